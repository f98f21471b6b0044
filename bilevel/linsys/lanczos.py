"""The Lanczos process: what a few products say about the eigenvalues of a symmetric matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.checks import check_count
from bilevel.linsys.base import Matvec, check_system, dot, norm, rank_rounding, select


class RitzValues(NamedTuple):
    """Approximate eigenvalues.

    Attributes:
        values: ``(*batch, k)``, ascending.
        residuals: ``(*batch, k)``: some eigenvalue of A is no further from the value than this.
    """

    values: Tensor
    residuals: Tensor


def ritz_values(matvec: Matvec, b: Tensor, num_steps: int) -> RitzValues:
    """Eigenvalues of a symmetric A as seen from the Krylov space of b (Golub and Van Loan 2013, section 10.1).

    The smallest and the largest come near those of A long before num_steps reaches d, always from inside: the smallest is
    never too small (but for rounding), the largest never too large. The basis is reorthogonalised, so there are no ghosts.
    An eigenvector that b has no part of is not seen.

    Args:
        matvec: ``v -> A v`` over ``(*batch, d)``.
        b: start ``(*batch, d)``; not zero.
        num_steps: products; d at most are taken.

    Returns:
        :class:`RitzValues` with k <= num_steps. A Krylov space that ends earlier repeats its largest value; NaN where a product is
        not finite, or b is zero (one, where it has no entries).
    """
    check_system(b, None)
    check_count("num_steps", num_steps)
    if b.shape[-1] == 0:
        nothing = b.new_full((*b.shape[:-1], 1), torch.nan)
        return RitzValues(nothing, nothing.clone())
    num_steps = min(num_steps, b.shape[-1])
    q = b / norm(b).unsqueeze(-1)
    basis, diagonal, off = [q], [], []
    scale = torch.zeros_like(b[..., 0])
    alive = torch.ones_like(scale, dtype=torch.bool)
    for k in range(num_steps):
        v = matvec(q)
        alpha = dot(q, v)
        scale = torch.maximum(scale, norm(v))
        space = torch.stack(basis, dim=-2)  # (*batch, k + 1, d)
        for _ in range(2):  # once is not enough (Parlett 1998, section 6.9)
            v = v - (space.mT @ (space @ v.unsqueeze(-1))).squeeze(-1)
        beta = norm(v)
        # an invariant subspace: what goes on from here would be noise
        ended = beta <= rank_rounding(b) * scale
        diagonal.append(torch.where(alive, alpha, -torch.inf))
        alive = alive & ~ended
        off.append(torch.where(alive, beta, 0))
        q = torch.where(alive.unsqueeze(-1), v / beta.unsqueeze(-1), 0)
        if k + 1 < num_steps:
            basis.append(q)
    return _of_tridiagonal(torch.stack(diagonal, -1), torch.stack(off, -1))


def spread(b: Tensor) -> Tensor:
    """A start for :func:`ritz_values` that has a part of every eigenvector, and at least half of it along b (which may be zero)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(b.shape[-1], generator=generator, dtype=torch.float64, device="cpu").to(b)
    noise = noise / norm(noise)
    along = select(norm(b) > 0, b / norm(b).unsqueeze(-1), torch.zeros_like(b))
    return along + select(
        dot(along, noise.expand_as(b)) < 0, -noise.expand_as(b), noise.expand_as(b)
    )  # never against it


def _of_tridiagonal(diagonal: Tensor, off: Tensor) -> RitzValues:
    """Of matrices ``(*batch, k, k)``. Where the process ended early, -inf marks the tail of the diagonal.

    The last entry of ``off`` leads out of the matrix: times the last entry of an eigenvector it is the residual.
    """
    unused = diagonal == -torch.inf
    t = torch.diag_embed(torch.where(unused, 0, diagonal))
    if t.shape[-1] > 1:
        t = t + torch.diag_embed(off[..., :-1], 1) + torch.diag_embed(off[..., :-1], -1)
    bad = ~(t.isfinite().all(-1).all(-1) & off.isfinite().all(-1))
    t = torch.where(bad[..., None, None], 0, t)
    # the tail gets a value above all others, which is then replaced by the largest of the used ones
    top = t.abs().sum(-1).amax(-1)
    t = t + torch.diag_embed(torch.where(unused, 2 * top.unsqueeze(-1), 0))
    values, vectors = torch.linalg.eigh(t)
    residuals = off[..., -1:].abs() * vectors[..., -1, :].abs()
    used = (~unused).sum(-1, keepdim=True)
    position = torch.minimum(torch.arange(values.shape[-1], device=values.device).expand_as(values), used - 1)
    values, residuals = values.gather(-1, position), residuals.gather(-1, position)
    hidden = bad.unsqueeze(-1)
    return RitzValues(torch.where(hidden, torch.nan, values), torch.where(hidden, torch.nan, residuals))
