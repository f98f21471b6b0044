"""The axes of a batch.

``levels`` has one entry for each batch axis, outermost first; an entry says for each argument whether it has that axis. An
argument without the axis is shared by the problems along it, and is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Levels = tuple[tuple[bool, ...], ...]


def over_levels(fn: Callable[..., Any], levels: Levels) -> Callable[..., Any]:
    """``fn`` of one problem -> the same over the batch axes, by nested ``vmap``."""
    for flags in reversed(levels):  # the innermost axis first
        fn = torch.func.vmap(fn, in_dims=tuple(0 if flag else None for flag in flags))
    return fn


def with_axis(levels: Levels) -> Levels:
    """The levels of ``(x, *tensors)`` where x has every axis and the tensors those of ``levels``."""
    return tuple((True, *flags) for flags in levels)
