"""Every script here imports this first: it says what to install where a package is missing, and ends."""

import sys
from importlib.util import find_spec

PACKAGES = ("matplotlib", "platformdirs", "pooch", "PIL", "rich", "scipy", "sklearn", "typer")

if missing := ", ".join(package for package in PACKAGES if find_spec(package) is None):
    sys.exit(
        f'the benchmarks need {missing}, not installed: pip install ".[benchmarks]" in the folder of the repository'
    )
