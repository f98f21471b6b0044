"""Image files of any size, in any colours, as few-shot learning takes them: square, small, uint8.

An image is turned as its EXIF entry says, laid on white where it is transparent, made grey or RGB, and reduced as a whole
(whatever its shape) to a square by Pillow's Lanczos filter.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from applications.meta_learning.data.cache import cached
from applications.meta_learning.data.classes import DataError, ImageClasses
from applications.meta_learning.data.contents import Contents

Colours = Literal["grey", "rgb"]

SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_SUFFIXES = (".bmp", ".gif", ".heic", ".tif", ".tiff", ".webp")  # images that would be left out in silence
CACHE_FORMAT = 2  # raise it when the decoded images, their checks or the cache file change


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The files of each class, not read yet.

    groups: one per class, as in `ImageClasses`.
    apart: one per class; images of classes with different ones have to differ. None: any may be equal.
    few: as in `Contents`.
    """

    files: Mapping[str, list[Path]]
    groups: tuple[str, ...]
    apart: tuple[str, ...] | None = None
    few: float = 0.0

    def load(self, kind: str, cache_dir: Path | None, size: int, colours: Colours) -> ImageClasses:
        """The images, from the cache of this kind of data where they are in it."""
        total, channels = sum(map(len, self.files.values())), 3 if colours == "rgb" else 1
        about = [colours, *(f"{name} {fingerprint(files)}" for name, files in self.files.items())]
        path, key = cache_place(kind, cache_dir, size, about)
        return cached(path, key, (total, channels, size, size), lambda: self.read(size, colours))

    def read(self, size: int, colours: Colours, *, ink: bool = False) -> ImageClasses:
        """The images from their files, without a cache. ink: as in `decode`.

        Raises:
            DataError: a file is no image, or the same as one that it must differ from.
        """
        contents = None if self.apart is None else Contents(self.few)
        counts = tuple(len(files) for files in self.files.values())
        images = np.empty((sum(counts), 3 if colours == "rgb" else 1, size, size), dtype=np.uint8)
        content, row = hashlib.sha256(), 0
        for part, (name, files) in zip(self.apart or self.groups, self.files.items(), strict=True):
            for file in files:
                try:
                    read = file.read_bytes()
                    images[row] = decode(Image.open(io.BytesIO(read), formats=("PNG", "JPEG")), size, colours, ink=ink)
                # Pillow raises OSError, SyntaxError, ValueError, zlib.error and more for damaged files.
                except Exception as error:
                    # what Pillow says of a file of another kind names the buffer
                    reason = "it is of another kind" if isinstance(error, UnidentifiedImageError) else error
                    raise DataError(
                        f"{file}: expected a PNG or JPEG image, could not read one ({reason}); replace it or take it out"
                    ) from error
                content.update(f"{name}\0{file.name}\0{len(read)}\0".encode(errors="surrogateescape") + read)
                if contents is not None:
                    contents.add(read, part, file)
                row += 1
        if contents is not None:
            contents.judge()
        return ImageClasses(
            images=torch.from_numpy(images),
            names=tuple(self.files),
            groups=self.groups,
            source_key=content.hexdigest(),
            counts=counts,
        )


def decode(image: Image.Image, size: int, colours: Colours, *, ink: bool = False) -> NDArray[np.uint8]:
    """(channels, size, size). ink: it is a drawing, dark on a light ground; ink becomes 255, and the ground 0.

    Raises:
        ValueError: the image has more than 8 bits per channel, of which Pillow would keep the wrong ones.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits per channel, mode {image.mode}; convert it to 8 bits")
    with image:
        upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        ground = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(ground, upright.convert("RGBA"))
    plain = upright.convert("RGB" if colours == "rgb" else "L")
    if ink:
        plain = ImageChops.invert(plain)
    if plain.size != (size, size):
        plain = plain.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(plain)
    return pixels.transpose(2, 0, 1) if colours == "rgb" else pixels[None]


def class_folders(folder: Path, option: str = "--data-dir") -> dict[str, list[Path]]:
    """The images in each folder of `folder`, in the order of their names. option: which names the folder.

    Raises:
        DataError: there is no folder in it, or one without images, or with images in formats that are not read.
    """
    try:
        found = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith((".", "__MACOSX")))
    except OSError as error:
        raise DataError(f"{folder}: could not be read ({error}); name another folder with {option}") from error
    if not found:
        raise DataError(
            f"{folder}: expected one folder for each class, <class>/<image>.png or .jpg, found none; name the folder "
            f"that has them with {option}"
        )
    return {name: images_in(folder / name, "the images of a class") for name in found}


def images_in(folder: Path, what: str = "images") -> list[Path]:
    """The images in a folder, in the order of their names; other files, and hidden ones, are left alone.

    Raises:
        DataError: there are none, or some in formats that are not read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: could not be read ({error})") from error
    others = [path for path in paths if path.suffix.lower() in OTHER_SUFFIXES]
    if others:
        raise DataError(
            f"{others[0]}: expected PNG or JPEG images; convert it (and {len(others) - 1} more of {folder.name})"
        )
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(f"{folder}: expected {what} (.png, .jpg), found none; fill it or take it out")
    return images


def expanded(path: str | Path) -> Path:
    """The path with ~ for the folder of a user.

    Raises:
        DataError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: there is no such user; write the folder out") from error


def fingerprint(files: list[Path]) -> str:
    """Hash of names, sizes and times (reading the files would take as long as decoding them); not of where they are."""
    digest = hashlib.sha256()
    for file in files:
        try:
            about = file.stat()
        except OSError as error:
            raise DataError(f"{file}: could not be read ({error})") from error
        # The change time too: it tells a file that was replaced by one of the same size and age.
        digest.update(
            f"{file.name}\0{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def cache_place(kind: str, cache_dir: Path | None, size: int, about: list[str]) -> tuple[Path, str]:
    """Path and key of the cache of such data. cache_dir: None: the user's cache folder."""
    folder = platformdirs.user_cache_path("bilevel", appauthor=False) / kind if cache_dir is None else cache_dir
    key = hashlib.sha256(
        "\n".join([f"format {CACHE_FORMAT}", kind, str(size), *about]).encode(errors="surrogateescape")
    ).hexdigest()
    return folder / f"{kind}-{size}-{key[:16]}.npz", key
