"""Which modules run during an evaluation, and what they change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook

_Key = tuple[int, str]  # the id of a module and the name of a buffer


@dataclass
class Watched:
    """What was seen during one evaluation: names of changed buffers, and of layers that draw random numbers."""

    changed: list[str] = field(default_factory=list)
    drawing: list[str] = field(default_factory=list)


class Modules:
    """A context in which every module that runs is noticed; at its end the buffers of these modules are what they were.

    A module may run with tensors of somebody else in the place of its buffers (``functional_call``). So buffers are compared between
    evaluations, from outside, and only what a module was then seen to run with is taken for its own and put back.
    """

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._ran: dict[int, nn.Module] = {}
        self._outside: dict[_Key, Tensor] = {}
        self._first: dict[_Key, tuple[Tensor, Tensor]] = {}  # the tensor that was seen first, and a copy of it
        self._own: set[_Key] = set()

    def __enter__(self) -> Modules:
        self._handle = register_module_forward_pre_hook(self._notice)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.remove()
        for module, name in self._own:
            tensor, copy = self._first[module, name]
            with torch.no_grad():
                tensor.copy_(copy)
            self._modules[module]._buffers[name] = tensor

    def _notice(self, module: nn.Module, _arguments: Any) -> None:
        self._modules[id(module)] = self._ran[id(module)] = module
        for key, buffer in _buffers({id(module): module}).items():
            if key not in self._first:
                self._first[key] = (buffer, buffer.detach().clone())
            if self._outside.get(key) is buffer:
                self._own.add(key)

    @contextmanager
    def watched(self) -> Iterator[Watched]:
        """One evaluation. Changes are seen in modules that have run before."""
        self._ran, self._outside, seen = {}, _buffers(self._modules), Watched()
        before = {key: buffer.detach().clone() for key, buffer in self._outside.items()}
        yield seen
        now, names = _buffers(self._modules), self._names()
        for (module, name), copy in before.items():
            if (module, name) not in now or not bool(same_entries(now[module, name], copy).all()):
                seen.changed.append(f"{names[module]}.{name}")
        seen.drawing = [f"{names[key]} = {module}" for key, module in self._ran.items() if _draws(module)]

    def _names(self) -> dict[int, str]:
        """``Sequential.1`` for a module inside another one that has run too, else its type."""
        inside = {id(child) for module in self._modules.values() for child in module.modules() if child is not module}
        roots = [module for key, module in self._modules.items() if key not in inside]
        return {
            id(module): f"{type(root).__name__}.{path}" if path else type(root).__name__
            for root in roots
            for path, module in root.named_modules()
        }


def _buffers(modules: dict[int, nn.Module]) -> dict[_Key, Tensor]:
    return {
        (key, name): buffer
        for key, module in modules.items()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def same_entries(a: Tensor, b: Tensor) -> Tensor:
    """Entry by entry, NaN like NaN."""
    a, b = (x.to_dense() if x.layout is not torch.strided else x for x in (a, b))
    return (a == b) | ((a != a) & (b != b))


def _draws(module: nn.Module) -> bool:
    """Whether the module draws random numbers when it runs."""
    rate = getattr(module, "dropout", None)  # of nn.MultiheadAttention and recurrent networks
    return module.training and (isinstance(module, _DropoutNd | nn.RReLU) or (isinstance(rate, float) and rate > 0))
