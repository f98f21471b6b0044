"""E2: time and memory of one meta-gradient over the number of inner steps (Figure 2b of the paper, figure 2 of the author response).

20-way 5-shot Omniglot, the network and settings of the paper. MAML keeps its path, so its memory grows with the steps; iMAML keeps a point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from applications.meta_learning.config import Config
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.cost import cost, fresh_processes
from applications.meta_learning.method import REGIME, build_method, build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.presets import preset
from applications.meta_learning.report import PALETTE, STYLE
from applications.meta_learning.tasks import device_of, dtype_of, load_source

STEPS = (1, 2, 4, 8, 16, 32, 64, 100)
CG_STEPS = (1, 2, 5, 10, 20, 50, 100)
TASKS, REPEATS = 2, 5
LIMIT_MB = 8_000  # on a CPU; on a GPU most of its memory
MAML, FIRST_ORDER, GD, HF = "MAML", "first-order MAML", "iMAML, gradient descent", "iMAML, Hessian-free"
METHODS = {MAML: "maml", FIRST_ORDER: "fo", GD: "gd", HF: "hf"}
OVER_CG = "iMAML over CG steps"
FLAT = 1.05


class E2(Experiment):
    """See the module."""

    name = "e2_compute_memory"
    uses_gpu = True
    title = "E2. Time and memory of one meta-gradient"
    paper = "figure 2b, and figure 2 of the author response. MAML there needs 12 GB at about 16 steps; the number of tasks is not given."

    def run(self, request: Request) -> Numbers:
        repeats, tasks = (1, 2) if request.quick else (REPEATS, TASKS)
        steps, cg_steps = ((1, 2), (1, 2)) if request.quick else (STEPS, CG_STEPS)
        some = _config(request, MAML, tasks)
        limit = _limit(device_of(some))
        with fresh_processes(reuse=request.quick) as processes:

            def measured(name: str, config: Config) -> Numbers:
                call = partial(_meta_gradient_cost, config, request.data_dir, repeats)
                return request.part(name.replace(" ", "-"), lambda: processes.submit(call).result())

            curves = {}
            for method in METHODS:
                config = _config(request, method, tasks)
                rows: list[Numbers] = []
                for k in _affordable(steps, rows, limit):
                    rows.append({"steps": k, **measured(f"{method}-{k}", replace(config, inner_steps=k))})
                curves[method] = rows
            config = _config(request, GD, tasks)
            curves[OVER_CG] = [
                {"steps": c, **measured(f"{OVER_CG}-{c}", replace(config, linear_steps=c))} for c in cg_steps
            ]
        return {
            "dataset": some.dataset,
            "device": device_of(some).type,
            "tasks": tasks,
            "query_shots": some.query_shots,
            "inner_steps": config.inner_steps,
            "linear_steps": config.linear_steps,
            "wanted": list(steps),
            "limit_mb": limit,
            "curves": curves,
        }

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context(STYLE):
            figure, (memory, seconds) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
            for name, colour in zip(METHODS, PALETTE, strict=True):
                rows = result["curves"][name]
                x = [row["steps"] for row in rows]
                memory.loglog(x, [row["peak_mb"] for row in rows], "o-", ms=3, color=colour, label=name)
                seconds.loglog(x, [row["seconds"] for row in rows], "o-", ms=3, color=colour, label=name)
            rows = result["curves"][OVER_CG]
            memory.loglog(
                [row["steps"] for row in rows],
                [row["peak_mb"] for row in rows],
                "k--",
                label=f"iMAML over CG steps ({result['inner_steps']} inner steps)",
            )
            memory.set(xlabel="inner steps (dashed: CG steps)", ylabel="peak memory above the start, MB")
            seconds.set(xlabel="inner steps (Hessian-free: Newton steps)", ylabel="seconds")
            ticks = result["wanted"]
            for axes in (memory, seconds):
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
                axes.minorticks_off()
                axes.legend(fontsize=8)
            figure.suptitle(f"20-way 5-shot, one meta-gradient of {result['tasks']} tasks")
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_conditions(result), "", *_memory(result), "", *_time(result)]


def _config(request: Request, method: str, tasks: int) -> Config:
    """The paper's settings for 20-way 5-shot; query set of K per class."""
    config = replace(preset(f"omniglot-20w5s-{METHODS[method]}"), meta_batch=tasks, threads=1, seed=request.seed)
    if request.data_dir is None:
        config = replace(config, dataset="glyphs", glyph_classes=30, train_classes=24)
    return replace(config, ways=5, channels=8) if request.quick else config


def _affordable(steps: Sequence[int], rows: list[Numbers], limit: float) -> Iterator[int]:
    """The numbers of steps, up to the first where the memory, if it grew like the steps, would pass the limit."""
    for k in steps:
        if (
            rows
            and rows[-1]["peak_mb"] > rows[0]["peak_mb"] * 1.5
            and rows[-1]["peak_mb"] * k / rows[-1]["steps"] > limit
        ):
            return
        yield k


def _limit(device: torch.device) -> float:
    return LIMIT_MB if device.type == "cpu" else 0.8 * torch.cuda.mem_get_info(device)[1] / 1e6


def _meta_gradient_cost(config: Config, data_dir: Path | None, repeats: int) -> Numbers:
    """Of one meta-gradient at the start of meta-training; in a process of its own."""
    torch.set_num_threads(config.threads)
    device, dtype = device_of(config), dtype_of(config)
    source = load_source(config, data_dir=data_dir)
    sampler = source.sampler(config, held_out=False, query_shots=config.query_shots, seed=config.seed, device=device)
    data = sampler.sample(config.meta_batch)
    module = build_network(config).to(device=device, dtype=dtype)
    theta = initial_theta(module, dtype, device)
    method, short = (build_method(c, module) for c in (config, replace(config, inner_steps=1)))
    usable = 0

    def call() -> None:
        nonlocal usable
        usable = int(method.algorithm.meta_gradient(method.problem, theta, data).ok.sum())

    warm_up = partial(short.algorithm.meta_gradient, short.problem, theta, data)
    return {**cost(call, warm_up, device=device, repeats=repeats), "usable": usable}


def _conditions(result: Numbers) -> list[str]:
    images = "real Omniglot" if result["dataset"] == "omniglot" else "generated characters in the place of Omniglot"
    how = "what PyTorch had allocated at its peak above that before the call; "
    how += "time of the processor, one thread" if result["device"] == "cpu" else "time between two events"
    rows = [row for name in (GD, HF) for row in result["curves"][name]]
    usable, all_tasks = sum(row["usable"] for row in rows), len(rows) * result["tasks"]
    return [
        f"One meta-gradient of {result['tasks']} tasks at the start of meta-training: {images}, {result['query_shots']} queries per class, "
        f"the paper's settings ({result['linear_steps']} CG steps, the Hessian itself). Every number comes from a process of its "
        f"own: {how}. Batch norm: {REGIME}." + (" Not measured on a GPU yet." if result["device"] == "cpu" else ""),
        "",
        f"Over all numbers of steps {usable} of {all_tasks} of iMAML's tasks gave a usable gradient; in the others CG met negative "
        "curvature or the inner solve diverged. It takes all its steps even so, and costs the same.",
    ]  # fmt: skip


def _memory(result: Numbers) -> list[str]:
    steps, curves = result["wanted"], result["curves"]
    body = []
    for name in METHODS:
        by_steps = {row["steps"]: row["peak_mb"] for row in curves[name]}
        body.append([name, *(f"{by_steps[k]:.0f}" if k in by_steps else "–" for k in steps)])
    slope, start = _line(curves[MAML], "peak_mb")
    maml = curves[MAML]
    stopped = maml[-1]["steps"] < steps[-1]
    first_order = curves[FIRST_ORDER][-1]["peak_mb"]
    return [
        "## Memory",
        "",
        "Peak in MB over inner steps (Hessian-free: Newton steps of 5 CG steps each):",
        "",
        *table(["method", *map(str, steps)], body),
        "",
        *(_flat(name, curves[name], "inner steps") for name in (GD, HF)),
        _flat(f"iMAML with {result['inner_steps']} GD steps", curves[OVER_CG], "CG steps"),
        f"- MAML: {slope:.1f} MB per step and {start:.0f} MB besides (least squares), {slope / result['tasks']:.1f} MB per step and task."
        + (
            f" It ends at {maml[-1]['steps']} steps: the next would pass the limit of {result['limit_mb']:.0f} MB that is set here."
            if stopped
            else ""
        ),
        f"- iMAML needs {curves[GD][-1]['peak_mb'] / first_order:.2f} times as much as first-order MAML, which needs that of one gradient "
        f"({first_order:.0f} MB).",
    ]  # fmt: skip


def _flat(name: str, rows: list[Numbers], unit: str) -> str:
    peaks = [row["peak_mb"] for row in rows]
    ratio, spread = peaks[-1] / peaks[0], max(peaks) / min(peaks)
    verdict = "flat within" if spread <= FLAT else "**not** flat within"
    return (
        f"- {name}: the peak at {rows[-1]['steps']} {unit} is {ratio:.3f} times that at {rows[0]['steps']}, largest over smallest "
        f"{spread:.3f}: {verdict} 5 %."
    )


def _time(result: Numbers) -> list[str]:
    """In units of one inner gradient, which is what a further step of first-order MAML costs."""
    steps, curves = result["wanted"], result["curves"]
    unit, _ = _line(curves[FIRST_ORDER], "seconds")
    lines, times = [], []
    for name in METHODS:
        slope, start = _line(curves[name], "seconds")
        by_steps = {row["steps"]: row["seconds"] for row in curves[name]}
        times.append([name, *(f"{by_steps[k] / unit:.1f}" if k in by_steps else "–" for k in steps)])
        lines.append([name, f"{slope / unit:.2f}", f"{start / unit:.1f}"])
    return [
        "## Time",
        "",
        f"In units of one gradient of the inner problem, {1000 * unit:.1f} ms: what a further step costs first-order MAML (least squares).",
        "",
        *table(["method", *map(str, steps)], times),
        "",
        "The same as a straight line over the steps. The paper says that iMAML with gradient descent is parallel to first-order MAML: "
        "equal numbers in the second column, and a constant more in the third.",
        "",
        *table(["method", "gradients per step", "gradients besides"], lines),
    ]  # fmt: skip


def _line(rows: list[Numbers], key: str) -> tuple[float, float]:
    """Slope and value at zero over the steps, least squares."""
    slope, start = np.polyfit([row["steps"] for row in rows], [row[key] for row in rows], 1)
    return float(slope), float(start)
