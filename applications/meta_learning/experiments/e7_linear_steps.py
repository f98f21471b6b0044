"""E7: from first-order MAML to iMAML, one step of the linear solver after the other (appendix A of the paper).

    0 steps: u = Lambda^{-1} dL/dphi, no product with the curvature: first-order MAML.        n steps: CG on (Lambda + H) u = dL/dphi.

All rows are meta-trained with the settings of the row `ours-fo-fixed` of E4 but for the linear system, on the same tasks and from the
same start; they differ in the number of steps alone. The meta-gradient of every row is then compared with that of the solved system.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from applications.meta_learning.algorithms import MetaGradient
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config
from applications.meta_learning.evaluate import Protocol
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.e4_omniglot import FIXED_STEPS
from applications.meta_learning.experiments.e7_regularisation import mean_and_interval
from applications.meta_learning.experiments.training import trained
from applications.meta_learning.method import build_method, conditions
from applications.meta_learning.presets import preset
from applications.meta_learning.report import STYLE
from applications.meta_learning.run import CHECKPOINT
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, load_theta
from bilevel import Status

LADDER = (0, 1, 2, 5, 10, 20)
SEEDS, OUTER_STEPS, META_BATCH, CHANNELS = 3, 150, 8, 16
CURVE_TASKS, TEST_TASKS, TEST_QUERIES = 100, 600, 15
GRADIENT_TASKS, EXACT_STEPS, EXACT_RTOL = 16, 300, 1e-8
GRADIENT_SEED = 20_000  # added to the seed: the tasks of the gradients are in no test


class E7LinearSteps(Experiment):
    """See the module."""

    name = "e7_linear_steps"
    title = "E7. From first-order MAML to iMAML"
    paper = "appendix A: first-order MAML is iMAML with 0 steps of CG, so that the number of steps leads from one to the other. No figure."

    def run(self, request: Request) -> Numbers:
        ladder, seeds = (LADDER[:3], 2) if request.quick else (LADDER, SEEDS)
        protocol = Protocol(name="test", tasks=4 if request.quick else TEST_TASKS, query_shots=TEST_QUERIES)
        runs = []
        for seed in range(seeds):  # the whole ladder of one seed first: an interrupted run has pairs
            for steps in ladder:
                config = settings(request, request.seed + seed, steps)
                name, trace_every = run_name(steps, seed), max(1, config.outer_steps // 10)
                measure = partial(trained, request, name, config, (protocol,), trace_every=trace_every)
                runs.append({"linear_steps": steps, "seed": seed, **request.part(name, measure, spinner=False)})
        some = settings(request, request.seed, ladder[-1])
        trained_network = request.parts / run_name(ladder[-1], 0) / CHECKPOINT
        measure_gradients = partial(gradients, some, request.data_dir, trained_network, ladder)
        return {
            "ladder": list(ladder),
            "seeds": seeds,
            "conditions": conditions(some),
            "curve": {"tasks": some.eval_tasks, "query_shots": some.eval_query_shots},
            "runs": runs,
            "gradients": request.part("gradients", measure_gradients),
        }

    def draw(self, result: Numbers, path: Path) -> None:
        colours = [plt.get_cmap("viridis")(place) for place in np.linspace(0, 0.92, len(result["ladder"]))]
        with plt.rc_context(STYLE):
            figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
            for steps, colour in zip(result["ladder"], colours, strict=True):
                curves = [run["curve"] for run in _runs(result, steps)]
                accuracy = [100 * statistics.mean(p["mean"] for p in points) for points in zip(*curves, strict=True)]
                for axes, x in ((panels[0, 0], "step"), (panels[0, 1], "step_seconds")):
                    places = [statistics.mean(p[x] for p in points) for points in zip(*curves, strict=True)]
                    axes.plot(places, accuracy, "o-", ms=3, color=colour, label=_words(steps))
            panels[0, 0].set(xlabel="outer steps", ylabel="held-out accuracy, %", title="mean of the seeds")
            panels[0, 1].set(xlabel="CPU seconds in meta-steps", title="the same over time")
            panels[0, 0].legend(fontsize=8, title="steps of the linear solver")
            _draw_final(panels[1, 0], result, colours)
            _draw_gradients(panels[1, 1], result)
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_setup(result), "", *_accuracies(result), "", *_gradient_table(result)]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def run_name(steps: int, seed: int) -> str:
    """Of the part, and of its folder."""
    return f"{steps}-steps-{seed}"


def settings(request: Request, seed: int, steps: int) -> Config:
    """Of the row with so many steps of the linear solver."""
    config = replace(preset("omniglot-5w1s-cpu"), **FIXED_STEPS, channels=CHANNELS, seed=seed, device="cpu", threads=1)
    if request.data_dir is None:
        config = replace(config, dataset="glyphs")
    if steps:
        config = replace(config, linear="cg", linear_steps=steps)
    else:
        config = replace(config, linear="identity", curvature="hessian")
    if request.quick:
        small = replace(config, channels=4, image_size=12, glyph_classes=24, train_classes=14, log_interval=1)
        return replace(small, outer_steps=2, meta_batch=2, eval_interval=1, eval_tasks=4)
    return replace(
        config, outer_steps=OUTER_STEPS, meta_batch=META_BATCH, eval_interval=OUTER_STEPS // 5, eval_tasks=CURVE_TASKS
    )


def gradients(config: Config, data_dir: Path | None, trained_network: Path, ladder: tuple[int, ...]) -> Numbers:
    """What each number of steps leaves of the meta-gradient of the solved system, at the start and after training.

    Mean over tasks of held-out classes, float64, so that rounding is no part of it.

    config: of a row with CG; its checkpoint is `trained_network`.
    """
    config = replace(config, dtype="float64")
    trainer = Trainer(config, load_source(config, data_dir=data_dir))
    sampler = trainer.source.sampler(
        config,
        held_out=True,
        query_shots=config.query_shots,
        seed=config.seed + GRADIENT_SEED,
        device=torch.device("cpu"),
    )
    data = sampler.sample(GRADIENT_TASKS)

    def meta_gradient(**changes: object) -> MetaGradient:
        method = build_method(replace(config, **changes), trainer.module)  # type: ignore[arg-type]  # settings by name
        return method.algorithm.meta_gradient(method.problem, trainer.theta, data)

    found = {"initial network": along_the_ladder(meta_gradient, ladder)}
    stored = load_checkpoint(trained_network)["theta"]
    load_theta(trainer.theta, {name: leaf.double() for name, leaf in stored.items()})
    found["trained network"] = along_the_ladder(meta_gradient, ladder)
    return {"tasks": GRADIENT_TASKS, "networks": found}


def along_the_ladder(meta_gradient: Callable[..., MetaGradient], ladder: tuple[int, ...]) -> Numbers:
    """Relative error and cosine of each number of steps. `meta_gradient` takes changes of the settings."""
    solved = meta_gradient(linear_steps=EXACT_STEPS, linear_rtol=EXACT_RTOL)
    assert solved.linear is not None
    exact = _flat(solved)
    rows = []
    for steps in ladder:
        changes = {"linear_steps": steps} if steps else {"linear": "identity"}
        found = _flat(meta_gradient(**changes))
        error, cosine = (found - exact).norm() / exact.norm(), found @ exact / (found.norm() * exact.norm())
        rows.append({"linear_steps": steps, "error": error.item(), "cosine": cosine.item()})
    return {
        "rows": rows,
        "steps_to_solve": int(solved.linear.steps.max()),
        "unsolved": int((solved.linear.codes != int(Status.CONVERGED)).sum()),
    }


def _flat(found: MetaGradient) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in found.grad.values()])


# ----------------------------------------------------------------------------------------------------------------------
# Reporting


def _runs(result: Numbers, steps: int) -> list[Numbers]:
    return [run for run in result["runs"] if run["linear_steps"] == steps]


def _words(steps: int) -> str:
    return f"{steps}" if steps else "0 (first-order MAML)"


def _final(run: Numbers) -> float:
    return 100 * float(run["tests"]["test"]["mean"])


def _draw_final(axes: Axes, result: Numbers, colours: list[tuple[float, ...]]) -> None:
    for place, (steps, colour) in enumerate(zip(result["ladder"], colours, strict=True)):
        values = [_final(run) for run in _runs(result, steps)]
        mean, interval = mean_and_interval(values)
        axes.errorbar(place, mean, interval, fmt="o", ms=5, color=colour, capsize=4)
        axes.plot([place + 0.15] * len(values), values, ".", color=colour, alpha=0.6)
    axes.set_xticks(range(len(result["ladder"])), [str(steps) for steps in result["ladder"]])
    axes.set(
        xlabel="steps of the linear solver",
        ylabel="test accuracy, %",
        title="after the last outer step: mean, 95 % interval, seeds",
    )


def _draw_gradients(axes: Axes, result: Numbers) -> None:
    for (network, found), style in zip(result["gradients"]["networks"].items(), ("s--", "o-"), strict=True):
        errors = [row["error"] for row in found["rows"]]
        axes.semilogy(range(len(errors)), errors, style, ms=4, color="#4477aa", label=network)
    axes.set_xticks(range(len(result["ladder"])), [str(steps) for steps in result["ladder"]])
    axes.set(
        xlabel="steps of the linear solver", ylabel="relative error", title="meta-gradient against the solved system"
    )
    axes.legend(fontsize=8)


def _setup(result: Numbers) -> list[str]:
    c, told = result["runs"][-1]["config"], result["conditions"]
    test, curve = result["runs"][-1]["tests"]["test"], result["curve"]
    left_out, tasks = (sum(run[key] for run in result["runs"]) for key in ("failed_tasks", "tasks"))
    return [
        f"5-way 1-shot; images: {told['images']}. Network: {told['network']}, {c['channels']} filters (the paper has 64). "
        f"Batch norm: {told['batch norm']}.",
        "",
        f"{c['outer_steps']} outer steps of {c['meta_batch']} tasks with {c['query_shots']} queries a class; the preset "
        "`omniglot-5w1s-cpu` in everything else but the inner steps, which have a fixed size, as in a row of [E4](e4_omniglot_cpu.md), "
        "whose runs are longer and have more filters: "
        f"lambda {c['lam']:g}, and {c['lam_head']:g} for the last layer; {c['inner_steps']} accelerated inner steps; CG with the "
        f"Gauss-Newton matrix; Adam, rate {c['outer_rate']:g} falling to 0. Test: {test['tasks']} tasks of held-out classes (random split) "
        f"with {test['query_shots']} queries a class; curves: {curve['tasks']} such tasks with {curve['query_shots']}. Split, network and "
        "tasks differ from seed to seed, and are the same for all rows of a seed. Nothing is selected by an accuracy. Time is that of "
        f"the processor in meta-steps, one thread, while other programs ran. Tasks left out: {left_out} of {tasks}.",
    ]


def _accuracies(result: Numbers) -> list[str]:
    first = _runs(result, 0)
    rows, clear = [], []
    cheap = statistics.mean(run["step_seconds"] / run["steps"] for run in first)
    for steps in result["ladder"]:
        runs = _runs(result, steps)
        mean, interval = mean_and_interval([_final(run) for run in runs])
        row = [_words(steps), ", ".join(f"{_final(r):.1f} ± {100 * r['tests']['test']['interval']:.1f}" for r in runs)]
        row.append(f"{mean:.1f} ± {interval:.1f}")
        for differences in (equal_steps(runs, first), equal_time(runs, first)):
            gain, doubt = mean_and_interval(differences)
            row.append(f"{gain:+.1f} ± {doubt:.1f}" if steps else "")
        gain, doubt = mean_and_interval(equal_steps(runs, first))
        if abs(gain) > doubt:
            clear.append(f"{steps} ({'above' if gain > 0 else 'below'})")
        cost = statistics.mean(run["step_seconds"] / run["steps"] for run in runs)
        rows.append([*row, f"{cost:.2f}", f"{cost / cheap:.1f}"])
    header = ["steps", "each seed, %", f"mean of {result['seeds']} seeds, %", "minus 0 steps", "the same at equal time"]
    return [
        "Accuracy after the last outer step. The intervals are 95 %: of a seed, over its test tasks; of a mean, and of a mean difference "
        "seed by seed, over the seeds by Student's t. At equal time: the curve, interpolated at the time when the row with 0 steps ended.",
        "",
        *table([*header, "CPU s per meta-step", "of that of 0 steps"], rows),
        "",
        f"Numbers of steps that differ from 0 by more than that interval at equal outer steps: {', '.join(clear) or 'none'}.",
    ]


def equal_steps(runs: list[Numbers], others: list[Numbers]) -> list[float]:
    """Difference in test accuracy, in points, seed by seed."""
    return [_final(run) - _final(other) for run, other in zip(runs, others, strict=True)]


def equal_time(runs: list[Numbers], others: list[Numbers]) -> list[float]:
    """Difference in accuracy on the curves, in points, seed by seed, where the run with the cheaper steps ends."""
    found = []
    for run, other in zip(runs, others, strict=True):
        end = min(run["step_seconds"], other["step_seconds"])
        mine, theirs = (
            np.interp(end, [p["step_seconds"] for p in r["curve"]], [p["mean"] for p in r["curve"]])
            for r in (run, other)
        )
        found.append(100 * float(mine - theirs))
    return found


def _gradient_table(result: Numbers) -> list[str]:
    measured = result["gradients"]
    networks = measured["networks"]
    rows = [
        [network, *(f"{row['error']:.2g}; {row['cosine']:.3f}" for row in found["rows"])]
        for network, found in networks.items()
    ]
    solved = "; ".join(
        f"{network}: {found['steps_to_solve']} steps at most, {found['unsolved']} tasks not solved"
        for network, found in networks.items()
    )
    return [
        f"The meta-gradient of each row, mean of {measured['tasks']} held-out tasks in float64, against that of the same system solved "
        f"to a relative residual of {EXACT_RTOL:g} ({solved}): relative error; cosine. The trained network is that of seed 0 with the "
        "most steps. The right answer here is that of the Gauss-Newton system at the point where the inner solver stopped; how far this "
        "is from the gradient of the path, and what the Hessian does, is [measured apart](e7_gradient_accuracy.md).",
        "",
        *table(["network", *(_words(steps) for steps in result["ladder"])], rows),
        "",
        "The first CG step goes along the preconditioned right-hand side. For one task its meta-gradient is therefore that of first-order "
        "MAML times a number; over several tasks it is their mean with other weights.",
    ]  # fmt: skip
