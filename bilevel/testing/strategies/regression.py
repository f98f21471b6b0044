"""Ridge, logistic and proximal problems: losses of a linear model, f the squared or the logistic loss.

    G = mean(w f(X phi, y)) + 1/2 sum_j a_j phi_j^2         L = mean f(X_val phi, y_val) (+ |theta|^2 / 20)

theta is one of: the logarithms of the penalties a, one for each feature ("penalties") or one for all ("penalty"); the logits of the
example weights w = sigmoid(theta) ("weights"); the targets y ("targets"). In a proximal problem theta is the centre:

    G = mean f(X phi, y) + 1/2 (phi - theta)^T Lambda (phi - theta)          L = mean f(X_val phi, y_val).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.constants import Constants
from bilevel.problem import BilevelProblem
from bilevel.proximal import ProximalProblem
from bilevel.testing.strategies.case import MARGIN, Model, extreme_eigenvalues, longest_row, rounded, spectral_norm
from bilevel.testing.strategies.draws import DIRECT, Array, Setup, columns, with_spectrum
from bilevel.testing.strategies.elementwise import LOGISTIC, SQUARED, Loss, sigmoid, sigmoid_slope
from bilevel.testing.strategies.oracle import Arrays, Derivatives
from bilevel.testing.strategies.structures import layouts, raveled
from bilevel.trees import Layout, Tree, unflatten

SPREAD = 1.5
"""The largest penalty over the smallest."""


@dataclass(frozen=True)
class Fit:
    """A loss of the outputs X phi: (output - y)^2 / 2, or the logistic loss of labels 0 and 1."""

    loss: Loss

    @property
    def classifies(self) -> bool:
        """Whether y are labels."""
        return self.loss is LOGISTIC

    def values(self, outputs: Tensor, y: Tensor) -> Tensor:
        """One loss for each example."""
        return self.loss.value((1 - 2 * y) * outputs if self.classifies else outputs - y)

    def affine(self, X: Array, y: Array) -> tuple[Array, Array | int]:
        """M and t such that the losses are f(M phi - t)."""
        return (columns(1 - 2 * y, X), 0) if self.classifies else (X, y)

    def numbers(self, setup: Setup, kappa: float, n: int, m: int) -> Arrays:
        """f'' X^T X / n has eigenvalues of at most scale (kappa - 1.5). Validation data fit a phi of size scale^(-1/2)."""
        source, d = setup.source, setup.d
        k = min(n, d)
        top = setup.scale * (kappa - SPREAD) / self.loss.bounds[1]
        singular = np.sqrt(n * top * source.spectrum(k, kappa, setup.shape))
        X = (source.orthogonal(n, k) * singular) @ source.orthogonal(d, k).T
        X_val = setup.scale**0.5 * source.normal(m, d)
        y, y_val = source.normal(n), source.normal(m)
        if self.classifies:
            y, y_val = (y > 0).astype(np.int64), (y_val > 0).astype(np.int64)
        return {"X": X, "y": y, "X_val": X_val, "y_val": y_val}

    def outer(self, n: Arrays, direct: bool) -> Any:
        """dL/dphi and dL/dtheta, as a function of phi."""
        M, t = self.affine(n["X_val"], n["y_val"])

        def gradients(phi: Array) -> tuple[Array, Array | int]:
            return M.T @ self.loss.first(M @ phi - t) / len(M), n["theta"] / 10 if direct else 0

        return gradients

    def outer_bounds(self, n: Arrays) -> dict[str, float | None]:
        """B and L."""
        first, second, _ = self.loss.bounds
        size = spectral_norm(n["X_val"]) / len(n["X_val"]) ** 0.5
        return {"B": None if first is None else first * size, "L": second * size * size}


def ridge(draw: st.DrawFn, setup: Setup) -> Model:
    """Squared losses."""
    return _regression(draw, setup, Fit(SQUARED), "ridge", ["penalties", "penalty", "weights", "targets"])


def logistic(draw: st.DrawFn, setup: Setup) -> Model:
    """Logistic losses."""
    return _regression(draw, setup, Fit(LOGISTIC), "logistic", ["penalties", "penalty", "weights"])


def _regression(draw: st.DrawFn, setup: Setup, fit: Fit, family: str, roles: list[str]) -> Model:
    role = draw(st.sampled_from(roles))
    n, m = draw(st.integers(1, 3 * setup.d)), draw(st.integers(1, setup.max_dim))
    direct = draw(st.booleans())
    p = {"penalties": setup.d, "penalty": 1, "weights": n, "targets": n}[role]
    phi_layout, theta_layout = draw(layouts(setup.d, setup.structured)), draw(layouts(p, setup.structured))
    tasks = [fit.numbers(setup, kappa, n, m) for kappa in setup.kappas]
    penalised = role in ("penalties", "penalty")
    for task in tasks:
        if role == "targets":
            del task["y"]
        if not penalised:
            task["penalty"] = np.array(setup.scale)
    spread = np.log(setup.scale) + np.log(SPREAD) * setup.source.uniform(p)
    return Model(
        name=setup.name(f"{family}, theta: {role}{DIRECT * direct}"),
        problem=_regression_problem(fit, role, direct, phi_layout, theta_layout),
        theta=spread if penalised else setup.source.normal(p),
        tasks=tasks,
        derive=lambda arrays: _regression_derivatives(arrays, fit, role, direct),
        bound=lambda arrays: _regression_bounds(arrays, fit, role),
        phi_layout=phi_layout,
        theta_layout=theta_layout,
    )


def _regression_problem(fit: Fit, role: str, direct: bool, phi_layout: Layout, theta_layout: Layout) -> BilevelProblem:
    def inner(phi: Tree, theta: Tree, data: dict[str, Tensor]) -> Tensor:
        x, y = raveled(phi_layout, phi), raveled(theta_layout, theta)
        losses = fit.values(data["X"] @ x, y if role == "targets" else data["y"])
        if role == "weights":
            losses = torch.sigmoid(y) * losses
        penalty = data["penalty"] if "penalty" in data else y.exp()
        return losses.mean() + 0.5 * (penalty * x.square()).sum()

    def outer(phi: Tree, theta: Tree, data: dict[str, Tensor]) -> Tensor:
        loss = fit.values(data["X_val"] @ raveled(phi_layout, phi), data["y_val"]).mean()
        return loss + raveled(theta_layout, theta).square().sum() / 20 if direct else loss

    def start(theta: Tree, data: dict[str, Tensor]) -> Tree:
        return phi_layout.unravel(torch.zeros_like(data["X"][0]))

    return BilevelProblem.from_functions(inner, outer, start)


def _regression_derivatives(n: Arrays, fit: Fit, role: str, direct: bool) -> Derivatives:
    theta, X, loss = n["theta"], n["X"], fit.loss
    M, t = fit.affine(X, theta if role == "targets" else n["y"])
    weights = sigmoid(theta) if role == "weights" else 1
    penalty = n["penalty"] if "penalty" in n else np.exp(theta)

    def cross(phi: Array, u: Array) -> Array:
        if role == "weights":
            return sigmoid_slope(theta) * loss.first(M @ phi - t) * (M @ u) / len(X)
        if role == "targets":
            return -loss.second(M @ phi - t) * (M @ u) / len(X)
        each = penalty * phi * u
        return each if role == "penalties" else each.sum(keepdims=True)

    return Derivatives(
        gradient=lambda phi: M.T @ (weights * loss.first(M @ phi - t)) / len(M) + penalty * phi,
        product=lambda phi, v: M.T @ columns(weights * loss.second(M @ phi - t), M @ v) / len(M) + columns(penalty, v),
        cross=cross,
        outer=fit.outer(n, direct),
    )


def _regression_bounds(n: Arrays, fit: Fit, role: str) -> tuple[Constants, float]:
    theta, X = n["theta"], n["X"]
    first, second, _ = fit.loss.bounds
    weights = sigmoid(theta) if role == "weights" else np.ones(len(X))
    penalty = n["penalty"] if "penalty" in n else np.exp(theta)
    mu, beta, rho = _inner_bounds(X, weights, np.diag(penalty * np.ones(X.shape[1])), fit)
    C: float | None = None
    if role == "targets":
        C = spectral_norm(X) / len(X)
    elif role == "weights":
        slopes = spectral_norm(columns(sigmoid_slope(theta), X)) / len(X)
        C = None if first is None else first * slopes
        rho = max(rho, second * longest_row(X) * slopes)
    else:  # exp(theta) phi: unbounded in phi
        rho = max(rho, float(penalty.max()) * (1 + MARGIN))
    return Constants(mu=mu, rho=rho, C=C, everywhere=True, **fit.outer_bounds(n)), beta


def _inner_bounds(X: Array, weights: Array, regulariser: Array, fit: Fit) -> tuple[float, float, float]:
    """mu, beta and the Lipschitz constant of the Hessian of mean(w f(X phi - t)) + 1/2 phi^T regulariser phi, for every t."""
    _, second, third = fit.loss.bounds
    smallest, largest = extreme_eigenvalues(regulariser)
    weighted = columns(np.sqrt(weights / len(X)), X)
    if third == 0:  # the Hessian is the same everywhere
        low, high = extreme_eigenvalues(second * weighted.T @ weighted + regulariser, terms=len(X))
        return max(low, smallest), high, 0.0
    size = spectral_norm(weighted) ** 2
    return smallest, second * size + largest, third * longest_row(X) * size


def proximal(draw: st.DrawFn, setup: Setup) -> Model:
    """Lambda: a number, one for each leaf, a diagonal or a matrix, with eigenvalues from scale to 1.5 scale."""
    fit = Fit(draw(st.sampled_from([SQUARED, LOGISTIC])))
    kind = draw(st.sampled_from(["number", "leaves", "diagonal", "matrix"]))
    n, m = draw(st.integers(1, 3 * setup.d)), draw(st.integers(1, setup.max_dim))
    layout = draw(layouts(setup.d, setup.structured))
    source, d = setup.source, setup.d
    lam, matrix = _lambda(setup, kind, layout)
    problem = ProximalProblem.from_model(
        lambda phi, data: data["X"] @ raveled(layout, phi),
        lambda outputs, data: fit.values(outputs, data["y"]).mean(),
        lambda phi, data: fit.values(data["X_val"] @ raveled(layout, phi), data["y_val"]).mean(),
        lam,
    )
    # so that X theta, too, is about 1
    size = (setup.scale * max(setup.kappas)) ** -0.5
    return Model(
        name=setup.name(f"proximal, {'logistic' if fit.classifies else 'squared'} loss, lam: {kind}"),
        problem=problem,
        theta=size * source.normal(d),
        tasks=[fit.numbers(setup, kappa, n, m) for kappa in setup.kappas],
        derive=lambda arrays: _proximal_derivatives(arrays, fit),
        bound=lambda arrays: _proximal_bounds(arrays, fit),
        phi_layout=layout,
        theta_layout=layout,
        hidden={"lam": matrix},
    )


def _lambda(setup: Setup, kind: str, layout: Layout) -> tuple[Any, Array]:
    """``lam`` as :class:`ProximalProblem` takes it, and as a matrix ``(d, d)``."""

    def drawn(count: int) -> Array:
        return setup.scale * (1 + (SPREAD - 1) * setup.source.uniform(count))

    if kind == "matrix":
        matrix = rounded(with_spectrum(setup.source.orthogonal(setup.d, setup.d), drawn(setup.d)), setup.dtype)
        return torch.tensor(matrix, dtype=setup.dtype), matrix
    if kind == "diagonal":
        diagonal = rounded(drawn(setup.d), setup.dtype)
        return layout.unravel(torch.tensor(diagonal, dtype=setup.dtype)), np.diag(diagonal)
    each = rounded(drawn(1 if kind == "number" else len(layout.sizes)), setup.dtype)
    lam = float(each[0]) if kind == "number" else unflatten(layout.structure, each.tolist())
    return lam, np.diag(np.repeat(each, setup.d if kind == "number" else layout.sizes))


def _proximal_derivatives(n: Arrays, fit: Fit) -> Derivatives:
    M, t = fit.affine(n["X"], n["y"])
    loss, lam = fit.loss, n["lam"]
    return Derivatives(
        gradient=lambda phi: M.T @ loss.first(M @ phi - t) / len(M) + lam @ (phi - n["theta"]),
        product=lambda phi, v: M.T @ columns(loss.second(M @ phi - t), M @ v) / len(M) + lam @ v,
        cross=lambda phi, u: -(lam @ u),
        outer=fit.outer(n, direct=False),
    )


def _proximal_bounds(n: Arrays, fit: Fit) -> tuple[Constants, float]:
    mu, beta, rho = _inner_bounds(n["X"], np.ones(len(n["X"])), n["lam"], fit)
    C = extreme_eigenvalues(n["lam"])[1]
    return Constants(mu=mu, rho=rho, C=C, everywhere=True, **fit.outer_bounds(n)), beta
