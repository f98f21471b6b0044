"""Learned regularisation in E7: the optimum of a family of regressions, and SciPy's Student's t."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import functional_call

from applications.meta_learning.experiments import e7_regularisation as e7
from applications.meta_learning.models import initial_theta
from applications.meta_learning.tasks import load_source
from bilevel import LearnedProximalProblem
from bilevel.regularisation import Diagonal
from tests.meta_learning.tiny import TINY

CPU = torch.device("cpu")


def test_meta_steps_find_the_lambda_of_bayes() -> None:
    """Weights vary by `deviation` around the centre, n noisy examples each: lambda = noise^2 / (n deviation^2)."""
    generator = torch.Generator().manual_seed(1)
    deviation, noise, n, tasks = torch.tensor([1.0, 0.25]), 0.5, 4, 2000

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w = torch.tensor([1.0, -2.0]) + deviation * normal(tasks, 2)
    x, x_test = normal(tasks, n, 2), normal(tasks, 20, 2)
    y = torch.einsum("tnd,td->tn", x, w) + noise * normal(tasks, n)
    data = {"x": x, "y": y, "x_test": x_test, "y_test": torch.einsum("tnd,td->tn", x_test, w)}

    def predict(phi: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat([phi["a"], phi["b"]])

    problem = LearnedProximalProblem.from_model(
        lambda phi, task: predict(phi, task["x"]),
        lambda outputs, task: 0.5 * (outputs - task["y"]).square().mean(),
        lambda phi, task: 0.5 * (predict(phi, task["x_test"]) - task["y_test"]).square().mean(),
        Diagonal(),
    )
    theta = problem.initial_theta({"a": torch.tensor([1.0]), "b": torch.tensor([-2.0])}, 0.25)
    outer = e7._outer(e7.Variant("diagonal", Diagonal(), 0.25, True), theta)
    for _ in range(120):
        assert e7.meta_step(problem, theta, data, outer)
    bayes = noise**2 / (n * deviation**2)
    torch.testing.assert_close(torch.cat(list(problem.lam(theta).values())).log(), bayes.log(), rtol=0, atol=0.2)


@pytest.mark.parametrize("variant", e7.VARIANTS, ids=lambda v: v.name)
def test_only_what_is_learned_moves(variant: e7.Variant) -> None:
    config = replace(TINY, query_shots=2)
    problem, module = e7.learned_problem(config, variant.kind)
    start = initial_theta(module, torch.float32, CPU)
    theta = problem.initial_theta({name: leaf.clone() for name, leaf in start.items()}, variant.lam)
    before = [leaf.clone() for leaf in e7._leaves(theta["lam"])]
    sampler = load_source(config).sampler(config, held_out=False, query_shots=2, seed=0, device=CPU)
    assert e7.meta_step(problem, theta, sampler.sample(3), e7._outer(variant, theta))
    moved = [not torch.equal(a, b) for a, b in zip(e7._leaves(theta["lam"]), before, strict=True)]
    assert (
        (all(moved) and len(moved) == (1 if variant.name == "scalar" else len(start)))
        if variant.learned
        else not any(moved)
    )
    assert all(not torch.equal(theta["centre"][name], leaf) for name, leaf in start.items())


def test_step_without_a_usable_task_moves_nothing() -> None:
    config = replace(TINY, query_shots=2)
    variant = e7.VARIANTS[-1]
    problem, module = e7.learned_problem(config, variant.kind)
    theta = problem.initial_theta(initial_theta(module, torch.float32, CPU), variant.lam)
    before = {name: leaf.clone() for name, leaf in theta["centre"].items()}
    data = load_source(config).sampler(config, held_out=False, query_shots=2, seed=0, device=CPU).sample(2)
    data["support"]["x"].fill_(torch.nan)
    assert not e7.meta_step(problem, theta, data, e7._outer(variant, theta))
    assert all(torch.equal(theta["centre"][name], leaf) for name, leaf in before.items())


def test_inner_objective_is_that_of_the_paper() -> None:
    config = replace(TINY, dtype="float64")
    problem, module = e7.learned_problem(config, Diagonal())
    centre = initial_theta(module, torch.float64, CPU)
    generator = torch.Generator().manual_seed(3)
    lam, phi = (
        {name: torch.rand(leaf.shape, generator=generator, dtype=torch.float64) + 0.5 for name, leaf in centre.items()}
        for _ in range(2)
    )
    task = load_source(config).sampler(config, held_out=False, query_shots=2, seed=0, device=CPU).sample(1)
    task = {part: {key: value[0] for key, value in examples.items()} for part, examples in task.items()}
    theta = problem.initial_theta(centre, lam)
    loss = torch.nn.functional.cross_entropy(
        functional_call(module, phi, (task["support"]["x"],)), task["support"]["y"]
    )
    pull = sum(float((lam[k] * (phi[k] - centre[k]) ** 2).sum()) for k in centre)
    np.testing.assert_allclose(float(problem.inner_objective(phi, theta, task)), float(loss) + pull / 2, rtol=1e-12)


@pytest.mark.parametrize("values", [[91.0, 92.5, 90.1], [3.0, 4.0]])
def test_interval_of_a_mean_is_students(values: list[float]) -> None:
    mean, interval = e7.mean_and_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([mean - interval, mean + interval], [low, high], rtol=1e-4)


def test_description_of_lambda() -> None:
    leaf = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    found = e7._describe({"a": leaf, "b": torch.tensor(2.0)})
    np.testing.assert_allclose(
        list(found["a"].values()), np.quantile(leaf.double().numpy(), [0.05, 0.5, 0.95]), rtol=1e-12
    )
    assert found["b"] == {"low": 2.0, "median": 2.0, "high": 2.0} and list(e7._describe(torch.tensor(3.0))) == ["all"]
