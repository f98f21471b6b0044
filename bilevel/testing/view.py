"""The problem as functions of two vectors, in float64 where that is possible, and where around a point to look at it."""

from __future__ import annotations

from collections.abc import Sequence
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


def moves(layout: Layout, name: str, values: Sequence[Tensor], *, few: bool = False) -> Directions:
    """Directions for differences in a variable of this layout that takes these values; ``few``: at most 4, over all leaves."""
    lengths, names, sizes = (
        layout.sizes,
        [name + path for path in layout.structure.paths()],
        typical_sizes(layout, values),
    )
    if few:
        smallest = max(min(sizes), 1e-3 * max(sizes))
        return directions(values[0], [sum(lengths)], [name], [smallest], every=4, count=4)
    return directions(values[0], lengths, names, sizes)


def typical_sizes(layout: Layout, values: Sequence[Tensor]) -> list[float]:
    """The size of an entry of each leaf, over several values; that of all leaves, or 1, where it is about zero."""

    def size(parts: Sequence[Tensor]) -> float:
        return max(float(part.square().mean().sqrt()) for part in parts) if parts[0].numel() else 0.0

    whole = size(values)
    whole = whole if whole > 1e-8 else 1.0
    leaves = [size(parts) for parts in zip(*(value.split(layout.sizes) for value in values), strict=True)]
    return [leaf if leaf > 1e-3 * whole else whole for leaf in leaves]


def aside(view: View, phis: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """A point near the first, where nothing is zero by chance or by optimality; none if G is finite nowhere around."""
    sizes = typical_sizes(view.phi, phis)
    scale = torch.cat([phis[0].new_full((n,), size) for n, size in zip(view.phi.sizes, sizes, strict=True)])
    noise = torch.randn(scale.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(scale)
    for length in (0.1, 0.01, 0.001):
        phi = phis[0] + length * scale * noise
        if view.is_finite(phi, theta):
            return [phi]
    return []
