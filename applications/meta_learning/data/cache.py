"""The decoded images in one file, so that they are decoded once.

The file is a NumPy .npz without pickled objects. It is written beside its place and then moved there, so it is whole or
absent; what is there and cannot be read back, or belongs to other files, is ignored and written again.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from applications.meta_learning.data.classes import ImageClasses


def cached(path: Path, key: str, shape: tuple[int, ...] | None, build: Callable[[], ImageClasses]) -> ImageClasses:
    """What `build` gives, from `path` if it was put there under the same `key` (and has this `shape`; None: any).

    Warns, and goes on without a cache, where `path` cannot be written.
    """
    if os.path.exists(path):
        try:
            return _load(path, key, shape)
        # A damaged file makes zipfile and NumPy raise nearly anything, and none of it matters: `build` knows better.
        except Exception as error:
            warnings.warn(f"{path}: not a usable cache ({error}); decoding again", stacklevel=3)
    classes = build()
    try:
        _store(path, key, classes)
    except OSError as error:
        warnings.warn(
            f"{path}: could not be written ({error}); going on without a cache, so the next start decodes again. "
            "Name one that can be written: XDG_CACHE_HOME in the environment (in Python, cache_dir)",
            stacklevel=3,
        )
    return classes


def _load(path: Path, key: str, shape: tuple[int, ...] | None) -> ImageClasses:
    with np.load(path, allow_pickle=False) as file:
        found = str(file["key"])
        if found != key:
            raise ValueError(f"expected the key {key}, found {found}")
        images = file["images"]
        if shape is not None and images.shape != shape:
            raise ValueError(f"expected images of shape {shape}, found {images.shape}")
        return ImageClasses(
            images=torch.from_numpy(images),
            names=tuple(file["names"].tolist()),
            groups=tuple(file["groups"].tolist()),
            source_key=str(file["source_key"]),
            counts=(tuple(file["counts"].tolist()) if "counts" in file else ()) or None,
        )


def _store(path: Path, key: str, classes: ImageClasses) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp", delete=False) as file:
        try:
            np.savez(
                file,
                key=np.array(key),
                images=classes.images.numpy(),
                names=np.array(classes.names),
                groups=np.array(classes.groups),
                source_key=np.array(classes.source_key),
                counts=np.array(classes.counts or (), dtype=np.int64),
            )
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a name without its contents
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
