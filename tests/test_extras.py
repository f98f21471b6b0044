"""Optional parts say what to install where a package is missing, and the extras of pyproject.toml name all that they need.

`imaml`, `bilevel.testing.strategies` and `ScipyMinimize` are tried in an environment without anything by tests/packaging.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # where a package is imported by another name
SCRIPTS = [
    path
    for folder in ("benchmarks", "examples")
    for path in sorted((ROOT / folder).glob("[!_]*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]


def modules_of(extra: str) -> set[str]:
    """Those that `pip install ".[extra]"` brings, without what every installation has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = set()
    for requirement in extras[extra]:
        name = re.match(r"[\w-]+", requirement)[0]
        if name == "bilevel":
            for other in re.search(r"\[(.*)\]", requirement)[1].split(","):
                found |= modules_of(other)
        else:
            found.add(MODULES.get(name, name))
    return found


def imported(path: Path) -> set[str]:
    """The packages that are neither Python's, nor the library's own requirements, nor files of this repository."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    here = {other.stem for other in path.parent.glob("*.py")} | {"bilevel", "applications", "peers"}
    return {name.split(".")[0] for name in names} - here - {"torch", "numpy"} - sys.stdlib_module_names


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_the_extra_has_what_the_scripts_import(folder: str) -> None:
    found = modules_of(folder)
    for path in (ROOT / folder).glob("*.py"):
        assert imported(path) <= found, path.name
    application = {name for path in (ROOT / "applications").rglob("*.py") for name in imported(path)}
    assert application <= found


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if imported(path)], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_script_says_what_to_install(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every package that it needs is missing; the first one that it imports is named, in the place of a traceback."""
    needed = imported(script)
    for name in {*needed, *(name for name in sys.modules if name.partition(".")[0] in needed)}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("extras", "_extras", *(path.stem for path in script.parent.glob("*.py"))):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(ModuleNotFoundError) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    sys.excepthook(stopped.type, stopped.value, stopped.tb)
    said, where = capsys.readouterr().err, script.parent.name
    missing = re.fullmatch(
        rf'(\w+) is not installed: pip install "\.\[{where}\]" in the folder of the repository\n', said
    )
    assert missing is not None and missing[1] in needed


@pytest.mark.parametrize("name", ["benchmarks/extras.py", "examples/_extras.py"])
def test_other_errors_are_shown_as_usual(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    runpy.run_path(str(ROOT / name))
    error = ValueError("no")
    sys.excepthook(ValueError, error, None)
    assert shown == [(ValueError, error, None)]


def test_the_pages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("sphinx.errors", reason="needs the extra 'docs'")
    monkeypatch.setitem(sys.modules, "myst_parser", None)
    with pytest.raises(errors.ConfigError, match=r'need myst_parser, which is not installed: pip install "\.\[docs'):
        runpy.run_path(str(ROOT / "docs" / "conf.py"))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import turns

    return turns


def test_an_environment_of_peers_is_looked_at_first(turns: Any, tmp_path: Path) -> None:
    turns.has_peers(sys.executable, ["torch"], "peers")
    remedy = r"make the environment as benchmarks/peers/README.md says \(extra 'peers'\) and name its bin/python"
    with pytest.raises(SystemExit, match=rf"{re.escape(sys.executable)} has no not_a_peer, nor_this; {remedy}"):
        turns.has_peers(sys.executable, ["torch", "not_a_peer", "nor_this"], "peers")
    with pytest.raises(SystemExit, match=rf"expected a Python interpreter, .*absent does not run .*; {remedy}"):
        turns.has_peers(str(tmp_path / "absent"), ["torch"], "peers")


@pytest.mark.parametrize("extra", ["peers", "peers-jax"])
def test_the_extras_of_peers_are_exact(extra: str) -> None:
    """A comparison is with one version."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all("==" in requirement or requirement.startswith("scipy") for requirement in extras[extra])
