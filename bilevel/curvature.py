"""What stands for the second derivative of the inner objective."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hessian:
    """The Hessian of G itself: the exact implicit gradient. Indefinite where G is not convex."""


@dataclass(frozen=True, kw_only=True)
class GaussNewton:
    """J^T H_out J for the part ``output_loss(predict(phi))`` of G, plus the exact Hessian of the regulariser.

    Positive semi-definite where ``output_loss`` is convex in the outputs, so CG cannot meet negative curvature; the
    implicit gradient is then biased by what is left out. (Schraudolph 2002; Martens 2010, section 4.2.) The problem
    must say what its model is: :meth:`bilevel.ProximalProblem.from_model`.
    """


Curvature = Hessian | GaussNewton


def check_curvature(curvature: object) -> None:
    """Refuse what is no instance of a curvature."""
    if not isinstance(curvature, Hessian | GaussNewton):
        raise TypeError(f"curvature: expected Hessian() or GaussNewton(), got {curvature!r}.")
