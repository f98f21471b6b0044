"""E7: is a learned regulariser better than a fixed one? (Section 6 of the paper proposes it, and has no experiment.)

    G = L_train(phi) + 1/2 (phi - c)^T Lambda (phi - c),        Lambda = lambda I, lambda of each leaf, or a full diagonal.

The centre c and the logarithms of lambda are learned together from the same hypergradient. All variants have the same initial network,
tasks, solvers and outer steps, and differ in nothing but Lambda; the fixed ones are the scalar kind whose lambda is never moved.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.evaluate import evaluate
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.method import build_network, conditions
from applications.meta_learning.models import initial_theta
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import cross_entropy, few_shot_losses
from applications.meta_learning.report import PALETTE, STYLE
from applications.meta_learning.tasks import TaskSource, dtype_of, load_source
from bilevel import LearnedProximalProblem
from bilevel.curvature import GaussNewton
from bilevel.linsys import CG
from bilevel.regularisation import Diagonal, Kind, PerLeaf, Scalar
from bilevel.solvers import LBFGS

SEEDS, STEPS, TESTS, TEST_TASKS, QUERIES = 3, 100, 2, 100, 10
CHANNELS, META_BATCH = 8, 8
CENTRE_RATE, LAM_RATE = 2e-3, 3e-2  # of Adam; the second is a relative change of lambda
# Its line search suits every lambda, and lambda may change by orders of magnitude. Gauss-Newton below, because the Hessian is indefinite.
INNER = LBFGS(max_steps=8)
LINEAR = CG(max_steps=5, rtol=0.0)
T_975 = {2: 12.706, 3: 4.303}  # Student's t for so many seeds: the 95 % interval of their mean


@dataclass(frozen=True)
class Variant:
    """Form and start of Lambda, and whether it is learned."""

    name: str
    kind: Kind
    lam: float
    learned: bool


VARIANTS = (
    Variant("fixed 2", Scalar(), 2.0, False),
    Variant("fixed 0.2", Scalar(), 0.2, False),
    Variant("scalar", Scalar(), 2.0, True),
    Variant("per leaf", PerLeaf(), 2.0, True),
    Variant("diagonal", Diagonal(), 2.0, True),
)


class E7Regularisation(Experiment):
    """See the module."""

    name = "e7_regularisation"
    uses_gpu = True
    title = "E7. Learned regularisation against a fixed one"
    paper = "nothing; sections 2.2 and 6 propose to learn lambda, as a scalar, a vector or a matrix."

    def run(self, request: Request) -> Numbers:
        seeds, steps, tests = (2, 1, 2) if request.quick else (SEEDS, STEPS, TEST_TASKS)
        variants = VARIANTS[::2] if request.quick else VARIANTS
        runs = []
        for seed in range(seeds):  # all variants of one seed first: an interrupted run has pairs
            config = _config(request, request.seed + seed)
            for variant in variants:
                name = f"{variant.name}-{seed}".replace(" ", "-")
                measure = partial(_trained, variant, config, request.data_dir, steps, tests)
                runs.append({"variant": variant.name, "seed": config.seed, **request.part(name, measure)})
        return {
            "dataset": config.dataset,
            "conditions": conditions(config),
            "channels": config.channels,
            "meta_batch": config.meta_batch,
            "steps": steps,
            "test_tasks": tests,
            "queries": QUERIES,
            "seeds": seeds,
            "inner_steps": INNER.max_steps,
            "cg_steps": LINEAR.max_steps,
            "rates": [CENTRE_RATE, LAM_RATE],
            "variants": [{"name": v.name, "start": v.lam, "learned": v.learned} for v in variants],
            "runs": runs,
        }

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context(STYLE):
            figure, (accuracy, lam) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
            colours = (*PALETTE, "black")
            for variant, colour in zip(result["variants"], colours, strict=False):
                runs = _runs(result, variant["name"])
                steps = [test["step"] for test in runs[0]["tests"]]
                curves = [[100 * test["mean"] for test in run["tests"]] for run in runs]
                for curve in curves:
                    accuracy.plot(steps, curve, color=colour, alpha=0.3, lw=0.8)
                middle = [statistics.mean(values) for values in zip(*curves, strict=True)]
                accuracy.plot(steps, middle, "o-", ms=3, color=colour, label=variant["name"])
            accuracy.set(xlabel="meta-steps", ylabel="held-out accuracy, %", title="each seed, and the mean")
            accuracy.legend(fontsize=8)
            leaves = list(result["runs"][-1]["lam"])
            learned = [(v["name"], c) for v, c in zip(result["variants"], colours, strict=False) if v["learned"]]
            for place, (name, colour) in enumerate(learned):
                for run in _runs(result, name):
                    rows = [run["lam"].get(leaf, run["lam"].get("all")) for leaf in leaves]
                    y = [i + 0.2 * (place - 1) for i in range(len(leaves))]
                    lam.plot([row["median"] for row in rows], y, "o", ms=3, color=colour)
                    lam.hlines(y, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, lw=0.8)
            lam.axvline(result["variants"][-1]["start"], color="grey", lw=0.8, ls="--")
            lam.set_yticks(range(len(leaves)), leaves, fontsize=7)
            lam.invert_yaxis()
            lam.set(xscale="log", xlabel="lambda", title="lambda learned (bars: 5 to 95 % of the entries)")
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_setup(result), "", *_accuracies(result), "", *_lambdas(result)]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def _config(request: Request, seed: int) -> Config:
    """Data and network: 5-way 1-shot with a small network. The inner and outer methods are the constants above."""
    config = replace(
        preset("omniglot-5w1s-gd"),
        channels=CHANNELS,
        meta_batch=META_BATCH,
        query_shots=QUERIES,
        seed=seed,
        device="cpu",
        threads=1,
    )
    if request.data_dir is None:
        config = replace(config, dataset="glyphs")
    if request.quick:
        config = replace(config, channels=4, meta_batch=2, glyph_classes=12, train_classes=7, image_size=12)
    return config


def learned_problem(config: Config, kind: Kind) -> tuple[LearnedProximalProblem, torch.nn.Module]:
    """The few-shot problem of the program with another regulariser, and its network."""
    module = build_network(config).to(dtype=dtype_of(config))
    return LearnedProximalProblem.from_model(*few_shot_losses(module, cross_entropy), kind), module


def _trained(variant: Variant, config: Config, data_dir: Path | None, steps: int, test_tasks: int) -> Numbers:
    """Train, and test at equal distances; then what became of lambda."""
    torch.set_num_threads(config.threads)
    problem, module = learned_problem(config, variant.kind)
    source, device = load_source(config, data_dir=data_dir), torch.device("cpu")
    theta = problem.initial_theta(initial_theta(module, dtype_of(config), device), variant.lam)
    sampler = source.sampler(config, held_out=False, query_shots=QUERIES, seed=config.seed, device=device)
    outer = _outer(variant, theta)
    skipped, tests = 0, []
    test = partial(_test, problem, module, theta, source, config, test_tasks)
    for step in range(steps):
        if step % max(1, steps // TESTS) == 0:
            tests.append({"step": step, **test()})
        skipped += not meta_step(problem, theta, sampler.sample(config.meta_batch), outer)
    tests.append({"step": steps, **test()})
    return {"tests": tests, "skipped_steps": skipped, "lam": _describe(problem.lam(theta))}


def _outer(variant: Variant, theta: dict[str, Any]) -> torch.optim.Adam:
    groups: list[dict[str, Any]] = [{"params": _leaves(theta["centre"]), "lr": CENTRE_RATE}]
    if variant.learned:
        groups.append({"params": _leaves(theta["lam"]), "lr": LAM_RATE})
    return torch.optim.Adam(groups)


def _leaves(tree: Any) -> list[Tensor]:
    return list(tree.values()) if isinstance(tree, dict) else [tree]


def meta_step(problem: LearnedProximalProblem, theta: dict[str, Any], data: Any, outer: torch.optim.Optimizer) -> bool:
    """One outer step; False where no task had a usable gradient, and nothing was moved."""
    meta = bilevel.hypergradient(
        problem, theta, data, solver=INNER, linsys=LINEAR, curvature=GaussNewton(), batched=True
    )
    if not meta.num_ok:
        return False
    for part in ("centre", "lam"):
        for leaf, grad in zip(_leaves(theta[part]), _leaves(meta.grad[part]), strict=True):
            leaf.grad = grad
    outer.step()
    return True


def _test(
    problem: LearnedProximalProblem,
    module: torch.nn.Module,
    theta: dict[str, Any],
    source: TaskSource,
    config: Config,
    tasks: int,
) -> Numbers:
    sampler = source.sampler(config, held_out=True, query_shots=QUERIES, seed=config.seed, device=torch.device("cpu"))
    # the type of `solver` names those of the program's settings; any inner solver will do
    found = evaluate(problem, module, theta, sampler, solver=INNER, tasks=tasks, query_shots=QUERIES)  # type: ignore[arg-type]
    return asdict(found)


def _describe(lam: Any) -> Numbers:
    """Median, and 5 and 95 % of the entries, of each leaf."""
    leaves = lam if isinstance(lam, dict) else {"all": lam}
    found = {}
    for name, leaf in leaves.items():
        low, middle, high = (
            leaf.detach().double().flatten().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        )
        found[name] = {"low": low, "median": middle, "high": high}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Reporting


def _runs(result: Numbers, variant: str) -> list[Numbers]:
    return [run for run in result["runs"] if run["variant"] == variant]


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean over seeds, and half of its 95 % interval by Student's t."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T_975[len(values)] * spread


def _last(run: Numbers) -> float:
    return 100 * float(run["tests"][-1]["mean"])


def _setup(result: Numbers) -> list[str]:
    told = result["conditions"]
    return [
        f"5-way 1-shot; images: {told['images']}. Network: {told['network']}, {result['channels']} filters. "
        f"Batch norm: {told['batch norm']}.",
        "",
        f"{result['steps']} meta-steps of {result['meta_batch']} tasks with {result['queries']} queries a class. Inner solver: "
        f"{result['inner_steps']} steps of L-BFGS; linear system: {result['cg_steps']} CG steps with the Gauss-Newton matrix; Adam, rate "
        f"{result['rates'][0]:g} for the centre and {result['rates'][1]:g} for the logarithm of lambda, which starts at "
        f"{result['variants'][-1]['start']:g} where it is learned. Tests: {result['test_tasks']} tasks of held-out classes (random split) "
        "with "
        f"{result['queries']} queries a class; split, network and tasks differ from seed to seed, and are the same for all variants.",
    ]


def _accuracies(result: Numbers) -> list[str]:
    fixed = [variant["name"] for variant in result["variants"] if not variant["learned"]]
    final = {v["name"]: [_last(run) for run in _runs(result, v["name"])] for v in result["variants"]}
    rows, clear = [], []
    for name, values in final.items():
        runs = _runs(result, name)
        mean, interval = mean_and_interval(values)
        slope = statistics.median(run["tests"][-1]["inner_residual"] for run in runs)
        row = [name, ", ".join(f"{_last(run):.1f} ± {100 * run['tests'][-1]['interval']:.1f}" for run in runs)]
        row.append(f"{mean:.1f} ± {interval:.1f}")
        for other in fixed:
            gain, doubt = mean_and_interval([a - b for a, b in zip(values, final[other], strict=True)])
            row.append("" if other == name else f"{gain:+.1f} ± {doubt:.1f}")
            if abs(gain) > doubt and name not in fixed:
                clear.append(f"{name} {'above' if gain > 0 else 'below'} {other}")
        rows.append([*row, f"{slope:.2g}"])
    header = ["lambda", "each seed, %", f"mean of {result['seeds']} seeds, %", *(f"minus {name}, %" for name in fixed)]
    skipped = sum(run["skipped_steps"] for run in result["runs"])
    return [
        "Accuracy after the last meta-step. The intervals are 95 %: of a seed, over its test tasks; of a mean, and of a mean difference at "
        "the same seed, over the seeds by Student's t. Slope: the median of |dG/dphi|.",
        "",
        *table([*header, "slope at test"], rows),
        "",
        f"Learned ones that differ from a fixed one by more than that interval: {'; '.join(clear) or 'none'}. "
        f"Meta-steps without a usable task: {skipped}.",
    ]


def _lambdas(result: Numbers) -> list[str]:
    learned = [variant["name"] for variant in result["variants"] if variant["learned"]]
    leaves = list(result["runs"][-1]["lam"])

    def cell(name: str, leaf: str) -> str:
        rows = [run["lam"].get(leaf, run["lam"].get("all")) for run in _runs(result, name)]
        if all(row["low"] == row["high"] for row in rows):
            return ", ".join(f"{row['median']:.2g}" for row in rows)
        return ", ".join(f"{row['median']:.2g} ({row['low']:.2g} to {row['high']:.2g})" for row in rows)

    return [
        "Lambda learned, for each seed (diagonal: median, and 5 to 95 % of the entries):",
        "",
        *table(["leaf", *learned], [[f"`{leaf}`", *(cell(name, leaf) for name in learned)] for leaf in leaves]),
    ]
