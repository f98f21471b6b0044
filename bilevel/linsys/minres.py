"""MINRES (Paige and Saunders 1975), preconditioned, over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linsys.base import dot, norm, rank_rounding, select
from bilevel.linsys.krylov import KrylovSolver, Outcome, System
from bilevel.status import Status

FLAT = 30
"""Up to so many eps |A| |r|, |A r| is zero as far as Lanczos can tell: it comes from a few sums, each of them rounded.

Fewer let a step pass that spoils a least-squares solution; more would take a small singular value for none.
"""

CLEARLY = 100
"""A r is not zero where it is so much longer than a semi-definite A with r^T A r at the rounding level would allow.

Fewer, and the rounding of r^T A r alone could make a semi-definite A an indefinite one.
"""


@dataclass(frozen=True, kw_only=True)
class MINRES(KrylovSolver):
    """The smallest residual in the Krylov space of a symmetric A that may be indefinite. One product per step.

    On a positive definite A it takes about the steps of CG. On an indefinite one it goes on where CG must stop, and ends with
    ``Status.SOLVED_INDEFINITE``: solved, but the point is not a minimum. It sees every negative eigenvalue that matters to b: where
    r^T A r < 0 for a residual r on its way (Liu and Roosta 2022), which costs nothing.

    On a singular A it finds the solution of least norm if there is one (from a zero start, without preconditioner). If b is not in the
    range of A it stops at a least-squares solution, with ``Status.SINGULAR``: where A maps the residual to nothing, or would map the next
    step to nothing, as far as rounding lets it see.

    With a preconditioner M the residual that it makes small is that in the norm of M; the one that it stops at, and reports, is
    ``|b - A u|``.

    Args:
        max_steps, rtol, atol, preconditioner: see :class:`~bilevel.linsys.krylov.KrylovSolver`.
    """

    recurrence_drifts: ClassVar[bool] = True  # by eps times the square of the condition number

    def iterate(self, system: System, u: Tensor, r: Tensor) -> Outcome:
        # The letters are those of the paper and of SciPy. Lanczos: A V = V T, with T tridiagonal (beta, alpha, beta); T = Q R by the
        # rotations (c, s); W = V R^{-1}. y is M times the next Lanczos vector before it is normalised.
        rounding = rank_rounding(u)
        zero, one = torch.zeros_like(r[..., 0]), torch.ones_like(r[..., 0])
        lanczos, lanczos_before, y = r, torch.zeros_like(r), system.precondition(r)
        beta, not_definite = _root(dot(lanczos, y))
        beta_before, phi_bar, delta_bar, epsilon, c, s = one, beta, zero, zero, -one, zero
        w = w_before = torch.zeros_like(r)
        size, size_t = zero, zero  # lower bounds of |A|, and of |A| in the norm of M
        active = norm(r) > system.threshold
        not_definite = active & not_definite
        negative = singular = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        for k in range(system.max_steps):
            if system.finished(active):
                break
            v = _over(y, beta)
            av = system.matvec(v)
            size = torch.maximum(size, norm(av) / norm(v))
            y = av if k == 0 else av - (beta / beta_before).unsqueeze(-1) * lanczos_before
            alpha = dot(v, y)
            y = y - _over(alpha.unsqueeze(-1) * lanczos, beta)
            lanczos_before, lanczos, y = lanczos, y, system.precondition(y)
            beta_before, (beta, wrong) = beta, _root(dot(lanczos, y))
            not_definite = not_definite | (active & wrong)
            # the last two rotations on the new column of T, then the rotation that removes beta
            delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
            size_t = torch.maximum(size_t, torch.hypot(torch.hypot(alpha, beta), zero if k == 0 else beta_before))
            epsilon_before, epsilon, delta_bar = epsilon, s * beta, -c * beta
            curvature, slope = -c * gamma_bar, torch.hypot(gamma_bar, delta_bar)  # r^T A r / |r|^2 and |A r| / |r|
            negative = negative | (active & _not_semidefinite(curvature, slope, size_t, rounding))
            gamma = torch.hypot(gamma_bar, beta)
            flat = (gamma <= rounding * size_t) & gamma.isfinite()
            gamma = torch.where(flat, 1, gamma)
            c, s = gamma_bar / gamma, beta / gamma
            phi, phi_bar_new = c * phi_bar, s * phi_bar
            w_new = (v - epsilon_before.unsqueeze(-1) * w_before - delta.unsqueeze(-1) * w) / gamma.unsqueeze(-1)
            w_before, w = w, w_new
            r_new = (s * s).unsqueeze(-1) * r - _over((phi_bar_new * c).unsqueeze(-1) * lanczos, beta)
            step = phi.unsqueeze(-1) * w
            # |A step| <= |r| + |r_new|: a longer step than that allows is the work of a singular value at the rounding level
            long = (rounding * size * norm(step) > norm(r) + norm(r_new)) & size.isfinite()
            least = (slope <= FLAT * torch.finfo(u.dtype).eps * size_t) & size_t.isfinite()
            lost = active & (flat | long | least)
            singular = singular | lost
            active = active & ~lost
            u, r = select(active, u + step, u), select(active, r_new, r)
            phi_bar = phi_bar_new
            steps = steps + active
            active = system.going(active, norm(r), steps)
        return Outcome(
            value=u,
            residual=norm(r),
            steps=steps,
            flags=((singular, Status.SINGULAR),),
            negative_curvature=negative,
            not_definite=None if system.preconditioner is None else not_definite,
        )


def _root(squared: Tensor) -> tuple[Tensor, Tensor]:
    """The root of r^T M r, and whether M cannot be positive definite."""
    return squared.clamp_min(0).sqrt(), squared < 0


def _not_semidefinite(curvature: Tensor, slope: Tensor, size: Tensor, rounding: float) -> Tensor:
    """Where no A >= 0 has these Rayleigh quotients: negative, or zero without A r being zero (|A r|^2 <= |A| r^T A r)."""
    zero = (curvature <= rounding * size) & (slope > CLEARLY * rounding**0.5 * size)
    return (curvature < -rounding * size) | zero


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale; 0 where the Krylov space has ended (scale = 0)."""
    return x / torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)
