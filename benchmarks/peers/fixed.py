"""The other end of `benchmarks/turns.py`: one method that always does the same work."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def load(path: str) -> dict[str, np.ndarray]:
    """The arrays of a problem; ``reference`` is the exact hypergradient."""
    with np.load(path) as arrays:
        return dict(arrays)


def peak_mb(reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset, in MB (Linux); 0 where it is not known."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def serve(
    hypergradient: Callable[[], Any],
    reference: np.ndarray,
    *,
    seconds: float = 0.05,
    warm_up: Callable[[], Any] | None = None,
    check: Callable[[], Any] | None = None,
) -> None:
    """Measure the peak memory, check the gradient, and then time one block of calls for every line of the input.

    Args:
        hypergradient: the work.
        reference: what it has to return; of a batch (tasks, d), where the largest error of a task counts.
        seconds: how long a block lasts; at least one call.
        warm_up: a call on something tiny before memory is looked at. None: the memory counts what the first call loads.
        check: what is compared with the reference in the place of the work itself: the same in float64, say.
    """
    if warm_up is not None:
        warm_up()
    before = peak_mb(reset=True)
    grad = hypergradient()
    first = time.perf_counter()
    hypergradient()
    calls = max(1, int(seconds / (time.perf_counter() - first)))
    for _ in range(min(calls, 20) if calls > 1 else 0):
        hypergradient()
    peak = peak_mb() - before
    grad = np.asarray(grad if check is None else check())
    error = float((np.linalg.norm(grad - reference, axis=-1) / np.linalg.norm(reference, axis=-1)).max())
    print(json.dumps({"error": error, "peak_mb": peak, "calls": calls}), flush=True)
    for _ in sys.stdin:
        walls, start = [], time.process_time()
        for _ in range(calls):
            begin = time.perf_counter()
            hypergradient()
            walls.append(time.perf_counter() - begin)
        cpu = (time.process_time() - start) / calls
        print(json.dumps({"seconds": statistics.median(walls), "cpu": cpu}), flush=True)
