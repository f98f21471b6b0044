"""From settings to tasks: the data set, its split, and the samplers for training and for held-out classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from applications.meta_learning.config import Config, ConfigError
from applications.meta_learning.data import (
    DataError,
    ImageClasses,
    Sampler,
    SinusoidSampler,
    Split,
    TaskSampler,
    alphabet_split,
    generate_glyphs,
    load_folder,
    load_mini_imagenet,
    load_omniglot,
    published_split,
    random_split,
)

GLYPH_DRAWINGS = 20  # as many as Omniglot has
TRAINING_OPTIONS = "--ways, --shots or --query-shots"
HELD_OUT_OPTIONS = "--ways, --shots or --eval-query-shots (imaml evaluate: --query-shots)"
TEST_SEED_OFFSET = 1_000_003  # held-out sinusoids come from another seed; for images the classes differ anyway


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskSource:
    """What tasks are drawn from.

    classes, split: None for sinusoids, whose tasks are never the same twice.
    key: says which data these are; a checkpoint can only be used with the same.
    """

    classes: ImageClasses | None
    split: Split | None
    key: str

    def sampler(self, config: Config, *, held_out: bool, query_shots: int, seed: int, device: torch.device) -> Sampler:
        """A stream of tasks. Those of held-out classes are not rotated.

        Raises:
            ConfigError: the data have too few classes or drawings for such tasks.
        """
        dtype = dtype_of(config)
        if self.classes is None or self.split is None:
            if held_out:
                seed += TEST_SEED_OFFSET
            return SinusoidSampler(shots=config.shots, query_shots=query_shots, seed=seed, device=device, dtype=dtype)
        try:
            return TaskSampler(
                self.classes.images,
                self.split.test if held_out else self.split.train,
                ways=config.ways,
                shots=config.shots,
                query_shots=query_shots,
                rotations=config.rotations and not held_out,
                seed=seed,
                device=device,
                dtype=dtype,
                counts=self.classes.counts,
            )
        except ValueError as error:
            part, hint = ("held-out", HELD_OUT_OPTIONS) if held_out else ("training", TRAINING_OPTIONS)
            raise ConfigError(
                f"these tasks cannot be drawn from the {part} classes of {config.dataset}: {error}; change {hint}"
            ) from error


def load_source(
    config: Config,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    split: Split | None = None,
) -> TaskSource:
    """The data that the settings ask for.

    split: of a checkpoint, used as it is. None: drawn from the settings.

    Raises:
        DataError: files are missing or damaged.
        ConfigError: the settings do not fit the data.
    """
    if config.is_regression:
        return TaskSource(classes=None, split=None, key="sinusoid")
    if config.dataset == "omniglot":
        classes = load_omniglot(data_dir, size=config.image_size, download=download)
    elif config.dataset == "mini-imagenet":
        classes = load_mini_imagenet(data_dir, size=config.image_size)
    elif config.dataset == "folder":
        classes = load_folder(data_dir, size=config.image_size, colours=config.colours)
    else:
        classes = generate_glyphs(config.glyph_classes, GLYPH_DRAWINGS, seed=config.seed, size=config.image_size)
    split = split or _draw_split(config, classes)
    if classes.counts is not None:
        _check_enough(config, classes, split)
    return TaskSource(classes=classes, split=split, key=classes.source_key)


def _draw_split(config: Config, classes: ImageClasses) -> Split:
    if config.split == "random" and config.train_classes >= classes.num_classes:
        raise ConfigError(
            f"train_classes: expected at most {classes.num_classes - 1}, because {config.dataset} has {classes.num_classes} classes here "
            f"and some are held out, got {config.train_classes} (of the preset, maybe); name such a number, or --train-classes 0, which "
            "trains on three quarters"
        )
    try:
        if config.split == "alphabets":
            return alphabet_split(classes)
        if config.split == "published":
            return published_split(classes)
        # The held-out classes must be enough for a task.
        num_train = config.train_classes or max(1, classes.num_classes - max(config.ways, classes.num_classes // 4))
        return random_split(classes, num_train=num_train, seed=config.seed)
    except ValueError as error:
        raise ConfigError(f"{config.dataset} cannot be split like this: {error}") from error


def _check_enough(config: Config, classes: ImageClasses, split: Split) -> None:
    """Before hours of training: both parts have the classes, and every class the images, that the tasks take.

    Raises:
        DataError: they have not.
    """
    if (last := max([*split.train, *split.test], default=0)) >= classes.num_classes:
        raise DataError(
            f"{config.dataset}: the run was trained on at least {last + 1} classes, and there are {classes.num_classes} now; bring back "
            "those that are missing, or train anew"
        )
    evaluated = max(config.shots, config.eval_query_shots if config.eval_interval else 0)
    counts = classes.images_per_class
    for part, indices, queries, option in (
        ("training", split.train, config.query_shots, "--query-shots"),
        ("held-out", split.test, evaluated, "--eval-query-shots"),
    ):
        if len(indices) < config.ways:
            raise DataError(
                f"{config.dataset}: {config.ways}-way tasks need {config.ways} classes for training and as many others held "
                f"out; of the {classes.num_classes} classes {len(indices)} are {part}; add classes, or change --ways or "
                "--train-classes"
            )
        few = [i for i in indices if counts[i] < config.shots + queries]
        if few:
            raise DataError(
                f"{config.dataset}: a {part} class needs {config.shots} support and {queries} query images, and {len(few)} "
                f"of {len(indices)} have fewer ({classes.names[few[0]]!r} has {counts[few[0]]}); add images, take such "
                f"classes out, or lower --shots or {option}"
            )


def dtype_of(config: Config) -> torch.dtype:
    """The torch dtype of the settings."""
    return torch.float64 if config.dtype == "float64" else torch.float32


def device_of(config: Config) -> torch.device:
    """The device of the settings, where it can be used.

    Raises:
        ConfigError: there is no such device.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device).cpu()  # which "meta" cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected auto or a device that works here, got {config.device!r} ({reason})"
        ) from error
    return device
