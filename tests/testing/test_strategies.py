"""bilevel.testing.strategies against NumPy, mpmath, exact fractions and central differences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import hypothesis
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
from bilevel.linsys import Exact
from bilevel.solvers import NewtonCG
from bilevel.testing import strategies
from bilevel.testing.strategies import Case, Matrix, trees
from bilevel.testing.strategies.elementwise import BOUNDED, LOGISTIC, SQUARED, Loss
from bilevel.testing.strategies.oracle import Derivatives, exact
from bilevel.trees import flatten, layout_of, unflatten

F32, F64 = torch.float32, torch.float64
EPS = float(np.finfo(np.float64).eps)

MATRICES: dict[str, Callable[..., st.SearchStrategy[Matrix]]] = {
    "spd": strategies.spd_matrices,
    "indefinite": strategies.indefinite_matrices,
    "singular": strategies.singular_matrices,
}
PROBLEMS: dict[str, Callable[..., st.SearchStrategy[Case]]] = {
    "quadratic": strategies.quadratic_problems,
    "nonquadratic": strategies.nonquadratic_problems,
    "ridge": strategies.ridge_problems,
    "logistic": strategies.logistic_problems,
    "proximal": strategies.proximal_problems,
    "batches": strategies.task_batches,
}
every_matrix = pytest.mark.parametrize("kind", MATRICES)
every_problem = pytest.mark.parametrize("kind", PROBLEMS)


def for_all(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    """Run ``check`` on so many draws. Inside a parametrised test, so that every strategy is a test of its own."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    run()


def find(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> Any:
    """The smallest example with the property; an error if there is none among many."""
    return hypothesis.find(strategy, condition, settings=settings(max_examples=2000, deadline=None, database=None))


# ----------------------------------------------------------------------------------------------------------------------
# Matrices.


@every_matrix
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_matrix_has_the_spectrum_that_it_is_said_to_have(kind: str, dtype: torch.dtype) -> None:
    def check(matrix: Matrix) -> None:
        a, values, vectors = (x.double().numpy() for x in (matrix.value, matrix.eigenvalues, matrix.eigenvectors))
        d = len(a)
        eps = torch.finfo(dtype).eps
        rounding = 4 * d * eps * np.abs(values).max()
        assert matrix.value.dtype == matrix.eigenvalues.dtype == matrix.eigenvectors.dtype == dtype
        assert a.shape == vectors.shape == (d, d) and 1 <= d <= 20
        assert np.array_equal(a, a.T)
        assert np.abs(np.linalg.eigvalsh(a) - values).max() <= rounding
        assert np.linalg.norm(a @ vectors - vectors * values, 2) <= 2 * rounding
        assert np.linalg.norm(vectors.T @ vectors - np.eye(d), 2) <= 8 * d * eps
        v = np.random.default_rng(0).standard_normal((3, 2, d))
        got = matrix.matvec(torch.tensor(v, dtype=dtype)).double().numpy()
        np.testing.assert_allclose(got, v @ a, rtol=0, atol=64 * eps * np.abs(a).sum())

    for_all(MATRICES[kind](dtype=dtype), check, 60)


def test_spd_matrices_are_definite_and_as_ill_conditioned_as_asked_for() -> None:
    def check(matrix: Matrix) -> None:
        np.linalg.cholesky(matrix.value.numpy())
        assert 1e8 * 0.999 <= matrix.kappa <= 1e11 * 1.001

    for_all(strategies.spd_matrices(min_dim=2, min_kappa=1e8, max_kappa=1e11), check, 60)
    for_all(strategies.spd_matrices(dtype=F32), lambda m: np.linalg.cholesky(m.value.numpy()) is None, 60)


def test_indefinite_matrices_have_both_signs_and_singular_ones_a_null_space() -> None:
    def indefinite(matrix: Matrix) -> None:
        values = np.linalg.eigvalsh(matrix.value.numpy())
        assert values[0] < 0 < values[-1]
        assert np.abs(values).min() >= np.abs(values).max() / 1.001e6

    def singular(matrix: Matrix) -> None:
        a = matrix.value.numpy()
        rank = np.linalg.matrix_rank(a, hermitian=True, tol=1e-7 * np.linalg.norm(a, 2))
        nullity = int((matrix.eigenvalues == 0).sum())
        assert matrix.kappa == np.inf and 1 <= nullity == len(a) - rank < len(a)
        null = matrix.eigenvectors.numpy()[:, :nullity]
        assert np.abs(a @ null).max() <= 4 * len(a) * EPS * np.linalg.norm(a, 2)

    for_all(strategies.indefinite_matrices(), indefinite, 60)
    for_all(strategies.singular_matrices(), singular, 60)


# ----------------------------------------------------------------------------------------------------------------------
# Problems. The oracles take the two functions of the problem, and nothing of the library.


@dataclass(frozen=True)
class Dense:
    """One task of a case: G and L over vectors, their dense derivatives by autograd, and the answers as NumPy arrays."""

    case: Case
    theta: Tensor
    phi: Tensor
    grad: np.ndarray
    data: dict[str, Tensor]
    constants: dict[str, float]

    def G(self, phi: Tensor, theta: Tensor) -> Tensor:
        return self._value(self.case.problem.inner_objective, phi, theta)

    def L(self, phi: Tensor, theta: Tensor) -> Tensor:
        return self._value(self.case.problem.outer_loss, phi, theta)

    def _value(self, fn: Callable[..., Tensor], phi: Tensor, theta: Tensor) -> Tensor:
        phi_layout, _ = layout_of(self.case.phi, int(self.case.batched))
        theta_layout, _ = layout_of(self.case.theta)
        return fn(phi_layout.unravel(phi), theta_layout.unravel(theta), self.data)

    def slope(self, phi: Tensor, theta: Tensor) -> np.ndarray:
        return torch.func.grad(self.G)(phi, theta).numpy()

    def hessian(self, phi: Tensor) -> np.ndarray:
        return torch.func.jacrev(torch.func.grad(self.G))(phi, self.theta).numpy()

    def cross(self, phi: Tensor) -> np.ndarray:
        return torch.func.jacrev(torch.func.grad(self.G), argnums=1)(phi, self.theta).numpy()

    def outer(self, phi: Tensor) -> tuple[np.ndarray, np.ndarray]:
        b, direct = torch.func.grad(self.L, argnums=(0, 1))(phi, self.theta)
        return b.numpy(), direct.numpy()

    def solution(self, theta: Tensor) -> Tensor:
        """Newton's method with dense matrices, halving the step while it does not lower the norm of the gradient."""
        phi = torch.zeros_like(self.phi)
        for _ in range(100):
            g = self.slope(phi, theta)
            H = torch.func.jacrev(torch.func.grad(self.G))(phi, theta).numpy()
            step = torch.from_numpy(np.linalg.solve(H, -g))
            lengths = (
                t for t in 0.5 ** np.arange(30) if np.linalg.norm(self.slope(phi + t * step, theta)) < np.linalg.norm(g)
            )
            length = next(lengths, None)
            if length is None:
                break
            phi = phi + length * step
        return phi


def vector(tree: Any, batch_ndim: int = 0) -> Tensor:
    layout, leaves = layout_of(tree, batch_ndim)
    return layout.ravel(leaves).double()


def tasks(case: Case) -> list[Dense]:
    """The tasks of a case, in float64."""
    data = {name: x.double() if x.is_floating_point() else x for name, x in case.data.items()}
    named = {**{name: getattr(case.constants, name) for name in ("mu", "rho", "B", "L", "C")}, "beta": case.beta}
    theta = vector(case.theta)
    if not case.batched:
        return [Dense(case, theta, vector(case.phi), vector(case.grad).numpy(), data, named)]
    grad = vector(case.grad, 1).numpy()
    return [
        Dense(
            case,
            theta,
            phi,
            grad[k],
            {name: x[k] for name, x in data.items()},
            {name: None if value is None else float(value[k]) for name, value in named.items()},
        )
        for k, phi in enumerate(vector(case.phi, 1))
    ]


def formula(task: Dense, phi: Tensor) -> tuple[np.ndarray, float, float]:
    """The implicit gradient at phi by dense algebra, the size of what was subtracted to get it, and the condition number of H.

    The cross derivative, b and dL/dtheta, too, may be small differences of terms as large as their slopes times |phi|.
    """
    H, cross, (b, direct) = task.hessian(phi), task.cross(phi), task.outer(phi)
    u = np.linalg.solve(H, b)
    length, known = np.linalg.norm(phi), task.constants
    terms = np.linalg.norm(direct) + known["L"] * length
    size = terms + (np.linalg.norm(cross, 2) + known["rho"] * length) * (np.linalg.norm(u) + terms / known["mu"])
    return direct - cross.T @ u, size, np.linalg.cond(H)


@every_problem
def test_solution_and_gradient_are_those_of_dense_algebra(kind: str) -> None:
    def check(case: Case) -> None:
        for task in tasks(case):
            H, rounding = task.hessian(task.phi), 100 * EPS
            step = np.linalg.solve(H, task.slope(task.phi, task.theta))
            at_zero = np.linalg.norm(task.slope(torch.zeros_like(task.phi), task.theta))
            size = np.linalg.norm(H, 2) * np.linalg.norm(task.phi) + at_zero  # of the terms of the slope
            assert np.linalg.norm(step) <= rounding * size / np.linalg.eigvalsh(H)[0]
            grad, size, kappa = formula(task, task.phi)
            assert np.linalg.norm(grad - task.grad) <= rounding * kappa * size

    for_all(PROBLEMS[kind](), check, 40)


@every_problem
def test_float32_cases_are_exact_for_the_rounded_numbers(kind: str) -> None:
    def check(case: Case) -> None:
        leaves = flatten((case.theta, case.phi, case.grad))[0] + [
            x for x in case.data.values() if x.is_floating_point()
        ]
        assert {leaf.dtype for leaf in leaves} == {F32}
        for task in tasks(case):
            phi = task.solution(task.theta)
            # the oracle is in float64 at the same numbers, so what is left is one rounding to float32
            assert np.linalg.norm(task.phi - phi) <= 1e-7 * np.linalg.norm(phi) + 1e-12
            grad, size, _ = formula(task, phi)
            assert np.linalg.norm(grad - task.grad) <= 1e-7 * np.linalg.norm(grad) + 1e-11 * size

    for_all(PROBLEMS[kind](dtype=F32, max_dim=4), check, 12)


@every_problem
def test_gradient_is_that_of_central_differences(kind: str) -> None:
    """F(theta) = L(phi*(theta), theta), solved again at theta +- h e_i by a Newton method of this file."""

    def check(case: Case) -> None:
        for task in tasks(case):
            h = 1e-3 * (float(task.theta.abs().max()) or 1.0)

            def F(theta: Tensor, task: Dense = task) -> float:
                return float(task.L(task.solution(theta), theta))

            size = len(task.theta)
            for i in range(min(size, 2)):
                e = torch.eye(size, dtype=F64)[i] * h
                # fourth order: (8 (F(h) - F(-h)) - (F(2h) - F(-2h))) / 12 h
                got = (
                    8 * (F(task.theta + e) - F(task.theta - e)) - (F(task.theta + 2 * e) - F(task.theta - 2 * e))
                ) / (12 * h)
                rounding = 1e-13 * abs(F(task.theta)) / h
                assert abs(got - task.grad[i]) <= 1e-6 * np.abs(task.grad).max() + rounding

    for_all(PROBLEMS[kind](max_kappa=30, max_dim=3), check, 3 if kind == "batches" else 6)


def per_task(case: Case, result: bilevel.Hypergradient) -> list[tuple[Dense, np.ndarray, np.ndarray]]:
    """Each task with phi and the gradient that came out for it, as vectors."""
    batch_ndim = int(case.batched)
    phi, grad = (np.atleast_2d(vector(tree, batch_ndim).numpy()) for tree in (result.phi, result.grad))
    return list(zip(tasks(case), phi, grad, strict=True))


@every_problem
def test_hypergradient_agrees(kind: str) -> None:
    """What users do with a case."""

    def check(case: Case) -> None:
        d = len(tasks(case)[0].phi)
        solver = NewtonCG(max_steps=60, cg_steps=3 * d, tol=1e-11)
        result = bilevel.hypergradient(
            case.problem, case.theta, case.data, solver=solver, linsys=Exact(), batched=case.batched, reduction="none"
        )
        assert bool(result.ok_per_task.all())
        assert flatten(result.phi)[1] == flatten(case.phi)[1] and flatten(result.grad)[1] == flatten(case.grad)[1]
        for task, phi, grad in per_task(case, result):
            _, size, _ = formula(task, task.phi)
            assert np.linalg.norm(phi - task.phi.numpy()) <= 1e-8 * np.linalg.norm(task.phi)
            assert np.linalg.norm(grad - task.grad) <= 1e-9 * size

    for_all(PROBLEMS[kind](max_kappa=1e3, max_dim=5), check, 20)


@every_problem
def test_hypergradient_agrees_in_float32(kind: str) -> None:
    def check(case: Case) -> None:
        result = bilevel.implicit_gradient(
            case.problem, case.phi, case.theta, case.data, linsys=Exact(), batched=case.batched, reduction="none"
        )
        for task, _, grad in per_task(case, result):
            _, size, kappa = formula(task, task.phi)
            assert np.linalg.norm(grad - task.grad) <= 100 * torch.finfo(F32).eps * kappa * size

    for_all(PROBLEMS[kind](dtype=F32), check, 30)


# ----------------------------------------------------------------------------------------------------------------------
# How exact "exact" is: arithmetic with more digits, for systems on which float64 alone loses half of its digits.


def solved_in_fractions(matrix: np.ndarray, b: np.ndarray) -> list[Fraction]:
    """Gauss-Jordan elimination, exactly."""
    rows = [[Fraction(x) for x in row] + [Fraction(y)] for row, y in zip(matrix.tolist(), b, strict=True)]
    for k in range(len(rows)):
        rows[k:] = sorted(rows[k:], key=lambda row: -abs(row[k]))
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in range(len(rows)):
            if i != k:
                rows[i] = [x - rows[i][k] * y for x, y in zip(rows[i], rows[k], strict=True)]
    return [row[-1] for row in rows]


def test_quadratic_cases_are_right_to_the_last_digits_at_any_condition_number() -> None:
    def check(case: Case) -> None:
        data = {name: x.numpy() for name, x in case.data.items()}
        as_fractions = {name: np.vectorize(Fraction, otypes=[object])(x) for name, x in data.items()}
        theta = np.array([Fraction(x) for x in case.theta.tolist()], dtype=object)
        phi = solved_in_fractions(data["A"], as_fractions["C"] @ theta + as_fractions["c"])
        assert np.abs(case.phi.numpy() - np.array(phi, dtype=float)).max() <= 2 * EPS * float(max(map(abs, phi)))
        if "squared" not in case.name:
            return
        F = as_fractions["F"]
        slope = F @ phi - as_fractions["t"] + (as_fractions["G"] @ theta if "G" in data else 0)
        u = solved_in_fractions(data["A"], F.T @ slope)
        grad = as_fractions["C"].T @ u + (as_fractions["G"].T @ slope if "G" in data else 0)
        assert np.abs(case.grad.numpy() - grad.astype(float)).max() <= 2 * EPS * float(max(map(abs, grad)))

    limits = {"min_dim": 2, "max_dim": 5, "min_kappa": 1e6, "max_kappa": 1e12}
    for_all(strategies.quadratic_problems(structured=False, **limits), check, 30)


def test_logistic_cases_are_right_to_the_last_digits_at_any_condition_number() -> None:
    """Newton's method in 60 digits, by mpmath."""

    def check(case: Case) -> None:
        matrix = mpmath.matrix
        with mpmath.workdps(60):
            X, X_val = matrix(case.data["X"].tolist()), matrix(case.data["X_val"].tolist())
            y, y_val = matrix(case.data["y"].tolist()), matrix(case.data["y_val"].tolist())
            penalty = [mpmath.exp(theta) for theta in case.theta.tolist()] * (X.cols if len(case.theta) == 1 else 1)
            P = mpmath.diag(penalty)

            def chances(X: Any, phi: Any) -> list[Any]:
                return [1 / (1 + mpmath.exp(-z)) for z in X * phi]

            phi = matrix(case.phi.tolist())  # the start; what is left of an error in it is its square
            for _ in range(4):
                s = chances(X, phi)
                H = X.T * mpmath.diag([p * (1 - p) for p in s]) * X / X.rows + P
                phi = phi - mpmath.lu_solve(H, X.T * (matrix(s) - y) / X.rows + P * phi)
            b = X_val.T * (matrix(chances(X_val, phi)) - y_val) / X_val.rows
            u = mpmath.lu_solve(H, b)
            each = [-a * f * v for a, f, v in zip(penalty, phi, u, strict=True)]
            grad = each if len(case.theta) == len(each) else [sum(each)]
            if "theta also in L" in case.name:
                grad = [g + mpmath.mpf(theta) / 10 for g, theta in zip(grad, case.theta.tolist(), strict=True)]
            grad = np.array([float(g) for g in grad])
            phi = np.array([float(f) for f in phi])
        assert np.abs(case.phi.numpy() - phi).max() <= 2 * EPS * np.abs(phi).max()
        assert np.abs(case.grad.numpy() - grad).max() <= 2 * EPS * np.abs(grad).max()

    cases = strategies.logistic_problems(min_dim=2, max_dim=4, min_kappa=1e6, max_kappa=1e10, structured=False)
    for_all(cases.filter(lambda case: "weights" not in case.name), check, 20)


def test_the_oracle_says_so_when_float64_cannot_find_the_solution() -> None:
    hilbert = 1 / (np.arange(14)[:, None] + np.arange(14) + 1.0)

    def derive(n: dict[str, Any]) -> Derivatives:
        return Derivatives(
            gradient=lambda phi: n["A"] @ phi - 1,
            product=lambda phi, v: n["A"] @ v,
            cross=lambda phi, u: u,
            outer=lambda phi: (phi, 0),
        )

    with pytest.raises(ArithmeticError, match="too ill-conditioned for float64"):
        exact(derive, {"A": hilbert}, 14)


# ----------------------------------------------------------------------------------------------------------------------
# The constants.


@pytest.mark.parametrize("loss", [SQUARED, BOUNDED, LOGISTIC], ids=["squared", "bounded", "logistic"])
def test_losses_have_the_derivatives_and_the_bounds_that_they_state(loss: Loss) -> None:
    z = torch.linspace(-50, 50, 200_001, dtype=F64)
    derivatives = [z]
    fn: Callable[[Tensor], Tensor] = loss.value
    for _ in range(3):
        fn = torch.func.grad(lambda x, fn=fn: fn(x).sum())
        derivatives.append(fn(z))
    np.testing.assert_allclose(loss.first(z.numpy()), derivatives[1], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(loss.second(z.numpy()), derivatives[2], rtol=1e-14, atol=1e-15)
    for bound, derivative in zip(loss.bounds, derivatives[1:], strict=True):
        largest = float(derivative.abs().max())
        assert bound is None or largest * (1 - 1e-12) <= bound <= largest * (1 + 1e-3)


@every_problem
def test_no_constant_is_violated_anywhere(kind: str) -> None:
    """Second derivatives by autograd, at pairs of points near and far, along the directions in which they change most."""

    def check(case: Case) -> None:
        generator = torch.Generator().manual_seed(1)
        for task in tasks(case):
            known = task.constants
            d = len(task.phi)
            for radius in (1e-2, 1.0, 30.0):
                size = radius / np.linalg.norm(task.data["X" if "X" in task.data else "A"], 2) ** 0.5
                phi, other = (task.phi + size * torch.randn(d, generator=generator, dtype=F64) for _ in range(2))
                distance = np.linalg.norm(phi - other)
                H, H_other = task.hessian(phi), task.hessian(other)
                rounding = 100 * EPS * known["beta"]
                values = np.linalg.eigvalsh(H)
                assert known["mu"] - rounding <= values[0] and values[-1] <= known["beta"] + rounding
                assert np.linalg.norm(H - H_other, 2) <= known["rho"] * distance + rounding
                cross, cross_other = task.cross(phi), task.cross(other)
                terms = 100 * EPS * np.linalg.norm(cross, 2)
                assert np.linalg.norm(cross - cross_other, 2) <= known["rho"] * distance + terms
                if known["C"] is not None:
                    assert np.linalg.norm(cross, 2) <= known["C"] * (1 + 100 * EPS)
                gradients, others = task.outer(phi), task.outer(other)
                if known["B"] is not None:
                    assert np.linalg.norm(gradients[0]) <= known["B"] * (1 + 100 * EPS)
                both = np.concatenate(gradients) - np.concatenate(others)
                size = np.linalg.norm(np.concatenate(gradients))
                assert np.linalg.norm(both) <= known["L"] * distance + 1000 * EPS * size

    for_all(PROBLEMS[kind](), check, 30)


@pytest.mark.parametrize("kappa", [2.0, 50.0])
@pytest.mark.parametrize(("kind", "name"), [("nonquadratic", "W"), ("logistic", "X"), ("proximal", "X")])
def test_the_constants_of_one_variable_are_the_best_ones(kind: str, name: str, kappa: float) -> None:
    """With one variable and one example the bounds are attained: what is 10 % too small or too large would be seen here."""

    def simple(case: Case) -> bool:
        one = len(case.data[name]) == 1 and case.constants.rho > 0 and case.kappa > 0.9 * kappa
        return one and "weights" not in case.name

    (task,) = tasks(find(PROBLEMS[kind](max_dim=1, max_kappa=100.0, structured=False), simple))
    # the loss of the one example is f(x phi + ..): its curvature is largest where the argument is 0, its change where it is about 1
    points = task.phi + torch.linspace(-60, 60, 2001, dtype=F64)[:, None] / task.data[name].reshape(-1)
    derivatives = torch.func.jacrev(torch.func.grad(task.G), argnums=(0, 1))
    H, cross = torch.func.vmap(lambda phi: derivatives(phi, task.theta))(points)
    spacing = (points[1:] - points[:-1]).norm(dim=-1)
    changes = [x.diff(dim=0).flatten(1).norm(dim=-1) / spacing for x in (H, cross)]
    assert 0.99 * task.constants["beta"] <= float(H.max()) <= task.constants["beta"]
    assert 0.95 * task.constants["rho"] <= float(torch.stack(changes).max()) <= task.constants["rho"]


def test_constants_of_quadratic_problems_are_those_of_the_matrices() -> None:
    def check(case: Case) -> None:
        values = np.linalg.eigvalsh(case.data["A"].numpy())
        assert case.constants.everywhere and case.constants.rho == 0
        assert case.constants.mu == pytest.approx(values[0], rel=1e-6) and case.constants.mu <= values[0]
        assert case.beta == pytest.approx(values[-1], rel=1e-9) and case.beta >= values[-1]
        assert pytest.approx(np.linalg.norm(case.data["C"].numpy(), 2), rel=1e-9) == case.constants.C
        assert case.kappa == case.beta / case.constants.mu
        assert case.problem.constants is case.constants

    for_all(strategies.quadratic_problems(), check, 40)


@pytest.mark.parametrize("kind", sorted(set(PROBLEMS) - {"batches"}))
def test_condition_numbers_are_as_asked_for(kind: str) -> None:
    def check(case: Case) -> None:
        assert 1 <= case.kappa <= 1e4 * (1 + 1e-6)

    for_all(PROBLEMS[kind](max_kappa=1e4), check, 40)
    assert find(PROBLEMS[kind](min_dim=2, min_kappa=1e5), lambda case: case.kappa > 0.9e5)


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn.


def test_batches_hold_tasks_of_unequal_difficulty() -> None:
    def check(case: Case) -> None:
        count = len(flatten(case.phi)[0][0])
        assert case.batched and 3 <= count <= 4
        leading = {len(leaf) for leaf in [*flatten((case.phi, case.grad))[0], *case.data.values()]}
        assert leading == {count}
        for value in (case.beta, case.constants.mu, case.constants.rho, case.constants.L):
            assert isinstance(value, Tensor) and value.shape == (count,) and value.dtype == F64

    for_all(strategies.task_batches(min_tasks=3, max_tasks=4), check, 30)
    spread = find(strategies.task_batches(min_dim=2), lambda case: bool(case.kappa.max() > 1e4 * case.kappa.min()))
    assert bool(spread.kappa.max() <= 1e6 * 1.01)


def test_a_task_of_a_batch_is_the_problem_that_it_is_alone() -> None:
    """Its slice of the data, with the constants of its own, to the last digit."""

    def check(case: Case) -> None:
        for k, task in enumerate(tasks(case)):
            alone = bilevel.implicit_gradient(
                case.problem, layout_of(case.phi, 1)[0].unravel(task.phi), case.theta, task.data, linsys=Exact()
            )
            _, size, kappa = formula(task, task.phi)
            assert np.linalg.norm(vector(alone.grad).numpy() - task.grad) <= 100 * EPS * kappa * size
            assert float(case.constants.mu[k]) == task.constants["mu"]
            if "A" in case.data and "W" not in case.data:
                assert float(case.beta[k]) == pytest.approx(np.linalg.norm(task.data["A"].numpy(), 2), rel=1e-10)

    for_all(strategies.task_batches(max_kappa=100.0), check, 15)


def has_tree(tree: Any) -> bool:
    return isinstance(tree, dict)


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        ("quadratic", lambda case: has_tree(case.phi) and has_tree(case.theta)),
        ("quadratic", lambda case: not has_tree(case.phi) and vector(case.phi).numel() != vector(case.theta).numel()),
        ("quadratic", lambda case: "G" in case.data and case.constants.B is not None),
        ("quadratic", lambda case: "G" not in case.data and case.constants.B is None),
        ("quadratic", lambda case: list(case.phi) == ["weight", "bias"] and isinstance(case.phi["bias"], list)),
        ("nonquadratic", lambda case: case.constants.rho > 0 and vector(case.phi).numel() < vector(case.theta).numel()),
        *[("ridge", lambda case, r=role: r in case.name) for role in ("penalties", "penalty,", "weights", "targets")],
        *[("logistic", lambda case, r=role: r in case.name) for role in ("penalties", "penalty,", "weights")],
        ("logistic", lambda case: case.data["y"].dtype == torch.int64 and set(case.data["y"].tolist()) == {0, 1}),
        ("logistic", lambda case: len(case.data["X"]) < case.data["X"].shape[1]),
        *[("proximal", lambda case, k=lam: k in case.name) for lam in ("number", "leaves", "diagonal", "matrix")],
        *[("proximal", lambda case, k=loss: k in case.name) for loss in ("squared", "logistic")],
        ("proximal", lambda case: isinstance(case.problem.lam, dict) and has_tree(case.theta)),
        *[("batches", lambda case, f=family: case.name.startswith(f)) for family in ("quadratic", "ridge", "proximal")],
    ],
)
def test_what_a_problem_can_look_like(kind: str, condition: Callable[[Case], bool]) -> None:
    find(PROBLEMS[kind](), condition)


def test_leaves_are_coupled() -> None:
    case = find(
        strategies.quadratic_problems(min_kappa=100.0, min_dim=3),
        lambda case: has_tree(case.phi) and "seed=0" not in case.name,
    )
    (task,) = tasks(case)
    split = len(case.phi["weight"].reshape(-1))
    H = task.hessian(task.phi)
    assert np.linalg.norm(H[:-split, -split:], 2) > 1e-3 * np.linalg.norm(H, 2)  # bias first: ravel order


def test_unstructured_variables_are_vectors() -> None:
    for_all(
        strategies.proximal_problems(structured=False),
        lambda case: (
            torch.testing.assert_close(case.phi.shape, case.theta.shape) if case.phi.ndim == 1 else pytest.fail()
        ),
        30,
    )


def test_trees_are_within_their_limits() -> None:
    def check(tree: Any) -> None:
        leaves, structure = flatten(tree)
        assert 1 <= len(leaves) <= 4
        for leaf in leaves:
            assert leaf.dtype == F32 and leaf.ndim <= 2 and all(1 <= size <= 3 for size in leaf.shape)
        rebuilt = unflatten(structure, leaves)
        assert flatten(rebuilt)[1] == structure

    for_all(trees(max_leaves=4, max_size=3, dtype=F32), check, 100)


@pytest.mark.parametrize(
    "condition",
    [
        lambda tree: isinstance(tree, dict) and list(tree) != sorted(tree),
        lambda tree: isinstance(tree, tuple) and any(isinstance(child, dict) for child in tree),
        lambda tree: isinstance(tree, list) and any(isinstance(child, list | tuple) for child in tree),
        lambda tree: len(flatten(tree)[0]) == 5,
        lambda tree: any(leaf.ndim == 2 for leaf in flatten(tree)[0]),
    ],
)
def test_what_a_tree_can_look_like(condition: Callable[[Any], bool]) -> None:
    find(trees(), condition)


def draws(strategy: st.SearchStrategy[Any]) -> list[Any]:
    seen: list[Any] = []

    @hypothesis.seed(3)
    @settings(max_examples=5, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def run(value: Any) -> None:
        seen.append(value)

    run()
    return seen


def test_the_same_draw_gives_the_same_numbers() -> None:
    one, two = draws(strategies.logistic_problems()), draws(strategies.logistic_problems())
    assert len(one) == len(two) == 5 and len({case.name for case in one}) > 1
    for a, b in zip(one, two, strict=True):
        assert a.name == b.name
        for x, y in zip(*(flatten((case.theta, case.data, case.phi, case.grad))[0] for case in (a, b)), strict=True):
            assert torch.equal(x, y)


# ----------------------------------------------------------------------------------------------------------------------
# What a failure is reduced to, and how it reads.


def test_matrices_shrink_to_readable_ones() -> None:
    smallest = find(strategies.spd_matrices(), lambda matrix: True)
    assert torch.equal(smallest.value, torch.ones(1, 1, dtype=F64))
    ill = find(strategies.spd_matrices(), lambda matrix: matrix.kappa >= 99)
    assert torch.equal(ill.value, ill.eigenvalues.diag()) and len(ill.value) == 2
    assert ill.eigenvalues[1] == 1 and 99 <= ill.kappa < 150
    indefinite = find(strategies.indefinite_matrices(), lambda matrix: True)
    assert torch.equal(indefinite.value, torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=F64))


def test_trees_shrink_to_a_number() -> None:
    assert torch.equal(find(trees(), lambda tree: True), torch.ones((), dtype=F64))


@every_problem
def test_problems_shrink_to_small_ones(kind: str) -> None:
    case = find(PROBLEMS[kind](), lambda case: True)
    assert "dim=1, " in case.name and "scale=1, seed=0" in case.name
    assert vector(case.phi, int(case.batched)).shape[-1] == 1
    larger = find(PROBLEMS[kind](), lambda case: len(tasks(case)[0].phi) >= 3)
    assert "dim=3, " in larger.name and "scale=1, seed=0" in larger.name


def test_a_case_is_printed_as_what_it_is() -> None:
    case = find(strategies.quadratic_problems(), lambda case: len(vector(case.phi)) == 2)
    text = repr(case)
    assert text.startswith("Case('quadratic, squared outer loss, dim=2, kappa=1, scale=1, seed=0',\n    theta=tensor(")
    assert all(f"    {name}=" in text for name in ("data", "phi", "grad")) and "object at" not in text
    assert hypothesis.vendor.pretty.pretty(case) == text  # what a falsifying example shows


# ----------------------------------------------------------------------------------------------------------------------
# Errors and imports.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, r"dtype: expected torch.float32 or torch.float64, got torch.float16"),
        ({"min_dim": 0}, r"expected 1 <= min_dim <= max_dim, got min_dim=0"),
        ({"min_dim": 5, "max_dim": 4}, r"got min_dim=5, max_dim=4"),
        ({"max_kappa": 0.5}, r"max_kappa: expected a number >= 1, got 0.5"),
        ({"min_dim": 2, "min_kappa": 100.0, "max_kappa": 10.0}, r"expected max_kappa >= 100, got 10"),
        ({"min_kappa": 10.0}, r"min_kappa > 1 needs min_dim >= 2"),
        ({"max_kappa": 1e14}, r"expected max_kappa <= .* torch.float64 cannot store .* got 1e\+14. Lower max_kappa"),
        ({"dtype": F32, "max_kappa": 1e6}, r"torch.float32 cannot store .* Lower max_kappa or max_dim, or use float64"),
        ({"min_kappa": float("nan")}, r"min_kappa: expected a number >= 1, got nan"),
        ({"min_kappa": -5}, r"min_kappa: expected a number >= 1, got -5"),
        ({"max_kappa": "10"}, r"max_kappa: expected a number >= 1, got '10'"),
        ({"max_kappa": True}, r"max_kappa: expected a number >= 1, got True"),
        ({"max_dim": 2.5}, r"max_dim: expected a whole number, got 2.5"),
    ],
)
def test_limits_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    for strategy in (strategies.spd_matrices, strategies.quadratic_problems):
        with pytest.raises((TypeError, ValueError), match=message):
            strategy(**options)


def test_more_limits_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="expected 2 <= min_dim <= max_dim, got min_dim=1"):
        strategies.indefinite_matrices(min_dim=1)
    with pytest.raises(ValueError, match="expected max_kappa >= 2, got 1.5"):
        strategies.ridge_problems(max_kappa=1.5)
    with pytest.raises(ValueError, match="expected min_tasks <= max_tasks, got min_tasks=3, max_tasks=2"):
        strategies.task_batches(min_tasks=3, max_tasks=2)
    with pytest.raises(ValueError, match="min_tasks: expected at least 1, got 0"):
        strategies.task_batches(min_tasks=0)
    with pytest.raises(TypeError, match="max_tasks: expected an integer, got float 3.5"):
        strategies.task_batches(max_tasks=3.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_leaves: expected at least 1, got 0"):
        trees(max_leaves=0)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout


def test_without_hypothesis_the_rest_works_and_the_error_says_what_to_install() -> None:
    printed = run_python(
        "import sys\n"
        "import bilevel\n"
        "assert not [name for name in sys.modules if name.startswith('bilevel.testing')]\n"
        "assert 'hypothesis' not in sys.modules\n"
        "sys.modules['hypothesis'] = None\n"
        "import bilevel.testing\n"
        "try:\n"
        "    import bilevel.testing.strategies\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "pip install hypothesis" in printed


def test_singular_matrices_keep_to_the_condition_number() -> None:
    def check(matrix: strategies.Matrix) -> None:
        positive = matrix.eigenvalues[matrix.eigenvalues > 0]
        assert len(positive) >= 2 and 0.99e3 < float(positive.max() / positive.min()) < 1.01e4

    for_all(strategies.singular_matrices(min_dim=3, max_dim=6, min_kappa=1e3, max_kappa=1e4), check, 60)
    with pytest.raises(ValueError, match="min_kappa > 1 needs min_dim >= 3"):
        strategies.singular_matrices(min_kappa=10.0)


def test_a_tree_is_printed_as_a_tree() -> None:
    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(tree=strategies.trees())
    def fails(tree: Any) -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fails()
    assert "tree=tensor(" in "".join(caught.value.__notes__) and "lambda" not in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_leaves": 1.5}, TypeError, "max_leaves: expected a whole number, got 1.5"),
        ({"dtype": torch.int64}, ValueError, "dtype: expected a floating dtype such as torch.float64, got torch.int64"),
    ],
)
def test_wrong_options_of_trees(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        strategies.trees(**options)
