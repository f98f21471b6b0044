"""E7: how accurate is the implicit gradient on the real network? And what Assumption 1 of the paper says of products with the Hessian.

After K steps of gradient descent on G from theta there are two exact derivatives to compare with:

    of the path:      d/dtheta L(phi_K(theta)), by back-propagation through the K steps in float64. It always exists.
    of the solution:  d/dtheta L(phi*(theta)), the implicit gradient at a solved inner problem. It exists where dG/dphi = 0 is reached;
                      with ReLU a minimum may lie on a kink, where dG/dphi does not vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.data import TaskBatch
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.cost import cost, fresh_processes
from applications.meta_learning.method import build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.outputs import outputs_of
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import Theta, cross_entropy, few_shot_problem
from applications.meta_learning.report import PALETTE, STYLE
from applications.meta_learning.tasks import TaskSource, device_of, dtype_of, load_source
from applications.meta_learning.train import Trainer
from bilevel import BilevelProblem, GaussNewton, Hessian, Hypergradient
from bilevel.linsys import CG, Identity, LinearSolver
from bilevel.solvers import GradientDescent, NewtonCG

LAMBDAS = (2.0, 20.0, 500.0)
STEPS = (1, 4, 16, 64)
SMOOTHNESS = (
    60.0  # of the support loss, about: eigenvalues of 45 to 61 were seen; the inner step is 1 / (lambda + this)
)
META_STEPS, META_BATCH, TASKS, CHANNELS = 40, 4, 2, 32
LINEAR_STEPS = (0, 1, 2, 5, 10, 20)
SOLVED = 1e-8  # |dG/dphi| at which the inner problem counts as solved
MAML, FIRST_ORDER, GAUSS_NEWTON = "MAML", "first-order MAML", "iMAML, Gauss-Newton, 20 CG steps"
HESSIAN = {c: f"iMAML, {c} CG step{'s' if c > 1 else ''}" for c in (1, 5, 20)}
STARTS = ("initial network", "trained network")

Curvature = Hessian | GaussNewton


class E7GradientAccuracy(Experiment):
    """See the module."""

    name = "e7_gradient_accuracy"
    uses_gpu = True
    title = "E7. Accuracy of the implicit gradient on the real network"
    paper = "not in it; asked by the reviewers. Appendix A (from first order to iMAML) and Assumption 1 (cost of a product)."

    def run(self, request: Request) -> Numbers:
        config = _config(request)
        source = load_source(config, data_dir=request.data_dir)
        steps, lambdas = ((1, 2), LAMBDAS[2:]) if request.quick else (STEPS, LAMBDAS)
        meta_steps = 2 if request.quick else META_STEPS
        trainer = Trainer(config, source)
        thetas = {STARTS[0]: {name: leaf.detach().clone() for name, leaf in trainer.theta.items()}}
        request.part("training", partial(_train, trainer, meta_steps, request.parts / "theta.pt"))
        thetas[STARTS[1]] = torch.load(request.parts / "theta.pt", weights_only=True)
        cells = []
        for start, theta in thetas.items():
            for lam in lambdas:
                name = f"{start.replace(' ', '-')}-{lam:g}"
                case = _case(config, source, theta, lam)
                measured = request.part(name, partial(_cell, *case, lam, steps))
                check = request.part(f"{name}-check", partial(_path_against_differences, *case, lam, steps[-1]))
                cells.append({"start": start, "lam": lam, **measured, **check})
        with fresh_processes(reuse=request.quick) as processes:
            product = request.part("product", lambda: processes.submit(_products, config, request.data_dir).result())
        return {
            "dataset": config.dataset,
            "channels": config.channels,
            "tasks": TASKS,
            "query_shots": config.query_shots,
            "meta_steps": meta_steps,
            "meta_batch": config.meta_batch,
            "smoothness": SMOOTHNESS,
            "steps": list(steps),
            "linear_steps": list(LINEAR_STEPS),
            "cells": cells,
            "product": product,
        }

    def draw(self, result: Numbers, path: Path) -> None:
        lambdas = list(dict.fromkeys(cell["lam"] for cell in result["cells"]))
        with plt.rc_context(STYLE):
            figure, grid = plt.subplots(
                2, len(lambdas), figsize=(4 * len(lambdas), 7), layout="constrained", squeeze=False
            )
            for row, start in zip(grid, STARTS, strict=True):
                for axes, lam in zip(row, lambdas, strict=True):
                    (cell,) = (c for c in result["cells"] if (c["start"], c["lam"]) == (start, lam))
                    _panel(axes, result["steps"], cell)
                    axes.set(title=f"{start}, λ = {lam:g}", xlabel="inner steps")
                row[0].set_ylabel("relative error against the path's gradient")
            handles = grid[0, -1].get_legend_handles_labels()  # it has every line
            figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), fontsize=8)
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [
            *_conditions(result),
            "",
            *_references(result),
            "",
            *_errors_table(result),
            "",
            *_appendix_a(result),
            "",
            *_assumption_1(result["product"]),
        ]


# ----------------------------------------------------------------------------------------------------------------------
# Measurements


def _config(request: Request) -> Config:
    config = replace(
        preset("omniglot-5w1s-cpu"),
        channels=CHANNELS,
        meta_batch=META_BATCH,
        query_shots=5,
        threads=1,
        seed=request.seed,
    )
    if request.data_dir is None:
        config = replace(config, dataset="glyphs", glyph_classes=40, train_classes=20)
    return replace(config, channels=8, meta_batch=2) if request.quick else config


def _train(trainer: Trainer, meta_steps: int, path: Path) -> Numbers:
    """theta after some meta-steps, to `path`; the query loss of the last."""
    record = {}
    for _ in range(meta_steps):
        record = trainer.meta_step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: leaf.detach() for name, leaf in trainer.theta.items()}, path)
    return {"loss": record["loss"]}


def _case(config: Config, source: TaskSource, theta: Theta, lam: float) -> tuple[BilevelProblem, Theta, TaskBatch]:
    """Problem, theta and held-out tasks in float64."""
    config = replace(config, dtype="float64")
    device = device_of(config)
    module = build_network(config).to(device=device, dtype=torch.float64)
    shots, seed = config.query_shots, config.seed + 1
    data = source.sampler(config, held_out=True, query_shots=shots, seed=seed, device=device).sample(TASKS)
    return few_shot_problem(module, cross_entropy, lam), _cast(theta, torch.float64), data


def _cell(problem: BilevelProblem, theta: Theta, data: TaskBatch, lam: float, steps: tuple[int, ...]) -> Numbers:
    """All comparisons at one theta and one lambda."""
    paths, points = [], []
    for k in steps:
        solver = _gd(lam, k)
        found = bilevel.unrolled(problem, theta, data, solver=solver, batched=True, reduction="none")
        paths.append(found)
        points.append(found.phi)
    curves = [
        {"dtype": str(dtype).removeprefix("torch."), **curve}
        for dtype in (torch.float64, torch.float32)
        for curve in _curves(problem, theta, data, steps, lam, dtype, paths)
    ]
    return {
        "curves": curves,
        "residual": float(bilevel.solve(problem, theta, data, solver=_gd(lam, steps[-1]), batched=True).residual.max()),
        "residual_finer": float(
            bilevel.solve(problem, theta, data, solver=_gd(lam, 4 * steps[-1], 4), batched=True).residual.max()
        ),
        "solution": _solution(problem, theta, data, points[-1], paths),
        "linear": _over_linear_steps(problem, points[-1], theta, data, paths[-1]),
    }


def _curves(
    problem: BilevelProblem,
    theta: Theta,
    data: TaskBatch,
    steps: tuple[int, ...],
    lam: float,
    dtype: torch.dtype,
    paths: list[Hypergradient],
) -> list[Numbers]:
    """Relative errors over the inner steps, of all methods in this precision, against the gradient of the path in float64."""
    theta, data = _cast(theta, dtype), _cast(data, dtype)
    methods: dict[str, tuple[LinearSolver, Curvature]] = {
        FIRST_ORDER: (Identity(), Hessian()),
        GAUSS_NEWTON: (_cg(20), GaussNewton()),
    }
    methods |= {name: (_cg(c), Hessian()) for c, name in HESSIAN.items()}
    rows: dict[str, list[Numbers]] = {name: [] for name in (MAML, *methods)}
    for k, exact in zip(steps, paths, strict=True):
        solver = _gd(lam, k)
        maml = exact
        if dtype == torch.float32:
            maml = bilevel.unrolled(problem, theta, data, solver=solver, batched=True, reduction="none")
            rows[MAML].append(_compare(maml, exact))
        for name, (linsys, curvature) in methods.items():
            found = bilevel.implicit_gradient(
                problem, maml.phi, theta, data, linsys=linsys, curvature=curvature, batched=True, reduction="none"
            )
            rows[name].append(_compare(found, exact))
    return [
        {"method": name, **{key: [p[key] for p in points] for key in points[0]}}
        for name, points in rows.items()
        if points
    ]


def _gd(lam: float, steps: int, finer: int = 1) -> GradientDescent:
    return GradientDescent(step_size=1 / (lam + SMOOTHNESS) / finer, max_steps=steps)


def _cg(steps: int) -> CG:
    """So many steps; what was found before negative curvature is kept, and counted."""
    return CG(max_steps=steps, rtol=0.0, steihaug=True)


def _compare(found: Hypergradient, exact: Hypergradient) -> Numbers:
    """Relative error and cosine task by task, None where there is no gradient. negative: tasks at which CG met negative curvature."""
    a, b = _flat(found.grad), _flat(exact.grad)
    ok = (found.ok_per_task & exact.ok_per_task).tolist()
    error = ((a - b).norm(dim=-1) / b.norm(dim=-1)).tolist()
    cosine = torch.cosine_similarity(a, b, dim=-1).tolist()
    negative = 0
    if found.linear is not None and found.linear.negative_curvature is not None:
        negative = int(found.linear.negative_curvature.sum())
    return {
        "error": [x if good else None for x, good in zip(error, ok, strict=True)],
        "cosine": [x if good else None for x, good in zip(cosine, ok, strict=True)],
        "negative": negative,
    }


def _over_linear_steps(
    problem: BilevelProblem, phi: Theta, theta: Theta, data: TaskBatch, exact: Hypergradient
) -> Numbers:
    """Appendix A: from first-order MAML (no linear step) to iMAML."""
    rows = {}
    for name, curvature in (("Hessian", Hessian()), ("Gauss-Newton", GaussNewton())):
        found = [
            bilevel.implicit_gradient(
                problem,
                phi,
                theta,
                data,
                linsys=_cg(c) if c else Identity(),
                curvature=curvature,
                batched=True,
                reduction="none",
            )
            for c in LINEAR_STEPS
        ]
        rows[name] = [_compare(one, exact) for one in found]
    return rows


def _solution(
    problem: BilevelProblem, theta: Theta, data: TaskBatch, phi: Theta, paths: list[Hypergradient]
) -> list[Numbers]:
    """The implicit gradient at a solved inner problem, task by task: how well solved, and how far the gradients of the path are from it."""
    found = _solved(problem, theta, data, phi)
    assert found.inner is not None
    exact = _flat(found.grad)
    size = exact.norm(dim=-1)
    away = torch.stack([(_flat(path.grad) - exact).norm(dim=-1) / size for path in paths])  # (steps, tasks)
    rows = []
    for task in range(len(size)):
        residual = float(found.inner.residual[task])
        solved = residual <= SOLVED and bool(found.ok_per_task[task])
        rows.append(
            {
                "residual": residual,
                "linear_residual": float(found.linear.residual[task]) if bool(found.ok_per_task[task]) else None,
                "solved": solved,
                "path_error": away[:, task].tolist() if solved else None,
            }
        )
    return rows


def _solved(problem: BilevelProblem, theta: Theta, data: TaskBatch, phi: Theta) -> Hypergradient:
    """The implicit gradient with both solves as tight as they get; from phi on."""
    return bilevel.hypergradient(
        problem,
        theta,
        data,
        solver=NewtonCG(max_steps=8, cg_steps=20, cg_rtol=1e-3, tol=1e-11),
        linsys=CG(max_steps=60, rtol=1e-11),
        init=phi,
        batched=True,
        reduction="none",
    )


def _path_against_differences(
    problem: BilevelProblem, theta: Theta, data: TaskBatch, lam: float, k: int, scale: float = 1.0
) -> Numbers:
    """|slope - central difference| / |difference| task by task, along one direction: is the gradient of the path what it should be?

    The direction, of length about one, is the mean gradient plus a random one. scale: multiplies the gradient, for the test of this.
    """
    solver = _gd(lam, k)
    found = bilevel.unrolled(problem, theta, data, solver=solver, batched=True, reduction="none")
    generator = torch.Generator().manual_seed(0)
    random = {
        name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for name, leaf in theta.items()
    }
    mean = {name: leaf.mean(0) for name, leaf in found.grad.items()}
    direction = {name: mean[name] / _length(mean) + random[name] / _length(random) for name in theta}

    def loss(h: float) -> Tensor:
        moved = {name: leaf + h * direction[name] for name, leaf in theta.items()}
        phi = bilevel.solve(problem, moved, data, solver=solver, batched=True).value
        return torch.func.vmap(lambda phi, task: problem.outer_loss(phi, moved, task))(phi, data)

    with torch.no_grad():
        difference = (loss(1e-8) - loss(-1e-8)) / 2e-8
    slope = scale * torch.stack([(found.grad[name] * direction[name]).flatten(1).sum(1) for name in theta]).sum(0)
    return {"path": ((slope - difference).abs() / difference.abs()).tolist()}


def _length(tree: Theta) -> Tensor:
    return torch.stack([leaf.norm() for leaf in tree.values()]).norm()


def _flat(tree: Theta) -> Tensor:
    """(tasks, d) in float64."""
    return torch.cat([tree[name].double().flatten(1) for name in sorted(tree)], dim=-1)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, dict):
        return {name: _cast(leaf, dtype) for name, leaf in tree.items()}
    return tree.to(dtype) if tree.is_floating_point() else tree


def _products(config: Config, data_dir: Path | None) -> Numbers:
    """Time and memory of a gradient and of a product with the Hessian by reverse over reverse (Assumption 1), in one process.

    20-way 5-shot, one task, so that the activations are most of the memory.
    """
    torch.set_num_threads(1)
    config = replace(config, ways=20, shots=5, query_shots=1)
    device, dtype = device_of(config), dtype_of(config)
    sampler = load_source(config, data_dir=data_dir).sampler(
        config, held_out=False, query_shots=1, seed=config.seed, device=device
    )
    support = {key: value[0] for key, value in sampler.sample(1)["support"].items()}
    module = build_network(config).to(device=device, dtype=dtype)
    outputs_at = outputs_of(module)
    phi = {name: leaf.requires_grad_() for name, leaf in initial_theta(module, dtype, device).items()}
    generator = torch.Generator().manual_seed(config.seed)
    v = [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in phi.values()]

    def gradient(create_graph: bool = False) -> tuple[Tensor, ...]:
        loss = cross_entropy(outputs_at(phi, support["x"]), support["y"])
        return torch.autograd.grad(loss, list(phi.values()), create_graph=create_graph)

    def product() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient(create_graph=True), list(phi.values()), v)

    calls: dict[str, Callable[[], object]] = {"gradient": gradient, "product": product}
    return {name: cost(call, product, device=device, repeats=15) for name, call in calls.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The page


def _panel(axes: Any, steps: list[int], cell: Numbers) -> None:
    names = (FIRST_ORDER, GAUSS_NEWTON, HESSIAN[5], HESSIAN[20])
    for name, colour in zip(names, PALETTE, strict=True):
        (curve,) = _select(cell, name, "float64")
        axes.loglog(steps, _drawn(curve["error"]), "o-", ms=3, color=colour, label=name)
    (curve,) = _select(cell, MAML, "float32")
    axes.loglog(steps, _drawn(curve["error"]), "k:", label="MAML in float32")
    solved = [row["path_error"] for row in cell["solution"] if row["solved"]]
    if solved:
        axes.loglog(steps, solved[0], "k--", lw=1, label="MAML against the solution (a solved task)")
    axes.set_xticks(steps, [str(k) for k in steps])
    axes.minorticks_off()


def _drawn(errors: list[list[float | None]]) -> list[float]:
    """The largest over the tasks; gaps where there is none."""
    return [max((e for e in by_task if e is not None), default=math.nan) for by_task in errors]


def _select(cell: Numbers, method: str, dtype: str) -> list[Numbers]:
    return [curve for curve in cell["curves"] if (curve["method"], curve["dtype"]) == (method, dtype)]


def _number(x: float | None) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{x:.1e}"


def _by_task(values: list[float | None], digits: str = ".1e") -> str:
    return " / ".join("–" if x is None or not math.isfinite(x) else format(x, digits) for x in values)


def _conditions(result: Numbers) -> list[str]:
    images = "Omniglot" if result["dataset"] == "omniglot" else "generated characters in the place of Omniglot"
    return [
        f"{images}, 5-way 1-shot, {result['query_shots']} queries per class, {result['tasks']} held-out tasks, {result['channels']} "
        "channels (the paper has 64): so few that this takes minutes on one core. The trained network has had "
        f"{result['meta_steps']} meta-steps of {result['meta_batch']} tasks of the preset `omniglot-5w1s-cpu`. Inner solver: gradient "
        "descent with the step 1 / (λ + "
        f"{result['smoothness']:g}). The figure shows the largest error of the tasks.",
    ]  # fmt: skip


def _references(result: Numbers) -> list[str]:
    body = []
    for cell in result["cells"]:
        solution = cell["solution"]
        solved = [row for row in solution if row["solved"]]
        ends = [row["path_error"][-1] for row in solved]
        body.append(
            [
                cell["start"],
                f"{cell['lam']:g}",
                _number(cell["residual"]),
                _number(cell["residual_finer"]),
                _by_task(cell["path"]),
                _by_task([row["residual"] for row in solution]),
                f"{len(solved)} of {len(solution)}",
                _by_task(ends) or "–",
            ]
        )
    last = result["steps"][-1]
    header = [
        "network",
        "λ",
        f"largest inner residual after {last} steps",
        f"after {4 * last} of a quarter the size",
        "path against differences, by task",
        "residual after Newton-CG on top, by task",
        "tasks solved",
        "path against solution",
    ]
    some = [f"{c['lam']:g} ({c['start']})" for c in result["cells"] if any(row["solved"] for row in c["solution"])]
    none = [f"{c['lam']:g} ({c['start']})" for c in result["cells"] if not any(row["solved"] for row in c["solution"])]
    return [
        "## What there is to compare with",
        "",
        "*Path*: back-propagation through the steps in float64; beside it its relative distance from a central difference of L(φ_K(θ)) "
        "along one direction. A number near 1: the difference is far larger than the slope, so this function jumps between the two points, "
        "as a step across a kink of the ReLU does. *Solution*: the implicit gradient where "
        f"|dG/dφ| ≤ {SOLVED:.0e} was reached and CG found no negative curvature; only there it is the derivative of anything.",
        "",
        *table(header, body),
        "",
        f"The solution can be trusted for at least one task at λ = {', '.join(some) or '(none)'}; it does not exist, or was not "
        f"reached, at λ = {', '.join(none) or '(none)'}. A residual that neither more steps, nor smaller ones, nor Newton's method "
        "lower, points to a minimum on a kink of the ReLU, where dG/dφ does not vanish and the implicit function theorem does not apply.",
    ]  # fmt: skip


def _errors_table(result: Numbers) -> list[str]:
    last = result["steps"][-1]
    names = (FIRST_ORDER, *HESSIAN.values(), GAUSS_NEWTON, MAML)
    body = []
    for cell in result["cells"]:
        for dtype in ("float64", "float32"):
            row = []
            for name in names:
                curves = _select(cell, name, dtype)
                row.append(_with_negative(curves[0], -1) if curves else "the reference")
            body.append([cell["start"], f"{cell['lam']:g}", dtype, *row])
    return [
        f"## Error against the gradient of the path, after {last} inner steps",
        "",
        "Relative, task by task; in brackets, where there are any, the tasks at which CG met negative curvature and stopped. float32 "
        "is compared with the path in float64.",
        "",
        *table(["network", "λ", "precision", *names], body),
    ]  # fmt: skip


def _with_negative(curve: Numbers, at: int) -> str:
    negative = curve["negative"][at]
    return _by_task(curve["error"][at]) + (f" ({negative})" if negative else "")


def _appendix_a(result: Numbers) -> list[str]:
    lines = [
        "## From first-order MAML to iMAML (Appendix A)",
        "",
        f"Cosine with the gradient of the path after {result['steps'][-1]} inner steps; relative error; task by task; over the steps "
        "of CG; 0 is first-order MAML.",
        "",
    ]  # fmt: skip
    body = [
        [
            cell["start"],
            f"{cell['lam']:g}",
            name,
            *(f"{_by_task(p['cosine'], '.2f')}; {_by_task(p['error'], '.2g')}" for p in points),
        ]
        for cell in result["cells"]
        for name, points in cell["linear"].items()
    ]
    return [*lines, *table(["network", "λ", "matrix", *map(str, result["linear_steps"])], body)]


def _assumption_1(product: Numbers) -> list[str]:
    gradient, hessian = product["gradient"], product["product"]
    times, memory = (hessian[key] / gradient[key] for key in ("seconds", "peak_mb"))
    holds = ("holds" if times <= 5 else "does not hold", "holds" if memory <= 2 else "does not hold")
    return [
        "## Assumption 1",
        "",
        f"A product with the Hessian, its gradient included (reverse over reverse, 20-way 5-shot, one task), costs {times:.2f} gradients "
        f"in time ({1000 * hessian['seconds']:.1f} against {1000 * gradient['seconds']:.1f} ms) and {memory:.2f} in peak memory "
        f"({hessian['peak_mb']:.1f} against {gradient['peak_mb']:.1f} MB), measured in one process. The paper assumes at most 5 in time, "
        f"which {holds[0]} here, and 2 in memory, which {holds[1]} here.",
    ]  # fmt: skip
