"""Works A and B with TorchOpt: its implicit differentiation (custom_root, conjugate gradients) around a loop of gradient steps."""

from __future__ import annotations

import torch
import torchopt
from few_shot_problem import CG_STEPS, Phi, Task, Work, adapted, average
from torch import Tensor

WORK = Work()


def inner(phi: Phi, theta: Phi, x: Tensor, y: Tensor) -> Tensor:
    """G."""
    return WORK.loss(phi, x, y) + WORK.lam / 2 * sum((p - t).square().sum() for p, t in zip(phi, theta, strict=True))


@torchopt.diff.implicit.custom_root(
    torch.func.grad(inner, argnums=0),
    argnums=1,
    solve=torchopt.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=CG_STEPS),
)
def solve(phi: Phi, theta: Phi, x: Tensor, y: Tensor) -> Phi:
    """Gradient descent."""
    with torch.enable_grad():
        return tuple(
            leaf.detach() for leaf in adapted(WORK.loss, tuple(leaf.detach() for leaf in theta), x, y, WORK.lam)
        )


def gradient(theta: Phi, task: Task) -> Phi:
    """Of one task."""
    x, y, query_x, query_y = task
    outer = tuple(leaf.clone().requires_grad_() for leaf in theta)
    return torch.autograd.grad(WORK.loss(solve(theta, outer, x, y), query_x, query_y), outer)


def mean(theta: Phi, tasks: list[Task]) -> Phi:
    """The meta-gradient."""
    return average(gradient(theta, task) for task in tasks)


WORK.serve(mean)
