"""Conjugate gradients (Hestenes and Stiefel 1952), preconditioned, over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linsys.base import dot, norm, select
from bilevel.linsys.krylov import KrylovSolver, Outcome, System
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
        active = norm(r) > system.threshold  # False for NaN, which the statuses report
        not_definite = active & (rz < 0)
        stopped = torch.zeros_like(active)  # at negative curvature
        singular = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        preconditioned = system.preconditioner is not None
        size = norm(r)
        lengths: list[Tensor] = []
        size_of_a = None  # a lower bound of |A|, from the first product where the lengths of the steps do not tell one
        for _ in range(system.max_steps):
            if system.finished(active):
                break
            ap = system.matvec(p)
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
            if not preconditioned:
                lengths.append(alpha)
            elif size_of_a is None:
                size_of_a = torch.where(active, norm(ap) / norm(p), 0)
            u = torch.addcmul(u, alpha, p)
            r = torch.addcmul(r, alpha, ap, value=-1)
            z = system.precondition(r)
            rz_new = dot(r, z)
            p = torch.addcmul(z, torch.where(active, rz_new / rz, 0).unsqueeze(-1), p)
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
            size=_largest_eigenvalue(torch.cat(lengths, -1)) if lengths else size_of_a,
        )


def _largest_eigenvalue(lengths: Tensor) -> Tensor:
    """A lower bound of that of A, from the lengths ``(*batch, steps)`` of the steps, 0 where none was taken: 1 / length is below an entry
    on the diagonal of Lanczos's matrix.
    """
    return torch.where(lengths > 0, lengths, torch.inf).amin(-1).reciprocal()
