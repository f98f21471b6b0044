"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each (Lake et al. 2015).

Every drawing is turned to grey levels with ink = 255 on background 0 and then reduced from 105x105 to 28x28 by Pillow's
Lanczos filter. The script of MAML (Finn et al. 2017) names the same filter but hands it the 1-bit drawings, for which
Pillow takes the nearest pixel instead: its images are black and white, ours have grey edges.
"""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import platformdirs
import pooch
import torch
from PIL import Image, ImageChops

from applications.meta_learning.data.cache import cached
from applications.meta_learning.data.classes import DataError, ImageClasses
from applications.meta_learning.data.files import expanded
from applications.meta_learning.data.layout import OFFICIAL, ImageSet, Layout, arrange
from applications.meta_learning.data.sources import Source, find_source

RESIZE_FILTER = Image.Resampling.LANCZOS
CACHE_FORMAT = 1  # raise it when the decoded images or the cache file change


def load_omniglot(
    data_dir: Path | str | None = None,
    cache_dir: Path | str | None = None,
    size: int = 28,
    download: bool = False,
    *,
    layout: Layout = OFFICIAL,
) -> ImageClasses:
    """Both sets of Omniglot, background first, characters in the order of their names.

    data_dir: a folder with images_background.zip and images_evaluation.zip, or with the folders that they unpack to
        (the archive counts where both are there). None: the user's cache folder, where `download` puts the archives.
    cache_dir: where the decoded images are kept. None: the user's cache folder.
    size: height and width of the images, 4 to 105.
    download: fetch the official archives (14 MB, checked against their md5) that `data_dir` lacks. Nothing is
        overwritten.
    layout: what must be there. Tests use small ones.

    Raises `DataError` for missing, damaged, incomplete or unsafe files and for a failed download; the message names the
    file and the next step.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 4 <= size <= layout.image_size:
        raise ValueError(f"size: expected an integer from 4 to {layout.image_size}, got {size!r}")
    user_cache = platformdirs.user_cache_path("bilevel", appauthor=False) / "omniglot"
    folder = user_cache if data_dir is None else expanded(data_dir)
    cache_folder = user_cache if cache_dir is None else expanded(cache_dir)
    sources = [_find_or_download(folder, image_set, download) for image_set in layout.sets]
    about = [f"format {CACHE_FORMAT}", f"size {size}", RESIZE_FILTER.name, *(s.fingerprint() for s in sources)]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()
    shape = (sum(image_set.characters for image_set in layout.sets), layout.drawings, size, size)
    path = cache_folder / f"omniglot-{size}-{key[:16]}.npz"
    return cached(path, key, shape, lambda: _decode_all(sources, layout, size))


def _find_or_download(folder: Path, image_set: ImageSet, download: bool) -> Source:
    source = find_source(folder, image_set.name)
    if source is None and download:
        _download(folder, image_set)
        source = find_source(folder, image_set.name)
    if source is None:
        raise DataError(
            f"no Omniglot in {folder}: expected {image_set.name}.zip or the folder {image_set.name}. "
            f"{_hint(folder, image_set.name)}"
            "Name the folder that has it with data_dir (--data-dir), or fetch it with download=True (--download)"
        )
    return source


def _hint(folder: Path, set_name: str) -> str:
    """The folder that was probably meant: the one above (a set or an archive was named) or one below (a clone was)."""
    below = sorted(folder.glob("*/")) if os.path.isdir(folder) else []
    for candidate in (folder.parent, *below):
        if find_source(candidate, set_name) is not None:
            return f"It is in {candidate}. "
    return ""


def _download(folder: Path, image_set: ImageSet) -> None:
    """Pooch writes beside the target, checks the hash and only then moves the file to its name."""
    target = folder / f"{image_set.name}.zip"
    by_hand = f"without a network, fetch {image_set.url} elsewhere and put it into {folder}"
    try:
        pooch.retrieve(image_set.url, known_hash=f"md5:{image_set.md5}", fname=target.name, path=folder)
    except OSError as error:  # of the network (all errors of requests are OSErrors) or of the disk
        raise DataError(f"could not download {image_set.url} to {target}: {error}; {by_hand}") from error
    except ValueError as error:
        raise DataError(
            f"{image_set.url} is not the official archive (expected md5 {image_set.md5}); nothing was kept. "
            f"Try again later; {by_hand}"
        ) from error


def _decode_all(sources: list[Source], layout: Layout, size: int) -> ImageClasses:
    arranged = [
        arrange(source.names(), image_set, layout.drawings, source.path, source.remedy)
        for source, image_set in zip(sources, layout.sets, strict=True)
    ]
    names = [character for characters in arranged for character in characters]
    images = np.empty((len(names) * layout.drawings, size, size), dtype=np.uint8)
    content = hashlib.sha256()
    row = 0
    for source, characters in zip(sources, arranged, strict=True):
        first = row
        files = [file for drawings in characters.values() for file in drawings]
        for file, png in zip(files, source.read(files), strict=True):
            content.update(f"{file}\0{len(png)}\0".encode() + png)
            try:
                images[row] = _decode(png, layout.image_size, size)
            # Pillow raises OSError, SyntaxError, ValueError, zlib.error and more for damaged files.
            except Exception as error:
                raise DataError(f"{source.path}: {file} is not a drawing ({error}); {source.remedy}") from error
            row += 1
        if images[first:row].mean() > 127:
            raise DataError(f"{source.path}: expected dark ink on a light ground, found the opposite; {source.remedy}")
    groups = [s.group for s, characters in zip(layout.sets, arranged, strict=True) for _ in characters]
    return ImageClasses(
        images=torch.from_numpy(images).view(len(names), layout.drawings, size, size),
        names=tuple(names),
        groups=tuple(groups),
        source_key=content.hexdigest(),
    )


def _decode(png: bytes, original_size: int, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        if image.size != (original_size, original_size):  # known before a pixel is unpacked
            raise ValueError(f"expected {original_size} x {original_size} pixels, found {image.width} x {image.height}")
        ink = ImageChops.invert(image.convert("L"))
        return np.asarray(ink.resize((size, size), RESIZE_FILTER))
