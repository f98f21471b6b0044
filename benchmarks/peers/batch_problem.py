"""Works E and F for the peers that use PyTorch: G and L of one task, and the settings that all share."""

from __future__ import annotations

import sys

import torch
from fixed import load

ARRAYS = load(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
X, y, X_val, y_val, theta = (torch.from_numpy(ARRAYS[name]) for name in ("X", "y", "X_val", "y_val", "theta"))
REFERENCE, STEP_SIZE, LAM = ARRAYS["reference"], float(ARRAYS["step_size"]), float(ARRAYS["lam"])
GD_STEPS, CG_STEPS = 25, 10
TOL, RTOL = 1e-8, 1e-8  # work F
softplus = torch.nn.functional.softplus


def inner(phi: torch.Tensor, theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """G of one task."""
    return softplus(-y * (x @ phi)).mean() + 0.5 * LAM * (phi - theta).square().sum()


def outer(phi: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """L of one task."""
    return softplus(-y * (x @ phi)).mean()


def newton(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Work F: phi* of one task and the dense Hessian there, row by row from one graph; steps are halved until G falls."""
    phi, eye = theta.clone().requires_grad_(), torch.eye(len(theta), dtype=theta.dtype)
    while True:
        value = inner(phi, theta, x, y)
        (grad,) = torch.autograd.grad(value, phi, create_graph=True)
        (hessian,) = torch.autograd.grad(grad, phi, eye, is_grads_batched=True)
        with torch.no_grad():
            if grad.norm() <= TOL:
                return phi.detach(), hessian
            step, size = torch.linalg.solve(hessian, grad), 1.0
            while size > 1e-6 and inner(phi - size * step, theta, x, y) > value:
                size /= 2
        phi = (phi.detach() - size * step).requires_grad_()
