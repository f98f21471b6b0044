"""Forward mode: tangents of the dtype of their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def tangent_along(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The derivative of ``fn`` at x along v, by dual numbers: with them a model does what it does in eager mode."""
    if forward_ad._current_level >= 0:  # the user's; there is only one
        return alike(*torch.func.jvp(fn, (x,), (v,)))
    # a Function, that of argmin say, switches forward mode off
    with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(fn(forward_ad.make_dual(x, v)))
    return torch.zeros_like(primal) if tangent is None else alike(primal, tangent)


def alike(value: Tensor, tangent: Tensor) -> Tensor:
    """The tangent in the dtype of its value: PyTorch's of a Python number times a 0-d float32 is float64."""
    return tangent.to(value.dtype)
