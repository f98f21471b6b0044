"""No linear solve at all: A replaced by the part whose inverse the problem knows in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.linsys.base import LinearSolver, Matvec, all_finite, check_system, mark
from bilevel.result import Result
from bilevel.status import Status


@dataclass(frozen=True, kw_only=True)
class Identity(LinearSolver):
    """u = M b, with M the inverse of the known part of A, which the caller hands in as the preconditioner.

    For the proximal problem the known part is the regulariser Lambda, u = Lambda^{-1} dL/dphi, and the gradient is that
    of first-order MAML (paper, Appendix A). The name: I + Lambda^{-1} H is replaced by the identity.

    It spends no product, so ``residual`` is NaN: not measured.

    Raises:
        ValueError: there is no preconditioner (the problem knows no part of its Hessian).
    """

    needs_known_inverse: ClassVar[bool] = True

    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        check_system(b, init)
        if preconditioner is None:
            raise ValueError(
                "Identity() needs a problem that knows part of its Hessian in closed form, as ProximalProblem does; this one does not. "
                "Use CG, Neumann or Exact; or define curvature_product and curvature_inverse, which a regulariser of your own needs too."
            )
        u = preconditioner(b)
        steps = torch.zeros(b.shape[:-1], dtype=torch.int64, device=b.device)
        codes = torch.full_like(steps, int(Status.MAX_STEPS))
        codes = mark(codes, ~all_finite(u), Status.NON_FINITE)
        return Result(value=u, codes=codes, steps=steps, residual=torch.full_like(b[..., 0], torch.nan))
