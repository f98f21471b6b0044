"""E6: sinusoid regression, the error after adaptation over the number of inner steps at meta-test (author response, point 4).

The settings of every algorithm are found by a search of its own, with a seed and tasks that are not reported; then all of them get
the same number of outer steps. All of them are trained again, several times as long: the longest runs are reported, and what they gain
says whether training had converged. One seed is trained once more with the larger K, sixteen times as long, which takes hours.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter
from scipy.special import stdtrit

from applications.meta_learning.config import Config
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.training import train
from applications.meta_learning.logs import environment
from applications.meta_learning.presets import preset
from applications.meta_learning.report import STYLE
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, TrainingFailed

ROWS = {
    "maml": "MAML",
    "fo": "first-order MAML",
    "reptile": "Reptile",
    "gd": "iMAML, gradient descent",
    "hf": "iMAML, Hessian-free",
}
COLOURS = dict(zip(ROWS, ("#aa3377", "#cc3311", "#777777", "#4477aa", "#228833"), strict=True))
IMAML = ("gd", "hf")

SHOTS, SEEDS = (5, 10), 3
OUTER_STEPS, SEARCH_STEPS = 8000, 2000
LONGER = (2, 4)  # times as long
LONGEST = 16  # one seed, with the last number of shots: does the error come to a floor at all?
TASKS, QUERY_SHOTS, SEARCH_TASKS = 200, 50, 100
SEARCH_SEED = 100  # added to the seed asked for: neither the networks nor the tasks of the search are reported

# Candidates. A step size of 0 is a line search; Newton-CG always has one.
STEP_SIZES, RATES, LAMS = (0.0, 0.01, 0.02), (3e-3, 1e-2), (0.1, 0.5, 2.0)
PLAIN = [
    {"inner_step_size": a, "lam": 0.0, "inner_curvature": "hessian", "outer_rate": r}
    for a, r in itertools.product(STEP_SIZES, RATES)
]
PROXIMAL = [
    {"inner_step_size": 0.0, "lam": lam, "inner_curvature": "hessian", "outer_rate": r}
    for lam, r in itertools.product(LAMS, RATES)
]
GRID: dict[str, list[Numbers]] = {
    **dict.fromkeys(("maml", "fo", "reptile"), PLAIN),
    "gd": PROXIMAL,
    "hf": [*({**one, "inner_curvature": "gauss-newton"} for one in PROXIMAL), *PROXIMAL[len(RATES) :]],
}


def base(row: str) -> Config:
    """What the search leaves as it is. Meta-training adapts with so many steps; meta-test with 1 to 100."""
    common = replace(preset("sinusoid"), device="cpu", threads=1, checkpoint_interval=1000)
    if row == "hf":
        return common
    common = replace(common, inner="gd", inner_curvature="hessian")
    if row == "gd":
        # 10 left |dG/dphi| = 2, where the meta-gradient is not that of iMAML any more: one seed of three went astray
        return replace(common, inner_steps=50)
    algorithm = {"maml": "maml", "fo": "first-order", "reptile": "reptile"}[row]
    return replace(common, lam=0.0, algorithm=algorithm, compile=False, inner_steps=10 if row == "reptile" else 5)  # type: ignore[arg-type]  # of the dict above


class E6(Experiment):
    """See the module."""

    name = "e6_sinusoid"
    title = "E6. Sinusoid regression"
    paper = "announced in the author response, point 4: on sinusoids iMAML performs better across the number of GD steps. No figure."

    def run(self, request: Request) -> Numbers:
        quick = request.quick
        shots, seeds = (SHOTS[:1], 1) if quick else (SHOTS, SEEDS)
        settings = {row: self._search(request, row) for row in ROWS}
        runs: list[Numbers] = []
        for seed, k, row in itertools.product(range(seeds), shots, ROWS):  # whole seeds first
            config = self._config(request, row, settings[row]["chosen"], k, request.seed + seed)
            measured = self._trained(request, f"{row}-{k}-{seed}", config)
            runs.append({"row": row, "shots": k, "seed": seed, "factor": 1, **measured})
        lengths = [] if quick else list(itertools.product(shots, LONGER))
        for seed, (k, factor), row in itertools.product(range(seeds), lengths, ROWS):
            config = self._config(request, row, settings[row]["chosen"], k, request.seed + seed)
            measured = self._trained(request, f"{row}-{k}-times{factor}-{seed}", longer(config, factor))
            runs.append({"row": row, "shots": k, "seed": seed, "factor": factor, **measured})
        longest: list[Numbers] = []
        for row in () if quick else ROWS:
            config = self._config(request, row, settings[row]["chosen"], SHOTS[-1], request.seed)
            measured = self._trained(request, f"{row}-longest-0", longer(config, LONGEST))
            longest.append({"row": row, "shots": SHOTS[-1], "seed": 0, "factor": LONGEST, **measured})
        return {
            "settings": settings,
            "runs": runs,
            "longest": longest,
            "meta_batch": config.meta_batch,
            "hidden": config.channels,
            "tasks": 4 if quick else TASKS,
            "query_shots": QUERY_SHOTS,
        }

    def _config(self, request: Request, row: str, chosen: Numbers, shots: int, seed: int) -> Config:
        steps = 2 if request.quick else OUTER_STEPS
        config = replace(base(row), **chosen, shots=shots, query_shots=shots, seed=seed, outer_steps=steps)
        config = replace(
            config, eval_interval=max(1, steps // 10), eval_query_shots=QUERY_SHOTS, eval_tasks=SEARCH_TASKS
        )
        return replace(config, channels=8, meta_batch=2, eval_tasks=4) if request.quick else config

    def _trained(self, request: Request, name: str, config: Config) -> Numbers:
        tasks = 4 if request.quick else TASKS
        return request.part(name, partial(trained, request, name, config, tasks), spinner=False)

    def _search(self, request: Request, row: str) -> Numbers:
        """All candidates in short runs, then the best one of each outer rate in a run as long as those that are reported: a short run
        favours large rates. The smallest error on the held-out tasks of the search wins.
        """
        candidates = GRID[row][:1] if request.quick else GRID[row]
        tried = [self._tried(request, row, candidate, SEARCH_STEPS) for candidate in candidates]
        rates = sorted({one["outer_rate"] for one in candidates})
        finalists = [min((one for one in tried if one["outer_rate"] == rate), key=_error) for rate in rates]
        finals = [
            self._tried(request, row, {name: one[name] for name in candidates[0]}, OUTER_STEPS) for one in finalists
        ]
        best = min(finals, key=_error)
        if best["error"] is None:
            raise RuntimeError(f"{ROWS[row]}: no candidate of the search could be trained")
        chosen = {name: best[name] for name in candidates[0]}
        return {"chosen": chosen, "tried": tried, "finals": finals, "inner_steps": base(row).inner_steps}

    def _tried(self, request: Request, row: str, candidate: Numbers, steps: int) -> Numbers:
        """The candidate with its error after so many outer steps."""
        config = self._config(request, row, candidate, SHOTS[-1], request.seed + SEARCH_SEED)
        config = replace(config, outer_steps=min(steps, config.outer_steps), eval_interval=0)
        return {**candidate, **request.part(part_name(row, candidate, steps), partial(searched, config))}

    def draw(self, result: Numbers, path: Path) -> None:
        shots = sorted({run["shots"] for run in result["runs"]})
        with plt.rc_context(STYLE):
            figure, panels = plt.subplots(1, len(shots) + 1, figsize=(4.3 * (len(shots) + 1), 4), layout="constrained")
            for k, axes in zip(shots, panels[:-1], strict=True):
                for row in ROWS:
                    steps, means, low, high = across(select(result, row, k))
                    axes.loglog(steps, means, "o-", ms=3, color=COLOURS[row], label=ROWS[row])
                    axes.fill_between(steps, low, high, color=COLOURS[row], alpha=0.15, lw=0)
                axes.set(title=f"K = {k}", xlabel="inner steps at meta-test", ylabel="mean squared error")
            figure.legend(
                *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ROWS), fontsize=8
            )
            long = _lengths(result, shots[-1])[-1]
            dashes = {1: "-", long: ":", LONGEST: "-."}
            for run in (one for one in result["runs"] + result.get("longest", []) if one["factor"] in dashes):
                if run["shots"] == shots[-1] and run["seed"] == 0:
                    points = [(p["step"], p["error"]) for p in run["training"]]
                    panels[-1].loglog(*zip(*points, strict=True), dashes[run["factor"]], color=COLOURS[run["row"]])
            title = f"training, K = {shots[-1]} (:  {long} times, -.  {LONGEST} times as long)"
            panels[-1].set_title(title, fontsize=10)
            panels[-1].set_xlabel("outer steps")
            panels[-1].xaxis.set_minor_formatter(NullFormatter())
            figure.savefig(path)
            plt.close(figure)

    def sources(self, stored: Numbers) -> str:
        """Hours lie between the first run and the last, and maybe commits that change nothing here: each run has its own."""
        runs = stored["result"]["runs"] + stored["result"].get("longest", [])
        commits = [f"`{commit[:12]}`" for commit in dict.fromkeys(run.get("commit") for run in runs) if commit]
        words = super().sources(stored) + (f"; runs of the commits {', '.join(commits)}" if len(commits) > 1 else "")
        elsewhere = {run["processor"] for run in runs if "processor" in run} - {stored["environment"]["processor"]}
        return words + (f", some of the longer ones on {' and '.join(sorted(elsewhere))}" if elsewhere else "")

    def findings(self, result: Numbers) -> list[str]:
        return [
            *_conditions(result),
            *_errors(result),
            *_astray(result),
            *_comparison(result),
            *_inner_solves(result),
            *_convergence(result),
            *_longest(result),
            *_settings(result),
        ]


def longer(config: Config, factor: int) -> Config:
    """The same training over more steps."""
    return replace(config, outer_steps=factor * config.outer_steps, eval_interval=factor * config.eval_interval)


def _error(one: Numbers) -> float:
    return math.inf if one["error"] is None else one["error"]


def part_name(row: str, candidate: Numbers, steps: int) -> str:
    """Of a candidate: its settings, so that what is on disk stays right when the grid changes."""
    words = (f"{value:g}" if isinstance(value, float) else value for value in candidate.values())
    return "-".join(["search" if steps == SEARCH_STEPS else "final", row, *words])


def searched(config: Config) -> Numbers:
    """The error of a candidate on held-out tasks after as many inner steps as in training; None where training gave up."""
    trainer = Trainer(config, load_source(config))
    try:
        for _ in range(config.outer_steps):
            trainer.meta_step()
    except TrainingFailed:
        return {"error": None, "failed_tasks": trainer.progress.failed_tasks}
    error = trainer.test(tasks=config.eval_tasks, query_shots=QUERY_SHOTS, seed=config.seed).mean
    return {"error": error if math.isfinite(error) else None, "failed_tasks": trainer.progress.failed_tasks}


def trained(request: Request, name: str, config: Config, tasks: int) -> Numbers:
    """Meta-training, its curve on held-out tasks, and the error over the number of inner steps on others.

    The tasks of the curve are drawn from the seed of the run, those of the end from another one: no task is in both.

    Raises:
        KeyboardInterrupt: it was stopped; the checkpoint is written, and another start goes on from there.
        TrainingFailed: too many meta-steps in a row failed.
    """
    trainer, entries, failure = train(request, name, config)
    if failure is not None:
        raise TrainingFailed(failure)
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation" and entry["step"]]
    training = [{"step": entry["step"], "error": entry["mean"]} for entry in evaluations]
    curve = trainer.test_over_inner_steps(tasks=tasks, query_shots=QUERY_SHOTS, seed=config.seed + 10_000)
    progress, here = trainer.progress, environment(torch.device("cpu"))
    return {
        "commit": here["commit"],
        "processor": here["processor"],
        "outer_steps": config.outer_steps,
        "seconds_per_step": progress.step_seconds / progress.step,
        "failed_tasks": progress.failed_tasks,
        "negative_tasks": progress.negative_tasks,
        "training": training,
        "curve": [
            {"steps": steps, "mean": e.mean, "interval": e.interval, "failed": e.failed, "residual": e.inner_residual}
            for steps, e in curve
        ],
    }


def select(result: Numbers, row: str, shots: int, factor: int | None = None) -> list[Numbers]:
    """The runs of an algorithm, one for each seed; without a factor those of the longest training."""
    factor = factor or max(run["factor"] for run in result["runs"] if run["shots"] == shots)
    return [r for r in result["runs"] if (r["row"], r["shots"], r["factor"]) == (row, shots, factor)]


def across(runs: list[Numbers]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Inner steps; mean over the seeds; least and largest."""
    steps = [point["steps"] for point in runs[0]["curve"]]
    values = list(zip(*([point["mean"] for point in run["curve"]] for run in runs), strict=True))
    return steps, [statistics.mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def half_width(values: list[float]) -> float | None:
    """Half of the 95 % interval of the mean, from Student's quantile; None for a single value."""
    n = len(values)
    return float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def _shown(values: Iterable[float]) -> str:
    values = list(values)
    width = half_width(values)
    return f"{statistics.mean(values):.3g}" + ("" if width is None else f" ± {width:.2g}")


def _shots(result: Numbers) -> list[int]:
    return sorted({run["shots"] for run in result["runs"]})


def _conditions(result: Numbers) -> list[str]:
    runs = result["runs"]
    seeds = len({run["seed"] for run in runs})
    steps = [f"{select(result, 'maml', k)[0]['outer_steps']} with K = {k}" for k in _shots(result)]
    return [
        f"Network 1 - {result['hidden']} - {result['hidden']} - 1 with ReLU, float32; outer steps of {result['meta_batch']} tasks: "
        f"{', '.join(steps)}, for every algorithm; Adam with a cosine schedule; as many query points as support points in "
        f"training. Test: {result['tasks']} tasks with {result['query_shots']} query points each, the same for all algorithms; seeds: "
        f"{seeds}. Every algorithm adapts at test as it does in training, iMAML with its proximal term. One step of the Hessian-free "
        f"solver is a Newton step with up to {base('hf').direction_steps} products with the matrix named below, and a line search.",
        "",
    ]


def _errors(result: Numbers) -> list[str]:
    lines = []
    for k in _shots(result):
        steps = [point["steps"] for point in select(result, "maml", k)[0]["curve"]]
        rows = []
        for row, name in ROWS.items():
            curves = [run["curve"] for run in select(result, row, k)]
            rows.append([name, *(_shown(curve[i]["mean"] for curve in curves) for i in range(len(steps)))])
        runs = [run for row in ROWS for run in select(result, row, k)]
        relative = statistics.median(p["interval"] / p["mean"] for run in runs for p in run["curve"] if p["mean"] > 0)
        failed = sum(p["failed"] for run in runs for p in run["curve"])
        lines += [
            f"K = {k}: mean squared error after so many inner steps, mean over the seeds ± 95 % interval over the seeds (Student). The "
            f"95 % interval over the tasks of one seed is {100 * relative:.0f} % of the mean (median of all entries). Test tasks whose "
            f"adaptation failed, which are in no mean: {failed}. The bands of the figure go from the least to the largest seed.",
            "",
            *table(["algorithm", *(f"{s}" for s in steps)], rows),
            "",
        ]
    return lines


def _astray(result: Numbers) -> list[str]:
    """Where one seed is far from another, the mean is that of the worse one."""
    found = []
    for k, row in itertools.product(_shots(result), ROWS):
        ends = [run["curve"][-1]["mean"] for run in select(result, row, k)]
        if max(ends) > 2 * min(ends):
            found.append(f"{ROWS[row]} at K = {k} ({', '.join(f'{end:.2g}' for end in ends)})")
    if not found:
        return []
    return [
        "**Not settled:** after the last step the error of one seed is more than twice that of another for "
        f"{'; '.join(found)}. These rows say what happened with these settings, and not what the algorithm can do.",
        "",
    ]


def _comparison(result: Numbers) -> list[str]:
    """iMAML against the others at equal inner steps, on the same tasks and seeds."""
    lines = ["The author response says that iMAML is better across the number of steps. Here, on the same tasks:", ""]
    for k, ours, other in itertools.product(_shots(result), IMAML, ("maml", "fo", "reptile")):
        mine, theirs = ([[p["mean"] for p in run["curve"]] for run in select(result, row, k)] for row in (ours, other))
        gaps = [
            [a - b for a, b in zip(x, y, strict=True)]
            for x, y in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True)
        ]
        steps = [p["steps"] for p in select(result, ours, k)[0]["curve"]]
        lower = [s for s, gap in zip(steps, gaps, strict=True) if statistics.mean(gap) < 0]
        widths = [math.inf if (width := half_width(gap)) is None else width for gap in gaps]
        clear = sum(statistics.mean(gap) + width < 0 for gap, width in zip(gaps, widths, strict=True))
        against = sum(statistics.mean(gap) - width > 0 for gap, width in zip(gaps, widths, strict=True))
        lines.append(
            f"- K = {k}, {ROWS[ours]} against {ROWS[other]}: lower error at {len(lower)} of {len(steps)} numbers of "
            f"steps{f' ({_listed(lower)})' if lower else ''}; the 95 % interval of the difference over the seeds is below 0 at {clear}, "
            f"above 0 at {against}."
        )
    return [*lines, ""]


def _inner_solves(result: Numbers) -> list[str]:
    """How far the steps of training are from the point at which iMAML takes its gradient."""
    lines = [
        "The gradient of iMAML is that of the inner solution phi*, and it is as good as the inner solve. After the steps of training "
        "(median over the tasks of a run, then over the runs; error of the same points, and after 100 steps):",
        "",
    ]
    for k, row in itertools.product(_shots(result), IMAML):
        runs, steps = select(result, row, k), result["settings"][row]["inner_steps"]
        points = [next(p for p in run["curve"] if p["steps"] == steps) for run in runs]
        residual = statistics.median(p["residual"] for p in points)
        here, there = (statistics.median(values) for values in zip(*_ends(runs, steps), strict=True))
        lines.append(
            f"- K = {k}, {ROWS[row]}, {steps} steps: |dG/dphi| = {residual:.2g}; error {here:.3g}, after 100 steps {there:.3g}."
            + (
                " Meta-training has improved phi*, which so few steps do not reach: solve the inner problem further, or better."
                if here > 2 * there
                else ""
            )
        )
    return [*lines, ""]


def _ends(runs: list[Numbers], steps: int) -> list[tuple[float, float]]:
    """The errors of each run after so many inner steps and after the most."""
    return [(next(p["mean"] for p in run["curve"] if p["steps"] == steps), run["curve"][-1]["mean"]) for run in runs]


def _listed(things: Iterable[object]) -> str:
    return ", ".join(map(str, things))


def _convergence(result: Numbers) -> list[str]:
    """What longer training gains: for each number of shots, from each length to the next."""
    lines = []
    for k in _shots(result):
        for pair in itertools.pairwise(_lengths(result, k)):
            lines += _gain(result, k, *pair)
    remark = (
        "The rate goes down to 0 in every run, so that all curves end flat; what tells is what the longer training gains. The targets "
        "have no noise, so that no error above 0 is a floor."
    )
    return [*_verdict(result), *lines, remark, ""] if lines else []


def _verdict(result: Numbers) -> list[str]:
    """What the last lengthening of all runs has gained, for each number of shots."""
    lines = []
    for k in _shots(result):
        if len(lengths := _lengths(result, k)) < 2:
            continue
        before, after = (select(result, "maml", k, factor)[0]["outer_steps"] for factor in lengths[-2:])
        logarithms = _logarithms(result, k, *lengths[-2:])
        by_seed = [statistics.mean(one) for one in zip(*logarithms, strict=True)]
        centre, width = statistics.mean(by_seed), half_width(by_seed)
        if width is None:
            verdict = "one seed cannot tell"
        elif abs(centre) <= width:
            verdict = f"no change that {len(by_seed)} seeds can show"
        else:
            verdict = "still falling" if centre < 0 else "rising"
        lines.append(f"- K = {k}, from {before} to {after} outer steps: the error is {_times(logarithms)}: {verdict}.")
    if longest := _logarithms_of_longest(result):
        run = result["longest"][-1]
        before = select(result, run["row"], run["shots"])[run["seed"]]["outer_steps"]
        words = f"from {before} to {run['outer_steps']} outer steps: the error is {_times(longest)}"
        lines.append(
            f"- K = {run['shots']}, {words}: the only one that says whether {before} were enough, and of one seed."
        )
    title = "**Had it converged?** All algorithms and seeds together, the last time that training was made longer:"
    return [title, "", *lines, ""]


def _lengths(result: Numbers, k: int) -> list[int]:
    """The lengths of training with so many shots, as factors."""
    return sorted({run["factor"] for run in result["runs"] if run["shots"] == k})


def _logarithms(result: Numbers, k: int, factor: int, later: int) -> list[list[float]]:
    """Of the factors between the errors after the most inner steps, for each algorithm and seed."""
    pairs = {row: (select(result, row, k, factor), select(result, row, k, later)) for row in ROWS}
    ends = {row: [[run["curve"][-1]["mean"] for run in runs] for runs in pair] for row, pair in pairs.items()}
    return [[math.log(b / a) for a, b in zip(before, after, strict=True)] for before, after in ends.values()]


def _logarithms_of_longest(result: Numbers) -> list[list[float]]:
    """The same of the longest training, against that of all seeds: for each algorithm one."""
    pairs = ((select(result, run["row"], run["shots"])[run["seed"]], run) for run in result.get("longest", []))
    ends = ([run["curve"][-1]["mean"] for run in pair] for pair in pairs)
    return [[math.log(after / before)] for before, after in ends]


def _gain(result: Numbers, k: int, factor: int, later: int) -> list[str]:
    """What training ``later`` times as long has gained over ``factor`` times."""
    runs = {row: (select(result, row, k, factor), select(result, row, k, later)) for row in ROWS}
    (first, *_), (last, *_) = runs["maml"]
    logarithms = _logarithms(result, k, factor, later)
    rows, means, clear = [], [], []
    for row, name in ROWS.items():
        steps = result["settings"][row]["inner_steps"]
        (here, far), (later_here, later_far) = (zip(*_ends(some, steps), strict=True) for some in runs[row])
        changes = [b - a for a, b in zip(far, later_far, strict=True)]
        width = half_width(changes)
        if width is not None and abs(statistics.mean(changes)) > width:
            clear.append(name)
        rows.append([name, str(steps), *map(_shown, (here, later_here, far, later_far, changes))])
        means.append((statistics.mean(far), statistics.mean(later_far)))
    gains = [100 * (1 - after / before) for before, after in means]
    orders = [[row for _, row in sorted(zip(errors, ROWS, strict=True))] for errors in zip(*means, strict=True)]
    same = "is the same after both" if orders[0] == orders[1] else "is not the same after both"
    most = last["curve"][-1]["steps"]
    least, largest = (100 * math.exp(end(map(end, logarithms))) for end in (min, max))
    return [
        f"What longer training gains: K = {k}, the error at test after as many inner steps as in training, and after {most}; after "
        f"{first['outer_steps']} outer steps and after {last['outer_steps']}, mean over the seeds ± 95 % interval; the change seed by "
        f"seed. After {most} inner steps the longer training gains between {min(gains):.0f} and {max(gains):.0f} % of the error of an "
        f"algorithm, and the 95 % interval of the change is clear of 0 for {len(clear)} of {len(ROWS)} algorithms"
        f"{f' ({_listed(clear)})' if clear else ''}; the order of the algorithms there {same}. Single seeds end at between "
        f"{least:.0f} and {largest:.0f} % of their error after the shorter training: "
        "for one algorithm an interval that holds 0 says that so few seeds cannot tell. All algorithms and seeds together: the error is "
        f"{_times(logarithms)}.",
        "",
        *table(
            [
                "algorithm",
                "inner steps",
                *(f"after {run['outer_steps']}" for run in (first, last)),
                *(f"{most} inner steps, after {run['outer_steps']}" for run in (first, last)),
                "change",
            ],
            rows,
        ),
        "",
    ]


def _times(logarithms: list[list[float]]) -> str:
    """The factor between the errors of the same runs after two lengths of training, from its logarithms for each algorithm and seed.

    The interval is over the seeds. Another algorithm would have another factor: it is that of these ones.
    """
    by_seed = [statistics.mean(one) for one in zip(*logarithms, strict=True)]
    centre, width = statistics.mean(by_seed), half_width(by_seed)
    words = f"{math.exp(centre):.2f} times that after the shorter training (geometric mean"
    if width is None:
        return f"{words}, one seed)"
    return f"{words}; 95 % interval over the seeds {math.exp(centre - width):.2f} to {math.exp(centre + width):.2f})"


def _longest(result: Numbers) -> list[str]:
    """One seed: what the error does where training goes on and on."""
    if not (longest := result.get("longest", [])):
        return []
    rows, logarithms = [], _logarithms_of_longest(result)
    for run, (logarithm,) in zip(longest, logarithms, strict=True):
        row = run["row"]
        shorter = (select(result, row, run["shots"], factor)[run["seed"]] for factor in _lengths(result, run["shots"]))
        all_runs = [*shorter, run]
        ends = [one["curve"][-1]["mean"] for one in all_runs]
        slope = logarithm / math.log(all_runs[-1]["outer_steps"] / all_runs[-2]["outer_steps"])
        rows.append([ROWS[row], *(f"{end:.3g}" for end in ends), f"{slope:.2f}"])
    steps, most = [one["outer_steps"] for one in all_runs], run["curve"][-1]["steps"]
    missing = [name for row, name in ROWS.items() if row not in {run["row"] for run in longest}]
    without = f" ({', '.join(missing)}: not run so long)" if missing else ""
    return [
        f"And longer still: one seed, {steps[-1]} outer steps{without}; the error after {most} inner steps. The last "
        "column is the "
        f"power of the number of outer steps with which it fell from {steps[-2]} to {steps[-1]}; at a floor it would "
        f"be 0, and above 0 it rose. From {steps[-2]} to {steps[-1]}, all algorithms together: the error is {_times(logarithms)}.",
        "",
        *table(["algorithm", *(f"after {step}" for step in steps), "power"], rows),
        "",
    ]


def _settings(result: Numbers) -> list[str]:
    rows = []
    for row, found in result["settings"].items():
        runs = [run for run in result["runs"] if run["row"] == row]
        chosen, tried = found["chosen"], found["tried"]
        errors = sorted(one["error"] for one in tried if one["error"] is not None)
        long = ", ".join(f"{_error(one):.3g} ({one['outer_rate']:g})" for one in found["finals"])
        rows.append(
            [
                ROWS[row],
                str(found["inner_steps"]),
                f"{chosen['inner_step_size']:g}" if chosen["inner_step_size"] else "line search",
                f"{chosen['lam']:g}",
                {"gauss-newton": "Gauss-Newton", "hessian": "Hessian"}[chosen["inner_curvature"]]
                if row == "hf"
                else "",
                f"{chosen['outer_rate']:g}",
                f"{errors[0]:.3g} to {errors[-1]:.3g} ({len(errors)} of {len(tried)})",
                long,
                f"{1000 * statistics.median(run['seconds_per_step'] for run in runs):.0f}",
                str(sum(run["failed_tasks"] for run in runs)),
                str(sum(run["negative_tasks"] for run in runs)),
            ]
        )
    header = [
        "algorithm",
        "inner steps in training",
        "step size",
        "lambda",
        "matrix of the steps",
        "outer rate",
        "errors of the search (trained)",
        f"the best of each rate, {OUTER_STEPS} outer steps",
    ]
    return [
        f"The settings are the best of a search with K = 10 and another seed: all candidates in runs of {SEARCH_STEPS} outer steps, then "
        f"the best one of each outer rate in a run of {OUTER_STEPS}, because a short run favours large rates. All candidates and their "
        "errors are in the JSON. Linear system of iMAML: 5 CG steps with the Gauss-Newton matrix. The last two columns count tasks of "
        "meta-training.",
        "",
        *table([*header, "ms per meta-step", "failed", "negative curvature"], rows),
        "",
        *_matrices(result),
    ]


def _matrices(result: Numbers) -> list[str]:
    """What the search says of the two matrices of Hessian-free steps."""
    best = {
        name: min(map(_error, found))
        for name, found in itertools.groupby(result["settings"]["hf"]["tried"], lambda one: one["inner_curvature"])
    }
    if len(best) == 1:
        return []
    lams = sorted({one["lam"] for one in result["settings"]["hf"]["tried"] if one["inner_curvature"] == "hessian"})
    return [
        "Hessian-free steps take the Gauss-Newton matrix (Martens 2010, whom the paper cites for them) or the Hessian itself, which is "
        f"indefinite for a network with kinks. The smallest error of the short runs: {best['gauss-newton']:.3g} against "
        f"{best['hessian']:.3g}, which were run with lambda = {' and '.join(f'{lam:g}' for lam in lams)}.",
        "",
    ]
