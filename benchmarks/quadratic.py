"""What does the hypergradient of one small quadratic cost, where dispatch is all there is? Work C: d = 50, 100 gradient steps of fixed
size and 5 CG steps, float64.

    python benchmarks/quadratic.py [--torch-peers PYTHON] [--jaxopt PYTHON] [--json docs/results/quadratic.json]

G = phi^T A phi / 2 - (b + W theta)^T phi with 20 outer variables, L = softplus of -t phi, summed, plus theta^2 / 20. A has the five
eigenvalues 1, 2.5, 5, 7.5 and 10, so that both 100 gradient steps and 5 CG steps reach the exact gradient: every right method finds the
same one, whether it unrolls or not, and the reference comes from dense linear algebra. A method with a relative error above 1e-6 is
wrong and takes no part. Each runs in a process of its own; they take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import extras  # noqa: F401 - says what to install
import numpy as np
import torch
from turns import PEERS, environment, has_peers, rows, show, summarise

INNER, OUTER = 50, 20
EIGENVALUES = (1.0, 2.5, 5.0, 7.5, 10.0)
LIMIT = 1e-6
OURS = {
    "bilevel": "eager",
    "bilevel, compile=True": "compile",
    "bilevel, quadratic=True": "quadratic",
    "bilevel, quadratic=True, compile=True": "quadratic-compile",
}
TORCH_PEERS = {
    "TorchOpt": ["torchopt"],
    "higher (unrolled)": ["higher"],
    "xitorch": ["xitorch"],
    "Betty": ["betty"],
}
BY_HAND = {"PyTorch by hand": ["torch"], "NumPy by hand": ["numpy"]}


def instance(seed: int) -> dict[str, np.ndarray]:
    """The problem and its exact hypergradient."""
    g = np.random.default_rng(seed)
    basis = np.linalg.qr(g.standard_normal((INNER, INNER)))[0]
    A = basis * np.resize(EIGENVALUES, INNER) @ basis.T
    A = (A + A.T) / 2
    b, W, target = g.standard_normal(INNER), g.standard_normal((INNER, OUTER)), g.standard_normal(INNER)
    theta = g.standard_normal(OUTER)
    phi = np.linalg.solve(A, b + W @ theta)
    u = np.linalg.solve(A, -target / (1 + np.exp(target * phi)))
    step_size = np.array(2 / (min(EIGENVALUES) + max(EIGENVALUES)))
    arrays = {"A": A, "b": b, "W": W, "target": target, "theta": theta, "step_size": step_size}
    return arrays | {"reference": 0.1 * theta + W.T @ u}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-peers", help="interpreter of an environment with torchopt, higher, xitorch and betty")
    parser.add_argument("--jaxopt", help="interpreter of an environment with jaxopt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions and one row of ours, to see that it works"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = dict(list(OURS.items())[:1]) if args.quick else OURS
    scripts = {name: (sys.executable, ["bilevel", mode]) for name, mode in ours.items()}
    scripts |= {name: (sys.executable, script) for name, script in BY_HAND.items()}
    if args.torch_peers:
        has_peers(args.torch_peers, [script for (script,) in TORCH_PEERS.values()], "peers")
        scripts |= {name: (args.torch_peers, script) for name, script in TORCH_PEERS.items()}
    if args.jaxopt:
        has_peers(args.jaxopt, ["jaxopt"], "peers-jax")
        scripts["JAXopt, jitted"] = (args.jaxopt, ["jaxopt"])
    repeats = 3 if args.quick else args.repeats
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **instance(args.seed))
        commands = {
            name: [python, str(PEERS / f"quadratic_{script[0]}.py"), str(path), str(args.threads), *script[1:]]
            for name, (python, script) in scripts.items()
        }
        found = rows(commands, args.threads, repeats, LIMIT)
    best = summarise(found, ["PyTorch by hand", *TORCH_PEERS], "cpu" if args.threads == 1 else "seconds")
    show(found, best)
    if args.json:
        options = {
            "threads": args.threads,
            "repeats": repeats,
            "seed": args.seed,
            "best": best,
            "target": 8.0,
            "limit": LIMIT,
        }
        result = {"rows": found, "options": options, "environment": environment()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
