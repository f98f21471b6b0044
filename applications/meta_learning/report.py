"""Tables and figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files; there may be no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from rich.table import Table
from rich.text import Text
from torch import Tensor

from applications.meta_learning.evaluate import Evaluation
from applications.meta_learning.logs import Entry
from applications.meta_learning.method import REGIME
from applications.meta_learning.predict import Prediction

TRAIN, TEST = "#4477aa", "#cc3311"  # told apart by colour-blind readers too
PALETTE = ("#4477aa", "#cc3311", "#228833", "#aa3377")
STYLE: Any = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def evaluation_table(rows: list[tuple[str, Evaluation]], title: str) -> Table:
    """One row per evaluation."""
    caption = [f"batch norm: {REGIME}"] if rows[0][1].metric == "accuracy" else []
    if any(result.failed for _, result in rows):
        caption.append("a failed task counts as 0 %" if caption else "failed tasks are in no mean")
    table = Table(title=title, caption="; ".join(caption) or None)
    table.add_column("")
    table.add_column(
        "accuracy, 95 % interval" if rows[0][1].metric == "accuracy" else "mean squared error", justify="right"
    )
    for heading in ("tasks", "queries", "failed", "|dG/dphi|"):
        table.add_column(heading, justify="right")
    for name, result in rows:
        table.add_row(
            name,
            str(result),
            str(result.tasks),
            str(result.query_shots),
            str(result.failed),
            f"{result.inner_residual:.2g}",
        )
    return table


def prediction_table(found: Prediction) -> Table:
    """A row for each image."""
    title = f"{len(found.classes)} classes, {found.shots} support image{'s' * (found.shots > 1)} of each"
    table = Table(title=title)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for file, label, row in zip(found.files, found.labels, found.probabilities, strict=True):
        table.add_row(Text(str(file)), Text(label), f"{row.max().item():.3f}")  # Text: a name may have brackets
    return table


def training_figure(entries: list[Entry], path: Path, title: str) -> None:
    """Accuracy (or error) over outer steps and over minutes, loss, inner residual, and share of negative curvature."""
    train = [entry for entry in entries if entry["kind"] == "train"]
    tests = [entry for entry in entries if entry["kind"] == "evaluation"]
    if not train and not tests:
        return
    regression = bool(tests) and tests[0]["metric"] == "mse"
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        for axes, scale, label in ((grid[0, 0], None, "outer steps"), (grid[0, 1], 60, "minutes")):
            _scores_panel(axes, train, tests, scale, label, regression)
        _trace(grid[0, 2], train, "loss", "query loss", log=True)
        _trace(grid[1, 0], train, "inner_residual", "inner residual |dG/dphi| (median)", log=True)
        _trace(grid[1, 1], train, "linear_residual", "linear residual |v - H u| (median)", log=True)
        _shares_panel(grid[1, 2], train)
        figure.suptitle(title)
        figure.savefig(path)
        plt.close(figure)


def _scores_panel(
    axes: Axes, train: list[Entry], tests: list[Entry], seconds: int | None, label: str, regression: bool
) -> None:
    factor, unit = (1, "mean squared error") if regression else (100, "accuracy, %")

    def position(entry: Entry) -> float:
        return entry["seconds"] / seconds if seconds else entry["step"]

    if not regression:
        values = _numbers(train, "accuracy") * factor
        _draw_smoothed(axes, np.array([position(e) for e in train]), values, "training tasks", TRAIN)
    if tests:
        x = np.array([position(e) for e in tests])
        mean, interval = (_numbers(tests, name) * factor for name in ("mean", "interval"))
        axes.plot(x, mean, color=TEST, marker="o", markersize=3, linewidth=1.5, label="held-out classes")
        axes.fill_between(x, mean - interval, mean + interval, color=TEST, alpha=0.2, linewidth=0)
        axes.annotate(
            f"{mean[-1]:.3g}", (x[-1], mean[-1]), xytext=(4, 0), textcoords="offset points", color=TEST, va="center"
        )
    if regression:
        _log_scale(axes)
    axes.set(xlabel=label, ylabel=unit)
    if axes.lines:
        axes.legend(loc="best")


def _shares_panel(axes: Axes, train: list[Entry]) -> None:
    steps = np.array([e["step"] for e in train], dtype=float)
    for name, label, colour in (("negative_curvature", "negative curvature", TRAIN), ("failed", "failed", TEST)):
        _draw_smoothed(axes, steps, 100 * _numbers(train, name), label, colour)
    axes.set(
        xlabel="outer steps",
        ylabel="share of tasks, %",
        ylim=(-0.02 * axes.get_ylim()[1], max(1.0, axes.get_ylim()[1])),
    )
    axes.legend(loc="upper left")


def _trace(axes: Axes, train: list[Entry], name: str, label: str, *, log: bool = False) -> None:
    values = _numbers(train, name)
    _draw_smoothed(axes, np.array([e["step"] for e in train], dtype=float), values, None, TRAIN)
    if log and np.any(values > 0):
        _log_scale(axes)
    axes.set(xlabel="outer steps", ylabel=label)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at the ticks; where there are few powers of ten, between them too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else NullFormatter())


def _draw_smoothed(axes: Axes, x: np.ndarray, y: np.ndarray, label: str | None, colour: str) -> None:
    """The points, pale, and their running mean over a twentieth of the run."""
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    width = max(1, len(y) // 20)
    if width > 1:
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        total = np.concatenate([[0.0], np.cumsum(y)])
        first = np.maximum(0, np.arange(len(y)) + 1 - width)
        y = (total[1:] - total[first]) / (np.arange(1, len(y) + 1) - first)
    axes.plot(x, y, color=colour, linewidth=1.5, label=label)


def _numbers(entries: list[Entry], name: str) -> np.ndarray:
    return np.array([np.nan if entry.get(name) is None else entry[name] for entry in entries], dtype=float)


def comparison_figure(curves: dict[str, list[tuple[int, float, Evaluation]]], path: Path, title: str) -> None:
    """Accuracy over outer steps and over seconds, one line per method: points (step, seconds, evaluation)."""
    with plt.rc_context(STYLE):
        figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
        for axes, column, label in ((by_step, 0, "outer steps"), (by_time, 1, "seconds of training")):
            for (name, curve), colour in zip(curves.items(), PALETTE, strict=False):
                x = np.array([point[column] for point in curve], dtype=float)
                mean, interval = (
                    100 * np.array([getattr(point[2], part) for point in curve]) for part in ("mean", "interval")
                )
                axes.plot(x, mean, color=colour, marker="o", markersize=3, label=name)
                axes.fill_between(x, mean - interval, mean + interval, color=colour, alpha=0.15, linewidth=0)
            axes.set(xlabel=label)
        by_step.set_ylabel("accuracy, %")
        by_step.legend(loc="lower right")
        figure.suptitle(title)
        figure.savefig(path)
        plt.close(figure)


def adaptation_figure(curves: dict[str, list[tuple[int, Evaluation]]], path: Path, title: str) -> None:
    """Error on held-out tasks over the number of inner steps, one line per name."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for (name, curve), colour in zip(curves.items(), PALETTE, strict=False):
            steps = np.array([step for step, _ in curve])
            mean = np.array([result.mean for _, result in curve])
            interval = np.array([result.interval for _, result in curve])
            axes.plot(steps, mean, marker="o", markersize=3, color=colour, label=name)
            axes.fill_between(steps, mean - interval, mean + interval, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        _log_scale(axes)
        axes.set(xlabel="inner steps at test", ylabel="mean squared error", title=title)
        axes.legend()
        figure.savefig(path)
        plt.close(figure)


def contact_sheet(
    support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], predictions: dict[str, Tensor], path: Path, title: str
) -> None:
    """One task: the support images, and the query images with the label that each method gives them.

    support, query: images (n, 1, height, width) in [0, 1] and labels (n,).
    predictions: predicted labels (n,) of the query images, by method.
    """
    (images, labels), (queries, truth) = support, query
    shown = min(len(queries), 10)
    order = np.random.default_rng(0).permutation(len(queries))[:shown]
    columns = max(len(images), shown)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(
            2,
            columns,
            figsize=(1.15 * columns + 1.6, 2.9 + 0.28 * len(predictions)),
            squeeze=False,
            layout="constrained",
        )
        for axes in grid.flat:
            axes.axis("off")
        for axes, image, label in zip(grid[0], images, labels, strict=False):
            _show(axes, image)
            axes.set_title(_letter(label), fontsize=12)
        for axes, index in zip(grid[1], order, strict=False):
            _show(axes, queries[index])
            axes.set_title(_letter(truth[index]), fontsize=9, color="#666666")
            for row, (guess, colour) in enumerate(zip(predictions.values(), PALETTE, strict=False)):
                right = int(guess[index]) == int(truth[index])
                axes.text(
                    0.5,
                    -0.18 - 0.22 * row,
                    _letter(guess[index]) + ("" if right else " ✗"),
                    transform=axes.transAxes,
                    ha="center",
                    va="center",
                    fontsize=11,
                    color=colour,
                    fontweight="normal" if right else "bold",
                )
        for row, (name, colour) in enumerate(zip(predictions, PALETTE, strict=False)):
            grid[1, 0].text(
                -0.15,
                -0.18 - 0.22 * row,
                name,
                transform=grid[1, 0].transAxes,
                ha="right",
                va="center",
                fontsize=9,
                color=colour,
            )
        grid[0, 0].text(-0.15, 0.5, "support", transform=grid[0, 0].transAxes, ha="right", va="center", fontsize=9)
        grid[1, 0].text(-0.15, 0.5, "query", transform=grid[1, 0].transAxes, ha="right", va="center", fontsize=9)
        figure.suptitle(title, fontsize=11, y=1.06)
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(1 - image[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _letter(label: Tensor) -> str:
    return chr(ord("A") + int(label))
