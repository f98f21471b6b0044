"""Matrix products of each task with a matrix of its own, by whichever routine of PyTorch is faster on this processor.

On x86 PyTorch multiplies float32 matrices with Intel's MKL, which uses AVX-512 on Intel's own processors only. oneDNN, which PyTorch has
for convolutions, uses it on AMD's too, and is twice as fast there; its product of two matrices is an operator that PyTorch's
compiler calls. Where that operator is missing, or the product is so small that a call for each task costs more than it saves, this
is `torch.baddbmm`. benchmarks/NOTES.md has the numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

LEAST = 2_000_000
"""Multiplications in the product of one task from which on oneDNN is called."""


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a @ b, or a @ b + plus: (tasks, m, k), (tasks, k, n), (tasks, m, n)."""
    if not is_large(a, b, plus):
        return a @ b if plus is None else torch.baddbmm(plus, a, b)
    if plus is None and not a.is_contiguous() and a.numel() > b.numel():
        # oneDNN reads its second factor as it lies, and copies a first one that is transposed
        return product(b.mT, a.mT).mT
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for i in range(len(a)):
        out[i] = _one(a[i], b[i], None if plus is None else plus[i])
    return out


def is_large(a: Tensor, b: Tensor, plus: Tensor | None = None) -> bool:
    """Whether the product is best taken one task at a time."""
    return (
        a.shape[1] * a.shape[2] * b.shape[2] >= LEAST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and _has_onednn()
        # what follows the operator knows nothing of
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled("cpu")
        and not has_tangents()
        and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, plus)))
    )


def has_tangents() -> bool:
    """Whether tensors may be dual numbers here."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


@cache
def _has_onednn() -> bool:
    """Whether there is the operator, and AVX-512 for it: without, MKL is as fast."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    one = torch.ones(1, 1)
    try:
        return bool(_one(one, one, None) == 1 and _one(one, one, one) == 2)
    except (AttributeError, RuntimeError, TypeError):  # it is not meant for others, and may change
        return False


def _one(a: Tensor, b: Tensor, plus: Tensor | None) -> Tensor:
    """(m, k), (k, n) -> (m, n)."""
    operator = torch.ops.mkldnn._linear_pointwise
    if plus is None:
        return operator(a, b.mT, None, "none", [], "")
    return operator.binary(a, plus, b.mT, None, "add")
