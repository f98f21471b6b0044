"""Work D with this library. The third argument: autograd, or compile."""

from __future__ import annotations

import sys
from typing import Any

import torch
from worker import problem, serve

import bilevel
from bilevel.linsys import CG
from bilevel.solvers import NewtonCG

X, y, X_val, y_val, theta, reference = (torch.from_numpy(array) for array in problem(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]))
CLASSES, FEATURES = int(y.max()) + 1, X.shape[1]


def cross_entropy(phi: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the examples. With the classes in front, (1, classes, examples), PyTorch is a fifth faster than the other way."""
    return torch.nn.functional.cross_entropy((phi @ x.T).unsqueeze(0), labels.unsqueeze(0))


def objective(phi: torch.Tensor, theta: torch.Tensor, data: Any) -> torch.Tensor:
    """G."""
    return cross_entropy(phi, data[0], data[1]) + 0.5 * (theta.exp() * phi.square()).sum()


PROBLEM = bilevel.BilevelProblem.from_functions(
    objective,
    lambda phi, theta, data: cross_entropy(phi, data[2], data[3]),
    lambda theta, data: theta.new_zeros(CLASSES, FEATURES),
)


def hypergradient(tol: float, rtol: float) -> torch.Tensor:
    """With these tolerances of the inner and the linear solve."""
    return bilevel.hypergradient(
        PROBLEM,
        theta,
        (X, y, X_val, y_val),
        solver=NewtonCG(max_steps=100, cg_steps=40, cg_rtol=0.1, tol=tol),
        linsys=CG(max_steps=500, rtol=rtol),
        compile=sys.argv[3] == "compile",
    ).unwrap()


serve(hypergradient, lambda grad: float((grad - reference).norm() / reference.norm()))
