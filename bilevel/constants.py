"""What the user knows of a problem, for rigorous error bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is known of a problem, for rigorous error bounds (paper, Assumption 2). None: not known.

    Each is a number that holds for every task, or a tensor ``(tasks,)`` with one for each. A bound is as true as they
    are. *Between the points* means: on the line from phi, where the hypergradient is taken, to the exact inner
    solution. What holds everywhere holds there.

    Attributes:
        mu: at most the smallest eigenvalue of d2G/dphi2 at phi, > 0. For a proximal problem whose training loss is
            convex: lam.
        rho: Lipschitz constant, in phi, of d2G/dphi2 and of d2G/dphi dtheta between the points (without ``everywhere``:
            as far as ``2 |dG/dphi| / mu`` around phi). 0 where G is quadratic in (phi, theta).
        B: at least ``|dL/dphi|`` between the points. Not needed; may sharpen the bound of a proximal problem.
        L: Lipschitz constant, in phi, of the gradient of the outer loss (with respect to phi and theta) between the
            points.
        C: at least the spectral norm of d2G/dphi dtheta at phi. A proximal problem knows it: the largest eigenvalue of
            Lambda.
        everywhere: mu holds between the points too. The bound is then sharper and needs no condition.
    """

    mu: float | Tensor | None = None
    rho: float | Tensor | None = None
    B: float | Tensor | None = None
    L: float | Tensor | None = None
    C: float | Tensor | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real | Tensor):
                raise TypeError(f"Constants: {field.name}: expected a number, got {type(value).__name__} {value!r}.")
            numbers = torch.as_tensor(value)
            if not bool(
                ((numbers > 0) if field.name == "mu" else (numbers >= 0)).logical_and(numbers.isfinite()).all()
            ):
                wanted = "a positive number" if field.name == "mu" else "a number >= 0"
                raise ValueError(f"Constants: {field.name}: expected {wanted}, got {value!r}.")
