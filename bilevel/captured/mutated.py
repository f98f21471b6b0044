"""What a captured step writes to: where it is, what a graph would not see of it, and how to bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.trees import flatten

Mutable = Tensor | nn.Module | Optimizer


class Mutated:
    """What a function writes to."""

    def __init__(self, things: Iterable[Mutable]) -> None:
        things = list(things)
        for thing in things:
            if not isinstance(thing, Mutable):
                raise TypeError(f"mutates: expected tensors, modules and optimizers, got {type(thing).__name__}.")
        self._things = things
        self._optimizers = [thing for thing in things if isinstance(thing, Optimizer)]

    def tensors(self) -> list[Tensor]:
        """All tensors, those that optimizers keep and options that are tensors included; gradients not, they are made
        anew.
        """
        found: list[Any] = [thing for thing in self._things if isinstance(thing, Tensor)]
        for thing in self._things:
            if isinstance(thing, nn.Module):
                found += [*thing.parameters(), *thing.buffers()]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                found += flatten(list(group.values()))[0]
            for state in optimizer.state.values():
                found += state.values()
        return [thing for thing in found if isinstance(thing, Tensor)]

    def kept_elsewhere(self) -> str | None:
        """What an optimizer keeps on another device than the parameter that it is about, in words."""
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.device != parameter.device:
                        return f"{type(optimizer).__name__} keeps {name!r} on {value.device}, its parameters are on {parameter.device}"
        return None

    def addresses(self) -> tuple[int, ...]:
        """Where the tensors are."""
        return tuple(tensor.data_ptr() for tensor in self.tensors())

    def numbers(self) -> dict[tuple[Any, ...], Any]:
        """The options of the optimizers that are no tensors; the last part of a key is the name."""
        return {
            (type(optimizer).__name__, i, j, k, name): leaf
            for i, optimizer in enumerate(self._optimizers)
            for j, group in enumerate(optimizer.param_groups)
            for name, value in group.items()
            for k, leaf in enumerate(flatten(value)[0])
            if not isinstance(leaf, Tensor)
        }

    def saved(self) -> Callable[[], None]:
        """What brings everything back to where it is now."""
        grads = [(tensor, tensor.grad) for tensor in self.tensors() if tensor.is_leaf]
        tensors = [*self.tensors(), *(grad for _, grad in grads if grad is not None)]
        copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
        states = [{key: dict(state) for key, state in optimizer.state.items()} for optimizer in self._optimizers]

        def restore() -> None:
            for optimizer, state in zip(self._optimizers, states, strict=True):
                optimizer.state.clear()
                optimizer.state.update(state)
            for tensor, grad in grads:
                tensor.grad = grad
            with torch.no_grad():
                for tensor, copy in copies:
                    tensor.copy_(copy)

        return restore
