"""What does each inner solver, each linear solver and each tolerance cost, and how good is the hypergradient? Three problems.

    python benchmarks/choices.py [--quick] [--problem NAME ...] [--json docs/results/choices.json]
    python docs/results/publish.py benchmark choices      # figure and page, from the JSON

Inner solvers: time of the solve, and the error of the hypergradient at the point that it found, with a dense linear solve. Linear
solvers: time of the gradient at the exact point, and its error. So the two times add. Each method is run with tolerances from loose to
tight, and not with tighter ones once it has used all its steps. Time is processor time on one thread, the median over repetitions in
which all methods take turns. Errors are relative, over all entries, against dense matrices (benchmarks/testbeds.py). With --problem the
others keep what the JSON file has.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch
from testbeds import Testbed, testbeds, vector

import bilevel
from applications.meta_learning.logs import environment
from bilevel import GaussNewton, Status
from bilevel.linsys import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    Exact,
    Identity,
    Jacobi,
    Neumann,
    Nystrom,
    NystromPreconditioner,
)
from bilevel.solvers import (
    LBFGS,
    Anderson,
    BlackBox,
    FixedPointIteration,
    GradientDescent,
    NesterovAGD,
    Newton,
    NewtonCG,
    ScipyMinimize,
    TorchOptim,
)
from bilevel.trees import flatten, tree_map

Make = Callable[[float], Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        steps: limit of every iteration.
        tolerances: of the sweeps.
        grid: tolerances of both solves together.
        accuracies: asked for by ``accuracy=``.
        repeats: of the timings.
    """

    steps: int = 1000
    tolerances: tuple[float, ...] = tuple(10.0**-k for k in range(1, 9))
    grid: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
    accuracies: tuple[float, ...] = (1e-1, 1e-2, 1e-4)
    repeats: int = 5


def minimisers(bed: Testbed, steps: int) -> dict[str, Make]:
    """Inner solvers of an objective, as functions of the tolerance. Fixed steps are 1 / (largest eigenvalue), from the dense matrix."""
    length, d = 1 / bed.facts["largest eigenvalue"], bed.start.shape[-1]

    def momentum(params: Any) -> Any:
        return torch.optim.SGD(params, lr=length, momentum=0.9, nesterov=True)

    return {
        "GradientDescent, fixed step": lambda tol: GradientDescent(step_size=length, max_steps=steps, tol=tol),
        "GradientDescent, backtracking": lambda tol: GradientDescent(step_size=None, max_steps=steps, tol=tol),
        "NesterovAGD": lambda tol: NesterovAGD(step_size=None, max_steps=steps, tol=tol),
        "LBFGS": lambda tol: LBFGS(max_steps=steps, tol=tol),
        "NewtonCG, cg_steps=5": lambda tol: NewtonCG(max_steps=100, cg_steps=5, tol=tol),
        "NewtonCG, cg_rtol=0.1": lambda tol: NewtonCG(max_steps=100, cg_steps=d, cg_rtol=0.1, tol=tol),
        "ScipyMinimize, L-BFGS-B": lambda tol: ScipyMinimize(method="L-BFGS-B", tol=tol),
        "ScipyMinimize, trust-ncg": lambda tol: ScipyMinimize(method="trust-ncg", tol=tol),
        "TorchOptim, SGD with momentum": lambda tol: TorchOptim(momentum, max_steps=steps, tol=tol),
        "TorchOptim, Adam": lambda tol: TorchOptim(lambda p: torch.optim.Adam(p, lr=0.01), max_steps=steps, tol=tol),
    }


def equation_solvers(steps: int) -> dict[str, Make]:
    """The same for conditions that are no gradients."""
    inexact = GMRES(max_steps=200, rtol=0.1)
    return {
        "FixedPointIteration": lambda tol: FixedPointIteration(max_steps=steps, tol=tol),
        "Anderson": lambda tol: Anderson(max_steps=steps, tol=tol),
        "Newton, Exact": lambda tol: Newton(max_steps=50, tol=tol),
        "Newton, linsys=GMRES(rtol=0.1)": lambda tol: Newton(max_steps=50, tol=tol, linsys=inexact),
        "GradientDescent, backtracking": lambda tol: GradientDescent(step_size=None, max_steps=steps, tol=tol),
    }


def linear_solvers(bed: Testbed, plan: Plan) -> dict[str, tuple[Make, tuple[float, ...]]]:
    """As functions of a number, and the numbers: tolerances, or ranks."""
    d, rest = bed.start.shape[-1], {"max_steps": plan.steps}
    if bed.problem is None:
        return {
            "GMRES, restart 10": (lambda rtol: GMRES(**rest, rtol=rtol, restart=10), plan.tolerances),
            "GMRES, restart 30": (lambda rtol: GMRES(**rest, rtol=rtol), plan.tolerances),
            "GMRES, no restart": (lambda rtol: GMRES(**rest, rtol=rtol, restart=d), plan.tolerances),
            "GMRES, Jacobi(num_probes=20)": (
                lambda rtol: GMRES(**rest, rtol=rtol, preconditioner=Jacobi(num_probes=20)),
                plan.tolerances,
            ),
            "BiCGStab": (lambda rtol: BiCGStab(**rest, rtol=rtol), plan.tolerances),
            "Exact": (lambda _: Exact(), (0.0,)),
            "CG": (lambda rtol: CG(**rest, rtol=rtol), (1e-6,)),
        }
    shift, rank = 0.99 * bed.facts["smallest eigenvalue"], max(1, d // 10)
    if bed.batched:
        shift = bed.problem.curvature_scale  # lambda
    sketch = NystromPreconditioner(rank=rank, shift=shift)
    return {
        "CG": (lambda rtol: CG(**rest, rtol=rtol), plan.tolerances),
        "CG, Jacobi(num_probes=20)": (
            lambda rtol: CG(**rest, rtol=rtol, preconditioner=Jacobi(num_probes=20)),
            plan.tolerances,
        ),
        "CG, Jacobi()": (lambda rtol: CG(**rest, rtol=rtol, preconditioner=Jacobi()), plan.tolerances),
        "CG, NystromPreconditioner of rank d/10": (
            lambda rtol: CG(**rest, rtol=rtol, preconditioner=sketch),
            plan.tolerances,
        ),
        "MINRES": (lambda rtol: MINRES(**rest, rtol=rtol), plan.tolerances),
        "Neumann": (lambda rtol: Neumann(num_terms=plan.steps, rtol=rtol), plan.tolerances),
        "Nystrom, of growing rank": (
            lambda share: Nystrom(rank=max(1, int(share * d)), shift=shift),
            (0.05, 0.1, 0.2, 0.4, 0.8),
        ),
        "Exact": (lambda _: Exact(), (0.0,)),
        "Identity": (lambda _: Identity(), (0.0,)),
    }


def point(bed: Testbed, solver: Any) -> bilevel.Result:
    """The inner solve alone."""
    if bed.problem is not None:
        return bilevel.solve(bed.problem, bed.theta, bed.data, solver=solver, init=bed.start, batched=bed.batched)
    found: list[bilevel.Result] = []
    bilevel.fixed_point(
        bed.step, bed.theta, bed.data, solver=solver, linsys=Exact(), init=bed.start, report=found.append
    )
    return found[0]


def gradient(bed: Testbed, phi: Any, linsys: Any, **options: Any) -> tuple[float, Any, bilevel.Result]:
    """Processor seconds, hypergradient at this point, and the linear solve."""
    if bed.problem is not None:
        begin = time.process_time()
        result = bilevel.implicit_gradient(
            bed.problem, phi, bed.theta, bed.data, linsys=linsys, batched=bed.batched, **options
        )
        return time.process_time() - begin, result.grad, result.linear
    found: list[bilevel.Result] = []
    theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), bed.theta)
    z = bilevel.fixed_point(
        bed.step, theta, bed.data, solver=BlackBox(lambda *_: phi), linsys=linsys, init=phi, report=found.append
    )
    begin = time.process_time()
    grads = torch.autograd.grad(bed.outer(z, theta, bed.data), flatten(theta)[0], materialize_grads=True)
    return time.process_time() - begin, list(grads), found[-1]


def statuses(result: bilevel.Result) -> str:
    """The name, with the counts of a batch."""
    names = [Status(int(code)).name for code in result.codes.reshape(-1)]
    counts = {name: names.count(name) for name in sorted(set(names))}
    return names[0] if result.codes.ndim == 0 else ", ".join(f"{count} {name}" for name, count in counts.items())


def facts(bed: Testbed, result: bilevel.Result, grad: Any) -> dict[str, Any]:
    """What is worth keeping of one run; the error is None where there is no gradient."""
    error = bed.error(grad)
    return {
        "gradients": result.num_grads,
        "products": result.num_matvecs,
        "status": statuses(result),
        "error": error if error == error else None,
    }


Run = Callable[[], float]
Sweep = tuple[dict[str, Any], Run]


def inner_run(bed: Testbed, solver: Any) -> Sweep:
    """One row, and how to time it again."""

    def again() -> float:
        begin = time.process_time()
        point(bed, solver)
        return time.process_time() - begin

    result = point(bed, solver)
    return facts(bed, result, gradient(bed, result.value, Exact())[1]), again


def linear_run(bed: Testbed, linsys: Any) -> Sweep:
    """One row, and how to time it again."""
    _, grad, result = gradient(bed, bed.phi, linsys)
    return facts(bed, result, grad), lambda: gradient(bed, bed.phi, linsys)[0]


def sweep(
    bed: Testbed, run: Callable[[Testbed, Any], Sweep], ways: dict[str, tuple[Make, tuple[float, ...]]], scale: float
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Run]]]:
    """Every method with every number, until it has used all its steps; the rows, and what is still to be timed."""
    rows: dict[str, Any] = {}
    timed = []
    for label, (make, numbers) in ways.items():
        rows[label] = []
        for number in numbers:
            try:
                row, again = run(bed, make(scale * number))
            except (TypeError, ValueError) as refusal:  # the library says that it cannot be right here
                rows[label] = [{"refused": str(refusal).split(". ")[0]}]
                break
            rows[label].append({"number": number, **row})
            timed.append((rows[label][-1], again))
            if "MAX_STEPS" in row["status"] and not label.startswith("Nystrom"):
                break
    return rows, timed


def take_turns(timed: list[tuple[dict[str, Any], Run]], repeats: int) -> None:
    """Time everything, one after the other, again and again."""
    seconds: list[list[float]] = [[] for _ in timed]
    for _ in range(repeats):
        for (_, again), own in zip(timed, seconds, strict=True):
            own.append(again())
    for (row, _), own in zip(timed, seconds, strict=True):
        row["milliseconds"] = 1e3 * statistics.median(own)


def as_float32(bed: Testbed) -> Testbed:
    """The same problem in single precision; the exact answer stays."""

    def cast(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.float() if leaf.is_floating_point() else leaf

    single = copy.copy(bed)
    single.theta, single.data, single.start = (tree_map(cast, tree) for tree in (bed.theta, bed.data, bed.start))
    return single


def usual(bed: Testbed, plan: Plan, tol: float, rtol: float) -> tuple[Any, Any]:
    """The pair of solvers that the tolerances are varied with."""
    if bed.problem is None:
        return Anderson(max_steps=plan.steps, tol=tol), GMRES(max_steps=plan.steps, rtol=rtol)
    newton = NewtonCG(max_steps=100, cg_steps=bed.start.shape[-1], cg_rtol=0.1, tol=tol)
    return newton, CG(max_steps=plan.steps, rtol=rtol)


def tolerance_grid(bed: Testbed, plan: Plan, scale: float) -> dict[str, Any]:
    """Errors over inner tolerance (rows) and linear tolerance (columns), in both precisions."""
    grid: dict[str, Any] = {}
    for name, own in (("float64", bed), ("float32", as_float32(bed))):
        grid[name] = []
        for tol in plan.grid:
            found = point(own, usual(bed, plan, tol * scale, 0.0)[0])
            grads = [gradient(own, found.value, usual(bed, plan, 0.0, rtol)[1])[1] for rtol in plan.grid]
            errors = [bed.error(tree_map(torch.Tensor.double, grad)) for grad in grads]
            grid[name].append({"inner": statuses(found), "errors": [e if e == e else None for e in errors]})
    return grid


def asked(bed: Testbed, plan: Plan) -> list[dict[str, Any]]:
    """``accuracy=``: what comes of it, and what it costs with the error estimates that it makes."""
    rows = []
    for accuracy in plan.accuracies:
        solver, linsys = usual(bed, plan, 0.0, 0.0)
        options = {"init": bed.start, "batched": bed.batched, "accuracy": accuracy}
        result = bilevel.hypergradient(bed.problem, bed.theta, bed.data, solver=solver, linsys=linsys, **options)
        rows.append(
            {
                "accuracy": accuracy,
                "gradients": result.inner.num_grads + result.linear.num_grads,
                "products": result.inner.num_matvecs + result.linear.num_matvecs,
                "error": bed.error(result.grad),
            }
        )
    return rows


def ways_through(bed: Testbed, steps: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What can be done about negative curvature: a linear solver, and the options of the gradient."""
    tight = CG(max_steps=steps, rtol=1e-6)
    return {
        "`CG`": (tight, {}),
        "`CG(steihaug=True)`": (CG(max_steps=steps, rtol=1e-6, steihaug=True), {}),
        "`CG`, `damping=1.0`": (tight, {"damping": 1.0}),
        "`CG`, `GaussNewton()`": (tight, {"curvature": GaussNewton()}),
        "`MINRES`": (MINRES(max_steps=steps, rtol=1e-6), {}),
        "`Exact`": (Exact(), {}),
        "`Neumann`": (Neumann(num_terms=steps, rtol=1e-6), {}),
        "`Nystrom`": (Nystrom(rank=max(1, bed.start.shape[-1] // 10), shift=bed.problem.curvature_scale), {}),
        "`Identity`": (Identity(), {}),
    }


def stopped_early(bed: Testbed, plan: Plan, steps: int) -> dict[str, Any]:
    """After a few steps of gradient descent the matrix is indefinite. What each way through says there and at the solution."""
    solver = GradientDescent(step_size=1 / bed.facts["largest eigenvalue"], max_steps=steps)
    phi = point(bed, solver).value
    matrices = torch.stack([bed.jacobian(phi[k], bed.task(k)[1]) for k in range(len(phi))])
    lowest = torch.linalg.eigvalsh(matrices)[:, 0]
    rows: dict[str, dict[str, Any]] = {}
    for label, (linsys, options) in ways_through(bed, plan.steps).items():
        rows[label] = {}
        for where, at in (("early", phi), ("solved", bed.phi)):
            _, grad, result = gradient(bed, at, linsys, **options)
            rows[label][where] = facts(bed, result, grad)
    return {"steps": steps, "indefinite": int((lowest < 0).sum()), "smallest": float(lowest.min()), "rows": rows}


def measure(bed: Testbed, plan: Plan) -> dict[str, Any]:
    """Everything about one problem."""
    scale = bed.facts["residual at the start"]
    solvers = equation_solvers(plan.steps) if bed.problem is None else minimisers(bed, plan.steps)
    ways = {label: (make, plan.tolerances) for label, make in solvers.items()}
    inner, first = sweep(bed, inner_run, ways, scale)
    linear, second = sweep(bed, linear_run, linear_solvers(bed, plan), 1.0)
    take_turns(first + second, plan.repeats)
    return {
        "title": bed.title,
        "words": bed.words,
        "d": bed.start.shape[-1],
        "tasks": len(bed.start) if bed.batched else 1,
        "outer variables": len(vector(bed.theta)),
        "facts": bed.facts,
        "inner": inner,
        "linear": linear,
        "grid": tolerance_grid(bed, plan, scale),
        "accuracy": None if bed.problem is None else asked(bed, plan),
        "early": stopped_early(bed, plan, 5) if bed.batched else None,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small problems, one repetition: to see that it works")
    parser.add_argument("--problem", action="append", choices=list(testbeds(True, 0)), help="this one only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("bilevel").setLevel(logging.ERROR)  # that SciPy gave up is in the statuses
    kept = args.json is not None and args.json.exists() and args.problem
    problems = json.loads(args.json.read_text())["problems"] if kept else {}
    plan = Plan(60, (1e-1, 1e-3), (1e-1, 1e-3), (1e-1,), 1) if args.quick else Plan(repeats=args.repeats)
    for name, make in testbeds(args.quick, args.seed).items():
        if args.problem is None or name in args.problem:
            begin = time.process_time()
            problems[name] = measure(make(), plan)
            command = " ".join(["benchmarks/choices.py", *sys.argv[1:]])
            problems[name]["environment"] = environment(torch.device("cpu")) | {"command": command}
            print(f"{name}: {time.process_time() - begin:.0f} seconds of processor time")
    if args.json:
        options = {"quick": args.quick, "seed": args.seed, **asdict(plan)}
        args.json.write_text(json.dumps({"problems": problems, "options": options}, indent=1) + "\n")


if __name__ == "__main__":
    main()
