"""Work D with TorchOpt: its implicit differentiation (custom_root, conjugate gradients) around the L-BFGS of PyTorch."""

from __future__ import annotations

import sys

import torch
import torchopt
from worker import problem, serve

X, y, X_val, y_val, theta, reference = (torch.from_numpy(array) for array in problem(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]))
CLASSES, FEATURES = int(y.max()) + 1, X.shape[1]


def cross_entropy(phi: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the examples, with the classes in front."""
    return torch.nn.functional.cross_entropy((phi @ x.T).unsqueeze(0), labels.unsqueeze(0))


def objective(phi: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """G."""
    return cross_entropy(phi, X, y) + 0.5 * (theta.exp() * phi.square()).sum()


def hypergradient(tol: float, rtol: float) -> torch.Tensor:
    """With these tolerances of the inner and the linear solve."""

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(objective, argnums=0),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(rtol=rtol, atol=0.0, maxiter=500),
    )
    def solve(start: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        phi, penalty = start.clone().requires_grad_(), theta.detach().exp()
        inner = torch.optim.LBFGS(
            [phi],
            max_iter=500,
            history_size=10,
            tolerance_grad=tol,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            inner.zero_grad()
            value = cross_entropy(phi, X, y) + 0.5 * (penalty * phi.square()).sum()
            value.backward()
            return value

        inner.step(closure)
        return phi.detach()

    outer = theta.clone().requires_grad_()
    phi = solve(torch.zeros(CLASSES, FEATURES, dtype=X.dtype), outer)
    cross_entropy(phi, X_val, y_val).backward()
    return outer.grad


serve(hypergradient, lambda grad: float((grad - reference).norm() / reference.norm()))
