"""An objective whose answers carry their derivatives, so that a solver's whole path can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Curvature, Hessian
from bilevel.derivatives import Flat, Levels, Objective, over_levels, with_axis
from bilevel.linsys.base import all_finite, select


class PathObjective(Objective):
    """G over a batch as :class:`Objective` has it, but as compositions of ``torch.func`` that are differentiable again.

    Args:
        levels: as for :class:`Objective`; the leaves of theta have every axis.
        skip: for each problem, how many of its first steps carry no derivative ``(*batch,)``; None: all steps carry theirs.
    """

    def __init__(
        self, flat: Flat, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...], skip: Tensor | None = None
    ) -> None:
        super().__init__(flat, levels, tensors, sizes)
        self._plain, self._live, self._skip = self.tensors, list(tensors), skip
        self._range = (0, 0) if skip is None else (int(skip.min()), int(skip.max()))
        self._both = over_levels(torch.func.grad_and_value(flat.inner), with_axis(levels))
        self._choose_tensors(0)  # what a method evaluates before its first step belongs to it

    def begin_step(self, k: int) -> None:
        """Step k carries the derivatives of the problems that do not skip it."""
        self._choose_tensors(k)

    def _choose_tensors(self, k: int) -> None:
        first, last = self._range
        if k < first:
            self.tensors = self._plain
        elif k < last:
            assert self._skip is not None
            n, mask = self.flat.num_theta, self._skip <= k
            theta = [select(mask, live, plain) for live, plain in zip(self._live[:n], self._plain[:n], strict=True)]
            self.tensors = [*theta, *self._live[n:]]
        else:
            self.tensors = self._live

    def only(self, rows: Tensor) -> None:
        """Not here: what is done carries derivatives all the same."""

    def value(self, phi: Tensor) -> Tensor:
        """G ``(*batch,)``: only ever compared, so it carries nothing."""
        with torch.no_grad():
            return self._inner(phi.detach(), *self._plain)

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G ``(*batch,)`` and dG/dphi ``(*batch, d)``."""
        gate = _Gate()
        grad, value = self._both(gate(phi), *map(gate, self.tensors))
        gate.close(value, grad)
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
        gate = _Gate()
        tensors = [gate(tensor) for tensor in objective.tensors]
        self.grad, self._pull, self.value = torch.func.vjp(  # type: ignore[misc]  # three with has_aux
            lambda point: objective._both(point, *tensors), gate(phi), has_aux=True
        )
        gate.close(self.value, self.grad)
        objective.num_grads += 1

    def matvec(self, v: Tensor) -> Tensor:
        """(Hessian + damping I) v."""
        self._objective.num_matvecs += 1
        pull = lambda row: self._pull(row)[0]  # noqa: E731
        product = pull(v) if v.ndim == self.grad.ndim else torch.func.vmap(pull)(v)
        return product + self._damping * v


class _Gate:
    """Lets no gradient through to the inputs of an evaluation that was not finite, problem by problem.

    A method rejects a trial at which G overflows. In reverse mode 0 * inf would still make NaN of it, behind every mask.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """An input."""
        if not x.requires_grad:
            return x
        x = x.view_as(x)
        x.register_hook(lambda grad: select(self._finite, grad, torch.zeros_like(grad)))
        return x

    def close(self, value: Tensor, grad: Tensor) -> None:
        """What came of the inputs."""
        self._finite = value.isfinite() & all_finite(grad)
