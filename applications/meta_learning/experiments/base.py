"""What an experiment is: numbers as JSON first, then a figure and a page that are made from the JSON alone."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from applications.meta_learning.logs import environment, write_atomically

Numbers = dict[str, Any]


class Experiment(ABC):
    """One figure or table. `name` is the stem of its files; `title` and `paper` say what it repeats."""

    name: str
    title: str
    paper: str

    @abstractmethod
    def run(self, *, quick: bool, seed: int) -> Numbers:
        """Measure. `quick`: a minute at most, on the same code paths, with numbers that mean little."""

    @abstractmethod
    def draw(self, result: Numbers, path: Path) -> None:
        """The figure."""

    @abstractmethod
    def findings(self, result: Numbers) -> list[str]:
        """Lines of Markdown: tables, and what agrees with the paper and what does not, with the numbers of the result."""

    def record(self, folder: Path, *, quick: bool, seed: int) -> Path:
        """Run, and write NAME.json, NAME.png and NAME.md to the folder.

        Returns:
            The path of the JSON.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        result = self.run(quick=quick, seed=seed)
        conditions = {"quick": quick, "seed": seed, "environment": environment(torch.device("cpu"))}
        write_atomically(path, json.dumps({**conditions, "result": result}, indent=1) + "\n")
        self.publish(path)
        return path

    def publish(self, path: Path) -> None:
        """Figure and page of numbers that were measured before."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.draw(stored["result"], path.with_suffix(".png"))
        write_atomically(path.with_suffix(".md"), self.page(stored))

    def page(self, stored: Numbers) -> str:
        """The page, in Markdown."""
        e = stored["environment"]
        lines = [
            f"# {self.title}",
            "",
            f"In the paper: {self.paper}",
            "",
            f"![{self.title}]({self.name}.png)",
            "",
            *self.findings(stored["result"]),
            "",
            f"Command: `imaml experiment {self.name.split('_')[0]}{' --quick' if stored['quick'] else ''} --seed {stored['seed']}`. "
            f"Hardware: {e['processor']}, {e['threads']} threads; torch {e['torch']}; commit `{e['commit'][:12]}`.",
            "",
        ]
        if stored["quick"]:
            lines.insert(2, "**A quick run: these numbers show that the code works, and nothing else.**\n")
        return "\n".join(lines)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
