"""A meta-step as one graph (a graph on the CPU, see tests/fake_graphs.py): the same training, without waiting for its numbers; and tasks
in smaller chunks where the memory does not suffice.
"""

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from applications.meta_learning import train
from applications.meta_learning.algorithms import Algorithm, ImplicitMAML, MetaGradient
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config
from applications.meta_learning.run import Ending
from applications.meta_learning.train import Trainer, TrainingFailed
from tests.fake_graphs import FakeGraphs, captured_by
from tests.meta_learning.test_train import ALGORITHMS, Broken, run
from tests.meta_learning.tiny import SINUSOID, TINY, tiny_source

PLAIN = replace(SINUSOID, dtype="float64", inner_steps=2, outer_steps=8, meta_batch=4)
CAPTURED = replace(PLAIN, capture=True)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO)
    names = ("bilevel.captured", "applications.meta_learning.step")
    return lambda: [record.getMessage() for record in caplog.records if record.name in names]


def assert_same_training(one: Trainer, other: Trainer) -> None:
    """Equal but for rounding: Adam of a graph is written as one kernel, with its rate in float32."""
    for name, leaf in one.theta.items():
        torch.testing.assert_close(other.theta[name], leaf, rtol=1e-5, atol=1e-6)  # a step is 1e-2
    mine, others = one.checkpoint(None), other.checkpoint(None)
    groups = [dict(state["outer"]["param_groups"][0]) for state in (mine, others)]
    assert groups[0].pop("lr") == pytest.approx(groups[1].pop("lr"))
    assert groups[0] == groups[1]
    assert mine["schedule"]["last_epoch"] == others["schedule"]["last_epoch"]
    for a, b in zip(mine["outer"]["state"].values(), others["outer"]["state"].values(), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"] and a["step"].dtype == b["step"].dtype
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=1e-8)
    counts = ("step", "tasks", "failed_tasks", "negative_tasks", "skipped_steps", "skipped_in_a_row")
    assert [mine["progress"][name] for name in counts] == [others["progress"][name] for name in counts]
    for a, b in zip(mine["progress"]["window"], others["progress"]["window"], strict=True):
        assert a == pytest.approx(b, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "cosine", "log_interval": 3, "weight_decay": 3.0},
        {"inner": "agd", "linear": "neumann"},
        {"algorithm": "maml", "lam": 0.0},
        {"algorithm": "first-order", "lam": 0.0},
        {
            "dataset": "glyphs",
            "shots": 1,
            "query_shots": 1,
            "channels": 2,
            "chunk_size": 3,
            "curvature": "gauss-newton",
        },
    ],
    ids=str,
)
def test_a_captured_run_is_the_run(settings: dict[str, Any], lines: Any) -> None:
    config = replace(PLAIN, **settings)
    source = tiny_source(config)
    graphs = FakeGraphs()
    plain, captured = (
        Trainer(config, source),
        Trainer(replace(config, capture=True), source, captured_step=captured_by(graphs)),
    )
    for _ in range(config.outer_steps):
        plain.meta_step()
        captured.meta_step()
    assert_same_training(plain, captured)
    assert graphs.calls == ["aside", "aside", "watched", "capture"] + ["replay"] * (config.outer_steps - 3)
    assert captured.step.is_deferred and not lines()


def test_numbers_are_read_when_they_are_logged_and_not_before() -> None:
    trainer = Trainer(replace(CAPTURED, log_interval=4), tiny_source(CAPTURED), captured_step=captured_by(FakeGraphs()))
    counted = []
    for _ in range(8):
        trainer.meta_step()
        counted.append(trainer.progress.tasks // 4)
    assert counted == [1, 1, 1, 4, 4, 4, 4, 8]  # the first one, for the display
    trainer.meta_step()
    assert trainer.checkpoint(None)["progress"]["tasks"] == 9 * 4  # a checkpoint is complete
    trainer.meta_step()
    assert math.isfinite(trainer.summary()["loss"]) and trainer.progress.tasks == 10 * 4 and not trainer.progress.window


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_steps_without_a_usable_task_change_nothing(schedule: Any) -> None:
    """Adam is told on the device; the host finds out when it reads the numbers, and the schedule goes back."""
    config = replace(PLAIN, schedule=schedule, outer_steps=20, log_interval=3, weight_decay=3.0)
    trainers = [
        Trainer(config, tiny_source(config)),
        Trainer(replace(config, capture=True), tiny_source(config), captured_step=captured_by(FakeGraphs())),
    ]
    for trainer in trainers:
        good = trainer.sampler
        for k in range(12):
            trainer.sampler = Broken(trainer, [0, 1, 2, 3] if k in (5, 7, 8) else [1]) if k >= 4 else good
            trainer.sampler.inner = good  # type: ignore[attr-defined]
            before = [leaf.clone() for leaf in trainer.theta.values()]
            trainer.meta_step()
            moved = [not torch.equal(leaf, old) for leaf, old in zip(trainer.theta.values(), before, strict=True)]
            assert any(moved) == (k not in (5, 7, 8))
        trainer.sampler = good
    plain, captured = trainers
    assert captured.progress.skipped_steps == 3
    if schedule == "constant":
        assert_same_training(plain, captured)
    # with a schedule, the rate is off by what the host did not know yet; once it knows, it is right
    assert captured.schedule.last_epoch == plain.schedule.last_epoch == 9
    assert captured.step.rate == pytest.approx(plain.step.rate)


def test_a_run_of_failing_steps_ends() -> None:
    trainer = Trainer(
        replace(CAPTURED, max_failed_steps=3, log_interval=2),
        tiny_source(CAPTURED),
        captured_step=captured_by(FakeGraphs()),
    )
    trainer.sampler = Broken(trainer, [0, 1, 2, 3])
    theta = [leaf.clone() for leaf in trainer.theta.values()]
    for _ in range(3):
        trainer.meta_step()
    with pytest.raises(
        TrainingFailed, match=r"(?s)4 meta-steps in a row.*adaptation: 4 problems, 4 failed.*NON_FINITE.*--lam"
    ):
        trainer.meta_step()
    assert all(torch.equal(leaf, old) for leaf, old in zip(trainer.theta.values(), theta, strict=True))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_a_run_goes_on_with_and_without_graphs(first: bool, second: bool, tmp_path: Path) -> None:
    """The checkpoint does not know how it was made."""
    config = replace(PLAIN, schedule="linear", eval_interval=0)
    source = tiny_source(config)
    whole = Trainer(config, source)
    for _ in range(config.outer_steps):
        whole.meta_step()

    def trainer(capture: bool) -> Trainer:
        return Trainer(
            replace(config, capture=capture), source, captured_step=captured_by(FakeGraphs()) if capture else None
        )

    begun = trainer(first)
    assert run(begun, tmp_path, 5) is Ending.STOPPED
    resumed = trainer(second)
    resumed.restore(load_checkpoint(tmp_path))
    assert run(resumed, tmp_path) is Ending.DONE
    whole.progress.window.clear()
    resumed.progress.window.clear()
    assert_same_training(whole, resumed)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"inner": "newton-cg"}, "called a synchronizing operation"),
        ({"inner_tol": 1e-3}, "called a synchronizing operation"),
        ({"linear_rtol": 1e-3}, "called a synchronizing operation"),
    ],
    ids=str,
)
def test_what_looks_at_numbers_runs_as_it_is(settings: dict[str, Any], reason: str, lines: Any) -> None:
    config = replace(PLAIN, **settings)
    plain = Trainer(config, tiny_source(config))
    captured = Trainer(replace(config, capture=True), tiny_source(config), captured_step=captured_by(FakeGraphs()))
    for _ in range(config.outer_steps):
        plain.meta_step()
        captured.meta_step()
    assert_same_training(plain, captured)
    assert len(lines()) == 1 and reason in lines()[0]


def test_without_a_gpu_the_setting_does_nothing_but_say_so(lines: Any, tmp_path: Path) -> None:
    plain, captured = Trainer(PLAIN, tiny_source(PLAIN)), Trainer(CAPTURED, tiny_source(PLAIN))
    assert run(plain, tmp_path / "plain") is run(captured, tmp_path / "captured") is Ending.DONE
    assert all(torch.equal(captured.theta[name], leaf) for name, leaf in plain.theta.items())
    assert len(lines()) == 1 and "a graph needs a CUDA device" in lines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# Memory.


@dataclass(frozen=True, kw_only=True)
class Small(ImplicitMAML):
    """On a device that holds so many tasks at once."""

    holds: int

    def meta_gradient(self, problem: Any, theta: Any, data: Any) -> MetaGradient:
        if (self.chunk_size or len(data["support"]["x"])) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return super().meta_gradient(problem, theta, data)


def with_memory(config: Config, holds: int) -> Trainer:
    trainer = Trainer(config, tiny_source(config), captured_step=captured_by(FakeGraphs()) if config.capture else None)
    algorithm: Algorithm = trainer.step.algorithm
    assert isinstance(algorithm, ImplicitMAML)
    options = {name: getattr(algorithm, name) for name in ("solver", "chunk_size", "linsys", "curvature", "damping")}
    trainer.step.algorithm = Small(**options, holds=holds)
    return trainer


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(("holds", "expected"), [(4, None), (3, 2), (2, 2), (1, 1)])
def test_tasks_in_chunks_that_fit(holds: int, expected: int | None, capture: bool, lines: Any) -> None:
    """Halved until they fit, which is remembered and changes nothing but rounding."""
    config = replace(PLAIN, capture=capture)
    plain, small = Trainer(PLAIN, tiny_source(PLAIN)), with_memory(config, holds)
    for _ in range(PLAIN.outer_steps):
        plain.meta_step()
        small.meta_step()
    assert small.step.algorithm.chunk_size == expected
    assert_same_training(plain, small)
    halvings = {None: 0, 2: 1, 1: 2}[expected]
    assert len(lines()) == halvings and all("Out of memory; going on with" in line for line in lines())


def test_tests_keep_to_the_chunks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, asked = with_memory(PLAIN, 1), []
    trainer.meta_step()
    for name in ("evaluate", "adaptation_curve"):
        monkeypatch.setattr(train, name, lambda *_, chunk_size, **__: asked.append(chunk_size))
    trainer.test(tasks=4, query_shots=1, seed=0)
    trainer.test_over_inner_steps(tasks=4, query_shots=1, seed=0)
    assert asked == [1, 1]


def test_a_number_that_was_asked_for_is_kept() -> None:
    trainer = with_memory(replace(PLAIN, chunk_size=3), holds=2)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.meta_step()
    trainer = with_memory(PLAIN, holds=0)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.meta_step()
    assert trainer.progress.step == 0


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
class TestCuda:
    @pytest.mark.parametrize("name", [name for name in ALGORITHMS if not ALGORITHMS[name].get("compile")])
    def test_a_captured_run_is_the_run(self, name: str, lines: Any) -> None:
        # the captured Adam keeps its rate in float32: one that it holds exactly
        settings = {"dtype": "float64", "outer_rate": 2.0**-7, **ALGORITHMS[name]}
        config = replace(TINY, device="cuda", outer_steps=8, **settings)
        plain = Trainer(config, tiny_source(config))
        captured = Trainer(replace(config, capture=True), tiny_source(config))
        for _ in range(8):
            plain.meta_step()
            captured.meta_step()
        for name, leaf in plain.theta.items():
            torch.testing.assert_close(captured.theta[name], leaf, rtol=1e-4, atol=1e-6)
        looks = config.inner == "newton-cg" or config.truncate > 0
        assert (captured.step._take.num_captures == 0) == looks  # type: ignore[attr-defined]
        assert len(lines()) == looks

    def test_a_memory_that_does_not_suffice(self) -> None:
        """A part of what 64 tasks at once take."""
        config = replace(TINY, device="cuda", meta_batch=64, image_size=28, channels=64, ways=5, query_shots=8)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Trainer(config, tiny_source(config)).meta_step()
        needed = torch.cuda.max_memory_allocated() - before
        gc.collect()
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + 0.6 * needed
        trainer = Trainer(config, tiny_source(config))
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        try:
            trainer.meta_step()
            chosen = trainer.step.algorithm.chunk_size
            trainer.meta_step()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert chosen is not None and 0 < chosen < 64 and trainer.step.algorithm.chunk_size == chosen
        assert trainer.progress.step == 2
