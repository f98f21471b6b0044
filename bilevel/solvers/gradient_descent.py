"""Gradient descent on G, with a fixed step size or with backtracking."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.derivatives import Objective
from bilevel.linsys.base import dot, norm, select
from bilevel.solvers.base import IterativeSolver, Local, Run, State
from bilevel.solvers.line_search import SUFFICIENT_DECREASE, hidden_in_terms, initial_step_size, not_above
from bilevel.solvers.masks import nowhere

# about three accepted steps make up for one halving; a larger GROW would have more trials rejected, a gradient each
GROW, SHRINK = 1.25, 0.5


@dataclass(frozen=True)
class _State(State):
    step_size: Tensor
    value: Tensor  # G at phi; infinite before the first evaluation
    grad: Tensor  # dG/dphi at phi; zeros before
    square: Tensor  # its square, and its norm: not the root of `square`, which rounds otherwise, and of one entry underflows
    size: Tensor


@dataclass(frozen=True)
class _Slope:
    grad: Tensor


@dataclass(frozen=True, kw_only=True)
class GradientDescent(IterativeSolver):
    """phi <- phi - step_size dG/dphi; with a fixed step size the inner solver of iMAML-GD (paper, section 4).

    Args:
        step_size: fixed, > 0; stable below 2 / (largest eigenvalue of the Hessian of G). None: backtracking. Then each
            problem has a step size of its own; a trial that does not lower G enough is a step that halves it, an
            accepted one lets it grow.
        max_steps: gradient evaluations, >= 1; with ``step_size=None`` two more, for the first step size.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps without reading a number back to the host.
        check_every: with ``tol > 0`` on an accelerator, steps between two looks at whether all problems are done. On the CPU every step.
    """

    step_size: float | None
    max_steps: int
    tol: float = 0.0
    check_every: int = 10

    def __post_init__(self) -> None:
        if self.step_size is not None:
            check_number("step_size", self.step_size, positive=True)
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        check_count("check_every", self.check_every)
        keep_python_numbers(self)

    def run(self, objective: Objective, phi: Tensor) -> Run:
        if self.step_size is None or self.tol > 0:
            return super().run(objective, phi)
        quadratic = objective.written_down(phi, self.max_steps)
        if quadratic is None:
            return super().run(objective, phi)
        # the same steps; each is one affine map of the way from phi
        hessian, grad = quadratic
        way = shift = -self.step_size * grad
        step = torch.eye(phi.shape[-1], dtype=phi.dtype, device=phi.device) - self.step_size * hessian
        for _ in range(self.max_steps - 1):
            way = torch.addmv(shift, step, way) if way.ndim == 1 else shift + (step @ way.unsqueeze(-1)).squeeze(-1)
        nobody = nowhere(phi)
        steps = torch.full_like(nobody, self.max_steps, dtype=torch.int64)
        return Run(phi + way, nobody, nobody, steps, norm(grad), None, self.tol)

    def init(self, objective: Objective, phi: Tensor) -> State:
        if self.step_size is not None:
            return State.start(phi)
        infinite = torch.full_like(phi[..., 0], torch.inf)
        step_size, grad = initial_step_size(objective, phi), torch.zeros_like(phi)
        return _State(phi, phi, nowhere(phi), step_size, infinite, grad, infinite, infinite)

    def ceiling(self, state: State) -> Tensor | None:
        if not isinstance(state, _State):
            return None
        return state.value + hidden_in_terms(state.phi, state.step_size)

    def evaluate(self, objective: Objective, point: Tensor) -> Local | _Slope:
        if self.step_size is not None and self.tol == 0:  # a step that does not look at G
            return _Slope(objective.gradient(point))
        return super().evaluate(objective, point)

    def step(self, objective: Objective, state: State, local: Local) -> State:
        if isinstance(state, _State):
            return self._backtrack(state, local)
        phi = torch.add(state.point, local.grad, alpha=-self.step_size)  # type: ignore[operator]
        if self.tol == 0:  # NaN spreads by itself
            return State(phi, phi, state.stalled)
        return replace(state, phi=phi, point=phi, stalled=state.stalled | ~local.value.isfinite())

    @staticmethod
    def _backtrack(state: _State, trial: Local) -> _State:
        """Take the trial if it lowers G enough, and choose the next one."""
        usable = trial.value.isfinite()
        first = state.value.isposinf() & ~state.stalled  # stalled: G was infinite at the start
        slope = state.step_size * state.square
        eps = torch.finfo(slope.dtype).eps
        # near the rounding floor of G, where the test on G says nothing, the gradient decides: smaller, or no less steep along the step,
        # as on the way down from a saddle
        at_floor = slope <= 10 * eps * state.value.abs()
        highest = state.value + hidden_in_terms(state.phi, state.step_size)
        size, hidden = norm(trial.grad), eps * norm(state.phi)
        falls = (size < state.size) & not_above(trial.value, highest)
        moves = state.step_size * state.size > hidden
        falls = falls | ((dot(trial.grad, state.grad) >= state.square) & moves & (trial.value <= state.value))
        enough = trial.value <= state.value - SUFFICIENT_DECREASE * slope
        # a start where G is no number keeps a gradient of zeros: not NaN, which would be the next point that G is asked at
        accept = usable & (first | torch.where(at_floor, falls, enough))
        step_size = torch.where(
            first, state.step_size, torch.where(accept, GROW * state.step_size, SHRINK * state.step_size)
        )
        phi = select(accept, state.point, state.phi)  # at first they are the same
        grad = select(accept, trial.grad, state.grad)
        square = torch.where(accept, dot(trial.grad, trial.grad), state.square)
        value, size = torch.where(accept, trial.value, state.value), torch.where(accept, size, state.size)
        negligible = step_size * size <= hidden  # asked where phi and the gradient stay
        stalled = state.stalled | torch.where(first, ~usable, ~accept & negligible)
        point = torch.addcmul(phi, torch.where(stalled, 0, step_size).unsqueeze(-1), grad, value=-1)
        return replace(
            state,
            phi=phi,
            point=point,
            stalled=stalled,
            step_size=step_size,
            value=value,
            grad=grad,
            square=square,
            size=size,
        )
