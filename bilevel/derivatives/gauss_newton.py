"""Products with the Gauss-Newton matrix of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.curvature import FiniteDifference, ForwardOverReverse, HessianProduct
from bilevel.derivatives.backward import backward_product, total
from bilevel.derivatives.differences import Differences
from bilevel.derivatives.fall_back import OF_A_MODEL, next_after
from bilevel.derivatives.forward import tangent_along
from bilevel.derivatives.levels import over_levels, with_axis

if TYPE_CHECKING:
    from bilevel.derivatives.objective import Objective


class GaussNewtonProduct:
    """v -> J^T H_out J v + (known part) v + (Hessian of the penalty) v, J the Jacobian of predict, H_out the Hessian of output_loss."""

    def __init__(self, objective: Objective, phi: Tensor) -> None:
        flat = objective.flat
        composition = flat.problem.composition
        if composition is None:
            raise ValueError(
                "GaussNewton() needs a problem of the form output_loss(predict(phi, ...), ...): build it with BilevelProblem.from_model, "
                "ProximalProblem.from_model or LearnedProximalProblem.from_model, or use Hessian()."
            )
        levels = with_axis(objective.levels)
        predict = over_levels(flat.predict, levels)
        self._phi, self._flat = phi, flat
        self._predict = lambda point: predict(point, *objective.tensors)
        self._outputs = self._predict(phi)
        self._z = self._outputs.detach().requires_grad_()
        loss = over_levels(flat.output_loss, levels)(self._z, *objective.tensors)
        (self._dz,) = torch.autograd.grad(loss.sum(), self._z, create_graph=True)
        self._known = objective.curvature_product if flat.problem.knows_curvature else None
        self._penalty_slope: Tensor | None = None
        if composition.penalty is not None:
            penalty = total(over_levels(flat.penalty, levels)(phi, *objective.tensors))
            if penalty.requires_grad:
                (slope,) = torch.autograd.grad(penalty, phi, create_graph=True, allow_unused=True)
                self._penalty_slope = slope
        self._transposed: tuple[Tensor, Tensor] | None = None
        self._differences: Differences | None = None

    def __call__(self, v: Tensor) -> Tensor:
        product = backward_product(
            self._outputs, self._phi, backward_product(self._dz, self._z, self._jacobian_product(v))
        )
        if self._penalty_slope is not None:  # zero where it is linear
            product = product + backward_product(self._penalty_slope, self._phi, v)
        return product if self._known is None else product + self._known(v)

    @property
    def exact(self) -> bool:
        """Whether all products so far were exact but for rounding."""
        return not isinstance(self._way, FiniteDifference)

    @property
    def _way(self) -> HessianProduct:
        return self._flat.fallen.get(GaussNewtonProduct, OF_A_MODEL[0])

    def _jacobian_product(self, v: Tensor) -> Tensor:
        """J v, in another way where an operator of the model lacks the derivative that this one needs."""
        while True:
            try:
                return self._along(v)
            except (NotImplementedError, RuntimeError, AssertionError) as error:
                following = next_after(self._way, error, OF_A_MODEL, "GaussNewton", self._flat.said)
                if following is None:
                    raise
                self._flat.fallen[GaussNewtonProduct] = following

    def _along(self, v: Tensor) -> Tensor:
        if isinstance(self._way, FiniteDifference):
            phi = self._phi.detach()
            if self._differences is None:
                self._differences = Differences(lambda x: [self._predict(x)], phi, None)
            rows = [self._differences(row)[0] for row in v.reshape(-1, *phi.shape)]
            found = torch.stack([row for row in rows if row is not None])
            return found.reshape(*v.shape[: v.ndim - phi.ndim], *found.shape[1:])
        if isinstance(self._way, ForwardOverReverse) and v.ndim == self._phi.ndim:  # one v for each problem
            return tangent_along(self._predict, self._phi.detach(), v)
        if self._transposed is None:
            # J v is the derivative of w -> J^T w
            with torch.enable_grad():
                w = torch.zeros_like(self._outputs, requires_grad=True)
                (jt_w,) = torch.autograd.grad(self._outputs, self._phi, w, create_graph=True)
            self._transposed = (jt_w, w)
        return backward_product(*self._transposed, v)
