"""Folders of the user's own images: the loader against Pillow, classes of different sizes in tasks, and the program."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
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
from applications.meta_learning.config import Config, ConfigError
from applications.meta_learning.data import DataError, ImageClasses, TaskSampler, files, load_folder
from applications.meta_learning.presets import preset
from applications.meta_learning.tasks import load_source

COUNTS = {"ash": 3, "beech": 5, "cedar": 4, "fir": 7}
SIZE = 8


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def write(folder: Path, counts: dict[str, int] = COUNTS, size: int = SIZE) -> Path:
    for c, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * c + i, size, size).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name, **options: tmp_path / "user" / name)
    return tmp_path / "user" / "bilevel" / "folder"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write(tmp_path / "place" / "trees")


def first_of(loaded: ImageClasses, name: str) -> np.ndarray:
    """The first image of a class, (channels, size, size)."""
    assert loaded.counts is not None
    return loaded.images[sum(loaded.counts[: loaded.names.index(name)])].numpy()


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_classes_may_have_different_numbers_of_images(place: Path) -> None:
    loaded = load_folder(place, size=SIZE)
    assert loaded.names == tuple(COUNTS) and loaded.counts == tuple(COUNTS.values()) == loaded.images_per_class
    assert loaded.images.shape == (19, 3, SIZE, SIZE) and loaded.num_classes == 4
    expected = [np.asarray(picture(100 * c + i)) for c, n in enumerate(COUNTS.values()) for i in range(n)]
    np.testing.assert_array_equal(loaded.images.movedim(1, -1).numpy(), np.stack(expected))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".JPG"])
def test_grey_or_rgb_squeezed_to_a_square(suffix: str, place: Path) -> None:
    path = place / "ash" / f"+{suffix}"  # comes first
    picture(7, 30, 20).save(path)
    with Image.open(path) as image:
        for colours, mode in (("rgb", "RGB"), ("grey", "L")):
            expected = np.asarray(image.convert(mode).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            found = first_of(load_folder(place, size=SIZE, colours=colours), "ash")  # type: ignore[arg-type]
            assert found.shape == (3 if colours == "rgb" else 1, SIZE, SIZE)
            np.testing.assert_array_equal(found.transpose(1, 2, 0).squeeze(), expected)


def turned_by_exif(path: Path) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture(7).save(path, exif=exif)
    return picture(7).rotate(-90)


def transparent(path: Path) -> Image.Image:
    """Black with a transparent left half: white there."""
    pixels = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    pixels[:, SIZE // 2 :, 3] = 255
    Image.fromarray(pixels).save(path)
    return Image.fromarray(np.where(pixels[..., 3:] == 0, 255, 0).astype(np.uint8).repeat(3, -1))


def palette(path: Path) -> Image.Image:
    image = picture(7).quantize(4)
    image.save(path)
    return image.convert("RGB")


def black_and_white(path: Path) -> Image.Image:
    image = picture(7).convert("1")
    image.save(path)
    return image.convert("RGB")


@pytest.mark.parametrize("make", [turned_by_exif, transparent, palette, black_and_white])
def test_images_look_as_in_a_viewer(make: Callable[[Path], Image.Image], place: Path) -> None:
    expected = make(place / "ash" / "+.png")
    found = first_of(load_folder(place, size=SIZE), "ash")
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(expected))


def test_other_files_are_left_alone(place: Path) -> None:
    before = load_folder(place, size=SIZE)
    (place / "ash" / ".DS_Store").write_bytes(b"x")
    (place / "ash" / "._00.png").write_bytes(b"x")
    (place / "ash" / "notes.txt").write_text("x")
    (place / "README.md").write_text("x")
    (place / ".git").mkdir()
    after = load_folder(place, size=SIZE)
    assert torch.equal(before.images, after.images) and after.source_key == before.source_key


def test_the_cache_follows_the_files(place: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_folder(place, size=SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # whatever decodes fails
        again = load_folder(place, size=SIZE)
        assert torch.equal(first.images, again.images) and again.counts == first.counts
    assert len(list(user_cache.iterdir())) == 1
    picture(500).save(place / "ash" / "zz.png")
    longer = load_folder(place, size=SIZE)
    assert longer.counts == (4, 5, 4, 7) and longer.source_key != first.source_key
    assert load_folder(place, size=SIZE, colours="grey").images.shape == (20, 1, SIZE, SIZE)


# --- errors ----------------------------------------------------------------------------------------------------------


def deep(path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(path)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda p: (p / "fir" / "00.png").write_bytes(b"no image"),
            "00.png: expected a PNG or JPEG.*replace it or take it",
        ),
        (
            lambda p: (p / "fir" / "00.png").write_bytes((p / "fir" / "00.png").read_bytes()[:60]),
            "00.png: expected a PNG",
        ),
        (lambda p: deep(p / "fir" / "00.png"), "more than 8 bits per channel, mode I;16; convert it to 8 bits"),
        (
            lambda p: (p / "fir" / "x.webp").touch(),
            r"x.webp: expected PNG or JPEG images; convert it \(and 0 more of fir\)",
        ),
        (
            lambda p: (p / "oak").mkdir(),
            r"oak: expected the images of a class \(.png, .jpg\), found none; fill it or take",
        ),
        (
            lambda p: (p / "ash").rename(p.parent / "ash"),
            r"expected at least 4 classes, two to train on and two to hold out, found 3 \(beech, cedar, fir\)",
        ),
    ],
)
def test_errors_say_what_to_do(break_it: Callable[[Path], Any], words: str, place: Path) -> None:
    break_it(place)
    with pytest.raises(DataError, match=words):
        load_folder(place, size=SIZE)


def linked_class(place: Path) -> None:
    (place / "oak").symlink_to(place / "ash")


def copied_image(place: Path) -> None:
    shutil.copy(place / "ash" / "01.png", place / "fir" / "another name.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (linked_class, r"oak/00.png: expected different images in 'ash' and 'oak', found the same one as .*ash/00.png"),
        (copied_image, r"fir/another name.png: expected different images in 'ash' and 'fir', .* as .*ash/01.png"),
    ],
)
def test_an_image_in_two_classes_is_refused(spoil: Callable[[Path], None], words: str, place: Path) -> None:
    """Each time: what cannot be loaded leaves no cache. A part of the tasks would be judged on images that were trained on."""
    load_folder(place, size=SIZE)
    spoil(place)
    for colours in ("rgb", "rgb", "grey"):
        with pytest.raises(DataError, match=f"{words}.*held out. Take one of them out"):
            load_folder(place, size=SIZE, colours=colours)  # type: ignore[arg-type]


def test_an_image_twice_in_a_class_is_told(place: Path) -> None:
    for name in ("y.png", "z.png"):
        shutil.copy(place / "ash" / "01.png", place / "ash" / name)
    words = r"ash/y.png is the same image as .*ash/01.png; .*support and query.* Take it out, and 1 more"
    with pytest.warns(UserWarning, match=words):
        assert load_folder(place, size=SIZE).counts == (5, 5, 4, 7)


def test_a_cache_from_before_images_were_compared_is_not_used(
    place: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "CACHE_FORMAT", 1)
        load_folder(place, size=SIZE)
    load_folder(place, size=SIZE)
    assert len(list(user_cache.iterdir())) == 2


def test_no_folder(place: Path) -> None:
    with pytest.raises(DataError, match=r"expected the folder of your images, <folder>/<class>/<image>.*--data-dir"):
        load_folder(None)
    with pytest.raises(DataError, match=r"missing: could not be read .*--data-dir"):
        load_folder(place / "missing")
    with pytest.raises(
        DataError, match=r"ash: expected one folder for each class, <class>/<image>.png or .jpg, found none"
    ):
        load_folder(place / "ash")


# --- tasks -----------------------------------------------------------------------------------------------------------


def marked() -> tuple[torch.Tensor, list[int]]:
    """Colour images that say their class and their number in it."""
    counts = [3, 6, 4, 5]
    images = torch.zeros(sum(counts), 3, 2, 2, dtype=torch.uint8)
    images[:, 1, 0, 1] = torch.cat([torch.full((n,), c + 1) for c, n in enumerate(counts)]).to(torch.uint8)
    images[:, 2, 1, 0] = torch.cat([torch.arange(n) + 1 for n in counts]).to(torch.uint8)
    return images, counts


def sampler(**changes: Any) -> TaskSampler:
    images, counts = marked()
    options: dict[str, Any] = {"ways": 2, "shots": 1, "query_shots": 2, "rotations": False, "seed": 0, "device": "cpu"}
    options |= changes
    return TaskSampler(images, options.pop("indices", [3, 0, 1]), counts=counts, **options)


def test_tasks_from_classes_of_different_sizes() -> None:
    """Every image of a class is drawn as often as any other of it, and none that is not there; no image twice in a task."""
    batch = sampler().sample(3000)
    x = torch.cat([batch["support"]["x"].unflatten(1, (2, 1)), batch["query"]["x"].unflatten(1, (2, 2))], 2)
    assert x.shape == (3000, 2, 3, 3, 2, 2) and batch["query"]["y"][0].tolist() == [0, 0, 1, 1]
    pixels = (x * 255).round().long()
    classes, numbers = pixels[..., 1, 0, 1] - 1, pixels[..., 2, 1, 0] - 1
    assert (classes == classes[..., :1]).all() and (classes[:, 0] != classes[:, 1]).all()
    assert set(classes.unique().tolist()) == {0, 1, 3}
    ordered = numbers.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    for index, count in ((0, 3), (1, 6), (3, 5)):
        drawn = torch.bincount(numbers[classes == index], minlength=count)
        share = 3 / count  # of the tasks with this class
        mean, sigma = 2000 * share, (2000 * share) ** 0.5
        assert len(drawn) == count and (drawn - mean).abs().max() < 5 * sigma + 1


def test_colour_images_are_turned_as_by_numpy() -> None:
    images, counts = marked()
    originals = {image.numpy().tobytes() for image in images}
    batch = sampler(rotations=True).sample(40)
    quarters = set()
    for image in (batch["query"]["x"] * 255).round().to(torch.uint8).flatten(0, 1).numpy():
        back = [np.ascontiguousarray(np.rot90(image, -k, axes=(-2, -1))).tobytes() in originals for k in range(4)]
        assert sum(back) == 1
        quarters.add(back.index(True))
    assert quarters == {0, 1, 2, 3} and sum(counts) == len(originals)


def test_the_smallest_class_bounds_the_shots() -> None:
    with pytest.raises(ValueError, match=r"expected shots \+ query_shots <= 3, .* got 2 \+ 2"):
        sampler(shots=2, query_shots=2)
    assert sampler(shots=2, query_shots=2, indices=[1, 3]).sample(1)["query"]["x"].shape == (1, 4, 3, 2, 2)
    with pytest.raises(ValueError, match="counts: expected numbers that add up to the 18 images, got 7"):
        TaskSampler(
            marked()[0], [0, 1], ways=2, shots=1, query_shots=1, rotations=False, seed=0, device="cpu", counts=[3, 4]
        )
    with pytest.raises(ValueError, match="counts: expected numbers that add up to the 18 images, got 7"):
        ImageClasses(images=marked()[0], names=("a", "b"), groups=("", ""), source_key="", counts=(3, 4))


# --- settings --------------------------------------------------------------------------------------------------------


FOLDER = replace(preset("folder"), ways=2, image_size=SIZE, query_shots=1, eval_query_shots=2)


def test_the_split_holds_out_a_quarter_and_enough_for_a_task(tmp_path: Path) -> None:
    many = write(tmp_path / "many", {f"c{i:02d}": 3 for i in range(16)})
    for ways, train_classes, expected in ((2, 0, (12, 4)), (6, 0, (10, 6)), (2, 9, (9, 7))):
        config = replace(FOLDER, ways=ways, train_classes=train_classes)
        split = load_source(config, data_dir=many).split
        assert split is not None and (len(split.train), len(split.test), split.name) == (*expected, "random")
        assert {*split.train, *split.test} == set(range(16))
        again, other = (load_source(replace(config, seed=seed), data_dir=many).split for seed in (0, 1))
        assert again == split != other


def test_what_the_tasks_need_is_checked_at_the_start(place: Path) -> None:
    assert load_source(FOLDER, data_dir=place).split is not None
    for changes, words in (
        (
            {"ways": 3},
            "3-way tasks need 3 classes for training and as many others held out; of the 4 classes 1 are training",
        ),
        (
            {"query_shots": 9},
            r"a training class needs 1 support and 9 query images, and 2 of 2 have fewer .*--query-shots",
        ),
        ({"eval_query_shots": 9}, r"a held-out class needs 1 support and 9 query images.*--eval-query-shots"),
        ({"shots": 3, "eval_interval": 0}, "needs 3 support and"),
    ):
        with pytest.raises(DataError, match=words):
            load_source(replace(FOLDER, **changes), data_dir=place)  # type: ignore[arg-type]
    for number in (4, 1200):  # that of the paper
        words = (
            f"train_classes: expected at most 3, because folder has 4 classes here .*, got {number} .*--train-classes 0"
        )
        with pytest.raises(ConfigError, match=words):
            load_source(replace(FOLDER, train_classes=number), data_dir=place)
    assert load_source(replace(FOLDER, train_classes=0), data_dir=place).split is not None


def test_settings_of_the_images() -> None:
    for changes, words in (
        ({"dataset": "glyphs", "colours": "rgb"}, "colours: expected 'rgb' for mini-imagenet, and 'grey' for drawings"),
        ({"dataset": "mini-imagenet", "split": "published"}, "colours: expected 'rgb' for mini-imagenet"),
        ({"dataset": "mini-imagenet", "colours": "rgb"}, "split: expected 'published' for mini-imagenet"),
        ({"dataset": "folder", "split": "published"}, "split: expected 'published' for mini-imagenet and for no other"),
        ({"network": "pooled", "image_size": 15}, "image_size: expected at least 16 for network='pooled'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Config(**changes)  # type: ignore[arg-type]
    values = Config().to_dict()
    del values["colours"], values["network"]
    assert Config.from_dict(values) == Config(colours="grey", network="strided")  # a run of before they were there


# --- the program -----------------------------------------------------------------------------------------------------


def imaml(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "BILEVEL_OMNIGLOT": "/nowhere"})


TINY = (
    *("--image-size", "8", "--channels", "2", "--query-shots", "1", "--eval-query-shots", "1", "--outer-steps", "2"),
    *("--meta-batch", "2", "--eval-interval", "1", "--eval-tasks", "2", "--log-interval", "1", "--device", "cpu"),
    *("--no-final-test", "--no-tensorboard"),
)


@pytest.mark.parametrize("colours", ["grey", "rgb"])
def test_train_evaluate_resume(colours: str, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--dataset", "folder", "--data-dir", place, "--ways", "2", "--colours", colours, "--out", run, *TINY)
    result = imaml("train", *options)
    assert result.exit_code == 0, result.output
    stored = load_checkpoint(run)
    assert stored["classes"] == list(COUNTS) and stored["config"]["rotations"] is False
    assert len(stored["split"]["train"]) == len(stored["split"]["test"]) == 2
    assert stored["theta"]["body.0.kernel"].shape == (3, 3, 1 if colours == "grey" else 3, 2)
    tested = imaml("evaluate", run, "--json", "--tasks", "4", "--protocol", "paper")
    report = json.loads(tested.stdout)  # the data are found where they were
    assert report["dataset"] == "folder" and report["evaluations"]["paper"]["failed"] == 0
    assert report["conditions"]["colours"] == colours and "the user's own" in report["conditions"]["images"]
    more = imaml("train", "--resume", "--out", run, "--outer-steps", "3", "--no-final-test", "--no-tensorboard")
    assert more.exit_code == 0 and load_checkpoint(run)["progress"]["step"] == 3, more.output
    tight = imaml("evaluate", run, "--protocol", "tight")
    words = re.sub(r"\s+", " ", tight.output)
    assert (
        tight.exit_code == 2
        and "cannot be drawn from the held-out classes of folder" in words
        and "--query-shots" in words
    )
    both = imaml("evaluate", run, "--tasks", "4")
    words = re.sub(r"\s+", " ", both.output)
    assert both.exit_code == 0 and "tight: left out, these tasks cannot be drawn" in words and "paper" in words


def test_other_images_than_those_of_the_checkpoint_are_refused(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--dataset", "folder", "--data-dir", place, "--ways", "2", "--out", run, *TINY)
    assert imaml("train", *options).exit_code == 0
    picture(77).save(place / "fir" / "more.png")
    result = imaml("evaluate", run, "--tasks", "4")
    assert result.exit_code == 2 and "are not those of the checkpoint" in re.sub(r"\s+", " ", result.output)


def test_classes_of_the_checkpoint_that_are_gone_are_named(tmp_path: Path) -> None:
    place, run = write(tmp_path / "many", {f"c{i}": 3 for i in range(5)}), tmp_path / "run"
    options = ("--dataset", "folder", "--data-dir", place, "--ways", "2", "--out", run, *TINY)
    assert imaml("train", *options).exit_code == 0
    shutil.rmtree(place / "c4")
    for command in (("evaluate", run), ("train", "--resume", "--out", run, "--outer-steps", "3")):
        result = imaml(*command)
        words = re.sub(r"[\s│]+", " ", result.output)
        assert result.exit_code == 2 and "at least 5 classes, and there are 4 now; bring back those" in words, words


def test_info_lists_the_presets() -> None:
    text = imaml("info").output
    names = [f"mini-imagenet-5w{shots}s-{name}" for shots in (1, 5) for name in ("gd", "hf", "maml", "fo", "reptile")]
    for name in (*names, "folder"):
        assert re.search(rf"\b{name}\b", text), name
    assert "pooled" in imaml("info", "mini-imagenet-5w1s-gd").output


def test_the_presets_of_table_3_are_the_papers() -> None:
    for shots in (1, 5):
        gd, hf, fo = (preset(f"mini-imagenet-5w{shots}s-{name}") for name in ("gd", "hf", "fo"))
        assert (gd.ways, gd.shots, gd.lam, gd.inner, gd.inner_steps, gd.linear, gd.linear_steps) == (
            *(5, shots, 0.5, "gd", 10),
            *("cg", 5),
        )
        assert (gd.image_size, gd.channels, gd.network, gd.colours, gd.eval_query_shots) == (
            84,
            32,
            "pooled",
            "rgb",
            15,
        )
        assert hf == replace(gd, inner="newton-cg", inner_steps=3) and hf.direction_steps == 5
        assert fo == replace(gd, algorithm="first-order", lam=0.0) and not gd.rotations
