"""Three bilevel problems on real data that differ in what matters to a solver, each with its exact hypergradient.

The data are the handwritten digits that ship with scikit-learn. The exact answers come from dense matrices in float64: derivatives by
torch.func, the point by SciPy (a trust region for a minimum, then MINPACK's hybrd for the last digits), the linear system by NumPy. No
solver of the library has a part in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.trees import flatten, tree_map

Function = Callable[[Tensor, Any, Any], Tensor]


@dataclass
class Testbed:
    """A problem for one task, its arguments, and its exact answer.

    Attributes:
        title, words: for people; the words say what is hard about it.
        condition: what is zero at the solution, ``(d,)``.
        outer: the outer loss.
        inner: the inner objective; None where there is none.
        problem: as the library takes it; None where there is no inner objective.
        step: the map whose fixed point is the solution; None where there is an inner objective.
        theta, data, start: the arguments; with ``batched`` data and start have a leading task axis.
        facts: measured while the exact answer was computed.
    """

    title: str
    words: str
    condition: Function
    outer: Function
    inner: Function | None
    problem: bilevel.BilevelProblem | None
    theta: Any
    data: Any
    start: Tensor
    batched: bool = False
    step: Function | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tasks = range(len(self.start)) if self.batched else [None]
        answers = [self._exact(*((self.start, self.data) if k is None else self.task(k))) for k in tasks]
        self.phi = torch.stack([phi for phi, _, _ in answers]) if self.batched else answers[0][0]
        self.grad = sum(grad for _, grad, _ in answers) / len(answers)
        for _, _, facts in answers:
            for name, value in facts.items():
                worst = min if name.startswith("smallest") else max
                self.facts[name] = worst(value, self.facts.get(name, value))

    def task(self, k: int) -> tuple[Tensor, Any]:
        """Start and data of one task."""
        return self.start[k], tree_map(lambda leaf: leaf[k], self.data)

    def jacobian(self, phi: Tensor, data: Any) -> Tensor:
        """The matrix of the linear system at phi, dense."""
        return torch.func.jacfwd(self.condition)(phi, self.theta, data)

    def error(self, grad: Any) -> float:
        """Of a hypergradient: relative, over all leaves."""
        return float((vector(grad) - self.grad).norm() / self.grad.norm())

    def _exact(self, start: Tensor, data: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The solution, the hypergradient, and what the matrix is like."""

        def condition(x: np.ndarray) -> np.ndarray:
            return self.condition(torch.from_numpy(x), self.theta, data).numpy()

        def jacobian(x: np.ndarray) -> np.ndarray:
            return self.jacobian(torch.from_numpy(x), data).numpy()

        x = start.numpy()
        if self.inner is not None:

            def value(x: np.ndarray) -> float:
                return float(self.inner(torch.from_numpy(x), self.theta, data))

            options = {"gtol": 1e-8}
            x = scipy.optimize.minimize(value, x, jac=condition, hess=jacobian, method="trust-exact", options=options).x
        phi = torch.from_numpy(scipy.optimize.root(condition, x, jac=jacobian, options={"xtol": 1e-15}).x)
        matrix = self.jacobian(phi, data).numpy()
        slope, direct = torch.func.grad(self.outer, (0, 1))(phi, self.theta, data)
        u = torch.from_numpy(np.linalg.solve(matrix.T, slope.numpy()))
        (cross,) = torch.func.vjp(lambda theta: self.condition(phi, theta, data), self.theta)[1](u)
        singular = np.linalg.svd(matrix, compute_uv=False)
        facts = {
            "residual at the start": float(np.linalg.norm(condition(start.numpy()))),
            "residual of the oracle": float(np.linalg.norm(condition(phi.numpy()))),
            "condition number": float(singular[0] / singular[-1]),
            "asymmetry": float(np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)),
        }
        if self.inner is not None:
            facts["smallest eigenvalue"] = float(np.linalg.eigvalsh(matrix)[0])
            at_start = np.linalg.eigvalsh(jacobian(start.numpy()))
            facts["smallest eigenvalue at the start"] = float(at_start[0])
            facts["largest eigenvalue"] = float(max(at_start[-1], singular[0]))
        return phi, vector(direct) - vector(cross), facts


def vector(tree: Any) -> Tensor:
    """The leaves of a tree in one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 64)`` from 0 to 1, and labels."""
    x, y = load_digits(return_X_y=True)
    return torch.as_tensor(x, dtype=torch.float64) / 16, torch.as_tensor(y)


def penalties(examples: int, classes: int, seed: int) -> Testbed:
    """A multinomial logistic regression with a log-penalty for each pixel; 65 weights for each class."""
    g = torch.Generator().manual_seed(seed)
    x, y = digits()
    x, y = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)[y < classes], y[y < classes]
    a, b = torch.randperm(len(x), generator=g)[: 2 * examples].split(examples)
    theta = np.log(10) * (-5 + 4 * torch.rand(65, generator=g, dtype=x.dtype))

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        W = phi.view(classes, 65)
        return cross_entropy(data["x"] @ W.T, data["y"]) + 0.5 * (theta.exp() * W.square()).sum()

    def outer(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return cross_entropy(data["x_valid"] @ phi.view(classes, 65).T, data["y_valid"])

    return Testbed(
        "One penalty per feature",
        "A multinomial logistic regression on images of digits, with one L2 penalty for each pixel, from 1e-5 to 0.1. Convex, one "
        "problem, and ill-conditioned.",
        torch.func.grad(inner),
        outer,
        inner,
        bilevel.BilevelProblem.from_functions(inner, outer),
        theta,
        {"x": x[a], "y": y[a], "x_valid": x[b], "y_valid": y[b]},
        torch.zeros(classes * 65, dtype=x.dtype),
    )


def few_shot(tasks: int, width: int, seed: int) -> Testbed:
    """5-way 2-shot tasks of digits, a network with one hidden layer, pulled to shared weights."""
    g = torch.Generator().manual_seed(seed)
    x, y = digits()
    ways, shots, queries, lam = 5, 2, 10, 0.2
    rows, labels = [], torch.arange(ways).repeat_interleave(shots + queries)
    for _ in range(tasks):
        classes = torch.randperm(10, generator=g)[:ways]
        own = [torch.nonzero(y == c).squeeze(1) for c in classes]
        rows.append(torch.cat([each[torch.randperm(len(each), generator=g)[: shots + queries]] for each in own]))
    support = (torch.arange(len(labels)) % (shots + queries)) < shots
    x = x[torch.stack(rows)]
    sizes = [width * 64, width, ways * width, ways]
    scale = torch.cat([torch.full((n,), s) for n, s in zip(sizes, (0.25, 0.1, width**-0.5, 0.1), strict=True)])
    theta = scale * torch.randn(sum(sizes), generator=g, dtype=x.dtype)

    def predict(phi: Tensor, images: Tensor) -> Tensor:
        W, b, V, c = phi.split(sizes)
        return torch.tanh((images - 0.3) @ W.view(width, 64).T + b) @ V.view(ways, width).T + c

    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: predict(phi, data["x"]),
        lambda z, data: cross_entropy(z, data["y"]),
        lambda phi, data: cross_entropy(predict(phi, data["x_query"]), data["y_query"]),
        lam=lam,
    )

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return cross_entropy(predict(phi, data["x"]), data["y"]) + 0.5 * lam * (phi - theta).square().sum()

    def outer(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return cross_entropy(predict(phi, data["x_query"]), data["y_query"])

    data = {"x": x[:, support], "y": labels[support], "x_query": x[:, ~support], "y_query": labels[~support]}
    data |= {name: data[name].expand(tasks, -1) for name in ("y", "y_query")}
    return Testbed(
        "Few-shot tasks",
        f"{tasks} tasks of 5 digits with {shots} images each, a network with one hidden layer, pulled to shared weights with lambda = "
        f"{lam:g}. A batch, well-conditioned at the solution, and indefinite on the way there.",
        torch.func.grad(inner),
        outer,
        inner,
        problem,
        theta,
        data,
        theta.expand(tasks, -1).contiguous(),
        batched=True,
    )


def equilibrium(images: int, width: int, seed: int) -> Testbed:
    """A deep-equilibrium layer on images of digits: z = tanh(W z + U x + b), all images as one system."""
    g = torch.Generator().manual_seed(seed)
    x, y = digits()
    rows = torch.randperm(len(x), generator=g)[:images]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=x.dtype)

    theta = {"W": normal(width, width) / width**0.5, "U": 0.1 * normal(width, 64), "b": 0.1 * normal(width)}

    def step(phi: Tensor, theta: Any, data: Any) -> Tensor:
        z = phi.view(images, width)
        return torch.tanh(z @ theta["W"].T + data["x"] @ theta["U"].T + theta["b"]).reshape(-1)

    def outer(phi: Tensor, theta: Any, data: Any) -> Tensor:
        return cross_entropy(phi.view(images, width) @ data["head"].T, data["y"])

    return Testbed(
        "An equilibrium layer",
        f"The layer z = tanh(W z + U x + b) of width {width} on {images} images, solved as one system of equations. No objective, and "
        "a matrix that is not symmetric.",
        lambda phi, theta, data: phi - step(phi, theta, data),
        outer,
        None,
        None,
        theta,
        {"x": x[rows], "y": y[rows], "head": normal(10, width)},
        torch.zeros(images * width, dtype=x.dtype),
        step=step,
    )


def testbeds(quick: bool, seed: int) -> dict[str, Callable[[], Testbed]]:
    """By name; not made before they are asked for."""
    sizes = (60, 3, 2, 2, 2, 16) if quick else (400, 10, 8, 8, 8, 64)
    examples, classes, tasks, width, images, units = sizes
    return {
        "penalties": lambda: penalties(examples, classes, seed),
        "few-shot": lambda: few_shot(tasks, width, seed),
        "equilibrium": lambda: equilibrium(images, units, seed),
    }
