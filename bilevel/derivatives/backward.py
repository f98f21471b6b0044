"""Reverse mode on a graph that is kept."""

from __future__ import annotations

import torch
from torch import Tensor


def backward_product(outputs: Tensor, inputs: Tensor, v: Tensor) -> Tensor:
    """v^T d(outputs)/d(inputs) on a retained graph; v may have further leading axes: several vectors at once."""

    def product(v: Tensor) -> Tensor:
        if not outputs.requires_grad:
            return torch.zeros_like(inputs)
        (result,) = torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(inputs) if result is None else result

    extra = v.shape[: v.ndim - outputs.ndim]
    if not extra:
        return product(v)
    return torch.func.vmap(product)(v.reshape(-1, *outputs.shape)).reshape(*extra, *inputs.shape)


def total(value: Tensor) -> Tensor:
    """Over the batch; one problem has nothing to add up."""
    return value.sum() if value.ndim else value
