"""Works E and F with this library, all tasks at once. The third argument: which of the ways below."""

from __future__ import annotations

import sys
from typing import Any

import torch
from batch_problem import CG_STEPS, GD_STEPS, LAM, REFERENCE, RTOL, STEP_SIZE, TOL, X, X_val, outer, theta, y, y_val
from fixed import serve

import bilevel
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent, NewtonCG

PROBLEM = bilevel.ProximalProblem.from_losses(
    lambda phi, data: outer(phi, data[0], data[1]), lambda phi, data: outer(phi, data[2], data[3]), LAM
)
DATA = (X, y, X_val, y_val)
FIXED = {"solver": GradientDescent(step_size=STEP_SIZE, max_steps=GD_STEPS), "linsys": CG(max_steps=CG_STEPS, rtol=0.0)}
MASKED = {
    "solver": NewtonCG(max_steps=100, cg_steps=100, cg_rtol=0.1, tol=TOL),
    "linsys": CG(max_steps=200, rtol=RTOL),
}


def ask(**options: Any) -> bilevel.Hypergradient:
    """The hypergradient of every task: (tasks, d)."""
    return bilevel.hypergradient(PROBLEM, theta, DATA, batched=True, reduction="none", **options)


def unmasked() -> dict[str, Any]:
    """As many steps for all as the hardest task needs."""
    found = ask(**MASKED)
    assert found.inner is not None
    steps, products = int(found.inner.num_steps.max()), int(found.linear.num_steps.max())
    for cg_steps in range(1, 101):
        options = {
            "solver": NewtonCG(max_steps=steps, cg_steps=cg_steps),
            "linsys": CG(max_steps=products, rtol=0.0),
        }
        got = ask(**options).unwrap()
        if ((got - torch.from_numpy(REFERENCE)).norm(dim=1) <= 1e-7 * torch.from_numpy(REFERENCE).norm(dim=1)).all():
            return options
    raise SystemExit("no number of steps is enough")


MODE = sys.argv[3]
OPTIONS: dict[str, Any] = unmasked() if MODE == "unmasked" else MASKED if "masked" in MODE else FIXED
serve(lambda: ask(**OPTIONS, compile="compile" in MODE).unwrap(), REFERENCE)
