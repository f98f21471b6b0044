"""The other end of `benchmarks/logistic.py`: loads a problem, finds its tolerances, and times some calls for every line that it reads."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOLERANCES = (1e-5, 1e-6, 3e-7, 1e-7, 1e-8, 1e-9)
BLOCK = (
    0.15  # seconds of calls in a turn, as in an outer loop: the first ones find the caches cold and the threads asleep
)
LIMIT = 1e-6  # relative error of the hypergradient


def problem(path: str) -> list[np.ndarray]:
    """X, y, validation X and y, theta, and the exact hypergradient."""
    with np.load(path) as arrays:
        return [arrays[name] for name in ("X", "y", "X_val", "y_val", "theta", "reference")]


def serve(hypergradient: Callable[[float, float], Any], error: Callable[[Any], float]) -> None:
    """Choose the fastest pair of tolerances whose error is at most `LIMIT`, say so, and then time some calls for each line of the input."""
    found, closest = [], float("inf")
    for tol, rtol in itertools.product(TOLERANCES, TOLERANCES):
        reached = error(hypergradient(tol, rtol))
        closest = min(closest, reached)
        if reached <= LIMIT:
            found.append((min(once(hypergradient, tol, rtol) for _ in range(3)), tol, rtol, reached))
    if not found:
        print(
            json.dumps({"failed": f"no tolerances give an error of {LIMIT}; the smallest is {closest:.1e}"}), flush=True
        )
        return
    _, tol, rtol, reached = min(found)
    print(json.dumps({"tol": tol, "rtol": rtol, "error": reached}), flush=True)
    for _ in sys.stdin:
        seconds: list[float] = []
        while sum(seconds) < BLOCK:
            seconds.append(once(hypergradient, tol, rtol))
        print(json.dumps(statistics.median(seconds)), flush=True)


def once(hypergradient: Callable[[float, float], Any], tol: float, rtol: float) -> float:
    """Seconds."""
    start = time.perf_counter()
    hypergradient(tol, rtol)
    return time.perf_counter() - start
