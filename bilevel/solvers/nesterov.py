"""Nesterov's accelerated gradient descent on G."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.derivatives import Objective
from bilevel.linsys.base import check_count, check_number, dot
from bilevel.solvers.base import IterativeSolver, Local, State, choose, initial_step_size, nowhere


@dataclass(frozen=True)
class _State(State):
    step_size: Tensor
    t: Tensor  # the sequence of Nesterov 1983 that gives the momentum (t_k - 1) / t_{k+1}


@dataclass(frozen=True, kw_only=True)
class NesterovAGD(IterativeSolver):
    """Accelerated gradient descent; O(sqrt(kappa)) steps (paper, Lemma 2; Nesterov 2004, section 2.2).

    The momentum is (1 - q) / (1 + q) with q = sqrt(strong_convexity * step_size) where the constant is known,
    ``momentum`` where it is given, and else Nesterov's growing sequence, restarted for each problem whenever the
    gradient points against the last movement (O'Donoghue and Candes 2015), which needs no constant.

    Args:
        step_size: 1 / (largest eigenvalue of the Hessian of G); None: backtracking for each problem.
        max_steps: gradient evaluations, >= 1.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps without reading a number back to the host.
        check_every: with ``tol > 0``, steps between two looks at whether all problems are done.
        strong_convexity: mu, the smallest eigenvalue of the Hessian of G; at most 1 / step_size.
        momentum: a fixed momentum in [0, 1).
    """

    step_size: float | None
    max_steps: int
    tol: float = 0.0
    check_every: int = 10
    strong_convexity: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.step_size is not None:
            check_number("step_size", self.step_size, positive=True)
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        check_count("check_every", self.check_every)
        if self.strong_convexity is not None and self.momentum is not None:
            raise ValueError("expected strong_convexity or momentum, got both: the one determines the other.")
        if self.strong_convexity is not None:
            check_number("strong_convexity", self.strong_convexity, positive=True)
            if self.step_size is not None and self.strong_convexity * self.step_size > 1:
                raise ValueError(
                    f"strong_convexity: expected at most 1 / step_size = {1 / self.step_size:g} (it is the "
                    f"smallest eigenvalue, and step_size "
                    f"at most 1 / the largest), got {self.strong_convexity:g}."
                )
        if self.momentum is not None:
            check_number("momentum", self.momentum)
            if self.momentum >= 1:
                raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum:g}.")

    def init(self, objective: Objective, phi: Tensor) -> _State:
        one = torch.ones_like(phi[..., 0])
        step_size = initial_step_size(objective, phi) if self.step_size is None else one * self.step_size
        return _State(phi, phi, nowhere(phi), step_size, one)

    def step(self, objective: Objective, state: _State, local: Local) -> _State:
        y, grad = state.point, local.grad
        x = y - state.step_size.unsqueeze(-1) * grad
        move = x - state.phi
        if self.momentum is None and self.strong_convexity is None:
            t = torch.where(dot(grad, move) > 0, 1.0, state.t)  # restart
            t_next = 0.5 * (1 + torch.sqrt(1 + 4 * t**2))
            beta = (t - 1) / t_next
        else:
            t_next, beta = state.t, self._momentum(state.step_size)
        stalled = state.stalled | ~local.value.isfinite()
        new = replace(state, phi=x, point=x + beta.unsqueeze(-1) * move, stalled=stalled, t=t_next)
        if self.step_size is not None:
            return new
        # backtracking: the step from y must lower G as a step of 1 / (Lipschitz constant) would
        decrease = 0.5 * state.step_size * dot(grad, grad)
        at_floor = decrease <= 10 * torch.finfo(decrease.dtype).eps * local.value.abs()
        accept = at_floor | (objective.value(x) <= local.value - decrease)
        return replace(
            choose(accept | stalled, new, state), step_size=torch.where(accept, state.step_size, 0.5 * state.step_size)
        )

    def _momentum(self, step_size: Tensor) -> Tensor:
        if self.momentum is not None:
            return torch.full_like(step_size, self.momentum)
        q = torch.sqrt(step_size * self.strong_convexity).clamp_max(1.0)  # type: ignore[operator]
        return (1 - q) / (1 + q)
