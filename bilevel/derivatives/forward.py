"""Forward mode: tangents of the dtype of their values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LOCK = threading.RLock()
PATIENCE = 600  # seconds


@contextmanager
def alone() -> Iterator[None]:
    """No other thread of the library is in forward mode: PyTorch counts its levels for the whole process, so two threads would take each
    other's tangents, or none.
    """
    if not _LOCK.acquire(timeout=PATIENCE):
        raise RuntimeError(
            f"forward mode: expected other threads to leave it, got none for {PATIENCE} s. Use Hessian(), whose products need none, or "
            "one thread."
        )
    try:
        yield
    finally:
        _LOCK.release()


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
