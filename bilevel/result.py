"""What a solve gives back: the value, what happened, and how close it came. Failure is never silent and never zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.isolation import isolated
from bilevel.trees import Tree, flatten


class Status(IntEnum):
    """What a solve ended with. Each member carries the sentence that the user reads, with cause and remedy.

    A batch of problems has an integer tensor of these codes; ``Status(int(code))`` is the member of one of them.
    """

    message: str
    failed: bool

    def __new__(cls, code: int, failed: bool = False, message: str = "") -> Status:
        """A member with its sentence; ``failed`` says whether the value may be used."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.failed = failed
        member.message = message
        return member

    CONVERGED = 0, False, "converged to the requested tolerance."
    MAX_STEPS = (
        1,
        False,
        "used all its steps (or reached the rounding floor) before the requested tolerance; raise max_steps or loosen the "
        "tolerance if the residual is too large for you.",
    )
    LINE_SEARCH_FAILED = (
        2,
        False,
        "no step along the search direction lowers the objective any more; the best point found is returned. Usual causes: the "
        "rounding floor (loosen tol or use float64), or an objective that is not a deterministic smooth function.",
    )
    STOPPED_AT_NEGATIVE_CURVATURE = (
        3,
        False,
        "met negative curvature and kept the answer found until then, as asked for (Steihaug); the answer is truncated there.",
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
        "diverged: the residual grew instead of falling, did not fall at all, or stopped falling far from zero. Reduce step_size (or "
        "leave it None), raise the regularisation, use Anderson or Newton for a map that is no contraction, or a larger rank of Nystrom.",
    )
    NON_FINITE = (
        6,
        True,
        "met NaN or infinity. Look for bad data, a log or a division by zero in the objective, or overflow in float32.",
    )
    NEGATIVE_CURVATURE = (
        7,
        True,
        "met negative curvature: the matrix is not positive definite, so the point is no strict minimum of the inner objective. "
        "Solve the inner problem further, raise the regularisation or damping, use GaussNewton() (of a problem "
        "made by from_model), or CG(steihaug=True), which keeps what it found before.",
    )
    SINGULAR = (
        8,
        True,
        "the matrix is singular to working precision, so there is no unique answer. Add regularisation or damping, or remove "
        "variables that the inner objective does not depend on.",
    )
    BREAKDOWN = (
        9,
        True,
        "the recurrence of the method broke down (it divides by a number that is zero here), and a fresh start of it too. Solve with "
        "GMRES or Exact, or from another start.",
    )


FAILED_CODES = tuple(int(status) for status in Status if status.failed)


SOLVED = (int(Status.CONVERGED), int(Status.SOLVED_INDEFINITE))


def failed(codes: Tensor) -> Tensor:
    """Which entries of a tensor of status codes are failures, as booleans of the same shape (without a host read)."""
    return codes >= min(FAILED_CODES)


class SolverError(RuntimeError):
    """A result that failed was asked for its value, or a solve failed under ``check=True``."""


@isolated
def describe(codes: Tensor, steps: Tensor, residual: Tensor, what: str) -> str:
    """One sentence for one problem, or the counts per status for a batch."""
    if codes.ndim == 0:
        status = Status(int(codes))
        return f"{what}: {status.name} after {int(steps)} steps, residual {float(residual):.3e}: {status.message}"
    lines = [f"{what}: {int(failed(codes).sum())} of {codes.numel()} problems failed:"]
    for status in Status:
        hit = codes == int(status)
        if hit.any():
            worst = float(torch.nan_to_num(residual[hit], nan=float("inf")).max())
            lines.append(
                f"  {int(hit.sum())} x {status.name} (at most {int(steps[hit].max())} steps, largest "
                f"residual {worst:.3e}): {status.message}"
            )
    return "\n".join(lines)


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
            methods that
            cannot see it.
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

    def describe(self, what: str | None = None) -> str:
        """What happened, in sentences."""
        return describe(self.codes, self.steps, self.residual, self.what if what is None else what)

    def unwrap(self) -> Any:
        """The value.

        Raises:
            SolverError: the solve failed (in a batch: any of them), with status, steps, residual and remedy.
        """
        if bool(self.failed.any()):
            raise SolverError(self.describe())
        return self.value


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a closer look at a hypergradient found. A part below the rounding error is 0; inf where there is no estimate, because the
    curvature is negative: then phi is near no minimum.

    Attributes:
        error: estimate of ``|grad - exact|`` over all leaves, reduced as ``outer``.
        linear: the part that the linear solve left, for each task ``(*batch,)``.
        inner: the part that the inner solve left ``(*batch,)``.
        size: the norm of the gradient of each task ``(*batch,)``.
        slope: ``|dG/dphi|`` at phi ``(*batch,)``.
        residual: ``|b - H u|``, measured anew ``(*batch,)``.
        rhs: ``|b| = |dL/dphi|`` ``(*batch,)``.
        num_grads: gradients of G that this look cost, each over the whole batch.
        num_matvecs: and products.
    """

    error: Tensor
    linear: Tensor
    inner: Tensor
    size: Tensor
    slope: Tensor
    residual: Tensor
    rhs: Tensor
    num_grads: int
    num_matvecs: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Hypergradient:
    """The gradient of the outer loss with respect to theta, with everything that tells how good it is.

    Attributes:
        grad: tree like theta. Mean or sum over the tasks that are ok; one per task for ``reduction="none"``, NaN where failed.
        outer: outer loss, reduced as ``grad``.
        outer_per_task: outer loss of each task ``(*batch,)``, whatever the reduction.
        phi: the point at which the gradient was taken, one per task.
        inner: the :class:`Result` of the inner solve; None where the point was handed in.
        linear: the :class:`Result` of the linear solve; its value is u, a tree like phi. None from :func:`bilevel.unrolled`.
        curvature: what stood for the Hessian.
        damping: what was added to its diagonal. Either one makes the gradient biased.
        ok: True where both solves succeeded and the gradient is finite: a bool, or a bool tensor ``(tasks,)``.
        num_ok: the number of tasks in ``grad`` and ``outer``.
        reduction: as asked for.
        grad_per_task: whether the leaves of ``grad`` have a task axis (``reduction="none"``, or ``theta_batched``).
        slope: ``|dG/dphi|`` at phi ``(*batch,)``, which is zero at a solution: the gradient is no better than that is small. None from
            :func:`bilevel.unrolled`.
        certificate: problem, phi, theta and data as the call saw them, for the questions below. It keeps no graph; change none of these
            tensors in place before you ask.
    """

    grad: Tree
    outer: Tensor
    outer_per_task: Tensor
    phi: Tree
    inner: Result | None
    linear: Result
    curvature: Any
    damping: float
    ok_per_task: Tensor
    reduction: str
    grad_per_task: bool = False
    slope: Tensor | None = None
    certificate: Any = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool | Tensor:
        """True where the gradient may be used: a bool for a single problem, a bool tensor ``(tasks,)`` for a batch."""
        return bool(self.ok_per_task) if self.ok_per_task.ndim == 0 else self.ok_per_task

    @property
    def num_ok(self) -> int:
        """The number of tasks that entered ``grad`` and ``outer``."""
        return int(self.ok_per_task.sum())

    @property
    def error_bound(self) -> Tensor | None:
        """A rigorous bound on ``|grad - exact gradient|`` over all leaves, reduced as ``outer``; inf where its condition fails.

        None where it cannot be had: ``problem.constants`` does not state mu, rho and L (and C, unless the problem is proximal), or the
        curvature is Gauss-Newton or damped. Mean and sum are over the tasks that are ok. What rounding may do is added by a model of it,
        and dominates near the floor. The first use costs about ten products. Derivation: :mod:`bilevel.certificates`.

        Raises:
            ValueError: theta, data, phi or u were changed in place since; or a constant is no number and not one for each task.
        """
        return self._certificate().error_bound

    @property
    def error_estimate(self) -> Tensor:
        """An estimate of ``|grad - exact gradient|`` over all leaves, reduced as ``outer``; :meth:`diagnose` has its parts.

        No bound. What ``GaussNewton()`` and damping change is not counted.
        """
        return self.diagnose().error

    def diagnose(self) -> Diagnosis:
        """The estimated error with its parts.

        The first use costs three gradients of G and two of L, and three solves by CG of at most 100 steps: on with the linear solve, a step
        of Newton's method from phi (at most seven more where phi is far from the solution), and the linear solve there; and 14 products.
        Later uses cost nothing.

        Raises:
            ValueError: theta, data, phi or u were changed in place since.
        """
        return self._certificate().diagnosis

    def explain(self) -> str:
        """What happened, how good the gradient is and what to change, in a few sentences.

        Asks for the bound, the estimate, and 30 products for the eigenvalues of the curvature.
        """
        return self._certificate().explain(self)

    def _certificate(self) -> Any:
        if self.certificate is None:
            raise ValueError(
                "error_bound, error_estimate and explain() are for hypergradient() and implicit_gradient(); an unrolled gradient has no "
                "certificate: it is exact for the path of the solver, and how far that is from phi* it does not know."
            )
        return self.certificate

    def describe(self) -> str:
        """What happened in both solves, in sentences."""
        solves: tuple[tuple[str, Result | None], ...] = (("inner solve", self.inner), ("linear solve", self.linear))
        lines = [solve.describe(what) for what, solve in solves if solve is not None]
        if self.inner is None and self.slope is not None:
            size = float(torch.nan_to_num(self.slope, nan=torch.inf).max())
            lines.insert(0, f"phi, as it was handed in: |dG/dphi| = {size:.3e}{' at most' if self.slope.ndim else ''}")
        return "\n".join(lines)

    def unwrap(self, *, check: Literal["failed", "converged"] = "failed") -> Tree:
        """``grad``.

        Args:
            check: a solve that has used up its steps is no failure. With "converged" it raises there too: the gradient of every task
                that enters is then one of two solves that met their tolerances. The same as ``check="converged"`` of :func:`argmin`.

        Raises:
            SolverError: no task is ok; where the gradient has a task axis (``grad_per_task``), any task is not ok. With
                ``check="converged"`` also: a solve of a task that is ok has not converged.
        """
        if check not in ("failed", "converged"):
            raise ValueError(f'check: expected "failed" or "converged", got {check!r}.')
        ok = self.ok_per_task
        if not bool(ok.all() if self.grad_per_task else ok.any()):
            raise SolverError(self.describe())
        if check == "converged":
            for what, solve in (("inner solve", self.inner), ("linear solve", self.linear)):
                if solve is None:
                    continue
                left = ok & ~torch.isin(solve.codes, solve.codes.new_tensor(SOLVED))
                if bool(left.any()):
                    raise SolverError(f"{what}: {int(left.sum())} of {left.numel()} not converged.\n{self.describe()}")
        return self.grad

    def assign_grad(self, theta: Tree) -> None:
        """Write ``grad`` to the ``.grad`` of the leaves of theta, in the place of what is there. With an optimizer over
        ``bilevel.tree_leaves(theta)`` its ``step()`` follows.

        Raises:
            SolverError: as :meth:`unwrap`; nothing is written then.
            ValueError: theta is no tree like ``grad``.
        """
        (grads, structure), (leaves, own) = flatten(self.unwrap()), flatten(theta)
        shapes, expected = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)], [grad.shape for grad in grads]
        if own != structure or shapes != expected:
            raise ValueError(
                f"assign_grad: expected a theta with leaves {structure.paths()} of shapes {[tuple(shape) for shape in expected]}, got "
                f"{own.paths()} of shapes {[tuple(shape) for shape in shapes]}."
                + (" With theta_batched or reduction='none' the gradient has a task axis." if own == structure else "")
            )
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()  # clipping it leaves the result as it is
