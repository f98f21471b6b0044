"""G that is quadratic in phi, as its problem says: linearised once, then a matrix. Verified where the solve ends.

    G(phi) = G0 + g0^T s + 1/2 s^T H s,        dG/dphi = g0 + H s,        s = phi - phi0,

with everything taken at the first point phi0 that is asked for. H is written down as soon as that is cheaper than to go on without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Curvature, Hessian
from bilevel.derivatives import Flat, Levels, Objective
from bilevel.linsys.base import dot, from_columns, norm, to_columns

LARGEST = 2**22
"""Matrices with more entries than this, over the whole batch, are never written down."""


class QuadraticFlat(Flat):
    """The functions of a problem whose G is quadratic in phi."""

    def objective(self, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        """See the base class."""
        return QuadraticObjective(Objective(self, levels, tensors, sizes))


class QuadraticObjective(Objective):
    """An objective that asks another one for its derivatives once."""

    num_grads: int = property(  # type: ignore[assignment]  # those of the other one
        lambda self: self._base.num_grads, lambda self, count: setattr(self._base, "num_grads", count)
    )
    num_matvecs: int = property(  # type: ignore[assignment]
        lambda self: self._base.num_matvecs, lambda self, count: setattr(self._base, "num_matvecs", count)
    )

    def __init__(self, base: Objective) -> None:
        self._base = base
        super().__init__(base.flat, base.levels, base.tensors, base.sizes)
        self._model: _Model | None = None

    def verify(self, phi: Tensor) -> None:
        """See the base class. That G is quadratic is verified by :meth:`measure` and :meth:`linearise`, which have the gradient there."""
        self._base.verify(phi)

    def measure(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        value, grad = self._base.measure(phi)
        self._check_gradient(phi, grad)
        return value, grad

    def value(self, phi: Tensor) -> Tensor:
        """See the base class."""
        return self.value_and_grad(phi)[0]

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        model = self.model(phi)
        return model.at_start if self._is_first(phi) else model.value_and_grad(phi)

    def linearise(self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False) -> Any:
        """See the base class."""
        exact = isinstance(curvature, Hessian)
        if exact and not with_theta:
            return _Linearisation(self.model(phi), *self.value_and_grad(phi), damping)
        local = self._base.linearise(phi, curvature, 0.0 if exact else damping, with_theta=with_theta)
        if with_theta:
            self._check_gradient(phi, local.grad)
        return _Verified(self.model(phi, local), local, damping) if exact else local

    def only(self, rows: Tensor) -> None:
        """Not here: products with a matrix are cheap, and the model is checked for all tasks at once."""

    def written_down(self, phi: Tensor, products: int) -> tuple[Tensor, Tensor] | None:
        """See the base class."""
        model = self.model(phi)
        if products < model.worth:
            return None
        self.num_matvecs += products
        return model.matrix, self.value_and_grad(phi)[1]

    def model(self, phi: Tensor, local: Any = None) -> _Model:
        """That of the first point that was asked for: phi, if there was none yet. ``local``: G linearised there, if somebody has it."""
        if self._model is None:
            start = phi.detach().clone()  # a solver may write to its phi
            self._model = _Model(self._base, start, local or self._base.linearise(start, Hessian(), 0.0))
            self._first = phi, phi._version
        return self._model

    def _check_gradient(self, phi: Tensor, grad: Tensor) -> None:
        if self._model is not None and not self._is_first(phi):
            self._model.check_gradient(phi, grad)

    def _is_first(self, phi: Tensor) -> bool:
        """Whether phi is where the model was made: nothing was taken from it then. Not by its numbers, which would be a host read."""
        return self._first[0] is phi and self._first[1] == phi._version


class _Model:
    """The quadratic.

    Attributes:
        at_start: G and its gradient there.
        worth: the number of products for which it is worth while to write H down.
    """

    def __init__(self, base: Objective, start: Tensor, local: Any) -> None:
        self._base, self._start, self._local = base, start, local
        self.at_start = local.value, local.grad
        d = start.shape[-1]
        # d products at once cost about as much as so many one by one
        self.worth = 1 + d // 16 if start.numel() * d <= LARGEST else float("inf")
        self._products = 0

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G and its gradient at phi."""
        value, slope = self.at_start
        step = phi - self._start
        grad = slope + self.product(step)
        return value + 0.5 * dot(step, slope + grad), grad

    def product(self, v: Tensor) -> Tensor:
        """H v for v ``(*batch, d)``, or with further axes in front."""
        self._products += 1
        if self._products < self.worth:
            return self._local.matvec(v)
        self._base.num_matvecs += 1
        if v.ndim == 1:
            return torch.mv(self.matrix, v)
        return from_columns(self.matrix @ to_columns(v, self.matrix.shape[:-2]), v.shape)

    @cached_property
    def matrix(self) -> Tensor:
        """H ``(*batch, d, d)``."""
        d, batch = self._start.shape[-1], self._start.shape[:-1]
        self._products = max(self._products, d)
        eye = torch.eye(d, dtype=self._start.dtype, device=self._start.device)
        rows = self._local.matvec(eye.reshape(d, *[1] * len(batch), d).expand(d, *batch, d))
        return rows.movedim(0, -1).contiguous()

    def check_gradient(self, phi: Tensor, grad: Tensor) -> None:
        """Refuse a gradient of G at phi that is not that of the quadratic.

        Raises:
            ValueError: G is not quadratic in phi.
        """
        slope, change = self.at_start[1], self.product(phi - self._start)
        _compare("gradient", grad, slope + change, norm(slope) + norm(change) + norm(self.product(phi)))

    def check_product(self, u: Tensor, local: Any) -> None:
        """Refuse a product of G's Hessian with u, at another point, that is not that of the quadratic.

        Raises:
            ValueError: G is not quadratic in phi.
        """
        if local is self._local:
            return
        expected = self.product(u)
        along = expected / norm(expected).clamp_min(torch.finfo(u.dtype).tiny).unsqueeze(-1)
        # |H| |u|, roughly: rounding is a part of that
        _compare("Hessian", local.matvec(u), expected, norm(self.product(along)) * norm(u))


def _compare(what: str, found: Tensor, expected: Tensor, scale: Tensor) -> None:
    error = norm(found - expected)
    if bool(
        (error > torch.finfo(found.dtype).eps ** 0.5 * scale).any()
    ):  # not where something is NaN: that is for the statuses
        worst = float((error / scale).nan_to_num(0, 0, 0).amax())
        raise ValueError(
            f"quadratic=True: expected an inner objective that is quadratic in phi, but its {what} at the solution differs from that of "
            f"the quadratic at the start by up to {worst:.1e} (relative). Remove quadratic=True; the same call is right without it."
        )


class _Linearisation:
    """As :class:`~bilevel.derivatives.Linearisation`, of the model."""

    exact = True

    def __init__(self, model: _Model, value: Tensor, grad: Tensor, damping: float) -> None:
        self._model, self.value, self.grad, self._damping = model, value, grad, damping

    def matvec(self, v: Tensor) -> Tensor:
        """(H + damping I) v."""
        product = self._model.product(v)
        return product if self._damping == 0 else product + self._damping * v

    def transposed_matvec(self, v: Tensor) -> Tensor:
        """The same."""
        return self.matvec(v)


class _Verified(_Linearisation):
    """The model at the solution, with the gradient and the cross derivative that G itself has there."""

    def __init__(self, model: _Model, local: Any, damping: float) -> None:
        super().__init__(model, local.value, local.grad, damping)
        self._local, self.exact = local, local.exact

    def cross(self, u: Tensor, *, keep: bool = False) -> list[Tensor | None]:
        """(d2G/dphi dtheta)^T u."""
        self._model.check_product(u, self._local)
        return self._local.cross(u, keep=keep)
