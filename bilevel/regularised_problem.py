"""What the proximal problems share: a regulariser whose curvature is known."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from bilevel.problem import BilevelProblem
from bilevel.trees import Tree


class RegularisedProblem(BilevelProblem):
    """A problem whose regulariser has a known curvature, and what a subclass with another regulariser makes of that.

    The base of the proximal problems.
    """

    _knows_curvature: bool | None = None

    @abstractmethod
    def regulariser(self, phi: Tree, theta: Tree) -> Tensor:
        """The part of G whose Hessian ``curvature_product`` and ``curvature_inverse`` know, 0-d."""

    @property
    def knows_curvature(self) -> bool:
        """Not where a subclass has another regulariser and does not tell the curvature of that; unless it says so itself."""
        if self._knows_curvature is not None:
            return self._knows_curvature
        products = self._definer("curvature_product"), self._definer("curvature_inverse")
        return max(products) <= self._definer("regulariser")

    @knows_curvature.setter
    def knows_curvature(self, knows: bool) -> None:
        self._knows_curvature = knows

    @property
    def _curvature_is_missing(self) -> bool:  # type: ignore[override]  # as above
        by_rule = self._knows_curvature is None and type(self).knows_curvature is RegularisedProblem.knows_curvature
        return by_rule and not self.knows_curvature

    def _is_own(self, base: type, *names: str) -> bool:
        """Whether these are the methods, or properties, of ``base``."""
        return all(self._definer(name) == 1 + type(self).__mro__.index(base) for name in names)
