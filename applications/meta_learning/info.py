"""What is told about presets, this machine, and checkpoints."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import bilevel
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config
from applications.meta_learning.options import out
from applications.meta_learning.presets import PRESETS, describe
from applications.meta_learning.train import Trainer


def print_presets() -> None:
    """All presets, one line each."""
    table = Table(title="presets (imaml train --preset NAME)")
    for heading in ("name", "what", "outer steps"):
        table.add_column(heading, justify="right" if heading == "outer steps" else "left")
    for name, config in PRESETS.items():
        table.add_row(name, describe(name), f"{config.outer_steps:,}")
    out.print(table)


def print_environment() -> None:
    """What runs here."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    rows = [
        ("bilevel", bilevel.__version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {cuda}"),
        ("python", f"{platform.python_version()}, {sys.platform}"),
    ]
    out.print(two_columns("this machine", rows))


def print_checkpoint(path: Path) -> None:
    """What is in a checkpoint."""
    stored = load_checkpoint(path)
    progress, config = stored["progress"], Config.from_dict(stored["config"])
    best = "none" if progress["best"] is None else f"{progress['best']:.4g} at step {progress['best_step']}"
    counts = (
        f"{progress['tasks']}, {progress['failed_tasks']} failed, {progress['negative_tasks']} with negative curvature"
    )
    rows = [
        ("step", f"{progress['step']} of {config.outer_steps}"),
        ("time", f"{progress['seconds'] / 60:.1f} min"),
        ("best evaluation during training", f"{best} (nothing is selected by it)"),
        (
            "tasks",
            counts,
        ),
        ("skipped meta-steps", progress["skipped_steps"]),
        ("parameters", f"{sum(leaf.numel() for leaf in stored['theta'].values()):,}"),
        ("data", f"{config.dataset}, source key {stored['source_key'][:16]}"),
    ]
    if stored["split"]:
        split = stored["split"]
        rows.append(
            ("split", f"{split['name']}: {len(split['train'])} classes for training, {len(split['test'])} held out")
        )
    out.print(two_columns(str(path), rows))
    out.print(two_columns("settings", list(config.to_dict().items())))


def two_columns(title: str, rows: list[tuple[str, Any]]) -> Table:
    """Names and values."""
    table = Table(title=escape(title), show_header=False)
    for name, value in rows:
        table.add_row(name, escape(str(value)))
    return table


def counts_table(trainer: Trainer) -> Table:
    """What a run has met."""
    progress = trainer.progress
    share = 100 / max(1, progress.tasks)
    return two_columns(
        "this run",
        [
            ("outer steps", progress.step),
            ("time", f"{progress.seconds / 60:.1f} min"),
            ("tasks", progress.tasks),
            ("tasks with negative curvature", f"{progress.negative_tasks} ({share * progress.negative_tasks:.2f} %)"),
            ("failed tasks", f"{progress.failed_tasks} ({share * progress.failed_tasks:.2f} %)"),
            ("skipped meta-steps", progress.skipped_steps),
        ],
    )
