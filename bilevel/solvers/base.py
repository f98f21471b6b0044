"""The loop of every iterative inner solver, written once. A method is a step.

The loop asks the state where it wants the next gradient (``point``), evaluates it there and tells the method, which
answers with the next state. Everything has a batch shape: vectors ``(*batch, d)``, scalars ``(*batch,)``. A problem
that is done keeps its state; what another problem of the batch does changes it by no more than rounding. Where at most
half of the problems are left, and ``tol > 0``, the loop goes on without the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.derivatives import Objective
from bilevel.linsys.base import all_finite, largest, norm, select
from bilevel.result import Result
from bilevel.solvers.line_search import not_above
from bilevel.solvers.masks import choose, compact_batch, gather_rows, nowhere, scatter_rows
from bilevel.status import Status

GROWTH = 1e6
"""A gradient norm that has grown by more than this factor counts as divergence even while it is finite.

Less would call a detour over steep ground a divergence; more would let a method that runs away, and has not overflowed
within its steps, end as one that only needs more of them.
"""

NO_PROGRESS = 1 - 1e-6
"""The factor for methods that make nothing smaller by themselves: an iteration that ends where it began has failed."""


@dataclass(frozen=True)
class State:
    """What a method carries from step to step; methods add fields of their own, each ``(*batch,)`` or ``(*batch, d)``.

    Attributes:
        phi: the best answer so far.
        point: where the next gradient is wanted.
        stalled: problems with which the method cannot go on.
    """

    phi: Tensor
    point: Tensor
    stalled: Tensor

    @staticmethod
    def start(phi: Tensor) -> State:
        """The state of a method that carries nothing else, at the start."""
        return State(phi, phi, nowhere(phi))


@dataclass(frozen=True)
class Run:
    """What a solver found, before the gradient at phi is known: the caller has that gradient anyway, so nobody pays for it twice.

    ``steps`` is ``(*batch,)``; ``start`` is ``|dG/dphi|`` at the start, NaN where nobody measured it.
    """

    phi: Tensor
    converged: Tensor
    stalled: Tensor
    steps: Tensor
    start: Tensor
    negative_curvature: Tensor | None
    tol: float
    growth: float = GROWTH
    measured: bool = True
    """Whether ``converged`` is what gradients of G have shown."""
    rounding: Tensor | None = None
    """Of equations F(phi) = 0: what rounding may leave of ``|F|``. More, where the method can go no further, is no root."""
    singular: Tensor | None = None
    """Where a singular matrix is why the method can go no further ``(*batch,)``."""
    hidden: Tensor | None = None
    """Of fixed points: where phi has become so large that its rounding hides what F was at the start ``(*batch,)``: no solution."""

    def result(self, level: Tensor, grad: Tensor, value: Any, num_grads: int, num_matvecs: int) -> Result:
        """The result with its status, from G ``(*batch,)`` and its gradient ``(*batch, d)`` at phi. Where G is no number, its gradient
        may be zero all the same: a constant in a torch.where.
        """
        # the norm squares its entries; where that underflows, the largest entry counts
        residual = torch.maximum(norm(grad), largest(grad))
        finite = residual.isfinite() & all_finite(self.phi) & level.isfinite()
        # a start at the solution has a gradient of next to nothing, of which any rounding is a large multiple
        floor = torch.finfo(residual.dtype).eps ** 0.5
        codes = torch.full_like(self.steps, int(Status.MAX_STEPS))
        converged = residual <= self.tol  # at the start, say, where nothing has become smaller
        if self.measured:
            converged = converged | self.converged
        stuck = self._stuck(converged, residual)
        for mask, status in (
            (self.stalled, Status.LINE_SEARCH_FAILED),
            (converged, Status.CONVERGED),
            (~converged & (residual > self.growth * self.start.clamp_min(floor)), Status.DIVERGED),
            (stuck, Status.DIVERGED),
            (torch.zeros_like(stuck) if self.hidden is None else self.hidden, Status.DIVERGED),
            (stuck & (False if self.singular is None else self.singular), Status.SINGULAR),
            (~finite & ~self.start.isfinite(), Status.NON_FINITE),
            (~finite & self.start.isfinite(), Status.DIVERGED),
        ):
            codes = torch.where(mask, int(status), codes)
        return Result(
            value=value,
            codes=codes,
            steps=self.steps,
            residual=residual,
            negative_curvature=self.negative_curvature,
            num_grads=num_grads,
            num_matvecs=num_matvecs,
        )

    def _stuck(self, converged: Tensor, residual: Tensor) -> Tensor:
        """Which problems have no solution where they ended, and no rounding explains it."""
        if self.rounding is None:
            return torch.zeros_like(converged)
        return self.stalled & ~converged & (residual > self.rounding)


class InnerSolver(ABC):
    """A procedure that finds a point phi. Subclasses are frozen keyword-only dataclasses; their fields are the
    options.
    """

    minimises: ClassVar[bool] = True
    """Whether it needs an objective to lower. Solvers of equations do not: ``root`` and ``fixed_point`` take only these."""

    @abstractmethod
    def run(self, objective: Objective, phi: Tensor) -> Run:
        """From the start phi ``(*batch, d)`` to an answer."""


class IterativeSolver(InnerSolver):
    """A method given by :meth:`init` and :meth:`step`, and the fields ``max_steps``, ``tol`` and ``check_every``."""

    max_steps: int
    tol: float
    growth: ClassVar[float] = GROWTH
    """A residual that ends larger than this multiple of the first one counts as divergence."""
    differentiable: ClassVar[bool] = True
    """Whether every operation of a step has a derivative, finite wherever the step is: ``unrolled`` takes only these."""
    check_every: int = 1
    """With ``tol > 0`` on an accelerator, how many steps pass between two looks at whether everything is done."""

    @property
    def can_compact(self) -> bool:
        """Whether the loop may go on with fewer problems."""
        return True

    @abstractmethod
    def init(self, objective: Objective, phi: Tensor) -> Any:
        """The state at the start."""

    @abstractmethod
    def step(self, objective: Objective, state: Any, local: Any) -> Any:
        """The next state; ``local`` has ``.value`` ``(*batch,)`` and ``.grad`` ``(*batch, d)`` at ``state.point``."""

    def evaluate(self, objective: Objective, point: Tensor) -> Any:
        """What :meth:`step` is told of ``point``."""
        return Local(*objective.value_and_grad(point))

    def ceiling(self, state: Any) -> Tensor | None:
        """What G may be at most ``(*batch,)`` where the answer is; None: anything.

        A trial that a line search is about to reject may lie uphill on a plateau, where the gradient is as small as at a minimum.
        """
        return None

    def negative_curvature_count(self, state: Any) -> Tensor | None:
        """How often each problem met negative curvature; None from a method that cannot see it."""
        return None

    def rounding(self, objective: Objective, state: Any, start: Tensor) -> Tensor | None:
        """Of equations: what rounding may leave of ``|F|`` at a root ``(*batch,)``. ``start`` is ``|F|`` at the start; None: not asked."""
        return None

    def singular(self, state: Any) -> Tensor | None:
        """Where the matrix of the last step was singular ``(*batch,)``; None from a method that has none."""
        return None

    def run(self, objective: Objective, phi: Tensor) -> Run:
        state = self.init(objective, phi)
        active = ~state.stalled
        nobody = torch.zeros_like(active)
        end = self._loop(objective, _Progress(state, active, nobody, nobody.long(), None), 0)
        start = torch.full_like(phi[..., 0], torch.nan) if end.start is None else end.start
        state = end.state
        return Run(
            state.phi,
            end.converged,
            state.stalled,
            end.steps,
            start,
            self.negative_curvature_count(state),
            self.tol,
            self.growth,
            objective.measures,
            self.rounding(objective, state, start),
            self.singular(state),
            _hidden(phi, state.phi, start) if objective.is_displacement else None,
        )

    def _loop(self, objective: Objective, begin: _Progress, first: int) -> _Progress:
        """The steps from number ``first`` on."""
        state, active, converged, steps, start = begin.state, begin.active, begin.converged, begin.steps, begin.start
        seen, unbooked = state.stalled, 0
        # The norm squares its entries; below the root of the smallest number that underflows, so take the largest entry
        # as well, as Run.result does, when tol is that small. Within a factor of 1e3: many small entries may be lost
        exactly = self.tol < 1e3 * torch.finfo(state.phi.dtype).tiny ** 0.5
        cheap = state.phi.device.type == "cpu"  # to look at a number
        for k in range(first, self.max_steps):
            objective.begin_step(k)
            local = self.evaluate(objective, state.point)
            if self.tol > 0:
                residual = norm(local.grad)
                residual = torch.maximum(residual, largest(local.grad)) if exactly else residual
                defined = local.value.isfinite()
                start = torch.where(defined, residual, torch.inf) if start is None else start
                done = active & (residual <= self.tol) & defined
                ceiling = self.ceiling(state)
                done = done if ceiling is None else done & not_above(local.value, ceiling)
                if not cheap or bool(done.any()):
                    converged = converged | done
                    state = replace(state, phi=select(done, state.point, state.phi))
                    active = active & ~done
                active = active & ~state.stalled
                due = k % self.check_every == 0
                left = int(active.sum()) if due or cheap else None
                if left == 0:
                    break
                new = self.step(objective, state, local)
                state = new if left == active.numel() else choose(active, new, state)
                steps = steps + active
                # half: less often would go on with tasks that are done, more often would record and verify more shapes
                if due and left is not None and 2 * left <= active.numel() and self.can_compact:
                    fewer = compact_batch(objective, active, left)
                    if fewer is not None:
                        del local
                        now, (few, rows) = _Progress(state, active, converged, steps, start), fewer
                        end = self._loop(few, gather_rows(now, rows), k + 1)
                        few.verify(end.state.phi)
                        objective.num_grads += few.num_grads
                        objective.num_matvecs += few.num_matvecs
                        return scatter_rows(now, rows, end)
            else:  # without what costs as much as the step itself where the tensors are small
                start = norm(local.grad) if start is None else start
                if state.stalled is not seen:
                    steps, unbooked = steps + unbooked * active, 0
                    active, seen = active & ~state.stalled, state.stalled
                state = self.step(objective, state, local)
                unbooked += 1
            del local  # with its graph, before the next one is built
        return _Progress(state, active, converged, steps + unbooked * active if unbooked else steps, start)


def _hidden(begin: Tensor, end: Tensor, start: Tensor) -> Tensor:
    """Whether a way from ``begin`` has led so far that rounding of phi is as large as F was there; not where it is that from the start."""
    eps, far = torch.finfo(end.dtype).eps, norm(end)
    return (eps * far >= start) & (eps**0.5 * far > norm(begin) + start)


@dataclass(frozen=True)
class _Progress:
    """Where a loop is; ``start`` is None before the first evaluation."""

    state: Any
    active: Tensor
    converged: Tensor
    steps: Tensor
    start: Tensor | None


@dataclass(frozen=True)
class Local:
    """G ``(*batch,)`` and its gradient ``(*batch, d)`` at a point."""

    value: Tensor
    grad: Tensor
