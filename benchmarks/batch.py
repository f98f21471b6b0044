"""What do 1,000 small problems cost at once, and one by one? Proximal logistic regressions, 20 features, 40 examples, float64.

    python benchmarks/batch.py [--torch-peers PYTHON] [--jaxopt PYTHON] [--work E|F] [--json docs/results/batch.json]

Work E: all tasks are well conditioned. Everyone takes 25 gradient steps of fixed size and 10 CG steps.
Work F: condition numbers over three decades. Everyone solves each task to a tolerance, by the method that suits it best.
The gradient of every task is compared with that of a dense Newton method in this script; the largest relative error of a task counts, and
a method above 1e-6 is wrong and takes no part. Each runs in a process of its own; they take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import extras  # noqa: F401 - says what to install
import numpy as np
import torch
from turns import PEERS, environment, has_peers, rows, show, summarise

FEATURES, EXAMPLES = 20, 40
LAM = {"E": 0.5, "F": 0.2}
LIMIT, TARGET = 1e-6, 50.0
OURS = {
    "E": {"bilevel": "fixed", "bilevel, compile=True": "fixed-compile"},
    "F": {
        "bilevel": "masked",
        "bilevel, compile=True": "masked-compile",
        "bilevel, fixed steps": "unmasked",
    },
}
TORCH_PEERS = {"E": {"TorchOpt, loop": "torchopt"}, "F": {"TorchOpt, loop": "torchopt"}}
BY_HAND = {"E": {"PyTorch by hand, loop": "torch"}, "F": {"PyTorch by hand, loop": "torch"}}


def instance(work: str, tasks: int, seed: int) -> dict[str, np.ndarray]:
    """The tasks, and the exact hypergradient of each."""
    g = np.random.default_rng(seed)
    spread = np.zeros(tasks) if work == "E" else 2 * g.random(tasks)  # log10 of largest over smallest scale
    scale = 10 ** (spread[:, None] * np.linspace(0, 1, FEATURES))
    weights = 2 * g.standard_normal((tasks, FEATURES)) / scale / FEATURES**0.5

    def part() -> tuple[np.ndarray, np.ndarray]:
        x = g.standard_normal((tasks, EXAMPLES, FEATURES)) * scale[:, None]
        score = np.einsum("tnd,td->tn", x, weights) + g.standard_normal((tasks, EXAMPLES))
        return x, np.where(score > 0, 1.0, -1.0)

    (x, y), (x_val, y_val) = part(), part()
    arrays = {"X": x, "y": y, "X_val": x_val, "y_val": y_val, "theta": 0.1 * g.standard_normal(FEATURES)}
    reference, condition, step_size = exact(**arrays, lam=LAM[work])
    return arrays | {
        "reference": reference,
        "condition": condition,
        "step_size": step_size,
        "lam": np.array(LAM[work]),
    }


def exact(
    X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray, theta: np.ndarray, lam: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By Newton's method with halving: the gradients (tasks, d), condition numbers (tasks,), and a step size for all."""
    phi = np.tile(theta, (len(X), 1))

    def value(phi: np.ndarray) -> np.ndarray:
        losses = np.logaddexp(0, -y * np.einsum("tnd,td->tn", X, phi)).mean(1)
        return losses + lam / 2 * ((phi - theta) ** 2).sum(1)

    def slope(X: np.ndarray, y: np.ndarray, phi: np.ndarray) -> np.ndarray:
        return np.einsum("tnd,tn->td", X, -y / (1 + np.exp(y * np.einsum("tnd,td->tn", X, phi)))) / X.shape[1]

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.einsum("tnd,td->tn", X, phi)))
        hessian = np.einsum("tnd,tn,tne->tde", X, p * (1 - p), X) / EXAMPLES + lam * np.eye(FEATURES)
        grad = slope(X, y, phi) + lam * (phi - theta)
        if np.abs(grad).max() < 1e-13:
            break
        step, size = np.linalg.solve(hessian, grad[..., None])[..., 0], np.ones(len(X))
        for _ in range(30):
            size = np.where(value(phi - size[:, None] * step) > value(phi) + 1e-14, size / 2, size)
        phi = phi - size[:, None] * step
    u = np.linalg.solve(hessian, slope(X_val, y_val, phi)[..., None])[..., 0]
    largest = 0.25 * np.linalg.norm(X, 2, axis=(1, 2)) ** 2 / EXAMPLES + lam
    return lam * u, np.linalg.cond(hessian), np.array(2 / (largest.max() + lam))


def measure(work: str, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one work."""
    tasks, repeats = (50, 2) if args.quick else (args.tasks, args.repeats)
    scripts = {name: (sys.executable, ["bilevel", mode]) for name, mode in OURS[work].items()}
    scripts |= {name: (sys.executable, [script, work]) for name, script in BY_HAND[work].items()}
    if args.torch_peers:
        has_peers(args.torch_peers, TORCH_PEERS[work].values(), "peers")
        scripts |= {name: (args.torch_peers, [script, work]) for name, script in TORCH_PEERS[work].items()}
    if args.jaxopt:
        has_peers(args.jaxopt, ["jaxopt"], "peers-jax")
        scripts["JAXopt, jitted, vmap"] = (args.jaxopt, ["jaxopt", work])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.npz"
        problem = instance(work, tasks, args.seed)
        np.savez(path, **problem)
        commands = {
            name: [python, str(PEERS / f"batch_{script[0]}.py"), str(path), str(args.threads), *script[1:]]
            for name, (python, script) in scripts.items()
        }
        found = rows(commands, args.threads, repeats, LIMIT)
    best = summarise(found, [*BY_HAND[work], *TORCH_PEERS[work]], "cpu" if args.threads == 1 else "seconds")
    show(found, best)
    condition = [float(number) for number in np.quantile(problem["condition"], (0, 0.5, 1))]
    return {
        "rows": found,
        "best": best,
        "tasks": tasks,
        "repeats": repeats,
        "condition": condition,
        "environment": environment(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-peers", help="interpreter of an environment with torchopt")
    parser.add_argument("--jaxopt", help="interpreter of an environment with jaxopt")
    parser.add_argument("--work", choices=("E", "F"), help="one of the two alone")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="50 tasks and few repetitions, to see that it works")
    parser.add_argument("--json", type=Path, help="write the numbers to this file; those of the other work stay in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    works = {work: measure(work, args) for work in ([args.work] if args.work else ("E", "F"))}
    if args.json:
        before = json.loads(args.json.read_text())["works"] if args.json.exists() else {}
        options = {"threads": args.threads, "seed": args.seed, "target": TARGET, "limit": LIMIT}
        result = {"works": before | works, "options": options, "environment": environment()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
