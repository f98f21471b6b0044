"""Conjugate gradients (Hestenes and Stiefel 1952), preconditioned, over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linsys.base import dot, norm, select
from bilevel.linsys.krylov import KrylovSolver, Outcome, System
from bilevel.linsys.single import is_single, single_cg
from bilevel.status import Status


@dataclass(frozen=True, kw_only=True)
class CG(KrylovSolver):
    """Conjugate gradients for symmetric positive definite A; the solver of the paper (section 3.1). One product per step.

    Negative curvature (p^T A p <= 0) shows that A is not positive definite. Then the problem fails with
    ``Status.NEGATIVE_CURVATURE``, or with ``SINGULAR`` where A p = 0; unless ``steihaug=True``.

    Args:
        max_steps, rtol, atol, preconditioner: see :class:`~bilevel.linsys.krylov.KrylovSolver`.
        steihaug: keep the iterate found before the negative curvature (Steihaug 1983; at the very first direction: M b, with M the
            preconditioner) and end with ``Status.STOPPED_AT_NEGATIVE_CURVATURE``, which is no failure. Without a
            preconditioner there is nothing to keep at the first direction, and it fails all the same.
    """

    reduces_residual: ClassVar[bool] = False  # it reduces the error in the norm of A
    squares_matrix: ClassVar[bool] = False

    steihaug: bool = False

    def iterate(self, system: System, u: Tensor, r: Tensor) -> Outcome:
        z = system.precondition(r)
        p, rz = z, dot(r, z)
        size = norm(r)
        active = size > system.threshold  # False for NaN, which the statuses report
        not_definite = active & (rz < 0)
        stopped = torch.zeros_like(active)  # at negative curvature
        singular = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        preconditioned = system.preconditioner is not None
        lengths: list[Tensor] = []
        shares: list[Tensor] = []  # of the direction before in the next one
        scales: list[Tensor] = []  # r^T z / z^T z
        first, known = 0, None
        if not preconditioned and is_single(u) and is_single(r):
            begin = single_cg(system.matvec, u, r, float(system.threshold), system.max_steps)
            u, r, p, first, known = begin.x, begin.r, begin.p, begin.taken, begin.ap
            if first:
                z, rz, steps = r, rz.new_tensor(begin.rr), steps + first
                size = rz.sqrt()
                active = size > system.threshold
                lengths, shares = [r.new_tensor(begin.lengths)], [r.new_tensor(begin.shares)]
        for _ in range(first, system.max_steps):
            if system.finished(active):
                break
            ap, known = system.matvec(p) if known is None else known, None
            curvature = dot(p, ap)
            bad = active & (curvature <= 0)
            stopped = stopped | bad
            singular = singular | (bad & (norm(ap) == 0))
            if self.steihaug and preconditioned:
                u = select(bad & (steps == 0), u + z, u)
            active = active & ~bad
            steps = steps + active
            # one pass for each vector: a problem that is done keeps its iterate because its alpha is zero, and its direction, finite as
            # it is, does no harm
            alpha = torch.where(active, rz / curvature, 0).unsqueeze(-1)
            lengths.append(alpha)
            if preconditioned:
                scales.append((rz / dot(z, z)).unsqueeze(-1))
            u = torch.addcmul(u, alpha, p)
            r = torch.addcmul(r, alpha, ap, value=-1)
            z = system.precondition(r)
            rz_new = dot(r, z)
            beta = torch.where(active, rz_new / rz, 0).unsqueeze(-1)
            shares.append(beta)
            p = torch.addcmul(z, beta, p)
            rz = rz_new
            size = norm(r) if preconditioned else rz.sqrt()
            active = system.going(active, size, steps)
            if preconditioned:
                not_definite = not_definite | (active & (rz < 0))
        flags = [(stopped, Status.NEGATIVE_CURVATURE), (singular, Status.SINGULAR)]
        if self.steihaug:
            flags.append((stopped & ((steps > 0) | preconditioned), Status.STOPPED_AT_NEGATIVE_CURVATURE))
        return Outcome(
            value=u,
            residual=size,
            steps=steps,
            flags=tuple(flags),
            negative_curvature=stopped,
            not_definite=not_definite if preconditioned else None,
            size=_largest_quotient(lengths, shares, scales) if lengths else None,
        )


def _largest_quotient(lengths: list[Tensor], shares: list[Tensor], scales: list[Tensor]) -> Tensor:
    """The largest z^T A z / z^T z ``(*batch,)`` that the iteration met, a lower bound of the norm of A.

    z = p - beta p' with p^T A p' = 0, so that z^T A z needs no product: it is r^T z times an entry on the diagonal of Lanczos's matrix,
    1 / alpha + beta / alpha'. What p^T A p shows instead is far below where p has a long part in the null space.
    """
    taken = torch.cat(lengths, -1)
    inverse = torch.where(taken > 0, taken, torch.inf).reciprocal()
    diagonal = torch.cat(shares, -1)[..., :-1] * inverse[..., :-1] + inverse[..., 1:]
    quotients = torch.cat([inverse[..., :1], diagonal], -1)
    if scales:
        quotients = quotients * torch.cat(scales, -1)
    return torch.where(taken > 0, quotients, 0).amax(-1)
