"""`imaml demo`: first-order MAML and iMAML on generated characters, at equal outer steps and at equal time.

Both take their steps in turn, so that whatever else the machine does slows both alike. When the time for this is over,
first-order MAML, whose steps are cheaper, goes on alone until it has had as much time as iMAML.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.data import TaskBatch
from applications.meta_learning.display import PLAIN_SECONDS
from applications.meta_learning.evaluate import Evaluation
from applications.meta_learning.logs import environment, write_json
from applications.meta_learning.method import REGIME, conditions
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import Theta, batched_outputs
from applications.meta_learning.report import comparison_figure, contact_sheet
from applications.meta_learning.run import RunError
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, load_theta

RESULTS, CURVES, TASK = "results.json", "curves.png", "task.png"
UNTRAINED, FIRST_ORDER, IMAML = "untrained", "first-order MAML", "iMAML"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the time is spent.

    seconds: for everything. Training gets what the evaluations leave, the same for both methods.
    tasks, query_shots: of the evaluations in the table. All use the same tasks.
    points, point_tasks: of the curves.
    """

    seconds: float = 270.0
    tasks: int = 300
    query_shots: int = 5
    points: int = 5
    point_tasks: int = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """theta after `step` meta-steps, which took `seconds`."""

    step: int
    seconds: float
    theta: Theta


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A line of the table."""

    method: str
    at: str
    snapshot: Snapshot
    result: Evaluation


def demo_config() -> tuple[Config, Config]:
    """First-order MAML and iMAML: the same settings up to the linear solver."""
    config = preset("glyphs")
    return replace(config, linear="identity", steihaug=False, damping=0.0), config


def refuse_other_files(folder: Path) -> None:
    """A demo replaces what an earlier one left, and nothing else.

    Raises:
        RunError: the folder has files of these names that are none of a demo.
    """
    found = [name for name in (RESULTS, CURVES, TASK) if (folder / name).exists()]
    if found and not _is_a_demo(folder / RESULTS):
        them = "it" if len(found) == 1 else "them"
        raise RunError(
            f"{folder} has {', '.join(found)} in it, and not from an earlier demo; this one would replace {them}. "
            "Name another folder with --out"
        )


def _is_a_demo(path: Path) -> bool:
    try:
        return [row["method"] for row in json.loads(path.read_text())["rows"]][:1] == [UNTRAINED]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def run_demo(first_order: Config, imaml: Config, plan: Plan, folder: Path, console: Console) -> bool:
    """Train both, print the table, write figures and results.json to `folder`.

    Returns:
        Whether both ended above the untrained network.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with console.status("drawing characters ..."):
        source = load_source(imaml)
    arms = {FIRST_ORDER: Trainer(first_order, source), IMAML: Trainer(imaml, source)}
    start = _snapshot(arms[IMAML], 0.0)
    with console.status("testing the untrained network ..."):
        before = time.perf_counter()
        untrained = _test(arms[IMAML], start, plan)
        cost = time.perf_counter() - before
    # what is still to be tested, in units of the test that was just timed; a tenth in reserve for the figures
    tests = 3 + 2 * (plan.points - 1) * plan.point_tasks / plan.tasks
    spent = time.perf_counter() - began
    budget = max(2.0, 0.9 * plan.seconds - spent - tests * cost)
    with _progress(console, budget) as tick:
        snapshots = _train(arms, budget, plan.points, tick)
    equal_steps = next(s for s in snapshots[FIRST_ORDER] if s.step == snapshots[IMAML][-1].step)
    with console.status("testing on held-out characters ..."):
        rows = [
            Row(method=UNTRAINED, at="", snapshot=start, result=untrained),
            _row(arms, FIRST_ORDER, "equal steps", equal_steps, plan),
            _row(arms, FIRST_ORDER, "equal time", snapshots[FIRST_ORDER][-1], plan),
            _row(arms, IMAML, "both", snapshots[IMAML][-1], plan),
        ]
        known = {id(row.snapshot): row.result for row in rows}
        curves = {
            method: [
                (s.step, s.seconds, known.get(id(s)) or _test(arms[method], s, plan, plan.point_tasks))
                for s in [start, *snapshots[method]]
            ]
            for method in arms
        }
    _write(folder, rows, arms[IMAML])  # first: by these results the next demo knows the figures for those of a demo
    comparison_figure(curves, folder / CURVES, f"generated characters, {imaml.ways}-way {imaml.shots}-shot, held out")
    final = {UNTRAINED: start, FIRST_ORDER: snapshots[FIRST_ORDER][-1], IMAML: snapshots[IMAML][-1]}
    _draw_task(arms[IMAML], final, folder / TASK)
    seconds = time.perf_counter() - began
    console.print(_table(rows))
    for line in verdict(rows):
        console.print(line, highlight=False)
    console.print(
        f"Figures ({CURVES}, {TASK}) and {RESULTS}: {folder}. All of it took {seconds:.0f} s.",
        markup=False,
        highlight=False,
        soft_wrap=True,  # a name that is cut cannot be copied
    )
    return all(row.result.mean > untrained.mean for row in rows[1:])


def _train(
    arms: dict[str, Trainer], budget: float, points: int, tick: Callable[[dict[str, Arm]], None]
) -> dict[str, list[Snapshot]]:
    """Train both for `budget` seconds together; theta at about `points` equal times, and where they are compared."""
    runs = {name: Arm(trainer=trainer) for name, trainer in arms.items()}
    first_order, imaml = runs[FIRST_ORDER], runs[IMAML]
    while imaml.seconds + max(imaml.seconds, first_order.seconds) < budget:
        for run in runs.values():
            run.step()
            run.snapshot_if_due(0.5 * budget / points)
        tick(runs)
    first_order.snapshot()
    imaml.snapshot()
    while first_order.seconds < imaml.seconds:
        first_order.step()
        first_order.snapshot_if_due(0.5 * budget / points)
        tick(runs)
    first_order.snapshot()
    return {name: run.snapshots for name, run in runs.items()}


@dataclass(kw_only=True, eq=False)
class Arm:
    """One of the two runs."""

    trainer: Trainer
    seconds: float = 0.0
    snapshots: list[Snapshot] = field(default_factory=list)

    def step(self) -> None:
        """One meta-step, timed."""
        before = time.perf_counter()
        self.trainer.meta_step()
        self.seconds += time.perf_counter() - before

    def snapshot(self) -> None:
        """Keep theta, once per step."""
        if not self.snapshots or self.snapshots[-1].step != self.trainer.progress.step:
            self.snapshots.append(_snapshot(self.trainer, self.seconds))

    def snapshot_if_due(self, interval: float) -> None:
        """Keep theta when this much time has passed since the last one."""
        if self.seconds >= interval + (self.snapshots[-1].seconds if self.snapshots else 0.0):
            self.snapshot()


def _snapshot(trainer: Trainer, seconds: float) -> Snapshot:
    theta = {name: leaf.clone() for name, leaf in trainer.theta.items()}
    return Snapshot(step=trainer.progress.step, seconds=seconds, theta=theta)


def _row(arms: dict[str, Trainer], method: str, at: str, snapshot: Snapshot, plan: Plan) -> Row:
    return Row(method=method, at=at, snapshot=snapshot, result=_test(arms[method], snapshot, plan))


def _test(trainer: Trainer, snapshot: Snapshot, plan: Plan, tasks: int | None = None) -> Evaluation:
    load_theta(trainer.theta, snapshot.theta)
    return trainer.test(tasks=tasks or plan.tasks, query_shots=plan.query_shots, seed=trainer.config.seed)


def _table(rows: list[Row]) -> Table:
    table = Table(
        title="held-out characters", caption=f"{rows[0].result.tasks} tasks, 95 % intervals; batch norm: {REGIME}"
    )
    for heading in ("", "compared at", "outer steps", "seconds", "accuracy"):
        table.add_column(heading, justify="left" if heading in ("", "compared at") else "right")
    for row in rows:
        table.add_row(row.method, row.at, str(row.snapshot.step), f"{row.snapshot.seconds:.0f}", str(row.result))
    return table


def verdict(rows: list[Row]) -> list[str]:
    """One sentence for equal steps and one for equal time, whichever method wins."""
    (imaml,) = (row for row in rows if row.method == IMAML)
    lines = []
    for at in ("equal steps", "equal time"):
        (other,) = (row for row in rows if row.method == FIRST_ORDER and row.at == at)
        ahead, behind = sorted((imaml, other), key=lambda row: row.result.mean, reverse=True)
        gap = 100 * (ahead.result.mean - behind.result.mean)
        apart = ahead.result.mean - ahead.result.interval > behind.result.mean + behind.result.interval
        intervals = "are apart" if apart else "overlap"
        lines.append(f"At {at}: {ahead.method} is ahead by {gap:.1f} points; the intervals {intervals}.")
    return lines


def _draw_task(trainer: Trainer, final: dict[str, Snapshot], path: Path) -> None:
    """One held-out task with the answers of each network after adaptation."""
    config = trainer.config
    data: TaskBatch = trainer.source.sampler(
        config, held_out=True, query_shots=2, seed=config.seed + 1, device=trainer.device
    ).sample(1)
    predictions = {}
    for method, snapshot in final.items():
        result = bilevel.solve(trainer.method.problem, snapshot.theta, data, solver=trainer.method.solver, batched=True)
        predictions[method] = batched_outputs(trainer.module, result.value, data["query"]["x"])[0].argmax(-1)
    support, query = ((data[part]["x"][0], data[part]["y"][0]) for part in ("support", "query"))
    contact_sheet(support, query, predictions, path, "One task with characters never seen in training")


def _write(folder: Path, rows: list[Row], trainer: Trainer) -> None:
    table = [
        {
            "method": row.method,
            "at": row.at,
            "step": row.snapshot.step,
            "seconds": row.snapshot.seconds,
            **asdict(row.result),
        }
        for row in rows
    ]
    write_json(
        folder / RESULTS,
        {
            "rows": table,
            "config": trainer.config.to_dict(),
            "conditions": conditions(trainer.config),
            "environment": environment(trainer.device),
        },
    )


class _PlainLines:
    """Where there is no terminal: a line now and then, so that nobody takes minutes of work for a standstill."""

    def __init__(self, console: Console, budget: float) -> None:
        self._console, self._budget, self._began = console, budget, time.monotonic()
        self._last = self._began
        self._print(f"training {FIRST_ORDER} and {IMAML} in turn for {budget:.0f} s ...")

    def __call__(self, runs: dict[str, Arm]) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            steps = ", ".join(f"{method} step {run.trainer.progress.step}" for method, run in runs.items())
            self._print(f"{now - self._began:.0f} of {self._budget:.0f} s: {steps}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console, budget: float) -> Iterator[Callable[[dict[str, Arm]], None]]:
    if not console.is_terminal:
        yield _PlainLines(console, budget)
        return
    name, steps = TextColumn("{task.description:<18}"), TextColumn("step {task.fields[step]}")
    with Progress(name, BarColumn(bar_width=None), steps, TimeElapsedColumn(), console=console, expand=True) as bar:
        tasks = {method: bar.add_task(method, total=budget / 2, step=0) for method in (FIRST_ORDER, IMAML)}

        def tick(runs: dict[str, Arm]) -> None:
            for method, run in runs.items():
                bar.update(tasks[method], completed=run.seconds, step=run.trainer.progress.step)

        yield tick
