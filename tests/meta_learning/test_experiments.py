"""Every experiment, in its quick version: the files that it leaves, and what it measures against oracles of the test."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import bilevel
from applications.meta_learning import logs
from applications.meta_learning.cli import app
from applications.meta_learning.experiments import EXPERIMENTS, Experiment
from applications.meta_learning.experiments import e1_meta_gradient as e1
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.run import RunError

RUNNER = CliRunner()
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_quick_version(experiment: Experiment, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["experiment", experiment.name, "--quick", "--seed", "3", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / f"{experiment.name}.json").read_text())
    has_images = experiment.name not in (
        "e1_meta_gradient",
        "e3_complexity",
        "e6_sinusoid",
        "e7_failures",
        "e7_step_sizes",
    )
    data = " --data-dir OMNIGLOT" if has_images and os.environ.get("BILEVEL_OMNIGLOT") else ""
    assert stored["environment"]["command"] == f"imaml experiment {experiment.name} --quick --seed 3{data}"
    assert stored["quick"] and stored["seed"] == 3 and {"commit", "torch", "processor"} <= set(stored["environment"])
    assert (tmp_path / f"{experiment.name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / f"{experiment.name}.md").read_text()
    assert "quick run" in page and f"imaml experiment {experiment.name} --quick --seed 3" in page
    assert not re.search(r"\b(nan|inf|None)\b", page), page
    assert not (tmp_path / f"{experiment.name}.parts").exists()
    # the page is made from the JSON alone
    (tmp_path / f"{experiment.name}.md").unlink()
    experiment.publish(tmp_path / f"{experiment.name}.json")
    assert (tmp_path / f"{experiment.name}.md").read_text() == page


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_published_page_is_that_of_its_numbers(experiment: Experiment) -> None:
    stored = RESULTS / f"{experiment.name}.json"
    if not stored.exists():
        pytest.skip("not measured yet")
    numbers = json.loads(stored.read_text())
    assert not numbers["quick"]
    assert stored.with_suffix(".md").read_text() == experiment.page(numbers)


def test_without_a_repository_the_page_names_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from an installed package."""
    monkeypatch.setattr(logs, "_commit", lambda: None)
    (e3,) = [experiment for experiment in EXPERIMENTS if experiment.name.startswith("e3")]
    e3.record(tmp_path, quick=True, seed=0)
    page = (tmp_path / f"{e3.name}.md").read_text()
    assert f"bilevel {bilevel.__version__}, not from a repository." in page
    stored = json.loads((tmp_path / f"{e3.name}.json").read_text())["environment"]
    assert logs.provenance({**stored, "commit": "0123456789abcdef+changes"}).endswith(
        "commit `0123456789ab` with changes that were not committed"
    )


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    request = Request(quick=True, seed=0, data_dir=None, parts=tmp_path / "parts")
    assert request.part("one", lambda: {"x": 1}) == {"x": 1}

    def again() -> dict[str, int]:
        raise AssertionError("measured twice")

    assert request.part("one", again) == {"x": 1}
    with pytest.raises(ZeroDivisionError):
        request.part("two", lambda: {"x": 1 // 0})
    assert request.part("two", lambda: {"x": 2}) == {"x": 2}  # a part that failed is measured again


class Interrupted(Experiment):
    name, title, paper = "interrupted", "Interrupted", "not in it"
    divisor = 0

    def run(self, request: Request) -> Any:
        return request.part("one", lambda: {"x": 1}) | request.part("two", lambda: {"y": 1 // self.divisor})

    def draw(self, result: Any, path: Path) -> None:
        path.write_bytes(b"")

    def findings(self, result: Any) -> list[str]:
        return [str(result)]


def test_parts_are_those_of_the_same_data_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Interrupted()
    with pytest.raises(ZeroDivisionError):
        experiment.record(tmp_path, quick=False, seed=0)
    experiment.divisor = 1
    with pytest.raises(
        RunError, match=r"seed-0 holds parts of an interrupted run with other data, which .* another --out"
    ):
        experiment.record(tmp_path, quick=False, seed=0, data_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("inspect.getsource", lambda module: "an edited module")
        with pytest.raises(RunError, match="with other code"):
            experiment.record(tmp_path, quick=False, seed=0)
    part = tmp_path / "interrupted.parts" / "seed-0" / "one.json"
    part.write_text('{"x": 7}')
    stored = json.loads(experiment.record(tmp_path, quick=False, seed=0).read_text())
    assert stored["result"] == {"x": 7, "y": 1}  # it went on


def test_a_quick_run_leaves_whole_ones_as_they_are(tmp_path: Path) -> None:
    """Days of work may be in their parts."""
    experiment = Interrupted()
    with pytest.raises(ZeroDivisionError):
        experiment.record(tmp_path, quick=False, seed=1)
    experiment.divisor = 1
    experiment.record(tmp_path, quick=True, seed=0)
    part = tmp_path / "interrupted.parts" / "seed-1" / "one.json"
    assert part.exists() and not (tmp_path / "interrupted.parts" / "quick-seed-0").exists()
    path = experiment.record(tmp_path, quick=False, seed=0)
    assert part.exists()
    before = path.read_bytes()
    with pytest.raises(RunError, match="has the numbers of a whole run, which --quick would replace"):
        experiment.record(tmp_path, quick=True, seed=0)
    assert path.read_bytes() == before
    experiment.record(tmp_path, quick=False, seed=1)
    assert not (tmp_path / "interrupted.parts").exists()


@pytest.mark.parametrize("content", ['{"runs":', "[1]", ""])
def test_a_damaged_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "interrupted.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"interrupted.json: expected the numbers of an experiment in JSON"):
        Interrupted().record(tmp_path, quick=True, seed=0)


def test_list_and_unknown_name() -> None:
    listed = RUNNER.invoke(app, ["experiment"])
    assert listed.exit_code == 0 and "e1" in listed.output and "meta-gradient" in listed.output
    wrong = RUNNER.invoke(app, ["experiment", "e9"])
    words = " ".join(wrong.output.replace("│", " ").split())
    assert wrong.exit_code == 2 and "there is no experiment 'e9'" in words and "imaml experiment" in words


@pytest.mark.parametrize("spectrum", e1.SPECTRA)
def test_e1_problems_have_the_stated_condition_number(spectrum: str) -> None:
    task, _ = e1._tasks(spectrum, 3, seed=5)
    x = task["x"].numpy()
    h = np.swapaxes(x, 1, 2) @ x / e1.N + e1.LAM * np.eye(e1.D)
    values = np.linalg.eigvalsh(h)
    assert (values[:, 0] >= e1.LAM * (1 - 1e-12)).all()
    np.testing.assert_allclose(values[:, -1], e1.KAPPA * e1.LAM, rtol=1e-9)
    if spectrum != "Fourier features":
        np.testing.assert_allclose(values[:, 0], e1.LAM, rtol=1e-9)


def test_e1_exact_meta_gradient_by_finite_differences() -> None:
    task, theta = e1._tasks("uniform", 1, seed=5)
    x, y, xt, yt = (task[key][0].numpy() for key in ("x", "y", "x_test", "y_test"))

    def outer(centre: np.ndarray) -> float:
        phi = np.linalg.solve(x.T @ x / e1.N + e1.LAM * np.eye(e1.D), x.T @ y / e1.N + e1.LAM * centre)
        return 0.5 * float(np.mean((xt @ phi - yt) ** 2))

    start = theta.numpy()
    differences = [(outer(start + 1e-5 * e) - outer(start - 1e-5 * e)) / 2e-5 for e in np.eye(e1.D)]
    np.testing.assert_allclose(e1._exact(task, theta)[0].numpy(), differences, rtol=1e-6, atol=1e-7)


def test_e1_every_method_converges_to_the_exact_meta_gradient() -> None:
    """The paper's claim, and the figure's: 1e-6 after 1,000 steps with enough CG steps; at 20 steps iMAML below MAML."""
    task, theta = e1._tasks("uniform", 3, seed=6)
    exact, problem = e1._exact(task, theta), e1._problem(task)
    methods = {row["name"]: row for row in e1._methods(torch.float64)}
    for name, row in methods.items():
        found = e1._errors(row, 1000, problem, theta, task, exact)
        if not re.fullmatch(r"iMAML, \d+ CG steps", name):  # where these end is a matter of the spectrum
            assert found["error"] < 1e-6, name
        assert not found["violations"]
    at_20 = {name: e1._errors(methods[name], 20, problem, theta, task, exact)["error"] for name in (e1.MAML, e1.EXACT)}
    assert at_20[e1.EXACT] < at_20[e1.MAML]
