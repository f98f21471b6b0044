"""BiCGStab (van der Vorst 1992), preconditioned from the right, over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linsys.base import dot, norm, select
from bilevel.linsys.krylov import MOST_GROWTH, KrylovSolver, Outcome, System
from bilevel.status import Status


@dataclass(frozen=True, kw_only=True)
class BiCGStab(KrylovSolver):
    """Stabilised bi-conjugate gradients for any invertible A (van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992): short recurrences, so
    memory does not grow. Two products per step.

    The residual may rise and fall on the way, and nothing guarantees that it ends. Where the recurrence breaks down (it divides by zero)
    it is started afresh from the point reached, with another shadow residual if need be; where that does not help, as for a
    skew-symmetric A, or where the residual grows until it overflows, the problem fails with ``Status.BREAKDOWN``, or with ``SINGULAR``
    where A maps a direction to zero.

    A preconditioner acts from the right, as in :class:`GMRES`; M need not be symmetric.

    Args:
        max_steps, rtol, atol, preconditioner: see :class:`~bilevel.linsys.krylov.KrylovSolver`.
    """

    requires_symmetric: ClassVar[bool] = False

    def iterate(self, system: System, u: Tensor, r: Tensor) -> Outcome:
        # The letters are those of the paper; r_hat is the shadow residual.
        eps = torch.finfo(u.dtype).eps
        active = norm(r) > system.threshold
        fresh = torch.ones_like(active)  # r_hat and p are to be set to r
        broken = singular = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        r_hat = p = v = r
        size = torch.zeros_like(r[..., 0])
        rho = alpha = omega = torch.ones_like(r[..., 0])
        peak = norm(r)
        for _ in range(system.max_steps):
            if system.finished(active):
                break
            rho_before, rho = rho, dot(r_hat, r)
            fresh = fresh | (rho.abs() <= eps * norm(r_hat) * norm(r))
            r_hat = select(fresh, r, r_hat)
            rho = torch.where(fresh, dot(r, r), rho)
            beta = torch.where(fresh, 0, rho / rho_before * (alpha / omega))
            p = torch.where(fresh.unsqueeze(-1), r, r + beta.unsqueeze(-1) * (p - omega.unsqueeze(-1) * v))
            p_hat = system.precondition(p)
            v = system.matvec(p_hat)
            size = torch.where(active, torch.maximum(size, norm(v) / norm(p_hat)), size)
            sigma = dot(r_hat, v)
            weak = sigma.abs() <= eps * norm(r_hat) * norm(v)
            twisted = fresh & weak & (norm(v) > 0)  # r^T A r = 0: with r + v |r| / |v| as the shadow, nothing is zero
            turn = torch.where(twisted, norm(r) / norm(v), 0).unsqueeze(-1)
            r_hat = torch.where(twisted.unsqueeze(-1), r_hat + turn * v, r_hat)
            sigma, weak = torch.where(twisted, dot(r_hat, v), sigma), weak & ~twisted
            alpha = torch.where(weak, 0, rho / torch.where(weak, 1, sigma))
            half = r - alpha.unsqueeze(-1) * v  # s in the paper
            half_hat = system.precondition(half)
            t = system.matvec(half_hat)
            slope, tt = dot(t, half), dot(t, t)
            over = norm(half) <= system.threshold  # half a step was enough
            slow = slope.abs() <= eps * norm(t) * norm(half)
            omega = torch.where(slow, 0, slope / torch.where(slow, 1, tt))
            singular = singular | (active & ((norm(v) == 0) | ((tt == 0) & ~over)))
            broken = broken | (active & twisted & slow & ~over)
            left = half - omega.unsqueeze(-1) * t
            # A, whose products were numbers before, has none that is not: the residual grew until it overflowed
            broken = broken | (active & (steps > 0) & ~norm(left).isfinite())
            active = active & ~broken & ~singular
            step = alpha.unsqueeze(-1) * p_hat + omega.unsqueeze(-1) * half_hat
            u, r = select(active, u + step, u), select(active, left, r)
            steps = steps + active
            fresh = weak | slow
            peak = torch.maximum(peak, norm(r))
            active = system.going(active, norm(r), steps)
        # a residual that was so large has left its rounding, of which the recurrence knows nothing; where it is measured, that tells
        lost = (norm(r) <= system.threshold) & (peak > MOST_GROWTH * norm(system.b))
        flags = ((lost, Status.MAX_STEPS), (broken, Status.BREAKDOWN), (singular, Status.SINGULAR))
        return Outcome(value=u, residual=norm(r), steps=steps, flags=flags, size=size)
