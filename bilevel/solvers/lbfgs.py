"""L-BFGS: a quasi-Newton method with a short memory, and a strong Wolfe line search."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.derivatives import Objective, is_transformed
from bilevel.linsys.base import dot, norm, select
from bilevel.solvers.base import IterativeSolver, Local, State
from bilevel.solvers.line_search import hidden_in_terms
from bilevel.solvers.masks import choose, nowhere
from bilevel.solvers.wolfe import Search


@dataclass(frozen=True)
class _Memory:
    """The last pairs of movement s and change of gradient y.

    Attributes:
        s, y: ``(*batch, memory + 1, d)``: a ring, and one more row to write what nobody wants to keep.
        r: the upper triangle of ``s_i . y_j``, ``(*batch, memory, memory)``, the newest last; rows of the identity for places that
            are not used.
        count: pairs pushed, ``(*batch,)``.
        scale: ``s . y / y . y`` of the newest pair; 1 without one.
    """

    s: Tensor
    y: Tensor
    r: Tensor
    count: Tensor
    scale: Tensor

    @staticmethod
    def empty(phi: Tensor, memory: int) -> _Memory:
        """Without pairs."""
        batch = phi.shape[:-1]
        s, y = (phi.new_zeros((*batch, memory + 1, phi.shape[-1])) for _ in range(2))
        r = torch.eye(memory, dtype=phi.dtype, device=phi.device).expand(*batch, memory, memory)
        return _Memory(s, y, r, nowhere(phi).long(), torch.ones_like(phi[..., 0]))

    def cleared(self) -> _Memory:
        """The same without pairs."""
        identity = torch.eye(self.r.shape[-1], dtype=self.r.dtype, device=self.r.device).expand_as(self.r)
        return replace(self, r=identity, count=torch.zeros_like(self.count), scale=torch.ones_like(self.scale))

    def pushed(self, mask: Tensor, s: Tensor, y: Tensor, *, everywhere: bool = False) -> _Memory:
        """With one more pair in place of the oldest, where the mask is set (``everywhere``). Writes into the rings of this one."""
        memory = self.r.shape[-1]
        row = torch.where(mask, self.count % memory, memory)[..., None, None].expand(*s.shape[:-1], 1, s.shape[-1])
        # where the path of a solver is differentiated, what it has used must stay as it was
        put = Tensor.scatter if s.requires_grad or is_transformed(s) else Tensor.scatter_
        kept = replace(self, s=put(self.s, -2, row, s.unsqueeze(-2)), y=put(self.y, -2, row, y.unsqueeze(-2)))
        new = replace(kept, count=self.count + 1)
        column, yy = new._places().products(kept.s, y), dot(y, y)
        r = torch.cat([pad(self.r[..., 1:, 1:], (0, 0, 0, 1)), column], -1)
        new = replace(new, r=r, scale=column[..., -1, 0] / torch.where(yy > 0, yy, 1.0))
        return new if everywhere else choose(mask, new, kept)

    def direction(self, grad: Tensor) -> Tensor:
        """- (approximate inverse Hessian) grad.

        The two loops over the pairs (Nocedal and Wright 2006, algorithm 7.4) are a back and a forward substitution with r: a few
        products with all pairs at once instead of 4 * memory small ones.
        """
        places = self._places()
        alpha = torch.linalg.solve_triangular(self.r, places.products(self.s, grad), upper=True)
        q = self.scale.unsqueeze(-1) * (grad - places.combination(self.y, alpha))
        beta = self.r.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * alpha - places.products(self.y, q)
        return -(q + places.combination(self.s, torch.linalg.solve_triangular(self.r.mT, beta, upper=False)))

    def _places(self) -> _Places:
        memory, count = self.r.shape[-1], self.count[..., None, None]
        age = torch.arange(memory, device=self.r.device).unsqueeze(-1)
        return _Places((age + count) % memory, (age - count) % memory, age + count >= memory)


@dataclass(frozen=True)
class _Places:
    """Where the pairs lie in a ring, ``(*batch, memory, 1)`` each."""

    of_age: Tensor  # oldest first
    age_of: Tensor
    used: Tensor  # oldest first

    def products(self, ring: Tensor, vector: Tensor) -> Tensor:
        """Inner products of the rows with a vector ``(*batch, d)``, oldest first: ``(*batch, memory, 1)``."""
        products = ring[..., :-1, :] @ vector.unsqueeze(-1)
        return torch.where(self.used, products.gather(-2, self.of_age), 0.0)

    def combination(self, ring: Tensor, weights: Tensor) -> Tensor:
        """The sum ``(*batch, d)`` of the rows with weights ``(*batch, memory, 1)``, oldest first."""
        return (ring[..., :-1, :].mT @ weights.gather(-2, self.age_of)).squeeze(-1)


@dataclass(frozen=True)
class _State(State):
    value: Tensor  # G at phi; infinite before the first evaluation
    lowest: Tensor  # of the values so far
    grad: Tensor  # dG/dphi at phi
    direction: Tensor
    given_up: Tensor  # |grad| where a search failed last
    search: Search
    memory: _Memory


@dataclass(frozen=True, kw_only=True)
class LBFGS(IterativeSolver):
    """L-BFGS (Liu and Nocedal 1989) with a strong Wolfe line search; needs no step size and no constant.

    Args:
        max_steps: gradient evaluations, >= 1. A trial of the line search is one; most steps need one.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps without reading a number back to the host.
        memory: pairs kept for each problem, >= 1: 2 * memory vectors like phi.
        check_every: with ``tol > 0`` on an accelerator, steps between two looks at whether all problems are done. On the CPU every step.
        max_backtracks: rejected trials before a line search ends.
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
        keep_python_numbers(self)

    def init(self, objective: Objective, phi: Tensor) -> _State:
        zero, still = phi.new_zeros(phi.shape[:-1]), torch.zeros_like(phi)
        infinite = torch.full_like(zero, torch.inf)
        search, memory = Search.start(zero, zero), _Memory.empty(phi, self.memory)
        return _State(phi, phi, nowhere(phi), infinite, infinite, still, still, infinite, search, memory)

    def ceiling(self, state: _State) -> Tensor:
        return state.lowest + hidden_in_terms(state.phi, state.memory.scale)

    def step(self, objective: Objective, state: _State, local: Local) -> _State:
        eps = torch.finfo(state.phi.dtype).eps
        s, y = state.point - state.phi, local.grad - state.grad
        is_pair = dot(s, y) > eps * norm(s) * norm(y)
        is_probe = is_pair & (state.memory.count == 0)
        slope = dot(local.grad, state.direction)
        trial = state.search.tried(local.value, state.value, self.ceiling(state), slope, is_probe, self.max_backtracks)
        accept = trial.taken & ~state.stalled
        if self.tol > 0 and accept.device.type == "cpu" and bool(accept.all()):
            return self._accepted(state, local, state.memory.pushed(is_pair, s, y, everywhere=bool(is_pair.all())))
        search = state.search.narrowed(trial)
        ended = (search.rejected > self.max_backtracks) | ~search.has_room(norm(state.direction), eps * norm(state.phi))
        rescue = ended & ~accept & search.has_lowered(search.low, search.low_change, state.value)
        search = search.back_to_low(rescue, self.max_backtracks)
        failed = ended & ~accept & ~rescue
        size = norm(state.grad)
        # a search that failed starts again without pairs; not where there were none, nor where little was gained since
        # the last such start
        hopeless = failed & ((state.memory.count == 0) | (size >= 0.5 * state.given_up))
        stalled = state.stalled | hopeless | (accept & (norm(local.grad) == 0))  # no step could do better

        phi, grad = select(accept, state.point, state.phi), select(accept, local.grad, state.grad)
        memory = state.memory.pushed(accept & is_pair, s, y)
        memory = choose(failed, memory.cleared(), memory)
        direction = memory.direction(grad)
        search = choose(accept | failed, _first_trial(phi, grad, direction, memory), search)
        return _State(
            phi=phi,
            point=select(stalled, phi, phi + search.length.unsqueeze(-1) * direction),
            stalled=stalled,
            value=torch.where(accept, local.value, state.value),
            lowest=torch.where(accept, torch.minimum(local.value, state.lowest), state.lowest),
            grad=grad,
            direction=direction,
            given_up=torch.where(failed, size, state.given_up),
            search=search,
            memory=memory,
        )

    def _accepted(self, state: _State, local: Local, memory: _Memory) -> _State:
        """What :meth:`step` ends with where all problems take their trial, as in most steps; it is most of the time of a small problem."""
        direction = memory.direction(local.grad)
        search = _first_trial(state.point, local.grad, direction, memory)
        stalled = norm(local.grad) == 0
        return _State(
            phi=state.point,
            point=select(stalled, state.point, state.point + search.length.unsqueeze(-1) * direction),
            stalled=stalled,
            value=local.value,
            lowest=torch.minimum(local.value, state.lowest),
            grad=local.grad,
            direction=direction,
            given_up=state.given_up,
            search=search,
            memory=memory,
        )


def _first_trial(phi: Tensor, grad: Tensor, direction: Tensor, memory: _Memory) -> Search:
    """The full step; without pairs a short one, which brings the first pair."""
    size = norm(grad)
    known = (memory.count > 0) | ~(size > 0)
    probe = torch.finfo(phi.dtype).eps ** 0.5 * (1 + norm(phi)) / torch.where(known, 1.0, size)
    return Search.start(torch.where(known, 1.0, probe), dot(grad, direction))
