"""Trees of tensors, and ways to lay a vector out as a tree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from bilevel.testing.strategies.draws import SEEDS, Source
from bilevel.trees import Layout, Tree, flatten, layout_of, unflatten

NAMES = ["weight", "bias", "a", "b", "conv1", "0"]


def trees(
    *, max_leaves: int = 5, max_size: int = 4, max_ndim: int = 2, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[Tree]:
    """Nested dicts, lists and tuples of tensors, as phi and theta may be. They shrink to one 0-d tensor.

    The keys of a dict are in any order of insertion. How the leaves hang together is the business of a problem: in the trees that the
    problem strategies draw, all leaves are coupled through the inner Hessian.

    Args:
        max_leaves: at most this many tensors.
        max_size: the longest axis of a leaf.
        max_ndim: the largest number of axes of a leaf.
        dtype: float64 or float32.
    """
    for name, value, least in (("max_leaves", max_leaves, 1), ("max_size", max_size, 1), ("max_ndim", max_ndim, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    shapes = st.lists(st.integers(1, max_size), max_size=max_ndim).map(torch.Size)
    return _filled(_nested(shapes, max_leaves), dtype)


@st.composite
def _nested(draw: st.DrawFn, leaves: st.SearchStrategy[Any], max_leaves: int, depth: int = 3) -> Tree:
    """A tree of 1 to ``max_leaves`` leaves."""
    count = draw(st.integers(1, max_leaves)) if depth else 1
    if count == 1 and not (depth and draw(st.booleans())):
        return draw(leaves)
    children = []
    while count:
        own = draw(st.integers(1, count))
        children.append(draw(_nested(leaves, own, depth - 1)))
        count -= own
    kind = draw(st.sampled_from(["tuple", "list", "dict"]))
    if kind == "dict":
        keys = draw(st.permutations(NAMES + [f"layer{k}" for k in range(len(children) - len(NAMES))]))
        return dict(zip(keys, children, strict=False))
    return tuple(children) if kind == "tuple" else children


@st.composite
def _filled(draw: st.DrawFn, shapes: st.SearchStrategy[Tree], dtype: torch.dtype) -> Tree:
    # torch.Size is a tuple, which flatten would open
    boxed = draw(shapes.map(_boxed))
    source = Source(draw(SEEDS))
    leaves, structure = flatten(boxed)
    return unflatten(structure, [torch.tensor(source.normal(*leaf.shape), dtype=dtype) for leaf in leaves])


def _boxed(tree: Tree) -> Tree:
    if isinstance(tree, torch.Size):
        return np.empty(tree)
    if isinstance(tree, dict):
        return {key: _boxed(value) for key, value in tree.items()}
    return type(tree)(_boxed(value) for value in tree)
