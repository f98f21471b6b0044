"""phi as a differentiable function of theta and data: :func:`argmin`, :func:`root`, :func:`fixed_point`.

One rule for all three. Let phi*(theta) solve c(phi, theta) = 0 and let A = dc/dphi be invertible there. Then

    dphi* = -A^{-1} (dc/dtheta) dtheta,        and backwards        (dphi*)^T v = -(dc/dtheta)^T A^{-T} v.

For ``argmin``, c = dG/dphi and A is the Hessian of G, which is symmetric; for ``root``, c = F; for ``fixed_point``, c = phi - T(phi).
The linear solves are a rule of their own, so that every derivative has derivatives again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Hessian
from bilevel.derivatives import (
    Flat,
    Levels,
    condition,
    condition_product,
    pullback,
    pushforward,
    refuse_batched_gradients,
    refuse_captured_under_transforms,
    refuse_eager_forward_mode,
    refuse_nested_forward_mode,
    transforms_active,
    with_axis,
)
from bilevel.entry import Call, check_linsys, check_solver, prepare, run_solver
from bilevel.isolation import isolated
from bilevel.linsys.base import LinearSolver, Operator
from bilevel.problem import BilevelProblem
from bilevel.residual import Condition, FixedPointFlat, RootFlat
from bilevel.result import Result
from bilevel.status import Check, failed, require_check
from bilevel.trees import Tree


@isolated
def argmin(
    problem: BilevelProblem,
    theta: Tree,
    data: Any = None,
    *,
    solver: Any,
    linsys: LinearSolver,
    init: Tree | None = None,
    check: Check = False,
    report: Callable[[Result], None] | None = None,
) -> Tree:
    """phi*(theta, data), differentiable with respect to theta and every floating tensor of data, to second order.

    Works under eager ``backward`` (also double) and under ``torch.func`` grad, vjp, jvp, jacrev, jacfwd, hessian, vmap
    and their nestings; tasks are batched with ``torch.func.vmap``. The derivative is the implicit one: the path of the
    solver does not enter, nor does ``init``, and a point that is not solved well gives a derivative that is not right
    well.

    A failed inner solve gives NaN for that entry, a failed linear solve NaN derivatives.

    Args:
        problem, theta, data, solver, init: as in :func:`solve`.
        linsys: linear solver for every derivative.
        check: "failed" (or True) raises where a solve failed. To use up its steps is no failure: "converged" raises there too, and needs
            a solver with a tolerance. False never raises. Acts under transforms of ``torch.func`` as well, as far as these let it see plain
            numbers: vmap, grad, jacrev, jacfwd, hessian do.
        report: called with the :class:`Result` of every solve, inner and linear, likewise; its ``what`` says which one it is.

    Raises:
        SolverError: with ``check``, a solve failed (or, with "converged", did not reach its tolerance).
        ValueError: the objective uses a tensor that carries a gradient and is no part of theta or data.
        NotImplementedError: forward mode over forward mode, which could not be right.
    """
    check_solver(solver)
    check_linsys(linsys)
    if linsys.needs_known_inverse:
        raise ValueError(
            f"argmin: {linsys!r} is no solve, so the derivative would not be that of phi*. Use CG, Neumann or Exact."
        )
    call = prepare(problem, theta, data, init)
    return _solution(call, solver, linsys, check, report, "argmin")


@isolated
def root(
    F: Callable[[Tree, Tree, Any], Tree],
    theta: Tree,
    data: Any = None,
    *,
    solver: Any,
    linsys: LinearSolver,
    init: Tree,
    check: Check = False,
    report: Callable[[Result], None] | None = None,
) -> Tree:
    """phi*(theta, data) with F(phi*, theta, data) = 0, differentiable like :func:`argmin`.

    For conditions that are no gradients: optimality systems with constraints, equilibria, implicit time steps.

    Args:
        F: a function of (phi, theta, data) that returns a tree like phi: as many equations as unknowns.
        theta, data, check, report: as in :func:`argmin`.
        solver: a solver of equations: :class:`~bilevel.solvers.Newton`, :class:`~bilevel.solvers.FixedPointIteration`,
            :class:`~bilevel.solvers.Anderson` or :class:`~bilevel.solvers.BlackBox` (whose function gets F as the problem).
        linsys: a linear solver for matrices that are not symmetric: ``Exact``, ``GMRES`` or ``BiCGStab``.
        init: start, a tree like phi.

    Raises:
        TypeError: the solver minimises; F is no function.
        ValueError: the linear solver needs a symmetric matrix; F returns no tree like phi.
        SolverError, NotImplementedError: as in :func:`argmin`.
    """
    return _of_equations(F, RootFlat, "root", theta, data, solver, linsys, init, check, report)


@isolated
def fixed_point(
    T: Callable[[Tree, Tree, Any], Tree],
    theta: Tree,
    data: Any = None,
    *,
    solver: Any,
    linsys: LinearSolver,
    init: Tree,
    check: Check = False,
    report: Callable[[Result], None] | None = None,
) -> Tree:
    """phi*(theta, data) with phi* = T(phi*, theta, data), differentiable like :func:`argmin`.

    T need not be a contraction for the derivative, only for the plain iteration: I - dT/dphi must be invertible at the solution.

    Args:
        T: a function of (phi, theta, data) that returns a tree like phi.
        theta, data, solver, linsys, init, check, report: as in :func:`root`, with F = phi - T(phi).

    Raises:
        As :func:`root`.
    """
    return _of_equations(T, FixedPointFlat, "fixed_point", theta, data, solver, linsys, init, check, report)


def _of_equations(
    fn: Any,
    flat_type: type[Flat],
    name: str,
    theta: Tree,
    data: Any,
    solver: Any,
    linsys: LinearSolver,
    init: Tree,
    check: Check,
    report: Callable[[Result], None] | None,
) -> Tree:
    if isinstance(fn, Condition):  # as a black box is handed it
        fn = fn.fn
    if not callable(fn) or isinstance(fn, BilevelProblem):
        raise TypeError(f"{name}: expected a function of (phi, theta, data), got {type(fn).__name__}.")
    check_solver(solver)
    check_linsys(linsys)
    if getattr(solver, "minimises", True):
        raise TypeError(
            f"{name}: expected a solver of equations such as Newton(max_steps=20, tol=1e-10) or FixedPointIteration, got {solver!r}, "
            "which minimises. If the equations are the gradient of something, use argmin."
        )
    if linsys.requires_symmetric:
        raise ValueError(
            f"{name}: {linsys!r} needs a symmetric matrix, and the derivative of the condition is none in general. Use Exact, GMRES or "
            "BiCGStab; if the equations are the gradient of something, use argmin."
        )
    call = prepare(Condition(fn), theta, data, init, flat_type=flat_type)
    return _solution(call, solver, linsys, check, report, name)


def _require_tolerance(solver: Any, name: str) -> None:
    """Without one, only a gradient of zeros ends as converged."""
    if getattr(solver, "tol", None) == 0:
        raise ValueError(f'{name}: check="converged" needs an inner solver with tol > 0, got {solver!r}.')


def _solution(
    call: Call, solver: Any, linsys: LinearSolver, check: Check, report: Callable[[Result], None] | None, name: str
) -> Tree:
    require_check(check, name)
    if check == "converged":
        _require_tolerance(solver, name)
    tensors = [call.phi.detach(), *call.tensors]
    if not transforms_active():
        refuse_eager_forward_mode(call.flat, tensors[0], tensors[1:])
    else:
        refuse_captured_under_transforms(call.flat, tensors[0], tensors[1:])
    rule = _Rule(call.flat, solver, linsys, check, report, name)
    return call.flat.phi.unravel(_Solution.apply(_Mapped(rule), *_guarded(tensors)))


@dataclass(frozen=True)
class _Rule:
    """What the differentiation rules of one call share."""

    flat: Flat
    solver: Any
    linsys: LinearSolver
    check: Check
    report: Callable[[Result], None] | None
    name: str

    def tell(self, result: Result, value: Any, what: str) -> None:
        """Report and check, where there is somebody to hear it."""
        if transforms_active():
            return
        result = replace(result, value=value, what=what)
        if self.report is not None:
            self.report(result)
        result.unwrap(check=self.check)


@dataclass(frozen=True)
class _Mapped:
    """A rule under ``vmap``: the batch axes that its arguments have, outermost first, and their sizes.

    ``transposed`` (linear solves): A^T in the place of A.
    """

    rule: _Rule
    levels: Levels = ()
    sizes: tuple[int, ...] = ()
    transposed: bool = False

    def mapped(
        self, size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[_Mapped, list[Tensor]]:
        """The same with one more axis outside."""
        moved = [
            tensor if axis is None else tensor.movedim(axis, 0) for tensor, axis in zip(tensors, in_dims, strict=True)
        ]
        flags = tuple(axis is not None for axis in in_dims)
        return _Mapped(self.rule, (flags, *self.levels), (size, *self.sizes), self.transposed), moved


def _guarded(tensors: Sequence[Tensor]) -> list[Tensor]:
    refuse_nested_forward_mode(tensors)
    refuse_batched_gradients(tensors)
    return list(tensors)


class _Solution(torch.autograd.Function):
    """(phi0, *tensors) -> phi*. Its rules solve with :class:`_LinearSolve`, and so have derivatives themselves."""

    @staticmethod
    def forward(mapped: _Mapped, phi: Tensor, *tensors: Tensor) -> Tensor:
        rule = mapped.rule
        phi = _expand(phi, [flags[0] for flags in mapped.levels], mapped.sizes)
        objective = rule.flat.objective(tuple(flags[1:] for flags in mapped.levels), tensors, mapped.sizes)
        result = run_solver(objective, phi.clone(), rule.solver)
        rule.tell(result, rule.flat.phi.unravel(result.value), f"{rule.name}, inner solve")
        return torch.where(result.failed.unsqueeze(-1), torch.nan, result.value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mapped = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @isolated
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = tuple((True, *flags[1:]) for flags in mapped.levels)  # of (phi, *tensors): the solution has every axis
        u = _LinearSolve.apply(
            _Mapped(mapped.rule, with_axis(levels), mapped.sizes, True), *_guarded([cotangent, phi, *tensors])
        )
        wanted = [want and _has_derivatives(t) for want, t in zip(ctx.needs_input_grad[2:], tensors, strict=True)]
        products = pullback(condition(mapped.rule.flat, levels), [phi, *tensors], -u, [False, *wanted])
        return (None, None, *products[1:])

    @staticmethod
    @isolated
    def jvp(ctx: Any, _mapped: None, _phi: Tensor | None, *tangents: Tensor | None) -> Tensor:
        phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = tuple((True, *flags[1:]) for flags in mapped.levels)
        change = pushforward(
            condition(mapped.rule.flat, levels), [phi, *tensors], [None, *_floating(tangents, tensors)]
        )
        if change is None:
            return torch.zeros_like(phi)
        return _LinearSolve.apply(
            _Mapped(mapped.rule, with_axis(levels), mapped.sizes), *_guarded([-change, phi, *tensors])
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], mapped: _Mapped, *tensors: Tensor) -> tuple[Tensor, int]:
        more, moved = mapped.mapped(info.batch_size, in_dims[1:], tensors)
        return _Solution.apply(more, *moved), 0


class _LinearSolve(torch.autograd.Function):
    """(b, phi, *tensors) -> u with A(phi, tensors) u = b, or A^T u = b."""

    @staticmethod
    def forward(mapped: _Mapped, b: Tensor, phi: Tensor, *tensors: Tensor) -> Tensor:
        rule, levels, sizes = mapped.rule, mapped.levels, mapped.sizes
        b = _expand(b, [flags[0] for flags in levels], sizes)
        # axes that only b has are several right-hand sides of one matrix: they go in front, and the matrix is
        # linearised once
        only_b = [axis for axis, flags in enumerate(levels) if not any(flags[1:])]
        shared = [axis for axis, flags in enumerate(levels) if any(flags[1:])]
        b = b.permute(*only_b, *shared, b.ndim - 1)
        point_levels = tuple(levels[axis] for axis in shared)
        point_sizes = tuple(sizes[axis] for axis in shared)
        phi = _expand(phi, [flags[1] for flags in point_levels], point_sizes)
        objective = rule.flat.objective(tuple(flags[2:] for flags in point_levels), tensors, point_sizes)
        local = objective.linearise(phi, Hessian(), 0.0)
        matvec = Operator(
            local.transposed_matvec if mapped.transposed else local.matvec,
            symmetric=rule.flat.symmetric,
            shared=len(only_b),
        )
        result = rule.linsys.solve(matvec, b, preconditioner=objective.curvature_inverse(0.0))
        rule.tell(result, rule.flat.phi.unravel(result.value), f"{rule.name}, linear solve")
        u = torch.where(failed(result.codes).unsqueeze(-1), torch.nan, result.value)
        back = sorted(range(len(levels)), key=lambda axis: [*only_b, *shared][axis])
        return u.permute(*back, u.ndim - 1).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mapped = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @isolated
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        u, phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = tuple((True, *flags[1:]) for flags in mapped.levels)
        flipped = _Mapped(mapped.rule, levels, mapped.sizes, not mapped.transposed)
        w = _LinearSolve.apply(flipped, *_guarded([cotangent, phi, *tensors]))
        wanted = [
            want and _has_derivatives(t) for want, t in zip(ctx.needs_input_grad[2:], [phi, *tensors], strict=True)
        ]
        product = condition_product(mapped.rule.flat, levels, mapped.transposed)
        products = pullback(product, [u, phi, *tensors], -w, [False, *wanted])
        return (None, _sum_to(w, mapped.levels), *products[1:])

    @staticmethod
    @isolated
    def jvp(ctx: Any, _mapped: None, b: Tensor | None, *tangents: Tensor | None) -> Tensor:
        u, phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = tuple((True, *flags[1:]) for flags in mapped.levels)
        product = condition_product(mapped.rule.flat, levels, mapped.transposed)
        change = pushforward(product, [u, phi, *tensors], [None, *_floating(tangents, [phi, *tensors])])
        rhs = None if b is None else _expand(b, [flags[0] for flags in mapped.levels], mapped.sizes)
        if change is not None:
            rhs = -change if rhs is None else rhs - change
        if rhs is None:
            return torch.zeros_like(u)
        same = _Mapped(mapped.rule, levels, mapped.sizes, mapped.transposed)
        return _LinearSolve.apply(same, *_guarded([rhs, phi, *tensors]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], mapped: _Mapped, *tensors: Tensor) -> tuple[Tensor, int]:
        more, moved = mapped.mapped(info.batch_size, in_dims[1:], tensors)
        return _LinearSolve.apply(more, *moved), 0


def _expand(x: Tensor, has_axis: Sequence[bool], sizes: Sequence[int]) -> Tensor:
    """Give x every batch axis, as a view."""
    own = x.shape[sum(has_axis) :]
    return x.reshape([size if has else 1 for size, has in zip(sizes, has_axis, strict=True)] + list(own)).expand(
        [*sizes, *own]
    )


def _sum_to(x: Tensor, levels: Levels) -> Tensor:
    """The cotangent of a first argument that was expanded by :func:`_expand`."""
    axes = [axis for axis, flags in enumerate(levels) if not flags[0]]
    return x.sum(axes) if axes else x


def _has_derivatives(tensor: Tensor) -> bool:
    """Not of labels and masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def _floating(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tangent if _has_derivatives(tensor) else None for tangent, tensor in zip(tangents, tensors, strict=True)]
