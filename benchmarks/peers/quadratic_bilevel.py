"""Work C with this library. The third argument: eager, compile, quadratic, or both as quadratic-compile."""

from __future__ import annotations

import sys
from typing import Any

import torch
from fixed import serve
from quadratic_problem import CG_STEPS, GD_STEPS, REFERENCE, STEP_SIZE, A, W, b, target, theta

import bilevel
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

PROBLEM = bilevel.BilevelProblem.from_functions(
    lambda phi, theta, data: 0.5 * phi @ (data[0] @ phi) - (data[1] + data[2] @ theta) @ phi,
    lambda phi, theta, data: torch.nn.functional.softplus(-data[3] * phi).sum() + 0.05 * theta @ theta,
    lambda theta, data: torch.zeros_like(data[1]),
    quadratic="quadratic" in sys.argv[3],
)
OPTIONS: dict[str, Any] = {"compile": "compile" in sys.argv[3]}
SOLVER, LINSYS = GradientDescent(step_size=STEP_SIZE, max_steps=GD_STEPS), CG(max_steps=CG_STEPS, rtol=0.0)


def hypergradient() -> torch.Tensor:
    """dL/dtheta."""
    return bilevel.hypergradient(PROBLEM, theta, (A, b, W, target), solver=SOLVER, linsys=LINSYS, **OPTIONS).unwrap()


serve(hypergradient, REFERENCE)
