"""Work D by hand: derivatives in closed form, Newton-CG and CG with numbers of Python, and nothing that only another problem needs.

What is left are the operations of PyTorch themselves: this is the floor for a library that is made of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from worker import problem, serve

X, y, X_val, y_val, theta, reference = (torch.from_numpy(array) for array in problem(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]))
CLASSES, EXAMPLES = int(y.max()) + 1, len(X)
TRUE, TRUE_VAL = (torch.nn.functional.one_hot(labels).T.to(X.dtype).contiguous() for labels in (y, y_val))


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, rtol: float) -> Tensor:
    """u with product(u) = b but for a residual of rtol |b|."""
    u, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = float(torch.vdot(r, r))
    least = rtol**2 * rr
    while rr > least:
        hp = product(p)
        alpha = rr / float(torch.vdot(p, hp))
        u.add_(p, alpha=alpha)
        r.sub_(hp, alpha=alpha)
        rr, before = float(torch.vdot(r, r)), rr
        p.mul_(rr / before).add_(r)
    return u


def hypergradient(tol: float, rtol: float) -> Tensor:
    """With these tolerances of the inner and the linear solve."""
    penalty = theta.exp()
    phi = torch.zeros(CLASSES, X.shape[1], dtype=X.dtype)

    def value(phi: Tensor, scores: Tensor) -> float:
        loss = torch.logsumexp(scores, 0).mean() - (TRUE * scores).sum() / EXAMPLES
        return float(loss + 0.5 * torch.vdot(penalty, phi.square().sum(0)))

    def product(v: Tensor) -> Tensor:
        """H v; p are the probabilities at phi."""
        weighted = (v.view_as(phi) @ X.T).mul_(p)
        weighted.sub_(p * weighted.sum(0))
        return torch.addmm(penalty * v.view_as(phi), weighted, X, alpha=1 / EXAMPLES).view(-1)

    scores = phi @ X.T
    now = value(phi, scores)
    while True:
        p = torch.softmax(scores, 0)
        grad = torch.addmm(penalty * phi, p - TRUE, X, alpha=1 / EXAMPLES).view(-1)
        if float(grad.norm()) <= tol:
            break
        direction = conjugate_gradients(product, -grad, 0.1)
        slope, length = float(torch.vdot(grad, direction)), 1.0
        while True:
            trial = phi + length * direction.view_as(phi)
            scores = trial @ X.T
            then = value(trial, scores)
            if then <= now + 1e-4 * length * slope or slope > -1e-14:
                break
            length /= 2
        phi, now = trial, then
    b = (torch.softmax(phi @ X_val.T, 0) - TRUE_VAL) @ X_val / len(X_val)
    u = conjugate_gradients(product, b.view(-1), rtol)
    return -(penalty * phi * u.view_as(phi)).sum(0)


serve(hypergradient, lambda grad: float((grad - reference).norm() / reference.norm()))
