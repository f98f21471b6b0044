"""Matrix products of each task with a matrix of its own, by whichever routine of PyTorch is faster on this processor.

On x86 PyTorch multiplies float32 matrices with Intel's MKL, which uses AVX-512 on Intel's own processors only. oneDNN, which PyTorch has
for convolutions, uses it on AMD's too, and is twice as fast there; its product of two matrices is an operator that PyTorch's
compiler calls. Where that operator is missing, or the product is so small that a call for each task costs more than it saves, this
is `torch.baddbmm`. benchmarks/NOTES.md has the numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

LEAST = 2_000_000
"""Multiplications in the product of one task from which on oneDNN is called."""


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a @ b, or a @ b + plus: (tasks, m, k), (tasks, k, n), (tasks, m, n)."""
    if not is_large(a, b):
        return a @ b if plus is None else torch.baddbmm(plus, a, b)
    if plus is None and not a.is_contiguous() and a.numel() > b.numel():
        return product(
            b.mT, a.mT
        ).mT  # oneDNN reads its second factor as it lies, and copies a first one that is transposed
    others = itertools.repeat(None) if plus is None else plus.unbind()
    tasks = zip(a.unbind(), b.unbind(), others, strict=False)
    return joined((_one(x, y, z).unsqueeze(0) for x, y, z in tasks), len(a))


def is_large(a: Tensor, b: Tensor) -> bool:
    """Whether the product is best taken one task at a time."""
    return (
        a.shape[1] * a.shape[2] * b.shape[2] >= LEAST
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and _has_onednn()
        # of these the operator knows nothing
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    )


def joined(parts: Iterable[Tensor], count: int) -> Tensor:
    """``torch.cat`` of so many equal parts, each written to its place as soon as it is there."""
    parts = iter(parts)
    first = next(parts)
    if count == 1:
        return first
    size = len(first)
    out = first.new_empty(count * size, *first.shape[1:])
    for i, part in enumerate(itertools.chain([first], parts)):
        out[i * size : (i + 1) * size] = part
    return out


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _one(a: Tensor, b: Tensor, plus: Tensor | None) -> Tensor:
    """(m, k), (k, n) -> (m, n)."""
    operator = torch.ops.mkldnn._linear_pointwise
    if plus is None:
        return operator(a, b.mT, None, "none", [], "")
    return operator.binary(a, plus, b.mT, None, "add")
