"""What the line searches share: how much is enough, what rounding hides, and the first length."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.derivatives import Objective
from bilevel.linsys.base import all_finite, dot, norm, select

SUFFICIENT_DECREASE = 1e-4
"""A trial must lower the objective by this part of what its slope at the start promises (Armijo).

The usual value, which refuses next to no progress only (Nocedal and Wright 2006, section 3.1).
"""

NOISE = 1000
"""A difference of this many eps |G| may be rounding.

Less would take the rounding of a sum over many data for a rise; more would let a search climb by what it hides.
"""

CANCELLED = 10
"""So many eps of its terms may be rounding in a G whose terms cancel.

Less would take rounding for uphill (tests/test_hard_objectives.py); more would take a plateau that much higher for a
minimum.
"""


def not_above(value: Tensor, other: Tensor) -> Tensor:
    """Where G is no larger, as far as rounding lets it be told; not where it is NaN."""
    return value <= other + NOISE * torch.finfo(value.dtype).eps * other.abs()


def hidden_in_terms(phi: Tensor, step_size: Tensor) -> Tensor:
    """What rounding may change of G where its terms cancel ``(*batch,)``.

    They are as large as phi^T H phi, and 1 / |H| is as large as this step.
    """
    return CANCELLED * torch.finfo(phi.dtype).eps * dot(phi, phi) / step_size


def initial_step_size(objective: Objective, phi: Tensor) -> Tensor:
    """1 / (curvature of G along its gradient) ``(*batch,)``, from the difference of two gradients: the first trial of a
    line search; 1 where that is no number.
    """
    _, grad = objective.value_and_grad(phi)
    # along anything where the gradient is zero: 0 / 0 would be NaN in the derivative of a path, masked or not
    direction = select(norm(grad) > 0, grad, torch.ones_like(grad))
    size = norm(direction)
    eps = torch.finfo(phi.dtype).eps ** 0.5 * (1 + norm(phi)) / size
    _, ahead = objective.value_and_grad(phi - eps.unsqueeze(-1) * direction)
    curvature = norm(select(all_finite(ahead), ahead, grad) - grad) / (eps * size)
    usable = curvature > 0
    step = 1 / torch.where(usable, curvature, 1)
    return torch.where(usable & (step > 0) & step.isfinite(), step, 1.0)
