"""A loss over more data than fit into memory together with the graph of their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.derivatives.guards import is_dual, refuse_captured, transforms_active


def sum_over_parts(loss: Callable[..., Tensor], parts: Iterable[Any], *arguments: Any) -> Tensor:
    """The sum of ``loss(*arguments, part)`` over the parts of the data, without the graphs of all of them at one time.

    For the G (or L) of one problem with many examples. The numbers are those of a plain sum; only the memory is another: a gradient and
    each Hessian product go through the parts one by one, and each part's graph is gone before the next one is made. A gradient costs
    what it costs otherwise, a product one more gradient.

    Under a transform of ``torch.func``, in a batch of problems and for third derivatives it is the plain sum, with its memory.
    ``compile=True`` keeps what several products share, which is what this is there to avoid: leave it out.

    Args:
        loss: of the arguments and one part; a scalar. It must be the same function each time, so without chance.
        parts: pieces of data, such as ``zip(x.split(1000), y.split(1000))``. An iterator is read once and its items are kept; anything
            else is iterated anew for each gradient and product, so that it may load its pieces then.
        arguments: what derivatives are wanted of, such as phi and theta (trees), and whatever else the loss needs.

    Raises:
        ValueError: there is no part; a value is no scalar; the loss or a part has a gradient that is not among the arguments.

    Example:
        >>> def inner_objective(phi, theta, data):
        ...     pieces = zip(data["x"].split(1000), data["y"].split(1000))
        ...     return bilevel.sum_over_parts(squares, pieces, phi) / len(data["x"]) + theta.exp() * phi.square().sum()
    """
    parts = tuple(parts) if isinstance(parts, Iterator) else parts
    leaves, structure = pytree.tree_flatten(arguments)
    own = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    work = _Sum(loss, parts, leaves, structure, own)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not own or not torch.is_grad_enabled() or transforms_active() or any(map(is_dual, tensors)):
        return work.value([leaves[i] for i in own])
    device = leaves[own[0]].device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    # products are taken when the caller's autocast has ended
    work.autocast = lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
    return _Value.apply(work, *(leaves[i] for i in own))


@dataclass(eq=False)
class _Sum:
    """The loss of each part, as a function of the leaves that derivatives are wanted of."""

    loss: Callable[..., Tensor]
    parts: Iterable[Any]
    leaves: list[Any]
    structure: Any
    own: list[int]
    autocast: Callable[[], AbstractContextManager[Any]] = torch.enable_grad

    def __post_init__(self) -> None:
        """The tensors themselves are saved by autograd, which notices where they are written to."""
        self.leaves = [None if i in self.own else leaf for i, leaf in enumerate(self.leaves)]

    def each(self, inputs: list[Tensor]) -> Iterator[Tensor]:
        """Part after part."""
        leaves = self.leaves.copy()
        for i, tensor in zip(self.own, inputs, strict=True):
            leaves[i] = tensor
        arguments = pytree.tree_unflatten(leaves, self.structure)
        none = True
        for part in self.parts:
            none = False
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(part)):
                raise ValueError(
                    "sum_over_parts: expected parts that are data, got one that carries a gradient, which would not be seen. Pass what it "
                    "was made of after the parts, as theta, and make it in the loss."
                )
            yield _scalar(
                self.loss(*arguments, part)
            )  # without a name here, which would hold its graph while the next one is made
        if none:
            raise ValueError("sum_over_parts: expected at least one part, got none. Has an iterator been used before?")

    def value(self, inputs: list[Tensor]) -> Tensor:
        """The plain sum."""
        first, *others = self.each(inputs)
        for other in others:
            first = first + other
        return first

    def value_and_gradients(self, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """One graph at a time."""
        total: Tensor | None = None
        gradients: list[Tensor | None] = [None] * len(inputs)
        with torch.enable_grad(), self.autocast():
            inputs = [x.detach().requires_grad_() for x in inputs]
            for value in self.each(inputs):
                if value.requires_grad:
                    _refuse_captured(value, inputs)
                    _add(gradients, torch.autograd.grad(value, inputs, allow_unused=True))
                total = value.detach() if total is None else total + value.detach()
                del value
        assert total is not None
        return total, gradients

    def products(self, inputs: list[Tensor], used: list[int], v: tuple[Tensor, ...]) -> list[Tensor | None]:
        """v^T (second derivative), one graph at a time; all of them where the products are to be differentiated."""
        keep = torch.is_grad_enabled()
        found: list[Tensor | None] = [None] * len(inputs)
        with torch.enable_grad(), self.autocast():
            for value in self.each(inputs):
                if value.requires_grad:
                    _add(found, _product(value, inputs, used, v, keep))
                del value
        return found


def _product(
    value: Tensor, inputs: list[Tensor], used: list[int], v: tuple[Tensor, ...], keep: bool
) -> tuple[Tensor | None, ...]:
    slopes = torch.autograd.grad(value, [inputs[i] for i in used], create_graph=True, allow_unused=True)
    pairs = [(slope, w) for slope, w in zip(slopes, v, strict=True) if slope is not None and slope.requires_grad]
    if not pairs:
        return ()
    own, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(own, inputs, cotangents, create_graph=keep, allow_unused=True)


class _Value(torch.autograd.Function):
    """The sum. Its gradient is there as soon as it is: who asks for a graph wants that."""

    @staticmethod
    def forward(ctx: Any, work: _Sum, *inputs: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*inputs)
        value, ctx.gradients = work.value_and_gradients(list(inputs))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        used = [i for i, gradient in enumerate(ctx.gradients) if gradient is not None]
        known = [ctx.gradients[i] for i in used]
        found: list[Tensor | None] = [None] * len(ctx.gradients)
        for i, gradient in zip(used, _Gradient.apply(ctx.work, used, known, *ctx.saved_tensors), strict=True):
            found[i] = cotangents[0] * gradient
        return None, *found


class _Gradient(torch.autograd.Function):
    """The gradient, which is known, as a function of the same inputs."""

    @staticmethod
    def forward(ctx: Any, work: _Sum, used: list[int], known: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.work, ctx.used = work, used
        ctx.save_for_backward(*inputs)
        return tuple(gradient.detach() for gradient in known)  # objects of their own: this may be asked for again

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        return None, None, None, *ctx.work.products(list(ctx.saved_tensors), ctx.used, v)


def _scalar(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"sum_over_parts: expected a loss that is a scalar tensor, got {got}.")


def _add(sums: list[Tensor | None], terms: tuple[Tensor | None, ...]) -> None:
    for i, term in enumerate(terms):
        if term is not None:
            known = sums[i]
            sums[i] = term if known is None else known + term


def _refuse_captured(value: Tensor, inputs: list[Tensor]) -> None:
    try:
        refuse_captured(value, inputs, "loss")
    except ValueError as error:
        raise ValueError(
            "sum_over_parts: the loss uses a tensor that carries a gradient and is none of its arguments, so no derivative would reach it. "
            "Pass it after the parts: sum_over_parts(loss, parts, phi, theta) calls loss(phi, theta, part)."
        ) from error
