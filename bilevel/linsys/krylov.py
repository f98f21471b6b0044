"""What the Krylov methods share: their options, the start, when to stop, and an honest end."""

# No postponed annotations here: subclasses inherit the fields, and sphinx evaluates their annotations in the modules of those.
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, check_rtol, keep_python_numbers
from bilevel.isolation import precise
from bilevel.linsys.base import (
    ROUNDING,
    LinearSolver,
    Matvec,
    Operator,
    all_finite,
    check_system,
    dot,
    in_own_unit,
    left_by,
    long_norm,
    mark,
    norm,
    not_reduced,
    rank_rounding,
    select,
    unit_of_matrix,
)
from bilevel.linsys.preconditioner import Preconditioner, check_preconditioner, prepare
from bilevel.result import Result
from bilevel.status import Status

MUCH = 0.1
"""The part of b that a solve has left when its steps were of little use."""

LITTLE = 0.01
"""The part of b that is left at most by a solve that is an answer, however long it is."""

CLOSE = 2
"""In the place of ROUNDING for CG, which knows the norm of A better: a proximal problem with lambda = 3e-7 |A| in float32 has an answer."""

MOST_GROWTH = 1e3
"""So many eps |b| may be wrong with the residual of a recurrence that is believed to have converged: it may rise so far above |b|, or what
a product measures be so large.
"""

STUCK = 30
"""In the place of ROUNDING, for calling A singular where all steps have left that much of b.

eps |A| |u| is then above |b| / 30, so a few roundings in A u are as large as what is left, and more steps do not help.
"""


@dataclass
class System:
    """A u = b, as an iteration sees it.

    Attributes:
        operator: A.
        preconditioner: ``v -> M v``, or None.
        b: right-hand side ``(*batch, d)``.
        threshold: the residual norm that is small enough ``(*batch,)``.
        fixed_steps: take all steps and read no number back to the host.
        max_steps: that many at most.
        num_matvecs: products so far.
        limit: the steps that each problem may take ``(*batch,)``, where that differs.
        in_units: A and M are divided by powers of two, so that their sizes are near 1.
        unit: that of A ``(*batch, 1)``; None: the first product will show it.
        unit_of_m: that of M, likewise.
    """

    operator: Operator
    preconditioner: Matvec | None
    b: Tensor
    threshold: Tensor
    fixed_steps: bool
    max_steps: int
    num_matvecs: int
    limit: Tensor | int | None = None
    in_units: bool = False
    unit: Tensor | None = None
    unit_of_m: Tensor | None = None

    def matvec(self, v: Tensor) -> Tensor:
        """A v, counted, in the unit of A."""
        self.num_matvecs += 1
        av = self.operator(v)
        if not self.in_units:
            return av
        if self.unit is None:
            self.unit = unit_of_matrix(v, av)
        return av / self.unit

    def precondition(self, v: Tensor) -> Tensor:
        """M v."""
        if self.preconditioner is None:
            return v
        mv = self.preconditioner(v)
        if not self.in_units:
            return mv
        if self.unit_of_m is None:
            self.unit_of_m = unit_of_matrix(v, mv)
        return mv / self.unit_of_m

    def going(self, active: Tensor, residual: Tensor, steps: Tensor) -> Tensor:
        """Which of the active problems go on; none whose residual is NaN."""
        active = active & (residual > self.threshold)
        return active if self.limit is None else active & (steps < self.limit)

    def finished(self, active: Tensor) -> bool:
        """Whether no problem is active any more, where that may be asked."""
        return not self.fixed_steps and not bool(active.any())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an iteration ends with; everything but ``value`` is ``(*batch,)``.

    Attributes:
        value: u ``(*batch, d)``.
        residual: ``|b - A u|`` as the recurrence has it, or measured.
        steps: steps taken.
        flags: what the iteration ran into, the later entry counts; a problem that is solved all the same is not marked.
        negative_curvature: where the iteration saw that A is not positive definite; None if it cannot.
        not_definite: where it saw that M is not positive definite.
        size: a lower bound of the norm of A, for a method that cannot tell by itself that its answer is that of a singular A.
        measured: the residual is the true one.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    flags: tuple[tuple[Tensor, Status], ...]
    negative_curvature: Tensor | None = None
    not_definite: Tensor | None = None
    size: Tensor | None = None
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class KrylovSolver(LinearSolver):
    """The options of every Krylov method.

    Stops where ``|b - A u| <= max(rtol |b|, atol)``, and at ``eps |b|`` at the latest, which counts as converged. Where rounding has led
    the recurrence astray, so that only its own residual is that small, it goes on from there with the true one, as long as that helps.
    With ``rtol = atol = 0`` it takes ``max_steps`` steps without reading a number back to the host, and reports the residual of the
    recurrence instead of spending a product on the true one (MINRES spends it, because rounding grows in its recurrence). A start that
    is no better than zero, in what the method reduces, is not used.

    Args:
        max_steps: at most this many steps, >= 1.
        rtol: tolerance relative to ``|b|``, below 1.
        atol: absolute tolerance.
        preconditioner: :class:`~bilevel.linsys.Jacobi`, :class:`~bilevel.linsys.NystromPreconditioner`, or a function ``v -> M v`` over
            ``(*batch, d)`` with M an approximate inverse of A, symmetric positive definite. It takes the place of the one that a problem
            hands over; None: that one. Products that it takes to build count in ``num_matvecs``.
    """

    reduces_residual: ClassVar[bool] = True
    """Whether a residual that is not below its start means that the method has failed."""

    recurrence_drifts: ClassVar[bool] = False
    """Whether the residual of the recurrence may be far from the true one, and nothing in the iteration shows it."""

    squares_matrix: ClassVar[bool] = True
    """Whether squares of the entries of A occur, which the number format may not hold."""

    max_steps: int
    rtol: float = 1e-6
    atol: float = 0.0
    preconditioner: Preconditioner | Matvec | None = None

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_rtol("rtol", self.rtol)
        check_number("atol", self.atol)
        check_preconditioner(self.preconditioner)
        keep_python_numbers(self)

    @abstractmethod
    def iterate(self, system: System, u: Tensor, r: Tensor) -> Outcome:
        """The iteration from u with r = b - A u."""

    @precise
    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        check_system(b, init)
        operator = self.operator(matvec)
        m, spent = prepare(self.preconditioner, preconditioner, operator, b)
        in_unit, unit = in_own_unit(b)
        system = self._system(operator, m, in_unit, unit.squeeze(-1), spent)
        size, zero = norm(system.b), torch.zeros_like(b)
        start = None
        if init is not None:  # what is solved for is the way from there
            left, helps = left_by(init, operator, system.b, unit)
            system.num_matvecs += 1
            if not self.reduces_residual:  # but u^T A u / 2 - b^T u, which is 0 at zero
                helps = helps | (dot(init / unit, system.b + left) > 0)
            start, system.b = select(helps, init, zero), select(helps, left, system.b)
        end = self.iterate(system, zero, system.b)
        if not (system.fixed_steps or end.measured):
            end = self._refine(system, end)
        elif self.recurrence_drifts:
            end = self._measured(system, end)
        found = self._result(system, end, size)
        value = found.value if system.unit is None else found.value / system.unit
        value = value * unit if start is None else start + value * unit
        codes = mark(found.codes, ~all_finite(value), Status.NON_FINITE)
        return replace(found, value=value, codes=codes, residual=found.residual * unit.squeeze(-1))

    def _system(self, operator: Operator, m: Matvec | None, b: Tensor, unit: Tensor, spent: int) -> System:
        """With the right-hand side in this unit, which is that of the tolerances too."""
        size = norm(b)
        # below the rounding floor the directions are noise
        wanted = torch.maximum(self.rtol * size, self.atol / unit)
        threshold = torch.maximum(wanted, torch.finfo(b.dtype).eps * size)
        fixed_steps = self.rtol == 0 and self.atol == 0
        return System(operator, m, b, threshold, fixed_steps, self.max_steps, spent, in_units=self.squares_matrix)

    def _refine(self, system: System, end: Outcome) -> Outcome:
        """The end with its true residual, after another round wherever only the residual of the recurrence has met the tolerance."""
        r = system.b - system.matvec(end.value)
        residual, claimed = norm(r), end.residual
        while True:
            again = (claimed <= system.threshold) & (residual > system.threshold) & (end.steps < self.max_steps)
            system.limit = self.max_steps - end.steps
            system.max_steps = int(torch.where(again, system.limit, 0).amax())
            if system.max_steps == 0:
                return replace(end, residual=residual)
            more = self.iterate(system, end.value, select(again, r, torch.zeros_like(r)))
            r_new = system.b - system.matvec(more.value)
            # half at least: rounds that gain less would be many, each with the products of a whole solve
            better = again & ((norm(r_new) <= 0.5 * residual) | (norm(r_new) <= system.threshold))
            r, residual = select(better, r_new, r), torch.where(better, norm(r_new), residual)
            claimed = torch.where(better, more.residual, torch.inf)
            end = Outcome(
                value=select(better, more.value, end.value),
                residual=residual,
                steps=end.steps + more.steps,
                flags=tuple((old | new, status) for (old, status), (new, _) in zip(end.flags, more.flags, strict=True)),
                negative_curvature=_either(end.negative_curvature, more.negative_curvature),
                not_definite=_either(end.not_definite, more.not_definite),
                size=end.size,
            )

    def _measured(self, system: System, end: Outcome) -> Outcome:
        """The end with its true residual where the recurrence only believes that it has converged."""
        residual = norm(system.b - system.matvec(end.value))
        much = MOST_GROWTH * torch.finfo(residual.dtype).eps * norm(system.b)
        astray = (end.residual <= system.threshold) & (residual > much)
        flags = ((astray, Status.MAX_STEPS), *end.flags)
        return replace(end, residual=torch.where(astray, residual, end.residual), flags=flags)

    def _without_answer(self, system: System, end: Outcome, codes: Tensor) -> Tensor:
        """Where u is so long that A is singular as far as rounding lets it be told ``(*batch,)``."""
        u, residual, size, eps = end.value, end.residual, norm(system.b), torch.finfo(end.value.dtype).eps
        length = long_norm(u)
        if end.size is None:
            return torch.zeros_like(residual, dtype=torch.bool)
        if not self.reduces_residual:
            # the iterates of CG are no longer than A^{-1} b: so the least eigenvalue is at most |b| / |u|. A small residual shows an
            # answer, which A in other units may have; without a preconditioner it counts only if it is measured
            unmeasured = system.fixed_steps and system.preconditioner is None
            left = torch.full_like(residual, torch.inf) if unmeasured else residual
            return (size <= CLOSE * eps * end.size * length) & (left > LITTLE * size)
        # |A u| <= |b| + |r|: so the least singular value is at most that over |u|
        stuck = (codes == int(Status.MAX_STEPS)) & (residual > MUCH * size)
        most = size + torch.where(stuck, 0, residual)
        bound = torch.where(stuck, STUCK * eps, ROUNDING * eps)
        # what has diverged has failed by any name: the usual bound of the rank tells why
        bound = torch.where(codes == int(Status.DIVERGED), max(ROUNDING * eps, rank_rounding(u)), bound)
        return most <= bound * end.size * length

    def _result(self, system: System, end: Outcome, start: Tensor) -> Result:
        if not system.fixed_steps and end.not_definite is not None and bool(end.not_definite.any()):
            raise ValueError(
                "preconditioner: expected a symmetric positive definite M, got v^T M v < 0 for some v. Jacobi() and "
                "NystromPreconditioner(rank=...) are positive definite for every A."
            )
        u, residual, eps = end.value, end.residual, torch.finfo(end.value.dtype).eps
        converged = residual <= system.threshold
        codes = torch.full_like(end.steps, int(Status.MAX_STEPS))
        if self.reduces_residual:  # no better than zero, and no better than where it began
            codes = mark(codes, not_reduced(residual, start), Status.DIVERGED)
        for mask, status in end.flags:
            codes = mark(codes, mask, status)
        lost = self._without_answer(system, end, codes) & (norm(u) > 0)
        codes = mark(codes, lost, Status.SINGULAR)
        if system.fixed_steps:  # the recurrence may say all the same that it has converged
            for mask, _ in end.flags:
                lost = lost | mask
            converged = converged & ~lost
        if self.reduces_residual:  # rounding led it astray: zero, where it began, is nearer
            worse = residual > norm(system.b) / eps**0.5
            u, residual = select(worse, torch.zeros_like(u), u), torch.where(worse, norm(system.b), residual)
        codes = mark(codes, converged, Status.CONVERGED)
        if end.negative_curvature is not None:
            codes = mark(codes, converged & end.negative_curvature, Status.SOLVED_INDEFINITE)
        codes = mark(codes, ~(residual.isfinite() & all_finite(u)), Status.NON_FINITE)
        return Result(
            value=u,
            codes=codes,
            steps=end.steps,
            residual=residual,
            num_matvecs=system.num_matvecs,
            negative_curvature=None if end.negative_curvature is None else end.negative_curvature.long(),
        )


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a | b
