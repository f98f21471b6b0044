"""quadratic=True: the same numbers from one linearisation, and an error where G is not quadratic. The oracles are closed forms and the
same call without it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
import bilevel.derivatives
import bilevel.quadratic
from bilevel import BilevelProblem, Status
from bilevel.curvature import GaussNewton
from bilevel.linsys import CG, MINRES, Exact
from bilevel.solvers import LBFGS, GradientDescent, NesterovAGD, NewtonCG
from bilevel.trees import flatten
from tests import cases
from tests.cases import Case

F64 = torch.float64
MADE = [cases.ridge, cases.coupled, cases.proximal, cases.learned]
STEPS = [
    GradientDescent(step_size=0.02, max_steps=1),
    GradientDescent(step_size=0.02, max_steps=2),
    GradientDescent(step_size=0.02, max_steps=60),
    GradientDescent(step_size=0.02, max_steps=60, tol=1e-14),
    NesterovAGD(step_size=0.02, max_steps=40),
    NesterovAGD(step_size=None, max_steps=25),
    LBFGS(max_steps=6),
    NewtonCG(max_steps=2, cg_steps=2, cg_rtol=0.0),
]


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def assert_close(found: Any, expected: Any, tol: float) -> None:
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol * (1 + float(b.abs().max())))


def said(case: Case) -> Case:
    case.problem.quadratic = True
    return case


@pytest.mark.parametrize("largest", [2**22, 0], ids=["matrix", "matrix-free"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize(
    "solver", STEPS, ids=lambda solver: f"{type(solver).__name__}-{solver.max_steps}-{solver.tol:g}"
)
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_the_same_steps(make: Any, solver: Any, compile: bool, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the same solution: what a solver has after few steps is the same too."""
    monkeypatch.setattr(bilevel.quadratic, "LARGEST", largest)
    plain, case = make(), said(make())
    options: dict[str, Any] = {"solver": solver, "linsys": CG(max_steps=3, rtol=0.0)}
    expected = bilevel.hypergradient(plain.problem, plain.theta, plain.data, **options)
    found = bilevel.hypergradient(case.problem, case.theta, case.data, compile=compile, **options)
    # a first step size from a difference of two gradients knows them to half of the digits only
    tol = 1e-6 if isinstance(solver, LBFGS) or getattr(solver, "step_size", 1.0) is None else 1e-10
    assert_close(found.phi, expected.phi, tol)
    assert_close(found.grad, expected.grad, 10 * tol)
    assert found.inner is not None and expected.inner is not None
    assert found.inner.codes.equal(expected.inner.codes)
    assert found.inner.steps.equal(expected.inner.steps)
    assert found.linear.steps.equal(expected.linear.steps)
    assert_close(found.inner.residual, expected.inner.residual, 10 * tol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_a_batch_with_a_matrix_for_each_task(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 8, 3, generator=g, dtype=F64).to(dtype), torch.randn(5, 8, generator=g, dtype=F64).to(dtype)
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (data[0] @ w - data[1]).square().sum() + 0.5 * (theta.exp() * w.square()).sum(),
        lambda w, theta, data: (w**3).sum() + theta.sum(),
        lambda theta, data: torch.ones_like(theta),
        quadratic=True,
    )
    theta = torch.tensor([0.1, -0.5, 0.3], dtype=dtype)
    found = bilevel.hypergradient(
        problem,
        theta,
        (x, y),
        solver=GradientDescent(step_size=0.04, max_steps=2000),
        linsys=Exact(),
        batched=True,
        reduction="none",
    )
    for i in range(5):
        matrix = x[i].double().T @ x[i].double() + torch.diag(theta.double().exp())
        w = torch.linalg.solve(matrix, x[i].double().T @ y[i].double())
        expected = 1 - theta.double().exp() * w * torch.linalg.solve(matrix, 3 * w**2)
        tol = 1e-9 if dtype == F64 else 1e-4
        torch.testing.assert_close(found.phi[i].double(), w, rtol=tol, atol=tol)
        torch.testing.assert_close(found.grad[i].double(), expected, rtol=tol, atol=tol)


def test_one_linearisation_and_products_from_a_matrix() -> None:
    """400 steps cost a gradient at the start, one where the quadratic is least, one at the end, and products in autograd for the matrix
    and the check.
    """
    calls = 0

    def inner(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * (w - theta) @ (torch.diag(torch.arange(1.0, 41.0, dtype=F64)) @ (w - theta))

    problem = BilevelProblem.from_functions(
        inner, lambda w, theta, data: w.square().sum(), lambda theta, data: torch.zeros_like(theta), quadratic=True
    )
    theta = torch.linspace(0, 1, 40, dtype=F64)
    found = bilevel.hypergradient(
        problem, theta, solver=GradientDescent(step_size=0.04, max_steps=400), linsys=CG(max_steps=40, rtol=1e-12)
    )
    assert calls == 3
    torch.testing.assert_close(found.grad, 2 * theta, rtol=1e-6, atol=1e-9)


def test_the_matrices_of_a_batch_take_one_product_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several directions at once would copy the data of every task for each of them: d times the memory."""
    shapes = []
    matvec = bilevel.derivatives.Linearisation.matvec

    def watched(self: Any, v: Tensor) -> Tensor:
        shapes.append(tuple(v.shape))
        return matvec(self, v)

    monkeypatch.setattr(bilevel.derivatives.Linearisation, "matvec", watched)
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (data @ (w - theta)).square().sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(theta),
        quadratic=True,
    )
    data = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(6), dtype=F64)
    theta = torch.ones(5, dtype=F64)
    solver = GradientDescent(step_size=0.01, max_steps=50)
    bilevel.hypergradient(problem, theta, data, solver=solver, linsys=CG(max_steps=5), batched=True)
    assert set(shapes) == {(3, 5)} and len(shapes) == 5 + 1  # the columns, and the check


def quartic(quadratic: bool = True) -> BilevelProblem:
    """H changes by 12 t^2."""
    return BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (w - theta).square().sum() + 0.1 * (w**4).sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(theta),
        quadratic=quadratic,
    )


WORDS = r"quadratic=True: expected an inner objective that is quadratic in phi, but its (gradient|Hessian) at the solution differs"


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize(
    "solver", STEPS, ids=lambda solver: f"{type(solver).__name__}-{solver.max_steps}-{solver.tol:g}"
)
def test_what_is_not_quadratic_is_refused(solver: Any, compile: bool) -> None:
    theta = torch.tensor([1.0, 2.0], dtype=F64)
    with pytest.raises(ValueError, match=WORDS):
        bilevel.hypergradient(quartic(), theta, solver=solver, linsys=Exact(), compile=compile)
    with pytest.raises(ValueError, match=WORDS):
        bilevel.solve(quartic(), theta, solver=solver, compile=compile)


def test_also_with_gauss_newton() -> None:
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: phi**2, lambda outputs, data: outputs.square().sum(), lambda phi, data: phi.sum(), 1.0
    )
    problem.quadratic = True
    with pytest.raises(ValueError, match=WORDS):
        bilevel.hypergradient(
            problem,
            torch.ones(2, dtype=F64),
            solver=GradientDescent(step_size=0.05, max_steps=20),
            linsys=CG(max_steps=5),
            curvature=GaussNewton(),
        )


def test_a_hessian_that_changes_where_the_gradient_does_not_is_refused() -> None:
    """The gradient of a w^5 - w^3 term agrees with that of the quadratic at 0 and at the solution; the Hessian does not."""
    bump = 1.0  # where the solution of the quadratic is: the extra gradient 5 w^4 - 10 w^3 + 5 w^2 is zero there, with a slope of 0 at 0
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (w - theta).square().sum() + (w**4 / 4 - bump * w**3 / 3).sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(theta),
        quadratic=True,
    )
    with pytest.raises(ValueError, match="its Hessian at the solution"):
        bilevel.hypergradient(
            problem,
            torch.ones(1, dtype=F64),
            solver=NewtonCG(max_steps=5, cg_steps=1, tol=1e-12),
            linsys=CG(max_steps=3),
        )


def test_a_start_at_the_solution_takes_nothing_from_the_model() -> None:
    """Also of a problem that is not quadratic the gradient is then right."""
    theta = torch.tensor([1.0, 2.0], dtype=F64)
    plain = bilevel.hypergradient(
        quartic(False), theta, solver=NewtonCG(max_steps=30, cg_steps=2, tol=1e-13), linsys=Exact()
    )
    found = bilevel.implicit_gradient(quartic(), plain.phi, theta, linsys=CG(max_steps=5, rtol=1e-13))
    torch.testing.assert_close(found.grad, 1 / (1 + 1.2 * plain.phi**2), rtol=1e-9, atol=0)


def test_what_is_not_finite_is_a_status() -> None:
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * ((w - theta) * data).square().sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(theta),
        quadratic=True,
    )
    theta = torch.ones(2, dtype=F64)
    data = torch.tensor([[1.0, 2.0], [1.0, torch.nan], [1.0, 300.0]], dtype=F64)
    found = bilevel.hypergradient(
        problem,
        theta,
        data,
        solver=GradientDescent(step_size=0.2, max_steps=200),
        linsys=CG(max_steps=5),
        batched=True,
        reduction="none",
    )
    assert found.inner is not None
    assert [Status(int(code)) for code in found.inner.codes] == [Status.MAX_STEPS, Status.NON_FINITE, Status.DIVERGED]
    torch.testing.assert_close(found.grad[0], torch.ones(2, dtype=F64))
    assert found.grad[1:].isnan().all()


@pytest.mark.parametrize(
    "solver", [GradientDescent(step_size=0.7, max_steps=500, tol=1e-4), LBFGS(max_steps=300, tol=1e-4)]
)
@pytest.mark.parametrize("d", [2, 40], ids=["matrix at once", "later"])
def test_a_start_that_is_far_away(solver: Any, d: int) -> None:
    """In float32, 10^4 away: rounding of what is added up at the start is as large as the gradient near the solution. What is called
    converged has converged.
    """
    g = torch.Generator().manual_seed(4)
    curvature, target = torch.rand(30, generator=g) + 0.5, torch.randn(30, d, generator=g)
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * data[0] * (w - data[1]).square().sum() + 0.5 * theta * w.square().sum(),
        lambda w, theta, data: w.sum(),
        quadratic=True,
    )
    init = 1e4 * torch.randn(30, d, generator=g)
    found = bilevel.solve(problem, torch.tensor(0.1), (curvature, target), solver=solver, init=init, batched=True)
    exact = curvature.double()[:, None] * target.double() / (curvature.double()[:, None] + 0.1)
    slope = (curvature.double()[:, None] + 0.1) * (found.value.double() - exact)
    converged = found.codes == int(Status.CONVERGED)
    assert (torch.linalg.vector_norm(slope, dim=-1)[converged] <= 1.1e-4).all()
    assert d > 2 or converged.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_what_cancels_is_no_wrong_claim(dtype: torch.dtype) -> None:
    """Centred features, targets of a thousand: in the gradient terms cancel that are much larger than it."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(20, 50, 4, generator=g, dtype=F64)
    x = (x - x.mean(1, keepdim=True)).to(dtype)
    y = (1000 + 0.01 * torch.randn(20, 50, generator=g, dtype=F64)).to(dtype)
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (data[0] @ w - data[1]).square().sum() + 0.5 * theta * w.square().sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(data[0][0]),
        quadratic=True,
    )
    for solver in (NewtonCG(max_steps=5, cg_steps=4), GradientDescent(step_size=0.01, max_steps=200)):
        bilevel.hypergradient(
            problem, torch.tensor(0.1, dtype=dtype), (x, y), solver=solver, linsys=CG(max_steps=4), batched=True
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rounding_is_never_taken_for_a_wrong_claim(dtype: torch.dtype, data: Any) -> None:
    """Condition numbers up to 1e10, starts far away and at the solution, large offsets."""
    seed = data.draw(st.integers(0, 10**6))
    kappa = 10.0 ** data.draw(st.floats(0, 10 if dtype == F64 else 4))
    size, offset = (10.0 ** data.draw(st.floats(-3, 3)) for _ in range(2))
    d = data.draw(st.integers(1, 8))
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))[0]
    eigenvalues = torch.logspace(0, 1, d, dtype=F64) ** torch.log10(torch.tensor(kappa, dtype=F64))
    root = (q * (eigenvalues / eigenvalues.max()).sqrt()).T.to(dtype)
    target = offset * torch.randn(d, generator=g, dtype=F64).to(dtype)
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (data @ (w - theta)).square().sum() + 1e-3 / kappa * w.square().sum(),
        lambda w, theta, data: w.square().sum(),
        quadratic=True,
    )
    start = data.draw(st.sampled_from([target, size * torch.randn(d, generator=g, dtype=F64).to(dtype)]))
    for solver in (NewtonCG(max_steps=3, cg_steps=d), GradientDescent(step_size=0.9, max_steps=30)):
        bilevel.hypergradient(problem, target, root, solver=solver, linsys=MINRES(max_steps=d), init=start)


def test_gauss_newton_and_damping() -> None:
    plain, case = cases.proximal(), said(cases.proximal())
    for options in ({"curvature": GaussNewton()}, {"damping": 0.3}):
        found, expected = (
            bilevel.hypergradient(
                one.problem,
                one.theta,
                one.data,
                solver=GradientDescent(step_size=0.02, max_steps=300),
                linsys=CG(max_steps=20, rtol=1e-12),
                **options,
            )
            for one in (case, plain)
        )
        assert_close(found.grad, expected.grad, 1e-9)


def test_the_estimate_of_what_is_not_quadratic_after_all() -> None:
    """A soft variable hides from the check behind a stiff one; the estimate asks G itself, and sees it."""
    problem = BilevelProblem.from_functions(
        lambda p, t, d: 0.5 * 1e4 * (p[0] - 1) ** 2 + 0.5 * (p[1] - t[0]) ** 2 + 0.25 * p[1] ** 4,
        lambda p, t, d: p.sum(),
        lambda t, d: torch.zeros(2),
        quadratic=True,
    )
    result = bilevel.hypergradient(
        problem, torch.tensor([1.0]), solver=NewtonCG(max_steps=30, cg_steps=10, tol=1e-3), linsys=Exact()
    )
    exact = 1 / (1 + 3 * 0.6823278038280193**2)  # at the root of p + p^3 = 1
    error = abs(float(result.grad) - exact)
    assert error > 0.5 and 0.5 * error < float(result.error_estimate) < 2 * error
    assert "The inner solve limits the accuracy" in result.explain()
