"""G over a batch: numbers at base level, with eager autograd; and to second order at one point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.curvature import Curvature, FiniteDifference, GaussNewton, Hessian, ReverseOverReverse
from bilevel.derivatives.backward import backward_product, total
from bilevel.derivatives.differences import Differences
from bilevel.derivatives.fall_back import FALL_BACK, FallBack
from bilevel.derivatives.flat import Flat
from bilevel.derivatives.forward import alike, jvp
from bilevel.derivatives.gauss_newton import GaussNewtonProduct
from bilevel.derivatives.guards import refuse_captured, refuse_moves, refuse_writes, versions
from bilevel.derivatives.levels import Levels, over_levels, with_axis


class Objective:
    """G over a batch at base level: what an inner solver sees, and the implicit gradient after it.

    Args:
        flat: the functions of one task.
        levels: for each batch axis, which of ``tensors`` have it.
        tensors: theta and data, detached.
        sizes: the batch shape.
    """

    def __init__(self, flat: Flat, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> None:
        self.flat, self.levels, self.sizes = flat, levels, sizes
        self.tensors = [tensor.detach() for tensor in tensors]
        self.num_grads = 0
        self.num_matvecs = 0
        self._inner = over_levels(flat.inner, with_axis(levels))
        self._remainder = over_levels(flat.remainder, with_axis(levels))
        self._checked = False
        self._versions = versions(self.tensors)

    measures: ClassVar[bool] = True
    """Whether its gradients are those of G; else what a solver has seen of them is not enough to call it converged."""

    is_displacement: bool = False
    """Whether its "gradient" is phi - T(phi), so that the rounding of phi is that of the gradient."""

    def begin_step(self, k: int) -> None:
        """Told by a solver at the start of its step k."""

    def verify(self, phi: Tensor) -> None:
        """Told where a solve has ended; for objectives that were recorded earlier."""

    def measure(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G and dG/dphi where a solve has ended: what autograd says there, whatever the solver was told on its way."""
        self.verify(phi)
        return self.value_and_grad(phi)

    def written_down(self, phi: Tensor, products: int) -> tuple[Tensor, Tensor] | None:
        """``(H, dG/dphi)`` at phi, H ``(*batch, d, d)``, where G is quadratic and that is worth it for so many products; else None."""
        return None

    def value(self, phi: Tensor) -> Tensor:
        """G ``(*batch,)`` at phi ``(*batch, d)``."""
        with torch.no_grad():
            return self._with_split(phi, self._remainder(phi, *self.tensors), phi.new_zeros(()))[0]

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G ``(*batch,)`` and dG/dphi ``(*batch, d)``."""
        with torch.enable_grad():
            phi = phi.detach().requires_grad_()
            before = versions([phi])
            value = self._remainder(phi, *self.tensors)
            refuse_moves(before, phi, "inner_objective")
            self._check(value, [phi])
            grad = self._gradient(value, phi)
        self.num_grads += 1
        return self._with_split(phi.detach(), value.detach(), grad)

    def gradient(self, phi: Tensor) -> Tensor:
        """dG/dphi ``(*batch, d)`` alone, for methods that do not look at G."""
        return self.value_and_grad(phi)[1]

    def linearise(
        self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False
    ) -> Linearisation:
        """Gradient, products with the curvature and (``with_theta``) with the cross derivative, on one graph."""
        self.num_grads += 1
        return Linearisation(self, phi, curvature, damping, with_theta)

    def outer_gradient(self, phi: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """L ``(*batch,)``, dL/dphi ``(*batch, d)`` and dL/dtheta: a leaf ``(*batch, *shape)``, or None where L
        does not depend on it.
        """
        n = self.flat.num_theta
        with torch.enable_grad():
            phi = phi.detach().requires_grad_()
            theta = self.theta_per_task()
            levels = tuple((True,) * (1 + n) + flags[n:] for flags in self.levels)
            before = versions([phi])
            value = over_levels(self.flat.outer, levels)(phi, *theta, *self.tensors[n:])
            refuse_moves(before, phi, "outer_loss")
            refuse_writes(self._versions, self.tensors, "outer_loss")
            if not value.requires_grad:
                return value.detach(), torch.zeros_like(phi), [None] * n
            refuse_captured(value, [phi, *theta], "outer_loss")
            grad, *direct = torch.autograd.grad(total(value), [phi, *theta], allow_unused=True)
        return value.detach(), torch.zeros_like(phi) if grad is None else grad, list(direct)

    def theta_per_task(self) -> list[Tensor]:
        """The leaves of theta with every batch axis, as fresh leaves of autograd (views where shared)."""
        theta = []
        for i, leaf in enumerate(self.tensors[: self.flat.num_theta]):
            own = [axis for axis, flags in enumerate(self.levels) if flags[i]]
            shape = [size if axis in own else 1 for axis, size in enumerate(self.sizes)]
            event = leaf.shape[len(own) :]
            theta.append(leaf.reshape([*shape, *event]).expand([*self.sizes, *event]).detach().requires_grad_())
        return theta

    def curvature_inverse(self, damping: float) -> Callable[[Tensor], Tensor] | None:
        """The inverse of the known part of the Hessian over ``(*batch, d)``; None if the problem knows none."""
        if not self.flat.problem.knows_curvature:
            return None

        scale = self.flat.problem.curvature_scale
        if scale is not None:
            return lambda v: v / (scale + damping)
        return self.with_theta(partial(self.flat.curvature_inverse, damping))

    def curvature_product(self, v: Tensor) -> Tensor:
        """(known part of the Hessian) v for v ``(*batch, d)``, or with further axes in front."""
        scale = self.flat.problem.curvature_scale
        return self.with_theta(self.flat.curvature_product)(v) if scale is None else scale * v

    def with_theta(self, fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """``fn(v, *theta)`` of one problem as a function of v ``(*batch, d)``, or with further axes in front."""
        n = self.flat.num_theta

        def apply(v: Tensor) -> Tensor:
            extra = ((True, *[False] * n),) * (v.ndim - 1 - len(self.levels))
            levels = extra + tuple((True, *flags[:n]) for flags in self.levels)
            return over_levels(fn, levels)(v, *self.tensors[:n])

        return apply

    def singles(self) -> Iterator[Objective]:
        """The objective of each task alone, with the batch shape ``()``, in the order of the flattened batch."""
        if not self.sizes:  # nor is there anything to cut, as sparse tensors could not be
            yield self._like((), self.tensors, ())
            return
        for index in itertools.product(*map(range, self.sizes)):
            own = []
            for i, tensor in enumerate(self.tensors):
                own.append(
                    tensor[tuple(position for position, flags in zip(index, self.levels, strict=True) if flags[i])]
                )
            yield self._like((), own, ())

    def only(self, rows: Tensor) -> Objective | None:
        """The objective of these tasks alone; None where that cannot be had. A solver goes on with it when the others are done."""
        if len(self.sizes) != 1:
            return None
        (flags,) = self.levels
        tensors = [
            tensor.index_select(0, rows) if flag else tensor for tensor, flag in zip(self.tensors, flags, strict=True)
        ]
        return self._like(self.levels, tensors, (len(rows),))

    def _like(self, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        """The same kind of objective over other tensors."""
        return type(self)(self.flat, levels, tensors, sizes)

    @cached_property
    def centre(self) -> Tensor | None:
        """Of the quadratic part that the problem splits off ``(*batch, d)``; None if it does not."""
        return None if self.flat.problem.split is None else over_levels(self.flat.centre, self.levels)(*self.tensors)

    def _with_split(self, phi: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of the remainder -> of G. The quadratic part is added in closed form, to whole vectors."""
        if self.centre is None:
            return value, grad
        step, scale = phi - self.centre, self.flat.problem.curvature_scale
        if scale is not None:  # fewer passes
            return value + 0.5 * scale * torch.linalg.vector_norm(step, dim=-1) ** 2, torch.add(grad, step, alpha=scale)
        slope = self.curvature_product(step)
        return value + 0.5 * torch.linalg.vecdot(step, slope), grad + slope

    def _gradient(self, value: Tensor, phi: Tensor, *, create_graph: bool = False) -> Tensor:
        """Of the remainder. Where that is all of G, it has to depend on phi."""
        grad = None
        if value.requires_grad:
            (grad,) = torch.autograd.grad(total(value), phi, create_graph=create_graph, allow_unused=True)
        return torch.zeros_like(phi) if grad is None and self.centre is not None else _of_phi(grad)

    def _gauss_newton(self, phi: Tensor) -> GaussNewtonProduct:
        problem = self.flat.problem
        if problem._curvature_is_missing:
            raise TypeError(
                f"GaussNewton(): {type(problem).__name__} has a regulariser of its own, whose curvature it does not tell. Define "
                "curvature_product(v, theta) and curvature_inverse(v, theta, damping) for it too, or use Hessian(). Where it is Lambda "
                "all the same, say knows_curvature = True."
            )
        if problem.composition is not None and problem._composes_another:
            raise TypeError(
                f"GaussNewton(): {type(problem).__name__} has an inner objective or a train_loss of its own, and the composition that it "
                "inherits may be that of another one. Define composition for it too, or use Hessian()."
            )
        known = self.curvature_product if problem.knows_curvature else None
        return GaussNewtonProduct(self.flat, self.levels, self.tensors, phi, known)

    def _check(self, value: Tensor, inputs: Sequence[Tensor]) -> None:
        """Once per call, on a graph that is there anyway."""
        if not self._checked:
            refuse_captured(value, inputs, "inner_objective")
            refuse_writes(self._versions, self.tensors, "inner_objective")
        self._checked = True


class Linearisation:
    """G to second order at one point, from one forward and one first backward pass.

    The graph lives as long as this object; only products by two reverse passes need one.

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
        asked = curvature.product if isinstance(curvature, Hessian) else ReverseOverReverse()
        self._way = FallBack(asked, FALL_BACK, "Hessian product", flat.fallen, asked, flat.said)
        again = isinstance(self._way.product, ReverseOverReverse)
        with torch.enable_grad():
            self._phi = phi.detach().requires_grad_()
            self._theta: list[Tensor] = []
            if with_theta:
                self._theta = objective.theta_per_task()
                tensors = [*self._theta, *tensors[n:]]
                levels = tuple((True,) * n + flags[n:] for flags in levels)
            before = versions([self._phi])
            value = over_levels(flat.remainder, with_axis(levels))(self._phi, *tensors)
            refuse_moves(before, self._phi, "inner_objective")
            objective._check(value, [self._phi, *self._theta])
            self._grad = objective._gradient(value, self._phi, create_graph=again)
            self._gauss_newton = objective._gauss_newton(self._phi) if isinstance(curvature, GaussNewton) else None
        self.value, self.grad = objective._with_split(phi.detach(), value.detach(), self._grad.detach())
        self._tensors, self._levels = [tensor.detach() for tensor in tensors], levels

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
            return alike(*jvp(lambda point: gradient(point, *self._tensors), (phi,), (direction,)))

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
        values, tangents = jvp(lambda point: gradient(point, *self._tensors), (phi,), (u,))
        return [alike(value, tangent) for value, tangent in zip(values, tangents, strict=True)]

    @cached_property
    def _differences(self) -> Differences:
        assert isinstance(self._way.product, FiniteDifference)
        flat, n, tensors = self._objective.flat, len(self._theta), self._tensors
        inner = over_levels(flat.inner, with_axis(self._levels))

        def gradients(
            phi: Tensor,
        ) -> list[Tensor | None]:  # no method: self would live until the next garbage collection
            """dG/dphi and the leaves of dG/dtheta elsewhere."""
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (phi, *tensors[:n])]
                value = inner(*inputs, *tensors[n:])
                return list(torch.autograd.grad(value.sum(), inputs, allow_unused=True))

        return Differences(gradients, self._phi.detach(), self._way.product.step, flat.said)

    def _slope(self) -> Tensor | None:
        """The gradient of the quadratic part that the problem splits off, as a function of theta."""
        if self._objective.centre is None:
            return None
        flat, tensors = self._objective.flat, [*self._theta, *self._tensors[len(self._theta) :]]
        with torch.enable_grad():
            return over_levels(flat.slope, with_axis(self._levels))(self._phi.detach(), *tensors)


def _of_phi(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise ValueError(
            "inner_objective: expected a function of phi, but the graph shows no dependence on it. Was phi detached? Or is "
            "torch.inference_mode() on around a transform of torch.func? torch.no_grad() takes its place."
        )
    return grad
