"""Conjugate gradients (Hestenes and Stiefel 1952), preconditioned, over a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linsys.base import LinearSolver, Matvec, check_count, check_number, check_system, dot, mark, norm, select
from bilevel.result import Result, Status


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients for symmetric positive definite A; the solver of the paper (section 3.1).

    Stops where ``|b - A u| <= max(rtol |b|, atol)``. With ``rtol = atol = 0`` it takes ``max_steps`` steps without
    reading a number back to the host, and reports the residual of the recurrence instead of spending a product on the
    true one.

    Negative curvature (p^T A p <= 0) shows that A is not positive definite. Then the problem fails with
    ``Status.NEGATIVE_CURVATURE``, or with ``SINGULAR`` where A p = 0; unless ``steihaug=True``.

    Args:
        max_steps: at most this many products, >= 1.
        rtol: tolerance relative to ``|b|``.
        atol: absolute tolerance.
        steihaug: keep the iterate found before the negative curvature (Steihaug 1983; at the very first direction: M b,
            with M the
            preconditioner) and end with ``Status.STOPPED_AT_NEGATIVE_CURVATURE``, which is no failure. Without a
            preconditioner there is nothing to keep at the first direction, and it fails all the same.
    """

    max_steps: int
    rtol: float = 1e-6
    atol: float = 0.0
    steihaug: bool = False

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_number("rtol", self.rtol)
        check_number("atol", self.atol)

    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        check_system(b, init)
        fixed_steps = self.rtol == 0 and self.atol == 0
        threshold = (self.rtol * norm(b)).clamp_min(self.atol)
        # below the rounding floor the directions are noise, and the curvature along noise says nothing
        threshold = torch.maximum(threshold, torch.finfo(b.dtype).eps * norm(b))
        x = torch.zeros_like(b) if init is None else init
        r = b if init is None else b - matvec(x)
        z = r if preconditioner is None else preconditioner(r)
        p, rz = z, dot(r, z)
        active = norm(r) > threshold  # False for NaN, which the statuses below report
        stopped = torch.zeros_like(active)  # at negative curvature
        singular = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        num_matvecs = 0 if init is None else 1
        for _ in range(self.max_steps):
            if not fixed_steps and not bool(active.any()):
                break
            ap = matvec(p)
            num_matvecs += 1
            curvature = dot(p, ap)
            bad = active & (curvature <= 0)
            stopped = stopped | bad
            singular = singular | (bad & (norm(ap) == 0))
            if self.steihaug and preconditioner is not None:
                x = select(bad & (steps == 0), x + z, x)
            active = active & ~bad
            steps = steps + active
            # one pass for each vector: a problem that is done keeps its iterate because its alpha is zero, and its direction, finite as
            # it is, does no harm
            alpha = torch.where(active, rz / curvature, 0).unsqueeze(-1)
            x = torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, ap, value=-1)
            z = r if preconditioner is None else preconditioner(r)
            rz_new = dot(r, z)
            p = torch.addcmul(z, torch.where(active, rz_new / rz, 0).unsqueeze(-1), p)
            rz = rz_new
            active = active & (norm(r) > threshold)
        if not fixed_steps:
            r = b - matvec(x)
            num_matvecs += 1
        residual = norm(r)
        codes = torch.full_like(steps, int(Status.MAX_STEPS))
        codes = mark(codes, residual <= threshold, Status.CONVERGED)
        kept = stopped & ((steps > 0) | (preconditioner is not None)) if self.steihaug else torch.zeros_like(stopped)
        codes = mark(codes, stopped, Status.NEGATIVE_CURVATURE)
        codes = mark(codes, singular, Status.SINGULAR)
        codes = mark(codes, kept, Status.STOPPED_AT_NEGATIVE_CURVATURE)
        codes = mark(codes, ~(residual.isfinite() & x.isfinite().all(-1)), Status.NON_FINITE)
        return Result(
            value=x,
            codes=codes,
            steps=steps,
            residual=residual,
            num_matvecs=num_matvecs,
            negative_curvature=stopped.long(),
        )
