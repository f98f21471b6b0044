"""How good a hypergradient is: a rigorous bound where the user states constants, an estimate always, and sentences.

Let phi be the point, H and C the derivatives d2G/dphi2 and d2G/dphi dtheta there, b = dL/dphi, and r = b - H u what the linear
solver left. Stars mark the exact inner solution. With g = dL/dtheta - C^T u as computed, w = H^{-1} b and w* = H*^{-1} b*,

    g* - g = - C^T H^{-1} r + (dL/dtheta* - dL/dtheta) - (C*^T w* - C^T w),

a *linear* part, the first term, and an *inner* part, the rest, which vanishes with delta = |phi - phi*|.

**Bound.** With the constants of :class:`bilevel.Constants` the linear part is at most C |r| / mu. For the inner part,

    w* - w = H*^{-1} ((b* - b) + (H - H*) w),    C*^T w* - C^T w = C*^T (w* - w) + (C* - C)^T w,    |w| <= |u| + |r| / mu,

so that it is at most

    L delta + C* (L + rho |w|) delta / mu* + rho |w| delta

(first term: only if L depends on theta directly; last term: only if C is not constant; C* = C if it is, else C + rho delta; mu* = mu if
that holds everywhere, else mu - rho delta). With |b*| <= B the last two terms are at most

    C (2 rho B / mu^2 + L / mu) delta + rho (B / mu*) delta

too (1 for the 2 if mu holds everywhere; last term: as above): Lemma 3 of the paper, there for C = -lam I. The smaller one is used.
delta comes from the gradient of G: |dG/dphi| / mu under strong convexity everywhere; else, by the theorem of Newton and Kantorovich,
(mu - sqrt(mu^2 - 2 rho |dG/dphi|)) / rho, under the condition of Lemma 3, delta < mu / (2 rho). That theorem also says that there is a
solution so near, and H* >= mu - rho delta > 0 that it is a minimum.

**Rounding.** A residual that is computed as zero is not zero. Each measured quantity gets what rounding may hide in it: eps, times 8 times
the root of how many numbers may have been summed (of phi, theta and data), times the size of what was subtracted to get it. For a gradient
that is the size of its terms; in a sum of smooth terms >= 0 it is at most sqrt(2 |H| G). This models what happens inside of the user's
functions, which nothing here can see; it matters only within some orders of the rounding floor.

**Estimate.** The same two parts, computed instead of bounded: CG goes on at phi for the linear part; Newton's method from phi, mostly one
step, and CG there, for the inner part. What is below the rounding of a gradient or a product is zero; how much that is, two of them right
beside each other show, because the model above is one of the worst case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.constants import Constants
from bilevel.curvature import Curvature, Hessian
from bilevel.derivatives import Objective
from bilevel.entry import Call
from bilevel.explanation import Spectrum, explain
from bilevel.gradient import Diagnosis, Hypergradient
from bilevel.isolation import isolated
from bilevel.linsys.base import Matvec, norm, select
from bilevel.linsys.cg import CG
from bilevel.linsys.lanczos import ritz_values, spread
from bilevel.linsys.neumann import some_direction
from bilevel.result import Result

CORRECTION = CG(max_steps=100, rtol=1e-8)
NEWTON_STEPS = 8
SIZE_STEPS = 8
SPECTRUM_STEPS = 30
NAMES = ("mu", "rho", "B", "L", "C")


@dataclass(frozen=True, eq=False, kw_only=True)
class Certificate:
    """What a hypergradient keeps of the call that made it, for questions that come later. No graph.

    Attributes:
        call: problem, theta, data; as ``phi`` the point, as ``u`` the solution of the linear system.
        ok: which tasks are in the gradient ``(*batch,)``.
        scale: what the gradient of each task was multiplied by: 1, or 1 / (number of tasks that are ok).
        per_task: the gradient was not summed over the tasks, because of ``reduction="none"`` or because theta has the task axis.
        none: ``reduction="none"``.
        chunk_size, outer_chunk_size: as in the call.
        solves: the linear solver solves, unlike ``Identity``.
        versions: how often each tensor had been written to when the gradient was taken.
    """

    call: Call
    ok: Tensor
    scale: Tensor
    per_task: bool
    none: bool
    curvature: Curvature
    damping: float
    chunk_size: int | None
    outer_chunk_size: int | None
    solves: bool
    versions: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        tensors = [tensor.detach() for tensor in self.call.tensors]  # of one version with the user's
        object.__setattr__(self, "call", replace(self.call, tensors=tensors))
        object.__setattr__(self, "versions", self._versions())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "versions": None if self.fresh else ()}  # the tensors of a copy count anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.versions is None:
            object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> tuple[int, ...]:
        assert self.call.u is not None
        tensors = [*self.call.tensors, self.call.phi, self.call.u]
        return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)

    @property
    def fresh(self) -> bool:
        """Nothing was changed in place since the gradient was taken."""
        return self.versions == self._versions()

    @property
    def known(self) -> bool:
        """The diagnosis is there, or can be had."""
        return "diagnosis" in self.__dict__ or self.fresh

    @cached_property
    def error_bound(self) -> Tensor | None:
        """See :attr:`bilevel.Hypergradient.error_bound`."""
        constants = self.call.flat.problem.constants
        if constants is None or self.damping or not isinstance(self.curvature, Hessian):
            return None
        known = _per_task(constants, self.call)
        bounds = self._each(lambda look, tasks: _bound(look, _cut(known, tasks)))
        if any(bound is None for bound in bounds):
            return None
        bound = torch.where(self.ok, self._join(bounds), torch.nan)
        if self.none or not self.call.sizes:
            return bound
        # of a sum, by the triangle inequality; of a gradient per task, exactly
        terms = torch.where(self.ok, bound, 0)
        return (torch.linalg.vector_norm(terms) if self.per_task else terms.sum()) * self.scale

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """See :meth:`bilevel.Hypergradient.diagnose`."""
        found = self._each(lambda look, tasks: _correct(look, self.ok[tasks], self.per_task))
        change = self._join([part.change for part in found]) if self.per_task else sum(part.change for part in found)
        if self.none:
            error = torch.where(self.ok, norm(change), torch.nan)
        else:
            error = torch.where(self.ok.any(), torch.linalg.vector_norm(change) * self.scale, torch.nan)
        linear, inner, size, slope, residual, rhs = (
            self._join(list(column)) for column in zip(*[part.columns for part in found], strict=True)
        )
        return Diagnosis(
            error=error,
            linear=linear,
            inner=inner,
            size=size,
            slope=slope,
            residual=residual,
            rhs=rhs,
            num_grads=sum(part.num_grads for part in found),
            num_matvecs=sum(part.num_matvecs for part in found),
        )

    @cached_property
    def spectrum(self) -> Spectrum:
        """What Lanczos sees of the curvature at phi."""

        def ends(look: _Look, tasks: Any) -> tuple[Tensor, ...]:
            values, residuals = ritz_values(look.local.matvec, spread(look.b), SPECTRUM_STEPS)
            return values[..., 0], values[..., -1], residuals[..., 0]

        return Spectrum(*[self._join(list(column)) for column in zip(*self._each(ends), strict=True)])

    def explain(self, result: Hypergradient) -> str:
        """See :meth:`bilevel.Hypergradient.explain`."""
        return explain(result, self.call.flat.problem, self.spectrum, self.solves)

    @isolated
    def _each(self, look_at: Callable[[_Look, Any], Any]) -> list[Any]:
        """Chunk by chunk: of a look at the chunk, and where its tasks are."""
        if not self.fresh:
            raise ValueError(
                "error_bound, error_estimate and explain() look at theta, data, phi and u again, but one of these was changed in place "
                "since the gradient was taken (optimizer.step() does that to parameters). Ask before the step, or pass clones to the call."
            )
        found, start = [], 0
        for piece in self.call.chunks(self.chunk_size):
            tasks = slice(start, start + len(piece.phi)) if self.call.sizes else ...
            found.append(look_at(_Look(piece, piece.objective(), piece.phi, self), tasks))
            start += len(piece.phi)
        return found

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if self.call.sizes else parts[0]


class _Look:
    """First and second derivatives at one point, and the gradient that a given u leads to."""

    def __init__(self, call: Call, objective: Objective, phi: Tensor, options: Certificate) -> None:
        assert call.u is not None
        self.call, self.objective, self.phi, self.u, self.options = call, objective, phi, call.u, options
        self.local = self.objective.linearise(phi, options.curvature, options.damping, with_theta=True)
        self.outer, self.b, self.direct = call.outer_gradient(phi, options.outer_chunk_size)

    def at(self, phi: Tensor) -> _Look:
        """The same elsewhere; the work is counted together."""
        return _Look(self.call, self.objective, phi, self.options)

    def undamped(self, v: Tensor) -> Tensor:
        """The curvature times v, without what was added to it."""
        return self.local.matvec(v) - self.options.damping * v

    def vector(self, leaves: list[Tensor | None]) -> Tensor:
        """Leaves like those of theta, zero for None, as vectors ``(*batch, dim theta)``."""
        pairs = zip(self.objective.theta_per_task(), leaves, strict=True)
        full = [torch.zeros_like(like) if leaf is None else leaf for like, leaf in pairs]
        return torch.cat([leaf.detach().reshape(*self.call.sizes, -1) for leaf in full], -1)

    def gradient(self, u: Tensor) -> Tensor:
        """dL/dtheta - C^T u, as vectors ``(*batch, dim theta)``."""
        return self.vector(self.direct) - self.vector(self.local.cross(u, keep=True))

    @cached_property
    def eps(self) -> float:
        """The rounding error of a sum, relative to the size of its terms."""
        (flags,) = self.call.levels or ((False,) * len(self.call.tensors),)
        shapes = [tensor.shape[flag:] for tensor, flag in zip(self.call.tensors, flags, strict=True)]
        numbers = self.phi.shape[-1] + sum(shape.numel() for shape in shapes)
        return 8 * numbers**0.5 * torch.finfo(self.phi.dtype).eps

    def shown(self) -> tuple[Tensor, Tensor]:
        """The same as it shows itself in products and gradients right beside u and phi, for an estimate: the model is one of the worst
        case, and counts all numbers of the data.
        """
        unit = torch.finfo(self.phi.dtype).eps
        signs = torch.where(some_direction(self.phi) < 0, -1.0, 1.0).to(self.phi)

        def noise(at: Tensor, here: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
            beside = at + 4 * unit * signs * at
            return 4 * norm(function(beside) - here - self.undamped(beside - at))

        pairs = (
            noise(self.u, self.undamped(self.u), self.undamped),
            noise(self.phi, self.local.grad, self.objective.gradient),
        )
        least = 8 * unit / self.eps
        return tuple(torch.maximum(least * m, torch.minimum(m, n)) for m, n in zip(self.hidden(), pairs, strict=True))  # type: ignore[return-value]

    def hidden(self) -> tuple[Tensor, Tensor]:
        """What rounding may hide in ``|b - H u|`` and in ``|dG/dphi|``, by a model."""
        ritz, _ = ritz_values(self.local.matvec, spread(self.b), SIZE_STEPS)
        size = 2 * ritz.abs().amax(-1)  # of H, and to spare
        terms = (2 * size * self.local.value.abs()).sqrt()
        return self.eps * (size * norm(self.u) + norm(self.b)), self.eps * (size * norm(self.phi) + terms)


def _per_task(constants: Constants, call: Call) -> dict[str, Tensor | None]:
    """The constants as tensors ``(*batch,)``."""

    def of(name: str) -> Tensor | None:
        value = getattr(constants, name)
        if value is None:
            return None
        value = torch.as_tensor(value, dtype=call.phi.dtype, device=call.phi.device)
        if value.ndim and value.shape != call.sizes:
            raise ValueError(
                f"Constants: {name}: expected a number, or one for each task of shape {tuple(call.sizes)}, got shape {tuple(value.shape)}."
            )
        return value.expand(call.sizes)

    known = {name: of(name) for name in NAMES}
    constant = call.flat.problem.constant_cross_norm
    return known if constant is None else known | {"C": torch.full_like(call.phi[..., 0], constant)}


def _cut(known: dict[str, Tensor | None], tasks: Any) -> dict[str, Tensor | None]:
    return {name: None if value is None else value[tasks] for name, value in known.items()}


def _bound(look: _Look, known: dict[str, Tensor | None]) -> Tensor | None:
    """The formula at the top of this module, for each task ``(*batch,)``; inf where its condition fails."""
    mu, rho, B, L, C = (known[name] for name in NAMES)
    if mu is None or rho is None or L is None or C is None:
        return None
    problem = look.call.flat.problem
    assert problem.constants is not None
    everywhere, constant_cross = problem.constants.everywhere, problem.constant_cross_norm is not None
    hidden_r, hidden_slope = look.hidden()
    theta = norm(look.vector([leaf.detach() for leaf in look.objective.theta_per_task()]))
    outer_terms = L * norm(look.phi) + (2 * L * look.outer.abs()).sqrt()
    r = norm(look.b - look.local.matvec(look.u)) + hidden_r + look.eps * outer_terms
    slope = norm(look.local.grad) + hidden_slope + look.eps * C * theta
    if not look.local.exact:
        return None  # products by finite differences
    if everywhere:
        delta = slope / mu
        mu_star = mu
        condition = torch.ones_like(delta, dtype=torch.bool)
    else:
        # 2 s / (mu + sqrt(mu^2 - 2 rho s)) is the root in a form that does not cancel
        delta = 2 * slope / (mu + (mu**2 - 2 * rho * slope).clamp_min(0).sqrt())
        mu_star = mu - rho * delta
        condition = (2 * rho * slope <= mu**2) & (2 * rho * delta < mu)
    w = norm(look.u) + r / mu
    change_of_w = (L + rho * w) * delta / mu_star
    inner = C * change_of_w if constant_cross else (C + rho * delta) * change_of_w + rho * w * delta
    if B is not None:
        lemma_3 = C * ((1 if everywhere else 2) * rho * B / mu**2 + L / mu) * delta
        inner = torch.minimum(inner, lemma_3 if constant_cross else lemma_3 + rho * B / mu_star * delta)
    direct = norm(look.vector(look.direct))
    if any(leaf is not None for leaf in look.direct):
        inner = inner + L * delta
    rounding = look.eps * (direct + C * norm(look.u))
    bound = (1 + look.eps) * (C * r / mu + inner + rounding)
    return torch.where(condition & bound.isfinite(), bound, torch.inf)


class _Correction(NamedTuple):
    """``change``: (better gradient - gradient) ``(*batch, dim theta)``, or its sum over the tasks that are ok. ``columns``: the fields
    of :class:`Diagnosis` from ``linear`` to ``rhs``.
    """

    change: Tensor
    columns: tuple[Tensor, ...]
    num_grads: int
    num_matvecs: int


def _correct(look: _Look, ok: Tensor, per_task: bool) -> _Correction:
    """Go on with the linear solve at phi, then with the inner solve and again with the linear one."""
    known = look.objective.curvature_inverse(look.options.damping)
    hidden_r, hidden_slope = look.shown()
    before = look.gradient(look.u)
    residual, slope = look.b - look.local.matvec(look.u), look.local.grad
    lost, change = _solve(look.local.matvec, residual, hidden_r, ok, known)
    lost = lost | (hidden_r > 0.01 * norm(look.b))  # rounding leaves few digits of b: H is nearly singular
    u = look.u + change
    after = look.gradient(u)
    lost_phi, there = _newton(look, hidden_slope, ok)
    # for the change of u, not for u: a tolerance relative to b would call the change converged before it is looked at
    left = there.b - there.local.matvec(u)
    left = select(norm(there.phi - look.phi) > 0, left, torch.zeros_like(left))  # else it is what the first solve left
    lost_u, change = _solve(there.local.matvec, left, hidden_r, ok, known)
    corrected = there.gradient(u + change)
    parts = [
        torch.where(ok, torch.where(without, torch.inf, norm(part)), torch.nan)
        for part, without in ((after - before, lost), (corrected - after, lost_phi | lost_u))
    ]
    total = select(lost | lost_phi | lost_u, torch.full_like(before, torch.inf), corrected - before)
    total = select(ok, total, torch.zeros_like(total))
    return _Correction(
        total if per_task else total.sum(0),
        (*parts, norm(before), norm(slope), norm(residual), norm(look.b)),
        look.objective.num_grads,
        look.objective.num_matvecs,
    )


def _newton(look: _Look, hidden: Tensor, ok: Tensor) -> tuple[Tensor, _Look]:
    """Where Newton's method met negative curvature or came no nearer, and a look at the point that it came to: one step if that lowers
    the gradient to a tenth, as it does near a solution; else more, shortened until they lower it.
    """
    known = look.objective.curvature_inverse(0.0)
    start, here = norm(look.local.grad), look
    lost, far, shortened = ~ok, ok & (start > hidden), torch.zeros_like(ok)
    for _ in range(NEWTON_STEPS):
        failed, step = _solve(here.undamped, -here.local.grad, hidden, far, known)
        lost, far = lost | failed, far & ~failed
        shortened = torch.zeros_like(shortened)
        for _ in range(NEWTON_STEPS):
            there = look.at(here.phi + step)
            worse = far & ~(norm(there.local.grad) < norm(here.local.grad))
            if not bool(worse.any()):
                break
            shortened = shortened | worse
            step = select(worse, 0.25 * step, step)
        here = there
        far = far & (norm(here.local.grad) > 0.1 * start)
        if not bool(far.any()):
            break
    # where it could not even halve the gradient, or a full step still overshoots, at a kink say, its step says nothing of the distance
    return lost | (far & (shortened | ~(norm(here.local.grad) <= 0.5 * start))), here


def _solve(
    matvec: Matvec, b: Tensor, hidden: Tensor, ok: Tensor, preconditioner: Matvec | None
) -> tuple[Tensor, Tensor]:
    """Where CG found no solution of A x = b, and x; zero there, and where b is nothing but rounding."""
    b = select(ok & (norm(b) > hidden), b, torch.zeros_like(b))
    result: Result = CORRECTION.solve(matvec, b, preconditioner=preconditioner)
    return result.failed, select(result.failed, torch.zeros_like(b), result.value)
