"""E7: where MAML works and iMAML fails, and the other way round, on small problems with known answers (:mod:`failures`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from applications.meta_learning.experiments import failures
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.report import PALETTE, STYLE

BLUE, RED, GREEN, PURPLE = PALETTE  # iMAML, MAML, a remedy, what the library estimates
TINY = 1e-16  # where a panel with a logarithmic axis draws a zero


class E7Failures(Experiment):
    """See the module."""

    name = "e7_failures"
    title = "E7. Where MAML or iMAML fails"
    paper = (
        "the author response promises cases of both kinds; also the claim of section 2.2, the sample-based inner solver of section 1, "
        "and a reviewer's question whether MAML's loss is numerical."
    )

    def run(self, request: Request) -> Numbers:
        quick, seed = request.quick, request.seed
        steps = (1, 10) if quick else (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100)
        lams = (1e-3, 1.0) if quick else (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
        small = (1.0, 1e-6) if quick else tuple(10.0**-i for i in range(15))
        long = (1, 10, 20) if quick else (1, 2, 5, 10, 20, 50, 100, 200)
        decades = (1, 10) if quick else (1, 3, 10, 30, 100, 300, 1000)
        generations, tolerances = (
            ((2, 10), (1e-4,)) if quick else ((2, 5, 10, 15, 20, 30, 40), (1e-1, 1e-2, 1e-4, 1e-6, 1e-8))
        )
        thetas = (0.5, 2.5) if quick else tuple(-1.125 + 0.25 * i for i in range(18))
        cases: dict[str, Callable[[], Numbers]] = {
            "negative_curvature": partial(failures.negative_curvature, steps),
            "unconverged": partial(failures.unconverged, lams, 10, seed),
            "flat": partial(failures.flat, small, seed),
            "too_large_a_step": partial(failures.too_large_a_step, long),
            "black_boxes": partial(failures.black_boxes, generations, tolerances, 1 if quick else 5, seed),
            "dependence": partial(failures.dependence, decades, seed),
            "kink": partial(failures.kink, thetas),
            "scaled": partial(failures.scaled, decades, seed),
        }
        return {name: request.part(name, measure) for name, measure in cases.items()}

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context({**STYLE, "font.size": 9, "axes.titlesize": 9.5}):
            figure, grid = plt.subplots(2, 4, figsize=(16, 7.4), layout="constrained")
            for (name, draw), axes in zip(PANELS.items(), grid.flat, strict=True):
                draw(axes, result[name])
                axes.legend(fontsize=7.5)
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [
            "Errors are relative to a reference in NumPy: dense algebra, a closed form, or differences of the run. *What was run*: the "
            "outer loss after the inner steps that were taken; *the bilevel problem*: the outer loss at the exact inner solution.",
            "",
            "## iMAML fails, MAML works",
            "",
            *_negative(result["negative_curvature"]),
            *_unconverged(result["unconverged"]),
            *_flat(result["flat"]),
            "## MAML fails, iMAML works",
            "",
            *_step(result["too_large_a_step"]),
            *_dependence(result["dependence"]),
            *_boxes(result["black_boxes"]),
            "## Both fail",
            "",
            *_kink(result["kink"]),
            "## Is MAML's loss numerical?",
            "",
            *_scaled(result["scaled"]),
        ]


def _quoted(lines: list[str]) -> list[str]:
    return [f"> {line}" if line.startswith("- ") else f"> {line}  " for line in lines]


def _shown(value: float | None) -> str:
    return "no gradient" if value is None else f"{value:.1e}"


# --- iMAML fails


def _draw_negative(axes: Axes, case: Numbers) -> None:
    rows = case["rows"]
    steps = [row["steps"] for row in rows]
    axes.loglog(steps, [row["maml"] for row in rows], "o-", ms=3, color=RED, label="MAML")
    given = [row for row in rows if row["imaml"] is not None]
    axes.loglog([row["steps"] for row in given], [row["imaml"] for row in given], "o-", ms=3, color=BLUE, label="iMAML")
    for i, row in enumerate(row for row in rows if row["imaml"] is None):
        axes.axvline(row["steps"], color=BLUE, ls=":", label=None if i else "iMAML refuses: negative curvature")
    axes.set(title="A. a saddle on the way to the minimum", xlabel="inner steps", ylabel="error against what was run")


def _negative(case: Numbers) -> list[str]:
    rows = case["rows"]
    first, last = rows[0], rows[-1]
    refused = [row for row in rows if row["imaml"] is None]
    given = [row["imaml"] for row in rows if row["imaml"] is not None]
    ours = "iMAML has a gradient at every number of steps here."
    if refused:
        steps = ", ".join(str(row["steps"]) for row in refused)
        ours = f"iMAML has no gradient at {steps} steps, where it has status {refused[0]['status']}."
    if given:
        ours += f" Its error against what was run: {given[0]:.1e} at the fewest steps with a gradient, {given[-1]:.1e} at the most."
    return [
        f"**A. Negative curvature.** A double well with lambda = {failures.WELL_LAM:g}; gradient descent starts near the saddle. The "
        f"smallest eigenvalue of the Hessian at phi_K is {first['eigenvalue']:.2f} at K = {first['steps']} and {last['eigenvalue']:.2f} "
        f"at K = {last['steps']}. {ours} MAML is within {max(row['maml'] for row in rows):.0e} of what was run at every number of steps. "
        "At a point that is no minimum the theorem says nothing, while the steps can always be differentiated.",
        "",
        *(["The library:", "", *_quoted(case["said"]["explain"]), ""] if case["said"] else []),
    ]


def _draw_unconverged(axes: Axes, case: Numbers) -> None:
    lams = [row["lam"] for row in case["rows"]]
    lines = (
        ("run_error", BLUE, "o-", "iMAML, error against what was run"),
        ("error", "black", "-", "iMAML, error in the bilevel problem"),
        ("estimate", PURPLE, "--", "the library's estimate of that"),
        ("imaml", GREEN, "-", "excess loss where iMAML ends"),
        ("maml", RED, "-", "excess loss where MAML ends"),
    )
    for key, colour, style, label in lines:
        axes.loglog(lams, [max(row[key], TINY) for row in case["rows"]], style, ms=3, color=colour, label=label)
    axes.set(title=f"B. {case['steps']} inner steps and a small lambda", xlabel="lambda", ylim=(TINY / 3, None))


def _unconverged(case: Numbers) -> list[str]:
    rows = [
        [
            f"{row['lam']:g}",
            *(f"{row[key]:.1e}" for key in ("error", "estimate", "run_error")),
            *(f"{100 * row[key]:.2g} %" for key in ("imaml",)),
            f"{abs(row['maml']):.0e}",
        ]
        for row in case["rows"]
    ]
    return [
        f"**B. Far from converged.** Quadratic tasks, {case['steps']} steps of gradient descent. With a small lambda the inner problem "
        "is ill-conditioned and phi_K is far from phi*. iMAML's gradient is then neither that of the bilevel problem nor that of what "
        "was run; meta-training with it ends where the loss after these steps is above the least one (*excess*, in closed form, for "
        "everything is quadratic). MAML minimises what is run.",
        "",
        *table(
            [
                "lambda",
                "iMAML's error, bilevel problem",
                "estimated by the library",
                "iMAML's error, what was run",
                "iMAML's excess",
                "MAML's excess",
            ],
            rows,
        ),
        "",
        f"The library, at lambda = {case['rows'][0]['lam']:g}:",
        "",
        *_quoted(case["said"]["explain"]),
        "",
    ]


def _draw_flat(axes: Axes, case: Numbers) -> None:
    for dtype, style in (("float64", "o-"), ("float32", "o--")):
        points = [(lam, e) for lam, e in zip(case["lams"], case[f"imaml {dtype}"], strict=True) if e is not None]
        axes.loglog(*zip(*points, strict=True), style, ms=3, color=BLUE, label=f"iMAML, {dtype}")
        axes.axhline(max(case[f"maml {dtype}"], TINY), color=RED, ls=style[1:], label=f"MAML without the term, {dtype}")
    axes.set(title="C. a flat inner objective", xlabel="lambda", ylabel="relative error", ylim=(TINY**1.4, None))


def _flat(case: Numbers) -> list[str]:
    def best(dtype: str) -> str:
        found = [(e, lam) for lam, e in zip(case["lams"], case[f"imaml {dtype}"], strict=True) if e is not None]
        error, lam = min(found)
        last = found[-1]
        none = len(case["lams"]) - len(found)
        missing = f", no gradient at the {none} smallest" if none else ""
        return f"{error:.1e} at lambda = {lam:g}, {last[0]:.1e} at {last[1]:g}{missing} ({dtype})"

    return [
        "**C. A flat inner objective.** Fewer examples than parameters and no proximal term: the minima are a plane, the Hessian is "
        "singular, and the start chooses the point. dphi/dtheta is the projector on the null space. MAML has it: error "
        f"{_shown(case['maml float64'])} (float64), {_shown(case['maml float32'])} (float32). The implicit gradient sees no dependence "
        f"on the start, and the library refuses: `{case['without']}` A small lambda brings iMAML near, with an error of the order of "
        f"lambda until rounding takes over: smallest {best('float64')}; {best('float32')}.",
        "",
    ]


# --- MAML fails


def _draw_step(axes: Axes, case: Numbers) -> None:
    for name, style in (("too large", "o-"), ("stable", "o--")):
        size = case[name]["step_size"]
        axes.loglog(
            case["steps"],
            [abs(g) for g in case[name]["grad"]],
            style,
            ms=3,
            color=RED,
            label=f"MAML, step size {size:g}",
        )
    axes.axhline(abs(case["exact"]), color=BLUE, label="exact; iMAML with Newton-CG is on it")
    axes.set(title="D. beyond the stability limit", xlabel="inner steps", ylabel="|dF/dtheta|")


def _step(case: Numbers) -> list[str]:
    large, stable = case["too large"], case["stable"]
    ours, same = case["imaml, Newton-CG"], case["imaml, same solver"]
    return [
        f"**D. Too large a step.** A double well in one variable. With steps of {large['step_size']:g} phi stays between "
        f"{min(large['phi']):.2f} and {max(large['phi']):.2f} but does not settle, and MAML's gradient is {large['grad'][-1]:.1e} after "
        f"{case['steps'][-1]} steps (exact: {case['exact']:.4f}; with steps of {stable['step_size']:g}: {stable['grad'][-1]:.4f}). It is "
        "the true derivative of a chaotic map, a product of factors 1 - alpha H of size above 1, and of no use. iMAML with Newton-CG, "
        f"whose steps nobody differentiates: error {_shown(ours['error'])}, status {ours['said']['inner']}. iMAML with the same gradient "
        f"descent has no minimum to work at either: error {_shown(same['error'])}, and the library says so (status "
        f"{same['said']['inner']}, linear solve {same['said']['linear']}):",
        "",
        *_quoted(same["said"]["explain"]),
        "",
    ]


def _draw_dependence(axes: Axes, case: Numbers) -> None:
    for (name, style), (lam, colour) in itertools.product(
        (("determined", "-"), ("few examples", "--")), ((0.0, RED), (case["lam"], BLUE))
    ):
        (curve,) = (c for c in case["curves"] if c["case"] == name and c["lam"] == lam)
        label = f"{name}, " + (f"lambda = {lam:g}" if lam else "no proximal term")
        axes.loglog(case["steps"], curve["norm"], style, color=colour, label=label)
        axes.loglog(case["steps"], curve["exact"], "x", ms=4, color=colour)
    axes.set(title="E. section 2.2 (crosses: closed form)", xlabel="inner steps", ylabel="|dphi_k / dtheta|")


def _dependence(case: Numbers) -> list[str]:
    rows = [[c["case"], f"{c['lam']:g}", *(f"{value:.2g}" for value in c["norm"])] for c in case["curves"]]
    worst = max(abs(a / b - 1) for c in case["curves"] for a, b in zip(c["norm"], c["exact"], strict=True))
    return [
        "**E. The dependence vanishes** (section 2.2): the spectral norm of dphi_k/dtheta over the inner steps k. *Determined*: the "
        "data have a curvature in every direction; *few examples*: none in half of the directions. The library's numbers are within "
        f"{worst:.0e} of the closed form.",
        "",
        *table(["data", "lambda", *(str(k) for k in case["steps"])], rows),
        "",
        "Where the data determine phi, the claim holds: without the proximal term the norm is (1 - alpha mu)^k and MAML's gradient goes "
        "to 0; with it, it stays at lambda / (mu + lambda) or above. Where there are fewer data than parameters, as in few-shot "
        "learning, it does not vanish in the directions that the data leave open, and there the proximal term is not needed for it.",
        "",
    ]


def _draw_boxes(axes: Axes, case: Numbers) -> None:
    for name, marker in (("SciPy", "s"), ("samples", "o")):
        rows = [row for row in case["rows"] if row["solver"] == name]
        axes.loglog(
            [row["residual"] for row in rows],
            [row["error"] for row in rows],
            marker,
            ms=4,
            color=BLUE,
            label=f"iMAML, {name}",
            alpha=0.7,
        )
    rows = sorted(case["rows"], key=lambda row: row["residual"])
    axes.loglog(
        [row["residual"] for row in rows],
        [row["estimate"] for row in rows],
        "-",
        lw=1,
        color=PURPLE,
        label="the library's estimate",
    )
    axes.set(title="F. solvers without a path (MAML is refused)", xlabel="|dG/dphi|", ylabel="relative error")


def _boxes(case: Numbers) -> list[str]:
    def ends(name: str) -> str:
        rows = sorted((row for row in case["rows"] if row["solver"] == name), key=lambda row: row["residual"])
        last, first = rows[0], rows[-1]
        return f"from {first['error']:.1e} at |dG/dphi| = {first['residual']:.1e} to {last['error']:.1e} at {last['residual']:.1e}"

    off = max(max(row["error"] / row["estimate"], row["estimate"] / row["error"]) for row in case["rows"])
    return [
        "**F. A solver that cannot be differentiated.** Logistic regression; the inner solver is L-BFGS-B of SciPy, or the "
        "cross-entropy method, which draws samples and asks for values of G only. MAML is refused: "
        f"`{case['maml'].partition(' got ')[0]} got ...`. iMAML through `BlackBox` has an error {ends('SciPy')} (SciPy), and "
        f"{ends('samples')} (samples): what counts is how near the point is, not how it was found. The library's estimate is within a "
        f"factor {off:.2f} of the true error in all {len(case['rows'])} runs.",
        "",
    ]


# --- both, and a question


def _draw_kink(axes: Axes, case: Numbers) -> None:
    thetas = [row["theta"] for row in case["rows"]]
    lines = (
        ("exact", "black", "-", 4.0),
        ("fixed point", GREEN, "-", 1.5),
        ("maml", RED, "--", 1.5),
        ("imaml", BLUE, ":", 2.5),
    )
    names = {"maml": "MAML", "imaml": "iMAML", "fixed point": "fixed_point of the proximal step"}
    for key, colour, style, width in lines:
        alpha = 0.3 if key == "exact" else 1.0
        axes.step(
            thetas,
            [row[key] for row in case["rows"]],
            style,
            where="mid",
            color=colour,
            lw=width,
            alpha=alpha,
            label=names.get(key, key),
        )
    axes.set(title="G. both fail: a kink", xlabel="theta", ylabel="dphi / dtheta", ylim=(-0.1, 1.6))


def _kink(case: Numbers) -> list[str]:
    rows = case["rows"]
    wrong = [row for row in rows if row["exact"] == 0]
    of_maml, of_imaml, of_remedy = (
        max(abs(row[key] - row["exact"]) for row in rows) for key in ("maml", "imaml", "fixed point")
    )
    residual = min(row["residual"] for row in wrong)
    return [
        f"**G. A kink.** Training loss |phi - {failures.KINK_AT:g}|: phi* stays at the kink while theta is within 1 / lambda of it, and "
        "its derivative is 0 there. Automatic differentiation knows the two sides and not the kink: largest error of dphi/dtheta "
        f"{of_maml:.2g} (MAML), {of_imaml:.2g} (iMAML). What gives it away is the inner residual, at least {residual:.2f} in the "
        f"{len(wrong)} cases at the kink. Written as a fixed point of the proximal step, `bilevel.fixed_point` has an error of "
        f"{of_remedy:.0e}. The library says of iMAML at the kink (status {case['said']['inner']}):",
        "",
        *_quoted(case["said"]["explain"]),
        "",
    ]


def _draw_scaled(axes: Axes, case: Numbers) -> None:
    for curve in case["curves"]:
        colour = RED if curve["method"] == "MAML" else BLUE
        style = (
            ("-" if curve["data"] == "as they are" else "--")
            if curve["dtype"] == "float64"
            else ("o" if curve["data"] == "as they are" else "x")
        )
        points = [(k, e) for k, e in zip(case["steps"], curve["error"], strict=True) if e]
        label = f"{curve['method']}, {curve['data']}" if curve["dtype"] == "float64" else None
        axes.loglog(*zip(*points, strict=True), style, ms=5, color=colour, label=label, mfc="none")
    axes.set(title="H. numerical? (lines: float64, markers: float32)", xlabel="inner steps", ylabel="relative error")


def _scaled(case: Numbers) -> list[str]:
    rows, parts = [], []
    for c in case["curves"]:
        rows.append([c["data"], f"{c['condition']:.0f}", c["method"], c["dtype"], *(_shown(e) for e in c["error"])])
    for kind in ("as they are", "scaled"):
        double, single = (
            next(c for c in case["curves"] if (c["data"], c["method"], c["dtype"]) == (kind, "MAML", dtype))
            for dtype in ("float64", "float32")
        )
        same = [
            k
            for k, a, b in zip(case["steps"], double["error"], single["error"], strict=True)
            if a and b and abs(b / a - 1) < 0.01
        ]
        parts.append(
            f"For the data {kind}, MAML's errors in float32 and float64 agree to 1 % at {', '.join(map(str, same)) or 'no number of'} "
            "steps"
        )
    return [
        f"Linear regression, features of unlike sizes, taken as they are or scaled to one size. {parts[0]}. {parts[1]}. Where they "
        "agree, the error is that of too few steps and not a numerical one: how many steps it takes is a matter of the condition "
        "number, which scaling changes, and not of the precision. iMAML, from the same points, has other errors because it does not "
        "differentiate the steps.",
        "",
        *table(["data", "condition number", "method", "precision", *(f"{k} steps" for k in case["steps"])], rows),
    ]


PANELS: dict[str, Callable[[Axes, Numbers], None]] = {
    "negative_curvature": _draw_negative,
    "unconverged": _draw_unconverged,
    "flat": _draw_flat,
    "too_large_a_step": _draw_step,
    "dependence": _draw_dependence,
    "black_boxes": _draw_boxes,
    "kink": _draw_kink,
    "scaled": _draw_scaled,
}
