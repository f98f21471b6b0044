"""Learned step sizes in E7: Meta-SGD written by hand with autograd, and SciPy's Student's t."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from applications.meta_learning.data import SinusoidSampler
from applications.meta_learning.experiments import e7_step_sizes as e7
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.tasks import load_source
from bilevel.solvers import GradientDescent
from tests.meta_learning.tiny import SINUSOID

DOUBLE = replace(SINUSOID, dtype="float64")
MAML = e7.VARIANTS[:3]


def forward(phi: dict[str, Tensor], x: Tensor) -> Tensor:
    for layer in ("body.0", "body.2"):
        x = (x @ phi[f"{layer}.weight"].T + phi[f"{layer}.bias"]).relu()
    return x @ phi["head.weight"].T + phi["head.bias"]


def loss(phi: dict[str, Tensor], examples: dict[str, Tensor]) -> Tensor:
    return (forward(phi, examples["x"]) - examples["y"]).square().mean()


def meta_sgd(centre: Any, raw: Any, task: Any, steps: int) -> dict[str, Tensor]:
    """phi <- phi - exp(raw) dG/dphi, with its graph."""
    phi = dict(centre)
    for _ in range(steps):
        grads = torch.autograd.grad(loss(phi, task["support"]), list(phi.values()), create_graph=True)
        sizes = raw if isinstance(raw, dict) else dict.fromkeys(phi, raw)
        phi = {name: phi[name] - sizes[name].exp() * grad for name, grad in zip(phi, grads, strict=True)}
    return phi


def tasks_of(data: Any) -> Iterator[Any]:
    for i in range(len(data["query"]["x"])):
        yield {part: {key: value[i] for key, value in examples.items()} for part, examples in data.items()}


def some_tasks(count: int) -> Any:
    return SinusoidSampler(shots=5, query_shots=7, seed=8, device="cpu", dtype=torch.float64).sample(count)


@pytest.mark.parametrize("variant", MAML[1:], ids=lambda v: v.name)
def test_change_of_variables_is_meta_sgd(variant: e7.Variant) -> None:
    """Adapted parameters, outer loss, and its gradient in the centre and in the step sizes."""
    found = e7.learner(variant, DOUBLE)
    generator = torch.Generator().manual_seed(2)
    for leaf in e7.leaves(found.theta["raw"]):  # from 0.002 to 0.05, no two alike
        leaf.copy_(-6.2 + 3.2 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64))
    data = some_tasks(3)
    meta = found.meta_gradient(data)

    centre = {name: leaf.clone().requires_grad_() for name, leaf in found.theta["centre"].items()}
    raw = {name: leaf.clone().requires_grad_() for name, leaf in e7.named(found.theta["raw"]).items()}
    sizes = raw if variant.diagonal else raw["all"]
    phis = [meta_sgd(centre, sizes, task, e7.MAML_STEPS.max_steps) for task in tasks_of(data)]
    outer = torch.stack([loss(phi, task["query"]) for phi, task in zip(phis, tasks_of(data), strict=True)]).mean()
    expected = torch.autograd.grad(outer, [*centre.values(), *raw.values()])

    for i, phi in enumerate(phis):
        psi = {name: leaf[i] for name, leaf in meta.phi.items()}
        torch.testing.assert_close(e7.adapted(psi, found.theta), phi, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(meta.outer, outer.detach(), rtol=1e-10, atol=0)
    grads = [*e7.leaves(meta.grad["centre"]), *e7.leaves(meta.grad["raw"])]
    torch.testing.assert_close(grads, list(expected), rtol=1e-9, atol=1e-11)
    assert all(bool(grad.abs().max() > 1e-8) for grad in grads)


@pytest.mark.parametrize("variant", e7.VARIANTS, ids=lambda v: v.name)
def test_only_what_is_learned_moves(variant: e7.Variant) -> None:
    learned = e7.trained(variant, replace(SINUSOID, meta_batch=2), steps=1, tasks=2)["learned"]
    start = e7.LAM if variant.implicit else e7.STEP_SIZE
    assert len(learned) == (6 if variant.diagonal else 1)
    for row in learned.values():
        still = row["low"] == row["high"] == pytest.approx(start, rel=1e-6)
        moved = max(abs(row["low"] / start - 1), abs(row["high"] / start - 1))
        # the first step of Adam changes every logarithm by its rate
        assert moved == pytest.approx(e7.RAW_RATE, rel=0.05) if variant.learned else still


@pytest.mark.parametrize("variant", [MAML[0], MAML[2], e7.VARIANTS[4]], ids=lambda v: v.name)
@pytest.mark.parametrize("steps", [1, 4])
def test_error_after_steps_is_that_of_gradient_descent(variant: e7.Variant, steps: int) -> None:
    found, data = e7.learner(variant, DOUBLE), some_tasks(3)
    size = 0.01 if variant.implicit else 1.0
    measured = e7.errors_after(found, GradientDescent(step_size=size, max_steps=steps), data)
    centre, errors = found.theta["centre"], []
    for task in tasks_of(data):
        phi = {name: leaf.clone().requires_grad_() for name, leaf in centre.items()}
        for _ in range(steps):
            pull = sum((phi[name] - centre[name]).square().sum() for name in phi)
            total = loss(phi, task["support"]) + (e7.LAM / 2 * pull if variant.implicit else 0)
            grads = torch.autograd.grad(total, list(phi.values()))
            phi = {n: (p - 0.01 * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
        errors.append(loss(phi, task["query"]).item())
    assert measured["mean"] == pytest.approx(np.mean(errors), rel=1e-9)
    assert measured["interval"] == pytest.approx(1.96 * np.std(errors, ddof=1) / 3**0.5, rel=1e-9)
    assert measured["failed"] == 0


def test_a_failed_task_is_in_no_mean() -> None:
    found, data = e7.learner(MAML[0], DOUBLE), some_tasks(4)
    data["support"]["x"][1] = torch.nan
    kept = {part: {key: value[[0, 2, 3]] for key, value in examples.items()} for part, examples in data.items()}
    with_it, without = (e7.errors_after(found, e7.MAML_STEPS, tasks) for tasks in (data, kept))
    assert with_it["failed"] == 1 and without["failed"] == 0
    assert with_it["mean"] == pytest.approx(without["mean"], rel=1e-12)
    data["support"]["x"][:] = torch.nan
    assert e7.errors_after(found, e7.MAML_STEPS, data) | {"residual": 0} == {
        "mean": None,
        "interval": None,
        "failed": 4,
        "residual": 0,
    }


def test_test_tasks_are_those_of_no_training(tmp_path: Path) -> None:
    config = e7.settings(Request(quick=False, seed=0, data_dir=None, parts=tmp_path), 0)
    assert (config.channels, config.shots, config.query_shots) == (40, e7.SHOTS, e7.SHOTS)
    assert e7.learner(MAML[0], config).solver == e7.MAML_STEPS
    source = load_source(config)
    seeds = range(e7.SEEDS)
    held_out = [
        source.sampler(config, held_out=True, query_shots=1, seed=s + e7.TEST_SEED, device=e7.CPU) for s in seeds
    ]
    training = [source.sampler(config, held_out=False, query_shots=1, seed=s, device=e7.CPU) for s in seeds]
    firsts = [float(sampler.sample(1)["support"]["x"][0, 0, 0]) for sampler in (*held_out, *training)]
    assert len(set(firsts)) == 2 * e7.SEEDS


def test_ratio_is_the_geometric_mean_with_students_interval() -> None:
    mine, theirs = [1.0, 2.0, 0.7], [2.0, 2.5, 1.9]
    logs = np.log(np.divide(mine, theirs))
    low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    found = e7.ratio_and_interval(list(mine), list(theirs))
    np.testing.assert_allclose(found, np.exp([logs.mean(), low, high]), rtol=1e-4)
    assert e7.ratio_and_interval([1.0, None], [1.0, 2.0]) is None


def test_differences_count_what_is_clear() -> None:
    factors = {"fixed": 1.0, "scalar": 0.5, "vector": 0.5, "fixed lambda": 3.0, "lambda": 3.0}
    runs = [
        {
            "variant": name,
            "curve": [{"steps": 1, "mean": factor * (1 + seed / 1000)}, {"steps": 2, "mean": None if seed else 1.0}],
        }
        for name, factor in factors.items()
        for seed in range(3)
    ]
    lines = e7._differences({"variants": [{"name": name} for name in factors], "runs": runs})
    assert "| scalar / fixed | 0.5 (0.5 to 0.5) | – | 1, 0 |" in lines
    assert "| lambda / vector | 6 (6 to 6) | – | 0, 1 |" in lines
