"""Work C by hand, in plain PyTorch with its automatic derivatives."""

from __future__ import annotations

import torch
from fixed import serve
from quadratic_problem import CG_STEPS, GD_STEPS, REFERENCE, STEP_SIZE, inner, outer, start, theta


def hypergradient() -> torch.Tensor:
    """dL/dtheta."""
    phi, t = start().requires_grad_(), theta.clone().requires_grad_()
    for _ in range(GD_STEPS):
        (grad,) = torch.autograd.grad(inner(phi, theta), phi)
        phi = (phi.detach() - STEP_SIZE * grad).requires_grad_()
    to_phi, to_theta = torch.autograd.grad(outer(phi, t), (phi, t))
    (grad,) = torch.autograd.grad(inner(phi, t), phi, create_graph=True)
    u, r = torch.zeros_like(to_phi), to_phi
    p, rr = r, r @ r
    for _ in range(CG_STEPS):
        (hp,) = torch.autograd.grad(grad, phi, p, retain_graph=True)
        alpha = rr / (p @ hp)
        u, r = u + alpha * p, r - alpha * hp
        rr, before = r @ r, rr
        p = r + rr / before * p
    (cross,) = torch.autograd.grad(grad, t, u)
    return to_theta - cross


serve(hypergradient, REFERENCE)
