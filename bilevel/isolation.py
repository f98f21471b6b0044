"""What is around a call and does not enter: ``torch.compile`` and autocast.

The compiler cannot see through a solve that asks for numbers to know when to stop, and what it has compiled cannot be differentiated twice
(torch 2.6 to 2.13), which every solve does with the objective. So in compiled code our calls stay eager, and inside our calls so does a
compiled network. Autocast would take the sums of the solvers in half precision, and none would reach its tolerance.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which ``torch.compile`` calls as it is, and in which neither it nor autocast does anything.

    It costs microseconds.
    """

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    @functools.wraps(function)
    def eager(*args: P.args, **kwargs: P.kwargs) -> R:
        with _stance.eager():
            return precise(*args, **kwargs)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # importing the compiler takes seconds
            return precise(*args, **kwargs)
        if function not in _disabled:
            _disabled[function] = torch.compiler.disable(eager)
        return _disabled[function](*args, **kwargs)

    return call


DEVICES = ("cpu", "cuda", "mps", "xpu")  # those that have autocast

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
