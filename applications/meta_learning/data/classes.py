"""The one form in which image classes reach splits and samplers, whatever they were made from."""

from dataclasses import dataclass

import torch
from torch import Tensor


class DataError(RuntimeError):
    """Data on disk (or the way to them) are not as they must be; the message says which file and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageClasses:
    """Images of `num_classes` classes.

    Attributes:
        images: uint8. Drawings: (num_classes, drawings, height, width); ink is 255, background 0. With `counts`:
            (images, channels, height, width), class after class.
        counts: images of each class, where classes have different numbers of them.
        names: one per class, e.g. "images_background/Greek/character07".
        groups: one per class: the published set that it belongs to ("background" or "evaluation" for Omniglot).
        source_key: hash of what the images were made from; the same for the same drawings in another container.
    """

    images: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]
    source_key: str
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                "images: expected a uint8 tensor (num_classes, drawings, height, width), or with counts (images, channels, height, "
                "width), got "
                f"{self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.counts is not None and sum(self.counts) != len(self.images):
            raise ValueError(
                f"counts: expected numbers that add up to the {len(self.images)} images, got {sum(self.counts)}"
            )
        if not len(self.names) == len(self.groups) == self.num_classes:
            raise ValueError(
                f"expected one name and one group for each of {self.num_classes} classes, got "
                f"{len(self.names)} names and {len(self.groups)} groups"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.images.shape[0] if self.counts is None else len(self.counts)

    @property
    def images_per_class(self) -> tuple[int, ...]:
        """Number of images of each class."""
        return (self.images.shape[1],) * self.num_classes if self.counts is None else self.counts
