"""The estimate of the error of a hypergradient: the two parts of :mod:`bilevel.certificates`, computed instead of
bounded.

CG goes on at phi for the linear part; Newton's method from phi, mostly one step, and CG there, for the inner part. What
is below the rounding of a gradient or a product is zero; how much that is, two of them right beside each other show,
because the model of :mod:`bilevel.certificates.evaluation` is one of the worst case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.certificates.evaluation import Evaluation
from bilevel.linsys.base import Matvec, norm, select
from bilevel.linsys.cg import CG
from bilevel.result import Result
from bilevel.status import converged

CORRECTION = CG(max_steps=100, rtol=1e-8)
"""An estimate needs the size of a correction, two digits say. Its relative error is at most rtol times the condition
number, so 1e-8 is enough for them up to a condition number of 1e6. 100 steps limit what a question may cost;
where they do not suffice, the estimate can be too small. How good it is with these: docs/results/certificates.md."""

TO_ROUNDING = CG(max_steps=100, rtol=1e-8, atol=1.0)
"""Where that fails, to the rounding of b, which is the unit of ``atol``: where H is singular, and b has nothing along its null vectors but
rounding, as with softmax and a bias without penalty, every step beyond makes that larger."""

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

SHORTER = 0.25
"""Of a point to the next: half would need twice as many of them to come as near."""


class Correction(NamedTuple):
    """``change``: (better gradient - gradient) ``(*batch, dim theta)``, or its sum over the tasks that are ok.
    ``columns``: the fields of :class:`bilevel.Diagnosis` from ``linear`` to ``rhs``.
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
    lost, change = _solve(here.local.matvec, residual, rounding_r, ok, known)
    left = norm(residual)
    lost = lost | (~met & (left <= rounding_r) & (left > MUCH_LEFT * norm(here.b)))
    u = here.u + change
    after = here.gradient(u)
    lost_phi, there = _newton(here, rounding_slope, ok)
    # for the change of u, not for u: a tolerance relative to b would call the change converged before it is looked at
    left = there.b - there.local.matvec(u)
    left = select(norm(there.phi - here.phi) > 0, left, torch.zeros_like(left))  # else it is what the first solve left
    lost_u, change = _solve(there.local.matvec, left, rounding_r, ok, known)
    corrected = there.gradient(u + change)
    parts = [
        torch.where(ok, torch.where(without, torch.inf, norm(part)), torch.nan)
        for part, without in ((after - before, lost), (corrected - after, lost_phi | lost_u))
    ]
    total = select(lost | lost_phi | lost_u, torch.full_like(before, torch.inf), corrected - before)
    total = select(ok, total, torch.zeros_like(total))
    return Correction(
        total if per_task else total.sum(0),
        (*parts, norm(before), norm(slope), norm(residual), norm(here.b)),
        here.objective.num_grads,
        here.objective.num_matvecs,
    )


def _newton(origin: Evaluation, rounding: Tensor, ok: Tensor) -> tuple[Tensor, Evaluation]:
    """Where Newton's method met negative curvature or came no nearer, and the evaluation at the point that it came to:
    one step if that lowers the gradient to a tenth, as it does near a solution; else more, shortened until they
    lower it.
    """
    known = origin.objective.curvature_inverse(0.0)
    start, here = norm(origin.local.grad), origin
    lost, far, shortened = ~ok, ok & (start > rounding), torch.zeros_like(ok)
    for _ in range(NEWTON_STEPS):
        failed, step = _solve(here.undamped, -here.local.grad, rounding, far, known)
        lost, far = lost | failed, far & ~failed
        shortened = torch.zeros_like(shortened)
        for _ in range(TRIAL_POINTS):
            there = origin.at(here.phi + step)
            worse = far & ~(norm(there.local.grad) < norm(here.local.grad))
            if not bool(worse.any()):
                break
            shortened = shortened | worse
            step = select(worse, SHORTER * step, step)
        here = there
        far = far & (norm(here.local.grad) > FAR_LESS * start)
        if not bool(far.any()):
            break
    # where it could not even halve the gradient, or a full step still overshoots, at a kink say, its step says nothing of
    # the distance
    return lost | (far & (shortened | ~(norm(here.local.grad) <= 0.5 * start))), here


def _solve(
    matvec: Matvec, b: Tensor, rounding: Tensor, ok: Tensor, preconditioner: Matvec | None
) -> tuple[Tensor, Tensor]:
    """Where CG found no solution of A x = b, and x; zero there, and where b is nothing but rounding."""
    b = select(ok & (norm(b) > rounding), b, torch.zeros_like(b))
    unit = torch.where(rounding > 0, rounding, 1).unsqueeze(-1)
    result: Result = CORRECTION.solve(matvec, b / unit, preconditioner=preconditioner)
    failed, x = result.failed, result.value
    poor = failed | ~((result.residual <= 1) | converged(result.codes))
    if bool(poor.any()):
        rest = select(poor, b / unit, torch.zeros_like(b))
        again: Result = TO_ROUNDING.solve(matvec, rest, preconditioner=preconditioner)
        better = poor & converged(again.codes)
        failed, x = failed & ~better, select(better, again.value, x)
    return failed, select(failed, torch.zeros_like(b), x * unit)
