"""Work C with TorchOpt: its implicit differentiation (custom_root, conjugate gradients) around a loop of gradient steps."""

from __future__ import annotations

import torch
import torchopt
from fixed import serve
from quadratic_problem import CG_STEPS, GD_STEPS, REFERENCE, STEP_SIZE, inner, outer, start, theta


@torchopt.diff.implicit.custom_root(
    torch.func.grad(inner, argnums=0),
    argnums=1,
    solve=torchopt.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=CG_STEPS),
)
def solve(phi: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Gradient descent."""
    theta, phi = theta.detach(), phi.detach().requires_grad_()
    with torch.enable_grad():
        for _ in range(GD_STEPS):
            (grad,) = torch.autograd.grad(inner(phi, theta), phi)
            phi = (phi.detach() - STEP_SIZE * grad).requires_grad_()
    return phi.detach()


def hypergradient() -> torch.Tensor:
    """dL/dtheta."""
    t = theta.clone().requires_grad_()
    return torch.autograd.grad(outer(solve(start(), t), t), t)[0]


serve(hypergradient, REFERENCE)
