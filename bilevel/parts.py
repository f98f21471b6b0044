"""A loss over more data than fit into memory together with the graph of their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.derivatives.guards import refuse_captured, transforms_active, versions

SAME = 1000
"""Sums of the same numbers in another order may differ by so many eps of their sizes."""


def sum_over_parts(loss: Callable[..., Tensor], parts: Iterable[Any], *arguments: Any) -> Tensor:
    """The sum of ``loss(*arguments, part)`` over the parts of the data, without the graphs of all of them at one time.

    For the G (or L) of one problem with many examples. The numbers are those of a plain sum; only the memory is another: a gradient and
    each Hessian product go through the parts one by one, and each part's graph is gone before the next one is made. A value comes with
    its gradient, where autograd may ask for one; a product takes a forward and a backward pass more than from a graph that is kept.

    So it is in :func:`~bilevel.hypergradient`, :func:`~bilevel.implicit_gradient` and :func:`~bilevel.solve` of one problem. The numbers
    are the same elsewhere, but the memory is that of the plain sum: under a transform of ``torch.func``, which is how batches, the backward
    pass of :func:`~bilevel.argmin`, :func:`~bilevel.unrolled` and ``ForwardOverReverse()`` work; under forward mode; for third
    derivatives; in float16, whose gradients have to be scaled on their way. ``compile=True`` keeps what several products share.

    Args:
        loss: of the arguments and one part; a scalar. It must be the same function each time, so without chance.
        parts: pieces of data, such as ``zip(x.split(1000), y.split(1000))``. An iterator is read once and its items are kept; anything
            else is iterated anew for each gradient and product, so that it may load its pieces then: the same data each time. A loader
            may shuffle them if the loss is a sum over the examples of its part, and not a mean.
        arguments: what derivatives are wanted of, such as phi and theta, and whatever else the loss needs. Trees of tensors: of a module
            ``dict(module.named_parameters())``, with ``torch.func.functional_call`` in the loss.

    Raises:
        TypeError: the loss cannot be called, or the parts cannot be iterated.
        ValueError: there is no part; a value is no scalar; the loss or a part has a gradient that is not among the arguments; data were
            written to between a gradient and a product, or were others when they were iterated anew.

    Example:
        >>> def inner_objective(phi, theta, data):
        ...     parts = zip(data["x"].split(1000), data["y"].split(1000))
        ...     squares = bilevel.sum_over_parts(lambda phi, part: (part[0] @ phi - part[1]).square().sum(), parts, phi)
        ...     return squares / len(data["x"]) + theta.exp() * phi.square().sum()
    """
    if not callable(loss) or not isinstance(parts, Iterable) or isinstance(parts, Mapping):
        raise TypeError(
            "sum_over_parts: expected a loss and an iterable of parts, sum_over_parts(loss, parts, *arguments), got "
            f"{type(loss).__name__} and {type(parts).__name__}."
        )
    leaves, structure = pytree.tree_flatten(arguments)
    own = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    casts = [_Cast.of(device) for device in sorted(devices) if torch.amp.is_autocast_available(device)]
    work = _Sum(loss, parts, leaves, structure, own, casts)
    inputs = [leaves[i] for i in own]
    elsewhere = transforms_active() or torch.autograd.forward_ad._current_level >= 0
    is_half = any(x.dtype == torch.float16 for x in inputs) or any(
        c.enabled and c.dtype == torch.float16 for c in casts
    )
    if not torch.is_grad_enabled() or elsewhere or (own and is_half):
        return work.value(inputs)
    if not own:
        return work.value([], only_data=True)
    if isinstance(parts, Iterator):
        work.parts = tuple(parts)
    return _Value.apply(work, *inputs)


class _Cast(NamedTuple):
    """What autocast is in the call: products are taken when it has ended."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @staticmethod
    def of(device: str) -> _Cast:
        return _Cast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


@dataclass(eq=False)
class _Sum:
    """The loss of each part, as a function of the leaves that derivatives are wanted of."""

    loss: Callable[..., Tensor]
    parts: Iterable[Any]
    leaves: list[Any]
    structure: Any
    own: list[int]
    casts: list[_Cast]
    versions: list[int] = field(default_factory=list)
    seen: _Tally | None = None  # the data of the value and gradient, where they are iterated anew

    def __post_init__(self) -> None:
        """Autograd saves those that derivatives are wanted of, and notices where they are written to."""
        self.leaves = [None if i in self.own else leaf for i, leaf in enumerate(self.leaves)]

    def each(self, inputs: list[Tensor], *, only_data: bool = False, tally: _Tally | None = None) -> Iterator[Tensor]:
        """Part after part."""
        leaves = self.leaves.copy()
        for i, tensor in zip(self.own, inputs, strict=True):
            leaves[i] = tensor
        arguments = pytree.tree_unflatten(leaves, self.structure)
        none = True
        for part in self.parts:
            none = False
            if only_data and any(tensor.requires_grad for tensor in _tensors(part)):
                raise ValueError(
                    "sum_over_parts: expected parts that are data, got one that carries a gradient, which would not be seen. Pass what it "
                    "was made of after the parts, as theta, and make it in the loss."
                )
            if tally is not None:
                tally.add(_tensors(part))
            # neither it nor the part has a name here while the next ones are made
            yield _scalar(self.loss(*arguments, part))
            del part
        if none:
            raise ValueError("sum_over_parts: expected at least one part, got none. Has an iterator been used before?")

    def value(self, inputs: list[Tensor], *, only_data: bool = False) -> Tensor:
        """The plain sum; ``only_data``: of what has no gradient."""
        total: Tensor | None = None
        for value in self.each(inputs, only_data=only_data):
            if only_data:
                _refuse_captured(value, [])
            total = value if total is None else total + value
        assert total is not None
        return total

    def value_and_gradients(self, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """One graph at a time."""
        total: Tensor | None = None
        gradients: list[Tensor | None] = [None] * len(inputs)
        self.versions, self.seen = self._versions(), self._tally()
        with torch.enable_grad(), self._autocast():
            inputs = [x.detach().requires_grad_() for x in inputs]
            for value in self.each(inputs, only_data=True, tally=self.seen):
                _refuse_captured(value, inputs)
                if value.requires_grad:
                    _add(gradients, torch.autograd.grad(value, inputs, allow_unused=True))
                total = value.detach().clone() if total is None else total + value.detach()
                del value
        assert total is not None
        return total, gradients

    def products(self, inputs: list[Tensor], used: list[int], v: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """v^T (second derivative), one graph at a time; all of them where the products are to be differentiated."""
        if self._versions() != self.versions:
            raise ValueError(
                "sum_over_parts: expected the data of the gradient in the product, too, but they were written to in between. Write to "
                "clones."
            )
        keep = torch.is_grad_enabled()
        found: list[Tensor | None] = [None] * len(inputs)
        tally = None if self.seen is None else self._tally()
        with torch.enable_grad(), self._autocast():
            # of each alone: one may be made of another, or be passed twice; and hooks are for the sum
            inputs = [x.view_as(x) for x in inputs]
            for value in self.each(inputs, tally=tally):
                if value.requires_grad:
                    _add(found, _product(value, inputs, used, v, keep))
                del value
        if tally is not None and self.seen is not None and tally.differs(self.seen):
            raise ValueError(
                "sum_over_parts: expected the same data for the gradient and for each product, got others when the parts were iterated "
                "anew. Let them be the same each time (no drop_last with shuffling, no sampling, no random augmentation), or pass a list "
                "of them."
            )
        return found

    def _tally(self) -> _Tally | None:
        """None of what is kept, and watched by its versions, and where nobody may look at numbers."""
        return _Tally() if not self._kept and torch._C._len_torch_dispatch_stack() == 0 else None

    def _autocast(self) -> ExitStack:
        stack = ExitStack()
        for cast in self.casts:
            stack.enter_context(
                torch.autocast(cast.device, dtype=cast.dtype, enabled=cast.enabled, cache_enabled=False)
            )
        return stack

    def _versions(self) -> list[int]:
        """Of all that is kept from the gradient to the products."""
        return versions(_tensors([self.leaves, self.parts if self._kept else []]))

    @property
    def _kept(self) -> bool:
        return isinstance(self.parts, tuple | list | Tensor)


@dataclass
class _Tally:
    """What a loader has given, whatever the order: how many numbers, their sum and the sum of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            if x.device.type == "meta" or x.layout is not torch.strided:
                continue
            x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
            x = x.cpu() if x.device.type == "mps" else x  # which has no double
            numbers = x.to(torch.float64).flatten()
            self.count += len(numbers)
            self.total += float(numbers.sum())
            self.squares += float(numbers.dot(numbers))

    def differs(self, other: _Tally) -> bool:
        """More than by rounding. NaN is no difference: it is in the sums as well."""
        rounding = SAME * torch.finfo(torch.float64).eps
        size = (self.count * max(self.squares, other.squares)) ** 0.5
        return (
            self.count != other.count
            or abs(self.total - other.total) > rounding * size
            or abs(self.squares - other.squares) > rounding * max(self.squares, other.squares)
        )


def _product(
    value: Tensor, inputs: list[Tensor], used: list[int], v: tuple[Tensor | None, ...], keep: bool
) -> tuple[Tensor | None, ...]:
    slopes = torch.autograd.grad(value, [inputs[i] for i in used], create_graph=True, allow_unused=True)
    # a cotangent that is None stands for zeros, which would make NaN of what is infinite
    pairs = [(g, w) for g, w in zip(slopes, v, strict=True) if g is not None and w is not None and g.requires_grad]
    if not pairs:
        return ()
    own, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(own, inputs, cotangents, create_graph=keep, allow_unused=True)


class _Value(torch.autograd.Function):
    """The sum. Its gradient is there as soon as it is: who asks for a graph wants that."""

    @staticmethod
    def forward(ctx: Any, work: _Sum, *inputs: Tensor) -> Tensor:
        value, gradients = work.value_and_gradients(list(inputs))
        ctx.work, ctx.used = work, [i for i, gradient in enumerate(gradients) if gradient is not None]
        ctx.save_for_backward(*inputs, *(gradients[i] for i in ctx.used))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        n = len(ctx.work.own)
        inputs, known = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        gradients = _Gradient.apply(ctx.work, ctx.used, known, *inputs) if torch.is_grad_enabled() else known
        found: list[Tensor | None] = [None] * n
        for i, gradient in zip(ctx.used, gradients, strict=True):
            found[i] = cotangents[0] * gradient
        return None, *found


class _Gradient(torch.autograd.Function):
    """The gradient, which is known, as a function of the same inputs."""

    @staticmethod
    def forward(
        ctx: Any, work: _Sum, used: list[int], known: tuple[Tensor, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.work, ctx.used = work, used
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(gradient.detach() for gradient in known)  # objects of their own: this may be asked for again

    @staticmethod
    def backward(ctx: Any, *v: Tensor | None) -> Any:
        return None, None, None, *ctx.work.products(list(ctx.saved_tensors), ctx.used, v)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


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
            "sum_over_parts: the loss uses a tensor that carries a gradient and is not one of its arguments, so no derivative would reach "
            "it. Pass it after the parts: sum_over_parts(loss, parts, phi, theta) calls loss(phi, theta, part). Of a module pass "
            "dict(module.named_parameters()), all of them, and call it by torch.func.functional_call."
        ) from error
