"""Prediction for new classes: against the path of the evaluation, against Pillow, and as a program."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import bilevel
from applications.meta_learning.checkpoint import load_checkpoint, save_checkpoint
from applications.meta_learning.cli import app
from applications.meta_learning.config import Config, ConfigError
from applications.meta_learning.data import DataError, ImageClasses, TaskBatch, load_folder, omniglot
from applications.meta_learning.data.files import decode
from applications.meta_learning.evaluate import evaluate
from applications.meta_learning.predict import predict
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import batched_outputs
from applications.meta_learning.run import matching_source
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, load_theta
from tests.meta_learning.tiny import SINUSOID, TINY

SIZE, WAYS, DRAWINGS = 16, 3, 8
FOLDER = replace(
    preset("folder"),
    ways=WAYS,
    image_size=SIZE,
    colours="grey",
    channels=8,
    query_shots=3,
    meta_batch=4,
    outer_rate=1e-2,
    outer_steps=15,
    eval_interval=0,
    device="cpu",
)


def imaml(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def squeezed(text: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.fixture(scope="module", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setattr(platformdirs, "user_cache_path", lambda name, **options: place)
        yield


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<class>/<image>.png: a class is a pattern of 5 x 5 squares; its images are shifted by a pixel, and noisy."""
    folder, random = tmp_path_factory.mktemp("glyphs"), np.random.default_rng(0)
    for c in range(20):
        (folder / f"c{c:02d}").mkdir()
        pattern = np.kron(random.integers(2, size=(5, 5)), np.full((3, 3), 180))
        for i in range(DRAWINGS):
            canvas = np.zeros((SIZE, SIZE))
            y, x = random.integers(2, size=2)
            canvas[y : y + 15, x : x + 15] = pattern
            noisy = (canvas + random.integers(75, size=canvas.shape)).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"c{c:02d}" / f"{i}.png")
    return folder


def trained(config: Config, folder: Path, run: Path) -> Path:
    trainer = Trainer(config, load_source(config, data_dir=folder))
    for _ in range(config.outer_steps):
        trainer.meta_step()
    run.mkdir()
    save_checkpoint(run / "checkpoint.pt", trainer.checkpoint(str(folder)))
    return run


@pytest.fixture(scope="module")
def run(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(FOLDER, glyphs, tmp_path_factory.mktemp("runs") / "run")


def trainer_of(run: Path) -> Trainer:
    """As `imaml evaluate` makes it."""
    stored = load_checkpoint(run)
    config = Config.from_dict(stored["config"])
    trainer = Trainer(config, matching_source(stored, config, data_dir=None, download=False))
    load_theta(trainer.theta, stored["theta"])
    return trainer


def lay_out(folder: Path, names: list[str], glyphs: Path, shots: int = 1) -> tuple[Path, Path]:
    """The first images of these classes as support, the others to be predicted, named after their class."""
    support, images = folder / "support", folder / "images"
    images.mkdir(parents=True)
    for name in names:
        (support / name).mkdir(parents=True)
        for i, file in enumerate(sorted((glyphs / name).iterdir())):
            shutil.copy(file, support / name / file.name if i < shots else images / f"{name}-{file.name}")
    return support, images


@pytest.fixture
def task(run: Path, glyphs: Path, tmp_path: Path) -> tuple[Path, Path]:
    return lay_out(tmp_path, held_out(run)[:WAYS], glyphs)


def held_out(run: Path) -> list[str]:
    stored = load_checkpoint(run)
    return [stored["classes"][i] for i in stored["split"]["test"]]


# --- what is predicted -----------------------------------------------------------------------------------------------


class Fixed:
    """A sampler that hands out one prepared task as often as wanted."""

    def __init__(self, data: TaskBatch) -> None:
        self.data = data

    def sample(self, num_tasks: int) -> TaskBatch:
        return {
            part: {key: leaf.repeat_interleave(num_tasks, 0) for key, leaf in tensors.items()}
            for part, tensors in self.data.items()
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


def write_task(classes: ImageClasses, data: TaskBatch, glyphs: Path, folder: Path) -> tuple[Path, list[Path]]:
    """The files whose images a sampled task has, as a support folder and a list, classes in the order of the task."""
    files = [file for name in classes.names for file in sorted((glyphs / name).iterdir())]
    file_of = {image.numpy().tobytes(): file for image, file in zip(classes.images, files, strict=True)}
    support, images = [
        [file_of[x.mul(255).round().byte().numpy().tobytes()] for x in data[part]["x"][0]]
        for part in ("support", "query")
    ]
    for i, (file, label) in enumerate(zip(support, data["support"]["y"][0].tolist(), strict=True)):
        (folder / f"label{label}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"label{label}" / f"{i}.png")
    return folder, images


def test_the_numbers_are_those_of_the_evaluation(run: Path, glyphs: Path, tmp_path: Path) -> None:
    """A task as the evaluation draws it, and the same task as files."""
    trainer = trainer_of(run)
    classes = load_folder(glyphs, size=SIZE, colours="grey")
    for seed in range(5):
        sampler = trainer.source.sampler(
            trainer.config, held_out=True, query_shots=4, seed=seed, device=torch.device("cpu")
        )
        data = sampler.sample(1)
        support, images = write_task(classes, data, glyphs, tmp_path / str(seed))
        found = predict(run, support, images)
        solver, problem = trainer.method.solver, trainer.method.problem
        adapted = bilevel.solve(problem, trainer.theta, data, solver=solver, batched=True)
        logits = batched_outputs(trainer.module, adapted.value, data["query"]["x"])[0]
        assert found.classes == ("label0", "label1", "label2") and found.files == tuple(images)
        torch.testing.assert_close(found.probabilities, logits.double().softmax(1), rtol=1e-6, atol=1e-7)
        result = evaluate(problem, trainer.module, trainer.theta, Fixed(data), solver=solver, tasks=2, query_shots=4)
        right = np.mean([name == f"label{y}" for name, y in zip(found.labels, data["query"]["y"][0], strict=True)])
        assert result.mean == pytest.approx(right)
        assert float(found.adaptation.residual) == pytest.approx(result.inner_residual, rel=1e-5)


@pytest.mark.parametrize("shots", [1, 3])
def test_new_classes_are_told_apart(shots: int, run: Path, glyphs: Path, tmp_path: Path) -> None:
    names, right = held_out(run), []
    for i in range(len(names)):
        chosen = [names[(i + k) % len(names)] for k in range(WAYS)]
        support, images = lay_out(tmp_path / str(i), chosen, glyphs, shots)
        found = predict(run, support, [images])
        assert found.shots == shots and found.step == FOLDER.outer_steps and found.classes == tuple(sorted(chosen))
        assert len(found.files) == WAYS * (DRAWINGS - shots)
        right += [file.name.startswith(label) for file, label in zip(found.files, found.labels, strict=True)]
    assert np.mean(right) > 0.85  # a guess gets 1/3, a hundred of them rarely 1/2


def test_the_answer_for_an_image_depends_on_those_beside_it(run: Path, task: tuple[Path, Path]) -> None:
    """As the page says: batch norm takes its statistics from all images that are predicted, and from no others."""
    support, images = task
    together, first = predict(run, support, [images]), sorted(images.iterdir())[0]
    alone = predict(run, support, [first])
    assert together.files[0] == first and (together.probabilities[0] - alone.probabilities[0]).abs().max() > 1e-3
    backwards = predict(run, support, sorted(images.iterdir(), reverse=True))
    torch.testing.assert_close(backwards.probabilities.flip(0), together.probabilities, rtol=1e-4, atol=1e-5)


def test_settings_of_the_inner_solver(run: Path, task: tuple[Path, Path]) -> None:
    support, images = task
    usual = predict(run, support, [images])
    longer = predict(run, support, [images], settings={"inner": "gd", "inner_steps": 40, "inner_step_size": 0.0})
    assert (int(usual.adaptation.steps), int(longer.adaptation.steps)) == (FOLDER.inner_steps, 40)
    assert longer.adaptation.residual < usual.adaptation.residual


# --- images ----------------------------------------------------------------------------------------------------------


def test_sizes_and_colours_as_in_training(run: Path, task: tuple[Path, Path], tmp_path: Path) -> None:
    """Large, oblong and coloured files: the same as files that Pillow has made small and grey."""
    support, images = task
    ready = tmp_path / "ready"
    ready.mkdir()
    for i, file in enumerate(sorted(images.iterdir())):
        large = Image.open(file).convert("RGB").resize((SIZE + 9 * i, 2 * SIZE + 3 * i))
        large.putpixel((i, i), (200, 10, 60))
        large.save(file)
        large.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(ready / file.name)
    assert torch.equal(predict(run, support, [images]).probabilities, predict(run, support, [ready]).probabilities)


def test_a_run_in_colours_sees_them(glyphs: Path, task: tuple[Path, Path], tmp_path: Path) -> None:
    support, images = task
    run = trained(replace(FOLDER, colours="rgb", outer_steps=1), glyphs, tmp_path / "rgb")
    grey = predict(run, support, [images]).probabilities
    assert grey.isfinite().all()
    for file in images.iterdir():
        dark = np.asarray(Image.open(file))
        Image.fromarray(np.stack([dark, 255 - dark, dark], -1)).save(file)
    assert (predict(run, support, [images]).probabilities - grey).abs().max() > 1e-3


def test_a_run_on_drawings_sees_ink_as_in_training(tmp_path: Path) -> None:
    """Files with dark ink: the same numbers as from the drawings themselves, whose ink is 1."""
    trainer = Trainer(TINY, load_source(TINY))
    trainer.meta_step()
    save_checkpoint(tmp_path / "checkpoint.pt", trainer.checkpoint(None))
    assert trainer.source.classes is not None
    drawings = trainer.source.classes.images[:WAYS, :4]
    for c in range(WAYS):
        for k in range(4):
            path = tmp_path / (f"support/c{c}/{k}.png" if k < 1 else f"images/{c}-{k}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - drawings[c, k].numpy()).save(path)
    found = predict(tmp_path, tmp_path / "support", [tmp_path / "images"])
    x = drawings.float().div(255).unsqueeze(2)
    data = {"support": {"x": x[:, :1].flatten(0, 1)[None], "y": torch.arange(WAYS)[None]}}
    adapted = bilevel.solve(trainer.method.problem, trainer.theta, data, solver=trainer.method.solver, batched=True)
    logits = batched_outputs(trainer.module, adapted.value, x[:, 1:].flatten(0, 1)[None])[0]
    torch.testing.assert_close(found.probabilities, logits.double().softmax(1), rtol=1e-6, atol=1e-7)
    for path in (tmp_path / "images").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(DataError, match="expected dark ink on a light ground, found the opposite.*on glyphs"):
        predict(tmp_path, tmp_path / "support", [tmp_path / "images"])


def test_ink_as_in_omniglot() -> None:
    drawing = Image.fromarray(np.random.default_rng(0).random((105, 105)) < 0.8)  # 1 bit, light ground
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG")
    expected = omniglot._decode(buffer.getvalue(), original_size=105, size=28)
    np.testing.assert_array_equal(decode(drawing, 28, "grey", ink=True)[0], expected)


# --- errors ----------------------------------------------------------------------------------------------------------


def empty(support: Path, images: Path) -> None:
    for file in next(support.iterdir()).iterdir():
        file.unlink()


def one_more_image(support: Path, images: Path) -> None:
    first = sorted(support.iterdir())[0]
    shutil.copy(next(first.iterdir()), first / "more.png")


def no_images(support: Path, images: Path) -> None:
    for file in images.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda s, i: shutil.rmtree(sorted(s.iterdir())[0]),
            r"expected 3 classes, because the last layer .* 3 outputs",
        ),
        (lambda s, i: shutil.copytree(sorted(s.iterdir())[0], s / "x"), r"found 4 \(.*x\).* train a run with --ways 4"),
        (lambda s, i: shutil.rmtree(s), r"support: could not be read .*--support"),
        (one_more_image, r"expected as many images in one class as in another, .* found 1 of .* and 2 of"),
        (empty, r"expected the images of a class \(.png, .jpg\), found none"),
        (no_images, r"images: expected images \(.png, .jpg\), found none"),
        (
            lambda s, i: (i / "a.png").write_bytes(b"no image"),
            r"a.png: expected a PNG or JPEG image, could not read one",
        ),
        (
            lambda s, i: (sorted(s.iterdir())[1] / "0.png").write_bytes(b"\x89PNG"),
            r"0.png: expected a PNG or JPEG image",
        ),
        (lambda s, i: (i / "a.webp").touch(), r"a.webp: expected PNG or JPEG images; convert it"),
    ],
)
def test_errors_say_what_to_do(
    break_it: Callable[[Path, Path], Any], words: str, run: Path, task: tuple[Path, Path]
) -> None:
    support, images = task
    break_it(support, images)
    with pytest.raises(DataError, match=words):
        predict(run, support, [images])
    result = imaml("predict", run, "--support", support, "--images", images)
    assert result.exit_code == 2 and not result.stdout and re.search(words, squeezed(result.stderr))


def test_more_errors(run: Path, task: tuple[Path, Path], tmp_path: Path) -> None:
    support, images = task
    with pytest.raises(DataError, match="expected at least one image to classify, got none; .*--images"):
        predict(run, support, [])
    with pytest.raises(DataError, match="absent.png: there is no such file; name image files, or .*--images"):
        predict(run, support, [images, tmp_path / "absent.png"])
    with pytest.raises(ConfigError, match="direction_steps: has no effect with --inner agd; leave it out, or add"):
        predict(run, support, [images], settings={"direction_steps": 9})
    with pytest.raises(ConfigError, match="inner_steps: expected at least 1"):
        predict(run, support, [images], settings={"inner_steps": 0})
    sinusoid = tmp_path / "checkpoint.pt"
    save_checkpoint(sinusoid, Trainer(SINUSOID, load_source(SINUSOID)).checkpoint(None))
    with pytest.raises(ConfigError, match="trained on sinusoids; expected one that was trained on images"):
        predict(sinusoid, support, [images])


def test_a_failed_adaptation_predicts_nothing(run: Path, task: tuple[Path, Path]) -> None:
    support, images = task
    with pytest.raises(bilevel.SolverError, match="NON_FINITE|DIVERGED"):
        predict(run, support, [images], settings={"inner_step_size": 1e30})
    result = imaml("predict", run, "--support", support, "--images", images, "--inner-step-size", "1e30")
    assert result.exit_code == 1 and not result.stdout and "Adaptation failed" in result.stderr
    assert "--inner-step-size (0 finds one)" in result.stderr


# --- the program -----------------------------------------------------------------------------------------------------


def test_table_and_json(run: Path, task: tuple[Path, Path]) -> None:
    support, images = task
    (support / held_out(run)[0]).rename(support / "[red]a class")  # no markup
    files = sorted(images.iterdir())
    found = predict(run, support, files)
    ways_to_say_it = (["--images", images], ["--images", *files], ["--images", files[0], "--images", images])
    for arguments in ways_to_say_it:
        result = imaml("predict", run, "--support", support, *arguments, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert [row["file"] for row in report["predictions"]] == list(map(str, files))
        assert [row["class"] for row in report["predictions"]] == found.labels
        for row, expected in zip(report["predictions"], found.probabilities.tolist(), strict=True):
            assert list(row["probabilities"].values()) == pytest.approx(expected, rel=1e-5)
            assert row["probability"] == row["probabilities"][row["class"]] == max(row["probabilities"].values())
    assert report["classes"] == list(found.classes) and report["shots"] == 1 and report["step"] == FOLDER.outer_steps
    assert report["adaptation"]["status"] == "MAX_STEPS" and report["adaptation"]["steps"] == FOLDER.inner_steps
    assert "transductive" in report["conditions"]["batch norm"]

    table = imaml("predict", run, "--support", support, "--images", images)
    assert table.exit_code == 0 and max(map(len, table.output.splitlines())) <= 80
    assert "transductive" in table.output and "3 classes, 1 support image of each" in table.output
    assert f"adaptation: MAX_STEPS after {FOLDER.inner_steps} steps, |dG/dphi| " in table.output
    assert "[red]a class" in table.output or "[red]a class" not in found.labels
    rows = [line for line in table.output.splitlines() if re.search(r" [01]\.\d{3} │$", line)]
    assert [float(row.split()[-2]) for row in rows] == pytest.approx(
        found.probabilities.max(1).values.tolist(), abs=5.1e-4
    )


def test_support_images_may_be_named_beside_few_images(run: Path, task: tuple[Path, Path]) -> None:
    support, images = task
    one, note = sorted(images.iterdir())[0], "Name the support images too"
    alone = imaml("predict", run, "--support", support, "--images", one)
    beside = imaml("predict", run, "--support", support, "--images", one, *sorted(support.iterdir()))
    assert alone.exit_code == beside.exit_code == 0 and note in alone.output and note not in beside.output
    found = predict(run, support, [one, *sorted(support.iterdir())])
    assert len(found.files) == 1 + WAYS and f"{found.probabilities[0].max():.3f}" in beside.output


def test_help_fits_80_columns() -> None:
    result = imaml("predict", "--help")
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    missing = imaml("predict", "run", "--support", "s")
    assert missing.exit_code == 2 and "--images" in missing.output
