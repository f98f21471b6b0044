"""Beside ``torch.compile``: what it may not look into.

The compiler cannot see through a solve that asks for numbers to know when to stop, and what it has compiled cannot be differentiated twice
(torch 2.6 to 2.13), which every solve does with the objective. So in compiled code our calls stay eager, and inside our calls so does a
compiled network.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which ``torch.compile`` calls as it is, and in which it does nothing.

    It costs nothing before somebody has imported the compiler, which takes seconds; microseconds afterwards.
    """

    @functools.wraps(function)
    def eager(*args: P.args, **kwargs: P.kwargs) -> R:
        with _stance.eager():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if function not in _disabled:
            _disabled[function] = torch.compiler.disable(eager)
        return _disabled[function](*args, **kwargs)

    return call


_disabled: dict[Callable[..., Any], Callable[..., Any]] = {}


class _Stance:
    """Compiled code runs eagerly. All threads have one stance: the first call that comes takes it, the last that goes gives it back."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    @contextmanager
    def eager(self) -> Iterator[None]:
        """For a call. Calls may lie in one another."""
        with self.lock:
            if self.calls == 0:
                self.stance = torch.compiler.set_stance("force_eager")
            self.calls += 1
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if self.calls == 0:
                    self.stance.__exit__(None, None, None)


_stance = _Stance()
