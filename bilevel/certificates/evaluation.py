"""A problem evaluated at a point, for the questions of :mod:`bilevel.certificates`, and what rounding may hide there.

A residual that is computed as zero is not zero. Each measured quantity gets what rounding may hide in it: eps, times 8
times the root of how many numbers may have been summed (of phi, theta and data), times the size of what was subtracted
to get it. For a gradient that is the size of its terms; in a sum of smooth terms >= 0 it is at most sqrt(2 |H| G). This
models what happens inside of the user's functions, which nothing here can see; it matters only within some orders of
the rounding floor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.curvature import Curvature
from bilevel.derivatives import Objective
from bilevel.entry import Call
from bilevel.linsys.base import norm, some_direction
from bilevel.linsys.lanczos import ritz_values, spread

TO_SPARE = 8
"""What the model of rounding is multiplied by. The root of the count is for one sum whose errors partly cancel, and
the user's functions do several in a row. A larger number makes every bound near the rounding floor larger, a
smaller one may make it false. With this one, none of the 10,000 bounds of docs/results/certificates.md was
violated."""

BESIDE = 4
"""How many eps (relative) away an estimate of rounding looks: near enough that the function is linear in between,
and far enough that every number is rounded anew."""

SAMPLE = 4
"""What a single sample of rounding is multiplied by: it may be a small one by chance."""

SIZE_STEPS = 8
"""Products for |H|. Lanczos finds the largest eigenvalue first, but from below; the factor of 2 that is added makes
up for what is missing after so few."""


class Rounding(NamedTuple):
    """What rounding may hide in a residual ``(*batch,)``.

    Attributes:
        shown: as two evaluations right beside each other show it. Chance may make it too small, or zero.
        possible: what the model says at least. Far too much where phi is long along small eigenvalues: a residual below
            it may still be an error of the gradient of many per cent.
    """

    shown: Tensor
    possible: Tensor


class Evaluation:
    """First and second derivatives at one point, and the gradient that a given u leads to."""

    def __init__(
        self,
        call: Call,
        objective: Objective,
        phi: Tensor,
        curvature: Curvature,
        damping: float,
        outer_chunk_size: int | None,
    ) -> None:
        assert call.u is not None
        self.call, self.objective, self.phi, self.u = call, objective, phi, call.u
        self.curvature, self.damping, self.outer_chunk_size = curvature, damping, outer_chunk_size
        self.local = objective.linearise(phi, curvature, damping, with_theta=True)
        self.outer, self.b, self.direct = call.outer_gradient(phi, outer_chunk_size)

    def at(self, phi: Tensor) -> Evaluation:
        """The same elsewhere; the work is counted together."""
        return Evaluation(self.call, self.objective, phi, self.curvature, self.damping, self.outer_chunk_size)

    def undamped(self, v: Tensor) -> Tensor:
        """The curvature times v, without what was added to it."""
        return self.local.matvec(v) - self.damping * v

    def vector(self, leaves: list[Tensor | None]) -> Tensor:
        """Leaves like those of theta, zero for None, as vectors ``(*batch, dim theta)``."""
        pairs = zip(self.objective.theta_per_task(), leaves, strict=True)
        full = [torch.zeros_like(like) if leaf is None else leaf for like, leaf in pairs]
        return torch.cat([leaf.detach().reshape(*self.call.sizes, -1) for leaf in full], -1)

    def gradient(self, u: Tensor) -> Tensor:
        """dL/dtheta - C^T u, as vectors ``(*batch, dim theta)``."""
        return self.vector(self.direct) - self.vector(self.local.cross(u, keep=True))

    @cached_property
    def eps(self) -> float:
        """The rounding error of a sum, relative to the size of its terms."""
        (flags,) = self.call.levels or ((False,) * len(self.call.tensors),)
        shapes = [tensor.shape[flag:] for tensor, flag in zip(self.call.tensors, flags, strict=True)]
        numbers = self.phi.shape[-1] + sum(shape.numel() for shape in shapes)
        return TO_SPARE * numbers**0.5 * torch.finfo(self.phi.dtype).eps

    def rounding_bound(self) -> tuple[Tensor, Tensor]:
        """What rounding may hide in ``|b - H u|`` and in ``|dG/dphi|``, by the model at the top of this module."""
        ritz, _ = ritz_values(self.local.matvec, spread(self.b), SIZE_STEPS)
        size = 2 * ritz.abs().amax(-1)  # of H
        terms = (2 * size * self.local.value.abs()).sqrt()
        return self.eps * (size * norm(self.u) + norm(self.b)), self.eps * (size * norm(self.phi) + terms)

    def rounding_estimate(self) -> tuple[Rounding, Rounding]:
        """The same as it shows itself in products and gradients right beside u and phi, for an estimate: the model is
        one of the worst case, counts all numbers of the data, and takes all of phi to lie along the largest
        eigenvalue.
        """
        unit = torch.finfo(self.phi.dtype).eps
        signs = torch.where(some_direction(self.phi) < 0, -1.0, 1.0).to(self.phi)

        def noise(at: Tensor, here: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
            beside = at + BESIDE * unit * signs * at
            return SAMPLE * norm(function(beside) - here - self.undamped(beside - at))

        noise_r = noise(self.u, self.undamped(self.u), self.undamped)
        noise_slope = noise(self.phi, self.local.grad, self.objective.gradient)
        least = TO_SPARE * unit / self.eps  # of the model: what it says of a sum of a single number
        bound_r, bound_slope = self.rounding_bound()
        return (
            Rounding(torch.minimum(bound_r, noise_r), least * bound_r),
            Rounding(torch.minimum(bound_slope, noise_slope), least * bound_slope),
        )
