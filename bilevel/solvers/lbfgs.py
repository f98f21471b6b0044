"""L-BFGS: a quasi-Newton method with a short memory, and a strong Wolfe line search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.derivatives import Objective
from bilevel.linsys.base import check_count, check_number, dot, norm, select
from bilevel.solvers.base import IterativeSolver, Local, State, choose, nowhere

SUFFICIENT_DECREASE, CURVATURE = 1e-4, 0.9  # c1 and c2 of the Wolfe conditions
MARGIN, LENGTHEN = 0.1, 10.0  # a trial keeps this distance to the ends of its bracket; an open one grows at most so much


@dataclass(frozen=True)
class _Memory:
    """The last pairs of movement and change of gradient, the newest last.

    Attributes:
        s, y: ``(*batch, memory, d)``.
        r: upper triangle of ``s_i . y_j``, ``(*batch, memory, memory)``; a row of the identity for a place that is not used.
        used: ``(*batch, memory)``.
        scale: ``s . y / y . y`` of the newest pair; 1 without one.
    """

    s: Tensor
    y: Tensor
    r: Tensor
    used: Tensor
    scale: Tensor

    def pushed(self, s: Tensor, y: Tensor, sy: Tensor, yy: Tensor) -> _Memory:
        """With one more pair, without the oldest."""
        rows = torch.cat([self.s[..., 1:, :], s.unsqueeze(-2)], -2)
        used = pad(self.used[..., 1:], (0, 1), value=True)
        column = torch.where(used, (rows @ y.unsqueeze(-1)).squeeze(-1), 0.0).unsqueeze(-1)
        r = torch.cat([pad(self.r[..., 1:, 1:], (0, 0, 0, 1)), column], -1)
        return _Memory(rows, torch.cat([self.y[..., 1:, :], y.unsqueeze(-2)], -2), r, used, sy / yy)

    def cleared(self) -> _Memory:
        """Without pairs."""
        identity = torch.eye(self.r.shape[-1], dtype=self.r.dtype, device=self.r.device).expand_as(self.r)
        return _Memory(self.s, self.y, identity, torch.zeros_like(self.used), torch.ones_like(self.scale))

    def direction(self, grad: Tensor) -> Tensor:
        """- (approximate inverse Hessian) grad.

        The two loops over the pairs (Nocedal and Wright 2006, algorithm 7.4) are a back and a forward substitution with r: a few
        products with all pairs at once instead of 4 * memory small ones.
        """
        used, scale, g = self.used.unsqueeze(-1), self.scale[..., None, None], grad.unsqueeze(-1)
        alpha = torch.linalg.solve_triangular(self.r, torch.where(used, self.s @ g, 0.0), upper=True)
        q = scale * (g - self.y.mT @ alpha)
        beta = self.r.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * alpha - torch.where(used, self.y @ q, 0.0)
        return -(q + self.s.mT @ torch.linalg.solve_triangular(self.r.mT, beta, upper=False)).squeeze(-1)


@dataclass(frozen=True)
class _State(State):
    """``point = phi + length direction``. The bracket (low, high) holds a strong Wolfe point: at ``low`` the objective is low
    enough and still falls, at ``high`` it is too large or rises; ``high`` is infinite until such a length was met.
    """

    value: Tensor  # G at phi; infinite before the first evaluation
    grad: Tensor  # dG/dphi at phi
    direction: Tensor
    slope: Tensor  # grad . direction
    length: Tensor
    low: Tensor
    low_slope: Tensor
    high: Tensor
    high_slope: Tensor
    trials: Tensor  # rejected so far in this search
    given_up: Tensor  # |grad| where a search failed last
    memory: _Memory


@dataclass(frozen=True, kw_only=True)
class LBFGS(IterativeSolver):
    """L-BFGS (Liu and Nocedal 1989) with a strong Wolfe line search; needs no step size and no constant.

    Args:
        max_steps: gradient evaluations, >= 1. A trial of the line search is one; most steps need one.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps without reading a number back to the host.
        memory: pairs kept for each problem, >= 1: 2 * memory vectors like phi.
        check_every: with ``tol > 0``, steps between two looks at whether all problems are done.
        max_backtracks: rejected trials before a line search fails.
    """

    max_steps: int
    tol: float = 0.0
    memory: int = 10
    check_every: int = 10
    max_backtracks: int = 20

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        check_count("memory", self.memory)
        check_count("check_every", self.check_every)
        check_count("max_backtracks", self.max_backtracks)

    def init(self, objective: Objective, phi: Tensor) -> _State:
        pairs = phi.new_zeros((*phi.shape[:-1], self.memory, phi.shape[-1]))
        r, used = pairs.new_zeros((*phi.shape[:-1], self.memory, self.memory)), pairs[..., 0].bool()
        zero, still = phi.new_zeros(phi.shape[:-1]), torch.zeros_like(phi)
        infinite = torch.full_like(zero, torch.inf)
        memory = _Memory(pairs, pairs, r, used, zero).cleared()
        search = dict(length=zero, low=zero, low_slope=zero, high=infinite, high_slope=infinite, trials=zero)
        return _State(
            phi, phi, nowhere(phi), infinite, still, still, zero, given_up=infinite, memory=memory, **search
        )

    def step(self, objective: Objective, state: _State, local: Local) -> _State:
        eps = torch.finfo(state.phi.dtype).eps
        slope = dot(local.grad, state.direction)
        healthy = (local.value.abs() < torch.inf) & (slope.abs() < torch.inf)  # not so for NaN
        # below the noise of G its values say nothing, and the slopes decide (Hager and Zhang 2005, section 4)
        noise = 10 * eps * state.value.abs()
        low_enough = local.value <= state.value + SUFFICIENT_DECREASE * state.length * state.slope + noise
        s, y = state.point - state.phi, local.grad - state.grad
        sy, yy = dot(s, y), dot(y, y)
        convex = sy > eps * norm(s) * yy.sqrt()
        falls = (slope < CURVATURE * state.slope) & ~(convex & ~state.memory.used[..., -1])
        too_long = ~(healthy & low_enough & (slope <= -CURVATURE * state.slope))
        accept = ~(too_long | falls | state.stalled)

        phi, value = select(accept, state.point, state.phi), torch.where(accept, local.value, state.value)
        size = norm(state.grad)
        low, low_slope = torch.where(too_long, state.low, state.length), torch.where(too_long, state.low_slope, slope)
        high, high_slope = torch.where(too_long, state.length, state.high), torch.where(too_long, slope, state.high_slope)
        length = _next_length(state, slope, low, low_slope, high, high_slope, healthy)
        trials = state.trials + 1
        negligible = ~(length * norm(state.direction) > eps * norm(state.phi))
        failed = ~accept & (negligible | (trials > self.max_backtracks))
        hopeless = failed & (~state.memory.used[..., -1] | (size >= 0.5 * state.given_up))
        stalled = state.stalled | hopeless

        grad = select(accept, local.grad, state.grad)
        memory = choose(accept & convex, state.memory.pushed(s, y, sy, yy), state.memory)
        memory = choose(failed, memory.cleared(), memory)
        direction = memory.direction(grad)
        slope = dot(grad, direction)
        probe = eps**0.5 * (1 + norm(phi)) / norm(grad)
        fresh = accept | failed
        first = torch.where(memory.used[..., -1] | ~(probe < torch.inf), 1.0, probe)
        length = torch.where(fresh, first, length)
        return _State(
            phi=phi,
            point=select(stalled, phi, phi + length.unsqueeze(-1) * direction),
            stalled=stalled,
            value=value,
            grad=grad,
            direction=direction,
            slope=slope,
            length=length,
            low=torch.where(fresh, 0.0, low),
            low_slope=torch.where(fresh, slope, low_slope),
            high=torch.where(fresh, torch.inf, high),
            high_slope=torch.where(fresh, torch.inf, high_slope),
            trials=torch.where(fresh, 0.0, trials),
            given_up=torch.where(failed, size, state.given_up),
            memory=memory,
        )


def _next_length(
    state: _State, slope: Tensor, low: Tensor, low_slope: Tensor, high: Tensor, high_slope: Tensor, healthy: Tensor
) -> Tensor:
    """The next trial of a search: where a line through the slopes at the ends is zero, kept inside the bracket."""
    width = high - low
    secant = low + width * low_slope / (low_slope - high_slope)
    by_secant = (high_slope > 0) & (secant < torch.inf) & (state.trials % 3 != 2)
    inside = torch.where(by_secant, secant, low + torch.where(healthy, 0.5, MARGIN) * width)
    inside = torch.minimum(torch.maximum(inside, low + MARGIN * width), high - MARGIN * width)
    t = state.length
    ahead = t + (t - state.low) * slope / (state.low_slope - slope)
    ahead = torch.where(slope > state.low_slope, ahead, torch.inf).clamp(2 * t, LENGTHEN * t)
    return torch.where(high < torch.inf, inside, ahead)
