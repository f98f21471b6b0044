"""What a preconditioner is: an approximate inverse of A, made from a few products with A."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from bilevel.linsys.base import Matvec, Operator


class Preconditioner(ABC):
    """A recipe for M, an approximate inverse of A. Subclasses are frozen keyword-only dataclasses; their fields are the options."""

    @abstractmethod
    def build(self, operator: Operator, b: Tensor) -> tuple[Matvec, int]:
        """M for every matrix of the batch.

        Args:
            operator: A.
            b: a right-hand side ``(*batch, d)``, for its shape, dtype and device.

        Returns:
            ``v -> M v`` over ``(*batch, d)`` with M symmetric positive definite, and the products with A that it took.
        """


def check_preconditioner(value: Any) -> None:
    """Refuse what is neither None, a recipe nor a function."""
    if isinstance(value, type) or not (value is None or isinstance(value, Preconditioner) or callable(value)):
        hint = f" Did you mean {value.__name__}()?" if isinstance(value, type) else ""
        raise TypeError(
            f"preconditioner: expected None, Jacobi(), NystromPreconditioner(rank=...) or a function v -> M v, got {value!r}.{hint}"
        )


def prepare(
    own: Preconditioner | Matvec | None, handed: Matvec | None, operator: Operator, b: Tensor
) -> tuple[Matvec | None, int]:
    """The preconditioner of a solve, and the products that it took: the solver's own, or else the one that was handed to it."""
    if isinstance(own, Preconditioner):
        return own.build(operator, b)
    return (handed if own is None else own), 0
