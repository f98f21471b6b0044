"""The derivative of what a solver computed, instead of the derivative of the solution.

Let phi_K(theta) be the point after K steps of an inner solver that started at ``initial_phi(theta)``. Unrolled differentiation takes the
gradient of L(phi_K(theta), theta) by the chain rule through all steps; with K steps of gradient descent that is MAML (Finn et al. 2017).
It needs no convergence and no linear system; in reverse mode its memory grows with K, in forward mode its time with the size of theta.
As K grows it tends to the implicit gradient, with an error of the order of K rho^K for a method of rate rho (Grazzi et al. 2020).
Truncated to the last k steps it is a biased but cheap version of it (Shaban et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.batching import Part, Reduction, gather, nan_where_not, ok_where_finite
from bilevel.entry import Call, check_solver, initial, prepare
from bilevel.linsys.base import check_count
from bilevel.path import PathObjective
from bilevel.problem import BilevelProblem
from bilevel.result import Hypergradient, Status
from bilevel.solvers.base import IterativeSolver, Run
from bilevel.trees import Tree

DIRECTIONS = 64  # of theta at once in forward mode


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
        truncate: differentiate the last so many steps only, >= 1, and the start not at all; None: all of them. A batch counts from
            the last step of its slowest task. Costs a second run of the steps.
        forward_mode: carry derivatives forwards: memory of one step for each entry of theta, however many steps.

    Returns:
        A :class:`~bilevel.Hypergradient`, whose ``linear`` is None. It has no ``error_bound`` and no ``error_estimate``.

    Raises:
        TypeError: the solver is not iterative, and so has no path (``BlackBox``).
        ValueError, NotImplementedError: as for :func:`bilevel.hypergradient`; the path through Gauss-Newton steps.
    """
    check_solver(solver)
    if not isinstance(solver, IterativeSolver):
        raise TypeError(
            f"unrolled: expected an iterative solver such as GradientDescent, got {solver!r}, which has no path."
        )
    if truncate is not None:
        check_count("truncate", truncate)
    call = prepare(problem, theta, data, init, batched=batched, theta_batched=theta_batched)

    def part_of(piece: Call) -> Part:
        return _part(piece, solver, init is not None, truncate, forward_mode, allow_unused)

    return gather(call, part_of, theta_batched, reduction, chunk_size, "unrolled").hypergradient(call, reduction)


def _part(
    call: Call, solver: IterativeSolver, fixed_start: bool, truncate: int | None, forward_mode: bool, allow_unused: bool
) -> Part:
    objective = call.objective()
    n = call.flat.num_theta
    levels = tuple((True,) * n + flags[n:] for flags in call.levels)
    skip = 0
    if truncate is not None:
        skip = max(int(solver.run(objective, call.phi).steps.max()) - truncate, 0)

    def path(*theta: Tensor) -> tuple[Tensor, Run]:
        """L ``(*batch,)`` after the path."""
        tensors = [*theta, *objective.tensors[n:]]
        phi = call.phi if fixed_start or skip else initial(call.flat, tensors, levels)
        run = solver.run(PathObjective(call.flat, levels, tensors, call.sizes, skip), phi)
        return call.outer_loss(run.phi, tensors, levels), run

    theta = objective.theta_per_task()
    derivative = _forwards if forward_mode else _backwards
    outer, run, grads = derivative(path, theta)
    unused = [f"theta{call.flat.theta.paths()[i]}" for i, grad in enumerate(grads) if grad is None]
    if unused and not allow_unused:
        raise ValueError(
            f"{', '.join(unused)}: expected every leaf of theta to enter the path of the inner solver or the outer loss, but the graph "
            "shows no use. Remove it from theta, or pass allow_unused=True for a zero gradient."
        )
    known = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(theta, grads, strict=True)]
    _, grad = objective.value_and_grad(run.phi)  # also refuses captured tensors
    inner = run.result(grad, run.phi, objective.num_grads, objective.num_matvecs)
    ok = ok_where_finite(~inner.failed, outer, known)
    inner = replace(inner, codes=torch.where(ok | inner.failed, inner.codes, int(Status.NON_FINITE)))
    return Part(run.phi, outer, nan_where_not(ok, [leaf.detach() for leaf in known]), inner, None, ok)


def _backwards(path: Any, theta: Sequence[Tensor]) -> tuple[Tensor, Run, list[Tensor | None]]:
    with torch.enable_grad():
        outer, run = path(*theta)
        grads: Sequence[Tensor | None] = [None] * len(theta)
        if outer.requires_grad:
            grads = torch.autograd.grad(outer.sum(), list(theta), allow_unused=True)
    return outer.detach(), replace(run, phi=run.phi.detach(), start=run.start.detach()), list(grads)


def _forwards(path: Any, theta: Sequence[Tensor]) -> tuple[Tensor, Run, list[Tensor | None]]:
    """One directional derivative for each entry of theta, for all tasks at once."""
    theta = [leaf.detach() for leaf in theta]
    with torch.no_grad():
        outer, run = path(*theta)
    grads: list[Tensor | None] = []
    for i, leaf in enumerate(theta):
        shape = leaf.shape[outer.ndim :]
        size = shape.numel()
        basis = torch.eye(size, dtype=leaf.dtype, device=leaf.device).reshape(size, *([1] * outer.ndim), *shape)

        def along(direction: Tensor, i: int = i, leaf: Tensor = leaf) -> Tensor:
            def moved(value: Tensor) -> Tensor:
                return path(*theta[:i], value, *theta[i + 1 :])[0]

            return torch.func.jvp(moved, (leaf,), (direction.expand_as(leaf),))[1]

        columns = torch.func.vmap(along, chunk_size=DIRECTIONS)(basis)  # (size, *batch)
        grads.append(columns.movedim(0, -1).reshape(leaf.shape))
    return outer, run, grads
