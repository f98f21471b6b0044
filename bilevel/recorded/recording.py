"""From a function to a program: its tensor operations as a graph, and that graph cut in parts that are run at different
times.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.recorded.lowering import direct, leave_out_transposed_copies, put_skinny_factors_in_front
from bilevel.recorded.simplify import FORMULAS, simplify

Function = Callable[..., Any]

_aten = torch.ops.aten


def recorded(function: Function, *arguments: Tensor) -> fx.GraphModule:
    """The tensor operations of ``function`` at these arguments, without in-place ones, and without what only autograd
    needs.
    """
    with _without_stack_traces():
        module = make_fx(function, decomposition_table=FORMULAS)(*arguments)
        if any(node.op == "call_function" and _is_mutable(node.target) for node in module.graph.nodes):
            functional = torch.func.functionalize(module, remove="mutations")
            module = make_fx(functional, decomposition_table=FORMULAS)(*arguments)
    for node in module.graph.nodes:
        if node.target is _aten.view.default:  # of vectors whose strides may be others next time
            node.target = _aten.reshape.default
    simplify(module.graph)
    leave_out_transposed_copies(module.graph)
    if arguments[0].device.type == "cpu":
        put_skinny_factors_in_front(module.graph)
    module.recompile()
    return module


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """One for each operation is a quarter of the time that a recording takes, and nobody reads them."""
    config = getattr(fx, "config", None)  # of torch, and newer than some that this library works with
    before = getattr(config, "do_not_emit_stack_traces", None)
    if before is None:
        yield
        return
    config.do_not_emit_stack_traces = True  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before  # type: ignore[union-attr]


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def split_linearisation(whole: fx.GraphModule) -> tuple[Function, Function, Function]:
    """(v, u, phi, *tensors) -> [value, grad, H v, C^T u], cut into what depends on v, what on u, and the rest."""
    nodes = list(whole.graph.nodes)
    v, u = nodes[:2]
    value, grad, product, cross = nodes[-1].args[0]
    of_v, of_u = _depending(nodes, v), _depending(nodes, u)
    saved_v, product_graph = _part(nodes, of_v, v, product)
    saved_u, cross_graph = _part(nodes, of_u, u, cross)
    prepare = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:-1]:
        if node not in of_v | of_u:
            copies[node] = prepare.node_copy(node, copies.__getitem__)
    numbers = [_own(prepare, copies[node]) for node in (value, grad)]
    prepare.output((*numbers, *fx.map_arg((tuple(saved_v), tuple(saved_u)), copies.__getitem__)))
    graphs = (prepare, product_graph, cross_graph)
    for graph in graphs:
        graph.eliminate_dead_code()
    one, two, three = (fx.GraphModule(whole, direct(graph)).forward for graph in graphs)
    return one, two, three


def split_constants(whole: fx.GraphModule) -> tuple[Function, Function]:
    """(phi, *tensors) -> outputs, cut into (*tensors) -> constants and (phi, *constants) -> outputs."""
    nodes = list(whole.graph.nodes)
    phi, output = nodes[0], nodes[-1].args[0]
    constants, rest = _part(nodes, _depending(nodes, phi), phi, output)
    before = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[1:-1]:
        if node.op == "placeholder" or all(argument in copies for argument in node.all_input_nodes):
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in constants))
    before.eliminate_dead_code()
    return fx.GraphModule(whole, direct(before)).forward, fx.GraphModule(whole, direct(rest)).forward


def _depending(nodes: list[fx.Node], source: fx.Node) -> set[fx.Node]:
    found = {source}
    for node in nodes[:-1]:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _part(nodes: list[fx.Node], own: set[fx.Node], source: fx.Node, output: Any) -> tuple[list[fx.Node], fx.Graph]:
    """A function of the source and of the nodes that its own nodes need from outside; these nodes."""
    outputs: set[fx.Node] = set()
    fx.map_arg(output, outputs.add)
    saved = [node for node in nodes if node not in own and (node in outputs or any(user in own for user in node.users))]
    graph = fx.Graph()
    copies = {source: graph.placeholder("vector")}
    for node in saved:
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        if node in own and node is not source:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(output, lambda node: _own(graph, copies[node])))
    return saved, graph


def _own(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A result that shares no memory with theta, data or a constant: a solver of the user's may write to what it got."""
    source = node
    while source.op == "call_function" and _is_view(source.target):
        source = source.args[0]  # type: ignore[assignment]  # views are of a node
    return node if source.op == "call_function" else graph.call_function(_aten.clone.default, (node,))


def _is_view(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target is _aten._unsafe_view.default or any(out.alias_info is not None for out in target._schema.returns)
    return target is operator.getitem
