"""The gradient of the outer loss, with everything that tells how good it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.curvature import Curvature
from bilevel.result import Result
from bilevel.status import Check, SolverError, refused, require_check, summary
from bilevel.trees import Tree, flatten, how_to_tree


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a closer look at a hypergradient found. Where only rounding is left, a part is about as large as the error that this
    hides; inf where there is no estimate: ``linear`` where H is singular or indefinite as far as one can see, ``inner`` where
    Newton's method from phi comes near no minimum, or the products that a look may cost did not suffice.

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


class Evidence(Protocol):
    """What a hypergradient keeps of the call that made it, and answers from: see :mod:`bilevel.certificates`."""

    @property
    def call(self) -> Any:
        """Problem, theta and data; ``phi`` the point, ``u`` the solution of the linear system."""

    @property
    def known(self) -> bool:
        """The diagnosis is there, or can be had."""

    @property
    def error_bound(self) -> Tensor | None:
        """See :attr:`Hypergradient.error_bound`."""

    @property
    def diagnosis(self) -> Diagnosis:
        """See :meth:`Hypergradient.diagnose`."""

    @property
    def doubts(self) -> Any:
        """What the diagnosis cannot tell: ``ran_out``, ``hidden_linear`` and ``hidden_inner``, for each task."""

    def explain(self, result: Hypergradient) -> str:
        """See :meth:`Hypergradient.explain`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Hypergradient:
    """The gradient of the outer loss with respect to theta, with everything that tells how good it is.

    Attributes:
        grad: tree like theta. Mean or sum over the tasks that are ok; one per task for ``reduction="none"``, NaN where
            failed.
        outer: outer loss, reduced as ``grad``.
        outer_per_task: outer loss of each task ``(*batch,)``, whatever the reduction.
        phi: the point at which the gradient was taken, one per task.
        inner: the :class:`~bilevel.Result` of the inner solve; None where the point was handed in.
        linear: the :class:`~bilevel.Result` of the linear solve; its value is u, a tree like phi. None from
            :func:`bilevel.unrolled`.
        curvature: what stood for the Hessian.
        damping: what was added to its diagonal. Either one makes the gradient biased.
        ok_per_task: True where both solves succeeded and the gradient is finite, a bool tensor ``(*batch,)``.
        reduction: as asked for.
        grad_per_task: whether the leaves of ``grad`` have a task axis (``reduction="none"``, or ``theta_batched``).
        slope: ``|dG/dphi|`` at phi ``(*batch,)``, which is zero at a solution: the gradient is no better than that is
            small. None from :func:`bilevel.unrolled`.
        certificate: problem, phi, theta and data as the call saw them, for the questions below. It keeps no graph;
            change none of these tensors in place before you ask. It holds the whole batch of data: of many results that
            you keep, drop it by ``dataclasses.replace(result, certificate=None)``.
    """

    grad: Tree
    outer: Tensor
    outer_per_task: Tensor
    phi: Tree
    inner: Result | None
    linear: Result
    curvature: Curvature
    damping: float
    ok_per_task: Tensor
    reduction: str
    grad_per_task: bool = False
    slope: Tensor | None = None
    certificate: Evidence | None = field(default=None, repr=False, compare=False)

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
        """A rigorous bound on ``|grad - exact gradient|`` over all leaves, reduced as ``outer``; inf where its
        condition fails.

        None where it cannot be had: ``problem.constants`` does not state mu, rho and L (and C, unless the problem is
        proximal), or the curvature is Gauss-Newton or damped. Mean and sum are over the tasks that are ok. What
        rounding may do is added by a model of it, and dominates near the floor. The first use costs some products.
        Derivation: :mod:`bilevel.certificates`.

        Raises:
            ValueError: theta, data, phi or u were changed in place since, or what a function of the problem captured has
                changed; or a constant is neither a number nor one for each task.
        """
        return self._certificate().error_bound

    @property
    def error_estimate(self) -> Tensor:
        """An estimate of ``|grad - exact gradient|`` over all leaves, reduced as ``outer``. Parts: :meth:`diagnose`.

        No bound. What ``GaussNewton()`` and damping change is not counted.
        """
        return self.diagnose().error

    def diagnose(self) -> Diagnosis:
        """The estimated error with its parts.

        The first use goes on with the linear solve, takes a step of Newton's method from phi (more where phi is far
        from the solution), and solves the linear system there. What that cost is in :class:`Diagnosis`. Later uses cost
        nothing.

        Raises:
            ValueError: theta, data, phi or u were changed in place since, or what a function of the problem captured has
                changed.
        """
        return self._certificate().diagnosis

    def explain(self) -> str:
        """What happened, how good the gradient is and what to change, in a few sentences.

        Asks for the bound and the estimate, and takes some products more for the eigenvalues of the curvature.
        """
        return self._certificate().explain(self)

    def _certificate(self) -> Evidence:
        if self.certificate is None:
            raise ValueError(
                "error_bound, error_estimate and explain() are for hypergradient() and implicit_gradient(); an "
                "unrolled gradient has no certificate: it is exact for the path of the solver, and how far that is "
                "from phi* it does not know."
            )
        return self.certificate

    def __repr__(self) -> str:
        ok = self.ok_per_task
        tasks = f"{self.num_ok} of {ok.numel()} tasks ok" if ok.ndim else "ok" if bool(ok) else "not ok"
        solves: tuple[tuple[str, Result | None], ...] = (("inner solve", self.inner), ("linear solve", self.linear))
        words = [f"{what} {summary(s.codes, s.steps, s.residual)}" for what, s in solves if s is not None]
        return f"Hypergradient({'; '.join([tasks, *words])})"

    def describe(self) -> str:
        """What happened in both solves, in sentences."""
        solves: tuple[tuple[str, Result | None], ...] = (("inner solve", self.inner), ("linear solve", self.linear))
        lines = [solve.describe(what) for what, solve in solves if solve is not None]
        if self.inner is None and self.slope is not None:
            size = float(torch.nan_to_num(self.slope, nan=torch.inf).max())
            lines.insert(0, f"phi, as it was handed in: |dG/dphi| = {size:.3e}{' at most' if self.slope.ndim else ''}")
        return "\n".join(lines)

    def unwrap(self, *, check: Check = "failed") -> Tree:
        """``grad``.

        Args:
            check: "failed" (or True) raises where there is no gradient to be had. To use up its steps is no failure of
                a solve: "converged" raises there too, and so always after a solver without a tolerance; the gradient of
                every task that enters is then one of two solves that met their tolerances; of ``implicit_gradient`` it is
                the linear solve alone, and ``slope`` says how good the point is that was handed in. False never raises:
                ``grad`` is NaN where no task is ok.

        Raises:
            SolverError: no task is ok; where the gradient has a task axis (``grad_per_task``), any task is not ok. With
                ``check="converged"`` also: a solve of a task that is ok has not converged.
            ValueError: ``check`` is something else.
        """
        require_check(check, "unwrap")
        if not check:
            return self.grad
        ok = self.ok_per_task
        if not bool(ok.all() if self.grad_per_task else ok.any()):
            raise SolverError(self.describe(), self._without_evidence())
        if check == "converged":
            for what, solve in (("inner solve", self.inner), ("linear solve", self.linear)):
                if solve is None:
                    continue
                left = ok & refused(solve.codes, check)
                if bool(left.any()):
                    few = f"{what}: {int(left.sum())} of {left.numel()} not converged."
                    raise SolverError(f"{few}\n{self.describe()}", self._without_evidence())
        return self.grad

    def _without_evidence(self) -> Hypergradient:
        """For an error, which may be kept, or sent to another process: the problem may hold functions that cannot be."""
        return replace(self, certificate=None)

    def assign_grad(self, theta: Tree, *, check: Check = "failed") -> None:
        """Write ``grad`` to the ``.grad`` of the leaves of theta, in the place of what is there. With an optimizer over
        ``bilevel.tree_leaves(theta)`` its ``step()`` follows.

        ``check`` is that of :meth:`unwrap`; False reads no number, as a :class:`bilevel.CapturedStep` needs it, and writes NaN where no
        task is ok. As in a backward pass, a tensor that stands in theta twice gets the sum, and one that is frozen
        (``requires_grad=False`` beside others that are not) gets none.

        Raises:
            SolverError: as :meth:`unwrap`; nothing is written then.
            TypeError: theta is no tree of tensors.
            ValueError: theta is no tree like ``grad``, or a part of it was computed from other tensors.
        """
        (grads, structure), (leaves, own) = flatten(self.unwrap(check=check)), flatten(theta)
        for path, leaf in zip(own.paths(), leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"assign_grad: theta{path}: expected a tree of tensors, got {type(leaf).__name__}{how_to_tree(leaf)}."
                )
        shapes, expected = [leaf.shape for leaf in leaves], [grad.shape for grad in grads]
        if own != structure or shapes != expected:
            raise ValueError(
                f"assign_grad: expected a theta with leaves {structure.paths()} of shapes "
                f"{[tuple(shape) for shape in expected]}, got {own.paths()} of shapes "
                f"{[tuple(shape) for shape in shapes]}."
                + (" With theta_batched or reduction='none' the gradient has a task axis." if own == structure else "")
            )
        computed = [path for path, leaf in zip(own.paths(), leaves, strict=True) if leaf.grad_fn is not None]
        if computed:
            raise ValueError(
                f"assign_grad: theta{computed[0]} was computed from other tensors, which the gradient would not reach. Use "
                "torch.autograd.backward(bilevel.tree_leaves(theta), bilevel.tree_leaves(result.unwrap())), or hand over leaves."
            )
        free = [leaf.requires_grad for leaf in leaves]
        written: set[int] = set()
        for leaf, grad, wanted in zip(leaves, grads, free, strict=True):
            if wanted or not any(free):
                leaf.grad = (
                    leaf.grad + grad if id(leaf) in written else grad.clone()
                )  # clipping leaves the result as it is
                written.add(id(leaf))
