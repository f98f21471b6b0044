"""The pages of benchmarks/quadratic.py, batch.py, few_shot.py and scaling.py, from their numbers alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from applications.meta_learning.logs import provenance

Rows = dict[str, dict[str, Any]]

HOW = (
    "Every method runs in a process of its own, and they take turns. The ratio is the median, over the rounds, of the time of the fastest "
    "right PyTorch peer by that of the method, with quartiles; above 1 is faster than it. On one thread it is that of the processor times, "
    "which other programs on the machine disturb less than the wall clock. A method whose gradient is wrong is not timed."
)


BETTY = "betty-ml 0.1.1, whose conjugate gradients take the next direction from the old residual and are wrong after one step."


def versions(methods: Iterable[str]) -> str:
    """Of the peers among these methods, as pyproject.toml pins them for their environments."""
    names = {method.lower().split(",")[0].split(" ")[0] for method in methods}
    names |= {"jax"} if "jaxopt" in names else set()
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pinned = [name for extra in ("peers", "peers-jax") for name in extras[extra] if name.split("==")[0] in names]
    words = f"Peers: {', '.join(sorted(pinned)).replace('==', ' ')}"
    if "betty" not in names:
        return f"{words}."
    return f"{words}, and {BETTY}"


WHERE = "[What the time is spent on](shares.md), [what a meta-gradient takes at least](floor.md)."


def quadratic(result: dict[str, Any]) -> str:
    """Work C."""
    options, rows = result["options"], result["rows"]
    lines = [
        "# One small quadratic",
        "",
        *_quick(result),
        "G = phi^T A phi / 2 - (b + W theta)^T phi with 50 inner and 20 outer variables, 100 gradient steps of fixed size and 5 CG steps, "
        "float64. The arithmetic takes microseconds, so this measures what a library adds to it. A has five different eigenvalues: these "
        "steps reach the exact gradient, unrolled or not.",
        "",
        HOW,
        "",
        "![Time of each method](quadratic.png)",
        "",
        *table(rows, options["limit"]),
        "",
        verdict(rows, options["best"], options["target"]),
        "",
        *_wrong(rows),
        WHERE,
        "",
        versions(rows),
        "",
        _from(result, f"{options['repeats']} repetitions"),
        "",
    ]
    return "\n".join(lines)


def batch(result: dict[str, Any]) -> str:
    """Works E and F."""
    options = result["options"]
    lines = ["# A thousand small problems", "", *_quick(result), HOW, "", "![Time of each method](batch.png)", ""]
    titles = {"E": "All of them easy", "F": "Easy ones and hard ones"}
    texts = {
        "E": "Everyone takes the same number of gradient steps and CG steps, enough for all.",
        "F": "Everyone solves to a tolerance by the method that suits it: this library by Newton-CG, the loops by Newton's method with a "
        "dense Hessian, JAXopt by L-BFGS. *Fixed steps* takes as many steps for all tasks as the hardest one needs; these were found by "
        "a search before, so its memory is not what a first call takes.",
    }
    for work, found in result["works"].items():
        low, middle, high = found["condition"]
        rows = found["rows"]
        lines += [
            f"## {titles[work]}",
            "",
            f"{found['tasks']:,} proximal logistic regressions with 20 features and 40 examples each, float64; condition numbers {low:.1f} "
            f"to {_number(high)}, median {_number(middle)}. {texts[work]}",
            "",
            *table(rows, options["limit"]),
            "",
            *([verdict(rows, found["best"], options["target"]), ""] if work == "E" else [_masks(rows), ""]),
            *_wrong(rows),
            _from(result, f"{found['repeats']} repetitions", found.get("environment")),
            "",
        ]
    methods = [method for found in result["works"].values() for method in found["rows"]]
    return "\n".join([*lines, versions(methods), ""])


def few_shot(result: dict[str, Any]) -> str:
    """Works A and B."""
    options = result["options"]
    lines = [
        "# One meta-gradient beside its peers",
        "",
        *_quick(result),
        "Four convolutions of 64 channels, 16 gradient steps and 5 CG steps, float32, 15 queries per class, random images. Before, every "
        "method computes the meta-gradient of two tasks in float64: that is the error in the tables. Memory is the peak above what the "
        "process had after a warm-up with two images. [Another page](meta_gradient.md) has more of this library's options.",
        "",
        HOW,
        "",
        "![Time of each method](few_shot.png)",
        "",
    ]
    for found in result["works"].values():
        rows = found["rows"]
        lines += [
            f"## {found['count']} tasks {found['ways']}-way {found['shots']}-shot, lambda = {found['lam']:g}",
            "",
            *table(rows, options["limit"]),
            "",
            verdict(rows, found["best"], options["target"]),
            "",
            _memory(rows, found["right_peers"]),
            "",
            *_wrong(rows),
            _from(result, f"{found['repeats']} repetitions", found.get("environment")),
            "",
        ]
    lines += [
        "higher unrolls: it computes MAML's gradient, another one, and is compared with a loop for that. It takes no part in the ratio's "
        "base. Lambda is so large that CG meets no negative curvature: there a system has no meaning, this library says so, and the loops "
        "go on.",
        "",
        WHERE,
        "",
        versions([method for found in result["works"].values() for method in found["rows"]]),
        "",
    ]
    return "\n".join(lines)


def scaling(result: dict[str, Any]) -> str:
    """Work G."""
    names = {"variables": "variables d", "tasks": "tasks at once"}
    texts = {
        "variables": "A signal of d samples is smoothed, with one log-weight for each difference of neighbours: d - 1 outer variables. 40 "
        "gradient steps and 15 CG steps, float64, no matrix anywhere.",
        "tasks": "The easy logistic regressions of [another page](batch.md), all tasks at once: 25 gradient steps and 10 CG steps.",
    }
    lines = [
        "# Cost over the number of variables and of tasks",
        "",
        *_quick(result),
        "![Time and memory over both](scaling.png)",
        "",
        f"Every size has a process of its own. All gradients are within a relative error of {result['options']['limit']:g} of the exact "
        "ones (a banded solver; a dense Newton method). Memory is the peak above what the process had after a tiny problem.",
        "",
    ]
    for kind, points in result["points"].items():
        slopes = result["slopes"][kind]
        first, last = points[0], points[-1]
        lines += [
            f"## {names[kind][0].upper()}{names[kind][1:]}",
            "",
            texts[kind],
            "",
            f"| {names[kind]} | CPU milliseconds | milliseconds | peak memory |"
            + (" vectors of d |" if kind == "variables" else ""),
            "|---" * (5 if kind == "variables" else 4) + "|",
        ]
        for point in points:
            vectors = f" {point['peak_mb'] * 1e6 / 8 / point['size']:.1f} |" if kind == "variables" else ""
            times = f"{point['cpu_milliseconds']:,.1f} | {point['milliseconds']:,.1f}"
            lines.append(f"| {point['size']:,} | {times} | {point['peak_mb']:,.1f} MB |{vectors}")
        lines += [
            "",
            f"Fitted slope of log time: {slopes['time, small']:.2f} over the smaller half of the sizes, where the number of operations "
            f"decides, and {slopes['time, large']:.2f} over the larger half; of log memory there: {slopes['memory, large']:.2f}. From "
            f"{first['size']:,} to {last['size']:,}, time grew by a factor of {last['cpu_milliseconds'] / first['cpu_milliseconds']:,.1f}.",
            "",
        ]
    return "\n".join([*lines, _from(result, ""), ""])


PACKAGES = ("TorchOpt", "xitorch", "higher (unrolled)")
"""Rows of PyTorch packages that compute the gradient that is asked for."""


def table(rows: Rows, limit: float) -> list[str]:
    """One row for each method."""
    lines = [
        "| method | CPU milliseconds | milliseconds | times as fast as the best peer (quartiles) | peak memory | relative error |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        error = f"{row['error']:.0e}"
        if not row["right"]:
            lines.append(f"| {name} | not timed | | | | {error}: above {limit:g} |")
            continue
        low, high = row["faster_quartiles"]
        lines.append(
            f"| {name} | {_number(row['cpu_milliseconds'])} | {_number(row['milliseconds'])} "
            f"| {row['faster']:.2f} ({low:.2f} .. {high:.2f}) | {max(row['peak_mb'], 0):.0f} MB | {error} |"
        )
    return lines


def verdict(rows: Rows, best: str, target: float) -> str:
    """Whether the target is reached, by which row of ours."""
    name, row = max(_ours(rows).items(), key=lambda item: item[1]["faster"])
    reached = "reached" if row["faster"] >= target else "**not reached**"
    packages = {key: one for key, one in rows.items() if key.startswith(PACKAGES) and one["right"]}
    fastest = max(packages, key=lambda key: packages[key]["faster"], default=best)
    beside = row["faster"] / rows[fastest]["faster"]
    published = (
        "" if fastest == best else f" The fastest right one that is published was *{fastest}*: {beside:.2f} times."
    )
    return (
        f"The fastest right PyTorch peer was *{best}*. Target: at least {target:g} times as fast; {reached}: {row['faster']:.2f} times "
        f"(*{name}*).{published}"
    )


def draw(tables: dict[str, Rows], path: Path, key: str = "cpu_milliseconds") -> None:
    """A panel for each work: the time of each method, this library's in another colour."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    from applications.meta_learning.report import PALETTE, STYLE

    timed = {title: [(name, row[key]) for name, row in rows.items() if key in row] for title, rows in tables.items()}
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        height = 0.8 + 0.32 * max(map(len, timed.values()))
        figure, panels = plt.subplots(
            1, len(timed), figsize=(6.5 * len(timed), height), squeeze=False, layout="constrained"
        )
        for axes, (title, rows) in zip(panels[0], timed.items(), strict=True):
            names, times = zip(*reversed(rows), strict=True)
            colours = [PALETTE[0] if name.startswith("bilevel") else "#777777" for name in names]
            axes.scatter(times, names, color=colours)  # points: on a logarithmic axis a bar has no length
            for name, time in rows:
                axes.annotate(_number(time), (time, name), (6, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set(xscale="log", title=title)
            axes.margins(y=0.12)
            axes.xaxis.set_minor_formatter(NullFormatter())  # each point has its number
            axes.set_xlabel("milliseconds" + (" of the processor" if key.startswith("cpu") else ""))
            axes.set_xlim(0.7 * min(times), 3 * max(times))
        figure.savefig(path)
        plt.close(figure)


TITLES = {
    "A": "A: 16 tasks 5-way 1-shot",
    "B": "B: 2 tasks 20-way 5-shot",
    "E": "E: 1,000 easy problems",
    "F": "F: 1,000 unequal problems",
}


def tables(result: dict[str, Any]) -> dict[str, Rows]:
    """Of the works of a result, by their titles."""
    if "works" not in result:
        return {"": result["rows"]}
    return {TITLES[work]: found["rows"] for work, found in result["works"].items()}


def _masks(rows: Rows) -> str:
    """What stopping early gains."""
    masked, fixed = rows["bilevel"]["cpu_milliseconds"], rows["bilevel, fixed steps"]["cpu_milliseconds"]
    ratio = fixed / masked
    gain = "pays" if ratio > 1.1 else "costs time" if ratio < 0.9 else "changes little"
    return (
        f"Fixed steps took {ratio:.2f} times as long as steps to a tolerance: stopping early {gain} here. Tasks that are done leave "
        "the inner solve when at most half are left; in the linear solve they stay to the end. The fixed numbers of steps are only known "
        "after a run to a tolerance."
    )


def _memory(rows: Rows, peers: list[str]) -> str:
    """Beside the leanest peer that computes the same."""
    leanest = min((name for name in peers if rows.get(name, {}).get("right")), key=lambda name: rows[name]["peak_mb"])
    name, row = max(_ours(rows).items(), key=lambda item: item[1]["faster"])
    least = min(_ours(rows).items(), key=lambda item: item[1]["peak_mb"])
    limit = rows[leanest]["peak_mb"]
    reached = "reached" if row["peak_mb"] <= limit else "**not reached**"
    return (
        f"Target for memory: no more than the leanest of these peers (*{leanest}*, {limit:.0f} MB); {reached} by the fastest of ours "
        f"(*{name}*, {row['peak_mb']:.0f} MB). The leanest of ours takes {least[1]['peak_mb']:.0f} MB (*{least[0]}*)."
    )


def _ours(rows: Rows) -> Rows:
    return {name: row for name, row in rows.items() if name.startswith("bilevel") and row["right"]}


def _wrong(rows: Rows) -> list[str]:
    """A sentence on the methods that failed the check."""
    names = [f"{name} ({row['error']:.0e})" for name, row in rows.items() if not row["right"]]
    return [f"Wrong, and left out: {', '.join(names)}.", ""] if names else []


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _quick(result: dict[str, Any]) -> list[str]:
    return (
        ["A quick run: it shows that the code works, and no more.", ""]
        if "--quick" in result["environment"]["command"]
        else []
    )


def _from(result: dict[str, Any], repeats: str, environment: dict[str, Any] | None = None) -> str:
    """Where the numbers come from. Works that are measured one by one have environments of their own."""
    environment, options = environment or result["environment"], result["options"]
    command = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", environment["command"])  # without folders
    seed = f"seed {options['seed']}" if "seed" in options else ""
    parts = [repeats, f"{options['threads']} thread" + "s" * (options["threads"] > 1), seed]
    facts = provenance({**environment, "threads": options["threads"]})
    return f"{', '.join(part for part in parts if part)}. Command: `{command}`. {facts}."
