"""A proximal problem whose regulariser is learned together with its centre (paper, sections 2.2 and 6).

    G = train_loss(phi) + 1/2 (phi - centre)^T Lambda (phi - centre),        theta = {"centre": centre, "lam": raw}

raw is real and free, and Lambda is positive definite for every raw:

* one number for all, one for each leaf, or one for each entry: lam = exp(raw);
* a full matrix: Lambda = L D L^T with L unit lower triangular, the part of raw below its diagonal, and D = exp(diagonal
  of raw) (Pourahmadi 1999). What stands above the diagonal of raw is not used. With L = I it is the diagonal form.

Why the logarithm: a step of raw is a relative change of lam, so that one outer step size serves lam = 0.001 and
lam = 100, and a loss in other units only shifts raw. dF/draw = lam dF/dlam fades where lam is too small to matter
beside the Hessian of the training loss.
Why L D L^T: products and inverses cost d^2, where a matrix exponential would cost d^3 in each evaluation of G, and the
quadratic form is a sum of squares, so that rounding cannot make it negative.

Where exp would leave the range in which lam, 1 / lam and their squares are finite (about 1e-17 to 1e17 in float32), it
stays at the end of that range, with derivative zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import exp, log
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bilevel import weights
from bilevel.trees import LEAF, Layout, Tree, flatten, layout_of, tree_map, unflatten
from bilevel.weights import described, is_positive_definite


class Kind(ABC):
    """The form of Lambda, and what is computed with it for one task. ``raw``: a tree of the kind's own layout."""

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
        return weights.quadratic(self._weights(raw, step), step)

    def product(self, raw: Tree, v: Tree) -> Tree:
        return weights.product(self._weights(raw, v), v)

    def inverse(self, raw: Tree, v: Tree, damping: float) -> Tree:
        return weights.inverse(self._weights(raw, v), v, damping)

    @staticmethod
    def _weights(raw: Tree, v: Tree) -> list[Tensor]:
        """lam for each leaf of v: a number, or a tensor like the leaf."""
        numbers = [_positive(leaf) for leaf in flatten(raw)[0]]
        return numbers * len(flatten(v)[0]) if len(numbers) == 1 else numbers


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
    """A symmetric positive definite matrix ``(d, d)`` in ravel order (leaves by sorted key). For d up to thousands.

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
            # R^T R = Lambda + damping I without forming it: Cholesky fails where Lambda is ill-conditioned, QR not
            root = damping**0.5 * torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            upper = torch.linalg.qr(torch.cat([upper, root])).R
        x = torch.linalg.solve_triangular(upper.mT, layout.ravel(leaves).unsqueeze(-1), upper=False)
        return layout.unravel(torch.linalg.solve_triangular(upper, x, upper=True).squeeze(-1))

    @staticmethod
    def _factors(raw: Tensor) -> tuple[Tensor, Tensor]:
        """L and the diagonal of D."""
        eye = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
        return raw.tril(-1) + eye, _positive(raw.diagonal(dim1=-2, dim2=-1))


def _limit(dtype: torch.dtype) -> float:
    """The largest |raw| that counts: lam, 1 / lam and their squares are finite, with room for sums of them."""
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
        raise ValueError(
            f"lam: expected a number or {described_layout(wanted)}, got {described_layout(Layout(structure, ()))}."
        )
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


def described_layout(layout: Layout) -> str:
    """For a message."""
    return "one tensor" if layout.structure == LEAF else f"a tree with leaves {layout.structure.paths()}"
