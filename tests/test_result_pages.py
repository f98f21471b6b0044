"""The pages under docs/results that scripts of benchmarks/ and docs/results/publish.py make: from the numbers alone, and up to date."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

for package in ("matplotlib", "scipy", "sklearn"):
    pytest.importorskip(package, reason="needs the extra 'examples'")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    sys.path.insert(0, str(RESULTS))
    try:
        return importlib.import_module("publish")
    finally:
        sys.path.remove(str(RESULTS))


@pytest.mark.parametrize("name", ["floor", "judged_together", "logistic", "meta_gradient", "preconditioning", "shares"])
def test_page_of_a_benchmark_is_that_of_its_numbers(publish: ModuleType, name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == publish.BENCHMARKS[name](name, result)


def test_page_of_the_warm_starts_is_that_of_its_numbers(publish: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    warm_start = importlib.import_module("warm_start")
    assert (RESULTS / "warm_start.md").read_text() == warm_start.page(
        json.loads((RESULTS / "warm_start.json").read_text())
    )


@pytest.mark.parametrize(
    "name", ["omniglot_5w1s_cpu", "omniglot_5w1s_cpu_10000", "omniglot_5w1s_cpu_resumed", "omniglot_5w1s_cpu_solved"]
)
def test_page_of_a_run_is_that_of_its_numbers(publish: ModuleType, name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == publish.page(name, result)


def test_the_readme_has_the_numbers_of_the_run(publish: ModuleType) -> None:
    name = publish.IN_README
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert publish.readme_table(name, result) in (ROOT / "README.md").read_text()


def test_page_of_choices_is_that_of_its_numbers(publish: ModuleType) -> None:
    result = json.loads((RESULTS / "choices.json").read_text())
    assert not result["options"]["quick"] and len(result["problems"]) == 3
    assert (RESULTS / "choices.md").read_text() == publish.choices_page.page(result)


class TestChoosingSaysWhatWasMeasured:
    """The sentences of docs/choosing.md about the measurement, one by one."""

    PROBLEMS = json.loads((RESULTS / "choices.json").read_text())["problems"]

    def rows(self, problem: str, kind: str) -> dict[str, list[dict]]:
        methods = self.PROBLEMS[problem][kind]
        return {label: rows for label, rows in methods.items() if "refused" not in rows[0]}

    def times(self, problem: str, kind: str, error: float) -> dict[str, float]:
        """Milliseconds until the error; infinite where it was never reached."""
        found = {}
        for label, rows in self.rows(problem, kind).items():
            good = [row["milliseconds"] for row in rows if row["error"] is not None and row["error"] <= error]
            found[label] = min(good, default=float("inf"))
        return found

    def test_ill_conditioned_problems_need_curvature(self) -> None:
        rows = self.rows("penalties", "inner")
        for label in rows:
            if label.startswith(("GradientDescent", "TorchOptim")):
                assert rows[label][-1]["status"] == "MAX_STEPS" and rows[label][-1]["error"] > 0.45, label
        assert rows["NewtonCG, cg_steps=5"][-1]["status"] == "MAX_STEPS"
        times = self.times("penalties", "inner", 1e-2)
        assert min(times, key=times.get) == "NewtonCG, cg_rtol=0.1"
        for label in ("NesterovAGD", "LBFGS"):
            assert 2 < times[label] / times["NewtonCG, cg_rtol=0.1"] < float("inf")
        tight = self.times("penalties", "inner", 1e-6)
        assert tight["NesterovAGD"] == float("inf") > tight["LBFGS"]
        assert times["ScipyMinimize, L-BFGS-B"] < times["LBFGS"]

    @pytest.mark.parametrize("error", [1e-2, 1e-6])
    def test_well_conditioned_batches_forgive(self, error: float) -> None:
        times = self.times("few-shot", "inner", error)
        slow = {label for label, time in times.items() if time > 3 * min(times.values())}
        assert slow == {label for label in times if label.startswith(("GradientDescent", "TorchOptim"))}
        assert min(times, key=times.get).startswith("NewtonCG")

    @pytest.mark.parametrize("error", [1e-2, 1e-6])
    def test_jacobi_pays_where_the_diagonal_varies(self, error: float) -> None:
        varied, even = (self.times(name, "linear", error) for name in ("penalties", "few-shot"))
        assert varied["CG, Jacobi(num_probes=20)"] < 0.9 * varied["CG"]
        assert even["CG"] < even["CG, Jacobi(num_probes=20)"]
        assert even["CG"] < even["CG, NystromPreconditioner of rank d/10"]
        assert varied["CG, NystromPreconditioner of rank d/10"] > 0.9 * varied["CG"]

    def test_exact_is_for_one_problem_and_many_digits(self) -> None:
        assert (times := self.times("penalties", "linear", 1e-6))["Exact"] == min(times.values())
        assert (times := self.times("few-shot", "linear", 1e-6))["Exact"] > 3 * times["CG"]

    def test_neumann_and_nystrom_are_for_special_cases(self) -> None:
        for name in ("penalties", "few-shot"):
            times = self.times(name, "linear", 1e-2)
            assert times["Neumann"] > 10 * times["CG"] and times["Nystrom, of growing rank"] == float("inf")
            assert not any(
                "CONVERGED" in row["status"] for row in self.rows(name, "linear")["Nystrom, of growing rank"]
            )

    @pytest.mark.parametrize("error", [1e-2, 1e-6])
    def test_equations(self, error: float) -> None:
        inner, linear = self.times("equilibrium", "inner", error), self.times("equilibrium", "linear", error)
        for label in ("Anderson", "Newton, linsys=GMRES(rtol=0.1)"):
            assert inner[label] < min(inner["FixedPointIteration"], inner["Newton, Exact"])
        assert min(linear, key=linear.get) == "BiCGStab"

    def test_nothing_mends_a_point_that_is_not_solved(self) -> None:
        early = self.PROBLEMS["few-shot"]["early"]
        assert early["steps"] == 5 and early["indefinite"] == self.PROBLEMS["few-shot"]["tasks"]
        assert all(row["early"]["error"] is None or row["early"]["error"] > 0.5 for row in early["rows"].values())
        solved = {label: row["solved"]["error"] for label, row in early["rows"].items()}
        assert solved["`CG`"] < 1e-5
        assert min(solved[label] for label in ("`CG`, `damping=1.0`", "`CG`, `GaussNewton()`", "`Identity`")) > 0.45

    def test_how_tight(self) -> None:
        decades = {-1: 0, -2: 1, -3: 2, -4: 3, -6: 4, -8: 5}  # of the tolerance: its place in the grid
        numbers = json.loads((RESULTS / "choices.json").read_text())["options"]["grid"]
        assert numbers == pytest.approx([10**decade for decade in decades])
        a_tenth_is_enough = []
        for name, problem in self.PROBLEMS.items():
            errors = [row["errors"] for row in problem["grid"]["float64"]]
            inner = {decade: errors[row][-1] for decade, row in decades.items()}
            linear = {decade: errors[-1][column] for decade, column in decades.items()}
            assert all(linear[wanted] < 4 * 10**wanted for wanted in (-1, -2, -3, -4, -6)), name
            assert all(inner[wanted - 2] < 10**wanted for wanted in (-1, -2, -4, -6)), name
            a_tenth_is_enough += [inner[wanted - 1] < 10**wanted for wanted in (-1, -2, -3)]
            assert 3 < inner[-6] / 1e-6 < 30, name
            assert "CONVERGED" not in problem["grid"]["float32"][-1]["inner"]
        assert not all(a_tenth_is_enough)
        assert self.PROBLEMS["penalties"]["grid"]["float64"][1]["errors"][-1] > 0.3


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.note.txt")), ids=lambda path: path.name)
def test_notes_have_no_numbers(path: Path) -> None:
    """Numbers belong to the JSON. Names of files, experiments and presets may have digits."""
    words = re.sub(r"`[^`]*`|\]\([^)]*\)|\bE\d\b", "", path.read_text())
    assert not re.search(r"\d", words), words


@pytest.mark.parametrize(
    ("name", "options"), [("floor", ["--quick"]), ("judged_together", ["--trials", "2", "--outer-steps", "2"])]
)
def test_a_small_run_makes_a_page(publish: ModuleType, name: str, options: list[str], tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options, "--json", str(path)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    page = publish.BENCHMARKS[name](name, json.loads(path.read_text()))
    assert not re.search(r"\b(nan|inf|None)\b", page), page
    assert not list(tmp_path.glob("*/")), "it leaves nothing behind but its numbers"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("choices") / "choices.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "choices.py"), "--quick", "--json", str(path)],
        cwd=path.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_quick_choices_make_a_page_and_a_figure(publish: ModuleType, quick: dict, tmp_path: Path) -> None:
    page = publish.choices_page.page(quick)
    assert "quick run" in page and "benchmarks/choices.py --quick" in page
    assert not re.search(r"\b(nan|inf|None)\b", page), page
    publish.choices_page.draw(quick, tmp_path / "choices.png")
    assert (tmp_path / "choices.png").read_bytes().startswith(b"\x89PNG")


def test_quick_choices_agree_with_the_oracle(quick: dict) -> None:
    """The dense answer and the library's direct solver meet at rounding: two ways that share no code."""
    for name, problem in quick["problems"].items():
        assert problem["facts"]["residual of the oracle"] < 1e-12
        (exact,) = problem["linear"]["Exact"]
        assert exact["status"].endswith("CONVERGED") and exact["error"] < 1e-10, name


def test_quick_choices_name_what_the_library_refuses(quick: dict) -> None:
    """No known part of the Hessian, no symmetric matrix, nothing to minimise."""

    def refused(name: str, kind: str) -> set[str]:
        return {label for label, rows in quick["problems"][name][kind].items() if "refused" in rows[0]}

    assert refused("penalties", "linear") == {"Identity"} and not refused("few-shot", "linear")
    assert refused("equilibrium", "linear") == {"CG"}
    assert refused("equilibrium", "inner") == {"GradientDescent, backtracking"}


def test_a_tighter_linear_tolerance_is_more_accurate(quick: dict) -> None:
    for problem in quick["problems"].values():
        for label, rows in problem["linear"].items():
            errors = [
                row["error"] for row in rows if "CONVERGED" in row.get("status", "") and "MAX" not in row["status"]
            ]
            assert errors == sorted(errors, reverse=True), label


def test_the_words_of_the_readme_beside_other_libraries_are_those_of_the_numbers() -> None:
    def times(page: str, one: str, other: str) -> float:
        """How many times as long the one took."""
        rows = json.loads((RESULTS / f"{page}.json").read_text())["rows"]
        return rows[one]["milliseconds"] / rows[other]["milliseconds"]

    hand, compiled = "PyTorch by hand", "bilevel, compile=True"
    assert 0.45 < times("quadratic", compiled, hand) < 0.65  # about half
    assert 1.35 < times("quadratic", "bilevel", hand) < 1.65  # half as much again
    assert 1.35 < times("logistic", compiled, hand) < 1.65
    for page, jax in (("quadratic", "JAXopt, jitted"), ("logistic", "jaxopt")):
        assert 4.5 < times(page, compiled, jax) < 22.5


def test_a_page_names_the_peers_that_took_part(publish: ModuleType) -> None:
    pages = publish.peers_page
    assert pages.versions(["bilevel, compile=True", "PyTorch by hand", "JAXopt, jitted"]).startswith("Peers: jax 0.")
    found = pages.versions(["higher (MAML's gradient)", "TorchOpt, loop"])
    assert "higher" in found and "torchopt" in found and "jax" not in found and "betty" not in found
    assert "betty-ml" in pages.versions(["Betty"])
