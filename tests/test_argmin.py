"""argmin: phi* as a differentiable function, under every transform against the same transform of the closed form."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import bilevel
from bilevel import BilevelProblem, Result, SolverError, Status, argmin, hypergradient, solve
from bilevel.linsys import CG, GMRES, Exact, Identity, Neumann
from bilevel.solvers import BlackBox, GradientDescent, NesterovAGD, NewtonCG
from bilevel.trees import flatten, tree_map, unflatten
from tests.cases import LINSYS_NAMES, PROBLEMS, SOLVER_NAMES, Case, inner_solvers, linear_solvers

F32, F64 = torch.float32, torch.float64
NEWTON = NewtonCG(max_steps=30, cg_steps=20, tol=1e-11)
LINSYS = {"cg": CG(max_steps=60, rtol=1e-13), "exact": Exact()}
RIDGE, COUPLED, PROXIMAL, EXPONENTIAL = PROBLEMS[:4]
IDS = {"ids": lambda case: case.name}


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def vector(tree: Any) -> Tensor:
    """All leaves in one vector, in ravel order."""
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def with_floating(data: Any, floats: Any) -> Any:
    """data with these tensors in the places of its floating ones."""
    leaves, structure = flatten(data)
    rest = iter(floats)
    return unflatten(structure, [next(rest) if is_floating(leaf) else leaf for leaf in leaves])


def stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *trees)


def scaled(tree: Any, k: int) -> Any:
    return tree_map(lambda leaf: leaf * (1 + 0.07 * k), tree)


def assert_same(got: Any, expected: Any, relative: float = 1e-8) -> None:
    """Leaf by leaf, relative to the largest entry of all."""
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected)
    size = max(float(leaf.abs().max()) for leaf in expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=relative * size)


# ----------------------------------------------------------------------------------------------------------------------
# The matrix of transforms.


@dataclass(frozen=True)
class Subject:
    """One function to transform, ours or the closed form, and where.

    ``f``: x -> F, 0-d. ``p``: x -> sin(phi*), a vector with second derivatives where phi* is linear in x. ``x``: a tree,
    theta or the floating data; ``xs``: three of them with a leading axis; ``xss``: with two. ``v``: a tangent like x.
    ``w``: a cotangent like phi.
    """

    f: Callable[[Any], Tensor]
    p: Callable[[Any], Tensor]
    x: Any
    xs: Any
    xss: Any
    v: Any
    w: Tensor


TRANSFORMS: dict[str, Callable[[Subject], Any]] = {
    "value": lambda s: s.p(s.x),
    "grad": lambda s: grad(s.f)(s.x),
    "vjp": lambda s: vjp(s.p, s.x)[1](s.w),
    "jvp": lambda s: jvp(s.p, (s.x,), (s.v,)),
    "jacrev": lambda s: jacrev(s.p)(s.x),
    "jacfwd": lambda s: jacfwd(s.p)(s.x),
    "hessian": lambda s: hessian(s.f)(s.x),
    "jacrev(grad)": lambda s: jacrev(grad(s.f))(s.x),
    "jacrev(jacrev)": lambda s: jacrev(jacrev(s.p))(s.x),
    "jacrev(jacfwd)": lambda s: jacrev(jacfwd(s.p))(s.x),
    "jacfwd(jacrev)": lambda s: jacfwd(jacrev(s.p))(s.x),
    "jvp(grad)": lambda s: jvp(grad(s.f), (s.x,), (s.v,)),
    "vjp(grad)": lambda s: vjp(grad(s.f), s.x)[1](s.v),
    "grad(jvp)": lambda s: grad(lambda x: jvp(s.f, (x,), (s.v,))[1])(s.x),
    "vmap": lambda s: vmap(s.p)(s.xs),
    "vmap(grad)": lambda s: vmap(grad(s.f))(s.xs),
    "vmap(jacrev)": lambda s: vmap(jacrev(s.p))(s.xs),
    "vmap(jacfwd)": lambda s: vmap(jacfwd(s.p))(s.xs),
    "vmap(hessian)": lambda s: vmap(hessian(s.f))(s.xs),
    "vmap(jvp), one point": lambda s: vmap(lambda v: jvp(s.p, (s.x,), (v,))[1])(s.xs),
    "vmap(vmap)": lambda s: vmap(vmap(s.p))(s.xss),
    "vmap(vmap(grad))": lambda s: vmap(vmap(grad(s.f)))(s.xss),
    "vmap(vmap(jacfwd))": lambda s: vmap(vmap(jacfwd(s.p)))(s.xss),
    "grad(vmap)": lambda s: grad(lambda xs: vmap(s.f)(xs).sum())(s.xs),
    "jacrev(vmap)": lambda s: jacrev(vmap(s.p))(s.xs),
    "jacfwd(vmap)": lambda s: jacfwd(vmap(s.p))(s.xs),
    "hessian(vmap)": lambda s: hessian(lambda xs: (vmap(s.f)(xs) ** 2).sum())(s.xs),
    "grad(vmap(grad))": lambda s: grad(lambda xs: sum((leaf**3).sum() for leaf in tree_leaves(vmap(grad(s.f))(xs))))(
        s.xs
    ),
}


def subject(case: Case, wrt: str, solution: Callable[[Any, Any], Any]) -> Subject:
    if wrt == "theta":
        x, arguments = case.theta, lambda x: (x, case.data)
    else:
        x, arguments = (
            tuple(filter(is_floating, flatten(case.data)[0])),
            lambda x: (case.theta, with_floating(case.data, x)),
        )

    def f(x: Any) -> Tensor:
        theta, data = arguments(x)
        return case.problem.outer_loss(solution(theta, data), theta, data)

    xs = stack([scaled(x, k) for k in range(3)])
    xss = stack([stack([scaled(x, 2 * i + j) for j in range(2)]) for i in range(2)])
    v = tree_map(lambda leaf: torch.cos(3 * leaf + 1), x)
    w = torch.cos(torch.arange(1.0, 1 + len(vector(case.phi_star(case.theta, case.data))), dtype=F64))
    return Subject(f, lambda x: torch.sin(vector(solution(*arguments(x)))), x, xs, xss, v, w)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wrt", ["theta", "data"])
@pytest.mark.parametrize("linsys", LINSYS)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_every_transform_is_that_of_the_closed_form(case: Case, linsys: str, wrt: str, transform: str) -> None:
    ours = subject(
        case, wrt, lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=LINSYS[linsys])
    )
    theirs = subject(case, wrt, case.phi_star)
    expected = TRANSFORMS[transform](theirs)
    assert max(float(leaf.abs().max()) for leaf in tree_leaves(expected)) > 1e-3
    assert_same(TRANSFORMS[transform](ours), expected)


def check_linear_solver(case: Case, name: str, transform: str) -> None:
    linsys = linear_solvers(1e-12)[name]
    ours = subject(case, "theta", lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=linsys))
    assert_same(TRANSFORMS[transform](ours), TRANSFORMS[transform](subject(case, "theta", case.phi_star)))


# A full product of problems, linear solvers and transforms would take minutes. Each solver meets every transform once:


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("linsys", [name for name in LINSYS_NAMES if name not in LINSYS])
def test_every_linear_solver_under_every_transform(linsys: str, transform: str) -> None:
    check_linear_solver(RIDGE, linsys, transform)


# and every problem:


@pytest.mark.parametrize("linsys", [name for name in LINSYS_NAMES if name not in LINSYS])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_every_linear_solver_on_every_problem(case: Case, linsys: str) -> None:
    check_linear_solver(case, linsys, "hessian")


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap(grad)", "hessian(vmap)", "vmap(jacfwd)"])
@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_the_inner_solver_does_not_matter(solver: str, transform: str) -> None:
    """A black box as well: it is called outside every transform."""
    case = EXPONENTIAL
    plain = BlackBox(lambda problem, theta, data, init: torch.log(data @ theta))
    chosen = plain if solver == "black-box" else inner_solvers(case, 1e-10)[solver]
    ours = subject(case, "theta", lambda theta, data: argmin(case.problem, theta, data, solver=chosen, linsys=Exact()))
    assert_same(TRANSFORMS[transform](ours), TRANSFORMS[transform](subject(case, "theta", case.phi_star)))


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap(hessian)"])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_float32(case: Case, transform: str) -> None:
    """|dG/dphi| <= 1e-4 and rounding times a condition number of at most 60, squared for second derivatives."""
    single = case.to(F32)
    solver = NewtonCG(max_steps=30, cg_steps=20, tol=1e-4)
    ours = subject(
        single,
        "theta",
        lambda theta, data: argmin(single.problem, theta, data, solver=solver, linsys=CG(max_steps=60, rtol=1e-6)),
    )
    got = TRANSFORMS[transform](ours)
    assert {leaf.dtype for leaf in tree_leaves(got)} == {F32}
    assert_same(got, TRANSFORMS[transform](subject(single.to(F64), "theta", case.phi_star)), 1e-3)


@pytest.mark.parametrize("linsys", [CG(max_steps=60, rtol=1e-12), Neumann(num_terms=3000, rtol=1e-12), Exact()])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_mixed_second_derivatives(case: Case, linsys: Any) -> None:
    floats = tuple(filter(is_floating, flatten(case.data)[0]))

    def outer(solution: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
        def f(theta: Any, floats: Any) -> Tensor:
            data = with_floating(case.data, floats)
            return case.problem.outer_loss(solution(theta, data), theta, data)

        return f

    ours = outer(lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=linsys))
    theirs = outer(case.phi_star)
    for mixed in (
        lambda f: jacrev(grad(f), argnums=1)(case.theta, floats),
        lambda f: jacfwd(grad(f), argnums=1)(case.theta, floats),
        lambda f: jacrev(jacfwd(f, argnums=1), argnums=0)(case.theta, floats),
        lambda f: hessian(f, argnums=(0, 1))(case.theta, floats),
    ):
        assert_same(mixed(ours), mixed(theirs))
        if isinstance(linsys, Neumann):
            break


def third_derivatives(f: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "rrr": jacrev(jacrev(jacrev(f))),
        "rrf": jacrev(jacrev(jacfwd(f))),
        "rfr": jacrev(jacfwd(jacrev(f))),
        "frr": jacfwd(jacrev(jacrev(f))),
        "frf": jacfwd(jacrev(jacfwd(f))),
        "ffr": jacfwd(jacfwd(jacrev(f))),
        "rff": jacrev(jacfwd(jacfwd(f))),
        "fff": jacfwd(jacfwd(jacfwd(f))),
    }


@pytest.mark.parametrize("order", list(third_derivatives(torch.sin)))
@pytest.mark.parametrize("case", [RIDGE, EXPONENTIAL], **IDS)
def test_third_derivatives_are_right_or_raise(case: Case, order: str) -> None:
    ours = subject(case, "theta", lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=Exact()))
    expected = jacrev(jacrev(jacrev(subject(case, "theta", case.phi_star).f)))(case.theta)
    if order.count("f") >= 2:  # two forward modes carry a tangent of x
        with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
            third_derivatives(ours.f)[order](case.theta)
    else:
        assert_same(third_derivatives(ours.f)[order](case.theta), expected, 1e-7)


def test_the_older_vmap_of_torch_autograd_raises_with_advice() -> None:
    """Before: "Batching rule not implemented for aten::detach"."""
    s = subject(RIDGE, "theta", lambda theta, data: argmin(RIDGE.problem, theta, data, solver=NEWTON, linsys=Exact()))
    plain = torch.autograd.functional.jacobian(s.f, s.x)
    assert_same(plain, jacrev(s.f)(s.x))
    advice = r"^torch.autograd.functional with vectorize=True, and .* are not supported. Use torch.func.jacrev"
    for batched in (
        lambda: torch.autograd.functional.jacobian(s.f, s.x, vectorize=True),
        lambda: torch.autograd.functional.hessian(lambda x: s.f(x).sum(), s.x, vectorize=True),
    ):
        with pytest.raises(NotImplementedError, match=advice):
            batched()


@pytest.mark.parametrize("wrt", ["theta", "data"])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_forward_over_forward_raises_with_advice(case: Case, wrt: str) -> None:
    """PyTorch would give exactly 0."""
    s = subject(case, wrt, lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=Exact()))
    advice = (
        r"forward mode over forward mode \(jacfwd of jacfwd, jvp of jvp\) .*torch.func.hessian.*jacrev\(jacrev\(f\)\)"
    )
    for nested in (
        lambda: jacfwd(jacfwd(s.f))(s.x),
        lambda: jacfwd(jacfwd(s.p))(s.x),
        lambda: jvp(lambda x: jvp(s.f, (x,), (s.v,))[1], (s.x,), (s.v,)),
        lambda: vmap(jacfwd(jacfwd(s.f)))(s.xs),
        lambda: jacfwd(jacfwd(vmap(s.f)))(s.xs),
    ):
        with pytest.raises(NotImplementedError, match=advice):
            nested()


def test_forward_over_forward_in_two_different_arguments_raises_too() -> None:
    def f(theta: Tensor, data: Tensor) -> Tensor:
        return argmin(EXPONENTIAL.problem, theta, data, solver=NEWTON, linsys=Exact()).sum()

    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(lambda data: jacfwd(f)(EXPONENTIAL.theta, data))(EXPONENTIAL.data)


def test_forward_mode_over_forward_mode_of_something_else_is_right_or_raises() -> None:
    """The outer tangent never meets argmin: d/ds of s^2 d/dt phi*(t)."""
    ones = torch.ones(3, dtype=F64)

    def slope(solution: Callable[[Tensor], Tensor]) -> Tensor:
        return jvp(solution, (EXPONENTIAL.theta,), (ones,))[1]

    def ours(theta: Tensor) -> Tensor:
        return argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=NEWTON, linsys=Exact())

    expected = slope(lambda theta: EXPONENTIAL.phi_star(theta, EXPONENTIAL.data))
    two = torch.tensor(2.0, dtype=F64)
    try:
        got = jvp(lambda s: s**2 * slope(ours), (two,), (torch.ones((), dtype=F64),))
    except NotImplementedError:
        got = (4 * slope(ours), 4 * slope(ours))  # what the advice of the message comes to
    assert_same(got, (4 * expected, 4 * expected))


# ----------------------------------------------------------------------------------------------------------------------
# vmap over one, the other, or both.


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=["theta", "data", "both"])
@pytest.mark.parametrize("inner", ["value", "grad", "hessian", "jacfwd"])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_vmap_over_theta_or_data_or_both(case: Case, inner: str, in_dims: tuple[int | None, int | None]) -> None:
    """Class labels are int64 tensors of the batch, different in every task."""
    leaves, structure = flatten(case.data)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def rebuilt(tensors: Any) -> Any:
        rest = iter(tensors)
        return unflatten(structure, [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    thetas = stack([scaled(case.theta, k) for k in range(3)]) if in_dims[0] == 0 else case.theta
    datas = tensors
    if in_dims[1] == 0:
        rolled = [
            [leaf.roll(k) if not leaf.is_floating_point() else leaf * (1 + 0.07 * k) for leaf in tensors]
            for k in range(3)
        ]
        datas = tuple(map(torch.stack, zip(*rolled, strict=True)))

    def outer(solution: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
        def f(theta: Any, tensors: Any) -> Tensor:
            data = rebuilt(tensors)
            return case.problem.outer_loss(solution(theta, data), theta, data)

        return f

    ours = outer(
        lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=CG(max_steps=60, rtol=1e-13))
    )
    wrap = {"value": lambda f: f, "grad": grad, "hessian": hessian, "jacfwd": jacfwd}[inner]
    assert_same(vmap(wrap(ours), in_dims)(thetas, datas), vmap(wrap(outer(case.phi_star)), in_dims)(thetas, datas))


def test_vmap_over_inner_axes_and_different_axes() -> None:
    case = EXPONENTIAL

    def ours(theta: Tensor, data: Tensor) -> Tensor:
        return argmin(case.problem, theta, data, solver=NEWTON, linsys=Exact())

    thetas = stack([scaled(case.theta, k) for k in range(5)]).T  # (3, 5): the axis last
    datas = stack([scaled(case.data, k) for k in range(5)]).movedim(0, 1)  # (4, 5, 3): the axis in the middle
    for fn in (lambda f: f, jacrev, jacfwd):
        got = vmap(fn(ours), in_dims=(1, 1), out_dims=1)(thetas, datas)
        assert_same(got, vmap(fn(case.phi_star), in_dims=(1, 1), out_dims=1)(thetas, datas))
    # an outer product: theta along one axis, data along the other, both axes of the result
    thetas, datas = thetas.T[:2], datas.movedim(1, 0)
    for fn in (lambda f: f, grad):
        one = fn(ours) if fn is not grad else grad(lambda t, d: (ours(t, d) ** 3).sum())
        other = fn(case.phi_star) if fn is not grad else grad(lambda t, d: (case.phi_star(t, d) ** 3).sum())
        got = vmap(vmap(one, (None, 0)), (0, None))(thetas, datas)
        assert_same(got, vmap(vmap(other, (None, 0)), (0, None))(thetas, datas))


def test_vmap_in_chunks() -> None:
    def f(theta: Tensor) -> Tensor:
        return (argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=NEWTON, linsys=Exact()) ** 2).sum()

    thetas = stack([scaled(EXPONENTIAL.theta, k) for k in range(5)])
    assert_same(vmap(grad(f), chunk_size=2)(thetas), vmap(grad(f))(thetas), 1e-13)


def test_every_task_of_a_vmap_stops_on_its_own() -> None:
    """With steps counted: the batch takes as many as its slowest task, and every task is solved to tol."""
    curvature = torch.tensor([1.0, 0.05, 0.5], dtype=F64)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * data * ((phi - theta) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0 * theta,
    )
    theta = normal(3, 2)
    got = vmap(
        lambda c: argmin(
            problem, theta, c, solver=GradientDescent(step_size=1.0, max_steps=2000, tol=1e-12), linsys=Exact()
        )
    )(curvature)
    torch.testing.assert_close(got, theta.expand(3, 2), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# The start.


@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_a_start_that_is_the_solution_already(case: Case) -> None:
    """A Function that returned its input would raise."""
    init = case.phi_star(case.theta, case.data)
    for solver in (
        NewtonCG(max_steps=5, tol=1e-9),
        GradientDescent(step_size=0.1 / case.lipschitz, max_steps=5, tol=1e-9),
    ):

        def f(theta: Any, solver: Any = solver) -> Tensor:
            phi = argmin(case.problem, theta, case.data, solver=solver, linsys=Exact(), init=init)
            return case.problem.outer_loss(phi, theta, case.data)

        for fn in (grad, hessian):
            assert_same(fn(f)(case.theta), fn(lambda theta: case.outer(theta, case.data))(case.theta), 1e-7)
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), case.theta)
    phi = argmin(case.problem, theta, case.data, solver=NewtonCG(max_steps=5, tol=1e-9), linsys=Exact(), init=init)
    grads = torch.autograd.grad(case.problem.outer_loss(phi, theta, case.data), flatten(theta)[0])
    assert_same(list(grads), flatten(grad(case.outer)(case.theta, case.data))[0], 1e-7)
    for leaf, start in zip(flatten(phi)[0], flatten(init)[0], strict=True):
        assert leaf.data_ptr() != start.data_ptr()


def test_the_derivative_with_respect_to_the_start_is_zero() -> None:
    """Implicit differentiation knows no path. In iMAML the dependence is the proximal centre."""

    def f(init: Tensor) -> Tensor:
        return argmin(
            EXPONENTIAL.problem, EXPONENTIAL.theta, EXPONENTIAL.data, solver=NEWTON, linsys=Exact(), init=init
        ).sum()

    init = normal(4, 4)
    assert grad(f)(init).tolist() == [0.0] * 4
    assert jacfwd(f)(init).tolist() == [0.0] * 4
    leaf = init.clone().requires_grad_()
    assert not f(leaf).requires_grad or torch.autograd.grad(f(leaf), leaf, allow_unused=True)[0] is None


def test_vmap_over_starts() -> None:
    starts = normal(5, 3, 4)
    case = EXPONENTIAL

    def f(theta: Tensor, init: Tensor) -> Tensor:
        return argmin(case.problem, theta, case.data, solver=NEWTON, linsys=Exact(), init=init)

    assert_same(vmap(f, (None, 0))(case.theta, starts), case.phi_star(case.theta, case.data).expand(3, 4), 1e-9)
    got = vmap(jacrev(f), (None, 0))(case.theta, starts)
    assert_same(got, jacrev(case.phi_star)(case.theta, case.data).expand(3, 4, 3), 1e-9)


@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_the_gradient_of_the_path_does_not_enter(case: Case) -> None:
    """At a point that is not solved: grad of argmin is implicit_gradient there, not the unrolled derivative."""
    solver = GradientDescent(step_size=1 / case.lipschitz, max_steps=4)

    def f(theta: Any) -> Tensor:
        return case.problem.outer_loss(
            argmin(case.problem, theta, case.data, solver=solver, linsys=Exact()), theta, case.data
        )

    expected = hypergradient(case.problem, case.theta, case.data, solver=solver, linsys=Exact())
    assert_same(vector(grad(f)(case.theta)), vector(expected.grad), 1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Eager autograd.


@pytest.mark.parametrize("linsys", LINSYS)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_eager_backward_and_double_backward(case: Case, linsys: str) -> None:
    """dict theta as well: a dict that reached a Function unflattened would give zero."""

    def own(tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.detach().clone().requires_grad_() if is_floating(leaf) else leaf, tree)

    def derivatives(solution: Callable[[Any, Any], Any]) -> list[Tensor]:
        theta, data = own(case.theta), own(case.data)
        inputs = [leaf for leaf in flatten((theta, data))[0] if is_floating(leaf)]
        value = case.problem.outer_loss(solution(theta, data), theta, data)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        scalar = sum((g * torch.cos(x.detach())).sum() + (g**3).sum() for g, x in zip(first, inputs, strict=True))
        return [value, *first, *torch.autograd.grad(scalar, inputs)]

    got = derivatives(lambda theta, data: argmin(case.problem, theta, data, solver=NEWTON, linsys=LINSYS[linsys]))
    for one, other in zip(got, derivatives(case.phi_star), strict=True):
        assert_same(one.detach(), other.detach(), 1e-8)


@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    """Finite differences of torch, with respect to theta and floating data together."""
    leaves, structure = flatten(case.theta)
    floats = [leaf for leaf in flatten(case.data)[0] if is_floating(leaf)]

    def phi(*inputs: Tensor) -> Tensor:
        theta, data = unflatten(structure, inputs[: len(leaves)]), with_floating(case.data, inputs[len(leaves) :])
        phi = argmin(case.problem, theta, data, solver=NEWTON, linsys=Exact())
        return torch.cat([vector(phi), case.problem.outer_loss(phi, theta, data)[None]])

    inputs = [leaf.clone().requires_grad_() for leaf in [*leaves, *floats]]
    # fast mode compares one random projection; `test_gradcheck_of_every_entry` does them all for the smallest case
    assert torch.autograd.gradcheck(phi, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(phi, inputs, fast_mode=True)


def test_gradcheck_of_every_entry() -> None:
    theta, data = EXPONENTIAL.theta.clone().requires_grad_(), EXPONENTIAL.data.clone().requires_grad_()

    def phi(theta: Tensor, data: Tensor) -> Tensor:
        return argmin(EXPONENTIAL.problem, theta, data, solver=NEWTON, linsys=CG(max_steps=20, rtol=1e-14))

    assert torch.autograd.gradcheck(phi, (theta, data))
    assert torch.autograd.gradgradcheck(phi, (theta, data))


def test_backward_accumulates_in_the_users_tensors_only() -> None:
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), PROXIMAL.theta)
    x = PROXIMAL.data["train"][0]
    phi = argmin(PROXIMAL.problem, theta, PROXIMAL.data, solver=NEWTON, linsys=Exact())
    assert list(phi) == list(theta)
    PROXIMAL.problem.outer_loss(phi, theta, PROXIMAL.data).backward()
    expected = grad(PROXIMAL.outer)(PROXIMAL.theta, PROXIMAL.data)
    for key in theta:
        assert_same(theta[key].grad, expected[key], 1e-9)
    assert x.grad is None and not x.requires_grad


def test_the_insertion_order_of_dicts_does_not_matter() -> None:
    theta = {key: leaf.clone().requires_grad_() for key, leaf in reversed(PROXIMAL.theta.items())}
    phi = argmin(PROXIMAL.problem, theta, PROXIMAL.data, solver=NEWTON, linsys=Exact(), init=dict(PROXIMAL.theta))
    assert list(phi) == list(PROXIMAL.theta)  # like init
    expected = grad(PROXIMAL.outer)(PROXIMAL.theta, PROXIMAL.data)
    PROXIMAL.problem.outer_loss(phi, theta, PROXIMAL.data).backward()
    for key in theta:
        assert_same(theta[key].grad, expected[key], 1e-9)


def test_a_part_of_theta_that_needs_no_gradient() -> None:
    theta = {"w": PROXIMAL.theta["w"].clone().requires_grad_(), "b": PROXIMAL.theta["b"].clone()}
    phi = argmin(PROXIMAL.problem, theta, PROXIMAL.data, solver=NEWTON, linsys=Exact())
    (got,) = torch.autograd.grad(PROXIMAL.problem.outer_loss(phi, theta, PROXIMAL.data), theta["w"])
    assert_same(got, grad(PROXIMAL.outer)(PROXIMAL.theta, PROXIMAL.data)["w"], 1e-9)
    assert theta["b"].grad is None


def test_without_a_gradient_to_take_the_answer_has_no_graph() -> None:
    phi = argmin(EXPONENTIAL.problem, EXPONENTIAL.theta, EXPONENTIAL.data, solver=NEWTON, linsys=Exact())
    assert not phi.requires_grad
    theta = EXPONENTIAL.theta.clone().requires_grad_()
    with torch.no_grad():
        assert not argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=NEWTON, linsys=Exact()).requires_grad


def test_rows_of_the_eager_hessian() -> None:
    """torch.autograd.functional, and torch.func.vmap over torch.autograd.grad on one graph."""

    def f(theta: Tensor) -> Tensor:
        return (argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=NEWTON, linsys=Exact()) ** 3).sum()

    expected = hessian(lambda theta: (EXPONENTIAL.phi_star(theta, EXPONENTIAL.data) ** 3).sum())(EXPONENTIAL.theta)
    assert_same(torch.autograd.functional.hessian(f, EXPONENTIAL.theta), expected)
    theta = EXPONENTIAL.theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    rows = vmap(lambda v: torch.autograd.grad(first, theta, v, retain_graph=True)[0])(torch.eye(3, dtype=F64))
    assert_same(rows, expected)


def test_eager_forward_mode_raises_or_is_right() -> None:
    tangent = torch.ones_like(EXPONENTIAL.theta)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(EXPONENTIAL.theta, tangent)
        try:
            phi = argmin(EXPONENTIAL.problem, dual, EXPONENTIAL.data, solver=NEWTON, linsys=Exact())
        except (RuntimeError, NotImplementedError):
            return
        got = torch.autograd.forward_ad.unpack_dual(phi).tangent
        assert got is not None
        assert_same(got, jvp(lambda t: EXPONENTIAL.phi_star(t, EXPONENTIAL.data), (EXPONENTIAL.theta,), (tangent,))[1])


class RidgeLayer(torch.nn.Module):
    """Inputs -> weights of a regularised least squares fit, as a layer with two learned parameters."""

    def __init__(self, fit: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.log_penalty = torch.nn.Parameter(RIDGE.theta.clone())
        self.mix = torch.nn.Parameter(torch.eye(4, dtype=F64))
        self.fit = fit

    def forward(self, x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
        data = {"train": (x @ self.mix, y), "valid": (x_test, y[:1]), "tag": ""}
        return x_test @ self.mix @ self.fit(self.log_penalty, data)


def test_inside_a_module_trained_with_backward() -> None:
    x, y = RIDGE.data["train"]
    x_test, y_test = RIDGE.data["valid"]
    modules = [
        RidgeLayer(lambda theta, data: argmin(RIDGE.problem, theta, data, solver=NEWTON, linsys=Exact())),
        RidgeLayer(RIDGE.phi_star),
    ]
    losses = []
    for module in modules:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        history = []
        for _ in range(15):
            loss = ((module(x, y, x_test) - y_test) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert_same(losses[0], losses[1], 1e-6)
    for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert_same(ours.detach(), theirs.detach(), 1e-6)


def test_inside_functional_call_and_vmap() -> None:
    """Per-sample gradients of a module that holds an argmin."""
    x, y = RIDGE.data["train"]
    x_test, y_test = RIDGE.data["valid"]
    results = []
    for fit in (lambda theta, data: argmin(RIDGE.problem, theta, data, solver=NEWTON, linsys=Exact()), RIDGE.phi_star):
        module = RidgeLayer(fit)
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters: dict[str, Tensor], one: Tensor, target: Tensor, module: RidgeLayer = module) -> Tensor:
            return (functional_call(module, parameters, (x, y, one[None]))[0] - target) ** 2

        results.append(vmap(grad(loss), (None, 0, 0))(parameters, x_test, y_test))
    assert_same(*results)


# ----------------------------------------------------------------------------------------------------------------------
# Objectives that differentiate by themselves.


def test_an_objective_that_uses_transforms() -> None:
    """G holds a torch.func derivative of its own (a physics-informed fit): phi . t with slope data at four points."""

    def slopes(phi: Tensor, points: Tensor) -> Tensor:
        return vmap(grad(lambda t, phi: phi @ torch.stack([t, t**2, torch.sin(t)]), argnums=0), (0, None))(points, phi)

    def forward_slopes(phi: Tensor, points: Tensor) -> Tensor:
        return jvp(lambda t: torch.stack([t, t**2, torch.sin(t)], -1) @ phi, (points,), (torch.ones_like(points),))[1]

    points = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)
    design = torch.stack([torch.ones_like(points), 2 * points, torch.cos(points)], 1)

    def closed(theta: Tensor) -> Tensor:
        return torch.linalg.inv(design.T @ design + 0.1 * torch.eye(3, dtype=F64)) @ (design.T @ theta)

    for own in (slopes, forward_slopes):
        problem = BilevelProblem.from_functions(
            lambda phi, theta, data, own=own: 0.5 * ((own(phi, data) - theta) ** 2).sum() + 0.05 * (phi**2).sum(),
            lambda phi, theta, data: (phi**3).sum(),
            lambda theta, data: torch.zeros(3, dtype=F64),
        )

        def ours(theta: Tensor, problem: BilevelProblem = problem) -> Tensor:
            return argmin(problem, theta, points, solver=NEWTON, linsys=Exact())

        theta = normal(6, 4)
        for fn in (jacrev, jacfwd):
            assert_same(fn(ours)(theta), fn(closed)(theta))
        assert_same(hessian(lambda t: (ours(t) ** 3).sum())(theta), hessian(lambda t: (closed(t) ** 3).sum())(theta))
        assert_same(
            vmap(grad(lambda t: (ours(t) ** 3).sum()))(torch.stack([theta, -theta])),
            vmap(grad(lambda t: (closed(t) ** 3).sum()))(torch.stack([theta, -theta])),
        )


def test_an_argmin_inside_an_inner_objective() -> None:
    """Three levels. y*(x, t) = t x; x*(t) = argmin 1/2 |y*|^2 + 1/2 |x - t|^2 = t / (1 + t^2)."""
    lowest = BilevelProblem.from_functions(
        lambda y, xt, data: 0.5 * ((y - xt["t"] * xt["x"]) ** 2).sum(),
        lambda y, xt, data: y.sum(),
        lambda xt, data: 0 * xt["x"],
    )

    def middle(x: Tensor, t: Tensor, data: Any) -> Tensor:
        y = argmin(lowest, {"x": x, "t": t}, solver=NEWTON, linsys=Exact())
        return 0.5 * (y**2).sum() + 0.5 * ((x - t) ** 2).sum()

    problem = BilevelProblem.from_functions(
        middle, lambda x, t, data: (x**3).sum(), lambda t, data: torch.zeros_like(t)
    )
    t = torch.tensor([0.3, 0.8], dtype=F64)
    closed = grad(lambda t: ((t / (1 + t**2)) ** 3).sum())(t)
    assert_same(hypergradient(problem, t, solver=NEWTON, linsys=Exact()).unwrap(), closed, 1e-9)
    batch = torch.stack([t, 2 * t])
    each = hypergradient(
        problem, batch, solver=NEWTON, linsys=Exact(), batched=True, theta_batched=True, reduction="none"
    ).unwrap()
    assert_same(each[0], closed, 1e-9)
    assert_same(grad(lambda t: (argmin(problem, t, solver=NEWTON, linsys=Exact()) ** 3).sum())(t), closed, 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Captured tensors.


def capturing(c: Any) -> BilevelProblem:
    return BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta * c) ** 2).sum() + (phi**4).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros(2, dtype=F64),
    )


ONES = torch.ones(2, dtype=F64)


def solved(c: Any, theta: Tensor = ONES) -> Tensor:
    return argmin(capturing(c), theta, solver=NEWTON, linsys=Exact()).sum()


def test_captured_constants_are_fine_everywhere() -> None:
    c = 2 * ONES
    for fn in (grad, jacfwd, hessian):
        assert_same(fn(lambda t: solved(c, t))(ONES), fn(lambda t: solved(2.0, t))(ONES), 1e-12)
    assert_same(
        vmap(grad(lambda t: solved(c, t)))(torch.stack([ONES, -ONES])),
        vmap(grad(lambda t: solved(2.0, t)))(torch.stack([ONES, -ONES])),
    )
    theta = ONES.clone().requires_grad_()
    solved(c, theta).backward()
    assert_same(theta.grad, grad(lambda t: solved(2.0, t))(ONES), 1e-12)


class Held(BilevelProblem):
    """Weighted ridge regression with the data in an attribute, as of the current batch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def inner_objective(self, phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
        return 0.5 * (self.x @ phi - self.y).square().mean() + 0.5 * (theta.exp() * phi.square()).sum()

    def outer_loss(self, phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
        return phi.square().sum()

    def initial_phi(self, theta: Tensor, data: Any = None) -> Tensor:
        return torch.zeros_like(theta)


BATCHES = [(normal(seed, 20, 3), normal(seed + 10, 20)) for seed in (1, 2)]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_a_problem_holds_must_not_change_before_the_derivative(scale: float, dtype: torch.dtype) -> None:
    """Two batches and one backward pass: before, the gradient was that of the second batch twice, and nothing was said."""
    theta = torch.zeros(3, dtype=dtype, requires_grad=True)
    problem = Held(*(part.to(dtype) for part in BATCHES[0]))
    problem.inner_objective = lambda phi, t, data=None: scale * Held.inner_objective(problem, phi, t)  # type: ignore[method-assign]
    solver, linsys = NewtonCG(max_steps=30, cg_steps=10, tol=1e-5 * scale), CG(max_steps=20, rtol=1e-5)

    def loss() -> Tensor:
        return argmin(problem, theta, solver=solver, linsys=linsys, check="converged").square().sum()

    first = loss()
    (once,) = torch.autograd.grad(first, theta, retain_graph=True)
    x, y = problem.x, problem.y
    closed = torch.func.grad(
        lambda t: torch.linalg.solve(x.T @ x / 20 + torch.diag(t.exp()), x.T @ y / 20).square().sum()
    )(theta.detach())
    assert_same(once, closed, 1e-4)
    problem.x, problem.y = (part.to(dtype) for part in BATCHES[1])
    match = r"^argmin: inner_objective is not what was solved: its condition .* Pass it in data, or take the derivative before"
    with pytest.raises(ValueError, match=match):
        first.backward(retain_graph=True)
    with pytest.raises(ValueError, match=match):
        (first + loss()).backward(retain_graph=True)
    problem.x, problem.y = x, y
    assert_same(torch.autograd.grad(first, theta)[0], closed, 1e-4)  # and back


def test_what_a_problem_holds_must_not_change_within_a_transform() -> None:
    problem, theta = Held(*BATCHES[0]), torch.zeros(3, dtype=F64)

    def loss(t: Tensor) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for problem.x, problem.y in BATCHES:
            total = total + argmin(problem, t, solver=NEWTON, linsys=LINSYS["cg"]).square().sum()
        return total

    for transform in (grad, jacrev):
        with pytest.raises(ValueError, match="argmin: inner_objective is not what was solved"):
            transform(loss)(theta)


def test_functions_that_do_not_change_are_never_refused() -> None:
    """Points that are not solved, at rounding level, at zero, and those of another number of threads."""
    theta = torch.zeros(3, dtype=F64, requires_grad=True)
    for batch in (BATCHES[0], (BATCHES[0][0], torch.zeros(20, dtype=F64))):
        for solver in (
            NEWTON,
            GradientDescent(step_size=0.1, max_steps=3, tol=1e-12),
            NewtonCG(max_steps=30, tol=1e-3),
        ):
            phi = argmin(Held(*batch), theta, solver=solver, linsys=LINSYS["exact"])
            threads = torch.get_num_threads()
            torch.set_num_threads(threads + 1)
            try:
                phi.sum().backward()
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("theta_grad", [True, False])
def test_a_captured_eager_tensor_is_an_error(leaf: bool, grad_mode: bool, theta_grad: bool) -> None:
    weight = (2 * ONES).requires_grad_()
    captured = weight if leaf else 3 * weight
    theta = ONES.clone().requires_grad_(theta_grad)
    match = r"inner_objective uses a tensor that carries a gradient.*Pass it through theta or data, or detach it"
    with torch.set_grad_enabled(grad_mode), pytest.raises(ValueError, match=match):
        solved(captured, theta)


def test_theta_itself_through_the_side_door_is_an_error() -> None:
    theta = ONES.clone().requires_grad_()
    with pytest.raises(ValueError, match="inner_objective uses a tensor that carries a gradient"):
        solved(theta, theta)
    for transform in (grad, jacfwd, hessian, lambda f: vmap(lambda t: f(t * ONES))):
        with pytest.raises(ValueError, match="inner_objective uses a tensor that carries a"):
            transform(lambda t: solved(t, t))(ONES)


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        pytest.param(lambda f: grad(f)(ONES), "carries a gradient of a torch.func transform", id="grad"),
        pytest.param(lambda f: vjp(f, ONES)[1](ONES[0]), "carries a gradient of a torch.func transform", id="vjp"),
        pytest.param(lambda f: jacrev(f)(ONES), "carries a gradient of a torch.func transform", id="jacrev"),
        pytest.param(lambda f: jvp(f, (ONES,), (ONES,)), "carries a gradient of a torch.func transform", id="jvp"),
        pytest.param(lambda f: jacfwd(f)(ONES), "carries a", id="jacfwd"),
        pytest.param(lambda f: hessian(f)(ONES), "carries a", id="hessian"),
        pytest.param(
            lambda f: vmap(f)(torch.stack([ONES, ONES])), r"carries a batch axis of torch.func.vmap", id="vmap"
        ),
        pytest.param(lambda f: vmap(grad(f))(torch.stack([ONES, ONES])), "carries a", id="vmap(grad)"),
        pytest.param(
            lambda f: grad(lambda c: vmap(f)(c).sum())(torch.stack([ONES, ONES])), "carries a", id="grad(vmap)"
        ),
    ],
)
@pytest.mark.parametrize(
    "function_of_it", [lambda c: c, lambda c: 3 * torch.sin(c)], ids=["itself", "a function of it"]
)
def test_a_captured_tensor_of_a_transform_is_an_error(
    transform: Callable[..., Any], match: str, function_of_it: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=rf"inner_objective uses a tensor that {match}.*Pass it through theta or data"):
        transform(lambda c: solved(function_of_it(c)))


def test_a_captured_tensor_beside_a_theta_of_the_same_transform_is_an_error() -> None:
    with pytest.raises(ValueError, match="uses a tensor that carries a gradient of a torch.func transform"):
        grad(lambda c: solved(c, 2 * c))(ONES)
    with pytest.raises(ValueError, match="uses a tensor that carries a gradient of a torch.func transform"):
        vmap(lambda theta: grad(lambda c: solved(c, theta))(ONES))(torch.stack([ONES, ONES]))
    with pytest.raises(ValueError, match="uses a tensor that carries a batch axis"):
        vmap(lambda c: grad(lambda theta: solved(c, theta))(ONES))(torch.stack([ONES, ONES]))


def test_a_captured_eager_tensor_under_a_transform_is_an_error() -> None:
    weight = (2 * ONES).requires_grad_()
    for transform in (grad, jacfwd, lambda f: lambda x: vmap(f)(x[None])):
        with pytest.raises(ValueError, match="inner_objective uses a tensor that carries a gradient"):
            transform(lambda theta: solved(weight, theta))(ONES)


def test_a_captured_dual_tensor_of_eager_forward_mode_is_an_error() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(2 * ONES, ONES)
        with pytest.raises((ValueError, NotImplementedError), match="forward|carries"):
            solved(dual)


def test_captured_tensors_passed_properly_give_the_derivative() -> None:
    """The advice of the message works."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta * data) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0 * theta,
    )
    got = grad(lambda c: argmin(problem, 3 * ONES, c, solver=NEWTON, linsys=Exact()).sum())(ONES)
    assert_same(got, 3 * ONES, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Failure: NaN, never 0; report and check.


def test_nan_in_one_entry_of_a_vmap() -> None:
    data = stack([scaled(EXPONENTIAL.data, k) for k in range(3)])
    bad = data.clone()
    bad[1, 0, 0] = torch.nan

    def phi(data: Tensor, theta: Tensor = EXPONENTIAL.theta) -> Tensor:
        return argmin(EXPONENTIAL.problem, theta, data, solver=NEWTON, linsys=CG(max_steps=30, rtol=1e-13))

    healthy, got = vmap(phi)(data), vmap(phi)(bad)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], healthy[[0, 2]])
    for fn in (grad(lambda d: (phi(d) ** 2).sum()), jacfwd(phi), hessian(lambda d: (phi(d) ** 2).sum())):
        one, other = vmap(fn)(bad), vmap(fn)(data)
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert one[1].isnan().any() and not (one[1] == 0).all()


def test_a_failed_inner_solve_is_nan_and_so_are_its_derivatives() -> None:
    case = RIDGE
    solver = GradientDescent(step_size=1.0, max_steps=1000)  # diverges

    def f(theta: Tensor) -> Tensor:
        return argmin(case.problem, theta, case.data, solver=solver, linsys=Exact()).sum()

    assert f(case.theta).isnan()
    for value in (grad(f)(case.theta), jacfwd(f)(case.theta), hessian(f)(case.theta), vmap(grad(f))(case.theta[None])):
        assert value.isnan().all()
    theta = case.theta.clone().requires_grad_()
    f(theta).backward()
    assert theta.grad.isnan().all()


def test_after_a_failed_inner_solve_no_derivative_is_finite_though_the_condition_does_not_depend_on_phi() -> None:
    """G = x (phi - theta)^2: with a step of 0.1 the task with x = 100 diverges. Its Hessian and cross derivative are the same everywhere,
    and at NaN too.
    """
    problem = BilevelProblem.from_functions(
        lambda phi, theta, x: (x * (phi - theta).square()).sum(),
        lambda phi, theta, x: phi.sum(),
        lambda theta, x: torch.zeros(3, dtype=F64),
    )
    solver = GradientDescent(step_size=0.1, max_steps=1000)
    x, theta = torch.stack([torch.ones(3, dtype=F64), torch.full((3,), 100.0, dtype=F64)]), torch.ones(3, dtype=F64)

    def f(theta: Tensor) -> Tensor:
        return vmap(lambda x: argmin(problem, theta, x, solver=solver, linsys=CG(max_steps=5)))(x)

    for jacobian in (jacrev(f)(theta), jacfwd(f)(theta)):
        assert_same(jacobian[0], torch.eye(3, dtype=F64), 1e-9)
        assert jacobian[1].isnan().all()
    leaf = theta.clone().requires_grad_()
    f(leaf).sum().backward()
    assert leaf.grad.isnan().all()
    # but a loss that leaves the failed task out has a gradient
    assert_same(grad(lambda t: f(t)[0].square().sum())(theta), 2 * theta, 1e-9)
    assert_same(hessian(lambda t: f(t)[0].square().sum())(theta), 2 * torch.eye(3, dtype=F64), 1e-9)
    for transform in (hessian, lambda g: jacrev(jacfwd(g)), lambda g: jacrev(jacrev(g))):
        assert transform(lambda t: f(t)[1].square().sum())(theta).isnan().all()


def test_a_failed_linear_solve_leaves_no_second_derivative_either() -> None:
    """A maximum: CG stops at negative curvature. Reverse over forward gave zero."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, x: -0.5 * phi.square().sum() - (theta.sin() * phi).sum(),
        lambda phi, theta, x: phi.sum(),
        lambda theta, x: torch.zeros_like(theta),
    )
    at = BlackBox(lambda problem, theta, data, init: -theta.sin())

    def f(theta: Tensor) -> Tensor:
        return argmin(problem, theta, solver=at, linsys=CG(max_steps=10)).sum()

    theta = normal(7, 2)
    for transform in (hessian, lambda g: jacrev(jacfwd(g)), lambda g: jacrev(jacrev(g))):
        assert transform(f)(theta).isnan().all()


def test_forward_mode_at_expanded_tensors() -> None:
    """phi* = sin(theta), where one number may stand for all of theta, and for all of data: no tangent can be put beside such a tensor."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, x: (x * (phi - theta.sin()).square()).sum(),
        lambda phi, theta, x: phi.sum(),
        lambda theta, x: torch.zeros_like(theta),
    )
    x, one = torch.tensor(2.0, dtype=F64).expand(3), torch.tensor(0.7, dtype=F64)

    def phi(theta: Tensor) -> Tensor:
        return argmin(problem, theta, x, solver=NEWTON, linsys=CG(max_steps=10, rtol=1e-13))

    assert_same(jacfwd(phi)(one.repeat(3)), one.cos() * torch.eye(3, dtype=F64), 1e-10)
    assert_same(jacfwd(lambda s: phi(s.expand(3)))(one), one.cos().expand(3), 1e-10)
    assert_same(hessian(lambda s: phi(s.expand(3)).sum())(one), -3 * one.sin(), 1e-10)


def hill() -> BilevelProblem:
    """G = sum cos(phi - theta): phi = theta is a maximum."""
    return BilevelProblem.from_functions(
        lambda phi, theta, data: torch.cos(phi - theta).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0 * theta,
    )


TOP = BlackBox(lambda problem, theta, data, init: theta.clone())


@pytest.mark.parametrize("linsys", [CG(max_steps=10), Neumann(num_terms=100)])
def test_a_failed_linear_solve_gives_nan_derivatives(linsys: Any) -> None:
    """At a maximum the Hessian is negative; neither method can go on."""

    def phi(theta: Tensor) -> Tensor:
        return argmin(hill(), theta, solver=TOP, linsys=linsys)

    theta = normal(7, 3)
    assert_same(phi(theta), theta, 1e-12)
    for value in (
        grad(lambda t: phi(t).sum())(theta),
        jacrev(phi)(theta),
        jacfwd(phi)(theta),
        vmap(grad(lambda t: phi(t).sum()))(theta[None]),
    ):
        assert value.isnan().all()
    leaf = theta.clone().requires_grad_()
    phi(leaf).sum().backward()
    assert leaf.grad.isnan().all()


def test_an_exact_solve_at_a_saddle_is_the_derivative_of_the_saddle() -> None:
    reports: list[Result] = []
    theta = normal(7, 3).requires_grad_()
    argmin(hill(), theta, solver=TOP, linsys=Exact(), report=reports.append).sum().backward()
    assert_same(theta.grad, torch.ones(3, dtype=F64), 1e-12)
    assert reports[-1].status is Status.SOLVED_INDEFINITE


def test_check_converged_raises_where_the_steps_were_used_up() -> None:
    """Which is no failure, and no solution."""
    few = GradientDescent(step_size=0.01, max_steps=3, tol=1e-8)
    theta = RIDGE.theta.clone().requires_grad_()
    options: dict[str, Any] = {"solver": few, "linsys": Exact()}
    argmin(RIDGE.problem, theta, RIDGE.data, check=True, **options)
    with pytest.raises(SolverError, match=r"check='converged': argmin, inner solve: MAX_STEPS after 3 steps"):
        argmin(RIDGE.problem, theta, RIDGE.data, check="converged", **options)
    one_step = argmin(
        RIDGE.problem, theta, RIDGE.data, solver=NEWTON, linsys=CG(max_steps=1, rtol=1e-12), check="converged"
    )
    with pytest.raises(SolverError, match=r"check='converged': argmin, linear solve: MAX_STEPS after 1 steps"):
        one_step.sum().backward()
    argmin(RIDGE.problem, theta, RIDGE.data, solver=NEWTON, linsys=Exact(), check="converged").sum().backward()
    saddle = argmin(hill(), theta, solver=TOP, linsys=Exact(), check="converged")
    saddle.sum().backward()  # SOLVED_INDEFINITE is solved
    with pytest.raises(
        ValueError, match='argmin: check: expected "failed" \\(or True\\), "converged" or False, got \'solved\''
    ):
        argmin(RIDGE.problem, theta, RIDGE.data, check="solved", **options)


def test_report_is_handed_every_result() -> None:
    reports: list[Result] = []
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), PROXIMAL.theta)
    phi = argmin(
        PROXIMAL.problem,
        theta,
        PROXIMAL.data,
        solver=NEWTON,
        linsys=CG(max_steps=60, rtol=1e-12),
        report=reports.append,
    )
    (inner,) = reports
    assert inner.status is Status.CONVERGED and inner.num_steps >= 1
    assert inner.what == "argmin, inner solve" and inner.describe().startswith("argmin, inner solve: CONVERGED")
    assert inner.residual <= 1e-11
    assert_same(vector(inner.value), vector(phi).detach(), 1e-14)
    value = PROXIMAL.problem.outer_loss(phi, theta, PROXIMAL.data)
    first = torch.autograd.grad(value, list(theta.values()), create_graph=True)
    assert len(reports) == 2
    assert reports[1].status is Status.CONVERGED and reports[1].num_matvecs >= 1
    assert reports[1].what == "argmin, linear solve"
    assert list(reports[1].value) == list(theta)  # u, a tree like phi
    sum((g**2).sum() for g in first).backward()
    assert len(reports) > 2
    assert all(not bool(report.failed.any()) for report in reports)
    assert all(not leaf.requires_grad for report in reports for leaf in flatten(report.value)[0])


def test_report_of_a_failure() -> None:
    reports: list[Result] = []
    theta = normal(7, 3).requires_grad_()
    argmin(hill(), theta, solver=TOP, linsys=CG(max_steps=5), report=reports.append).sum().backward()
    assert [report.status for report in reports] == [Status.CONVERGED, Status.NEGATIVE_CURVATURE]


def test_check_raises_in_eager_mode() -> None:
    case = RIDGE
    with pytest.raises(SolverError, match="argmin, inner solve: DIVERGED.*Reduce step_size"):
        argmin(
            case.problem,
            case.theta,
            case.data,
            solver=GradientDescent(step_size=1.0, max_steps=1000),
            linsys=Exact(),
            check=True,
        )
    theta = normal(7, 3).requires_grad_()
    phi = argmin(hill(), theta, solver=TOP, linsys=CG(max_steps=5), check=True)
    with pytest.raises(SolverError, match="argmin, linear solve: NEGATIVE_CURVATURE"):
        phi.sum().backward()
    assert theta.grad is None
    fine = argmin(case.problem, case.theta, case.data, solver=NEWTON, linsys=Exact(), check=True)
    assert_same(fine, case.phi_star(case.theta, case.data), 1e-9)


UNDER: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, theta: vmap(f)(torch.stack([theta, theta])),
    "grad": lambda f, theta: grad(lambda t: f(t).sum())(theta),
    "jacrev": lambda f, theta: jacrev(f)(theta),
    "jacfwd": lambda f, theta: jacfwd(f)(theta),
    "hessian": lambda f, theta: hessian(lambda t: f(t).sum())(theta),
    "vmap of grad": lambda f, theta: vmap(grad(lambda t: f(t).sum()))(torch.stack([theta, theta])),
    "vmap of jacfwd": lambda f, theta: vmap(jacfwd(f))(torch.stack([theta, theta])),
}


@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER)
def test_check_raises_under_transforms(under: Any) -> None:
    bowl = BilevelProblem.from_functions(
        lambda phi, theta, data: 5 * (phi - theta).square().sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0 * theta,
    )

    def solution(theta: Tensor, problem: BilevelProblem, solver: Any) -> Tensor:
        return argmin(problem, theta, solver=solver, linsys=CG(max_steps=5), check=True)

    theta = normal(7, 3)
    with pytest.raises(SolverError, match="argmin, inner solve"):
        under(lambda t: solution(t, bowl, GradientDescent(step_size=1.0, max_steps=100)), theta)
    if under is not UNDER["vmap"]:  # which takes no derivative
        with pytest.raises(SolverError, match="argmin, linear solve"):
            under(lambda t: solution(t, hill(), TOP), theta)


def test_check_reports_before_it_raises() -> None:
    reports: list[Result] = []
    with pytest.raises(SolverError):
        argmin(
            RIDGE.problem,
            RIDGE.theta,
            RIDGE.data,
            solver=GradientDescent(step_size=1.0, max_steps=1000),
            linsys=Exact(),
            check=True,
            report=reports.append,
        )
    assert [report.status for report in reports] == [Status.DIVERGED]


def test_a_singular_hessian_gives_nan_or_the_minimum_norm_never_zero() -> None:
    """phi_1 does not enter G: there is no derivative."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi[0] - theta) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros(2, dtype=F64),
    )
    theta = torch.ones(1, dtype=F64)
    for linsys in (CG(max_steps=10), Exact()):
        assert (
            grad(lambda t, linsys=linsys: argmin(problem, t, solver=NEWTON, linsys=linsys).sum())(theta).isnan().all()
        )


# ----------------------------------------------------------------------------------------------------------------------
# Arguments.


def test_the_black_box_is_called_at_base_level() -> None:
    """Detached, plain tensors, once for each entry, whatever surrounds argmin."""
    seen: list[tuple[bool, bool]] = []

    def fn(problem: BilevelProblem, theta: Tensor, data: Tensor, init: Tensor) -> Tensor:
        seen.append((theta.requires_grad, torch._C._functorch.is_functorch_wrapped_tensor(theta)))
        return torch.as_tensor(torch.log(data @ theta).numpy())  # numpy() refuses what is no plain tensor

    def f(theta: Tensor) -> Tensor:
        return (argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=BlackBox(fn), linsys=Exact()) ** 2).sum()

    thetas = stack([scaled(EXPONENTIAL.theta, k) for k in range(3)])
    expected = vmap(grad(lambda theta: (EXPONENTIAL.phi_star(theta, EXPONENTIAL.data) ** 2).sum()))(thetas)
    assert_same(vmap(grad(f))(thetas), expected)
    assert seen == [(False, False)] * 3


def test_identity_is_no_solve() -> None:
    with pytest.raises(
        ValueError,
        match=r"argmin: Identity\(\) is no solve, so the derivative would not be that of phi\*.*Use CG, Neumann or Exact",
    ):
        argmin(PROXIMAL.problem, PROXIMAL.theta, PROXIMAL.data, solver=NEWTON, linsys=Identity())


def test_what_the_objective_raises_reaches_the_caller() -> None:
    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        raise KeyError("in the objective")

    problem = BilevelProblem.from_functions(inner, lambda phi, theta, data: phi.sum(), lambda theta, data: theta)
    for call in (
        lambda t: argmin(problem, t, solver=NEWTON, linsys=Exact()),
        lambda t: grad(lambda t: argmin(problem, t, solver=NEWTON, linsys=Exact()).sum())(t),
    ):
        with pytest.raises(KeyError, match="in the objective"):
            call(ONES)


def test_integer_and_static_data_are_carried() -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (
            data["k"] * ((phi - theta[data["index"]]) ** 2).sum() + (0 if data["none"] is None else torch.nan)
        ),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros(3, dtype=F64),
    )
    data = {"index": torch.tensor([1, 1, 0]), "k": 2.0, "none": None, "mask": torch.tensor([True]), "name": "x"}

    def phi(theta: Tensor) -> Tensor:
        return argmin(problem, theta, data, solver=NEWTON, linsys=Exact())

    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=F64)
    assert_same(jacrev(phi)(ONES), expected, 1e-12)
    assert_same(jacfwd(phi)(ONES), expected, 1e-12)
    indices = torch.tensor([[0, 0, 0], [1, 0, 1]])
    got = vmap(
        lambda index: grad(lambda t: argmin(problem, t, {**data, "index": index}, solver=NEWTON, linsys=Exact()).sum())(
            ONES
        )
    )(indices)
    assert_same(got, torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=F64), 1e-12)


def test_a_theta_that_the_inner_objective_ignores_has_derivative_zero() -> None:
    """argmin cannot know whether the caller uses it elsewhere: phi* truly does not depend on it."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta["a"]) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0 * theta["a"],
    )
    got = grad(lambda t: argmin(problem, t, solver=NEWTON, linsys=Exact()).sum())({"a": ONES, "b": ONES})
    assert got["b"].tolist() == [0.0, 0.0]
    assert_same(got["a"], ONES, 1e-12)


def test_the_users_tensors_are_as_they_were() -> None:
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), PROXIMAL.theta)
    data = tree_map(torch.clone, PROXIMAL.data)
    init = tree_map(torch.clone, PROXIMAL.theta)
    tensors = flatten((theta, data, init))[0]
    before = [(leaf.detach().clone(), leaf.requires_grad, leaf._version) for leaf in tensors]
    for solver in (NEWTON, GradientDescent(step_size=0.02, max_steps=3), NesterovAGD(step_size=0.02, max_steps=3)):
        phi = argmin(PROXIMAL.problem, theta, data, solver=solver, linsys=Exact(), init=init)
        torch.autograd.grad(vector(phi).sum(), list(theta.values()))
        with torch.no_grad():
            for leaf in flatten(phi)[0]:
                leaf.fill_(9.0)  # no alias of init or theta
    for leaf, (value, flag, version) in zip(tensors, before, strict=True):
        assert (
            torch.equal(leaf, value) and leaf.requires_grad == flag and leaf._version == version and leaf.grad is None
        )


def test_argmin_agrees_with_solve_and_hypergradient() -> None:
    for case in PROBLEMS:
        phi = argmin(case.problem, case.theta, case.data, solver=NEWTON, linsys=Exact())
        run = solve(case.problem, case.theta, case.data, solver=NEWTON)
        assert torch.equal(vector(phi), vector(run.value))
        assert flatten(phi)[1] == flatten(run.value)[1]
    gc.collect()


def test_an_empty_axis_under_vmap_is_named() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda x, t, _: (x - t).square().sum(), lambda x, t, _: x.sum(), lambda t, _: torch.zeros_like(t)
    )
    solver = NewtonCG(max_steps=3)
    with pytest.raises(ValueError, match="vmap: expected at least one problem along the mapped axis, got an empty one"):
        torch.func.vmap(lambda t: argmin(problem, t, solver=solver, linsys=CG(max_steps=3)))(torch.zeros(0, 3))


def test_convergence_cannot_be_checked_without_a_tolerance() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda x, t, _: (x - t).square().sum(), lambda x, t, _: x.sum(), lambda t, _: torch.zeros_like(t)
    )
    theta = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'check="converged" needs an inner solver with tol > 0, got NewtonCG'):
        argmin(problem, theta, solver=NewtonCG(), linsys=CG(max_steps=3), check="converged")
    theta.requires_grad_()
    for linsys in (Exact(), CG(max_steps=9, rtol=0.0)):  # which ends where rounding lets it go no further
        argmin(problem, theta, solver=NewtonCG(tol=1e-9), linsys=linsys, check="converged").sum().backward()


def test_a_parameter_that_phi_lacks_is_thought_of() -> None:
    net = nn.Linear(2, 1).double()
    x = torch.ones(3, 2, dtype=torch.float64)
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, _: functional_call(net, phi, (x,)).square().sum(), lambda phi, _: phi["weight"].sum(), lam=1.0
    )
    theta = {"weight": net.weight.detach()}
    with pytest.raises(ValueError, match="phi has to have every parameter of the module"):
        argmin(problem, theta, solver=NewtonCG(), linsys=CG(max_steps=3))


@pytest.mark.parametrize("way", ["argmin", "fixed_point", "root"])
def test_chance_that_a_residual_hides_is_an_error(way: str) -> None:
    """The solve cannot converge, and what it has left is as large as what two masks differ by: nothing else would see that."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.3)).double()
    x = torch.randn(8, dtype=torch.float64)
    theta = {name: leaf.detach().requires_grad_() for name, leaf in net.named_parameters()}

    def layer(z: Any, theta: Any, data: Any = None) -> Any:
        return 0.4 * torch.func.functional_call(net, theta, (z,)).tanh() + x

    def answer() -> Any:
        options: Any = {"init": x, "check": True}
        if way == "fixed_point":
            solver = bilevel.solvers.Anderson(max_steps=60, tol=1e-6)
            return bilevel.fixed_point(layer, theta, solver=solver, linsys=GMRES(max_steps=20), **options)
        if way == "root":
            steps = bilevel.solvers.FixedPointIteration(max_steps=60, tol=1e-6)
            return bilevel.root(
                lambda z, t, d: z - layer(z, t), theta, solver=steps, linsys=GMRES(max_steps=20), **options
            )
        problem = bilevel.BilevelProblem.from_functions(
            lambda z, t, d: 0.5 * (z - layer(z, t)).square().sum() + 0.5 * z.square().sum(), lambda z, t, d: z.sum()
        )
        descent = bilevel.solvers.GradientDescent(step_size=0.1, max_steps=300, tol=1e-6)
        return bilevel.argmin(problem, theta, solver=descent, linsys=CG(max_steps=20), **options)

    with pytest.raises(ValueError, match="two evaluations of .* differ: its condition is .* Is there chance in it"):
        answer()
    net.eval()
    assert answer().isfinite().all()
