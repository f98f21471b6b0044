"""A symmetric matrix as a multiple of the identity and something of low rank, from a few products: the randomised Nystrom method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linsys.base import Operator, batch_of, from_columns, outside_transforms, to_columns

CUTOFF = 10  # eigenvalues below this multiple of eps |A| are rounding


@dataclass(frozen=True)
class LowRank:
    """A ~ U diag(values) U^T + shift I.

    Attributes:
        vectors: U, with orthonormal columns ``(*batch, d, k)``.
        values: not negative, in descending order ``(*batch, k)``; 0 where the rank is lower.
        shift: ``(*batch,)``.
        indefinite: A is not positive semi-definite, as its smallest Ritz value shows ``(*batch,)``.
        finite: no product had a NaN or an infinity ``(*batch,)``; where one had, the rest is meaningless.
    """

    vectors: Tensor
    values: Tensor
    shift: Tensor
    indefinite: Tensor
    finite: Tensor

    def solve(self, v: Tensor, eigenvalues: Tensor, rest: Tensor) -> Tensor:
        """U diag(1 / eigenvalues) U^T v + (v - U U^T v) / rest, for v ``(*axes, *batch, d)``."""
        x = to_columns(v, self.finite.shape)
        coefficients = self.vectors.mT @ x
        left = x - self.vectors @ coefficients
        # twice, so that what cancels in the first line is not divided by a small rest
        left = left - self.vectors @ (self.vectors.mT @ left)
        inside = self.vectors @ (coefficients / eigenvalues.unsqueeze(-1))
        return from_columns(inside + left / rest[..., None, None], v.shape)


def nystrom_approximation(operator: Operator, b: Tensor, rank: int, shift: float, seed: int) -> LowRank:
    """The randomised Nystrom approximation of B = A - shift I (Frangella, Tropp and Udell 2023, Algorithm 2.1), from ``rank`` products.

    B ~ Y (Omega^T Y)^+ Y^T with Y = B Omega and a random orthonormal Omega, which is the same for every problem of a batch. Differences:

    1. The pseudo-inverse leaves eigenvalues of Omega^T Y at the rounding level out, where the paper adds a small shift.
    2. B should be positive semi-definite. The eigenvalues of Omega^T A Omega, Ritz values of A, show where it is not: there the shift
       is lowered to the smallest of them (but not below 0).

    Args:
        operator: A.
        b: a right-hand side ``(*batch, d)``, for its shape, dtype and device.
        rank: columns of Omega; d at most are taken.
        shift: at most the smallest eigenvalue of A.
        seed: of Omega.
    """
    batch, d = batch_of(operator, b), b.shape[-1]
    k = min(rank, d)
    generator = torch.Generator().manual_seed(seed)
    with outside_transforms():
        omega = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64, device="cpu")).Q
    omega = omega.to(b)
    rows = omega.mT.reshape(k, *(1,) * len(batch), d).expand(k, *batch, d)
    product = operator(rows).movedim(0, -1)  # A Omega, (*batch, d, k)
    finite = product.isfinite().all(-1).all(-1)
    product = torch.where(finite[..., None, None], product, omega)
    core = omega.mT @ product
    ritz, rotation = torch.linalg.eigh(0.5 * (core + core.mT))
    level = CUTOFF * torch.finfo(b.dtype).eps * ritz.abs().amax(-1)
    smallest = ritz[..., 0]
    lowered = smallest.clamp(0, shift)
    theta = ritz - lowered.unsqueeze(-1)
    scale = torch.where(theta > level.unsqueeze(-1), theta, torch.inf).rsqrt()  # 0 for what is left out
    factor = (product - lowered[..., None, None] * omega) @ rotation * scale.unsqueeze(-2)
    vectors, roots, _ = torch.linalg.svd(factor, full_matrices=False)
    return LowRank(vectors, roots.square(), lowered, smallest < -level, finite)
