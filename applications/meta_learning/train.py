"""Meta-training: the outer loop around the meta-gradient of an algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from applications.meta_learning.checkpoint import FORMAT, VERSION, Checkpoint, CheckpointError
from applications.meta_learning.config import Config, ConfigError
from applications.meta_learning.data import Sampler
from applications.meta_learning.evaluate import Evaluation, accuracy, adaptation_curve, evaluate
from applications.meta_learning.method import build_method, build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.problem import batched_outputs
from applications.meta_learning.step import NAMES, Found, MetaStep, describe
from applications.meta_learning.tasks import TaskSource, device_of, dtype_of
from bilevel import CapturedStep

Record = dict[str, float]


class TrainingFailed(RuntimeError):
    """Too many meta-steps in a row had no usable task; the message says what to change."""


@dataclass(kw_only=True)
class Progress:
    """Where a run is, and what it has met so far.

    seconds: time in the outer loop, evaluations and checkpoints included.
    step_seconds: time in the meta-steps alone; on the CPU that of the processor, so that other programs beside it do not count.
    window: records of the meta-steps since the last line of the log.
    best: highest mean of an evaluation during training (lowest error). For information: nothing is selected by it.
    """

    step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    tasks: int = 0
    failed_tasks: int = 0
    negative_tasks: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    evaluated_at: int = -1
    best: float | None = None
    best_step: int | None = None
    window: list[Record] = field(default_factory=list)


class Trainer:
    """The state of one run: theta, Adam, the stream of tasks, and `progress`. A call of `meta_step` is one outer step.

    captured_step: what captures a step in the place of `bilevel.CapturedStep`, for tests.

    Raises:
        ConfigError: the settings fit neither the data nor this machine.
    """

    def __init__(self, config: Config, source: TaskSource, *, captured_step: type[CapturedStep] | None = None) -> None:
        self.config, self.source = config, source
        self.device = device_of(config)
        self.module: nn.Module = build_network(config).to(device=self.device, dtype=dtype_of(config))
        self.method = build_method(config, self.module)
        self.theta = initial_theta(self.module, dtype_of(config), self.device)
        self.sampler = source.sampler(
            config, held_out=False, query_shots=config.query_shots, seed=config.seed, device=self.device
        )
        self.step = MetaStep(config, self.method, self.theta, self.device, captured_step)
        self.outer = self.step.outer
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.step.rates, _rate_factor(config))
        self.progress = Progress()
        self.last_failure = ""
        self._unread: list[Found] = []
        self._last: Record = {}

    def meta_step(self) -> Record:
        """Draw tasks, take their meta-gradient and let Adam step along it.

        Tasks that failed are left out of the mean. Where all failed, theta and Adam stay as they are.

        Returns:
            The numbers of this step. Where steps are captured they are read every `log_interval` steps, so that nobody waits for a
            step in between, and these are those of the last step that was read.

        Raises:
            TrainingFailed: that was the last of `max_failed_steps` such steps in a row.
        """
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        started = clock()
        data = self.sampler.sample(self.config.meta_batch)
        found = self.step(data)
        self.progress.step += 1
        if self._logs_this_step and not self.config.is_regression:  # a forward pass more
            outputs = batched_outputs(self.module, found["phi"], data["query"]["x"])
            share = accuracy(outputs, data["query"]["y"])  # of NaN it would be that of the first class
            share = torch.where(outputs.isfinite().flatten(1).all(1), share, torch.nan).nanmean(0, keepdim=True)
            found["numbers"] = torch.cat([found["numbers"], share])
        del found["phi"]
        self._unread.append(found)
        if self.step.is_deferred:
            self.schedule.step()
        if not self.step.is_deferred or self._logs_this_step or not self._last:
            self._read()
        self.progress.step_seconds += clock() - started
        if self.progress.skipped_in_a_row >= self.config.max_failed_steps:
            raise TrainingFailed(self._explain_failure())
        return self._last

    def _read(self) -> None:
        """Wait for the steps so far, and count what they met."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        numbers = iter(torch.cat([found["numbers"] for found in unread]).tolist())  # one wait for the device
        skipped = 0
        for found in unread:
            own = [next(numbers) for _ in range(len(found["numbers"]))]
            record = self._last = dict(zip(NAMES, own, strict=False))
            record["tasks"] = self.config.meta_batch  # a resumed run may have another
            self.progress.tasks += self.config.meta_batch
            self.progress.failed_tasks += self.config.meta_batch - int(record["ok_tasks"])
            self.progress.negative_tasks += int(record["negative_tasks"])
            self.progress.window.append(record)
            if record["ok_tasks"]:
                self.progress.skipped_in_a_row = 0
                if not self.step.is_deferred:
                    self.schedule.step()
            else:
                skipped += 1
                self.progress.skipped_steps += 1
                self.progress.skipped_in_a_row += 1
                self.last_failure = describe(found)
        if self.step.is_deferred and skipped:  # they did not count, which nobody knew
            self.schedule.last_epoch -= skipped
            self._set_outer_options()

    @property
    def _logs_this_step(self) -> bool:
        return self.progress.step % self.config.log_interval == 0

    def _explain_failure(self) -> str:
        return (
            f"{self.progress.skipped_in_a_row} meta-steps in a row had no task with a usable gradient; "
            f"theta is what it was before them. The last one:\n{self.last_failure}\n{self._advice()}"
        )

    def _advice(self) -> str:
        """What may help, of what is not so already."""
        config = self.config
        has_matrix = config.algorithm == "imaml" and config.linear != "identity"
        helpful = [
            (
                "--curvature gauss-newton (it cannot meet negative curvature)",
                has_matrix and config.curvature == "hessian",
            ),
            ("a larger --lam", config.lam > 0),
            ("--damping 1", has_matrix and config.damping < 1),
            (
                "--steihaug",
                has_matrix and config.linear == "cg" and not config.steihaug and config.curvature == "hessian",
            ),
            (
                "a smaller --inner-step-size, or 0, which finds one for every task",
                config.inner != "newton-cg" and config.inner_step_size > 0,
            ),
        ]
        found = [words for words, may in helpful if may]
        advice = (
            f"What helps, in this order: {'; '.join(found)}. Add it to --resume to go on from here. " if found else ""
        )
        return advice + "If the loss rose before that, theta itself has run away: begin anew with a lower --outer-rate."

    def test(
        self, *, tasks: int, query_shots: int, seed: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """Adapt theta to tasks of held-out classes; a seed stands for the same tasks every time.

        Raises:
            Stopped: `should_stop` became true.
        """
        return evaluate(
            self.method.problem,
            self.module,
            self.theta,
            self._held_out(query_shots, seed),
            solver=self.method.solver,
            tasks=tasks,
            query_shots=query_shots,
            chunk_size=self.step.algorithm.chunk_size,  # as many as the memory held in training
            should_stop=should_stop,
        )

    def test_over_inner_steps(self, *, tasks: int, query_shots: int, seed: int) -> list[tuple[int, Evaluation]]:
        """The same after 1, 2, 3, ... inner steps."""
        return adaptation_curve(
            self.method.problem,
            self.module,
            self.theta,
            lambda: self._held_out(query_shots, seed),
            solver=self.method.solver,
            tasks=tasks,
            query_shots=query_shots,
            chunk_size=self.step.algorithm.chunk_size,  # as many as the memory held in training
        )

    def _held_out(self, query_shots: int, seed: int) -> Sampler:
        return self.source.sampler(self.config, held_out=True, query_shots=query_shots, seed=seed, device=self.device)

    def require_tests(self, *, final: bool) -> None:
        """Before hours of training: the evaluations on the way, and the final one in the paper's protocol, can be drawn.

        Raises:
            ConfigError: the held-out classes are too few, or have too few images.
        """
        config = self.config
        if config.eval_interval:
            self._held_out(config.eval_query_shots, config.seed)
        if final:
            try:
                self._held_out(config.shots, config.seed)
            except ConfigError as error:
                raise ConfigError(f"final test: {error}, or leave that test out with --no-final-test") from error

    def check_progress(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """The short evaluation during training. It is watched, not used: nothing is selected by it.

        Raises:
            Stopped: `should_stop` became true.
        """
        config = self.config
        result = self.test(
            tasks=config.eval_tasks, query_shots=config.eval_query_shots, seed=config.seed, should_stop=should_stop
        )
        best, better = self.progress.best, min if result.metric == "mse" else max
        if math.isfinite(result.mean) and (best is None or better(best, result.mean) != best):
            self.progress.best, self.progress.best_step = result.mean, self.progress.step
        self.progress.evaluated_at = self.progress.step
        return result

    def summary(self) -> Record:
        """Means over the meta-steps since the last call, for one line of the log."""
        self._read()
        window, self.progress.window = self.progress.window, []
        tasks = sum(record.get("tasks", self.config.meta_batch) for record in window)
        failed = tasks - sum(record["ok_tasks"] for record in window)
        return {
            "loss": _mean(window, "loss"),
            "accuracy": _mean(window, "accuracy"),
            "inner_residual": _mean(window, "inner_residual"),
            "linear_residual": _mean(window, "linear_residual"),
            "negative_curvature": sum(record["negative_tasks"] for record in window) / max(1, tasks),
            "failed": failed / max(1, tasks),
            "skipped_steps": self.progress.skipped_steps,
            "rate": self.step.rate,
        }

    def checkpoint(self, data_dir: str | None) -> Checkpoint:
        """Everything that `restore` needs to go on as if nothing had happened."""
        self._read()
        source = self.source
        return {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "theta": {name: leaf.detach() for name, leaf in self.theta.items()},
            "outer": self.step.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "sampler": self.sampler.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": asdict(self.progress),
            "split": source.split.to_dict() if source.split else None,
            "classes": list(source.classes.names) if source.classes else None,
            "source_key": source.key,
            "data_dir": data_dir,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same data, network and tasks.

        Raises:
            CheckpointError: it belongs to other data or another network, or is damaged.
        """
        try:
            load_theta(self.theta, checkpoint["theta"])
            self.step.load_state_dict(checkpoint["outer"])
            self.schedule.load_state_dict({**checkpoint["schedule"], "lr_lambdas": [None]})
            self.sampler.load_state_dict(checkpoint["sampler"])
            torch.set_rng_state(checkpoint["rng"])
            self.progress = Progress(**checkpoint["progress"])
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"this checkpoint does not fit the run: {error}") from error
        self.progress.skipped_in_a_row = 0
        self._set_outer_options()

    def changed_rate(self, changes: Sequence[Mapping[str, Any]]) -> str:
        """What changed settings make of the rate that the schedule had come to; nothing where they change nothing."""
        before = replace(self.config, **{change["setting"]: change["from"] for change in changes})
        then, now = (c.outer_rate * _rate_factor(c)(self.schedule.last_epoch) for c in (before, self.config))
        if then == now:
            return ""
        schedule = f"{self.config.schedule} over {self.config.outer_steps} steps"
        return f"outer rate at this step: {then:.3g} -> {now:.3g} (schedule: {schedule})"

    def _set_outer_options(self) -> None:
        """The loaded state has the old rate and epsilon in it; a resumed run may have been given others."""
        self.schedule.base_lrs = [self.config.outer_rate]
        rate = self.config.outer_rate * _rate_factor(self.config)(self.schedule.last_epoch)
        self.step.set_options(rate=rate, eps=self.config.outer_eps, weight_decay=self.config.weight_decay)


def load_theta(theta: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Copy stored parameters into theta.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    expected = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in theta.items()}
    found = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in stored.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"expected the parameters of the network that the settings describe, got others for {', '.join(wrong)}: "
            f"{expected.get(wrong[0])} expected, {found.get(wrong[0])} found"
        )
    for name, leaf in theta.items():
        leaf.copy_(stored[name])


def _rate_factor(config: Config) -> Callable[[int], float]:
    def factor(step: int) -> float:
        left = max(0.0, 1 - step / config.outer_steps)
        if config.schedule == "linear":
            return left
        return 0.5 * (1 - math.cos(math.pi * left)) if config.schedule == "cosine" else 1.0

    return factor


def _mean(window: list[Record], name: str) -> float:
    values = [record[name] for record in window if math.isfinite(record.get(name, math.nan))]
    return sum(values) / len(values) if values else math.nan
