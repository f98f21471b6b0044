"""Losses of one number: in torch, and with derivatives that NumPy evaluates in float64 and in ``Decimal`` alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.testing.strategies.draws import Array


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A convex f(z), elementwise.

    Attributes:
        value: f in torch.
        first, second: f' and f'' over arrays.
        bounds: of |f'| (None: unbounded), f'' and |f'''|, over all z.
    """

    value: Callable[[Tensor], Tensor]
    first: Callable[[Array], Array]
    second: Callable[[Array], Array]
    bounds: tuple[float | None, float, float]


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), without overflow."""
    e = np.exp(-abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


def sigmoid_slope(z: Array) -> Array:
    """The derivative of :func:`sigmoid`, without cancellation."""
    e = np.exp(-abs(z))
    return e / (1 + e) ** 2


SQUARED = Loss(value=lambda z: 0.5 * z.square(), first=lambda z: z, second=lambda z: 0 * z + 1, bounds=(None, 1.0, 0.0))

# sqrt(1 + z^2): |f'''| = 3 |z| (1 + z^2)^(-5/2) is largest at z = 1/2
BOUNDED = Loss(
    value=lambda z: (1 + z.square()).sqrt(),
    first=lambda z: z / np.sqrt(1 + z * z),
    second=lambda z: 1 / ((1 + z * z) * np.sqrt(1 + z * z)),
    bounds=(1.0, 1.0, 48 / (25 * math.sqrt(5))),
)

# log(1 + exp(z)). By default softplus is linear beyond 20, where its slope is off by 2e-9 and its curvature by all of it; beyond 40
# both are below the rounding of float64.
LOGISTIC = Loss(
    value=lambda z: softplus(z, threshold=40.0),
    first=sigmoid,
    second=sigmoid_slope,
    bounds=(1.0, 0.25, 1 / (6 * math.sqrt(3))),
)
