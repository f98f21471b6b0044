"""What is seen while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from applications.meta_learning.config import Config
from applications.meta_learning.evaluate import Evaluation
from applications.meta_learning.logs import Entry
from applications.meta_learning.train import Progress as RunProgress
from applications.meta_learning.train import Record

PLAIN_SECONDS = 30.0  # between two lines where there is no terminal
GROWN = 8  # times the least that an inner solve of this run has left of its gradient: then it is said
SHARES = (("tasks with negative curvature", "negative_curvature"), ("failed tasks", "failed"))


class Display:
    """Shows steps, means of the last steps, and evaluations. A context manager; outside of it nothing is shown live."""

    def __init__(self, console: Console, config: Config, *, start: int = 0, title: str = "training") -> None:
        self.console, self.config = console, config
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=config.outer_steps, completed=start)
        self._status, self._test = Text("first meta-step ..."), Text("")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
        self._last_line = -PLAIN_SECONDS
        self._logged = self._warned = False
        self._least = math.inf

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def step(self, progress: RunProgress, record: Record) -> None:
        """A meta-step was done."""
        self._bar.update(self._task, completed=progress.step)
        if not self._logged:
            self._status = Text(f"loss {record['loss']:.3f}")

    def logged(self, entry: Entry) -> None:
        """A line of the log was written."""
        self._logged = True
        words = self._describe(entry)
        self._status = Text("\n".join(words))
        self._watch(entry)
        if not self.console.is_terminal and time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._print_plain(entry["step"], entry["seconds"], "  ".join(words))

    def _watch(self, entry: Entry) -> None:
        """Say once that the inner solves get worse: accuracy falls long after the meta-gradient has become wrong."""
        residual = entry["inner_residual"]
        self._least = min(self._least, residual)
        # beside the loss, which tells a large remainder from the rounding of a solve that is done
        grown = residual > GROWN * self._least and residual > entry["loss"]
        if grown and self.config.algorithm == "imaml" and not self._warned:
            self._warned = True
            self.console.print(
                f"step {entry['step']}: the inner solves leave |dG/dphi| = {residual:.2g}, {residual / self._least:.0f} times their least. "
                "The implicit gradient is right where they end at a solution; raise --inner-steps (with "
                "--inner-tol a task that is solved takes no more), or lower --outer-rate.",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )

    def evaluated(self, entry: Entry, result: Evaluation) -> None:
        """An evaluation on held-out classes was done."""
        failed = f", {result.failed} failed" if result.failed else ""
        words = f"held-out {result.metric} {result} ({result.tasks} tasks{failed})"
        self._test = Text(f"step {entry['step']}: {words}", style="bold")
        if not self.console.is_terminal:
            self._print_plain(entry["step"], entry["seconds"], words)

    def _render(self) -> Group:
        return Group(self._bar, self._status, self._test)

    def _describe(self, entry: Entry) -> tuple[str, str]:
        accuracy = "" if self.config.is_regression else f"  accuracy {100 * entry['accuracy']:.1f} %"
        shares = (f"{words} {100 * entry[name]:.1f} %" for words, name in SHARES)
        return f"loss {entry['loss']:.3f}{accuracy}  |dG/dphi| {entry['inner_residual']:.2g}", "  ".join(shares)

    def _print_plain(self, step: int, seconds: float, words: str) -> None:
        line = f"step {step}/{self.config.outer_steps}  {seconds / 60:.1f} min  {words}"
        self.console.print(line, highlight=False, soft_wrap=True)
