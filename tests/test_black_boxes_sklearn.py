"""Estimators of scikit-learn as inner solvers: autograd cannot see into them, and need not.

The oracles: the derivative of the fitted coefficients by dense algebra in numpy, and differences of two more fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from bilevel import BilevelProblem, Status, argmin, hypergradient, unrolled
from bilevel.linsys import CG, Exact
from bilevel.solvers import BlackBox

linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn, of the extra 'test'")
svm = pytest.importorskip("sklearn.svm", reason="needs scikit-learn, of the extra 'test'")

F64 = torch.float64
LINSYS = {"cg": CG(max_steps=50, rtol=1e-12), "exact": Exact()}


def draw(seed: int, n: int = 40, d: int = 4) -> dict[str, Tensor]:
    """A regression target ``y``, labels ``sign`` of two classes and ``label`` of three; a second part for validation."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, d, generator=generator, dtype=F64)
    scores = x @ torch.randn(d, 3, generator=generator, dtype=F64) + torch.randn(
        2 * n, 3, generator=generator, dtype=F64
    )
    whole = {
        "x": x,
        "y": 2 + scores[:, 0],
        "sign": torch.where(scores[:, 0] > 0.3, 1.0, -1.0).to(F64),
        "label": scores.argmax(1),
    }
    return {**{key: v[:n] for key, v in whole.items()}, **{f"{key}_v": v[n:] for key, v in whole.items()}}


def output(phi: Any, x: Tensor) -> Tensor:
    return x @ phi["w"] + phi["b"]


def line(d: int = 4) -> dict[str, Tensor]:
    return {"w": torch.zeros(d, dtype=F64), "b": torch.zeros((), dtype=F64)}


def coefficients(model: Any) -> dict[str, Tensor]:
    """Slope and intercept of a fitted line."""
    return {"w": torch.as_tensor(model.coef_.reshape(-1)), "b": torch.as_tensor(model.intercept_).reshape(())}


def coefficients_of(phi: Any) -> Any:
    """The two as one vector of numpy, the intercept last."""
    return np.append(phi["w"].numpy(), float(phi["b"]))


def with_ones(x: Tensor) -> Any:
    return np.hstack([x.numpy(), np.ones((len(x), 1))])


def refits(fit: Callable[[Tensor], Any], loss: Callable[[Any], Tensor], theta: Tensor, h: float = 1e-4) -> Tensor:
    """dL/dtheta by central differences of the validation loss of two more fits, for each entry."""
    entries = []
    for step in h * torch.eye(theta.numel(), dtype=F64):
        ahead, behind = (loss(fit(theta + sign * step.reshape(theta.shape))) for sign in (1, -1))
        entries.append((ahead - behind) / (2 * h))
    return torch.stack(entries).reshape(theta.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Ridge: a penalty, and a weight for each example.


def ridge_objective(phi: Any, theta: Any, data: Any) -> Tensor:
    errors = (output(phi, data["x"]) - data["y"]).square()
    return (theta["weight"].exp() * errors).sum() + theta["penalty"].exp() * phi["w"].square().sum()


def ridge_loss(phi: Any, theta: Any, data: Any) -> Tensor:
    return 0.5 * (output(phi, data["x_v"]) - data["y_v"]).square().mean()


def fit_ridge(problem: Any, theta: Any, data: Any, init: Any) -> Any:
    model = linear_model.Ridge(alpha=float(theta["penalty"].exp()), solver="cholesky")
    return coefficients(model.fit(data["x"].numpy(), data["y"].numpy(), sample_weight=theta["weight"].exp().numpy()))


RIDGE = BilevelProblem.from_functions(ridge_objective, ridge_loss, lambda theta, data: line())


def ridge_closed_form(theta: Any, data: Any) -> tuple[Any, dict[str, Any]]:
    """(w, b) by the weighted normal equations with the intercept as a last column, and its derivatives."""
    z, y = with_ones(data["x"]), data["y"].numpy()
    weight, penalty = theta["weight"].exp().numpy(), float(theta["penalty"].exp())
    free = np.array([1.0] * (z.shape[1] - 1) + [0.0])  # the intercept is not penalised
    inverse = np.linalg.inv(z.T @ (weight[:, None] * z) + penalty * np.diag(free))
    phi = inverse @ (z.T @ (weight * y))
    return phi, {"weight": inverse @ (z.T * (weight * (y - z @ phi))), "penalty": -penalty * inverse @ (free * phi)}


def ridge_theta() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"penalty": torch.tensor(0.7, dtype=F64), "weight": 0.5 * torch.randn(40, generator=generator, dtype=F64)}


@pytest.mark.parametrize("linsys", LINSYS)
def test_ridge_has_the_hypergradient_of_the_closed_form(linsys: str) -> None:
    theta, data = ridge_theta(), draw(0)
    result = hypergradient(RIDGE, theta, data, solver=BlackBox(fit_ridge, tol=1e-9), linsys=LINSYS[linsys])
    assert result.inner.status is Status.CONVERGED
    phi, derivative = ridge_closed_form(theta, data)
    np.testing.assert_allclose(result.inner.value["w"].numpy(), phi[:-1], rtol=1e-10)
    zv = with_ones(data["x_v"])
    slope = zv.T @ (zv @ phi - data["y_v"].numpy()) / len(zv)
    for key, grad in result.unwrap().items():
        np.testing.assert_allclose(grad.numpy(), slope @ derivative[key], rtol=1e-8, atol=1e-12)


def test_the_coefficients_themselves_have_a_jacobian_and_vmap_fits_each_data_set() -> None:
    theta, sets = ridge_theta(), [draw(0), draw(1), draw(2)]
    data = {key: torch.stack([part[key] for part in sets]) for key in sets[0]}

    def fitted(theta: Any, data: Any) -> Any:
        return argmin(RIDGE, theta, data, solver=BlackBox(fit_ridge, tol=1e-9), linsys=Exact())

    jacobians = torch.func.vmap(torch.func.jacrev(fitted), in_dims=(None, 0))(theta, data)
    for k, part in enumerate(sets):
        _, derivative = ridge_closed_form(theta, part)
        for key in theta:
            np.testing.assert_allclose(jacobians["w"][key][k].numpy(), derivative[key][:-1], rtol=1e-8, atol=1e-11)
            np.testing.assert_allclose(jacobians["b"][key][k].numpy(), derivative[key][-1], rtol=1e-8, atol=1e-11)


# ----------------------------------------------------------------------------------------------------------------------
# Logistic regression: no closed form. scikit-learn minimises C sum(losses) + |w|^2 / 2; that is our objective for C = 1 / penalty.


def logistic_objective(phi: Any, theta: Tensor, data: Any) -> Tensor:
    return softplus(-data["sign"] * output(phi, data["x"])).sum() + 0.5 * theta.exp() * phi["w"].square().sum()


def logistic_loss(phi: Any, theta: Tensor, data: Any) -> Tensor:
    return softplus(-data["sign_v"] * output(phi, data["x_v"])).mean()


def fit_logistic(problem: Any, theta: Tensor, data: Any, init: Any) -> Any:
    model = linear_model.LogisticRegression(C=float((-theta).exp()), solver="newton-cholesky", tol=1e-12)
    return coefficients(model.fit(data["x"].numpy(), data["sign"].numpy()))


LOGISTIC = BilevelProblem.from_functions(logistic_objective, logistic_loss, lambda theta, data: line())


@pytest.mark.parametrize("linsys", LINSYS)
@pytest.mark.parametrize("log_penalty", [-2.0, 1.0])
def test_logistic_regression_against_dense_algebra_and_refits(linsys: str, log_penalty: float) -> None:
    theta, data = torch.tensor(log_penalty, dtype=F64), draw(0)
    result = hypergradient(LOGISTIC, theta, data, solver=BlackBox(fit_logistic, tol=1e-8), linsys=LINSYS[linsys])
    assert result.inner.status is Status.CONVERGED
    got = result.unwrap()

    z, zv, s, sv = with_ones(data["x"]), with_ones(data["x_v"]), data["sign"].numpy(), data["sign_v"].numpy()
    w = coefficients_of(fit_logistic(LOGISTIC, theta, data, None))
    p = 1 / (1 + np.exp(-(z @ w)))
    free = np.array([1.0] * (len(w) - 1) + [0.0])
    hessian = z.T @ ((p * (1 - p))[:, None] * z) + np.exp(log_penalty) * np.diag(free)
    slope = -zv.T @ (sv / (1 + np.exp(sv * (zv @ w)))) / len(zv)
    np.testing.assert_allclose(
        got.numpy(), -slope @ np.linalg.solve(hessian, np.exp(log_penalty) * free * w), rtol=1e-7
    )
    assert (
        np.abs(z.T @ (s / (1 + np.exp(s * (z @ w)))) - np.exp(log_penalty) * free * w).max() < 1e-8
    )  # the oracle's own

    again = refits(lambda t: fit_logistic(LOGISTIC, t, data, None), lambda phi: logistic_loss(phi, theta, data), theta)
    torch.testing.assert_close(got, again, rtol=1e-5, atol=1e-9)


def test_three_classes_and_a_penalty_for_each_feature_against_refits() -> None:
    """A penalty exp(theta_j) |w_j|^2 / 2 is the scaling of feature j by exp(-theta_j / 2) under a penalty of one."""

    def objective(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        penalty = 0.5 * (theta.exp() * phi.square()).sum()
        return cross_entropy(data["x"] @ phi.T, data["label"], reduction="sum") + penalty

    def loss(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return cross_entropy(data["x_v"] @ phi.T, data["label_v"])

    def fit(problem: Any, theta: Tensor, data: Any, init: Any) -> Tensor:
        scale = (-0.5 * theta).exp()
        model = linear_model.LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cg", tol=1e-12)
        model.fit((data["x"] * scale).numpy(), data["label"].numpy())
        return torch.from_numpy(model.coef_) * scale

    problem = BilevelProblem.from_functions(objective, loss, lambda theta, data: torch.zeros(3, 4, dtype=F64))
    theta, data = torch.tensor([-1.0, 0.5, 2.0, 0.0], dtype=F64), draw(3)
    result = hypergradient(problem, theta, data, solver=BlackBox(fit, tol=1e-8), linsys=CG(max_steps=50, rtol=1e-12))
    assert result.inner.status is Status.CONVERGED
    again = refits(lambda t: fit(problem, t, data, None), lambda phi: loss(phi, theta, data), theta)
    torch.testing.assert_close(result.unwrap(), again, rtol=1e-5, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# A support vector machine with squared hinges: |w|^2 / 2 + C sum max(0, 1 - y f)^2, quadratic between its kinks.


def test_squared_hinges_have_the_derivative_of_their_active_set() -> None:
    def objective(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        hinges = (1 - data["sign"] * (data["x"] @ w)).relu()
        return 0.5 * w.square().sum() + theta.exp() * hinges.square().sum()

    def loss(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        return 0.5 * (data["x_v"] @ w - data["sign_v"]).square().mean()

    def fit(problem: Any, theta: Tensor, data: Any, init: Any) -> Tensor:
        model = svm.LinearSVC(C=float(theta.exp()), dual=False, fit_intercept=False, tol=1e-12, max_iter=1000)
        return torch.from_numpy(model.fit(data["x"].numpy(), data["sign"].numpy()).coef_[0])

    problem = BilevelProblem.from_functions(objective, loss, lambda theta, data: torch.zeros(4, dtype=F64))
    theta, data = torch.tensor(-1.0, dtype=F64), draw(4)
    # liblinear compares values of G, and so stops at the root of the rounding error
    result = hypergradient(problem, theta, data, solver=BlackBox(fit, tol=1e-6), linsys=Exact())
    assert result.inner.status is Status.CONVERGED

    x, s, xv, sv, c = data["x"].numpy(), data["sign"].numpy(), data["x_v"].numpy(), data["sign_v"].numpy(), np.exp(-1.0)
    w = result.inner.value.numpy()
    active = s * (x @ w) < 1
    assert 0 < active.sum() < len(x) and np.abs(1 - s * (x @ w)).min() > 1e-4  # not at a kink
    xa, sa = x[active], s[active]
    inverse = np.linalg.inv(np.eye(4) + 2 * c * xa.T @ xa)
    distance = np.linalg.norm(w - 2 * c * inverse @ (xa.T @ sa))
    assert distance <= float(result.inner.residual) * (1 + 1e-6)  # no eigenvalue is below 1
    slope = xv.T @ (xv @ w - sv) / len(xv)
    np.testing.assert_allclose(result.unwrap().numpy(), 2 * c * slope @ inverse @ xa.T @ (sa - xa @ w), rtol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Its answer is measured.


def test_an_estimator_that_stops_early_is_measured_not_believed() -> None:
    """scikit-learn warns; the status says it for a program, and the residual says by how much."""
    theta, data = torch.tensor(-2.0, dtype=F64), draw(0)

    def fit(problem: Any, theta: Tensor, data: Any, init: Any) -> Any:
        model = linear_model.LogisticRegression(C=float((-theta).exp()), solver="lbfgs", max_iter=2)
        with pytest.warns(UserWarning, match="failed to converge"):
            return coefficients(model.fit(data["x"].numpy(), data["sign"].numpy()))

    result = hypergradient(LOGISTIC, theta, data, solver=BlackBox(fit, tol=1e-8), linsys=Exact())
    assert result.inner.status is Status.MAX_STEPS
    z, s, w = with_ones(data["x"]), data["sign"].numpy(), coefficients_of(result.inner.value)
    gradient = -z.T @ (s / (1 + np.exp(s * (z @ w)))) + np.exp(-2.0) * np.append(w[:-1], 0.0)
    np.testing.assert_allclose(float(result.inner.residual), np.linalg.norm(gradient), rtol=1e-9)
    assert float(result.inner.residual) > 1e-2


def test_another_convention_of_the_penalty_is_found_out() -> None:
    """Ridge has no 1/2 in front of its penalty. Who writes it into the objective has a residual of |penalty w|."""

    def halved(phi: Any, theta: Any, data: Any) -> Tensor:
        return ridge_objective(phi, theta, data) - 0.5 * theta["penalty"].exp() * phi["w"].square().sum()

    problem = BilevelProblem.from_functions(halved, ridge_loss, lambda theta, data: line())
    theta, data = ridge_theta(), draw(0)
    result = hypergradient(problem, theta, data, solver=BlackBox(fit_ridge, tol=1e-9), linsys=Exact())
    assert result.inner.status is Status.MAX_STEPS
    expected = float(theta["penalty"].exp()) * np.linalg.norm(ridge_closed_form(theta, data)[0][:-1])
    np.testing.assert_allclose(float(result.inner.residual), expected, rtol=1e-8)


def test_there_is_no_path_to_differentiate() -> None:
    with pytest.raises(TypeError, match="BlackBox"):
        unrolled(LOGISTIC, torch.tensor(0.0, dtype=F64), draw(0), solver=BlackBox(fit_logistic))
