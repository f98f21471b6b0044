"""Trees and the one vector that stands for a tree."""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.trees import flatten, layout_of, tree_map, unflatten


class Pair(NamedTuple):
    left: Any
    right: Any


leaves = st.lists(st.integers(0, 3), max_size=2).map(lambda shape: torch.zeros(shape))
keys = st.one_of(st.text("abcxyz.", min_size=1, max_size=3), st.integers(-5, 12))
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
        st.dictionaries(keys, children, max_size=3),
    ),
    max_leaves=8,
)
quick = settings(max_examples=60, deadline=None)


def numbered(tree: Any) -> Any:
    """The tree with different numbers everywhere."""
    count = iter(range(1, 10_000))
    return tree_map(lambda x: torch.tensor([float(next(count)) for _ in range(x.numel())]).reshape(x.shape), tree)


def same(a: Any, b: Any) -> bool:
    """Equality by hand: kinds, keys in their order, leaves."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


def reversed_dicts(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: reversed_dicts(tree[key]) for key in reversed(tree)}
    if isinstance(tree, Pair):
        return Pair(*map(reversed_dicts, tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map(reversed_dicts, tree))
    return tree


@quick
@given(trees)
def test_unflatten_undoes_flatten(tree: Any) -> None:
    tree = numbered(tree)
    flat, structure = flatten(tree)
    assert same(unflatten(structure, flat), tree)
    assert len(structure.paths()) == len(flat)


@quick
@given(trees)
def test_insertion_order_does_not_matter(tree: Any) -> None:
    tree = numbered(tree)
    flat, structure = flatten(tree)
    other, other_structure = flatten(reversed_dicts(tree))
    assert structure == other_structure
    assert all(a is b for a, b in zip(flat, other, strict=True))
    doubled = tree_map(lambda x, y: x + y, tree, reversed_dicts(tree))
    assert same(doubled, tree_map(lambda x: 2 * x, tree))


@quick
@given(trees, st.sampled_from([(), (3,), (2, 3)]))
def test_unravel_undoes_ravel(tree: Any, batch: tuple[int, ...]) -> None:
    tree = numbered(tree_map(lambda x: torch.zeros(batch + x.shape), tree))
    if not flatten(tree)[0]:
        return
    layout, flat = layout_of(tree, len(batch))
    vector = layout.ravel(flat)
    assert vector.shape == (*batch, sum(layout.sizes))
    assert same(layout.unravel(vector), tree)
    # one more axis in front passes through
    assert same(layout.unravel(vector.expand(4, *vector.shape)), tree_map(lambda x: x.expand(4, *x.shape), tree))


def test_the_ravel_order_is_that_of_the_sorted_keys() -> None:
    tree = {
        "w": torch.tensor([5.0, 6.0]),
        "b": [torch.tensor(1.0), {"z": torch.tensor([[3.0, 4.0]]), "a": torch.tensor([2.0])}],
    }
    layout, flat = layout_of(tree)
    assert layout.ravel(flat).tolist() == [1, 2, 3, 4, 5, 6]
    assert layout.structure.paths() == ["['b'][0]", "['b'][1]['a']", "['b'][1]['z']", "['w']"]
    assert layout.sizes == [1, 1, 2, 2]
    assert list(layout.unravel(torch.arange(6.0))) == ["w", "b"]  # the user's own order comes back


def test_keys_of_several_types_have_an_order() -> None:
    tree = {"a": 1, 10: 2, 9: 3, (1, 2): 4}
    assert flatten(tree)[0] == flatten(dict(reversed(tree.items())))[0] == [3, 2, 1, 4]


def test_other_leaves_and_empty_trees() -> None:
    assert flatten(None)[0] == [None]
    assert flatten("abc")[0] == ["abc"]
    assert flatten({})[0] == [] and flatten([{}, ()])[0] == []
    assert flatten(torch.ones(2))[1].paths() == [""]
    assert flatten(OrderedDict(b=1, a=2))[0] == [2, 1]


def test_a_named_tuple_stays_one() -> None:
    pair = tree_map(lambda x: x + 1, Pair(left=1, right={"k": 2}))
    assert pair == Pair(left=2, right={"k": 3}) and type(pair) is Pair


@pytest.mark.parametrize("other", [{"a": 1}, {"a": 1, "c": 2}, [1, 2], (1, 2), Pair(1, 2), 1, {"a": 1, "b": [2]}])
def test_trees_of_different_structure_are_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=r"expected trees of one structure, got leaves \[.*'a'.*'b'"):
        tree_map(lambda x, y: x, {"a": 1, "b": 2}, other)
    assert flatten(other)[1] != flatten({"a": 1, "b": 2})[1]


def test_a_list_is_no_tuple() -> None:
    assert flatten([1, 2])[1] != flatten((1, 2))[1] != flatten(Pair(1, 2))[1]


def test_keys_that_have_no_order_are_listed_by_their_names() -> None:
    """Members of an enum, tuples of unlike things. Before: TypeError, '<' not supported."""

    class Key(enum.Enum):
        B = 1
        A = 2

    for tree in ({Key.B: 1, Key.A: 2}, {("a", 1): 1, (1, "a"): 2}):
        leaves, structure = flatten(tree)
        again = dict(reversed(tree.items()))
        assert flatten(again) == (leaves, structure) and unflatten(structure, leaves) == tree
    assert flatten({Key.B: 1, Key.A: 2})[0] == [2, 1]


def test_keys_without_order_and_without_a_name_are_refused() -> None:
    """An order by their addresses would change from run to run."""
    with pytest.raises(TypeError, match="expected keys that can be sorted, or have a name of their own, got <object"):
        flatten({object(): 1, object(): 2})
