"""The user's functions of one task, of one vector phi and a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.curvature import HessianProduct
from bilevel.isolation import locate
from bilevel.problem import BilevelProblem
from bilevel.trees import Layout, Structure, Tree, flatten, unflatten


@dataclass(frozen=True)
class Flat:
    """G and L of *one* task as functions of ``(phi, *tensors)``: phi ``(d,)``, tensors the leaves of theta, then
    those of data.
    """

    problem: BilevelProblem
    phi: Layout
    theta: Structure
    data: Structure
    data_static: tuple[Any, ...]  # the leaves of data, TENSOR in the place of each tensor
    fallen: dict[Any, HessianProduct] = field(default_factory=dict, compare=False, repr=False)
    """In this call, what stands for products that an operator of the problem does not allow."""

    symmetric: ClassVar[bool] = True  # the derivative of the condition in phi
    source: ClassVar[str] = "inner_objective"  # what the user calls the function behind the condition

    def condition(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """What is zero at the solution ``(d,)``: dG/dphi."""
        return torch.func.grad(self.inner)(phi, *tensors)

    def probe(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """Any number that carries whatever the condition depends on."""
        return self.inner(phi, *tensors)

    @property
    def said(self) -> set[str]:
        """What the log has been told of this problem."""
        return self.problem.__dict__.setdefault("_said", set())

    @cached_property
    def num_theta(self) -> int:
        """The number of leaves of theta."""
        return len(self.theta.paths())

    def trees(self, tensors: Sequence[Tensor]) -> tuple[Tree, Any]:
        """theta and data as the user knows them."""
        rest = iter(tensors[self.num_theta :])
        data = [next(rest) if leaf is TENSOR else leaf for leaf in self.data_static]
        return unflatten(self.theta, tensors[: self.num_theta]), unflatten(self.data, data)

    def inner(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """G, 0-d."""
        try:
            value = self.problem.inner_objective(self.phi.unravel(phi), *self.trees(tensors))
        except Exception as error:
            self._locate(error, "inner_objective", tensors)
            raise
        return _scalar(value, "inner_objective", phi)

    def outer(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """L, 0-d."""
        try:
            value = self.problem.outer_loss(self.phi.unravel(phi), *self.trees(tensors))
        except Exception as error:
            self._locate(error, "outer_loss", tensors)
            raise
        return _scalar(value, "outer_loss", phi)

    def remainder(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """G without the quadratic part that the problem splits off, 0-d."""
        if self.problem.split is None:
            return self.inner(phi, *tensors)
        remainder, _ = self.problem.split
        try:
            value = remainder(self.phi.unravel(phi), *self.trees(tensors))
        except Exception as error:
            self._locate(error, "inner_objective", tensors)
            raise
        return _scalar(value, "inner_objective", phi)

    def centre(self, *tensors: Tensor) -> Tensor:
        """Where the quadratic part is smallest ``(d,)``."""
        assert self.problem.split is not None
        _, centre = self.problem.split
        leaves, structure = flatten(centre(self.trees(tensors)[0]))
        layout = Layout(structure, tuple(leaf.shape for leaf in leaves))
        if layout != self.phi:
            raise ValueError(
                f"phi: expected a tree like the centre of the regulariser with leaves {_leaves(layout)}, got {_leaves(self.phi)}."
            )
        return self.phi.ravel(leaves)

    def slope(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """The gradient of the quadratic part ``(d,)``."""
        return self.curvature_product(phi - self.centre(*tensors), *tensors[: self.num_theta])

    def predict(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """The model's outputs, any shape."""
        assert self.problem.composition is not None
        outputs = self.problem.composition.predict(self.phi.unravel(phi), *self.trees(tensors))
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"predict: expected one tensor, got {type(outputs).__name__}. GaussNewton() needs a single "
                f"tensor of outputs."
            )
        return outputs

    def output_loss(self, outputs: Tensor, *tensors: Tensor) -> Tensor:
        """The training loss as a function of the outputs, 0-d."""
        assert self.problem.composition is not None
        return _scalar(self.problem.composition.output_loss(outputs, *self.trees(tensors)), "output_loss", outputs)

    def penalty(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """What G has beside the loss of the outputs, 0-d."""
        assert self.problem.composition is not None and self.problem.composition.penalty is not None
        return _scalar(self.problem.composition.penalty(self.phi.unravel(phi), *self.trees(tensors)), "penalty", phi)

    def curvature_product(self, v: Tensor, *theta: Tensor) -> Tensor:
        """(known part of the Hessian) v, for one vector ``(d,)`` and the leaves of theta."""
        return self._known(lambda tree: self.problem.curvature_product(tree, unflatten(self.theta, theta)), v)

    def curvature_inverse(self, damping: float, v: Tensor, *theta: Tensor) -> Tensor:
        """(known part of the Hessian + damping I)^{-1} v, for one vector ``(d,)`` and the leaves of theta."""
        return self._known(lambda tree: self.problem.curvature_inverse(tree, unflatten(self.theta, theta), damping), v)

    def _locate(self, error: Exception, name: str, tensors: Sequence[Tensor]) -> None:
        """Let an error of a function of the user's know where it was raised, and for which shapes."""
        data = [path for path, leaf in zip(self.data.paths(), self.data_static, strict=True) if leaf is TENSOR]
        names = [*(f"theta{path}" for path in self.theta.paths()), *(f"data{path}" for path in data)]
        leaves = [
            f"phi{path} {tuple(shape)}" for path, shape in zip(self.phi.structure.paths(), self.phi.shapes, strict=True)
        ]
        leaves += [
            f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            for name, x in zip(names, tensors, strict=True)
        ]
        locate(error, f"bilevel: raised in {name}, for one task with {', '.join(leaves)}.")

    def _known(self, fn: Callable[[Tree], Tree], v: Tensor) -> Tensor:
        return self.phi.ravel(flatten(fn(self.phi.unravel(v)))[0])


class _TensorLeaf:
    """Marks where a tensor goes among the static leaves of data."""

    def __repr__(self) -> str:
        return "<tensor>"

    def __reduce__(self) -> str:
        return "TENSOR"  # there is one only, in copies too


TENSOR = _TensorLeaf()


def _scalar(value: Any, name: str, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a 0-d tensor, got {got}. Reduce it, for example with .sum() or .mean().")
    if value.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {like.dtype} like phi, got {value.dtype}. Convert the data to the dtype of theta."
        )
    return value


def _leaves(layout: Layout) -> list[str]:
    return [f"{path}{tuple(shape)}" for path, shape in zip(layout.structure.paths(), layout.shapes, strict=True)]
