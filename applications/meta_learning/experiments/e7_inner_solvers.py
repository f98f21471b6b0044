"""E7: which inner solver, and how many steps? (The reviewers asked; the paper's figure has 20 steps only.)

Two parts. iMAML is meta-trained with several numbers of inner steps, and each result is tested with several. Then all inner solvers adapt
the same tasks from the same meta-trained parameters, and what they reach is set against what it costs. The times are measured in turns in
one process, and given as ratios to the first row: other programs on the machine slow all of them alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel
from applications.meta_learning.allocator import keep_freed_memory
from applications.meta_learning.config import Config
from applications.meta_learning.evaluate import CURVE_STEPS, Evaluation, evaluate
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.cost import fresh_processes, peak_resident
from applications.meta_learning.method import conditions
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import Theta
from applications.meta_learning.report import PALETTE, STYLE
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, TrainingFailed
from bilevel.solvers import LBFGS, BlackBox, GradientDescent, InnerSolver, NesterovAGD, NewtonCG, ScipyMinimize

CHANNELS, META_BATCH, META_STEPS = 32, 8, 150
INNER_STEPS, COMPARED = (1, 4, 16, 32), 16  # of the training; the one whose parameters the solvers get
BUDGETS, NEWTON_CG_STEPS = (8, 32, 128), 8  # steps; Newton-CG takes one for each 8, with 8 CG steps each
TASKS, ROUNDS, TEST_TASKS = 8, 5, 100
TASK_SEED = 9_001


class E7InnerSolvers(Experiment):
    """See the module."""

    name = "e7_inner_solvers"
    title = "E7. Inner solvers, and the number of inner steps"
    paper = "figure 2a shows 20 inner steps; the reviewers asked for more, and for the time and memory of other inner solvers."

    def run(self, request: Request) -> Numbers:
        counts, meta_steps, tests = ((2,), 1, 2) if request.quick else (INNER_STEPS, META_STEPS, TEST_TASKS)
        compared, test_steps = (2, (1, 2)) if request.quick else (COMPARED, CURVE_STEPS)
        trained = []
        for count in counts:
            config = replace(_config(request), inner_steps=count, outer_steps=meta_steps)
            measure = partial(_trained, config, request.data_dir, test_steps, tests, _stored(request, count))
            trained.append({"inner_steps": count, **request.part(f"trained-{count}", measure)})
        config, path = replace(_config(request), inner_steps=compared), _stored(request, compared)
        budgets, tasks, rounds = ((2,), 2, 1) if request.quick else (BUDGETS, TASKS, ROUNDS)
        times = request.part("solvers", partial(_in_turns, config, request.data_dir, path, budgets, tasks, rounds))
        with fresh_processes(reuse=request.quick) as processes:
            for row in times["rows"]:
                call = partial(_memory, config, request.data_dir, path, row["name"], row["budget"], tasks)
                name = f"memory-{row['name']}-{row['budget']}".replace(" ", "-")
                row["peak_mb"] = request.part(name, lambda call=call: processes.submit(call).result())["peak_mb"]  # type: ignore[misc]  # call=
        return {
            "dataset": config.dataset,
            "conditions": conditions(config),
            "channels": config.channels,
            "meta_batch": config.meta_batch,
            "meta_steps": meta_steps,
            "inner_step_size": config.inner_step_size,
            "lam": config.lam,
            "compared": compared,
            "tasks": tasks,
            "rounds": rounds,
            "newton_cg_steps": NEWTON_CG_STEPS,
            "trained": trained,
            "rows": times["rows"],
        }

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context(STYLE):
            figure, (accuracy, residual) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
            for run, colour in zip(result["trained"], PALETTE, strict=False):
                low, middle, high = zip(*(_band(test) for test in run["tests"]), strict=True)
                steps = [test["steps"] for test in run["tests"]]
                accuracy.semilogx(steps, middle, "o-", ms=3, color=colour, label=f"trained with {run['inner_steps']}")
                accuracy.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
            accuracy.set(xlabel="inner steps at test", ylabel="test accuracy, %", title="iMAML over inner steps")
            ticks = [test["steps"] for test in result["trained"][0]["tests"]]
            accuracy.set_xticks(ticks, [str(tick) for tick in ticks])
            accuracy.minorticks_off()
            for i, (name, rows) in enumerate(_by_name(result)):
                dashes = "-" if i < len(PALETTE) else "--"
                shown = [row for row in rows if row["residual"]]
                x, y = [row["ratio"] for row in shown], [row["residual"] for row in shown]
                residual.loglog(x, y, f"o{dashes}", ms=4, color=PALETTE[i % len(PALETTE)], label=name)
            first = result["rows"][0]
            residual.set(
                xlabel=f"time, in those of {first['name']}, {first['budget']} steps",
                ylabel="|dG/dphi| reached, median",
                title="inner solvers on the same tasks",
            )
            accuracy.legend(fontsize=8)
            residual.legend(fontsize=7, handlelength=4, loc="upper left", bbox_to_anchor=(1.01, 1))
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_setup(result), "", *_accuracy(result), "", *_solvers_table(result), "", *_summary(result)]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def _config(request: Request) -> Config:
    """The paper's settings for 5-way 1-shot, with fewer filters and tasks, and the Gauss-Newton matrix so that training goes on."""
    config = replace(
        preset("omniglot-5w1s-gd"),
        curvature="gauss-newton",
        channels=CHANNELS,
        meta_batch=META_BATCH,
        seed=request.seed,
        device="cpu",
        threads=1,
    )
    if request.data_dir is None:
        config = replace(config, dataset="glyphs")
    if request.quick:
        config = replace(config, channels=4, meta_batch=2, glyph_classes=12, train_classes=7, image_size=12)
    return config


def _stored(request: Request, inner_steps: int) -> Path:
    """Where the meta-trained parameters are kept."""
    return request.parts / f"theta-{inner_steps}.pt"


def _trained(config: Config, data_dir: Path | None, test_steps: tuple[int, ...], tests: int, path: Path) -> Numbers:
    """Meta-train, keep the parameters, and test over the number of inner steps."""
    torch.set_num_threads(config.threads)
    trainer = Trainer(config, load_source(config, data_dir=data_dir))
    failure = None
    try:
        while trainer.progress.step < config.outer_steps:
            trainer.meta_step()
    except TrainingFailed:
        failure = trainer.progress.step
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: leaf.detach() for name, leaf in trainer.theta.items()}, path)
    curve = [(k, _test(trainer, k, tests)) for k in test_steps]
    return {
        "gave_up_at": failure,
        "failed_tasks": trainer.progress.failed_tasks,
        "tests": [
            {
                "steps": steps,
                "mean": found.mean,
                "interval": found.interval,
                "tasks": found.tasks,
                "failed": found.failed,
                "residual": _finite(found.inner_residual),
            }
            for steps, found in curve
        ],
    }


def _test(trainer: Trainer, inner_steps: int, tasks: int) -> Evaluation:
    config, solver = trainer.config, replace(trainer.method.solver, max_steps=inner_steps)
    sampler = trainer.source.sampler(config, held_out=True, query_shots=5, seed=config.seed, device=trainer.device)
    return evaluate(
        trainer.method.problem, trainer.module, trainer.theta, sampler, solver=solver, tasks=tasks, query_shots=5
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def solvers(budget: int, step_size: float) -> dict[str, InnerSolver]:
    """Every inner solver with about so many gradients: Newton-CG takes fewer steps, of several products each."""
    newton = max(1, budget // NEWTON_CG_STEPS)
    return {
        "GD, fixed step": GradientDescent(step_size=step_size, max_steps=budget),
        "GD, line search": GradientDescent(step_size=None, max_steps=budget),
        "AGD, adaptive steps": NesterovAGD(step_size=None, max_steps=budget),
        "Newton-CG": NewtonCG(max_steps=newton, cg_steps=NEWTON_CG_STEPS),
        "L-BFGS": LBFGS(max_steps=budget),
        "L-BFGS of SciPy": ScipyMinimize(method="L-BFGS-B", options={"maxiter": budget}),
        "L-BFGS of torch, as a black box": BlackBox(partial(torch_lbfgs, budget)),
    }


def torch_lbfgs(budget: int, problem: bilevel.BilevelProblem, theta: Theta, data: Any, init: Theta) -> Theta:
    """`torch.optim.LBFGS` with its strong Wolfe line search, on one task."""
    phi = {name: leaf.clone().requires_grad_() for name, leaf in init.items()}
    optimizer = torch.optim.LBFGS(
        phi.values(), max_iter=budget, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = problem.inner_objective(phi, theta, data)
        value.backward()
        return value

    optimizer.step(closure)
    return {name: leaf.detach() for name, leaf in phi.items()}


class _Bench:
    """The tasks of the comparison, and a call of each solver on them."""

    def __init__(self, config: Config, data_dir: Path | None, path: Path, tasks: int) -> None:
        torch.set_num_threads(config.threads)
        trainer = Trainer(config, load_source(config, data_dir=data_dir))
        self.problem = trainer.method.problem
        self.theta: Theta = torch.load(path, weights_only=True)
        self.data = trainer.source.sampler(
            config, held_out=True, query_shots=1, seed=config.seed + TASK_SEED, device=trainer.device
        ).sample(tasks)
        self.step_size = config.inner_step_size

    def solve(self, name: str, budget: int) -> bilevel.Result:
        """Adapt all tasks."""
        solver = solvers(budget, self.step_size)[name]
        return bilevel.solve(self.problem, self.theta, self.data, solver=solver, batched=True)

    def objective(self, phi: Theta) -> Tensor:
        """G, (tasks,)."""
        with torch.no_grad():
            return torch.func.vmap(lambda p, task: self.problem.inner_objective(p, self.theta, task))(phi, self.data)


def _in_turns(
    config: Config, data_dir: Path | None, path: Path, budgets: tuple[int, ...], tasks: int, rounds: int
) -> Numbers:
    """What each solver reaches, and its time: the median over the rounds of the ratio to the first solver in the same round."""
    keep_freed_memory()
    bench = _Bench(config, data_dir, path, tasks)
    cases = [(name, budget) for name in solvers(1, 1.0) for budget in budgets]
    rows: list[Numbers] = []
    for name, budget in cases:  # the answers, and the warm-up
        found = bench.solve(name, budget)
        rows.append(
            {
                "name": name,
                "budget": budget,
                "num_grads": found.num_grads,
                "num_matvecs": found.num_matvecs,
                "failed": int(found.failed.sum()),
                "residual": _finite(float(found.residual.nanmedian())),
                "objective": _finite(float(bench.objective(found.value).nanmedian())),
            }
        )
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for i, (name, budget) in enumerate(cases):
            start = time.process_time()
            bench.solve(name, budget)
            seconds[i].append(time.process_time() - start)
    for row, own in zip(rows, seconds, strict=True):
        ratios = [mine / first for mine, first in zip(own, seconds[0], strict=True)]
        row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    rows[0]["seconds"] = statistics.median(seconds[0])
    return {"rows": rows}


def _memory(config: Config, data_dir: Path | None, path: Path, name: str, budget: int, tasks: int) -> Numbers:
    """Peak memory above that before the call, in MB; in a process of its own."""
    bench = _Bench(config, data_dir, path, tasks)
    bench.solve(name, 1)
    return {"peak_mb": peak_resident(partial(bench.solve, name, budget))}


# ----------------------------------------------------------------------------------------------------------------------
# Reporting


def _by_name(result: Numbers) -> Iterator[tuple[str, list[Numbers]]]:
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        yield name, [row for row in result["rows"] if row["name"] == name]


def _band(test: Numbers) -> tuple[float, float, float]:
    """Test accuracy in %: the ends of its interval around it."""
    mean, interval = 100 * test["mean"], 100 * test["interval"]
    return mean - interval, mean, mean + interval


def _number(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else f"{value:{form}}"


def _setup(result: Numbers) -> list[str]:
    told, tests = result["conditions"], result["trained"][0]["tests"][0]
    return [
        f"5-way 1-shot, lambda {result['lam']:g}; images: {told['images']}. Network: {told['network']}, {result['channels']} filters. "
        f"Batch norm: {told['batch norm']}.",
        "",
        f"Meta-training: {result['meta_steps']} meta-steps of {result['meta_batch']} tasks, inner steps of gradient descent of "
        f"{result['inner_step_size']:g}, Gauss-Newton matrix, one seed, {preset('omniglot-5w1s-gd').split} split of the "
        f"characters. Tests: {tests['tasks']} tasks of held-out classes, 5 queries each, ± a 95 % interval over the tasks.",
    ]


def _accuracy(result: Numbers) -> list[str]:
    steps = [test["steps"] for test in result["trained"][0]["tests"]]
    rows = []
    for run in result["trained"]:
        row = [f"{run['inner_steps']}"]
        row += [f"{100 * test['mean']:.1f} ± {100 * test['interval']:.1f}" for test in run["tests"]]
        rows.append(row)
    residuals = [
        [str(run["inner_steps"]), *(_number(t["residual"]) for t in run["tests"])] for run in result["trained"]
    ]
    stopped = [run for run in result["trained"] if run["gave_up_at"] is not None]
    header = ["inner steps in training", *(f"{k} at test" for k in steps)]
    return [
        "## Over the number of inner steps",
        "",
        "Test accuracy in %:",
        "",
        *table(header, rows),
        "",
        "Median of |dG/dphi| after adaptation:",
        "",
        *table(header, residuals),
        *(
            f"\nWith {run['inner_steps']} inner steps the training gave up at meta-step {run['gave_up_at']}."
            for run in stopped
        ),
    ]


def _solvers_table(result: Numbers) -> list[str]:
    header = [
        "solver",
        "steps",
        "gradients",
        "products",
        "time, ratio (range)",
        "peak memory, MB",
        "slope",
        "G",
        "failed",
    ]
    rows = [
        [
            row["name"],
            str(row["budget"]),
            str(row["num_grads"]),
            str(row["num_matvecs"]),
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            f"{row['peak_mb']:.0f}",
            _number(row["residual"]),
            _number(row["objective"], ".4f"),
            str(row["failed"]),
        ]
        for row in result["rows"]
    ]
    first = result["rows"][0]
    return [
        "## Inner solvers",
        "",
        f"{result['tasks']} tasks of held-out classes, from the parameters that were trained with {result['compared']} inner steps, "
        f"float32. The ratio is to the first row ({first['seconds']:.2f} s of processor time), the median of {result['rounds']} rounds. "
        f"Newton-CG takes a step for each {result['newton_cg_steps']} in the second column, of {result['newton_cg_steps']} CG steps. SciPy "
        "and torch work on one task at a time. Gradients and products: each of all tasks (for SciPy of the task that took most; a black "
        "box is not looked into). Slope (|dG/dphi|) and G: medians over the tasks.",
        "",
        *table(header, rows),
    ]


def _summary(result: Numbers) -> list[str]:
    solved = [row for row in result["rows"] if row["residual"] is not None and not row["failed"]]
    if not solved:
        return ["No solver brought every task to an end."]
    best = min(solved, key=lambda row: row["residual"])
    first = result["rows"][0]
    lowest = min(solved, key=lambda row: row["objective"])
    lines = [
        f"- The smallest slope is {best['residual']:.2g}: {_told(best)}.",
        f"- The smallest G is {lowest['objective']:.4f}: {_told(lowest)}.",
    ]
    first = result["rows"][0]
    if first["objective"] is not None:
        better = [row for row in solved if row["objective"] < first["objective"] and row["ratio_high"] <= 1.1]
        names = ", ".join(f"{row['name']} ({row['budget']})" for row in better)
        lines.append(
            f"- With a lower G than the first row, and in no round slower by more than a tenth: {names or 'none'}."
        )
    return lines


def _told(row: Numbers) -> str:
    return f"{row['name']} with {row['budget']} steps, at {row['ratio']:.1f} times the time of the first row"
