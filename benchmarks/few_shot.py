"""What does one meta-gradient cost, here and with the peers? Works A and B: four convolutions of 64 channels, 16 gradient steps and 5 CG
steps, float32, one thread.

    python benchmarks/few_shot.py [--torch-peers PYTHON] [--work A|B] [--json docs/results/few_shot.json]

Work A: 16 tasks, 5-way 1-shot, 15 queries per class. Work B: 2 tasks, 20-way 5-shot, 15 queries per class.
Before any time counts, every method computes the meta-gradient of two tasks in float64, and its relative error to the loop by hand in this
process is at most 1e-8 (in float32, two orders of summation differ by per cents after 16 steps). higher unrolls, so its gradient is MAML's
and is compared with a loop for that one. Each runs in a process of its own; they take turns. Memory: peak above what the process had after
a warm-up with two images. `meta_gradient.py` measures this library alone, with more of its options.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import numpy as np
import torch
from meta_gradient import tasks
from peers.few_shot_problem import Phi, average, cross_entropy, flat, imaml, maml, network
from torch.func import functional_call
from turns import PEERS, environment, has_peers, rows, show, summarise

WORKS = {"A": {"count": 16, "ways": 5, "shots": 1}, "B": {"count": 2, "ways": 20, "shots": 5}}
# Among the noise of B the network's Hessian + 2 I has negative eigenvalues, where a system has no meaning and this library stops
LAM = {"A": 2.0, "B": 10.0}
OURS = {
    "A": {"bilevel": "16,1", "bilevel, 8 tasks at once": "8,1", "bilevel, 2 tasks at once": "2,1"},
    "B": {"bilevel": "2,1", "bilevel, 1 task at once": "1,1"},
}
PEER_SCRIPTS = {"TorchOpt": "torchopt", "higher (MAML's gradient)": "higher"}
RIGHT_PEERS = ["PyTorch by hand, loop", "TorchOpt"]  # those that compute the same gradient
LIMIT, TARGET = 1e-8, 1.5


def instance(work: str, seed: int) -> dict[str, np.ndarray]:
    """Random images, a random network, and the meta-gradients of the first two tasks in float64."""
    torch.manual_seed(seed)
    data, net = tasks(**WORKS[work]), network(WORKS[work]["ways"])
    lam = LAM[work]
    names = [name for name, _ in net.named_parameters()]
    theta: Phi = tuple(leaf.detach().double() for leaf in net.parameters())
    arrays = {f"{part}_{kind}": tensor.numpy() for part, both in data.items() for kind, tensor in both.items()}

    def loss(phi: Phi, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(net, dict(zip(names, phi, strict=True)), (x,)), y)

    two = [
        (
            data["support"]["x"][i].double(),
            data["support"]["y"][i],
            data["query"]["x"][i].double(),
            data["query"]["y"][i],
        )
        for i in range(2)
    ]
    for name, gradient in {"imaml": partial(imaml, lam=lam), "maml": maml}.items():
        arrays[f"reference_{name}"] = flat(average(map(partial(gradient, loss, theta), two))).numpy()
    return arrays | {f"p{i:02d}": leaf.numpy() for i, leaf in enumerate(theta)} | {"lam": np.array(lam)}


def measure(work: str, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one work."""
    scripts = {name: (sys.executable, ["bilevel", mode]) for name, mode in OURS[work].items()}
    scripts["PyTorch by hand, loop"] = (sys.executable, ["torch"])
    if args.torch_peers:
        has_peers(args.torch_peers, PEER_SCRIPTS.values(), "peers")
        scripts |= {name: (args.torch_peers, [script]) for name, script in PEER_SCRIPTS.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.npz"
        np.savez(path, **instance(work, args.seed))
        commands = {
            name: [python, str(PEERS / f"few_shot_{script[0]}.py"), str(path), str(args.threads), *script[1:]]
            for name, (python, script) in scripts.items()
        }
        found = rows(commands, args.threads, args.repeats, LIMIT)
    best = summarise(found, RIGHT_PEERS, "cpu" if args.threads == 1 else "seconds")
    show(found, best)
    return {
        "rows": found,
        "best": best,
        "repeats": args.repeats,
        "right_peers": RIGHT_PEERS,
        "lam": LAM[work],
        "environment": environment(),
        **WORKS[work],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-peers", help="interpreter of an environment with torchopt and higher")
    parser.add_argument("--work", choices=WORKS, help="one of the two alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two tasks and two repetitions, to see that it works")
    parser.add_argument("--json", type=Path, help="write the numbers to this file; those of the other work stay in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.repeats = 2
        WORKS.update(A=WORKS["A"] | {"count": 2}, B={"count": 2, "ways": 5, "shots": 2})
    works = {work: measure(work, args) for work in ([args.work] if args.work else WORKS)}
    if args.json:
        before = json.loads(args.json.read_text())["works"] if args.json.exists() else {}
        options = {"threads": args.threads, "seed": args.seed, "target": TARGET, "limit": LIMIT}
        result = {"works": before | works, "options": options, "environment": environment()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
