"""The problem of iMAML with a regulariser that is learned together with its centre."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.composition import Composition, Loss, ModelLoss, composition_of
from bilevel.problem import require_functions_of
from bilevel.regularisation import Kind, described_layout
from bilevel.regularised_problem import RegularisedProblem
from bilevel.trees import Tree, flatten, how_to_tree, layout_of, tree_map


class LearnedProximalProblem(RegularisedProblem):
    """iMAML's problem with a learned regulariser.

    G = train_loss(phi) + 1/2 (phi - centre)^T Lambda (phi - centre), L = test_loss(phi).

    theta is ``{"centre": tree, "lam": raw}``. The centre, a tree like phi, is the start of the inner solve. ``raw`` is
    free and Lambda positive definite whatever it is: ``lam = exp(raw)``, or ``L D L^T`` for a matrix
    (:mod:`bilevel.regularisation`). :meth:`initial_theta` makes theta, :meth:`lam` reads lambda. The hypergradient is
    with respect to both together.

    Args:
        train_loss, test_loss: functions of (phi, data), of one task, that return 0-d tensors.
        kind: the form of Lambda: ``Scalar()``, ``PerLeaf()``, ``Diagonal()`` or ``Matrix()`` of
            :mod:`bilevel.regularisation`.

    Raises:
        TypeError: a loss is no function, or kind is no kind.
        ValueError: (at use) theta is not of the form above.
    """

    def __init__(self, train_loss: Callable[..., Tensor], test_loss: Callable[..., Tensor], kind: Kind) -> None:
        require_functions_of("phi", "data", train_loss=train_loss, test_loss=test_loss)
        if not isinstance(kind, Kind):
            hint = f" Did you mean {kind.__name__}()?" if isinstance(kind, type) else ""
            raise TypeError(f"kind: expected Scalar(), PerLeaf(), Diagonal() or Matrix(), got {kind!r}.{hint}")
        self.train_loss, self.test_loss, self.kind = train_loss, test_loss, kind

    @classmethod
    def from_losses(cls, train_loss: Loss, test_loss: Loss, kind: Kind, *, quadratic: bool = False) -> Self:
        """The problem from two functions of (phi, data): as the class, with ``quadratic``.

        Args:
            train_loss, test_loss, kind: as in :class:`LearnedProximalProblem`.
            quadratic: the training loss is quadratic in phi, and so G is: :attr:`BilevelProblem.quadratic`.

        Raises:
            TypeError: as in :class:`LearnedProximalProblem`.
        """
        problem = cls(train_loss, test_loss, kind)
        problem.quadratic = quadratic
        return problem

    @classmethod
    def from_model(  # type: ignore[override]  # another kind of problem, another signature
        cls, predict: Loss, output_loss: Loss, test_loss: Loss, kind: Kind, *, quadratic: bool = False
    ) -> Self:
        """The problem with train_loss(phi, data) = output_loss(predict(phi, data), data).

        This form allows :class:`bilevel.curvature.GaussNewton`.

        Args:
            predict: the outputs, a function of (phi, data): one tensor of any shape.
            output_loss: a function of (outputs, data), 0-d.
            test_loss, kind, quadratic: as in :meth:`from_losses`.

        Raises:
            TypeError: as in :class:`LearnedProximalProblem`.
        """
        require_functions_of("phi", "data", predict=predict, test_loss=test_loss)
        require_functions_of("outputs", "data", output_loss=output_loss)
        return cls.from_losses(ModelLoss(predict, output_loss), test_loss, kind, quadratic=quadratic)

    def initial_theta(self, centre: Tree, lam: Any = 1.0) -> dict[str, Tree]:
        """``{"centre": centre, "lam": raw}`` with the raw parameter that stands for ``lam``.

        Args:
            centre: a tree of float32 or float64 tensors. Not copied, so that an optimizer of theta moves a network's
                own parameters.
            lam: a positive number; or a tree like what :meth:`lam` returns, whose leaves may be numbers. For
                ``Matrix()`` also a diagonal, a tree like the centre.

        Returns:
            theta. The raw parameter requires grad if the centre does.

        Raises:
            TypeError, ValueError: centre or lam is not of this form, or lam is not positive (definite).
        """
        leaves, structure = flatten(centre)
        if not leaves:
            raise ValueError("centre: expected at least one tensor, got an empty tree.")
        for path, leaf in zip(structure.paths(), leaves, strict=True):
            if not isinstance(leaf, Tensor) or leaf.dtype not in (torch.float32, torch.float64):
                got = leaf.dtype if isinstance(leaf, Tensor) else f"{type(leaf).__name__}{how_to_tree(leaf)}"
                raise TypeError(f"centre{path}: expected a float32 or float64 tensor, got {got}.")
        raw = self.kind.initial(lam, layout_of(centre)[0], leaves[0].detach())
        learned = any(leaf.requires_grad for leaf in leaves)
        return {"centre": centre, "lam": tree_map(lambda leaf: leaf.clone().requires_grad_(learned), raw)}

    def lam(self, theta: Tree) -> Tree:
        """Lambda of theta, differentiable: a 0-d tensor, a tree of these or like the centre, or a ``(d, d)`` matrix."""
        return self.kind.lam(self._split(theta)[1])

    def inner_objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self.train_loss(phi, data) + self.regulariser(phi, theta)

    def outer_loss(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self.test_loss(phi, data)

    def initial_phi(self, theta: Tree, data: Any = None) -> Tree:
        return tree_map(torch.clone, self._split(theta)[0])

    def regulariser(self, phi: Tree, theta: Tree) -> Tensor:
        """1/2 (phi - centre)^T Lambda (phi - centre)."""
        centre, raw = self._split(theta)
        return self.kind.quadratic(raw, tree_map(torch.sub, phi, centre))

    def curvature_product(self, v: Tree, theta: Tree) -> Tree:
        return self.kind.product(self._split(theta)[1], v)

    def curvature_inverse(self, v: Tree, theta: Tree, damping: float = 0.0) -> Tree:
        return self.kind.inverse(self._split(theta)[1], v, damping)

    @property
    def composition(self) -> Composition | None:
        return composition_of(self.train_loss)

    def _split(self, theta: Tree) -> tuple[Tree, Tree]:
        """centre and raw."""
        advice = "problem.initial_theta(centre, lam=...) makes theta."
        if not isinstance(theta, dict) or set(theta) != {"centre", "lam"}:
            got = f"keys {list(theta)}" if isinstance(theta, dict) else type(theta).__name__
            raise ValueError(f'theta: expected {{"centre": tree, "lam": raw}}, got {got}. {advice}')
        wanted = self.kind.layout(layout_of(theta["centre"])[0])
        found, _ = layout_of(theta["lam"])
        if found.structure != wanted.structure:
            raise ValueError(
                f"theta['lam']: expected for {self.kind!r} {described_layout(wanted)}, got "
                f"{described_layout(found)}. {advice}"
            )
        for path, shape, own in zip(wanted.structure.paths(), wanted.shapes, found.shapes, strict=True):
            if own != shape:
                raise ValueError(
                    f"theta['lam']{path}: expected for {self.kind!r} shape {tuple(shape)}, got {tuple(own)}. {advice}"
                )
        return theta["centre"], theta["lam"]
