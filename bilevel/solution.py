"""phi as a differentiable function of theta and data: :func:`argmin`, :func:`root`, :func:`fixed_point`.

One rule for all three. Let phi*(theta) solve c(phi, theta) = 0 and let A = dc/dphi be invertible there. Then

    dphi* = -A^{-1} (dc/dtheta) dtheta,        and backwards        (dphi*)^T v = -(dc/dtheta)^T A^{-T} v.

For ``argmin``, c = dG/dphi and A is the Hessian of G, which is symmetric; for ``root``, c = F; for ``fixed_point``, c = phi - T(phi).
The rules themselves are in :mod:`bilevel.implicit_rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevel.derivatives import Flat
from bilevel.entry import Call, Solver, check_linsys, check_solver, prepare
from bilevel.implicit_rule import Rule, differentiable_solution
from bilevel.isolation import isolated
from bilevel.linsys.base import LinearSolver
from bilevel.problem import BilevelProblem, require_functions_of
from bilevel.residual import Condition, FixedPointFlat, RootFlat
from bilevel.result import Result
from bilevel.status import Check, require_check
from bilevel.trees import Tree


@isolated
def argmin(
    problem: BilevelProblem,
    theta: Tree,
    data: Any = None,
    *,
    solver: Solver,
    linsys: LinearSolver,
    init: Tree | None = None,
    check: Check = False,
    report: Callable[[Result], None] | None = None,
) -> Tree:
    """phi*(theta, data), differentiable with respect to theta and every floating tensor of data, to second order.

    Works under eager ``backward`` (also double) and under ``torch.func`` grad, vjp, jvp, jacrev, jacfwd, hessian, vmap
    and their nestings; tasks are batched with ``torch.func.vmap``. The derivative is the implicit one: the path of the
    solver does not enter, nor does ``init``, and the derivative is only as accurate
    as the inner solve.

    A failed inner solve gives NaN for that entry, and NaN derivatives where the entry is used; a failed linear solve NaN derivatives.

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
    solver: Solver,
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
        ValueError: the linear solver needs a symmetric matrix; F returns no tree like phi, or does not depend on phi (T neither).
        SolverError, NotImplementedError: as in :func:`argmin`.
    """
    return _of_equations(F, RootFlat, "root", theta, data, solver, linsys, init, check, report)


@isolated
def fixed_point(
    T: Callable[[Tree, Tree, Any], Tree],
    theta: Tree,
    data: Any = None,
    *,
    solver: Solver,
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
    solver: Solver,
    linsys: LinearSolver,
    init: Tree,
    check: Check,
    report: Callable[[Result], None] | None,
) -> Tree:
    if isinstance(fn, Condition):  # as a black box is handed it
        fn = fn.fn
    if not callable(fn) or isinstance(fn, BilevelProblem):
        raise TypeError(f"{name}: expected a function of (phi, theta, data), got {type(fn).__name__}.")
    require_functions_of("phi", "theta", "data", **{flat_type.source: fn})
    check_solver(solver)
    check_linsys(linsys)
    if getattr(solver, "minimises", True):
        raise TypeError(
            f"{name}: expected a solver of equations such as Newton(max_steps=20, tol=1e-10) or FixedPointIteration, got {solver!r}, "
            "which minimises. If the equations are the gradient of something, use argmin."
        )
    if linsys.requires_symmetric:
        raise ValueError(
            f"{name}: {linsys!r} needs a symmetric matrix, and the derivative of the condition is not symmetric in general. Use Exact, "
            "GMRES or BiCGStab; if the equations are the gradient of something, use argmin."
        )
    call = prepare(Condition(fn), theta, data, init, flat_type=flat_type)
    return _solution(call, solver, linsys, check, report, name)


def _require_tolerance(solver: Solver, name: str) -> None:
    """Without one, only a gradient of zeros ends as converged."""
    if getattr(solver, "tol", None) == 0:
        raise ValueError(f'{name}: check="converged" needs an inner solver with tol > 0, got {solver!r}.')


def _solution(
    call: Call, solver: Solver, linsys: LinearSolver, check: Check, report: Callable[[Result], None] | None, name: str
) -> Tree:
    require_check(check, name)
    if check == "converged":
        _require_tolerance(solver, name)
    return differentiable_solution(call, Rule(call.flat, solver, linsys, check, report, name))
