"""What must not go unseen: tensors that the objective captured instead of receiving them, and what PyTorch cannot differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Probed(Protocol):
    """A function of the user's that can be asked for any number that carries whatever it depends on."""

    @property
    def source(self) -> str:
        """What the user calls it."""

    def probe(self, phi: Tensor, *tensors: Tensor) -> Tensor:
        """The number."""


_CAPTURED = (
    "{name} uses a tensor that carries {what} but is no part of theta or data, so no derivative would reach it. "
    "Pass it through theta or data, or detach it. If the function makes it, for a derivative in an input: use torch.func.grad or "
    "torch.func.jvp there."
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


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to; what was made in inference mode does not count."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def refuse_moves(before: list[int], phi: Tensor, name: str) -> None:
    """The solver knows where it asked. ``before``: the :func:`versions` of phi."""
    if versions([phi]) != before:
        raise ValueError(
            f"{name} writes to phi in place, so that what it computes belongs to another point than the one that was asked for. Let it "
            "work on a clone (nn.Embedding: without max_norm). A bound on phi is no part of a function: see fixed_point with a projection."
        )


def refuse_writes(before: list[int], tensors: Sequence[Tensor], name: str) -> None:
    """The tensors are the caller's own. ``before``: their :func:`versions`."""
    if versions(tensors) != before:
        raise ValueError(
            f"{name} writes to theta or data in place. They are the caller's own, and the gradient would be that of other numbers: let it "
            "work on clones. What was written stays written."
        )


def refuse_eager_forward_mode(flat: Probed, phi: Tensor, tensors: Sequence[Tensor]) -> None:
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


def refuse_captured_under_transforms(flat: Probed, phi: Tensor, tensors: Sequence[Tensor]) -> None:
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
            "which is jacfwd(jacrev(f)), or jacrev(jacrev(f))."
        )
