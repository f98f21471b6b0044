"""How does the cost of a hypergradient grow with the number of variables, and with the number of tasks? Work G.

    python benchmarks/scaling.py [--json docs/results/scaling.json]

Variables, 1e2 to 1e7: a signal of d samples is smoothed with one log-weight for each difference of neighbours (so theta has d - 1
entries), G = |phi - y|^2 / 2 + sum exp(theta_j) (phi_{j+1} - phi_j)^2 / 2, L = |phi - clean|^2 / 2; 40 gradient steps and 15 CG steps, no
matrix anywhere. Tasks, 1 to 1,024: the logistic regressions of work E in `batch.py`, all at once.
Every size has a process of its own. Time: median of the repetitions. Memory: peak above what the process had after a warm-up on a tiny
problem. The gradient is compared with an exact one (a banded solver; a dense Newton method). Slopes are least-squares fits of log time
and log memory. The C library keeps freed memory, as in `imaml`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import numpy as np
import torch
from batch import instance
from peers.fixed import peak_mb
from scipy.linalg import solveh_banded

import bilevel
from applications.meta_learning.allocator import keep_freed_memory
from applications.meta_learning.logs import environment
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

SIZES = {"variables": [10**k for k in range(2, 8)], "tasks": [2**k for k in range(11)]}
QUICK = {"variables": [100, 1000, 10_000], "tasks": [1, 4, 16]}
LIMIT = 1e-6
logistic = torch.nn.functional.softplus


def smoothing(size: int) -> tuple[Callable[[], torch.Tensor], Callable[[], np.ndarray]]:
    """The hypergradient of d variables, and the exact one."""
    g = torch.Generator().manual_seed(size)
    clean = torch.linspace(0, 6 * size**0.25, size, dtype=torch.float64).sin()
    noisy = clean + 0.3 * torch.randn(size, generator=g, dtype=torch.float64)
    theta = torch.rand(size - 1, generator=g, dtype=torch.float64) - 1
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - data[0]).square().sum() + 0.5 * (theta.exp() * phi.diff().square()).sum(),
        lambda phi, theta, data: 0.5 * (phi - data[1]).square().sum(),
        lambda theta, data: data[0].clone(),
    )
    solver, linsys = GradientDescent(step_size=1 / 3, max_steps=40), CG(max_steps=15, rtol=0.0)  # eigenvalues in [1, 5]

    def exact() -> np.ndarray:
        weights, y, bands = theta.exp().numpy(), noisy.numpy(), np.ones((2, size))
        bands[0, 1:] = -weights
        bands[1, :-1] += weights
        bands[1, 1:] += weights
        phi = solveh_banded(bands, y)
        return -weights * np.diff(phi) * np.diff(solveh_banded(bands, phi - clean.numpy()))

    return lambda: bilevel.hypergradient(problem, theta, (noisy, clean), solver=solver, linsys=linsys).unwrap(), exact


def regressions(size: int) -> tuple[Callable[[], torch.Tensor], Callable[[], np.ndarray]]:
    """The hypergradients of many tasks, and the exact ones."""
    arrays = instance("E", size, size)
    data = tuple(torch.from_numpy(arrays[name]) for name in ("X", "y", "X_val", "y_val"))
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: logistic(-data[1] * (data[0] @ phi)).mean(),
        lambda phi, data: logistic(-data[3] * (data[2] @ phi)).mean(),
        float(arrays["lam"]),
    )
    solver = GradientDescent(step_size=float(arrays["step_size"]), max_steps=25)
    options: dict[str, Any] = {
        "solver": solver,
        "linsys": CG(max_steps=10, rtol=0.0),
        "batched": True,
        "reduction": "none",
    }
    theta = torch.from_numpy(arrays["theta"])
    return lambda: bilevel.hypergradient(problem, theta, data, **options).unwrap(), lambda: arrays["reference"]


KINDS = {"variables": smoothing, "tasks": regressions}


def give_back() -> None:
    """To the kernel, what the C library keeps of memory that is free: it would hide what comes next (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def one(kind: str, size: int, seconds: float) -> dict[str, float]:
    """Time, memory and error at one size, in this process."""
    keep_freed_memory()  # else every large tensor is mapped, filled with zeros and unmapped by the kernel, which takes longer than the work
    KINDS[kind](2)[0]()
    hypergradient, exact = KINDS[kind](size)
    give_back()
    before = peak_mb(reset=True)
    grad = hypergradient().numpy()
    memory, walls, cpu = peak_mb() - before, [], []
    reference = exact()
    error = np.linalg.norm(grad - reference) / np.linalg.norm(reference)
    begin = time.perf_counter()
    while not walls or (time.perf_counter() - begin < seconds and len(walls) < 200):
        start = time.perf_counter(), time.process_time()
        hypergradient()
        walls.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {
        "size": size,
        "milliseconds": 1e3 * statistics.median(walls),
        "cpu_milliseconds": 1e3 * statistics.median(cpu),
        "peak_mb": memory,
        "error": float(error),
    }


def slopes(points: list[dict[str, float]]) -> dict[str, float]:
    """Of log time and log memory over log size, for the small half of the sizes and for the large one."""
    half = max(2, len(points) // 2)

    def fit(points: list[dict[str, float]], key: str) -> float:
        size, value = (np.log([max(point[name], 0.1) for point in points]) for name in ("size", key))
        return float(np.polyfit(size, value, 1)[0])

    return {
        "time, small": fit(points[:half], "cpu_milliseconds"),
        "time, large": fit(points[-half:], "cpu_milliseconds"),
        "memory, large": fit(points[-half:], "peak_mb"),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and memory over both sizes."""
    from matplotlib import pyplot as plt

    from applications.meta_learning.report import PALETTE, STYLE

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.8), sharex="col")
        for column, (kind, points) in enumerate(result["points"].items()):
            size = np.array([point["size"] for point in points])
            for row, (key, label) in enumerate(
                (("cpu_milliseconds", "CPU time (ms)"), ("peak_mb", "peak memory (MB)"))
            ):
                values = np.array([max(point[key], 1e-2) for point in points])
                axes[row, column].loglog(size, values, "o-", color=PALETTE[0])
                axes[row, column].loglog(size, values[-1] * size / size[-1], ":", color="grey", label="slope 1")
                axes[row, column].set_ylabel(label)
                axes[row, column].set_ylim(bottom=values.min() / 2)
            axes[0, column].legend(frameon=False)
            axes[1, column].set_xlabel({"variables": "variables d", "tasks": "tasks at once"}[kind])
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--kind", choices=SIZES, help="one of the two alone; the other stays in the file")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help="one size in this process")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, and a figure beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), 0.2 if args.quick else 2.0)))
        return
    points = json.loads(args.json.read_text())["points"] if args.json and args.json.exists() else {}
    for kind in [args.kind] if args.kind else SIZES:
        points[kind] = []
        for size in (QUICK if args.quick else SIZES)[kind]:
            command = [sys.executable, __file__, "--one", kind, str(size), "--threads", str(args.threads)]
            environ = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            answer = subprocess.run(
                command + ["--quick"] * args.quick, env=environ, capture_output=True, text=True, check=True
            )
            point = json.loads(answer.stdout)
            if point["error"] > LIMIT:
                raise SystemExit(
                    f"{kind} {size}: expected a relative error of at most {LIMIT}, got {point['error']:.1e}"
                )
            points[kind].append(point)
            print(f"{kind} {size:9d} {point['cpu_milliseconds']:10.2f} ms, +{point['peak_mb']:.1f} MB", flush=True)
    result = {
        "points": points,
        "slopes": {kind: slopes(found) for kind, found in points.items()},
        "options": {"threads": args.threads, "limit": LIMIT},
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result["slopes"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
