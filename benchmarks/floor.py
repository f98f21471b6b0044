"""What does one meta-gradient take at least? Its operations and the bytes of its operators, for works A and B and for those of the GPU.

    python benchmarks/floor.py [--json docs/results/floor.json]

Counted are the operations of products and convolutions, and what every operator that does work reads and writes, one operator after
the other: fused, the bytes would be fewer. The rates of this machine, one thread, are measured: those of a large product and of a large
copy. Those of an H200 are from its data sheet. The works of the GPU are counted here with two tasks and multiplied: all their operators
work on all tasks at once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import torch
from few_shot import LAM, WORKS
from gpu_parts import TARGETS_MS, Setting, Traffic, milliseconds
from meta_gradient import tasks
from torch.utils.flop_counter import FlopCounterMode
from turns import environment

import bilevel
from applications.meta_learning import products
from applications.meta_learning.models import ConvNet, initial_theta
from applications.meta_learning.problem import cross_entropy, few_shot_problem
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

H200 = {"operations_per_ms": 67e9, "bytes_per_ms": 4.8e9}  # float32 without tensor cores, 4.8 TB/s
COUNTED, GPU_TASKS = 2, 32
CPU = torch.device("cpu")
ONEDNN = {
    torch.ops.mkldnn._linear_pointwise: lambda x, *_, out_shape, **__: 2 * math.prod(x) * out_shape[-1],
}


def counts(run: Callable[[], Any]) -> dict[str, float]:
    """Of one call, after one that is not counted."""
    run()
    with FlopCounterMode(display=False, custom_mapping=ONEDNN) as flops, Traffic() as traffic:
        run()
    return {"operations": flops.get_total_flops(), "bytes": traffic.bytes, "operators": traffic.operators}


def meta_gradient(work: str) -> Callable[[], Any]:
    """As benchmarks/peers/few_shot_bilevel.py computes it."""
    sizes, chunk = WORKS[work], {"A": (16, 1), "B": (2, 1)}[work]
    torch.manual_seed(0)
    data, net = tasks(**sizes), ConvNet(sizes["ways"])
    return partial(
        bilevel.hypergradient,
        few_shot_problem(net, cross_entropy, LAM[work]),
        initial_theta(net, torch.float32, CPU),
        data,
        solver=GradientDescent(step_size=0.1, max_steps=16),
        linsys=CG(max_steps=5, rtol=0.0),
        batched=True,
        chunk_size=chunk[0],
        outer_chunk_size=chunk[1],
    )


def rates(size: int) -> dict[str, float]:
    """Of this machine: operations per millisecond of a product, bytes per millisecond of a copy."""
    x = torch.rand(1, size, size)
    long = torch.rand(16 * size * size)
    target = torch.empty_like(long)
    return {
        "operations_per_ms": 2 * size**3 / milliseconds(lambda: products.product(x, x), CPU, 7)["median"],
        "bytes_per_ms": 2 * 4 * long.numel() / milliseconds(lambda: target.copy_(long), CPU, 7)["median"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        WORKS.update(A={"count": 2, "ways": 3, "shots": 1}, B={"count": 2, "ways": 3, "shots": 1})
    here, rows = rates(128 if args.quick else 2048), {}
    for work in WORKS:
        rows[work] = {**counts(meta_gradient(work)), **here}
    products.LEAST = float("inf")  # as on a GPU
    for work, target in TARGETS_MS.items():
        setting = Setting(work, CPU, args.quick, 0)
        config = setting.config(meta_batch=COUNTED)
        step, data = setting.step(config), setting.tasks(config)
        found = counts(partial(step, data))
        many = {key: found[key] * GPU_TASKS / COUNTED for key in ("operations", "bytes")}
        rows[work] = {**found, **many, **H200, "target_ms": target}
    for work, row in rows.items():
        row["compute_ms"] = row["operations"] / row["operations_per_ms"]
        row["memory_ms"] = row["bytes"] / row["bytes_per_ms"]
        print(
            f"{work:5} {row['operations'] / 1e9:8.1f} GFLOP {row['bytes'] / 1e9:7.1f} GB {row['operators']:6} operators: at least "
            f"{row['compute_ms']:.1f} and {row['memory_ms']:.1f} ms"
        )
    if args.json:
        options = {"quick": args.quick, "tasks": GPU_TASKS, "counted": COUNTED}
        args.json.write_text(
            json.dumps({"rows": rows, "options": options, "environment": environment()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
