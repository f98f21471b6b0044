"""Every example runs at its small size, quietly, draws its figure, and what it claims holds. Its page is up to date with its words."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("matplotlib", "optuna", "sklearn"):
    pytest.importorskip(package, reason="needs the extra 'examples'")

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("[!_]*.py") if path.name != "render.py")


def stem(path: Path) -> str:
    return path.stem


def row(report: str, name: str) -> list[float]:
    """The numbers of the first line that begins with this name."""
    line = next(line for line in report.splitlines() if line.strip().startswith(name))
    return [
        float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?", line.replace(name, "", 1))
    ]


def penalties(report: str) -> None:
    """The gradient finds penalties that are much better on the validation data than what the others find in the same time."""
    losses = {name: row(report, name)[2] for name in ("shared penalty", "random search", "Optuna", "hypergradient")}
    assert losses.pop("hypergradient") < 0.85 * min(losses.values())


def influence(report: str) -> None:
    """The error of a Taylor polynomial of order k, relative to the change, falls like step^k: tenfold, hundredfold."""
    first, second = row(report, "first derivative"), row(report, "first and second")
    assert 7 < first[1] / first[2] < 14
    assert 50 < second[1] / second[2] < 200
    assert row(report, "and the second derivative")[0] < 0.7 * row(report, "effects of the two, added")[0]


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]\d+)?", line)]


def lasso(report: str) -> None:
    """By gradient one arrives where the path of 100 penalties arrives."""
    line = next(line for line in report.splitlines() if line.startswith("lasso by gradient"))
    assert max(map(abs, numbers(line.split(":")[1]))) < 1e-3


def cleaning(report: str) -> None:
    """Where the wrong labels have a system, the learned weights find more of them than the losses of a plain fit."""
    lines = report.split("systematic")[-1].splitlines()
    found = {line[:32].strip(): numbers(line[32:]) for line in lines[2:] if line[32:].strip()}
    assert found["learned weight"][0] > found["loss of a plain fit"][0] + 10


def black_box(report: str) -> None:
    """The gradient is that of refits, and it lowers the loss of the cross-validation."""
    difference, size = numbers(next(line for line in report.splitlines() if line.startswith("largest difference")))
    assert difference < 1e-6 * size
    best = {line[:24].strip(): numbers(line[24:]) for line in report.splitlines()}
    assert best["L-BFGS-B, our gradient"][1] < best["equal scales"][1]


def equilibrium(report: str) -> None:
    """The gradient is as good as the solves are. That of many plain steps is wrong, and needs more memory."""
    solved, exact, plain = (row(report, name) for name in ("solved, as in training", "solved to 1e-10", "k = 100"))
    assert solved[0] < 1e-2 < 0.1 < plain[0]
    assert exact[0] < 1e-8
    assert plain[1] > 2 * solved[1]


def few_shot(report: str) -> None:
    """A few meta-steps make the network better at classes that it has never seen."""
    untrained, imaml = row(report, "not meta-trained")[0], row(report, "iMAML")[2]
    assert imaml > untrained + 3


def learned_regularisation(report: str) -> None:
    """The start is too large: the learned number goes down from it, in every run."""
    assert max(row(report, "a number    ")) < 1.9


# What the output of an example must say at the small size too. An example that is not named here is only run.
CLAIMS: dict[str, Callable[[str], None]] = {
    "black_box": black_box,
    "cleaning": cleaning,
    "equilibrium": equilibrium,
    "few_shot": few_shot,
    "influence": influence,
    "lasso": lasso,
    "learned_regularisation": learned_regularisation,
    "penalties": penalties,
}


def code_of_the_page(script: Path) -> str:
    """What a reader copies: the lines that the page includes."""
    page = (ROOT / "docs" / "examples" / f"{script.stem}.md").read_text()
    first, last, onwards = map(int, re.search(r":lines: (\d+)-(\d+),(\d+)-\n", page).groups())
    lines = script.read_text().splitlines()
    return "\n".join([*lines[first - 1 : last], *lines[onwards - 1 :], ""])


@pytest.mark.parametrize("script", EXAMPLES, ids=stem)
def test_runs_and_keeps_its_claim(script: Path, tmp_path: Path) -> None:
    """As copied from its page into an empty folder."""
    copied = tmp_path / script.name
    copied.write_text(code := code_of_the_page(script))
    page = (ROOT / "docs" / "examples" / f"{script.stem}.md").read_text()
    for name in re.findall(r"^from (\w+) import", code, re.MULTILINE):
        beside = ROOT / "examples" / f"{name}.py"
        if beside.exists():  # and the page shows it, or links to the page that does
            text, shown = (
                (beside.read_text(), f"../../examples/{name}.py")
                if name.startswith("_")
                else (code_of_the_page(beside), f"]({name}.md)")
            )
            assert shown in page
            (tmp_path / beside.name).write_text(text)
    done = subprocess.run(
        [sys.executable, str(copied), "--quick", "--out", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip()
    assert (tmp_path / f"{script.stem}.png").read_bytes().startswith(b"\x89PNG")
    CLAIMS.get(script.stem, lambda report: None)(done.stdout)


@pytest.mark.parametrize("script", EXAMPLES, ids=stem)
def test_has_a_page_with_its_words_and_its_numbers(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python examples/render.py NAME`` writes it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    import render

    module = ast.parse(script.read_text())
    title, text = (ast.get_docstring(module) or "").split("\n\n", 1)
    title = " ".join(title.split()).removesuffix(".")
    page = (ROOT / "docs" / "examples" / f"{script.stem}.md").read_text()
    assert page.startswith(f"# {title}\n\n{text}\n")
    assert code_of_the_page(script) == "".join(
        line + "\n"
        for line in script.read_text().splitlines()[module.body[1].lineno - 1 :]
        if not line.startswith("import _extras")
    )
    assert f"<!-- code {render.fingerprint(script)} -->" in page, "the code has changed since the page was made"
    assert f"]({script.stem}.md)" in (ROOT / "docs" / "examples" / "index.md").read_text()


def test_claims_are_of_examples_that_exist() -> None:
    assert set(CLAIMS) <= set(map(stem, EXAMPLES))
