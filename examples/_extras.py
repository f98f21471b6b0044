"""Every script here imports this first: it says what to install where a package is missing, and ends."""

import sys
from importlib.util import find_spec

PACKAGES = ("matplotlib", "optuna", "PIL", "scipy", "sklearn")

if missing := ", ".join(package for package in PACKAGES if find_spec(package) is None):
    sys.exit(f'the examples need {missing}, not installed: pip install ".[examples]" in the folder of the repository')
