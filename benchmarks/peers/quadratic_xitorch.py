"""Work C with xitorch: `minimize` by its gradient descent without momentum, and its conjugate gradients in the backward pass."""

from __future__ import annotations

import warnings

import torch
from fixed import serve
from quadratic_problem import CG_STEPS, GD_STEPS, REFERENCE, STEP_SIZE, inner, outer, start, theta
from xitorch.optimize import minimize

warnings.filterwarnings("ignore")  # fixed numbers of steps: neither solve is said to converge
FORWARD = {
    "step": STEP_SIZE,
    "gamma": 0.0,
    "maxiter": GD_STEPS,
    "f_tol": 0.0,
    "f_rtol": 0.0,
    "x_tol": 0.0,
    "x_rtol": 0.0,
}
BACKWARD = {"method": "cg", "max_niter": CG_STEPS, "rtol": 0.0, "atol": 0.0, "posdef": True}


def hypergradient() -> torch.Tensor:
    """dL/dtheta."""
    t = theta.clone().requires_grad_()
    phi = minimize(inner, start(), params=(t,), method="gd", bck_options=BACKWARD, **FORWARD)
    return torch.autograd.grad(outer(phi, t), t)[0]


serve(hypergradient, REFERENCE)
