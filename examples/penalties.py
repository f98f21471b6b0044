"""One penalty per feature, tuned by gradient

A multinomial logistic regression on the handwritten digits that ship with scikit-learn: 8 by 8 pixels and a constant, so 65
features. Each has an L2 penalty of its own, and the 65 penalties minimise the loss on validation data. No grid has room for that;
a hypergradient gives all 65 slopes for little more than the cost of a fit.

The comparison is with the best *shared* penalty from a grid that becomes finer and finer, and, from there on, random search and Optuna
(its default sampler) over the 65 penalties; all for the same time, with the same inner solver, the same bounds and a warm start. The
two searches look near the shared penalty: in the whole box neither finds anything better than that. Time is
processor time; what Optuna takes to think is part of it. Training and validation data are divided anew several times; nobody
sees the test part. The intervals allow for other divisions and other test examples. How far the test loss lies above the
validation loss is the price of tuning many numbers on the validation data: the validation column says who minimises best, the
test columns say what it is worth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import _extras  # noqa: F401 - says what to install
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optuna
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.linsys import CG
from bilevel.solvers import NewtonCG

LOW, HIGH = -12.0, 2.0  # bounds of the logarithms of the penalties
TRAIN, VALIDATION = 300, 800
SOLVER = NewtonCG(max_steps=50, cg_steps=50, tol=1e-5, cg_rtol=0.3)
LINSYS = CG(max_steps=200, rtol=1e-2)
Data = dict[str, Tensor]


def weights(V: Tensor, theta: Tensor) -> Tensor:
    """The inner variable is V, a scaled W: features with large and small penalties are then alike to the solver, and it is faster."""
    return V / (theta.exp() + 0.01).sqrt()[:, None]


def train(V: Tensor, theta: Tensor, data: Data) -> Tensor:
    """G: V ``(65, 10)``, theta ``(65,)`` the logarithms of the penalties."""
    W = weights(V, theta)
    return cross_entropy(data["x"] @ W, data["y"]) + 0.5 * (theta.exp() @ W.square()).sum()


def validate(V: Tensor, theta: Tensor, data: Data) -> Tensor:
    """L."""
    return cross_entropy(data["x_validation"] @ weights(V, theta), data["y_validation"])


PROBLEM = bilevel.BilevelProblem.from_functions(
    train, validate, initial_phi=lambda theta, data: theta.new_zeros(65, 10)
)


class Fit(NamedTuple):
    theta: Tensor
    V: Tensor
    loss: float  # on the validation data


Run = tuple[Fit, list[tuple[float, float]]]  # the best fit, and the best validation loss over time


def fit(theta: Tensor, init: Tensor, data: Data) -> Fit:
    V = bilevel.solve(PROBLEM, theta, data, solver=SOLVER, init=init, compile=True).unwrap()
    return Fit(theta, V, float(validate(V, theta, data)))


def grid(start: Fit, data: Data) -> Iterator[Fit]:
    """Finer and finer around the best."""
    high, low, count = HIGH, LOW, 29
    while True:
        fits = [start]
        for penalty in torch.linspace(high, low, count):
            fits.append(fit(torch.full_like(start.theta, float(penalty)), fits[-1].V, data))
            yield fits[-1]
        best, step = float(min(fits[1:], key=lambda each: each.loss).theta[0]), (high - low) / (count - 1)
        high, low, count = best + step, best - step, 9


def random(start: Fit, data: Data) -> Iterator[Fit]:
    generator = torch.Generator().manual_seed(0)  # of its own: how many numbers it draws depends on the clock
    while True:
        step = torch.randn(start.theta.shape, generator=generator, dtype=start.theta.dtype)
        yield fit((start.theta + step).clamp(LOW, HIGH), start.V, data)


def sampler(start: Fit, data: Data) -> Iterator[Fit]:
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial({f"{j}": float(value) for j, value in enumerate(start.theta)})
    low, high = (start.theta - 2).clamp(LOW, HIGH).tolist(), (start.theta + 2).clamp(LOW, HIGH).tolist()
    while True:
        trial = study.ask()
        values = [trial.suggest_float(f"{j}", low[j], high[j]) for j in range(len(low))]
        yield (found := fit(start.theta.new_tensor(values), start.V, data))
        study.tell(trial, found.loss)


def gradient(start: Fit, data: Data) -> Iterator[Fit]:
    theta, result = start.theta.clone(), None
    outer = torch.optim.Adam([theta], lr=0.3)
    while True:
        result = bilevel.hypergradient(
            PROBLEM, theta, data, solver=SOLVER, linsys=LINSYS, compile=True, warm_start=result
        )
        yield Fit(theta.clone(), result.phi, float(result.outer))
        theta.grad = result.unwrap()
        outer.step()
        theta.clamp_(LOW, HIGH)


METHODS = {"shared penalty, grid": grid, "random search": random, "Optuna": sampler, "hypergradient": gradient}


def race(fits: Iterator[Fit], best: Fit, seconds: float) -> Run:
    begin, trace = time.process_time(), [(0.0, best.loss)]
    for found in fits:
        best = min(best, found, key=lambda each: each.loss)
        trace.append((time.process_time() - begin, best.loss))
        if trace[-1][0] > seconds:
            break
    return best, trace


def mean(values: Tensor, digits: int) -> str:
    """The mean of ``(divisions, test examples)`` with a 95 % interval for both: other divisions, other examples."""
    variance = sum(values.mean(1 - axis).var() / values.shape[axis] for axis in (0, 1))
    return f"{values.mean():.{digits}f} ± {1.96 * variance**0.5:.{digits}f}"


def report(found: dict[str, list[Run]], x: Tensor, y: Tensor) -> None:
    print(f"{'':22}{'fits':>5}{'seconds':>9}{'validation':>12}{'test log-loss':>17}{'test accuracy, %':>18}")
    losses = {}
    for name, runs in found.items():
        logits = torch.stack([x @ weights(best.V, best.theta) for best, _ in runs])  # (divisions, n, 10)
        losses[name] = torch.stack([cross_entropy(each, y, reduction="none") for each in logits])
        right = 100 * (logits.argmax(-1) == y).double()
        facts = torch.tensor([(len(trace) - 1, trace[-1][0], best.loss) for best, trace in runs]).mean(0)
        line = f"{name:22}{facts[0]:5.0f}{facts[1]:9.1f}{facts[2]:12.3f}"
        print(f"{line}{mean(losses[name], 3):>17}{mean(right, 1):>18}")
    print("\ntest log-loss with the hypergradient minus that with another (not decided where the interval contains 0)")
    for name in list(found)[:-1]:
        print(f"  {name:22}{mean(losses['hypergradient'] - losses[name], 3):>18}")


def draw(found: dict[str, list[Run]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained", width_ratios=[1.4, 1])
    for (name, runs), style in zip(list(found.items())[1:], ("k:", "C1--", "C0-"), strict=True):
        for number, (_, trace) in enumerate(runs):
            left.plot(*zip(*trace, strict=True), style, label=name if number == 0 else None)
    left.set(xlabel="processor seconds", ylabel="validation log-loss, best so far")
    left.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    pixels = found["hypergradient"][0][0].theta[:64].reshape(8, 8) / torch.tensor(10.0).log()
    image = right.imshow(pixels.numpy(), cmap="viridis")
    right.set_title("log10 of the penalty of each pixel", fontsize=10)
    right.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=130)


def main(quick: bool, out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    divisions, seconds = (2, 0.3) if quick else (8, 2.5)
    x, y = map(torch.as_tensor, load_digits(return_X_y=True))
    x = torch.cat([x / 16, torch.ones(len(y), 1)], dim=1)
    order = torch.randperm(len(y))
    mine, test = order[: TRAIN + VALIDATION], order[TRAIN + VALIDATION :]
    found = {name: [] for name in METHODS}
    for _ in range(divisions):
        a, b = mine[torch.randperm(len(mine))].split([TRAIN, VALIDATION])
        data = {"x": x[a], "y": y[a], "x_validation": x[b], "y_validation": y[b]}
        best = fit(torch.zeros(65, dtype=x.dtype), torch.zeros(65, 10, dtype=x.dtype), data)
        for method in METHODS.values():  # what is done once, imports and recordings, is not timed
            next(method(best, data))
        for name, method in METHODS.items():
            found[name].append(race(method(best, data), best, max(seconds, 1.0) if method is grid else seconds))
            best = found["shared penalty, grid"][-1][0]
    print(f"{TRAIN} training, {VALIDATION} validation, {len(test)} test examples; divisions: {divisions}\n")
    report(found, x[test], y[test])
    draw(found, out / "penalties.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One penalty per feature, tuned by gradient")
    parser.add_argument("--quick", action="store_true", help="fewer divisions, less time")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figure")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.out)
