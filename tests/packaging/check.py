"""Build the distributions, look at what is in them, and try the wheel in an environment that has nothing else.

    python tests/packaging/check.py [--keep FOLDER]

Run with an interpreter that has the extra `dev` (make package). Nothing is written into the repository: its files are copied first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REPOSITORY_ONLY = (".ci/", ".github/", ".gitignore")
PACKAGES = ("bilevel/", "applications/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="put the two distributions there")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory(prefix="bilevel-package-") as scratch:
        sdist, wheel = build(Path(scratch))
        try_wheel(wheel, Path(scratch))
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for built in (sdist, wheel):
                shutil.copy(built, keep)


def build(scratch: Path) -> tuple[Path, Path]:
    """The wheel is built from the source distribution, as a package index would offer it."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT, quiet=True)
    files = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for name in files:
        (scratch / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, scratch / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch / "dist", scratch / "source", quiet=True)
    (sdist,), (wheel,) = (scratch / "dist").glob("*.tar.gz"), (scratch / "dist").glob("*.whl")

    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    compare("the source distribution", packed - made, {n for n in files if not n.startswith(REPOSITORY_ONLY)})

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    compare("the wheel", packed, {name for name in files if name.startswith(PACKAGES)})
    print(f"ok: {sdist.name} ({sdist.stat().st_size / 1e6:.1f} MB), {wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB)")
    return sdist, wheel


def compare(what: str, packed: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - packed), sorted(packed - expected)
    if missing or extra:
        sys.exit(f"{what} lacks {missing} and has {extra}, which is not in the repository: see MANIFEST.in")


def try_wheel(wheel: Path, scratch: Path) -> None:
    away = scratch / "away"
    away.mkdir()
    for name in ("smoke.py", "downstream.py"):
        shutil.copy(HERE / name, away)
    venv.create(scratch / "environment", with_pip=True)
    python = scratch / "environment" / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt")
    if os.environ.get("TORCH_INDEX"):
        install = (*install, "--extra-index-url", os.environ["TORCH_INDEX"])

    run(*install, wheel, cwd=away, quiet=True)
    run(python, "-I", "smoke.py", "bare", cwd=away)
    cache = ("--cache-dir", scratch / "mypy")
    run(sys.executable, "-m", "mypy", "--strict", *cache, "--python-executable", python, "downstream.py", cwd=away)

    run(*install, f"{wheel}[meta-learning]", cwd=away, quiet=True)
    run(python, "-I", "smoke.py", "application", cwd=away)


def run(*command: str | Path, cwd: Path | None = None, quiet: bool = False) -> str:
    """Its output, which is shown where it fails, and where it is not quiet."""
    environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode or not quiet:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return done.stdout


if __name__ == "__main__":
    main()
