"""What do warm starts and tolerances from an accuracy save? One L2 penalty for each feature of a logistic regression, tuned by gradient.

    python benchmarks/warm_start.py [--write]
    python benchmarks/warm_start.py --page     # the page again, from the JSON

The same outer loop (Adam on the logarithms of the penalties, loss on validation data) in several ways, each until the validation loss that
the most careful of them has after its last step. Counted are gradients of the training objective and products with its Hessian, including
those that the error estimates cost. ``--write`` puts the numbers into docs/results/warm_start.json and makes the page from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import bilevel
from applications.meta_learning.logs import provenance
from bilevel.linsys import CG
from bilevel.solvers import NesterovAGD, NewtonCG

RESULT = Path(__file__).parents[1] / "docs" / "results" / "warm_start.json"
FEATURES, INFORMATIVE, EXAMPLES = 100, 20, 400
TIGHT = 1e-8
ACCURACY = 1e-2
AGAIN = 10  # outer steps between two looks at the tolerances
INNER = {
    "Newton-CG": NewtonCG(max_steps=50, cg_steps=100, cg_rtol=0.1),
    "Nesterov": NesterovAGD(step_size=None, max_steps=5000, check_every=1),
}


def data_set(seed: int) -> tuple[Tensor, Tensor]:
    """Training and validation data ``(EXAMPLES, FEATURES)``, each row times its label; few features carry information."""
    generator = torch.Generator().manual_seed(seed)

    def part(weights: Tensor) -> Tensor:
        x = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
        noise = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
        return x * (x @ weights + noise).sign().unsqueeze(1)

    weights = torch.randn(FEATURES, generator=generator, dtype=torch.float64) * (torch.arange(FEATURES) < INFORMATIVE)
    return part(weights), part(weights)


PROBLEM = bilevel.BilevelProblem.from_functions(
    lambda phi, theta, data: -logsigmoid(data[0] @ phi).mean() + 0.5 * (theta.exp() * phi.square()).sum(),
    lambda phi, theta, data: -logsigmoid(data[1] @ phi).mean(),
    lambda theta, data: torch.zeros_like(theta),
)


@dataclass(frozen=True)
class Way:
    """How one outer step asks for its gradient: theta, data, the step before, its number -> the result."""

    name: str
    ask: Callable[..., bilevel.Hypergradient]


def ways(solver: Any) -> list[Way]:
    """From the most careful to the most thrifty."""
    inner, linear = replace(solver, tol=TIGHT), CG(max_steps=500, rtol=TIGHT)

    def cold(theta: Tensor, data: Any, before: Any, step: int) -> bilevel.Hypergradient:
        return bilevel.hypergradient(PROBLEM, theta, data, solver=inner, linsys=linear)

    def init(theta: Tensor, data: Any, before: Any, step: int) -> bilevel.Hypergradient:
        start = None if before is None else before.phi
        return bilevel.hypergradient(PROBLEM, theta, data, solver=inner, linsys=linear, init=start)

    def warm(theta: Tensor, data: Any, before: Any, step: int) -> bilevel.Hypergradient:
        return bilevel.hypergradient(PROBLEM, theta, data, solver=inner, linsys=linear, warm_start=before)

    def accurate(theta: Tensor, data: Any, before: Any, step: int) -> bilevel.Hypergradient:
        return bilevel.hypergradient(
            PROBLEM, theta, data, solver=inner, linsys=linear, warm_start=before, accuracy=ACCURACY
        )

    chosen: list[bilevel.Tolerances] = []

    def now_and_then(theta: Tensor, data: Any, before: Any, step: int) -> bilevel.Hypergradient:
        if step % AGAIN == 0:
            result = accurate(theta, data, before, step)
            chosen[:] = [bilevel.tolerances(result, ACCURACY)]
            return result
        (tol, rtol) = chosen[0]
        return bilevel.hypergradient(
            PROBLEM,
            theta,
            data,
            solver=inner if tol is None else replace(inner, tol=tol),
            linsys=linear if rtol is None else replace(linear, rtol=rtol),
            warm_start=before,
        )

    return [
        Way(f"cold starts, both tolerances {TIGHT:g}", cold),
        Way("the same, init= from the step before", init),
        Way("the same, warm_start= from the step before", warm),
        Way(f"warm_start= and accuracy={ACCURACY:g} in every step", accurate),
        Way(f"warm_start=, tolerances for {ACCURACY:g} anew every {AGAIN} steps", now_and_then),
    ]


def run(way: Way, steps: int, rate: float, seed: int, target: float | None) -> dict[str, Any]:
    """The outer loop, to the target or for so many steps; counts and the last validation loss."""
    data = data_set(seed)
    theta = torch.full((FEATURES,), -3.0, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([theta], lr=rate)
    before, grads, products, worst = None, 0, 0, 0.0
    for step in range(3 * steps):
        before = way.ask(theta, data, before, step)
        theta.grad = before.unwrap()
        grads += before.inner.num_grads + before.linear.num_grads
        products += before.inner.num_matvecs + before.linear.num_matvecs
        exact = bilevel.implicit_gradient(
            PROBLEM, solved(theta, data), theta, data, linsys=CG(max_steps=500, rtol=1e-12)
        )  # not counted
        worst = max(worst, float((before.grad - exact.grad).norm() / exact.grad.norm()))
        loss = float(exact.outer)
        if (target is None and step + 1 == steps) or (target is not None and loss <= target):
            break
        outer.step()
    else:
        raise RuntimeError(f"{way.name}: {loss} did not come down to {target} in {3 * steps} steps.")
    return {"steps": step + 1, "gradients": grads, "products": products, "loss": loss, "largest relative error": worst}


def solved(theta: Tensor, data: Any) -> Tensor:
    """The exact solution, to measure by."""
    return bilevel.solve(PROBLEM, theta, data, solver=NewtonCG(max_steps=50, cg_steps=200, tol=1e-12)).unwrap()


def measure(steps: int, rate: float, seed: int) -> dict[str, dict[str, Any]]:
    """Every way with every inner solver."""
    rows: dict[str, dict[str, Any]] = {}
    for inner, solver in INNER.items():
        target = None
        rows[inner] = {}
        for way in ways(solver):
            rows[inner][way.name] = run(way, steps, rate, seed, target)
            target = rows[inner][way.name]["loss"] if target is None else target
    return rows


def table(result: dict[str, Any]) -> list[str]:
    """In Markdown."""
    lines = []
    for inner, rows in result["rows"].items():
        first = next(iter(rows.values()))
        lines += [
            "",
            f"Inner solver: {inner}",
            "",
            "| | outer steps | gradients | Hessian products | both, in % of the first row | largest error of a gradient |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            share = [f"{100 * row[key] / first[key]:.0f} %" for key in ("gradients", "products")]
            lines.append(
                f"| {name} | {row['steps']} | {row['gradients']} | {row['products']} | {share[0]} and {share[1]} | "
                f"{row['largest relative error']:.0e} |"
            )
    return lines


def page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    environment = result["environment"]
    lines = [
        "# Warm starts and tolerances",
        "",
        f"Logistic regression with one L2 penalty for each of {result['features']} features, {result['examples']} examples, the penalties "
        f"tuned by Adam on the validation loss. Each way runs to the validation loss of the first after {result['steps']} outer steps. "
        "Counted are all gradients of the training objective and all products with its Hessian, those of the error estimates included.",
        "",
        "<!-- table -->",
        *table(result),
        "",
        "<!-- end of table -->",
        "",
        f"Command: `{environment['command']}`, seed {result['seed']}, float64. {provenance(environment)}. "
        f"Counts, not times: they do not depend on the machine.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into docs/results")
    parser.add_argument("--page", action="store_true", help="from the JSON that is there")
    args = parser.parse_args()
    if args.page:
        result = json.loads(RESULT.read_text())
    else:
        from applications.meta_learning.logs import environment

        result = {
            "features": FEATURES,
            "examples": EXAMPLES,
            "steps": args.steps,
            "rate": args.rate,
            "seed": args.seed,
            "rows": measure(args.steps, args.rate, args.seed),
            "environment": environment(torch.device("cpu")),
        }
        print("\n".join(table(result)))
    if args.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if args.write or args.page:
        RESULT.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
