"""Works E and F by hand, in plain PyTorch, one task after the other. E: gradient steps; F: Newton's method with the dense Hessian."""

from __future__ import annotations

import sys

import torch
from batch_problem import CG_STEPS, GD_STEPS, REFERENCE, STEP_SIZE, X, X_val, inner, newton, outer, theta, y, y_val
from fixed import serve


def descent(x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, y_val: torch.Tensor) -> torch.Tensor:
    """Work E: one task."""
    phi, t = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    for _ in range(GD_STEPS):
        (grad,) = torch.autograd.grad(inner(phi, theta, x, y), phi)
        phi = (phi.detach() - STEP_SIZE * grad).requires_grad_()
    (r,) = torch.autograd.grad(outer(phi, x_val, y_val), phi)
    (grad,) = torch.autograd.grad(inner(phi, t, x, y), phi, create_graph=True)
    u, p, rr = torch.zeros_like(r), r, r @ r
    for _ in range(CG_STEPS):
        (hp,) = torch.autograd.grad(grad, phi, p, retain_graph=True)
        alpha = rr / (p @ hp)
        u, r = u + alpha * p, r - alpha * hp
        rr, before = r @ r, rr
        p = r + rr / before * p
    return -torch.autograd.grad(grad, t, u)[0]


def dense(x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, y_val: torch.Tensor) -> torch.Tensor:
    """Work F: one task."""
    phi, hessian = newton(x, y)
    phi, t = phi.requires_grad_(), theta.clone().requires_grad_()
    (r,) = torch.autograd.grad(outer(phi, x_val, y_val), phi)
    (grad,) = torch.autograd.grad(inner(phi, t, x, y), phi, create_graph=True)
    return -torch.autograd.grad(grad, t, torch.linalg.solve(hessian, r))[0]


TASK = {"E": descent, "F": dense}[sys.argv[3]]
serve(lambda: torch.stack([TASK(*task) for task in zip(X, y, X_val, y_val, strict=True)]), REFERENCE)
