"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.derivatives import Objective
from bilevel.linsys.base import norm
from bilevel.solvers.base import NO_PROGRESS, IterativeSolver, Local, State
from bilevel.solvers.masks import nowhere


@dataclass(frozen=True)
class _State(State):
    previous: Tensor  # the point before this one (*batch, d), NaN at the first
    last: Tensor  # F there
    residuals: Tensor  # differences of successive F, of length one, newest first (*batch, memory, d); zero where there is none yet
    steps: Tensor  # the plain steps from one to the next: what phi - relaxation * F changes by, in the same unit


@dataclass(frozen=True, kw_only=True)
class Anderson(IterativeSolver):
    """Anderson mixing (Anderson 1965; Walker and Ni 2011, "type II").

    The next point is a plain step from that combination of the last points whose residual F, if F were linear, would be the
    smallest. It needs no derivative, and converges for many maps that are no contraction. On a linear problem it is GMRES.

    Args:
        max_steps: evaluations of F, >= 1.
        tol: stop a problem where ``|F| <= tol``; 0 takes all steps without reading a number back to the host.
        memory: differences kept, >= 1; the memory is 2 * memory vectors for each problem.
        relaxation: length of the plain step, > 0.
        check_every: with ``tol > 0`` on an accelerator, steps between two looks at whether all problems are done. On the CPU every step.
    """

    minimises: ClassVar[bool] = False
    growth: ClassVar[float] = NO_PROGRESS

    max_steps: int
    tol: float = 0.0
    memory: int = 5
    relaxation: float = 1.0
    check_every: int = 10

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        check_count("memory", self.memory)
        check_number("relaxation", self.relaxation, positive=True)
        check_count("check_every", self.check_every)
        keep_python_numbers(self)

    def init(self, objective: Objective, phi: Tensor) -> _State:
        none = torch.zeros((*phi.shape[:-1], self.memory, phi.shape[-1]), dtype=phi.dtype, device=phi.device)
        unknown = torch.full_like(phi, torch.nan)
        return _State(phi, phi, nowhere(phi), unknown, unknown, none, none)

    def step(self, objective: Objective, state: _State, local: Local) -> _State:
        x, f = state.point, local.grad
        first = state.last.isnan().all(-1, keepdim=True)
        change = torch.where(first, 0, f - state.last)
        # each difference in its own unit, once for all, so that the normal equations are well scaled
        length = norm(change).unsqueeze(-1)
        none = ~(length > 0) | ~length.isfinite()
        length = torch.where(none, 1, length)  # masked below; 0 / 0 would be NaN in the derivative of a path
        step = x - state.previous - self.relaxation * change  # NaN at the first, where there is none
        residuals = _pushed(state.residuals, torch.where(none, 0, change / length))
        steps = _pushed(state.steps, torch.where(none, 0, step / length))
        weights = _least_squares(residuals, f)
        phi = x - self.relaxation * f - (weights.unsqueeze(-2) @ steps).squeeze(-2)
        stalled = state.stalled | ~local.value.isfinite()
        return _State(phi, phi, stalled, x, f, residuals, steps)


def _pushed(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([row.unsqueeze(-2), rows[..., :-1, :]], dim=-2)


def _least_squares(rows: Tensor, f: Tensor) -> Tensor:
    """The weights ``(*batch, memory)`` that minimise |f - sum_i weights_i rows_i|; rows ``(*batch, memory, d)`` of length one, some zero.

    Normal equations, with a shift that keeps dependent rows from cancelling: an error in the weights costs a little speed and
    no accuracy.
    """
    gram = rows @ rows.mT
    empty = torch.linalg.diagonal(gram) == 0
    shift = 10 * gram.shape[-1] * torch.finfo(f.dtype).eps
    chol, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(empty.to(f.dtype) + shift))
    return torch.cholesky_solve(rows @ f.unsqueeze(-1), chol).squeeze(-1)
