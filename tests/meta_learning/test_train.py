"""The outer loop: what is stepped, what is skipped, and that an interruption leaves no trace."""

import io
import json
import math
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor

import bilevel
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config
from applications.meta_learning.data import TaskBatch
from applications.meta_learning.display import Display
from applications.meta_learning.logs import RunLog, read_log
from applications.meta_learning.run import Ending, Run, StopRequest, stop_on_signals
from applications.meta_learning.train import Trainer, TrainingFailed
from bilevel.curvature import GaussNewton
from bilevel.linsys import CG
from bilevel.recorded.programs import Programs
from tests.meta_learning.tiny import SINUSOID, TINY, tiny_source

ALGORITHMS: dict[str, dict[str, Any]] = {
    "gradient descent": {},
    "line search": {"inner_step_size": 0.0},
    "accelerated": {"inner": "agd"},
    "hessian-free": {"inner": "newton-cg", "inner_curvature": "gauss-newton"},
    "first order": {"linear": "identity"},
    "neumann": {"linear": "neumann"},
    "steihaug": {"curvature": "hessian", "steihaug": True},
    "two lambdas": {"lam_head": 0.1},
    "float64": {"dtype": "float64"},
    "chunks": {"chunk_size": 2},
    "recorded": {"compile": True},
    "maml": {"algorithm": "maml", "lam": 0.0},
    "maml, proximal": {"algorithm": "maml", "inner": "agd"},
    "truncated": {"algorithm": "maml", "truncate": 1},
    "first order, no proximal term": {"algorithm": "first-order", "lam": 0.0},
    "reptile": {"algorithm": "reptile", "lam": 0.0},
}


@pytest.mark.parametrize("settings", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm_takes_steps(settings: dict[str, Any]) -> None:
    config = replace(TINY, **settings)
    trainer = Trainer(config, tiny_source())
    before = {name: leaf.clone() for name, leaf in trainer.theta.items()}
    for _ in range(2):
        record = trainer.meta_step()
    assert record["ok_tasks"] == 3 and math.isfinite(record["loss"]) and 0 <= record["accuracy"] <= 1
    assert trainer.progress.step == 2 and trainer.progress.tasks == 6 and trainer.progress.failed_tasks == 0
    assert all(not torch.equal(leaf, before[name]) and leaf.isfinite().all() for name, leaf in trainer.theta.items())


@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_a_step_is_adam_along_the_mean_meta_gradient(weight_decay: float) -> None:
    config = replace(TINY, dtype="float64", weight_decay=weight_decay)
    trainer, twin = Trainer(config, tiny_source()), Trainer(config, tiny_source())
    method, theta = twin.method, {name: leaf.clone().requires_grad_() for name, leaf in twin.theta.items()}
    outer = torch.optim.Adam(list(theta.values()), lr=config.outer_rate, eps=config.outer_eps)
    for _ in range(3):
        meta = bilevel.hypergradient(
            method.problem,
            {name: leaf.detach() for name, leaf in theta.items()},
            twin.sampler.sample(config.meta_batch),
            solver=method.solver,
            linsys=CG(max_steps=config.linear_steps, rtol=0.0),
            curvature=GaussNewton(),
            batched=True,
        )
        for name, leaf in theta.items():
            leaf.grad = meta.grad[name]
            with torch.no_grad():
                leaf *= 1 - weight_decay * config.outer_rate
        outer.step()
        trainer.meta_step()
    for name, leaf in theta.items():
        torch.testing.assert_close(trainer.theta[name], leaf.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"inner": "newton-cg", "inner_curvature": "gauss-newton", "inner_step_size": 0.0}], ids=str
)
def test_a_recorded_run_is_the_run(settings: dict[str, Any]) -> None:
    config = replace(SINUSOID, dtype="float64", **settings)
    plain, recorded = Trainer(config, tiny_source(config)), Trainer(replace(config, compile=True), tiny_source(config))
    for _ in range(4):
        expected, found = plain.meta_step(), recorded.meta_step()
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    assert len(Programs.of(recorded.method.problem)) > 0 and len(Programs.of(plain.method.problem)) == 0
    for name, leaf in plain.theta.items():
        torch.testing.assert_close(recorded.theta[name], leaf, rtol=1e-8, atol=1e-9)


def test_training_learns() -> None:
    config = replace(
        SINUSOID, outer_steps=150, outer_rate=1e-2, meta_batch=10, channels=20, inner_steps=5, inner_step_size=0.0
    )
    trainer = Trainer(config, tiny_source(config))
    before = trainer.test(tasks=200, query_shots=20, seed=0)
    for _ in range(config.outer_steps):
        trainer.meta_step()
    after = trainer.test(tasks=200, query_shots=20, seed=0)
    assert after.metric == "mse" and after.mean + after.interval < before.mean - before.interval


class Broken:
    """A sampler whose tasks numbered in `bad` are NaN."""

    def __init__(self, trainer: Trainer, bad: list[int]) -> None:
        self.inner, self.bad = trainer.sampler, bad

    def sample(self, num_tasks: int) -> TaskBatch:
        data = self.inner.sample(num_tasks)
        data["support"]["x"][self.bad] = torch.nan
        return data

    def state_dict(self) -> dict[str, Tensor]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.inner.load_state_dict(state)


def test_the_accuracy_leaves_failed_tasks_out() -> None:
    """The largest of NaN outputs is the first one: before, a step in which all tasks failed had learned as much as chance."""
    trainer = Trainer(replace(TINY, inner_step_size=1e30, log_interval=1, max_failed_steps=10), tiny_source())
    record = trainer.meta_step()
    assert record["ok_tasks"] == 0 and math.isnan(record["accuracy"]) and math.isnan(record["loss"])
    # a linear solve that fails says nothing of what was learned from the support set
    unsolved = replace(TINY, curvature="hessian", lam=1e-6, inner_steps=1, linear_steps=30, log_interval=1)
    record = Trainer(replace(unsolved, max_failed_steps=10), tiny_source()).meta_step()
    assert record["ok_tasks"] < TINY.meta_batch and 0 <= record["accuracy"] <= 1


def test_failed_tasks_are_left_out_and_counted() -> None:
    trainer, clean = Trainer(TINY, tiny_source()), Trainer(TINY, tiny_source())
    trainer.sampler = Broken(trainer, [1])
    record = trainer.meta_step()
    assert record["ok_tasks"] == 2 and trainer.progress.failed_tasks == 1 and math.isfinite(record["loss"])
    assert all(leaf.isfinite().all() for leaf in trainer.theta.values())
    # the step is that of the two others alone
    data = clean.sampler.sample(3)
    two = {part: {key: value[[0, 2]] for key, value in tensors.items()} for part, tensors in data.items()}
    method = clean.method
    meta = bilevel.hypergradient(
        method.problem,
        clean.theta,
        two,
        solver=method.solver,
        linsys=CG(max_steps=TINY.linear_steps, rtol=0.0),
        curvature=GaussNewton(),
        batched=True,
    )
    for name, leaf in trainer.theta.items():
        torch.testing.assert_close(leaf.grad, meta.grad[name], rtol=1e-3, atol=1e-5)


def test_a_step_without_a_usable_task_changes_nothing_and_the_run_ends_after_some() -> None:
    trainer = Trainer(replace(TINY, max_failed_steps=3), tiny_source())
    trainer.meta_step()
    theta = {name: leaf.clone() for name, leaf in trainer.theta.items()}
    moments = [state["exp_avg"].clone() for state in trainer.outer.state_dict()["state"].values()]
    good, trainer.sampler = trainer.sampler, Broken(trainer, [0, 1, 2])
    for _ in range(2):
        assert trainer.meta_step()["ok_tasks"] == 0
    trainer.sampler, bad = good, trainer.sampler
    assert all(torch.equal(leaf, theta[name]) for name, leaf in trainer.theta.items())
    after = [state["exp_avg"] for state in trainer.outer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    trainer.meta_step()  # a good one in between starts the count again
    assert trainer.progress.skipped_steps == 2 and trainer.progress.skipped_in_a_row == 0
    trainer.sampler = bad
    for _ in range(2):
        trainer.meta_step()
    with pytest.raises(
        TrainingFailed,
        match=r"(?s)3 meta-steps in a row.*NON_FINITE.*--lam.*--damping 1.*--inner-step-size",
    ):
        trainer.meta_step()
    assert all(leaf.isfinite().all() for leaf in trainer.theta.values())


def test_negative_curvature_is_counted() -> None:
    """A negative lambda is not allowed, so: a Hessian that is indefinite because the inner solve has just begun."""
    config = replace(
        TINY, curvature="hessian", lam=1e-4, inner_steps=1, linear_steps=30, meta_batch=10, max_failed_steps=1000
    )
    trainer = Trainer(config, tiny_source())
    for _ in range(3):
        trainer.meta_step()
    assert trainer.progress.negative_tasks > 0
    assert trainer.progress.failed_tasks >= trainer.progress.negative_tasks
    robust = Trainer(replace(config, steihaug=True), tiny_source())
    robust.meta_step()
    assert robust.progress.negative_tasks > 0 and robust.progress.failed_tasks == 0


def rates(config: Config) -> list[float]:
    trainer = Trainer(config, tiny_source())
    seen = []
    for _ in range(config.outer_steps):
        seen.append(trainer.schedule.get_last_lr()[0])
        trainer.meta_step()
    return [*seen, trainer.schedule.get_last_lr()[0]]


def test_schedules() -> None:
    config = replace(TINY, outer_steps=4, outer_rate=0.01)
    assert rates(config) == [0.01] * 5
    assert rates(replace(config, schedule="linear")) == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0])
    assert rates(replace(config, schedule="cosine")) == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    )


class StopAt:
    """Asks to stop once the trainer has reached a step."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def __call__(self) -> bool:
        return self.trainer.progress.step >= self.step


def run(trainer: Trainer, folder: Path, stop_at: int | None = None, stop: StopRequest | None = None) -> Ending:
    folder.mkdir(exist_ok=True)
    console = Console(file=(folder / "console.txt").open("a"))
    with (
        RunLog(folder, at_step=trainer.progress.step, tensorboard=False) as log,
        Display(console, trainer.config) as display,
    ):
        loop = Run(trainer, folder, data_dir=None, log=log, display=display)
        loop.start()
        stop = stop or StopRequest()
        return loop.loop(stop if stop_at is None else StopAt(trainer, stop_at))  # type: ignore[arg-type]


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if "seconds" not in key} for entry in read_log(path)]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4], ids=lambda step: f"at {step}")
@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, schedule="cosine"),
        replace(TINY, inner="newton-cg", lam_head=0.5, linear="neumann"),
        replace(SINUSOID, schedule="linear", dtype="float64"),
    ],
    ids=["gd", "newton-cg", "sinusoid"],
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(config: Config, stop_at: int, tmp_path: Path) -> None:
    source = tiny_source(config)
    whole = Trainer(config, source)
    assert run(whole, tmp_path / "whole") is Ending.DONE
    first = Trainer(config, source)
    assert run(first, tmp_path / "parts", stop_at) is Ending.STOPPED
    torch.manual_seed(99)  # another process would have another state here
    second = Trainer(config, source)
    second.restore(load_checkpoint(tmp_path / "parts"))
    assert second.progress.step == stop_at
    assert run(second, tmp_path / "parts") is Ending.DONE
    assert all(torch.equal(second.theta[name], leaf) for name, leaf in whole.theta.items())
    states = zip(whole.outer.state_dict()["state"].values(), second.outer.state_dict()["state"].values(), strict=True)
    assert all(torch.equal(one[key], other[key]) for one, other in states for key in one)
    assert torch.equal(whole.sampler.state_dict()["generator"], second.sampler.state_dict()["generator"])
    assert without_time(tmp_path / "whole" / "log.jsonl") == without_time(tmp_path / "parts" / "log.jsonl")


def test_a_finished_run_goes_on_to_more_steps(tmp_path: Path) -> None:
    """The evaluation at its end is not repeated."""
    source = tiny_source()
    whole, first = Trainer(TINY, source), Trainer(replace(TINY, outer_steps=4), source)
    run(whole, tmp_path / "whole")
    run(first, tmp_path / "parts")
    second = Trainer(TINY, source)
    second.restore(load_checkpoint(tmp_path / "parts"))
    assert run(second, tmp_path / "parts") is Ending.DONE
    assert all(torch.equal(second.theta[name], leaf) for name, leaf in whole.theta.items())
    assert without_time(tmp_path / "whole" / "log.jsonl") == without_time(tmp_path / "parts" / "log.jsonl")


@pytest.mark.parametrize(
    ("algorithm", "residuals", "warned"),
    [
        ("imaml", [0.2, 0.1, 0.79, math.nan, 0.9, 3.0], "step 5: .* = 0.9, 9 times their least.*--inner-steps"),
        ("imaml", [0.2, 0.1, 0.79], ""),
        ("imaml", [1e-7, 1e-5], ""),  # solved, but for rounding
        ("first-order", [0.1, 2.1], ""),
    ],
)
def test_inner_solves_that_get_worse_are_told_once(
    algorithm: Literal["imaml", "first-order"], residuals: list[float], warned: str
) -> None:
    console = Console(file=io.StringIO())
    with Display(console, replace(TINY, algorithm=algorithm, linear="cg")) as display:
        for step, residual in enumerate(residuals, 1):
            entry = {"kind": "train", "step": step, "seconds": 0.0, "loss": 0.5, "accuracy": 0.9}
            display.logged({**entry, "inner_residual": residual, "negative_curvature": 0.0, "failed": 0.0})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("their least") == bool(warned) and re.search(warned, text)


def test_the_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    with RunLog(tmp_path, at_step=0, tensorboard=False) as log:
        for step in (2, 4, 6):
            log.write("train", step, 0.1, {"loss": math.nan})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a write that was cut off
    with RunLog(tmp_path, at_step=4, tensorboard=False) as log:
        log.write("train", 5, 0.2, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5] and lines[0]["loss"] is None


@pytest.mark.parametrize(
    "line", [b"\xff\xfe garbage", b'{"step": 3}', b'{"kind": "train", "step": 3}', b"\0\0", b"[1]"], ids=range(5)
)
def test_a_damaged_line_of_the_log_is_left_out(tmp_path: Path, line: bytes) -> None:
    with RunLog(tmp_path, at_step=0, tensorboard=False) as log:
        log.write("train", 1, 0.1, {"loss": 1.0})
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with RunLog(tmp_path, at_step=9, tensorboard=False) as log:
        log.write("train", 2, 0.2, {"loss": 1.0})
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_shares_count_the_tasks_that_there_were(tmp_path: Path) -> None:
    """A line of the log may be about steps before and after a change of --meta-batch."""
    first = Trainer(replace(TINY, log_interval=10, eval_interval=0), tiny_source())
    run(first, tmp_path, 2)
    for batch in (1, 9):
        second = Trainer(replace(TINY, log_interval=10, meta_batch=batch), tiny_source())
        second.restore(load_checkpoint(tmp_path))
        second.meta_step()
        assert second.summary()["failed"] == 0


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({"curvature": "hessian", "linear": "cg"}, ["--curvature gauss-newton", "--damping 1", "--steihaug"], []),
        (
            {"curvature": "gauss-newton", "damping": 2.0, "linear": "cg"},
            ["--lam"],
            ["--curvature", "--damping", "--steihaug"],
        ),
        ({"algorithm": "maml", "lam": 0.0}, ["--outer-rate"], ["--curvature", "--damping", "--steihaug", "--lam"]),
        ({"inner": "newton-cg"}, ["--outer-rate"], ["--inner-step-size"]),
    ],
)
def test_the_advice_is_what_the_settings_leave_open(
    settings: dict[str, Any], said: list[str], unsaid: list[str]
) -> None:
    trainer = Trainer(replace(TINY, max_failed_steps=1, **settings), tiny_source())
    trainer.sampler = Broken(trainer, [0, 1, 2])
    with pytest.raises(TrainingFailed) as failed:
        trainer.meta_step()
    advice = str(failed.value).splitlines()[-1]
    assert all(word in advice for word in said) and not any(word in advice for word in unsaid), advice


def test_what_a_killed_process_was_writing_goes_with_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint.pt.4242.tmp"
    left.write_bytes(b"half")
    run(Trainer(TINY, tiny_source()), tmp_path, 1)
    assert not left.exists()


def test_a_resumed_run_takes_the_new_options_of_adam(tmp_path: Path) -> None:
    first = Trainer(TINY, tiny_source())
    run(first, tmp_path, 2)
    second = Trainer(replace(TINY, outer_rate=0.5, outer_eps=0.1, weight_decay=0.2), tiny_source())
    second.restore(load_checkpoint(tmp_path))
    second.meta_step()
    group = second.outer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.5, 0.1, 0.2)


def test_the_time_limit_ends_a_run(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, outer_steps=1_000_000, minutes=0.01, eval_interval=0), tiny_source())
    assert run(trainer, tmp_path) is Ending.TIME
    assert 0.6 <= trainer.progress.seconds < 5
    assert load_checkpoint(tmp_path)["progress"]["step"] == trainer.progress.step > 0


def test_a_run_that_fails_leaves_a_checkpoint_and_its_log(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, max_failed_steps=3), tiny_source())
    trainer.sampler = Broken(trainer, [0, 1, 2])
    with pytest.raises(TrainingFailed):
        run(trainer, tmp_path)
    stored = load_checkpoint(tmp_path)
    assert stored["progress"]["skipped_steps"] == 3
    assert [entry["failed"] for entry in read_log(tmp_path / "log.jsonl") if entry["kind"] == "train"] == [1.0, 1.0]
    Trainer(TINY, tiny_source()).restore(stored)


@pytest.mark.parametrize("during", ["step", "evaluation", "last checkpoint"])
def test_a_signal_in_the_last_step_stops_the_run_too(during: str, tmp_path: Path) -> None:
    """What is left then, if nothing else, is the test at the end, which may take longer than all of the steps."""
    trainer, stop = Trainer(TINY, tiny_source()), StopRequest()
    method = {"step": "meta_step", "evaluation": "check_progress", "last checkpoint": "checkpoint"}[during]
    plain = getattr(trainer, method)

    def signalled(*arguments: Any) -> Any:
        done = plain(*arguments)
        stop.requested = trainer.progress.step == TINY.outer_steps
        return done

    setattr(trainer, method, signalled)
    assert run(trainer, tmp_path, stop=stop) is Ending.STOPPED
    stored = load_checkpoint(tmp_path)
    assert stored["progress"]["step"] == TINY.outer_steps
    resumed = Trainer(TINY, tiny_source())
    resumed.restore(stored)
    assert run(resumed, tmp_path) is Ending.DONE
    assert [e["step"] for e in read_log(tmp_path / "log.jsonl") if e["kind"] == "evaluation"] == [0, 2, 4, 6]


def test_a_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", ALGORITHMS.values(), ids=ALGORITHMS)
def test_on_a_gpu(settings: dict[str, Any], tmp_path: Path) -> None:
    config = replace(TINY, device="cuda", **settings)
    trainer = Trainer(config, tiny_source())
    assert run(trainer, tmp_path, 3) is Ending.STOPPED
    assert all(leaf.is_cuda and leaf.isfinite().all() for leaf in trainer.theta.values())
    second = Trainer(config, tiny_source())
    second.restore(load_checkpoint(tmp_path))
    assert run(second, tmp_path) is Ending.DONE and second.progress.failed_tasks == 0


def test_the_log_of_a_run(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_source())
    run(trainer, tmp_path)
    entries = read_log(tmp_path / "log.jsonl")
    train = [entry for entry in entries if entry["kind"] == "train"]
    tests = [entry for entry in entries if entry["kind"] == "evaluation"]
    assert [entry["step"] for entry in train] == [2, 4, 6] and [entry["step"] for entry in tests] == [0, 2, 4, 6]
    assert set(train[0]) == {
        "kind", "step", "seconds", "loss", "accuracy", "inner_residual", "linear_residual", "negative_curvature",
        "failed", "skipped_steps", "rate",
    }  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text()) == TINY.to_dict()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["device"] == "cpu" and environment["threads"] >= 1
    text = (tmp_path / "console.txt").read_text()
    assert (
        "step 2/6" in text
        and "held-out accuracy" in text
        and "tasks with negative curvature 0.0 %  failed tasks 0.0 %" in text
    )
