"""Newton's method for equations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.curvature import Hessian
from bilevel.derivatives import Objective
from bilevel.linsys.base import LinearSolver, Operator, norm, select
from bilevel.linsys.exact import Exact
from bilevel.solvers.base import IterativeSolver, State
from bilevel.solvers.line_search import SUFFICIENT_DECREASE
from bilevel.solvers.masks import nowhere
from bilevel.status import Status

ENOUGH = 0.5
"""A step must lower |F| by this part of what it promises.

The usual 1e-4 lets it run into where F is flat, as an arctangent is, and A next to singular; steps that converge, slowly to a
multiple root too, lower |F| by more.
"""


@dataclass(frozen=True)
class _State(State):
    singular: Tensor  # problems that stopped at a singular A


@dataclass(frozen=True, kw_only=True)
class Newton(IterativeSolver):
    """phi <- phi - t A^{-1} F(phi), with A = dF/dphi and a step length t from backtracking on ``|F|`` (Dennis and Schnabel 1996, ch. 6).

    Quadratic convergence near a regular solution. Where A is singular, or no step length lowers ``|F|``, the problem stops: with
    ``SINGULAR`` or ``DIVERGED``, or, where ``|F|`` may be rounding, with ``LINE_SEARCH_FAILED``, which is no failure.

    Args:
        max_steps: >= 1.
        tol: stop a problem where ``|F| <= tol``; 0 takes all steps.
        linsys: a linear solver that needs no symmetric matrix: ``Exact()``, ``GMRES`` or ``BiCGStab``.
        max_backtracks: halvings of the step before it gives up.
    """

    minimises: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False  # linear solvers are made for values

    max_steps: int = 20
    tol: float = 0.0
    linsys: LinearSolver = field(default_factory=Exact)
    max_backtracks: int = 20

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        check_count("max_backtracks", self.max_backtracks, at_least=0)
        if not isinstance(self.linsys, LinearSolver) or self.linsys.requires_symmetric:
            raise ValueError(
                f"linsys: expected a linear solver that needs no symmetric matrix (Exact, GMRES, BiCGStab), got {self.linsys!r}."
            )
        keep_python_numbers(self)

    def init(self, objective: Objective, phi: Tensor) -> _State:
        return _State(phi, phi, nowhere(phi), nowhere(phi))

    def singular(self, state: _State) -> Tensor:
        return state.singular

    def evaluate(self, objective: Objective, point: Tensor) -> Any:
        return objective.linearise(point, Hessian(), 0.0)

    def rounding(self, objective: Objective, state: State, start: Tensor) -> Tensor | None:
        if not bool(state.stalled.any()):
            return None
        terms = norm(objective.linearise(state.phi, Hessian(), 0.0).matvec(state.phi))  # F adds up about as much
        # Generous: less would fail a root in whose F more terms cancel than A phi shows, more would pass a point that
        # is no root. 10 start: terms as large as F at the start may cancel here
        return torch.finfo(start.dtype).eps * torch.maximum(1e3 * terms, 10 * start)

    def step(self, objective: Objective, state: _State, local: Any) -> _State:
        solved = self.linsys.solve(Operator(local.matvec, symmetric=False), -local.grad)
        direction = select(solved.failed, torch.zeros_like(local.grad), solved.value)
        size = norm(local.grad)
        best, length = state.point, torch.ones_like(size)
        # a truncated solve promises less
        promised = (1 - solved.residual / torch.where(size > 0, size, 1)).clamp(SUFFICIENT_DECREASE, 1)
        searching = ~(state.stalled | solved.failed)
        for _ in range(self.max_backtracks + 1):
            trial = state.point + length.unsqueeze(-1) * direction
            fallen = norm(objective.value_and_grad(trial)[1]) <= (1 - ENOUGH * promised * length) * size
            accept = searching & fallen
            best = select(accept, trial, best)
            searching = searching & ~accept
            if not bool(searching.any()):
                break
            length = torch.where(searching, 0.5 * length, length)
        singular = ~state.stalled & (solved.codes == int(Status.SINGULAR))
        return _State(best, best, state.stalled | solved.failed | searching, state.singular | singular)
