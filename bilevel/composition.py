"""The parts of an inner objective that is a loss of a network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.trees import Tree

Loss = Callable[[Tree, Any], Tensor]


@dataclass(frozen=True)
class Composition:
    """An inner objective that is a loss of a network's outputs, and a rest: what ``BilevelProblem.from_model`` takes.

    Attributes:
        predict: (phi, theta, data) -> outputs, one tensor.
        output_loss: (outputs, theta, data) -> 0-d tensor.
        penalty: (phi, theta, data) -> 0-d tensor, the rest of G apart from what the problem knows in closed form; None:
            nothing.
    """

    predict: Callable[..., Tensor]
    output_loss: Callable[..., Tensor]
    penalty: Callable[..., Tensor] | None = None

    def objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        """The sum."""
        value = self.output_loss(self.predict(phi, theta, data), theta, data)
        return value if self.penalty is None else value + self.penalty(phi, theta, data)


@dataclass(frozen=True)
class ModelLoss:
    """A training loss output_loss(predict(phi, data), data) that remembers what it is made of.

    Attributes:
        predict: (phi, data) -> outputs, one tensor.
        output_loss: (outputs, data) -> 0-d tensor.
    """

    predict: Loss
    output_loss: Loss

    def __call__(self, phi: Tree, data: Any) -> Tensor:
        return self.output_loss(self.predict(phi, data), data)

    @property
    def composition(self) -> Composition:
        """The same as a part of G, which theta does not enter."""
        return Composition(
            lambda phi, theta, data: self.predict(phi, data),
            lambda outputs, theta, data: self.output_loss(outputs, data),
        )


def composition_of(train_loss: Loss) -> Composition | None:
    """What a training loss is made of, where it remembers that."""
    return train_loss.composition if isinstance(train_loss, ModelLoss) else None
