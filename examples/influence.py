"""How much each training example matters

A logistic regression on the breast cancer data that ship with scikit-learn. Give each training example a weight, 1 for all of them.
The fitted parameters are then a function of the weights, `argmin`, and its derivatives say what each example does to the fit and
to the test loss. Leaving example i out is the step of its weight from 1 to 0. The first derivative predicts what that does (the
influence function of Cook and Weisberg 1982), the second mends the prediction, and says how two examples act together.

The check is to fit again: without each example in turn, with a little less weight on it, and without pairs of the most influential
ones. The comparison is with what a statistician would use: one Newton step of the fit without the example, which needs the same
Jacobian, and the leverages, which only a linear model has (Pregibon 1981).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.func import hessian, jacrev, vmap
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

import bilevel
from bilevel.linsys import Exact
from bilevel.solvers import NewtonCG

PENALTY = 1e-2
STEPS = (1.0, 0.1, 0.01)  # by which the weight of an example is lowered
SOLVER = NewtonCG(max_steps=50, cg_steps=60, tol=1e-11, cg_rtol=1e-3)
Data = dict[str, Tensor]


def train(phi: Tensor, w: Tensor, data: Data) -> Tensor:
    """G: phi ``(31,)`` are the parameters, w ``(n,)`` the weights of the training examples."""
    losses = log_loss(data["x"] @ phi, data["y"], reduction="none")
    return w @ losses / len(losses) + 0.5 * PENALTY * phi.square().sum()


def test(phi: Tensor, w: Tensor, data: Data) -> Tensor:
    """L."""
    return log_loss(data["x_test"] @ phi, data["y_test"])


PROBLEM = bilevel.BilevelProblem.from_functions(train, test, initial_phi=lambda w, data: w.new_zeros(31))


def patients(count: int) -> Data:
    x, y = map(torch.as_tensor, load_breast_cancer(return_X_y=True))
    mine, others = torch.randperm(len(y)).tensor_split([count])
    x = (x - x[mine].mean(0)) / x[mine].std(0)
    x, y = torch.cat([x, torch.ones(len(y), 1)], dim=1), y.double()
    return {"x": x[mine], "y": y[mine], "x_test": x[others], "y_test": y[others]}


def refits(w: Tensor, data: Data, phi: Tensor) -> Tensor:
    """The test loss ``(m,)`` of a fit for each row of the weights ``(m, n)``; phi is the start. All fits are one batch."""
    tasks = {name: tensor.expand(len(w), *tensor.shape) for name, tensor in data.items()}
    start = phi.expand(len(w), -1)
    found = bilevel.solve(PROBLEM, w, tasks, solver=SOLVER, init=start, batched=True, theta_batched=True, chunk_size=64)
    return vmap(lambda phi: test(phi, w, data))(found.unwrap())


def leverages(phi: Tensor, J: Tensor, data: Data) -> Tensor:
    """x_i^T H^{-1} x_i times the second derivative of the loss of example i, ``(n,)``; the Jacobian has H^{-1} x_i in it."""
    p = torch.sigmoid(data["x"] @ phi)
    return -(data["x"] * J.T).sum(1) * p * (1 - p) / (p - data["y"])


def timed(compute: Callable[[], Tensor], what: str) -> Tensor:
    start = time.process_time()
    result = compute()
    print(f"  {what:58}{time.process_time() - start:8.2f}")
    return result


def error(predicted: Tensor, true: Tensor) -> float:
    return float((predicted - true).norm() / true.norm())


def draw(predicted: dict[str, Tensor], alone: Tensor, pairs: Tensor, added: dict[str, Tensor], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
    colours = ("#cc3311", "#4477aa", "#228833")
    for axis, true, rows in ((axes[0], alone, predicted), (axes[1], pairs, added)):
        for (name, values), colour in zip(rows.items(), colours, strict=False):
            axis.plot(true, values, "o", ms=3.5, alpha=0.6, mew=0, color=colour, label=name)
        axis.axline((0, 0), slope=1, color="0.4", lw=1)
        axis.set(xlabel="change of the test loss, fitted again", ylabel="predicted")
        axis.locator_params(nbins=5)
        axis.legend(frameon=False)
    axes[0].set_title("without one example")
    axes[1].set_title("without a pair")
    figure.savefig(path, dpi=130)


def main(quick: bool, out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = patients(200 if quick else 285)
    n = len(data["y"])
    ones, eye = torch.ones(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)

    def fit(w: Tensor) -> Tensor:
        return bilevel.argmin(PROBLEM, w, data, solver=SOLVER, linsys=Exact())

    def outcome(w: Tensor) -> Tensor:
        return test(fit(w), w, data)

    phi, loss = fit(ones), outcome(ones)
    gradient = jacrev(outcome)(ones)
    print(f"{n} training examples, {len(data['y_test'])} test examples; test loss {loss:.4f}\n\nprocessor seconds")
    J = timed(lambda: jacrev(fit)(ones), f"Jacobian of the parameters, {len(phi)} x {n}")
    S = timed(lambda: hessian(outcome)(ones), f"Hessian of the test loss, {n} x {n}")
    alone = timed(lambda: refits(1 - eye, data, phi), f"{n} fits without one example") - loss

    h = leverages(phi, J, data)
    predictions: dict[str, Callable[[float], Tensor]] = {
        "first derivative": lambda t: -t * gradient,
        "first and second": lambda t: -t * gradient + 0.5 * t * t * S.diagonal(),
        "one Newton step": lambda t: vmap(lambda phi: test(phi, ones, data))(phi - t * (J / (1 - t * h)).T) - loss,
    }
    print("\nthe weight of one example lowered from 1: relative error of the predicted change, and rank correlation")
    print(f"  {'':20}" + "".join(f"{f'to {1 - t:g}':>12}" for t in STEPS) + f"{'ranks, to 0':>14}")
    true = [alone if t == 1 else refits(1 - t * eye, data, phi) - loss for t in STEPS]
    for name, predict in predictions.items():
        errors = "".join(f"{error(predict(t), change):12.1e}" for t, change in zip(STEPS, true, strict=True))
        print(f"  {name:20}{errors}{spearmanr(predict(1.0), alone).statistic:14.4f}")

    top = alone.abs().argsort(descending=True)[:20]
    i, j = top[torch.triu_indices(20, 20, 1)]
    pairs = refits(1 - eye[i] - eye[j], data, phi) - loss
    added = {"effects of the two, added": alone[i] + alone[j]}
    added["and the second derivative"] = alone[i] + alone[j] + S[i, j]
    print(f"\n{len(pairs)} pairs of the {len(top)} most influential examples left out: relative error")
    for name, values in added.items():
        print(f"  {name:32}{error(values, pairs):12.1e}")
    draw({name: predict(1.0) for name, predict in predictions.items()}, alone, pairs, added, out / "influence.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How much each training example matters")
    parser.add_argument("--quick", action="store_true", help="fewer examples")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figure")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.out)
