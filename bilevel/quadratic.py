"""G that is quadratic in phi, as its problem says: linearised once, then a matrix. Verified where the solve ends.

    G(phi) = G0 + g0^T s + 1/2 s^T H s,        dG/dphi = g0 + H s,        s = phi - phi0,

with everything taken at the first point phi0 that is asked for. H becomes a dense matrix as soon as that is cheaper than to go on without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Curvature, Hessian
from bilevel.derivatives import Levels, Objective
from bilevel.linsys.base import all_finite, dot, from_columns, norm, select, to_columns

LARGEST = 2**22
"""Matrices with more entries than this, over the whole batch, are never made dense: that would be more than 32 MiB
in float64, and a problem may have been written so that its products need hardly any memory."""

SMALL, SMALL_IN_A_BATCH = 256, 32
"""Up to this d the matrix is made at once: then nothing is ever taken from a start that is far away, where rounding
is large. The price, if a solve takes few products, is d of them: in one stack for a single problem, one by one
for a batch."""

STACKED = 16
"""So many products in one stack cost about as much as one alone, because the data is read once for all of them.
Measured in float64 on one core of a busy machine: 6 to 25 for d from 512 to 2000 (0.5 to 9 up to 256, where the
matrix is made at once)."""


class QuadraticObjective(Objective):
    """An objective that asks another one for its derivatives once."""

    measures = False  # the gradient at the end does

    def __init__(self, base: Objective) -> None:
        self._base = base
        super().__init__(base.flat, base.levels, base.tensors, base.sizes)
        self._model: _Model | None = None

    @property
    def num_grads(self) -> int:
        """Those of the other one."""
        return self._base.num_grads

    @num_grads.setter
    def num_grads(self, count: int) -> None:
        self._base.num_grads = count

    @property
    def num_matvecs(self) -> int:
        """Those of the other one."""
        return self._base.num_matvecs

    @num_matvecs.setter
    def num_matvecs(self, count: int) -> None:
        self._base.num_matvecs = count

    def verify(self, phi: Tensor) -> None:
        """See the base class. That G is quadratic is verified by :meth:`measure` and :meth:`linearise`, which have the gradient there."""
        self._base.verify(phi)

    def measure(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        value, grad = self._base.measure(phi)
        self._check_gradient(phi, value, grad)
        return value, grad

    def value(self, phi: Tensor) -> Tensor:
        """See the base class."""
        return self.value_and_grad(phi)[0]

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        model = self._model_from(phi)
        return model.at_start if self._is_first(phi) else model.value_and_grad(phi)

    def linearise(self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False) -> Any:
        """See the base class."""
        exact = isinstance(curvature, Hessian)
        if exact and not with_theta:
            return _Linearisation(self._model_from(phi), *self.value_and_grad(phi), damping)
        local = self._base.linearise(phi, curvature, 0.0 if exact else damping, with_theta=with_theta)
        if with_theta:
            self._check_gradient(phi, local.value, local.grad)
        if not exact:
            return local
        is_new = self._model is None
        return _Verified(self._model_from(phi, local), local, damping, is_new)

    def _like(self, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        return QuadraticObjective(Objective(self.flat, levels, tensors, sizes))

    def only(self, rows: Tensor) -> None:
        """Not here: products with a matrix are cheap, and the model is checked for all tasks at once."""

    def written_down(self, phi: Tensor, products: int) -> tuple[Tensor, Tensor] | None:
        """See the base class."""
        model = self._model_from(phi)
        if products < model.worth:
            return None
        self.num_matvecs += products
        matrix = model.matrix
        return matrix, model.value_and_grad(phi)[1]

    def _model_from(self, phi: Tensor, local: Any = None) -> _Model:
        """That of the first point that was asked for: phi, if there was none yet. ``local``: G linearised there, if somebody has it."""
        if self._model is None:
            start = phi.detach().clone()  # a solver may write to its phi
            self._model = _Model(self._base, start, local or self._base.linearise(start, Hessian(), 0.0))
            self._first = phi, phi._version
        return self._model

    def _check_gradient(self, phi: Tensor, value: Tensor, grad: Tensor) -> None:
        if self._model is not None and not self._is_first(phi):
            self._model.check_gradient(phi, value, grad)

    def _is_first(self, phi: Tensor) -> bool:
        """Whether phi is where the model was made: nothing was taken from it then. Not by its numbers, which would be a host read."""
        return self._first[0] is phi and self._first[1] == phi._version


class _Model:
    """The quadratic.

    Attributes:
        at_start: G and its gradient at the first point.
        worth: the number of products from which on a dense H is worth while.
    """

    worth: float

    def __init__(self, base: Objective, start: Tensor, local: Any) -> None:
        self._base, self._local = base, local
        self.at_start = local.value, local.grad
        self._origin, (self._value, self._slope) = start, self.at_start
        d, is_batch = start.shape[-1], start.ndim > 1
        if start.numel() * d > LARGEST:
            self.worth = math.inf
        elif d <= (SMALL_IN_A_BATCH if is_batch else SMALL):
            self.worth = 0
        else:
            self.worth = d if is_batch else 1 + d // STACKED
        self._products = 0

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G and its gradient at phi."""
        self._is_dense()  # which moves the origin
        step = phi - self._origin
        grad = self._slope + self.product(step)
        return self._value + 0.5 * dot(step, self._slope + grad), grad

    def product(self, v: Tensor) -> Tensor:
        """H v for v ``(*batch, d)``, or with further axes in front."""
        dense = self._is_dense()
        self._products += 1
        if not dense:
            return self._local.matvec(v)
        self._base.num_matvecs += 1
        if v.ndim == 1:
            return torch.mv(self.matrix, v)
        return from_columns(self.matrix @ to_columns(v, self.matrix.shape[:-2]), v.shape)

    def _is_dense(self) -> bool:
        """Whether products are those of the matrix from now on; makes it where it has become worth while."""
        return self._products >= self.worth and self.matrix is not None

    @cached_property
    def matrix(self) -> Tensor:
        """H ``(*batch, d, d)``."""
        d, batch = self._origin.shape[-1], self._origin.shape[:-1]
        self._products = max(self._products, d)
        matrix = (
            self._by_columns()
            if batch
            else self._local.matvec(torch.eye(d, dtype=self._origin.dtype, device=self._origin.device)).mT
        )
        self._local = None  # with its graph
        self._move_origin(matrix)
        return matrix.contiguous()

    def _by_columns(self) -> Tensor:
        """For a batch: all products at once would copy the data of each task d times."""
        columns = torch.empty(
            (*self._origin.shape, self._origin.shape[-1]), dtype=self._origin.dtype, device=self._origin.device
        )
        unit = torch.zeros_like(self._origin)
        for j in range(self._origin.shape[-1]):
            unit[..., j] = 1
            columns[..., j] = self._local.matvec(unit)
            unit[..., j] = 0
        return columns

    def _move_origin(self, matrix: Tensor) -> None:
        """To where the gradient is zero but for rounding: from far away, rounding in what is added up there would be as large as the
        gradient near the solution. The gradient there is that of G.
        """
        step, info = torch.linalg.solve_ex(matrix, -self._slope.unsqueeze(-1))
        there = self._origin + step.squeeze(-1)
        value, grad = self._base.value_and_grad(there)
        better = (info == 0) & all_finite(grad) & value.isfinite() & (norm(grad) < norm(self._slope))
        self._origin = select(better, there, self._origin)
        self._value, self._slope = torch.where(better, value, self._value), select(better, grad, self._slope)

    @cached_property
    def size(self) -> Tensor:
        """The Frobenius norm of H ``(*batch,)``, or an estimate of it: the scale of rounding."""
        if self._is_dense():
            return torch.linalg.matrix_norm(self.matrix)
        signs = torch.arange(self._origin.shape[-1], device=self._origin.device).to(self._origin).cos().sign()
        return norm(self._local.matvec(signs.expand_as(self._origin)))

    def check_gradient(self, phi: Tensor, value: Tensor, grad: Tensor) -> None:
        """Refuse a gradient of G at phi that is not that of the quadratic.

        Raises:
            ValueError: G is not quadratic in phi.
        """
        _, expected = self.value_and_grad(phi)
        size = self.size
        # what the gradient of a sum of squares adds up is as large as |H|^(1/2) (2 G)^(1/2)
        terms = size * (norm(phi) + norm(phi - self._origin)) + (2 * size * value.abs()).sqrt()
        _compare("gradient", grad, expected, norm(self._slope) + terms)

    def check_product(self, u: Tensor, local: Any) -> None:
        """Refuse a product of G's Hessian with u, at another point, that is not that of the quadratic.

        Raises:
            ValueError: G is not quadratic in phi.
        """
        _compare("Hessian", local.matvec(u), self.product(u), self.size * norm(u))


def _compare(what: str, found: Tensor, expected: Tensor, scale: Tensor) -> None:
    error = norm(found - expected)
    # half of the digits: rounding takes fewer, and a G that is not quadratic more
    tolerance = torch.finfo(found.dtype).eps ** 0.5 * scale
    if bool((error > tolerance).any()):  # not where something is NaN: that is for the statuses
        worst = float((error / scale).nan_to_num(0, 0, 0).amax())
        raise ValueError(
            f"quadratic=True: expected an inner objective that is quadratic in phi, but its {what} at the solution differs from that of "
            f"the quadratic at the start by up to {worst:.1e} (relative). Remove quadratic=True."
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
    """The model at the solution, with the gradient and the cross derivative that G itself has there. ``is_new``: it was made there."""

    def __init__(self, model: _Model, local: Any, damping: float, is_new: bool) -> None:
        super().__init__(model, local.value, local.grad, damping)
        self._local, self._is_new = local, is_new

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether all products so far were exact but for rounding."""
        return bool(self._local.exact)

    def cross(self, u: Tensor, *, keep: bool = False) -> list[Tensor | None]:
        """(d2G/dphi dtheta)^T u."""
        if not self._is_new:
            self._model.check_product(u, self._local)
        return self._local.cross(u, keep=keep)
