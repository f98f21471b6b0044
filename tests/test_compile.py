"""compile=True: the same numbers, from derivatives that were recorded once. The oracle is what autograd gives without, and closed forms."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.curvature import FiniteDifference, ForwardOverReverse, GaussNewton, Hessian, ReverseOverReverse
from bilevel.linsys import CG, Exact
from bilevel.recorded.programs import Programs
from bilevel.recorded.recording import recorded, split_linearisation
from bilevel.solvers import GradientDescent, NewtonCG
from bilevel.solvers.base import IterativeSolver, State
from bilevel.trees import flatten
from tests.cases import LINSYS_NAMES, PROBLEMS, SOLVER_NAMES, Case, inner_solvers, linear_solvers

F64 = torch.float64
NEWTON, SOLVED = NewtonCG(max_steps=30, cg_steps=20, tol=1e-11), CG(max_steps=60, rtol=1e-12)


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def assert_same(one: bilevel.Hypergradient, other: bilevel.Hypergradient, tol: float = 1e-9) -> None:
    for a, b in zip(leaves(one.grad), leaves(other.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    torch.testing.assert_close(one.outer, other.outer, rtol=tol, atol=tol)
    torch.testing.assert_close(one.ok, other.ok)
    assert one.linear is not None and other.linear is not None
    assert one.linear.num_matvecs == other.linear.num_matvecs
    # of a batch, tasks that are done leave it, which takes a linearisation anew; few tasks stay where their derivatives are recorded
    if one.inner is not None and other.inner is not None and one.ok_per_task.ndim == 0:
        assert (one.inner.num_grads, one.inner.num_matvecs) == (other.inner.num_grads, other.inner.num_matvecs)


def count(problem: bilevel.BilevelProblem) -> int:
    return len(Programs.of(problem))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_every_inner_solver(case: Case, solver: str, dtype: torch.dtype) -> None:
    case = case.to(dtype)
    method = inner_solvers(case, 1e-10 if dtype == F64 else 1e-3)[solver]
    plain, recorded, replayed = (
        bilevel.hypergradient(case.problem, case.theta, case.data, solver=method, linsys=CG(max_steps=30), compile=c)
        for c in (False, True, True)
    )
    for other in (recorded, replayed):
        assert other.inner is not None and plain.inner is not None
        assert other.inner.codes.equal(plain.inner.codes)
        assert_same(other, plain, 1e-9 if dtype == F64 else 1e-3)


@pytest.mark.parametrize("linear", LINSYS_NAMES)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_every_linear_solver(case: Case, linear: str) -> None:
    """Among them those that take several vectors at once."""
    phi = case.phi_star(case.theta, case.data)
    method = linear_solvers(1e-11)[linear]
    found = [
        bilevel.implicit_gradient(case.problem, phi, case.theta, case.data, linsys=method, compile=c)
        for c in (False, True)
    ]
    assert_same(found[1], found[0])


def logistic(n: int = 12, d: int = 3, classes: int = 4) -> tuple[bilevel.BilevelProblem, Tensor, dict[str, Any]]:
    """Integer labels, a static leaf, an outer loss that depends on theta."""

    def inner(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        fit = torch.nn.functional.cross_entropy(data["x"] @ w, data["y"])
        return data["weight"] * fit + 0.5 * (theta.exp().unsqueeze(-1) * w**2).sum()

    def outer(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(data["v"] @ w, data["y"]) + 0.1 * theta.sum() ** 2

    g = torch.Generator().manual_seed(3)
    data = {
        "x": torch.randn(5, n, d, generator=g, dtype=F64),
        "v": torch.randn(5, n, d, generator=g, dtype=F64),
        "y": torch.randint(classes, (5, n), generator=g),
        "weight": 2.0,
    }
    problem = bilevel.BilevelProblem.from_functions(inner, outer, lambda theta, data: theta.new_zeros(d, classes))
    return problem, torch.full((d,), -1.0, dtype=F64), data


def one_task(data: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: value[i] if isinstance(value, Tensor) else value for key, value in data.items()}


def test_other_values_of_the_same_shape_need_no_new_recording() -> None:
    problem, theta, data = logistic()
    for i in range(3):
        shifted = theta + 0.3 * i
        found = bilevel.hypergradient(problem, shifted, one_task(data, i), solver=NEWTON, linsys=SOLVED, compile=True)
        if i == 0:
            recorded = count(problem)
        plain = bilevel.hypergradient(problem, shifted, one_task(data, i), solver=NEWTON, linsys=SOLVED)
        assert_same(found, plain)
    assert count(problem) == recorded > 0


def test_other_shapes_dtypes_and_static_leaves_are_recorded_anew() -> None:
    problem, theta, data = logistic()
    task = one_task(data, 0)
    variants = [
        (theta, task),
        (theta, {**task, "x": task["x"][:7], "y": task["y"][:7], "v": task["v"][:7]}),
        (theta, {**task, "weight": 0.5}),
        (
            theta.float(),
            {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in task.items()},
        ),
        (theta, {**task, "x": task["x"].T.contiguous().T}),
    ]
    seen = []
    for th, da in variants:
        tol = 1e-9 if th.dtype == F64 else 1e-4
        method = replace(NEWTON, tol=1e-11 if th.dtype == F64 else 1e-4)
        found = bilevel.hypergradient(problem, th, da, solver=method, linsys=CG(max_steps=12), compile=True)
        seen.append(count(problem))
        for a, b in zip(
            leaves(found.grad),
            leaves(bilevel.hypergradient(problem, th, da, solver=method, linsys=CG(max_steps=12)).grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"theta_batched": True}, {"reduction": "none"}], ids=str)
def test_batches(options: dict[str, Any]) -> None:
    problem, theta, data = logistic()
    if options.get("theta_batched"):
        theta = theta + 0.1 * torch.arange(5, dtype=F64).unsqueeze(-1)
    found = [
        bilevel.hypergradient(problem, theta, data, solver=NEWTON, linsys=SOLVED, batched=True, compile=c, **options)
        for c in (False, True)
    ]
    assert_same(found[1], found[0])


def test_a_task_that_fails_leaves_the_others_as_they_are() -> None:
    problem, theta, data = logistic()
    broken = {**data, "x": data["x"].clone()}
    broken["x"][1] = torch.nan
    found, plain = (
        bilevel.hypergradient(problem, theta, broken, solver=NEWTON, linsys=SOLVED, batched=True, compile=c)
        for c in (True, False)
    )
    assert found.ok.tolist() == [True, False, True, True, True]
    assert_same(found, plain)


@pytest.mark.parametrize(
    "curvature", [Hessian(product=ForwardOverReverse()), Hessian(product=FiniteDifference()), GaussNewton()], ids=repr
)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_curvatures(curvature: Any, damping: float) -> None:
    """The proximal problem also splits its quadratic part off and knows an inverse of it."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 8, 3, generator=g, dtype=F64), torch.randint(2, (4, 8), generator=g)
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: torch.tanh(data[0] @ phi["a"]) @ phi["b"],
        lambda outputs, data: torch.nn.functional.cross_entropy(outputs, data[1]),
        lambda phi, data: torch.nn.functional.cross_entropy(torch.tanh(data[0] @ phi["a"]) @ phi["b"], data[1]),
        0.7,
    )
    theta = {"a": torch.randn(3, 5, generator=g, dtype=F64), "b": torch.randn(5, 2, generator=g, dtype=F64)}
    found, plain = (
        bilevel.hypergradient(
            problem,
            theta,
            (x, y),
            solver=NewtonCG(max_steps=4, curvature=curvature, damping=damping),
            linsys=CG(max_steps=5, rtol=0.0),
            curvature=curvature,
            damping=damping,
            batched=True,
            compile=c,
        )
        for c in (True, False)
    )
    # differences of gradients round in another order
    assert_same(found, plain, 1e-6 if isinstance(getattr(curvature, "product", None), FiniteDifference) else 1e-9)


def test_several_vectors_at_once() -> None:
    problem, theta, data = logistic()
    found = bilevel.hypergradient(problem, theta, one_task(data, 0), solver=NEWTON, linsys=Exact(), compile=True)
    assert_same(found, bilevel.hypergradient(problem, theta, one_task(data, 0), solver=NEWTON, linsys=Exact()))


@pytest.mark.parametrize("product", [ReverseOverReverse(), ForwardOverReverse()], ids=repr)
def test_in_place_operations_of_the_objective(product: Any) -> None:
    """Cut in two, a program with in-place writes would read what is not there yet."""

    def inner(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        out = torch.zeros_like(phi)
        out[1:] += 2 * phi[1:]
        out.mul_(phi)
        return out.sum() + ((data @ phi).sin() ** 2).sum() + 2 * (phi - theta[0]).square().sum()

    g = torch.Generator().manual_seed(2)
    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: (phi**3).sum(), lambda theta, data: data[0] * 0 + 0.1
    )
    for scale in (1.0, 0.5):
        data = scale * torch.randn(3, 4, generator=g, dtype=F64)
        found, plain = (
            bilevel.hypergradient(
                problem,
                torch.tensor([0.3, 1.0], dtype=F64),
                data,
                solver=replace(NEWTON, curvature=Hessian(product=product)),
                linsys=SOLVED,
                curvature=Hessian(product=product),
                compile=c,
            )
            for c in (True, False)
        )
        assert_same(found, plain)


def test_a_write_in_place_stays_with_its_vector() -> None:
    """The buffer is made without v, and holds v when it is read: the reader belongs to the product, and nothing is left over in it."""

    def everything(v: Tensor, u: Tensor, phi: Tensor) -> list[Any]:
        buffer = torch.zeros_like(phi)
        buffer[1:].add_(v[1:])
        return [phi.sum(), 2 * phi, buffer * phi, [u * phi]]

    phi = torch.arange(1.0, 4.0)
    prepare, product, cross = split_linearisation(recorded(everything, phi.clone(), phi.clone(), phi))
    value, grad, for_product, for_cross = prepare(phi)
    assert value == 6 and grad.tolist() == [2, 4, 6]
    for scale in (1.0, 10.0, 1.0):
        v = scale * torch.tensor([5.0, 1.0, -1.0])
        assert product(v, *for_product).tolist() == [0, 2 * scale, -3 * scale]
        assert cross(v, *for_cross)[0].tolist() == (v * phi).tolist()


class Weighted(bilevel.BilevelProblem):
    """G = weight/2 |phi - theta|^2 + |phi|^2/2, phi* = weight theta / (weight + 1)."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def inner_objective(self, phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
        return 0.5 * self.weight * (phi - theta).square().sum() + 0.5 * phi.square().sum()

    def outer_loss(self, phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
        return phi.sum()

    def initial_phi(self, theta: Tensor, data: Any = None) -> Tensor:
        return torch.zeros_like(theta)


def weighted_grad(problem: Weighted) -> float:
    found = bilevel.hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True)
    assert found.inner is not None and found.inner.status is bilevel.Status.CONVERGED
    return found.unwrap()[0].item()


def test_a_captured_value_that_changes_leads_to_a_new_recording() -> None:
    problem = Weighted(1.0)
    assert weighted_grad(problem) == pytest.approx(0.5)
    problem.weight = 3.0
    assert weighted_grad(problem) == pytest.approx(0.75)
    assert bilevel.solve(problem, torch.ones(2, dtype=F64), solver=NEWTON, compile=True).value[0] == pytest.approx(0.75)
    problem.weight = 1.0
    assert bilevel.solve(problem, torch.ones(2, dtype=F64), solver=NEWTON, compile=True).value[0] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_captured_value_that_shows_in_the_curvature_alone(dtype: torch.dtype) -> None:
    """At phi = theta = 0 the gradient of G is zero whatever the weight; dphi/dtheta = weight / (weight + 1) is not."""
    problem, zero = Weighted(1.0), torch.zeros(2, dtype=dtype)
    for weight in (1.0, 3.0):
        problem.weight = weight
        found = bilevel.implicit_gradient(problem, zero, zero, linsys=CG(max_steps=5), compile=True)
        assert found.unwrap()[0].item() == pytest.approx(weight / (weight + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_captured_value_in_an_objective_that_is_small(dtype: torch.dtype) -> None:
    """A mean over many variables: a change by 15 % is one of 1e-4 in a gradient."""
    scale = [1.0]
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - scale[0] * theta).square().mean(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.ones(1000, dtype=dtype)
    for scale[0] in (1.0, 1.01, 1.15):
        found = bilevel.hypergradient(
            problem, theta, solver=NewtonCG(max_steps=5, tol=1e-8), linsys=CG(max_steps=10), compile=True
        )
        torch.testing.assert_close(found.unwrap(), scale[0] * theta)


def test_theta_outside_of_where_the_objective_is_defined() -> None:
    """A factorisation of a matrix that is hardly positive definite, and a distribution that looks at its arguments."""

    def factored(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return (
            0.5 * (torch.linalg.cholesky(theta.reshape(2, 2)).T @ phi).square().sum() + 0.5 * (phi - 1).square().sum()
        )

    def normal(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        distribution = torch.distributions.Normal(phi, theta, validate_args=True)
        return 0.5 * phi.square().sum() - 1e-4 * distribution.log_prob(torch.ones_like(phi)).sum()

    for inner, theta in ((factored, [1.0, 0.0, 0.0, 1e-4]), (normal, [1e-4, 1.0])):
        problem = bilevel.BilevelProblem.from_functions(
            inner, lambda phi, theta, data: phi.sum(), lambda theta, data: theta.new_zeros(2)
        )
        plain, compiled = (
            bilevel.hypergradient(
                problem, torch.tensor(theta, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=compile
            )
            for compile in (False, True)
        )
        assert_same(compiled, plain)
        assert (count(problem) > 0) == (inner is factored)  # a look at numbers cannot be recorded


def test_a_leaf_without_entries() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta["a"]).square().sum() + theta["b"].sum() * phi.sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta["a"]),
    )
    theta = {"a": torch.ones(3, dtype=F64), "b": torch.ones(0, dtype=F64)}
    found = bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVED, compile=True).unwrap()
    assert found["a"].tolist() == [1, 1, 1] and found["b"].shape == (0,) and count(problem) > 0


def test_a_captured_value_that_shows_in_the_cross_derivative_alone() -> None:
    """At theta = 0 neither the gradient of G nor its Hessian knows the scale; dphi/dtheta = -scale does."""
    scale = [1.0]
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * phi.square().sum() + scale[0] * (theta * phi).sum() - phi.sum(),
        lambda phi, theta, data: 0.5 * (phi - 3).square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    for scale[0] in (1.0, 2.0):
        found = bilevel.hypergradient(problem, torch.zeros(3, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True)
        torch.testing.assert_close(found.unwrap(), torch.full((3,), 2 * scale[0], dtype=F64))


def test_theta_at_the_edge_of_where_the_objective_is_defined() -> None:
    """sqrt(theta) at theta = 0: the check cannot look at both sides of it, and still sees that the weight has changed."""
    weight = [1.0]
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            0.5 * weight[0] * (phi - 1).square().sum() + 0.5 * ((1 + theta.sqrt()) * phi.square()).sum()
        ),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.tensor([0.0, 0.0, 4.0], dtype=F64)
    for weight[0] in (1.0, 3.0):
        found = bilevel.solve(problem, theta, solver=NEWTON, compile=True).unwrap()
        torch.testing.assert_close(found, weight[0] / (weight[0] + 1 + theta.sqrt()))


def test_operators_get_the_layout_that_they_were_recorded_with() -> None:
    """The backward pass of a group norm wants a contiguous gradient, which the power of one gives it here."""
    torch.manual_seed(0)

    def normed(theta: Tensor) -> Tensor:
        shift, scale = torch.ones(4).to(theta), torch.arange(4.0).to(theta)
        return torch.nn.functional.group_norm(theta.reshape(2, 4, 3), 2, scale, shift)

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            0.5 * (phi - 0.3).square().sum() + 0.02 * phi.square().mean() * normed(theta).pow(1).sum()
        ),
        lambda phi, theta, data: (phi - 1).square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.randn(24, dtype=F64)
    plain, compiled = (
        bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVED, compile=compile).unwrap()
        for compile in (False, True)
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-12)


def test_shapes_that_depend_on_the_numbers_of_the_data(caplog: pytest.LogCaptureFixture) -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta).square().sum() + 0.5 * phi[data].square().mean(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.ones(6, dtype=F64)
    for count in (3, 5, 5, 1):
        mask = torch.arange(6) < count
        found = bilevel.hypergradient(problem, theta, mask, solver=NEWTON, linsys=SOLVED, compile=True).unwrap()
        torch.testing.assert_close(found, torch.where(mask, 1 / (1 + 1 / count), 1.0).to(F64))
    told = [message for message in caplog.messages if "could not be replayed" in message]
    assert len(told) == 2 and all("Does a shape depend on the numbers in data?" in message for message in told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["product", "cross"])
def test_a_program_that_gives_other_numbers_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, which: str, dtype: torch.dtype
) -> None:
    """The products are compared with autograd's when they are recorded."""

    def wrong(whole: torch.fx.GraphModule) -> Any:
        prepare, product, cross = split_linearisation(whole)
        if which == "product":
            return prepare, lambda v, *saved: 1.01 * product(v, *saved), cross
        return prepare, product, lambda u, *saved: [-leaf for leaf in cross(u, *saved)]

    monkeypatch.setattr("bilevel.recorded.tracing.split_linearisation", wrong)
    theta = torch.ones(2, dtype=dtype)
    found = bilevel.implicit_gradient(Weighted(1.0), 0.5 * theta, theta, linsys=CG(max_steps=5), compile=True)
    assert found.unwrap()[0].item() == pytest.approx(0.5)
    assert any("does not give the same numbers" in message for message in caplog.messages)


def test_a_call_that_failed_leaves_nothing_out_of_date() -> None:
    problem = Weighted(1.0)

    class Broken(NewtonCG):
        def step(self, *arguments: Any) -> Any:
            raise KeyError("the solver fails after its first linearisation")

    with pytest.raises(KeyError):
        bilevel.solve(problem, torch.ones(2, dtype=F64), solver=Broken(tol=1e-11), compile=True)
    problem.weight = 3.0
    assert weighted_grad(problem) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "deep", "pickle"]
)
def test_a_copy_of_a_problem_has_recordings_of_its_own(duplicate: Any) -> None:
    problem = Weighted(1.0)
    weighted_grad(problem)
    before = count(problem)
    other = duplicate(problem)
    other.weight = 3.0
    assert weighted_grad(other) == pytest.approx(0.75)
    assert weighted_grad(problem) == pytest.approx(0.5) and count(problem) == before


def test_chance_in_the_objective_is_an_error() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta - torch.rand_like(phi)).square().sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    with pytest.raises(
        ValueError, match=r"function of phi, theta and data, but two evaluations at the same point differ"
    ):
        bilevel.solve(problem, torch.ones(3), solver=GradientDescent(step_size=0.5, max_steps=3), compile=True)


def test_what_cannot_be_recorded_is_logged_and_computed_without(caplog: pytest.LogCaptureFixture) -> None:
    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        bend = 1.0 if float(theta.detach().sum()) > 0 else 2.0  # a number read from a tensor
        return 0.5 * bend * (phi - theta).square().sum() + 0.5 * phi.square().sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: torch.zeros_like(theta)
    )
    for value, expected in ((1.0, 0.5), (-1.0, 2 / 3)):
        with caplog.at_level(logging.WARNING, logger="bilevel.recorded.programs"):
            found = bilevel.hypergradient(
                problem, torch.full((2,), value, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True
            )
        assert found.unwrap()[0].item() == pytest.approx(expected)
    assert any("could not record" in message and "computed without" in message for message in caplog.messages)


def test_errors_of_the_user_are_those_without_compile() -> None:
    weight = torch.ones((), requires_grad=True)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: weight * (phi - theta).square().sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    for compile in (False, True):
        with pytest.raises(ValueError, match="inner_objective uses a tensor that carries a gradient"):
            bilevel.solve(problem, torch.ones(2), solver=GradientDescent(step_size=0.1, max_steps=2), compile=compile)


def test_warm_start_accuracy_and_the_certificate() -> None:
    problem, theta, data = logistic()
    task = one_task(data, 0)
    first = bilevel.hypergradient(problem, theta, task, solver=NEWTON, linsys=SOLVED, accuracy=1e-6, compile=True)
    assert first.error_estimate is not None and first.error_estimate.item() < 1e-4
    assert "CONVERGED" in first.explain()
    again = bilevel.hypergradient(
        problem, theta + 0.01, task, solver=NEWTON, linsys=SOLVED, warm_start=first, compile=True
    )
    assert_same(
        again,
        bilevel.hypergradient(problem, theta + 0.01, task, solver=NEWTON, linsys=SOLVED, warm_start=first),
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
def test_on_a_gpu() -> None:
    problem, theta, data = logistic()
    data = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in data.items()}
    found = [
        bilevel.hypergradient(problem, theta.cuda(), data, solver=NEWTON, linsys=SOLVED, batched=True, compile=c)
        for c in (False, True)
    ]
    assert_same(found[1], found[0])


def test_what_is_replayed_calls_operators_the_shorter_way() -> None:
    """In every part of a program."""
    problem, theta, data = logistic()
    bilevel.hypergradient(problem, theta, one_task(data, 0), solver=NEWTON, linsys=SOLVED, compile=True)
    programs = Programs.of(problem)._programs
    parts = [part for key, program in programs.items() if key[0] != "linearisation" for part in program]
    parts += [
        getattr(program, name)
        for key, program in programs.items()
        if key[0] == "linearisation"
        for name in ("prepare", "product", "cross")
    ]
    code = "".join(part.__self__.code for part in parts)
    assert "torch.mul(" in code and "aten.mul" not in code and "aten.mm" not in code and "aten.exp." not in code


def test_a_full_matrix_as_lambda_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """The check of the matrix looks at numbers, which what is recorded must not."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(5, 3, generator=g, dtype=F64)
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, _: (X @ phi["w"]).cosh().sum(), lambda phi, _: phi["w"].sum(), lam=torch.eye(3, dtype=F64) + 0.1
    )
    theta = {"w": torch.ones(3, dtype=F64)}
    found = bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVED, compile=True)
    assert count(problem) > 0 and not caplog.records
    assert_same(found, bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVED))


def test_a_captured_value_where_the_objective_is_defined_on_one_side_only() -> None:
    """Near phi = 1e-3 the root has no gradient on the other side of zero; at phi itself it has, and that is compared."""
    weights = torch.ones(4, dtype=F64)

    def inner(p: Tensor, theta: Tensor, data: Any) -> Tensor:
        return (500 * weights * p.square() - 2e-3 * theta * p.sqrt()).sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda p, theta, data: p.sum(), lambda theta, data: torch.full_like(theta, 1e-3)
    )
    options: Any = {"solver": replace(NEWTON, max_steps=60, tol=1e-12), "linsys": SOLVED}
    for weights in (torch.ones(4, dtype=F64), torch.tensor([1.0, 1.0, 4.0, 4.0], dtype=F64)):
        found = bilevel.hypergradient(problem, torch.ones(4, dtype=F64), compile=True, **options)
        # 1000 w p = 1e-3 theta / sqrt(p): p = (1e-6 theta / w)^(2/3)
        torch.testing.assert_close(found.unwrap(), 2 / 3 * (1e-6 / weights) ** (2 / 3), rtol=1e-7, atol=0)


def test_recordings_are_bounded_and_those_in_use_stay(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many examples as calls, and one shape that comes back in between."""
    monkeypatch.setattr("bilevel.recorded.programs.MOST", 8)
    problem, theta, data = logistic()
    task = one_task(data, 0)

    def call(examples: int) -> Any:
        part = {**task, "x": task["x"][:examples], "y": task["y"][:examples], "v": task["v"][:examples]}
        options: Any = {"solver": NEWTON, "linsys": SOLVED}
        found = bilevel.hypergradient(problem, theta, part, compile=True, **options).unwrap()
        torch.testing.assert_close(found, bilevel.hypergradient(problem, theta, part, **options).unwrap())
        return dict(problem._programs._programs)  # type: ignore[attr-defined]

    often = call(10)
    for examples in range(4, 9):
        call(examples)
        again = call(10)
        assert all(again[key] is program for key, program in often.items())  # the same, not made anew
        assert count(problem) <= 8
    (told,) = [message for message in caplog.messages if "recordings for one problem" in message]
    assert "8 recordings" in told and "Pad them to a few sizes" in told


def test_a_copy_of_a_result_answers_without_the_programs() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta.sin()).square().sum() + 0.1 * phi.pow(4).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    options: Any = {"solver": NEWTON, "linsys": SOLVED}
    theta = torch.ones(2, dtype=F64)
    found = bilevel.hypergradient(problem, theta, compile=True, **options)
    copied = copy.deepcopy(found)
    assert float(copied.error_estimate) < 1e-8 and "Eigenvalues" in copied.explain()
    again = bilevel.hypergradient(problem, theta, warm_start=copied, accuracy=1e-6, compile=True, **options)
    torch.testing.assert_close(again.grad, found.grad)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 500.0), (torch.float64, 5e4)])
def test_a_change_that_shows_in_a_variable_of_small_units_leads_to_a_new_recording(
    dtype: torch.dtype, unit: float
) -> None:
    """A column of incomes, a flag and a score: the gradient of the first hides that of the others. Before, the old penalty counted, and
    statuses, residuals and estimates said that all was well.
    """
    g = torch.Generator().manual_seed(0)
    columns = [unit * (1 + 0.3 * torch.randn(200, generator=g)), (torch.rand(200, generator=g) > 0.5).float()]
    x = torch.stack([*columns, torch.randn(200, generator=g)], 1).double()
    y = 0.5 / unit * x[:, 0] + 1.5 * x[:, 1] - x[:, 2]

    class Ridge(bilevel.BilevelProblem):
        penalty = 0.0

        def inner_objective(self, w: Tensor, theta: Tensor, data: Any = None) -> Tensor:
            return 0.5 * (x.to(w) @ w - y.to(w) * theta.exp()).square().mean() + 0.5 * self.penalty * w.square().sum()

        def outer_loss(self, w: Tensor, theta: Tensor, data: Any = None) -> Tensor:
            return w[1]

        def initial_phi(self, theta: Tensor, data: Any = None) -> Tensor:
            return torch.zeros(3, dtype=theta.dtype)

    problem, theta = Ridge(), torch.zeros((), dtype=dtype)
    for problem.penalty in (0.02, 0.2, 0.5):
        solver = NewtonCG(max_steps=50, cg_steps=6, tol=1e-2)
        found = bilevel.hypergradient(problem, theta, solver=solver, linsys=Exact(), compile=True).unwrap()
        matrix = x.T @ x / 200 + problem.penalty * torch.eye(3, dtype=torch.float64)
        exact = torch.linalg.solve(matrix, x.T @ y / 200)[1]  # phi* is linear in exp(theta)
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 1e3), (torch.float32, 1e5), (torch.float64, 1e5), (torch.float64, 1e9)]
)
def test_a_task_beside_larger_ones_does_not_keep_an_old_recording(dtype: torch.dtype, large: float) -> None:
    """theta / phi* = (penalty + x^2) / penalty by hand: what a task answers depends on no other."""

    class Captured:
        penalty = 1.0

    def inner(w: Tensor, theta: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (x * w - x).square().sum() + 0.5 * Captured.penalty * (w - theta).square().sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda w, theta, x: w.sum(), lambda theta, x: torch.zeros_like(theta)
    )
    x, theta = torch.tensor([[large, large], [1.0, 1.0]], dtype=dtype), torch.zeros(2, dtype=dtype)
    for Captured.penalty in (1.0, 3.0):
        found = bilevel.hypergradient(
            problem,
            theta,
            x,
            solver=NewtonCG(max_steps=30, cg_steps=4, tol=1e-3),
            linsys=Exact(),
            batched=True,
            reduction="none",
            compile=True,
        )
        expected = torch.full((2,), Captured.penalty / (1 + Captured.penalty), dtype=dtype)
        torch.testing.assert_close(found.grad[1], expected)


@dataclass(frozen=True, kw_only=True)
class WritesToTheGradient(IterativeSolver):
    """A solver of the user's, which takes what it got for its own."""

    max_steps: int = 4
    tol: float = 0.0
    check_every: int = 1

    def init(self, objective: Any, phi: Tensor) -> State:
        return State.start(phi)

    def step(self, objective: Any, state: State, local: Any) -> State:
        phi = state.point + local.grad.mul_(-0.1)
        return replace(state, phi=phi, point=phi)


GRADIENTS_THAT_ARE_THERE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda phi, theta: (2 * phi).sum(),
    "theta": lambda phi, theta: (theta * phi).sum(),
    "a view of theta": lambda phi, theta: (theta.reshape(3, 1) * phi.reshape(3, 1)).sum(),
    "phi itself": lambda phi, theta: (phi.detach() * phi).sum(),
    "all pieces of phi": lambda phi, theta: (phi.detach().chunk(1)[0] * phi).sum(),
    "a part of theta": lambda phi, theta: theta[0] * phi.mean(),
    "something of theta": lambda phi, theta: (theta.exp() * phi).sum(),
    "no constant": lambda phi, theta: (theta * phi.square()).sum(),
}


@pytest.mark.parametrize("inner", GRADIENTS_THAT_ARE_THERE.values(), ids=GRADIENTS_THAT_ARE_THERE)
def test_a_solver_may_write_to_the_gradient_that_it_got(inner: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What is recorded computes constants once; handing them out, it gave the second step the gradient that the first had
    overwritten, and theta was overwritten with it.
    """
    theta = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: inner(phi, theta),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.ones(3, dtype=F64),
    )
    plain, compiled, again = (
        bilevel.solve(problem, theta, solver=WritesToTheGradient(), compile=compile) for compile in (False, True, True)
    )
    torch.testing.assert_close(compiled.value, plain.value)
    torch.testing.assert_close(again.value, plain.value)
    assert theta.tolist() == [1.0, 2.0, 3.0]


class Scaled(bilevel.BilevelProblem):
    """Ridge regression with what may change from call to call; its closed form."""

    def __init__(self) -> None:
        self.scale: float | None = 1.0
        self.penalty = 1.0

    def inner_objective(self, phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        if self.scale is None:  # a number that the first evaluation looks up
            self.scale = data["x"].abs().max().item()
        fit = (data["x"] / self.scale @ phi - data["y"]).square().sum()
        return 0.5 * fit + 0.5 * self.penalty * (theta.exp() * phi.square()).sum()

    def outer_loss(self, phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return (phi - 1).square().sum()

    def initial_phi(self, theta: Tensor, data: Any) -> Tensor:
        return torch.zeros_like(theta)

    def exact(self, theta: Tensor, data: Any) -> Tensor:
        assert self.scale is not None
        x, weights = data["x"] / self.scale, self.penalty * theta.exp()
        hessian = x.T @ x + weights.diag()
        phi = torch.linalg.solve(hessian, x.T @ data["y"])
        return -weights * phi * torch.linalg.solve(hessian, 2 * (phi - 1))


def ridge_data() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(20, 3, generator=g, dtype=F64), "y": torch.randn(20, generator=g, dtype=F64)}


def test_threads_after_a_change_replay_nothing_that_is_out_of_date() -> None:
    """One of them finds out and records anew; the others are in the middle of a solve with what was recorded before."""
    problem, data, theta = Scaled(), ridge_data(), torch.zeros(3, dtype=F64)
    with ThreadPoolExecutor(4) as threads:
        for k in range(12):
            problem.penalty = 1.0 + 0.5 * k
            exact = problem.exact(theta, data)
            solve = lambda _: bilevel.hypergradient(  # noqa: E731
                problem,
                theta,
                data,
                solver=GradientDescent(step_size=0.02, max_steps=2000, tol=1e-10),
                linsys=SOLVED,
                compile=True,
            ).unwrap(check="converged")
            for found in threads.map(solve, range(4)):
                torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


def test_nothing_is_replayed_where_the_gradient_could_not_be_recorded() -> None:
    """For that is what is verified. The first evaluation looks at a number, those after it do not."""
    problem, data, theta = Scaled(), ridge_data(), torch.zeros(3, dtype=F64)
    problem.scale = None
    for penalty in (1.0, 10.0, 100.0):
        problem.penalty = penalty
        found = bilevel.hypergradient(problem, theta, data, solver=NEWTON, linsys=SOLVED, compile=True).unwrap()
        torch.testing.assert_close(found, problem.exact(theta, data), rtol=1e-8, atol=1e-10)
    assert count(problem) > 0  # tried again, and recorded


def test_a_recording_that_fails_twice_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        tried.append(phi.dtype)
        weight = 2.0 if bool(phi.sum() > 100) else 1.0
        return 0.5 * weight * (phi - theta).square().sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: torch.zeros_like(theta)
    )
    counts = []
    for _ in range(4):
        tried.clear()
        found = bilevel.hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True)
        torch.testing.assert_close(found.unwrap(), torch.ones(2, dtype=F64))
        counts.append(len(tried))
    assert counts[2] == counts[3] < counts[0]
    assert len([message for message in caplog.messages if "could not record the gradient" in message]) == 1


def test_nothing_is_recorded_where_autograd_looks_for_anomalies(caplog: pytest.LogCaptureFixture) -> None:
    problem, data, theta = Scaled(), ridge_data(), torch.zeros(3, dtype=F64)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        bilevel.hypergradient(problem, theta, data, solver=NEWTON, linsys=SOLVED, compile=True).unwrap()
    assert count(problem) == 0 and not caplog.messages
    bilevel.hypergradient(problem, theta, data, solver=NEWTON, linsys=SOLVED, compile=True).unwrap()
    assert count(problem) > 0


@dataclass
class Captured:
    scale: float = 1.0


def pulled(captured: Captured, edge: Callable[[Tensor, Any], Tensor]) -> bilevel.BilevelProblem:
    """At theta = 0 the scale shows in the cross derivative alone: the gradient is that scale. ``edge``: another term."""
    return bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            0.5 * (phi - data).square().sum() - captured.scale * (theta["a"] * phi).sum() + edge(phi, theta)
        ),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(data),
    )


def test_a_change_beside_a_task_that_is_no_number() -> None:
    captured = Captured()
    problem = pulled(captured, lambda phi, theta: 0 * phi.sum())
    data = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]], dtype=F64)
    for scale in (1.0, 5.0):
        captured.scale = scale
        found = bilevel.hypergradient(
            problem,
            {"a": torch.zeros(2, dtype=F64)},
            data,
            solver=NEWTON,
            linsys=SOLVED,
            batched=True,
            reduction="none",
            compile=True,
        )
        assert found.ok_per_task.tolist() == [True, False]
        torch.testing.assert_close(found.grad["a"][0], torch.full((2,), scale, dtype=F64))


def test_a_change_beside_a_leaf_at_the_edge_of_its_domain() -> None:
    captured = Captured()
    problem = pulled(captured, lambda phi, theta: (phi * theta["b"].sqrt()).sum())
    theta = {"a": torch.zeros(2, dtype=F64), "b": torch.full((2,), 1e-6, dtype=F64)}
    for scale in (1.0, 5.0):
        captured.scale = scale
        found = bilevel.hypergradient(
            problem, theta, torch.ones(2, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True
        )
        torch.testing.assert_close(found.unwrap()["a"], torch.full((2,), scale, dtype=F64))


def test_a_change_under_a_theta_that_was_expanded() -> None:
    captured = Captured()
    problem = pulled(captured, lambda phi, theta: 0 * phi.sum())
    for scale in (1.0, 5.0):
        captured.scale = scale
        found = bilevel.hypergradient(
            problem,
            {"a": torch.zeros(1, dtype=F64).expand(3)},
            torch.ones(3, dtype=F64),
            solver=NEWTON,
            linsys=SOLVED,
            compile=True,
        )
        torch.testing.assert_close(found.unwrap()["a"], torch.full((3,), scale, dtype=F64))


def test_the_certificate_of_a_recorded_call_sees_a_change_too() -> None:
    captured = Captured()
    problem = pulled(captured, lambda phi, theta: 0 * phi.sum())
    found = bilevel.hypergradient(
        problem, {"a": torch.ones(2, dtype=F64)}, torch.ones(2, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True
    )
    captured.scale = 2.0
    with pytest.raises(ValueError, match="inner_objective is not what it was"):
        found.explain()


def test_chance_with_a_seed_is_computed_without_recordings(caplog: pytest.LogCaptureFixture) -> None:
    """Its numbers are always the same; a recording would draw on. After two calls it is not tried any more."""

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        weights = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=F64)
        return 0.5 * (weights * (phi - 1).square()).sum() + 0.5 * (theta.exp() * phi.square()).sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: torch.zeros_like(theta)
    )
    weights = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for _ in range(3):
        found = bilevel.hypergradient(problem, torch.zeros(3, dtype=F64), solver=NEWTON, linsys=SOLVED, compile=True)
        torch.testing.assert_close(found.unwrap(), -weights / (weights + 1).square())
    told = [message for message in caplog.messages if "the call was made without" in message]
    assert len(told) == 2 and "seed a generator of its own" in told[0] and "and so are all that follow" in told[1]
    assert not [message for message in caplog.messages if "chance in it" in message]


def test_a_gradient_that_is_recorded_anew_leaves_nothing_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what is verified, for all that was recorded of its kind. Others had pushed it out."""
    monkeypatch.setattr("bilevel.recorded.programs.MOST", 4)
    captured = Captured()
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta).square().sum() + captured.scale * 0.25 * phi.pow(4).sum(),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta, steps = torch.full((3,), 0.9, dtype=F64), GradientDescent(step_size=0.1, max_steps=400, tol=1e-8)
    bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVED, compile=True)
    for n in (4, 5):
        bilevel.solve(problem, torch.ones(n, dtype=F64), solver=steps, compile=True)
    captured.scale = 4.0
    compiled, plain = (
        bilevel.hypergradient(problem, theta, solver=steps, linsys=SOLVED, compile=c).unwrap() for c in (True, False)
    )
    torch.testing.assert_close(compiled, plain)


def test_what_the_objective_raises_at_the_solution_is_not_swallowed() -> None:
    captured = Captured()

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        if captured.scale != 1:
            raise ValueError("the objective has no such scale")
        return 0.5 * (phi - theta).square().sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.square().sum(), lambda theta, data: torch.zeros_like(theta)
    )
    theta = torch.ones(3, dtype=F64)
    captured.scale = 1
    assert bilevel.solve(problem, theta, solver=NEWTON, compile=True).status is bilevel.Status.CONVERGED
    captured.scale = 2
    with pytest.raises(ValueError, match="the objective has no such scale"):
        bilevel.solve(problem, theta, solver=NEWTON, compile=True)
