"""The problem of iMAML: a training loss and a quadratic form that keeps phi near theta."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bilevel.composition import Composition, Loss, ModelLoss, composition_of
from bilevel.problem import Split, require_functions_of, require_own
from bilevel.regularised_problem import RegularisedProblem
from bilevel.trees import Tree, tree_map
from bilevel.weights import Weights


class ProximalProblem(RegularisedProblem):
    """The problem of iMAML (Eqs. 3 and 4).

    G = train_loss(phi) + 1/2 (phi - theta)^T Lambda (phi - theta), L = test_loss(phi).

    theta is the proximal centre and the start of the inner solve; phi has the structure and shapes of theta.

    Args:
        lam: Lambda. A positive number or 0-d tensor; a tree of these like theta (one per leaf); a tree of tensors like
            theta (diagonal); or a symmetric positive definite matrix ``(d, d)`` in ravel order (leaves by sorted key).

    Raises:
        TypeError: lam is no number or floating tensor, or requires grad.
        ValueError: lam is not positive (definite), or (at use) does not match theta.
    """

    def __init__(self, lam: Any) -> None:
        self._weights = Weights(lam)

    @property
    def lam(self) -> Any:
        """Lambda as it was given: a float, a tree of floats and tensors, or a tensor. To change it, make a new problem."""
        return self._weights.lam

    @lam.setter
    def lam(self, lam: Any) -> None:
        raise AttributeError(
            f"lam: {type(self).__name__} takes it once, by super().__init__(lam); for another one make a new problem, or learn it with "
            "LearnedProximalProblem."
        )

    def train_loss(self, phi: Tree, data: Any) -> Tensor:
        """The training loss of one task, a 0-d tensor. A subclass defines this method, or the property ``composition``
        (whose functions must then leave theta alone: they get None here).
        """
        if self.composition is None:
            raise NotImplementedError(f"{type(self).__name__} must define train_loss(phi, data).")
        return self.composition.objective(phi, None, data)

    @abstractmethod
    def test_loss(self, phi: Tree, data: Any) -> Tensor:
        """The test loss of one task, a 0-d tensor."""

    def inner_objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self.train_loss(phi, data) + self.regulariser(phi, theta)

    @property
    def split(self) -> Split | None:
        if not self._is_own(ProximalProblem, "inner_objective", "regulariser"):
            return None  # a subclass has another G
        return Split(lambda phi, theta, data: self.train_loss(phi, data), lambda theta: theta)

    def outer_loss(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self.test_loss(phi, data)

    def initial_phi(self, theta: Tree, data: Any = None) -> Tree:
        return tree_map(torch.clone, theta)

    def regulariser(self, phi: Tree, theta: Tree) -> Tensor:
        """1/2 (phi - theta)^T Lambda (phi - theta), 0-d."""
        return self._weights.quadratic(tree_map(torch.sub, phi, theta))

    @property
    def constant_cross_norm(self) -> float | None:
        """The largest eigenvalue of Lambda: the cross derivative is -Lambda, where G is that of this class."""
        return self._weights.largest if self._is_own(ProximalProblem, "inner_objective", "regulariser") else None

    @property
    def curvature_scale(self) -> float | None:  # type: ignore[override]  # lam decides
        lam = self._weights.lam
        own = self._is_own(ProximalProblem, "regulariser", "curvature_product", "curvature_inverse")
        return lam if own and isinstance(lam, float) else None

    def curvature_product(self, v: Tree, theta: Tree = None) -> Tree:
        return self._weights.product(v)

    def curvature_inverse(self, v: Tree, theta: Tree = None, damping: float = 0.0) -> Tree:
        return self._weights.inverse(v, damping)

    @classmethod
    def from_losses(cls, train_loss: Loss, test_loss: Loss, lam: Any, *, quadratic: bool = False) -> ProximalProblem:
        """A proximal problem from two functions of (phi, data).

        Args:
            train_loss, test_loss: of one task, 0-d.
            lam: Lambda, as in :class:`ProximalProblem`.
            quadratic: the training loss is quadratic in phi, and so G is: :attr:`BilevelProblem.quadratic`.

        Raises:
            TypeError, ValueError: a loss is no function of (phi, data), or lam as in :class:`ProximalProblem`; or
                (TypeError) this is called of a subclass, whose methods it would leave out.
        """
        require_own(cls, ProximalProblem, "from_losses")
        require_functions_of("phi", "data", train_loss=train_loss, test_loss=test_loss)
        problem = _LossesProblem(train_loss, test_loss, lam)
        problem.quadratic = quadratic
        return problem

    @classmethod
    def from_model(  # type: ignore[override]  # another kind of problem, another signature
        cls, predict: Loss, output_loss: Loss, test_loss: Loss, lam: Any, *, quadratic: bool = False
    ) -> ProximalProblem:
        """A proximal problem with train_loss(phi, data) = output_loss(predict(phi, data), data).

        This form allows :class:`bilevel.curvature.GaussNewton`.

        Args:
            predict: the outputs, a function of (phi, data): one tensor of any shape.
            output_loss: a function of (outputs, data), 0-d.
            test_loss: a function of (phi, data), 0-d.
            lam, quadratic: as in :meth:`from_losses`.

        Raises:
            TypeError, ValueError: as in :meth:`from_losses`.
        """
        require_own(cls, ProximalProblem, "from_model")
        require_functions_of("phi", "data", predict=predict, test_loss=test_loss)
        require_functions_of("outputs", "data", output_loss=output_loss)
        return cls.from_losses(ModelLoss(predict, output_loss), test_loss, lam, quadratic=quadratic)


class _LossesProblem(ProximalProblem):
    def __init__(self, train_loss: Loss, test_loss: Loss, lam: Any) -> None:
        super().__init__(lam)
        self._train_loss, self._test_loss = train_loss, test_loss

    @property
    def composition(self) -> Composition | None:
        return composition_of(self._train_loss)

    def train_loss(self, phi: Tree, data: Any) -> Tensor:
        return self._train_loss(phi, data)

    def test_loss(self, phi: Tree, data: Any) -> Tensor:
        return self._test_loss(phi, data)
