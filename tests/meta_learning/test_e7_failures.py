"""E7, failure cases: every reference of the experiment against another one (SciPy, loops in NumPy, finite differences), and what the
library says of each case."""

import copy
import json
from functools import cache

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel
from applications.meta_learning.experiments import e7_failures as page
from applications.meta_learning.experiments import failures
from applications.meta_learning.experiments.base import Numbers


@cache
def measured() -> dict[str, Numbers]:
    """Small versions of all cases, once for the module."""
    return {
        "negative_curvature": failures.negative_curvature((1, 5, 60)),
        "unconverged": failures.unconverged((1e-3, 1.0), 10, 1),
        "flat": failures.flat((1e-2, 1e-6), 1),
        "too_large_a_step": failures.too_large_a_step((1, 5, 20, 200)),
        "black_boxes": failures.black_boxes((5, 40), (1e-2, 1e-8), 2, 1),
        "dependence": failures.dependence((1, 30), 1),
        "kink": failures.kink((0.5, 1.75, 2.5)),
        "scaled": failures.scaled((3, 300), 1),
    }


def central(fn, at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    return np.array([(fn(at + h * e) - fn(at - h * e)) / (2 * h) for e in np.eye(len(at))])


# --- A


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_double_well_by_the_chain_rule_written_out(steps: int) -> None:
    """J <- (I - alpha H) J + alpha lambda I, with the Hessian by differences of the slope."""
    theta, lam, alpha = np.array(failures.WELL_THETA), failures.WELL_LAM, failures.WELL_STEP

    def value(phi: np.ndarray) -> float:
        return 0.25 * (phi[0] ** 2 - 1) ** 2 + 0.5 * (phi[1] - phi[0]) ** 2 + 0.5 * lam * np.sum((phi - theta) ** 2)

    def slope(phi: np.ndarray) -> np.ndarray:
        return central(value, phi)

    phi, j = theta.copy(), np.eye(2)
    for _ in range(steps):
        h = np.array([[3 * phi[0] ** 2 + lam, -1], [-1, 1 + lam]])
        j, phi = (np.eye(2) - alpha * h) @ j + alpha * lam * np.eye(2), phi - alpha * slope(phi)
    second = np.stack([(slope(phi + 1e-4 * e) - slope(phi - 1e-4 * e)) / 2e-4 for e in np.eye(2)])
    np.testing.assert_allclose(failures.well_hessian(phi), second, atol=1e-4)
    row = next(row for row in measured()["negative_curvature"]["rows"] if row["steps"] == steps)
    np.testing.assert_allclose(row["run"], j.T @ (phi - failures.WELL_GOAL), rtol=1e-6)
    assert row["eigenvalue"] == pytest.approx(np.linalg.eigvalsh(second)[0], abs=1e-4)


def test_double_well_maml_has_a_gradient_and_imaml_has_none() -> None:
    case = measured()["negative_curvature"]
    assert all(row["maml"] < 1e-7 for row in case["rows"])
    for row in case["rows"]:
        assert (row["imaml"] is None) == (row["eigenvalue"] < 0) == (row["status"] == "NEGATIVE_CURVATURE")
    assert case["said"]["linear"] == "NEGATIVE_CURVATURE" and "phi is not a minimum of G" in case["said"]["explain"][-1]


# --- B


def quadratics() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 3, 3))
    return x @ np.swapaxes(x, 1, 2) / 10, rng.standard_normal((4, 3))


def loss_by_steps(theta: np.ndarray, a: np.ndarray, w: np.ndarray, lam: float, steps: int) -> float:
    losses = []
    for a_i, w_i in zip(a, w, strict=True):
        phi = theta.copy()
        for _ in range(steps):
            phi = phi - (a_i @ (phi - w_i) + lam * (phi - theta)) / (1 + lam)
        losses.append(0.5 * np.sum((phi - w_i) ** 2))
    return float(np.mean(losses))


@pytest.mark.parametrize("lam", [1e-3, 0.5])
def test_quadratic_references_by_the_steps_themselves(lam: float) -> None:
    (a, w), theta = quadratics(), np.array([0.3, -1.0, 0.5])
    assert failures.loss_after(theta, a, w, lam, 7) == pytest.approx(loss_by_steps(theta, a, w, lam, 7), rel=1e-12)
    found = scipy.optimize.minimize(loss_by_steps, theta, args=(a, w, lam, 7), options={"gtol": 1e-9})
    np.testing.assert_allclose(failures.best_start(a, w, lam, 7), found.x, atol=1e-5)
    by_differences = central(lambda t: loss_by_steps(t, a, w, lam, 7), theta)
    np.testing.assert_allclose(failures.run_gradient(theta, a, w, lam, 7), by_differences, rtol=1e-6)

    def at_the_minimum(t: np.ndarray) -> float:
        phis = [np.linalg.solve(a_i + lam * np.eye(3), a_i @ w_i + lam * t) for a_i, w_i in zip(a, w, strict=True)]
        return float(np.mean(0.5 * np.sum((np.array(phis) - w) ** 2, -1)))

    np.testing.assert_allclose(
        failures.exact_gradient(theta, a, w, lam), central(at_the_minimum, theta), rtol=1e-5, atol=1e-9
    )


def test_far_from_converged_maml_is_the_best_and_the_estimate_is_right() -> None:
    first, last = measured()["unconverged"]["rows"]
    for row in (first, last):
        assert abs(row["maml"]) < 1e-10 < row["imaml"] + 1e-9 and row["estimate"] == pytest.approx(
            row["error"], rel=0.01
        )
    assert first["imaml"] > 1e-3 > last["imaml"] and first["run_error"] > 0.5 and last["error"] < 1e-3
    assert "The inner solve limits the accuracy" in measured()["unconverged"]["said"]["explain"][-1]


# --- C


def test_flat_error_is_of_the_order_of_lambda_and_without_it_there_is_a_refusal() -> None:
    case = measured()["flat"]
    assert case["maml float64"] < 1e-13 and case["maml float32"] < 1e-5
    large, small = case["imaml float64"]
    assert 1e-4 < large < 1e-1 and small == pytest.approx(1e-4 * large, rel=0.1)  # lambda is 10,000 times smaller
    assert case["without"].startswith("ValueError: theta: expected every leaf of theta to enter")


# --- D


def test_chaos_reference_and_path() -> None:
    lam, theta = failures.CHAOS_LAM, failures.CHAOS_THETA

    def minimum(t: float) -> float:
        return scipy.optimize.brentq(lambda p: p**3 - p + lam * (p - t), 0.6, 2.0, xtol=1e-15)

    def loss(t: float) -> float:
        return 0.5 * (minimum(t) - failures.CHAOS_GOAL) ** 2

    exact = (loss(theta + 1e-5) - loss(theta - 1e-5)) / 2e-5
    assert failures.chaos_exact() == pytest.approx(exact, rel=1e-6)
    case = measured()["too_large_a_step"]
    for name, alpha in failures.CHAOS_STEPS.items():
        phi, j = theta, 1.0
        for step in range(1, 21):
            j = (1 - alpha * (3 * phi**2 - 1 + lam)) * j + alpha * lam
            phi -= alpha * (phi**3 - phi + lam * (phi - theta))
            if step in case["steps"]:
                assert case[name]["grad"][case["steps"].index(step)] == pytest.approx(
                    j * (phi - failures.CHAOS_GOAL), rel=1e-6
                )
    assert abs(case["too large"]["grad"][-1]) > 1e10 and case["stable"]["grad"][-1] == pytest.approx(exact, rel=1e-6)
    assert case["imaml, Newton-CG"]["error"] < 1e-10 and case["imaml, Newton-CG"]["said"]["inner"] == "CONVERGED"
    assert case["imaml, same solver"]["error"] > 0.1 and case["imaml, same solver"]["said"]["inner"] == "MAX_STEPS"


# --- E


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_stretch_is_that_of_the_matrix_recursion(lam: float) -> None:
    values, j = np.array([0.0, 0.03, 1.0]), np.eye(3)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    a = turn @ np.diag(values) @ turn.T
    for _ in range(12):
        j = j - (a @ j + lam * (j - np.eye(3))) / (1 + lam)
    np.testing.assert_allclose(np.sort(failures.stretch(values, lam, 12)), np.linalg.eigvalsh(j), atol=1e-12)
    assert failures.largest_stretch(torch.tensor(a), lam, 12) == pytest.approx(np.linalg.norm(j, 2), rel=1e-12)


def test_section_2_2() -> None:
    for curve in measured()["dependence"]["curves"]:
        np.testing.assert_allclose(curve["norm"], curve["exact"], rtol=1e-12)
        falls = curve["norm"][-1] < 0.75
        assert falls == (curve["case"] == "determined" and not curve["lam"])


# --- F


def test_logistic_reference_by_scipy_and_differences() -> None:
    rng = np.random.default_rng(5)
    x, x_test = rng.standard_normal((2, 30, 3))
    y, y_test = rng.choice([-1.0, 1.0], (2, 30))
    theta = rng.standard_normal(3)

    def loss(x: np.ndarray, y: np.ndarray, phi: np.ndarray) -> float:
        return float(np.mean(np.log1p(np.exp(-y * (x @ phi)))))

    def outer(t: np.ndarray) -> float:
        inner = scipy.optimize.minimize(
            lambda p: loss(x, y, p) + 0.1 * np.sum((p - t) ** 2), t, options={"gtol": 1e-10}
        ).x
        return loss(x_test, y_test, inner)

    found = failures.logistic_exact(x, y, x_test, y_test, theta, 0.2)
    np.testing.assert_allclose(found, central(outer, theta, 1e-2), rtol=2e-3, atol=2e-4)


def test_black_boxes_are_as_good_as_their_points() -> None:
    case = measured()["black_boxes"]
    for row in case["rows"]:
        assert row["estimate"] == pytest.approx(row["error"], rel=0.2) and row["error"] < 20 * row["residual"]
    assert min(row["error"] for row in case["rows"] if row["solver"] == "samples") < 1e-6
    assert case["maml"].startswith("TypeError: unrolled: expected an iterative solver")


def test_sampler_asks_for_no_slope() -> None:
    """|x| has no gradient that the sampler could use at 0, and a floor no gradient at all."""
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, task: torch.floor(20 * (phi - 0.5).abs()).sum(), lambda phi, task: phi.sum(), 1e-9
    )
    start = torch.zeros(2, dtype=torch.float64)
    found = failures.by_samples(problem, start, None, start, generations=15, seed=0)
    assert (found - 0.5).abs().max() < 0.06


# --- G and H


def test_kink_by_minimisation() -> None:
    def minimum(t: float) -> float:
        return scipy.optimize.minimize_scalar(
            lambda p: abs(p - failures.KINK_AT) + 0.5 * failures.KINK_LAM * (p - t) ** 2,
            bounds=(-5, 5),
            method="bounded",
            options={"xatol": 1e-10},
        ).x

    for row in measured()["kink"]["rows"]:
        slope = (minimum(row["theta"] + 0.01) - minimum(row["theta"] - 0.01)) / 0.02
        assert row["exact"] == pytest.approx(slope, abs=1e-4)
        assert row["fixed point"] == pytest.approx(slope, abs=1e-4)
        assert row["maml"] == pytest.approx(1) and row["imaml"] == pytest.approx(1)
        assert (row["residual"] > 0.1) == (row["exact"] == 0)


def test_precision_makes_no_difference_before_convergence() -> None:
    curves = {(c["data"], c["method"], c["dtype"]): c["error"] for c in measured()["scaled"]["curves"]}
    for data in ("as they are", "scaled"):
        for method in ("MAML", "iMAML"):
            single, double = (curves[data, method, dtype][0] for dtype in ("float32", "float64"))
            assert double > 0.1 and single == pytest.approx(double, rel=1e-3)
    assert curves["scaled", "MAML", "float64"][1] < 1e-8 < 1e-2 < curves["as they are", "MAML", "float64"][1]
    assert 1e-8 < curves["scaled", "MAML", "float32"][1] < 1e-4


# --- The page


def test_page_says_what_the_numbers_say() -> None:
    result = json.loads(json.dumps(measured()))
    text = "\n".join(page.E7Failures().findings(result))
    assert "iMAML has no gradient at 1, 5 steps, where it has status NEGATIVE_CURVATURE" in text
    other = copy.deepcopy(result)
    for row in other["negative_curvature"]["rows"]:
        row["imaml"] = 0.5
    for curve in other["scaled"]["curves"]:
        curve["error"] = [0.1, 0.2] if curve["dtype"] == "float64" else [0.3, 0.4]
    text = "\n".join(page.E7Failures().findings(other))
    assert "iMAML has no gradient nowhere here" not in text and "has a gradient at every number of steps here" in text
    assert "agree to 1 % at no number of steps" in text
    other["flat"]["imaml float32"] = [0.25, None]
    text = "\n".join(page.E7Failures().findings(other))
    assert "2.5e-01 at lambda = 0.01, 2.5e-01 at 0.01, no gradient at the 1 smallest (float32)" in text
