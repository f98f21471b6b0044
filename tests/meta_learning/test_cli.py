"""The program, as its users meet it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import bilevel
from applications.meta_learning import cli, logs, run
from applications.meta_learning.__main__ import main
from applications.meta_learning.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from applications.meta_learning.cli import app
from applications.meta_learning.config import Config, ConfigError
from applications.meta_learning.evaluate import Evaluation
from applications.meta_learning.logs import read_log
from applications.meta_learning.presets import preset
from applications.meta_learning.report import evaluation_table
from applications.meta_learning.run import alone
from tests.meta_learning.tiny import TINY, TINY_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
OMNIGLOT = os.environ.get("BILEVEL_OMNIGLOT")
PROGRAM = (sys.executable, "-m", "applications.meta_learning")


def imaml(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "80", "BILEVEL_OMNIGLOT": ""}
    )


def train(folder: Path, *more: str) -> Result:
    return imaml("train", "--out", folder, *TINY_OPTIONS, "--no-final-test", "--no-tensorboard", *more)


def squeezed(text: str) -> str:
    """Without the line breaks and borders that a terminal adds."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = imaml("train", "--out", folder, *TINY_OPTIONS)
    assert result.exit_code == 0, result.output
    return folder


def test_options_override_the_preset(finished: Path) -> None:
    assert Config.from_dict(load_checkpoint(finished)["config"]) == TINY


def test_a_preset_gives_what_no_option_names(tmp_path: Path) -> None:
    name = "omniglot-20w1s-hf"
    cheap = {
        "dataset": "glyphs",
        "glyph_classes": 40,
        "train_classes": 20,
        "channels": 2,
        "image_size": 8,
        "outer_steps": 1,
    }
    cheap |= {"meta_batch": 1, "eval_interval": 0}
    options = [word for key, value in cheap.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    result = imaml("train", "--preset", name, "--out", tmp_path, *options, "--no-final-test", "--no-tensorboard")
    assert result.exit_code == 0 or "Nothing was learned" in result.output  # of the one task of its one step
    assert load_checkpoint(tmp_path)["config"] == {**preset(name).to_dict(), **cheap}


def test_a_run_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"checkpoint.pt", "config.json", "environment.json", "log.jsonl", "curves.png", "results.json"} <= names
    assert list((finished / "tensorboard").glob("events.*"))
    results = json.loads((finished / "results.json").read_text())
    assert results["evaluations"]["paper"]["tasks"] == 600 and results["evaluations"]["paper"]["query_shots"] == 1
    assert load_checkpoint(finished)["progress"]["step"] == 6


def test_evaluate(finished: Path) -> None:
    result = imaml("evaluate", finished, "--tasks", "20")
    assert result.exit_code == 0 and "paper" in result.output and "tight" in result.output
    assert "transductive" in result.output and "held-out" in result.output
    as_json = imaml("evaluate", finished / "checkpoint.pt", "--json", "--tasks", "20", "--protocol", "tight")
    report = json.loads(as_json.stdout)
    assert list(report["evaluations"]) == ["tight"] and report["step"] == 6
    tight = report["evaluations"]["tight"]
    assert tight["tasks"] == 20 and tight["query_shots"] == 15 and 0 <= tight["mean"] <= 1 and tight["failed"] == 0
    assert "transductive" in report["conditions"]["batch norm"] and "ink 1" in report["conditions"]["images"]


def test_one_evaluation_has_one_name(finished: Path) -> None:
    """Before, --tasks and --query-shots together gave the same numbers twice, as paper and as tight."""
    options = ["--json", "--tasks", "5", "--query-shots", "2"]
    for more, names in ([], ["own"]), (["--protocol", "paper"], ["paper"]):
        report = json.loads(imaml("evaluate", finished, *options, *more).stdout)
        assert list(report["evaluations"]) == names
        assert (report["evaluations"][names[0]]["tasks"], report["evaluations"][names[0]]["query_shots"]) == (5, 2)


def test_the_seed_of_an_evaluation_has_a_largest_value(finished: Path) -> None:
    result = imaml("evaluate", finished, "--seed", str(2**63))
    assert result.exit_code == 2 and f"--seed: expected at most {2**62}, got {2**63}" in squeezed(result.output)


@pytest.mark.parametrize(
    ("changes", "algorithm", "regulariser"),
    [
        ({"lam_head": 0.1}, "iMAML (gd, 16 steps; cg, 5 steps; hessian)", "lambda 2, of the last layer 0.1"),
        ({"linear": "identity"}, "first-order MAML (gd, 16 steps)", "lambda 2"),
        ({"algorithm": "first-order", "lam": 0.0}, "first-order MAML (gd, 16 steps)", "no proximal term"),
        ({"algorithm": "reptile", "lam": 0.0}, "Reptile (gd, 16 steps)", "no proximal term"),
        ({"algorithm": "maml", "lam": 0.0}, "MAML (gd, 16 steps)", "no proximal term"),
        (
            {"algorithm": "maml", "truncate": 4},
            "MAML, truncated (gd, 16 steps, through the last 4)",
            "lambda 2",
        ),
    ],
)
def test_figures_and_tables_name_the_algorithm(changes: dict[str, Any], algorithm: str, regulariser: str) -> None:
    """Before, the figure of a run of MAML or of Reptile called it iMAML, with a linear solver that it does not have."""
    config = replace(Config(lam=2.0), **changes)
    assert cli._algorithm(config) == algorithm and cli._regulariser(config) == regulariser


def test_a_run_whose_time_is_used_up_says_so(tmp_path: Path) -> None:
    assert train(tmp_path, "--minutes", "0.0001").exit_code == 0
    again = imaml("train", "--resume", "--out", tmp_path, "--no-final-test", "--no-tensorboard")
    assert again.exit_code == 0
    assert "Its time is used up. For more, name the sum, or 0 for no limit:" in squeezed(again.output)
    assert "--minutes 0.0002" in squeezed(again.output)
    assert "used up" not in train(tmp_path, "--overwrite").output


def test_a_run_of_a_larger_machine_takes_the_threads_that_are_here(finished: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    stored = load_checkpoint(finished)
    stored["config"]["threads"] = 10**6
    save_checkpoint(tmp_path / "checkpoint.pt", stored)
    try:
        result = imaml("evaluate", tmp_path, "--tasks", "2", "--protocol", "paper")
        assert result.exit_code == 0, result.output
    finally:
        torch.set_num_threads(before)


def test_a_resumed_run_says_first_that_it_keeps_its_data(finished: Path) -> None:
    result = imaml("train", "--resume", "--out", finished, "--dataset", "mini-imagenet")
    assert result.exit_code == 2
    assert "a resumed run keeps its data, tasks and network: --dataset is 'glyphs'" in squeezed(result.output)


@pytest.mark.parametrize(("more", "words"), [({}, "add --split random"), ({"split": "random"}, "add --colours grey")])
def test_a_preset_of_another_data_set_says_what_to_add(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"of the preset, maybe\); {words}"):
        replace(preset("mini-imagenet-5w1s-gd"), dataset="glyphs", **more)


def test_evaluate_with_another_inner_solver(finished: Path) -> None:
    options = ["--json", "--tasks", "20", "--protocol", "paper"]
    usual, longer = (
        json.loads(imaml("evaluate", finished, *options, *more).stdout)
        for more in ([], ["--inner-steps", "30", "--inner-step-size", "0", "--lam", "0.5"])
    )
    assert (longer["config"]["inner_steps"], longer["config"]["lam"]) == (30, 0.5)
    assert longer["evaluations"]["paper"]["inner_residual"] < usual["evaluations"]["paper"]["inner_residual"]


def test_info(finished: Path) -> None:
    about = imaml("info", finished)
    assert (
        about.exit_code == 0
        and "6 of 6" in about.output
        and "7 classes for training, 5 held out" in squeezed(about.output)
    )
    general = imaml("info")
    assert general.exit_code == 0 and torch.__version__ in general.output
    for name in ("glyphs", "sinusoid", "omniglot-5w1s-cpu", "omniglot-20w5s-hf"):
        assert name in general.output
    settings = imaml("info", "omniglot-20w1s-hf")
    assert settings.exit_code == 0 and "newton-cg" in settings.output


def test_stop_and_resume_and_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, "--minutes", "0.00001").exit_code == 0  # the time limit ends it at once
    assert load_checkpoint(folder)["progress"]["step"] == 0
    again = train(folder)
    assert again.exit_code == 2 and "holds a run already" in squeezed(again.output)
    resumed = imaml(
        "train", "--out", folder, "--resume", "--minutes", "0", "--lam", "3", "--no-final-test", "--no-tensorboard"
    )
    assert resumed.exit_code == 0, resumed.output
    assert "--lam: 1.0 -> 3.0" in resumed.output
    assert load_checkpoint(folder)["progress"]["step"] == 6 and load_checkpoint(folder)["config"]["lam"] == 3.0
    (changed,) = (entry for entry in read_log(folder / "log.jsonl") if entry["kind"] == "changed")
    assert {"setting": "lam", "from": 1.0, "to": 3.0} in changed["settings"]
    named = imaml(
        "train", "--out", folder, "--resume", "--preset", "glyphs", "--no-final-test", "--no-tensorboard"
    )  # the name of the preset stands for its folder; its outer steps and lambda are not those of this run
    assert named.exit_code == 0, named.output
    assert load_checkpoint(folder)["progress"]["step"] == 6 and load_checkpoint(folder)["config"]["lam"] == 3.0
    assert train(folder, "--overwrite", "--outer-steps", "2").exit_code == 0
    assert load_checkpoint(folder)["progress"]["step"] == 2
    assert max(entry["step"] for entry in read_log(folder / "log.jsonl")) == 2


def test_a_folder_in_which_another_process_trains_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with alone(folder):
        for option in ("--resume", "--overwrite"):
            refused = train(folder, option)
            assert refused.exit_code == 2 and "another process trains there" in squeezed(refused.output)
    assert {path: path.read_bytes() for path in before} == before
    assert train(folder, "--overwrite", "--outer-steps", "2").exit_code == 0
    with alone(tmp_path / "new"):
        refused = train(tmp_path / "new")
        assert refused.exit_code == 2 and "another process trains there" in squeezed(refused.output)


def test_a_run_that_appears_while_the_data_are_loaded_is_kept(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, begin = tmp_path / "run", cli._begin

    def slow(chosen: cli._Chosen, place: Path) -> object:
        shutil.copytree(finished, folder)  # another process trains, and ends
        return begin(chosen, place)

    monkeypatch.setattr(cli, "_begin", slow)
    refused = train(folder)
    assert refused.exit_code == 2 and "holds a run already" in squeezed(refused.output)
    assert (folder / "checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()


OF_A_USER = ("results.json", "log.jsonl", "config.json", "environment.json", "curves.png", "adaptation.png")


def test_files_of_the_user_are_not_replaced(tmp_path: Path) -> None:
    for name in (*OF_A_USER, "tensorboard/events.out.tfevents.1"):
        path = tmp_path / name.split(".")[0] / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        folder = tmp_path / name.split(".")[0]
        for _ in range(2):  # the first attempt opens no door for the second one
            refused = train(folder)
            assert refused.exit_code == 2 and path.read_text() == "mine"
            assert f"has {name} in it but no checkpoint.pt" in squeezed(refused.output)
            assert "--out names another folder, --overwrite deletes them" in squeezed(refused.output)
        assert [p for p in folder.rglob("*") if p.is_file()] == [path]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")  # not in the way
    for name in ("notes", "results"):
        more = ("--overwrite",) if name == "results" else ()
        assert train(tmp_path / name, "--outer-steps", "1", *more).exit_code == 0
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_a_run_that_fails_before_its_first_checkpoint_may_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, checkpoint: object) -> None:
        assert (path.parent / "log.jsonl").exists() and (path.parent / "config.json").exists()
        raise CheckpointError("the disk is full")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", full)
        for _ in range(2):
            failed = imaml("train", "--out", folder, *TINY_OPTIONS, "--no-final-test")
            assert failed.exit_code == 2 and "the disk is full" in squeezed(failed.output)
    assert train(folder).exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--inner newton-cg --inner-step-size 0.2", "--inner-step-size: has no effect with --inner newton-cg"),
        (
            "--inner gd --inner-momentum 0.5",
            "--inner-momentum: has no effect with --inner gd; leave it out, or add --inner agd",
        ),
        ("--inner agd --direction-steps 9", "--direction-steps: has no effect with --inner agd"),
        ("--inner gd --inner-damping 1", "--inner-damping: has no effect with --inner gd"),
        ("--algorithm first-order --linear-steps 9", "--linear-steps: has no effect with --algorithm first-order"),
        (
            "--algorithm reptile --linear neumann",
            "--linear: has no effect with --algorithm reptile; leave it out, or add",
        ),
        ("--algorithm maml --damping 1", "--damping: has no effect with --algorithm maml"),
        ("--linear exact --channels 1 --linear-steps 9", "leave it out, or add --linear cg or --linear neumann"),
        ("--linear identity --curvature gauss-newton", "--curvature: has no effect with --linear identity"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(options: str, words: str, tmp_path: Path) -> None:
    short = "--outer-steps 1 --meta-batch 1 --glyph-classes 40 --train-classes 20 --eval-interval 0 --no-final-test"
    result = imaml("train", "--out", tmp_path / "run", *options.split(), *short.split())
    assert result.exit_code == 2 and words in squeezed(result.output), result.output
    assert not list(tmp_path.iterdir())


def test_without_effect_in_the_other_commands(finished: Path) -> None:
    """`finished` adapts by gradient descent; its settings have a number of direction steps too, which is no error."""
    for command in (["evaluate", finished, "--tasks", "2"], ["train", "--resume", "--out", finished]):
        result = imaml(*command, "--direction-steps", "9")
        assert result.exit_code == 2 and "--direction-steps: has no effect with --inner gd" in squeezed(result.output)
    changed = imaml("evaluate", finished, "--tasks", "2", "--inner", "newton-cg", "--direction-steps", "9")
    assert changed.exit_code == 0, changed.output


def test_a_run_may_not_lie_among_its_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    for place in (images / "runs" / "a", images, tmp_path / "link" / "a", images / ".." / "images" / "a"):
        refused = imaml("train", "--dataset", "folder", "--data-dir", images, "--out", place)
        words = squeezed(refused.output)
        assert refused.exit_code == 2 and "--out: expected a folder outside of the images" in words, words
    assert not list(images.iterdir())
    beside = imaml("train", "--dataset", "folder", "--data-dir", images, "--out", tmp_path / "images-runs")
    assert "expected one folder for each class" in squeezed(beside.output)


def test_a_device_that_is_not_there_is_said_before_the_data_are_read(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the data were read first")

    monkeypatch.setattr(cli, "load_source", fail)
    monkeypatch.setattr(cli, "matching_source", fail)
    for command in (
        ["train", "--out", tmp_path / "run"],
        ["train", "--resume", "--out", finished],
        ["evaluate", finished],
    ):
        result = imaml(*command, "--device", "cuda:99")
        assert result.exit_code == 2 and "device: expected auto or a device that works" in squeezed(result.output)


def test_the_lock_of_another_thing_is_not_that_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(filelock.Timeout), alone(tmp_path):
        raise filelock.Timeout("elsewhere")
    with alone(tmp_path):  # free again
        pass


def test_results_of_another_step_do_not_stay(finished: Path, tmp_path: Path) -> None:
    """`finished` has results and figures of step 6."""
    for number, options in enumerate((("--overwrite", "--outer-steps", "2"), ("--resume", "--outer-steps", "8"))):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        assert (folder / "results.json").exists()
        assert train(folder, *options).exit_code == 0
        assert not (folder / "results.json").exists() and (folder / "curves.png").exists()


def test_names_in_brackets_are_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "a [b] [/x]"
    trained = imaml("train", "--out", folder, *TINY_OPTIONS, "--no-tensorboard")
    assert trained.exit_code == 0, trained.output
    assert f"Figures, log and checkpoint: {folder}" in trained.output.replace("\n", "")
    assert f"imaml evaluate '{folder}'" in trained.output.replace("\n", "")
    shown = imaml("info", folder)
    assert shown.exit_code == 0 and "a [b] [/x]" in squeezed(shown.output)
    stopped = imaml("train", "--out", folder, "--resume", "--no-final-test", "--no-tensorboard")  # nothing is left
    assert f"--resume --out '{folder}' --no-final-test --no-tensorboard --outer-steps" in stopped.output.replace(
        "\n", ""
    )


def test_an_evaluation_without_a_task_that_could_be_adapted_fails(finished: Path) -> None:
    for more in ((), ("--json",)):
        found = imaml("evaluate", finished, "--protocol", "paper", "--tasks", "4", "--inner-step-size", "1e6", *more)
        assert found.exit_code == 1
        assert "no task of paper could be adapted" in squeezed(found.output)


def test_the_table_says_what_became_of_failed_tasks() -> None:
    for metric, words in (("accuracy", "a failed task counts as 0 %"), ("mse", "failed tasks are in no mean")):
        found = Evaluation(metric=metric, mean=0.5, interval=0.1, tasks=4, query_shots=1, failed=1, inner_residual=0.1)
        assert words in str(evaluation_table([("x", found)], "").caption)
        assert "failed" not in str(evaluation_table([("x", replace(found, failed=0))], "").caption)


def test_sinusoids(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = imaml(
        *(
            "train",
            "--dataset",
            "sinusoid",
            "--out",
            folder,
            "--outer-steps",
            "4",
            "--eval-interval",
            "2",
            "--eval-tasks",
            "5",
        ),
        *("--log-interval", "1", "--meta-batch", "2", "--channels", "8", "--no-tensorboard"),
    )
    assert result.exit_code == 0, result.output
    assert (folder / "adaptation.png").exists() and (folder / "curves.png").exists()
    report = json.loads((folder / "results.json").read_text())
    assert report["evaluations"]["paper"]["metric"] == "mse"
    assert "mean squared error" in imaml("evaluate", folder, "--tasks", "10").output


def test_a_run_that_cannot_go_on_says_what_to_change(tmp_path: Path) -> None:
    """A step size so large that every task diverges."""
    folder = tmp_path / "run"
    result = train(folder, "--inner-step-size", "1e30", "--max-failed-steps", "2")
    assert result.exit_code == 1
    words = squeezed(result.output)
    assert "2 meta-steps in a row had no task with a usable gradient" in words and "--inner-step-size" in words
    assert "Traceback" not in words
    resumed = imaml(
        "train", "--resume", "--out", folder, "--inner-step-size", "0.1", "--no-final-test", "--no-tensorboard"
    )
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "omniglot-5w1s"], "no preset 'omniglot-5w1s'; did you mean omniglot-5w1s-.*imaml info lists all"),
        (["--preset", "omniglot"], "no preset 'omniglot'; did you mean omniglot-5w1s-cpu\\?"),
        (["--preset", "zzz"], "no preset 'zzz'; did you mean glyphs.*imaml info lists all"),
        (["--lam", "-1"], "--lam: expected at least 0"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "expected one of --resume and --overwrite"),
        (["--dataset", "omniglot", "--data-dir", "missing"], "no Omniglot in missing.*--data-dir.*--download"),
        (
            ["--data-dir", "images"],
            "glyphs is generated and reads no files.*--dataset omniglot, mini-imagenet or folder",
        ),
        (["--ways", "300"], "these tasks cannot be drawn from the training classes of glyphs: ways"),
        (["--ways", "6"], "cannot be drawn from the held-out classes of glyphs: ways.*the 5 classes.*change --ways"),
        (
            ["--query-shots", "40"],
            "the training classes of glyphs: expected shots.*change --ways, --shots or --query-shots",
        ),
        (["--eval-query-shots", "40"], "the held-out classes of glyphs: expected shots.*--eval-query-shots"),
        (["--shots", "11", "--query-shots", "1", "--eval-query-shots", "1"], "final test: .*11 .*--no-final-test"),
        (["--device", "cuda:99"], "device: expected auto or a device that works here"),
        (["--linear", "exact", "--linear-steps", "5", "--channels", "64"], "'exact' builds a dense Hessian"),
        (["--glyph-classes", "5"], "--train-classes: expected less than the 5"),
        (["--inner", "adam"], "'adam' is not one of 'gd', 'agd', 'newton-cg'"),
        (["--device", "meta"], "device: expected auto or a device that works here, got 'meta'"),
        (["--threads", "100000"], "--threads: expected at most [0-9]+ on this machine, got 100000"),
        (["--seed", str(2**63)], f"--seed: expected at most {2**62}"),
        (["--dataset", "omniglot", "--image-size", "200"], "--image-size: expected at most 105 for omniglot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_message_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = imaml("train", "--out", "run", *TINY_OPTIONS, *arguments)
    assert result.exit_code == 2
    assert re.search(words, squeezed(result.output)), result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())  # nothing that would be in the way of the next attempt


def test_errors_of_the_other_commands(tmp_path: Path, finished: Path) -> None:
    for arguments, words in (
        (["evaluate", tmp_path], "no checkpoint at"),
        (["evaluate", finished / "config.json"], "config.json is no checkpoint of imaml; expected a checkpoint.pt, or"),
        (["info", finished / "config.json"], "config.json is no checkpoint of imaml; expected a checkpoint.pt, or"),
        (
            ["experiment", "e1", "--only", "bogus", "--out", tmp_path / "e"],
            "--only: e1_meta_gradient is measured as a whole, so there is no 'bogus' in it; leave --only out",
        ),
        (["demo", "--seconds", "29"], "30"),
        (["info", tmp_path], "no checkpoint at"),
        (["info", "omniglot-5w1"], "omniglot-5w1 is no preset and no file, did you mean omniglot-5w"),
        (["info", "zzz"], "zzz is no preset and no file; imaml info lists the presets"),
        (
            ["train", "--resume", "--out", finished, "--outer-steps", "3"],
            "--outer-steps: this run has taken 6 steps; expected at least so many in all, got 3. To begin anew, name another --out",
        ),
        (["evaluate", finished, "--protocol", "loose"], "'loose' is not one of 'paper', 'tight', 'both'"),
        (
            ["train", "--resume", "--out", finished, "--ways", "4"],
            "a resumed run keeps its data, tasks and network: --ways is 3, got 4",
        ),
    ):
        result = imaml(*arguments)
        assert result.exit_code == 2 and words in squeezed(result.output) and "Traceback" not in result.output
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    result = imaml("train", "--resume", "--out", tmp_path)
    assert result.exit_code == 2 and "damaged or not a checkpoint" in squeezed(result.output)


@pytest.mark.parametrize("command", [["train"], ["demo"], ["experiment", "e1"]], ids=" ".join)
def test_a_folder_that_cannot_be_made(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at the start, not where the numbers would be written."""
    (tmp_path / "file").touch()
    result = imaml(*command, "--out", tmp_path / "file" / "run")
    assert result.exit_code == 2 and not result.stdout
    assert re.search("cannot be written: .*file is no folder; name another folder with --out", squeezed(result.output))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser, who may run this, can write anywhere
    result = imaml(*command, "--out", tmp_path / "run")
    assert result.exit_code == 2 and not result.stdout
    assert re.search("cannot be written: .* is read-only, or .*--out", squeezed(result.output))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path, text: str, encoding: str, errors: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", no_space)
    result = train(tmp_path / "run")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert re.search(
        r"run/log.jsonl: No space left on device; free some space, or name a folder on another disk",
        squeezed(result.output),
    )
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]


def test_a_checkpoint_that_cannot_be_read(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:3000])
    cut = imaml("evaluate", tmp_path)
    assert cut.exit_code == 2
    assert squeezed(cut.output).endswith(
        "is damaged or not a checkpoint of imaml; nothing in it was executed. Use another one, or train again with --overwrite "
    )

    def forbidden(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    result = imaml("evaluate", finished)
    assert result.exit_code == 2 and "cannot be read (Permission denied)" in squeezed(result.output)


def test_a_run_that_is_complete_says_how_to_go_on(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    shutil.copytree(finished, folder)
    result = imaml("train", "--resume", "--out", folder, "--no-final-test", "--no-tensorboard")
    assert result.exit_code == 0 and "Nothing was left to do" in result.output
    assert f"imaml train --resume --out '{folder}' --no-final-test --no-tensorboard --outer-steps 12" in result.output
    assert f"Next: imaml evaluate '{folder}'" in result.output


def test_more_steps_than_planned_say_what_becomes_of_the_rate(finished: Path, tmp_path: Path) -> None:
    """It had gone down to zero, and now it goes on: 6 of 12 steps on a line from 0.001 to 0."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rate = json.loads((folder / "config.json").read_text())["outer_rate"]
    options = ("--resume", "--out", folder, "--no-final-test", "--no-tensorboard", "--outer-steps", "12")
    result = imaml("train", *options, "--schedule", "linear")
    assert result.exit_code == 0 and "--outer-steps: 6 -> 12" in result.output
    told = f"outer rate at this step: {rate:.3g} -> {rate / 2:.3g} (schedule: linear over 12 steps)"
    assert told in squeezed(result.output)


def test_warnings_are_shown_without_file_and_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("applications.meta_learning.cli.app", lambda: warnings.warn("the disk is slow", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", lambda *a: sys.stderr.write(warnings.formatwarning(*a)))
        main()
    assert capsys.readouterr().err == "Warning: the disk is slow\n"


def test_version_and_short_help() -> None:
    assert imaml("--version").output == f"imaml of bilevel {bilevel.__version__}\n"
    assert imaml("train", "-h").output == imaml("train", "--help").output


def test_without_its_packages_imaml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "applications.meta_learning.cli")
    monkeypatch.setitem(sys.modules, "typer", None)  # as if it were not installed
    with pytest.raises(
        SystemExit, match=r'imaml needs typer, which is not installed: pip install "\.\[meta-learning\]"'
    ):
        main()


def test_without_tensorboard_there_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    result = imaml("train", "--out", tmp_path / "run", *TINY_OPTIONS, "--no-final-test")
    assert result.exit_code == 0 and squeezed(logs.NO_TENSORBOARD) in squeezed(result.output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_that_resumes(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*PROGRAM, "train", "--out", str(folder), *TINY_OPTIONS, "--no-tensorboard"]
    with subprocess.Popen(
        [*command, "--outer-steps", "1000000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            number, signal.SIG_DFL
        ),  # under nohup, or in the background, it may be ignored
    ) as process:
        deadline = time.monotonic() + 100
        log = folder / "log.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and f"imaml train --resume --out {folder}" in errors
    step = load_checkpoint(folder)["progress"]["step"]
    assert step > 0 and f"Stopped at step {step}" in errors
    resumed = train(folder, "--resume", "--outer-steps", str(step + 2))
    assert resumed.exit_code == 0, resumed.output
    assert load_checkpoint(folder)["progress"]["step"] == step + 2
    assert train(tmp_path / "whole", "--outer-steps", str(step + 2)).exit_code == 0
    interrupted, whole = (load_checkpoint(path)["theta"] for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(interrupted[name], leaf) for name, leaf in whole.items())


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["info"], ["demo"], ["experiment"]])
def test_help_fits_80_columns(command: list[str]) -> None:
    result = imaml(*command, "--help")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    # Lines of a docstring are kept: one that is too long leaves a few words on a line of their own.
    text = [line for line in lines if line.startswith(" ") and line.strip()]
    assert all(len(line.rstrip()) > 25 or line.rstrip().endswith(".") for line in text), text


def test_every_setting_is_an_option_with_its_help() -> None:
    text = squeezed(imaml("train", "--help").output)
    for name in TINY.to_dict():
        assert f"--{name.replace('_', '-')}" in text
    for kind in get_type_hints(Config).values():
        assert get_origin(kind) is not Literal or all(choice in text for choice in get_args(kind))
    for panel in ("Start here", "Data and tasks", "Inner problem", "Meta-gradient", "Outer loop"):
        assert panel in text


@pytest.mark.skipif(not OMNIGLOT, reason="needs the environment variable BILEVEL_OMNIGLOT")
def test_real_omniglot(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = imaml(
        *(
            "train",
            "--dataset",
            "omniglot",
            "--data-dir",
            str(OMNIGLOT),
            "--out",
            folder,
            "--outer-steps",
            "2",
            "--meta-batch",
            "2",
        ),
        *(
            "--channels",
            "8",
            "--eval-interval",
            "1",
            "--eval-tasks",
            "4",
            "--log-interval",
            "1",
            "--no-final-test",
            "--no-tensorboard",
        ),
    )
    assert result.exit_code == 0, result.output
    stored = load_checkpoint(folder)
    assert (len(stored["split"]["train"]), len(stored["split"]["test"])) == (1200, 423)
    found = imaml("evaluate", folder, "--tasks", "5", "--json")  # the data are found where they were
    assert found.exit_code == 0 and json.loads(found.stdout)["dataset"] == "omniglot"


def test_a_run_without_one_usable_task_has_failed(tmp_path: Path) -> None:
    """The accuracy of tasks that could not be adapted counts as 0; that they could not is said, too."""
    folder = tmp_path / "run"
    result = train(folder, "--inner-step-size", "1e6", "--inner", "gd", "--eval-interval", "2", "--eval-tasks", "5")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "(5 tasks, 5 failed)" in squeezed(result.output)
    assert "Nothing was learned: no task of any meta-step had a usable gradient." in squeezed(result.output)
    assert load_checkpoint(folder)["progress"]["skipped_steps"] == TINY.outer_steps


def test_a_disk_that_is_full_after_training_says_that_training_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "training_figure", full)
    result = train(tmp_path / "run")
    assert result.exit_code == 2
    assert "Training is done and its checkpoint is written; what follows it failed:" in squeezed(result.output)
    assert load_checkpoint(tmp_path / "run")["progress"]["step"] == TINY.outer_steps


def test_only_omniglot_can_be_fetched(tmp_path: Path) -> None:
    found = imaml("train", "--dataset", "folder", "--data-dir", tmp_path, "--download", "--out", tmp_path / "run")
    assert found.exit_code == 2 and "--download: only omniglot can be fetched" in squeezed(found.output)


def test_the_folder_of_nobody(tmp_path: Path) -> None:
    found = imaml("train", "--dataset", "folder", "--data-dir", "~nobody42/images", "--out", tmp_path / "run")
    assert found.exit_code == 2 and "~nobody42/images: there is no such user" in squeezed(found.output)


def test_names_that_are_no_text_and_letters_that_a_terminal_lacks(tmp_path: Path) -> None:
    """Of old archives; and Python takes ASCII for what a terminal with LANG=C and nothing else can show."""
    for k in range(6):
        folder = tmp_path / "images" / f"class{k}"
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(10 * k + i).integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(os.fsencode(folder) + (b"/\xff\xfe.png" if i == 0 else b"/%d.png" % i))
    command = [*PROGRAM, "train", "--out", str(tmp_path / "run"), *TINY_OPTIONS]
    options = [
        "--dataset",
        "folder",
        "--data-dir",
        str(tmp_path / "images"),
        "--train-classes",
        "4",
        "--no-tensorboard",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    more = ["--split", "random", "--ways", "2", "--query-shots", "2", "--eval-query-shots", "2", "--outer-steps", "2"]
    found = subprocess.run(
        [*command, *options, *more], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stdout + found.stderr


def test_without_the_proximal_term_imaml_is_tested_and_not_trained(finished: Path, tmp_path: Path) -> None:
    """As the authors' code adapts at test."""
    for more in (
        ["--out", tmp_path / "run", *TINY_OPTIONS, "--lam", "0"],
        ["--resume", "--out", finished, "--lam", "0"],
    ):
        refused = imaml("train", *more)
        assert refused.exit_code == 2 and "lam: expected a number above 0 to train with imaml" in squeezed(
            refused.output
        )
    tested = imaml("evaluate", finished, "--lam", "0", "--protocol", "paper", "--tasks", "4")
    assert tested.exit_code == 0 and "no proximal term" in squeezed(tested.output), tested.output
