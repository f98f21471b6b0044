"""What does the hypergradient of a logistic regression cost, at an error of 1e-6? Work D: one log-penalty for each of 200 features,
1,000 examples, 5 classes, float64, from a start at zero.

    python benchmarks/logistic.py [--torchopt PYTHON] [--jaxopt PYTHON] [--threads 2] [--repeats 30] [--json docs/results/logistic.json]

Every method runs in a process of its own that stays alive; they take turns, so that whatever else the machine does slows all alike. A turn
is a block of calls, as in an outer loop, of which the median counts.
Before any time counts, each finds the fastest pair of tolerances (inner, linear) with which the gradient's relative error is at most
1e-6. The exact gradient comes from a dense Newton method in this script. The penalties are scattered around the one that is best on the
validation data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import extras  # noqa: F401 - says what to install
import numpy as np
import torch
from turns import PEERS, Worker, environment, has_peers

EXAMPLES, FEATURES, CLASSES = 1000, 200, 5


def instance(seed: int) -> dict[str, np.ndarray]:
    """Data, penalties and the exact hypergradient by dense linear algebra."""
    g = np.random.default_rng(seed)
    weights = 0.3 * g.standard_normal((FEATURES, CLASSES))

    def part() -> tuple[np.ndarray, np.ndarray]:
        x = g.standard_normal((EXAMPLES, FEATURES))
        return x, (x @ weights + g.standard_normal((EXAMPLES, CLASSES))).argmax(1)

    (x, y), (x_val, y_val) = part(), part()
    theta = -4.0 + 0.5 * g.standard_normal(FEATURES)
    arrays = {"X": x, "y": y, "X_val": x_val, "y_val": y_val, "theta": theta}
    return arrays | {"reference": exact(**arrays)}


def softmax(scores: np.ndarray) -> np.ndarray:
    """Row by row."""
    e = np.exp(scores - scores.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def exact(X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """phi* by Newton's method, and dL/dtheta = -(theta.exp() phi* u) summed over classes with H u = dL/dphi."""
    phi, one_hot, penalty = np.zeros((CLASSES, FEATURES)), np.eye(CLASSES), np.exp(theta)
    while True:
        p = softmax(X @ phi.T)
        grad = (p - one_hot[y]).T @ X / len(X) + penalty * phi
        blocks = np.einsum("nc,cd->ncd", p, one_hot) - np.einsum("nc,nd->ncd", p, p)
        hessian = np.einsum("ncd,ni,nj->cidj", blocks, X, X, optimize=True) / len(X)
        hessian = hessian.reshape(phi.size, phi.size) + np.diag(np.tile(penalty, CLASSES))
        if np.abs(grad).max() < 1e-14:
            break
        phi = phi - np.linalg.solve(hessian, grad.ravel()).reshape(phi.shape)
    slope = (softmax(X_val @ phi.T) - one_hot[y_val]).T @ X_val / len(X_val)
    u = np.linalg.solve(hessian, slope.ravel()).reshape(phi.shape)
    return -(penalty * phi * u).sum(0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("torchopt", "jaxopt"):
        parser.add_argument(f"--{name}", help=f"interpreter of an environment with {name}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = str(PEERS / "logistic_bilevel.py")
    commands = {"bilevel": [sys.executable, ours], "bilevel, compile=True": [sys.executable, ours]}
    commands["PyTorch by hand"] = [sys.executable, str(PEERS / "logistic_torch.py")]
    for name in ("torchopt", "jaxopt"):
        if getattr(args, name):
            has_peers(getattr(args, name), [name], "peers" if name == "torchopt" else "peers-jax")
            commands[name] = [getattr(args, name), str(PEERS / f"logistic_{name}.py")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **instance(args.seed))
        workers = {}
        for name, command in commands.items():
            mode = "compile" if "compile" in name else "autograd"
            workers[name] = Worker([*command, str(path), str(args.threads), mode], args.threads)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.repeats):
        for name, worker in workers.items():
            time.sleep(0.5)  # threads of the one before wait for more work for 0.2 s, and take the cores from this one
            seconds[name].append(worker())
    rows = {}
    for name, worker in workers.items():
        worker.close()
        ratios = [own / base for own, base in zip(seconds[name], seconds["bilevel"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "fastest": 1e3 * min(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            **worker.chosen,
        }
        print(
            f"{name:24s} {rows[name]['milliseconds']:7.1f} ms, {rows[name]['ratio']:.2f} of bilevel, error {worker.chosen['error']:.0e}"
        )
    if args.json:
        options = {"threads": args.threads, "repeats": args.repeats, "seed": args.seed}
        result = {"rows": rows, "options": options, "environment": environment()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
