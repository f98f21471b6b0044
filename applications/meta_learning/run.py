"""A training run on disk: its folder, its interruptions, and the loop that logs, evaluates and saves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
import torch

from applications.meta_learning.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from applications.meta_learning.config import FIXED_FIELDS, Config, ConfigError, changed_fields, option_name
from applications.meta_learning.data import Split
from applications.meta_learning.data.files import expanded
from applications.meta_learning.display import Display
from applications.meta_learning.evaluate import Stopped
from applications.meta_learning.logs import RunLog, environment, write_json
from applications.meta_learning.method import conditions
from applications.meta_learning.tasks import TaskSource, load_source
from applications.meta_learning.train import Trainer, TrainingFailed

CHECKPOINT = "checkpoint.pt"
FILES = ("log.jsonl", "config.json", "environment.json")
OF_THE_LAST_STEP = ("results.json", "curves.png", "adaptation.png")


class RunError(RuntimeError):
    """The folder of a run is not as it must be; the message says what to do."""


class Ending(Enum):
    """Why the loop ended."""

    DONE = "all outer steps done"
    TIME = "time limit reached"
    STOPPED = "stopped by a signal"


@dataclass
class StopRequest:
    """Whether SIGINT (Ctrl-C), SIGTERM or SIGHUP has come."""

    requested: bool = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.requested


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """The first Ctrl-C, SIGTERM or SIGHUP asks to stop; a second one ends the program at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if (
        hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    ):  # of a lost terminal; nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a new run; the folder can be written. Nothing is made or changed.

    Raises:
        RunError: there is a run already, or none to resume, or files that a run would replace, or the folder cannot be written.
        CheckpointError: the checkpoint cannot be read.
    """
    path = folder / CHECKPOINT
    if resume and not path.exists():
        raise RunError(
            f"nothing to resume: expected {path}; name the folder of the run with --out, or leave --resume out to start "
            "a new one there"
        )
    if path.exists() and not (resume or overwrite):
        raise RunError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite deletes its checkpoint and log, "
            "--out names another folder"
        )
    if not (resume or overwrite) and (found := _in_the_way(folder)):
        raise RunError(
            f"{folder} has {', '.join(found)} in it but no {CHECKPOINT}: files of something else, or of a run that was killed before its "
            "first checkpoint. A run would replace them; --out names another folder, --overwrite deletes them"
        )
    require_writable(folder)
    return load_checkpoint(path) if resume else None


def require_writable(folder: Path) -> None:
    """Before hours of work, and without leaving a folder behind if something else is wrong.

    Raises:
        RunError: the folder, or the one that it would be made in, cannot be written.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    reason = "" if os.access(nearest, os.W_OK | os.X_OK) else "is read-only, or belongs to somebody else"
    if not nearest.is_dir():
        reason = "is no folder"
    if reason:
        raise RunError(f"{folder} cannot be written: {nearest} {reason}; name another folder with --out")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process trains in the folder. It is made if it is missing. A process that dies leaves no lock behind.

    Raises:
        RunError: another one does, or the folder cannot be made.
    """
    require_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); name another folder with --out") from error
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunError(
            f"{folder} is in use: another process trains there; wait for it, or name another folder with --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def clear_folder(folder: Path) -> None:
    """Remove checkpoint, log, results, figures and TensorBoard events of an earlier run."""
    for name in (CHECKPOINT, *_in_the_way(folder)):
        (folder / name).unlink(missing_ok=True)


def _in_the_way(folder: Path) -> list[str]:
    """Files beside a checkpoint that a new run would replace, or append to."""
    events = sorted(f"{path.parent.name}/{path.name}" for path in (folder / "tensorboard").glob("events.*"))
    return [name for name in (*FILES, *OF_THE_LAST_STEP) if (folder / name).exists()] + events


@contextmanager
def nothing_without_checkpoint(folder: Path) -> Iterator[None]:
    """A new run that fails before its first checkpoint takes its other files with it, which would be in the way of the next attempt."""
    try:
        yield
    except BaseException:
        if not (folder / CHECKPOINT).exists():
            clear_folder(folder)
        raise


def refuse_among_images(config: Config, folder: Path, data_dir: Path | None) -> None:
    """A run may not lie among the images that it reads: the next start would take its folder for a class.

    Raises:
        ConfigError: it would.
    """
    if config.dataset != "folder" or data_dir is None:
        return
    images = expanded(data_dir).resolve()
    if folder.resolve().is_relative_to(images):
        raise ConfigError(
            f"--out: expected a folder outside of the images, whose folders are the classes, got {folder} inside {images}; name another "
            "one with --out"
        )


def check_resumable(old: Config, new: Config) -> list[str]:
    """The settings that a resumed run changes.

    Raises:
        ConfigError: one of them decides what the tasks or the network are.
    """
    changed = changed_fields(old, new)
    refuse_fixed(old, {name: getattr(new, name) for name in changed})
    return changed


def refuse_fixed(old: Config, settings: dict[str, Any]) -> None:
    """Refuse to change what decides what the tasks or the network are.

    Raises:
        ConfigError: one of the settings does.
    """
    fixed = {name: value for name, value in settings.items() if name in FIXED_FIELDS and value != getattr(old, name)}
    if fixed:
        pairs = ", ".join(f"{option_name(name)} is {getattr(old, name)!r}, got {new!r}" for name, new in fixed.items())
        raise ConfigError(
            f"a resumed run keeps its data, tasks and network: {pairs}; leave them out, or start a new run with --out"
        )


def matching_source(checkpoint: Checkpoint, config: Config, *, data_dir: Path | None, download: bool) -> TaskSource:
    """The data of a checkpoint, with the split that is stored in it.

    Raises:
        CheckpointError: the data that were found are others.
        DataError: they were not found.
    """
    try:
        split = Split.from_dict(checkpoint["split"]) if checkpoint["split"] else None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the split in the checkpoint is damaged: {error}") from error
    stored = checkpoint["data_dir"]
    source = load_source(
        config, data_dir=data_dir or (Path(stored) if stored else None), download=download, split=split
    )
    names = list(source.classes.names) if source.classes else None
    if source.key != checkpoint["source_key"] or names != checkpoint["classes"]:
        raise CheckpointError(
            f"the {config.dataset} data found here are not those of the checkpoint (source key {source.key[:12]}, "
            f"expected {str(checkpoint['source_key'])[:12]}), so its held-out classes would not be held out; "
            "name the right ones with --data-dir"
        )
    return source


class Run:
    """One run in a folder: config.json, environment.json, log.jsonl, checkpoint.pt."""

    def __init__(self, trainer: Trainer, folder: Path, *, data_dir: Path | None, log: RunLog, display: Display) -> None:
        self.trainer, self.folder, self.log, self.display = trainer, folder, log, display
        needs_files = trainer.config.needs_files
        self.data_dir = str(expanded(data_dir).resolve()) if data_dir and needs_files else None

    def start(self) -> None:
        """Write what is known before the first step, a first checkpoint included: a disk that cannot be written to fails now. What is
        there of an earlier last step is no longer true, and what a process that was killed was writing is of no use.
        """
        for path in self.folder.glob(f".{CHECKPOINT}.*.tmp"):
            path.unlink(missing_ok=True)
        if self.trainer.progress.step < self.trainer.config.outer_steps:
            for name in OF_THE_LAST_STEP:
                (self.folder / name).unlink(missing_ok=True)
        facts = {**environment(self.trainer.device), **conditions(self.trainer.config)}
        write_json(self.folder / "config.json", self.trainer.config.to_dict())
        write_json(self.folder / "environment.json", facts)
        self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.folder / CHECKPOINT, self.trainer.checkpoint(self.data_dir))

    def loop(self, stop: StopRequest) -> Ending:
        """Train until done, out of time, or asked to stop, and write the checkpoint.

        An error that nobody foresaw leaves the last checkpoint as it is.

        Raises:
            TrainingFailed: too many meta-steps in a row failed.
        """
        try:
            ending = self._loop_until_end(stop)
        except TrainingFailed:
            self._log_step()
            self.save()
            raise
        self.save()
        return Ending.STOPPED if stop() else ending  # the test that follows may take longer than all steps

    def _loop_until_end(self, stop: StopRequest) -> Ending:
        progress, config = self.trainer.progress, self.trainer.config
        zero = time.perf_counter() - progress.seconds
        while True:
            self._evaluate_if_due(stop)
            progress.seconds = time.perf_counter() - zero
            ending = self._ending(stop)
            if ending is not None:
                return ending
            if progress.step and progress.step % config.checkpoint_interval == 0:
                self.save()
            record = self.trainer.meta_step()
            progress.seconds = time.perf_counter() - zero
            self.display.step(progress, record)
            if progress.step % config.log_interval == 0:
                self._log_step()

    def _log_step(self) -> None:
        progress = self.trainer.progress
        self.display.logged(self.log.write("train", progress.step, progress.seconds, self.trainer.summary()))

    def _ending(self, stop: StopRequest) -> Ending | None:
        progress, config = self.trainer.progress, self.trainer.config
        if progress.step >= config.outer_steps:
            return Ending.DONE
        if stop():
            return Ending.STOPPED
        return Ending.TIME if config.minutes and progress.seconds >= 60 * config.minutes else None

    def _evaluate_if_due(self, stop: StopRequest) -> None:
        progress, interval = self.trainer.progress, self.trainer.config.eval_interval
        if not interval or progress.evaluated_at == progress.step or progress.step % interval:
            return
        try:
            result = self.trainer.check_progress(stop)
        except Stopped:
            return  # it is made up for after --resume
        values = {**asdict(result), "step_seconds": round(progress.step_seconds, 3)}
        self.display.evaluated(self.log.write("evaluation", progress.step, progress.seconds, values), result)


def use_threads(config: Config) -> None:
    """Set the number of CPU threads, where the settings name one, and full precision for convolutions on CUDA, as products have it: a
    chunk of one task is made of convolutions, others of products.
    """
    torch.backends.cudnn.allow_tf32 = False
    if config.threads:  # those of a run from a larger machine may be more than this one has
        torch.set_num_threads(min(config.threads, _most_threads()))


def require_threads(settings: dict[str, Any]) -> None:
    """Refuse to be asked for so many threads that the system may not give them, which would break the process.

    Raises:
        ConfigError: they are too many.
    """
    if settings.get("threads", 0) > _most_threads():
        raise ConfigError(f"threads: expected at most {_most_threads()} on this machine, got {settings['threads']}")


def _most_threads() -> int:
    return 4 * (os.cpu_count() or 1)
