"""E3: its problems and its counts against closed forms, SciPy and finite differences."""

import math
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel
from applications.meta_learning.experiments import bounds, complexity
from applications.meta_learning.experiments.e3_complexity import _counts, slope
from bilevel.solvers import GradientDescent


def outer_of_minimum(task: bounds.Task, theta: np.ndarray, lam: float) -> tuple[float, np.ndarray]:
    """Outer loss at phi* and phi*, by SciPy."""
    x, y, xt, yt = (task[key].numpy() for key in ("x", "y", "x_test", "y_test"))

    def value(phi: np.ndarray) -> float:
        return float(np.logaddexp(x @ phi - y, y - x @ phi).mean() + 0.5 * lam * ((phi - theta) ** 2).sum())

    def gradient(phi: np.ndarray) -> np.ndarray:
        return x.T @ np.tanh(x @ phi - y) / len(y) + lam * (phi - theta)

    def hessian(phi: np.ndarray) -> np.ndarray:
        return x.T @ ((1 - np.tanh(x @ phi - y) ** 2)[:, None] * x) / len(y) + lam * np.eye(len(phi))

    rough = scipy.optimize.minimize(value, theta, jac=gradient, hess=hessian, method="trust-exact").x
    phi = scipy.optimize.root(gradient, rough, jac=hessian, tol=1e-14).x
    return float(np.logaddexp(xt @ phi - yt, yt - xt @ phi).mean() - math.log(2)), phi


@pytest.mark.parametrize("lam", bounds.LAMS)
def test_exact_gradient_by_finite_differences(lam: float) -> None:
    task, theta = bounds.random_task(3), torch.linspace(-1, 1, bounds.D, dtype=torch.float64)
    star = bounds.minimiser(task, theta, lam)
    _, expected = outer_of_minimum(task, theta.numpy(), lam)
    np.testing.assert_allclose(star.numpy(), expected, rtol=1e-8, atol=1e-9)
    h = 1e-4
    differences = [
        (outer_of_minimum(task, theta.numpy() + e, lam)[0] - outer_of_minimum(task, theta.numpy() - e, lam)[0])
        / (2 * h)
        for e in h * np.eye(bounds.D)
    ]
    exact = bounds.implicit(task, star, lam).numpy()
    np.testing.assert_allclose(exact, differences, atol=1e-4 * np.abs(exact).max())


def test_constants_bound_what_they_should() -> None:
    """At random pairs of points, with a part of each bound reached."""
    task, lam, g = bounds.random_task(4), 0.1, torch.Generator().manual_seed(0)
    c, problem = bounds.constants_of(task, lam), bounds.problem(0.1)
    slope_of = torch.func.grad(problem.test_loss)
    seen = {"beta": 0.0, "mu": math.inf, "rho": 0.0, "B": 0.0, "L": 0.0}
    for scale in (0.01, 0.1, 1.0, 10.0) * 25:
        a = torch.randn(bounds.D, generator=g, dtype=torch.float64) * 2
        b = a + scale * torch.randn(bounds.D, generator=g, dtype=torch.float64)
        far = float((a - b).norm())
        at_a, at_b = (torch.func.hessian(problem.inner_objective)(p, torch.zeros_like(p), task) for p in (a, b))
        torch.testing.assert_close(at_a, bounds.hessian(task, a, lam), rtol=1e-9, atol=1e-12)
        values = torch.linalg.eigvalsh(at_a)
        va, vb = slope_of(a, task), slope_of(b, task)
        seen["beta"], seen["mu"] = max(seen["beta"], float(values[-1])), min(seen["mu"], float(values[0]))
        seen["rho"] = max(seen["rho"], float(torch.linalg.matrix_norm(at_a - at_b, ord=2)) / far)
        seen["B"], seen["L"] = max(seen["B"], float(va.norm())), max(seen["L"], float((va - vb).norm()) / far)
    assert seen["mu"] >= c.mu * (1 - 1e-12)
    for name in ("beta", "rho", "B", "L"):
        assert 0.02 * getattr(c, name) < seen[name] <= getattr(c, name), name


@pytest.mark.parametrize("method", [complexity.GD, complexity.AGD])
def test_closed_forms_of_the_diagonal_problem(method: str) -> None:
    p = complexity.diagonal(30.0, 12, seed=1)
    assert float(p.h.min()) == 1.0 and float(p.h.max()) == pytest.approx(30.0, rel=1e-12)
    g = torch.func.grad(complexity.problem().inner_objective)(p.star, p.theta, p.data)
    assert float(g.abs().max()) < 1e-12

    def outer(theta: torch.Tensor, steps: int | None) -> torch.Tensor:
        """By a loop of our own, for autograd; None: at the minimiser."""
        c = p.data["c"] + complexity.LAM * theta
        x = y = theta
        momentum = 0.0 if method == complexity.GD else (math.sqrt(30) - 1) / (math.sqrt(30) + 1)
        for _ in range(steps or 0):
            new = y - (p.h * y - c) / 30
            x, y = new, new + momentum * (new - x)
        return 0.5 * ((c / p.h if steps is None else x) - p.target).square().sum()

    torch.testing.assert_close(torch.func.grad(outer)(p.theta, None), p.exact, rtol=1e-10, atol=1e-12)
    for steps in (1, 7, 40):
        expected = torch.func.grad(outer)(p.theta, steps)
        torch.testing.assert_close(p.through_path(method, steps), expected, rtol=1e-9, atol=1e-11)


def test_counts_are_those_of_the_theory() -> None:
    """Gradient descent needs log(|e_0| / delta) / -log(1 - 1/kappa) steps where all the error is in the smallest eigenvalue."""
    for kappa in (10.0, 100.0):
        found = complexity.to_accuracy(complexity.GD, kappa, 400, 1e-6, seed=0)
        p = complexity.diagonal(kappa, 400, 0)
        delta = 0.5e-6 * float(p.exact.norm())
        most = math.log(float((p.h * (p.star - p.theta)).norm()) / delta) / -math.log1p(-1 / kappa)
        least = math.log(float((p.star - p.theta)[0].abs()) / delta) / -math.log1p(-1 / kappa)
        assert least <= found["inner"] <= most + 3
        assert found["error"] <= 1e-6


@pytest.mark.parametrize(
    ("method", "key", "expected"),
    [(complexity.GD, "inner", 1.0), (complexity.AGD, "inner", 0.5), (complexity.AGD, "linear", 0.5)],
)
def test_slopes(method: str, key: str, expected: float) -> None:
    kappas = [10.0, 30.0, 100.0, 300.0]
    counts = [complexity.to_accuracy(method, kappa, 5000, 1e-6, seed=1)[key] for kappa in kappas]
    assert abs(slope(kappas, counts) - expected) <= 0.1


def test_slope_of_a_power() -> None:
    x = [1.0, 3.0, 10.0, 70.0]
    assert slope(x, [4 * v**0.7 for v in x]) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize(("power", "said"), [(0.58, "are all within"), (0.62, "are not all within")])
def test_the_page_says_whether_the_slopes_agree(power: float, said: str) -> None:
    sweep = [
        {"kappa": k, "method": method, "inner": k**p, "linear": k**0.5, "error": 1e-7}
        | {"promised inner": k, "promised linear": k}
        for k in (10.0, 100.0)
        for method, p in ((complexity.GD, 1.0), (complexity.AGD, power))
    ]
    page = "\n".join(_counts({"sweep": sweep, "d": 5, "accuracy": 1e-6}))
    assert said in page and f"{power:.3f}" in page


def test_table_1() -> None:
    """Memory of MAML is one vector for each step and of iMAML none; the errors of definitions 3 and 4."""
    entries = [complexity.table_1(kappa, 1000, 1e-3, 0.1, seed=2) for kappa in (10.0, 40.0)]
    for row in entries[1]["rows"]:
        assert row["delta"] <= 1e-3
        assert row["exact-solve error"] < 0.01 or "truncated" in row["name"]
    few, many = ({row["name"]: row for row in entry["rows"]} for entry in entries)
    for name in ("MAML, GD", "MAML, AGD", "truncated back-propagation, GD"):
        steps = many[name]["products"] - few[name]["products"]
        assert steps > 10
        assert (many[name]["memory"] - few[name]["memory"]) * entries[0]["unit"] == pytest.approx(steps, rel=0.1)
    of_imaml = [row["iMAML, AGD and CG"] for row in (few, many)]
    assert of_imaml[1]["products"] - of_imaml[0]["products"] > 10
    # one number for each step, and no vector
    assert of_imaml[1]["memory"] == pytest.approx(of_imaml[0]["memory"], abs=0.01) and of_imaml[0]["memory"] < 3
    for name in ("MAML, GD", "MAML, AGD"):
        assert many[name]["approx-solve error"] < 1e-13 < many[name]["exact-solve error"]
    assert 1e-4 < many["truncated back-propagation, GD"]["approx-solve error"] < 0.1
    assert many["truncated back-propagation, GD"]["products"] == math.ceil(40 * math.log(10))


def test_bytes_that_are_alive() -> None:
    size = 8 * 1000
    start = torch.ones(1000, dtype=torch.float64)

    def chain() -> None:
        x = start
        for _ in range(5):
            x = x.sin()  # two at a time: the old one and the new

    assert complexity.peak_bytes(chain)[0] == 2 * size

    def kept() -> weakref.ref[torch.Tensor]:
        x = start.clone().requires_grad_()
        y = x
        for _ in range(5):
            y = y.sin()  # the graph keeps every argument
        return weakref.ref(y)

    assert complexity.peak_bytes(kept)[0] == 6 * size
    assert complexity.peak_bytes(lambda: [start.view(10, 100), start.neg_(), start[3:]])[0] == 0


def test_a_bound_that_is_too_small_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(p["violated"] for p in bounds.lemma_3(1, (1.0,), seed=5)["points"])
    assert not any(p["violated"] for p in bounds.theorem_2(1, (1.0,), seed=5)["points"])
    monkeypatch.setattr(bounds, "implicit_gradient_error", lambda *a, everywhere: 1e-9)
    monkeypatch.setattr(bounds, "theorem2_iterations", lambda **k: (2, 1))
    assert any(p["violated"] for p in bounds.lemma_3(1, (1.0,), seed=5)["points"])
    assert all(p["violated"] for p in bounds.theorem_2(1, (1.0,), seed=5)["points"])


def test_corollary_1_descends_on_f() -> None:
    """With steps 1/L_F, F falls by at least |grad F|^2 / (2 L_F), but for the error of the gradients."""
    found = bounds.corollary_1(2, 4, seed=6)
    falls = -np.diff(found["values"])
    least = np.array(found["norms"][:-1]) ** 2 / (2 * found["L_F"])
    assert (falls >= 0.99 * least).all() and found["violations"] == 0 and found["worst inexactness"] <= 1
    task, theta = bounds.random_task(6, scale=0.5), np.zeros(bounds.D)
    other = bounds.random_task(7, scale=0.5)
    expected = np.mean([outer_of_minimum(t, theta, 1.0)[0] for t in (task, other)])
    assert found["values"][0] == pytest.approx(expected, rel=1e-9)


def test_unrolled_is_through_the_path() -> None:
    """The oracle of definition 4 against the library, with the rounding of float64."""
    p = complexity.diagonal(20.0, 30, seed=3)
    found = bilevel.unrolled(
        complexity.problem(), p.theta, p.data, solver=GradientDescent(step_size=1 / 20, max_steps=15)
    )
    torch.testing.assert_close(found.grad, p.through_path(complexity.GD, 15), rtol=1e-11, atol=1e-12)
