"""E6: its numbers against NumPy and SciPy, its search against made-up errors."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from applications.meta_learning.config import Config
from applications.meta_learning.data import SinusoidSampler
from applications.meta_learning.experiments import e6_sinusoid as e6
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.logs import write_json
from applications.meta_learning.tasks import TEST_SEED_OFFSET, load_source
from applications.meta_learning.train import Trainer
from tests.meta_learning.tiny import SINUSOID

FACTOR = 4


def request(tmp_path: Path, *, quick: bool = True) -> Request:
    return Request(quick=quick, seed=0, data_dir=None, parts=tmp_path)


def forward(theta: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, ...]:
    w0, b0, w1, b1, w2, b2 = theta
    first = np.maximum(x @ w0.T + b0, 0)
    second = np.maximum(first @ w1.T + b1, 0)
    return first, second, second @ w2.T + b2


def slopes(theta: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Back-propagation by hand of the mean squared error."""
    first, second, out = forward(theta, x)
    d_out = 2 * (out - y) / len(x)
    d_second = d_out @ theta[4] * (second > 0)
    d_first = d_second @ theta[2] * (first > 0)
    return [d_first.T @ x, d_first.sum(0), d_second.T @ first, d_second.sum(0), d_out.T @ second, d_out.sum(0)]


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_curve_is_that_of_gradient_descent_in_numpy(lam: float, tmp_path: Path) -> None:
    config = replace(
        SINUSOID,
        dtype="float64",
        algorithm="imaml" if lam else "first-order",
        lam=lam,
        inner_step_size=0.02,
        outer_steps=2,
        eval_interval=1,
        seed=4,
    )
    found = e6.trained(request(tmp_path), "run", config, tasks=3)
    trainer = Trainer(config, load_source(config))
    for _ in range(2):
        trainer.meta_step()
    names = [f"{layer}.{kind}" for layer in ("body.0", "body.2", "head") for kind in ("weight", "bias")]
    theta = [trainer.theta[name].detach().numpy() for name in names]
    sampler = SinusoidSampler(
        shots=5,
        query_shots=e6.QUERY_SHOTS,
        seed=4 + 10_000 + TEST_SEED_OFFSET,
        device="cpu",
        dtype=trainer.theta["head.bias"].dtype,
    )
    data = sampler.sample(3)
    for point in found["curve"]:
        errors = []
        for task in range(3):
            x, y, xq, yq = (data[part][key][task].numpy() for part in ("support", "query") for key in ("x", "y"))
            phi = [leaf.copy() for leaf in theta]
            for _ in range(point["steps"]):
                phi = [p - 0.02 * (g + lam * (p - t)) for p, g, t in zip(phi, slopes(phi, x, y), theta, strict=True)]
            errors.append(np.mean((forward(phi, xq)[-1] - yq) ** 2))
        assert point["mean"] == pytest.approx(np.mean(errors), rel=1e-9)
        assert point["interval"] == pytest.approx(1.96 * np.std(errors, ddof=1) / 3**0.5, rel=1e-9)
    assert [point["step"] for point in found["training"]] == [1, 2]


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends as one that was not interrupted, in every number but its time."""
    config = replace(SINUSOID, outer_steps=6, eval_interval=2, checkpoint_interval=2, seed=3)
    whole = e6.trained(request(tmp_path / "whole"), "run", config, tasks=3)
    steps, take = [], Trainer.meta_step

    def one_step(self: Trainer) -> Any:
        steps.append(self.progress.step)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    monkeypatch.setattr(Trainer, "meta_step", one_step)
    with pytest.raises(KeyboardInterrupt):
        e6.trained(request(tmp_path / "parts"), "run", config, tasks=3)
    assert steps == [0, 1, 2, 3]
    found = e6.trained(request(tmp_path / "parts"), "run", config, tasks=3)
    assert steps == [0, 1, 2, 3, 4, 5]
    del whole["seconds_per_step"], found["seconds_per_step"]
    assert found == whole and [point["step"] for point in found["training"]] == [2, 4, 6]


def with_search(folder: Path, row: str, errors: list[float | None], finals: dict[int, float | None]) -> None:
    """Results on disk: of the short runs, and of the long ones of the candidates with these numbers."""
    short = [(candidate, error, e6.SEARCH_STEPS) for candidate, error in zip(e6.GRID[row], errors, strict=True)]
    long = [(e6.GRID[row][i], error, e6.OUTER_STEPS) for i, error in finals.items()]
    for candidate, error, steps in short + long:
        write_json(folder / f"{e6.part_name(row, candidate, steps)}.json", {"error": error, "failed_tasks": 0})


def test_search_takes_the_best_of_each_rate_to_full_length(tmp_path: Path) -> None:
    grid = e6.GRID["gd"]
    rates = [candidate["outer_rate"] for candidate in grid]
    assert rates[0] == rates[2] != rates[1] == rates[3]
    # number 3 is the best of the short runs, and not of the long ones; 0 failed
    with_search(tmp_path, "gd", [None, 0.5, 0.3, 0.2, 0.9, 0.9], {2: 0.1, 3: 0.4})
    found = e6.E6()._search(request(tmp_path, quick=False), "gd")
    assert found["chosen"] == grid[2] and [one["error"] for one in found["finals"]] == [0.1, 0.4]
    assert [one["error"] for one in found["tried"]] == [None, 0.5, 0.3, 0.2, 0.9, 0.9]


def test_search_in_which_nothing_can_be_trained(tmp_path: Path) -> None:
    with_search(tmp_path, "maml", [None] * len(e6.GRID["maml"]), {0: None, 1: None})
    with pytest.raises(RuntimeError, match=r"^MAML: no candidate of the search could be trained$"):
        e6.E6()._search(request(tmp_path, quick=False), "maml")


def test_a_candidate_that_cannot_be_trained_has_no_error() -> None:
    config = replace(
        SINUSOID, inner_step_size=1e12, inner_steps=10, algorithm="first-order", max_failed_steps=2, outer_steps=4
    )
    found = e6.searched(config)
    assert found["error"] is None and found["failed_tasks"] == 2 * config.meta_batch


def test_reported_runs_have_other_seeds_than_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: dict[str, list[Any]] = {"searched": [], "trained": []}
    for name in configs:

        def record(*arguments: Any, name: str = name) -> dict[str, Any]:
            configs[name] += [one for one in arguments if isinstance(one, Config)]
            return {"error": 1.0, "failed_tasks": 0}

        monkeypatch.setattr(e6, name, record)
    result = e6.E6().run(request(tmp_path, quick=False))
    searched, reported = ({c.seed for c in configs[name]} for name in ("searched", "trained"))
    lengths = [c.outer_steps for c in configs["searched"]]
    assert lengths.count(e6.SEARCH_STEPS) == sum(map(len, e6.GRID.values()))
    assert lengths.count(e6.OUTER_STEPS) == len(e6.ROWS) * len(e6.RATES)
    assert reported == {0, 1, 2} and not searched & reported
    steps = [run["factor"] for run in result["runs"]]
    lengths = 2 * [1, *e6.LONGER]
    assert all(steps.count(factor) == len(e6.ROWS) * 3 * lengths.count(factor) for factor in {*lengths, *steps})
    factors = (*lengths, e6.LONGEST)
    assert {c.outer_steps for c in configs["trained"]} == {n * e6.OUTER_STEPS for n in factors}
    longest = [c for c in configs["trained"] if c.outer_steps == e6.LONGEST * e6.OUTER_STEPS]
    assert [one["row"] for one in result["longest"]] == list(e6.ROWS) and {c.seed for c in longest} == {0}
    assert {c.shots for c in longest} == {10}
    for k in (5, 10):
        for factor in (1, *e6.LONGER):
            seeds = [c.seed for c in configs["trained"] if (c.shots, c.outer_steps) == (k, factor * e6.OUTER_STEPS)]
            assert sorted(seeds) == sorted(len(e6.ROWS) * [0, 1, 2])
    assert {c.meta_batch for c in configs["trained"]} == {25} and {c.channels for c in configs["trained"]} == {40}
    again = configs["trained"].copy()
    e6.E6().run(request(tmp_path, quick=False))  # all parts are there
    assert configs["trained"] == again


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.5], [0.3, 0.1]])
def test_interval_is_that_of_student(values: list[float]) -> None:
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert e6.half_width(values) == pytest.approx((high - low) / 2, rel=1e-4)
    assert e6.half_width(values[:1]) is None


def made_up(row: str, seed: int, errors: tuple[float, float], factor: int = 1) -> dict[str, Any]:
    points = [{"steps": s, "mean": m, "interval": 0.1, "failed": 0} for s, m in zip((1, 10), errors, strict=True)]
    training = [{"step": 5 * factor, "error": 2.0}, {"step": 10 * factor, "error": 1.0 / factor}]
    return {
        "row": row,
        "shots": 5,
        "seed": seed,
        "factor": factor,
        "outer_steps": 10 * factor,
        "curve": points,
        "training": training,
    }


def test_comparison_counts_what_the_numbers_say() -> None:
    runs = [made_up(row, seed, (1.0 + 0.01 * seed, 1.0)) for row in e6.ROWS for seed in range(3)]
    for run in runs:
        if run["row"] == "gd":  # clearly lower after 1 step, higher after 10 in one seed and lower in another
            run["curve"][0]["mean"] -= 0.5
            run["curve"][1]["mean"] += (0.4, -0.1, 0.0)[run["seed"]]
    lines = e6._comparison({"runs": runs})
    line = next(line for line in lines if "gradient descent against MAML" in line)
    assert "lower error at 1 of 2 numbers of steps (1)" in line and "below 0 at 1, above 0 at 0." in line
    other = next(line for line in lines if "Hessian-free against MAML" in line)
    assert "lower error at 0 of 2 numbers of steps;" in other and "below 0 at 0, above 0 at 0." in other


def test_convergence_says_what_the_longer_training_gained() -> None:
    settings = {row: {"inner_steps": 1} for row in e6.ROWS}
    short = [made_up(row, seed, (3.0 + seed, 1.0 + seed)) for row in e6.ROWS for seed in range(3)]
    gains = dict(zip(e6.ROWS, (0.5, 0.6, 0.7, 0.9, 0.8), strict=True))
    long = [made_up(row, seed, (2.0, (1.0 + seed) * gains[row]), FACTOR) for row in e6.ROWS for seed in range(3)]
    other = [{**run, "shots": 10} for run in short]  # not trained longer
    verdict, lines = (
        e6._verdict({"runs": short + long + other}),
        e6._convergence({"runs": short + long + other, "settings": settings}),
    )
    assert verdict[0].startswith("**Had it converged?**") and lines[: len(verdict)] == verdict
    lines = lines[len(verdict) :]
    assert (
        "after 10 outer steps and after 40," in lines[0]
        and "gains between 10 and 50 % of the error of an algorithm" in lines[0]
    )
    assert "the change is clear of 0 for 0 of 5 algorithms" in lines[0]  # 2 ± 2.5 in the units of each
    assert "Single seeds end at between 50 and 90 % of their error after the shorter training" in lines[0]
    steady = [made_up("fo", r["seed"], (2.0, 0.5 + r["seed"]), FACTOR) if r["row"] == "fo" else r for r in long]
    assert "clear of 0 for 1 of 5 algorithms" in "".join(
        e6._convergence({"runs": short + steady, "settings": settings})
    )
    logs = np.log([*gains.values()])
    together = (
        f"{np.exp(logs.mean()):.2f} times that after the shorter training (geometric mean; 95 % interval over the seeds"
    )
    assert f"the error is {together} {np.exp(logs.mean()):.2f} to {np.exp(logs.mean()):.2f})." in lines[0]
    width = e6.half_width([1.0, 2.0, 3.0])
    change = f"-1 ± {width / 2:.2g}"  # of 1, 2, 3 to 0.5, 1, 1.5: -0.5, -1, -1.5
    assert f"| MAML | 1 | 4 ± {width:.2g} | 2 ± 0 | 2 ± {width:.2g} | 1 ± {width / 2:.2g} | {change} |" in lines
    assert "the order of the algorithms there is not the same after both" in lines[0]  # equal before, and then not
    assert (
        lines[-2].startswith("The rate goes down to 0")
        and sum("What longer training gains" in line for line in lines) == 1
    )
    assert e6._convergence({"runs": short, "settings": settings}) == []
    both = e6._convergence(
        {"runs": short + long + other + [{**run, "shots": 10} for run in long], "settings": settings}
    )
    told = [line for line in both if "What longer training gains" in line]
    assert len(told) == 2 and "K = 5," in told[0] and "K = 10," in told[1]
    middle = [made_up(row, seed, (2.0, (1.0 + seed) * 0.95), 2) for row in e6.ROWS for seed in range(3)]
    steps = [
        line for line in e6._convergence({"runs": long + middle + short, "settings": settings}) if "What longer" in line
    ]
    assert ["after 10 outer steps and after 20," in line for line in steps] == [True, False]
    assert ["after 20 outer steps and after 40," in line for line in steps] == [False, True]
    assert "gains between 5 and 5 %" in steps[0] and "gains between 5 and 47 %" in steps[1]


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ((0.5, 0.55, 0.6), "still falling"),
        ((2.0, 1.7, 1.9), "rising"),
        ((0.5, 2.1, 1.0), "no change that 3 seeds can show"),
        ((0.5,), "one seed cannot tell"),
    ],
)
def test_the_verdict_is_that_of_the_last_lengthening(factors: tuple[float, ...], verdict: str) -> None:
    """The first lengthening gained much, which tells nothing of the second."""
    ends = [(seed, 1.0, 0.01, 0.01 * factor) for seed, factor in enumerate(factors)]
    runs = [
        made_up(row, seed, (9.0, error), n)
        for row in e6.ROWS
        for seed, *errors in ends
        for n, error in zip((1, 2, 4), errors, strict=True)
    ]
    other = [{**made_up(row, seed, (9.0, 1.0)), "shots": 10} for row in e6.ROWS for seed in range(len(factors))]
    longest = [
        {**made_up(row, 0, (9.0, 0.25), e6.LONGEST), "shots": 10} for row in e6.ROWS
    ]  # 1 before, of the same seed
    line, last = (line for line in e6._verdict({"runs": runs + other, "longest": longest}) if line.startswith("- K"))
    assert last.startswith("- K = 10, from 10 to 160 outer steps: the error is 0.25 times that after")
    assert last.endswith("(geometric mean, one seed): the only one that says whether 10 were enough, and of one seed.")
    mean = np.exp(np.log(factors).mean())
    assert line.startswith(f"- K = 5, from 20 to 40 outer steps: the error is {mean:.2f} times that after")
    assert line.endswith(f": {verdict}.")


def test_the_factor_of_all_algorithms_has_the_interval_of_the_seeds() -> None:
    own = np.arange(5)[:, None]  # what differs between the algorithms does not widen it
    logarithms = own + np.random.default_rng(0).normal(size=(5, 3))
    by_seed = logarithms.mean(0)
    low, high = scipy.stats.t.interval(0.95, 2, loc=by_seed.mean(), scale=scipy.stats.sem(by_seed))
    assert e6._times(logarithms.tolist()) == (
        f"{np.exp(by_seed.mean()):.2f} times that after the shorter training (geometric mean; 95 % interval over the seeds "
        f"{np.exp(low):.2f} to {np.exp(high):.2f})"
    )


def test_a_run_without_end_says_with_which_power_the_error_falls() -> None:
    """Of the last stretch: errors 2, 1.5, 1 and 1/2 after 10, 20, 40 and 160, which is a power of -1/2."""
    settings = {"hf": {"inner_steps": 1}}
    ends = {1: 2.0, 2: 1.5, FACTOR: 1.0}
    runs = [made_up("hf", s, (9.0, end + s), factor) for s in range(3) for factor, end in ends.items()]
    runs, longest = (
        [{**run, "shots": 10} for run in some] for some in (runs, [made_up("hf", 0, (9.0, 0.5), e6.LONGEST)])
    )
    result = {"runs": [run for run in runs if run["row"] == "hf"], "longest": longest}
    assert e6._logarithms_of_longest(result) == [[pytest.approx(np.log(0.5 / 1.0))]]
    lines = e6._longest({"runs": runs, "settings": settings, "longest": longest})
    absent = "MAML, first-order MAML, Reptile, iMAML, gradient descent"
    words = f"one seed, 160 outer steps ({absent}: not run so long); the error after 10 inner steps."
    assert words in lines[0] and "from 40 to 160" in lines[0]
    assert lines[-2] == "| iMAML, Hessian-free | 2 | 1.5 | 1 | 0.5 | -0.50 |"
    assert "the error is 0.50 times that after the shorter training (geometric mean, one seed)." in lines[0]
    assert e6._longest({"runs": runs, "settings": settings}) == []


def test_the_longest_training_is_reported() -> None:
    short = [made_up(row, seed, (3.0, 1.0)) for row in e6.ROWS for seed in range(3)]
    long = [made_up(row, seed, (2.0, 0.5), FACTOR) for row in e6.ROWS for seed in range(3)]
    other = [{**made_up(row, seed, (7.0, 6.0)), "shots": 10} for row in e6.ROWS for seed in range(3)]
    result = {"runs": short + long + other}
    assert e6.select(result, "gd", 5) == [run for run in long if run["row"] == "gd"]
    assert e6.select(result, "gd", 5, 1) == [run for run in short if run["row"] == "gd"]
    assert e6.select(result, "gd", 10) == [run for run in other if run["row"] == "gd"]
    text = "\n".join(e6._errors(result))
    assert "| MAML | 2 ± 0 | 0.5 ± 0 |" in text and "| MAML | 7 ± 0 | 6 ± 0 |" in text and "| 3 ±" not in text


def test_inner_solves_are_told_by_their_gradient_and_by_what_more_steps_gain() -> None:
    settings = {row: {"inner_steps": 1 if row == "gd" else 10} for row in e6.ROWS}
    runs = [made_up(row, seed, (3.0 + seed, 1.0)) for row in e6.ROWS for seed in range(3)]
    for run in runs:
        for point in run["curve"]:
            point["residual"] = 7.0 / point["steps"] + run["seed"]
    lines = e6._inner_solves({"runs": runs, "settings": settings})
    told = "- K = 5, iMAML, gradient descent, 1 steps: |dG/dphi| = 8; error 4, after 100 steps 1. Meta-training has improved phi*"
    assert any(line.startswith(told) for line in lines)
    assert "- K = 5, iMAML, Hessian-free, 10 steps: |dG/dphi| = 1.7; error 1, after 100 steps 1." in lines


def test_seeds_that_are_far_apart_are_named() -> None:
    ends = {"maml": (1.0, 1.9, 1.2), "gd": (1.0, 2.2, 1.2)}
    runs = [made_up(row, seed, (3.0, ends.get(row, (1.0,) * 3)[seed])) for row in e6.ROWS for seed in range(3)]
    (line, _) = e6._astray({"runs": runs})
    assert "iMAML, gradient descent at K = 5 (1, 2.2, 1.2)" in line and "MAML at K = 5 (1, 1.9" not in line
    assert e6._astray({"runs": [run for run in runs if run["row"] != "gd"] + [made_up("gd", 0, (3.0, 1.0))]}) == []


def test_runs_of_several_commits_are_told() -> None:
    facts = {"processor": "P", "threads": 1, "commit": "a" * 40, "torch": "2", "bilevel": "1"}
    runs = [{**made_up("gd", seed, (1.0, 1.0)), "commit": commit * 40} for seed, commit in enumerate("bbc")]
    stored = {"environment": facts, "result": {"runs": runs}}
    assert e6.E6().sources(stored).endswith("commit `aaaaaaaaaaaa`; runs of the commits `bbbbbbbbbbbb`, `cccccccccccc`")
    assert e6.E6().sources({**stored, "result": {"runs": runs[:2]}}).endswith("commit `aaaaaaaaaaaa`")
