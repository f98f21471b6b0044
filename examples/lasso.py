"""Lasso and elastic net, with the penalties chosen by gradient descent on the cross-validation error.

The lasso is not smooth where a weight is zero, so it is no problem for `argmin`. Its solution is a fixed point of proximal maps, here
those of Douglas and Rachford, and `bilevel.fixed_point` differentiates it. The five folds of the cross-validation are one batch under
`torch.func.vmap`, and L-BFGS-B of SciPy moves the logarithms of the penalties.

The data are the 442 patients of scikit-learn's diabetes study with all squares and products of the ten measurements: 64 features.
Each split fits 220 of them; the others are the test set. LassoCV and ElasticNetCV minimise the same cross-validation error over a
path and a grid. The last row is what a grid is too slow for: a penalty of its own for the measurements, their squares and their
products, and a ridge penalty, four numbers in all. Errors are in units of the variance of the target in the training set; the splits
share patients, so the intervals are somewhat too narrow.
"""

import argparse
import time
import warnings
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib
import numpy as np
import scipy.optimize
import scipy.stats
import torch
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNetCV, LassoCV
from sklearn.model_selection import KFold
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import bilevel
from bilevel.linsys import Exact
from bilevel.solvers import Anderson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDS = 5
GAMMA = 3.0  # step of the proximal maps: the weights do not depend on it, the number of iterations does
SOLVER = Anderson(max_steps=2000, tol=1e-8)


def halves(z, penalty, data):
    """The two proximal maps: x of |Xw - y|^2 / (2n), a linear solve, then w of l1 |w| + l2 |w|^2 / 2, soft thresholding."""
    x = data["inverse"] @ (z + GAMMA * data["cov"])
    v = 2 * x - z
    return x, v.sign() * (v.abs() - GAMMA * penalty["l1"]).relu() / (1 + GAMMA * penalty["l2"])


def douglas_rachford(z, penalty, data):
    x, w = halves(z, penalty, data)
    return z + w - x


def fit(theta, group, data, init):
    """The weights, differentiable in theta, and z, each (folds, features). theta: one log l1 for each group, then log l2 if any."""
    count = int(group.max()) + 1
    penalty = {"l1": theta[:count].exp()[group], "l2": theta[count:].exp().sum()}

    def one_fold(data, init):
        z = bilevel.fixed_point(douglas_rachford, penalty, data, solver=SOLVER, linsys=Exact(), init=init)
        return halves(z, penalty, data)[1], z

    return torch.func.vmap(one_fold)(data, init)


def moments(X, y, folds):
    """What the fits need of each fold, centred like scikit-learn does; every leaf has a leading axis for the folds."""
    rows = []
    for train, held_out in folds:
        x_mean, y_mean = X[train].mean(0), y[train].mean()
        A, b = X[train] - x_mean, y[train] - y_mean
        gram = A.T @ A / len(train)
        inverse = np.linalg.inv(np.eye(len(gram)) + GAMMA * gram)
        rows.append((inverse, A.T @ b / len(train), X[held_out] - x_mean, y[held_out] - y_mean))
    names = ("inverse", "cov", "X", "y")
    return {name: torch.tensor(np.stack(part)) for name, part in zip(names, zip(*rows, strict=True), strict=True)}


def squared_error(w, data):
    return (torch.einsum("fnd,fd->fn", data["X"], w) - data["y"]).square().mean()


def tune(theta, group, data, budget):
    """Minimise the cross-validation error from theta. Returns theta, the error there and all (theta, error) on the way.

    It stops at about ``budget`` evaluations.
    """
    visited = []
    z = torch.zeros_like(data["cov"])

    def value_and_gradient(numbers):
        nonlocal z
        theta = torch.tensor(numbers, requires_grad=True)
        w, found = fit(theta, group, data, init=z)
        error = squared_error(w, data)
        if not error.isfinite():  # a fit that failed is NaN
            raise RuntimeError(f"an inner solve failed at penalties {np.exp(numbers)}")
        z = found.detach()  # the next solve starts here
        visited.append((numbers.copy(), error.item()))
        return error.item(), torch.autograd.grad(error, theta)[0].numpy()

    bounds = [(-6.0, 1.0)] * len(theta)
    scipy.optimize.minimize(
        value_and_gradient, theta, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxfun": budget}
    )
    best, error = min(visited, key=lambda pair: pair[1])
    return best, error, visited


def one_split(X, y, group, seed, ratios, budget):
    """{method: (cross-validation error, test error, CPU seconds)}, and what the figure shows of this split."""
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = order[:220], order[220:]
    scaler = StandardScaler().fit(X[train])
    X, y = scaler.transform(X), (y - y[train].mean()) / y[train].std()
    folds = list(KFold(FOLDS).split(X[train]))
    rows = {}
    for name, model in (
        ("LassoCV", LassoCV(cv=folds)),
        ("ElasticNetCV", ElasticNetCV(cv=folds, l1_ratio=ratios)),
    ):
        start = time.process_time()
        model.fit(X[train], y[train])
        seconds = time.process_time() - start
        rows[name] = (model.mse_path_.mean(-1).min(), np.square(model.predict(X[test]) - y[test]).mean(), seconds)
        if name == "LassoCV":
            path = (model.alphas_, model.mse_path_.mean(-1))
    one_group, visited = torch.zeros_like(group), {}
    for name, groups, start_at in (
        ("lasso, 1 penalty", one_group, [-2.0]),
        ("elastic net, 2 penalties", one_group, [-2.0, -4.0]),
        ("by group, 4 penalties", group, [-2.0, -2.0, -2.0, -4.0]),
    ):
        start = time.process_time()
        theta, error, visited[name] = tune(np.array(start_at), groups, moments(X[train], y[train], folds), budget)
        everything = moments(X, y, [(train, test)])
        w, _ = fit(torch.tensor(theta), groups, everything, torch.zeros_like(everything["cov"]))
        rows[name] = (error, squared_error(w, everything).item(), time.process_time() - start)
    return rows, path, visited["lasso, 1 penalty"]


def interval(values):
    """Mean and half-width of the 95 % interval over splits, by Student's t."""
    return np.mean(values), scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5


def draw(file, path, visited, tests):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.semilogx(*path, label="LassoCV: 100 penalties")
    left.plot([np.exp(t[0]) for t, _ in visited], [e for _, e in visited], "o-", alpha=0.7, label="by gradient")
    left.set(xlabel="penalty", ylabel="cross-validation error", title="first split", ylim=(None, 1.1))
    left.legend()
    for row, values in enumerate(tests.values()):
        mean, half = interval(values - tests["LassoCV"])
        right.errorbar(mean, -row, xerr=half, fmt="o", capsize=3)
    right.set_yticks(-np.arange(len(tests)), list(tests))
    right.axvline(0, color="grey", linewidth=0.8)
    right.set(xlabel="test error minus that of LassoCV, same splits", title="mean and 95 % interval")
    figure.savefig(file, dpi=120)


def main(quick: bool, out: Path) -> None:
    X, y = load_diabetes(return_X_y=True, scaled=False)
    products = PolynomialFeatures(2, include_bias=False)
    X = products.fit_transform(StandardScaler().fit_transform(X))
    powers = products.powers_
    kept = powers[:, 1] < 2  # sex has two values: its square is no feature
    X, powers = X[:, kept], powers[kept]
    group = torch.tensor(np.where(powers.sum(1) == 1, 0, np.where(powers.max(1) == 2, 1, 2)))
    splits, budget, ratios = (2, 5, [0.5, 1.0]) if quick else (10, 40, [0.1, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the far end of scikit-learn's path
        results = [one_split(X, y, group, seed, ratios, budget) for seed in range(splits)]

    table = {name: np.array([rows[name] for rows, _, _ in results]) for name in results[0][0]}
    print(f"{splits} splits, mean and 95 % interval; 'difference' is to LassoCV on the same splits\n")
    print(f"{'':26}{'CV error':>9}{'test error':>17}{'difference':>19}{'CPU seconds':>13}")
    for name, values in table.items():
        test, half = interval(values[:, 1])
        difference, spread = interval(values[:, 1] - table["LassoCV"][:, 1])
        print(
            f"{name:26}{values[:, 0].mean():9.4f}{test:9.4f} ±{half:6.4f}{difference:+11.4f} ±{spread:6.4f}"
            f"{values[:, 2].mean():13.2f}"
        )
    gap = (table["lasso, 1 penalty"] - table["LassoCV"])[:, 0]
    print(f"\nlasso by gradient, minus the best of the path, in CV error: {gap.min():+.1e} to {gap.max():+.1e}")
    draw(out / "lasso.png", *results[0][1:], {name: values[:, 1] for name, values in table.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lasso and elastic net, the penalties chosen by gradient")
    parser.add_argument("--quick", action="store_true", help="at most 10 seconds")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.quick, options.out)
