"""A training run as a part of an experiment: it goes on from its checkpoint when the experiment is started again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config
from applications.meta_learning.display import Display
from applications.meta_learning.evaluate import Protocol
from applications.meta_learning.experiments.base import Numbers, Request
from applications.meta_learning.logs import RunLog, environment, read_log
from applications.meta_learning.run import CHECKPOINT, Ending, Run, matching_source, stop_on_signals, use_threads
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, TrainingFailed

CURVE = ("step", "seconds", "step_seconds", "mean", "interval")
TRACE = ("step", "loss", "inner_residual", "linear_residual", "negative_curvature", "failed")


class Trained(NamedTuple):
    """A run that has ended: the trainer as it is then, the entries of the log, and why it gave up, if it did."""

    trainer: Trainer
    entries: list[dict[str, Any]]
    failure: str | None


def train(request: Request, name: str, config: Config) -> Trained:
    """Train with these settings in a folder of this name among the parts, from the checkpoint there if there is one.

    Raises:
        KeyboardInterrupt: it was stopped; the checkpoint is written.
    """
    folder = request.parts / name
    folder.mkdir(parents=True, exist_ok=True)
    use_threads(config)
    trainer, data_dir = _trainer(config, folder / CHECKPOINT, request.data_dir)
    failure = None
    with (
        stop_on_signals() as stop,
        RunLog(folder, at_step=trainer.progress.step, tensorboard=False) as log,
        Display(request.console, config, start=trainer.progress.step, title=name) as display,
    ):
        run = Run(trainer, folder, data_dir=data_dir, log=log, display=display)
        run.start()
        try:
            if run.loop(stop) is Ending.STOPPED:
                raise KeyboardInterrupt
        except TrainingFailed as error:
            failure = str(error)
    return Trained(trainer, read_log(folder / "log.jsonl"), failure)


def trained(request: Request, name: str, config: Config, protocols: tuple[Protocol, ...], trace_every: int) -> Numbers:
    """What there is to say of the run of these settings: its curve, what it met, and its final tests.

    Raises:
        KeyboardInterrupt: as :func:`train`.
    """
    trainer, entries, failure = train(request, name, config)
    tests = {
        p.name: asdict(trainer.test(tasks=p.tasks, query_shots=p.query_shots or config.shots, seed=config.seed))
        for p in protocols
    }
    progress = trainer.progress
    return {
        "config": config.to_dict(),
        "environment": {key: value for key, value in environment(trainer.device).items() if key != "command"},
        "steps": progress.step,
        "tasks": progress.tasks,
        "failed_tasks": progress.failed_tasks,
        "negative_tasks": progress.negative_tasks,
        "skipped_steps": progress.skipped_steps,
        "seconds": progress.seconds,
        "step_seconds": progress.step_seconds,
        "failure": failure,
        "tests": tests,
        "curve": [{key: e[key] for key in CURVE} for e in entries if e["kind"] == "evaluation"],
        "trace": [
            {key: e[key] for key in TRACE} for e in entries if e["kind"] == "train" and e["step"] % trace_every == 0
        ],
    }


def _trainer(config: Config, checkpoint: Path, data_dir: Path | None) -> tuple[Trainer, Path | None]:
    if not checkpoint.exists():
        return Trainer(config, load_source(config, data_dir=data_dir)), data_dir
    stored = load_checkpoint(checkpoint)
    trainer = Trainer(config, matching_source(stored, config, data_dir=data_dir, download=False))
    trainer.restore(stored)
    return trainer, data_dir or (Path(stored["data_dir"]) if stored["data_dir"] else None)
