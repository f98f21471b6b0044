"""Is this hypergradient right, and if not, which part is wrong? One line in a user's test."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Hessian, Hypergradient, Result
from bilevel.checks import check_number
from bilevel.curvature import Curvature
from bilevel.entry import Solver, prepare
from bilevel.isolation import isolated
from bilevel.linsys.base import LinearSolver
from bilevel.testing.determinism import check_deterministic
from bilevel.testing.modules import same_entries
from bilevel.testing.pieces import derivative_parts
from bilevel.testing.report import CheckFailed, Part, Report, Verdict, not_judged
from bilevel.testing.solves import Answer, Choices, Sum, find_minimum
from bilevel.testing.view import View, cast, view
from bilevel.trees import Tree, flatten, tree_map

DEFAULT_RTOL = {torch.float64: 1e-5, torch.float32: 1e-3}
TASKS = 3  # of a batch, so many are checked


@isolated
def check_hypergradient(
    problem: BilevelProblem,
    theta: Tree,
    data: Any = None,
    *,
    solver: Solver,
    linsys: LinearSolver,
    init: Tree | None = None,
    curvature: Curvature = Hessian(),
    damping: float = 0.0,
    batched: bool = False,
    allow_unused: bool = False,
    rtol: float | None = None,
) -> Report:
    """Check ``bilevel.hypergradient(...)`` with these arguments against values of G and L, and name the part that is at fault.

    The references are computed in float64 where the problem allows that, also for a float32 call. They are: differences of G, L and
    dG/dphi for each derivative; the minimum of G, found again by Newton's method; the implicit formula with dense matrices; the
    gradient through one exact Newton step; differences of F(theta) = L(phi*(theta), theta). Above 500 variables no matrix is built;
    above 50, differences are taken along random directions, the same in each run.

    A truncated solve is at fault when what it leaves is larger than ``rtol``. The bias of ``GaussNewton()``, damping and
    ``Identity()`` is measured and shown as "by choice", and is no fault: ``report["curvature"].error`` is its size.

    Args:
        problem, theta, data, solver, linsys, init, curvature, damping, batched, allow_unused: as in :func:`bilevel.hypergradient`. Of a
            batch 3 tasks are checked, each as it comes out of the batched call: those that failed, then the first.
        rtol: the largest error that is no fault, relative to the larger of the two terms of the gradient. None: 1e-5 for float64 and
            1e-3 for float32, or 16 eps times the condition number of the inner Hessian where that is more (at most 0.1).

    Returns:
        The :class:`~bilevel.testing.Report`; of a batch, that of the worst task.

    Raises:
        CheckFailed: something is at fault, an ``AssertionError``; the message is the report, which it has as ``report``.
        ValueError: the problem is no deterministic function (:func:`~bilevel.testing.check_deterministic`), its ``composition`` is not
            that of its ``inner_objective``, or the solver writes to theta or data.
        TypeError, ValueError: an argument that ``hypergradient`` refuses.
    """
    if rtol is not None:
        check_number("rtol", rtol, positive=True)
    prepare(problem, theta, data, init, batched=batched)  # refuses what is no batch, say
    # before the call that follows, so that it changes neither a module nor an argument
    first = 0 if batched else None
    check_deterministic(problem, theta, _of_task(data, first), init=_of_task(init, first))
    before = cast((theta, data), None)
    found = bilevel.hypergradient(
        problem,
        theta,
        data,
        solver=solver,
        linsys=linsys,
        init=init,
        curvature=curvature,
        damping=damping,
        batched=batched,
        reduction="none",
        allow_unused=allow_unused,
    )
    _refuse_changes(before, (theta, data))
    reports = []
    for index in _tasks(found) if batched else [None]:
        own, start = _of_task(data, index), _of_task(init, index)
        if index:  # the first has been looked at
            check_deterministic(problem, theta, own, init=start)
        start = problem.initial_phi(theta, own) if start is None else start
        _refuse_another_composition(problem, start, theta, own)
        report = _examine(_Task(problem, theta, own, start, found, index), Choices(linsys, curvature, damping), rtol)
        if not report.ok:
            __tracebackhide__ = True  # pytest shows the caller's lines and the report, and not these
            raise CheckFailed(report)
        reports.append(report)
    worst = max(reports, key=lambda report: report["hypergradient"].error)
    unseen = len(found.outer_per_task) - len(reports) if batched else 0
    return (
        replace(worst, notes=(*worst.notes, f"{unseen} more tasks of the batch were not checked.")) if unseen else worst
    )


def _refuse_another_composition(problem: BilevelProblem, start: Tree, theta: Tree, data: Any) -> None:
    """``GaussNewton()`` takes the problem's word for what G is made of; the bias of another G would pass for a choice."""
    if problem.composition is None or (
        problem.split is None and (problem.knows_curvature or problem._curvature_is_missing)
    ):
        return
    objective = problem.inner_objective if problem.split is None else problem.split.remainder
    with torch.no_grad():
        phi = tree_map(
            lambda leaf: leaf + 0.1 * torch.arange(leaf.numel(), device=leaf.device).to(leaf).cos().reshape(leaf.shape),
            start,
        )
        value, made = objective(phi, theta, data), problem.composition.objective(phi, theta, data)
    apart, size = float((value - made).abs()), float(value.abs() + made.abs())
    if apart > torch.finfo(value.dtype).eps ** 0.5 * (1 + size):  # not where it is NaN: that is for the report
        raise ValueError(
            f"composition: expected what inner_objective is (without its known part), got {float(made):.6g} in the place of "
            f"{float(value):.6g} near the start. GaussNewton() would be that of another problem."
        )


def _tasks(found: Hypergradient) -> list[int]:
    """Which tasks of a batch to check: what failed comes first."""
    return torch.argsort(found.ok_per_task.long(), stable=True)[:TASKS].tolist()


def _refuse_changes(before: Any, after: Any) -> None:
    for path, old, new in zip(flatten(before)[1].paths(), flatten(before)[0], flatten(after)[0], strict=True):
        if isinstance(old, Tensor) and not bool(same_entries(old, new.detach()).all()):
            raise ValueError(
                f"{'data' if path.startswith('[1]') else 'theta'}{path[3:]}: changed during the call. A procedure of yours (solver, "
                "linsys) writes to its arguments in place, so every answer is that of other numbers. Let it work on a copy."
            )


def _of_task(tree: Any, index: int | None) -> Any:
    """One task of a batched tree."""

    def one(leaf: Any) -> Any:
        return leaf[index] if index is not None and isinstance(leaf, Tensor) and leaf.ndim else leaf

    return tree_map(one, tree)


@dataclass(frozen=True)
class _Task:
    """One problem, and what the library found; ``index``: its place in the batch."""

    problem: BilevelProblem
    theta: Tree
    data: Any
    start: Tree
    found: Hypergradient
    index: int | None

    @property
    def title(self) -> str:
        """For the report."""
        return "" if self.index is None else f"task {self.index} of {len(self.found.outer_per_task)}: "

    def answer(self, view: View) -> Answer:
        """What was found, in the precision of the references."""
        assert self.found.inner is not None

        def vector(tree: Tree) -> Tensor:
            return torch.cat([leaf.reshape(-1) for leaf in flatten(_of_task(tree, self.index))[0]]).to(view.dtype)

        def solve(result: Result) -> Result:
            codes, steps, residual = _of_task((result.codes, result.steps, result.residual), self.index)
            return Result(value=None, codes=codes, steps=steps, residual=residual)

        grad, phi, u = (vector(tree) for tree in (self.found.grad, self.found.phi, self.found.linear.value))
        return Answer(grad, phi, u, solve(self.found.inner), solve(self.found.linear))


def _examine(task: _Task, choices: Choices, rtol: float | None) -> Report:
    """The report on one task."""
    seen, start, theta = view(task.problem, task.start, task.theta, task.data)
    dtype = flatten(task.theta)[0][0].dtype
    allowed = rtol or DEFAULT_RTOL[dtype]
    answer = task.answer(seen)
    candidates = [start] if bool(answer.inner.failed) else [answer.phi, start]
    points = [phi for phi in candidates if seen.is_finite(phi, theta)]
    if not points:
        remark = f"G, L or dG/dphi is not finite where the inner solve starts. {answer.inner.describe('The solver')}"
        nowhere = Part(
            name="start",
            error=math.nan,
            tolerance=allowed,
            compared="G, L and dG/dphi where the inner solve starts",
            verdict=Verdict.FAULT,
            remark=remark,
        )
        return Report(parts=(nowhere,), rtol=allowed, setting=f"{task.title}{start.numel()} numbers in phi")
    parts, notes = derivative_parts(seen, points, theta, allowed)
    wrong = {part.name for part in parts if part.verdict is Verdict.FAULT}
    kappa = None
    if wrong & {"dG/dphi", "d2G/dphi2"}:
        parts += [not_judged(name) for name in ("implicit formula", "inner solve", "linear solve", "hypergradient")]
    else:
        minimum, note = find_minimum(seen, answer, start, theta)
        notes += [note] if note else []
        kappa = minimum.kappa
        if rtol is None and kappa is not None:
            allowed = max(allowed, min(16 * torch.finfo(dtype).eps * kappa, 0.1))
        parts += _after(parts, Sum(seen, theta, answer, choices, minimum, allowed).parts())
    if seen.dtype != torch.float64:
        notes.append(
            "The problem cannot be evaluated in float64 (does it hold float32 tensors of its own?), so the references are in float32 "
            "too, and less certain."
        )
    setting = (
        f"{task.title}{start.numel()} numbers in phi, {theta.numel()} in theta; gradient in {_name(dtype)}, references in "
        f"{_name(seen.dtype)}; rtol {allowed:.1e}" + ("" if kappa is None else f"; condition number {kappa:.1e}")
    )
    return Report(parts=tuple(parts), rtol=allowed, setting=setting, notes=tuple(notes))


def _after(derivatives: list[Part], others: list[Part]) -> list[Part]:
    """Where a derivative is at fault, so is what is made of it; the two solves have faults of their own, but none by its NaN."""
    wrong = [part for part in derivatives if part.is_at_fault]
    made = ("implicit formula", "Newton step", "hypergradient") if wrong else ()
    spread = any(not math.isfinite(part.error) for part in wrong)
    return [
        part.following() if part.name in made or (spread and not math.isfinite(part.error)) else part for part in others
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
