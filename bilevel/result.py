"""What a solve gives back: the value, what happened, and how close it came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.status import Check, SolverError, Status, describe, failed, refused, require_check, summary


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """The outcome of one solve, or of a batch of them at once.

    Attributes:
        value: the answer: a tree like phi (from :func:`bilevel.solve`) or a vector ``(*batch, d)`` (from a linear
            solver).
        codes: status codes, integer tensor ``(*batch,)``.
        steps: steps that each problem took, integer tensor ``(*batch,)``.
        residual: inner: ``|dG/dphi|`` over all leaves; linear: ``|b - A u|``; tensor ``(*batch,)``. NaN where not
            measured.
        num_grads: gradient evaluations, each over the whole batch (or the tasks of it that are left).
        num_matvecs: products with the matrix, likewise.
        negative_curvature: how often each problem met negative curvature, integer tensor ``(*batch,)``; None from
            methods that cannot see it.
        what: which solve it was, in words.
    """

    value: Any
    codes: Tensor
    steps: Tensor
    residual: Tensor
    num_grads: int = 0
    num_matvecs: int = 0
    negative_curvature: Tensor | None = None
    what: str = "solve"

    @property
    def status(self) -> Status | Tensor:
        """The :class:`Status` of a single problem; the integer tensor ``(*batch,)`` of a batch."""
        return Status(int(self.codes)) if self.codes.ndim == 0 else self.codes

    @property
    def num_steps(self) -> int | Tensor:
        """Steps taken: a number for a single problem, an integer tensor ``(*batch,)`` for a batch."""
        return int(self.steps) if self.steps.ndim == 0 else self.steps

    @property
    def failed(self) -> Tensor:
        """Which problems failed, booleans ``(*batch,)``."""
        return failed(self.codes)

    def __repr__(self) -> str:
        return f"Result({self.what}: {summary(self.codes, self.steps, self.residual)})"

    def describe(self, what: str | None = None) -> str:
        """What happened, in sentences."""
        return describe(self.codes, self.steps, self.residual, self.what if what is None else what)

    def unwrap(self, *, check: Check = "failed") -> Any:
        """The value.

        Args:
            check: "failed" (or True) raises where a solve failed. To use up its steps is no failure: "converged" raises
                there too, and so always after a solver without a tolerance. False never raises; the value of a failed
                solve is then not to be used.

        Raises:
            SolverError: the solve (in a batch: any of them) failed, or with "converged" did not meet its tolerance. Its
                text has status, steps, residual and remedy.
            ValueError: ``check`` is something else.
        """
        require_check(check, "unwrap")
        if check and bool(refused(self.codes, check).any()):
            why = (
                "" if bool(self.failed.any()) else "check='converged': "
            )  # or nobody would see what is wrong with MAX_STEPS
            raise SolverError(why + self.describe(), self)
        return self.value
