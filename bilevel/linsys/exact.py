"""The dense solve: the whole matrix, one product per column at once, and a factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.isolation import precise
from bilevel.linsys.base import (
    ROUNDING,
    LinearSolver,
    Matvec,
    all_finite,
    batch_of,
    check_system,
    from_columns,
    mark,
    norm,
    some_direction,
    to_columns,
)
from bilevel.result import Result
from bilevel.status import Status


@dataclass(frozen=True, kw_only=True)
class Exact(LinearSolver):
    """Form A (d products at once, d^2 memory for each problem of the batch) and factorise it (Golub and Van Loan,
    Matrix Computations, chapters 3, 4 and 8): once for all right-hand sides of an :class:`~bilevel.linsys.Operator`
    that shares A among them.

    Symmetric A: by Cholesky. Where A is not positive definite it goes on with the eigenvalues: a singular A (an eigenvalue below
    ``4 eps |A|``) fails with ``Status.SINGULAR``; an indefinite one is solved and ends with ``Status.SOLVED_INDEFINITE``, which is no
    failure: the implicit function theorem holds at any regular stationary point, but the point is not a minimum.

    General A (``Operator(..., symmetric=False)``): by LU. Singular where a singular value is below ``4 eps |A|``.

    It looks at numbers, so a ``solve`` of its own raises under ``torch.func.vmap``; give it the batch as leading axes. The other
    transforms go through it, and ``vmap`` of :func:`bilevel.argmin` hands it the batch.
    """

    requires_symmetric: ClassVar[bool] = False

    @precise
    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        """As the base class says. ``init`` and ``preconditioner`` are not used.

        Raises:
            ValueError: A is not symmetric, and the operator does not say so.
        """
        check_system(b, init)
        operator = self.operator(matvec)
        batch, d = batch_of(operator, b), b.shape[-1]
        try:
            eye = torch.eye(d, dtype=b.dtype, device=b.device)
            rows = eye.reshape(d, *(1,) * len(batch), d).expand(d, *batch, d)
            a = operator(rows).movedim(0, -1)  # (*batch, d, d)
        except RuntimeError as error:
            if any(word in str(error) for word in ("allocate", "out of memory", "not enough memory")):
                error.add_note(
                    f"bilevel: Exact() makes a matrix of {d} x {d} numbers for each problem, by {d} products at once. CG needs some "
                    "vectors (of equations: GMRES, BiCGStab)."
                )
            raise
        finite = a.isfinite().all(-1).all(-1)
        a = torch.where(finite[..., None, None], a, eye)
        rhs_finite = all_finite(b)
        rhs = to_columns(torch.where(rhs_finite.unsqueeze(-1), b, 0), batch)
        if operator.symmetric:
            a = _symmetrised(a)
            x, codes = _solve_symmetric(a, rhs)
        else:
            x, codes = _solve_general(a, rhs)
        residual = norm(b - from_columns(a @ x, b.shape))
        finite = finite & rhs_finite
        u = torch.where(finite.unsqueeze(-1), from_columns(x, b.shape), torch.nan)
        codes = codes.expand(finite.shape)
        codes = mark(codes, ~all_finite(u) & (codes != int(Status.SINGULAR)), Status.NON_FINITE)
        codes = mark(codes, ~finite, Status.NON_FINITE)
        residual = torch.where(finite, residual, torch.nan)
        return Result(value=u, codes=codes, steps=torch.ones_like(codes), residual=residual, num_matvecs=d)


def _symmetrised(a: Tensor) -> Tensor:
    asymmetry = (a - a.mT).abs().amax((-2, -1))
    if bool((asymmetry > torch.finfo(a.dtype).eps ** 0.5 * a.abs().amax((-2, -1))).any()):
        raise ValueError(
            "Exact() needs a symmetric matrix, got one that differs from its transpose by more than rounding. If it is meant to, pass "
            "bilevel.linsys.Operator(matvec, symmetric=False). A Hessian never is: then an operator of the objective has a wrong second "
            "derivative (bilevel.testing.check_hypergradient names it; Hessian(product=FiniteDifference()) does without), or the products "
            "are differences in too few digits (use float64)."
        )
    return 0.5 * (a + a.mT)


def _solve_symmetric(a: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """A X = B ``(*batch, d, k)``, and the status of each A ``(*batch,)``."""
    limit = ROUNDING * torch.finfo(a.dtype).eps
    chol, info = torch.linalg.cholesky_ex(a)
    x = torch.cholesky_solve(rhs, chol)
    # at most 1 / (smallest eigenvalue), and not much less for most v: a cheap sign that the eigenvalues must be looked
    # at. The margin of 100 is for a v with little of that eigenvector
    v = some_direction(a[..., 0])
    longest = norm(torch.cholesky_solve(v.expand_as(a[..., 0]).unsqueeze(-1), chol).squeeze(-1)) / norm(v)
    doubtful = (info != 0) | ~(limit * torch.linalg.matrix_norm(a) * longest < 1e-2)
    codes = torch.full_like(info, int(Status.CONVERGED), dtype=torch.int64)
    if bool(doubtful.any()):
        values = torch.linalg.eigvalsh(a)
        singular = values.abs().amin(-1) <= limit * values.abs().amax(-1)
        x = torch.where(doubtful[..., None, None], _by_inverse(a, rhs)[0], x)
        codes = mark(codes, doubtful & (values[..., 0] < 0), Status.SOLVED_INDEFINITE)
        codes = mark(codes, doubtful & singular, Status.SINGULAR)
    return x, codes


def _solve_general(a: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """A X = B ``(*batch, d, k)``, and the status of each A ``(*batch,)``."""
    limit = ROUNDING * torch.finfo(a.dtype).eps
    x, inverse = _by_inverse(a, rhs)
    # the product of these norms is at least the condition number, so a margin of 10 is for rounding alone
    condition = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(inverse)
    doubtful = ~(limit * condition < 0.1)
    codes = torch.full_like(doubtful, int(Status.CONVERGED), dtype=torch.int64)
    if bool(doubtful.any()):
        values = torch.linalg.svdvals(a)
        codes = mark(codes, doubtful & (values[..., -1] <= limit * values[..., 0]), Status.SINGULAR)
    return x, codes


def _by_inverse(a: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """A^{-1} B with one step of refinement, which makes it as good as by substitution up to condition numbers of some 1e10; and A^{-1}.

    torch.linalg.solve and lu_solve are silently wrong under some nestings of torch.func transforms; the inverse is right under all.
    """
    inverse = torch.linalg.inv_ex(a).inverse
    x = inverse @ rhs
    return x + inverse @ (rhs - a @ x), inverse
