"""root and fixed_point: solutions of conditions that are no gradients, against closed forms, dense algebra and differences."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from bilevel import BilevelProblem, Result, SolverError, Status, argmin, fixed_point, hypergradient, root
from bilevel.linsys import CG, GMRES, MINRES, BiCGStab, Exact, Identity, Neumann
from bilevel.solvers import Anderson, BlackBox, FixedPointIteration, GradientDescent, Newton, NewtonCG
from bilevel.trees import flatten, tree_map, unflatten
from tests.cases import (
    EQUATION_SOLVER_NAMES,
    EQUATIONS,
    GENERAL_LINSYS_NAMES,
    Equation,
    equation_solvers,
    general_linear_solvers,
)
from tests.test_argmin import TRANSFORMS, Subject, assert_same, is_floating, scaled, stack, vector, with_floating

F32, F64 = torch.float32, torch.float64
NEWTON = Newton(max_steps=30, tol=1e-11)
AFFINE, TREE, HYPERBOLIC, CONSTRAINED = EQUATIONS
IDS = {"ids": lambda case: case.name}


def tensor(*values: Any) -> Tensor:
    return torch.tensor(*values, dtype=F64)


def ours(case: Equation, solver: Any = NEWTON, linsys: Any = Exact(), **options: Any) -> Callable[[Any, Any], Any]:  # noqa: B008
    return lambda theta, data: case.solution(theta, data, solver=solver, linsys=linsys, **options)


def subject(case: Equation, wrt: str, solution: Callable[[Any, Any], Any]) -> Subject:
    """What the matrix of transforms differentiates: with respect to theta, or to the floating data."""
    if wrt == "theta":
        x, arguments = case.theta, lambda x: (x, case.data)
    else:
        x = tuple(filter(is_floating, flatten(case.data)[0]))
        arguments = lambda x: (case.theta, with_floating(case.data, x))  # noqa: E731

    def f(x: Any) -> Tensor:
        theta, data = arguments(x)
        return case.outer_loss(solution(theta, data), theta, data)

    xs = stack([scaled(x, k) for k in range(3)])
    xss = stack([stack([scaled(x, 2 * i + j) for j in range(2)]) for i in range(2)])
    v = tree_map(lambda leaf: torch.cos(3 * leaf + 1), x)
    w = torch.cos(torch.arange(1.0, 1 + len(vector(case.phi_star(case.theta, case.data))), dtype=F64))
    return Subject(f, lambda x: torch.sin(vector(solution(*arguments(x)))), x, xs, xss, v, w)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are known.


def cosine(x: Tensor, t: Tensor, data: Any) -> Tensor:
    return torch.cos(x) + t


@pytest.mark.parametrize("linsys", GENERAL_LINSYS_NAMES)
@pytest.mark.parametrize(
    "solver",
    [
        FixedPointIteration(max_steps=200, tol=1e-14),
        Anderson(max_steps=60, tol=1e-14),
        Newton(max_steps=20, tol=1e-14),
        BlackBox(lambda T, theta, data, init: tensor(0.7390851332151607) + 0 * theta),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_the_fixed_point_of_the_cosine(solver: Any, linsys: str) -> None:
    """x = cos x + t: x' = 1 / (1 + sin x), x'' = -cos(x) x'^3."""
    chosen = general_linear_solvers(1e-13)[linsys]

    def x(t: Tensor) -> Tensor:
        return fixed_point(cosine, t, solver=solver, linsys=chosen, init=tensor(0.5))

    zero = tensor(0.0)
    numbers = {1: 0.5975100457, 2: -0.1576631141}
    assert abs(float(x(zero)) - 0.7390851332) < 1e-9
    for first in (grad, jacrev, jacfwd):
        assert abs(float(first(x)(zero)) - numbers[1]) < 1e-9
    for second in (hessian, lambda f: grad(grad(f)), lambda f: jacrev(jacfwd(f))):
        assert abs(float(second(x)(zero)) - numbers[2]) < 1e-9


def test_the_constrained_quadratic_of_the_issue() -> None:
    """Q = [[4, 1], [1, 2]], c = (1, 1), x1 + x2 = b: x = (1/4, 3/4) at b = 1, dx/db = (1/4, 3/4)."""
    q, c = tensor([[4.0, 1.0], [1.0, 2.0]]), torch.ones(2, dtype=F64)

    def optimality(z: Any, b: Tensor, data: Any) -> Any:
        return {"x": q @ z["x"] + c - z["nu"], "nu": z["x"].sum() - b}

    def x(b: Tensor) -> Tensor:
        init = {"x": torch.zeros(2, dtype=F64), "nu": tensor(0.0)}
        return root(optimality, b, solver=Newton(max_steps=3, tol=1e-12), linsys=Exact(), init=init)["x"]

    expected = tensor([0.25, 0.75])
    for got in (x(tensor(1.0)), jacrev(x)(tensor(1.0)), jacfwd(x)(tensor(1.0))):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_an_implicit_time_step() -> None:
    """Ten backward Euler steps of a stiff y' = -k y: y = (1 + k h)^-10, each step a root, and k of them all."""

    def final(k: Tensor) -> Tensor:
        y = tensor(1.0)
        for _ in range(10):
            y = root(
                lambda new, k, old: new - old + 0.1 * k * new, k, y, solver=Newton(tol=1e-13), linsys=Exact(), init=y
            )
        return y

    k = tensor(50.0)
    for transform in (lambda f: f, grad, hessian):
        torch.testing.assert_close(transform(final)(k), transform(lambda k: (1 + 0.1 * k) ** -10)(k), rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The matrix of transforms.


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wrt", ["theta", "data"])
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_every_transform_is_that_of_the_closed_form(case: Equation, wrt: str, transform: str) -> None:
    expected = TRANSFORMS[transform](subject(case, wrt, case.phi_star))
    assert max(float(leaf.abs().max()) for leaf in tree_leaves(expected)) > 1e-3
    assert_same(TRANSFORMS[transform](subject(case, wrt, ours(case))), expected)


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "jacrev(jacfwd)", "vmap(grad)", "hessian(vmap)"])
@pytest.mark.parametrize("linsys", GENERAL_LINSYS_NAMES)
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_the_linear_solver_does_not_matter(case: Equation, linsys: str, transform: str) -> None:
    got = TRANSFORMS[transform](subject(case, "theta", ours(case, linsys=general_linear_solvers(1e-12)[linsys])))
    if case is CONSTRAINED and linsys == "bicgstab" and any(leaf.isnan().any() for leaf in tree_leaves(got)):
        return  # BREAKDOWN: its inner products with a right-hand side that lies in the zero block are zero
    assert_same(got, TRANSFORMS[transform](subject(case, "theta", case.phi_star)))


@pytest.mark.parametrize("transform", ["value", "grad", "jacfwd", "hessian", "vmap(grad)", "vmap(jacfwd)"])
@pytest.mark.parametrize("solver", EQUATION_SOLVER_NAMES)
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_the_solver_does_not_matter(case: Equation, solver: str, transform: str) -> None:
    """A black box as well: it is called outside every transform, once for each entry."""
    got = TRANSFORMS[transform](subject(case, "theta", ours(case, equation_solvers(case, 1e-10)[solver])))
    assert_same(got, TRANSFORMS[transform](subject(case, "theta", case.phi_star)))


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap(hessian)"])
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_float32(case: Equation, transform: str) -> None:
    single = case.to(F32)
    got = TRANSFORMS[transform](subject(single, "theta", ours(single, Newton(max_steps=20, tol=1e-5))))
    assert {leaf.dtype for leaf in tree_leaves(got)} == {F32}
    assert_same(got, TRANSFORMS[transform](subject(single.to(F64), "theta", case.phi_star)), 3e-4)


@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_mixed_second_derivatives(case: Equation) -> None:
    floats = tuple(filter(is_floating, flatten(case.data)[0]))

    def outer(solution: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
        def f(theta: Any, floats: Any) -> Tensor:
            data = with_floating(case.data, floats)
            return case.outer_loss(solution(theta, data), theta, data)

        return f

    for mixed in (
        lambda f: jacrev(grad(f), argnums=1)(case.theta, floats),
        lambda f: jacfwd(grad(f), argnums=1)(case.theta, floats),
        lambda f: jacrev(jacfwd(f, argnums=1), argnums=0)(case.theta, floats),
    ):
        assert_same(mixed(outer(ours(case))), mixed(outer(case.phi_star)))


@pytest.mark.parametrize("order", ["rrr", "rrf", "rfr", "frr", "frf", "rff"])
def test_third_derivatives_are_right_or_raise(order: str) -> None:
    def derivative(f: Callable[[Tensor], Tensor]) -> Tensor:
        for letter in reversed(order):
            f = {"r": jacrev, "f": jacfwd}[letter](f)
        return f(HYPERBOLIC.theta)

    mine = subject(HYPERBOLIC, "theta", ours(HYPERBOLIC)).f
    if order.count("f") >= 2:
        with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
            derivative(mine)
    else:
        closed = subject(HYPERBOLIC, "theta", HYPERBOLIC.phi_star).f
        assert_same(derivative(mine), jacrev(jacrev(jacrev(closed)))(HYPERBOLIC.theta), 1e-7)


@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_forward_over_forward_raises_with_advice(case: Equation) -> None:
    """PyTorch would give exactly 0."""
    s = subject(case, "theta", ours(case))
    for nested in (
        lambda: jacfwd(jacfwd(s.f))(s.x),
        lambda: jvp(lambda x: jvp(s.f, (x,), (s.v,))[1], (s.x,), (s.v,)),
        lambda: vmap(jacfwd(jacfwd(s.f)))(s.xs),
    ):
        with pytest.raises(NotImplementedError, match="forward mode over forward mode .*torch.func.hessian"):
            nested()


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=["theta", "data", "both"])
@pytest.mark.parametrize("inner", ["value", "grad", "hessian", "jacfwd"])
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_vmap_over_theta_or_data_or_both(case: Equation, inner: str, in_dims: tuple[int | None, int | None]) -> None:
    """The integer labels of the batch are different in every entry."""
    leaves, structure = flatten(case.data)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def rebuilt(tensors: Any) -> Any:
        rest = iter(tensors)
        return unflatten(structure, [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    thetas = stack([scaled(case.theta, k) for k in range(3)]) if in_dims[0] == 0 else case.theta
    datas = tensors
    if in_dims[1] == 0:
        rolled = [[x * (1 + 0.07 * k) if x.is_floating_point() else x.roll(k) for x in tensors] for k in range(3)]
        datas = tuple(map(torch.stack, zip(*rolled, strict=True)))

    def outer(solution: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
        def f(theta: Any, tensors: Any) -> Tensor:
            data = rebuilt(tensors)
            return case.outer_loss(solution(theta, data), theta, data)

        return f

    wrap = {"value": lambda f: f, "grad": grad, "hessian": hessian, "jacfwd": jacfwd}[inner]
    got = vmap(wrap(outer(ours(case))), in_dims)(thetas, datas)
    assert_same(got, vmap(wrap(outer(case.phi_star)), in_dims)(thetas, datas))


# ----------------------------------------------------------------------------------------------------------------------
# Eager autograd.


@pytest.mark.parametrize("linsys", GENERAL_LINSYS_NAMES)
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_eager_backward_and_double_backward(case: Equation, linsys: str) -> None:
    def derivatives(solution: Callable[[Any, Any], Any]) -> list[Tensor]:
        theta, data = (
            tree_map(lambda leaf: leaf.clone().requires_grad_() if is_floating(leaf) else leaf, tree)
            for tree in (case.theta, case.data)
        )
        inputs = [leaf for leaf in flatten((theta, data))[0] if is_floating(leaf)]
        value = case.outer_loss(solution(theta, data), theta, data)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        scalar = sum((g * torch.cos(x.detach())).sum() + (g**3).sum() for g, x in zip(first, inputs, strict=True))
        return [value, *first, *torch.autograd.grad(scalar, inputs)]

    got = derivatives(ours(case, linsys=general_linear_solvers(1e-13)[linsys]))
    for one, other in zip(got, derivatives(case.phi_star), strict=True):
        assert_same(one.detach(), other.detach())


@pytest.mark.parametrize("solve", [root, fixed_point])
def test_gradcheck_of_a_condition_without_closed_form(solve: Callable[..., Any]) -> None:
    """Finite differences of torch, of every entry: tanh(M x) + x + x^3 - (W theta) (1 + roll(x)) - d."""
    generator = torch.Generator().manual_seed(0)
    m, w, theta, d = (torch.randn(*s, generator=generator, dtype=F64) for s in ((4, 4), (4, 3), (3,), (4,)))

    def condition(x: Tensor, theta: Tensor, d: Tensor) -> Tensor:
        return torch.tanh(0.3 * m @ x) + x + x**3 - (w @ theta) * (1 + x.roll(1)) - d

    fn = condition if solve is root else lambda x, theta, d: x - condition(x, theta, d)

    def x(theta: Tensor, d: Tensor) -> Tensor:
        solver = Newton(max_steps=50, tol=1e-13)
        return solve(fn, theta, d, solver=solver, linsys=Exact(), init=torch.zeros(4, dtype=F64))

    assert condition(x(theta, d), theta, d).norm() < 1e-12
    inputs = (theta.requires_grad_(), d.requires_grad_())
    assert torch.autograd.gradcheck(x, inputs)
    assert torch.autograd.gradgradcheck(x, inputs)


def test_backward_accumulates_in_the_users_tensors_only() -> None:
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), CONSTRAINED.theta)
    init = tree_map(torch.clone, CONSTRAINED.init)
    phi = CONSTRAINED.solution(theta, CONSTRAINED.data, init=init, solver=NEWTON, linsys=Exact())
    assert list(phi) == list(init)
    CONSTRAINED.outer_loss(phi, theta, CONSTRAINED.data).backward()
    expected = grad(CONSTRAINED.outer)(CONSTRAINED.theta, CONSTRAINED.data)
    for key, leaf in theta.items():
        assert_same(leaf.grad, expected[key])
        assert torch.equal(leaf, CONSTRAINED.theta[key])
    for leaf, before in zip(flatten(init)[0], flatten(CONSTRAINED.init)[0], strict=True):
        assert torch.equal(leaf, before) and leaf.grad is None and leaf._version == 0


def test_dicts_are_matched_by_key() -> None:
    """What F returns in another order than phi has."""

    def swapped(phi: Any, theta: Any, data: Any) -> Any:
        return dict(reversed(CONSTRAINED.fn(phi, theta, data).items()))

    theta = dict(reversed(CONSTRAINED.theta.items()))
    phi = root(swapped, theta, CONSTRAINED.data, solver=NEWTON, linsys=Exact(), init=CONSTRAINED.init)
    assert_same(vector(phi), vector(CONSTRAINED.phi_star(CONSTRAINED.theta, CONSTRAINED.data)))


def test_a_condition_that_differentiates_by_itself() -> None:
    """The stationarity of an objective, written with torch.func.grad: root is argmin."""

    def objective(phi: Tensor, theta: Tensor) -> Tensor:
        return torch.cosh(phi).sum() + 0.5 * (phi[:-1] * phi[1:]).sum() * theta[0] - phi @ theta

    problem = BilevelProblem.from_functions(lambda phi, theta, data: objective(phi, theta), lambda *_: tensor(0.0))
    theta, init = tensor([0.3, -0.2, 0.5]), torch.zeros(3, dtype=F64)
    newton_cg = NewtonCG(max_steps=20, cg_steps=5, tol=1e-12)

    def by_argmin(theta: Tensor) -> Tensor:
        return (argmin(problem, theta, solver=newton_cg, linsys=Exact(), init=init) ** 3).sum()

    def by_root(theta: Tensor) -> Tensor:
        phi = root(
            lambda phi, theta, data: grad(objective)(phi, theta), theta, solver=NEWTON, linsys=Exact(), init=init
        )
        return (phi**3).sum()

    for transform in (grad, hessian, jacfwd):
        assert_same(transform(by_root)(theta), transform(by_argmin)(theta))


# ----------------------------------------------------------------------------------------------------------------------
# The start.


def test_the_derivative_with_respect_to_the_start_is_zero() -> None:
    def f(init: Tensor) -> Tensor:
        return ours(HYPERBOLIC, init=init)(HYPERBOLIC.theta, HYPERBOLIC.data).sum()

    init = tensor([0.1, 0.2, -0.1, 0.3])
    assert grad(f)(init).tolist() == [0.0] * 4
    assert jacfwd(f)(init).tolist() == [0.0] * 4


def test_vmap_over_starts_finds_different_roots() -> None:
    """x^2 = theta from both sides: +-sqrt(theta), with derivatives +-1 / (2 sqrt(theta))."""

    def x(theta: Tensor, init: Tensor) -> Tensor:
        return root(lambda x, theta, data: x**2 - theta, theta, solver=NEWTON, linsys=Exact(), init=init)

    theta, starts = tensor(2.0), tensor([-1.0, 1.0, 3.0])
    signs = tensor([-1.0, 1.0, 1.0])
    assert_same(vmap(x, (None, 0))(theta, starts), signs * 2**0.5, 1e-10)
    assert_same(vmap(grad(x), (None, 0))(theta, starts), signs * 0.5 / 2**0.5, 1e-10)
    assert_same(vmap(hessian(x), (None, 0))(theta, starts), -signs * 0.25 / 2**1.5, 1e-10)


@pytest.mark.parametrize("tol", [0.0, 1e-9])
@pytest.mark.parametrize("solver", [n for n in EQUATION_SOLVER_NAMES if n != "black-box"])
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_a_start_that_is_the_solution_already(case: Equation, solver: str, tol: float) -> None:
    """No divergence: there is nothing to lower. A Function that returned its input would raise."""
    reports: list[Result] = []
    init = case.phi_star(case.theta, case.data)
    chosen = replace(equation_solvers(case, tol)[solver], max_steps=5)
    phi = case.solution(case.theta, case.data, init=init, solver=chosen, linsys=Exact(), report=reports.append)
    assert not reports[0].failed
    if tol:
        assert reports[0].status is Status.CONVERGED and reports[0].num_steps == 0
    assert_same(vector(phi), vector(init), 1e-13)
    for leaf, start in zip(flatten(phi)[0], flatten(init)[0], strict=True):
        assert leaf.data_ptr() != start.data_ptr()
    got = grad(lambda theta: case.outer_loss(ours(case, chosen, init=init)(theta, case.data), theta, case.data))
    assert_same(got(case.theta), grad(case.outer)(case.theta, case.data))


# ----------------------------------------------------------------------------------------------------------------------
# What the solvers report.


def reported(fn: Any, theta: Tensor, init: Tensor, solver: Any, solve: Any = fixed_point) -> tuple[Tensor, Result]:
    reports: list[Result] = []
    phi = solve(fn, theta, solver=solver, linsys=Exact(), init=init, report=reports.append)
    return phi, reports[0]


def quarter_turn(x: Tensor, centre: Tensor, data: Any) -> Tensor:
    return centre + tensor([[0.0, -1.0], [1.0, 0.0]]) @ (x - centre)


@pytest.mark.parametrize("tol", [0.0, 1e-10])
@pytest.mark.parametrize("max_steps", [1, 50, 51])
def test_plain_iteration_of_a_rotation_diverges_and_says_so(max_steps: int, tol: float) -> None:
    """It goes round for ever at one distance: without this status the answer would be some point of the circle."""
    solver = FixedPointIteration(max_steps=max_steps, tol=tol)
    phi, result = reported(quarter_turn, torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64), solver)
    assert result.status is Status.DIVERGED and phi.isnan().all()
    assert "Anderson or Newton" in result.status.message
    assert abs(float(result.residual) - 2) < 1e-12  # |centre - start| sqrt(2)


@pytest.mark.parametrize(
    "solver",
    [
        Newton(max_steps=5, tol=1e-10),
        Anderson(max_steps=20, tol=1e-10),
        FixedPointIteration(max_steps=200, tol=1e-10, relaxation=0.5),
    ],
)
def test_other_solvers_find_the_centre_of_the_rotation(solver: Any) -> None:
    centre = tensor([1.0, -2.0])
    phi, result = reported(quarter_turn, centre, torch.zeros(2, dtype=F64), solver)
    assert result.status is Status.CONVERGED and result.residual <= 1e-10
    assert_same(phi, centre, 1e-9)
    jacobian = jacrev(
        lambda c: fixed_point(quarter_turn, c, solver=solver, linsys=Exact(), init=torch.zeros(2, dtype=F64))
    )(centre)
    assert_same(jacobian, torch.eye(2, dtype=F64), 1e-12)


def test_statuses_in_a_batch_of_rotations_and_contractions() -> None:
    """x -> c + factor R (x - c): a contraction, a rotation, a spiral outwards, and a contraction that is too slow."""
    factors = tensor([0.5, 1.0, 1.1, 0.999])

    def x(factor: Tensor) -> Tensor:
        return fixed_point(
            lambda x, centre, factor: centre + factor * (quarter_turn(x, centre, None) - centre),
            torch.ones(2, dtype=F64),
            factor,
            solver=FixedPointIteration(max_steps=60, tol=1e-8),
            linsys=Exact(),
            init=torch.zeros(2, dtype=F64),
        )

    got = vmap(x)(factors)
    assert got.isnan().all(-1).tolist() == [False, True, True, False]
    assert_same(got[0], torch.ones(2, dtype=F64), 1e-7)
    assert (got[3] - 1).norm() > 1  # MAX_STEPS: not there, and said so
    _, slow = reported(
        lambda x, c, _: c + 0.999 * (quarter_turn(x, c, None) - c),
        torch.ones(2, dtype=F64),
        torch.zeros(2, dtype=F64),
        FixedPointIteration(max_steps=60, tol=1e-8),
    )
    assert slow.status is Status.MAX_STEPS and slow.residual > 1


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=40), FixedPointIteration(max_steps=40, tol=1e-10)])
def test_an_expansion_diverges_by_iteration_and_not_by_newton(solver: Any) -> None:
    phi, result = reported(lambda x, t, _: 2 * x + t, tensor([1.0]), tensor([0.0]), solver)
    assert result.status is Status.DIVERGED and phi.isnan().all()
    for other in (Newton(max_steps=5, tol=1e-12), Anderson(max_steps=10, tol=1e-12)):
        phi, result = reported(lambda x, t, _: 2 * x + t, tensor([1.0]), tensor([0.0]), other)
        assert result.status is Status.CONVERGED
        assert_same(phi, tensor([-1.0]), 1e-12)


def test_newton_shortens_its_step() -> None:
    """arctan from 3: the full Newton step doubles the distance, for ever."""
    phi, result = reported(
        lambda x, t, _: torch.atan(x - t), tensor([0.5]), tensor([3.5]), Newton(max_steps=20, tol=1e-13), root
    )
    assert result.status is Status.CONVERGED
    assert_same(phi, tensor([0.5]), 1e-12)


@pytest.mark.parametrize("start", [1.0, 3.0, 100.0])
def test_newton_without_a_root_fails_at_the_smallest_residual(start: float) -> None:
    def F(x: Tensor, t: Tensor, _: Any) -> Tensor:
        return x**2 + t

    solver = Newton(max_steps=200, tol=1e-10)
    phi, result = reported(F, tensor([1.0]), tensor([start]), solver, root)
    # from 1 the first step ends at 0, where the derivative is 0 too
    words = "SINGULAR .* or start elsewhere" if start == 1 else "DIVERGED .* stopped falling far from zero"
    assert 1 <= result.residual < 1.01
    with pytest.raises(SolverError, match=words):
        root(F, tensor([1.0]), solver=solver, linsys=Exact(), init=tensor([start]), check=True)
    assert phi.isnan().all()


@pytest.mark.parametrize(
    ("dtype", "scale", "start"), [(torch.float32, 1.0, 100.0), (torch.float64, 1.0, 1e5), (torch.float64, 1e-9, 3.0)]
)
def test_what_is_no_root_does_not_depend_on_units_or_start(dtype: torch.dtype, scale: float, start: float) -> None:
    t = torch.ones(1, dtype=dtype)
    with pytest.raises(SolverError, match="DIVERGED"):
        root(
            lambda x, t, _: scale * (x**2 + t),
            t,
            solver=Newton(max_steps=200, tol=1e-30),
            linsys=Exact(),
            init=start * t,
            check=True,
        )


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e10])
def test_newton_from_its_own_answer_has_not_failed(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        t = torch.randn(4, generator=g, dtype=torch.float64) + 3

        def F(x: Tensor, t: Tensor, _: Any) -> Tensor:
            return scale * (x**3 + 0.1 * x.flip(0) - t)

        first, _ = reported(F, t, torch.ones(4, dtype=torch.float64), Newton(max_steps=50), root)
        again, result = reported(F, t, first, Newton(max_steps=50), root)
        assert not result.failed
        assert_same(again, first, 1e-12)


def test_newton_at_the_rounding_floor_has_not_failed() -> None:
    """A tolerance that rounding does not allow: stuck, and as near as can be."""
    scale = 1e6

    def F(x: Tensor, t: Tensor, _: Any) -> Tensor:
        return scale * (x**3 - t)

    for start in (tensor([2.0]), tensor([1.5]) ** (1 / 3) + 1e-12):
        phi, result = reported(F, tensor([1.5]), start, Newton(max_steps=60, tol=1e-300), root)
        assert result.status in (Status.LINE_SEARCH_FAILED, Status.CONVERGED)
        assert_same(phi, tensor([1.5]) ** (1 / 3), 1e-12)


def test_newton_and_a_constraint_that_is_stated_twice() -> None:
    """The system is consistent, and its matrix singular: what is wrong with it is said, and GMRES takes the steps of least length."""
    a, b, centre = tensor([[1.0, 1.0], [2.0, 2.0]]), tensor([1.0, 2.0]), tensor([0.3, 1.0])

    def optimality(z: Any, centre: Tensor, _: Any) -> Any:
        return {"x": z["x"] - centre + a.T @ z["nu"], "nu": a @ z["x"] - b}

    def x(linsys: Any) -> Any:
        init = {"x": torch.zeros(2, dtype=F64), "nu": torch.zeros(2, dtype=F64)}
        solver = Newton(max_steps=20, tol=1e-10, linsys=linsys)
        return root(optimality, centre, solver=solver, linsys=Exact(), init=init, check=True)["x"]

    with pytest.raises(SolverError, match=r"inner solve: SINGULAR after 1 steps.*redundant equations"):
        x(Exact())
    assert_same(x(GMRES(max_steps=9, rtol=1e-12)), tensor([0.15, 0.85]), 1e-9)  # the nearest point of x1 + x2 = 1


def test_newton_at_a_singular_start_says_that_it_is_stuck() -> None:
    phi, result = reported(lambda x, t, _: x**2 - t, tensor([1.0]), tensor([0.0]), Newton(max_steps=9, tol=1e-10), root)
    assert result.status is Status.SINGULAR and result.residual == 1 and phi.isnan().all()
    # and there is no derivative to be had there
    got = grad(lambda t: root(lambda x, t, _: x**2 - t, t, solver=Newton(), linsys=Exact(), init=tensor([0.0])).sum())(
        tensor([1.0])
    )
    assert got.isnan().all()


@pytest.mark.parametrize("solver", [n for n in EQUATION_SOLVER_NAMES if n != "black-box"])
def test_nan_is_reported(solver: str) -> None:
    chosen = equation_solvers(AFFINE, 1e-10)[solver]
    phi, result = reported(lambda x, t, _: torch.log(t) + 0 * x, tensor([-1.0]), tensor([1.0]), chosen)
    assert result.status is Status.NON_FINITE and phi.isnan().all()


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=10), Anderson(max_steps=10, tol=1e-10)])
def test_nan_on_the_way_is_divergence(solver: Any) -> None:
    """log(x) - 1 from 0.5: negative after one step."""
    phi, result = reported(lambda x, t, _: torch.log(x) - t, tensor([1.0]), tensor([0.5]), solver)
    assert result.status is Status.DIVERGED and phi.isnan().all()


def test_anderson_is_gmres_on_a_linear_problem() -> None:
    """After k + 1 steps it has taken a plain step from the k-th iterate of GMRES (Walker and Ni 2011, theorem 2.2)."""
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    generator = torch.Generator().manual_seed(3)
    m, c = 0.25 * torch.randn(6, 6, generator=generator, dtype=F64), torch.randn(6, generator=generator, dtype=F64)
    a = torch.eye(6, dtype=F64) - m
    for k in (1, 2, 4):
        phi, _ = reported(lambda x, c, _: m @ x + c, c, torch.zeros(6, dtype=F64), Anderson(max_steps=k + 1, memory=6))
        x, _ = scipy_linalg.gmres(a.numpy(), c.numpy(), restart=k, maxiter=1, rtol=0.0)
        assert_same(phi, m @ torch.from_numpy(x) + c, 1e-7)


def test_anderson_needs_far_fewer_steps() -> None:
    """Eigenvalues from 0 to 0.99, residual 1e-10: the plain iteration needs ln(1e-10) / ln(0.99) = 2300 steps."""
    m = torch.diag(torch.linspace(0, 0.99, 30, dtype=F64))
    c, zero = torch.ones(30, dtype=F64), torch.zeros(30, dtype=F64)
    _, plain = reported(lambda x, c, _: m @ x + c, c, zero, FixedPointIteration(max_steps=5000, tol=1e-10))
    _, mixed = reported(lambda x, c, _: m @ x + c, c, zero, Anderson(max_steps=5000, tol=1e-10))
    assert plain.status is Status.CONVERGED and 2000 < plain.num_steps < 2600
    assert mixed.status is Status.CONVERGED and mixed.num_steps < 500


@pytest.mark.parametrize("solver", EQUATION_SOLVER_NAMES)
@pytest.mark.parametrize("case", EQUATIONS, **IDS)
def test_what_is_reported_is_measured(case: Equation, solver: str) -> None:
    """The residual is |F| of all leaves at the answer, by the user's own function."""
    reports: list[Result] = []
    chosen = equation_solvers(case, 1e-9)[solver]
    phi = case.solution(case.theta, case.data, solver=chosen, linsys=Exact(), report=reports.append)
    (result,) = reports
    value = vector(case.fn(phi, case.theta, case.data))
    expected = (value - vector(phi) if case.is_map else value).norm()
    torch.testing.assert_close(result.residual, expected, rtol=1e-3, atol=1e-15)
    assert result.status is Status.CONVERGED and result.residual <= 1e-9
    assert_same(vector(result.value), vector(phi), 1e-15)


def test_nan_in_one_entry_of_a_vmap() -> None:
    data = stack([scaled(HYPERBOLIC.data, k) for k in range(3)])
    bad = data.clone()
    bad[1, 0, 0] = torch.nan
    for solver in (NEWTON, Anderson(max_steps=100, tol=1e-11, relaxation=0.5), FixedPointIteration(max_steps=90)):
        chosen = replace(solver, relaxation=0.5) if isinstance(solver, FixedPointIteration) else solver
        for linsys in general_linear_solvers(1e-12).values():

            def phi(data: Tensor, chosen: Any = chosen, linsys: Any = linsys) -> Tensor:
                return ours(HYPERBOLIC, chosen, linsys)(HYPERBOLIC.theta, data)

            healthy, got = vmap(phi)(data), vmap(phi)(bad)
            assert got[1].isnan().all()
            assert torch.equal(got[[0, 2]], healthy[[0, 2]])
            for fn in (grad(lambda d, phi=phi: (phi(d) ** 2).sum()), jacfwd(phi)):
                one, other = vmap(fn)(bad), vmap(fn)(data)
                assert torch.equal(one[[0, 2]], other[[0, 2]])
                assert one[1].isnan().any() and not (one[1] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Singular at the solution: reported, not answered.


def quartic(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    """(theta - phi)^4, whose second derivative at its minimum is zero."""
    return ((theta - phi) ** 4).sum()


QUARTIC = BilevelProblem.from_functions(quartic, lambda phi, theta, data: phi.sum(), lambda theta, data: 0 * theta)
FOUND = BlackBox(lambda problem, theta, data, init: theta.clone())


@pytest.mark.parametrize("size", [1, 3])
def test_a_singular_hessian_of_hypergradient_and_argmin(size: int) -> None:
    theta = torch.ones(size, dtype=F64)
    result = hypergradient(QUARTIC, theta, solver=FOUND, linsys=Exact())
    assert result.inner.status is Status.CONVERGED
    assert result.linear.status is Status.SINGULAR and not result.ok and result.grad.isnan().all()
    with pytest.raises(SolverError, match="SINGULAR .*no unique answer"):
        result.unwrap()
    for linsys in (Exact(), CG(max_steps=9), MINRES(max_steps=9)):
        got = grad(lambda t, linsys=linsys: argmin(QUARTIC, t, solver=FOUND, linsys=linsys).sum())(theta)
        assert got.isnan().all()


@pytest.mark.parametrize("linsys", GENERAL_LINSYS_NAMES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_singular_condition_of_root(size: int, linsys: str) -> None:
    reports: list[Result] = []
    theta = torch.ones(size, dtype=F64, requires_grad=True)
    chosen = general_linear_solvers(1e-10)[linsys]

    def phi(theta: Tensor, **options: Any) -> Tensor:
        return root(
            lambda x, t, _: 4 * (x - t) ** 3, theta, solver=FOUND, linsys=chosen, init=0 * theta.detach(), **options
        )

    phi(theta, report=reports.append).sum().backward()
    assert reports[0].status is Status.CONVERGED and reports[1].failed
    if linsys == "exact":
        assert reports[1].status is Status.SINGULAR
    assert theta.grad.isnan().all()
    assert jacrev(phi)(theta.detach()).diagonal().isnan().all()
    if linsys == "exact":  # forwards the right-hand side is zero, which tells a Krylov method nothing of the matrix
        assert jacfwd(phi)(theta.detach()).diagonal().isnan().all()
    with pytest.raises(SolverError, match="root, linear solve"):
        phi(theta, check=True).sum().backward()


def test_one_singular_entry_of_a_batch() -> None:
    """x^2 = t at t = 0 and at t = 4."""

    def x(t: Tensor) -> Tensor:
        found = BlackBox(lambda fn, theta, data, init: theta.sqrt())
        return root(lambda x, t, _: x**2 - t, t, solver=found, linsys=Exact(), init=tensor(1.0))

    got = vmap(grad(x))(tensor([0.0, 4.0]))
    assert got[0].isnan() and abs(float(got[1]) - 0.25) < 1e-14


# ----------------------------------------------------------------------------------------------------------------------
# check, report.


def test_check_raises_and_names_the_function() -> None:
    ones, zeros = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    reports: list[Result] = []
    with pytest.raises(SolverError, match="fixed_point, inner solve: DIVERGED.*did not fall at all"):
        fixed_point(
            quarter_turn,
            ones,
            solver=FixedPointIteration(max_steps=9),
            linsys=Exact(),
            init=zeros,
            check=True,
            report=reports.append,
        )
    assert [result.status for result in reports] == [Status.DIVERGED]
    with pytest.raises(SolverError, match="root, inner solve: NON_FINITE"):
        root(lambda x, t, _: x / (t - t), ones, solver=NEWTON, linsys=Exact(), init=zeros, check=True)
    assert_same(root(lambda x, t, _: x - t, ones, solver=NEWTON, linsys=Exact(), init=zeros, check=True), ones, 1e-12)


def test_report_is_handed_every_result() -> None:
    reports: list[Result] = []
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), CONSTRAINED.theta)
    phi = ours(CONSTRAINED, linsys=GMRES(max_steps=20, rtol=1e-12), report=reports.append)(theta, CONSTRAINED.data)
    assert len(reports) == 1 and reports[0].num_matvecs >= 1
    value = CONSTRAINED.outer_loss(phi, theta, CONSTRAINED.data)
    first = torch.autograd.grad(value, list(theta.values()), create_graph=True)
    assert len(reports) == 2 and reports[1].status is Status.CONVERGED
    assert list(reports[1].value) == list(CONSTRAINED.init)  # u, a tree like phi
    sum((g**2).sum() for g in first).backward()
    assert len(reports) > 2
    assert all(not leaf.requires_grad for report in reports for leaf in flatten(report.value)[0])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and what is not.


@pytest.mark.parametrize("solve", [root, fixed_point], ids=["root", "fixed_point"])
class TestRefusals:
    ONES = torch.ones(2, dtype=F64)

    def call(self, solve: Any, fn: Any = lambda x, t, _: 0.5 * x - t, theta: Any = ONES, **options: Any) -> Any:
        options = {"solver": NEWTON, "linsys": Exact(), "init": self.ONES, **options}
        return solve(fn, theta, options.pop("data", None), **options)

    @pytest.mark.parametrize("linsys", [CG(max_steps=5), MINRES(max_steps=5), Neumann(num_terms=5), Identity()])
    def test_linear_solvers_that_need_symmetry(self, solve: Any, linsys: Any) -> None:
        words = rf"{solve.__name__}: {type(linsys).__name__}\(.*needs a symmetric matrix.*Use Exact, GMRES or BiCGStab.*use argmin"
        with pytest.raises(ValueError, match=words):
            self.call(solve, linsys=linsys)

    @pytest.mark.parametrize("solver", [GradientDescent(step_size=0.1, max_steps=5), NewtonCG()])
    def test_solvers_that_minimise(self, solve: Any, solver: Any) -> None:
        words = rf"{solve.__name__}: expected a solver of equations such as Newton.*got {type(solver).__name__}.*minimises.*use argmin"
        with pytest.raises(TypeError, match=words):
            self.call(solve, solver=solver)

    def test_classes_in_the_place_of_instances(self, solve: Any) -> None:
        with pytest.raises(TypeError, match=r"solver: expected an inner solver.*Did you mean Newton\(\.\.\.\)"):
            self.call(solve, solver=Newton)
        with pytest.raises(TypeError, match=r"linsys: expected a linear solver.*Did you mean Exact\(\.\.\.\)"):
            self.call(solve, linsys=Exact)

    def test_a_problem_in_the_place_of_a_function(self, solve: Any) -> None:
        for fn in (QUARTIC, 3):
            words = rf"{solve.__name__}: expected a function of \(phi, theta, data\), got {type(fn).__name__}"
            with pytest.raises(TypeError, match=words):
                self.call(solve, fn)

    def test_no_start(self, solve: Any) -> None:
        with pytest.raises(TypeError, match="init"):
            solve(lambda x, t, _: x - t, self.ONES, solver=NEWTON, linsys=Exact())
        with pytest.raises(ValueError, match="init: expected a start, a tree like phi, got None"):
            self.call(solve, init=None)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (
                lambda x, t, _: (x, x),
                r"expected a tree like phi, a tensor, got a tuple with leaves \['\[0\]', '\[1\]'\]",
            ),
            (lambda x, t, _: x.sum(), r"expected torch.float64 \(2,\) like phi, got torch.float64 \(\)"),
            (lambda x, t, _: torch.cat([x, x]), r"expected torch.float64 \(2,\) like phi, got torch.float64 \(4,\)"),
            (lambda x, t, _: x.float(), r"expected torch.float64 \(2,\) like phi, got torch.float32 \(2,\)"),
            (lambda x, t, _: None, r"expected torch.float64 \(2,\) like phi, got NoneType"),
        ],
        ids=["structure", "0-d", "shape", "dtype", "None"],
    )
    def test_an_answer_unlike_phi(self, solve: Any, wrong: Any, words: str) -> None:
        name = "F" if solve is root else "T"
        for transform in (lambda f: f(self.ONES), lambda f: jacrev(f)(self.ONES), lambda f: vmap(f)(self.ONES[None])):
            with pytest.raises(ValueError, match=f"{name}: {words}"):
                transform(lambda theta: self.call(solve, wrong, theta))

    def test_the_leaf_is_named(self, solve: Any) -> None:
        init = {"a": self.ONES, "b": [self.ONES]}
        with pytest.raises(
            ValueError, match=r"\['b'\]\[0\]: expected torch.float64 \(2,\) like phi, got torch.float64 \(1,\)"
        ):
            self.call(solve, lambda x, t, _: {"a": x["a"], "b": [x["b"][0][:1]]}, init=init)
        words = r"expected a tree like phi, a dict with leaves \[\"\['a'\]\", \"\['b'\]\[0\]\"\], got a dict with leaves \[\"\['a'\]\"\]"
        with pytest.raises(ValueError, match=words):
            self.call(solve, lambda x, t, _: {"a": x["a"]}, init=init)
        with pytest.raises(ValueError, match="a list with leaves .*, got a tuple with leaves"):
            self.call(solve, lambda x, t, _: tuple(x), init=[self.ONES, self.ONES])

    def test_what_the_function_raises_reaches_the_caller(self, solve: Any) -> None:
        def fn(x: Tensor, t: Tensor, data: Any) -> Tensor:
            raise KeyError("in the condition")

        for transform in (lambda f: f(self.ONES), lambda f: jacrev(f)(self.ONES)):
            with pytest.raises(KeyError, match="in the condition"):
                transform(lambda theta: self.call(solve, fn, theta))

    @pytest.mark.parametrize("theta_grad", [True, False])
    def test_a_captured_eager_tensor(self, solve: Any, theta_grad: bool) -> None:
        captured = (2 * self.ONES).requires_grad_()
        theta = self.ONES.clone().requires_grad_(theta_grad)
        name = "F" if solve is root else "T"
        with pytest.raises(
            ValueError, match=f"{name} uses a tensor that carries a gradient.*Pass it through theta or data"
        ):
            self.call(solve, lambda x, t, _: 0.5 * x - captured * t, theta)

    @pytest.mark.parametrize("transform", [grad, jacfwd, hessian, lambda f: lambda c: vmap(f)(torch.stack([c, c]))])
    def test_a_captured_tensor_of_a_transform(self, solve: Any, transform: Any) -> None:
        name = "F" if solve is root else "T"
        with pytest.raises(ValueError, match=f"{name} uses a tensor that carries a.*Pass it through theta or data"):
            transform(lambda c: self.call(solve, lambda x, t, _: 0.5 * x - c * t).sum())(self.ONES)

    def test_captured_constants_are_fine(self, solve: Any) -> None:
        captured = 2 * self.ONES
        got = jacrev(lambda t: self.call(solve, lambda x, t, _: 0.5 * x - captured * t, t))(self.ONES)
        factor = 4.0 if solve is root else -4.0
        assert_same(got, factor * torch.eye(2, dtype=F64), 1e-12)

    def test_dual_tensors(self, solve: Any) -> None:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(self.ONES, self.ONES)
            with pytest.raises(NotImplementedError, match="Use torch.func.jvp or jacfwd"):
                self.call(solve, theta=dual)


def test_a_condition_that_does_not_know_phi() -> None:
    ones = torch.ones(2, dtype=F64)
    for solver in (NEWTON, FixedPointIteration(max_steps=5), Anderson(max_steps=5), FOUND):
        with pytest.raises(ValueError, match="F: expected a function of phi, but the graph shows no dependence on it"):
            root(lambda x, t, _: t - 1, ones, solver=solver, linsys=Exact(), init=ones)
    with pytest.raises(ValueError, match="F: expected a function of phi"):
        grad(lambda t: root(lambda x, t, _: x.detach() - t, t, solver=NEWTON, linsys=Exact(), init=ones).sum())(ones)


@pytest.mark.parametrize("linsys", GENERAL_LINSYS_NAMES)
def test_a_condition_that_does_not_know_one_entry_of_phi(linsys: str) -> None:
    """There is no derivative of what is not determined."""
    chosen = general_linear_solvers(1e-10)[linsys]
    found = BlackBox(lambda fn, theta, data, init: torch.stack([theta, 0 * theta]))

    def phi(t: Tensor) -> Tensor:
        return root(
            lambda x, t, _: torch.stack([x[0] - t, x[0] - t]),
            t,
            solver=found,
            linsys=chosen,
            init=torch.zeros(2, dtype=F64),
        )

    assert jacrev(phi)(tensor(1.0))[1].isnan()


@pytest.mark.parametrize("solver", [NEWTON, FixedPointIteration(max_steps=50), Anderson(max_steps=50), FOUND])
def test_a_map_that_does_not_know_phi(solver: Any) -> None:
    """Of x/2 + t the derivative is 2, and 1 where x is detached: which would pass, because the point is right."""
    ones = torch.ones(2, dtype=F64)

    @torch.no_grad()
    def without_a_graph(x: Tensor, t: Tensor, _: Any) -> Tensor:
        return x / 2 + t

    for T in (lambda x, t, _: x.detach() / 2 + t, without_a_graph, lambda x, t, _: t**3):
        with pytest.raises(
            ValueError, match="T: expected a function of phi, but the graph shows no dependence.*no_grad"
        ):
            fixed_point(T, ones, solver=solver, linsys=Exact(), init=ones)
        with pytest.raises(
            ValueError, match="T: expected a function of phi, but the graph shows no dependence.*no_grad"
        ):
            jacrev(lambda t, T=T: fixed_point(T, t, solver=solver, linsys=Exact(), init=ones))(ones)


@pytest.mark.parametrize("solve", [root, fixed_point])
def test_theta_that_is_not_used_has_derivative_zero(solve: Any) -> None:
    """As in argmin: the solution truly does not depend on it."""
    theta = {"a": torch.ones(2, dtype=F64), "b": torch.ones(3, dtype=F64)}

    def f(theta: Any) -> Tensor:
        fn = lambda x, t, _: x**3 / 4 + x / 2 - t["a"]  # noqa: E731
        return (solve(fn, theta, solver=NEWTON, linsys=Exact(), init=torch.zeros(2, dtype=F64)) ** 2).sum()

    for transform in (grad, jacfwd):
        got = transform(f)(theta)
        assert got["b"].tolist() == [0.0] * 3 and (got["a"] != 0).all()
    eager = tree_map(lambda leaf: leaf.clone().requires_grad_(), theta)
    f(eager).backward()
    assert eager["b"].grad is None or eager["b"].grad.tolist() == [0.0] * 3
    assert_same(eager["a"].grad, grad(f)(theta)["a"], 1e-14)


def test_the_black_box_is_handed_the_function() -> None:
    """F of root and T of fixed_point, to be called; with plain tensors."""
    seen: list[Any] = []

    def fn(condition: Any, theta: Tensor, data: Any, init: Tensor) -> Tensor:
        seen.append(torch._C._functorch.is_functorch_wrapped_tensor(theta))
        x = init
        for _ in range(100):
            x = condition(x, theta, data)
        return x

    def x(t: Tensor) -> Tensor:
        return fixed_point(cosine, t, solver=BlackBox(fn, tol=1e-10), linsys=Exact(), init=tensor(0.5))

    assert abs(float(grad(x)(tensor(0.0))) - 0.5975100457) < 1e-9
    reports: list[Result] = []
    by_secant = BlackBox(lambda F, theta, data, init: init - F(init, theta, data))
    root(lambda x, t, _: x - t, tensor(2.0), solver=by_secant, linsys=Exact(), init=tensor(0.0), report=reports.append)
    assert reports[0].status is Status.CONVERGED and float(reports[0].value) == 2
    assert seen == [False] * len(seen) and seen


def test_functions_of_the_wrong_number_of_arguments_are_refused() -> None:
    """By name, before anything is solved."""
    x, options = tensor([1.0]), {"solver": Newton(tol=1e-12), "linsys": Exact(), "init": tensor([0.0])}
    with pytest.raises(TypeError, match=r"F: expected a function of \(phi, theta, data\), got one of \(phi, theta\)"):
        root(lambda phi, theta: phi - theta, x, **options)
    with pytest.raises(TypeError, match=r"T: expected a function of \(phi, theta, data\), got one of \(phi\)"):
        fixed_point(lambda phi: phi, x, **options)
    with pytest.raises(
        TypeError, match=r"fn: expected a function of \(problem, theta, data, init\), got one of \(a, b\)"
    ):
        BlackBox(lambda a, b: a)


def test_a_solver_of_ones_own() -> None:
    """A class with `run` and no more: told from a minimiser by what it says of itself."""

    class Mine:
        def run(self, objective: Any, phi: Tensor) -> Any:
            return Newton(tol=1e-12).run(objective, phi)

    mine = Mine()
    with pytest.raises(TypeError, match="which minimises"):
        root(lambda x, t, _: x - t, tensor([1.0]), solver=mine, linsys=Exact(), init=tensor([0.0]))
    mine.minimises = False
    got = root(lambda x, t, _: x - t, tensor([1.0]), solver=mine, linsys=Exact(), init=tensor([0.0]))
    assert got == 1


def test_solvers_of_equations_find_stationary_points_too() -> None:
    """argmin takes them: they drive dG/dphi to zero. Newton also finds the saddle that no descent would."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi[0] ** 2 - phi[1] ** 2) - phi @ theta,
        lambda phi, theta, data: (phi**3).sum(),
        lambda theta, data: 0 * theta,
    )
    theta = tensor([0.4, 0.7])
    for solver in (NEWTON, Anderson(max_steps=30, tol=1e-11)):
        got = jacrev(lambda t, solver=solver: argmin(problem, t, solver=solver, linsys=Exact()))(theta)
        assert_same(got, torch.diag(tensor([1.0, -1.0])), 1e-12)
    result = hypergradient(problem, theta, solver=NEWTON, linsys=Exact())
    assert result.linear.status is Status.SOLVED_INDEFINITE
    assert_same(result.grad, tensor([3 * 0.4**2, -3 * 0.7**2]), 1e-9)


def test_options_are_checked() -> None:
    for build, words in (
        (lambda: Newton(max_steps=0), "max_steps: expected at least 1, got 0"),
        (lambda: Newton(tol=-1.0), "tol: expected a finite number >= 0"),
        (lambda: Newton(max_backtracks=-1), "max_backtracks: expected at least 0"),
        (
            lambda: Newton(linsys=CG(max_steps=3)),
            r"linsys: expected a linear solver that needs no symmetric matrix \(Exact",
        ),
        (lambda: FixedPointIteration(max_steps=5, relaxation=0.0), "relaxation: expected a finite number > 0"),
        (lambda: FixedPointIteration(max_steps=5, check_every=0), "check_every: expected at least 1"),
        (lambda: Anderson(max_steps=5, memory=0), "memory: expected at least 1, got 0"),
        (lambda: Anderson(max_steps=5, relaxation=-1.0), "relaxation: expected a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
    with pytest.raises(TypeError, match="memory: expected an integer"):
        Anderson(max_steps=5, memory=2.5)


# ----------------------------------------------------------------------------------------------------------------------
# Example: a deep-equilibrium layer.


class Equilibrium(torch.nn.Module):
    """z = tanh(W z + U x + b), as a layer. |W| < 1, so that there is one solution."""

    def __init__(self, solve: Callable[..., Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.W = torch.nn.Parameter(0.35 * torch.randn(4, 4, generator=generator, dtype=F64))
        self.U = torch.nn.Parameter(torch.randn(4, 2, generator=generator, dtype=F64))
        self.b = torch.nn.Parameter(0.1 * torch.randn(4, generator=generator, dtype=F64))
        self.solve = solve

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(
            lambda z, p, x: torch.tanh(z @ p["W"].T + x @ p["U"].T + p["b"]), dict(self.named_parameters()), x
        )


def implicit(solver: Any, linsys: Any) -> Callable[..., Tensor]:
    return lambda T, p, x: fixed_point(T, p, x, solver=solver, linsys=linsys, init=x.new_zeros(*x.shape[:-1], 4))


def implicit_per_example(T: Any, p: Any, x: Tensor) -> Tensor:
    return vmap(implicit(Anderson(max_steps=60, tol=1e-12), Exact()), in_dims=(None, None, 0))(T, p, x)


def by_iteration(T: Any, p: Any, x: Tensor) -> Tensor:
    """Autograd through 400 applications of the map."""
    z = x.new_zeros(*x.shape[:-1], 4)
    for _ in range(400):
        z = T(z, p, x)
    return z


LAYERS = {
    "anderson, gmres": implicit(Anderson(max_steps=100, tol=1e-12), GMRES(max_steps=50, rtol=1e-13)),
    "iteration, bicgstab": implicit(FixedPointIteration(max_steps=600, tol=1e-12), BiCGStab(max_steps=50, rtol=1e-13)),
    "newton, exact": implicit(Newton(tol=1e-12), Exact()),
    "vmap over examples": implicit_per_example,
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(7, 2, generator=generator, dtype=F64)
    return x, torch.sin(2 * x[:, :1]) * x[:, 1:]


@pytest.mark.parametrize("name", LAYERS)
def test_equilibrium_gradients_are_those_of_the_iterated_map(name: str) -> None:
    x, _ = batch()
    weights = torch.cos(torch.arange(28, dtype=F64)).reshape(7, 4)
    results = []
    for solve in (LAYERS[name], by_iteration):
        layer, inputs = Equilibrium(solve), x.clone().requires_grad_()
        (weights * layer(inputs) ** 2).sum().backward()
        results.append([inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    assert_same(*results, 1e-9)


def test_equilibrium_gradients_are_those_of_differences() -> None:
    x, _ = batch()
    layer = Equilibrium(LAYERS["anderson, gmres"])
    loss = (layer(x) ** 3).sum()
    loss.backward()
    for parameter in layer.parameters():
        for i in (0, parameter.numel() - 1):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    values.append((layer(x) ** 3).sum())
                    parameter.view(-1)[i] -= step
            torch.testing.assert_close(parameter.grad.view(-1)[i], (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_equilibrium_layer_inside_a_network_that_is_trained() -> None:
    """The same losses as with the iterated map, step by step."""
    x, y = batch()
    losses = []
    for solve in (LAYERS["anderson, gmres"], by_iteration):
        head = torch.nn.Linear(4, 1, dtype=F64)
        with torch.no_grad():
            head.weight.fill_(0.5), head.bias.zero_()
        network = torch.nn.Sequential(Equilibrium(solve), head)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        history = []
        for _ in range(25):
            loss = (network(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert_same(*losses, 1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# Example: the lasso, as the fixed point of a proximal gradient step.

STEP = 0.3


def lasso_data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x, xv = (torch.randn(n, 8, generator=generator, dtype=F64) for n in (30, 20))
    w = tensor([2.0, -1.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.3])
    noise = torch.randn(50, generator=generator, dtype=F64)
    return {"X": x, "y": x @ w + 0.5 * noise[:30], "Xv": xv, "yv": xv @ w + 0.5 * noise[30:]}


def proximal_gradient(w: Tensor, log_penalty: Tensor, data: Any) -> Tensor:
    """One step for 1/(2 n) |X w - y|^2 + penalty |w|_1: soft thresholding."""
    z = w - STEP * data["X"].T @ (data["X"] @ w - data["y"]) / len(data["y"])
    return z.sign() * (z.abs() - STEP * log_penalty.exp()).relu()


def validation(w: Any, data: Any) -> Any:
    return 0.5 * ((data["Xv"] @ w - data["yv"]) ** 2).mean()


def lasso(log_penalty: Tensor, data: Any, linsys: Any = Exact()) -> Tensor:  # noqa: B008
    solver = Anderson(max_steps=3000, tol=1e-13)
    init = torch.zeros(8, dtype=F64)
    return fixed_point(proximal_gradient, log_penalty, data, solver=solver, linsys=linsys, init=init, check=True)


def on_the_support(w: Tensor, log_penalty: Tensor, data: Any) -> tuple[Tensor, Tensor]:
    """dw/d log_penalty, by the normal equations of the support: X_S^T X_S / n w_S = X_S^T y / n - penalty sign(w_S)."""
    support = w.abs() > 1e-9  # Anderson mixes points: a zero is one to rounding
    xs = data["X"][:, support]
    dw = torch.zeros_like(w)
    dw[support] = -torch.linalg.inv(xs.T @ xs / len(xs)) @ (log_penalty.exp() * w[support].sign())
    return support, dw


def coordinate_descent(penalty: float, data: Any) -> np.ndarray[Any, Any]:
    """The lasso to machine precision, in numpy (Friedman et al. 2010)."""
    x, y = data["X"].numpy(), data["y"].numpy()
    w = np.zeros(x.shape[1])
    scale = (x**2).mean(0)
    for _ in range(400):
        for j in range(len(w)):
            rho = x[:, j] @ (y - x @ w) / len(y) + scale[j] * w[j]
            w[j] = np.sign(rho) * max(abs(rho) - penalty, 0) / scale[j]
    return w


@pytest.mark.parametrize("linsys", GENERAL_LINSYS_NAMES)
def test_the_lasso_hypergradient_on_its_support(linsys: str) -> None:
    data, chosen = lasso_data(), general_linear_solvers(1e-13)[linsys]
    for log_penalty in (tensor(-2.0), tensor(-0.7)):
        w = lasso(log_penalty, data)
        support, dw = on_the_support(w, log_penalty, data)
        assert 2 < int(support.sum()) < 8  # some in, some out
        for jacobian in (jacrev, jacfwd):
            got = jacobian(lambda t: lasso(t, data, chosen))(log_penalty)
            torch.testing.assert_close(got, dw, rtol=1e-9, atol=1e-11)
        leaf = log_penalty.clone().requires_grad_()
        validation(lasso(leaf, data, chosen), data).backward()
        slope = data["Xv"].T @ (data["Xv"] @ w - data["yv"]) / 20
        torch.testing.assert_close(leaf.grad, slope @ dw, rtol=1e-9, atol=1e-11)


def test_the_lasso_against_differences_of_coordinate_descent() -> None:
    data, log_penalty, h = lasso_data(), tensor(-1.0), 1e-5
    w = lasso(log_penalty, data)
    plus, minus, middle = (
        torch.from_numpy(coordinate_descent(float((log_penalty + step).exp()), data)) for step in (h, -h, 0)
    )
    torch.testing.assert_close(w, middle, rtol=0, atol=1e-11)
    assert ((w.abs() < 1e-9) == (middle == 0)).all()
    got = grad(lambda t: validation(lasso(t, data), data))(log_penalty)
    expected = (validation(plus, data) - validation(minus, data)) / (2 * h)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_the_lasso_against_scikit_learn() -> None:
    """Its estimator as the solver, too: the derivative needs the point only."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    data, log_penalty = lasso_data(), tensor(-1.0)

    def fitted(penalty: float) -> Tensor:
        model = linear_model.Lasso(alpha=penalty, fit_intercept=False, tol=1e-14, max_iter=100_000)
        return torch.from_numpy(model.fit(data["X"].numpy(), data["y"].numpy()).coef_)

    estimator = BlackBox(lambda T, theta, data, init: fitted(float(theta.exp())), tol=1e-7)

    def loss(t: Tensor) -> Tensor:
        init = torch.zeros(8, dtype=F64)
        return validation(fixed_point(proximal_gradient, t, data, solver=estimator, linsys=Exact(), init=init), data)

    got, h = grad(loss)(log_penalty), 1e-4
    ahead, behind = (validation(fitted(float((log_penalty + step).exp())), data) for step in (h, -h))
    torch.testing.assert_close(got, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got, grad(lambda t: validation(lasso(t, data), data))(log_penalty), rtol=1e-5, atol=1e-8)


def test_one_lasso_penalty_per_feature_under_vmap() -> None:
    """Different supports in one batch."""
    data = lasso_data()
    penalties = torch.stack([torch.full((8,), level, dtype=F64) for level in (-2.5, -1.0, 0.0)])
    jacobians = vmap(jacrev(lambda t: lasso(t, data)))(penalties)
    supports = set()
    for penalty, jacobian in zip(penalties, jacobians, strict=True):
        w = lasso(penalty, data)
        support = w.abs() > 1e-9  # Anderson mixes points: a zero is one to rounding
        supports.add(tuple(support.tolist()))
        xs = data["X"][:, support]
        expected = torch.zeros(8, 8, dtype=F64)
        inverse = torch.linalg.inv(xs.T @ xs / 30)
        expected[support.outer(support)] = -(inverse * (penalty.exp() * w.sign())[support]).reshape(-1)
        torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-11)
    assert len(supports) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Example: a box constraint, as the fixed point of a projected gradient step.

BOX_Q = tensor([[3.0, 1.0, 0.5, 0.0], [1.0, 4.0, 0.0, 1.0], [0.5, 0.0, 2.0, 0.3], [0.0, 1.0, 0.3, 3.0]])


def projected_gradient(x: Tensor, theta: Any, data: Any) -> Tensor:
    """For min 1/2 x^T Q x - c^T x with low <= x <= high."""
    return torch.minimum(torch.maximum(x - 0.2 * (BOX_Q @ x - theta["c"]), theta["low"]), theta["high"])


def boxed(theta: Any) -> Tensor:
    solver = Anderson(max_steps=500, tol=1e-13)
    init = torch.zeros(4, dtype=F64)
    return fixed_point(projected_gradient, theta, solver=solver, linsys=Exact(), init=init, check=True)


BOX = {"c": tensor([4.0, 1.0, -3.0, 2.0]), "low": torch.full((4,), -1.0, dtype=F64), "high": torch.ones(4, dtype=F64)}


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_the_derivative_of_a_box_constrained_minimum(jacobian: Any) -> None:
    """Zero at active bounds but for the bound itself; the free entries solve the reduced system."""
    x = boxed(BOX)
    at_high, at_low = (x - 1).abs() < 1e-9, (x + 1).abs() < 1e-9
    free = ~(at_high | at_low)
    assert at_high.sum() == 1 and at_low.sum() == 1 and free.sum() == 2
    got = jacobian(boxed)(BOX)
    inverse = torch.linalg.inv(BOX_Q[free][:, free])
    expected = {key: torch.zeros(4, 4, dtype=F64) for key in BOX}
    expected["c"][free.outer(free)] = inverse.reshape(-1)
    for key, active in (("high", at_high), ("low", at_low)):
        expected[key][active.outer(active)] = 1.0
        expected[key][free.outer(active)] = (-inverse @ BOX_Q[free][:, active]).reshape(-1)
    for key, matrix in expected.items():
        torch.testing.assert_close(got[key], matrix, rtol=1e-9, atol=1e-12)
    assert (got["c"][~free] == 0).all()


def test_the_box_constrained_minimum_is_that_of_scipy() -> None:
    """And its derivatives are the differences of SciPy's bounded least squares: Q = L L^T, |L^T x - L^{-1} c|^2."""
    optimize = pytest.importorskip("scipy.optimize")
    factor = torch.linalg.cholesky(BOX_Q)

    def by_scipy(c: Tensor) -> Tensor:
        b = torch.linalg.inv(factor) @ c
        bounds = (BOX["low"].numpy(), BOX["high"].numpy())
        return torch.from_numpy(optimize.lsq_linear(factor.T.numpy(), b.numpy(), bounds, method="bvls", tol=1e-15).x)

    torch.testing.assert_close(boxed(BOX), by_scipy(BOX["c"]), rtol=0, atol=1e-10)
    got = jacrev(lambda c: boxed({**BOX, "c": c}))(BOX["c"])
    for j, step in enumerate(1e-5 * torch.eye(4, dtype=F64)):
        difference = (by_scipy(BOX["c"] + step) - by_scipy(BOX["c"] - step)) / 2e-5
        torch.testing.assert_close(got[:, j], difference, rtol=1e-6, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is kept.


@pytest.mark.parametrize("transform", ["backward", "double backward", "hessian", "vmap(grad)"])
def test_calls_leave_nothing_behind(transform: str) -> None:
    """With the collector off, so that not even a reference cycle is made."""

    def f(theta: Tensor) -> Tensor:
        return (ours(HYPERBOLIC, Newton(max_steps=3))(theta, HYPERBOLIC.data) ** 2).sum()

    def call() -> None:
        if transform == "hessian":
            hessian(f)(HYPERBOLIC.theta)
            return
        if transform == "vmap(grad)":
            vmap(grad(f))(torch.stack([HYPERBOLIC.theta, 2 * HYPERBOLIC.theta]))
            return
        theta = HYPERBOLIC.theta.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(theta), theta, create_graph=transform == "double backward")
        if transform == "double backward":
            torch.autograd.grad((first**2).sum(), theta)

    def live() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    for _ in range(3):
        call()
    gc.collect()
    gc.disable()
    try:
        before = live()
        for _ in range(50):
            call()
        after = live()
    finally:
        gc.enable()
    assert after <= before


@pytest.mark.parametrize(
    "solver", [FixedPointIteration(max_steps=50, tol=1e-6), Anderson(max_steps=50, tol=1e-6)], ids=["plain", "anderson"]
)
def test_a_start_that_is_good_enough_has_converged(solver: Any) -> None:
    """x = x / 2 + t, x* = 2 t, from 1e-7 beside it: nothing becomes smaller because no step is taken."""
    reports: list[Any] = []
    t = torch.tensor(1.0, dtype=torch.float64)
    x = fixed_point(
        lambda x, t, data: 0.5 * x + t, t, solver=solver, linsys=Exact(), init=2 * t + 1e-7, report=reports.append
    )
    assert reports[0].status is Status.CONVERGED and reports[0].num_steps == 0
    assert x.item() == pytest.approx(2.0, abs=2e-7)


def test_a_black_box_may_solve_its_equation_with_another_call() -> None:
    """It is handed F as the user wrote it, or as good as that."""

    def inner(fn: Any, theta: Tensor, data: Any, init: Tensor) -> Tensor:
        return root(fn, theta, data, solver=Newton(max_steps=20), linsys=Exact(), init=init)

    theta = tensor([2.0, 3.0])
    got = root(lambda x, t, _: x**3 - t, theta, solver=BlackBox(inner), linsys=Exact(), init=torch.ones_like(theta))
    torch.testing.assert_close(got, theta ** (1 / 3))


@pytest.mark.parametrize("solve", [root, fixed_point])
def test_a_mask_that_was_drawn_anew_before_the_derivative_is_refused(solve: Any) -> None:
    """Two forward passes of a layer with a mask of its own, one backward pass: the first would get the mask of the second."""
    mask = {"now": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)}
    theta = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64, requires_grad=True)

    def function(z: Any, t: Any, data: Any) -> Any:
        moved = torch.tanh(0.5 * z * mask["now"] + t)
        return moved if solve is fixed_point else z - moved

    def layer() -> Any:
        return solve(
            function, theta, solver=Newton(max_steps=30, tol=1e-10), linsys=Exact(), init=torch.zeros_like(theta)
        )

    first = layer()
    (expected,) = torch.autograd.grad(first.sum(), theta, retain_graph=True)
    mask["now"] = 1 - mask["now"]
    second = layer()
    name, source = ("fixed_point", "T") if solve is fixed_point else ("root", "F")
    with pytest.raises(ValueError, match=f"^{name}: {source} is not what was solved: its condition at the solution is"):
        (first + second).sum().backward()
    z = first.detach()
    slope = 1 - z.square()  # of tanh; the condition is a system of three equations on their own
    kept = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(expected, slope / (1 - 0.5 * kept * slope))


SHIFTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, t: x + 0.3 + 0 * t,
    lambda x, t: x.flip(-1) + x.new_tensor([1.0, 0.5]) + 0 * t,
    lambda x, t: x + 1 + x.sin() / 2 + 0 * t,
]


@pytest.mark.parametrize("shift", SHIFTS, ids=["shift", "reflection", "sine"])
def test_anderson_finds_no_fixed_point_in_the_rounding_of_a_large_one(shift: Any) -> None:
    """There is none; but x + 1 is x where x is large enough."""
    told: list[Any] = []
    size = 2 if shift(torch.zeros(2), torch.zeros(1)).std() > 0 else 1
    fixed_point(
        lambda x, t, d: shift(x, t),
        torch.zeros(1, dtype=F64),
        solver=Anderson(max_steps=60, tol=1e-9),
        linsys=Exact(),
        init=torch.zeros(size, dtype=F64),
        report=told.append,
    )
    assert told[0].failed or (told[0].status is Status.MAX_STEPS and told[0].residual > 0.1), told[0].describe()


def test_anderson_goes_far_where_the_fixed_point_is_far() -> None:
    for far in (1e8, 1e12):
        told: list[Any] = []
        found = fixed_point(
            lambda x, t, d, far=far: (1 - 1 / far) * x + t,
            torch.ones(1, dtype=F64),
            solver=Anderson(max_steps=50, tol=1e-9 + 4e-16 * far),
            linsys=Exact(),
            init=torch.zeros(1, dtype=F64),
            report=told.append,
        )
        assert told[0].status is Status.CONVERGED, told[0].describe()
        torch.testing.assert_close(found, torch.full((1,), far, dtype=F64), rtol=1e-1, atol=0)


@pytest.mark.parametrize(
    "solver", [FixedPointIteration(max_steps=200, tol=1e15), Anderson(max_steps=50, tol=1e15)], ids=repr
)
def test_maps_whose_square_is_too_large_to_be_a_number(solver: Any) -> None:
    told: list[Any] = []
    found = fixed_point(
        lambda x, t, d: 0.5 * x + t,
        torch.full((2,), 1e20),
        solver=solver,
        linsys=Exact(),
        init=torch.zeros(2),
        report=told.append,
    )
    assert told[0].status is Status.CONVERGED, told[0].describe()
    torch.testing.assert_close(found, torch.full((2,), 2e20), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("solver", [Newton(max_steps=30, tol=1e-6), Newton(max_steps=30)], ids=["tol", "all steps"])
def test_equations_in_units_of_their_own(solver: Any, dtype: torch.dtype) -> None:
    """A residual without units of variables that are large: their rounding is not that of the residual."""
    pressure = torch.tensor([1e7, 2e7], dtype=dtype)
    found = root(lambda x, t, d: x / t - 1, pressure, init=torch.zeros(2, dtype=dtype), solver=solver, linsys=Exact())
    torch.testing.assert_close(found, pressure)


@pytest.mark.parametrize(
    "solver", [Newton(max_steps=5, tol=1e-6), Anderson(max_steps=5), FixedPointIteration(max_steps=5)], ids=repr
)
def test_a_map_that_writes_to_phi(solver: Any) -> None:
    def clamped(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        with torch.no_grad():
            phi.clamp_(max=0.5)
        return 0.5 * phi + 0.5 * theta

    with pytest.raises(ValueError, match=r"fixed_point: T.* writes to phi in place|T writes to phi in place"):
        fixed_point(clamped, torch.ones(3), init=torch.ones(3), solver=solver, linsys=Exact())


@pytest.mark.parametrize(
    "F",
    [
        lambda x, t, b: torch.atan(5 * (x - b)) + 0 * t,
        lambda x, t, b: (
            torch.stack([x[0] ** 2 + x[1] - 11 - b[0], x[0] + x[1] ** 2 - 7 - b[1], torch.atan(x[2] * x[0] - b[2])])
            + 0 * t
        ),
    ],
    ids=["bounded", "coupled"],
)
def test_newton_does_not_run_into_where_f_is_flat(F: Any) -> None:
    """Of 60 starts, some a long way off. With the usual sufficient decrease of 1e-4 it reached 21 and 33 of the roots, and said
    SINGULAR of most of the others.
    """
    reached = 0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        b, start = (torch.randn(3, generator=g, dtype=torch.float64) for _ in range(2))
        solver = Newton(max_steps=100, tol=1e-10)
        reports: list[Any] = []
        x = root(
            F, tensor([0.0])[0], b, solver=solver, linsys=Exact(), init=2 * start, report=reports.append, check=False
        )
        if reports[0].status is Status.CONVERGED:
            reached += 1
            assert F(x, 0.0, b).norm() <= 1e-10
    assert reached >= 54


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_newton_with_a_truncated_linear_solve(steps: int) -> None:
    """A step promises only what its linear solve has solved: with a residual of more than half of |F| no length could lower |F| by half
    of all.
    """
    g = torch.Generator().manual_seed(0)
    n = 60
    A = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5 + torch.eye(n, dtype=torch.float64)
    b = torch.randn(n, generator=g, dtype=torch.float64)
    solver = Newton(max_steps=400, tol=1e-9, linsys=GMRES(max_steps=steps))
    x, result = reported(
        lambda x, t, _: A @ x + 0.1 * x**3 - b + 0 * t.sum(),
        tensor([0.0]),
        torch.zeros(n, dtype=torch.float64),
        solver,
        root,
    )
    assert result.status is Status.CONVERGED and (A @ x + 0.1 * x**3 - b).norm() <= 1e-9
