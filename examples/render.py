"""Run examples at full size and write their pages.

    python examples/render.py [NAME ...]

Runs examples/NAME.py (all of them without a name) on one thread and writes docs/examples/NAME.md, docs/examples/NAME.png and the list
docs/examples/index.md. The first paragraph of a docstring is the title of the page, the rest its text, in Markdown. What the page says
of the outcome is what the example printed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import torch

from applications.meta_learning.logs import environment

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "examples"
INDEX = """\
# Examples

Each is one script, written with the public interface only. It prints what you see on its page and ends with a comparison. The
tests run all of them at a small size (`--quick`); the pages are from the full size. What they need beyond the library is the extra
`examples`: `pip install ".[examples]"` in a checkout.

{entries}

```{{toctree}}
:hidden:
:glob:

*
```
"""
PAGE = """\
# {title}

{text}

```text
{printed}
```

![{title}]({name}.png)

<!-- code {code} -->

Command: `python examples/{name}.py`, {seconds:.0f} seconds of processor time on one thread. Hardware: {processor}; torch
{torch}, Python {python}.

## The code

```{{literalinclude}} ../../examples/{name}.py
:language: python
:lines: {lines}
```
{beside}"""
GLYPHS = """
It imports `_glyphs.py`, which lies beside it:

```{literalinclude} ../../examples/_glyphs.py
:language: python
```
"""


def examples() -> list[Path]:
    """The scripts, in alphabetical order. What begins with an underscore is shared by some of them."""
    return sorted(path for path in HERE.glob("[!_]*.py") if path.name != Path(__file__).name)


def heading(script: Path) -> tuple[str, str, str]:
    """The title, the text, and the lines of the code below the docstring, without the one that looks for missing packages: so what
    is copied from the page runs by itself.
    """
    module = ast.parse(script.read_text())
    first = module.body[1].lineno
    (skipped,) = [
        node.lineno for node in module.body if isinstance(node, ast.Import) and node.names[0].name == "_extras"
    ]
    docstring = ast.get_docstring(module)
    if docstring is None or "\n\n" not in docstring:
        raise ValueError(f"{script.name}: expected a docstring: the title, an empty line, the text of the page.")
    title, text = docstring.split("\n\n", 1)
    return " ".join(title.split()).removesuffix("."), text, f"{first}-{skipped - 1},{skipped + 1}-"


def fingerprint(script: Path) -> str:
    """Of the statements that make the numbers: words, imports and layout may change."""
    module = ast.parse(script.read_text())
    kept = [
        node for node in module.body[1:-1] if not isinstance(node, ast.Import | ast.ImportFrom)
    ]  # the last one parses options
    for node in ast.walk(ast.Module(kept, [])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(repr(_written(kept)).encode()).hexdigest()[:16]


def _written(node: object) -> object:
    """A tree of lists and strings that every version of Python makes the same, as ``ast.unparse`` and ``ast.dump`` do not."""
    if isinstance(node, list):
        return [_written(one) for one in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        [name, _written(value)] for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"
    ]
    return [type(node).__name__, *fields]


def processor_seconds() -> float:
    """Of all the examples that have run: a busy machine does not change it much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def render(script: Path) -> None:
    """Run one example and write its page and figure."""
    title, text, lines = heading(script)
    command = [sys.executable, str(script), "--out", str(PAGES)]
    before = processor_seconds()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    seconds = processor_seconds() - before
    if done.returncode or done.stderr:
        raise SystemExit(f"{script.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    facts = environment(torch.device("cpu"))
    page = PAGE.format(
        title=title,
        text=text,
        printed=done.stdout.rstrip(),
        name=script.stem,
        seconds=seconds,
        lines=lines,
        beside=GLYPHS if "from _glyphs import" in script.read_text() else "",
        code=fingerprint(script),
        **{key: facts[key] for key in ("processor", "torch", "python")},
    )
    (PAGES / f"{script.stem}.md").write_text(page)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the name of an example; all without one")
    names = parser.parse_args().names
    PAGES.mkdir(exist_ok=True)
    for script in [HERE / f"{name}.py" for name in names] or examples():
        print(script.stem, flush=True)
        render(script)
    rendered = [script for script in examples() if (PAGES / f"{script.stem}.md").exists()]
    entries = "\n".join(f"- [{heading(script)[0]}]({script.stem}.md)" for script in rendered)
    (PAGES / "index.md").write_text(INDEX.format(entries=entries))


if __name__ == "__main__":
    main()
