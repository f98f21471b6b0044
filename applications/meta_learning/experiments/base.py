"""What an experiment is: numbers as JSON first, then a figure and a page that are made from the JSON alone."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from applications.meta_learning.logs import environment, provenance, write_atomically, write_json
from applications.meta_learning.run import RunError

Numbers = dict[str, Any]

CLAIM = "measured-with.json"  # beside the parts: what they are of


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an experiment.

    quick: a minute at most, on the same code paths, with numbers that mean little.
    data_dir: folder of the real Omniglot. None: those that need images take generated characters, and the page says so.
    parts: folder for the parts of a long experiment that are done.
    only: the one part to measure, of an experiment whose parts are runs of their own (E4). None: all.
    console: where progress is shown.
    """

    quick: bool
    seed: int
    data_dir: Path | None
    parts: Path
    only: str | None = None
    console: Console = field(default_factory=lambda: Console(quiet=True))

    def part(self, name: str, measure: Callable[[], Numbers], *, spinner: bool = True) -> Numbers:
        """The numbers of this part: those on disk if an interrupted run had come so far, else measured now and kept.

        spinner: False where `measure` shows its progress itself.
        """
        path = self.parts / f"{name}.json"
        if not path.exists():
            with self.console.status(name) if spinner else nullcontext():
                numbers = measure()
            self.parts.mkdir(parents=True, exist_ok=True)
            write_json(path, numbers)
        return read_numbers(path)


def read_numbers(path: Path) -> Numbers:
    """A JSON file of numbers.

    Raises:
        RunError: it is damaged.
    """
    reason: object = "no table"
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        found, reason = None, error
    if not isinstance(found, dict):
        raise RunError(
            f"{path}: expected the numbers of an experiment in JSON ({reason}); delete it, or name another --out"
        )
    return found


class Experiment(ABC):
    """One figure or table. `name` is the stem of its files; `title` and `paper` say what it repeats."""

    name: str
    title: str
    paper: str
    cells: tuple[str, ...] = ()  # names of the parts that can be asked for one by one
    uses_gpu = False  # where there is one

    @abstractmethod
    def run(self, request: Request) -> Numbers:
        """Measure. What takes minutes goes through `request.part`, so that an interrupted run can go on."""

    @abstractmethod
    def draw(self, result: Numbers, path: Path) -> None:
        """The figure."""

    @abstractmethod
    def findings(self, result: Numbers) -> list[str]:
        """Lines of Markdown: tables, and what agrees with the paper and what does not, with the numbers of the result."""

    def record(
        self,
        folder: Path,
        *,
        quick: bool,
        seed: int,
        data_dir: Path | None = None,
        only: str | None = None,
        console: Console | None = None,
    ) -> Path:
        """Run, or go on with an interrupted run, and write NAME.json, NAME.png and NAME.md to the folder; where there are cells, after
        each of them.

        Returns:
            The path of the JSON.
        """
        if self.cells and only is None and not quick:
            for name in self.cells:
                path = self.record(folder, quick=quick, seed=seed, data_dir=data_dir, only=name, console=console)
            return path
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        if quick and path.exists() and read_numbers(path).get("quick") is False:
            raise RunError(
                f"{path} has the numbers of a whole run, which --quick would replace; name another folder with --out"
            )
        parts = folder / f"{self.name}.parts" / f"{'quick-' if quick else ''}seed-{seed}"
        console = console or Console(quiet=True)
        request = Request(quick=quick, seed=seed, data_dir=data_dir, parts=parts, only=only, console=console)
        if not self.cells:  # the runs of cells know their own settings
            self._claim(parts, data_dir)
        result = self.run(request)
        device = torch.device("cuda" if self.uses_gpu and torch.cuda.is_available() else "cpu")
        facts = {**environment(device), "command": self.command(quick, seed, result)}
        conditions = {"quick": quick, "seed": seed, "environment": facts}
        write_json(path, {**conditions, "result": result})
        self.publish(path)
        if quick or not self.cells:  # the runs of cells are kept: they have the checkpoints
            shutil.rmtree(parts, ignore_errors=True)
            if parts.parent.exists() and not any(parts.parent.iterdir()):  # those of other runs stay
                parts.parent.rmdir()
        return path

    def _claim(self, parts: Path, data_dir: Path | None) -> None:
        """Parts on disk are not measured again, so they have to be of the same data and of the same code.

        Raises:
            RunError: they are not.
        """
        source = inspect.getsource(inspect.getmodule(type(self)))  # type: ignore[arg-type]  # it has one
        mine = {
            "data": "generated" if data_dir is None else "real",
            "code": hashlib.sha256(source.encode()).hexdigest()[:16],
        }
        path = parts / CLAIM
        if not any(parts.glob("*")):
            parts.mkdir(parents=True, exist_ok=True)
            write_json(path, mine)
        found = read_numbers(path) if path.exists() else {}
        if changed := [name for name in mine if found.get(name) != mine[name]]:
            raise RunError(
                f"{parts} holds parts of an interrupted run with other {' and '.join(changed)}, which cannot go on with these. Move "
                "it away to measure again, or name another --out"
            )

    def publish(self, path: Path) -> None:
        """Figure and page of numbers that were measured before."""
        stored = read_numbers(path)
        self.draw(stored["result"], path.with_suffix(".png"))
        write_atomically(path.with_suffix(".md"), self.page(stored))

    def command(self, quick: bool, seed: int, result: Numbers) -> str:
        """What to type for these numbers, as anybody would: without the folders of this machine."""
        images = result.get("conditions", {}).get("images", "") + result.get("dataset", "")
        data = " --data-dir OMNIGLOT" if "omniglot" in images.lower() else ""
        return f"imaml experiment {self.name}{' --quick' if quick else ''} --seed {seed}{data}"

    def sources(self, stored: Numbers) -> str:
        """The hardware, the versions and the commit."""
        return provenance(stored["environment"])

    def page(self, stored: Numbers) -> str:
        """The page, in Markdown."""
        lines = [
            f"# {self.title}",
            "",
            f"In the paper: {self.paper}",
            "",
            f"![{self.title}]({self.name}.png)",
            "",
            *self.findings(stored["result"]),
            "",
            f"Command: `{self.command(stored['quick'], stored['seed'], stored['result'])}`. {self.sources(stored)}.",
            "",
        ]
        if stored["quick"]:
            lines.insert(2, "**A quick run: these numbers show that the code works, and nothing else.**\n")
        return "\n".join(lines)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
