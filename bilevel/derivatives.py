"""The one file that calls autograd.

A *call* of the library is made flat here: phi is one vector ``(*batch, d)``, theta and data are a list of tensors, and
the user's functions of one task are mapped over the batch with ``torch.func.vmap``. Two faces over the same flat
functions:

* :class:`Objective` and :class:`Linearisation`: numbers at base level, with eager autograd and one retained graph
  (fast);
* :func:`gradient`, :func:`hessian_product`, ...: compositions of ``torch.func``, differentiable again (for the rules of
  ``argmin``).

Axes. ``levels`` has one entry for each batch axis, outermost first; an entry says for each argument whether it has that
axis. An argument without the axis is shared by the problems along it, and is never copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bilevel.curvature import (
    Curvature,
    FiniteDifference,
    ForwardOverReverse,
    GaussNewton,
    Hessian,
    HessianProduct,
    ReverseOverReverse,
)
from bilevel.problem import BilevelProblem
from bilevel.products import FALL_BACK, OF_A_MODEL, Differences, next_after
from bilevel.trees import Layout, Structure, Tree, flatten, unflatten

Levels = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class Flat:
    """G and L of *one* task as functions of ``(phi, *tensors)``: phi ``(d,)``, tensors the leaves of theta, then
    those of data.
    """

    problem: BilevelProblem
    phi: Layout
    theta: Structure
    data: Structure
    data_static: tuple[Any, ...]  # the leaves of data, TENSOR in the place of each tensor
    fallen: dict[Any, HessianProduct] = field(default_factory=dict, compare=False, repr=False)
    """In this call, what stands for products that an operator of the problem does not allow."""

    symmetric: ClassVar[bool] = True  # the derivative of the condition in phi
    source: ClassVar[str] = "inner_objective"  # what the user calls the function behind the condition

    def condition(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """What is zero at the solution ``(d,)``: dG/dphi."""
        return torch.func.grad(self.inner)(phi, *tensors)

    def probe(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """Any number that carries whatever the condition depends on."""
        return self.inner(phi, *tensors)

    def objective(self, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        """Numbers at base level, over a batch."""
        return Objective(self, levels, tensors, sizes)

    @property
    def said(self) -> set[str]:
        """What the log has been told of this problem."""
        return self.problem.__dict__.setdefault("_said", set())

    @property
    def num_theta(self) -> int:
        """The number of leaves of theta."""
        return len(self.theta.paths())

    def trees(self, tensors: Sequence[Tensor]) -> tuple[Tree, Any]:
        """theta and data as the user knows them."""
        rest = iter(tensors[self.num_theta :])
        data = [next(rest) if leaf is TENSOR else leaf for leaf in self.data_static]
        return unflatten(self.theta, tensors[: self.num_theta]), unflatten(self.data, data)

    def inner(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """G, 0-d."""
        value = self.problem.inner_objective(self.phi.unravel(phi), *self.trees(tensors))
        return _scalar(value, "inner_objective", phi)

    def outer(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """L, 0-d."""
        value = self.problem.outer_loss(self.phi.unravel(phi), *self.trees(tensors))
        return _scalar(value, "outer_loss", phi)

    def remainder(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """G without the quadratic part that the problem splits off, 0-d."""
        if self.problem.split is None:
            return self.inner(phi, *tensors)
        return _scalar(self.problem.split[0](self.phi.unravel(phi), *self.trees(tensors)), "inner_objective", phi)

    def centre(self, *tensors: Tensor) -> Tensor:
        """Where the quadratic part is smallest ``(d,)``."""
        assert self.problem.split is not None
        leaves, structure = flatten(self.problem.split[1](self.trees(tensors)[0]))
        layout = Layout(structure, tuple(leaf.shape for leaf in leaves))
        if layout != self.phi:
            raise ValueError(
                f"phi: expected a tree like the centre of the regulariser with leaves {_leaves(layout)}, got {_leaves(self.phi)}."
            )
        return self.phi.ravel(leaves)

    def slope(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """The gradient of the quadratic part ``(d,)``."""
        return self.curvature_product(phi - self.centre(*tensors), *tensors[: self.num_theta])

    def predict(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """The model's outputs, any shape."""
        assert self.problem.composition is not None
        outputs = self.problem.composition.predict(self.phi.unravel(phi), *self.trees(tensors))
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"predict: expected one tensor, got {type(outputs).__name__}. GaussNewton() needs a single "
                f"tensor of outputs."
            )
        return outputs

    def output_loss(self, outputs: Tensor, *tensors: Tensor) -> Tensor:
        """The training loss as a function of the outputs, 0-d."""
        assert self.problem.composition is not None
        return _scalar(self.problem.composition.output_loss(outputs, *self.trees(tensors)), "output_loss", outputs)

    def penalty(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """What G has beside the loss of the outputs, 0-d."""
        assert self.problem.composition is not None and self.problem.composition.penalty is not None
        return _scalar(self.problem.composition.penalty(self.phi.unravel(phi), *self.trees(tensors)), "penalty", phi)

    def curvature_product(self, v: Tensor, *theta: Tensor) -> Tensor:
        """(known part of the Hessian) v, for one vector ``(d,)`` and the leaves of theta."""
        return self._known(lambda tree: self.problem.curvature_product(tree, unflatten(self.theta, theta)), v)

    def curvature_inverse(self, damping: float, v: Tensor, *theta: Tensor) -> Tensor:
        """(known part of the Hessian + damping I)^{-1} v, for one vector ``(d,)`` and the leaves of theta."""
        return self._known(lambda tree: self.problem.curvature_inverse(tree, unflatten(self.theta, theta), damping), v)

    def _known(self, fn: Callable[[Tree], Tree], v: Tensor) -> Tensor:
        return self.phi.ravel(flatten(fn(self.phi.unravel(v)))[0])


class _TensorLeaf:
    """Marks where a tensor goes among the static leaves of data."""

    def __repr__(self) -> str:
        return "<tensor>"

    def __reduce__(self) -> str:
        return "TENSOR"  # there is one only, in copies too


TENSOR = _TensorLeaf()


def _scalar(value: Any, name: str, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a 0-d tensor, got {got}. Reduce it, for example with .sum() or .mean().")
    if value.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {like.dtype} like phi, got {value.dtype}. Convert the data to the dtype of theta."
        )
    return value


def _leaves(layout: Layout) -> list[str]:
    return [f"{path}{tuple(shape)}" for path, shape in zip(layout.structure.paths(), layout.shapes, strict=True)]


def over_levels(fn: Callable[..., Any], levels: Levels) -> Callable[..., Any]:
    """``fn`` of one problem -> the same over the batch axes, by nested ``vmap``."""
    for flags in reversed(levels):  # the innermost axis first
        fn = torch.func.vmap(fn, in_dims=tuple(0 if flag else None for flag in flags))
    return fn


def with_axis(levels: Levels, count: int = 1) -> Levels:
    """The levels of ``(x_1, .., x_count, *tensors)`` where the x have every axis and the tensors those of
    ``levels``.
    """
    return tuple((True,) * count + flags for flags in levels)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers at base level.


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

    measures: ClassVar[bool] = True
    """Whether its gradients are those of G; else what a solver has seen of them is not enough to call it converged."""

    def begin_step(self, k: int, state: Any) -> Any:
        """Told by a solver at the start of its step k, which goes on with the state that is returned."""
        return state

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
            value = self._remainder(phi, *self.tensors)
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
            value = over_levels(self.flat.outer, levels)(phi, *theta, *self.tensors[n:])
            if not value.requires_grad:
                return value.detach(), torch.zeros_like(phi), [None] * n
            refuse_captured(value, [phi, *theta], "outer_loss")
            grad, *direct = torch.autograd.grad(_total(value), [phi, *theta], allow_unused=True)
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
        for index in itertools.product(*map(range, self.sizes)):
            own = []
            for i, tensor in enumerate(self.tensors):
                own.append(
                    tensor[tuple(position for position, flags in zip(index, self.levels, strict=True) if flags[i])]
                )
            yield self.flat.objective((), own, ())

    def only(self, rows: Tensor) -> Objective | None:
        """The objective of these tasks alone; None where that cannot be had. A solver goes on with it when the others are done."""
        if len(self.sizes) != 1:
            return None
        (flags,) = self.levels
        tensors = [
            tensor.index_select(0, rows) if flag else tensor for tensor, flag in zip(self.tensors, flags, strict=True)
        ]
        return self._of(tensors, (len(rows),))

    def _of(self, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        return self.flat.objective(self.levels, tensors, sizes)

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
            (grad,) = torch.autograd.grad(_total(value), phi, create_graph=create_graph, allow_unused=True)
        return torch.zeros_like(phi) if grad is None and self.centre is not None else _of_phi(grad)

    def _check(self, value: Tensor, inputs: Sequence[Tensor]) -> None:
        """Once per call, on a graph that is there anyway."""
        if not self._checked:
            refuse_captured(value, inputs, "inner_objective")
        self._checked = True


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
                _GaussNewtonProduct(objective, self._phi) if isinstance(curvature, GaussNewton) else None
            )
        self.value, self.grad = objective._with_split(phi.detach(), value.detach(), self._grad.detach())
        self._tensors, self._levels = [tensor.detach() for tensor in tensors], levels
        self._asked = curvature.product if isinstance(curvature, Hessian) else ReverseOverReverse()
        self._product = flat.fallen.get(self._asked, self._asked)

    @property
    def exact(self) -> bool:
        """Whether all products so far were exact but for rounding."""
        return not (
            isinstance(self._product, FiniteDifference) or (self._gauss_newton and not self._gauss_newton.exact)
        )

    def matvec(self, v: Tensor) -> Tensor:
        """(curvature + damping I) v for v ``(*batch, d)`` or ``(k, *batch, d)``."""
        self._objective.num_matvecs += 1
        product = self._falling_back(self._hessian_product, v) if self._gauss_newton is None else self._gauss_newton(v)
        return product if self._damping == 0 else product + self._damping * v

    def transposed_matvec(self, v: Tensor) -> Tensor:
        """The same: the curvature is symmetric."""
        return self.matvec(v)

    def cross(self, u: Tensor, *, keep: bool = False) -> list[Tensor | None]:
        """(d2G/dphi dtheta)^T u: leaves ``(*batch, *shape)``, None where dG/dphi does not depend on the leaf.
        Frees the graph unless ``keep``.
        """
        return self._falling_back(lambda v: self._cross_product(v, keep), u)

    def _falling_back(self, product: Callable[[Tensor], Any], v: Tensor) -> Any:
        """``product(v)``, in another way where an operator lacks the derivative that this one needs."""
        while True:
            try:
                return product(v)
            except (NotImplementedError, RuntimeError, AssertionError) as error:
                flat = self._objective.flat
                following = next_after(self._product, error, FALL_BACK, "Hessian product", flat.said)
                if following is None:
                    raise
                self._product = flat.fallen[self._asked] = following

    def _hessian_product(self, v: Tensor) -> Tensor:
        if isinstance(self._product, ReverseOverReverse):
            product = backward_product(self._grad, self._phi, v)
            return product if self._objective.centre is None else product + self._objective.curvature_product(v)
        phi = self._phi.detach()
        extra = v.shape[: v.ndim - phi.ndim]
        if isinstance(self._product, FiniteDifference):
            rows = [self._differences(row)[0] for row in v.reshape(-1, *phi.shape)]
            return torch.stack([row for row in rows if row is not None]).reshape(v.shape)
        gradient = over_levels(self._objective.flat.condition, with_axis(self._levels))

        def along(direction: Tensor) -> Tensor:
            return alike(*torch.func.jvp(lambda point: gradient(point, *self._tensors), (phi,), (direction,)))

        for _ in extra:
            along = torch.func.vmap(along)
        return along(v)

    def _cross_product(self, u: Tensor, keep: bool) -> list[Tensor | None]:
        if isinstance(self._product, ReverseOverReverse):
            parts = [part for part in (self._grad, self._slope()) if part is not None and part.requires_grad]
            if not parts:
                return [None] * len(self._theta)
            cotangents = [u] * len(parts)
            return list(torch.autograd.grad(parts, self._theta, cotangents, allow_unused=True, retain_graph=keep))
        phi, n = self._phi.detach(), len(self._theta)
        if isinstance(self._product, FiniteDifference):
            return self._differences(u)[1:]
        of_theta = torch.func.grad(self._objective.flat.inner, argnums=tuple(range(1, n + 1)))
        gradient = over_levels(of_theta, with_axis(self._levels))
        values, tangents = torch.func.jvp(lambda point: gradient(point, *self._tensors), (phi,), (u,))  # type: ignore[misc]
        return [alike(value, tangent) for value, tangent in zip(values, tangents, strict=True)]

    @cached_property
    def _differences(self) -> Differences:
        assert isinstance(self._product, FiniteDifference)
        return Differences(self._gradients, self._phi.detach(), self._product.step)

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


class _GaussNewtonProduct:
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
            penalty = _total(over_levels(flat.penalty, levels)(phi, *objective.tensors))
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
        return self._flat.fallen.get(_GaussNewtonProduct, OF_A_MODEL[0])

    def _jacobian_product(self, v: Tensor) -> Tensor:
        """J v, in another way where an operator of the model lacks the derivative that this one needs."""
        while True:
            try:
                return self._along(v)
            except (NotImplementedError, RuntimeError, AssertionError) as error:
                following = next_after(self._way, error, OF_A_MODEL, "GaussNewton", self._flat.said)
                if following is None:
                    raise
                self._flat.fallen[_GaussNewtonProduct] = following

    def _along(self, v: Tensor) -> Tensor:
        if isinstance(self._way, FiniteDifference):
            phi = self._phi.detach()
            if self._differences is None:
                self._differences = Differences(lambda x: [self._predict(x)], phi, None)
            rows = [self._differences(row)[0] for row in v.reshape(-1, *phi.shape)]
            found = torch.stack([row for row in rows if row is not None])
            return found.reshape(*v.shape[: v.ndim - phi.ndim], *found.shape[1:])
        if isinstance(self._way, ForwardOverReverse) and v.ndim == self._phi.ndim:  # one v for each problem
            return _tangent(self._predict, self._phi.detach(), v)
        if self._transposed is None:
            # J v is the derivative of w -> J^T w
            with torch.enable_grad():
                w = torch.zeros_like(self._outputs, requires_grad=True)
                (jt_w,) = torch.autograd.grad(self._outputs, self._phi, w, create_graph=True)
            self._transposed = (jt_w, w)
        return backward_product(*self._transposed, v)


def _tangent(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The derivative of ``fn`` at x along v, by dual numbers: with them a model does what it does in eager mode."""
    if forward_ad._current_level >= 0:  # the user's; there is only one
        return alike(*torch.func.jvp(fn, (x,), (v,)))
    # a Function, that of argmin say, switches forward mode off
    with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(fn(forward_ad.make_dual(x, v)))
    return torch.zeros_like(primal) if tangent is None else alike(primal, tangent)


def alike(value: Tensor, tangent: Tensor) -> Tensor:
    """The tangent in the dtype of its value: PyTorch's of a Python number times a 0-d float32 is float64."""
    return tangent.to(value.dtype)


def with_tangent_alike(x: Tensor) -> Tensor:
    """x, whose tangents, if it has any, are of its dtype: there and back again, for .to() alone sees the dtype of x."""
    forward = any(
        interpreter.key() == torch._C._functorch.TransformType.Jvp
        for interpreter in torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters()
    )
    return x.double().float() if forward and x.dtype == torch.float32 else x


def _total(value: Tensor) -> Tensor:
    """Over the batch; one problem has nothing to add up."""
    return value.sum() if value.ndim else value


def _of_phi(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise ValueError(
            "inner_objective: expected a function of phi, but the graph shows no dependence on it. Was phi detached?"
        )
    return grad


def backward_product(outputs: Tensor, inputs: Tensor, v: Tensor) -> Tensor:
    """v^T d(outputs)/d(inputs) on a retained graph; v may have further leading axes: several vectors at once."""

    def product(v: Tensor) -> Tensor:
        if not outputs.requires_grad:
            return torch.zeros_like(inputs)
        (result,) = torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(inputs) if result is None else result

    extra = v.shape[: v.ndim - outputs.ndim]
    if not extra:
        return product(v)
    return torch.func.vmap(product)(v.reshape(-1, *outputs.shape)).reshape(*extra, *inputs.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Compositions of torch.func, differentiable again in every mode.


def condition(flat: Flat, levels: Levels) -> Callable[..., Tensor]:
    """``(phi, *tensors) -> condition``; ``levels`` over (phi, *tensors)."""
    return over_levels(flat.condition, levels)


def condition_product(flat: Flat, levels: Levels, transposed: bool) -> Callable[..., Tensor]:
    """``(u, phi, *tensors) -> A u``, or A^T u, with A the derivative of the condition in phi; ``levels`` over (u, phi, *tensors)."""

    def product(u: Tensor, phi: Tensor, *tensors: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda p: flat.condition(p, *tensors), phi)[1]
        if flat.symmetric or transposed:
            return pull(u)[0]
        # A u is the derivative of w -> A^T w, which is linear
        return torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(phi))[1](u)[0]

    return over_levels(product, levels)


def pullback(
    fn: Callable[..., Tensor], arguments: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The vector-Jacobian product of ``fn`` with respect to the wanted arguments; None for the others."""
    chosen = [i for i, want in enumerate(wanted) if want]
    if not chosen:
        return [None] * len(arguments)

    def of_chosen(*values: Tensor) -> Tensor:
        full = list(arguments)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return fn(*full)

    # vjp's own function may be called once its level is gone, and saved tensors still wear it
    arguments = [torch._C._functorch.unwrap_if_dead(argument) for argument in arguments]
    cotangent = torch._C._functorch.unwrap_if_dead(cotangent)
    products = torch.func.vjp(of_chosen, *[arguments[i] for i in chosen])[1](cotangent)
    result: list[Tensor | None] = [None] * len(arguments)
    for i, product in zip(chosen, products, strict=True):
        result[i] = product
    return result


def pushforward(
    fn: Callable[..., Tensor], arguments: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor | None:
    """The Jacobian-vector product of ``fn``; None if every tangent is None."""
    chosen = [i for i, tangent in enumerate(tangents) if tangent is not None]
    if not chosen:
        return None

    def of_chosen(*values: Tensor) -> Tensor:
        full = list(arguments)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return fn(*full)

    arguments = [torch._C._functorch.unwrap_if_dead(argument) for argument in arguments]
    return alike(*torch.func.jvp(of_chosen, tuple(arguments[i] for i in chosen), tuple(tangents[i] for i in chosen)))


# ----------------------------------------------------------------------------------------------------------------------
# What must not go unseen: tensors that the objective captured instead of receiving them.

_CAPTURED = (
    "{name} uses a tensor that carries {what} but is no part of theta or data, so no derivative would reach it. "
    "Pass it through theta or data, or detach it."
)


def refuse_captured(value: Tensor, inputs: Sequence[Tensor], name: str) -> None:
    """Walk the graph of ``value``: every leaf must be one of ``inputs``."""
    known = {id(tensor) for tensor in inputs}
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            words = _CAPTURED.format(name=name, what=f"a gradient (shape {tuple(variable.shape)}, requires_grad=True)")
            if isinstance(variable, torch.nn.Parameter):
                words += (
                    " With functional_call: phi has to have every parameter of the module, or {**theta, **phi} together; those that are in "
                    "neither are the module's own."
                )
            raise ValueError(words)
        stack.extend(parent for parent, _ in node.next_functions)


def refuse_eager_forward_mode(flat: Flat, phi: Tensor, tensors: Sequence[Tensor]) -> None:
    """Eager dual numbers do not nest, and a Function's forward does not even see them."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    if any(is_dual(tensor) for tensor in tensors):
        raise NotImplementedError(
            "dual tensors of torch.autograd.forward_ad are not supported, and torch.func.linearize makes such. Use torch.func.jvp "
            "or jacfwd."
        )
    if is_dual(flat.probe(phi.detach(), *[tensor.detach() for tensor in tensors])):
        raise ValueError(_CAPTURED.format(name=flat.source, what="a tangent of torch.autograd.forward_ad"))


def is_dual(tensor: Tensor) -> bool:
    """Whether the tensor carries a tangent of eager forward mode."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
    )


def transforms_active() -> bool:
    """Whether the caller runs under a ``torch.func`` transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a ``torch.func`` transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def refuse_captured_under_transforms(flat: Flat, phi: Tensor, tensors: Sequence[Tensor]) -> None:
    """The same check where a transform may hide the tensor: G of plain tensors must be plain.

    Every level of every input is stripped (one slice of a batch, the primal of a dual), so that whatever the value
    still carries came in through the side door.
    """
    with torch.enable_grad():
        value = flat.probe(_strip(phi), *[_strip(tensor) for tensor in tensors])
    while is_transformed(value):
        if torch._C._functorch.is_batchedtensor(value):
            raise ValueError(_CAPTURED.format(name=flat.source, what="a batch axis of torch.func.vmap"))
        if value.requires_grad or torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(_CAPTURED.format(name=flat.source, what="a gradient of a torch.func transform"))
        value = torch._C._functorch.get_unwrapped(value)
    if value.requires_grad:
        raise ValueError(_CAPTURED.format(name=flat.source, what="a gradient"))


def _strip(tensor: Tensor) -> Tensor:
    while is_transformed(tensor):
        inner = torch._C._functorch.get_unwrapped(tensor)
        if torch._C._functorch.is_batchedtensor(tensor):
            axis = torch._C._functorch.maybe_get_bdim(tensor)
            if not inner.shape[axis]:
                raise ValueError("vmap: expected at least one problem along the mapped axis, got an empty one.")
            inner = inner.select(axis, 0)
        tensor = inner
    return tensor.detach()


def refuse_batched_gradients(tensors: Sequence[Tensor]) -> None:
    """``torch.autograd`` has a vmap of its own, older than ``torch.func``, which a Function cannot answer."""
    if any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors):
        raise NotImplementedError(
            "torch.autograd.functional with vectorize=True, and torch.autograd.grad with is_grads_batched=True, are not supported. Use "
            "torch.func.jacrev or torch.func.hessian, or leave these arguments out."
        )


def refuse_nested_forward_mode(tensors: Sequence[Tensor]) -> None:
    """PyTorch hands a Function's ``jvp`` no tangent of an outer forward mode: the second derivative would be 0
    without a word.
    """
    forward_levels = {
        interpreter.level()
        for interpreter in torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters()
        if interpreter.key() == torch._C._functorch.TransformType.Jvp
    }
    if len(forward_levels) < 2:
        return
    levels = set()
    for tensor in tensors:
        while is_transformed(tensor):
            levels.add(torch._C._functorch.maybe_get_level(tensor))
            tensor = torch._C._functorch.get_unwrapped(tensor)
    if len(levels & forward_levels) >= 2:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd of jacfwd, jvp of jvp) cannot be right here. Use torch.func.hessian, "
            "which is jacfwd(jacrev(f)), or jacrev(jacfwd(f))."
        )
