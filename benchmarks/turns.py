"""Methods in processes of their own that run in turn, so that whatever else the machine does slows all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from applications.meta_learning import logs

HERE = Path(__file__).parent
PEERS = HERE / "peers"


def environment() -> dict[str, Any]:
    """What measured; in the command, files of the machine without their folders."""
    found = logs.environment(torch.device("cpu"))
    words = found["command"].split()
    return {**found, "command": " ".join(Path(word).name if word.startswith("/") else word for word in words)}


def has_peers(python: str, modules: Iterable[str], extra: str) -> None:
    """End with what to do if this interpreter does not run, or lacks one of these."""
    look = "import sys; from importlib.util import find_spec; print(*[m for m in sys.argv[1:] if find_spec(m) is None])"
    remedy = f"make the environment as benchmarks/peers/README.md says (extra '{extra}') and name its bin/python"
    try:
        done = subprocess.run([python, "-c", look, *modules], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"expected a Python interpreter, {python} does not run ({error}); {remedy}") from None
    if missing := ", ".join(done.stdout.split()):
        raise SystemExit(f"{python} has no {missing}; {remedy}")


class Worker:
    """One method in its process. ``chosen`` is what it said of itself when it was ready."""

    def __init__(self, command: list[str], threads: int) -> None:
        environ = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(HERE.parent),
            "PYTHONWARNINGS": "ignore",
        }
        if threads == 1:  # JAX has threads of its own
            environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        self._process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.chosen = self._read()
        if "failed" in self.chosen:
            raise SystemExit(f"{' '.join(command[:2])}: {self.chosen['failed']}")

    def __call__(self) -> Any:
        """One turn: what the worker measured."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args[:2]))} ended early")
        return json.loads(line)


def rows(commands: dict[str, list[str]], threads: int, repeats: int, limit: float) -> dict[str, dict[str, Any]]:
    """Start every method, let them take turns, and return for each its error, peak memory, and the milliseconds of each turn.

    A method whose gradient has a relative error above ``limit`` is wrong: it is marked, and not timed. One process at a time is
    started, so that each has the machine to itself while its memory is measured.
    """
    workers = {name: Worker(command, threads) for name, command in commands.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        right = worker.chosen["error"] <= limit
        found[name] = {**worker.chosen, "right": right, "turns": []}
        print(f"{name:32s} error {worker.chosen['error']:.1e}" + ("" if right else ": WRONG"), flush=True)
    right = {name: worker for name, worker in workers.items() if found[name]["right"]}
    for _ in range(repeats):
        for name, worker in right.items():
            if threads > 1:
                time.sleep(0.3)  # threads of the one before wait for more work, and take the cores from this one
            found[name]["turns"].append({key: 1e3 * value for key, value in worker().items()})
    for worker in workers.values():
        worker.close()
    return found


def summarise(found: dict[str, dict[str, Any]], peers: list[str], clock: str = "seconds") -> str:
    """Add medians and ratios to the rows: the time of each turn over that of the fastest right method among ``peers`` in the same round.

    Returns the name of that peer. ``clock``: "seconds" (of the wall), or "cpu" for work that is long enough to be interrupted.
    """
    for row in found.values():
        if row["turns"]:
            row["milliseconds"] = statistics.median(turn["seconds"] for turn in row["turns"])
            row["cpu_milliseconds"] = statistics.median(turn["cpu"] for turn in row["turns"])
    key = "milliseconds" if clock == "seconds" else "cpu_milliseconds"
    best = min((name for name in peers if "milliseconds" in found.get(name, {})), key=lambda name: found[name][key])
    for row in found.values():
        pairs = zip(row["turns"], found[best]["turns"], strict=False)
        ratios = [base[clock] / own[clock] for own, base in pairs]
        if ratios:
            row["faster"] = statistics.median(ratios)
            row["faster_quartiles"] = [statistics.quantiles(ratios, n=4)[index] for index in (0, 2)]
    return best


def show(found: dict[str, dict[str, Any]], best: str) -> None:
    """The rows on the terminal."""
    for name, row in found.items():
        if "milliseconds" in row:
            low, high = row["faster_quartiles"]
            print(
                f"{name:32s} {row['milliseconds']:9.3f} ms (CPU {row['cpu_milliseconds']:9.3f}), {row['faster']:7.2f} times as fast as "
                f"{best} ({low:.2f} .. {high:.2f}), +{row['peak_mb']:.0f} MB"
            )
