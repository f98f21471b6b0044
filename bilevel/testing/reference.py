"""What a hypergradient is compared with: the same formula by plain autograd, with dense matrices where that is possible.

At a point phi, with H = d2G/dphi2 and C = d2G/dphi dtheta,

    H u = dL/dphi,        gradient = dL/dtheta - C^T u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import GaussNewton
from bilevel.curvature import Curvature
from bilevel.linsys import CG
from bilevel.linsys.base import LinearSolver
from bilevel.testing.view import View, backward
from bilevel.trees import flatten

DENSE = 500  # up to so many rows a matrix is built
CG_RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}
Product = Callable[[Tensor], Tensor]


class Point:
    """G to second order and L to first order at one point, as autograd has them.

    Attributes:
        slope: dG/dphi ``(d,)``.
        b: dL/dphi ``(d,)``.
        a: dL/dtheta ``(p,)``.
    """

    def __init__(self, view: View, phi: Tensor, theta: Tensor) -> None:
        self.view, self.at = view, phi
        with torch.enable_grad():
            self._phi, self._theta = phi.detach().requires_grad_(), theta.detach().requires_grad_()
            self._slope = backward(view.inner(self._phi, self._theta), self._phi, graph=True)
            outer = view.outer(self._phi, self._theta)
            self.b, self.a = backward(outer, self._phi), backward(outer, self._theta)
        self.slope = self._slope.detach()

    def hessian(self, v: Tensor) -> Tensor:
        """v^T d2G/dphi2 ``(d,)``."""
        return backward(self._slope, self._phi, v)

    def cross(self, u: Tensor) -> Tensor:
        """(d2G/dphi dtheta)^T u ``(p,)``."""
        return backward(self._slope, self._theta, u)

    def chosen(self, curvature: Curvature, damping: float, linsys: LinearSolver) -> Product:
        """Products with the matrix that the user put in the place of the Hessian."""
        if linsys.needs_known_inverse:
            product: Product = self._known
        elif isinstance(curvature, GaussNewton):
            product = self._gauss_newton()
        else:
            product = self.hessian
        return lambda v: product(v) + damping * v

    def _known(self, v: Tensor) -> Tensor:
        known = self.view.problem.curvature_product(
            self.view.phi.unravel(v), self.view.theta.unravel(self._theta.detach())
        )
        return self.view.phi.ravel(flatten(known)[0])

    def _gauss_newton(self) -> Product:
        """v -> J^T H_out J v + (known part, Hessian of the penalty) v."""
        composition = self.view.problem.composition
        assert composition is not None
        theta = self.view.theta.unravel(self._theta.detach())
        with torch.enable_grad():
            phi = self.view.phi.unravel(self._phi)
            outputs = composition.predict(phi, theta, self.view.data)
            z = outputs.detach().requires_grad_()
            dz = backward(composition.output_loss(z, theta, self.view.data), z, graph=True)
            w = torch.zeros_like(outputs, requires_grad=True)
            jt_w = backward(outputs, self._phi, w, graph=True)  # its derivative in w is J
            rest = None if composition.penalty is None else composition.penalty(phi, theta, self.view.data)
            slope = None if rest is None else backward(rest, self._phi, graph=True)

        def product(v: Tensor) -> Tensor:
            found = backward(outputs, self._phi, backward(dz, z, backward(jt_w, w, v)))
            if slope is not None and slope.requires_grad:
                found = found + backward(slope, self._phi, v)
            return found + self._known(v) if self.view.problem.knows_curvature else found

        return product


@dataclass(frozen=True)
class System:
    """A symmetric matrix: its products and, up to ``DENSE`` rows, its entries."""

    product: Product
    dense: Tensor | None

    @staticmethod
    def of(product: Product, like: Tensor) -> System:
        """From its products with vectors like ``like``."""
        d = like.numel()
        if d > DENSE:
            return System(product, None)
        return System(product, torch.stack([product(row) for row in torch.eye(d, device=like.device).to(like)]))

    def solve(self, b: Tensor, rtol: float | None = None) -> Tensor:
        """The solution ``(d,)``; not finite where there is none. ``rtol``: an accuracy that is enough, where it is iterative."""
        if self.dense is not None:
            return torch.linalg.solve_ex(self.dense, b)[0]
        found = CG(max_steps=2000, rtol=rtol or CG_RTOL[b.dtype]).solve(self.product, b)
        return torch.full_like(b, torch.nan) if bool(found.failed) else found.value


@dataclass(frozen=True)
class Formula:
    """The implicit formula at a point: u and the two terms of the gradient."""

    u: Tensor
    direct: Tensor
    through: Tensor

    @staticmethod
    def at(point: Point, system: System) -> Formula:
        """With the system solved accurately."""
        u = system.solve(point.b)
        return Formula(u, point.a, point.cross(u))

    @property
    def grad(self) -> Tensor:
        """dL/dtheta - C^T u."""
        return self.direct - self.through

    @property
    def scale(self) -> float:
        """The larger term: where they cancel, no method is more accurate than relative to this."""
        return max(float(self.direct.norm()), float(self.through.norm()))


def reattached(view: View, phi: Tensor, theta: Tensor, hessian: Tensor) -> Tensor:
    """The gradient through one exact Newton step, re-attached to a detached phi: an implicit gradient without the formula."""
    with torch.enable_grad():
        start, theta = phi.detach().requires_grad_(), theta.detach().requires_grad_()
        slope = backward(view.inner(start, theta), start, graph=True)
        step = torch.linalg.solve_ex(hessian, slope)[0]
        return backward(view.outer(phi.detach() - step, theta), theta)
