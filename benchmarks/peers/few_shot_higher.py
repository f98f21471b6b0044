"""Works A and B with higher. It unrolls: the gradient is MAML's, another one than the implicit gradient."""

from __future__ import annotations

import higher
import torch
from few_shot_problem import INNER_STEPS, STEP_SIZE, Phi, Task, Work, average, cross_entropy

WORK = Work()


def gradient(theta: Phi, task: Task) -> Phi:
    """Of one task."""
    x, y, query_x, query_y = task
    net = WORK.net.to(theta[0].dtype)
    with torch.no_grad():
        for parameter, leaf in zip(net.parameters(), theta, strict=True):
            parameter.copy_(leaf)
    optimizer = torch.optim.SGD(net.parameters(), STEP_SIZE)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (copy, steps):
        for _ in range(INNER_STEPS):
            steps.step(cross_entropy(copy(x), y))
        return torch.autograd.grad(cross_entropy(copy(query_x), query_y), list(net.parameters()))


def mean(theta: Phi, tasks: list[Task]) -> Phi:
    """The meta-gradient."""
    return average(gradient(theta, task) for task in tasks)


WORK.serve(mean, "maml")
