"""Any procedure that returns a point: another library, a sampler, a look-up."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.checks import check_number, keep_python_numbers
from bilevel.derivatives import Objective
from bilevel.derivatives.guards import refuse_writes, versions
from bilevel.problem import require_functions_of
from bilevel.solvers.base import InnerSolver, Run
from bilevel.trees import flatten

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a procedure found for one task.

    Attributes:
        phi: ``(d,)``.
        steps: that it took.
        start: ``|dG/dphi|`` at the start; NaN if it does not know.
        note: what it says of an answer that is not good enough; goes to the log.
    """

    phi: Tensor
    steps: int = 0
    start: float = torch.nan
    note: str = ""


class TaskByTask(InnerSolver):
    """A procedure that takes one task at a time. Its answers are measured, not believed: CONVERGED where ``|dG/dphi| <= tol``, else
    MAX_STEPS. ``num_grads`` and ``num_matvecs`` are those of the task that took most.
    """

    tol: float

    @abstractmethod
    def find(self, objective: Objective, phi: Tensor) -> Answer:
        """From the start phi ``(d,)``, which is its own to change, to an answer. ``objective`` has the batch shape ``()``."""

    def run(self, objective: Objective, phi: Tensor) -> Run:
        answers, singles = [], []
        for single, start in zip(objective.singles(), phi.reshape(-1, phi.shape[-1]), strict=True):
            answers.append(self.find(single, start.clone()))
            singles.append(single)
        notes = [answer.note for answer in answers if answer.note]
        if notes:
            _logger.warning("%r: %d of %d tasks are not solved to tol. %s", self, len(notes), len(answers), notes[0])
        objective.num_grads += max(single.num_grads for single in singles)
        objective.num_matvecs += max(single.num_matvecs for single in singles)
        batch = phi.shape[:-1]
        found = torch.stack([answer.phi for answer in answers]).reshape(phi.shape)
        steps = torch.tensor([answer.steps for answer in answers], device=phi.device).reshape(batch)
        start = phi.new_tensor([answer.start for answer in answers]).reshape(batch)
        no = torch.zeros_like(steps, dtype=torch.bool)
        return Run(found, no, no, steps, start, None, self.tol)


@dataclass(frozen=True)
class BlackBox(TaskByTask):
    """A procedure of the user's. The implicit gradient needs the point only, not the way to it (paper, section 3.1).

    Args:
        fn: ``fn(problem, theta, data, init) -> phi``; called with detached tensors, outside every transform, with
            gradient mode on, once for each task. Its answer must have the structure, shapes and dtype of ``init``. What
            it raises reaches the caller.
        tol: its answer counts as CONVERGED where ``|dG/dphi| <= tol``, else as MAX_STEPS.

    Raises:
        ValueError: at use, the answer is not like ``init``.
    """

    minimises: ClassVar[bool] = False

    fn: Callable[..., Any]
    tol: float = field(default=1e-6, kw_only=True)

    def __post_init__(self) -> None:
        require_functions_of("problem", "theta", "data", "init", fn=self.fn)
        check_number("tol", self.tol)
        keep_python_numbers(self)

    def find(self, objective: Objective, phi: Tensor) -> Answer:
        flat, layout = objective.flat, objective.flat.phi
        theta, data = flat.trees(objective.tensors)
        before = versions(objective.tensors)
        with torch.enable_grad():
            answer = self.fn(flat.problem, theta, data, layout.unravel(phi))
        refuse_writes(before, objective.tensors, "BlackBox: fn")
        leaves, structure = flatten(answer)
        if structure != layout.structure:
            raise ValueError(
                f"BlackBox: expected a tree like init with leaves {layout.structure.paths()}, "
                f"got leaves {structure.paths()}."
            )
        for path, leaf, shape in zip(structure.paths(), leaves, layout.shapes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape or leaf.dtype != phi.dtype:
                got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"BlackBox: phi{path}: expected a tensor {phi.dtype} {tuple(shape)} like init, got {got}."
                )
        # a copy: the next task may find its answer in the same buffer
        return Answer(layout.ravel([leaf.detach().to(phi.device) for leaf in leaves]).clone())
