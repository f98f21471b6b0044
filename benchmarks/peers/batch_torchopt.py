"""Works E and F with TorchOpt (custom_root, conjugate gradients), one task after the other. E: gradient steps; F: Newton's method."""

from __future__ import annotations

import sys

import torch
import torchopt
from batch_problem import (
    CG_STEPS,
    GD_STEPS,
    REFERENCE,
    RTOL,
    STEP_SIZE,
    X,
    X_val,
    inner,
    newton,
    outer,
    theta,
    y,
    y_val,
)
from fixed import serve

WORK = sys.argv[3]
LINEAR = (
    torchopt.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=CG_STEPS)
    if WORK == "E"
    else torchopt.linear_solve.solve_cg(rtol=RTOL, atol=0.0, maxiter=200)
)


@torchopt.diff.implicit.custom_root(torch.func.grad(inner, argnums=0), argnums=1, solve=LINEAR)
def solve(phi: torch.Tensor, theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One task."""
    with torch.enable_grad():
        return descent(theta.detach(), x, y) if WORK == "E" else newton(x, y)[0]


def descent(theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient steps of fixed size."""
    phi = theta.clone().requires_grad_()
    for _ in range(GD_STEPS):
        (grad,) = torch.autograd.grad(inner(phi, theta, x, y), phi)
        phi = (phi.detach() - STEP_SIZE * grad).requires_grad_()
    return phi.detach()


def task(x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, y_val: torch.Tensor) -> torch.Tensor:
    """The hypergradient of one task."""
    t = theta.clone().requires_grad_()
    phi = solve(theta, t, x, y)
    return torch.autograd.grad(outer(phi, x_val, y_val), t)[0]


serve(lambda: torch.stack([task(*one) for one in zip(X, y, X_val, y_val, strict=True)]), REFERENCE)
