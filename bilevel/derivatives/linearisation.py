"""G to second order at one point: gradient, products with the curvature, and with the cross derivative."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.curvature import Curvature, FiniteDifference, GaussNewton, Hessian, ReverseOverReverse
from bilevel.derivatives.backward import backward_product
from bilevel.derivatives.differences import Differences
from bilevel.derivatives.fall_back import FALL_BACK, FallBack
from bilevel.derivatives.forward import alike
from bilevel.derivatives.gauss_newton import GaussNewtonProduct
from bilevel.derivatives.levels import over_levels, with_axis

if TYPE_CHECKING:
    from bilevel.derivatives.objective import Objective


class Linearisation:
    """G to second order at one point, from one forward and one first backward pass.

    The graph lives as long as this object.

    Attributes:
        value: G ``(*batch,)``.
        grad: dG/dphi ``(*batch, d)``.
    """

    def __init__(
        self, objective: Objective, phi: Tensor, curvature: Curvature, damping: float, with_theta: bool
    ) -> None:
        self._objective, self._damping = objective, damping
        flat, n = objective.flat, objective.flat.num_theta
        tensors, levels = objective.tensors, objective.levels
        with torch.enable_grad():
            self._phi = phi.detach().requires_grad_()
            self._theta: list[Tensor] = []
            if with_theta:
                self._theta = objective.theta_per_task()
                tensors = [*self._theta, *tensors[n:]]
                levels = tuple((True,) * n + flags[n:] for flags in levels)
            value = over_levels(flat.remainder, with_axis(levels))(self._phi, *tensors)
            objective._check(value, [self._phi, *self._theta])
            self._grad = objective._gradient(value, self._phi, create_graph=True)
            self._gauss_newton = (
                GaussNewtonProduct(objective, self._phi) if isinstance(curvature, GaussNewton) else None
            )
        self.value, self.grad = objective._with_split(phi.detach(), value.detach(), self._grad.detach())
        self._tensors, self._levels = [tensor.detach() for tensor in tensors], levels
        asked = curvature.product if isinstance(curvature, Hessian) else ReverseOverReverse()
        self._way = FallBack(asked, FALL_BACK, "Hessian product", flat.fallen, asked, flat.said)

    @property
    def exact(self) -> bool:
        """Whether all products so far were exact but for rounding."""
        return self._way.exact and (self._gauss_newton is None or self._gauss_newton.exact)

    def matvec(self, v: Tensor) -> Tensor:
        """(curvature + damping I) v for v ``(*batch, d)`` or ``(k, *batch, d)``."""
        self._objective.num_matvecs += 1
        product = self._way(self._hessian_product, v) if self._gauss_newton is None else self._gauss_newton(v)
        return product if self._damping == 0 else product + self._damping * v

    def transposed_matvec(self, v: Tensor) -> Tensor:
        """The same: the curvature is symmetric."""
        return self.matvec(v)

    def cross(self, u: Tensor, *, keep: bool = False) -> list[Tensor | None]:
        """(d2G/dphi dtheta)^T u: leaves ``(*batch, *shape)``, None where dG/dphi does not depend on the leaf.
        Frees the graph unless ``keep``.
        """
        return self._way(lambda v: self._cross_product(v, keep), u)

    def _hessian_product(self, v: Tensor) -> Tensor:
        if isinstance(self._way.product, ReverseOverReverse):
            product = backward_product(self._grad, self._phi, v)
            return product if self._objective.centre is None else product + self._objective.curvature_product(v)
        if not self._way.exact:
            return self._differences.rows(v)
        phi = self._phi.detach()
        gradient = over_levels(self._objective.flat.condition, with_axis(self._levels))

        def along(direction: Tensor) -> Tensor:
            return alike(*torch.func.jvp(lambda point: gradient(point, *self._tensors), (phi,), (direction,)))

        for _ in range(v.ndim - phi.ndim):
            along = torch.func.vmap(along)
        return along(v)

    def _cross_product(self, u: Tensor, keep: bool) -> list[Tensor | None]:
        if isinstance(self._way.product, ReverseOverReverse):
            parts = [part for part in (self._grad, self._slope()) if part is not None and part.requires_grad]
            if not parts:
                return [None] * len(self._theta)
            cotangents = [u] * len(parts)
            return list(torch.autograd.grad(parts, self._theta, cotangents, allow_unused=True, retain_graph=keep))
        phi, n = self._phi.detach(), len(self._theta)
        if not self._way.exact:
            return self._differences(u)[1:]
        of_theta = torch.func.grad(self._objective.flat.inner, argnums=tuple(range(1, n + 1)))
        gradient = over_levels(of_theta, with_axis(self._levels))
        values, tangents = torch.func.jvp(lambda point: gradient(point, *self._tensors), (phi,), (u,))  # type: ignore[misc]
        return [alike(value, tangent) for value, tangent in zip(values, tangents, strict=True)]

    @cached_property
    def _differences(self) -> Differences:
        assert isinstance(self._way.product, FiniteDifference)
        return Differences(self._gradients, self._phi.detach(), self._way.product.step, self._objective.flat.said)

    def _slope(self) -> Tensor | None:
        """The gradient of the quadratic part that the problem splits off, as a function of theta."""
        if self._objective.centre is None:
            return None
        flat, tensors = self._objective.flat, [*self._theta, *self._tensors[len(self._theta) :]]
        with torch.enable_grad():
            return over_levels(flat.slope, with_axis(self._levels))(self._phi.detach(), *tensors)

    def _gradients(self, phi: Tensor) -> list[Tensor | None]:
        """dG/dphi and the leaves of dG/dtheta elsewhere."""
        n = len(self._theta)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (phi, *self._tensors[:n])]
            value = over_levels(self._objective.flat.inner, with_axis(self._levels))(*inputs, *self._tensors[n:])
            return list(torch.autograd.grad(value.sum(), inputs, allow_unused=True))
