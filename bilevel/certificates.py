"""How good a hypergradient is: a rigorous bound where the user states constants, an estimate always, and sentences.

Let phi be the point, H and C the derivatives d2G/dphi2 and d2G/dphi dtheta there, b = dL/dphi, and H u = b - r what the linear
solver left. Stars mark the exact inner solution. With g = dL/dtheta - C^T u as computed,

    g* - g = (dL/dtheta* - dL/dtheta) - C^T H^{-1} r - [C*^T H*^{-1} b* - C^T H^{-1} b],

a *linear* part, C^T H^{-1} r, and an *inner* part, the rest, which vanishes with delta = |phi - phi*|.

**Bound.** With the constants of :class:`bilevel.Constants` the linear part is at most C |r| / mu. For the inner part, let w = H^{-1} b,
so that |w| <= |u| + |r| / mu; then H*^{-1} b* - w = H*^{-1} ((b* - b) + (H - H*) w), which gives

    L delta + C (L + rho |w|) delta / mu* + rho |w| delta

(first term: only if L depends on theta directly; last term: only if C is not constant; mu* = mu everywhere, else mu - rho delta).
Lemma 3 of the paper bounds the same by (2 lam rho B / mu^2 + lam L / mu) delta, and is used where it is the smaller one.
delta comes from the gradient of G: |dG/dphi| / mu under strong convexity everywhere; else, by the theorem of Newton and Kantorovich,
(mu - sqrt(mu^2 - 2 rho |dG/dphi|)) / rho, under the condition of Lemma 3, delta < mu / (2 rho).

**Rounding.** A residual that is computed as zero is not zero. Each measured quantity gets what rounding may hide in it: a multiple of eps
times the size of what was subtracted to get it.

**Estimate.** The same two parts, computed instead of bounded: ten further steps of CG for the linear part, a Newton correction of phi
and a linear solve there for the inner part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Curvature, Hessian
from bilevel.derivatives import Linearisation, Objective
from bilevel.entry import Call
from bilevel.explanation import explain
from bilevel.linsys.base import norm, select
from bilevel.linsys.cg import CG
from bilevel.linsys.lanczos import ritz_values
from bilevel.problem import Constants
from bilevel.result import Diagnosis, Hypergradient

FURTHER_STEPS = 10
CORRECTION_STEPS = 100
LANCZOS_STEPS = 30


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a hypergradient keeps of the call that made it, for questions that come later. No graph.

    Attributes:
        call: problem, theta, data, and as ``phi`` the point.
        u: the solution of the linear system ``(*batch, d)``.
        ok: which tasks are in the gradient ``(*batch,)``.
        scale: what the gradient of each task was multiplied by: 1, or 1 / (number of tasks that are ok).
        per_task: the gradient was not summed over the tasks, because of ``reduction="none"`` or because theta has the task axis.
        none: ``reduction="none"``.
        chunk_size, outer_chunk_size: as in the call.
        measured: the linear solver measured its residual.
        versions: of theta and data, when the gradient was taken.
    """

    call: Call
    u: Tensor
    ok: Tensor
    scale: Tensor
    per_task: bool
    none: bool
    curvature: Curvature
    damping: float
    chunk_size: int | None
    outer_chunk_size: int | None
    measured: bool
    versions: tuple[int, ...]

    @staticmethod
    def versions_of(call: Call) -> tuple[int, ...]:
        """How often each tensor of theta and data was written to."""
        return tuple(-1 if tensor.is_inference() else tensor._version for tensor in call.tensors)

    def error_bound(self) -> Tensor | None:
        """See :attr:`bilevel.Hypergradient.error_bound`."""
        constants = self.call.flat.problem.constants
        if constants is None or not self.measured or self.damping or not isinstance(self.curvature, Hessian):
            return None
        bounds = []
        for start, look in self._looks():
            bound = _bound(look, _of_chunk(constants, start, len(look.phi) if self.call.sizes else None))
            if bound is None:
                return None
            bounds.append(bound)
        bound = torch.cat(bounds) if self.call.sizes else bounds[0]
        return self._reduce_norms(torch.where(self.ok, bound, torch.nan))

    def diagnose(self) -> Diagnosis:
        """See :meth:`bilevel.Hypergradient.diagnose`."""
        rows: list[tuple[Tensor, ...]] = []
        total = None
        for start, look in self._looks():
            change, *row = _correct(look)
            rows.append(tuple(row))
            ok = self.ok[start : start + len(look.phi)] if self.call.sizes else self.ok
            change = select(ok, change, torch.zeros_like(change))
            if self.call.sizes and not self.per_task:
                change = change.sum(0)
                total = change if total is None else total + change
            else:
                total = change if total is None else torch.cat([total, change])
        assert total is not None
        columns = [torch.cat(column) if self.call.sizes else column[0] for column in zip(*rows, strict=True)]
        if self.none:
            error = torch.where(self.ok, norm(total), torch.nan)
        else:
            error = torch.where(self.ok.any(), torch.linalg.vector_norm(total) * self.scale, torch.nan)
        return Diagnosis(error, *columns)

    def explain(self, result: Hypergradient) -> str:
        """See :meth:`bilevel.Hypergradient.explain`."""
        return explain(result, self.call.flat.problem)

    def _looks(self) -> Any:
        """Chunk by chunk, so that memory stays what it was in the call: (index of the first task, a look at the chunk)."""
        if self.versions != self.versions_of(self.call):
            raise ValueError(
                "error_bound, error_estimate and explain() look at theta and data again, but these were changed in place since the "
                "gradient was taken (optimizer.step() does that to parameters). Ask before the step, or pass clones to the call."
            )
        start = 0
        for piece in self.call.chunks(self.chunk_size):
            count = len(piece.phi) if self.call.sizes else 1
            u = self.u[start : start + count] if self.call.sizes else self.u
            yield start, _Look(piece, piece.phi, u, self.curvature, self.damping, self.outer_chunk_size)
            start += count

    def _reduce_norms(self, norms: Tensor) -> Tensor:
        """The norm of the reduced gradient's error from those of each task, by the triangle inequality."""
        if self.none or not self.call.sizes:
            return norms
        known = torch.where(self.ok, norms, 0)
        total = torch.linalg.vector_norm(known) if self.per_task else known.sum()
        return torch.where(self.ok.any(), total * self.scale, torch.nan)


class _Look:
    """First and second derivatives at one point, and the gradient that a given u leads to."""

    def __init__(
        self, call: Call, phi: Tensor, u: Tensor, curvature: Curvature, damping: float, outer_chunk_size: int | None
    ) -> None:
        self.call, self.phi, self.u = call, phi, u
        self._options = (curvature, damping, outer_chunk_size)
        self.objective: Objective = call.objective()
        self.local: Linearisation = self.objective.linearise(phi, curvature, damping, with_theta=True)
        _, self.b, self.direct = call.outer_gradient(phi, outer_chunk_size)

    def at(self, phi: Tensor, u: Tensor) -> _Look:
        """The same elsewhere."""
        return _Look(self.call, phi, u, *self._options)

    def preconditioner(self) -> Any:
        """The inverse of the part of the curvature that the problem knows."""
        return self.objective.curvature_inverse(self._options[1])

    def gradient(self, u: Tensor) -> Tensor:
        """dL/dtheta - C^T u, as vectors ``(*batch, dim theta)``."""
        leaves = []
        for leaf, a, c in zip(
            self.objective.theta_per_task(), self.direct, self.local.cross(u, keep=True), strict=True
        ):
            total = torch.zeros_like(leaf) if a is None else a
            total = total if c is None else total - c
            leaves.append(total.detach().reshape(*self.call.sizes, -1))
        return torch.cat(leaves, -1)

    def theta_norm(self) -> Tensor:
        """|theta| of each task ``(*batch,)``."""
        return norm(
            torch.cat([leaf.detach().reshape(*self.call.sizes, -1) for leaf in self.objective.theta_per_task()], -1)
        )


def _of_chunk(constants: Constants, start: int, count: int | None) -> Constants:
    """The constants of the tasks of one chunk."""
    if count is None:
        return constants

    def cut(value: Any) -> Any:
        return value[start : start + count] if isinstance(value, Tensor) and value.ndim else value

    return Constants(
        mu=cut(constants.mu),
        rho=cut(constants.rho),
        B=cut(constants.B),
        L=cut(constants.L),
        C=cut(constants.C),
        everywhere=constants.everywhere,
    )


def _bound(look: _Look, known: Constants) -> Tensor | None:
    """The formula at the top of this module, for each task ``(*batch,)``; inf where its condition fails."""
    constant_cross = look.call.flat.problem.constant_cross_norm
    if known.mu is None or known.rho is None or known.L is None or (known.C is None and constant_cross is None):
        return None
    like = norm(look.b)
    mu, rho, L = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (known.mu, known.rho, known.L))
    C = torch.as_tensor(known.C if constant_cross is None else constant_cross, dtype=like.dtype, device=like.device)
    d = look.phi.shape[-1]
    hidden = 16 * d**0.5 * torch.finfo(like.dtype).eps
    size = 2 * ritz_values(look.local.matvec, _start(look.b), min(8, d)).abs().amax(-1)  # of H, and to spare
    r = norm(look.b - look.local.matvec(look.u)) + hidden * (size * norm(look.u) + like)
    slope = norm(look.local.grad) + hidden * (size * norm(look.phi) + C * look.theta_norm())
    if known.everywhere:
        delta = slope / mu
        at_solution = mu
        condition = torch.ones_like(delta, dtype=torch.bool)
    else:
        # 2 s / (mu + sqrt(mu^2 - 2 rho s)) is the root in a form that does not cancel
        root = (mu**2 - 2 * rho * slope).clamp_min(0).sqrt()
        delta = 2 * slope / (mu + root)
        at_solution = mu - rho * delta
        condition = (2 * rho * slope <= mu**2) & (2 * rho * delta < mu)
    w = norm(look.u) + r / mu
    inner = C * (L + rho * w) * delta / at_solution
    if constant_cross is not None and known.B is not None:
        B = torch.as_tensor(known.B, dtype=like.dtype, device=like.device)
        factor = 1 if known.everywhere else 2
        inner = torch.minimum(inner, C * (factor * rho * B / mu**2 + L / mu) * delta)  # Lemma 3
    if constant_cross is None:
        inner = inner + rho * w * delta
    if any(leaf is not None for leaf in look.direct):
        inner = inner + L * delta
    rounding = hidden * norm(look.gradient(look.u))
    bound = C * r / mu + inner + rounding
    return torch.where(condition & bound.isfinite(), bound, torch.inf)


def _start(b: Tensor) -> Tensor:
    """b, or ones where b is zero, for a Krylov space that exists."""
    return select(norm(b) > 0, b, torch.ones_like(b))


def _correct(look: _Look) -> tuple[Tensor, ...]:
    """(better gradient - gradient) ``(*batch, dim theta)``, then the fields of :class:`Diagnosis` from ``linear`` on."""
    before = look.gradient(look.u)
    matvec, known = look.local.matvec, look.preconditioner()
    further = CG(max_steps=FURTHER_STEPS, rtol=0.0, steihaug=True)
    better = further.solve(matvec, look.b, init=look.u, preconditioner=known).value
    after = look.gradient(better)
    values = ritz_values(matvec, _start(look.b), LANCZOS_STEPS)
    correction = CG(max_steps=CORRECTION_STEPS, rtol=1e-4, steihaug=True)
    step = correction.solve(matvec, -look.local.grad, preconditioner=known).value
    there = look.at(look.phi + step, better)
    # for the change of u, not for u: a tolerance relative to b would call the change converged before it is looked at
    left = there.b - there.local.matvec(better)
    u = better + correction.solve(there.local.matvec, left, preconditioner=there.preconditioner()).value
    corrected = there.gradient(u)
    return (
        corrected - before,
        norm(after - before),
        norm(corrected - after),
        norm(before),
        norm(look.local.grad),
        norm(look.b - matvec(look.u)),
        norm(look.b),
        values[..., 0],
        values[..., -1],
    )
