"""The paper's statements against textbook methods in NumPy: kept, not vacuous, and where the printed text is off, shown.

The problems are proximal logistic regressions whose exact solution is known by construction: every phi* is the inner solution for
theta = phi* + grad L_train(phi*) / lam (the condition of Eq. 4, read backwards), and the exact gradient is Lemma 1 in dense algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import bilevel
from bilevel.theory import (
    agd_iterations,
    corollary1_calls,
    implicit_gradient_error,
    theorem2_iterations,
    theorem2_tolerances,
)

ROUNDING = 1 + 1e-9
SIGMA3 = 1 / (6 * math.sqrt(3))  # the largest |second derivative| of the logistic function


def agd(gradient: Callable[[np.ndarray], np.ndarray], start: np.ndarray, mu: float, beta: float, steps: int) -> Any:
    """Nesterov's method for strongly convex functions (Bubeck 2015, section 3.7.1): y_1, y_2, ..., one gradient each."""
    root = math.sqrt(beta / mu)
    x = y = start
    for _ in range(steps):
        y_next = x - gradient(x) / beta
        x = y_next + (root - 1) / (root + 1) * (y_next - y)
        y = y_next
    return y


def conjugate_gradients(matrix: np.ndarray, b: np.ndarray, steps: int) -> np.ndarray:
    x, r, p = np.zeros_like(b), b, b
    for _ in range(steps):
        if r @ r <= 1e-32 * (b @ b):  # exact, to rounding
            break
        alpha = r @ r / (p @ matrix @ p)
        x, r_next = x + alpha * p, r - alpha * (matrix @ p)
        p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
    return x


def logistic_loss(rows: np.ndarray, phi: np.ndarray) -> float:
    """mean log(1 + exp(-row phi)): the labels are in the signs of the rows."""
    return float(np.logaddexp(0, -rows @ phi).mean())


def logistic_gradient(rows: np.ndarray, phi: np.ndarray) -> np.ndarray:
    return -rows.T @ (1 / (1 + np.exp(rows @ phi))) / len(rows)


def logistic_hessian(rows: np.ndarray, phi: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-rows @ phi))
    return (rows.T * (p * (1 - p))) @ rows / len(rows)


@dataclass(frozen=True)
class Proximal:
    """Proximal logistic regression, judged by a logistic loss; the constants are the closed forms of docs/constants.md."""

    train: np.ndarray  # (n, d)
    test: np.ndarray  # (m, d)
    lam: float
    star: np.ndarray  # phi*

    @staticmethod
    def random(seed: int, *, d: int = 4, lam: float = 0.3, scale: float = 1.0) -> Proximal:
        rng = np.random.default_rng(seed)
        return Proximal(scale * rng.normal(size=(12, d)), rng.normal(size=(9, d)), lam, rng.normal(size=d))

    @property
    def theta(self) -> np.ndarray:
        return self.star + logistic_gradient(self.train, self.star) / self.lam

    def solution(self, theta: np.ndarray) -> np.ndarray:
        """phi* for another theta: Newton's method, to rounding."""
        phi = theta
        for _ in range(50):
            phi = phi - np.linalg.solve(self.inner_hessian(phi), self.inner_gradient(phi, theta))
        assert np.linalg.norm(self.inner_gradient(phi, theta)) < 1e-12
        return phi

    def inner_gradient(self, phi: np.ndarray, theta: np.ndarray) -> np.ndarray:
        return logistic_gradient(self.train, phi) + self.lam * (phi - theta)

    def inner_hessian(self, phi: np.ndarray) -> np.ndarray:
        return logistic_hessian(self.train, phi) + self.lam * np.eye(len(phi))

    def hypergradient(self, phi: np.ndarray) -> np.ndarray:
        """Lemma 1 at phi; at phi* the exact gradient."""
        return self.lam * np.linalg.solve(self.inner_hessian(phi), logistic_gradient(self.test, phi))

    @property
    def beta(self) -> float:
        return self.lam + np.linalg.eigvalsh(self.train.T @ self.train)[-1] / (4 * len(self.train))

    @property
    def constants(self) -> dict[str, float]:
        top, top_test = (np.linalg.eigvalsh(x.T @ x)[-1] / len(x) for x in (self.train, self.test))
        return {
            "lam": self.lam,
            "mu": self.lam,
            "rho": SIGMA3 * np.linalg.norm(self.train, axis=1).max() * top,
            "B": np.linalg.norm(self.test, axis=1).mean(),
            "L": top_test / 4,
        }


def on_sphere(rng: np.random.Generator, d: int, radius: float) -> np.ndarray:
    v = rng.normal(size=d)
    return radius * v / np.linalg.norm(v)


def quadratic(seed: int, kappa: float, d: int) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues from 1 to kappa, the minimiser x*) in the eigenbasis, where Nesterov's method is what it is in any other."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([[1.0, kappa], rng.uniform(1, kappa, d // 2), kappa ** rng.uniform(0, 1, d - d // 2 - 2)])
    return values, on_sphere(rng, d, 10 ** rng.uniform(-2, 2))


class TestLemma2:
    @pytest.mark.parametrize("kappa", [1.0, 1.5, 10.0, 300.0, 1e4])
    def test_the_number_of_iterations_reaches_delta(self, kappa: float) -> None:
        for seed in range(20):
            values, x = quadratic(seed, kappa, 12)
            for relative in (2.0, 0.9, 1e-2, 1e-8):
                delta = relative * np.linalg.norm(x)
                steps = agd_iterations(kappa, delta, np.linalg.norm(x))
                found = agd(lambda y, v=values, x=x: v * (y - x), np.zeros(12), 1.0, kappa, steps)
                assert np.linalg.norm(found - x) <= delta * ROUNDING

    def test_it_is_not_vacuous(self) -> None:
        """On the classical worst case, a chain of springs, a quarter of the number does not reach delta, and the number does."""
        d, kappa, delta = 400, 1e3, 1e-6
        chain = 2 * np.eye(d) - np.eye(d, k=1) - np.eye(d, k=-1)
        matrix = np.eye(d) + (kappa - 1) / 4 * chain  # eigenvalues in (1, kappa)
        x = np.linalg.solve(matrix, (kappa - 1) / 4 * np.eye(d)[0])
        steps = agd_iterations(kappa, delta, np.linalg.norm(x))

        def distance(steps: int) -> float:
            return float(np.linalg.norm(agd(lambda y: matrix @ (y - x), np.zeros(d), 1.0, kappa, steps) - x))

        assert distance(steps) <= delta < distance(steps // 4)

    def test_printed_formula(self) -> None:
        assert agd_iterations(100, 1e-3, 1.0) == math.ceil(20 * math.log(200_000)) == 245
        assert agd_iterations(4, 2.0, 3.0) == math.ceil(4 * math.log(12)) == 10

    def test_no_step_where_the_logarithm_is_negative(self) -> None:
        """2 kappa |x*| < delta: 0 is close enough."""
        assert agd_iterations(10, 21.0, 1.0) == agd_iterations(10, 20.0, 1.0) == 0 < agd_iterations(10, 19.0, 1.0)
        assert agd_iterations(10, 1e-300, 0.0) == agd_iterations(10, math.inf, 1.0) == 0
        assert agd_iterations(1e300, 1e-300, 1e300) > 1e150  # no overflow on the way


class TestLemma3:
    @pytest.mark.parametrize("lam", [0.05, 0.5, 5.0])
    def test_never_violated(self, lam: float) -> None:
        for seed in range(60):
            problem = Proximal.random(seed, lam=lam)
            known, rng = problem.constants, np.random.default_rng(seed)
            exact = problem.hypergradient(problem.star)
            for radius in 10 ** rng.uniform(-6, 1, 10):
                phi = problem.star + on_sphere(rng, 4, radius)
                delta_prime = 10 ** rng.uniform(-8, 0)
                error = np.linalg.norm(problem.hypergradient(phi) + on_sphere(rng, 4, delta_prime) - exact)
                for everywhere in (False, True):
                    bound = implicit_gradient_error(
                        **known, delta=radius, delta_prime=delta_prime, everywhere=everywhere
                    )
                    assert error <= bound * ROUNDING
                assert math.isfinite(bound)

    def test_not_vacuous_on_a_logistic_problem(self) -> None:
        """One variable, phi* where the third derivative is largest, an outer loss in its linear part: only rho counts."""
        star, delta = np.array([math.log(2 + math.sqrt(3))]), 1e-3
        problem = Proximal(np.array([[1.0]]), np.array([[-1e3]]), 1.0, star)  # outer slope 1000
        known = {**problem.constants, "L": 0.0}
        error = np.linalg.norm(problem.hypergradient(star + delta) - problem.hypergradient(star))
        bounds = [implicit_gradient_error(**known, delta=delta, delta_prime=0.0, everywhere=e) for e in (False, True)]
        assert error <= bounds[1] < 1.5 * error
        assert bounds[0] == pytest.approx(2 * bounds[1])

    def test_it_cannot_be_improved_and_mu_at_one_point_is_enough(self) -> None:
        """One variable: from one point to the other (either may be phi*) G'' falls from mu to mu - rho delta, and the outer slope
        rises from B - L delta to B."""
        lam, mu, rho, B, L = 0.7, 2.0, 3.0, 5.0, 4.0
        ratios = []
        for fraction in (0.1, 0.5, 0.9, 0.999):
            delta = fraction * mu / (2 * rho)
            error = lam * (B / (mu - rho * delta) - (B - L * delta) / mu)
            ratios.append(error / implicit_gradient_error(lam, rho, mu, B, L, delta, 0.0))
        assert max(ratios) <= 1 and ratios[-1] > 0.99

    def test_mu_and_b_at_the_same_point_are_not_enough(self) -> None:
        """B = 0 where mu holds, slope L delta where the curvature is almost mu / 2: nearly twice the printed bound."""
        lam, mu, rho, L = 0.7, 2.0, 3.0, 4.0
        delta = 0.999 * mu / (2 * rho)
        error = lam * L * delta / (mu - rho * delta)
        assert error > 1.9 * implicit_gradient_error(lam, rho, mu, 0.0, L, delta, 0.0)

    def test_everywhere_is_an_assumption(self) -> None:
        """With mu at one point only, the sharper bound is violated."""
        lam, mu, rho, B = 0.7, 2.0, 3.0, 5.0
        delta = 0.25
        error = lam * (B / (mu - rho * delta) - B / mu)
        printed, sharper = (
            implicit_gradient_error(lam, rho, mu, B, 0.0, delta, 0.0, everywhere=e) for e in (False, True)
        )
        assert sharper < error <= printed

    def test_condition_and_values(self) -> None:
        numbers = {"lam": 3.0, "rho": 5.0, "mu": 2.0, "B": 7.0, "L": 11.0, "delta_prime": 0.25}
        assert implicit_gradient_error(**numbers, delta=0.1) == pytest.approx((52.5 + 16.5) * 0.1 + 0.25)
        assert implicit_gradient_error(**numbers, delta=0.2) == math.inf  # mu / (2 rho)
        assert implicit_gradient_error(**numbers, delta=0.2, everywhere=True) == pytest.approx(42.75 * 0.2 + 0.25)
        flat = {**numbers, "rho": 0.0}
        assert implicit_gradient_error(**flat, delta=100.0) == pytest.approx(
            16.5 * 100 + 0.25
        )  # quadratic: no condition
        assert implicit_gradient_error(**{**flat, "L": 0.0}, delta=math.inf) == 0.25

    def test_ridge_regression_leaves_only_l(self) -> None:
        """rho = 0: with H = mu I, one variable and L the curvature of the outer loss, equality for every delta."""
        lam, curvature, L, delta = 0.4, 1.1, 3.0, 7.0
        error = lam / (lam + curvature) * L * delta
        assert error == pytest.approx(implicit_gradient_error(lam, 0.0, lam + curvature, 9.0, L, delta, 0.0))


class TestTheorem2:
    @pytest.mark.parametrize("lam, scale", [(1.0, 1.0), (0.1, 2.0), (0.02, 3.0)])
    @pytest.mark.parametrize("eps", [1e-2, 1e-7])
    def test_the_iterations_give_eps(self, lam: float, scale: float, eps: float) -> None:
        """Three quarters of eps even, because of the 8: with a 4 it is eps. CG with a quarter of the linear iterations."""
        for seed in range(5):
            problem = Proximal.random(seed, lam=lam, scale=scale)
            known, d = problem.constants, len(problem.star)
            kappa = problem.beta / problem.lam
            inner, linear = theorem2_iterations(kappa=kappa, D=np.linalg.norm(problem.star), eps=eps, **known)
            phi = agd(lambda x, p=problem: p.inner_gradient(x, p.theta), np.zeros(d), lam, problem.beta, inner)
            matrix, v = problem.inner_hessian(phi) / lam, logistic_gradient(problem.test, phi)
            accelerated = agd(lambda w, A=matrix, v=v: A @ w - v, np.zeros(d), 1.0, problem.beta / lam, linear)
            for g in (accelerated, conjugate_gradients(matrix, v, math.ceil(linear / 4))):
                assert np.linalg.norm(g - problem.hypergradient(problem.star)) <= 0.75 * eps * ROUNDING
            for everywhere in (False, True):
                delta, _ = theorem2_tolerances(**known, eps=eps, everywhere=everywhere)
                fewer = agd_iterations(kappa, delta, np.linalg.norm(problem.star))
                assert fewer < inner
                phi = agd(lambda x, p=problem: p.inner_gradient(x, p.theta), np.zeros(d), lam, problem.beta, fewer)
                error = np.linalg.norm(problem.hypergradient(phi) - problem.hypergradient(problem.star))
                assert error <= eps / 2 * ROUNDING

    @pytest.mark.parametrize("kappa", [10.0, 1e3])
    def test_not_vacuous_in_the_inner_solve(self, kappa: float) -> None:
        """A quadratic inner problem (rho = 0) and a quarter of the inner iterations: the error is above eps."""
        values, star = quadratic(1, kappa, 40)
        lam, L, eps = 1.0, 2.0, 1e-6
        inner, _ = theorem2_iterations(kappa=kappa, D=np.linalg.norm(star), lam=lam, rho=0, mu=1, B=1, L=L, eps=eps)

        def error(steps: int) -> float:  # outer loss L/2 |phi|^2
            phi = agd(lambda x: values * (x - star), np.zeros(40), 1.0, kappa, steps)
            return float(np.linalg.norm(lam / values * L * (phi - star)))

        assert error(inner) <= eps < error(inner // 4)

    def test_quarter_for_cg_on_an_ill_conditioned_system(self) -> None:
        """200 distinct eigenvalues, so that CG does not end after a few steps because the dimension is small."""
        for seed in range(3):
            values, solution = quadratic(seed, 1e3, 200)
            for delta_prime in (1e-1, 1e-4, 1e-8):
                steps = agd_iterations(1e3, delta_prime, np.linalg.norm(solution))
                found = conjugate_gradients(np.diag(values), values * solution, math.ceil(steps / 4))
                assert np.linalg.norm(found - solution) <= delta_prime

    def test_printed_formulas(self) -> None:
        """B_1 = 69: 6 log(8 9 13 (690 + 2.5)) = 80.3 and 6 log(4 9 (3/2) 7 / 0.1) = 49.4."""
        numbers = {"lam": 3.0, "rho": 5.0, "mu": 2.0, "B": 7.0, "L": 11.0, "eps": 0.1}
        assert theorem2_iterations(kappa=9.0, D=13.0, **numbers) == (81, 50)
        assert theorem2_iterations(kappa=9.0, D=0.0, **numbers) == (0, 50)
        assert theorem2_iterations(kappa=9.0, D=13.0, **{**numbers, "B": 0.0})[1] == 0
        assert theorem2_iterations(kappa=9.0, D=13.0, **{**numbers, "rho": 0.0, "L": 0.0})[0] == 0  # phi plays no part

    def test_tolerances_satisfy_lemma3(self) -> None:
        """The minimum in the proof, min(eps / (2 B_1), mu / (2 rho)), does not always: its condition is strict."""
        rng = np.random.default_rng(0)
        for _ in range(200):
            numbers = dict(zip(("lam", "rho", "mu", "B", "L"), 10 ** rng.uniform(-4, 4, 5), strict=True))
            eps = 10 ** rng.uniform(-6, 6)
            for everywhere in (False, True):
                delta, delta_prime = theorem2_tolerances(**numbers, eps=eps, everywhere=everywhere)
                bound = implicit_gradient_error(**numbers, delta=delta, delta_prime=delta_prime, everywhere=everywhere)
                assert bound <= eps * ROUNDING
                assert not everywhere or bound == pytest.approx(eps)
        # rho large: mu / (2 rho) is the minimum, and is refused
        assert implicit_gradient_error(1.0, 10.0, 1.0, 0.01, 0.01, 1.0 / 20.0, 0.0) == math.inf
        assert theorem2_tolerances(lam=1, rho=0, mu=1, B=9, L=0, eps=0.5) == (math.inf, 0.25)

    def test_equation_7_as_printed_has_half_the_solution(self) -> None:
        problem = Proximal.random(3)
        matrix, v = problem.inner_hessian(problem.star) / problem.lam, logistic_gradient(problem.test, problem.star)
        w = agd(lambda w: 2 * matrix @ w - v, np.zeros(4), 2.0, 2 * problem.beta / problem.lam, 1000)  # its gradient
        np.testing.assert_allclose(w, 0.5 * problem.hypergradient(problem.star), rtol=1e-10)


class Slope:
    """F on the line with a slope that is constant, but for a quadratic valley of curvature L_F."""

    def __init__(self, slope: float, L_F: float) -> None:
        self.slope, self.L_F = slope, L_F

    def gradient(self, theta: float) -> float:
        return float(np.clip(self.L_F * theta, -self.slope, self.slope))

    def gap(self, theta: float) -> float:
        return self.slope * abs(theta) - self.slope**2 / (2 * self.L_F)

    def first_stationary(self, theta: float, eps: float, error: float, limit: int) -> int:
        """Gradients until |F'| <= eps, when each of them is too short by ``error``."""
        for calls in range(1, limit + 1):
            gradient = self.gradient(theta)
            if abs(gradient) <= eps:
                return calls
            theta -= (gradient - math.copysign(error, gradient)) / self.L_F
        return limit + 1


class TestCorollary1:
    @pytest.mark.parametrize("eps", [0.3, 0.1])
    def test_meta_learning_finds_a_stationary_point(self, eps: float) -> None:
        """Three tasks, each gradient wrong by eps / sqrt(2) in the worst direction; L_F from Assumption 2, min F >= 0."""
        tasks = [Proximal.random(seed, d=2, lam=2.0) for seed in range(3)]
        worst = {name: max(task.constants[name] for task in tasks) for name in tasks[0].constants}
        L_F = worst["lam"] / worst["mu"] * implicit_gradient_error(**worst, delta=1, delta_prime=0, everywhere=True)
        theta = np.array([3.0, -4.0])

        def gradient(theta: np.ndarray) -> np.ndarray:
            return np.mean([task.hypergradient(task.solution(theta)) for task in tasks], axis=0)

        start = np.mean([logistic_loss(task.test, task.solution(theta)) for task in tasks])
        calls = corollary1_calls(M=3, L_F=L_F, gap=start, eps=eps)
        steps, remainder = divmod(calls, 3)
        assert remainder == 0
        norms = []
        while not norms or norms[-1] > eps:
            g = gradient(theta)
            norms.append(np.linalg.norm(g))
            theta = theta - (g - eps / math.sqrt(2) * g / norms[-1]) / L_F
            assert len(norms) <= steps
        assert norms[0] > eps  # there was something to do

    def test_smoothness_of_f(self) -> None:
        """L_F = lam / mu times Lemma 3 for delta = 1: differences of the exact gradient, and a case with equality."""
        for seed in range(20):
            task, rng = Proximal.random(seed), np.random.default_rng(seed)
            L_F = implicit_gradient_error(**task.constants, delta=1, delta_prime=0, everywhere=True)  # lam = mu
            one, two = (rng.normal(size=4) for _ in range(2))
            change = task.hypergradient(task.solution(one)) - task.hypergradient(task.solution(two))
            assert np.linalg.norm(change) <= L_F * np.linalg.norm(one - two)
        lam, mu, L = 0.4, 1.5, 3.0  # quadratic, one variable: F'' = (lam / mu)^2 L
        assert lam / mu * implicit_gradient_error(lam, 0, mu, 0, L, 1, 0) == pytest.approx((lam / mu) ** 2 * L)

    def test_the_number_is_kept_and_not_vacuous(self) -> None:
        """On a slope just above eps, gradients within eps / sqrt(2) need most of the calls, and gradients within eps more."""
        eps, L_F, start = 0.1, 2.0, 40.0
        hill = Slope(1.001 * eps, L_F)
        calls = corollary1_calls(M=1, L_F=L_F, gap=hill.gap(start), eps=eps)
        needed = hill.first_stationary(start, eps, eps / math.sqrt(2), 2 * calls)
        assert 0.8 * calls < needed <= calls
        assert hill.first_stationary(start, eps, eps, 10 * calls) > 10 * calls

    def test_printed_formula(self) -> None:
        assert corollary1_calls(M=5, L_F=3.0, gap=7.0, eps=2.0) == 5 * 21
        assert corollary1_calls(M=5, L_F=3.0, gap=7.1, eps=2.0) == 5 * 22  # no step in parts
        assert corollary1_calls(M=np.int64(5), L_F=3.0, gap=0.0, eps=2.0) == 0


LEMMA3 = {"lam": 1.0, "rho": 1.0, "mu": 1.0, "B": 1.0, "L": 1.0, "delta": 0.1, "delta_prime": 0.1}
THEOREM2 = {"kappa": 2.0, "D": 1.0, "lam": 1.0, "rho": 1.0, "mu": 1.0, "B": 1.0, "L": 1.0, "eps": 0.1}
COROLLARY1 = {"M": 2, "L_F": 1.0, "gap": 1.0, "eps": 0.1}


class TestArguments:
    @pytest.mark.parametrize(
        "function, good, wrong, message",
        [
            (agd_iterations, {"kappa": 2.0, "delta": 0.1, "x_norm": 1.0}, wrong, message)
            for wrong, message in [
                ({"kappa": 0.5}, r"kappa: expected a finite number >= 1, got 0\.5"),
                ({"kappa": math.inf}, "kappa: expected a finite number >= 1, got inf"),
                ({"delta": 0.0}, r"delta: expected a number > 0, got 0\.0"),
                ({"x_norm": -1.0}, r"x_norm: expected a finite number >= 0, got -1\.0"),
                ({"x_norm": math.nan}, "x_norm: expected a finite number >= 0, got nan"),
            ]
        ]
        + [
            (function, good, {name: value}, rf"^{name}: expected a finite number {kind}, got {value}")
            for function, good in [(implicit_gradient_error, LEMMA3), (theorem2_iterations, THEOREM2)]
            for name, value, kind in [
                ("lam", 0.0, "> 0"),
                ("mu", -1.0, "> 0"),
                ("mu", math.nan, "> 0"),
                ("rho", -1.0, ">= 0"),
                ("B", math.inf, ">= 0"),
                ("L", -1, ">= 0"),
            ]
        ]
        + [
            (implicit_gradient_error, LEMMA3, {"delta": -0.1}, r"delta: expected a number >= 0, got -0\.1"),
            (
                implicit_gradient_error,
                LEMMA3,
                {"delta_prime": math.nan},
                "delta_prime: expected a number >= 0, got nan",
            ),
            (theorem2_iterations, THEOREM2, {"kappa": 0.0}, r"kappa: expected a finite number >= 1, got 0\.0"),
            (theorem2_iterations, THEOREM2, {"D": -1.0}, r"D: expected a finite number >= 0, got -1\.0"),
            (theorem2_iterations, THEOREM2, {"eps": 0.0}, r"eps: expected a finite number > 0, got 0\.0"),
            (corollary1_calls, COROLLARY1, {"M": 0}, "M: expected a finite number >= 1, got 0"),
            (corollary1_calls, COROLLARY1, {"L_F": -1.0}, r"L_F: expected a finite number >= 0, got -1\.0"),
            (corollary1_calls, COROLLARY1, {"gap": math.inf}, "gap: expected a finite number >= 0, got inf"),
            (corollary1_calls, COROLLARY1, {"eps": -0.1}, r"eps: expected a finite number > 0, got -0\.1"),
        ],
    )
    def test_out_of_range(
        self, function: Callable[..., Any], good: dict[str, Any], wrong: dict[str, Any], message: str
    ) -> None:
        function(**good)
        with pytest.raises(ValueError, match=message):
            function(**{**good, **wrong})

    def test_not_a_number(self) -> None:
        with pytest.raises(TypeError, match="kappa: expected a number, got str '10'"):
            agd_iterations("10", 0.1, 1.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="mu: expected a number, got Tensor"):
            implicit_gradient_error(**{**LEMMA3, "mu": torch.tensor(1.0)})
        with pytest.raises(TypeError, match="rho: expected a number, got bool True"):
            implicit_gradient_error(**{**LEMMA3, "rho": True})
        with pytest.raises(TypeError, match=r"M: expected an integer, got float 2\.0"):
            corollary1_calls(**{**COROLLARY1, "M": 2.0})

    def test_reachable_from_the_package(self) -> None:
        assert bilevel.theory.agd_iterations is agd_iterations
