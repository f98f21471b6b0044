"""The derivative of what a solver computed, instead of the derivative of the solution.

Let phi_K(theta) be the point after K steps of an inner solver that started at ``initial_phi(theta)``. Unrolled differentiation takes

    dL/dtheta + (dphi_K/dtheta)^T dL/dphi        at phi_K,

by the chain rule through all steps; with K steps of gradient descent from theta that is MAML (Finn et al. 2017).
It needs no convergence and no linear system; in reverse mode its memory grows with K, in forward mode its time with the size of theta.
As K grows it tends to the implicit gradient, with an error of the order of K rho^K for a method of rate rho (Grazzi et al. 2020).
Truncated to the last k steps it is a biased but cheap version of it (Shaban et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.batching import Part, Reduction, gather, nan_where_not, ok_where_finite
from bilevel.checks import check_count
from bilevel.curvature import Hessian
from bilevel.derivatives import Levels, alike, jvp, refuse_captured
from bilevel.entry import Call, check_solver, initial, prepare, refuse_unused
from bilevel.gradient import Hypergradient
from bilevel.isolation import isolated, without_checkpoints
from bilevel.linsys.base import dot, select
from bilevel.path import PathObjective
from bilevel.problem import BilevelProblem
from bilevel.solvers.base import IterativeSolver, Run
from bilevel.status import Status
from bilevel.trees import Tree

DIRECTIONS = 64  # of theta at once in forward mode


@isolated
def unrolled(
    problem: BilevelProblem,
    theta: Tree,
    data: Any = None,
    *,
    solver: IterativeSolver,
    init: Tree | None = None,
    truncate: int | None = None,
    forward_mode: bool = False,
    batched: bool = False,
    theta_batched: bool = False,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    allow_unused: bool = False,
) -> Hypergradient:
    """The gradient of the outer loss through the path of the inner solver, and through ``initial_phi(theta)``.

    Args:
        problem, theta, data, batched, theta_batched, reduction, chunk_size, allow_unused: as in :func:`bilevel.hypergradient`.
        solver: an iterative inner solver with the curvature ``Hessian()``. Step sizes and momenta that it chooses are part of the path.
        init: start of the inner solve, a constant; None: ``problem.initial_phi``, whose dependence on theta counts.
        truncate: differentiate the last so many steps of each task only, >= 1, and the start only where a task took no more of them;
            None: all steps. Costs a second run of the steps.
        forward_mode: carry derivatives forwards: memory of one step for each entry of theta, however many steps.

    Returns:
        A :class:`~bilevel.Hypergradient`, whose ``linear`` is None. It has no ``error_bound`` and no ``error_estimate``.

    Raises:
        TypeError: the solver has no path that could be differentiated (``BlackBox``, ``Newton``).
        ValueError: as for :func:`bilevel.hypergradient`.
        NotImplementedError: the path through Gauss-Newton steps; in forward mode, an operator of the objective that has none.
    """
    check_solver(solver)
    if not isinstance(solver, IterativeSolver) or not solver.differentiable:
        raise TypeError(
            f"unrolled: expected an iterative solver such as GradientDescent or NewtonCG, got {solver!r}, which has no path that could "
            "be differentiated."
        )
    if truncate is not None:
        check_count("truncate", truncate)
    call = prepare(problem, theta, data, init, batched=batched, theta_batched=theta_batched)

    def part_of(piece: Call) -> Part:
        return _part(piece, solver, init is not None, truncate, forward_mode, allow_unused)

    return gather(call, part_of, theta_batched, reduction, chunk_size, "unrolled").hypergradient(call, reduction)


@without_checkpoints()
def _part(
    call: Call, solver: IterativeSolver, fixed_start: bool, truncate: int | None, forward_mode: bool, allow_unused: bool
) -> Part:
    """dL/dtheta + (dphi_K/dtheta)^T dL/dphi for the tasks of one chunk."""
    objective = call.objective()
    theta = objective.theta_per_task()
    path = _Path(call, solver, fixed_start)
    with torch.enable_grad():
        start = path.start(theta)
    if not fixed_start:
        refuse_captured(start, theta, "initial_phi")
    if truncate is not None or forward_mode:
        with torch.no_grad():
            run, num_grads, num_matvecs = path(theta)
    if truncate is not None:
        path = replace(path, skip=(run.steps - truncate).clamp_min(0))
    if not forward_mode:
        with torch.enable_grad():
            run, num_grads, num_matvecs = path(theta)
    phi = run.phi.detach()
    outer, slope, direct = call.outer_gradient(phi, None)
    through = _forwards(path, theta, slope) if forward_mode else _backwards(run.phi, theta, slope)
    seen = [a is not None or (b is not None and not forward_mode) for a, b in zip(direct, through, strict=True)]
    if not allow_unused and not all(seen):
        begins = path.skip is None or bool((path.skip == 0).any())
        _refuse_unused(call, phi, slope, seen, _backwards(start, theta, slope) if begins else [None] * len(theta))
    grads = [
        (torch.zeros_like(x) if a is None else a) + (0 if b is None else b)
        for x, a, b in zip(theta, direct, through, strict=True)
    ]
    level, residual = objective.value_and_grad(phi)  # also refuses captured tensors
    inner = replace(run, phi=phi, start=run.start.detach()).result(level, residual, phi, num_grads + 1, num_matvecs)
    ok = ok_where_finite(~inner.failed, outer, grads)
    codes = torch.where(ok | inner.failed, inner.codes, int(Status.NON_FINITE))
    inner = replace(inner, codes=codes, what="inner solve")
    return Part(phi, outer, nan_where_not(ok, [grad.detach() for grad in grads]), inner, None, ok)


@dataclass(frozen=True)
class _Path:
    """theta, its leaves with every batch axis -> the run of the solver, and the gradients and products that it took.

    ``skip``: how many of its first steps carry no derivative, for each task ``(*batch,)``.
    """

    call: Call
    solver: IterativeSolver
    fixed_start: bool
    skip: Tensor | None = None

    def __call__(self, theta: Sequence[Tensor]) -> tuple[Run, int, int]:
        tensors, levels = self._tensors(theta)
        phi = self.start(theta)
        if self.skip is not None:
            late = self.skip > 0
            phi = self.call.phi if bool(late.all()) else select(late, self.call.phi, phi)
        objective = PathObjective(self.call.flat, levels, tensors, self.call.sizes, self.skip)
        run = self.solver.run(objective, phi)
        return run, objective.num_grads, objective.num_matvecs

    def start(self, theta: Sequence[Tensor]) -> Tensor:
        """``initial_phi(theta)``, or what was given in its place ``(*batch, d)``."""
        return self.call.phi if self.fixed_start else initial(self.call.flat, *self._tensors(theta))

    def as_batch(self) -> _Path:
        """A single problem as a batch of one, whose scalars are no 0-d tensors: PyTorch's tangent of a 0-d float32 times a number of
        Python is float64.
        """
        call, skip = self.call, self.skip
        levels: Levels = ((False,) * len(call.tensors),)
        batch = replace(call, levels=levels, sizes=(1,), phi=call.phi.unsqueeze(0))
        return replace(self, call=batch, skip=None if skip is None else skip.unsqueeze(0))

    def _tensors(self, theta: Sequence[Tensor]) -> tuple[list[Tensor], Levels]:
        n = len(theta)
        return [*theta, *self.call.tensors[n:]], tuple((True,) * n + flags[n:] for flags in self.call.levels)


def _backwards(phi: Tensor, theta: Sequence[Tensor], slope: Tensor) -> list[Tensor | None]:
    """(dphi/dtheta)^T slope, None where the graph shows no dependence."""
    if not phi.requires_grad:
        return [None] * len(theta)
    return list(torch.autograd.grad(phi, theta, slope, allow_unused=True))


def _forwards(path: _Path, theta: Sequence[Tensor], slope: Tensor) -> list[Tensor | None]:
    """The same, by one directional derivative for each entry of theta, for all tasks at once."""
    if slope.ndim == 1:
        of_batch = _forwards(path.as_batch(), [leaf.unsqueeze(0) for leaf in theta], slope.unsqueeze(0))
        return [None if grad is None else grad.squeeze(0) for grad in of_batch]
    theta = [leaf.detach().contiguous() for leaf in theta]  # a tangent cannot be put beside an expanded tensor
    grads: list[Tensor | None] = []
    for i, leaf in enumerate(theta):
        batch_ndim = slope.ndim - 1
        shape = leaf.shape[batch_ndim:]
        if shape.numel() == 0:
            grads.append(torch.zeros_like(leaf))
            continue
        basis = torch.eye(shape.numel(), dtype=leaf.dtype, device=leaf.device)
        basis = basis.reshape(shape.numel(), *([1] * batch_ndim), *shape)

        def along(direction: Tensor, i: int = i, leaf: Tensor = leaf) -> Tensor:
            def moved(value: Tensor) -> Tensor:
                return path([*theta[:i], value, *theta[i + 1 :]])[0].phi

            return dot(alike(*jvp(moved, (leaf,), (direction.expand_as(leaf),))), slope)

        columns = torch.func.vmap(along, chunk_size=DIRECTIONS)(basis)  # (size, *batch)
        grads.append(columns.movedim(0, -1).reshape(leaf.shape))
    return grads


def _refuse_unused(
    call: Call, phi: Tensor, slope: Tensor, seen: Sequence[bool], of_start: Sequence[Tensor | None]
) -> None:
    """A leaf of theta that no graph shows to be used is an error. ``seen``: those that the path or L used; G and the start are asked
    again, because a path may have no steps, and forwards there is no graph."""
    of_gradient = call.objective().linearise(phi, Hessian(), 0.0, with_theta=True).cross(slope)
    uses = zip(seen, of_gradient, of_start, strict=True)
    unused = [i for i, (used, a, b) in enumerate(uses) if not used and a is None and b is None]
    refuse_unused(call, unused, "the path of the inner solver")
