"""A proximal problem whose regulariser is learned together with its centre (paper, sections 2.2 and 6).

    G = train_loss(phi) + 1/2 (phi - centre)^T Lambda (phi - centre),        theta = {"centre": centre, "lam": raw}

raw is real and free, and Lambda is positive definite for every raw:

* one number for all, one for each leaf, or one for each entry: lam = exp(raw);
* a full matrix: Lambda = L D L^T with L unit lower triangular, the part of raw below its diagonal, and D = exp(diagonal of raw)
  (Pourahmadi 1999). What stands above the diagonal of raw is not used. With L = I it is the diagonal form.

Why the logarithm: a step of raw is a relative change of lam, so that one outer step size serves lam = 0.001 and lam = 100, and a
loss in other units only shifts raw. dF/draw = lam dF/dlam fades where lam is too small to matter beside the Hessian of the training loss.
Why L D L^T: products and inverses cost d^2, where a matrix exponential would cost d^3 in each evaluation of G, and the quadratic form
is a sum of squares, so that rounding cannot make it negative.

Where exp would leave the range in which lam, 1 / lam and their squares are finite (about 1e-17 to 1e17 in float32), it stays at the
end of that range, with derivative zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import exp, log
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.problem import (
    BilevelProblem,
    Composition,
    Loss,
    ModelLoss,
    composition_of,
    described,
    is_positive_definite,
    require_functions_of,
)
from bilevel.trees import LEAF, Layout, Tree, flatten, layout_of, tree_map, unflatten


class Kind(ABC):
    """The form of Lambda, and what is computed with it for one task. ``raw``: a tree of the layout that the kind asks for."""

    @abstractmethod
    def layout(self, centre: Layout) -> Layout:
        """Structure and shapes of raw, and of lambda as the user knows it, for this centre."""

    @abstractmethod
    def lam(self, raw: Tree) -> Tree:
        """Lambda as the user knows it."""

    @abstractmethod
    def initial(self, lam: Any, centre: Layout, like: Tensor) -> Tree:
        """The raw parameter with this lambda."""

    @abstractmethod
    def quadratic(self, raw: Tree, step: Tree) -> Tensor:
        """1/2 step^T Lambda step."""

    @abstractmethod
    def product(self, raw: Tree, v: Tree) -> Tree:
        """Lambda v."""

    @abstractmethod
    def inverse(self, raw: Tree, v: Tree, damping: float) -> Tree:
        """(Lambda + damping I)^{-1} v."""


class _Entrywise(Kind):
    """Lambda is diagonal: one number for each entry, which entries may share."""

    def lam(self, raw: Tree) -> Tree:
        return tree_map(_positive, raw)

    def initial(self, lam: Any, centre: Layout, like: Tensor) -> Tree:
        wanted = self.layout(centre)
        return unflatten(wanted.structure, [number.log() for number in _numbers(lam, wanted, like)])

    def quadratic(self, raw: Tree, step: Tree) -> Tensor:
        leaves, _ = flatten(step)
        terms = [  # a number outside the sum costs nothing
            lam * s.square().sum() if lam.ndim == 0 else (lam * s.square()).sum()
            for lam, s in zip(self._weights(raw, len(leaves)), leaves, strict=True)
        ]
        return 0.5 * (terms[0] if len(terms) == 1 else torch.stack(terms).sum())

    def product(self, raw: Tree, v: Tree) -> Tree:
        leaves, structure = flatten(v)
        weights = self._weights(raw, len(leaves))
        return unflatten(structure, [lam * x for lam, x in zip(weights, leaves, strict=True)])

    def inverse(self, raw: Tree, v: Tree, damping: float) -> Tree:
        leaves, structure = flatten(v)
        weights = self._weights(raw, len(leaves))
        return unflatten(structure, [x / (lam + damping) for lam, x in zip(weights, leaves, strict=True)])

    @staticmethod
    def _weights(raw: Tree, count: int) -> list[Tensor]:
        """lam for each leaf of phi: a number, or a tensor like the leaf."""
        weights = [_positive(leaf) for leaf in flatten(raw)[0]]
        return weights * count if len(weights) == 1 else weights


@dataclass(frozen=True, kw_only=True)
class Scalar(_Entrywise):
    """One lambda for all of phi: a 0-d tensor."""

    def layout(self, centre: Layout) -> Layout:
        return Layout(LEAF, (torch.Size(()),))


@dataclass(frozen=True, kw_only=True)
class PerLeaf(_Entrywise):
    """One lambda for each leaf of phi (each layer of a network): a tree like the centre of 0-d tensors."""

    def layout(self, centre: Layout) -> Layout:
        return Layout(centre.structure, (torch.Size(()),) * len(centre.shapes))


@dataclass(frozen=True, kw_only=True)
class Diagonal(_Entrywise):
    """One lambda for each entry of phi: a tree like the centre."""

    def layout(self, centre: Layout) -> Layout:
        return centre


@dataclass(frozen=True, kw_only=True)
class Matrix(Kind):
    """A symmetric positive definite matrix ``(d, d)`` in ravel order (leaves by sorted key). For d up to some thousands.

    Its preconditioner costs two triangular solves for each product, d^2; with damping a QR factorisation, d^3.
    """

    def layout(self, centre: Layout) -> Layout:
        d = sum(centre.sizes)
        return Layout(LEAF, (torch.Size((d, d)),))

    def lam(self, raw: Tree) -> Tree:
        lower, pivots = self._factors(raw)
        return (lower * pivots) @ lower.mT

    def initial(self, lam: Any, centre: Layout, like: Tensor) -> Tree:
        (size,) = self.layout(centre).shapes
        diagonal = centre.structure == LEAF and isinstance(lam, Tensor) and lam.shape == centre.shapes[0]
        if diagonal or not (isinstance(lam, Tensor) and lam.ndim == 2):
            return centre.ravel(_numbers(lam, centre, like)).log().diag_embed()
        if lam.shape != size:
            raise ValueError(
                f"lam: expected a number or a {tuple(size)} matrix for this centre, got {tuple(lam.shape)}."
            )
        if not lam.is_floating_point():
            raise TypeError(f"lam: expected a real floating matrix, got {lam.dtype}.")
        matrix = lam.detach().to(like)
        if not is_positive_definite(matrix):
            raise ValueError(f"lam: expected a symmetric positive definite matrix, got {described(matrix)}.")
        factor = torch.linalg.cholesky(matrix)
        roots = factor.diagonal()
        _check_range("lam, pivots", roots.square(), lam)
        return (factor / roots).tril(-1) + (2 * roots.log()).diag_embed()

    def quadratic(self, raw: Tree, step: Tree) -> Tensor:
        lower, pivots = self._factors(raw)
        layout, leaves = layout_of(step)
        return 0.5 * (pivots * (lower.mT @ layout.ravel(leaves)).square()).sum()

    def product(self, raw: Tree, v: Tree) -> Tree:
        lower, pivots = self._factors(raw)
        layout, leaves = layout_of(v)
        return layout.unravel(lower @ (pivots * (lower.mT @ layout.ravel(leaves))))

    def inverse(self, raw: Tree, v: Tree, damping: float) -> Tree:
        lower, pivots = self._factors(raw)
        layout, leaves = layout_of(v)
        upper = pivots.sqrt().unsqueeze(-1) * lower.mT  # upper^T upper = Lambda
        if damping:
            # R^T R = Lambda + damping I without forming it: this cannot fail, as Cholesky can where Lambda is ill-conditioned
            root = damping**0.5 * torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            upper = torch.linalg.qr(torch.cat([upper, root])).R
        x = torch.linalg.solve_triangular(upper.mT, layout.ravel(leaves).unsqueeze(-1), upper=False)
        return layout.unravel(torch.linalg.solve_triangular(upper, x, upper=True).squeeze(-1))

    @staticmethod
    def _factors(raw: Tensor) -> tuple[Tensor, Tensor]:
        """L and the diagonal of D."""
        eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
        return raw.tril(-1) + eye, _positive(raw.diagonal(dim1=-2, dim2=-1))


class LearnedProximalProblem(BilevelProblem):
    """iMAML's problem with a learned regulariser: G = train_loss(phi) + 1/2 (phi - centre)^T Lambda (phi - centre), L = test_loss(phi).

    theta is ``{"centre": tree, "lam": raw}``. The centre, a tree like phi, is the start of the inner solve. ``raw`` is free and
    Lambda positive definite whatever it is: ``lam = exp(raw)``, or ``L D L^T`` for a matrix (:mod:`bilevel.regularisation`).
    :meth:`initial_theta` makes theta, :meth:`lam` reads lambda. The hypergradient is with respect to both together.

    Args:
        train_loss, test_loss: functions of (phi, data), of one task, that return 0-d tensors.
        kind: the form of Lambda: ``Scalar()``, ``PerLeaf()``, ``Diagonal()`` or ``Matrix()`` of :mod:`bilevel.regularisation`.

    Raises:
        TypeError: a loss is no function, or kind is no kind.
        ValueError: (at use) theta is not of the form above.
    """

    knows_curvature = True

    def __init__(self, train_loss: Loss, test_loss: Loss, kind: Kind) -> None:
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
            centre: a tree of float32 or float64 tensors. Not copied, so that an optimizer of theta moves a network's own parameters.
            lam: a positive number; or a tree like what :meth:`lam` returns, whose leaves may be numbers. For ``Matrix()`` also a
                diagonal, a tree like the centre.

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
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"centre{path}: expected a float32 or float64 tensor, got {got}.")
        raw = self.kind.initial(lam, layout_of(centre)[0], leaves[0].detach())
        learned = any(leaf.requires_grad for leaf in leaves)
        return {"centre": centre, "lam": tree_map(lambda leaf: leaf.clone().requires_grad_(learned), raw)}

    def lam(self, theta: Tree) -> Tree:
        """Lambda of one theta, differentiable: a 0-d tensor, a tree of these, a tree like the centre, or a ``(d, d)`` matrix."""
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
                f"theta['lam']: expected for {self.kind!r} {_described(wanted)}, got {_described(found)}. {advice}"
            )
        for path, shape, own in zip(wanted.structure.paths(), wanted.shapes, found.shapes, strict=True):
            if own != shape:
                raise ValueError(
                    f"theta['lam']{path}: expected for {self.kind!r} shape {tuple(shape)}, got {tuple(own)}. {advice}"
                )
        return theta["centre"], theta["lam"]


def _limit(dtype: torch.dtype) -> float:
    """The largest |raw| that counts: lam, 1 / lam and their squares are finite, with room for the sums that they enter."""
    return 0.45 * log(torch.finfo(dtype).max)


def _positive(raw: Tensor) -> Tensor:
    limit = _limit(raw.dtype)
    return raw.clamp(-limit, limit).exp()


def _numbers(lam: Any, wanted: Layout, like: Tensor) -> list[Tensor]:
    """lam as positive tensors of these shapes, in ravel order; a number stands for a whole leaf, or for all."""
    leaves, structure = flatten(lam)
    if structure == LEAF and not (isinstance(lam, Tensor) and lam.ndim):
        leaves, structure = leaves * len(wanted.shapes), wanted.structure
    if structure != wanted.structure:
        raise ValueError(f"lam: expected a number or {_described(wanted)}, got {_described(Layout(structure, ()))}.")
    numbers = []
    for path, leaf, shape in zip(structure.paths(), leaves, wanted.shapes, strict=True):
        if isinstance(leaf, bool) or not (
            leaf.is_floating_point() if isinstance(leaf, Tensor) else isinstance(leaf, Real)
        ):
            raise TypeError(
                f"lam{path}: expected positive numbers or real floating tensors, got {type(leaf).__name__} {leaf!r}."
            )
        number = torch.as_tensor(leaf, dtype=like.dtype, device=like.device).detach()
        if number.ndim and number.shape != shape:
            raise ValueError(f"lam{path}: expected a number or shape {tuple(shape)}, got {tuple(number.shape)}.")
        _check_range(f"lam{path}", number, leaf)
        numbers.append(number.expand(shape))
    return numbers


def _check_range(name: str, number: Tensor, given: Any) -> None:
    low, high = exp(-_limit(number.dtype)), exp(_limit(number.dtype))
    if not bool(((number >= low) & (number <= high)).all()):
        raise ValueError(
            f"{name}: expected positive numbers, {low:.0e} to {high:.0e} for {number.dtype}, got {given!r}."
        )


def _described(layout: Layout) -> str:
    return "one tensor" if layout.structure == LEAF else f"a tree with leaves {layout.structure.paths()}"
