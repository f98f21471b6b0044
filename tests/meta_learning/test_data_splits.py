import dataclasses
import json

import pytest
import torch

from applications.meta_learning.data import ImageClasses, Split, alphabet_split, random_split


def classes(groups):
    num = len(groups)
    return ImageClasses(
        images=torch.zeros(num, 2, 4, 4, dtype=torch.uint8),
        names=tuple(f"class{i}" for i in range(num)),
        groups=tuple(groups),
        source_key="",
    )


def test_a_random_split_is_a_partition_and_depends_on_the_seed():
    data = classes(["glyphs"] * 1623)
    splits = [random_split(data, 1200, seed) for seed in (0, 1, 0)]
    for split in splits:
        assert (len(split.train), len(split.test)) == (1200, 423)
        assert sorted(split.train + split.test) == list(range(1623))
    assert splits[0] == splits[2]
    assert set(splits[0].test) != set(splits[1].test)


def test_a_random_split_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    random_split(classes(["x"] * 10), 5, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_train", [0, 10, -3])
def test_both_parts_of_a_random_split_need_a_class(num_train):
    with pytest.raises(ValueError, match=f"num_train: expected 1 to 9, .* got {num_train}"):
        random_split(classes(["x"] * 10), num_train, 0)


def test_the_alphabet_split_follows_the_groups():
    split = alphabet_split(classes(["background", "evaluation", "background", "evaluation", "evaluation"]))
    assert split == Split(name="alphabets", train=(0, 2), test=(1, 3, 4))


def test_the_alphabet_split_needs_the_published_groups():
    with pytest.raises(
        ValueError, match=r"needs the groups 'background' and 'evaluation', got \['glyphs'\]; use a random"
    ):
        alphabet_split(classes(["glyphs"] * 3))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((0, 1, 2), (2, 3), r"disjoint, got 1 in both \(first: 2\); accuracy on classes"),
        ((0, 1), (), "split test: expected at least one class, got none"),
        ((0, 0), (1,), "split train: expected every class once, got 2 indices of 1 classes"),
        ((0, -1), (1,), r"split train: expected a tuple of class indices \(int, >= 0\), got \(0, -1\)"),
        ((0, 1), (2.0,), "split test: expected a tuple of class indices"),
        ([0, 1], (2,), r"split train: expected a tuple of class indices \(int, >= 0\), got \[0, 1\]"),
    ],
)
def test_a_wrong_split_cannot_be_made(train, test, message):
    with pytest.raises(ValueError, match=message):
        Split(name="mine", train=train, test=test)


def test_a_split_cannot_be_changed():
    split = Split(name="mine", train=(0,), test=(1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.train = (1,)


def test_a_split_comes_back_from_plain_lists():
    split = random_split(classes(["x"] * 30), 20, 3)
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"name": "random", "train": [0, 1], "test": [1]}, "disjoint, got 1 in both"),
        ({"name": "random", "train": [0]}, r"entries name, train and test, got \['name', 'train'\]"),
        ({"name": "random", "train": 3, "test": [1]}, "split train: expected a list of class indices, got 3"),
        (None, "entries name, train and test, got NoneType"),
    ],
)
def test_a_stored_split_is_checked_again(state, message):
    with pytest.raises(ValueError, match=message):
        Split.from_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(2, 2, 4, 4)},
            r"images: expected a uint8 tensor .* got torch.float32 of shape \(2, 2, 4, 4\)",
        ),
        ({"names": ("only one",)}, "expected one name and one group for each of 2 classes, got 1 names and 2 groups"),
    ],
)
def test_image_classes_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(classes(["x", "y"]), **changes)
