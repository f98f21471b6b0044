"""What does a preconditioner save? Hessian products of CG to 1e-8, on three spectra, with everything that building it takes.

    python benchmarks/preconditioning.py [--size 500 --seeds 5] [--json docs/results/preconditioning.json]

The matrices are random with a given spectrum, so the numbers do not depend on the machine (but for the last digits of rounding). Two
counts for each: products until ``|b - A u| <= 1e-8 |b|``, by the solver's own tolerance and with the product that confirms it; and
products until ``|u - u*| <= 1e-8 |u*|`` with u* known. The median over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch
from torch import Tensor

from applications.meta_learning.logs import environment
from bilevel.linsys import CG, Jacobi, NystromPreconditioner, Operator, Preconditioner

TOLERANCE = 1e-8
LIMIT = 20_000  # steps
SHIFT = 1e-3


def orthogonal(d: int, generator: torch.Generator) -> Tensor:
    """A random basis."""
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def with_spectrum(values: Tensor, generator: torch.Generator) -> Tensor:
    """A random symmetric matrix with these eigenvalues."""
    q = orthogonal(len(values), generator)
    return q @ torch.diag(values) @ q.T


def fast_decay(d: int, generator: torch.Generator) -> Tensor:
    """Eigenvalues 10^(2 - k / 10), k = 0, 1, .., and damping of 0.001: condition number 1e5."""
    return with_spectrum(10 ** (2 - torch.arange(d, dtype=torch.float64) / 10) + SHIFT, generator)


def bad_scaling(d: int, generator: torch.Generator) -> Tensor:
    """S K S with the eigenvalues of K between 1 and 3, and a diagonal S from 0.03 to 30: variables in different units."""
    scale = torch.logspace(-1.5, 1.5, d, dtype=torch.float64)[torch.randperm(d, generator=generator)]
    return scale[:, None] * with_spectrum(torch.linspace(1, 3, d, dtype=torch.float64), generator) * scale


def clusters(d: int, generator: torch.Generator) -> Tensor:
    """Eigenvalues uniform in [1, 2], and clusters of 5 at 10, 100 and 1000."""
    values = 1 + torch.rand(d, generator=generator, dtype=torch.float64)
    values[:15] = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64).repeat_interleave(5)
    return with_spectrum(values, generator)


SPECTRA: dict[str, tuple[Callable[[int, torch.Generator], Tensor], float]] = {
    "fast decay": (fast_decay, SHIFT),
    "badly scaled diagonal": (bad_scaling, 0.0),
    "uniform with clusters": (clusters, 1.0),
}


def preconditioners(a: Tensor, shift: float) -> dict[str, Any]:
    """What CG is given; shift is what one would know of the spectrum: the damping, or lambda."""
    known = 1 / a.diagonal()
    return {
        "none": None,
        "Jacobi(), d products": Jacobi(),
        "Jacobi(num_probes=20)": Jacobi(num_probes=20),
        "the diagonal, known": lambda v: known * v,
        "NystromPreconditioner(rank=20)": NystromPreconditioner(rank=20, shift=shift),
        "NystromPreconditioner(rank=60)": NystromPreconditioner(rank=60, shift=shift),
    }


def products(a: Tensor, b: Tensor, exact: Tensor, preconditioner: Any) -> dict[str, Any]:
    """Both counts, and what each leaves of the other quantity."""

    def matvec(v: Tensor) -> Tensor:
        return v @ a

    def relative_error(u: Tensor) -> float:
        return float((u - exact).norm() / exact.norm())

    solver = CG(max_steps=LIMIT, rtol=TOLERANCE, preconditioner=preconditioner)
    by_residual = solver.solve(matvec, b)
    assert not by_residual.failed
    # the error of CG falls in every step (Hestenes and Stiefel 1952), so bisection finds where it passes the tolerance
    low, high = 0, 2 * int(by_residual.steps)
    fixed = replace(solver, rtol=0.0)
    while high < LIMIT and relative_error(replace(fixed, max_steps=high).solve(matvec, b).value) > TOLERANCE:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        reached = relative_error(replace(fixed, max_steps=middle).solve(matvec, b).value) <= TOLERANCE
        low, high = (low, middle) if reached else (middle, high)
    by_error = replace(fixed, max_steps=high).solve(matvec, b)
    building = preconditioner.build(Operator(matvec), b)[1] if isinstance(preconditioner, Preconditioner) else 0
    return {
        "building": building,
        "to_residual": by_residual.num_matvecs,
        "error_there": relative_error(by_residual.value),
        "to_error": by_error.num_matvecs,
        "converged": int(by_residual.codes) == 0,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=500, help="d")
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, .. below this")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (make, shift) in SPECTRA.items():
        runs: dict[str, list[dict[str, Any]]] = {}
        for seed in range(args.seeds):
            generator = torch.Generator().manual_seed(seed)
            a = make(args.size, generator)
            exact = torch.randn(args.size, generator=generator, dtype=torch.float64)
            for label, preconditioner in preconditioners(a, shift).items():
                runs.setdefault(label, []).append(products(a, a @ exact, exact, preconditioner))
        rows[name] = {}
        print(f"\n{name}: {make.__doc__}")
        print(
            f"{'preconditioner':34} {'to residual 1e-8':>17} {'error there':>12} {'to error 1e-8':>14} {'building':>9}"
        )
        for label, counts in runs.items():
            row = {key: statistics.median([run[key] for run in counts]) for key in counts[0] if key != "converged"}
            row["converged"] = all(run["converged"] for run in counts)
            rows[name][label] = row
            print(
                f"{label:34} {row['to_residual']:17.0f} {row['error_there']:12.1e} {row['to_error']:14.0f} {row['building']:9.0f}"
            )
    if args.json:
        spectra = {name: str(make.__doc__) for name, (make, _) in SPECTRA.items()}
        options = {key: value for key, value in vars(args).items() if key != "json"}
        result = {"rows": rows, "spectra": spectra, "options": options, "environment": environment(torch.device("cpu"))}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
