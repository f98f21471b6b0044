"""The problem as functions of two vectors, in float64 where that is possible, and where around a point to look at it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelProblem
from bilevel.testing.differences import Directions, directions
from bilevel.trees import Layout, Tree, layout_of, tree_map


@dataclass(frozen=True)
class View:
    """G and L of one task as functions of the vectors phi ``(d,)`` and theta ``(p,)``, in one precision."""

    problem: BilevelProblem
    phi: Layout
    theta: Layout
    data: Any
    dtype: torch.dtype

    def inner(self, phi: Tensor, theta: Tensor) -> Tensor:
        """G, 0-d."""
        return self.problem.inner_objective(self.phi.unravel(phi), self.theta.unravel(theta), self.data)

    def outer(self, phi: Tensor, theta: Tensor) -> Tensor:
        """L, 0-d."""
        return self.problem.outer_loss(self.phi.unravel(phi), self.theta.unravel(theta), self.data)

    def slope(self, phi: Tensor, theta: Tensor) -> Tensor:
        """dG/dphi ``(d,)``."""
        with torch.enable_grad():
            phi = phi.detach().requires_grad_()
            return backward(self.inner(phi, theta), phi).detach()

    def is_finite(self, phi: Tensor, theta: Tensor) -> bool:
        """Whether G, L and dG/dphi are."""
        values = [self.inner(phi, theta), self.outer(phi, theta), self.slope(phi, theta)]
        return all(bool(value.isfinite().all()) for value in values)


def view(problem: BilevelProblem, phi: Tree, theta: Tree, data: Any) -> tuple[View, Tensor, Tensor]:
    """The problem with phi and theta as vectors, in float64 if it can be evaluated there, else in the precision of theta."""
    phi_layout, phi_leaves = layout_of(phi)
    theta_layout, theta_leaves = layout_of(theta)
    x, t = phi_layout.ravel(phi_leaves).detach(), theta_layout.ravel(theta_leaves).detach()
    if x.dtype != torch.float64:
        found = View(problem, phi_layout, theta_layout, cast(data, torch.float64), torch.float64)
        if _works(found, x.double(), t.double()):
            return found, x.double(), t.double()
    return View(problem, phi_layout, theta_layout, cast(data, None), x.dtype), x.clone(), t.clone()


def _works(view: View, phi: Tensor, theta: Tensor) -> bool:
    """Whether nothing in the problem insists on another precision, such as tensors that it captured."""
    try:
        values = [view.inner(phi, theta), view.outer(phi, theta), view.slope(phi, theta)]
    except Exception:
        return False  # the precision of the user is checked by the call of the library
    return all(value.dtype == view.dtype for value in values)


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Detached copies of the tensors, the floating ones in ``dtype``."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(dtype if dtype and leaf.is_floating_point() else leaf.dtype, copy=True)

    return tree_map(copy, tree)


def backward(outputs: Tensor, inputs: Tensor, v: Tensor | None = None, *, graph: bool = False) -> Tensor:
    """v^T d(outputs)/d(inputs); zero where the graph shows no dependence. Keeps the graph of ``outputs``."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (product,) = torch.autograd.grad(outputs, inputs, v, retain_graph=True, create_graph=graph, allow_unused=True)
    return torch.zeros_like(inputs) if product is None else product


def moves_of_phi(view: View, phis: Sequence[Tensor], theta: Tensor) -> Directions:
    """Directions for differences in phi, which takes these values."""
    return _moves(view.phi, "phi", phis, typical_sizes(view.phi, phis, unit_of_phi(view, phis[0], theta)))


def moves_of_theta(view: View, phi: Tensor, theta: Tensor, *, few: bool = False) -> Directions:
    """The same in theta; ``few``: at most 4, over all leaves."""
    unit = min(_unit(lambda t: view.inner(phi, t), theta), _unit(lambda t: view.outer(phi, t), theta))
    return _moves(view.theta, "theta", [theta], typical_sizes(view.theta, [theta], unit), few=few)


def unit_of_phi(view: View, phi: Tensor, theta: Tensor) -> float:
    """The length over which G changes by its own size."""
    return _unit(lambda x: view.inner(x, theta), phi)


def _unit(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The length over which f changes by its own size, by its first and second derivative along one direction; at most 1."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64, device="cpu").to(x)
    v = v / v.norm().clamp_min(1e-30)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = f(x)
        slope = backward(value, x, graph=True)
        bend = backward(slope, x, v)
    size, first, second = (abs(float(number)) for number in (value.detach(), slope.detach() @ v, bend @ v))
    lengths = [size / first if first else 1.0, (size / second) ** 0.5 if second else 1.0]
    return min([1.0, *(length for length in lengths if 0 < length < math.inf)])


def _moves(layout: Layout, name: str, values: Sequence[Tensor], sizes: list[float], *, few: bool = False) -> Directions:
    lengths, names = layout.sizes, [name + path for path in layout.structure.paths()]
    if few:
        smallest = max(min(sizes), 1e-3 * max(sizes))
        return directions(values[0], [sum(lengths)], [name], [smallest], every=4, count=4)
    return directions(values[0], lengths, names, sizes)


def typical_sizes(layout: Layout, values: Sequence[Tensor], unit: float) -> list[float]:
    """The size of an entry of each leaf, over several values; that of all leaves where it is about zero, and ``unit`` where all are."""

    def size(parts: Sequence[Tensor]) -> float:
        return max(float(part.square().mean().sqrt()) for part in parts) if parts[0].numel() else 0.0

    whole = size(values)
    whole = whole if whole > 1e-8 else unit
    leaves = [size(parts) for parts in zip(*(value.split(layout.sizes) for value in values), strict=True)]
    return [leaf if leaf > 1e-3 * whole else whole for leaf in leaves]


def aside(view: View, phis: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """A point near the first, where nothing is zero by chance or by optimality; none if G is finite nowhere around."""
    sizes = typical_sizes(view.phi, phis, unit_of_phi(view, phis[0], theta))
    scale = torch.cat([phis[0].new_full((n,), size) for n, size in zip(view.phi.sizes, sizes, strict=True)])
    noise = torch.randn(scale.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu").to(
        scale
    )
    for length in (0.1, 0.01, 0.001):
        phi = phis[0] + length * scale * noise
        if view.is_finite(phi, theta):
            return [phi]
    return []
