"""Tolerances from the accuracy that is wanted of the hypergradient, and starts from the step before.

The error of a hypergradient has a linear part, proportional to the residual of the linear solve, and an inner part, proportional to
|dG/dphi| (Lemma 3 of the paper). Each gets half of what is allowed. The factors are not known beforehand; a first gradient measures
them. They grow while a solve goes on, because what is left lies more and more in the directions of small curvature: so
:func:`to_accuracy` measures again until the estimate is met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.entry import Call
from bilevel.linsys.base import LinearSolver, check_number, mark, norm
from bilevel.result import Hypergradient, Result, Status

MAX_ROUNDS = 10
FIRST_RTOL = 0.1


class Tolerances(NamedTuple):
    """``tol`` of an inner solver (absolute, on ``|dG/dphi|``) and ``rtol`` of a linear solver (relative to ``|dL/dphi|``)."""

    tol: float
    rtol: float


def tolerances(result: Hypergradient, accuracy: float) -> Tolerances:
    """The tolerances that give a hypergradient like this one a relative error of ``accuracy``, half of it for each solve.

    ``hypergradient(..., accuracy=...)`` does this in every call. In an outer loop it is cheaper now and then: the factors change slowly.

    Args:
        result: a hypergradient of the same problem at this theta or one nearby. It should not be exact: the factors are measured on
            its errors. Costs what :meth:`bilevel.Hypergradient.diagnose` costs.
        accuracy: wanted ``|grad - exact| / |exact|`` of each task, > 0.

    Returns:
        :class:`Tolerances`; for a batch what the most demanding of its tasks needs.

    Raises:
        ValueError: no task of the result is ok.
    """
    check_number("accuracy", accuracy, positive=True)
    if not bool(result.ok_per_task.any()):
        raise ValueError(f"tolerances: expected a result with at least one task that is ok, got\n{result.describe()}")
    found = result.diagnose()
    allowed = 0.5 * accuracy * found.size
    return Tolerances(
        _scaled(found.slope, allowed / found.inner, result.ok_per_task),
        _scaled(found.residual / found.rhs, allowed / found.linear, result.ok_per_task),
    )


def _scaled(residual: Tensor, factor: Tensor, ok: Tensor) -> float:
    """The residual at which the error is what is allowed. A part without error asks for nothing."""
    wanted = (residual * factor)[ok & factor.isfinite() & (residual > 0)]
    return max(float(wanted.min()), torch.finfo(residual.dtype).tiny) if len(wanted) else 1.0


def warmed(call: Call, earlier: Hypergradient | None, *, phi_too: bool) -> Call:
    """The call with the starts of an earlier result, task by task where that one is ok."""
    if earlier is None:
        return call
    if not isinstance(earlier, Hypergradient) or earlier.certificate is None:
        raise TypeError(f"warm_start: expected the Hypergradient of an earlier call, got {type(earlier).__name__}.")
    before = earlier.certificate.call
    if before.flat.phi != call.flat.phi or before.phi.shape != call.phi.shape or before.phi.dtype != call.phi.dtype:
        raise ValueError(
            f"warm_start: expected a result for the same phi and number of tasks (raveled: {tuple(call.phi.shape)}, {call.phi.dtype}), got "
            f"one for {tuple(before.phi.shape)}, {before.phi.dtype}."
        )
    ok = earlier.ok_per_task.unsqueeze(-1)
    phi = torch.where(ok, before.phi, call.phi) if phi_too else call.phi
    return replace(call, phi=phi, u=torch.where(ok, earlier.certificate.u, 0))


def to_accuracy(
    run: Callable[[Call, Any, LinearSolver], Hypergradient],
    call: Call,
    solver: Any,
    linsys: LinearSolver,
    accuracy: float,
    warm_start: Hypergradient | None,
) -> Hypergradient:
    """Run until the estimated relative error of each task is at most ``accuracy``, or no further."""
    check_number("accuracy", accuracy, positive=True)
    _check_methods(solver, linsys)
    direct = "rtol" not in [field.name for field in fields(linsys)]  # type: ignore[arg-type]
    wanted = _first(call, accuracy) if warm_start is None else tolerances(warm_start, accuracy)
    earlier = warm_start
    for _ in range(MAX_ROUNDS):
        result = run(
            warmed(call, earlier, phi_too=True),
            replace(solver, tol=wanted.tol),
            linsys if direct else replace(linsys, rtol=wanted.rtol),  # type: ignore[type-var]
        )
        assert result.inner is not None
        if not bool(result.ok_per_task.any()):
            return result
        found = result.diagnose()
        allowed = accuracy * found.size
        missed = result.ok_per_task & (found.linear + found.inner > allowed)
        late = missed & (found.inner > 0.5 * allowed)  # the inner solve is to blame
        rough = missed & (found.linear > 0.5 * allowed)
        hopeless = (late & (result.inner.codes != int(Status.CONVERGED))) | (
            rough & (result.linear.codes != int(Status.CONVERGED))
        )
        if not bool(missed.any()) or bool(hopeless.any()):
            return result
        # what is left lies in directions of smaller curvature: ask for more than proportion says
        new = tolerances(result, 0.5 * accuracy)
        wanted = Tolerances(
            min(wanted.tol, new.tol) if bool(late.any()) else wanted.tol,
            min(wanted.rtol, new.rtol) if bool(rough.any()) else wanted.rtol,
        )
        earlier = result
    assert result.inner is not None
    return replace(result, inner=_not_reached(result.inner, late), linear=_not_reached(result.linear, rough))


def _not_reached(result: Result, missed: Tensor) -> Result:
    return replace(result, codes=mark(result.codes, missed & ~result.failed, Status.MAX_STEPS))


def _first(call: Call, accuracy: float) -> Tolerances:
    """Without a result to measure on: the fraction ``accuracy`` of what the gradient is at the start."""
    _, grad = call.objective().value_and_grad(call.phi)
    slope = norm(grad)
    slope = slope[slope.isfinite() & (slope > 0)]
    return Tolerances(accuracy * float(slope.min()) if len(slope) else accuracy, min(FIRST_RTOL, accuracy))


def _check_methods(solver: Any, linsys: LinearSolver) -> None:
    if not (is_dataclass(solver) and "tol" in [field.name for field in fields(solver)]):
        raise TypeError(f"accuracy: expected an inner solver with a field tol to choose, got {solver!r}.")
    if linsys.needs_known_inverse:
        raise ValueError(
            f"accuracy: {linsys!r} is no solve, so no tolerance makes the gradient exact. Use CG, Neumann or Exact."
        )
