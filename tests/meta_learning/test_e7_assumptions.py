"""The audit of E7 against dense algebra and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from applications.meta_learning.experiments import e7_assumptions as e7
from applications.meta_learning.method import build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.problem import cross_entropy, few_shot_problem
from applications.meta_learning.tasks import load_source
from bilevel import ProximalProblem
from tests.meta_learning.tiny import TINY

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    GENERATOR.manual_seed(4)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def mlp_loss(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """2 - 4 - 3 with tanh, 27 parameters in one vector."""
    w, b, v, c = phi[:8].view(4, 2), phi[8:12], phi[12:24].view(3, 4), phi[24:]
    return torch.nn.functional.cross_entropy(torch.tanh(x @ w.T + b) @ v.T + c, y)


def test_ends_are_those_of_the_dense_hessian() -> None:
    x, y, phi = normal(2, 6, 2), torch.randint(3, (2, 6), generator=GENERATOR), normal(2, 27)
    slope, product = e7.products(lambda p: torch.func.vmap(mlp_loss)(p, x, y), phi)
    low, high, doubt = e7.ends(product, phi)
    for i in range(2):
        dense = torch.func.hessian(mlp_loss)(phi[i], x[i], y[i]).numpy()
        values = np.linalg.eigvalsh(dense)
        assert values[0] < -1e-3  # the case of interest
        np.testing.assert_allclose([low[i], high[i]], values[[0, -1]], rtol=1e-9)
        np.testing.assert_allclose(slope[i], torch.func.grad(mlp_loss)(phi[i], x[i], y[i]), rtol=1e-10, atol=1e-12)
        v = normal(27)
        expanded = torch.stack([v if j == i else torch.zeros(27, dtype=torch.float64) for j in range(2)])
        np.testing.assert_allclose(product(expanded)[i], dense @ v.numpy(), rtol=1e-9, atol=1e-12)
        assert product(expanded)[1 - i].abs().max() == 0  # tasks do not touch one another
    assert doubt.max() < 1e-6


def test_few_lanczos_steps_never_pass_the_ends() -> None:
    matrix = normal(60, 60)
    matrix = matrix + matrix.T
    low, high, doubt = e7.ends(lambda v: v @ matrix, normal(1, 60))
    values = np.linalg.eigvalsh(matrix.numpy())
    assert values[0] - 1e-10 <= float(low) and float(high) <= values[-1] + 1e-10
    assert np.abs(values - float(low)).min() <= float(doubt) + 1e-10


def test_inner_and_outer_are_those_of_the_task() -> None:
    config = replace(TINY, dtype="float64")
    module = build_network(config).double()
    theta = initial_theta(module, torch.float64, torch.device("cpu"))
    data = (
        load_source(config).sampler(config, held_out=False, query_shots=2, seed=1, device=torch.device("cpu")).sample(2)
    )
    problem = few_shot_problem(module, cross_entropy, 3.0)
    phi = e7.flat({name: leaf + 0.1 * normal(2, *leaf.shape) for name, leaf in theta.items()})
    inner, outer = e7._inner(problem, theta, data, phi), e7._outer(problem, theta, data, phi)
    for i in range(2):
        leaves = {name: leaf[i] for name, leaf in e7.unflat(phi, theta).items()}
        assert sum(leaf.numel() for leaf in leaves.values()) == phi.shape[1]

        def loss(part: str, i: int = i, leaves: dict[str, Tensor] = leaves) -> Tensor:
            outputs = functional_call(module, leaves, (data[part]["x"][i],))
            return torch.nn.functional.cross_entropy(outputs, data[part]["y"][i])

        distance = sum(float((leaves[name] - theta[name]).square().sum()) for name in theta)
        np.testing.assert_allclose(inner[i], float(loss("support")) + 1.5 * distance, rtol=1e-12)
        np.testing.assert_allclose(outer[i], float(loss("query")), rtol=1e-12)


def test_rho_of_a_function_with_known_third_derivatives() -> None:
    """f = sum a x^3 / 6 has the Hessian diag(a x)."""
    a, first, second = normal(9), normal(3, 9), normal(3, 9)
    second[2] = first[2]
    found = e7.hessian_change(lambda x: (a * x**3 / 6).sum(-1), first, second)
    difference = (a * (first - second)).abs().amax(-1)[:2] / (first - second).norm(dim=-1)[:2]
    np.testing.assert_allclose(found[:2], difference, rtol=1e-9)
    assert (found[:2] <= a.abs().max()).all() and found[2] == 0


@pytest.mark.parametrize(("lowest", "steps", "meets"), [(-3.0, 5, True), (-1.0, 5, False), (-3.0, 1, False)])
def test_cg_meets_negative_curvature_where_there_is_some(lowest: float, steps: int, meets: bool) -> None:
    """Eigenvalues of A + 2 I: lowest + 2, 3, 4, 5. The first direction has the curvature of their mean, above zero."""
    spectrum = torch.tensor([lowest, 1.0, 2.0, 3.0], dtype=torch.float64)
    problem = ProximalProblem.from_losses(
        lambda phi, task: 0.5 * (spectrum * (phi - task) ** 2).sum(), lambda phi, task: phi.sum(), lam=2.0
    )
    task, phi = torch.zeros(2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    found = e7._meets_negative_curvature(problem, phi, torch.zeros(4, dtype=torch.float64), task, steps)
    assert found.tolist() == [meets, meets]


def test_outside_lemma_3() -> None:
    audit = {
        "adapted_mu": [2.0, 2.0, -1.0, 2.0, 2.0, 2.0],
        "adapted_slope": [1.9, 2.1, 0.0, 50.0, 0.0, 0.0],
        "rho": [1.0, 1.0, 1.0, 0.0, 1.0, 1.0],
        "adapted_cg": [False, False, False, False, True, False],
        "adapted_cg_many": [False, False, False, False, True, True],
    }
    assert e7._negative(audit, "adapted") == [False, False, True, False, True, True]
    assert e7._outside(audit, "adapted") == [False, True, True, False, True, True]
    assert e7._outside_if_convex(audit, "adapted", 1.0) == [True, True, False, False, False, False]


def test_flat_and_back() -> None:
    like = {"b": normal(2, 3), "a": normal(4)}
    tasks = {"b": normal(5, 2, 3), "a": normal(5, 4)}
    vector = e7.flat(tasks)
    assert vector.shape == (5, 10) and torch.equal(vector[3, :6].view(2, 3), tasks["b"][3])
    assert all(torch.equal(leaf, tasks[name]) for name, leaf in e7.unflat(vector, like).items())
    assert torch.equal(e7.flat(like, tasks=0), torch.cat([like["b"].flatten(), like["a"]]))
