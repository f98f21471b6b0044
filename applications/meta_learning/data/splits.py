"""Which classes are for meta-training and which are held out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from applications.meta_learning.data.classes import ImageClasses


@dataclass(frozen=True, kw_only=True)
class Split:
    """Class indices for meta-training and for meta-test, with no class in both.

    A split is stored in the checkpoint as it is (`to_dict`, `from_dict`), never drawn again from its seed, so that
    an evaluation cannot meet a class that the training has seen.
    """

    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("train", "test"):
            indices = getattr(self, field)
            if not isinstance(indices, tuple) or not all(type(index) is int and index >= 0 for index in indices):
                raise ValueError(f"split {field}: expected a tuple of class indices (int, >= 0), got {indices!r:.80}")
            if not indices:
                raise ValueError(f"split {field}: expected at least one class, got none")
            if len(set(indices)) != len(indices):
                raise ValueError(
                    f"split {field}: expected every class once, got {len(indices)} indices "
                    f"of {len(set(indices))} classes"
                )
        common = set(self.train) & set(self.test)
        if common:
            raise ValueError(
                f"expected train and test classes to be disjoint, got {len(common)} in both (first: {min(common)}); "
                "accuracy on classes that were trained on is not few-shot accuracy"
            )

    def to_dict(self) -> dict[str, Any]:
        """The split as a string and two lists of int, for a checkpoint."""
        return {"name": self.name, "train": list(self.train), "test": list(self.test)}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> "Split":
        """The split that `to_dict` wrote, checked again."""
        if not isinstance(state, Mapping) or set(state) != {"name", "train", "test"}:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"expected a split with the entries name, train and test, got {got}")
        for field in ("train", "test"):
            if not isinstance(state[field], list):
                raise ValueError(f"split {field}: expected a list of class indices, got {state[field]!r:.80}")
        return Split(name=str(state["name"]), train=tuple(state["train"]), test=tuple(state["test"]))


def random_split(classes: ImageClasses, num_train: int, seed: int) -> Split:
    """``num_train`` classes for training and all others for test, by a random permutation (Omniglot: 1200 of 1623)."""
    if not 0 < num_train < classes.num_classes:
        raise ValueError(
            f"num_train: expected 1 to {classes.num_classes - 1}, so that some of the {classes.num_classes} classes "
            f"are left for test, got {num_train}"
        )
    order = torch.randperm(classes.num_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(name="random", train=tuple(order[:num_train]), test=tuple(order[num_train:]))


def published_split(classes: ImageClasses) -> Split:
    """The groups 'train' and 'test' of a data set that was published with them (Mini-ImageNet: 64 / 20)."""
    if set(classes.groups) != {"train", "test"}:
        raise ValueError(
            f"a published split needs the groups 'train' and 'test', got {sorted(set(classes.groups))}; use a random "
            "split for this data set"
        )
    train, test = (tuple(i for i, group in enumerate(classes.groups) if group == name) for name in ("train", "test"))
    return Split(name="published", train=train, test=test)


def alphabet_split(classes: ImageClasses) -> Split:
    """Omniglot's own split: no alphabet is in both sets (background for training, evaluation for test; 964 / 659)."""
    if set(classes.groups) != {"background", "evaluation"}:
        raise ValueError(
            "a split by alphabets needs the groups 'background' and 'evaluation', got "
            f"{sorted(set(classes.groups))}; use a random split for this data set"
        )
    return Split(
        name="alphabets",
        train=tuple(i for i, group in enumerate(classes.groups) if group == "background"),
        test=tuple(i for i, group in enumerate(classes.groups) if group == "evaluation"),
    )
