"""GMRES (Saad and Schultz 1986) with restarts, preconditioned from the right, over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel.checks import check_count
from bilevel.linsys.base import norm, not_reduced, rank_rounding, select
from bilevel.linsys.krylov import KrylovSolver, Outcome, System
from bilevel.status import Status


@dataclass(frozen=True, kw_only=True)
class GMRES(KrylovSolver):
    """The smallest residual in the Krylov space of any invertible A (Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986). One product
    per step, and one for each restart.

    Without restarts it ends after d steps at most; between restarts it keeps all vectors, so memory grows with ``restart``. Too small a
    ``restart`` may stall for ever: a whole cycle without progress ends the solve early (``MAX_STEPS``, or ``DIVERGED`` where nothing was
    gained at all). A singular A on whose Krylov space there is nothing to gain any more ends with ``SINGULAR``.

    A preconditioner acts from the right, A M (M^{-1} u) = b, so the residual is that of u; M need not be symmetric.

    Args:
        max_steps, rtol, atol, preconditioner: see :class:`~bilevel.linsys.krylov.KrylovSolver`; max_steps counts over all cycles.
        restart: steps between restarts, >= 1.
    """

    requires_symmetric: ClassVar[bool] = False

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restart", self.restart)

    def iterate(self, system: System, u: Tensor, r: Tensor) -> Outcome:
        residual = norm(r)
        active = residual > system.threshold
        singular = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        system.limit = system.max_steps if system.limit is None else system.limit
        taken = 0
        while taken < system.max_steps if system.fixed_steps else not system.finished(active):
            length = min(self.restart, u.shape[-1])
            if system.fixed_steps:
                length = min(length, system.max_steps - taken)
            cycle = _cycle(system, r, active, steps, length)
            taken += length
            steps = cycle.steps
            u_new = u + cycle.step
            if system.fixed_steps and taken == system.max_steps:
                r_new, residual_new = r, cycle.residual  # the one of the recurrence; the last r is not needed
            else:
                r_new = system.b - system.matvec(u_new)
                residual_new = norm(r_new)
            # it cannot grow, except where rounding has taken over; NaN ends below, for it is above no threshold
            stalled = active & not_reduced(residual_new, residual)
            better = active & ~(residual_new >= residual)  # NaN is for the statuses to report
            u, r = select(better, u_new, u), select(better, r_new, r)
            residual = torch.where(better, residual_new, residual)
            singular = singular | (active & cycle.singular)
            active = system.going(active & ~stalled & ~cycle.singular, residual, steps)
        return Outcome(value=u, residual=residual, steps=steps, flags=((singular, Status.SINGULAR),), measured=True)


class _Cycle(NamedTuple):
    step: Tensor  # (*batch, d)
    residual: Tensor  # (*batch,), as all that follow
    steps: Tensor  # so far, over all cycles
    singular: Tensor


def _cycle(system: System, r: Tensor, active: Tensor, steps: Tensor, length: int) -> _Cycle:
    """Arnoldi from r, and the least-squares problem min |(|r|, 0, ..) - H y| by rotations as the columns of H come."""
    residual = rest = norm(r)  # rest: the last entry of the right-hand side, whose size is the residual
    singular = torch.zeros_like(active)
    rounding = rank_rounding(r)
    size = torch.zeros_like(residual)  # a lower bound of |A M|
    basis = [r / torch.where(residual > 0, residual, 1).unsqueeze(-1)]
    eye = torch.eye(length + 1, dtype=r.dtype, device=r.device).expand(*residual.shape, -1, -1)
    rotations = list(eye.unbind(-2))  # the rows of the product of all rotations
    triangle: list[Tensor] = []  # columns of R
    rhs: list[Tensor] = []
    for j in range(length):
        if system.finished(active):
            break
        w = system.matvec(system.precondition(basis[j]))
        size = torch.maximum(size, norm(w))
        space = torch.stack(basis, -2)  # (*batch, j + 1, d)
        h = torch.zeros_like(space[..., 0])
        for _ in range(2):  # once is not enough (Parlett 1998, section 6.9)
            part = (space @ w.unsqueeze(-1)).squeeze(-1)
            h, w = h + part, w - (space.mT @ part.unsqueeze(-1)).squeeze(-1)
        beta = norm(w)
        column = torch.cat([h, beta.unsqueeze(-1)], -1)
        rotated = (torch.stack(rotations[: j + 2], -2)[..., : j + 2] @ column.unsqueeze(-1)).squeeze(-1)
        top, bottom = rotated[..., j], rotated[..., j + 1]
        pivot = torch.hypot(top, bottom)
        flat = (pivot <= rounding * size) & pivot.isfinite()  # so is then the smallest singular value of A M
        singular = singular | (active & flat)
        active = active & ~flat
        pivot = torch.where(flat, 1, pivot)
        c, s = (top / pivot).unsqueeze(-1), (bottom / pivot).unsqueeze(-1)
        rotations[j : j + 2] = [
            c * rotations[j] + s * rotations[j + 1],
            c * rotations[j + 1] - s * rotations[j],
        ]
        below = torch.zeros_like(eye[..., 0, j + 1 : length])
        triangle.append(torch.cat([rotated[..., :j], pivot.unsqueeze(-1), below], -1))
        rhs.append(
            torch.where(active, c.squeeze(-1) * rest, 0)
        )  # a problem that takes no part gets 0 as its coefficient
        rest = torch.where(active, -s.squeeze(-1) * rest, rest)
        steps = steps + active
        active = system.going(active, rest.abs(), steps)
        basis.append(w / torch.where(beta > 0, beta, torch.inf).unsqueeze(-1))  # 0 where the Krylov space has ended
    # column by column, so that the columns which only other problems needed add exact zeros and nothing to the rounding of this one
    left, step = torch.stack(rhs, -1), torch.zeros_like(r)
    for j in reversed(range(len(triangle))):
        y = (left[..., j] / triangle[j][..., j]).unsqueeze(-1)
        left = left - triangle[j][..., : left.shape[-1]] * y
        step = torch.addcmul(step, y, basis[j])
    # |A M step| <= |r| + |r_new|: a longer step than that allows is the work of a singular value at the rounding level
    singular = singular | ((rounding * size * norm(step) > norm(r) + rest.abs()) & size.isfinite())
    return _Cycle(system.precondition(step), rest.abs(), steps, singular)
