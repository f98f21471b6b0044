"""How good are the error bound and the error estimate? Random problems whose exact hypergradient is known, five ways to stop.

    python docs/results/certificates.py [--problems 1000 --seed 0]
    python docs/results/certificates.py --page          # figure and page again, from the JSON

Draws the problems from :mod:`bilevel.testing.strategies` and writes certificates.json, certificates.png and certificates.md beside this
file; about three minutes on one core. A problem whose C depends on phi (a penalty as theta) gets the C of the point; the strategies state
the other constants. The exact hypergradients come from dense algebra in 38 digits, not from this library.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

import bilevel
from applications.meta_learning.logs import provenance
from bilevel.linsys import CG, Exact, Neumann
from bilevel.solvers import GradientDescent, NesterovAGD, NewtonCG
from bilevel.testing.strategies import (
    Case,
    logistic_problems,
    nonquadratic_problems,
    proximal_problems,
    quadratic_problems,
    ridge_problems,
)
from bilevel.trees import flatten, layout_of

HERE = Path(__file__).parent
WINDOW = (1e-9, 1.0)  # of the true relative error: below is rounding, above is no gradient
FACTOR = 10.0
FAMILIES = {
    "quadratic": quadratic_problems,
    "non-quadratic": nonquadratic_problems,
    "ridge": ridge_problems,
    "logistic": logistic_problems,
    "proximal": proximal_problems,
}
DIMS = [(2, 10), (2, 10), (10, 30), (10, 30), (30, 100)]
KAPPAS = [(2.0, 1e2), (1e2, 1e4), (1e4, 1e6)]


def cases(count: int, seed: int, dims: list[tuple[int, int]] = DIMS) -> list[Case]:
    """``count`` different problems: each family, small and large, well and badly conditioned."""
    alternatives = [
        family(min_dim=low, max_dim=high, min_kappa=mild, max_kappa=severe)
        for family in FAMILIES.values()
        for low, high in dims
        for mild, severe in KAPPAS
    ]
    found: dict[str, Case] = {}

    @hypothesis_seed(seed)
    @settings(
        max_examples=4 * count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(alternatives).flatmap(lambda chosen: chosen))
    def collect(case: Case) -> None:
        if len(found) < count and "seed=0" not in case.name:  # the simplest problems, which Hypothesis is fond of
            found[case.name] = case

    collect()
    assert len(found) == count
    return list(found.values())


@dataclass(frozen=True)
class Rule:
    """A way to stop: from a problem, the gradient norm at its start and random numbers to two solvers."""

    name: str
    solvers: Callable[[Case, float, np.random.Generator], tuple[Any, Any]]


def _power(rng: np.random.Generator, low: float, high: float) -> float:
    return float(10 ** rng.uniform(low, high))


RULES = [
    Rule(
        "gradient descent and CG, fixed steps",
        lambda case, slope, rng: (
            GradientDescent(step_size=1 / case.beta, max_steps=int(_power(rng, 0.3, 2.7))),
            CG(max_steps=int(rng.integers(1, 60)), rtol=0.0),
        ),
    ),
    Rule(
        "Nesterov to tol, CG to rtol",
        lambda case, slope, rng: (
            NesterovAGD(step_size=1 / case.beta, max_steps=1000, tol=slope * _power(rng, -8, -1)),
            CG(max_steps=1000, rtol=_power(rng, -8, -1)),
        ),
    ),
    Rule(
        "Newton-CG to tol, CG to rtol",
        lambda case, slope, rng: (
            NewtonCG(max_steps=30, cg_steps=200, tol=slope * _power(rng, -10, -2), cg_rtol=1e-2),
            CG(max_steps=1000, rtol=_power(rng, -8, -1)),
        ),
    ),
    Rule(
        "truncated Newton-CG, exact linear solve",
        lambda case, slope, rng: (
            NewtonCG(max_steps=int(rng.integers(1, 5)), cg_steps=int(rng.integers(2, 20))),
            Exact(),
        ),
    ),
    Rule(
        "Newton-CG to tol, Neumann series",
        lambda case, slope, rng: (
            NewtonCG(max_steps=30, cg_steps=200, tol=slope * _power(rng, -10, -2), cg_rtol=1e-2),
            Neumann(num_terms=int(_power(rng, 0, 2.5))),
        ),
    ),
]


def vector(tree: Any) -> torch.Tensor:
    """The leaves of a tree in one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def derivatives(case: Case, phi: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """H ``(d, d)`` and C ``(d, p)`` at phi, by ``torch.func``."""
    phi_layout, phi_leaves = layout_of(phi)
    theta_layout, theta_leaves = layout_of(case.theta)

    def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return case.problem.inner_objective(phi_layout.unravel(x), theta_layout.unravel(y), case.data)

    slope = torch.func.grad(inner)
    x, y = phi_layout.ravel(phi_leaves), theta_layout.ravel(theta_leaves)
    h, c = torch.func.jacrev(slope, argnums=(0, 1))(x, y)
    return h.numpy(), c.numpy()


def measure_one(case: Case, rule: Rule, rng: np.random.Generator) -> dict[str, Any]:
    """True error, estimate and bounds of one hypergradient, relative to the exact one."""
    problem = case.problem
    start = layout_of(problem.initial_phi(case.theta, case.data))
    x = start[0].ravel(start[1]).requires_grad_()
    value = problem.inner_objective(start[0].unravel(x), case.theta, case.data)
    slope = float(torch.autograd.grad(value, x)[0].norm())
    solver, linsys = rule.solvers(case, slope, rng)
    result = bilevel.hypergradient(problem, case.theta, case.data, solver=solver, linsys=linsys)
    if not result.ok:
        return {"failed": result.describe()}
    exact = vector(case.grad)
    size = float(exact.norm())
    h, c = derivatives(case, result.phi)
    known = case.constants
    if known.C is None:
        known = replace(known, C=float(np.linalg.norm(c, 2)) * (1 + 1e-9))
    here = float(np.linalg.eigvalsh(h)[0])
    bounds = {}
    for name, constants in {
        "bound": known,
        "local bound": replace(known, mu=max(here - 1e-12 * float(np.abs(h).max()), float(known.mu)), everywhere=False),
    }.items():
        problem.constants = constants
        again = replace(
            result, certificate=replace(result.certificate)
        )  # asked for the first time, with these constants
        assert again.error_bound is not None
        bounds[name] = float(again.error_bound) / size
    problem.constants = case.constants
    return {
        "error": float((vector(result.grad) - exact).norm()) / size,
        "estimate": float(result.error_estimate) / size,
        "products": result.diagnose().num_matvecs,
        **bounds,
    }


def measure(problems: list[Case], seed: int, *, in_turn: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Every rule on every problem; or on each problem one of them, in turn."""
    rows: dict[str, list[dict[str, Any]]] = {rule.name: [] for rule in RULES}
    for i, case in enumerate(problems):
        for j, rule in enumerate(RULES):
            if in_turn and i % len(RULES) != j:
                continue
            row = measure_one(case, rule, np.random.default_rng([seed, i, j]))
            rows[rule.name].append({"problem": case.name} | row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one rule. An estimate misses its window if it is 0 or infinite, too."""
    done = [row for row in rows if "failed" not in row]
    window = [row for row in done if WINDOW[0] <= row["error"] <= WINDOW[1]]
    good = [row for row in window if row["error"] / FACTOR <= row["estimate"] <= FACTOR * row["error"]]
    finite = [row for row in done if math.isfinite(row["local bound"])]
    return {
        "problems": len(rows),
        "failed": len(rows) - len(done),
        "in the window": len(window),
        "within the factor": len(good),
        "too small": sum(row["estimate"] < row["error"] / FACTOR for row in window),
        "too large": sum(row["estimate"] > FACTOR * row["error"] for row in window),
        "products, mean": float(np.mean([row["products"] for row in done])),
        "bounds violated": sum(row["bound"] < row["error"] for row in done),
        "bound / error, median": float(np.median([row["bound"] / row["error"] for row in window])),
        "local bounds, finite": len(finite),
        "local bounds violated": sum(row["local bound"] < row["error"] for row in done),
        "local bound / error, median": float(
            np.median([row["local bound"] / row["error"] for row in finite if row["error"] >= WINDOW[0]])
        ),
    }


def logarithm(x: float) -> float | None:
    """log10 with two decimals; None for 0 and infinity."""
    return round(math.log10(x), 2) if 0 < x < math.inf else None


def figure(result: dict[str, Any], path: Path) -> None:
    """Estimate and bound over the true error, a row for each rule; all of it from the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rules = result["rules"]
    low, high = -17.0, 4.0
    fig, axes = plt.subplots(
        len(rules), 2, figsize=(7.2, 2.9 * len(rules)), sharex=True, sharey=True, layout="constrained"
    )
    for (name, rule), (left, right) in zip(rules.items(), axes, strict=True):
        for axis in (left, right):
            axis.plot([low, high], [low, high], color="0.35", lw=1)
            axis.set(xlim=(low, 1.5), ylim=(low, high), xticks=range(-16, 1, 4), yticks=range(-16, 5, 4))
            axis.xaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$")
            axis.yaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$")
            axis.spines[["top", "right"]].set_visible(False)
        left.fill_between([low, high], [low - 1, high - 1], [low + 1, high + 1], color="#228833", alpha=0.2, lw=0)
        left.axvspan(-9, 0, color="0.5", alpha=0.08, lw=0)
        right.fill_between([low, high], [low, high], low, color="#cc3311", alpha=0.12, lw=0)
        for axis, column, colour in ((left, "estimate", "#4477aa"), (right, "bound", "#aa3377")):
            points = [(x, min(y, high)) for x, y in zip(rule["error"], rule[column], strict=True) if None not in (x, y)]
            axis.scatter(*zip(*points, strict=True), s=5, alpha=0.45, color=colour, lw=0, clip_on=False)
        found = rule["summary"]
        share = 100 * found["within the factor"] / found["in the window"]
        note = {"fontsize": 10, "va": "top", "ha": "left"}
        left.text(-16.5, 3.6, f"{share:.1f} % of {found['in the window']}\nwithin a factor 10", **note)
        right.text(
            -16.5,
            3.6,
            f"{found['bounds violated']} violated\nmedian {found['bound / error, median']:.0e} times the error",
            **note,
        )
        left.set_ylabel("estimate")
        right.set_ylabel("bound")
        left.set_title(name[0].upper() + name[1:], loc="left", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("true relative error")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    rules, environment = result["rules"], result["environment"]
    found = [rule["summary"] for rule in rules.values()]
    violated = sum(each["bounds violated"] + each["local bounds violated"] for each in found)
    bounds = sum(2 * (each["problems"] - each["failed"]) for each in found)
    worst = min(100 * each["within the factor"] / each["in the window"] for each in found)
    lines = [
        "# How good are the bound and the estimate?",
        "",
        f"{result['problems']} random problems with known answers, each solved and stopped in {len(rules)} ways: {violated} of {bounds} "
        f"rigorous bounds violated, and the estimate within a factor {FACTOR:.0f} of the true error in at least "
        f"{math.floor(10 * worst) / 10:.1f} % of the cases of each stopping rule, where the true relative error lies between "
        f"{WINDOW[0]:.0e} and {WINDOW[1]:.0f}.",
        "",
        "![Estimate and bound over the true error](certificates.png)",
        "",
        "Left: the estimate; the green band is a factor 10 either way, the grey columns are the window that the shares are about. "
        "Right: the bound; in the red area it would be violated, and what is above the figure lies on its upper edge. All are relative "
        "to the exact hypergradient.",
        "",
        "| stopping rule | in the window | estimate within a factor 10 | too small | too large | products for it, mean |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in zip(rules, found, strict=True):
        share = 100 * each["within the factor"] / each["in the window"]
        lines.append(
            f"| {name} | {each['in the window']} of {each['problems']} | {share:.1f} % | {each['too small']} | {each['too large']} | "
            f"{each['products, mean']:.0f} |"
        )
    lines += [
        "",
        "| stopping rule | bounds violated | bound / error, median | with mu at phi only: finite | violated | bound / error, median |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in zip(rules, found, strict=True):
        lines.append(
            f"| {name} | {each['bounds violated']} | {each['bound / error, median']:.1e} | "
            f"{each['local bounds, finite']} of {each['problems'] - each['failed']} | {each['local bounds violated']} | "
            f"{each['local bound / error, median']:.1e} |"
        )
    lines += [
        "",
        f"Problems: {result['families']}, from `bilevel.testing.strategies`; phi of {result['dims'][0]} to {result['dims'][1]} numbers, "
        f"condition numbers of {KAPPAS[0][0]:.0f} to {KAPPAS[-1][1]:.0e}, float64. The exact answers come from derivatives written by hand "
        "and dense algebra in 38 digits.",
        "",
        f"Command: `{environment['command']}`, seed {result['seed']}. {provenance(environment)}. "
        f"Not measured on a GPU yet.",
        "",
    ]
    note = HERE / "certificates.note.txt"
    return "\n".join(lines) + ("\n" + note.read_text() if note.exists() else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true", help="from the JSON that is there")
    args = parser.parse_args()
    path = HERE / "certificates.json"
    if not args.page:
        from applications.meta_learning.logs import environment

        torch.set_num_threads(1)
        problems = cases(args.problems, args.seed)
        measured = measure(problems, args.seed)
        for name, rows in measured.items():
            for row in rows:
                if row.get("bound", math.inf) < row.get("error", 0):
                    print(f"violated: {name}: {row}", file=sys.stderr)
        result = {
            "problems": args.problems,
            "dims": [DIMS[0][0], DIMS[-1][1]],
            "seed": args.seed,
            "families": ", ".join(FAMILIES),
            "environment": environment(torch.device("cpu")),
            "rules": {
                name: {"summary": summary(rows)}
                | {
                    column: [logarithm(row[column]) for row in rows if "failed" not in row]
                    for column in ("error", "estimate", "bound")
                }
                for name, rows in measured.items()
            },
        }
        path.write_text(
            json.dumps(result).replace('"summary"', '\n"summary"').replace('"error": [', '\n"error": [') + "\n"
        )
    result = json.loads(path.read_text())
    figure(result, HERE / "certificates.png")
    (HERE / "certificates.md").write_text(page(result))


if __name__ == "__main__":
    main()
