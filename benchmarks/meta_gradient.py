"""What does one meta-gradient cost? Work A: 16 tasks 5-way 1-shot, 15 queries per class, 16 GD + 5 CG steps, float32, one thread.

    python benchmarks/meta_gradient.py [--ways 5 --shots 1 --tasks 16 --chunk-size 16 --outer-chunk-size 2 --repeats 7] [--json FILE]

Time: median over the repetitions after one warm-up. Memory: peak resident size of this process above what it had after a warm-up on a
single task, sampled every millisecond; so it counts activations and graphs, and not the libraries. One method for each process, because
what a process has freed it keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch

import bilevel
from applications.meta_learning.allocator import keep_freed_memory
from applications.meta_learning.logs import environment
from applications.meta_learning.models import ConvNet
from applications.meta_learning.problem import cross_entropy, few_shot_problem
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, Identity
from bilevel.solvers import GradientDescent

QUERIES = 15
METHODS = {
    "iMAML": (CG(max_steps=5, rtol=0.0), Hessian()),
    "iMAML, Gauss-Newton": (CG(max_steps=5, rtol=0.0), GaussNewton()),
    "first-order MAML": (Identity(), Hessian()),
}


class PeakMemory:
    """Peak resident memory of this process while the block runs, in MB."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._running = self.now(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)

    @staticmethod
    def now() -> float:
        """Resident memory in MB (Linux)."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def tasks(count: int, ways: int, shots: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random images with the labels of a few-shot task."""

    def part(per_class: int) -> dict[str, torch.Tensor]:
        labels = torch.arange(ways).repeat_interleave(per_class).expand(count, -1).clone()
        return {"x": torch.rand(count, ways * per_class, 1, 28, 28), "y": labels}

    return {"support": part(shots), "query": part(QUERIES)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "ways": 5,
        "shots": 1,
        "tasks": 16,
        "chunk-size": 16,
        "outer-chunk-size": 2,
        "repeats": 7,
        "threads": 1,
        "inner-steps": 16,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=METHODS, default="iMAML")
    parser.add_argument("--json", type=Path, help="add the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    net = ConvNet(args.ways)
    problem = few_shot_problem(net, cross_entropy, 2.0)
    theta = {name: p.detach() for name, p in net.named_parameters()}
    data = tasks(args.tasks, args.ways, args.shots)

    def meta_gradient(data: Any, linsys: Any, curvature: Any) -> None:
        got = bilevel.hypergradient(
            problem,
            theta,
            data,
            solver=GradientDescent(step_size=0.1, max_steps=args.inner_steps),
            linsys=linsys,
            curvature=curvature,
            batched=True,
            chunk_size=args.chunk_size,
            outer_chunk_size=args.outer_chunk_size,
        )
        assert got.ok.all()

    linsys, curvature = METHODS[args.method]
    meta_gradient(tasks(1, args.ways, args.shots), linsys, curvature)
    before, seconds = PeakMemory.now(), []
    with PeakMemory() as memory:
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            meta_gradient(data, linsys, curvature)
            seconds.append(time.perf_counter() - start)
    row = {
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "slowest": max(seconds[1:]),
        "peak_mb": memory.peak - before,
        "options": {key: value for key, value in vars(args).items() if key != "json"},
        "environment": environment(torch.device("cpu")),
    }
    print(
        f"{args.method}: {row['seconds']:.3f} s ({row['fastest']:.3f} .. {row['slowest']:.3f}), +{row['peak_mb']:.0f} MB"
    )
    if args.json:
        rows = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(rows | {args.method: row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
