"""The estimate of the error of a hypergradient: the two parts of :mod:`bilevel.certificates`, computed instead of
bounded.

CG goes on at phi for the linear part; Newton's method from phi, mostly one step, and CG there, for the inner part. A
residual that may be nothing but rounding is solved for like any other: it is as long as rounding is there, so that the
correction is about as long as the error that rounding hides, which is many per cent where the condition number nears
1 / eps. It is zero only where the residual is, or where CG finds no solution for what is only rounding. How much
rounding is, two gradients or products right beside each other show, because the model of
:mod:`bilevel.certificates.evaluation` is one of the worst case; far below that model Newton's method need not come
nearer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.certificates.evaluation import Evaluation, Rounding
from bilevel.linsys.base import Matvec, long_norm, norm, select
from bilevel.linsys.cg import CG
from bilevel.result import Result
from bilevel.status import converged

CORRECTION = CG(max_steps=100, rtol=1e-8)
"""An estimate needs the size of a correction, two digits say. Its relative error is at most rtol times the condition
number, so 1e-8 is enough for them up to a condition number of 1e6. How good it is with these:
docs/results/certificates.md."""

STEPS_PER_NUMBER = 10
"""CG needs more steps than the 100 above where many different eigenvalues are spread over many orders of magnitude: in
exact numbers one for each number of phi, with rounding some times that."""

MOST_NUMBERS = 400_000
"""That many numbers in all those products limit what a question may cost, as soon as phi has more than 200; from 4,000 on it is the 100
above. Where they do not suffice, the estimate can be too small, or there is none."""

TO_ROUNDING = 1.0
"""Where that fails, to the rounding of b, which is the unit of this ``atol``: where H is singular, and b has nothing along its null
vectors but rounding, as with softmax and a bias without penalty, every step beyond makes that larger."""

MUCH_LEFT = 0.01
"""Where a solve that did not meet its tolerance has left more than this part of b, and rounding in H u may be as much, nobody can
tell what is missing: H is singular as far as one can see."""

NEWTON_STEPS = 8
"""Near a solution one does; where so many do not come near one, phi is too far from it for an estimate."""

FAR_LESS = 0.1
"""The gradient has fallen to this part of what it was: what is left changes the distance, and so the estimate, by
about as much."""

TRIAL_POINTS = 8
"""Points tried along one Newton step, each at a quarter of the distance of the one before. The last is at 4^-7 =
6e-5 of the step: if the gradient falls only nearer than that, the step is of no use."""

HARDLY, IN_A_ROW = 0.9, 3
"""After so many steps in a row that had to be shortened and left more than this part of the gradient each, the others are like them: fewer
would give up more estimates that come out right after all."""

SHORTER = 0.25
"""Of a point to the next: half would need twice as many of them to come as near."""


class Doubts(NamedTuple):
    """What an estimate cannot tell, for each task ``(*batch,)``.

    Attributes:
        ran_out: there is none only because the products that a question may cost did not suffice.
        hidden_linear: ``|b - H u|`` may be nothing but rounding.
        hidden_inner: ``|dG/dphi|`` may be.
    """

    ran_out: Tensor
    hidden_linear: Tensor
    hidden_inner: Tensor


class Correction(NamedTuple):
    """``change``: (better gradient - gradient) ``(*batch, dim theta)``, or its sum over the tasks that are ok.
    ``columns``: the fields of :class:`bilevel.Diagnosis` from ``linear`` to ``rhs``, then those of :class:`Doubts`.
    """

    change: Tensor
    columns: tuple[Tensor, ...]
    num_grads: int
    num_matvecs: int


def correct(here: Evaluation, ok: Tensor, met: Tensor, per_task: bool) -> Correction:
    """Go on with the linear solve at phi, then with the inner solve and again with the linear one.

    ``met``: where the linear solve met its tolerance.
    """
    known = here.objective.curvature_inverse(here.damping)
    rounding_r, rounding_slope = here.rounding_estimate()
    before = here.gradient(here.u)
    residual, slope = here.b - here.local.matvec(here.u), here.local.grad
    solved = _solve(here.local.matvec, residual, rounding_r, ok, known)
    left = norm(residual)
    lost = solved.failed | (~met & (left <= rounding_r.shown) & (left > MUCH_LEFT * norm(here.b)))
    u = here.u + solved.value
    after = here.gradient(u)
    newton = _newton(here, rounding_slope, ok)
    there = newton.there
    # for the change of u, not for u: a tolerance relative to b would call the change converged before it is looked at
    # nor is what the first solve left counted again
    left = there.b - there.local.matvec(u) - (here.b - here.local.matvec(u))
    left = select(norm(there.phi - here.phi) > 0, left, torch.zeros_like(left))
    moved = _solve(there.local.matvec, left, rounding_r, ok & ~newton.lost, known)
    corrected = there.gradient(u + moved.value)
    lost_phi = newton.lost | moved.failed
    parts = [
        torch.where(ok, torch.where(without, torch.inf, long_norm(part)), torch.nan)
        for part, without in ((after - before, lost), (corrected - after, lost_phi))
    ]
    total = select(lost | lost_phi, torch.full_like(before, torch.inf), corrected - before)
    total = select(ok, total, torch.zeros_like(total))
    hidden = [
        size <= torch.maximum(*rounding)
        for size, rounding in ((norm(residual), rounding_r), (norm(slope), rounding_slope))
    ]
    doubts = Doubts(newton.ran_out & ~(lost | moved.failed), *hidden)
    return Correction(
        total if per_task else total.sum(0),
        (*parts, *(long_norm(v) for v in (before, slope, residual, here.b)), *doubts),
        here.objective.num_grads,
        here.objective.num_matvecs,
    )


class _Newton(NamedTuple):
    """``lost``: where Newton's method met negative curvature or came no nearer. ``ran_out``: of these, where only the number of products
    was in the way. ``there``: the evaluation at the point that it came to.
    """

    lost: Tensor
    ran_out: Tensor
    there: Evaluation


def _newton(origin: Evaluation, rounding: Rounding, ok: Tensor) -> _Newton:
    """One step of Newton's method if that lowers the gradient to a tenth, as it does near a solution; else more, shortened until they
    lower it. Where the gradient may be nothing but rounding it need not become smaller, and a step is what that rounding hides.
    """
    known = origin.objective.curvature_inverse(0.0)
    start, here = norm(origin.local.grad), origin
    lost, far = ~ok, ok & (start > 0)
    shortened, ran_out, hopeless = (torch.zeros_like(ok) for _ in range(3))
    slow = torch.zeros_like(ok, dtype=torch.long)
    for k in range(NEWTON_STEPS):
        # at length for the first one: near a solution it is the only one, and far from it the others would cost as much again
        solved = _solve(here.undamped, -here.local.grad, rounding, far, known, at_length=k == 0, hopeless=hopeless)
        hopeless = hopeless | solved.poor
        lost, far, step, before = lost | solved.failed, far & ~solved.failed, solved.value, norm(here.local.grad)
        shortened = torch.zeros_like(shortened)
        for _ in range(TRIAL_POINTS):
            there = origin.at(here.phi + step)
            slope = norm(there.local.grad)
            worse = far & ~((slope < norm(here.local.grad)) | (slope <= rounding.possible))
            if not bool(worse.any()):
                break
            shortened = shortened | worse
            step = select(worse, SHORTER * step, step)
        here, slope = there, norm(there.local.grad)
        cut = far & solved.ran_out & ~(slope <= 0.5 * torch.minimum(start, before))
        lost, ran_out = lost | cut, ran_out | cut  # as many products again would most likely not help either
        slow = torch.where(shortened & (slope > HARDLY * before), slow + 1, 0)
        stuck = far & (slow >= IN_A_ROW)
        lost, far = lost | stuck, far & ~stuck
        # nor has it arrived while its steps overshoot
        far = far & ~cut & (slope > rounding.possible) & ((slope > FAR_LESS * start) | shortened)
        if not bool(far.any()):
            break
    # where it could not even halve the gradient, or a full step still overshoots, at a kink say, its step says nothing of
    # the distance
    no_nearer = far & (shortened | ~(norm(here.local.grad) <= 0.5 * start))
    return _Newton(lost | no_nearer, ran_out, here)


def _affordable(dim: int) -> int:
    """Products for one solve."""
    return min(STEPS_PER_NUMBER * dim, MOST_NUMBERS // dim)


class _Solved(NamedTuple):
    """``failed``: where CG found no solution. ``ran_out``: where it took all its steps and has not halved b; others end at
    rounding. ``poor``: where the solution does not meet a tolerance. ``value``: the solution, zero where it failed.
    """

    failed: Tensor
    ran_out: Tensor
    poor: Tensor
    value: Tensor


def _solve(
    matvec: Matvec,
    b: Tensor,
    rounding: Rounding,
    ok: Tensor,
    preconditioner: Matvec | None,
    *,
    at_length: bool = True,
    hopeless: Tensor | None = None,
) -> _Solved:
    """A x = b by CG. Also for a b that may be nothing but rounding: x is then the size of what that hides, and zero where CG fails.
    ``hopeless``: where to stop at rounding was of no help with a matrix like this one, and is not tried.
    """
    b = select(ok, b, torch.zeros_like(b))
    unit = torch.where(rounding.shown > 0, rounding.shown, rounding.possible)
    unit = torch.where(unit > 0, unit, 1).unsqueeze(-1)
    solver = CORRECTION
    if at_length:
        solver = replace(solver, max_steps=max(solver.max_steps, _affordable(b.shape[-1])))
    result: Result = solver.solve(matvec, b / unit, preconditioner=preconditioner)
    failed, x = result.failed, result.value
    poor = failed | ~((result.residual <= 1) | converged(result.codes))
    ran_out = poor & (result.steps >= solver.max_steps) & ~(result.residual <= 0.5 * norm(b / unit))
    tried = poor if hopeless is None else poor & (failed | ~hopeless)
    if bool(tried.any()):
        rest = select(tried, b / unit, torch.zeros_like(b))
        again: Result = replace(CORRECTION, atol=TO_ROUNDING).solve(matvec, rest, preconditioner=preconditioner)
        # not where it had nothing to do, because all of b is rounding: zero says less than what the first try has found
        better = tried & converged(again.codes) & ((again.steps > 0) | failed)
        failed, ran_out, poor = failed & ~better, ran_out & ~better, poor & ~better
        x = select(better, again.value, x)
    return _Solved(failed, ran_out, poor, select(failed, torch.zeros_like(b), x * unit))
