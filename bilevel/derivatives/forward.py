"""Forward mode: tangents of the dtype of their values."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_lock = threading.RLock()


def _anew() -> None:
    """In the child of a fork nobody is left who would give the lock back."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_anew)


@contextmanager
def alone() -> Iterator[None]:
    """No other thread of the library is in forward mode, or records: PyTorch counts the levels of forward mode for the whole process, so
    that two threads would take each other's tangents, or none; and what records patches it.
    """
    # autograd's own threads work for one that waits for them, and has its turn
    if isinstance(threading.current_thread(), threading._DummyThread):
        yield
        return
    with _lock:
        yield


def jvp(fn: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Any:
    """``torch.func.jvp``, in one thread at a time."""
    with alone():
        return torch.func.jvp(fn, at, along)


def tangent_along(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The derivative of ``fn`` at x along v, by dual numbers: with them a model does what it does in eager mode."""
    with alone():
        return _tangent_along(fn, x, v)


def _tangent_along(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    if forward_ad._current_level >= 0:  # the user's; there is only one
        return alike(*torch.func.jvp(fn, (x,), (v,)))
    # a Function, that of argmin say, switches forward mode off
    with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(fn(forward_ad.make_dual(x, v)))
    return torch.zeros_like(primal) if tangent is None else alike(primal, tangent)


def alike(value: Tensor, tangent: Tensor) -> Tensor:
    """The tangent in the dtype of its value: PyTorch's of a Python number times a 0-d float32 is float64."""
    return tangent.to(value.dtype)
