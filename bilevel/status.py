"""What became of each problem: a code, what it means, and which codes a check lets pass."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.isolation import isolated


class Status(IntEnum):
    """What a solve ended with. Each member carries the sentence that the user reads, with cause and remedy.

    A batch of problems has an integer tensor of these codes; ``Status(int(code))`` is the member of one of them.
    """

    # Those that failed come last, DIVERGED first among them: :func:`failed` compares numbers.

    message: str
    failed: bool

    def __new__(cls, code: int, failed: bool = False, message: str = "") -> Status:
        """A member with its sentence; ``failed`` says whether the value may be used.

        The defaults are for type checkers, which take the look-up ``Status(code)`` for a call of this.
        """
        member = int.__new__(cls, code)
        member._value_ = code
        member.failed = failed
        member.message = message
        return member

    def __str__(self) -> str:
        """The name: a number says nothing to a reader."""
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec[-1:] in tuple("bdoxXn") else format(self.name, spec)

    CONVERGED = 0, False, "converged to the requested tolerance."
    MAX_STEPS = (
        1,
        False,
        "used all its steps (or reached the rounding floor) before the requested tolerance; raise max_steps (of GMRES, restart too; of "
        "Nystrom, rank; a black box has its own), or loosen the tolerance, if the residual is too large for you.",
    )
    LINE_SEARCH_FAILED = (
        2,
        False,
        "no step along the search direction lowers the objective any more; the best point found is returned. Usual "
        "causes: the rounding floor (give a tol, which is 0 by default, loosen it, or use float64), or an objective that is not a "
        "deterministic smooth function.",
    )
    STOPPED_AT_NEGATIVE_CURVATURE = (
        3,
        False,
        "met negative curvature and kept the answer found until then, as asked for (Steihaug); the answer is "
        "truncated there.",
    )
    SOLVED_INDEFINITE = (
        4,
        False,
        "solved, but the matrix is indefinite: the point is a saddle of the inner objective, not a minimum. Solve the "
        "inner problem further, or raise the regularisation.",
    )
    DIVERGED = (
        5,
        True,
        "diverged: the residual grew instead of falling, did not fall at all, or stopped falling far from zero. "
        "Reduce step_size (or leave it None) where there is one, raise the regularisation, begin nearer to the solution, use Anderson "
        "or Newton for a map that is no contraction, or a larger rank of Nystrom.",
    )
    NON_FINITE = (
        6,
        True,
        "met NaN or infinity. Look for bad data, a log or a division by zero in the objective, or overflow in float32.",
    )
    NEGATIVE_CURVATURE = (
        7,
        True,
        "met negative curvature: the matrix is not positive definite, so the point is no strict minimum of the inner "
        "objective. Solve the inner problem further, raise the regularisation or damping, use GaussNewton() (of a "
        "problem made by from_model), or CG(steihaug=True), which keeps what it found before.",
    )
    SINGULAR = (
        8,
        True,
        "the matrix is singular to working precision, so there is no unique answer. Add regularisation, or damping where the call has "
        "it; remove variables that the inner objective does not depend on, and redundant equations (or take GMRES, which finds one of the "
        "answers of equations that agree); or start elsewhere.",
    )
    BREAKDOWN = (
        9,
        True,
        "the recurrence of the method broke down: it divides by a number that is zero here, after a fresh start too, or grows "
        "until it overflows. Solve with GMRES or Exact, or from another start.",
    )


def failed(codes: Tensor) -> Tensor:
    """Which entries of a tensor of status codes are failures, as booleans of the same shape (without a host read)."""
    return codes >= int(Status.DIVERGED)


def converged(codes: Tensor) -> Tensor:
    """Which entries of a tensor of status codes met their tolerance, likewise."""
    return (codes == int(Status.CONVERGED)) | (codes == int(Status.SOLVED_INDEFINITE))


Check = Literal["failed", "converged"] | bool
"""When a call raises, the same wherever there is a ``check=``.

"failed" or True: a solve failed. "converged": a solve did not meet its tolerance, so also where it used up its steps;
``SOLVED_INDEFINITE`` met it. False: never.
"""


def require_check(check: Any, name: str) -> None:
    """Refuse what is no :data:`Check`.

    Raises:
        ValueError: it is something else; ``name`` is that of the call.
    """
    if not isinstance(check, bool) and not (isinstance(check, str) and check in ("failed", "converged")):
        raise ValueError(f'{name}: check: expected "failed" (or True), "converged" or False, got {check!r}.')


def refused(codes: Tensor, check: Check) -> Tensor:
    """Which entries of a tensor of status codes the check does not let pass, likewise."""
    if check == "converged":
        return ~converged(codes)
    return failed(codes) if check else torch.zeros_like(codes, dtype=torch.bool)


def summary(codes: Tensor, steps: Tensor, residual: Tensor) -> str:
    """A few words on one problem or a batch; none where nobody may look at numbers, as under ``vmap``."""
    try:
        if codes.ndim == 0:
            return f"{Status(int(codes))} after {int(steps)} steps, residual {float(residual):.2e}"
        counts = [
            f"{int((codes == int(status)).sum())} {status}" for status in Status if bool((codes == int(status)).any())
        ]
        return f"{codes.numel()} problems: {', '.join(counts)}; at most {int(steps.max())} steps"
    except RuntimeError:
        return "..."


class SolverError(RuntimeError):
    """A result was asked for its value, or a solve ended, and ``check`` does not let it pass.

    Attributes:
        result: the :class:`~bilevel.Result` or :class:`~bilevel.Hypergradient` that was refused, with its status codes and residuals
            (without ``certificate``).
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


@isolated
def describe(codes: Tensor, steps: Tensor, residual: Tensor, what: str) -> str:
    """One sentence for one problem, or the counts per status for a batch."""
    if codes.ndim == 0:
        status = Status(int(codes))
        message = status.message
        if status is Status.MAX_STEPS and int(steps) == 0 and bool(residual.isnan()):
            message = "took no step, and measured nothing: Identity() solves no system. CG does."
        return f"{what}: {status.name} after {int(steps)} steps, residual {float(residual):.3e}: {message}"
    lines = [f"{what}: {codes.numel()} problem{'s' * (codes.numel() != 1)}, {int(failed(codes).sum())} failed:"]
    for status in Status:
        hit = codes == int(status)
        if hit.any():
            worst = float(torch.nan_to_num(residual[hit], nan=float("inf")).max())
            lines.append(
                f"  {int(hit.sum())} x {status.name} ({_which(hit) if status.failed else ''}at most {int(steps[hit].max())} steps, largest "
                f"residual {worst:.3e}): {status.message}"
            )
    return "\n".join(lines)


FEW = 5
"""So many indices are named."""


def _which(hit: Tensor) -> str:
    """The first indices at which the mask is set; nothing where that is everywhere."""
    if bool(hit.all()):
        return ""
    found = hit.nonzero().tolist()
    names = [str(one[0]) if len(one) == 1 else str(tuple(one)) for one in found[:FEW]]
    return f"{'index' if len(found) == 1 else 'indices'} {', '.join(names)}{', ...' * (len(found) > FEW)}; "
