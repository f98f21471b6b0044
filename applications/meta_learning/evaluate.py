"""Meta-test: adapt to tasks of held-out classes and measure on their queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import bilevel
from applications.meta_learning.data import Sampler, TaskBatch
from applications.meta_learning.method import Solver
from applications.meta_learning.problem import Theta, batched_outputs
from bilevel import BilevelProblem

BATCH = (
    25  # tasks drawn at a time. The tasks of a seed depend on it, so it is no option; `chunk_size` bounds the memory
)
CURVE_STEPS = (1, 2, 3, 5, 10, 20, 50, 100)


class Stopped(Exception):
    """An evaluation was abandoned because the program was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How many tasks, with how many query examples per class (None: as many as support examples)."""

    name: str
    tasks: int
    query_shots: int | None


PAPER = Protocol(name="paper", tasks=600, query_shots=None)
TIGHT = Protocol(name="tight", tasks=1000, query_shots=15)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A mean over tasks with its 95 % interval, 1.96 s / sqrt(n).

    metric: "accuracy" (share of right answers, 0 to 1) or "mse".
    mean: over all tasks. A task whose adaptation failed counts as accuracy 0; it is left out of a mean squared error.
    failed: number of such tasks.
    inner_residual: median of |dG/dphi| after adaptation.
    """

    metric: str
    mean: float
    interval: float
    tasks: int
    query_shots: int
    failed: int
    inner_residual: float

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f} %"
        return f"{self.mean:.4g} ± {self.interval:.2g}"


def evaluate(
    problem: BilevelProblem,
    module: nn.Module,
    theta: Theta,
    sampler: Sampler,
    *,
    solver: Solver,
    tasks: int,
    query_shots: int,
    chunk_size: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Adapt theta to each of `tasks` tasks with `solver`, `chunk_size` at a time (None: 25), and measure on their queries.

    Raises:
        Stopped: `should_stop` became true.
    """
    scores, residuals, failures = [], [], []
    for start in range(0, tasks, BATCH):
        if should_stop():
            raise Stopped
        data = sampler.sample(min(BATCH, tasks - start))
        result = bilevel.solve(problem, theta, data, solver=solver, batched=True, chunk_size=chunk_size)
        scores.append(_scores(batched_outputs(module, result.value, data["query"]["x"]), data))
        residuals.append(result.residual)
        failures.append(result.failed)
    regression = data["query"]["y"].is_floating_point()
    score, residual, failed = (torch.cat(parts).cpu() for parts in (scores, residuals, failures))
    kept = score[~failed] if regression else torch.where(failed, torch.zeros_like(score), score)
    return Evaluation(
        metric="mse" if regression else "accuracy",
        mean=kept.mean().item(),
        interval=1.96 * kept.std().item() / math.sqrt(max(1, len(kept))),
        tasks=tasks,
        query_shots=query_shots,
        failed=int(failed.sum()),
        inner_residual=residual.nanmedian().item(),
    )


def adaptation_curve(
    problem: BilevelProblem,
    module: nn.Module,
    theta: Theta,
    make_sampler: Callable[[], Sampler],
    *,
    solver: Solver,
    tasks: int,
    query_shots: int,
    chunk_size: int | None = None,
) -> list[tuple[int, Evaluation]]:
    """The evaluation after 1, 2, 3, ... inner steps of the same solver on the same tasks."""
    return [
        (
            steps,
            evaluate(
                problem,
                module,
                theta,
                make_sampler(),
                solver=replace(solver, max_steps=steps),
                tasks=tasks,
                query_shots=query_shots,
                chunk_size=chunk_size,
            ),
        )
        for steps in CURVE_STEPS
    ]


def _scores(outputs: Tensor, data: TaskBatch) -> Tensor:
    """Accuracy or mean squared error of each task, float64 (tasks,)."""
    y = data["query"]["y"]
    if y.is_floating_point():
        return (outputs - y).double().square().flatten(1).mean(1)
    return accuracy(outputs, y)


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """Share of right answers of each task: outputs (tasks, n, ways), y (tasks, n) -> (tasks,)."""
    return (outputs.argmax(-1) == y).double().mean(-1)
