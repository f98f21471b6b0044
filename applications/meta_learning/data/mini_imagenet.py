"""Mini-ImageNet (Vinyals et al. 2016) with the classes of Ravi and Larochelle (2017): 64 for training, 20 for test.

The 16 classes for validation are not read: nothing here is selected by them. The copies that people have come in three forms:

    train.csv, test.csv (columns filename, label), images/<filename>
    train/<class>/<image>, test/<class>/<image>
    one pickle for each part: {"image_data": array, "class_dict": {class: rows}} or {"data": array, "labels": labels}
"""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from applications.meta_learning.data.cache import cached
from applications.meta_learning.data.classes import DataError, ImageClasses
from applications.meta_learning.data.contents import Contents
from applications.meta_learning.data.files import ImageFiles, cache_place, class_folders, decode, expanded, fingerprint
from applications.meta_learning.data.safe_pickle import read_pickle

PARTS = ("train", "test")
NUM_CLASSES = (64, 20)  # of each part
KIND = "mini-imagenet"
FEW = (
    1e-3  # of a fixed collection, whose images nobody may take out: more in both parts would be a split of another kind
)

FILES = (  # what each form needs, in the order in which they are looked for; the first two paths are the parts
    ("csv", ("train.csv", "test.csv", "images")),
    ("folders", ("train", "test")),
    ("pickles", ("mini-imagenet-cache-train.pkl", "mini-imagenet-cache-test.pkl")),
    ("pickles", ("miniImageNet_category_split_train_phase_train.pickle", "miniImageNet_category_split_test.pickle")),
    ("pickles", ("train.pickle", "test.pickle")),
    ("pickles", ("train.pkl", "test.pkl")),
)
EXPECTED = (
    "expected train.csv, test.csv and the folder images; or the folders train and test with one folder for each class; or "
    "pickles such as mini-imagenet-cache-train.pkl and mini-imagenet-cache-test.pkl"
)


def load_mini_imagenet(
    data_dir: Path | str | None,
    cache_dir: Path | str | None = None,
    size: int = 84,
    *,
    num_classes: tuple[int, int] = NUM_CLASSES,
) -> ImageClasses:
    """RGB images of both parts, training first; the groups are 'train' and 'test'.

    data_dir: the folder with one of the forms above.
    cache_dir: where the decoded images are kept (1.1 GB). None: the user's cache folder.
    size: height and width; images of another size are reduced to it.
    num_classes: of training and test. Tests use small ones.

    Raises `DataError` for missing, damaged, incomplete or unsafe files; the message names the file and the next step.
    """
    if data_dir is None:
        raise DataError(f"Mini-ImageNet cannot be downloaded here: {EXPECTED}; name the folder with --data-dir")
    folder = expanded(data_dir)
    cache_folder = None if cache_dir is None else expanded(cache_dir)
    form, paths = _find(folder)
    if form == "pickles":
        path, key = cache_place(KIND, cache_folder, size, [fingerprint(paths)])
        classes = cached(path, key, None, lambda: _from_pickles(paths, size))
    else:
        parts = [_listed(paths[i], paths[2]) if form == "csv" else class_folders(paths[i]) for i in range(2)]
        in_train, in_test = ({path for of in classes.values() for path in of} for classes in parts)
        if both := in_train & in_test:
            raise DataError(
                f"{folder}: expected different images in train and test, found {len(both)} in both, such as {min(both).name}; accuracy "
                "on images that were trained on is not few-shot accuracy"
            )
        files = {
            f"{part}/{name}": of for part, classes in zip(PARTS, parts, strict=True) for name, of in classes.items()
        }
        groups = tuple(part for part, classes in zip(PARTS, parts, strict=True) for _ in classes)
        classes = ImageFiles(files=files, groups=groups, apart=groups, few=FEW).load(KIND, cache_folder, size, "rgb")
    _check_classes(classes, folder, num_classes)
    return classes


def _find(folder: Path) -> tuple[str, list[Path]]:
    """The form in which the data are there, and its files."""
    partly = None
    for form, names in FILES:
        paths = [folder / name for name in names]
        missing = [path for path in paths if not path.exists()]
        if not missing:
            return form, paths
        if len(missing) < len(paths) and partly is None:
            partly = next(path.name for path in paths if path.exists()), ", ".join(path.name for path in missing)
    if partly is not None:
        raise DataError(f"{folder}: found {partly[0]}, but not {partly[1]} beside it; {EXPECTED}")
    below = sorted(folder.glob("*/")) if folder.is_dir() else []
    near = [place for place in (folder.parent, *below) if any((place / names[0]).exists() for _, names in FILES)]
    hint = f"It is perhaps in {near[0]}. " if near else ""
    raise DataError(f"no Mini-ImageNet in {folder}: {EXPECTED}. {hint}Name the folder that has it with --data-dir")


def _check_classes(classes: ImageClasses, where: Path, num_classes: tuple[int, int]) -> None:
    for part, expected in zip(PARTS, num_classes, strict=True):
        found = classes.groups.count(part)
        if found != expected:
            raise DataError(
                f"{where}: expected {expected} classes in {part}, found {found}; get the files of Ravi and Larochelle's "
                "split, or use your own classes with --dataset folder"
            )
    short = [name.split("/", 1)[1] for name in classes.names]
    both = {name for name in short if short.count(name) > 1 and not name.startswith(LABEL)}
    if both:
        raise DataError(
            f"{where}: expected different classes in train and test, found {min(both)} in both; accuracy on classes that "
            "were trained on is not few-shot accuracy"
        )


# --- CSV -------------------------------------------------------------------------------------------------------------


def _listed(table: Path, images: Path) -> dict[str, list[Path]]:
    """The files of each class that a CSV names, in its order."""
    found: dict[str, list[Path]] = {}
    lines: dict[str, int] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise DataError(f"{table}: expected the columns filename and label, found {rows.fieldnames}")
            for row in rows:
                name, label = row["filename"], row["label"]
                if not name or not label or Path(name).name != name:
                    raise DataError(
                        f"{table}, line {rows.line_num}: expected the name of a file in images and a label, found "
                        f"{name!r}, {label!r}"
                    )
                if name in lines:
                    raise DataError(
                        f"{table}, line {rows.line_num}: expected every image once, found {name} on line {lines[name]} too; it could be "
                        "support and query of one task"
                    )
                lines[name] = rows.line_num
                found.setdefault(label, []).append(images / name)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: could not be read as a table ({error}); get it again") from error
    missing = [path for paths in found.values() for path in paths if not path.exists()]
    if missing:
        raise DataError(
            f"{table}: {len(missing)} of its images are missing, the first is {missing[0].name}; expected all of them in "
            f"{images}, unpack the archive of the images again"
        )
    return dict(sorted(found.items()))


# --- pickles ---------------------------------------------------------------------------------------------------------

LABEL = "label "  # of a class without a name


@dataclass(frozen=True)
class _Arrays:
    """What a pickle holds: images (n, height, width, 3) and the rows of each class."""

    images: NDArray[np.uint8]
    rows: dict[str, NDArray[np.int64]]


def _from_pickles(paths: list[Path], size: int) -> ImageClasses:
    parts = [_arrays(path) for path in paths]
    images = np.empty((sum(len(rows) for part in parts for rows in part.rows.values()), 3, size, size), dtype=np.uint8)
    names, groups, counts, content, first = [], [], [], hashlib.sha256(), 0
    contents = Contents(FEW)
    for path, part, arrays in zip(paths, PARTS, parts, strict=True):
        for name, rows in arrays.rows.items():
            originals = arrays.images[rows]
            content.update(f"{part}/{name}\0{originals.shape}\0".encode() + originals.tobytes())
            for i, original in enumerate(originals):
                images[first + i] = decode(Image.fromarray(original), size, "rgb")
                contents.add(original.tobytes(), part, f"{path}, row {rows[i]}")
            first += len(rows)
            names.append(f"{part}/{name}")
            groups.append(part)
            counts.append(len(rows))
    contents.judge()
    return ImageClasses(
        images=torch.from_numpy(images),
        names=tuple(names),
        groups=tuple(groups),
        source_key=content.hexdigest(),
        counts=tuple(counts),
    )


def _arrays(path: Path) -> _Arrays:
    stored = read_pickle(path)
    if not isinstance(stored, dict):
        raise DataError(f"{path}: expected a dict, found {type(stored).__name__}; {EXPECTED}")
    if {"image_data", "class_dict"} <= set(stored):
        images, of_class = stored["image_data"], stored["class_dict"]
    elif {"data", "labels"} <= set(stored):
        images, of_class = stored["data"], _by_label(stored)
    else:
        keys = ", ".join(sorted(map(str, stored)))
        raise DataError(f"{path}: expected the entries image_data and class_dict, or data and labels, found {keys}")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: expected images as a uint8 array (images, height, width, 3), found {found}")
    try:
        rows = {str(name): np.asarray(of_class[name], dtype=np.int64) for name in sorted(of_class, key=str)}
        every = np.concatenate(list(rows.values()))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: expected the rows of the images of each class, found something else ({error})"
        ) from error
    if every.ndim != 1 or len(every) != len(images) or not np.array_equal(np.sort(every), np.arange(len(images))):
        raise DataError(f"{path}: expected every one of the {len(images)} images in one class, found {len(every)} rows")
    return _Arrays(images, rows)


def _by_label(stored: dict[str, Any]) -> dict[str, Any]:
    """Rows of each label, under the name of its class where the pickle says it."""
    labels, names = np.asarray(stored["labels"]), stored.get("label2catname")
    names = names if isinstance(names, dict) else {}
    return {
        names.get(label, f"{LABEL}{label}"): np.flatnonzero(labels == label) for label in np.unique(labels).tolist()
    }
