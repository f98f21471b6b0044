"""Any procedure that returns a point: SciPy, another library, a sampler, a look-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.derivatives import Objective
from bilevel.linsys.base import check_number
from bilevel.solvers.base import InnerSolver, Run
from bilevel.trees import flatten


@dataclass(frozen=True)
class BlackBox(InnerSolver):
    """A procedure of the user's. The implicit gradient needs the point only, not the way to it (paper, section 3.1).

    Args:
        fn: ``fn(problem, theta, data, init) -> phi``; called with detached tensors, outside every transform, with
            gradient mode on,
            once for each task. Its answer must have the structure, shapes and dtype of ``init``. What it raises reaches
            the caller.
        tol: its answer counts as CONVERGED where ``|dG/dphi| <= tol``, else as MAX_STEPS.

    Raises:
        ValueError: at use, the answer is not like ``init``.
    """

    minimises: ClassVar[bool] = False

    fn: Callable[..., Any]
    tol: float = field(default=1e-6, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn: expected a function of (problem, theta, data, init), got {type(self.fn).__name__}.")
        check_number("tol", self.tol)

    def run(self, objective: Objective, phi: Tensor) -> Run:
        layout = objective.flat.phi
        answers = []
        for theta, data, init in objective.tasks(phi.clone()):  # fn may optimise its start in place
            with torch.enable_grad():
                answer = self.fn(objective.flat.problem, theta, data, init)
            leaves, structure = flatten(answer)
            if structure != layout.structure:
                raise ValueError(
                    f"BlackBox: expected a tree like init with leaves {layout.structure.paths()}, got "
                    f"leaves {structure.paths()}."
                )
            for path, leaf, shape in zip(structure.paths(), leaves, layout.shapes, strict=True):
                if not isinstance(leaf, Tensor) or leaf.shape != shape or leaf.dtype != phi.dtype:
                    got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
                    raise ValueError(
                        f"BlackBox: phi{path}: expected a tensor {phi.dtype} {tuple(shape)} like init, got {got}."
                    )
            answers.append(layout.ravel([leaf.detach().to(phi.device) for leaf in leaves]))
        found = torch.stack(answers).reshape(phi.shape)
        zero = torch.zeros(phi.shape[:-1], dtype=torch.int64, device=phi.device)
        no = zero.bool()
        return Run(found, no, no, zero, torch.full_like(phi[..., 0], torch.nan), None, self.tol)
