"""An objective whose answers carry their derivatives, so that a solver's whole path can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Curvature, Hessian
from bilevel.derivatives import Flat, Levels, Objective, over_levels, with_axis


class PathObjective(Objective):
    """G over a batch as :class:`Objective` has it, but as compositions of ``torch.func`` that are differentiable again.

    Args:
        skip: evaluations at the start that carry no derivative (truncation).
    """

    def __init__(
        self, flat: Flat, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...], skip: int
    ) -> None:
        super().__init__(flat, levels, tensors, sizes)
        self._plain = self.tensors
        self._live = list(tensors)
        self._skip = skip
        self._both = over_levels(torch.func.grad_and_value(flat.inner), with_axis(levels))

        self.begin_step(0)

    def begin_step(self, k: int) -> None:
        """The first ``skip`` steps carry no derivatives, nor does what comes before them."""
        self.tensors = self._plain if k < self._skip else self._live

    def value(self, phi: Tensor) -> Tensor:
        """G ``(*batch,)``: only ever compared, so it carries nothing."""
        with torch.no_grad():
            return self._inner(phi.detach(), *self._plain)

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G ``(*batch,)`` and dG/dphi ``(*batch, d)``."""
        grad, value = self._both(phi, *self.tensors)
        self.num_grads += 1
        return value, grad

    def linearise(self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False) -> Any:
        """Gradient, and products with the Hessian."""
        if not isinstance(curvature, Hessian):
            raise NotImplementedError(
                f"unrolled: the path through {curvature!r} is not implemented; use curvature=Hessian() in the solver."
            )
        return _PathLinearisation(self, phi, damping)


class _PathLinearisation:
    def __init__(self, objective: PathObjective, phi: Tensor, damping: float) -> None:
        self._objective, self._damping = objective, damping
        self.value, self.grad = objective.value_and_grad(phi)
        tensors = objective.tensors
        gradient = over_levels(objective.flat.condition, with_axis(objective.levels))
        self._pull = torch.func.vjp(lambda p: gradient(p, *tensors), phi)[1]

    def matvec(self, v: Tensor) -> Tensor:
        """(Hessian + damping I) v."""
        self._objective.num_matvecs += 1
        (product,) = self._pull(v)
        return product + self._damping * v
