"""A recorded program without the work that only the general rules of autograd need.

Backward passes begin with a gradient of one, add the zeros of branches that nothing depends on, take powers of one and zero, and compute
again what another pass has computed; the rules of vmap give tensors the shape that they have. Leaving that out changes nothing but the sign
of a zero: NaN and infinity go where they went. Strides are kept: an operator may have been recorded for those that its argument had.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

_aten = torch.ops.aten

_CONSTANT: dict[Any, float] = {_aten.ones_like.default: 1.0, _aten.zeros_like.default: 0.0}
_IDENTITIES = (_aten.expand.default, _aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
"""What changes nothing but the shape, if that: vmap puts them around every product of matrices."""
_SHAPES_ONLY = (
    _aten.expand.default,
    _aten.reshape.default,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
    _aten.t.default,
)


def _log_softmax_backward(grad: Tensor, logarithm: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """As a formula: its softmax need not be computed again for every ``grad``, as the operator does."""
    return (grad - logarithm.exp() * grad.sum(dim, keepdim=True)).to(dtype)


FORMULAS = {_aten._log_softmax_backward_data.default: _log_softmax_backward}
"""Operators to record as others: the ``decomposition_table`` of ``make_fx``."""


def simplify(graph: fx.Graph) -> None:
    """Simplify in place. The nodes know their shapes and dtypes, as those that ``make_fx`` records do."""
    constants: dict[fx.Node, float] = {}  # nodes that are one number everywhere
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        value = _value(node, constants)
        if value is not None:
            constants[node] = value
        simpler = _simpler(graph, node, constants) or _independent(graph, node, constants) or node
        simpler = known.setdefault(_key(simpler), simpler)
        if simpler is not node:
            node.replace_all_uses_with(simpler)
    graph.eliminate_dead_code()


def _value(node: fx.Node, constants: dict[fx.Node, float]) -> float | None:
    """The number that all entries of the node are, if that is known."""
    if node.target in _CONSTANT:
        return _CONSTANT[node.target]
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 0:
        return 1.0  # of NaN, too
    value = constants.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if value is None or node.target in _SHAPES_ONLY:
        return value
    return -value if node.target is _aten.neg.default else None


def _simpler(graph: fx.Graph, node: fx.Node, constants: dict[fx.Node, float]) -> fx.Node | None:
    """Another node with the same numbers; None if there is none to be seen."""
    arguments: tuple[Any, ...] = (*node.args, None, None)
    first, second = arguments[:2]
    if node.target in (_aten.detach.default, _aten.alias.default):
        return first
    if node.target in _IDENTITIES and is_known(first) and like(node)[0] == like(first)[0]:
        return first
    if node.target is _aten.t.default and first.target is _aten.t.default:
        return first.args[0]
    if (
        node.target is _aten.transpose.int
        and first.target is _aten.transpose.int
        and set(node.args[1:]) == set(first.args[1:])
    ):
        return first.args[0]
    if node.target is _aten.sum.default and like(node) == like(first) and like(node)[0] == ():
        return first
    if node.target in (_aten.pow.Tensor_Scalar, _aten.mul.Scalar) and second == 1 and like(first) == like(node):
        return first
    if node.target not in (_aten.mul.Tensor, _aten.add.Tensor) or node.kwargs:
        return None
    for own, other in ((first, second), (second, first)):
        value = constants.get(own)
        # other may be a number, or of another shape
        if value is None or not isinstance(other, fx.Node) or like(other) != like(node):
            continue
        if value == (1 if node.target is _aten.mul.Tensor else 0):
            return other
        if value == -1 and node.target is _aten.mul.Tensor:
            with graph.inserting_before(node):
                negative = graph.call_function(_aten.neg.default, (other,))
            negative.meta = node.meta
            return negative
    return None


def _independent(graph: fx.Graph, node: fx.Node, constants: dict[fx.Node, float]) -> fx.Node | None:
    """Ones and zeros like another tensor, as what does not depend on it: then they are made once, and so is all that follows from them
    alone. None if this is something else.
    """
    if node.target not in _CONSTANT or "val" not in node.meta:
        return None
    like_it = node.meta["val"]
    if like_it.stride() != torch.empty(like_it.shape, device="meta").stride():
        return None
    with graph.inserting_before(node):
        found = graph.call_function(
            _aten.full.default,
            (list(like_it.shape), _CONSTANT[node.target]),
            {"dtype": like_it.dtype, "device": like_it.device, "pin_memory": False},
        )
    found.meta = node.meta
    constants[found] = constants[node]
    return found


def _key(node: fx.Node) -> Any:
    """Equal for nodes that compute the same."""
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return node
    elif node.target is not operator.getitem:  # a part of what an operator returns
        return node
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0
    return (
        node.target,
        repr(structure),  # torch 2.6 cannot hash it
        tuple(leaf if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves),
    )


def is_known(node: fx.Node) -> bool:
    """Whether its shape is: old versions of PyTorch do not say it of a tensor that the function captured."""
    return "val" in node.meta or "tensor_meta" in node.meta


def like(node: fx.Node) -> tuple[Any, ...]:
    """Shape, strides and dtype of what a recorded node computes."""
    found = node.meta["val"] if "val" in node.meta else node.meta["tensor_meta"]
    stride = found.stride if isinstance(found, TensorMetadata) else found.stride()
    return tuple(found.shape), tuple(stride), found.dtype
