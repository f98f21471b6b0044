"""A problem with places to plant a fault, and faults in hand-written rules of autograd.

phi has 6 numbers in two leaves that the Hessian couples, theta has 4 in two leaves; the cross derivative is 6 x 4; nothing is
quadratic, and L depends on theta directly. Every place is a function that may be replaced: ``places`` has the right ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_data() -> dict[str, Any]:
    a = normal(1, 6, 6)
    return {
        "A": a @ a.T / 6 + 0.5 * torch.eye(6, dtype=torch.float64),
        "M": normal(2, 6, 6),
        "P": normal(3, 3, 6),
        "C": normal(4, 6, 4),
        "K": normal(5, 4, 4),
        "D": normal(6, 4, 6),
        "target": normal(7, 6),
        "label": torch.tensor([1, 0, 2, 1, 0, 2]),
    }


def make_theta() -> Any:
    return [normal(8, 3), {"s": normal(9, 1)[0]}]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    def one(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return bilevel.trees.tree_map(one, tree)


Map = Callable[[Tensor, Tensor], Tensor]


def product(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix @ x


def problem(
    phi_in_G: Map = product,
    theta_in_G: Map = product,
    phi_in_L: Map = product,
    theta_in_L: Map = product,
) -> bilevel.BilevelProblem:
    """Each place is the product of a matrix and a vector, with right derivatives unless it is replaced."""

    def vectors(phi: Any, theta: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([phi["w"].reshape(-1), phi["b"]]), torch.cat([theta[0], theta[1]["s"].reshape(1)])

    def inner(phi: Any, theta: Any, data: Any) -> Tensor:
        x, t = vectors(phi, theta)
        weights = 1 + 0.5 * data["label"].to(x)
        fit = (weights * torch.nn.functional.softplus(phi_in_G(data["M"], x))).sum()
        scaled = ((0.3 * t[:3]).exp() * (data["P"] @ x).square()).sum()
        return 0.5 * x @ (data["A"] @ x) + fit + 0.3 * scaled - x @ (data["C"] @ theta_in_G(data["K"], t).tanh())

    def outer(phi: Any, theta: Any, data: Any) -> Tensor:
        x, t = vectors(phi, theta)
        distance = 0.5 * (phi_in_L(data["M"], x) - data["target"]).square().sum() + 0.1 * x.pow(3).sum()
        return distance + 0.3 * t @ (data["D"] @ x) + theta_in_L(data["K"], t).sin().sum()

    def start(theta: Any, data: Any) -> Any:
        return {"w": torch.zeros_like(data["target"][:4]).reshape(2, 2), "b": torch.zeros_like(data["target"][:2])}

    return bilevel.BilevelProblem.from_functions(inner, outer, start)


# ----------------------------------------------------------------------------------------------------------------------
# The product by hand, right and wrong.


def by_hand(backward: Map) -> Map:
    """The product as a Function whose backward is ``backward(matrix, cotangent)``, itself differentiated by autograd."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(matrix: Tensor, x: Tensor) -> Tensor:
            return matrix @ x

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
            return None, backward(ctx.saved_tensors[0], cotangent)

    return Product.apply


def right(matrix: Tensor, v: Tensor) -> Tensor:
    return matrix.T @ v


def wrong_transpose(matrix: Tensor, v: Tensor) -> Tensor:
    return matrix @ v


def wrong_sign(matrix: Tensor, v: Tensor) -> Tensor:
    return -(matrix.T @ v)


def detached(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix @ x.detach()


def right_then(second: Map) -> Map:
    """First derivatives right; those of the first derivatives by ``second`` in the place of the product with the matrix."""

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, matrix: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(matrix)
            return matrix.T @ v

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
            return None, second(ctx.saved_tensors[0], cotangent)

    return by_hand(Transposed.apply)


def negative(matrix: Tensor, v: Tensor) -> Tensor:
    return -(matrix @ v)


def constant_backward(matrix: Tensor, x: Tensor) -> Tensor:
    """A backward that is right and not differentiable: what the Function saved was detached."""
    return by_hand(lambda matrix, v: (matrix.T @ v).detach())(matrix, x)
