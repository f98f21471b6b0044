"""What a meta-step does with a batch of tasks: iMAML and the algorithms that the paper compares it with.

All of them adapt theta to each task with the same inner solver, and differ in the direction that the outer optimizer gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel
from applications.meta_learning.problem import Theta
from bilevel import BilevelProblem, Result
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import LinearSolver
from bilevel.solvers import IterativeSolver


@dataclass(frozen=True, kw_only=True)
class MetaGradient:
    """What the outer step needs and what the log wants to know.

    grad: like theta, the mean over the tasks that are ok; NaN with none.
    outer: query loss, the same mean.
    phi: the adapted parameters, with the task axis.
    ok: which tasks have a usable gradient, (tasks,).
    inner: of the adaptation. linear: of the linear system; None where there is none.
    """

    grad: Theta
    outer: Tensor
    phi: Theta
    ok: Tensor
    inner: Result
    linear: Result | None


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm with its settings. `chunk_size`, `outer_chunk_size`: tasks at once."""

    solver: IterativeSolver
    chunk_size: int | None = None
    outer_chunk_size: int | None = None

    def meta_gradient(self, problem: BilevelProblem, theta: Theta, data: Any) -> MetaGradient:
        """For a batch of tasks with the task axis in front."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ImplicitMAML(Algorithm):
    """iMAML (Algorithm 1 and 2 of the paper). With the linear solver `Identity` it is first-order MAML (appendix A).

    compile: as in :func:`bilevel.hypergradient`.
    """

    linsys: LinearSolver
    curvature: Hessian | GaussNewton = Hessian()
    damping: float = 0.0
    compile: bool = False

    def meta_gradient(self, problem: BilevelProblem, theta: Theta, data: Any) -> MetaGradient:
        found = bilevel.hypergradient(
            problem,
            theta,
            data,
            solver=self.solver,
            linsys=self.linsys,
            curvature=self.curvature,
            damping=self.damping,
            batched=True,
            chunk_size=self.chunk_size,
            outer_chunk_size=self.outer_chunk_size,
            compile=self.compile,
        )
        return _from_library(found)


@dataclass(frozen=True, kw_only=True)
class MAML(Algorithm):
    """MAML (Finn et al. 2017): back-propagation through the steps of the inner solver; `truncate`: through the last so many only.

    Truncated, no step reaches the starting point, so theta is only felt through the proximal term (Shaban et al. 2019).
    """

    truncate: int | None = None

    def meta_gradient(self, problem: BilevelProblem, theta: Theta, data: Any) -> MetaGradient:
        found = bilevel.unrolled(
            problem,
            theta,
            data,
            solver=self.solver,
            truncate=self.truncate,
            batched=True,
            chunk_size=self.chunk_size,
        )
        return _from_library(found)


@dataclass(frozen=True, kw_only=True)
class FirstOrderMAML(Algorithm):
    """First-order MAML (Finn et al. 2017): the query gradient at the adapted parameters, as if these moved with theta one to one."""

    def meta_gradient(self, problem: BilevelProblem, theta: Theta, data: Any) -> MetaGradient:
        found = bilevel.solve(problem, theta, data, solver=self.solver, batched=True, chunk_size=self.chunk_size)
        step = self.outer_chunk_size or self.chunk_size

        def loss(phi: Theta, task: Any) -> Tensor:
            return problem.outer_loss(phi, theta, task)

        grads, outer = torch.func.vmap(torch.func.grad_and_value(loss), chunk_size=step)(found.value, data)
        return _reduced(grads, outer, found)


@dataclass(frozen=True, kw_only=True)
class Reptile(Algorithm):
    """Reptile (Nichol et al. 2018): towards the adapted parameters, theta - phi. It never looks at the query set."""

    def meta_gradient(self, problem: BilevelProblem, theta: Theta, data: Any) -> MetaGradient:
        found = bilevel.solve(problem, theta, data, solver=self.solver, batched=True, chunk_size=self.chunk_size)
        steps = {name: theta[name].detach() - leaf for name, leaf in found.value.items()}
        step = self.outer_chunk_size or self.chunk_size

        def loss(phi: Theta, task: Any) -> Tensor:
            return problem.outer_loss(phi, theta, task)

        with torch.no_grad():  # for the log alone
            outer = torch.func.vmap(loss, chunk_size=step)(found.value, data)
        return _reduced(steps, outer, found)


def _from_library(found: bilevel.Hypergradient) -> MetaGradient:
    assert found.inner is not None
    return MetaGradient(
        grad=found.grad,
        outer=found.outer,
        phi=found.phi,
        ok=found.ok_per_task,
        inner=found.inner,
        linear=found.linear,
    )


def _reduced(grads: Theta, outer: Tensor, inner: Result) -> MetaGradient:
    """The mean over the tasks whose adaptation did not fail and whose numbers are finite."""
    ok = ~inner.failed & outer.isfinite()
    for grad in grads.values():
        ok = ok & grad.flatten(1).isfinite().all(1)
    weight = ok.to(outer.dtype) / ok.sum()  # 0 / 0 = NaN where none is ok

    def mean(x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 1)
        return (torch.where(ok.reshape(shape), x, 0) * weight.reshape(shape)).sum(0)

    return MetaGradient(
        grad={name: mean(grad.detach()) for name, grad in grads.items()},
        outer=mean(outer.detach()),
        phi=inner.value,
        ok=ok,
        inner=inner,
        linear=None,
    )
