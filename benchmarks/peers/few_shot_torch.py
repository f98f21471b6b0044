"""Works A and B as the public codes do them: a loop over the tasks, each by hand in plain PyTorch."""

from __future__ import annotations

from few_shot_problem import Phi, Task, Work, average, imaml

WORK = Work()


def mean(theta: Phi, tasks: list[Task]) -> Phi:
    """The meta-gradient."""
    return average(imaml(WORK.loss, theta, task, WORK.lam) for task in tasks)


WORK.serve(mean)
