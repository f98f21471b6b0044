"""The dense solve: the whole matrix, one product per column at once, and a factorisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.linsys.base import LinearSolver, Matvec, check_system, mark, norm
from bilevel.result import Result, Status


@dataclass(frozen=True, kw_only=True)
class Exact(LinearSolver):
    """Form A (d products at once, d^2 memory for each problem of the batch) and solve by Cholesky.

    Where A is not positive definite it goes on with the eigenvalues: a singular A (an eigenvalue below ``d eps |A|``)
    fails with ``Status.SINGULAR``; an indefinite one is solved and ends with ``Status.SOLVED_INDEFINITE``, which is no
    failure: the implicit function theorem holds at any regular stationary point, but the point is no minimum.
    """

    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        """As the base class says. ``init`` and ``preconditioner`` are not used."""
        check_system(b, init)
        d = b.shape[-1]
        eye = torch.eye(d, dtype=b.dtype, device=b.device)
        columns = eye.reshape((d,) + (1,) * (b.ndim - 1) + (d,)).expand((d, *b.shape))
        a = matvec(columns).movedim(0, -1)  # (*batch, d, d)
        finite = a.isfinite().all(-1).all(-1) & b.isfinite().all(-1)
        safe = torch.where(finite[..., None, None], a, eye)
        eps = torch.finfo(b.dtype).eps
        if bool(((safe - safe.mT).abs().amax((-2, -1)) > eps**0.5 * safe.abs().amax((-2, -1))).any()):
            raise ValueError(
                "Exact() needs a symmetric matrix, got one that differs from its transpose by more than rounding."
            )
        safe = 0.5 * (safe + safe.mT)
        chol, info = torch.linalg.cholesky_ex(safe)
        u = torch.cholesky_solve(torch.where(finite[..., None], b, 0).unsqueeze(-1), chol).squeeze(-1)
        pivots = chol.diagonal(dim1=-2, dim2=-1)
        # the squared ratio of the pivots is at most the condition number: a cheap sign that the eigenvalues must be
        # looked at
        doubtful = (info != 0) | ~(pivots.amin(-1) ** 2 > d * eps * pivots.amax(-1) ** 2)
        codes = torch.full(b.shape[:-1], int(Status.CONVERGED), dtype=torch.int64, device=b.device)
        if bool(doubtful.any()):
            values, vectors = torch.linalg.eigh(safe)
            smallest, largest = values.abs().amin(-1), values.abs().amax(-1)
            singular = smallest <= d * eps * largest
            by_eigenvalues = torch.einsum(
                "...ij,...j,...kj,...k->...i", vectors, 1 / values, vectors, torch.where(finite[..., None], b, 0)
            )
            u = torch.where(doubtful[..., None], by_eigenvalues, u)
            codes = mark(codes, doubtful & (values[..., 0] < 0), Status.SOLVED_INDEFINITE)
            codes = mark(codes, doubtful & singular, Status.SINGULAR)
        u = torch.where(finite[..., None], u, torch.nan)
        residual = norm(b - (safe @ u.unsqueeze(-1)).squeeze(-1))
        codes = mark(codes, ~finite, Status.NON_FINITE)
        codes = mark(codes, ~u.isfinite().all(-1) & (codes != int(Status.SINGULAR)), Status.NON_FINITE)
        return Result(value=u, codes=codes, steps=torch.ones_like(codes), residual=residual, num_matvecs=d)
