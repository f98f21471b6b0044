"""What few-shot learning is for: adapt a meta-trained network to new classes from a few images of each, and classify others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config, ConfigError, refuse_without_effect
from applications.meta_learning.data import DataError
from applications.meta_learning.data.files import ImageFiles, class_folders, expanded, images_in
from applications.meta_learning.method import build_method, build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.problem import batched_outputs
from applications.meta_learning.tasks import device_of, dtype_of
from applications.meta_learning.train import load_theta

INK = ("glyphs", "omniglot")  # drawings, which training sees with ink 1 on background 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The classes of some images.

    Attributes:
        files: one for each image.
        classes: the names of the folders of the support images, in order.
        probabilities: softmax of the network's outputs, float64 (images, classes) on the CPU.
        adaptation: of the inner solve; it did not fail. Its value is phi.
        config: the settings that were used.
        step: meta-steps of the run.
        shots: support images of each class.
    """

    files: tuple[Path, ...]
    classes: tuple[str, ...]
    probabilities: Tensor
    adaptation: bilevel.Result
    config: Config
    step: int
    shots: int

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[i] for i in self.probabilities.argmax(1).tolist()]


def predict(
    run: Path, support: Path, images: Sequence[Path], *, settings: Mapping[str, Any] | None = None
) -> Prediction:
    """Adapt the network of a run to the classes of `support` and classify `images`.

    The images are decoded, reduced and scaled as in training, and the network is adapted by the inner solver of the run. Batch
    norm takes its statistics from the images at hand, so all of `images` are classified together, and the answer for one of them
    depends on the others.

    run: a checkpoint.pt, or the folder that has it.
    support: <class>/<image>.png or .jpg; as many classes as the run has ways, and as many images in one as in another.
    images: files, and folders of files.
    settings: fields of `Config` to replace, for example {"inner_steps": 20, "device": "cpu"}.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: a setting is wrong, or the run is not about images.
        DataError: a file is no image, or the support folder does not fit the run.
        bilevel.SolverError: the adaptation failed; the message says how.
    """
    stored = load_checkpoint(run)
    config = replace(Config.from_dict(stored["config"]), **{"device": "auto", **(settings or {})})
    refuse_without_effect(config, settings or {})
    if config.is_regression:
        raise ConfigError("this run was trained on sinusoids; expected one that was trained on images")
    device, dtype = device_of(config), dtype_of(config)
    classes = _support_files(expanded(support), config.ways)
    shots = len(next(iter(classes.values())))
    files = _image_files(images)
    examples, queries = (_pixels(each, config).to(device, dtype).div_(255) for each in (classes, {"images": files}))

    module = build_network(config).to(device=device, dtype=dtype)
    theta = initial_theta(module, dtype, device)
    load_theta(theta, stored["theta"])
    method = build_method(config, module)
    labels = torch.arange(config.ways, device=device).repeat_interleave(shots)
    task = {"support": {"x": examples[None], "y": labels[None]}}
    try:
        found = bilevel.solve(method.problem, theta, task, solver=method.solver, batched=True)
        phi = found.unwrap()
        outputs = batched_outputs(module, phi, queries[None])[0]
    except torch.OutOfMemoryError as error:
        raise ConfigError("the device is out of memory; give fewer images at a time, or --device cpu") from error
    return Prediction(
        files=tuple(files),
        classes=tuple(classes),
        probabilities=outputs.double().softmax(-1).cpu(),
        adaptation=replace(found, codes=found.codes[0], steps=found.steps[0], residual=found.residual[0]),
        config=config,
        step=stored["progress"]["step"],
        shots=shots,
    )


def _support_files(folder: Path, ways: int) -> dict[str, list[Path]]:
    """The files of each class."""
    classes = class_folders(folder, "--support")
    if len(classes) != ways:
        raise DataError(
            f"{folder}: expected {ways} classes, because the last layer of this network has {ways} outputs, which --ways fixed in "
            f"training; found {len(classes)} ({', '.join(classes)}). Give {ways}, or train a run with --ways {len(classes)}"
        )
    fewest, most = (pick(classes, key=lambda name: len(classes[name])) for pick in (min, max))
    if len(classes[fewest]) != len(classes[most]):
        raise DataError(
            f"{folder}: expected as many images in one class as in another, since each counts the same, found "
            f"{len(classes[fewest])} of {fewest!r} and {len(classes[most])} of {most!r}; add images, or take some out"
        )
    return classes


def _image_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and those in the folders that are; each once."""
    found = [file for path in map(expanded, paths) for file in (images_in(path) if path.is_dir() else [path])]
    if missing := [file for file in found if not file.exists()]:
        raise DataError(f"{missing[0]}: there is no such file; name image files, or folders of them, with --images")
    if not found:
        raise DataError("expected at least one image to classify, got none; name files or folders with --images")
    return list(dict.fromkeys(found))


def _pixels(files: Mapping[str, list[Path]], config: Config) -> Tensor:
    """uint8 (images, channels, size, size), as training has them."""
    ink = config.dataset in INK
    images = ImageFiles(files=files, groups=("",) * len(files)).read(config.image_size, config.colours, ink=ink).images
    if ink and images.float().mean() > 127:
        first = next(iter(files.values()))[0]
        raise DataError(
            f"{first} and those with it: expected dark ink on a light ground, found the opposite; invert the images "
            f"(the training was on {config.dataset})"
        )
    return images
