"""The randomised Nystrom preconditioner (Frangella, Tropp and Udell 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.linsys.base import Matvec, Operator
from bilevel.linsys.low_rank import CUTOFF, nystrom_approximation
from bilevel.linsys.preconditioner import Preconditioner


@dataclass(frozen=True, kw_only=True)
class NystromPreconditioner(Preconditioner):
    """For A with eigenvalues that fall fast: takes the ``rank`` largest out of the way (arXiv 2110.02820, eq. 1.3).

    With U diag(l) U^T the Nystrom approximation of A - shift I, and l_k the last of l,

        M = U (diag(l) + shift I)^{-1} U^T + (I - U U^T) / (l_k + shift),

    which is that of the paper times a constant, so that M approximates the inverse of A. Takes ``rank`` products, all at once. It is for
    positive semi-definite A; positive definite it is for any.

    Args:
        rank: >= 1. Worth its products where the eigenvalue number ``rank`` of A is far below the largest.
        shift: what A has on its diagonal besides: the damping, or lambda of a proximal problem. Not above the smallest eigenvalue of A; if
            it is, the smallest Ritz value takes its place.
        seed: of the random sketch, which is the same in every call and for every problem of a batch.
    """

    rank: int
    shift: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_number("shift", self.shift)
        check_count("seed", self.seed, at_least=0)
        keep_python_numbers(self)

    def build(self, operator: Operator, b: Tensor) -> tuple[Matvec, int]:
        """As the base class says.

        Raises:
            ValueError: the operator is not symmetric.
        """
        if not operator.symmetric:
            raise ValueError(
                "NystromPreconditioner needs a symmetric matrix, got one that is declared symmetric=False. Use Jacobi."
            )
        a = nystrom_approximation(operator, b, self.rank, self.shift, self.seed)
        kept = a.values > CUTOFF * torch.finfo(b.dtype).eps * a.values[..., :1]
        last = torch.where(kept, a.values, torch.inf).amin(-1)
        rest = torch.where(last.isfinite(), last, 0) + a.shift
        rest = torch.where(rest > 0, rest, 1)
        eigenvalues = torch.where(kept, a.values + a.shift.unsqueeze(-1), rest.unsqueeze(-1))
        return lambda v: a.solve(v, eigenvalues, rest), a.values.shape[-1]
