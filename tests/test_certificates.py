"""Bounds, estimates and the words of ``explain``, against closed forms and dense algebra (numpy)."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel
from bilevel import Constants
from bilevel.certificates.kinks import kinks
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, Exact, Identity, Neumann
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG
from tests.cases import PROBLEMS

F64 = torch.float64
LONG = np.longdouble


def t(x, dtype=F64):
    return torch.as_tensor(np.asarray(x, dtype=np.float64), dtype=dtype)


def spd(seed, eigenvalues):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))[0]
    a = (q * np.asarray(eigenvalues)) @ q.T
    return 0.5 * (a + a.T)


def refined_solve(a, b):
    """A x = b with refinement in extended precision: right to float64 rounding at any kappa that a test uses."""
    x = np.linalg.solve(a, np.asarray(b, dtype=np.float64)).astype(LONG)
    for _ in range(5):
        x = x + np.linalg.solve(a, np.asarray(b.astype(LONG) - a.astype(LONG) @ x, dtype=np.float64))
    return x


class Quadratic:
    """G = phi^T A phi / 2 - phi^T (K theta + c), L = |phi - target|^2 / 2 + theta^T E phi: everything known."""

    def __init__(self, seed, eigenvalues, m=3, direct=True, dtype=F64):
        rng = np.random.default_rng(seed)
        d = len(eigenvalues)

        def numbers(*shape):  # that the dtype can store
            return t(rng.standard_normal(shape), dtype).double().numpy()

        self.a = t(spd(seed, eigenvalues), dtype).double().numpy()
        self.k, self.c, self.target, self.theta = numbers(d, m), numbers(d), numbers(d), numbers(m)
        self.e = numbers(m, d) if direct else np.zeros((m, d))
        a, k, c, target, e = (t(x, dtype) for x in (self.a, self.k, self.c, self.target, self.e))

        def outer(phi, theta, data):
            loss = 0.5 * (phi - target).square().sum()
            return loss + theta @ (e @ phi) if direct else loss

        self.problem = bilevel.BilevelProblem.from_functions(
            lambda phi, theta, data: 0.5 * phi @ a @ phi - phi @ (k @ theta + c),
            outer,
            lambda theta, data: torch.zeros(d, dtype=dtype),
        )
        self.mu = np.linalg.eigvalsh(self.a)[0] * (1 - 1e-8)
        self.problem.constants = Constants(
            mu=self.mu,
            rho=0.0,
            L=float(np.hypot(1, np.linalg.norm(self.e, 2))),
            C=float(np.linalg.norm(self.k, 2)),
            everywhere=True,
        )
        self.phi = refined_solve(self.a, self.k.astype(LONG) @ self.theta + self.c)
        self.grad = self.gradient_at(self.phi)

    def gradient_at(self, phi):
        """The formula of the theorem, with an exact linear solve, at any phi."""
        phi = np.asarray(phi, dtype=LONG)
        b = phi - self.target + self.e.T.astype(LONG) @ self.theta
        return self.e.astype(LONG) @ phi + self.k.T.astype(LONG) @ refined_solve(self.a, b)

    def error(self, result):
        return float(np.linalg.norm(result.grad.double().numpy() - self.grad))


def at(problem, phi, theta, linsys, **options):
    """The gradient at a point that is brought."""
    return bilevel.implicit_gradient(problem, t(phi), t(theta), linsys=linsys, **options)


# --- the bound: equality where the derivation has equalities ----------------------------------------------------------


def scalar(inner, outer, constants):
    problem = bilevel.BilevelProblem.from_functions(inner, outer)
    problem.constants = constants
    return problem


def assert_tight(result, exact, slack=1e-6):
    error = abs(float(result.grad) - exact)
    assert error > 0
    assert error <= float(result.error_bound) <= error * (1 + slack)


def test_linear_part_is_attained():
    """H = 2, C = -3, b = 5, u = 1 after one term of the series: r = 3."""
    problem = scalar(
        lambda phi, theta, _: phi**2 - 3 * phi * theta,
        lambda phi, theta, _: 5 * phi,
        Constants(mu=2.0, rho=0.0, L=0.0, C=3.0, everywhere=True),
    )
    result = at(problem, 1.5 * 0.7, 0.7, Neumann(num_terms=1, step_size=0.1))
    assert_tight(result, exact=3 * 5 / 2)


def test_inner_part_of_a_quadratic_problem_is_attained():
    problem = scalar(
        lambda phi, theta, _: phi**2 - 3 * phi * theta,
        lambda phi, theta, _: 2 * phi**2,
        Constants(mu=2.0, rho=0.0, L=4.0, C=3.0, everywhere=True),
    )
    result = at(problem, 1.5 * 0.7 + 0.25, 0.7, Exact())
    assert_tight(result, exact=3 * 4 * (1.5 * 0.7) / 2)


def test_direct_part_is_attained():
    """dL/dtheta = 4 phi, and next to no cross derivative."""
    problem = scalar(
        lambda phi, theta, _: phi**2 - 1e-9 * phi * theta,
        lambda phi, theta, _: 4 * phi * theta,
        Constants(mu=2.0, rho=0.0, L=4.0, C=1e-9, everywhere=True),
    )
    result = at(problem, 0.25, 0.7, Exact())
    exact = 2 * 4 * (0.5e-9 * 0.7)  # F = 4 phi* theta, phi* = 1e-9 theta / 2
    assert_tight(result, exact)


def test_change_of_the_cross_derivative_is_attained():
    """G = (1 + theta) phi^2 / 2: phi* = 0 and C = phi, which is near zero and changes by delta. C holds at phi alone."""
    delta = 1e-3
    problem = scalar(
        lambda phi, theta, _: 0.5 * (1 + theta) * phi**2,
        lambda phi, theta, _: 5 * phi,
        Constants(mu=2.0, rho=1.0, L=0.0, C=delta, everywhere=True),
    )
    assert_tight(at(problem, delta, 1.0, Exact()), exact=0.0, slack=2 * delta)


def test_the_cross_derivative_may_vanish_where_the_gradient_is_taken():
    """Then the gradient is zero and all of the true one is the error; C = 0 at phi must not make the bound zero."""
    problem = scalar(
        lambda phi, theta, _: 0.5 * theta.exp() * (phi - 1).square() + 0.5 * (phi - 3).square(),
        lambda phi, theta, _: 0.5 * phi.square(),
        Constants(mu=2.0, rho=1.0, L=1.0, C=0.0, everywhere=True),
    )
    result = at(problem, 1.0, 0.0, Exact())
    assert float(result.grad) == 0
    exact = -(2.0 - 1.0) * 2.0 / 2.0  # phi* = 2, C = phi* - 1, u = phi* / H
    assert abs(exact) <= float(result.error_bound) < 10


def cubic(mu, rho, slope, b=5.0):
    """dG/dphi = mu x - rho x^2 / 2 - slope + theta around x = 0: the worst case of the theorem of Newton and Kantorovich."""
    problem = scalar(
        lambda phi, theta, _: 0.5 * mu * phi**2 - rho * phi**3 / 6 - slope * phi + theta * phi,
        lambda phi, theta, _: b * phi,
        Constants(mu=mu, rho=rho, L=0.0, C=1.0),
    )
    root = (mu - np.sqrt(mu**2 - 2 * rho * slope)) / rho if 2 * rho * slope <= mu**2 else np.nan
    return problem, root


@pytest.mark.parametrize("slope", [1e-6, 0.1, 0.7])
def test_local_bound_is_attained(slope):
    mu, rho = 2.0, 1.5
    problem, root = cubic(mu, rho, slope)
    assert root < mu / (2 * rho)
    result = at(problem, 0.0, 0.0, Exact())
    exact = -5.0 / (mu - rho * root)  # H* = mu - rho delta
    error = abs(float(result.grad) - exact)
    # C is not constant as far as the problem says, so rho |w| delta and C + rho delta are in it: take them out
    w = 5.0 / mu
    expected = (1 + rho * root) * rho * w * root / (mu - rho * root) + rho * w * root
    np.testing.assert_allclose(float(result.error_bound), expected, rtol=1e-5)
    np.testing.assert_allclose(rho * w * root / (mu - rho * root), error, rtol=1e-6)
    assert error <= float(result.error_bound)


def proximal_cubic(mu, rho, slope, **stated):
    """The same with lam = 1 and a constant cross derivative."""
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, _: 0.5 * (mu - 1) * phi**2 - rho * phi**3 / 6 - slope * phi, lambda phi, _: 5 * phi, 1.0
    )
    problem.constants = Constants(mu=mu, rho=rho, L=0.0, **stated)
    return problem


@pytest.mark.parametrize("slope", [1e-6, 0.1, 0.7])
def test_local_bound_of_a_proximal_problem_is_attained(slope):
    mu, rho = 2.0, 1.5
    root = (mu - np.sqrt(mu**2 - 2 * rho * slope)) / rho
    result = at(proximal_cubic(mu, rho, slope), 0.0, 0.0, Exact())
    assert_tight(result, exact=5.0 / (mu - rho * root))
    with_lemma = at(proximal_cubic(mu, rho, slope, B=5.0), 0.0, 0.0, Exact())
    assert float(with_lemma.error_bound) <= float(result.error_bound)


@pytest.mark.parametrize(("slope", "finite"), [(0.999, True), (1.001, False), (1.2, False), (1.4, False)])
def test_local_bound_is_infinite_beyond_the_condition(slope, finite):
    """mu = 2, rho = 1.5: delta < mu / (2 rho) is slope < 3 mu^2 / (8 rho) = 1; beyond mu^2 / (2 rho) = 4/3 there may be no root."""
    result = at(proximal_cubic(2.0, 1.5, slope), 0.0, 0.0, Exact())
    assert bool(result.error_bound.isfinite()) == finite
    assert finite or float(result.error_bound) == np.inf


def test_lemma_3_is_used_where_it_is_sharper():
    """u = 4.5 overshoots w = 2.5, so |w| <= |u| + |r| / mu = 6.5 is large; B is not."""
    bounds = [
        float(at(proximal_cubic(2.0, 1.5, 0.5, **stated), 0.0, 0.0, Neumann(num_terms=1, step_size=0.9)).error_bound)
        for stated in ({}, {"B": 5.0}, {"B": 50.0})
    ]
    delta = (2 - np.sqrt(2.5)) / 1.5
    np.testing.assert_allclose(bounds[1], 4 / 2 + 2 * 1.5 * 5 / 4 * delta, rtol=1e-6)
    assert bounds[1] < bounds[0] == bounds[2]


def test_everywhere_has_lemma_3_without_the_two():
    problem = proximal_cubic(2.0, 1.5, 0.5, B=5.0, everywhere=True)
    result = at(problem, 0.0, 0.0, Neumann(num_terms=1, step_size=0.9))
    np.testing.assert_allclose(float(result.error_bound), 4 / 2 + 1.5 * 5 / 4 * 0.25, rtol=1e-6)


# --- the bound: dense problems, rounding ------------------------------------------------------------------------------

LINEAR = [CG(max_steps=1, rtol=0.0), CG(max_steps=4), CG(max_steps=400, rtol=1e-12), Exact(), Neumann(num_terms=30)]


@pytest.mark.parametrize("linsys", LINEAR, ids=repr)
@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("d", [1, 2, 20])
def test_bound_holds_for_dense_problems(d, kappa, linsys):
    case = Quadratic(d, np.geomspace(1, kappa, d))
    for distance in (0.0, 1e-12, 1e-3):
        phi = np.asarray(case.phi, dtype=float) + distance * np.random.default_rng(1).standard_normal(d)
        result = at(case.problem, phi, case.theta, linsys)
        assert case.error(result) <= float(result.error_bound)
        if distance == 0 and isinstance(
            linsys, Exact
        ):  # useful: a few orders above rounding times the condition number
            assert float(result.error_bound) < 1e-11 * kappa * np.linalg.norm(np.asarray(case.grad, dtype=float))


@pytest.mark.parametrize("seed", range(5))
def test_bound_holds_in_float32(seed):
    case = Quadratic(seed, np.geomspace(1, 100, 10), dtype=torch.float32)
    theta = t(case.theta, torch.float32)
    result = bilevel.hypergradient(
        case.problem, theta, solver=NewtonCG(max_steps=10, cg_steps=10), linsys=CG(max_steps=50, rtol=1e-7)
    )
    bound = result.error_bound
    assert bound.dtype == torch.float32
    assert case.error(result) <= float(bound) < 0.1 * float(result.grad.norm())


def test_rounding_of_data_much_larger_than_phi_is_counted():
    """Least squares with a huge target that is almost orthogonal to the features: the gradient is a difference of huge terms."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 4))
    huge = rng.standard_normal(50)
    huge -= x @ np.linalg.lstsq(x, huge, rcond=None)[0]
    y = 1e8 * huge + x @ rng.standard_normal(4)
    centre = rng.standard_normal(4)
    xt, yt, ct = t(x), t(y), t(centre)
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, _: 0.5 * (xt @ phi - yt).square().sum(), lambda phi, _: 0.5 * (phi - ct).square().sum(), 1.0
    )
    problem.constants = Constants(mu=1.0, rho=0.0, L=1.0, everywhere=True)
    hessian = x.T.astype(LONG) @ x + np.eye(4)
    theta = rng.standard_normal(4)
    phi = refined_solve(np.asarray(hessian, float), x.T.astype(LONG) @ y + theta)
    grad = refined_solve(np.asarray(hessian, float), phi - centre)
    worst = 0.0
    for seed in range(20):  # what one sum loses is chance
        start = np.random.default_rng(seed).standard_normal(4)
        result = bilevel.hypergradient(
            problem, t(theta), solver=NewtonCG(max_steps=3, cg_steps=4, tol=1e-12), linsys=Exact(), init=t(start)
        )
        error = np.linalg.norm(result.grad.numpy() - grad)
        assert error <= float(result.error_bound)
        worst = max(worst, float(error))
    assert worst > 1e-12  # it is there to be counted


def test_rounding_that_hides_in_the_inner_gradient_is_counted():
    """Data so large that the gradient as computed is a staircase: it vanishes on whole steps, far from where the exact one does."""
    worst = 0.0
    for seed in range(10):
        a, b, theta, centre = np.random.default_rng(seed).standard_normal(4)
        y = np.array([1e8 + a, b - 1e8])
        data, ct = t(y), t([centre])
        problem = bilevel.ProximalProblem.from_losses(
            lambda phi, y: 0.5 * (phi - y).square().sum(), lambda phi, _, ct=ct: 0.5 * (phi - ct).square().sum(), 1.0
        )
        problem.constants = Constants(mu=3.0, rho=0.0, L=1.0, everywhere=True)
        result = bilevel.hypergradient(
            problem, t([theta]), data, solver=GradientDescent(step_size=1 / 3, max_steps=200, tol=1e-13), linsys=Exact()
        )
        exact = (sum(map(Fraction, (*y, theta))) / 3 - Fraction(centre)) / 3
        error = abs(float(Fraction(result.grad.item()) - exact))
        assert error <= float(result.error_bound)
        if result.inner.residual <= 1e-13:
            worst = max(worst, error)
    assert worst > 1e-10  # where the gradient as computed says that nothing is left


def dense(case):
    """mu, L, C of a case of tests/cases.py at its exact solution, by torch.func and numpy; phi raveled."""
    from bilevel.trees import layout_of

    def vector(tree):
        layout, leaves = layout_of(tree)
        return layout, layout.ravel(leaves)

    phi_layout, phi = vector(case.phi_star(case.theta, case.data))
    theta_layout, theta = vector(case.theta)

    def inner(p, s):
        return case.problem.inner_objective(phi_layout.unravel(p), theta_layout.unravel(s), case.data)

    def outer(p, s):
        return case.problem.outer_loss(phi_layout.unravel(p), theta_layout.unravel(s), case.data)

    hessian = torch.func.hessian(inner)(phi, theta).numpy()
    cross = torch.func.jacrev(torch.func.grad(inner), argnums=1)(phi, theta).numpy()
    second = torch.cat([torch.func.jacrev(torch.func.grad(outer, argnums=i))(phi, theta) for i in (0, 1)]).numpy()
    return phi_layout, phi, np.linalg.eigvalsh(hessian)[0], np.linalg.norm(second, 2), np.linalg.norm(cross, 2)


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-3])
def test_bound_and_estimate_for_the_list_of_cases(case, distance, monkeypatch):
    """Trees, a rectangular cross derivative, an outer loss that knows theta, a third derivative."""
    layout, phi, mu, L, C = dense(case)
    rho = {"ridge": float(case.theta.exp().max()) if case.name == "ridge" else 0, "exponential": float(phi.exp().max())}
    constants = Constants(mu=0.9 * mu, rho=1.1 * rho.get(case.name, 0.0), L=1.5 * L + 0.1, C=1.1 * C)
    monkeypatch.setattr(case.problem, "constants", constants, raising=False)
    point = phi + distance * torch.linspace(-1, 1, len(phi), dtype=F64)
    result = bilevel.implicit_gradient(
        case.problem, layout.unravel(point), case.theta, case.data, linsys=CG(max_steps=3, rtol=0.0)
    )
    exact = torch.func.grad(lambda theta: case.outer(theta, case.data))(case.theta)
    from bilevel.trees import flatten

    pairs = zip(flatten(result.grad)[0], flatten(exact)[0], strict=True)
    error = float(torch.cat([(a - b).reshape(-1) for a, b in pairs]).norm())
    assert error <= float(result.error_bound)
    np.testing.assert_allclose(float(result.error_estimate), error, rtol=0.05, atol=1e-12)


def test_identity_has_a_bound_too():
    """First-order MAML is an approximation like any other; its residual is measured here."""
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, _: 2 * (phi - 1) ** 2, lambda phi, _: 0.5 * (phi - 5) ** 2, 2.0
    )
    problem.constants = Constants(mu=6.0, rho=0.0, L=1.0, everywhere=True)
    result = at(problem, 2.0, 4.0, Identity())  # docs/concepts.md: -3 in place of -1
    assert_tight(result, exact=-1.0)
    np.testing.assert_allclose(float(result.error_estimate), 2.0, rtol=1e-6)


# --- when there is no bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["mu", "rho", "L", "C"])
def test_no_bound_without_a_constant(missing):
    case = Quadratic(0, [1.0, 2.0])
    stated = {"mu": 1.0, "rho": 0.0, "L": 3.0, "C": 3.0} | {missing: None}
    case.problem.constants = Constants(**stated)
    assert at(case.problem, np.zeros(2), case.theta, Exact()).error_bound is None
    case.problem.constants = None
    assert at(case.problem, np.zeros(2), case.theta, Exact()).error_bound is None


def test_no_bound_for_a_biased_gradient():
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, _: phi, lambda z, _: 0.5 * (z - 1).square().sum(), lambda phi, _: phi.sum(), 1.0
    )
    problem.constants = Constants(mu=1.0, rho=0.0, L=1.0)
    assert at(problem, [0.0, 0.0], [1.0, 2.0], Exact()).error_bound is not None  # C is known
    assert at(problem, [0.0, 0.0], [1.0, 2.0], Exact(), damping=0.1).error_bound is None
    assert at(problem, [0.0, 0.0], [1.0, 2.0], Exact(), curvature=GaussNewton()).error_bound is None


@pytest.mark.parametrize(
    ("lam", "norm"),
    [
        (0.5, 0.5),
        ({"a": 0.5, "b": torch.tensor(3.0)}, 3.0),
        ({"a": torch.tensor([[1.0, 7.0]]), "b": torch.tensor([2.0])}, 7.0),
        (torch.tensor([[2.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 2.0]], dtype=F64), 2 + np.sqrt(2)),
        (torch.tensor([[3.0, 1.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 3.0]], dtype=F64), 5.0),
    ],
)
def test_a_proximal_problem_knows_its_cross_derivative(lam, norm):
    problem = bilevel.ProximalProblem.from_losses(lambda phi, _: phi["a"].sum(), lambda phi, _: phi["b"].sum(), lam)
    np.testing.assert_allclose(problem.constant_cross_norm, norm, rtol=1e-12)


@pytest.mark.parametrize("name", ["mu", "rho", "B", "L", "C"])
def test_constants_are_checked(name):
    with pytest.raises(TypeError, match=f"Constants: {name}: expected a number, got str 'x'"):
        Constants(**{name: "x"})
    with pytest.raises(TypeError, match=f"Constants: {name}: expected a number, got bool True"):
        Constants(**{name: True})
    for bad in (-1.0, float("nan"), float("inf"), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match=f"Constants: {name}: expected a (positive )?number"):
            Constants(**{name: bad})
    if name == "mu":
        with pytest.raises(ValueError, match="mu: expected a positive number"):
            Constants(mu=0.0)
    else:
        assert getattr(Constants(**{name: 0}), name) == 0


# --- batches ----------------------------------------------------------------------------------------------------------


def tasks(count=5, d=4, seed=0):
    """Proximal least squares for several tasks, with one mu and one L for each, and the exact gradients."""
    rng = np.random.default_rng(seed)
    x, y, centre = rng.standard_normal((count, 7, d)), rng.standard_normal((count, 7)), rng.standard_normal((count, d))
    weight = np.linspace(0.5, 2, count)
    lam, theta = 0.7, rng.standard_normal(d)
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: 0.5 * (data["x"] @ phi - data["y"]).square().sum(),
        lambda phi, data: 0.5 * data["weight"] * (phi - data["centre"]).square().sum(),
        lam,
    )
    hessians = np.einsum("tni,tnj->tij", x, x) + lam * np.eye(d)
    mu = np.linalg.eigvalsh(hessians)[:, 0] * (1 - 1e-8)
    problem.constants = Constants(mu=t(mu), rho=0.0, L=t(weight), everywhere=True)
    data = {"x": t(x), "y": t(y), "centre": t(centre), "weight": t(weight)}

    def exact(theta):
        phi = np.linalg.solve(hessians, (np.einsum("tni,tn->ti", x, y) + lam * theta)[..., None])[..., 0]
        return lam * np.linalg.solve(hessians, (weight[:, None] * (phi - centre))[..., None])[..., 0]

    return problem, t(theta), data, exact


ROUGH = {"solver": GradientDescent(step_size=0.05, max_steps=20), "linsys": CG(max_steps=2, rtol=0.0)}


def run(problem, theta, data, **options):
    return bilevel.hypergradient(problem, theta, data, batched=True, **(ROUGH | options))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_reductions(chunk_size):
    problem, theta, data, exact = tasks()
    each = run(problem, theta, data, reduction="none", chunk_size=chunk_size)
    errors = np.linalg.norm(each.grad.numpy() - exact(theta.numpy()), axis=1)
    assert (errors <= each.error_bound.numpy()).all() and (each.error_bound.numpy() < 100 * errors).all()
    np.testing.assert_allclose(each.error_estimate, errors, rtol=1e-5)
    np.testing.assert_allclose(each.diagnose().size, each.grad.norm(dim=1))
    for reduction, scale in (("sum", 1.0), ("mean", 0.2)):
        result = run(problem, theta, data, reduction=reduction, chunk_size=chunk_size)
        error = np.linalg.norm(result.grad.numpy() - scale * exact(theta.numpy()).sum(0))
        np.testing.assert_allclose(result.error_estimate, error, rtol=1e-5)  # of the sum: errors may cancel
        np.testing.assert_allclose(result.error_bound, scale * each.error_bound.sum())
        torch.testing.assert_close(result.diagnose().linear, each.diagnose().linear)
        per_theta = run(
            problem, theta.expand(5, -1), data, theta_batched=True, reduction=reduction, chunk_size=chunk_size
        )
        error = np.linalg.norm(per_theta.grad.numpy() - scale * exact(theta.numpy()))
        np.testing.assert_allclose(per_theta.error_estimate, error, rtol=1e-5)
        np.testing.assert_allclose(per_theta.error_bound, scale * each.error_bound.norm())
        assert error <= float(per_theta.error_bound)


def test_a_batch_is_what_its_tasks_are_alone():
    problem, theta, data, _ = tasks()
    batch = run(problem, theta, data, reduction="none")
    constants, bound = problem.constants, batch.error_bound
    for i in range(5):
        problem.constants = Constants(mu=constants.mu[i], rho=0.0, L=constants.L[i], everywhere=True)
        alone = bilevel.hypergradient(problem, theta, {k: v[i] for k, v in data.items()}, **ROUGH)
        torch.testing.assert_close(bound[i], alone.error_bound, rtol=1e-8, atol=0)
        torch.testing.assert_close(batch.error_estimate[i], alone.error_estimate, rtol=1e-6, atol=0)


def test_failed_tasks_are_nan_and_do_not_count():
    problem, theta, data, exact = tasks()
    data["x"][1, 0, 0] = torch.nan
    ok = [0, 2, 3, 4]
    each = run(problem, theta, data, reduction="none")
    assert each.error_bound[1].isnan() and each.error_estimate[1].isnan()
    found = each.diagnose()
    assert found.linear[1].isnan() and found.inner[1].isnan() and found.linear[ok].isfinite().all()
    mean = run(problem, theta, data)
    np.testing.assert_allclose(mean.error_bound, each.error_bound[ok].sum() / 4)
    good, _, clean, exact = tasks()
    error = np.linalg.norm(mean.grad.numpy() - exact(theta.numpy())[ok].mean(0))
    np.testing.assert_allclose(mean.error_estimate, error, rtol=1e-5)
    assert error <= float(mean.error_bound)
    undisturbed = run(good, theta, clean, reduction="none")
    assert torch.equal(each.error_bound[ok], undisturbed.error_bound[ok])
    assert torch.equal(each.error_estimate[ok], undisturbed.error_estimate[ok])
    data["x"][:] = torch.nan
    nothing = run(problem, theta, data)
    assert nothing.error_bound.isnan() and nothing.error_estimate.isnan()
    assert "There is no gradient: grad is NaN." in nothing.explain()


def test_infinite_for_one_task_is_infinite_for_the_sum():
    problem, theta, data, _ = tasks()
    problem.constants = Constants(mu=0.7, rho=torch.tensor([0.0, 0.0, 1e9, 0.0, 0.0]), L=2.0)
    each = run(problem, theta, data, reduction="none")
    assert each.error_bound.isinf().tolist() == [False, False, True, False, False]
    assert run(problem, theta, data).error_bound.isinf()


@pytest.mark.parametrize("shape", [(4,), (5, 1), (1,)])
def test_constants_of_a_wrong_shape(shape):
    problem, theta, data, _ = tasks()
    problem.constants = Constants(mu=torch.ones(shape), rho=0.0, L=2.0)
    message = (
        rf"Constants: mu: expected a number, or one for each task of shape \(5,\), got shape {re.escape(str(shape))}"
    )
    with pytest.raises(ValueError, match=message):
        _ = run(problem, theta, data).error_bound


LONG_ALONG_SMALL = [
    (torch.float32, 1e4, 1e-3),
    (torch.float32, 1e5, 1e-4),
    (torch.float32, 1e6, 1e-4),
    (F64, 1e8, 1e-9),
    (F64, 1e10, 1e-11),
]

# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [10, 1e3, 1e6])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_estimate_of_a_truncated_linear_solve(kappa, steps):
    """It goes on until the solve is done: ten steps more see little where kappa is 1e6. All of it is linear."""
    case = Quadratic(3, np.geomspace(1, kappa, 40), direct=False)
    result = at(case.problem, np.asarray(case.phi, float), case.theta, CG(max_steps=steps, rtol=0.0))
    found = result.diagnose()
    np.testing.assert_allclose(float(found.error), case.error(result), rtol=0.05)
    np.testing.assert_allclose(float(found.linear), case.error(result), rtol=0.05)
    assert float(found.inner) < 0.1 * float(found.linear)


@pytest.mark.parametrize("kappa", [10, 1e3, 1e6])
def test_estimate_of_a_truncated_inner_solve(kappa):
    case = Quadratic(4, np.geomspace(1, kappa, 30))
    result = bilevel.hypergradient(
        case.problem, t(case.theta), solver=GradientDescent(step_size=1 / kappa, max_steps=50), linsys=Exact()
    )
    found = result.diagnose()
    np.testing.assert_allclose(float(found.error), case.error(result), rtol=1e-2)
    np.testing.assert_allclose(float(found.inner), case.error(result), rtol=1e-2)
    assert float(found.linear) < 1e-6 * float(found.inner)
    np.testing.assert_allclose(float(found.slope), float(result.inner.residual))
    phi = result.phi.numpy()
    b = phi - case.target + case.e.T @ case.theta
    np.testing.assert_allclose(float(found.rhs), np.linalg.norm(b))


def test_estimate_splits_the_error_into_its_two_parts():
    case = Quadratic(5, np.geomspace(1, 1e3, 20))
    phi = np.asarray(case.phi, float) + 1e-3 * np.random.default_rng(0).standard_normal(20)
    result = at(case.problem, phi, case.theta, CG(max_steps=12, rtol=0.0))
    found, exact_there = result.diagnose(), np.asarray(case.gradient_at(phi), float)
    np.testing.assert_allclose(float(found.linear), np.linalg.norm(result.grad.numpy() - exact_there), rtol=1e-3)
    np.testing.assert_allclose(
        float(found.inner), np.linalg.norm(exact_there - np.asarray(case.grad, float)), rtol=1e-3
    )
    r = (phi - case.target + case.e.T @ case.theta) - case.a @ result.linear.value.numpy()
    np.testing.assert_allclose(float(found.residual), np.linalg.norm(r), rtol=1e-6)


def test_of_an_exact_result_only_rounding_is_left():
    """phi* and u to the last digit: kappa eps at most, and not zero, for the residuals are not."""
    case = Quadratic(6, np.geomspace(1, 1e4, 10))
    result = at(case.problem, np.asarray(case.phi, float), case.theta, Exact())
    found, size = result.diagnose(), float(np.linalg.norm(np.asarray(case.grad, float)))
    assert 0 < float(found.error) < 1e4 * 2.3e-16 * size and case.error(result) < 1e4 * 2.3e-16 * size
    assert float(found.linear) < 1e-11 * size and float(found.inner) < 1e-11 * size


def least_squares(seed, d, n, kappa, dtype):
    """G = |X phi - theta|^2 / 2, L = |X_val phi - y_val|^2 / 2: phi is long along the small eigenvalues of H = X^T X, so that |H| |phi|
    says little of the rounding in dG/dphi. The exact gradient by the pseudo-inverse in float64: error eps sqrt(kappa).
    """
    g = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    left, right = torch.linalg.qr(numbers(n, d)).Q, torch.linalg.qr(numbers(d, d)).Q
    x = (left * torch.logspace(0, -np.log10(kappa) / 2, d, dtype=F64)) @ right.T
    data = tuple(a.to(dtype) for a in (x, numbers(n), numbers(n, d) / d**0.5, numbers(n)))
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (data[0] @ phi - theta).square().sum(),
        lambda phi, theta, data: 0.5 * (data[1] @ phi - data[2]).square().sum(),
        lambda theta, data: theta.new_zeros(d),
    )
    x, y, x_val, y_val = (a.double() for a in data)
    inverse = torch.linalg.pinv(x, rtol=1e-14)
    exact = inverse.T @ (x_val.T @ (x_val @ (inverse @ y) - y_val))
    return problem, data[1], (data[0], data[2], data[3]), exact


@pytest.mark.parametrize("linsys", [Exact(), CG(max_steps=200)], ids=repr)
@pytest.mark.parametrize("solver", [LBFGS(max_steps=500), NewtonCG(max_steps=50, cg_steps=40, cg_rtol=0.1)], ids=repr)
@pytest.mark.parametrize(("dtype", "kappa", "tol"), LONG_ALONG_SMALL)
def test_what_the_model_of_rounding_allows_is_estimated_all_the_same(dtype, kappa, tol, solver, linsys):
    problem, theta, data, exact = least_squares(1, 8, 20, kappa, dtype)
    result = bilevel.hypergradient(problem, theta, data, solver=replace(solver, tol=tol), linsys=linsys)
    error, rounding = float((result.grad.double() - exact).norm()), torch.finfo(dtype).eps * kappa * float(exact.norm())
    assert error / 3 < float(result.error_estimate) < max(3 * error, 0.1 * rounding)


@pytest.mark.parametrize("kappa", [1e4, 1e6])
def test_many_eigenvalues_need_more_products(kappa):
    """A right answer, and a rough one, of 150 weights: 100 steps of CG come nowhere near the step of Newton's method."""
    problem, theta, data, exact = least_squares(0, 150, 300, kappa, F64)
    solver = NewtonCG(max_steps=30, cg_steps=1500, cg_rtol=0.1)
    for tol in (1e-3, 1e-7):
        result = bilevel.hypergradient(problem, theta, data, solver=replace(solver, tol=tol), linsys=Exact())
        error = float((result.grad - exact).norm())
        assert error / 2 < float(result.error_estimate) < 2 * error


@pytest.mark.parametrize("condition", [1e10, 1e12])
@pytest.mark.parametrize("seed", [0, 1])
def test_where_only_rounding_is_left_the_estimate_is_not_zero(seed, condition):
    """H u = b to the last digit says little where the condition number nears 1 / eps. The oracle has 50 digits."""
    n, g = 40, torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))
    h = q @ torch.diag(condition ** torch.linspace(0, -1, n, dtype=F64)) @ q.T
    h = 0.5 * (h + h.T)
    b, t, c = h @ torch.randn(n, generator=g, dtype=F64), *torch.randn(2, n, generator=g, dtype=F64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, _: 0.5 * w @ (h @ w) - b @ w - (theta - 1) * (c @ w),
        lambda w, theta, _: 0.5 * (w - t).square().sum(),
        lambda theta, _: torch.linalg.solve(h, b),
    )
    with mpmath.workdps(50):
        matrix = mpmath.matrix(h.tolist())
        at, along = (mpmath.lu_solve(matrix, mpmath.matrix(x.tolist())) for x in (b, c))
        exact = float(sum((at[i] - mpmath.mpf(t[i].item())) * along[i] for i in range(n)))
    solver = GradientDescent(step_size=None, max_steps=50, tol=1e-9)
    result = bilevel.hypergradient(problem, torch.tensor(1.0, dtype=F64), solver=solver, linsys=Exact())
    error = abs(float(result.grad) - exact)
    assert error > 1e-7 * abs(exact)  # there is something to see
    assert float(result.error_estimate) > 0.1 * error
    assert "Nothing to change" not in result.explain()


def test_a_look_from_far_away_does_not_cost_many_solves_at_length():
    """Logistic regression, 200 variables of scales over four orders of magnitude, and a point that nobody has solved for."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 200, generator=g, dtype=F64) * 10 ** torch.linspace(0, -4, 200, dtype=F64)
    y = (torch.randn(300, generator=g, dtype=F64) > 0).to(F64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, _: binary_cross_entropy_with_logits(x @ w, y) + 5e-10 * theta * w.square().sum(),
        lambda w, theta, _: w.square().sum(),
    )
    point, theta = torch.randn(200, generator=g, dtype=F64), torch.ones((), dtype=F64)
    found = bilevel.implicit_gradient(problem, point, theta, linsys=CG(max_steps=10)).diagnose()
    assert found.num_matvecs < 4 * 2000  # 18,934 when each of eight steps of Newton's method was solved at length


def test_too_few_products_for_an_estimate_are_called_so(monkeypatch):
    """H is positive definite; the words must not speak of negative curvature, nor advise more steps of a solver that has converged."""
    monkeypatch.setattr("bilevel.certificates.estimate._affordable", lambda dim: 20)
    problem, theta, data, exact = least_squares(0, 60, 120, 1e6, F64)
    solver = NewtonCG(max_steps=30, cg_steps=1000, cg_rtol=0.1, tol=1e-9)
    result = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=Exact())
    text = result.explain()
    assert (result.grad - exact).norm() < 1e-5 * exact.norm() and result.error_estimate == torch.inf
    assert (
        "the products that an estimate may cost did not suffice" in text
        and "compare with the gradient of a smaller tol" in text
    )
    assert (
        "negative curvature" not in text and "raise its number of steps" not in text and "Nothing to change" not in text
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_zero_gradients_and_unused_leaves(dtype):
    """b = 0; and an objective that does not know theta at all."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: phi.square().sum() - (phi * theta["used"]).sum(),
        lambda phi, theta, _: 0 * phi.sum(),
        lambda theta, _: torch.ones(2, dtype=dtype),
    )
    problem.constants = Constants(mu=2.0, rho=0.0, L=0.0, C=1.0, everywhere=True)
    theta = {"used": torch.ones(2, dtype=dtype), "unused": torch.ones((), dtype=dtype)}
    solver = GradientDescent(step_size=0.1, max_steps=3)
    result = bilevel.hypergradient(problem, theta, solver=solver, linsys=CG(max_steps=2), allow_unused=True)
    assert float(result.error_estimate) == 0
    assert float(result.error_bound) < 1e-4 if dtype == torch.float32 else 1e-12
    assert "- dL/dphi is zero at phi, so the gradient has no implicit part there." in result.explain()
    constant = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: (phi - 1).square().sum(),
        lambda phi, theta, _: phi.square().sum(),
        lambda theta, _: torch.zeros(2, dtype=dtype),
    )
    constant.constants = Constants(mu=2.0, rho=0.0, L=2.0, C=0.0, everywhere=True)
    result = bilevel.hypergradient(
        constant, torch.ones(3, dtype=dtype), solver=solver, linsys=CG(max_steps=2), allow_unused=True
    )
    assert float(result.error_estimate) == 0 and float(result.error_bound) == 0
    assert "the linear solve" in result.explain()


def test_tasks_whose_outer_loss_does_not_see_phi_are_counted():
    """Leaves with and without axes of their own; the linear solver starts from zero and ends there."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, task: (phi["a"] - theta).square().sum() + (phi["b"] - 1).square(),
        lambda phi, theta, task: task * (phi["a"].sum() + phi["b"] ** 3),
        lambda theta, task: {"a": torch.zeros_like(theta), "b": theta.new_zeros(())},
    )
    for weights, where in (([0.0, 2.0, 0.0], " in 2 of 3 tasks"), ([1.0, 2.0, 3.0], None)):
        result = bilevel.hypergradient(
            problem,
            torch.ones(4, dtype=F64),
            torch.tensor(weights, dtype=F64),
            solver=NewtonCG(max_steps=5, cg_steps=5, tol=1e-12),
            linsys=CG(max_steps=5, rtol=1e-10),
            batched=True,
        )
        said = f"dL/dphi is zero at phi{where}, so" if where else "dL/dphi is zero"
        assert (said in result.explain()) == (where is not None)


def test_estimate_counts_its_work(monkeypatch):
    from bilevel.derivatives import Linearisation, Objective

    counted = {"matvec": 0, "linearise": 0, "gradient": 0}

    def counting(cls, name):
        original = getattr(cls, name)

        def method(self, *args, **kwargs):
            counted[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, method)

    case = Quadratic(7, np.geomspace(1, 100, 30))
    result = bilevel.hypergradient(case.problem, t(case.theta), **ROUGH)
    counting(Linearisation, "matvec")
    counting(Objective, "linearise")
    counting(Objective, "gradient")
    found = result.diagnose()
    assert (found.num_matvecs, found.num_grads) == (counted["matvec"], counted["linearise"] + counted["gradient"])
    assert found.num_matvecs <= 8 + 2 + 4 + 3 * 101
    assert result.diagnose() is found and counted["matvec"] == found.num_matvecs  # asked twice, done once


def logistic(seed=0, n=30, d=6):
    """One log-penalty for each feature; the exact hypergradient by Newton's method and dense algebra."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), rng.integers(0, 2, n) * 2.0 - 1
    xv, yv = rng.standard_normal((n, d)), rng.integers(0, 2, n) * 2.0 - 1
    z, zv, theta = t(x * y[:, None]), t(xv * yv[:, None]), rng.standard_normal(d) - 1
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: torch.logaddexp(-z @ phi, 0 * z[:, 0]).mean() + 0.5 * (theta.exp() * phi.square()).sum(),
        lambda phi, theta, _: torch.logaddexp(-zv @ phi, 0 * zv[:, 0]).mean(),
        lambda theta, _: torch.zeros(d, dtype=F64),
    )
    zn, zvn, e, phi = z.numpy(), zv.numpy(), np.exp(theta), np.zeros(d)
    for _ in range(50):
        p = 1 / (1 + np.exp(zn @ phi))
        h = (zn.T * (p * (1 - p))) @ zn / n + np.diag(e)
        phi = phi - np.linalg.solve(h, -zn.T @ p / n + e * phi)
    u = np.linalg.solve(h, -zvn.T @ (1 / (1 + np.exp(zvn @ phi))) / n)
    return problem, t(theta), -e * phi * u, (zn, zvn, e)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_logistic_regression_locally_and_everywhere(seed, steps):
    """Not quadratic, and the cross derivative depends on phi."""
    problem, theta, exact, (z, zv, e) = logistic(seed)
    n = len(z)
    result = bilevel.hypergradient(
        problem, theta, solver=GradientDescent(step_size=0.3, max_steps=steps), linsys=CG(max_steps=3, rtol=0.0)
    )
    error = np.linalg.norm(result.grad.numpy() - exact)
    assert error / 3 < float(result.error_estimate) < 3 * error
    phi = result.phi.numpy()
    p = 1 / (1 + np.exp(z @ phi))
    third = 0.0963 * np.linalg.norm(z, axis=1).max() * np.linalg.norm(z, 2) ** 2 / n  # |sigmoid''| <= 1 / (6 sqrt 3)
    known = {
        "rho": max(third, e.max()),
        "L": 0.25 * np.linalg.norm(zv, 2) ** 2 / n,
        "C": np.abs(e * phi).max() * (1 + 1e-12),
    }
    problem.constants = Constants(mu=e.min(), everywhere=True, **known)
    everywhere = float(result.error_bound)
    assert error <= everywhere
    here = np.linalg.eigvalsh((z.T * (p * (1 - p))) @ z / n + np.diag(e))[0]
    problem.constants = Constants(mu=here * (1 - 1e-12), **known)
    local = bilevel.implicit_gradient(problem, result.phi, theta, linsys=CG(max_steps=3, rtol=0.0))
    assert error <= float(local.error_bound)
    if steps == 40 and seed == 0:
        assert float(local.error_bound) < everywhere  # here is a larger mu than everywhere


def saddle(low=-0.5, d=4, lam=None, b_sees_it=True):
    """A quadratic with one negative eigenvalue. lam: as the proximal problem whose sum is this."""
    a = spd(8, [low, 1.0, 2.0, 5.0][:d])
    shift = 0.0 if lam is None else lam
    train = t(a - shift * np.eye(d))
    q = t(np.linalg.eigh(a)[1])
    b = q.sum(1) if b_sees_it else q[:, 1:].sum(1)

    def quadratic(phi, matrix):
        return 0.5 * phi @ matrix @ phi

    if lam is None:
        problem = bilevel.BilevelProblem.from_functions(
            lambda phi, theta, _: quadratic(phi, train) - phi @ theta, lambda phi, theta, _: b @ phi
        )
    else:
        problem = bilevel.ProximalProblem.from_losses(lambda phi, _: quadratic(phi, train), lambda phi, _: b @ phi, lam)
    return problem, a, torch.ones(d, dtype=F64)


@pytest.mark.parametrize("linsys", [CG(max_steps=1), CG(max_steps=10, steihaug=True), Exact()], ids=repr)
@pytest.mark.parametrize("lam", [None, 0.3])
def test_no_estimate_at_a_point_with_negative_curvature(linsys, lam):
    problem, _, theta = saddle(lam=lam)
    result = at(problem, [1.0, 2.0, 3.0, 4.0], theta, linsys)
    if result.ok:
        assert float(result.error_estimate) == np.inf
        assert (
            "There is no estimate of the error: from phi, Newton's method meets negative curvature" in result.explain()
        )


@pytest.mark.parametrize("theta", [0.2, 0.5, 0.6, 0.8, 1.3, 1.7])
def test_no_estimate_at_a_kink(theta):
    """G = |phi - 1| + |phi - theta|^2 / 2 has its minimum at the kink, phi* = 1 for theta in (0, 2): the exact gradient is 0, and the
    condition does not hold anywhere near.
    """
    problem = bilevel.ProximalProblem.from_losses(lambda phi, data: (phi - 1).abs(), lambda phi, data: phi.clone(), 1.0)
    result = bilevel.hypergradient(
        problem, torch.tensor(theta, dtype=F64), solver=GradientDescent(step_size=0.1, max_steps=200), linsys=Exact()
    )
    assert float(result.error_estimate) == np.inf
    text = result.explain()
    assert "comes no nearer to a minimum" in text and "G has a kink at phi: along -dG/dphi" in text
    assert "raise its number of steps" not in text


def test_no_estimate_at_a_kink_from_anywhere():
    """The same wherever phi is: shortened steps of Newton's method come near the kink, where the slope may be a tenth of
    what it was, and have not arrived.
    """
    problem = bilevel.ProximalProblem.from_losses(lambda phi, data: (phi - 1).abs(), lambda phi, data: phi.clone(), 1.0)
    theta, phi = torch.meshgrid(t(np.linspace(0.05, 1.95, 39)), t(np.linspace(0.025, 1.975, 40)), indexing="ij")
    result = bilevel.implicit_gradient(
        problem, phi.flatten(), theta.flatten(), linsys=Exact(), batched=True, theta_batched=True, reduction="none"
    )
    assert result.ok_per_task.all()
    assert result.diagnose().inner.isinf().all()
    assert "Nothing to change" not in result.explain()


def test_a_look_gives_up_where_newton_hardly_lowers_the_gradient():
    """A network with kinks, far from a minimum: eight steps of Newton's method, each with a solve and its repetition, took 1,700
    products to say nothing.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(60, 70), torch.nn.ReLU(), torch.nn.Linear(70, 5)).double()
    x, labels = torch.randn(80, 60, dtype=F64), torch.randint(0, 5, (80,))
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: torch.func.functional_call(net, phi, (x,)),
        lambda outputs, data: torch.nn.functional.cross_entropy(outputs, labels),
        lambda phi, data: torch.func.functional_call(net, phi, (x[:9],)).square().mean(),
        1e-3,
    )
    theta = {name: leaf.detach() for name, leaf in net.named_parameters()}
    solver = GradientDescent(step_size=0.1, max_steps=60)
    options = {"linsys": CG(max_steps=20), "curvature": bilevel.GaussNewton()}
    found = bilevel.hypergradient(problem, theta, solver=solver, **options).diagnose()
    assert found.inner.isinf() and found.num_matvecs < 1100


def test_the_theorem_holds_at_a_saddle_that_is_solved():
    """SOLVED_INDEFINITE at a stationary point: the gradient is that of the stationary point, and exact."""
    problem, a, theta = saddle()
    result = at(problem, np.linalg.solve(a, theta.numpy()), theta, Exact())
    assert result.linear.status is bilevel.Status.SOLVED_INDEFINITE
    assert float(result.error_estimate) == 0


def model_problem(seed=0, d=5, lam=0.05):
    """Least squares of tanh outputs, whose Gauss-Newton matrix is not its Hessian."""
    rng = np.random.default_rng(seed)
    x, y, centre = t(rng.standard_normal((9, d))), t(0.5 * rng.standard_normal(9)), t(rng.standard_normal(d))
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, _: torch.tanh(x @ phi),
        lambda z, _: 0.5 * (z - y).square().sum(),
        lambda phi, _: 0.5 * (phi - centre).square().sum(),
        lam,
    )

    def matrix(phi, gauss_newton):
        z = np.tanh(x.numpy() @ phi)
        jacobian = (1 - z**2)[:, None] * x.numpy()
        rest = 0 if gauss_newton else (x.numpy().T * ((z - y.numpy()) * -2 * z * (1 - z**2))) @ x.numpy()
        return jacobian.T @ jacobian + rest + lam * np.eye(d)

    theta = t(0.1 * rng.standard_normal(d))
    exact = bilevel.solve(problem, theta, solver=NewtonCG(max_steps=50, cg_steps=50, tol=1e-13)).unwrap().numpy()
    z = np.tanh(x.numpy() @ exact)  # a stationary point, checked without the library
    slope = x.numpy().T @ ((z - y.numpy()) * (1 - z**2)) + lam * (exact - theta.numpy())
    assert np.linalg.norm(slope) < 1e-11 and np.linalg.eigvalsh(matrix(exact, False))[0] > 0
    return problem, theta, exact, matrix, centre.numpy(), lam


@pytest.mark.parametrize(("gauss_newton", "damping"), [(True, 0.0), (False, 3.0), (True, 3.0)])
def test_estimate_is_of_the_formula_that_was_asked_for(gauss_newton, damping):
    """Not of its bias: with the same curvature and damping at the exact phi. With damping, a damped step would see too little."""
    problem, theta, exact, matrix, centre, lam = model_problem()
    point = exact + 1e-3 * np.random.default_rng(1).standard_normal(5)
    curvature = GaussNewton() if gauss_newton else Hessian()
    result = at(problem, point, theta, Exact(), curvature=curvature, damping=damping)
    wanted = lam * np.linalg.solve(matrix(exact, gauss_newton) + damping * np.eye(5), exact - centre)
    error = np.linalg.norm(result.grad.numpy() - wanted)
    assert error / 2 < float(result.error_estimate) < 2 * error


# --- what a result keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["theta", "data", "result.phi", "u"])
def test_changes_in_place_are_noticed(what):
    case = PROBLEMS[0]
    theta, data = case.theta.clone(), {**case.data, "train": tuple(x.clone() for x in case.data["train"])}
    phi = case.phi_star(theta, data)
    result = bilevel.implicit_gradient(case.problem, phi, theta, data, linsys=CG(max_steps=2, rtol=0.0))
    before = result.error_estimate
    changed = {
        "theta": theta,
        "data": data["train"][0],
        "result.phi": result.phi,
        "u": result.linear.value,
    }[what]
    changed.add_(1.0)
    assert result.error_estimate == before  # it was asked before the change
    with pytest.raises(ValueError, match=r"one of these was changed in place .* Ask before the step, or pass clones"):
        _ = result.explain()  # the eigenvalues were not


def test_the_point_that_was_handed_in_stays_the_callers():
    """The result has a copy of its own: what becomes of the caller's changes nothing."""
    case = PROBLEMS[0]
    phi = case.phi_star(case.theta, case.data)
    one, other = (
        bilevel.implicit_gradient(case.problem, phi, case.theta, case.data, linsys=CG(max_steps=2, rtol=0.0))
        for _ in range(2)
    )
    expected = other.explain()
    phi.add_(1.0)
    assert one.explain() == expected


def test_an_optimizer_step_is_noticed():
    case = PROBLEMS[0]
    theta = case.theta.clone().requires_grad_()
    result = bilevel.hypergradient(case.problem, theta, case.data, **ROUGH)
    theta.grad = result.unwrap()
    torch.optim.SGD([theta], lr=0.1).step()
    with pytest.raises(ValueError, match="changed in place"):
        _ = result.error_estimate


def test_no_graph_is_kept():
    """theta and data may be results of other computations; a result must not hold on to these."""

    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, token):
            ctx.token = token
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g, None

    class Token:
        pass

    case = PROBLEMS[0]
    token = Token()
    alive = weakref.ref(token)
    theta = Graph.apply(case.theta.clone().requires_grad_(), token)
    result = bilevel.hypergradient(case.problem, theta, case.data, **ROUGH)
    result.explain()
    del theta, token
    gc.collect()
    assert alive() is None
    assert all(not tensor.requires_grad for tensor in result.certificate.call.tensors)
    assert result.error_estimate.grad_fn is None


def test_the_users_tensors_are_left_alone():
    case = PROBLEMS[0]
    theta = case.theta.clone().requires_grad_()
    result = bilevel.hypergradient(case.problem, theta, case.data, **ROUGH)
    result.explain()
    assert theta.grad is None and theta.requires_grad and torch.equal(theta, case.theta)


def test_a_result_without_a_certificate_says_so():
    with pytest.raises(ValueError, match=r"error_bound, error_estimate and explain\(\) are for hypergradient\(\)"):
        _ = bilevel.Hypergradient(
            grad=torch.zeros(1),
            outer=torch.zeros(()),
            outer_per_task=torch.zeros(()),
            phi=torch.zeros(1),
            inner=None,
            linear=None,
            curvature=Hessian(),
            damping=0.0,
            ok_per_task=torch.tensor(True),
            reduction="mean",
        ).error_bound


# --- the words --------------------------------------------------------------------------------------------------------


def numbers(pattern, text):
    """The numbers that a sentence names."""
    found = re.search(pattern, text)
    assert found, text
    return [float(group) for group in found.groups()]


def test_explain_says_what_happened_and_how_good_it_is():
    case = Quadratic(0, np.geomspace(1, 100, 20))
    result = bilevel.hypergradient(
        case.problem,
        t(case.theta),
        solver=GradientDescent(step_size=0.01, max_steps=900, tol=1e-2),
        linsys=CG(max_steps=6, rtol=0.0),
    )
    text, found, error = result.explain(), result.diagnose(), case.error(result)
    steps, slope = numbers(r"Inner solve: CONVERGED after (\d+) steps, \|dG/dphi\| = (\S+)\.", text)
    assert steps == result.inner.num_steps and slope == pytest.approx(float(result.inner.residual), rel=1e-2)
    assert "Linear solve: MAX_STEPS after 6 steps, |b - H u| = " in text
    linear, inner = numbers(
        r"Estimated relative error of the gradient: (\S+) from the linear solve, (\S+) from the inner solve\.", text
    )
    assert linear == pytest.approx(float(found.linear / found.size), rel=0.1)
    assert inner == pytest.approx(float(found.inner / found.size), rel=0.1)
    (estimate,) = numbers(r"Estimated absolute error of grad: (\S+)\.\n", text)
    (bound,) = numbers(r"Rigorous bound of the absolute error: (\S+)\.\n", text)
    assert estimate == pytest.approx(error, rel=0.05) and error < bound == pytest.approx(
        float(result.error_bound), rel=1e-2
    )
    low, high, condition = numbers(
        r"Eigenvalues of the Hessian of G at phi, as far as Lanczos sees: (\S+) to (\S+) \(condition number about (\S+)\)\.",
        text,
    )
    assert (low, high, condition) == (1.0, 100.0, 100.0)
    assert text.splitlines()[-1].startswith("- The linear solve limits the accuracy: raise its number of steps.")


@pytest.mark.parametrize(
    ("solver", "linsys", "advice"),
    [
        ((400, 0.0), CG(max_steps=3, rtol=0.0), ["The linear solve limits the accuracy: raise its number of steps."]),
        ((400, 0.0), CG(max_steps=90, rtol=1e-2), ["The linear solve limits the accuracy: lower its rtol."]),
        (
            (5, 0.0),
            Exact(),
            [
                "The inner solve limits the accuracy: raise its number of steps, or lower its step size, where it has one, if"
            ],
        ),
        ((400, 1e-2), Exact(), ["The inner solve limits the accuracy: lower its tol."]),
        ((400, 1e-12), CG(max_steps=90, rtol=1e-12), ["Nothing to change."]),
        (
            (5, 0.0),
            CG(max_steps=2, rtol=0.0),
            ["The linear solve limits the accuracy: raise", "The inner solve limits the accuracy: raise"],
        ),
    ],
)
def test_advice_names_the_solve_that_limits_and_what_to_raise(solver, linsys, advice):
    case = Quadratic(1, np.linspace(1, 10, 12))
    steps, tol = solver
    result = bilevel.hypergradient(
        case.problem,
        t(case.theta),
        solver=GradientDescent(step_size=0.15, max_steps=steps, tol=tol),
        linsys=linsys,
    )
    given = [line for line in result.explain().splitlines() if line.startswith("- ")]
    assert len(given) == len(advice)
    assert all(line.startswith(f"- {words}") for line, words in zip(given, advice, strict=True))


def test_advice_that_is_followed_helps():
    """Lower rtol, then fewer words."""
    case = Quadratic(1, np.linspace(1, 10, 12))
    solver = GradientDescent(step_size=0.15, max_steps=400, tol=1e-11)
    errors = []
    for rtol in (1e-1, 1e-3, 1e-9):
        result = bilevel.hypergradient(case.problem, t(case.theta), solver=solver, linsys=CG(max_steps=90, rtol=rtol))
        errors.append(case.error(result))
        assert ("lower its rtol" in result.explain()) == (rtol > 1e-9)
    assert errors[0] > errors[1] > errors[2]


def test_advice_for_a_point_that_was_brought_and_for_identity():
    case = Quadratic(1, np.linspace(1, 10, 12))
    text = at(case.problem, np.zeros(12), case.theta, Exact()).explain()
    assert "Inner solve" not in text
    assert text.endswith("- phi limits the accuracy: solve the inner problem further before you call.")
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, _: 2 * (phi - 1) ** 2, lambda phi, _: 0.5 * (phi - 5) ** 2, 2.0
    )
    text = at(problem, 2.0, 4.0, Identity()).explain()
    assert "Linear solve: MAX_STEPS after 0 steps, |b - H u| = not measured." in text
    assert text.endswith(
        "- Identity() solves no linear system: this is the first-order gradient. CG comes closer to the exact one."
    )


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            bilevel.Status.LINE_SEARCH_FAILED,
            "its line search found nothing lower; either that is the rounding floor, then use float64, or G has a kink there or is "
            "no function of phi (chance in it).",
        ),
        (bilevel.Status.STOPPED_AT_NEGATIVE_CURVATURE, "it stopped at negative curvature, see there."),
    ],
)
def test_advice_for_the_rarer_statuses(status, words):
    case = Quadratic(1, np.linspace(1, 10, 12))
    result = bilevel.hypergradient(
        case.problem, t(case.theta), solver=GradientDescent(step_size=0.15, max_steps=5), linsys=Exact()
    )
    result = replace(result, inner=replace(result.inner, codes=torch.tensor(int(status))))
    assert result.explain().endswith(f"The inner solve limits the accuracy: {words}")


def test_explain_for_a_batch():
    problem, theta, data, _ = tasks()
    data["x"][1, 0, 0] = torch.nan
    result = run(problem, theta, data)
    text = result.explain()
    assert "Inner solve: 4 MAX_STEPS, 1 NON_FINITE of 5 tasks; at most 20 steps, |dG/dphi| at most " in text
    assert "4 of 5 tasks are ok and in the gradient; that of the others is NaN." in text
    assert "Estimated relative error of the gradient of a task, at most: " in text
    assert "- The inner solve met NaN or infinity. Look for bad data" in text
    found, ok = result.diagnose(), [0, 2, 3, 4]
    linear, inner = numbers(r"at most: (\S+) from the linear solve, (\S+) from the inner", text)
    assert linear == pytest.approx(float((found.linear / found.size)[ok].max()), rel=0.1)
    assert inner == pytest.approx(float((found.inner / found.size)[ok].max()), rel=0.1)
    x = data["x"].numpy()[ok]
    values = np.linalg.eigvalsh(np.einsum("tni,tnj->tij", x, x) + 0.7 * np.eye(4))
    low, high, condition = numbers(r"sees: (\S+) to (\S+) \(condition number about (\S+)\)", text)
    np.testing.assert_allclose([low, high], [values.min(), values.max()], rtol=1e-2)
    assert condition == pytest.approx((values[:, -1] / values[:, 0]).max(), rel=0.1)  # of one task, not across tasks


def test_explain_names_the_leaves_that_hold_no_numbers():
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            0.5 * (data["x"] @ phi).square().sum() + 0.5 * (theta["t"].exp() * phi.square()).sum() - phi.sum()
        ),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta["t"]),
    )
    x, theta = torch.ones(3, 20, 4, dtype=F64), {"t": torch.zeros(4, dtype=F64)}
    x[1, 2, 3], x[1, 0, 0] = torch.nan, torch.inf
    options = {"solver": NewtonCG(max_steps=5, tol=1e-9), "linsys": CG(max_steps=5), "batched": True}
    lines = bilevel.hypergradient(problem, theta, {"x": x, "n": 3}, **options).explain().splitlines()
    assert "- data['x'] holds NaN or infinity (2 of 240 numbers)." in lines
    assert sum("met NaN or infinity" in line for line in lines) == 1  # and not of the linear solve again
    bad = {"t": torch.tensor([0, torch.nan, 0, 0], dtype=F64)}
    text = bilevel.hypergradient(problem, bad, {"x": torch.ones(3, 20, 4, dtype=F64)}, **options).explain()
    assert "- theta['t'] holds NaN or infinity (1 of 4 numbers)." in text and "data" not in text.replace("bad data", "")
    fine = bilevel.hypergradient(problem, theta, {"x": torch.ones(3, 20, 4, dtype=F64)}, **options).explain()
    assert "holds NaN" not in fine


def test_explain_when_the_condition_of_lemma_3_fails():
    text = at(proximal_cubic(2.0, 1.5, 1.2), 0.0, 0.0, Exact()).explain()
    assert (
        "There is no rigorous bound yet: the inner gradient is too large for the condition of Lemma 3, delta < mu / (2 rho)."
        in text
    )


def test_explain_names_the_bias():
    problem, theta, exact, *_ = model_problem()
    for options, words in (
        ({"curvature": GaussNewton()}, "The bias of GaussNewton() is not"),
        ({"damping": 0.25}, "The bias of damping=0.25 is not"),
        ({"curvature": GaussNewton(), "damping": 0.25}, "The bias of GaussNewton() and damping=0.25 is not"),
    ):
        assert words in at(problem, exact, theta, Exact(), **options).explain()
    assert "bias" not in at(problem, exact, theta, Exact()).explain()


LOOKS = [CG(max_steps=10), CG(max_steps=10, steihaug=True), Exact()]


@pytest.mark.parametrize("linsys", LOOKS, ids=repr)
@pytest.mark.parametrize("b_sees_it", [True, False])
@pytest.mark.parametrize("d", [2, 4])
def test_remedy_for_negative_curvature_of_a_proximal_problem(linsys, d, b_sees_it):
    """Raising lam, or damping, by the amount that is named makes the Hessian positive definite; by 5 % less it does not."""
    lam = 0.3
    problem, a, theta = saddle(low=-0.5, d=d, lam=lam, b_sees_it=b_sees_it)
    text = at(problem, np.ones(d), theta[:d], linsys).explain()
    if b_sees_it or not isinstance(linsys, CG):
        assert "is negative, so phi is not a minimum of G: the smallest eigenvalue is about -5.00e-01." in text
    more, damping = numbers(r"Raising lam, now 0\.3, by (\S+), or damping=(\S+), would make it positive", text)
    smallest = np.linalg.eigvalsh(a)[0]
    for shift in (more, damping):
        assert smallest + shift > 0 > smallest + 0.95 * shift
    # and the library agrees
    raised = saddle(low=-0.5 + more, d=d, lam=lam + more, b_sees_it=b_sees_it)[0]
    for after in (
        at(raised, np.ones(d), theta[:d], Exact()),
        at(problem, np.ones(d), theta[:d], Exact(), damping=damping),
    ):
        assert after.linear.status is bilevel.Status.CONVERGED
        assert "The curvature at phi is negative" not in after.explain()


def test_remedy_counts_the_damping_that_is_there():
    problem, a, theta = saddle(low=-0.5)
    text = at(problem, np.ones(4), theta, CG(max_steps=10), damping=0.2).explain()
    more, damping = numbers(r"A term of (\S+) \|phi\|\^2 / 2 in G, or damping=(\S+), would", text)
    smallest = np.linalg.eigvalsh(a)[0]
    assert smallest + 0.2 + more > 0 > smallest + 0.2 + 0.95 * more
    assert smallest + damping > 0 > smallest + 0.95 * damping
    assert "the Hessian of G + 0.2 I" in text


@pytest.mark.parametrize("d", [200, 1000])
def test_remedy_is_enough_where_lanczos_has_not_converged(d):
    """A spectrum without a gap at its lower end: the smallest Ritz value is too large, and its residual is added."""
    values = np.linspace(-1, 9, d)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: 0.5 * (t(values) * phi.square()).sum() - phi @ theta, lambda phi, theta, _: phi.sum()
    )
    result = at(problem, np.zeros(d), np.ones(d), CG(max_steps=50))
    assert float(result.certificate.spectrum.smallest) > -1 + 1e-4
    more, _ = numbers(r"A term of (\S+) \|phi\|\^2 / 2 in G, or damping=(\S+), would", result.explain())
    assert 1 < more < 2


def test_remedy_speaks_of_what_the_problem_has():
    """Lambda as a tree or a matrix, and GaussNewton() only where there is a model and it is not used already."""
    a = t(np.diag([-2.0, 1.0]))
    for lam in ({"x": torch.tensor([0.5, 0.5], dtype=F64)},):
        problem = bilevel.ProximalProblem.from_losses(
            lambda phi, _: 0.5 * phi["x"] @ a @ phi["x"], lambda phi, _: phi["x"].sum(), lam
        )
        theta = {"x": torch.ones(2, dtype=F64)}
        text = bilevel.implicit_gradient(problem, theta, theta, linsys=CG(max_steps=3)).explain()
        assert "Raising Lambda (every eigenvalue) by 1.51, or damping=1.51, would" in text
        assert "GaussNewton" not in text

    def modelled(curvature):
        problem = bilevel.ProximalProblem.from_model(
            lambda phi, _: phi, lambda z, _: 0.5 * z @ a @ z, lambda phi, _: phi.sum(), 0.5
        )
        return at(problem, np.ones(2), np.ones(2), CG(max_steps=3), curvature=curvature).explain()

    assert "use GaussNewton(), which is never negative for a convex output loss" in modelled(Hessian())
    assert "use GaussNewton()" not in modelled(GaussNewton())
    assert "The curvature at phi is negative" in modelled(GaussNewton())  # this output loss is not convex


def test_negative_curvature_on_the_way_is_told_apart():
    """-cos has its maximum at pi; the minimum at 0 is reached from there, past negative curvature."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: (-phi.cos() + theta * phi + 0.01 * phi.square()).sum(),
        lambda phi, theta, _: phi.square().sum(),
    )
    result = bilevel.hypergradient(
        problem,
        t([0.1]),
        solver=NewtonCG(max_steps=50, cg_steps=3, tol=1e-10),
        linsys=CG(max_steps=3),
        init=t([2.5]),
    )
    assert result.ok and int(result.inner.negative_curvature) > 0
    text = result.explain()
    assert (
        "The inner solve met negative curvature on the way. At phi there is none: nothing to change for the gradient."
        in text
    )
    assert "no minimum" not in text


def softmax_with_a_free_bias():
    """A shift of all biases changes no probability: one eigenvalue of H is zero, and neither function sees that direction. The exact
    gradient is that of the same problem with the last bias kept at zero, by dense Newton steps and a dense solve.
    """
    g = torch.Generator().manual_seed(0)
    x, x_val = torch.randn(200, 8, generator=g, dtype=F64), torch.randn(60, 8, generator=g, dtype=F64)
    y, y_val = torch.randint(0, 4, (200,), generator=g), torch.randint(0, 4, (60,), generator=g)

    def fit(phi, x, y):
        return torch.nn.functional.cross_entropy(x @ phi["W"] + phi["b"], y)

    def penalty(phi, theta):
        return 0.5 * theta.exp() * phi["W"].square().sum()

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: fit(phi, x, y) + penalty(phi, theta),
        lambda phi, theta, _: fit(phi, x_val, y_val),
        lambda theta, _: {"W": x.new_zeros(8, 4), "b": x.new_zeros(4)},
    )
    theta = torch.tensor(-2.0, dtype=F64)

    def tree(v):
        return {"W": v[:32].view(8, 4), "b": torch.cat([v[32:], v.new_zeros(1)])}

    def inner(v, theta):
        return fit(tree(v), x, y) + penalty(tree(v), theta)

    v = x.new_zeros(35)
    for _ in range(20):
        v = v - torch.linalg.solve(torch.func.hessian(inner)(v, theta), torch.func.grad(inner)(v, theta))
    u = torch.linalg.solve(
        torch.func.hessian(inner)(v, theta), torch.func.grad(lambda v: fit(tree(v), x_val, y_val))(v)
    )
    cross = torch.func.jacrev(torch.func.grad(inner), argnums=1)(v, theta)
    return problem, theta, float(-(cross @ u))


@pytest.mark.parametrize("solver", [NewtonCG(max_steps=40, cg_steps=40), LBFGS(max_steps=400)], ids=["newton", "lbfgs"])
@pytest.mark.parametrize(("tol", "rtol"), [(1e-9, 1e-9), (1e-3, 1e-9), (1e-9, 1e-3), (1e-6, 1e-5)])
def test_a_singular_direction_that_neither_function_sees_leaves_the_estimate_right(solver, tol, rtol):
    problem, theta, exact = softmax_with_a_free_bias()
    result = bilevel.hypergradient(problem, theta, solver=replace(solver, tol=tol), linsys=CG(max_steps=80, rtol=rtol))
    error = abs(float(result.unwrap()) - exact)
    assert float(result.error_estimate) == pytest.approx(error, rel=0.1, abs=1e-13)
    text = result.explain()
    assert (
        "H is singular at phi: an eigenvalue is zero but for rounding. dL/dphi has nothing along that direction" in text
    )
    assert "add regularisation" not in text and "met negative curvature" not in text
    assert ("limits the accuracy" in text) == (max(tol, rtol) > 1e-9)


def test_a_direction_that_matters_is_not_called_singular_in_float32():
    """A condition number of 2e5 is not one of zero: dL/dphi lies along that direction, and the gradient is exact."""
    a, theta = torch.tensor([1.0, 0.5, 5e-6]), torch.tensor([1.0, 2.0, 3.0])
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: 0.5 * (a * phi * phi).sum() - (a * theta * phi).sum(),
        lambda phi, theta, _: phi.square().sum() / 2,
    )
    result = bilevel.hypergradient(
        problem, theta, init=theta.clone(), solver=NewtonCG(max_steps=5, tol=1e-12), linsys=Exact()
    )
    torch.testing.assert_close(result.unwrap(), theta)
    assert "singular" not in result.explain()


def test_negative_curvature_in_some_tasks_of_a_batch():
    """The worst task decides the amount."""
    low = t([-1.0, 2.0, -3.0])
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: 0.5 * (data["h"] * phi.square()).sum(), lambda phi, data: phi.sum(), 0.5
    )
    result = bilevel.implicit_gradient(
        problem,
        torch.ones(3, 2, dtype=F64),
        t([1.0, 1.0]),
        {"h": torch.stack([low, torch.ones(3, dtype=F64)], 1)},
        linsys=CG(max_steps=3, steihaug=True),
        batched=True,
    )
    text = result.explain()
    assert result.ok.all()
    assert "The curvature at phi is negative in 2 of 3 tasks" in text
    assert "Raising lam, now 0.5, by 2.51, or damping=2.51, would" in text
    assert result.diagnose().error.isinf() and result.diagnose().linear[1].isfinite()


def test_explain_calls_a_singular_matrix_singular():
    """Two equal features and no penalty: the smallest eigenvalue is zero with rounding, not negative curvature."""
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]], dtype=F64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (x @ phi - theta).square().sum(), lambda phi, theta, data: phi.square().sum()
    )
    result = bilevel.implicit_gradient(
        problem, torch.tensor([0.3, -0.2], dtype=F64), torch.ones(3, dtype=F64), linsys=Exact()
    )
    text = result.explain()
    assert "The linear solve: the matrix is singular" in text
    assert "negative" not in text and "damping=6" not in text


def test_explain_of_a_line_search_that_ends_at_a_kink():
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: phi.abs().sum() + 0.5 * (phi - theta).square().sum(),
        lambda phi, theta, data: (phi - 2).square().sum(),
        lambda theta, data: torch.ones_like(theta),
    )
    result = bilevel.hypergradient(
        problem, torch.full((1,), 0.5, dtype=F64), solver=bilevel.solvers.LBFGS(max_steps=1000), linsys=CG(max_steps=5)
    )
    assert result.inner.status is bilevel.Status.LINE_SEARCH_FAILED and result.inner.residual > 0.1
    text = result.explain()
    assert "G has a kink at phi" in text and "use float64" not in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", [NewtonCG(max_steps=60, cg_steps=12), LBFGS(max_steps=400)])
def test_explain_names_the_kinks_of_a_lasso(solver, dtype):
    """Several at once, each of which takes a part of the slope; the other tasks of the batch have none."""
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(rng.standard_normal(shape), dtype=dtype) for shape in ((40, 9), 40))
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, size: (
            0.5 * (x @ w - y).square().mean() + (theta.exp() * (size * w.abs() + (1 - size) * w.square())).sum()
        ),
        lambda w, theta, size: (w - 1).square().sum(),
        lambda theta, size: torch.full_like(theta, 0.1),
    )
    result = bilevel.hypergradient(
        problem,
        torch.full((9,), -1.5, dtype=dtype),
        torch.tensor([0.0, 1.0, 0.0], dtype=dtype),
        solver=solver,
        linsys=CG(max_steps=20),
        batched=True,
    )
    assert (result.phi[1].abs() < 3e-3).sum() >= 5 and result.inner.residual[1] > 0.1  # at several kinks
    assert "G has a kink at phi in 1 of 3 tasks" in result.explain()


def test_a_sharp_bend_is_no_kink():
    """From 1 to -1 within a tenth: only what is left of the slope right before the minimum tells it from a kink."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: (theta + phi.square()).sqrt() + 0.05 * phi.square(), lambda phi, theta, _: phi.clone()
    )
    phi, theta = t(np.linspace(1, 4, 31)), torch.full((31,), 0.01, dtype=F64)
    result = bilevel.implicit_gradient(
        problem, phi, theta, linsys=Exact(), batched=True, theta_batched=True, reduction="none"
    )
    assert result.diagnose().inner.isinf().any() and "G has a kink" not in result.explain()


def test_rounding_is_no_kink():
    """Of gradients that are nothing but rounding, whose slope along themselves is by chance what it is."""
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for shape in ((60, 6, 4), (60, 6)))
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, task: (task[0] @ phi - task[1]).square().mean() + (theta * phi.square()).sum(),
        lambda phi, theta, task: phi.square().sum(),
    )
    phi = torch.linalg.solve(2 * x.mT @ x / 6 + 0.2 * torch.eye(4), 2 * (x.mT @ y.unsqueeze(-1)) / 6).squeeze(-1)
    result = bilevel.implicit_gradient(problem, phi, torch.full((4,), 0.1), (x, y), linsys=Exact(), batched=True)
    largest = result.certificate.spectrum.largest
    asked = torch.ones(60, dtype=torch.bool)
    (found,) = result.certificate._each(lambda here, tasks: kinks(here, largest[tasks], asked[tasks]))
    assert not found.any()


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_explain_names_no_kink_far_from_a_minimum(steps):
    """Of smooth functions that Newton's method finds hard, and of a network with kinks that has been trained for a few steps."""
    rng = np.random.default_rng(1)
    x = t(rng.standard_normal((30, 4)))
    smooth = [
        lambda phi, theta, _: (1 + (phi - theta).square()).sqrt().sum() + 1e-3 * phi.square().sum(),
        lambda phi, theta, _: (phi - theta).square().square().sum() + 1e-3 * phi.square().sum(),
        lambda phi, theta, _: (3 * (phi - theta)).exp().sum() + phi.square().sum(),
        lambda phi, theta, _: torch.nn.functional.softplus(20 * (x @ phi - theta.sum())).mean() + phi.square().sum(),
        lambda phi, theta, _: (x @ phi).relu().square().mean() + 0.5 * (phi - theta).square().sum(),
    ]
    for objective in smooth:
        problem = bilevel.BilevelProblem.from_functions(
            objective, lambda phi, theta, _: (phi - 2).square().sum(), lambda theta, _: torch.full_like(theta, 3.0)
        )
        solver = GradientDescent(step_size=0.01, max_steps=steps)
        result = bilevel.hypergradient(problem, torch.full((4,), 0.5, dtype=F64), solver=solver, linsys=CG(max_steps=9))
        assert "G has a kink" not in result.explain()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3)).double()
    inputs, labels = torch.randn(30, 6, dtype=F64), torch.randint(0, 3, (30,))
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, _: torch.func.functional_call(net, phi, (inputs,)),
        lambda outputs, _: torch.nn.functional.cross_entropy(outputs, labels),
        lambda phi, _: torch.func.functional_call(net, phi, (inputs[:9],)).square().mean(),
        0.5,
    )
    theta = {name: leaf.detach() for name, leaf in net.named_parameters()}
    solver = GradientDescent(step_size=0.1, max_steps=steps)
    result = bilevel.hypergradient(
        problem, theta, solver=solver, linsys=CG(max_steps=20), curvature=bilevel.GaussNewton()
    )
    assert "G has a kink" not in result.explain()


@pytest.mark.parametrize(
    "part, options", [("inner", {"tol": 1e-2, "rtol": 1e-5}), ("linear", {"tol": 1e-5, "rtol": 1e-2})]
)
def test_many_data_in_float32_hide_no_error(part, options):
    """A model of rounding that counts all numbers of the data says that everything below a per cent may be rounding here."""
    g = torch.Generator().manual_seed(0)
    X, Xv, w = (torch.randn(*shape, generator=g) for shape in ((20_000, 50), (500, 50), (50,)))
    y, yv = (X @ w / 7 + 0.5 * torch.randn(20_000, generator=g)).sign(), (Xv @ w / 7).sign()

    def loss(phi, X, y):
        return torch.nn.functional.softplus(-(X @ phi) * y).mean()

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: loss(phi, data[0], data[1]) + 0.5 * (theta.exp() * phi.square()).sum(),
        lambda phi, theta, data: loss(phi, data[2], data[3]),
        lambda theta, data: torch.zeros_like(theta),
    )
    data, theta = (X, y, Xv, yv), torch.full((50,), -3.0)

    def run(dtype, tol, rtol):
        return bilevel.hypergradient(
            problem,
            theta.to(dtype),
            tuple(x.to(dtype) for x in data),
            solver=bilevel.solvers.LBFGS(max_steps=500, tol=tol, check_every=1),
            linsys=CG(max_steps=100, rtol=rtol),
        )

    exact, found = run(F64, 1e-11, 1e-11).grad, run(torch.float32, **options)
    error = (found.grad - exact).norm()
    assert error > 1e-4 * exact.norm()
    assert 0.7 * error < found.error_estimate < 1.4 * error
    assert getattr(found.diagnose(), part) > 0.7 * error


def test_a_copy_can_be_asked_and_a_changed_one_not():
    case = Quadratic(3, np.geomspace(1, 10, 5))
    theta = t(case.theta)
    result = bilevel.hypergradient(case.problem, theta, **ROUGH)
    copied, expected = copy.deepcopy(result), copy.deepcopy(result).error_estimate
    assert expected == bilevel.hypergradient(case.problem, theta, **ROUGH).error_estimate
    theta.add_(1)
    with pytest.raises(ValueError, match="changed in place"):
        result.diagnose()
    with pytest.raises(ValueError, match="changed in place"):
        copy.deepcopy(result).diagnose()
    assert copied.error_estimate == expected
    assert "linear solve" in copied.explain().lower()


def test_a_copy_of_a_result_with_data_can_be_asked():
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (data * (phi - theta)).square().sum(),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta, data = t(np.array([1.0, 2.0])), t(np.array([1.0, 3.0]))
    options = {"solver": GradientDescent(step_size=0.1, max_steps=20), "linsys": CG(max_steps=1)}
    result = bilevel.hypergradient(problem, theta, data, **options)
    assert copy.deepcopy(result).diagnose().error == result.diagnose().error > 0


class Moody(bilevel.BilevelProblem):
    """Ridge regression for tasks with the same rows; what the functions look up besides their arguments can change."""

    def __init__(self) -> None:
        self.shift, self.weight = 0.0, 1.0

    def inner_objective(self, phi, theta, data):
        return (
            0.5 * (data["X"] @ phi - data["y"] - self.shift).square().mean() + 0.5 * (theta.exp() * phi.square()).sum()
        )

    def outer_loss(self, phi, theta, data):
        return self.weight * phi.square().sum() + phi.sum()

    def initial_phi(self, theta, data):
        return torch.zeros(3, dtype=F64)


@pytest.mark.parametrize("what", ["inner_objective", "outer_loss"])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("question", ["error_estimate", "diagnose", "explain"])
def test_a_captured_number_that_has_changed(question, batched, what) -> None:
    """The answer would be about another problem. It is one again when the number is what it was."""
    g = torch.Generator().manual_seed(3)
    tasks = (4,) if batched else ()
    data = {"X": torch.randn(*tasks, 9, 3, generator=g, dtype=F64), "y": torch.randn(*tasks, 9, generator=g, dtype=F64)}
    problem, theta = Moody(), torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    found = bilevel.hypergradient(
        problem,
        theta,
        data,
        solver=NewtonCG(max_steps=20, cg_steps=5, tol=1e-9),
        linsys=CG(max_steps=20, rtol=1e-9),
        batched=batched,
        chunk_size=3 if batched else None,
    )

    def ask() -> object:
        answer = getattr(found, question)
        return answer() if callable(answer) else answer

    problem.shift, problem.weight = (1e-4, 1.0) if what == "inner_objective" else (0.0, 1.001)
    with pytest.raises(
        ValueError, match=f"at phi {what} is not what it was .* Ask before it changes, or pass it in data"
    ):
        ask()
    problem.shift, problem.weight = 0.0, 1.0
    assert ask() is not None
    problem.shift = 1.0
    assert ask() is not None  # it is known by now


def test_a_change_is_seen_far_from_the_solution_too() -> None:
    """Where the gradient of G is as large after the change as before."""
    g = torch.Generator().manual_seed(3)
    data = {"X": torch.randn(9, 3, generator=g, dtype=F64), "y": torch.randn(9, generator=g, dtype=F64)}
    problem = Moody()
    found = bilevel.hypergradient(
        problem,
        torch.tensor([-1.0, 0.0, 1.0], dtype=F64),
        data,
        solver=GradientDescent(step_size=0.01, max_steps=1),
        linsys=CG(max_steps=20, rtol=1e-9),
    )
    problem.shift = 1e-3
    with pytest.raises(ValueError, match="at phi inner_objective is not what it was"):
        found.diagnose()


def test_what_a_user_does_to_a_result_is_no_change() -> None:
    case = Quadratic(0, [1.0, 2.0, 3.0])
    found = bilevel.hypergradient(
        case.problem, t(case.theta), None, solver=NewtonCG(max_steps=5, cg_steps=9), linsys=CG(max_steps=9)
    )
    found.outer_per_task.zero_()
    found.slope.fill_(1.0)
    assert found.error_estimate < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_a_loss_that_cancels_is_no_change(seed) -> None:
    """L is a sum less a number that is nearly equal; another number of threads adds up in another order."""
    n, threads = 100_003, torch.get_num_threads()
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    size = float((x.double() / 2).square().sum())

    def outer(phi, theta, data):
        return phi.square().sum() - size

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta * x).square().sum() + 0.5 * phi.square().sum(),
        outer,
        lambda theta, data: torch.zeros(n),
    )
    try:
        torch.set_num_threads(1)
        found = bilevel.hypergradient(
            problem, torch.ones(()), None, solver=NewtonCG(max_steps=3, cg_steps=2), linsys=CG(max_steps=3)
        )
        torch.set_num_threads(2)
        assert found.error_estimate < 1e-3 * found.grad.abs()
    finally:
        torch.set_num_threads(threads)


def test_accuracy_of_a_loss_that_draws_is_refused() -> None:
    case = Quadratic(0, [1.0, 2.0, 3.0])
    problem = bilevel.BilevelProblem.from_functions(
        case.problem.inner_objective,
        lambda phi, theta, data: phi[torch.randint(3, ())].square(),
        lambda theta, data: torch.zeros(3, dtype=F64),
    )
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match="accuracy= call the functions .* outer_loss is not what it was .* random numbers"
    ):
        for _ in range(9):
            bilevel.hypergradient(
                problem,
                t(case.theta),
                None,
                solver=NewtonCG(max_steps=9, cg_steps=9),
                linsys=CG(max_steps=9),
                accuracy=1e-4,
            )


# --- at the ends of the range of numbers, and of definiteness ----------------------------------------------------------


def test_an_estimate_whose_squares_are_too_large_to_be_numbers():
    """The error is a quarter of the gradient, in any unit of the outer loss; at the very end nothing is known, and that is said."""
    said = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float32, 1e20), (F64, 1e200)):
        theta = torch.tensor([1.0, 2.0], dtype=dtype)
        problem = bilevel.BilevelProblem.from_functions(
            lambda phi, theta, data: 0.5 * (phi - theta).square().sum() + phi.pow(4).sum(),
            lambda phi, theta, data, scale=scale: scale * phi.sum(),
        )
        result = bilevel.implicit_gradient(problem, 0.4 * theta, theta, linsys=CG(max_steps=5))
        found = result.diagnose()
        said.append((float(found.inner / found.size), result.explain()))
    assert said[0][0] > 0.1 and said[1][0] == pytest.approx(said[0][0], rel=1e-4)
    assert all("phi limits the accuracy" in words for _, words in said[:2])
    assert "There is no estimate of the error" in said[2][1] and "Nothing to change" not in said[2][1]


def test_a_null_direction_is_no_negative_curvature():
    """Where CG(steihaug=True) stopped at it; and it is not advised what is in use."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi[0] - theta[0]).square() + 0 * (phi[1] * theta[1]),
        lambda phi, theta, data: phi.sum(),
    )
    theta = t([1.0, 2.0])
    said = bilevel.implicit_gradient(problem, theta, theta, linsys=CG(max_steps=5, steihaug=True)).explain()
    assert "H is singular at phi: an eigenvalue is zero but for rounding, and the linear solve took it for" in said
    assert "no minimum" not in said and "steihaug" not in said
