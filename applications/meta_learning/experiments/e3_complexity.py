"""E3: what a meta-gradient costs (Table 1, Lemmas 2 and 3, Theorem 2 and Corollary 1 of the paper).

The measurements are in `complexity` (over the condition number, in closed form) and in `bounds` (the paper's bounds on random problems).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.experiments.bounds import LAMS, ROUNDING, corollary_1, lemma_3, theorem_2
from applications.meta_learning.experiments.complexity import AGD, GD, table_1, to_accuracy
from applications.meta_learning.report import PALETTE, STYLE

KAPPAS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
ACCURACY = 1e-6
DELTA, EPS = 1e-3, 0.1
MARGIN = 0.1  # what a slope may be off

# what the paper's table states: compute, memory, error (approx-solve, but for iMAML exact-solve), and the powers of kappa in the first two
PAPER = {
    "MAML, GD": ("κ log(D/δ)", "Mem · κ log(D/δ)", "0", 1.0, 1.0),
    "MAML, AGD": ("√κ log(D/δ)", "Mem · √κ log(D/δ)", "0", 0.5, 0.5),
    "truncated back-propagation, GD": ("κ log(D/δ)", "Mem · κ log(1/ε)", "ε", 1.0, 1.0),
    "iMAML, AGD and CG": ("√κ log(D/δ)", "Mem", "δ (exact-solve)", 0.5, 0.0),
}
SOLVES = (
    ("gradient descent, inner problem", GD, "inner", 1.0),
    ("accelerated, inner problem", AGD, "inner", 0.5),
    ("conjugate gradients, linear system", AGD, "linear", 0.5),
)


class E3(Experiment):
    """See the module."""

    name = "e3_complexity"
    title = "E3. Complexity of the meta-gradient"
    paper = "table 1, lemmas 2 and 3, theorem 2, corollary 1. It has no measurements of them."

    def run(self, request: Request) -> Numbers:
        quick, seed, part = request.quick, request.seed, request.part
        kappas, d = (KAPPAS[:3], 500) if quick else (KAPPAS, 5000)
        lams = LAMS[-1:] if quick else LAMS
        sweep = [
            part(f"kappa-{kappa:g}-{method.replace(' ', '-')}", partial(to_accuracy, method, kappa, d, ACCURACY, seed))
            for kappa in kappas
            for method in (GD, AGD)
        ]
        rows = [
            part(f"table-{kappa:g}", partial(table_1, kappa, d, DELTA, EPS, seed))
            for kappa in KAPPAS[: 2 if quick else 4]
        ]
        return {
            "d": d,
            "accuracy": ACCURACY,
            "delta": DELTA,
            "eps": EPS,
            "sweep": sweep,
            "table": rows,
            "lemma 3": part("lemma-3", partial(lemma_3, 1 if quick else 10, lams, seed)),
            "theorem 2": part("theorem-2", partial(theorem_2, 1 if quick else 4, lams, seed)),
            "corollary 1": part("corollary-1", partial(corollary_1, 2 if quick else 4, 3 if quick else 50, seed)),
        }

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context(STYLE):
            figure, grid = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
            _draw_counts(grid[0, 0], result)
            _draw_memory(grid[0, 1], result)
            _draw_bounds(grid[1, 0], result)
            _draw_stationary(grid[1, 1], result["corollary 1"])
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_counts(result), "", *_table_1(result), "", *_bounds(result), "", *_stationary(result["corollary 1"])]


def slope(x: list[float], y: list[float]) -> float:
    """Of the line through log y over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _series(result: Numbers, method: str, key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in result["sweep"] if row["method"] == method]
    return [row["kappa"] for row in rows], [row[key] for row in rows]


def _column(result: Numbers, name: str, key: str) -> list[float]:
    return [row[key] for entry in result["table"] for row in entry["rows"] if row["name"] == name]


def _draw_counts(axes: Axes, result: Numbers) -> None:
    for (label, method, key, _), colour in zip(SOLVES, PALETTE, strict=False):
        kappas, counts = _series(result, method, key)
        axes.loglog(
            kappas, counts, "o-", ms=4, color=colour, label=f"{label.split(',')[0]}: slope {slope(kappas, counts):.2f}"
        )
    kappas, promised = _series(result, AGD, "promised inner")
    axes.loglog(kappas, promised, "--", color=PALETTE[1], label="theorem 2, inner problem")
    axes.set(
        xlabel="condition number κ",
        ylabel="gradients or products",
        title=f"for a meta-gradient to {result['accuracy']:g}",
    )
    axes.legend(fontsize=8)


def _draw_memory(axes: Axes, result: Numbers) -> None:
    kappas = [entry["kappa"] for entry in result["table"]]
    for name, colour in zip(PAPER, PALETTE, strict=True):
        axes.loglog(kappas, _column(result, name, "memory"), "o-", ms=4, color=colour, label=name)
    axes.set(xlabel="condition number κ", ylabel="peak memory, in gradients", title=f"memory, inner solve to {DELTA:g}")
    axes.legend(fontsize=8)


def _draw_bounds(axes: Axes, result: Numbers) -> None:
    points = [p for p in result["lemma 3"]["points"] if p["error"] > ROUNDING]
    for key, label, marker, colour in (
        ("printed", "as printed", "o", PALETTE[1]),
        ("everywhere", "μ at both points", "x", PALETTE[0]),
    ):
        known = [p for p in points if p[key] is not None]
        axes.loglog(
            [p["error"] for p in known], [p[key] for p in known], marker, ms=4, ls="", color=colour, label=label
        )
    ends = [min(p["error"] for p in points), max(p["error"] for p in points)]
    axes.loglog(ends, ends, color="black", lw=1, label="bound = error")
    axes.set(xlabel="relative error of the meta-gradient", ylabel="relative bound", title="lemma 3 on random problems")
    axes.legend(fontsize=8)


def _draw_stationary(axes: Axes, numbers: Numbers) -> None:
    steps = range(1, len(numbers["norms"]) + 1)
    axes.loglog(steps, numbers["norms"], color=PALETTE[0], label="|∇F|")
    axes.loglog(steps, numbers["allowed"], "--", color=PALETTE[1], label="corollary 1")
    axes.set(xlabel="outer steps", ylabel="norm of the gradient of F", title="corollary 1")
    axes.legend(fontsize=8)


def _counts(result: Numbers) -> list[str]:
    rows, within = [], True
    for label, method, key, expected in SOLVES:
        kappas, counts = _series(result, method, key)
        fitted = slope(kappas, counts)
        within = within and abs(fitted - expected) <= MARGIN
        rows.append([label, *(f"{count:,}" for count in counts), f"{fitted:.3f}", f"{expected:g}"])
    worst = max(row["error"] for row in result["sweep"])
    inner, linear = (
        [row[f"promised {key}"] / row[key] for row in result["sweep"] if row["method"] == AGD]
        for key in ("inner", "linear")
    )
    kappas = _series(result, GD, "inner")[0]
    return [
        f"Gradients of G, or Hessian products, for a relative error of {result['accuracy']:g} of the meta-gradient. Diagonal Hessian with "
        f"{result['d']:,} eigenvalues from 1 to κ with equal steps of the logarithm, float64; step 1/κ, momentum of lemma 2; each solve "
        f"stops at the tolerance of theorem 2. The largest true error was {worst:.1e}.",
        "",
        *table(["solve", *(f"κ = {kappa:g}" for kappa in kappas), "slope", "paper"], rows),
        "",
        f"The slopes (log-log, least squares over all κ) are {'all' if within else 'not all'} within {MARGIN:g} of the paper's "
        "powers of κ.",
        "",
        f"Theorem 2 allows {min(inner):.1f} to {max(inner):.1f} times what the accelerated method took, and {min(linear):.1f} to "
        f"{max(linear):.1f} times what CG took (the theorem has Nesterov's method there, too).",
    ]


def _table_1(result: Numbers) -> list[str]:
    kappas = [entry["kappa"] for entry in result["table"]]
    rows = []
    for name, (compute, memory, error, power, growth) in PAPER.items():
        used = [
            g + p for g, p in zip(_column(result, name, "gradients"), _column(result, name, "products"), strict=True)
        ]
        held = _column(result, name, "memory")
        ends = {
            key: _column(result, name, key)[-1]
            for key in ("gradients", "products", "approx-solve error", "exact-solve error")
        }
        rows.append(
            [
                name,
                compute,
                f"{ends['gradients']:,} + {ends['products']:,}",
                f"{slope(kappas, used):.2f} ({power:g})",
                memory,
                f"{held[-1]:.1f}",
                f"{round(slope(kappas, held), 2) + 0.0:.2f} ({growth:g})",
                error,
                f"{ends['approx-solve error']:.1e}",
                f"{ends['exact-solve error']:.1e}",
            ]
        )
    header = [
        "algorithm",
        "compute, paper",
        "here",
        "power of κ (paper)",
        "memory, paper",
        "here",
        "power of κ (paper)",
        "error, paper",
    ]
    return [
        f"Table 1, measured at κ = {kappas[-1]:g}; the powers are fitted over κ = {', '.join(f'{k:g}' for k in kappas)}. Inner solve "
        f"until |φ - φ*| is {result['delta']:g} of |θ - φ*|; truncated back-propagation keeps κ log(1/ε) steps, ε = {result['eps']:g}. "
        "Errors are relative to the size of the exact meta-gradient.",
        "",
        *table([*header, "approx-solve error (def. 4), here", "exact-solve error (def. 3), here"], rows),
        "",
        "Compute: gradients of G forwards + Hessian products (backwards through one step is one; of CG, one per step). The library "
        "runs the steps of truncated back-propagation twice; they are counted once. Memory: the largest sum of the sizes of all tensors "
        "that were made by the call and alive at one time, divided by the same for one gradient of G, which is "
        f"{result['table'][-1]['unit']:.1f} vectors of the size of θ. It is counted by operations, not by the allocator, so it is the same "
        f"in every run. Each step that is kept adds {_per_step(result)} such vectors; a network keeps its activations (E2). What is there "
        "whatever the number of steps lowers the fitted powers of the memory.",
        "",
        *_two_errors(result),
    ]


def _per_step(result: Numbers) -> str:
    """Vectors that one more step of an unrolled method keeps: from one κ to the next, smallest and largest."""
    found: list[float] = []
    for name, (*_, growth) in PAPER.items():
        steps, held = _column(result, name, "products"), _column(result, name, "memory")
        if growth > 0:
            found.extend(np.diff(held) / np.diff(steps) * result["table"][-1]["unit"])
    return f"{min(found):.2f} to {max(found):.2f}"


def _two_errors(result: Numbers) -> list[str]:
    """What definitions 3 and 4 say of each method."""
    approx, exact = (
        {name: max(_column(result, name, f"{kind}-solve error")) for name in PAPER} for kind in ("approx", "exact")
    )
    maml = max(approx["MAML, GD"], approx["MAML, AGD"])
    ratio = {name: exact[name] / result["delta"] for name in PAPER}
    held = _column(result, "iMAML, AGD and CG", "memory")
    return [
        f"Over all κ, the approx-solve error of MAML is at most {maml:.0e}, that of truncated back-propagation "
        f"{approx['truncated back-propagation, GD']:.1e} for an ε of {result['eps']:g}, that of iMAML {approx['iMAML, AGD and CG']:.1e}. "
        "The paper's table gives the exact-solve error for iMAML alone. Here are all, relative and divided by the relative δ: "
        + ", ".join(f"{name} {value:.1f}" for name, value in ratio.items())
        + f". iMAML's memory is between {min(held):.2f} and {max(held):.2f} gradients; theorem 1 has 2.",
    ]


def _bounds(result: Numbers) -> list[str]:
    points, promises = result["lemma 3"]["points"], result["theorem 2"]["points"]
    above = [p for p in points if p["error"] > ROUNDING]
    rows = []
    for lam in sorted({p["lam"] for p in points}):
        own = [p for p in above if p["lam"] == lam]
        printed = [p["printed"] / p["error"] for p in own if p["printed"] is not None]
        sharper = [p["everywhere"] / p["error"] for p in own]
        rows.append([f"{lam:g}", str(len(own)), str(len(printed)), _spread(printed), _spread(sharper)])
    steps, products = ([p["promised"][i] / max(p["taken"][i], 1) for p in promises] for i in (0, 1))
    missed = sum(p["stopped error"] > p["accuracy"] for p in promises)
    return [
        f"Lemma 3, on {len(points)} meta-gradients of random problems with a Hessian that is not constant (losses log cosh): violated by "
        f"{sum(p['violated'] for p in points)}. Bound over true error, smallest / median / largest, as printed (where its condition holds) "
        "and without the factor 2 and the condition, which strong convexity everywhere allows; without the "
        f"{len(points) - len(above)} cases whose relative error is below {ROUNDING:g} (ratios near 1 are "
        "those where the linear solve leaves most of the error: its true error is the δ' of the bound):",
        "",
        *table(["λ", "cases", "condition holds", "as printed", "μ at both points"], rows),
        "",
        f"Theorem 2, on {len(promises)} problems and accuracies: the error after the promised iterations (CG for the linear system) was "
        f"above what was asked for in {sum(p['violated'] for p in promises)}. Solvers that stop at the theorem's tolerances missed it in "
        f"{missed}. The theorem promises {_spread(steps)} times their gradients and {_spread(products)} times their products "
        "(smallest / median / largest).",
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{value:.3g}" for value in (min(values), float(np.median(values)), max(values)))


def _stationary(numbers: Numbers) -> list[str]:
    steps = len(numbers["norms"])
    return [
        f"Corollary 1, {numbers['tasks']} tasks, gradient descent on F with step 1/L_F, L_F = {numbers['L_F']:.3g}: |∇F| went from "
        f"{numbers['norms'][0]:.2e} to {numbers['norms'][-1]:.2e} in {steps} steps. The smallest |∇F| so far was above the corollary's "
        f"bound after {numbers['violations']} of the {steps} steps (the bound with F(0) for F(0) - min F). For the smallest "
        f"|∇F| the corollary promises {numbers['promised calls']:,} calls; it took {numbers['calls']}. It needs meta-gradients within "
        f"ε / √2; the worst here had {numbers['worst inexactness']:.1e} of that error.",
    ]
