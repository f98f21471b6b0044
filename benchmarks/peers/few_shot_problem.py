"""Works A and B for the peers: the network as a plain `nn.Sequential`, the losses, and the loops by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

INNER_STEPS, CG_STEPS, STEP_SIZE = 16, 5, 0.1
Phi = tuple[Tensor, ...]
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support images and labels, query images and labels
cross_entropy = nn.functional.cross_entropy


def network(ways: int, channels: int = 64) -> nn.Sequential:
    """Four times convolution, batch norm with the statistics of the batch, ReLU; then a linear layer."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers.append(nn.Conv2d(channels if i else 1, channels, 3, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, ways))


class Work:
    """What the script was called with: a file and the number of threads."""

    def __init__(self) -> None:
        torch.set_num_threads(int(sys.argv[2]))
        with np.load(sys.argv[1]) as arrays:
            self.arrays = dict(arrays)
        self.lam = float(self.arrays["lam"])
        self.net = network(int(self.arrays["support_y"].max()) + 1)
        self.names = [name for name, _ in self.net.named_parameters()]

    def theta(self, dtype: torch.dtype = torch.float32) -> Phi:
        """The shared parameters, detached."""
        return tuple(torch.from_numpy(self.arrays[f"p{i:02d}"]).to(dtype) for i in range(len(self.names)))

    def tasks(self, dtype: torch.dtype = torch.float32) -> list[Task]:
        """All of them."""
        s, t, q, u = (torch.from_numpy(self.arrays[n]) for n in ("support_x", "support_y", "query_x", "query_y"))
        return list(zip(s.to(dtype), t, q.to(dtype), u, strict=True))

    def loss(self, phi: Phi, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of the network with parameters phi."""
        return cross_entropy(functional_call(self.net, dict(zip(self.names, phi, strict=True)), (x,)), y)

    def serve(self, mean: Callable[[Phi, list[Task]], Phi], reference: str = "imaml") -> None:
        """Time ``mean(theta, tasks)``; its check is in float64 on the first two tasks."""
        from fixed import serve

        theta, tasks, double = self.theta(), self.tasks(), torch.float64
        tiny = tuple(tensor[:2] for tensor in tasks[0])
        serve(
            lambda: mean(theta, tasks),
            self.arrays[f"reference_{reference}"],
            warm_up=lambda: mean(theta, [tiny]),
            check=lambda: flat(mean(self.theta(double), self.tasks(double)[:2])),
        )


def flat(leaves: Phi) -> Tensor:
    """One vector."""
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves])


def average(gradients: Iterator[Phi]) -> Phi:
    """The mean over tasks, of which one at a time is kept."""
    total, count = list(next(gradients)), 1
    for gradient in gradients:
        total, count = [one.add_(other) for one, other in zip(total, gradient, strict=True)], count + 1
    return tuple(one / count for one in total)


def adapted(
    loss: Any, theta: Phi, x: Tensor, y: Tensor, lam: float, steps: int = INNER_STEPS, step_size: float = STEP_SIZE
) -> Phi:
    """Gradient steps on loss + lam / 2 |phi - theta|^2 from theta."""
    phi = tuple(leaf.detach().clone().requires_grad_() for leaf in theta)
    for _ in range(steps):
        grads = torch.autograd.grad(loss(phi, x, y), phi)
        with torch.no_grad():
            phi = tuple(p - step_size * (g + lam * (p - t)) for p, g, t in zip(phi, grads, theta, strict=True))
        phi = tuple(leaf.requires_grad_() for leaf in phi)
    return phi


def imaml(
    loss: Any,
    theta: Phi,
    task: Task,
    lam: float,
    steps: int = INNER_STEPS,
    step_size: float = STEP_SIZE,
    cg_steps: int = CG_STEPS,
) -> Phi:
    """The implicit gradient of one task: (I + H / lam) u = dL/dphi by conjugate gradients, on one graph."""
    x, y, query_x, query_y = task
    phi = adapted(loss, theta, x, y, lam, steps, step_size)
    r = torch.autograd.grad(loss(phi, query_x, query_y), phi)
    grads = torch.autograd.grad(loss(phi, x, y), phi, create_graph=True)
    u: Phi = tuple(torch.zeros_like(leaf) for leaf in r)
    p, rr = r, sum(leaf.square().sum() for leaf in r)
    for _ in range(cg_steps):
        hp = torch.autograd.grad(grads, phi, p, retain_graph=True)
        ap = [v + h / lam for v, h in zip(p, hp, strict=True)]
        alpha = rr / sum((v * a).sum() for v, a in zip(p, ap, strict=True))
        u = tuple(v + alpha * d for v, d in zip(u, p, strict=True))
        r = tuple(v - alpha * a for v, a in zip(r, ap, strict=True))
        rr, before = sum(leaf.square().sum() for leaf in r), rr
        p = tuple(v + rr / before * d for v, d in zip(r, p, strict=True))
    return u


def maml(loss: Any, theta: Phi, task: Task) -> Phi:
    """MAML's gradient of one task: through the steps, without the proximal term."""
    x, y, query_x, query_y = task
    start = tuple(leaf.clone().requires_grad_() for leaf in theta)
    phi = start
    for _ in range(INNER_STEPS):
        grads = torch.autograd.grad(loss(phi, x, y), phi, create_graph=True)
        phi = tuple(p - STEP_SIZE * g for p, g in zip(phi, grads, strict=True))
    return torch.autograd.grad(loss(phi, query_x, query_y), start)
