"""The theorem, and the functions that return its numbers.

Let phi*(theta) solve dG/dphi(phi, theta) = 0 and let H = d2G/dphi2 be invertible there. Differentiating the condition,

    H dphi*/dtheta + d2G/dphi dtheta = 0,        so        dphi*/dtheta = -H^{-1} d2G/dphi dtheta

and the hypergradient of F(theta) = L(phi*(theta), theta) is

    dF/dtheta = dL/dtheta - (d2G/dphi dtheta)^T u,        H u = dL/dphi.

For the proximal problem, G = train_loss(phi) + lam/2 |phi - theta|^2, the cross derivative is -lam I and H = lam I +
H_train, so this is (I + H_train / lam)^{-1} dL/dphi: Lemma 1 and Eq. 6 of the paper. No rule here knows that.

How phi was found does not enter: this file knows no inner solver.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel.accuracy import to_accuracy, warmed
from bilevel.batching import (
    Gathered,
    Part,
    Reduction,
    as_tree,
    chunks,
    concatenate,
    gather,
    nan_where_not,
    ok_where_finite,
)
from bilevel.certificates import Certificate
from bilevel.checks import check_count, check_number
from bilevel.curvature import Curvature, Hessian, check_curvature
from bilevel.entry import (
    Call,
    Solver,
    check_linsys,
    check_solver,
    prepare,
    refuse_transforms,
    refuse_unused,
    run_solver,
)
from bilevel.gradient import Hypergradient
from bilevel.isolation import isolated, without_checkpoints
from bilevel.linsys.base import LinearSolver, norm
from bilevel.problem import BilevelProblem
from bilevel.recorded import with_programs
from bilevel.result import Result
from bilevel.status import Status, converged
from bilevel.trees import Tree


@isolated
def solve(
    problem: BilevelProblem,
    theta: Tree,
    data: Any = None,
    *,
    solver: Solver,
    init: Tree | None = None,
    batched: bool = False,
    theta_batched: bool = False,
    chunk_size: int | None = None,
    compile: bool = False,
) -> Result:
    """Solve the inner problem.

    Args:
        problem: the bilevel problem.
        theta: outer variable, a tree of float32 or float64 tensors.
        data: any tree; with ``batched`` each of its tensors has a leading task axis.
        solver: an inner solver of :mod:`bilevel.solvers`.
        init: start, a tree like phi (with the task axis if ``batched``); None: ``problem.initial_phi``.
        batched: solve a batch of tasks at once.
        theta_batched: theta has the task axis too: one theta for each task.
        chunk_size: at most this many tasks at once; bounds memory and changes nothing else.
        compile: record the derivatives of G as a list of tensor operations at the first call, and replay them without autograd from
            then on. Saves time where the tensors are small and the problem is solved many times, for several outer steps say; the
            recording itself takes from tenths of a second to seconds (a deep network), again for every new shape. Changes nothing
            else: what cannot be recorded is logged and computed as usual, and one gradient near the solution is checked against
            autograd, so that a value that the objective captured and that has changed since leads to a new recording.

    Returns:
        A :class:`~bilevel.Result`; ``value`` is phi, a tree like the start. It carries no graph; see :func:`argmin`. A solve that
        failed is no exception: ``status`` says so, of each task.

    Raises:
        TypeError: an argument is of the wrong kind: no inner solver, a leaf that is no tensor, other dtypes than float32 or float64, two
            dtypes; or called within a transform of ``torch.func``, for which there is :func:`argmin`.
        ValueError: an objective that is no scalar, wrong shapes, two devices, a leaf without the task axis, ``quadratic=True`` for a G that
            is not.
    """
    check_solver(solver)
    call = prepare(problem, theta, data, init, batched=batched, theta_batched=theta_batched, compile=compile)
    refuse_transforms(call, "solve")

    def run(call: Call) -> Result | None:
        return concatenate([run_solver(piece.objective(), piece.phi, solver) for piece in chunks(call, chunk_size)])

    found = with_programs(call, run)
    assert found is not None
    return as_tree(found, call)


@isolated
def implicit_gradient(
    problem: BilevelProblem,
    phi: Tree,
    theta: Tree,
    data: Any = None,
    *,
    linsys: LinearSolver,
    curvature: Curvature = Hessian(),
    damping: float = 0.0,
    batched: bool = False,
    theta_batched: bool = False,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    outer_chunk_size: int | None = None,
    allow_unused: bool = False,
    warm_start: Hypergradient | None = None,
    compile: bool = False,
) -> Hypergradient:
    """The hypergradient at a point phi that you bring, however it was found (the formula at the top of this module).

    Args:
        problem: the bilevel problem.
        phi: the point, a tree (with the task axis if ``batched``).
        theta: outer variable, a tree of float32 or float64 tensors.
        data: any tree; with ``batched`` each of its tensors has a leading task axis.
        linsys: a linear solver of :mod:`bilevel.linsys`.
        curvature: what stands for H: ``Hessian()`` or ``GaussNewton()``.
        damping: added to the diagonal of H. Like Gauss-Newton it biases the gradient.
        batched, theta_batched, chunk_size: as in :func:`solve`.
        reduction: "mean", "sum" or "none" over the tasks, for ``grad`` and ``outer``. With ``theta_batched`` the gradient keeps its
            task axis and is that of the reduced outer loss.
        outer_chunk_size: at most this many tasks at once in the outer loss alone: for tasks with more test data than
            training data, whose outer loss needs the most memory. Changes nothing else.
        allow_unused: give zero for a leaf of theta that enters neither G nor L, instead of an error.
        warm_start: the result for a theta nearby (of the previous outer step): the linear solve starts from its solution. Tasks that
            failed there start from zero.
        compile: as in :func:`solve`.

    Returns:
        A :class:`~bilevel.Hypergradient`; ``inner`` is None. ``grad`` is a tree like theta; with ``reduction="none"`` it has a task axis.

    Raises:
        TypeError, ValueError: as :func:`solve`; and ValueError for a leaf of theta that neither G nor L depends on
            (``allow_unused``), a linear solver that needs a known part of H which the problem does not have, or GaussNewton() for a
            problem that does not name its outputs.
    """
    call = prepare(
        problem, theta, data, phi, batched=batched, theta_batched=theta_batched, phi_name="phi", compile=compile
    )
    call = warmed(call, warm_start, phi_too=False)
    options = _Options(linsys, curvature, damping, allow_unused, outer_chunk_size)
    return _hypergradient(call, None, options, theta_batched, reduction, chunk_size, "implicit_gradient")


@isolated
def hypergradient(
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
    theta_batched: bool = False,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    outer_chunk_size: int | None = None,
    allow_unused: bool = False,
    warm_start: Hypergradient | None = None,
    accuracy: float | None = None,
    compile: bool = False,
) -> Hypergradient:
    """Solve the inner problem and take the hypergradient there: Algorithm 2 of the paper for a whole meta-batch. The fast path.

    Args:
        problem: the bilevel problem.
        theta: outer variable, a tree of float32 or float64 tensors. It need not require grad.
        data: any tree, handed to the functions of the problem; with ``batched`` each of its tensors has a leading task axis.
        solver: an inner solver of :mod:`bilevel.solvers`.
        linsys: a linear solver of :mod:`bilevel.linsys`.
        init: start of the inner solve, a tree like phi (with the task axis if ``batched``); None: ``problem.initial_phi``.
        curvature: what stands for the inner Hessian: ``Hessian()``, or ``GaussNewton()``, which biases the gradient.
        damping: added to its diagonal; biases the gradient too.
        batched: solve a batch of tasks at once.
        theta_batched: theta has the task axis too: one theta for each task. The gradient then keeps its task axis.
        reduction: "mean", "sum" or "none" over the tasks, for ``grad`` and ``outer``.
        chunk_size: at most this many tasks at once; bounds memory and changes nothing else.
        outer_chunk_size: the same for the outer loss alone.
        allow_unused: give zero for a leaf of theta that enters neither G nor L, instead of an error.
        compile: record the derivatives of G and replay them: see :func:`solve`.
        warm_start: the result of an earlier call, in the place of ``init``: the inner solve starts from its point, the linear solve
            from its solution.
        accuracy: wanted relative error of the gradient of each task. The tolerances of both solvers (their fields ``tol`` and
            ``rtol``) are then chosen, checked by the error estimate and tightened until it is met, each round from where the one
            before ended. Where it cannot be met (max_steps, or the rounding floor), the status says so. The bias of
            ``GaussNewton()`` and of damping is not counted. See :func:`bilevel.tolerances` for what it costs.

    Returns:
        A :class:`~bilevel.Hypergradient`: ``grad``, a tree like theta (with ``reduction="none"`` it has a task axis), ``outer``, ``phi``,
        and what both solves say of themselves. Tasks that failed are left out of the reduction (``ok_per_task``); ``unwrap()`` raises where
        none is left, and with ``reduction="none"`` where one failed.

    Raises:
        TypeError, ValueError: as :func:`implicit_gradient`; and ValueError for both of ``init`` and ``warm_start``, and for ``accuracy``
            where a second evaluation of the outer loss at the same point differs.
    """
    check_solver(solver)
    if warm_start is not None and init is not None:
        raise ValueError("expected init or warm_start, got both: each says where the inner solve starts.")
    call = prepare(problem, theta, data, init, batched=batched, theta_batched=theta_batched, compile=compile)
    options = _Options(linsys, curvature, damping, allow_unused, outer_chunk_size)

    def run(call: Call, solver: Solver, linsys: LinearSolver) -> Hypergradient:
        return _hypergradient(
            call, solver, replace(options, linsys=linsys), theta_batched, reduction, chunk_size, "hypergradient"
        )

    if accuracy is None:
        return run(warmed(call, warm_start, phi_too=True), solver, linsys)
    return to_accuracy(run, call, solver, linsys, accuracy, warm_start)


@dataclass(frozen=True)
class _Options:
    linsys: LinearSolver
    curvature: Curvature
    damping: float
    allow_unused: bool
    outer_chunk_size: int | None

    def __post_init__(self) -> None:
        check_linsys(self.linsys)
        if self.outer_chunk_size is not None:
            check_count("outer_chunk_size", self.outer_chunk_size)
        check_curvature(self.curvature)
        check_number("damping", self.damping)


@without_checkpoints()
def _hypergradient(
    call: Call,
    solver: Solver | None,
    options: _Options,
    theta_batched: bool,
    reduction: Reduction,
    chunk_size: int | None,
    name: str,
) -> Hypergradient:
    def run(call: Call) -> Gathered:
        return gather(call, lambda piece: _implicit(piece, solver, options), theta_batched, reduction, chunk_size, name)

    found = with_programs(call, run)
    assert found.part.linear is not None and found.part.inner_grad is not None
    certificate = Certificate(
        call=replace(call, phi=found.part.phi, u=found.part.linear.value),
        ok=found.part.ok,
        scale=found.scale,
        per_task=found.per_task,
        reduction=reduction,
        curvature=options.curvature,
        damping=options.damping,
        chunk_size=chunk_size,
        outer_chunk_size=options.outer_chunk_size,
        solves=not options.linsys.needs_known_inverse,
        met=converged(found.part.linear.codes),
        outer=found.part.outer.clone(),  # what the user does to the result is no change of the problem
        inner_grad=found.part.inner_grad,
    )
    return replace(found.hypergradient(call, reduction, options.curvature, options.damping), certificate=certificate)


def _implicit(call: Call, solver: Solver | None, options: _Options) -> Part:
    """The formula at the top of this module, for the tasks of one chunk."""
    objective = call.objective()
    run = None if solver is None else solver.run(objective, call.phi)
    phi = call.phi.detach() if run is None else run.phi
    objective.verify(phi)
    inner_grads = objective.num_grads
    outer, b, direct = call.outer_gradient(phi, options.outer_chunk_size)
    local = objective.linearise(phi, options.curvature, options.damping, with_theta=True)
    inner = None if run is None else run.result(local.value, local.grad, phi, inner_grads + 1, objective.num_matvecs)
    linear = options.linsys.solve(
        local.matvec, b, init=call.u, preconditioner=objective.curvature_inverse(options.damping)
    )
    cross = local.cross(linear.value)
    unused = [i for i, (a, c) in enumerate(zip(direct, cross, strict=True)) if a is None and c is None]
    if not options.allow_unused:
        refuse_unused(call, unused, "the inner objective")
    inner = None if inner is None else replace(inner, what="inner solve")
    ok = ~linear.failed if inner is None else ~(inner.failed | linear.failed)
    grads = []
    for leaf, a, c in zip(objective.theta_per_task(), direct, cross, strict=True):
        grad = torch.zeros_like(leaf) if a is None else a
        grads.append(grad.detach() if c is None else grad - c)
    finite = ok_where_finite(torch.ones_like(ok), outer, grads)
    codes = torch.where(finite | linear.failed, linear.codes, int(Status.NON_FINITE))
    linear = replace(linear, codes=codes, what="linear solve")
    ok = ok & finite
    return Part(phi, outer, nan_where_not(ok, grads), inner, linear, ok, norm(local.grad), local.grad.detach())
