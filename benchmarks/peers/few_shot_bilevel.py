"""Works A and B with this library. The third argument: tasks at once in the inner problem and in the outer loss, as in `8,1`."""

from __future__ import annotations

import sys

import torch
from few_shot_problem import CG_STEPS, INNER_STEPS, STEP_SIZE, Phi, Task, Work, cross_entropy

import bilevel
from applications.meta_learning.allocator import keep_freed_memory
from applications.meta_learning.models import ConvNet
from applications.meta_learning.problem import few_shot_problem
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

keep_freed_memory()
WORK = Work()
NET = ConvNet(WORK.net[-1].out_features)
NAMES = [name for name, _ in NET.named_parameters()]
PROBLEM = few_shot_problem(NET, cross_entropy, WORK.lam)
CHUNK, OUTER_CHUNK = map(int, sys.argv[3].split(","))


def mean(theta: Phi, tasks: list[Task]) -> Phi:
    """The meta-gradient. ConvNet has its kernels as (3, 3, inputs, outputs)."""
    tree = {
        name: leaf.permute(2, 3, 1, 0).contiguous() if leaf.ndim == 4 else leaf
        for name, leaf in zip(NAMES, theta, strict=True)
    }
    x, y, query_x, query_y = (torch.stack(column) for column in zip(*tasks, strict=True))
    found = bilevel.hypergradient(
        PROBLEM,
        tree,
        {"support": {"x": x, "y": y}, "query": {"x": query_x, "y": query_y}},
        solver=GradientDescent(step_size=STEP_SIZE, max_steps=INNER_STEPS),
        linsys=CG(max_steps=CG_STEPS, rtol=0.0),
        batched=True,
        chunk_size=CHUNK,
        outer_chunk_size=OUTER_CHUNK,
    ).grad  # NaN, which the check would show, if no task succeeds
    return tuple(found[name].permute(3, 2, 0, 1) if found[name].ndim == 4 else found[name] for name in NAMES)


WORK.serve(mean)
