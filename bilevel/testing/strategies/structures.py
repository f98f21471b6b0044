"""Trees of tensors, and ways to lay a vector out as a tree."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from bilevel.testing.strategies.draws import SEEDS, Array, Source
from bilevel.trees import Layout, Tree, layout_of, tree_map

NAMES = ["weight", "bias", "b", "a", "conv1", "0"]


def trees(
    *, max_leaves: int = 5, max_size: int = 4, max_ndim: int = 2, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[Tree]:
    """Nested dicts, lists and tuples of tensors, as phi and theta may be. They shrink to one 0-d tensor.

    The keys of a dict come in any order. How the leaves hang together is the business of a problem: in the trees that the problem
    strategies draw, all leaves are coupled through the inner Hessian.

    Args:
        max_leaves: at most this many tensors; there is at least one.
        max_size: the longest axis of a leaf.
        max_ndim: the largest number of axes of a leaf.
        dtype: of every leaf.

    Raises:
        ValueError: a limit that leaves nothing to draw.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating dtype such as torch.float64, got {dtype}.")
    for name, value, least in (("max_leaves", max_leaves, 1), ("max_size", max_size, 1), ("max_ndim", max_ndim, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a whole number, got {value!r}.")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    leaves = st.lists(st.integers(1, max_size), max_size=max_ndim).map(np.zeros)
    return _of_normal_numbers(_nested(leaves, max_leaves, 3), dtype)


@st.composite
def _of_normal_numbers(draw: st.DrawFn, shapes: st.SearchStrategy[Tree], dtype: torch.dtype) -> Tree:
    """Composite, so that Hypothesis prints the tree and not how it was made."""
    return _filled(draw(shapes), Source(draw(SEEDS)), dtype)


def _filled(tree: Tree, source: Source, dtype: torch.dtype) -> Tree:
    return tree_map(lambda leaf: torch.tensor(source.normal(*leaf.shape), dtype=dtype), tree)


@st.composite
def _nested(draw: st.DrawFn, leaves: st.SearchStrategy[Array], max_leaves: int, depth: int) -> Tree:
    """A tree of at most so many leaves and levels."""
    if depth == 0 or not draw(st.booleans()):
        return draw(leaves)
    left = draw(st.integers(1, max_leaves))
    children: list[Any] = []
    while left:
        share = draw(st.integers(1, left))
        children.append(draw(_nested(leaves, share, depth - 1)))
        left -= share
    kind = draw(st.sampled_from(["tuple", "list", "dict"]))
    if kind == "dict":
        extra = [f"layer{k}" for k in range(len(children) - len(NAMES))]
        return dict(zip(draw(st.permutations(NAMES + extra)), children, strict=False))
    return tuple(children) if kind == "tuple" else children


@st.composite
def layouts(draw: st.DrawFn, d: int, structured: bool) -> Layout:
    """Ways to lay out a vector ``(d,)``: as it is, or as a dict of two or three leaves, whose keys are not in ravel order."""
    if not structured or d == 1 or not draw(st.booleans()):
        return layout_of(np.zeros(d))[0]
    cuts = sorted(draw(st.sets(st.integers(1, d - 1), min_size=1, max_size=min(2, d - 1))))
    sizes = [end - start for start, end in itertools.pairwise([0, *cuts, d])]
    first, *rest = [np.zeros(draw(st.sampled_from(_shapes(size)))) for size in sizes]
    return layout_of({"weight": first, "bias": rest[0] if len(rest) == 1 else [rest[0], (rest[1],)]})[0]


def _shapes(size: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(size,)]
    if size == 1:
        shapes.append(())
    if size % 2 == 0:
        shapes.append((2, size // 2))
    return shapes


def raveled(layout: Layout, tree: Tree) -> torch.Tensor:
    """The vector ``(d,)`` of a tree, in ravel order."""
    return layout.ravel(layout_of(tree)[1])
