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

from bilevel.checks import check_accuracy
from bilevel.entry import Call
from bilevel.gradient import Diagnosis, Hypergradient
from bilevel.linsys.base import LinearSolver, mark, norm
from bilevel.result import Result
from bilevel.status import Status

MAX_ROUNDS = 10
"""Each round asks the solve that is to blame for less than half of the residual that was left, and the rounds end where
the accuracy is met or a solve can do no more. This limits what a call may cost where the estimate goes on missing by a
little."""

BLIND = 0.1
"""The part of ``|dG/dphi|`` that is asked for next where there is no estimate from phi, for being too far from the solution, say."""

FIRST_RTOL = 0.1
"""The largest ``rtol`` to begin with, however little accuracy is wanted: the first round has to take some steps, or
it measures the factors of a start and not those of a solve."""

MOST_RTOL = 0.5
"""The largest ``rtol`` that is proposed, however little accuracy is wanted: at 1, zero would be a solution."""


class Tolerances(NamedTuple):
    """``tol`` of an inner solver (absolute, on ``|dG/dphi|``) and ``rtol`` of a linear solver (relative to ``|dL/dphi|``).

    None where the result had no error left that a tolerance could be measured on, as after a direct solve: what is left is within the
    accuracy, and may be nothing but rounding.
    """

    tol: float | None
    rtol: float | None


def tolerances(result: Hypergradient, accuracy: float) -> Tolerances:
    """The tolerances that give a hypergradient like this one a relative error of ``accuracy``, half of it for each solve.

    To first order: the error is taken to be proportional to the residual, which is optimistic where ``accuracy`` is much below the
    error of ``result``. ``hypergradient(..., accuracy=...)`` measures again in every call. In an outer loop it is cheaper to ask now
    and then, because the factors change slowly.

    Args:
        result: a hypergradient of the same problem at this theta or one nearby. Costs what :meth:`bilevel.Hypergradient.diagnose` costs.
        accuracy: wanted ``|grad - exact| / |exact|`` of each task, between 0 and 1.

    Returns:
        :class:`Tolerances`; for a batch what the most demanding of its tasks needs.

    Raises:
        ValueError: no task of the result is ok.
    """
    check_accuracy(accuracy)
    if not bool(result.ok_per_task.any()):
        raise ValueError(f"tolerances: expected a result with at least one task that is ok, got\n{result.describe()}")
    found, evidence = result.diagnose(), result.certificate
    assert evidence is not None
    doubts, allowed = evidence.doubts, 0.5 * accuracy * found.size
    late = result.ok_per_task & ~(doubts.hidden_inner & (found.inner <= allowed))
    rough = result.ok_per_task & ~(doubts.hidden_linear & (found.linear <= allowed))
    return _wanted(found, accuracy, late, rough)


def _wanted(found: Diagnosis, accuracy: float, late: Tensor, rough: Tensor) -> Tolerances:
    """The tolerances at which each part of the error is half of what is allowed: ``tol`` for the tasks of the first mask, ``rtol`` for
    those of the second.
    """
    allowed = 0.5 * accuracy * found.size

    def least(residual: Tensor, part: Tensor, tasks: Tensor) -> float | None:
        wanted = (residual * allowed / part)[tasks & (part > 0) & part.isfinite() & (allowed > 0)]
        return max(float(wanted.min()), torch.finfo(wanted.dtype).tiny) if len(wanted) else None

    rtol = least(found.residual / found.rhs, found.linear, rough)
    return Tolerances(least(found.slope, found.inner, late), None if rtol is None else min(rtol, MOST_RTOL))


def warmed(call: Call, earlier: Hypergradient | None, *, phi_too: bool) -> Call:
    """The call with the starts of an earlier result, task by task where that one is ok."""
    if earlier is None:
        return call
    if not isinstance(earlier, Hypergradient) or earlier.certificate is None:
        raise TypeError(
            f"warm_start: expected what hypergradient() or implicit_gradient() returned, got {type(earlier).__name__}"
            f"{' of unrolled()' if isinstance(earlier, Hypergradient) else ''}."
        )
    before = earlier.certificate.call
    same_place = before.phi.shape == call.phi.shape and before.phi.device == call.phi.device
    if before.flat.phi != call.flat.phi or not same_place or before.phi.dtype != call.phi.dtype:
        raise ValueError(
            "warm_start: expected a result for the same phi and number of tasks (raveled: "
            f"{tuple(call.phi.shape)}, {call.phi.dtype}, {call.phi.device}), got one for {tuple(before.phi.shape)}, {before.phi.dtype}, "
            f"{before.phi.device}."
        )
    ok = earlier.ok_per_task.unsqueeze(-1)
    phi = torch.where(ok, before.phi, call.phi) if phi_too else call.phi
    return replace(call, phi=phi, u=torch.where(ok, before.u, 0))


def to_accuracy(
    run: Callable[[Call, Any, LinearSolver], Hypergradient],
    call: Call,
    solver: Any,
    linsys: LinearSolver,
    accuracy: float,
    warm_start: Hypergradient | None,
) -> Hypergradient:
    """Run until the estimated relative error of each task is at most ``accuracy``, or no further."""
    check_accuracy(accuracy)
    _check_methods(solver, linsys)
    start, rounds = warmed(call, warm_start, phi_too=True), []
    tol, rtol = _first(call, accuracy, warm_start)
    direct = not _has(linsys, "rtol")
    for _ in range(MAX_ROUNDS):
        result = run(
            start,
            replace(solver, tol=tol),
            linsys if direct else replace(linsys, rtol=rtol),  # type: ignore[type-var]
        )
        assert result.inner is not None
        rounds.append(result)
        found = result.diagnose()
        allowed = accuracy * found.size
        rounding = 0.5 * torch.finfo(found.size.dtype).eps * found.size  # below which nothing can be estimated
        inner, linear = torch.maximum(found.inner, rounding), torch.maximum(found.linear, rounding)
        missed = result.ok_per_task & ~(linear + inner <= allowed)
        late = missed & ~(inner <= 0.5 * allowed)  # the inner solve is to blame
        rough = missed & ~(linear <= 0.5 * allowed)
        # no estimate: phi may be too far from the solution for one, and a smaller gradient shows it
        blind = late & found.inner.isinf()
        # a solve that could not keep its tolerance, or has none, will not keep a smaller one; nor is there one for H that is singular
        stuck = late & ((result.inner.codes != int(Status.CONVERGED)) | (found.slope == 0))
        failing = (result.linear.codes != int(Status.CONVERGED)) | found.linear.isinf() | direct
        stuck = stuck | (rough & ~blind & failing)
        # what is left lies in directions of smaller curvature: ask for more than proportion says
        new = _wanted(found, 0.5 * accuracy, late & ~stuck, rough & ~stuck & ~failing)
        unseen = BLIND * found.slope[blind & ~stuck]
        if new == (None, None) and not len(unseen):
            break
        tol = min([tol, new.tol or tol, *unseen.tolist()])
        rtol = min(rtol, new.rtol or rtol)
        start = warmed(call, result, phi_too=True)
    return _as_one(rounds, late, rough)


def _as_one(rounds: list[Hypergradient], late: Tensor, rough: Tensor) -> Hypergradient:
    """The last of the rounds, with the work of all of them. Its statuses say where the accuracy was not reached."""
    last = rounds[-1]

    def total(name: str, missed: Tensor) -> Result:
        results = [getattr(result, name) for result in rounds]
        codes = results[-1].codes
        return replace(
            results[-1],
            codes=mark(codes, missed & (codes == int(Status.CONVERGED)), Status.MAX_STEPS),
            steps=torch.stack([result.steps for result in results]).sum(0),
            num_grads=sum(result.num_grads for result in results),
            num_matvecs=sum(result.num_matvecs for result in results),
        )

    looks = [result.diagnose() for result in rounds]
    inner, linear = total("inner", late), total("linear", rough)
    linear = replace(
        linear,
        num_grads=linear.num_grads + sum(look.num_grads for look in looks),
        num_matvecs=linear.num_matvecs + sum(look.num_matvecs for look in looks),
    )
    return replace(last, inner=inner, linear=linear)


def _first(call: Call, accuracy: float, warm_start: Hypergradient | None) -> tuple[float, float]:
    """From an earlier result, if it can be looked at; else the fraction ``accuracy`` of what the gradient is at the start."""
    known = Tolerances(None, None)
    evidence = None if warm_start is None else warm_start.certificate
    if warm_start is not None and evidence is not None and evidence.known and bool(warm_start.ok_per_task.any()):
        known = tolerances(warm_start, accuracy)
    tol = known.tol
    if tol is None:
        _, grad = call.objective().value_and_grad(call.phi)
        slope = norm(grad)
        slope = slope[slope.isfinite() & (slope > 0)]
        tol = accuracy * float(slope.min()) if len(slope) else accuracy
    return tol, min(FIRST_RTOL, accuracy) if known.rtol is None else known.rtol


def _check_methods(solver: Any, linsys: LinearSolver) -> None:
    if not _has(solver, "tol"):
        raise TypeError(f"accuracy: expected an inner solver with a field tol to choose, got {solver!r}.")
    if linsys.needs_known_inverse:
        raise ValueError(
            f"accuracy: {linsys!r} is no solve, so no tolerance makes the gradient exact. Use CG, Neumann or Exact."
        )


def _has(method: Any, name: str) -> bool:
    return is_dataclass(method) and name in [field.name for field in fields(method)]
