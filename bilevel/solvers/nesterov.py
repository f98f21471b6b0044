"""Nesterov's accelerated gradient descent on G."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.derivatives import Objective
from bilevel.linsys.base import dot, norm, select
from bilevel.solvers.base import IterativeSolver, Local, State
from bilevel.solvers.line_search import hidden_in_terms, initial_step_size, not_above
from bilevel.solvers.masks import nowhere

# a step size grows by at most this factor, and stays below this part of 1 / (local Lipschitz constant)
GROW, SAFETY = 1.1, 0.9
TOO_LONG = 2.0  # a step that exceeds 1 / (local Lipschitz constant) by this factor is taken again


@dataclass(frozen=True)
class _State(State):
    step_size: Tensor
    t: Tensor  # the sequence of Nesterov 1983 that gives the momentum (t_k - 1) / t_{k+1}


@dataclass(frozen=True)
class _Adaptive(_State):
    """``point`` is a trial from ``base``, by way of ``ahead = base - step_size grad``."""

    base: Tensor
    value: Tensor  # G at the start
    grad: Tensor
    ahead: Tensor
    momentum: Tensor
    started: Tensor


@dataclass(frozen=True, kw_only=True)
class NesterovAGD(IterativeSolver):
    """Accelerated gradient descent; O(sqrt(kappa)) steps (paper, Lemma 2; Nesterov 2004, section 2.2).

    The momentum is (1 - q) / (1 + q) with q = sqrt(strong_convexity * step_size) where the constant is known,
    ``momentum`` where it is given, and else Nesterov's growing sequence, restarted for each problem whenever the
    gradient points against the last movement (O'Donoghue and Candes 2015), which needs no constant.

    Args:
        step_size: 1 / (largest eigenvalue of the Hessian of G); None: each problem has a step size of its own, from the changes of
            the gradient that it meets on its way (as Malitsky and Mishchenko 2020); it falls and grows. Nothing is evaluated for it
            but two gradients before the first step, and one for each step that turns out too long and is taken again.
        max_steps: gradient evaluations, >= 1, without the two before the first step.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps without reading a number back to the host.
        check_every: with ``tol > 0`` on an accelerator, steps between two looks at whether all problems are done. On the CPU every step.
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
                    f"strong_convexity: expected at most 1 / step_size = {1 / self.step_size:g} (it is the smallest "
                    f"eigenvalue, and step_size at most 1 / the largest), got {self.strong_convexity:g}."
                )
        if self.momentum is not None:
            check_number("momentum", self.momentum)
            if self.momentum >= 1:
                raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum:g}.")
        keep_python_numbers(self)

    def init(self, objective: Objective, phi: Tensor) -> _State:
        one, no = torch.ones_like(phi[..., 0]), nowhere(phi)
        if self.step_size is not None:
            return _State(phi, phi, no, self.step_size * one, one)
        step_size = initial_step_size(objective, phi)
        infinite = torch.full_like(one, torch.inf)
        return _Adaptive(phi, phi, no, step_size, one, phi, infinite, torch.zeros_like(phi), phi, 0 * one, no)

    def ceiling(self, state: _State) -> Tensor | None:
        return state.value + hidden_in_terms(state.base, state.step_size) if isinstance(state, _Adaptive) else None

    def step(self, objective: Objective, state: _State, local: Local) -> _State:
        if isinstance(state, _Adaptive):
            return self._adapt(state, local)
        x = state.point - state.step_size.unsqueeze(-1) * local.grad
        move = x - state.phi
        beta, t = self._momentum(local.grad, move, state.t, state.step_size, state.step_size)
        stalled = state.stalled | ~local.value.isfinite()
        return replace(state, phi=x, point=x + beta.unsqueeze(-1) * move, stalled=stalled, t=t)

    def _momentum(
        self, grad: Tensor, move: Tensor, t: Tensor, step_size: Tensor, last_step_size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The momentum after this movement, and the next t (with step sizes that change: Scheinberg, Goldfarb and Bai 2014)."""
        if self.momentum is not None:
            return torch.full_like(t, self.momentum), t
        if self.strong_convexity is not None:
            q = torch.sqrt(step_size * self.strong_convexity).clamp_max(1.0)
            return (1 - q) / (1 + q), t
        t = torch.where(dot(grad, move) >= 0, 1.0, t)  # restart; where the gradient is zero, too
        t_next = 0.5 * (1 + torch.sqrt(1 + 4 * last_step_size / step_size * t**2))
        return (t - 1) / t_next, t_next

    def _adapt(self, state: _Adaptive, local: Local) -> _Adaptive:
        """Judge the step to this point by the Lipschitz constant of the gradient along it, and choose the next."""
        eps, first, old = torch.finfo(state.phi.dtype).eps, ~state.started, state.step_size
        finite = (norm(local.grad) < torch.inf) & local.value.isfinite()
        moved = state.point - state.base
        inverse, decided = _inverse_lipschitz(local.grad - state.grad, moved, eps * norm(state.base))
        decided = decided & ~first
        # uphill of the start there may be a plateau, with no curvature to tell that the step was too long
        uphill = finite & ~not_above(local.value, state.value + hidden_in_terms(state.base, old))
        again = ~first & (~finite | uphill | (decided & (old > TOO_LONG * inverse)))
        shorter = torch.where(finite, torch.minimum(SAFETY * inverse, 0.5 * old), 0.1 * old)
        unseen = (norm(moved) > 1e3 * eps * norm(state.base)) & (norm(local.grad - state.grad) == 0)  # no curvature
        longer = torch.where(decided, torch.minimum(SAFETY * inverse, GROW * old), torch.where(unseen, 2 * old, old))
        step_size = torch.where(again, torch.maximum(shorter, 0.1 * old), longer)

        phi = select(again | first, state.phi, state.ahead)
        base, grad = select(again, state.base, state.point), select(again, state.grad, local.grad)
        value = torch.where(first, local.value, state.value)
        ahead = base - step_size.unsqueeze(-1) * grad
        move = ahead - phi
        beta, t = self._momentum(grad, move, state.t, step_size, old)
        keep = finite & ~uphill
        beta = torch.where(again, torch.where(keep, state.momentum, 0.0), beta)
        t = torch.where(again, torch.where(keep, state.t, 1.0), t)
        negligible = again & ~(step_size * norm(grad) > eps * norm(base))
        stalled = state.stalled | negligible | (first & ~finite)
        point = select(stalled, phi, ahead + beta.unsqueeze(-1) * move)
        return _Adaptive(phi, point, stalled, step_size, t, base, value, grad, ahead, beta, torch.ones_like(first))


def _inverse_lipschitz(change: Tensor, move: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (Lipschitz constant of the gradient along a movement), and where the movement is long enough to tell.

    For convex G the gradient is co-coercive, |change|^2 <= L change . move; elsewhere |change| <= L |move|.
    """
    size, along = norm(change), dot(change, move)
    decided = (norm(move) > 1e3 * rounding) & (size > 0) & (size < torch.inf)
    # quotients of ones where they are not used: 0 / 0 would be NaN in the derivative of the path, mask or not
    size = torch.where(decided, size, 1.0)
    return torch.where(along > 0, along / size**2, norm(move) / size), decided
