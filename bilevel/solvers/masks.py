"""States of a batch under a mask: some problems go on, the others keep what they have, or leave the batch for a while."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bilevel.derivatives import Objective
from bilevel.linsys.base import select

S = TypeVar("S")


def nowhere(phi: Tensor) -> Tensor:
    """A mask ``(*batch,)`` that is False for every problem of the batch."""
    return torch.zeros(phi.shape[:-1], dtype=torch.bool, device=phi.device)


def choose(mask: Tensor, new: S, old: S) -> S:
    """The new state where the mask is set, field by field."""

    def of_field(yes: Any, no: Any) -> Any:
        if yes is no:
            return no
        return select(mask, yes, no) if isinstance(no, Tensor) else choose(mask, yes, no)

    return replace(old, **{name: of_field(getattr(new, name), value) for name, value in _fields(old)})  # type: ignore[type-var]


def compact_batch(objective: Objective, active: Tensor, left: int) -> tuple[Objective, Tensor] | None:
    """The objective of the problems that are active, with a few others, and their rows; None if that is not to be had."""
    size = active.numel()
    while (size + 1) // 2 >= left and size > 1:  # few different sizes, for what is recorded for each shape
        size = (size + 1) // 2
    rows = torch.argsort((~active).int().flatten(), stable=True)[:size]
    fewer = objective.only(rows)
    return None if fewer is None else (fewer, rows)


def gather_rows(state: S, rows: Tensor) -> S:
    """The state of some problems of a batch with one axis."""

    def of_field(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, rows)
        return gather_rows(value, rows) if is_dataclass(value) else value

    return replace(state, **{name: of_field(value) for name, value in _fields(state)})  # type: ignore[type-var]


def scatter_rows(state: S, rows: Tensor, part: S) -> S:
    """The state with that of some problems in their places."""

    def of_field(old: Any, new: Any) -> Any:
        if isinstance(old, Tensor):
            return old.index_copy(0, rows, new)
        return scatter_rows(old, rows, new) if is_dataclass(old) else new

    return replace(state, **{name: of_field(old, getattr(part, name)) for name, old in _fields(state)})  # type: ignore[type-var]


def _fields(state: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(state, field.name)) for field in fields(state)]
