"""L-BFGS: a quasi-Newton method with a short memory, and a strong Wolfe line search."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.derivatives import Objective
from bilevel.linsys.base import check_count, check_number, dot, norm, select
from bilevel.solvers.base import IterativeSolver, Local, State, choose, nowhere

SUFFICIENT_DECREASE, CURVATURE = 1e-4, 0.9  # c1 and c2 of the Wolfe conditions
MARGIN, GROWTH = (
    0.1,
    10.0,
)  # a trial keeps this distance to the ends of a bracket; an open bracket grows at most so much


@dataclass(frozen=True)
class _Memory:
    """The last pairs of movement and change of gradient, oldest first; empty places are zero.

    Attributes:
        s, y: ``(*batch, memory, d)``.
        r: ``(*batch, memory, memory)``, the upper triangle of ``s_i . y_j``; the diagonal is zero where a place is empty.
    """

    s: Tensor
    y: Tensor
    r: Tensor

    @staticmethod
    def empty(phi: Tensor, memory: int) -> _Memory:
        rows = phi.new_zeros((*phi.shape[:-1], memory, phi.shape[-1]))
        return _Memory(rows, rows, rows.new_zeros((*phi.shape[:-1], memory, memory)))

    @property
    def is_empty(self) -> Tensor:
        return self.r[..., -1, -1] == 0

    def pushed(self, s: Tensor, y: Tensor) -> _Memory:
        """With the pair as the newest, and without the oldest."""
        all_s = torch.cat([self.s[..., 1:, :], s.unsqueeze(-2)], -2)
        all_y = torch.cat([self.y[..., 1:, :], y.unsqueeze(-2)], -2)
        column = torch.matmul(all_s, y.unsqueeze(-1))
        return _Memory(all_s, all_y, torch.cat([pad(self.r[..., 1:, 1:], (0, 0, 0, 1)), column], -1))

    def direction(self, grad: Tensor) -> Tensor:
        """- (approximate inverse Hessian) grad.

        The two loops over the pairs (Nocedal and Wright 2006, algorithm 7.4) are a back and a forward substitution with r: a few
        products with all pairs at once in place of 4 * memory small ones.
        """
        g, y, s, r = grad.unsqueeze(-1), self.y, self.s, self.r
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        triangle = r + torch.diag_embed((diagonal == 0).to(r.dtype))
        alpha = torch.linalg.solve_triangular(triangle, s @ g, upper=True)
        q = g - y.mT @ alpha
        newest = dot(y[..., -1, :], y[..., -1, :])
        scale = torch.where(newest > 0, diagonal[..., -1] / newest, 1.0)[..., None, None]
        beta = diagonal.unsqueeze(-1) * alpha - scale * (y @ q)
        alpha = torch.linalg.solve_triangular(triangle.mT, beta, upper=False)
        return -(scale * q + s.mT @ alpha).squeeze(-1)


@dataclass(frozen=True)
class _State(State):
    """The search: ``point = phi + length direction``, and a bracket (low, high) that holds a strong Wolfe point. At ``low`` the
    objective is low enough and still falls; at ``high`` it is too large or rises; infinite until such a length was met.
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
    given_up: Tensor  # |grad| at the last search that failed
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
        zero, no = torch.zeros_like(phi[..., 0]), nowhere(phi)
        infinite = zero + torch.inf
        memory = _Memory.empty(phi, self.memory)
        still = torch.zeros_like(phi)
        return _State(
            phi, phi, no, infinite, still, still, zero, zero, zero, zero, infinite, infinite, zero, infinite, memory
        )

    def step(self, objective: Objective, state: _State, local: Local) -> _State:
        first = state.value.isposinf()
        slope = dot(local.grad, state.direction)
        healthy = local.value.isfinite() & slope.isfinite()
        # near the rounding floor of G, where its values say nothing, the slopes decide (Hager and Zhang 2005, section 4)
        noise = 10 * torch.finfo(slope.dtype).eps * state.value.abs()
        low_enough = healthy & (local.value <= state.value + SUFFICIENT_DECREASE * state.length * state.slope + noise)
        s, y = state.point - state.phi, local.grad - state.grad
        sy = dot(s, y)
        convex = sy > torch.finfo(slope.dtype).eps * norm(s) * norm(y)
        falls = slope < CURVATURE * state.slope
        falls = falls & ~(state.memory.is_empty & convex)  # the probe
        rises = slope > -CURVATURE * state.slope
        too_long = ~low_enough | rises
        accept = (first & healthy) | (~too_long & ~falls)
        accept = accept & ~state.stalled
        moved = replace(
            state,
            phi=state.point,
            value=local.value,
            grad=local.grad,
            memory=choose(convex & ~first, state.memory.pushed(s, y), state.memory),
        )
        return choose(accept, _searching(moved), self._next_trial(state, slope, too_long, healthy, first))

    def _next_trial(self, state: _State, slope: Tensor, too_long: Tensor, healthy: Tensor, first: Tensor) -> _State:
        t = state.length
        low, low_slope = torch.where(too_long, state.low, t), torch.where(too_long, state.low_slope, slope)
        high, high_slope = torch.where(too_long, t, state.high), torch.where(too_long, slope, state.high_slope)
        # closed bracket
        width = high - low
        secant = low + width * low_slope / (low_slope - high_slope)
        middle = low + torch.where(healthy, 0.5, MARGIN) * width
        by_secant = secant.isfinite() & (high_slope > 0) & (state.trials % 3 != 2)
        inside = torch.where(by_secant, secant, middle)
        inside = torch.minimum(torch.maximum(inside, low + MARGIN * width), high - MARGIN * width)
        # open bracket
        ahead = t + (t - state.low) * slope / (state.low_slope - slope)
        ahead = torch.where(slope > state.low_slope, ahead, torch.inf).clamp(2 * t, GROWTH * t)
        length = torch.where(high.isfinite(), inside, ahead)
        trials = state.trials + 1
        eps = torch.finfo(t.dtype).eps
        failed = (trials > self.max_backtracks) | (length * norm(state.direction) <= eps * norm(state.phi))
        size = norm(state.grad)
        hopeless = failed & (state.memory.is_empty | (size >= 0.5 * state.given_up))
        again = replace(
            state,
            point=state.phi + length.unsqueeze(-1) * state.direction,
            length=length,
            low=low,
            low_slope=low_slope,
            high=high,
            high_slope=high_slope,
            trials=trials,
        )
        restart = _searching(replace(state, given_up=size, memory=_Memory.empty(state.phi, self.memory)))
        stalled = state.stalled | hopeless | (first & ~healthy)
        new = replace(choose(failed, restart, again), stalled=stalled)
        return replace(new, point=select(stalled, state.phi, new.point))


def _searching(state: _State) -> _State:
    direction = state.memory.direction(state.grad)
    slope = dot(state.grad, direction)
    unit = torch.ones_like(slope)
    eps = torch.finfo(slope.dtype).eps ** 0.5
    probe = eps * (1 + norm(state.phi)) / norm(state.grad)
    probe = torch.where(probe.isfinite(), probe, 1.0)
    length = torch.where(state.memory.is_empty, probe, unit)
    zero = 0 * unit
    return replace(
        state,
        point=state.phi + length.unsqueeze(-1) * direction,
        direction=direction,
        slope=slope,
        length=length,
        low=zero,
        low_slope=slope,
        high=unit + torch.inf,
        high_slope=unit + torch.inf,
        trials=zero,
    )
