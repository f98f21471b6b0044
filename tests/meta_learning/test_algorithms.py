"""The baselines against loops written by hand, and what appendix A of the paper says of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from applications.meta_learning.algorithms import MAML, FirstOrderMAML, ImplicitMAML, MetaGradient, Reptile
from applications.meta_learning.problem import Theta, cross_entropy, few_shot_problem, plain_problem
from bilevel import BilevelProblem
from bilevel.linsys import Identity
from bilevel.solvers import GradientDescent, NesterovAGD

RATE, STEPS, LAM, TASKS = 0.3, 4, 0.7, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


NET = network()
THETA: Theta = {name: p.detach().clone() for name, p in NET.named_parameters()}


def tasks() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(1)
    return {
        part: {"x": torch.randn(TASKS, 6, 5, dtype=torch.float64), "y": torch.randint(0, 3, (TASKS, 6))}
        for part in ("support", "query")
    }


DATA = tasks()


def loss(phi: Theta, part: str, i: int) -> Tensor:
    return nn.functional.cross_entropy(functional_call(NET, phi, (DATA[part]["x"][i],)), DATA[part]["y"][i])


def adapted(theta: Theta, i: int, lam: float, steps: int = STEPS, momentum: float = 0.0) -> Theta:
    """Gradient descent by hand, with the graph of all its steps."""
    phi = {name: leaf + 0 for name, leaf in theta.items()}
    point = phi
    for _ in range(steps):
        support = loss(point, "support", i)
        grads = torch.autograd.grad(support, list(point.values()), create_graph=True)
        new = {
            name: point[name] - RATE * (grad + lam * (point[name] - theta[name]))
            for name, grad in zip(point, grads, strict=True)
        }
        point = {name: new[name] + momentum * (new[name] - phi[name]) for name in new}
        phi = new
    return phi


def by_hand(lam: float, through_steps: bool, momentum: float = 0.0) -> Theta:
    """The mean over the tasks of the gradient of the query loss."""
    total = {name: torch.zeros_like(leaf) for name, leaf in THETA.items()}
    for i in range(TASKS):
        theta = {name: leaf.clone().requires_grad_() for name, leaf in THETA.items()}
        phi = adapted(theta, i, lam, momentum=momentum)
        if not through_steps:
            phi = theta = {name: leaf.detach().requires_grad_() for name, leaf in phi.items()}
        grads = torch.autograd.grad(loss(phi, "query", i), list(theta.values()))
        for name, grad in zip(theta, grads, strict=True):
            total[name] += grad / TASKS
    return total


def problem(lam: float) -> BilevelProblem:
    return few_shot_problem(NET, cross_entropy, lam) if lam else plain_problem(NET, cross_entropy)


SOLVER = GradientDescent(step_size=RATE, max_steps=STEPS)


def assert_same(found: MetaGradient, expected: Theta, rtol: float = 1e-10) -> None:
    assert found.ok.all() and list(found.grad) == list(expected)
    for name, leaf in expected.items():
        torch.testing.assert_close(found.grad[name], leaf, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("lam", [0.0, LAM])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_maml_is_back_propagation_through_the_steps(lam: float, chunk_size: int | None) -> None:
    found = MAML(solver=SOLVER, chunk_size=chunk_size).meta_gradient(problem(lam), THETA, DATA)
    assert_same(found, by_hand(lam, through_steps=True))
    outer = sum(loss(adapted_detached(i, lam), "query", i) for i in range(TASKS)) / TASKS
    torch.testing.assert_close(found.outer, outer)


def adapted_detached(i: int, lam: float) -> Theta:
    start = {name: leaf.clone().requires_grad_() for name, leaf in THETA.items()}
    return {name: leaf.detach() for name, leaf in adapted(start, i, lam).items()}


def test_maml_with_momentum() -> None:
    solver = NesterovAGD(step_size=RATE, max_steps=STEPS, momentum=0.6)
    found = MAML(solver=solver).meta_gradient(problem(0.0), THETA, DATA)
    assert_same(found, by_hand(0.0, through_steps=True, momentum=0.6))


def test_truncation_keeps_what_the_proximal_term_gives_in_the_last_steps() -> None:
    found = MAML(solver=SOLVER, truncate=2).meta_gradient(problem(LAM), THETA, DATA)
    total = {name: torch.zeros_like(leaf) for name, leaf in THETA.items()}
    for i in range(TASKS):
        theta = {name: leaf.clone().requires_grad_() for name, leaf in THETA.items()}
        phi = {name: leaf.detach().requires_grad_() for name, leaf in adapted(theta, i, LAM, steps=STEPS - 2).items()}
        for _ in range(2):
            grads = torch.autograd.grad(loss(phi, "support", i), list(phi.values()), create_graph=True)
            phi = {
                name: phi[name] - RATE * (grad + LAM * (phi[name] - theta[name]))
                for name, grad in zip(phi, grads, strict=True)
            }
        for name, grad in zip(theta, torch.autograd.grad(loss(phi, "query", i), list(theta.values())), strict=True):
            total[name] += grad / TASKS
    assert_same(found, total)


@pytest.mark.parametrize("lam", [0.0, LAM])
@pytest.mark.parametrize("outer_chunk_size", [None, 1])
def test_first_order_maml_is_the_query_gradient_at_the_adapted_parameters(
    lam: float, outer_chunk_size: int | None
) -> None:
    algorithm = FirstOrderMAML(solver=SOLVER, outer_chunk_size=outer_chunk_size)
    assert_same(algorithm.meta_gradient(problem(lam), THETA, DATA), by_hand(lam, through_steps=False))


def test_imaml_with_identity_is_first_order_maml() -> None:
    """Appendix A: no step of CG, and the same inner problem."""
    ours = ImplicitMAML(solver=SOLVER, linsys=Identity()).meta_gradient(problem(LAM), THETA, DATA)
    assert_same(ours, by_hand(LAM, through_steps=False))


def test_reptile_is_the_way_that_the_parameters_went() -> None:
    found = Reptile(solver=SOLVER).meta_gradient(problem(0.0), THETA, DATA)
    expected = {
        name: torch.stack([THETA[name] - adapted_detached(i, 0.0)[name] for i in range(TASKS)]).mean(0)
        for name in THETA
    }
    assert_same(found, expected)


def test_reptile_is_first_order_maml_only_if_the_outer_loss_is_the_training_loss() -> None:
    """Appendix A says that lambda (theta - phi*) = grad L_train(phi*), hence Reptile is first-order MAML up to the step length. That needs
    the outer loss to be the training loss; with a query set of its own it is not so.
    """
    solver = GradientDescent(step_size=RATE, max_steps=4_000, tol=1e-12)
    same = {"support": DATA["support"], "query": DATA["support"]}

    def directions(data: Any) -> tuple[Tensor, Tensor]:
        reptile = Reptile(solver=solver).meta_gradient(problem(LAM), THETA, data)
        first_order = FirstOrderMAML(solver=solver).meta_gradient(problem(LAM), THETA, data)
        assert (reptile.inner.residual < 1e-11).all()
        return tuple(torch.cat([leaf.flatten() for leaf in m.grad.values()]) for m in (reptile, first_order))  # type: ignore[return-value]

    reptile, first_order = directions(same)
    torch.testing.assert_close(LAM * reptile, first_order, rtol=1e-8, atol=1e-10)
    reptile, first_order = directions(DATA)
    cosine = torch.nn.functional.cosine_similarity(reptile, first_order, dim=0)
    assert (LAM * reptile - first_order).norm() > 0.5 * first_order.norm() and cosine < 0.9


@pytest.mark.parametrize(
    "algorithm",
    [FirstOrderMAML(solver=SOLVER), Reptile(solver=SOLVER), MAML(solver=SOLVER)],
    ids=["first-order", "reptile", "maml"],
)
def test_a_task_with_bad_data_is_left_out(algorithm: Any) -> None:
    bad = {part: {key: value.clone() for key, value in tensors.items()} for part, tensors in DATA.items()}
    bad["support"]["x"][1] = torch.nan
    found = algorithm.meta_gradient(problem(0.0), THETA, bad)
    assert found.ok.tolist() == [True, False, True] and "NON_FINITE" in found.inner.describe()
    rest = {part: {key: value[[0, 2]] for key, value in tensors.items()} for part, tensors in DATA.items()}
    expected = algorithm.meta_gradient(problem(0.0), THETA, rest)
    for name in THETA:
        torch.testing.assert_close(found.grad[name], expected.grad[name], rtol=1e-10, atol=1e-13)
    none = {part: {"x": 0 * value["x"] + torch.nan, "y": value["y"]} for part, value in DATA.items()}
    assert all(leaf.isnan().all() for leaf in algorithm.meta_gradient(problem(0.0), THETA, none).grad.values())
