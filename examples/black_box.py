"""Through scikit-learn: the gradient of a model that autograd cannot see.

`LogisticRegression.fit` runs in NumPy and SciPy; there is nothing to back-propagate through. `BlackBox` takes it as it is: the implicit
gradient needs the point that it found, and the objective that it minimises, written down once in PyTorch. The library measures
whether the point is a minimum of that objective, so a convention read wrongly in the manual shows at once.

What is tuned here is a step before the fit: each of the 30 features of the breast cancer data set is multiplied by a number of its
own, which decides how much the penalty shrinks its weight. The loss is that of five-fold cross-validation; each fold is a task
with its own fit. Three questions follow. Is the gradient right, against refits by scikit-learn? How wrong is it when the fit stops
early, and does `error_estimate` say so? And what is it worth, against optimisers that only see the loss?
"""

import argparse
import contextlib
import time
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib
import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch.nn.functional import softplus

import bilevel
from bilevel.linsys import Exact
from bilevel.solvers import BlackBox

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PENALTY = 0.01
FOLDS = 5


def mean_loss(phi, theta, x, sign):
    return softplus(-sign * (x * theta.exp() @ phi["w"] + phi["b"])).mean()


PROBLEM = bilevel.BilevelProblem.from_functions(
    lambda phi, theta, d: mean_loss(phi, theta, d["x"], d["sign"]) + 0.5 * PENALTY * phi["w"].square().sum(),
    lambda phi, theta, d: mean_loss(phi, theta, d["x_held_out"], d["sign_held_out"]),
    lambda theta, d: {"w": torch.zeros_like(theta), "b": theta.new_zeros(())},
)


def sklearn_fit(x, sign, theta, **how):
    """x, sign and theta are arrays. scikit-learn multiplies the sum of the losses by C and leaves the intercept free."""
    return LogisticRegression(C=1 / (PENALTY * len(sign)), max_iter=10_000, **how).fit(x * np.exp(theta), sign)


def solver(**how):
    """scikit-learn as an inner solver: called once for each fold, with that fold's data."""

    def fit(problem, theta, data, init):
        model = sklearn_fit(data["x"].numpy(), data["sign"].numpy(), theta.numpy(), **how)
        return {"w": torch.from_numpy(model.coef_[0]), "b": torch.tensor(model.intercept_[0])}

    return BlackBox(fit)


ACCURATE = {"solver": "newton-cholesky", "tol": 1e-10}


def hypergradient(theta, folds, **how):
    return bilevel.hypergradient(
        PROBLEM, torch.tensor(theta), folds, solver=solver(**how), linsys=Exact(), batched=True
    )


def loss_by_refits(theta, folds):
    """The same loss with scikit-learn and NumPy alone."""
    losses = []
    for x, sign, x_held_out, sign_held_out in zip(*(folds[name].numpy() for name in folds), strict=True):
        model = sklearn_fit(x, sign, theta, **ACCURATE)
        losses.append(np.logaddexp(0, -sign_held_out * model.decision_function(x_held_out * np.exp(theta))).mean())
    return np.mean(losses)


def check(theta, folds):
    """The gradient, compared with central differences of refits."""
    hypergradient(theta, folds, **ACCURATE)  # imports and recordings, which are done once
    start = time.process_time()
    result = hypergradient(theta, folds, **ACCURATE)
    gradient, seconds = result.unwrap().numpy(), time.process_time() - start
    statuses = sorted({bilevel.Status(code).name for code in result.inner.codes.tolist()})
    print(f"five fits and the gradient: {seconds:.3f} CPU s; status of the fits: {', '.join(statuses)}")
    h, start = 1e-4, time.process_time()
    steps = h * np.eye(len(theta))
    refits = np.array([loss_by_refits(theta + e, folds) - loss_by_refits(theta - e, folds) for e in steps]) / (2 * h)
    print(f"{2 * FOLDS * len(theta)} refits for central differences: {time.process_time() - start:.3f} CPU s")
    print(f"largest difference: {abs(gradient - refits).max():.1e}, of a largest entry of {abs(refits).max():.1e}\n")
    return gradient


def stop_early(theta, folds, exact):
    """The error of the gradient, and what the library says of it, when scikit-learn stops early."""
    print("tol of lbfgs   |dG/dphi|   error of gradient   error_estimate")
    rows = []
    for tol in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5):
        result = hypergradient(theta, folds, solver="lbfgs", tol=tol)
        error = np.linalg.norm(result.grad.numpy() - exact)
        rows.append((float(result.inner.residual.max()), error, float(result.error_estimate)))
        print(f"{tol:12.0e}{rows[-1][0]:12.1e}{error:20.1e}{rows[-1][2]:17.1e}")
    return np.array(rows)


class BudgetSpent(Exception):
    """Ends an optimiser."""


def race(folds, count):
    """{optimiser: (best theta, losses in the order of evaluation)} from equal scales."""
    found = {}

    def with_gradient(theta):
        result = hypergradient(theta, folds, **ACCURATE)
        return float(result.outer), result.unwrap().numpy()

    def run(name, loss, budget, **options):
        seen = []

        def watched(theta):
            answer = loss(theta)
            seen.append((answer[0] if isinstance(answer, tuple) else answer, theta.copy()))
            if len(seen) >= budget:
                raise BudgetSpent
            return answer

        with contextlib.suppress(BudgetSpent):
            scipy.optimize.minimize(watched, np.zeros(30), bounds=[(-3, 3)] * 30, **options)
        found[name] = min(seen, key=lambda pair: pair[0])[1], [value for value, _ in seen]

    def refits(theta):
        return loss_by_refits(theta, folds)

    run("L-BFGS-B, our gradient", with_gradient, count, method="L-BFGS-B", jac=True)
    run("L-BFGS-B, differences", refits, 20 * count, method="L-BFGS-B")
    run("Powell", refits, 20 * count, method="Powell")
    return found


def draw(file, rows, found):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.loglog(rows[:, 0], rows[:, 1], "o-", label="true")
    left.loglog(rows[:, 0], rows[:, 2], "x--", label="error_estimate")
    left.set(
        xlabel="largest |dG/dphi| of the five fits", ylabel="error of the gradient", title="a fit that stops early"
    )
    left.legend()
    for (name, (_, losses)), style in zip(found.items(), ("-", "--", ":"), strict=True):
        right.semilogx(np.arange(1, len(losses) + 1), np.minimum.accumulate(losses), style, label=name)
    right.set(xlabel="cross-validations, five fits each", ylabel="best loss so far", title="30 feature scales")
    right.legend(fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(file, dpi=120)


def main(quick: bool, out: Path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    sign, order = 2.0 * y - 1, np.random.default_rng(0).permutation(len(y))
    train, test = order[:400], order[400:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    parts = []
    for a, b in StratifiedKFold(FOLDS).split(x[train], sign[train]):
        parts.append((x[train[a]], sign[train[a]], x[train[b]], sign[train[b]]))
    names = ("x", "sign", "x_held_out", "sign_held_out")
    folds = {name: torch.tensor(np.stack(part)) for name, part in zip(names, zip(*parts, strict=True), strict=True)}

    theta = np.random.default_rng(1).normal(size=30)
    gradient = check(theta, folds)
    rows = stop_early(theta, folds, gradient)
    found = race(folds, 5 if quick else 50)
    scales = {"equal scales": (np.zeros(30), [loss_by_refits(np.zeros(30), folds)])} | found
    print(f"\n{'':24}{'cross-':>12}{'best':>9}{'test':>9}{'difference':>18}{'test':>10}")
    print(f"{'':24}{'validations':>12}{'loss':>9}{'loss':>9}{'to equal scales':>18}{'errors':>10}")
    for name, (theta, seen) in scales.items():
        model = sklearn_fit(x[train], sign[train], theta, **ACCURATE)
        margins = sign[test] * model.decision_function(x[test] * np.exp(theta))
        losses = np.logaddexp(0, -margins)
        if name == "equal scales":
            first = losses
        half = 1.96 * np.std(losses - first, ddof=1) / len(test) ** 0.5
        print(
            f"{name:24}{len(seen):12}{min(seen):9.4f}{losses.mean():9.4f}{np.mean(losses - first):+9.4f} ±{half:7.4f}"
            f"{(margins < 0).sum():10}"
        )
    print(f"\n{len(test)} test examples, 95 % interval over them")
    draw(out / "black_box.png", rows, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Through scikit-learn: the gradient of a model that autograd cannot see."
    )
    parser.add_argument("--quick", action="store_true", help="at most 10 seconds")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.quick, options.out)
