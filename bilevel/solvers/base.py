"""The loop of every iterative inner solver, written once. A method is a step.

The loop asks the state where it wants the next gradient (``point``), evaluates it there and tells the method, which
answers with the next state. Everything has a batch shape: vectors ``(*batch, d)``, scalars ``(*batch,)``. A problem
that is done keeps its state; what another problem of the batch does changes it by no more than rounding. Where at most half of the
problems are left, and ``tol > 0``, the loop goes on without the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bilevel.derivatives import Objective
from bilevel.linsys.base import dot, largest, norm, select
from bilevel.result import Result
from bilevel.status import Status
from bilevel.trees import Tree

GROWTH = 1e6
"""A gradient norm that has grown by more than this factor counts as divergence even while it is finite."""

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


def nowhere(phi: Tensor) -> Tensor:
    """A mask ``(*batch,)`` that is False for every problem of the batch."""
    return torch.zeros(phi.shape[:-1], dtype=torch.bool, device=phi.device)


S = TypeVar("S")


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

    def result(self, grad: Tensor, value: Any, num_grads: int, num_matvecs: int) -> Result:
        """The result with its status, from the gradient ``(*batch, d)`` at phi."""
        residual = torch.maximum(norm(grad), largest(grad))  # which squares do not lose below the smallest number
        finite = residual.isfinite() & self.phi.isfinite().all(-1)
        floor = torch.finfo(residual.dtype).eps ** 0.5
        codes = torch.full_like(self.steps, int(Status.MAX_STEPS))
        converged = residual <= self.tol  # at the start, say, where nothing has become smaller
        if self.measured:
            converged = converged | self.converged
        for mask, status in (
            (self.stalled, Status.LINE_SEARCH_FAILED),
            (converged, Status.CONVERGED),
            (~converged & (residual > self.growth * self.start.clamp_min(floor)), Status.DIVERGED),
            (self._stuck(converged, residual), Status.DIVERGED),
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
    """With ``tol > 0``, how many steps pass between two looks at whether everything is done."""

    @property
    def may_leave(self) -> bool:
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

    def counted(self, state: Any) -> Tensor | None:
        """How often each problem met negative curvature; None from a method that cannot see it."""
        return None

    def rounding(self, objective: Objective, state: Any, start: Tensor) -> Tensor | None:
        """Of equations: what rounding may leave of ``|F|`` at a root ``(*batch,)``. ``start`` is ``|F|`` at the start; None: not asked."""
        return None

    def run(self, objective: Objective, phi: Tensor) -> Run:
        state = self.init(objective, phi)
        active = ~state.stalled
        nobody = torch.zeros_like(active)
        end = self._loop(objective, _Progress(state, active, nobody, nobody.long(), None), 0)
        start = torch.full_like(phi[..., 0], torch.nan) if end.start is None else end.start
        state = end.state
        counted, measured = self.counted(state), objective.measures
        return Run(
            state.phi,
            end.converged,
            state.stalled,
            end.steps,
            start,
            counted,
            self.tol,
            self.growth,
            measured,
            self.rounding(objective, state, start),
        )

    def _loop(self, objective: Objective, begin: _Progress, first: int) -> _Progress:
        """The steps from number ``first`` on."""
        state, active, converged, steps, start = begin.state, begin.active, begin.converged, begin.steps, begin.start
        seen, unbooked = state.stalled, 0
        # as Run.result measures it; elsewhere squares below the smallest number are below any tolerance
        exactly = self.tol < 1e3 * torch.finfo(state.phi.dtype).tiny ** 0.5
        for k in range(first, self.max_steps):
            state = objective.begin_step(k, state)
            local = self.evaluate(objective, state.point)
            if self.tol > 0:
                residual = norm(local.grad)
                residual = torch.maximum(residual, largest(local.grad)) if exactly else residual
                start = residual if start is None else start
                done = active & (residual <= self.tol)
                ceiling = self.ceiling(state)
                done = done if ceiling is None else done & not_above(local.value, ceiling)
                converged = converged | done
                state = replace(state, phi=select(done, state.point, state.phi))
                active = active & ~done
                active = active & ~state.stalled
                left = int(active.sum()) if k % self.check_every == 0 else None
                if left == 0:
                    break
                state = choose(active, self.step(objective, state, local), state)
                steps = steps + active
                if left is not None and 2 * left <= active.numel() and self.may_leave:
                    fewer = without_those_that_are_done(objective, active, left)
                    if fewer is not None:
                        del local
                        now, (few, rows) = _Progress(state, active, converged, steps, start), fewer
                        end = self._loop(few, taken(now, rows), k + 1)
                        few.verify(end.state.phi)
                        objective.num_grads += few.num_grads
                        objective.num_matvecs += few.num_matvecs
                        return put(now, rows, end)
            else:  # without what costs as much as the step itself where the tensors are small
                start = norm(local.grad) if start is None else start
                if state.stalled is not seen:
                    steps, unbooked = steps + unbooked * active, 0
                    active, seen = active & ~state.stalled, state.stalled
                state = self.step(objective, state, local)
                unbooked += 1
            del local  # with its graph, before the next one is built
        return _Progress(state, active, converged, steps + unbooked * active if unbooked else steps, start)


def without_those_that_are_done(objective: Objective, active: Tensor, left: int) -> tuple[Objective, Tensor] | None:
    """The objective of the problems that are active, with a few others, and their rows; None if that is not to be had."""
    size = active.numel()
    while (size + 1) // 2 >= left and size > 1:  # few different sizes, for what is recorded for each shape
        size = (size + 1) // 2
    rows = torch.argsort((~active).int().flatten(), stable=True)[:size]
    fewer = objective.only(rows)
    return None if fewer is None else (fewer, rows)


@dataclass(frozen=True)
class _Progress:
    """Where a loop is; ``start`` is None before the first evaluation."""

    state: Any
    active: Tensor
    converged: Tensor
    steps: Tensor
    start: Tensor | None


def taken(state: S, rows: Tensor) -> S:
    """The state of some problems of a batch with one axis."""

    def of_field(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, rows)
        return taken(value, rows) if is_dataclass(value) else value

    return replace(state, **{name: of_field(value) for name, value in _fields(state)})  # type: ignore[type-var]


def put(state: S, rows: Tensor, part: S) -> S:
    """The state with that of some problems in their places."""

    def of_field(old: Any, new: Any) -> Any:
        if isinstance(old, Tensor):
            return old.index_copy(0, rows, new)
        return put(old, rows, new) if is_dataclass(old) else new

    return replace(state, **{name: of_field(old, getattr(part, name)) for name, old in _fields(state)})  # type: ignore[type-var]


def _fields(state: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(state, field.name)) for field in fields(state)]


@dataclass(frozen=True)
class Local:
    """G ``(*batch,)`` and its gradient ``(*batch, d)`` at a point."""

    value: Tensor
    grad: Tensor


def not_above(value: Tensor, other: Tensor) -> Tensor:
    """Where G is no larger, as far as rounding lets it be told; not where it is NaN."""
    return value <= other + 1e3 * torch.finfo(value.dtype).eps * other.abs()


def hidden_in_terms(phi: Tensor, step_size: Tensor) -> Tensor:
    """What rounding may change of G where its terms cancel ``(*batch,)``: they are as large as phi^T H phi, and 1 / |H| as this step."""
    return 10 * torch.finfo(phi.dtype).eps * dot(phi, phi) / step_size


def choose(mask: Tensor, new: S, old: S) -> S:
    """The new state where the mask is set, field by field."""

    def of_field(yes: Any, no: Any) -> Any:
        if yes is no:
            return no
        if not isinstance(no, Tensor):
            return choose(mask, yes, no)
        own = mask if no.ndim == mask.ndim else mask.reshape(mask.shape + (1,) * (no.ndim - mask.ndim))
        return torch.where(own, yes, no)

    names = [field.name for field in fields(old)]  # type: ignore[arg-type]
    return replace(old, **{name: of_field(getattr(new, name), getattr(old, name)) for name in names})  # type: ignore[type-var]


def initial_step_size(objective: Objective, phi: Tensor) -> Tensor:
    """1 / (curvature of G along its gradient) ``(*batch,)``, from one gradient difference: the first trial of a
    line search; 1 where that is no number.
    """
    _, grad = objective.value_and_grad(phi)
    # along anything where the gradient is zero: 0 / 0 would be NaN in the derivative of a path, masked or not
    direction = select(norm(grad) > 0, grad, torch.ones_like(grad))
    size = norm(direction)
    eps = torch.finfo(phi.dtype).eps ** 0.5 * (1 + norm(phi)) / size
    _, ahead = objective.value_and_grad(phi - eps.unsqueeze(-1) * direction)
    curvature = norm(select(ahead.isfinite().all(-1), ahead, grad) - grad) / (eps * size)
    usable = curvature > 0
    step = 1 / torch.where(usable, curvature, 1)
    return torch.where(usable & (step > 0) & step.isfinite(), step, 1.0)


def tree_value(objective: Objective, phi: Tensor) -> Tree:
    """The answer as the user knows it."""
    return objective.flat.phi.unravel(phi)
