"""The page and the figure of benchmarks/choices.py, from its numbers alone (``python docs/results/publish.py benchmark choices``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from applications.meta_learning.logs import provenance

LOOSE, TIGHT = 1e-2, 1e-6  # the errors that the tables ask for
SYSTEM = "Exact"
Rows = list[dict[str, Any]]


def page(result: dict[str, Any]) -> str:
    """In Markdown; docs/choosing.md takes the first table from between the marks."""
    problems, options = result["problems"], result["options"]
    lines = [
        "# Which solver, which linear solver, which tolerance: measured",
        "",
        "Three problems, every choice, against the exact hypergradient. What follows from it is in "
        "[Which solver, which linear solver, which tolerance](../choosing.md).",
        "",
        *(["A quick run: it shows that the code works, and no more.", ""] if options["quick"] else []),
        f"The milliseconds of processor time until the relative error is at most {LOOSE:g} and {TIGHT:g}, for the fastest method of "
        "each kind. An inner solve and a linear solve make one hypergradient, so the times add.",
        "",
        "<!-- short -->",
        "",
        *_short(problems),
        "",
        "<!-- end of short -->",
        "",
        f"Every choice: the milliseconds until {_together(f'{LOOSE:g}')} and until {_together(f'{TIGHT:g}')}. A dash: not reached; where "
        "neither is, the smallest error.",
        "",
        *_all(problems, "inner", "inner solver"),
        "",
        *_all(problems, "linear", "linear solver"),
        "",
        "The relative error of the hypergradient over one tolerance, with the other one tight. The inner tolerance is relative to the "
        "gradient at the start, the linear one is `rtol`.",
        "",
        *_short_tolerances(problems, options),
        "",
        "![Error over processor time](choices.png)",
        "",
        "## How to read the tables",
        "",
        *_reading(options),
    ]
    for problem in problems.values():
        lines += _problem(problem, options)
    environment = next(iter(problems.values()))["environment"]
    lines += [
        "## Where the numbers come from",
        "",
        f"Command: `python {environment['command']}`, seed {options['seed']}; one thread, float64 where nothing else is said. The "
        f"times are the median of {options['repeats']}, and all methods of a problem take turns. "
        f"{provenance(environment)}. The processor did other work at the same time, which slows "
        "all methods alike: compare the times of one problem with each other, and not with those of another machine. Errors and counts "
        "do not depend on it.",
        "",
    ]
    return "\n".join(lines)


def _reading(options: dict[str, Any]) -> list[str]:
    return [
        f"- Each method is run with tolerances from {options['tolerances'][0]:g} to {options['tolerances'][-1]:g}, and with no tighter "
        f"ones once it has used its {options['steps']} steps (methods of Newton's kind have fewer). A row has the times "
        "until the error is small enough. The other columns are about one run: the cheapest that reaches the smaller error, or else "
        "the most accurate.",
        "- The tolerance of an inner solver is relative to the gradient of the inner objective (or the residual of the equations) at the "
        "start; that of a linear solver is its `rtol`.",
        f"- *Inner solvers*: the time of the solve alone; the error is that of the hypergradient at its point, with `{SYSTEM}`.",
        "- *Linear solvers*: the time of the gradient at the exact point, with the derivatives of the outer loss and the cross derivative.",
        "- *Error*: relative, over all entries, against a hypergradient from dense matrices: derivatives by torch.func, the point by "
        "SciPy, the linear system by NumPy. No solver of the library has a part in it.",
        "- *Gradients* and *products* are counted over the whole batch at once; for `ScipyMinimize` and `TorchOptim`, which take one task "
        "after the other, they are those of the task that took most.",
        "",
    ]


def _first(rows: Rows, error: float) -> dict[str, Any] | None:
    """The cheapest run that is accurate enough."""
    good = [row for row in rows if row.get("error") is not None and row["error"] <= error]
    return min(good, key=lambda row: row["milliseconds"], default=None)


def _best(rows: Rows) -> dict[str, Any]:
    """The run that a row of a table is about."""
    found = _first(rows, TIGHT)
    return found or min(rows, key=lambda row: float("inf") if row["error"] is None else row["error"])


def _number(value: float | None) -> str:
    """An error, on one line."""
    return "none" if value is None else _together(f"{value:.0e}")


def _together(text: str) -> str:
    """Without a place where a browser may break the line."""
    return text.replace("-", "\u2011")


def _milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(row: dict[str, Any] | None) -> str:
    return "–" if row is None else _milliseconds(row["milliseconds"])


def _fastest(methods: dict[str, Rows], error: float) -> str:
    """Its name and its time."""
    found = {label: _first(rows, error) for label, rows in methods.items() if "refused" not in rows[0]}
    times = {label: row["milliseconds"] for label, row in found.items() if row is not None}
    if not times:
        return "none"
    label = min(times, key=lambda name: times[name])
    return f"{_code(label)}: {_milliseconds(times[label])} ms"


def _code(label: str) -> str:
    """The class and its options as code, the rest as words."""
    name, *rest = label.split(", ")
    return ", ".join([f"`{name}`", *(f"`{part}`" if "=" in part or "(" in part else part for part in rest)])


def _short(problems: dict[str, Any]) -> list[str]:
    lines = ["| problem | error | inner solver | linear solver |", "|---|---|---|---|"]
    for problem in problems.values():
        tasks = f"{problem['tasks']} tasks of " if problem["tasks"] > 1 else ""
        for error, title in ((LOOSE, problem["title"]), (TIGHT, f"{tasks}{problem['d']} unknowns")):
            cells = [_fastest(problem[kind], error) for kind in ("inner", "linear")]
            lines.append(f"| {title} | {_together(f'{error:g}')} | {' | '.join(cells)} |")
    return lines


def _all(problems: dict[str, Any], kind: str, heading: str) -> list[str]:
    """A row for each method, with its cost on each problem."""
    labels = dict.fromkeys(label for problem in problems.values() for label in problem[kind])
    titles = " | ".join(problem["title"] for problem in problems.values())
    lines = [f"| {heading} | {titles} |", "|---" * (1 + len(problems)) + "|"]
    for label in labels:
        cells = [_cost(problem[kind].get(label)) for problem in problems.values()]
        lines.append(f"| {_code(label)} | {' | '.join(cells)} |")
    return lines


def _cost(rows: Rows | None) -> str:
    """Of one method on one problem."""
    if rows is None:
        return ""
    if "refused" in rows[0]:
        return "refused"
    found = [_first(rows, error) for error in (LOOSE, TIGHT)]
    if found == [None, None]:
        error = _best(rows)["error"]
        return "failed" if error is None else f"error {_number(error)}"
    return f"{_time(found[0])} / {_time(found[1])}"


def _short_tolerances(problems: dict[str, Any], options: dict[str, Any]) -> list[str]:
    lines = [
        f"| tolerance | {' | '.join(f'{number:g}' for number in options['grid'])} |",
        "|---" * (1 + len(options["grid"])) + "|",
    ]
    for problem in problems.values():
        grid = [row["errors"] for row in problem["grid"]["float64"]]
        lines.append(f"| {problem['title']}: inner | {' | '.join(_number(row[-1]) for row in grid)} |")
        lines.append(f"| {problem['title']}: linear | {' | '.join(map(_number, grid[-1]))} |")
    return lines


def _problem(problem: dict[str, Any], options: dict[str, Any]) -> list[str]:
    facts = problem["facts"]
    known = [
        f"{problem['d']} unknowns" + (f" for each of {problem['tasks']} tasks" if problem["tasks"] > 1 else ""),
        f"{problem['outer variables']} outer variables",
        f"condition number {facts['condition number']:.2g}",
    ]
    if "smallest eigenvalue" in facts:
        known.append(
            f"smallest eigenvalue of the Hessian {facts['smallest eigenvalue']:.1e} at the solution and "
            f"{facts['smallest eigenvalue at the start']:.1e} at the start"
        )
    else:
        known.append(f"the matrix differs from its transpose by {100 * facts['asymmetry']:.0f} % of its norm")
    lines = [f"## {problem['title']}", "", problem["words"], "", "; ".join(known) + ".", ""]
    early = problem["early"]
    lines += ["### Inner solvers", "", *_table(problem["inner"], gradients=True), ""]
    lines += ["### Linear solvers", "", *_table(problem["linear"], gradients=False), ""]
    lines += _tolerances(problem, options)
    return lines if early is None else [*lines, *_early(early, problem["tasks"])]


def _table(methods: dict[str, Rows], gradients: bool) -> list[str]:
    counts = "gradients, products" if gradients else "products"
    lines = [
        f"| method | ms to {LOOSE:g} | ms to {_together(f'{TIGHT:g}')} | tolerance | {counts} | status | error |",
        "|---|---|---|---|---|---|---|",
    ]
    refused = []
    for label, rows in methods.items():
        if "refused" in rows[0]:
            refused.append(_code(label))
            continue
        row = _best(rows)
        spent = f"{row['gradients']}, {row['products']}" if gradients else str(row["products"])
        number = _together(f"{row['number']:g}") if row["number"] else ""
        if "growing rank" in label:
            number = f"rank {row['number']:g} d"
        lines.append(
            f"| {_code(label)} | {_time(_first(rows, LOOSE))} | {_time(_first(rows, TIGHT))} | {number} | {spent} | "
            f"{row['status']} | {_number(row['error'])} |"
        )
    if refused:
        lines += ["", f"Refused with an error, because it could not be right here: {', '.join(refused)}."]
    return lines


def _tolerances(problem: dict[str, Any], options: dict[str, Any]) -> list[str]:
    pair = "`Anderson` and `GMRES`" if problem["accuracy"] is None else "`NewtonCG` and `CG`"
    lines = [
        "### Tolerances",
        "",
        f"The error with {pair}; inner tolerance downwards, linear tolerance to the right.",
        "",
    ]
    for precision in ("float64", "float32"):
        lines += [
            f"| {precision} | {' | '.join(f'{number:g}' for number in options['grid'])} | inner status |",
            "|---" * (2 + len(options["grid"])) + "|",
        ]
        for number, row in zip(options["grid"], problem["grid"][precision], strict=True):
            lines.append(f"| {number:g} | {' | '.join(map(_number, row['errors']))} | {row['inner']} |")
        lines.append("")
    if problem["accuracy"] is not None:
        lines += [
            "With `accuracy=` the tolerances are chosen; the counts contain the error estimates.",
            "",
            "| asked for | error | gradients | products |",
            "|---|---|---|---|",
        ]
        for row in problem["accuracy"]:
            lines.append(f"| {row['accuracy']:g} | {_number(row['error'])} | {row['gradients']} | {row['products']} |")
        lines.append("")
    return lines


def _early(early: dict[str, Any], tasks: int) -> list[str]:
    lines = [
        "### Negative curvature",
        "",
        f"After {early['steps']} steps of gradient descent the Hessian of {early['indefinite']} of {tasks} tasks is indefinite "
        f"(smallest eigenvalue {early['smallest']:.2g}). What each way through says there, and at the solution; the error is against the "
        "exact hypergradient in both.",
        "",
        "| linear solve | status there | error there | status at the solution | error at the solution |",
        "|---|---|---|---|---|",
    ]
    for label, row in early["rows"].items():
        cells = [f"{row[where]['status']} | {_number(row[where]['error'])}" for where in ("early", "solved")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]


def draw(result: dict[str, Any], path: Path) -> None:
    """Error over processor time: inner solvers above, linear solvers below, a column for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(result["problems"].values())
    figure, axes = plt.subplots(
        2, len(problems), figsize=(3.7 * len(problems), 11.0), layout="constrained", squeeze=False
    )
    for column, problem in zip(axes.T, problems, strict=True):
        for axis, kind in zip(column, ("inner", "linear"), strict=True):
            _curves(axis, problem[kind])
            axis.set_xlabel(f"processor time of the {kind} solve, ms")
        column[0].set_title(problem["title"], fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the hypergradient")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(axis: Any, methods: dict[str, Rows]) -> None:
    colours = (
        "#4477aa",
        "#cc3311",
        "#228833",
        "#aa3377",
        "#ddaa33",
        "#33bbee",
        "#222222",
        "#999999",
        "#885533",
        "#66ccaa",
    )
    shown = {label: [row for row in rows if row.get("error")] for label, rows in methods.items()}
    shown = {label: rows for label, rows in shown.items() if rows}
    for (label, rows), colour, marker in zip(shown.items(), colours, "osD^vP*X<>", strict=False):
        times, errors = zip(*((row["milliseconds"], row["error"]) for row in rows), strict=True)
        axis.plot(times, errors, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    axis.set(xscale="log", yscale="log")
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), labelspacing=0.3)
