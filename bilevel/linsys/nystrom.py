"""The inverse of a low-rank approximation: no iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, check_rtol, keep_python_numbers
from bilevel.isolation import precise
from bilevel.linsys.base import LinearSolver, Matvec, all_finite, check_system, in_own_unit, mark, norm, not_reduced
from bilevel.linsys.low_rank import nystrom_approximation
from bilevel.result import Result
from bilevel.status import Status


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    """u = (H_k + shift I)^{-1} b for A = H + shift I, with H_k the Nystrom approximation of H of rank k (Hataya and Yamada 2023).

    A is the whole matrix: shift says how much of its diagonal is not H. So use it with ``damping=shift``, or on a proximal problem
    with ``shift=lam``. It takes ``rank`` products at once, and one more to measure what is left, ``|b - A u|``. How good u is depends on
    the eigenvalues of H beyond the first ``rank``; it is exact where these are 0, and for rank = d.

    Differences from the paper: H is seen through random directions instead of random columns, for then the basis does not matter; the
    inverse is taken from an eigendecomposition of H_k, which is Woodbury's formula without its cancellation; eigenvalues of A below
    shift count as shift. An A that is seen to be indefinite fails with ``NEGATIVE_CURVATURE``.

    Args:
        rank: >= 1.
        shift: > 0; not above the smallest eigenvalue of A.
        seed: of the random directions, which are the same in every call and for every problem of a batch.
        rtol, atol: the status is CONVERGED where ``|b - A u| <= max(rtol |b|, atol)``, else MAX_STEPS: a larger rank is needed; DIVERGED, a
            failure, where ``|b - A u|`` is no smaller than ``|b|``.
    """

    rank: int
    shift: float
    seed: int = 0
    rtol: float = 1e-6
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_number("shift", self.shift, positive=True)
        check_count("seed", self.seed, at_least=0)
        check_rtol("rtol", self.rtol)
        check_number("atol", self.atol)
        keep_python_numbers(self)

    @precise
    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        """As the base class says. ``init`` and ``preconditioner`` are not used."""
        check_system(b, init)
        operator = self.operator(matvec)
        b, unit = in_own_unit(b)
        a = nystrom_approximation(operator, b, self.rank, self.shift, self.seed)
        u = a.solve(b, (a.values + a.shift.unsqueeze(-1)).clamp_min(self.shift), torch.full_like(a.shift, self.shift))
        u = torch.where(a.finite.unsqueeze(-1), u, torch.nan)
        residual = norm(b - operator(u))
        codes = torch.full(b.shape[:-1], int(Status.MAX_STEPS), dtype=torch.int64, device=b.device)
        codes = mark(codes, not_reduced(residual, norm(b)), Status.DIVERGED)  # zero would be as close, or closer
        codes = mark(codes, a.indefinite, Status.NEGATIVE_CURVATURE)
        wanted = torch.maximum(self.rtol * norm(b), self.atol / unit.squeeze(-1))
        codes = mark(codes, residual <= wanted, Status.CONVERGED)
        u = u * unit
        codes = mark(codes, ~(residual.isfinite() & all_finite(u)), Status.NON_FINITE)
        return Result(
            value=u,
            codes=codes,
            steps=torch.ones_like(codes),
            residual=residual * unit.squeeze(-1),
            num_matvecs=a.values.shape[-1] + 1,
            negative_curvature=a.indefinite.long().expand_as(codes),
        )
