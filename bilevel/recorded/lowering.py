"""The last steps to a recorded program: operators in the form in which this processor, and Python, are fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bilevel.recorded.simplify import is_known, like

_aten = torch.ops.aten

SKINNY = 10
"""Columns at most of a factor that is better in front."""
LARGE = {_aten.mm.default: 20_000, _aten.bmm.default: 800}
"""Entries at least of the other factor: below, the two views and the copy cost what is gained."""
_SWAPPED: dict[Any, tuple[Any, tuple[int, ...]]] = {
    _aten.mm.default: (_aten.t.default, ()),
    _aten.bmm.default: (_aten.transpose.int, (1, 2)),
}


def leave_out_transposed_copies(graph: fx.Graph) -> None:
    """A copy of (A B)^T as B^T A^T: the gradient of the weights of a linear layer, where vmap has made it. In place. The numbers are the
    same but for rounding, strides are kept. Not of single products: what is skinny would not be in front any more, and autograd makes no
    such copies of them.
    """
    for node in list(graph.nodes):
        if node.target is not _aten.clone.default or node.kwargs.get("memory_format") is not torch.contiguous_format:
            continue
        view: Any = node.args[0]
        product: Any = view.args[0] if view.args else None
        if not isinstance(product, fx.Node) or product.target is not _aten.bmm.default:
            continue
        if not _is_transposed(view, product) or len(view.users) > 1 or len(product.users) > 1:
            continue
        with graph.inserting_before(node):
            found = _transposed_product(graph, product)
        found.meta = node.meta
        node.replace_all_uses_with(found)
    graph.eliminate_dead_code()


def put_skinny_factors_in_front(graph: fx.Graph) -> None:
    """A B of a matrix and a few columns as (B^T A^T)^T, for the BLAS of PyTorch on a CPU: two to eight times as fast where A is large
    (benchmarks/NOTES.md). In place; the nodes know their shapes. The numbers are the same but for rounding, strides are kept.
    """
    for node in list(graph.nodes):
        # the transposed factors that are made above do not know their shapes
        if node.target not in LARGE or not all(map(is_known, node.args)):
            continue
        a, b = node.args
        *_, m, k = like(a)[0]
        n = like(b)[0][-1]
        one_of_many = node.target is _aten.mm.default and n == 1  # that is a matrix and a vector, which is fast
        # nor where A has few rows: then what is in front is skinny as it is
        if n > SKINNY or 4 * n > m or m * k < LARGE[node.target] or one_of_many:
            continue
        with graph.inserting_before(node):
            view, axes = _SWAPPED[node.target]
            back = graph.call_function(view, (_transposed_product(graph, node), *axes))
            found = graph.call_function(_aten.clone.default, (back,), {"memory_format": torch.contiguous_format})
        found.meta = node.meta
        node.replace_all_uses_with(found)
    graph.eliminate_dead_code()


def _transposed_product(graph: fx.Graph, product: Any) -> fx.Node:
    """(A B)^T as B^T A^T."""
    a, b = product.args
    return graph.call_function(product.target, (_transposed(graph, b, product), _transposed(graph, a, product)))


def _transposed(graph: fx.Graph, factor: fx.Node, product: fx.Node) -> fx.Node:
    """A factor of this product with its matrices transposed."""
    view, axes = _SWAPPED[product.target]
    if _is_transposed(factor, product):
        return factor.args[0]  # type: ignore[return-value]  # a node
    return graph.call_function(view, (factor, *axes))


def _is_transposed(node: fx.Node, product: fx.Node) -> bool:
    """Whether a node is another one with the matrices of such products transposed."""
    view, axes = _SWAPPED[product.target]
    return node.target is view and {axis % 3 for axis in node.args[1:]} == set(axes)  # type: ignore[operator]  # numbers


def direct(graph: fx.Graph) -> fx.Graph:
    """The same operators as the functions of ``torch``, which Python calls in two thirds of the time. They know nothing of each other's
    place in the graph any more: this is the last that is done to it.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
    return graph


_OVERLOADS = {
    "abs addcmul addmm addmv baddbmm bmm cat cos dot exp log mm mv neg permute reciprocal relu": ("default",),
    "reshape rsqrt sigmoid sin split_with_sizes sqrt t tanh unsqueeze vdot": ("default",),
    "add bitwise_and bitwise_or div eq ge gt le lt mul ne sub": ("Tensor", "Scalar"),
    "bitwise_not sum": ("default", "dim_IntList"),
    "pow": ("Tensor_Scalar", "Tensor_Tensor"),
    "mean squeeze": ("dim",),
    "transpose": ("int",),
    "where": ("self",),
}
_FUNCTIONS = {
    getattr(getattr(_aten, name), overload): getattr(torch, name)
    for names, overloads in _OVERLOADS.items()
    for name in names.split()
    for overload in overloads
    if overload in getattr(_aten, name).overloads()
}
"""Functions of ``torch`` that take the arguments of these operators as they are."""
