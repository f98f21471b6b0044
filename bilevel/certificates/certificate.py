"""What a hypergradient keeps of the call that made it, and answers from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.certificates.bound import bound, constants_of, constants_per_task
from bilevel.certificates.estimate import Doubts, correct
from bilevel.certificates.evaluation import Evaluation
from bilevel.certificates.explanation import Spectrum, explain
from bilevel.certificates.kinks import kinks
from bilevel.curvature import Curvature, Hessian
from bilevel.entry import CHANGED, Call, has_changed
from bilevel.gradient import Diagnosis, Hypergradient
from bilevel.isolation import isolated, without_checkpoints
from bilevel.linsys.base import norm
from bilevel.linsys.lanczos import ritz_values, spread

SPECTRUM_STEPS = 30
"""Products for the eigenvalues that ``explain`` names. Lanczos comes near both ends of the spectrum long before it
knows the rest. Of a matrix with a large condition number more products would still lower the smallest one;
``Spectrum.doubt`` tells how sure it is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Certificate:
    """What a hypergradient keeps of the call that made it, for questions that come later. No graph.

    Attributes:
        call: problem, theta, data; as ``phi`` the point, as ``u`` the solution of the linear system.
        ok: which tasks are in the gradient ``(*batch,)``.
        scale: what the gradient of each task was multiplied by: 1, or 1 / (number of tasks that are ok).
        per_task: the gradient was not summed over the tasks, because of ``reduction="none"`` or because theta has the task axis.
        reduction: as asked for.
        curvature, damping: of the linear system, as in the call.
        chunk_size, outer_chunk_size: as in the call.
        solves: the linear solver solves, unlike ``Identity``.
        met: where it met its tolerance ``(*batch,)``.
        outer, inner_grad: the outer loss ``(*batch,)`` and dG/dphi ``(*batch, d)`` at phi, then.
        versions: how often each tensor had been written to when the gradient was taken.
    """

    call: Call
    ok: Tensor
    scale: Tensor
    per_task: bool
    reduction: str
    curvature: Curvature
    damping: float
    chunk_size: int | None
    outer_chunk_size: int | None
    solves: bool
    met: Tensor
    outer: Tensor
    inner_grad: Tensor
    versions: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        tensors = [tensor.detach() for tensor in self.call.tensors]  # of one version with the user's
        object.__setattr__(self, "call", replace(self.call, tensors=tensors))
        object.__setattr__(self, "versions", self._versions())

    def __getstate__(self) -> dict[str, Any]:
        # the tensors of a copy count anew, and its problem has no recorded programs
        return {**self.__dict__, "call": replace(self.call, programs=None), "versions": None if self.fresh else ()}

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
        return "_looked" in self.__dict__ or self.fresh

    @cached_property
    def error_bound(self) -> Tensor | None:
        """See :attr:`bilevel.Hypergradient.error_bound`."""
        constants = self.call.flat.problem.constants
        if constants is None or self.damping or not isinstance(self.curvature, Hessian):
            return None
        known = constants_per_task(constants, self.call)
        bounds = self._each(lambda here, tasks: bound(here, constants_of(known, tasks)))
        if any(part is None for part in bounds):
            return None
        each = torch.where(self.ok, self._join(bounds), torch.nan)
        if self.reduction == "none" or not self.call.sizes:
            return each
        # of a sum, by the triangle inequality; of a gradient per task, exactly
        terms = torch.where(self.ok, each, 0)
        return (torch.linalg.vector_norm(terms) if self.per_task else terms.sum()) * self.scale

    @property
    def diagnosis(self) -> Diagnosis:
        """See :meth:`bilevel.Hypergradient.diagnose`."""
        return self._looked[0]

    @property
    def doubts(self) -> Doubts:
        """What the diagnosis cannot tell; costs the same look."""
        return self._looked[1]

    @cached_property
    def _looked(self) -> tuple[Diagnosis, Doubts]:
        found = self._each(lambda here, tasks: correct(here, self.ok[tasks], self.met[tasks], self.per_task))
        change = self._join([part.change for part in found]) if self.per_task else sum(part.change for part in found)
        if self.reduction == "none":
            error = torch.where(self.ok, norm(change), torch.nan)
        else:
            error = torch.where(self.ok.any(), torch.linalg.vector_norm(change) * self.scale, torch.nan)
        linear, inner, size, slope, residual, rhs, *doubts = (
            self._join(list(column)) for column in zip(*[part.columns for part in found], strict=True)
        )
        diagnosis = Diagnosis(
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
        return diagnosis, Doubts(*doubts)

    @cached_property
    def spectrum(self) -> Spectrum:
        """What Lanczos sees of the curvature at phi."""

        def ends(here: Evaluation, tasks: Any) -> tuple[Tensor, ...]:
            values, residuals = ritz_values(here.local.matvec, spread(here.b), SPECTRUM_STEPS)
            return values[..., 0], values[..., -1], residuals[..., 0]

        return Spectrum(*[self._join(list(column)) for column in zip(*self._each(ends), strict=True)])

    @cached_property
    def kinks(self) -> Tensor:
        """Which of the tasks that have no estimate are at a kink, where there is a minimum but for it."""
        asked = self.ok & self.diagnosis.inner.isinf() & ~self.doubts.ran_out & (self.spectrum.smallest > 0)
        if not bool(asked.any()):
            return asked
        return self._join(self._each(lambda here, tasks: kinks(here, self.spectrum.largest[tasks], asked[tasks])))

    def explain(self, result: Hypergradient) -> str:
        """See :meth:`bilevel.Hypergradient.explain`."""
        return explain(
            result, self.call.flat.problem, self.spectrum, self.solves, self.doubts, self.kinks, self.call.not_finite()
        )

    @isolated
    @without_checkpoints()
    def _each(self, ask: Callable[[Evaluation, Any], Any]) -> list[Any]:
        """Chunk by chunk: what is asked of the evaluation of the chunk, and of where its tasks are."""
        if not self.fresh:
            raise ValueError(
                "error_bound, error_estimate and explain() look at theta, data, phi and u again, but one of these was changed in place "
                "since the gradient was taken (optimizer.step() does that to parameters). Ask before the step, or pass clones to the call."
            )
        found, start = [], 0
        for piece in self.call.chunks(self.chunk_size):
            tasks = slice(start, start + len(piece.phi)) if self.call.sizes else ...
            objective = piece.objective(trusting=False)
            here = Evaluation(piece, objective, piece.phi, self.curvature, self.damping, self.outer_chunk_size)
            self._require_same(here, tasks)
            found.append(ask(here, tasks))
            start += len(piece.phi)
        return found

    def _require_same(self, here: Evaluation, tasks: Any) -> None:
        """Refuse to judge the gradient of one problem by another. A change that leaves both at phi as they were is not seen."""
        grad = here.local.grad
        inner = has_changed(here.objective, here.phi, grad, norm(grad - self.inner_grad[tasks]))
        before, now = self.outer[tasks], here.outer
        # the sizes of L and of its terms, for rounding in terms that cancel
        size = torch.maximum(torch.maximum(now.abs(), before.abs()), norm(here.b) * norm(here.phi))
        outer = (now - before).abs() > CHANGED[here.phi.dtype] * size
        for name, changed in (("inner_objective", inner), ("outer_loss", outer)):
            if bool((changed & self.ok[tasks]).any()):
                raise ValueError(
                    "error_bound, error_estimate, explain() and accuracy= call the functions of the problem again, but at phi "
                    f"{name} is not what it was when the gradient was taken: something that it captured has changed since (an attribute, "
                    "the variable of a loop, a buffer, train() or eval(), random numbers). Ask before it changes, or pass it in data."
                )

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if self.call.sizes else parts[0]
