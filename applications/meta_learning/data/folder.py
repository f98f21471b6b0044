"""The user's own images: one folder for each class, ``<folder>/<class>/<image>.png`` or ``.jpg``."""

from pathlib import Path

from applications.meta_learning.data.classes import DataError, ImageClasses
from applications.meta_learning.data.files import Colours, ImageFiles, class_folders, expanded

FEWEST_CLASSES = 4


def load_folder(
    data_dir: Path | str | None, cache_dir: Path | str | None = None, size: int = 28, colours: Colours = "rgb"
) -> ImageClasses:
    """The classes of a folder ``<class>/<image>.png`` or ``.jpg``, in the order of their names. They may have different numbers of images.

    Args:
        data_dir: the folder.
        cache_dir: where the decoded images are kept. None: the user's cache folder.
        size: height and width to which every image is reduced.
        colours: "rgb" or "grey".

    Raises:
        DataError: a folder without classes, a class without images, a file that is no image, the same image in two classes.
    """
    if data_dir is None:
        raise DataError(
            "expected the folder of your images, <folder>/<class>/<image>.png or .jpg; name it with --data-dir"
        )
    folder = expanded(data_dir)
    files = class_folders(folder)
    if len(files) < FEWEST_CLASSES:
        raise DataError(
            f"{folder}: expected at least {FEWEST_CLASSES} classes, two to train on and two to hold out, found "
            f"{len(files)} ({', '.join(files)}); add classes"
        )
    found = ImageFiles(files=files, groups=("folder",) * len(files), apart=tuple(files))
    return found.load("folder", None if cache_dir is None else expanded(cache_dir), size, colours)
