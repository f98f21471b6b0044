"""Work C with higher: it unrolls, so it differentiates through all gradient steps and solves no linear system."""

from __future__ import annotations

import higher
import torch
from fixed import serve
from quadratic_problem import GD_STEPS, REFERENCE, STEP_SIZE, inner, outer, start, theta


class Point(torch.nn.Module):
    """phi as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = torch.nn.Parameter(start())

    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        """G."""
        return inner(self.phi, theta)


def hypergradient() -> torch.Tensor:
    """dL/dtheta."""
    module, t = Point(), theta.clone().requires_grad_()
    with higher.innerloop_ctx(module, torch.optim.SGD(module.parameters(), STEP_SIZE)) as (copy, optimizer):
        for _ in range(GD_STEPS):
            optimizer.step(copy(t))
        return torch.autograd.grad(outer(copy.phi, t), t)[0]


serve(hypergradient, REFERENCE)
