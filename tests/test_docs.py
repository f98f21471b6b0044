"""What README and the pages show: python blocks run, make targets and imaml commands exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

import bilevel

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
WITH_CODE = [page for page in PAGES if re.search(r"^ *```+python$", page.read_text(), re.MULTILINE)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.join(shlex.split(line, comments=True)) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


COMMANDS = [(name(page), line) for page in PAGES for line in shell_lines(page)]


def test_the_pages_that_teach_by_code_have_code() -> None:
    assert {"README.md", "docs/concepts.md", "docs/choosing.md", "docs/extending.md"} <= set(map(name, WITH_CODE))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_blocks_run(page: Path) -> None:
    """Top to bottom in one namespace, as a reader would paste them; one test per page, so that the order is kept."""
    document = Sybil(parsers=[PythonCodeBlockParser()], path=str(page.parent)).parse(page)
    examples = list(document.examples())
    assert len(examples) == len(re.findall(r"^ *```+python$", page.read_text(), re.MULTILINE))
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), target


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if line.startswith("make ")}))
def test_make_targets_exist(line: str) -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    words = [word for word in shlex.split(line)[1:] if "=" not in word]
    assert words and set(words) <= targets


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if line.startswith("imaml ")}))
def test_imaml_commands_parse(line: str) -> None:
    """The sub-command exists and takes these options with these values. Not run: some of them train for hours."""
    typer = pytest.importorskip("typer", reason="needs the extra 'meta-learning'")
    from applications.meta_learning.cli import app

    program = typer.main.get_command(app)
    command, *arguments = shlex.split(line)[1:]
    context = typer.Context(program, info_name="imaml")
    found = program.get_command(context, command)
    assert found is not None, f"imaml has no sub-command {command!r}"
    if "--help" not in arguments:
        found.make_context(command, arguments, parent=context)


def test_commands_in_the_pages_are_of_a_kind_that_is_checked() -> None:
    unchecked = [pair for pair in COMMANDS if not pair[1].startswith(("make ", "imaml "))]
    assert not unchecked


def test_every_public_name_is_in_the_interface_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for module in (bilevel, bilevel.solvers, bilevel.linsys, bilevel.curvature):
        assert f".. automodule:: {module.__name__}\n" in page
        for public in module.__all__ if hasattr(module, "__all__") else ():
            assert getattr(getattr(module, public), "__doc__", None), f"{module.__name__}.{public} has no docstring"
