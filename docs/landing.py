"""Draws the figures of the first page: `python docs/landing.py`. The problem is that of the page, whose code is executed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from bilevel import hypergradient
from bilevel.linsys import CG
from bilevel.solvers import NewtonCG

HERE = Path(__file__).parent
COLOURS = {"light": ("#1b1b1b", "#2b5fb4", "#b8620a", "#9a9a9a"), "dark": ("#d8d8d8", "#7fb2ff", "#f6b04d", "#8a8a8a")}
OUTER_STEPS = 150


def of_the_page() -> SimpleNamespace:
    """What the names of the first code block of index.md stand for."""
    block = re.search(r"^```python\n(.*?)^```", (HERE / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None, "index.md has no code"
    names: dict[str, object] = {}
    exec(block.group(1), names)
    return SimpleNamespace(**names)


def slope(page: SimpleNamespace, theta: Tensor) -> tuple[float, Tensor]:
    """The outer loss and the hypergradient."""
    solver, linsys = NewtonCG(max_steps=10, cg_steps=8, tol=1e-5), CG(max_steps=8)
    result = hypergradient(page.problem, theta, solver=solver, linsys=linsys)
    return float(result.outer), result.unwrap()


def draw_slopes(axes: Axes, page: SimpleNamespace, line: str, tangent: str) -> None:
    """All penalties equal: the loss over their size, and tangents with the slope that the library gives."""
    at = torch.linspace(-5.0, 3.0, 81)
    axes.plot(at, [slope(page, torch.full((8,), float(s)))[0] for s in at], color=line, linewidth=2)
    for s in (-3.4, -0.6, 0.8, 2.0):
        loss, gradient = slope(page, torch.full((8,), s))
        run = torch.tensor([-0.7, 0.7])
        axes.plot(s + run, loss + run * float(gradient.sum()), color=tangent, linewidth=2)
        axes.plot([s], [loss], "o", color=tangent, markersize=5)
    axes.set(xlabel="log of the penalty, the same for all features", ylabel="validation loss")
    axes.set_title("The slope of the loss after training", loc="left", fontsize=10)


def draw_descent(axes: Axes, page: SimpleNamespace, useful: str, useless: str) -> None:
    """Eight penalties, each with its slope, under Adam."""
    theta = page.theta.clone().requires_grad_()
    outer, path = torch.optim.Adam([theta], lr=0.1), []
    for _ in range(OUTER_STEPS):
        path.append(theta.detach().clone())
        theta.grad = slope(page, theta.detach())[1]
        outer.step()
    for index, penalty in enumerate(torch.stack(path).T):
        axes.plot(penalty, color=useful if index < 2 else useless, linewidth=2 if index < 2 else 1.2)
    axes.text(OUTER_STEPS * 0.98, 2.0, "six of noise", color=useless, ha="right", va="center")
    axes.text(
        OUTER_STEPS * 0.98, float(path[-1][:2].max()) - 0.15, "two that matter", color=useful, ha="right", va="top"
    )
    axes.set(xlabel="outer step", ylabel="log of the penalty")
    axes.set_title("So each feature finds its own penalty", loc="left", fontsize=10)


def main() -> None:
    page = of_the_page()
    for name, (ink, line, tangent, pale) in COLOURS.items():
        style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": name}
        with plt.rc_context(style):
            for stem, draw, colours in (
                ("slopes", draw_slopes, (line, tangent)),
                ("descent", draw_descent, (tangent, pale)),
            ):
                figure, axes = plt.subplots(figsize=(3.9, 2.3), layout="constrained")
                draw(axes, page, *colours)
                figure.savefig(
                    HERE / "_static" / f"landing-{stem}-{name}.svg", transparent=True, metadata={"Date": None}
                )
                plt.close(figure)


if __name__ == "__main__":
    main()
