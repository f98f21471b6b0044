"""Does dG/dphi end at a kink of G beside phi? Then no step makes it small, and the theorem does not hold there."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.certificates.evaluation import Evaluation
from bilevel.linsys.base import dot, norm

DOUBLINGS = 20
"""Of a step, from 1e-3 / (largest eigenvalue) on, until it lies beyond the minimum along -dG/dphi. After so many it is a thousand times
as long as a quadratic with the largest eigenvalue would allow, and phi is far from any minimum."""

HALVINGS = 25
"""Of what lies around that minimum; less than 1e-7 of it is left, and smooth functions change by about as little there."""

AT_ONCE = 0.01
"""Within this part of 1 / (largest eigenvalue) a smooth G loses no more than this part of its slope: where it loses all of it, it has
kinks there, however many."""

HALF = 0.5
"""Or a single one takes at least this part of the slope, and phi has been hopping about it."""

TO_SPARE = 10
"""How far above rounding a jump must be."""


def kinks(here: Evaluation, largest: Tensor, asked: Tensor) -> Tensor:
    """Where it does ``(*batch,)``, of the tasks that are ``asked`` about. Some tens of gradients.

    ``largest``: the largest eigenvalue of the curvature at phi.
    """
    grad = here.local.grad
    square = dot(grad, grad)
    asked = asked & (largest > 0) & (square > 0)
    square, step = torch.where(asked, square, 1), torch.where(asked, largest, 1).reciprocal()

    def slope(t: Tensor) -> Tensor:
        """Of G along -dG/dphi, by that at phi, where it is -1."""
        return -dot(here.objective.gradient(here.phi - t.unsqueeze(-1) * grad), grad) / square

    near, far = torch.zeros_like(step), 1e-3 * step
    before, after = torch.full_like(step, -1), slope(far)
    for _ in range(DOUBLINGS):
        on = asked & ~(after > 0)
        if not bool(on.any()):
            break
        near, before = torch.where(on, far, near), torch.where(on, after, before)
        far = torch.where(on, 2 * far, far)
        after = torch.where(on, slope(far), after)
    found = asked & (after > 0)
    at_once = far <= AT_ONCE * step
    for _ in range(HALVINGS):
        if not bool(found.any()):
            return found
        middle = 0.5 * (near + far)
        value = slope(middle)
        beyond = value > 0
        near, before = torch.where(beyond, near, middle), torch.where(beyond, before, value)
        far, after = torch.where(beyond, middle, far), torch.where(beyond, value, after)
    rounding = torch.maximum(*here.rounding_estimate()[1]) / norm(grad)
    return found & (after - before > TO_SPARE * rounding) & (at_once | (-before >= HALF))
