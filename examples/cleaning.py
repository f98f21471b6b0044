"""Data cleaning: a weight for every training example, learned where 30 % of the labels are wrong.

The images are scikit-learn's handwritten digits: 1000 to train on, 30 or 100 more whose labels are known to be right, and a test
set. The inner problem is a logistic regression in which each training example has a weight; the outer loss is that of the fitted model
on the clean examples. The hypergradient has 1000 entries and costs one linear system, however many weights there are.

Two kinds of wrong labels: *uniform*, any other digit; and *systematic*, an even digit is called the next odd one, so often that most
even digits are wrong. Each of the first six rows of a table ranks the training examples by suspicion; the first two see no clean label.
The average precision needs no threshold. The precision at 30 % is that of the 30 % most suspicious, and so it is also the recall.
The test accuracy is of a model fitted to the other 70 % and the clean examples. Three rows are for comparison: fits to all and
the clean, to the clean only, and to all with the right labels. The last row compares, run by run, the model
of the sixth row with the best of the first four.

Uniform mistakes need no bilevel problem: a plain fit does not learn them, and its losses rank as well. Systematic ones it learns; there the
learned weights find far more than its losses do, and no more than the losses of a fit to the clean examples alone.
"""

import argparse
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib
import numpy as np
import scipy.stats
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import cross_val_predict
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.linsys import CG
from bilevel.solvers import LBFGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PENALTY = 1e-3
LINES = [("#0072b2", "-"), ("#56b4e9", "--"), ("#009e73", ":"), ("#d55e00", "-"), ("#cc79a7", "--"), ("black", "-.")]


def logits(phi, x):
    return x @ phi["W"] + phi["b"]


def inner(phi, theta, data):
    losses = cross_entropy(logits(phi, data["x"]), data["y"], reduction="none")
    return (theta.sigmoid() * losses).mean() + 0.5 * PENALTY * phi["W"].square().sum()


def outer(phi, theta, data):
    return cross_entropy(logits(phi, data["x_clean"]), data["y_clean"])


def start(theta, data):
    return {"W": data["x"].new_zeros(64, 10), "b": data["x"].new_zeros(10)}


PROBLEM = bilevel.BilevelProblem.from_functions(inner, outer, start)


def learn_weights(data, steps):
    """The weights (examples,) and the loss of each example under the model fitted with them (examples,)."""
    theta = data["x"].new_zeros(len(data["x"]))
    optimizer, earlier = torch.optim.SGD([theta], lr=0.2 * len(theta), momentum=0.9), None
    for _ in range(steps):
        earlier = bilevel.hypergradient(
            PROBLEM,
            theta,
            data,
            solver=LBFGS(max_steps=300, tol=1e-4),
            linsys=CG(max_steps=50, rtol=1e-2),
            warm_start=earlier,
        )
        theta.grad = earlier.unwrap()
        optimizer.step()
    losses = cross_entropy(logits(earlier.phi, data["x"]), data["y"], reduction="none")
    return theta.sigmoid().numpy(), losses.numpy()


def corrupt(y, kind, rng):
    """Labels of which 30 % are wrong, and which."""
    candidates = np.flatnonzero(y % 2 == 0) if kind == "systematic" else np.arange(len(y))
    wrong = np.isin(np.arange(len(y)), rng.permutation(candidates)[: round(0.3 * len(y))])
    shift = 1 if kind == "systematic" else rng.integers(1, 10, len(y))
    return np.where(wrong, (y + shift) % 10, y), wrong


def plain(count):
    """Without weights; scikit-learn multiplies the sum of the losses by C."""
    return LogisticRegression(C=1 / (PENALTY * count), max_iter=2000)


def suspicions(x, y, x_clean, y_clean, steps):
    """{method: a number for each example, high where its label is suspect}."""

    def loss(probabilities):
        return -np.log(probabilities[np.arange(len(y)), y])

    both = np.concatenate([x, x_clean]), np.concatenate([y, y_clean])
    arrays = {"x": x, "y": y, "x_clean": x_clean, "y_clean": y_clean}
    weights, losses = learn_weights({name: torch.tensor(array) for name, array in arrays.items()}, steps)
    return {
        "loss of a plain fit": loss(plain(len(y)).fit(x, y).predict_proba(x)),
        "loss in cross-validation": loss(cross_val_predict(plain(len(y)), x, y, cv=5, method="predict_proba")),
        "loss, fit to clean and noisy": loss(plain(len(both[1])).fit(*both).predict_proba(x)),
        "loss, fit to the clean only": loss(plain(len(y_clean)).fit(x_clean, y_clean).predict_proba(x)),
        "learned weight": -weights,
        "loss, fit with learned weights": losses,
    }


def one_run(kind, clean_size, seed, size, steps):
    """{method: (average precision, precision at 30 %, accuracy)}, reference accuracies, and what the figure shows."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    train, clean, test = np.split(order, [size, size + clean_size])
    x, (noisy, wrong) = x / 16, corrupt(y[train], kind, rng)

    def accuracy(kept, labels):
        rows, labels = np.concatenate([train[kept], clean]), np.concatenate([labels[kept], y[clean]])
        return plain(len(rows)).fit(x[rows], labels).score(x[test], y[test])

    rows, curves = {}, {}
    for name, suspicion in suspicions(x[train], noisy, x[clean], y[clean], steps).items():
        flagged = np.isin(np.arange(size), np.argsort(-suspicion)[: wrong.sum()])
        rows[name] = average_precision_score(wrong, suspicion), wrong[flagged].mean(), accuracy(~flagged, noisy)
        curves[name] = precision_recall_curve(wrong, suspicion)[:2]
    everything = np.ones(size, dtype=bool)
    references = {
        "nothing removed": accuracy(everything, noisy),
        "the clean only": accuracy(~everything, noisy),
        "all labels right": accuracy(everything, y[train]),
    }
    return rows, references, curves


def percent(values):
    """Mean and half-width of the 95 % interval over runs, by Student's t."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{100 * np.mean(values):9.1f} ±{100 * half:5.1f}"


def main(quick: bool, out: Path) -> None:
    runs, size, steps, cleans = (2, 200, 2, (30,)) if quick else (4, 1000, 15, (30, 100))
    print(f"{runs} runs, {size} training examples, 30 % wrong; in %, mean and 95 % interval")
    figure, panels = plt.subplots(
        2, len(cleans), figsize=(10, 8), squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    cases = [(kind, clean) for kind in ("uniform", "systematic") for clean in cleans]
    for (kind, clean), axes in zip(cases, panels.flat, strict=True):
        results = [one_run(kind, clean, seed, size, steps) for seed in range(runs)]
        print(f"\n{f'{kind}, {clean} clean examples':34}{'average':>13}{'precision':>16}{'test':>16}")
        print(f"{'':34}{'precision':>13}{'at 30 %':>16}{'accuracy':>16}")
        for name, (colour, line) in zip(results[0][0], LINES, strict=True):
            print(f"{name:32}" + "".join(percent([rows[name][k] for rows, _, _ in results]) for k in range(3)))
            axes.plot(*results[0][2][name][::-1], line, color=colour, label=name)
        for name in results[0][1]:
            print(f"{name:64}" + percent([references[name] for _, references, _ in results]))
        accuracies = {name: np.array([rows[name][2] for rows, _, _ in results]) for name in results[0][0]}
        learned = accuracies["loss, fit with learned weights"]
        best = max(list(accuracies)[:4], key=lambda name: accuracies[name].mean())
        print(f"{f'fit with learned weights minus {best!r}':64}{percent(learned - accuracies[best])}")
        axes.set(title=f"{kind}, {clean} clean examples, first run", ylim=(0, 1.02))
    figure.supxlabel("recall")
    figure.supylabel("precision")
    panels[1, 0].legend(fontsize=8)
    figure.savefig(out / "cleaning.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Data cleaning: a learned weight for every training example")
    parser.add_argument("--quick", action="store_true", help="at most 10 seconds")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.quick, options.out)
