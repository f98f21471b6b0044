"""The Neumann series: u = a sum_k (I - a A)^k b."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, check_rtol, keep_python_numbers
from bilevel.isolation import precise
from bilevel.linsys.base import (
    LinearSolver,
    Matvec,
    all_finite,
    check_system,
    in_own_unit,
    largest,
    left_by,
    mark,
    norm,
    not_reduced,
    select,
    some_direction,
    unit_of,
)
from bilevel.result import Result
from bilevel.status import Status

POWER_STEPS = 12
"""Products for the estimate of the largest eigenvalue, which is never too large.

So a is above 1 / (largest eigenvalue); the series converges below twice that. Each product multiplies the norm by at
least as much as the one before, so the last does by at least c^(1/12) of the largest eigenvalue, with c the part of its
eigenvector in the start. That is more than half for c > 2^-12, and a random direction has a part of about d^(-1/2).
Where it fails all the same, the residual grows, and the status is DIVERGED.
"""


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """Sum the Neumann series of A^{-1} b (Lorraine, Vicol and Duvenaud 2020), which is Richardson's iteration from zero.

    It converges if and only if every eigenvalue of A lies in (0, 2 / step_size). For symmetric A the residual norms of
    the series are log-convex in the number of terms, so a residual that grows once grows for ever: this is how
    ``Status.DIVERGED`` is found. A residual that has not fallen at all (A b = 0) is no better.

    Args:
        num_terms: terms of the series, one product each, >= 1.
        step_size: the factor a; None: 1 / (estimate of the largest eigenvalue of A), which costs 12 products more.
        rtol: stop where ``|b - A u| <= rtol |b|``; 0 takes all terms without reading a number back to the host.
    """

    num_terms: int
    step_size: float | None = None
    rtol: float = 0.0

    def __post_init__(self) -> None:
        check_count("num_terms", self.num_terms)
        check_rtol("rtol", self.rtol)
        if self.step_size is not None:
            check_number("step_size", self.step_size, positive=True)
        keep_python_numbers(self)

    @precise
    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        """As the base class says. A preconditioner is not used."""
        check_system(b, init)
        matvec = self.operator(matvec)
        b, unit = in_own_unit(b)
        x, r = torch.zeros_like(b), b
        if init is not None:
            left, helps = left_by(init, matvec, b, unit)
            x, r = select(helps, init / unit, x), select(helps, left, r)
        num_matvecs = 0 if init is None else 1
        if self.step_size is None:
            a = 1 / largest_eigenvalue(matvec, b)
            num_matvecs += POWER_STEPS
        else:
            a = torch.full_like(b[..., 0], self.step_size)
        threshold = self.rtol * norm(b)
        residual = norm(r)
        start = norm(b)
        healthy = residual.isfinite()  # b and the first product are finite
        active = residual > threshold
        growing = torch.zeros_like(active)
        steps = torch.zeros_like(active, dtype=torch.int64)
        # below this a growing residual is rounding
        floor = 100 * torch.finfo(b.dtype).eps * norm(b)
        for k in range(self.num_terms):
            if self.rtol > 0 and not bool(active.any()):
                break
            x = select(active, x + a.unsqueeze(-1) * r, x)
            product = matvec(r)
            num_matvecs += 1
            if k == 0:
                healthy = healthy & all_finite(product)
            r = select(active, r - a.unsqueeze(-1) * product, r)
            steps = steps + active
            new = norm(r)
            growing = growing | (active & (new > residual) & (new > floor))
            residual = new
            active = active & ~(residual <= threshold)
        if self.rtol > 0:
            residual = norm(b - matvec(x))
            num_matvecs += 1
        codes = torch.full_like(steps, int(Status.MAX_STEPS))
        codes = mark(codes, not_reduced(residual, start), Status.DIVERGED)
        codes = mark(codes, residual <= threshold, Status.CONVERGED)
        codes = mark(codes, growing, Status.DIVERGED)
        x = x * unit
        finite = residual.isfinite() & all_finite(x)
        codes = mark(codes, ~finite, Status.DIVERGED)
        codes = mark(codes, ~finite & ~healthy, Status.NON_FINITE)
        residual = residual * unit.squeeze(-1)
        return Result(value=x, codes=codes, steps=steps, residual=residual, num_matvecs=num_matvecs)


def largest_eigenvalue(matvec: Matvec, b: Tensor) -> Tensor:
    """An estimate ``(*batch,)`` of max |eigenvalue| of a symmetric A by the power method from one fixed
    pseudo-random start.
    """
    v = some_direction(b).expand_as(b)
    for _ in range(POWER_STEPS):
        av = matvec(v / norm(v).unsqueeze(-1))
        unit = unit_of(largest(av))
        v = av / unit
        estimate = norm(v) * unit.squeeze(-1)
    # one for A = 0, where any step is as good
    return torch.where(estimate > 0, estimate, 1.0)
