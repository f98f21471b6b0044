"""The loader of Mini-ImageNet on small data in the forms that people have, written here with csv, Pillow and pickle.

Oracles: the arrays that were written, Pillow for a smaller size, and a pickle of Python 2 put together from its opcodes.
"""

import csv
import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.cli import app
from applications.meta_learning.data import DataError, ImageClasses, load_mini_imagenet, published_split
from applications.meta_learning.data.safe_pickle import read_pickle

SIZE = 12
COUNTS = {"train": {"n01": 4, "n02": 3, "n03": 4}, "test": {"n04": 3, "n05": 5}}  # images of each class
NUM_CLASSES = (3, 2)

Parts = dict[str, dict[str, np.ndarray]]  # part -> class -> (images, size, size, 3)
Writer = Callable[[Path, Parts], None]


def pictures(counts: dict[str, dict[str, int]] = COUNTS, size: int = SIZE) -> Parts:
    random = np.random.default_rng(0)
    return {
        part: {name: random.integers(256, size=(n, size, size, 3), dtype=np.uint8) for name, n in classes.items()}
        for part, classes in counts.items()
    }


def write_csv(folder: Path, parts: Parts) -> None:
    (folder / "images").mkdir(parents=True)
    for part, classes in parts.items():
        with (folder / f"{part}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["filename", "label"])
            for name, images in classes.items():
                for i, image in enumerate(images):
                    # Pillow goes by the contents, so that the pixels are the same in all forms
                    Image.fromarray(image).save(folder / "images" / f"{name}{i:08d}.jpg", "PNG")
                    rows.writerow([f"{name}{i:08d}.jpg", name])


def write_folders(folder: Path, parts: Parts) -> None:
    for part, classes in parts.items():
        for name, images in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / part / name / f"{i:08d}.png")


def shuffled(classes: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, list[int]]]:
    """All images in an order in which the classes alternate, and the rows of each class in it."""
    names = [name for name, images in classes.items() for _ in images]
    order = np.random.default_rng(1).permutation(len(names))
    images = np.concatenate(list(classes.values()))[order]
    rows: dict[str, list[int]] = {name: [0] * len(of) for name, of in classes.items()}
    first = dict(zip(classes, np.cumsum([0, *(len(of) for of in classes.values())]), strict=False))
    for row, original in enumerate(order.tolist()):
        rows[names[original]][original - int(first[names[original]])] = row
    return images, rows


def write_cache_pickles(folder: Path, parts: Parts, protocol: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, classes in parts.items():
        images, rows = shuffled(classes)
        with (folder / f"mini-imagenet-cache-{part}.pkl").open("wb") as file:
            pickle.dump({"image_data": images, "class_dict": rows}, file, protocol=protocol)


def write_label_pickles(folder: Path, parts: Parts, named: bool = True) -> None:
    """In these, the images of a class come in the order of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, classes in parts.items():
        labels = [label for label, images in enumerate(classes.values()) for _ in images]
        stored: dict[str, Any] = {"data": np.concatenate(list(classes.values())), "labels": labels}
        if named:
            stored["label2catname"] = dict(enumerate(classes))
        name = "train_phase_train" if part == "train" else part
        with (folder / f"miniImageNet_category_split_{name}.pickle").open("wb") as file:
            pickle.dump(stored, file)


FORMS = pytest.mark.parametrize("write", [write_csv, write_folders, write_cache_pickles, write_label_pickles])


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, **options: tmp_path / "user" / name)
    return tmp_path / "user" / "bilevel" / "mini-imagenet"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place" / "data"


def load(folder: Path, size: int = SIZE, num_classes: tuple[int, int] = NUM_CLASSES) -> ImageClasses:
    return load_mini_imagenet(folder, size=size, num_classes=num_classes)


def by_class(classes: ImageClasses) -> dict[str, np.ndarray]:
    """(images, size, size, 3) of each class, by its name."""
    assert classes.counts is not None and classes.images.dtype == torch.uint8
    parts = classes.images.movedim(1, -1).split(list(classes.counts))
    return {name: part.numpy() for name, part in zip(classes.names, parts, strict=True)}


# --- what is loaded --------------------------------------------------------------------------------------------------


@FORMS
def test_every_form_gives_the_images_of_each_class(write: Writer, place: Path) -> None:
    parts = pictures()
    write(place, parts)
    loaded = load(place)
    assert loaded.names == ("train/n01", "train/n02", "train/n03", "test/n04", "test/n05")
    assert loaded.groups == ("train",) * 3 + ("test",) * 2
    for name, images in by_class(loaded).items():
        part, short = name.split("/")
        np.testing.assert_array_equal(images, parts[part][short])
    split = published_split(loaded)
    assert (split.name, split.train, split.test) == ("published", (0, 1, 2), (3, 4))


@FORMS
def test_another_size_is_that_of_lanczos(write: Writer, place: Path) -> None:
    parts = pictures()
    write(place, parts)
    for name, images in by_class(load(place, size=7)).items():
        part, short = name.split("/")
        for image, original in zip(images, parts[part][short], strict=True):
            smaller = Image.fromarray(original).resize((7, 7), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(image, np.asarray(smaller))


def test_labels_without_names(place: Path) -> None:
    """The labels of the two files may be the same numbers."""
    write_label_pickles(place, pictures(), named=False)
    assert load(place).names == ("train/label 0", "train/label 1", "train/label 2", "test/label 0", "test/label 1")


@FORMS
def test_a_second_start_decodes_nothing(
    write: Writer, place: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place, pictures())
    first = load(place)
    (path,) = user_cache.iterdir()
    assert path.name.startswith("mini-imagenet-12-") and path.suffix == ".npz"

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("decoded although a cache was there")

    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(Image, "fromarray", fail)
    second = load(place)
    assert torch.equal(first.images, second.images)
    assert (first.names, first.groups, first.counts, first.source_key) == (
        second.names,
        second.groups,
        second.counts,
        second.source_key,
    )


@FORMS
def test_an_image_in_both_parts_is_refused(write: Writer, place: Path, tmp_path: Path) -> None:
    """Under another name, in another class: the content counts. In one part it is a warning."""
    parts = pictures()
    parts["test"]["n05"][3] = parts["train"]["n02"][1]
    write(place, parts)
    with pytest.raises(DataError, match="expected different images in 'train' and 'test', found the same one as .*"):
        load(place)
    parts = pictures()
    parts["test"]["n05"][3] = parts["test"]["n04"][1]
    write(tmp_path / "twice", parts)
    with pytest.warns(UserWarning, match=r"is the same image as .* Take it out$"):
        np.testing.assert_array_equal(by_class(load(tmp_path / "twice"))["test/n05"], parts["test"]["n05"])


@FORMS
def test_a_few_images_in_both_parts_are_told(
    write: Writer, place: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Nobody may take an image out of a collection that all papers use."""
    parts = pictures()
    parts["test"]["n05"][3] = parts["train"]["n02"][1]
    write(place, parts)
    total = sum(len(images) for part in parts.values() for images in part.values())
    monkeypatch.setattr("applications.meta_learning.data.mini_imagenet.FEW", 1 / total)
    np.testing.assert_array_equal(by_class(load(place))["test/n05"], parts["test"]["n05"])
    told = [str(one.message) for one in recwarn if "expected different images" in str(one.message)]
    assert len(told) == 1 and f"1 of {total} images, too few to change an accuracy" in told[0]


def test_a_source_key_tells_other_images(place: Path, tmp_path: Path) -> None:
    parts = pictures()
    write_cache_pickles(place, parts)
    write_cache_pickles(tmp_path / "same", parts, protocol=2)
    parts["test"]["n05"][-1, 0, 0, 0] ^= 1
    write_cache_pickles(tmp_path / "other", parts)
    keys = [load(folder).source_key for folder in (place, tmp_path / "same", tmp_path / "other")]
    assert keys[0] == keys[1] != keys[2]


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(protocol: int, place: Path) -> None:
    parts = pictures()
    write_cache_pickles(place, parts, protocol)
    np.testing.assert_array_equal(by_class(load(place))["test/n05"], parts["test"]["n05"])


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """What Python 2 and the NumPy of that time write for {"image_data": array}: text and pixels are both byte strings."""
    image = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3) + 230  # bytes that are no ASCII
    word = lambda text: b"U" + bytes([len(text)]) + text  # noqa: E731
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + word(b"b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + word(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + word(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    pixels = b"T" + struct.pack("<i", image.nbytes) + image.tobytes()
    shape = b"(K\x02K\x02K\x02K\x03t"
    path = tmp_path / "old.pkl"
    path.write_bytes(
        b"\x80\x02}" + word(b"image_data") + array + b"(K\x01" + shape + dtype + b"\x89" + pixels + b"tbs."
    )
    stored = read_pickle(path)
    assert list(stored) == ["image_data"]
    np.testing.assert_array_equal(stored["image_data"], image)


class Bomb:
    """Unpickled by pickle.load, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused(protocol: int, place: Path, tmp_path: Path) -> None:
    write_cache_pickles(place, pictures())
    target = tmp_path / "made"
    path = place / "mini-imagenet-cache-test.pkl"
    path.write_bytes(pickle.dumps({"image_data": np.zeros(3), "class_dict": {"a": Bomb(target)}}, protocol))
    pickle.loads(path.read_bytes())
    assert target.exists()  # it works
    target.unlink()
    with pytest.raises(
        DataError, match=r"cache-test.pkl: refused.*it asks for .*nothing in it was run.*that you trust"
    ):
        load(place)
    assert not target.exists()


class Asks:
    """Asks for a function of this name when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Asks(eval, "1"), "it asks for __builtin__.eval"),
        (Asks(getattr, "a", "upper"), "it asks for __builtin__.getattr"),
        (np.array([{}, 1], dtype=object), "it has an array of object"),
        (np.zeros(2, dtype=[("a", "u1")]), "it has an array of .*expected numbers or text"),
        (torch.zeros(2), "it asks for torch"),
        ({1, 2}, "it asks for __builtin__.set"),
    ],
    ids=["eval", "getattr", "objects", "records", "tensor", "set"],
)
def test_only_arrays_and_plain_containers(thing: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([thing], protocol=2))
    with pytest.raises(DataError, match=words):
        read_pickle(path)


def test_plain_things_come_back(tmp_path: Path) -> None:
    things = {"a": [1, 2.5, None, True, ("x", b"\xff")], "b": np.arange(3), "c": np.float32(2), "d": np.array(["é"])}
    path = tmp_path / "a.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(things, protocol))
        found = read_pickle(path)
        assert found["a"] == things["a"] and found["c"] == 2
        np.testing.assert_array_equal(found["b"], things["b"])
        np.testing.assert_array_equal(found["d"], things["d"])


# --- errors ----------------------------------------------------------------------------------------------------------


def replaced(place: Path, **entries: Any) -> None:
    """The pickle of the test classes with other entries."""
    path = place / "mini-imagenet-cache-test.pkl"
    stored = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({k: v for k, v in {**stored, **entries}.items() if v is not None}))


@pytest.mark.parametrize(
    ("write", "break_it", "words"),
    [
        (
            write_csv,
            lambda p: (p / "test.csv").unlink(),
            "found train.csv, but not test.csv beside it; expected train.csv",
        ),
        (write_folders, lambda p: (p / "test").rename(p / "tset"), "found train, but not test beside it"),
        (
            write_cache_pickles,
            lambda p: (p / "mini-imagenet-cache-train.pkl").unlink(),
            "but not mini-imagenet-cache-train",
        ),
        (write_csv, lambda p: (p / "images").rename(p / "pictures"), "found train.csv, but not images"),
        (
            write_csv,
            lambda p: [(p / "images" / f"n05{i:08d}.jpg").unlink() for i in (1, 3)],
            "test.csv: 2 of its images are missing, the first is n0500000001.jpg; expected all of them in .*images",
        ),
        (write_csv, lambda p: (p / "test.csv").write_text("a,b\n1,2\n"), "expected the columns filename and label"),
        (write_csv, lambda p: (p / "test.csv").write_bytes(b"\xff\xfe\x00"), "could not be read as a table"),
        (
            write_csv,
            lambda p: (p / "test.csv").write_text("filename,label\n../x.jpg,n04\n"),
            "test.csv, line 2: expected the name of a file in images and a label, found '../x.jpg', 'n04'",
        ),
        (
            write_csv,
            lambda p: (p / "images" / "n0400000000.jpg").write_bytes(b"not an image"),
            "n0400000000.jpg: expected a PNG or JPEG image.*replace it or take it out",
        ),
        (
            write_folders,
            lambda p: (p / "train" / "n04").mkdir() or Image.new("RGB", (9, 9)).save(p / "train" / "n04" / "1.png"),
            "expected 3 classes in train, found 4; get the files of Ravi and Larochelle's split, or .*--dataset folder",
        ),
        (
            write_folders,
            lambda p: (p / "test" / "n04").rename(p / "test" / "n02"),
            "expected different classes in train and test, found n02 in both",
        ),
        (write_folders, lambda p: (p / "test" / "empty").mkdir(), "expected the images of a class .*found none"),
        (
            write_cache_pickles,
            lambda p: (p / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps([1])),
            "cache-test.pkl: expected a dict, found list",
        ),
        (
            write_cache_pickles,
            lambda p: replaced(p, class_dict=None, other=1),
            "expected the entries image_data and class_dict, or data and labels, found image_data, other",
        ),
        (
            write_cache_pickles,
            lambda p: replaced(p, image_data=np.zeros((8, SIZE * SIZE * 3), dtype=np.uint8)),
            r"expected images as a uint8 array \(images, height, width, 3\), found uint8 \(8, 432\)",
        ),
        (
            write_cache_pickles,
            lambda p: replaced(p, image_data=np.zeros((8, SIZE, SIZE, 3), dtype=np.float32)),
            r"found float32 \(8, 12, 12, 3\)",
        ),
        (write_cache_pickles, lambda p: replaced(p, image_data=[1, 2]), "found list"),
        (
            write_cache_pickles,
            lambda p: replaced(p, class_dict={"a": [0, 1, 2], "b": [2, 3, 4, 5, 6]}),
            "expected every one of the 8 images in one class, found 8 rows",
        ),
        (write_cache_pickles, lambda p: replaced(p, class_dict={"a": [0, "x"]}), "expected the rows of the images"),
        (write_cache_pickles, lambda p: replaced(p, class_dict=7), "expected the rows of the images"),
        (
            write_cache_pickles,
            lambda p: (p / "mini-imagenet-cache-test.pkl").write_bytes(b"\x80\x04cut"),
            "refused, or damaged",
        ),
    ],
)
def test_errors_say_what_to_do(write: Writer, break_it: Callable[[Path], Any], words: str, place: Path) -> None:
    write(place, pictures())
    break_it(place)
    with pytest.raises(DataError, match=words):
        load(place)


def test_no_data(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be downloaded here: expected train.csv.*--data-dir"):
        load_mini_imagenet(None)
    with pytest.raises(DataError, match=r"no Mini-ImageNet in .*missing: expected train.csv.*pickles.*--data-dir"):
        load(tmp_path / "missing")
    write_folders(place, pictures())
    for folder in (place.parent, place / "train"):
        with pytest.raises(DataError, match=rf"no Mini-ImageNet .*It is perhaps in {re.escape(str(place))}\. "):
            load(folder)


# --- the program -----------------------------------------------------------------------------------------------------


def imaml(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "BILEVEL_OMNIGLOT": "/nowhere"})


def test_an_image_that_a_table_names_twice_is_refused(place: Path) -> None:
    """It could be support and query of one task."""
    write_csv(place, pictures({"train": {"n0": 3, "n1": 3}, "test": {"n2": 3, "n3": 3}}, size=16))
    with (place / "train.csv").open("a") as file:
        file.write("n000000001.jpg,n1\n")
    with pytest.raises(
        DataError, match="train.csv, line 8: expected every image once, found n000000001.jpg on line 3 too"
    ):
        load_mini_imagenet(place, size=16, num_classes=(2, 2))


def test_an_image_in_both_tables_is_refused(place: Path) -> None:
    """Classes with other names, and the same images."""
    write_csv(place, pictures({"train": {"n0": 3, "n1": 3}, "test": {"n2": 3, "n3": 3}}, size=16))
    with (place / "test.csv").open("a") as file:
        file.write("n000000001.jpg,n2\n")
    with pytest.raises(
        DataError, match="expected different images in train and test, found 1 in both, such as n000000001.jpg"
    ):
        load_mini_imagenet(place, size=16, num_classes=(2, 2))


TINY = (
    *("--image-size", "16", "--channels", "2", "--query-shots", "1", "--eval-query-shots", "1", "--outer-steps", "2"),
    *("--meta-batch", "2", "--eval-interval", "2", "--eval-tasks", "2", "--inner-steps", "2", "--device", "cpu"),
    *("--no-final-test", "--no-tensorboard", "--log-interval", "1"),
)


def test_train_and_evaluate(place: Path, tmp_path: Path) -> None:
    counts = {"train": {f"n{i:02d}": 2 for i in range(64)}, "test": {f"n{i:02d}": 2 for i in range(64, 84)}}
    write_label_pickles(place, pictures(counts, size=16))
    run = tmp_path / "run"
    result = imaml(
        "train", "--preset", "mini-imagenet-5w1s-gd", "--data-dir", place, "--out", run, *TINY, "--linear", "identity"
    )
    assert result.exit_code == 0, result.output
    stored = load_checkpoint(run)
    assert stored["split"] == {"name": "published", "train": list(range(64)), "test": list(range(64, 84))}
    assert stored["classes"][64] == "test/n64" and stored["theta"]["body.0.kernel"].shape == (3, 3, 3, 2)
    tested = imaml("evaluate", run, "--json", "--tasks", "4", "--query-shots", "1", "--protocol", "paper")
    report = json.loads(tested.stdout)  # the data are found where they were
    assert report["split"] == "published" and report["evaluations"]["paper"]["failed"] == 0
    assert "max-pooling" in report["conditions"]["network"] and "Mini-ImageNet" in report["conditions"]["images"]
    assert "ink" not in report["conditions"]["images"]
    shown = imaml("info", run)
    assert "published: 64 classes for training, 20 held out" in re.sub(r"[\s│]+", " ", shown.output)
    many = imaml("evaluate", run, "--tasks", "4", "--protocol", "tight")
    assert many.exit_code == 2 and "--query-shots" in many.output and "Traceback" not in many.output


def test_too_few_images_are_found_before_the_training(place: Path, tmp_path: Path) -> None:
    counts = {"train": {f"n{i:02d}": 2 for i in range(64)}, "test": {f"n{i:02d}": 2 for i in range(64, 84)}}
    write_label_pickles(place, pictures(counts, size=16))
    result = imaml("train", "--preset", "mini-imagenet-5w1s-hf", "--data-dir", place, "--out", tmp_path / "run")
    words = re.sub(r"\s+", " ", result.output)
    assert (
        result.exit_code == 2
        and "a training class needs 1 support and 15 query images, and 64 of 64 have fewer" in words
    )
    assert "('train/n00' has 2); add images" in words and "--query-shots" in words


def test_without_a_folder(tmp_path: Path) -> None:
    result = imaml("train", "--dataset", "mini-imagenet", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "Mini-ImageNet cannot be downloaded here" in result.output  # not Omniglot's folder
