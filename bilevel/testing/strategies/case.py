"""A problem with its exact solution and hypergradient, and how one is made of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.constants import Constants
from bilevel.problem import BilevelProblem
from bilevel.testing.strategies.draws import Array
from bilevel.testing.strategies.oracle import Arrays, Derivatives, exact
from bilevel.trees import Layout, Tree

MARGIN = 1e-10  # relative; far above what rounding does to a computed norm, far below what anybody would notice


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Case:
    """A bilevel problem whose answer is known.

    The inner objective is strongly convex everywhere. ``phi`` and ``grad`` are right to the last digits of their dtype for the numbers
    as they stand in ``theta`` and ``data``. (They are found in 38 digits from derivatives written by hand; see the source of
    ``bilevel.testing.strategies.oracle``.)

    Attributes:
        name: what was drawn, for the report of a failure.
        problem: the problem, with ``problem.constants`` set, so that ``error_bound`` is there where C is known.
        theta: a tree of tensors.
        data: a dict of tensors; with a leading task axis if ``batched``.
        phi: the exact inner solution, a tree (with the task axis if ``batched``).
        grad: the exact hypergradient, a tree like theta. If ``batched`` it has the task axis, as ``reduction="none"`` gives it.
        constants: rigorous for this theta and data, at every phi (``everywhere`` is set); numbers, or ``(tasks,)`` if ``batched``. None
            where no constant holds everywhere: B of a squared outer loss, C where theta is a penalty.
        beta: at least the largest eigenvalue of the inner Hessian at every phi; 1 / beta is a step size for gradient descent.
        batched: whether data, phi and grad have a task axis: the ``batched=`` of the call.
    """

    name: str
    problem: BilevelProblem
    theta: Tree
    data: dict[str, Tensor]
    phi: Tree
    grad: Tree
    constants: Constants
    beta: float | Tensor
    batched: bool

    @property
    def kappa(self) -> float | Tensor:
        """beta / mu, at least the condition number of the inner Hessian."""
        assert self.constants.mu is not None
        return self.beta / self.constants.mu

    def __repr__(self) -> str:
        shown = "".join(f",\n{name}={getattr(self, name)}" for name in ("theta", "data", "phi", "grad"))
        return f"Case({self.name!r}" + shown.replace("\n", "\n    ") + ")"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would list all fields of a dataclass, whatever its repr


@dataclass(frozen=True, kw_only=True)
class Model:
    """The numbers that make a case, in float64.

    Attributes:
        name, problem: as in :class:`Case`.
        theta: ``(p,)``.
        tasks: the data of each task.
        hidden: numbers that are part of the problem itself.
        derive: from the arrays of a task, ``hidden`` and ``theta`` to the derivatives.
        bound: from the same to the constants and beta.
        phi_layout, theta_layout: how the vectors are laid out as trees.
    """

    name: str
    problem: BilevelProblem
    theta: Array
    tasks: list[Arrays]
    derive: Callable[[Arrays], Derivatives]
    bound: Callable[[Arrays], tuple[Constants, float]]
    phi_layout: Layout
    theta_layout: Layout
    hidden: Arrays = field(default_factory=dict)

    def case(self, dtype: torch.dtype, batched: bool) -> Case:
        """Round the numbers to the dtype, and answer for the rounded ones."""
        theta = rounded(self.theta, dtype)
        tasks = [{name: rounded(array, dtype) for name, array in task.items()} for task in self.tasks]
        arrays = [{**task, **self.hidden, "theta": theta} for task in tasks]
        d = sum(self.phi_layout.sizes)
        answers = [exact(self.derive, each, d) for each in arrays]
        bounds = [self.bound(each) for each in arrays]
        stacked = {name: np.stack([task[name] for task in tasks]) for name in tasks[0]}
        phi, grad = (np.stack(column) for column in zip(*answers, strict=True))
        beta = torch.tensor([beta for _, beta in bounds], dtype=torch.float64)

        def tensor(array: Array) -> Tensor:
            return torch.tensor(array if batched else array[0], dtype=dtype if array.dtype.kind == "f" else None)

        constants = _stacked([constants for constants, _ in bounds]) if batched else bounds[0][0]
        self.problem.constants = constants
        return Case(
            name=self.name,
            problem=self.problem,
            theta=self.theta_layout.unravel(torch.tensor(theta, dtype=dtype)),
            data={name: tensor(array) for name, array in stacked.items()},
            phi=self.phi_layout.unravel(tensor(phi)),
            grad=self.theta_layout.unravel(tensor(grad)),
            constants=constants,
            beta=beta if batched else float(beta),
            batched=batched,
        )


def rounded(array: Array, dtype: torch.dtype) -> Array:
    """Floating numbers as the dtype would store them, as float64."""
    narrow = array.dtype.kind == "f" and dtype is torch.float32
    return array.astype(np.float32).astype(np.float64) if narrow else array


def _stacked(each: list[Constants]) -> Constants:
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(Constants)):
        values = [getattr(constants, name) for constants in each]
        columns[name] = (
            values[0] if name == "everywhere" or values[0] is None else torch.tensor(values, dtype=torch.float64)
        )
    return Constants(**columns)


def spectral_norm(matrix: Array) -> float:
    """At least the largest singular value."""
    return float(np.linalg.norm(matrix, 2)) * (1 + MARGIN)


def longest_row(matrix: Array) -> float:
    """At least the largest norm of a row."""
    return float(np.linalg.norm(matrix, axis=1).max()) * (1 + MARGIN)


def extreme_eigenvalues(matrix: Array, terms: int = 0) -> tuple[float, float]:
    """At most the smallest and at least the largest eigenvalue of a symmetric matrix, each entry of which is a sum of so many terms.

    Rounding included: of the sums, and of ``eigvalsh``, which is backward stable.
    """
    values = np.linalg.eigvalsh(matrix)
    error = 4 * (len(matrix) + terms) * float(np.finfo(np.float64).eps * np.abs(values).max())
    return float(values[0]) - error, float(values[-1]) + error
