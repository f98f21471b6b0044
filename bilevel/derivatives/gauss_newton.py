"""Products with the Gauss-Newton matrix of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.curvature import ForwardOverReverse
from bilevel.derivatives.backward import backward_product, total
from bilevel.derivatives.differences import Differences
from bilevel.derivatives.fall_back import OF_A_MODEL, FallBack
from bilevel.derivatives.flat import Flat
from bilevel.derivatives.forward import tangent_along
from bilevel.derivatives.levels import Levels, over_levels, with_axis


class GaussNewtonProduct:
    """v -> J^T H_out J v + (known part) v + (Hessian of the penalty) v, J the Jacobian of predict, H_out the Hessian of output_loss.

    ``known``: v -> (known part) v; None: there is none.
    """

    def __init__(
        self,
        flat: Flat,
        levels: Levels,
        tensors: Sequence[Tensor],
        phi: Tensor,
        known: Callable[[Tensor], Tensor] | None,
    ) -> None:
        composition = flat.problem.composition
        if composition is None:
            raise ValueError(
                "GaussNewton() needs a problem of the form output_loss(predict(phi, ...), ...): build it with BilevelProblem.from_model, "
                "ProximalProblem.from_model or LearnedProximalProblem.from_model, or use Hessian()."
            )
        levels = with_axis(levels)
        predict = over_levels(flat.predict, levels)
        self._phi, self._said = phi, flat.said
        self._way = FallBack(OF_A_MODEL[0], OF_A_MODEL, "GaussNewton", flat.fallen, GaussNewtonProduct, flat.said)
        self._predict = lambda point: predict(point, *tensors)
        self._outputs = self._predict(phi)
        self._z = self._outputs.detach().requires_grad_()
        loss = over_levels(flat.output_loss, levels)(self._z, *tensors)
        dz = None
        if loss.requires_grad:  # it may be a constant, as that of a task without data
            (dz,) = torch.autograd.grad(loss.sum(), self._z, create_graph=True, allow_unused=True)
        self._dz = torch.zeros_like(self._z) if dz is None else dz
        self._known = known
        self._penalty_slope: Tensor | None = None
        if composition.penalty is not None:
            penalty = total(over_levels(flat.penalty, levels)(phi, *tensors))
            if penalty.requires_grad:
                (slope,) = torch.autograd.grad(penalty, phi, create_graph=True, allow_unused=True)
                self._penalty_slope = slope
        self._transposed: tuple[Tensor, Tensor] | None = None
        self._differences: Differences | None = None

    def __call__(self, v: Tensor) -> Tensor:
        product = backward_product(
            self._outputs, self._phi, backward_product(self._dz, self._z, self._way(self._jacobian_product, v))
        )
        if self._penalty_slope is not None:  # zero where it is linear
            product = product + backward_product(self._penalty_slope, self._phi, v)
        return product if self._known is None else product + self._known(v)

    @property
    def exact(self) -> bool:
        """Whether all products so far were exact but for rounding."""
        return self._way.exact

    def _jacobian_product(self, v: Tensor) -> Tensor:
        """J v."""
        if not self._way.exact:
            if self._differences is None:
                predict = self._predict  # not self, which would live until the next garbage collection
                self._differences = Differences(lambda x: [predict(x)], self._phi.detach(), None, self._said)
            return self._differences.rows(v)
        if isinstance(self._way.product, ForwardOverReverse) and v.ndim == self._phi.ndim:  # one v for each problem
            return tangent_along(self._predict, self._phi.detach(), v)
        if self._transposed is None:
            # J v is the derivative of w -> J^T w
            with torch.enable_grad():
                w = torch.zeros_like(self._outputs, requires_grad=True)
                (jt_w,) = torch.autograd.grad(self._outputs, self._phi, w, create_graph=True)
            self._transposed = (jt_w, w)
        return backward_product(*self._transposed, v)
