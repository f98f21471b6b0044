"""What stands for the second derivative of the inner objective."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.checks import check_number, keep_python_numbers

__all__ = [
    "Curvature",
    "FiniteDifference",
    "ForwardOverReverse",
    "GaussNewton",
    "Hessian",
    "HessianProduct",
    "ReverseOverReverse",
]


@dataclass(frozen=True, kw_only=True)
class ReverseOverReverse:
    """A Hessian product as a backward pass through the gradient, on one retained graph (Pearlmutter 1994)."""


@dataclass(frozen=True, kw_only=True)
class ForwardOverReverse:
    """A Hessian product as the directional derivative of the gradient: no graph is kept, each product costs a new gradient and more."""


@dataclass(frozen=True, kw_only=True)
class FiniteDifference:
    """A Hessian product as a central difference of two gradients, for operators that have first derivatives only.

    Its relative error is about 1e-10 in float64 and 1e-4 in float32, so no rigorous bound is given with it.

    Args:
        step: length of the step relative to ``1 + |phi|``, > 0; None: the cube root of the machine epsilon, or what is shorter where
            the first product at a point shows that G curves over shorter lengths (two gradients more for each point). One length serves
            all directions: measure variables of very different size in units of their own. The log warns where no step gives one digit.
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None:
            check_number("step", self.step, positive=True)
        keep_python_numbers(self)


HessianProduct = ReverseOverReverse | ForwardOverReverse | FiniteDifference


@dataclass(frozen=True, kw_only=True)
class Hessian:
    """The Hessian of G itself: the exact implicit gradient. Indefinite where G is not convex.

    Args:
        product: how a product with it is taken. Where an operator of the problem lacks what that needs (attention and recurrent
            layers do), the next of ReverseOverReverse, ForwardOverReverse, FiniteDifference is taken, and the log says so. With
            ``quadratic=True`` it is that of the check at the solution; the matrix in between is made with the first that works.
    """

    product: HessianProduct = ReverseOverReverse()

    def __post_init__(self) -> None:
        if not isinstance(self.product, HessianProduct):
            raise TypeError(
                "product: expected ReverseOverReverse(), ForwardOverReverse() or FiniteDifference(), got "
                f"{self.product!r}."
            )


@dataclass(frozen=True, kw_only=True)
class GaussNewton:
    """J^T H_out J for the part ``output_loss(predict(phi))`` of G, plus the exact Hessian of the regulariser, or of the penalty.

    Positive semi-definite where ``output_loss`` (and the penalty) is convex, so CG cannot meet negative curvature; the
    implicit gradient is then biased by what is left out. (Schraudolph 2002; Martens 2010, section 4.2.) The problem
    must say what its model is: ``from_model`` of :class:`bilevel.BilevelProblem`, :class:`bilevel.ProximalProblem` or
    :class:`bilevel.LearnedProximalProblem`.
    """


Curvature = Hessian | GaussNewton


def check_curvature(curvature: object) -> None:
    """Refuse what is no instance of a curvature."""
    if not isinstance(curvature, Hessian | GaussNewton):
        raise TypeError(f"curvature: expected Hessian() or GaussNewton(), got {curvature!r}.")
