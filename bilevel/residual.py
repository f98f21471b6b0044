"""Conditions that are no gradients, F(phi) = 0 and phi = T(phi): their values and derivatives, beside those of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.curvature import Curvature
from bilevel.derivatives import (
    Flat,
    Levels,
    Objective,
    backward_product,
    over_levels,
    refuse_captured,
    refuse_writes,
    with_axis,
)
from bilevel.derivatives.guards import refuse_moves, versions
from bilevel.linsys.base import all_finite
from bilevel.problem import BilevelProblem
from bilevel.trees import Structure, Tree, flatten


class Condition(BilevelProblem):
    """A user's function of (phi, theta, data) in the place of a problem: it has no objective."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def __call__(self, phi: Tree, theta: Tree, data: Any = None) -> Tree:
        """As the user wrote it: what a black box is handed."""
        return self.fn(phi, theta, data)

    def inner_objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        raise NotImplementedError

    def outer_loss(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        raise NotImplementedError

    def initial_phi(self, theta: Tree, data: Any = None) -> Tree:
        raise ValueError("init: expected a start, a tree like phi, got None.")


class RootFlat(Flat):
    """F = 0."""

    symmetric: ClassVar[bool] = False
    source: ClassVar[str] = "F"

    def condition(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """What is to be zero ``(d,)``."""
        return self.zero(phi, self.given(phi, *tensors))

    def zero(self, phi: Tensor, given: Tensor) -> Tensor:
        """The condition, from the value of the user's function; vectors with any batch axes."""
        return given

    def given(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """The user's function ``(d,)``."""
        assert isinstance(self.problem, Condition)
        try:
            value = self.problem(self.phi.unravel(phi), *self.trees(tensors))
        except Exception as error:
            self._locate(error, self.source, tensors)
            raise
        leaves, structure = flatten(value)
        if structure != self.phi.structure:
            raise ValueError(
                f"{self.source}: expected a tree like phi, {_named(self.phi.structure)}, got {_named(structure)}."
            )
        for path, leaf, shape in zip(structure.paths(), leaves, self.phi.shapes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape or leaf.dtype != phi.dtype:
                got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"{self.source}{path}: expected {phi.dtype} {tuple(shape)} like phi, got {got}.")
        return self.phi.ravel(leaves)

    def probe(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """F itself."""
        return self.condition(phi, *tensors)


def _named(structure: Structure) -> str:
    if structure.kind is None:
        return "a tensor"
    return f"a {structure.kind.__name__} with leaves {structure.paths()}"


class FixedPointFlat(RootFlat):
    """phi - T(phi) = 0."""

    source: ClassVar[str] = "T"

    def zero(self, phi: Tensor, given: Tensor) -> Tensor:
        """phi - T."""
        return phi - given


class Residual(Objective):
    """F over a batch at base level. To a solver it looks like an objective |F|^2 / 2 whose "gradient" is F: what it drives to zero."""

    def __init__(self, flat: Flat, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> None:
        super().__init__(flat, levels, tensors, sizes)
        assert isinstance(flat, RootFlat)
        self._zero, self._given = flat.zero, over_levels(flat.given, with_axis(levels))
        self.is_displacement = isinstance(flat, FixedPointFlat)

    def value(self, phi: Tensor) -> Tensor:
        """|F|^2 / 2 ``(*batch,)``."""
        return self.value_and_grad(phi)[0]

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """|F|^2 / 2 ``(*batch,)`` and F ``(*batch, d)``."""
        self.num_grads += 1
        before = versions([phi])
        if not self._checked:
            with torch.enable_grad():
                point = phi.detach().requires_grad_()
                given = self._given(point, *self.tensors)
                self._check(given, [point])
            residual = self._zero(point, given).detach()
        else:
            with torch.no_grad():
                residual = self._zero(phi.detach(), self._given(phi.detach(), *self.tensors))
        refuse_moves(before, phi, self.flat.source)
        return _half_square(residual), residual

    def linearise(  # type: ignore[override]  # what a solver of equations needs of it
        self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False
    ) -> ResidualLinearisation:
        """Products with the derivative of F and its transpose, on one graph."""
        self.num_grads += 1
        return ResidualLinearisation(self, phi)

    def curvature_inverse(self, damping: float) -> None:
        """Nothing is known."""

    def _check(self, value: Tensor, inputs: Sequence[Tensor]) -> None:
        if self._checked:
            return
        if not value.requires_grad:
            raise ValueError(
                f"{self.flat.source}: expected a function of phi, but the graph shows no dependence on it. Was phi detached, or the "
                "function evaluated without a graph (torch.no_grad)?"
            )
        refuse_captured(value, inputs, self.flat.source)
        refuse_writes(self._versions, self.tensors, self.flat.source)
        self._checked = True


class ResidualLinearisation:
    """F to first order at one point. The graph lives as long as this object.

    Attributes:
        value: |F|^2 / 2 ``(*batch,)``.
        grad: F ``(*batch, d)``.
    """

    def __init__(self, residual: Residual, phi: Tensor) -> None:
        self._residual = residual
        with torch.enable_grad():
            self._phi = phi.detach().requires_grad_()
            before = versions([phi])
            given = residual._given(self._phi, *residual.tensors)
            refuse_moves(before, phi, residual.flat.source)
            residual._check(given, [self._phi])
            self._value = residual._zero(self._phi, given)
            # A v is the derivative of w -> A^T w, which is linear: right for every operator that has a double backward
            self._w = torch.zeros_like(self._value, requires_grad=True)
            self._pull = (
                torch.autograd.grad(self._value, self._phi, self._w, create_graph=True, allow_unused=True)[0]
                if self._value.requires_grad
                else None
            )
        self.grad = self._value.detach()
        self.value = _half_square(self.grad)

    def matvec(self, v: Tensor) -> Tensor:
        """A v for v ``(*batch, d)`` or ``(k, *batch, d)``."""
        self._residual.num_matvecs += 1
        return torch.zeros_like(v) if self._pull is None else backward_product(self._pull, self._w, v)

    def transposed_matvec(self, v: Tensor) -> Tensor:
        """A^T v."""
        self._residual.num_matvecs += 1
        return backward_product(self._value, self._phi, v)


def _half_square(residual: Tensor) -> Tensor:
    """|F|^2 / 2 ``(*batch,)``; the largest number where only the square is too large to be one."""
    value = 0.5 * torch.linalg.vecdot(residual, residual)
    return torch.where(value.isinf() & all_finite(residual), torch.finfo(value.dtype).max, value)
