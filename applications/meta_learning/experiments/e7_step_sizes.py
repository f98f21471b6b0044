"""E7: MAML with learned step sizes beside iMAML with a learned lambda, on sinusoids (section 2.2: both may be scalars or vectors).

Learned step sizes need nothing but another inner variable. With phi = centre + exp(raw / 2) psi and psi = 0 at the start, a step of
gradient descent of size 1 on psi,

    psi <- psi - dG/dpsi = psi - exp(raw / 2) dG/dphi,        is        phi <- phi - exp(raw) dG/dphi,

a step of size exp(raw), one for all parameters or one for each of them (Meta-SGD, Li et al. 2017, has one inner step; here there are
several, all with the same sizes). theta is {"centre": ..., "raw": ...}, and `bilevel.unrolled` differentiates the path in both.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.evaluate import CURVE_STEPS
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.e6_sinusoid import base
from applications.meta_learning.experiments.e7_regularisation import mean_and_interval
from applications.meta_learning.method import build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.outputs import outputs_of
from applications.meta_learning.problem import few_shot_losses, squared_error
from applications.meta_learning.report import PALETTE, STYLE
from applications.meta_learning.run import use_threads
from applications.meta_learning.tasks import TaskSource, dtype_of, load_source
from bilevel import BilevelProblem, Hypergradient, LearnedProximalProblem
from bilevel.curvature import GaussNewton
from bilevel.linsys import CG
from bilevel.regularisation import Diagonal
from bilevel.solvers import GradientDescent, IterativeSolver

SEEDS, OUTER_STEPS, META_BATCH, SHOTS = 3, 500, 25, 10
TASKS, QUERY_SHOTS = 200, 50
TEST_SEED = 10_000  # added to the seed of a run
STEP_SIZE, LAM = 0.01, 0.5  # fixed, or where learning starts
CENTRE_RATE, RAW_RATE = 5e-3, 2e-2  # of Adam; the second is a relative change of a step size or of lambda
CPU = torch.device("cpu")

MAML_STEPS = GradientDescent(step_size=1.0, max_steps=5)  # on psi
IMAML_STEPS = GradientDescent(
    step_size=None, max_steps=10
)  # lambda counts at a solution: the line search comes nearer to it
LINEAR = CG(max_steps=5, rtol=0.0)


@dataclass(frozen=True)
class Variant:
    """implicit: iMAML, whose lambda is what may be learned; otherwise MAML, and its step size."""

    name: str
    implicit: bool
    diagonal: bool
    learned: bool


VARIANTS = (
    Variant("MAML, fixed step size", False, False, False),
    Variant("MAML, learned step size", False, False, True),
    Variant("MAML, learned vector of step sizes", False, True, True),
    Variant("iMAML, fixed lambda", True, True, False),
    Variant("iMAML, learned diagonal lambda", True, True, True),
)


class E7StepSizes(Experiment):
    """See the module."""

    name = "e7_step_sizes"
    title = "E7. Learned step sizes and a learned lambda"
    paper = (
        "section 2.2: lambda plays a role like MAML's step size alpha; both may be scalars, vectors or matrices, and learned. "
        "No experiment."
    )

    def run(self, request: Request) -> Numbers:
        seeds, steps, tasks = (2, 2, 4) if request.quick else (SEEDS, OUTER_STEPS, TASKS)
        runs = []
        for seed, (place, variant) in itertools.product(range(seeds), enumerate(VARIANTS)):
            config = settings(request, request.seed + seed)
            measured = request.part(f"variant-{place}-{seed}", partial(trained, variant, config, steps, tasks))
            runs.append({"variant": variant.name, "seed": config.seed, **measured})
        return {
            "variants": [
                {"name": v.name, "what": what_is_learned(v), "learned": v.learned, "diagonal": v.diagonal}
                for v in VARIANTS
            ],
            "seeds": seeds,
            "outer_steps": steps,
            "meta_batch": config.meta_batch,
            "hidden": config.channels,
            "shots": config.shots,
            "tasks": tasks,
            "query_shots": QUERY_SHOTS,
            "start": {"step size": STEP_SIZE, "lambda": LAM},
            "rates": [CENTRE_RATE, RAW_RATE],
            "inner_steps": {"step size": MAML_STEPS.max_steps, "lambda": IMAML_STEPS.max_steps},
            "cg_steps": LINEAR.max_steps,
            "runs": runs,
        }

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context(STYLE):
            figure, (errors, learned) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
            for variant, colour, style in zip(result["variants"], COLOURS, STYLES, strict=True):
                runs = _runs(result, variant["name"])
                points = list(zip(*(run["curve"] for run in runs), strict=True))
                known = [[p["mean"] for p in seeds if p["mean"] is not None] for seeds in points]
                drawn = [(p[0]["steps"], v) for p, v in zip(points, known, strict=True) if v]
                steps, values = [s for s, _ in drawn], [v for _, v in drawn]
                means = [statistics.mean(v) for v in values]
                errors.loglog(steps, means, style, ms=4, color=colour, label=variant["name"])
                errors.fill_between(
                    steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12, lw=0
                )
            errors.set(
                xlabel="inner steps at meta-test", ylabel="mean squared error", title="mean and range of the seeds"
            )
            errors.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            errors.yaxis.set_minor_formatter("{x:g}")
            for axis in (errors.xaxis, errors.yaxis):
                axis.set_major_formatter("{x:g}")
            errors.legend(fontsize=8)
            _draw_learned(learned, result)
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_setup(result), "", *_errors(result), "", *_differences(result), "", *_learned(result)]


COLOURS = ("#999999", PALETTE[0], PALETTE[3], "#ccaa44", PALETTE[2])
STYLES = ("o--", "o-", "o-", "s--", "s-")


# ----------------------------------------------------------------------------------------------------------------------
# The problem with step sizes


def adapted(psi: Any, theta: Any) -> dict[str, Tensor]:
    """phi = centre + exp(raw / 2) psi. raw: one 0-d tensor, or a dict like the centre; psi: a dict like the centre."""
    raw = theta["raw"]
    return {
        name: centre + ((raw if isinstance(raw, Tensor) else raw[name]) / 2).exp() * psi[name]
        for name, centre in theta["centre"].items()
    }


def step_size_problem(module: nn.Module) -> BilevelProblem:
    """G = support loss and L = query loss at `adapted(psi, theta)`; psi starts at 0."""
    outputs_at = outputs_of(module)

    def loss_on(part: str) -> Callable[[Any, Any, Any], Tensor]:
        return lambda psi, theta, task: squared_error(outputs_at(adapted(psi, theta), task[part]["x"]), task[part]["y"])

    def start(theta: Any, task: Any) -> dict[str, Tensor]:
        return {name: torch.zeros_like(centre) for name, centre in theta["centre"].items()}

    return BilevelProblem.from_functions(loss_on("support"), loss_on("query"), start)


def initial_raw(centre: dict[str, Tensor], step_size: float, *, diagonal: bool) -> Any:
    """The logarithm of a step size, for all parameters or for each."""
    if diagonal:
        return {name: torch.full_like(leaf, math.log(step_size)) for name, leaf in centre.items()}
    return torch.full((), math.log(step_size), dtype=next(iter(centre.values())).dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def settings(request: Request, seed: int) -> Config:
    """Network and tasks of E6."""
    config = replace(base("maml"), shots=SHOTS, query_shots=SHOTS, meta_batch=META_BATCH, seed=seed)
    return replace(config, channels=8, meta_batch=2) if request.quick else config


def what_is_learned(variant: Variant) -> str:
    """In words."""
    return "lambda" if variant.implicit else "step size"


@dataclass(frozen=True)
class Learner:
    """One variant at work. raw: what may be learned beside the centre, a part of theta."""

    problem: BilevelProblem
    theta: dict[str, Any]
    raw: str
    solver: GradientDescent
    meta_gradient: Callable[[Any], Hypergradient]


def learner(variant: Variant, config: Config) -> Learner:
    """The variant at its start."""
    module = build_network(config).to(dtype=dtype_of(config))
    centre = initial_theta(module, dtype_of(config), CPU)
    theta: dict[str, Any]
    if variant.implicit:
        proximal = LearnedProximalProblem.from_model(*few_shot_losses(module, squared_error), Diagonal())
        theta = proximal.initial_theta(centre, LAM)
        implicit = partial(
            bilevel.hypergradient,
            proximal,
            theta,
            solver=IMAML_STEPS,
            linsys=LINEAR,
            curvature=GaussNewton(),
            batched=True,
        )
        return Learner(proximal, theta, "lam", IMAML_STEPS, implicit)
    problem = step_size_problem(module)
    theta = {"centre": centre, "raw": initial_raw(centre, STEP_SIZE, diagonal=variant.diagonal)}
    through_steps = partial(bilevel.unrolled, problem, theta, solver=MAML_STEPS, batched=True)
    return Learner(problem, theta, "raw", MAML_STEPS, through_steps)


def trained(variant: Variant, config: Config, steps: int, tasks: int) -> Numbers:
    """Meta-training, the error over the number of inner steps, and what was learned."""
    use_threads(config)
    found, source = learner(variant, config), load_source(config)
    sampler = source.sampler(config, held_out=False, query_shots=config.query_shots, seed=config.seed, device=CPU)
    outer = torch.optim.Adam([{"params": leaves(found.theta["centre"]), "lr": CENTRE_RATE}])
    if variant.learned:
        outer.add_param_group({"params": leaves(found.theta[found.raw]), "lr": RAW_RATE})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, steps)
    failed = 0
    for _ in range(steps):
        meta = found.meta_gradient(sampler.sample(config.meta_batch))
        failed += config.meta_batch - meta.num_ok
        if meta.num_ok:
            for part in ("centre", found.raw):
                for leaf, grad in zip(leaves(found.theta[part]), leaves(meta.grad[part]), strict=True):
                    leaf.grad = grad
            outer.step()
        schedule.step()
    learned = {name: spread(leaf.exp()) for name, leaf in named(found.theta[found.raw]).items()}
    return {"curve": curve(found, source, config, tasks), "failed_tasks": failed, "learned": learned}


def leaves(tree: Any) -> list[Tensor]:
    """Of a dict, or the one tensor."""
    return list(named(tree).values())


def named(tree: Any) -> dict[str, Tensor]:
    """A dict as it is, one tensor as a dict."""
    return tree if isinstance(tree, dict) else {"all": tree}


def spread(leaf: Tensor) -> Numbers:
    """Median, and 5 and 95 % of the entries."""
    wanted = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, middle, high = leaf.detach().double().flatten().quantile(wanted).tolist()
    return {"low": low, "median": middle, "high": high}


def curve(found: Learner, source: TaskSource, config: Config, tasks: int) -> list[Numbers]:
    """The error over the number of inner steps, on the same tasks."""
    sampler = source.sampler(config, held_out=True, query_shots=QUERY_SHOTS, seed=config.seed + TEST_SEED, device=CPU)
    data = sampler.sample(tasks)
    return [{"steps": n, **errors_after(found, replace(found.solver, max_steps=n), data)} for n in CURVE_STEPS]


def errors_after(found: Learner, solver: IterativeSolver, data: Any) -> Numbers:
    """Mean squared error on the queries, with its 95 % interval over the tasks that did not fail, how many did, and the median |dG|."""
    result = bilevel.solve(found.problem, found.theta, data, solver=solver, batched=True)
    with torch.no_grad():
        loss = torch.func.vmap(lambda phi, task: found.problem.outer_loss(phi, found.theta, task))(result.value, data)
    kept = loss.double()[~result.failed & loss.isfinite()]
    usable = len(kept) > 1
    return {
        "mean": kept.mean().item() if usable else None,
        "interval": 1.96 * kept.std().item() / math.sqrt(len(kept)) if usable else None,
        "failed": len(loss) - len(kept),
        "residual": result.residual.nanmedian().item(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Reporting


def _runs(result: Numbers, variant: str) -> list[Numbers]:
    return [run for run in result["runs"] if run["variant"] == variant]


def _draw_learned(axes: Any, result: Numbers) -> None:
    """What was learned over its start, leaf by leaf."""
    names = list(_runs(result, VARIANTS[-1].name)[0]["learned"])
    shown = [(v, c) for v, c in zip(result["variants"], COLOURS, strict=True) if v["learned"]]
    for place, (variant, colour) in enumerate(shown):
        start = result["start"][variant["what"]]
        for run in _runs(result, variant["name"]):
            rows = [run["learned"].get(name, run["learned"].get("all")) for name in names]
            y = [i + 0.2 * (place - 1) for i in range(len(names))]
            axes.plot([row["median"] / start for row in rows], y, "o", ms=3, color=colour)
            axes.hlines(
                y, [row["low"] / start for row in rows], [row["high"] / start for row in rows], color=colour, lw=0.8
            )
    axes.axvline(1, color="grey", lw=0.8, ls="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="learned / start", title="step sizes and lambda (bars: 5 to 95 % of the entries)")


def _setup(result: Numbers) -> list[str]:
    steps, start = result["inner_steps"], result["start"]
    failed = sum(run["failed_tasks"] for run in result["runs"])
    residual = statistics.median(
        point["residual"]
        for variant in result["variants"]
        if variant["what"] == "lambda"
        for run in _runs(result, variant["name"])
        for point in run["curve"]
        if point["steps"] == steps["lambda"]
    )
    return [
        f"Sinusoids, K = {result['shots']}, as in [E6](e6_sinusoid.md). Network 1 - {result['hidden']} - {result['hidden']} - 1 with ReLU, "
        f"float32; {result['outer_steps']} outer steps of {result['meta_batch']} tasks for every row, Adam with a cosine schedule, rate "
        f"{result['rates'][0]:g} for the centre and {result['rates'][1]:g} for the logarithm of what is learned. Nothing was searched "
        f"for. Test: {result['tasks']} tasks with {result['query_shots']} query points each; {result['seeds']} seeds, whose tasks and "
        "initial networks are the same for all rows.",
        "",
        f"MAML adapts in training with {steps['step size']} steps; its step size is {start['step size']:g}, or starts there. iMAML "
        f"adapts with {steps['lambda']} steps of gradient descent with a line search, which leave |dG/dphi| = {residual:.2g} at test "
        f"(median), and takes {result['cg_steps']} CG steps with the Gauss-Newton matrix; its lambda is {start['lambda']:g}, or starts "
        "there, with one entry for each parameter. The logarithm is learned: step sizes stay positive, which those of Meta-SGD need not. "
        f"Tasks of meta-training left out: {failed}.",
        "",
        "The implicit derivative is that of a solution, and what the inner steps leave undone is an error of it; the derivative of MAML is "
        "that of the steps that are taken.",
    ]


def _errors(result: Numbers) -> list[str]:
    rows, failed = [], 0
    for variant in result["variants"]:
        runs, row = _runs(result, variant["name"]), [variant["name"]]
        for points in zip(*(run["curve"] for run in runs), strict=True):
            failed += sum(p["failed"] for p in points)
            values = [p["mean"] for p in points]
            if any(v is None for v in values):
                row.append("–")
                continue
            mean, interval = mean_and_interval(values)
            row.append(f"{mean:.3g} ± {interval:.2g}")
        rows.append(row)
    return [
        "Mean squared error after so many inner steps: mean over the seeds ± 95 % interval over the seeds (Student). Test tasks whose "
        f"adaptation failed, which are in no mean: {failed}.",
        "",
        *table(["", *(str(p["steps"]) for p in result["runs"][0]["curve"])], rows),
    ]


def _differences(result: Numbers) -> list[str]:
    fixed, scalar, vector, fixed_lam, lam = (variant["name"] for variant in result["variants"])
    pairs = [(scalar, fixed), (vector, fixed), (vector, scalar), (lam, fixed_lam), (lam, vector)]
    rows = []
    for one, other in pairs:
        errors = zip(_points(result, one), _points(result, other), strict=True)
        ratios = [ratio_and_interval(mine, theirs) for mine, theirs in errors]
        cells = ["–" if r is None else f"{r[0]:.2g} ({r[1]:.2g} to {r[2]:.2g})" for r in ratios]
        below = sum(r is not None and r[2] < 1 for r in ratios)
        above = sum(r is not None and r[1] > 1 for r in ratios)
        rows.append([f"{one} / {other}", *cells, f"{below}, {above}"])
    steps = [str(p["steps"]) for p in result["runs"][0]["curve"]]
    return [
        "Ratio of the errors at equal inner steps, geometric mean over the seeds with its 95 % interval (Student, of the logarithms); "
        "below 1 the first has the smaller error. The last column counts the numbers of steps at which the interval is below 1, and "
        "above 1.",
        "",
        *table(["", *steps, "below, above"], rows),
    ]


def _points(result: Numbers, variant: str) -> list[list[float | None]]:
    """Errors of all seeds, for each number of steps."""
    return [[p["mean"] for p in points] for points in zip(*(r["curve"] for r in _runs(result, variant)), strict=True)]


def ratio_and_interval(mine: list[float | None], theirs: list[float | None]) -> tuple[float, float, float] | None:
    """Geometric mean of the ratios seed by seed, and the ends of its 95 % interval; None where an error is unknown."""
    logs = [math.log(a / b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    if len(logs) < len(mine):
        return None
    mean, interval = mean_and_interval(logs)
    return math.exp(mean), math.exp(mean - interval), math.exp(mean + interval)


def _learned(result: Numbers) -> list[str]:
    shown = [variant for variant in result["variants"] if variant["learned"]]
    names = list(_runs(result, shown[-1]["name"])[0]["learned"])

    def cell(variant: Numbers, name: str) -> str:
        rows = [run["learned"].get(name, run["learned"].get("all")) for run in _runs(result, variant["name"])]
        if not variant["diagonal"]:
            return ", ".join(f"{row['median']:.2g}" for row in rows)
        return ", ".join(f"{row['median']:.2g} ({row['low']:.2g} to {row['high']:.2g})" for row in rows)

    start = result["start"]
    return [
        f"What was learned, for each seed: median, and 5 to 95 % of the entries. Start: step size {start['step size']:g}, lambda "
        f"{start['lambda']:g}.",
        "",
        *table(["leaf", *(v["name"] for v in shown)], [[f"`{n}`", *(cell(v, n) for v in shown)] for n in names]),
    ]
