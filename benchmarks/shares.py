"""What is the time of works A, B, C and D spent on, here and in the same work by hand?

    python benchmarks/shares.py [--json docs/results/shares.json]

The scripts of `benchmarks/peers/`, each in a process of its own, under the profiler of PyTorch: the time within each kind of operator,
and between operators (Python, autograd's bookkeeping, waiting). The profiler itself costs about a microsecond for each operator, which is
in both; so the time of a call is measured without it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import few_shot
import logistic
import numpy as np
import quadratic
import torch
from turns import PEERS, environment

Instance = Callable[[], dict[str, np.ndarray]]
WORKS: dict[str, tuple[Instance, int, dict[str, list[str]]]] = {  # the problem, threads, scripts and their modes
    "A": (
        lambda: few_shot.instance("A", 0),
        1,
        {"bilevel": ["few_shot_bilevel", "16,1"], "by hand": ["few_shot_torch"]},
    ),
    "B": (
        lambda: few_shot.instance("B", 0),
        1,
        {"bilevel": ["few_shot_bilevel", "2,1"], "by hand": ["few_shot_torch"]},
    ),
    "C": (
        lambda: quadratic.instance(0),
        1,
        {"bilevel": ["quadratic_bilevel", "quadratic-compile"], "by hand": ["quadratic_torch"]},
    ),
    "D": (lambda: logistic.instance(0), 2, {"bilevel": ["logistic_bilevel", "compile"], "by hand": ["logistic_torch"]}),
}
TOLERANCES = 3e-7, 1e-6  # of work D: they reach an error of 1e-6 there

KINDS = {
    "products and convolutions": ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "conv", "linear_pointwise"),
    "copies and layout": ("copy", "to_copy", "clone", "cat", "stack", "fill", "zero", "im2col", "col2im", "contiguous"),
}
REST = "elementwise, reductions, the rest"


def kind(operator: str) -> str:
    """The kind of an operator such as ``aten::addmm``."""
    name = operator.split("::")[-1].strip("_")
    for found, words in KINDS.items():
        if any(name.startswith(word) or (word == "conv" and "conv" in name) for word in words):
            return found
    return REST


def spent(work: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """The median time of a call in milliseconds, the number of operators in it, and the shares of the time under the profiler."""
    work()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    calls = min(len(times), 50)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        whole = 1e6 * (time.perf_counter() - start)
    shares, operators = dict.fromkeys((*KINDS, REST), 0.0), 0
    for row in profile.key_averages():
        if row.key.startswith(("aten::", "mkldnn::")):
            operators += row.count
            shares[kind(row.key)] += row.self_cpu_time_total / whole
    shares["between operators"] = 1 - sum(shares.values())
    return {"milliseconds": statistics.median(times), "operators": operators // calls, "shares": shares}


def one(script: str, seconds: float) -> dict[str, Any]:
    """The work that a script hands over to be timed."""
    sys.path.insert(0, str(PEERS))
    fixed, worker = map(importlib.import_module, ("fixed", "worker"))
    works: list[Callable[[], Any]] = []
    fixed.serve = lambda work, *_, **__: works.append(work)  # type: ignore[attr-defined]
    worker.serve = lambda work, _: works.append(lambda: work(*TOLERANCES))  # type: ignore[attr-defined]
    runpy.run_path(str(PEERS / f"{script}.py"))
    return spent(works[0], seconds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", default="ABCD", help="some of A, B, C, D")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each time")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for work in args.works:
            instance, threads, scripts = WORKS[work]
            np.savez(Path(folder) / "problem.npz", **instance())
            for name, (script, *mode) in scripts.items():
                code = f"import json, shares; print(json.dumps(shares.one({script!r}, {args.seconds})))"
                command = [sys.executable, "-c", code, str(Path(folder) / "problem.npz"), str(threads), *mode]
                environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PEERS.parent), str(PEERS.parents[1])])}
                done = subprocess.run(command, capture_output=True, text=True, env=environ)
                if done.returncode:
                    raise SystemExit(f"{script}: {done.stderr}")
                row = json.loads(done.stdout.splitlines()[-1])
                rows.setdefault(work, {})[name] = {**row, "threads": threads}
                print(f"{work}, {name:8} {row['milliseconds']:8.2f} ms, {row['operators']:6} operators: ", end="")
                print(", ".join(f"{what} {100 * share:.0f} %" for what, share in row["shares"].items()), flush=True)
    if args.json:
        result = {"rows": rows, "options": {"seconds": args.seconds}, "environment": environment()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
