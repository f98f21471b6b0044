"""Trees of tensors, and the one vector that stands for a tree inside the library.

A tree is a tensor or a nested dict / list / tuple (named tuples too) of leaves. Dicts are matched by key and never by
insertion order: leaves are always listed in the order of the sorted keys, which is the *ravel order* of the
documentation. Subclasses of dict and tuples of PyTorch's own (``torch.return_types``) reach the user's functions as
plain dicts and tuples, without methods of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

Tree = Any
"""A tensor, or a nested dict / list / tuple of tensors."""


@dataclass(frozen=True)
class Structure:
    """The shape of a tree without its leaves. Equal for trees that match key by key."""

    kind: type | None  # None: a leaf
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()
    order: tuple[Any, ...] = field(default=(), compare=False)  # the user's order of keys, kept for what is handed back

    def paths(self, prefix: str = "") -> list[str]:
        """The name of each leaf in ravel order, as in ``['conv1']['weight']``; a bare tensor has the name ``''``."""
        if self.kind is None:
            return [prefix]
        return [
            path
            for key, child in zip(self.keys, self.children, strict=True)
            for path in child.paths(f"{prefix}[{key!r}]")
        ]


LEAF = Structure(None)


def _children(tree: Tree) -> tuple[type, tuple[Any, ...], list[Tree], tuple[Any, ...]] | None:
    if isinstance(tree, dict):
        try:
            keys = tuple(sorted(tree, key=lambda key: (type(key).__name__, key)))
        except TypeError:  # members of an enum, tuples of unlike things
            if nameless := [key for key in tree if type(key).__repr__ is object.__repr__]:  # type: ignore[comparison-overlap]
                raise TypeError(
                    f"expected keys that can be sorted, or have a name of their own, got {nameless[0]!r}: leaves are listed in the "
                    "order of the keys. Use strings."
                ) from None
            keys = tuple(sorted(tree, key=lambda key: (type(key).__name__, repr(key))))
        return dict, keys, [tree[key] for key in keys], tuple(tree)
    if isinstance(tree, tuple | list):
        kind = type(tree) if hasattr(tree, "_fields") else tuple if isinstance(tree, tuple) else list
        return kind, tuple(range(len(tree))), list(tree), ()
    return None


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves of a tree in ravel order, and its structure. Whatever is no dict, list or tuple is a leaf, so None."""
    parts = _children(tree)
    if parts is None:
        return [tree], LEAF
    kind, keys, values, order = parts
    flat = [flatten(value) for value in values]
    return [leaf for leaves, _ in flat for leaf in leaves], Structure(
        kind, keys, tuple(spec for _, spec in flat), order
    )


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Tree:
    """The tree of this structure with these leaves, dicts in the order of their original."""
    return _unflatten(structure, iter(leaves))


def _unflatten(structure: Structure, leaves: Any) -> Tree:
    if structure.kind is None:
        return next(leaves)
    values = [_unflatten(child, leaves) for child in structure.children]
    if structure.kind is dict:
        by_key = dict(zip(structure.keys, values, strict=True))
        return {key: by_key[key] for key in structure.order}
    if structure.kind in (list, tuple):
        return structure.kind(values)
    return structure.kind(*values)  # a named tuple


def tree_leaves(tree: Tree) -> list[Any]:
    """The leaves of a tree in ravel order: what an optimizer of theta takes."""
    return flatten(tree)[0]


def tree_map(fn: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``fn`` leaf by leaf over trees of one structure; dicts are paired by key."""
    leaves, structure = flatten(tree)
    rest = []
    for other in others:
        more, spec = flatten(other)
        if spec != structure:
            raise ValueError(f"expected trees of one structure, got leaves {structure.paths()} and {spec.paths()}")
        rest.append(more)
    return unflatten(structure, [fn(*group) for group in zip(leaves, *rest, strict=True)])


@dataclass(frozen=True)
class Layout:
    """How a tree of tensors lies in one vector: ``(*batch, *shape)`` leaves <-> ``(*batch, d)``."""

    structure: Structure
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each leaf."""
        return [prod(shape) for shape in self.shapes]

    def ravel(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves ``(*batch, *shape)`` with one batch shape -> one vector ``(*batch, d)``."""
        flat = [
            leaf.reshape((*leaf.shape[: leaf.ndim - len(shape)], size))
            for leaf, shape, size in zip(leaves, self.shapes, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def unravel(self, vector: Tensor) -> Tree:
        """A vector ``(*batch, d)`` -> the tree, its leaves ``(*batch, *shape)`` views of the vector."""
        batch = vector.shape[:-1]
        if len(self.shapes) == 1 and len(self.shapes[0]) == 1:
            return unflatten(self.structure, [vector])
        parts = [vector] if len(self.shapes) == 1 else vector.split(self.sizes, dim=-1)
        return unflatten(
            self.structure, [part.reshape(batch + shape) for part, shape in zip(parts, self.shapes, strict=True)]
        )


def layout_of(tree: Tree, batch_ndim: int = 0) -> tuple[Layout, list[Tensor]]:
    """The layout of a tree whose leaves have ``batch_ndim`` leading batch axes, and its leaves."""
    leaves, structure = flatten(tree)
    return Layout(structure, tuple(leaf.shape[batch_ndim:] for leaf in leaves)), leaves


def how_to_tree(thing: Any) -> str:
    """How what holds tensors becomes a tree."""
    if isinstance(thing, torch.nn.ParameterDict):
        return "; this one becomes one by dict(...)"
    if isinstance(thing, torch.nn.Module):
        return "; of a module it is dict(module.named_parameters()), for torch.func.functional_call"
    return "; an iterator becomes one by list(...)" if isinstance(thing, Iterator) else ""
