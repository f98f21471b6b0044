"""Small problems with known answers on which MAML or iMAML fails (E7), each measured against a reference that is not the library's.

Every function returns the numbers of one case. All gradients are of one outer loss with respect to theta.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

import bilevel
from applications.meta_learning.experiments.base import Numbers
from bilevel import BilevelProblem, Hypergradient, ProximalProblem, Status
from bilevel.linsys import CG, Exact
from bilevel.solvers import BlackBox, FixedPointIteration, GradientDescent, NewtonCG

Array = npt.NDArray[np.float64]
F64 = torch.float64

# A double well, coupled: minima near phi_0 = +-1, and an indefinite Hessian between them.
WELL_LAM, WELL_STEP = 0.3, 0.2
WELL_THETA, WELL_GOAL = (0.05, 0.5), (1.2, 0.0)

# The double well in one variable, whose gradient descent is chaotic with the larger step.
CHAOS_LAM, CHAOS_THETA, CHAOS_GOAL = 0.5, 0.3, 0.5
CHAOS_STEPS = {"stable": 0.9, "too large": 1.8}

KINK_LAM, KINK_AT, KINK_STEP = 1.0, 1.0, 0.1


def gradient_descent(step_size: float, steps: int) -> GradientDescent:
    """Plain, with all its steps."""
    return GradientDescent(step_size=step_size, max_steps=steps)


def relative(found: Tensor, exact: Tensor | Array) -> float | None:
    """|found - exact| / |exact|; None where there is no finite gradient."""
    exact = torch.as_tensor(exact, dtype=F64)
    error = float((found.double() - exact).norm() / exact.norm())
    return error if np.isfinite(error) else None


def said(found: Hypergradient) -> Numbers:
    """What the library says of a gradient of one problem."""
    assert found.inner is not None
    return {
        "inner": Status(int(found.inner.codes)).name,
        "linear": Status(int(found.linear.codes)).name,
        "explain": found.explain().splitlines(),
    }


# --- iMAML fails, MAML works


def negative_curvature(steps: tuple[int, ...]) -> Numbers:
    """A point short of the minimum, where the Hessian is indefinite."""
    goal, theta = torch.tensor(WELL_GOAL, dtype=F64), torch.tensor(WELL_THETA, dtype=F64)

    def train(phi: Tensor, task: Any) -> Tensor:
        return 0.25 * (phi[0].square() - 1).square() + 0.5 * (phi[1] - phi[0]).square()

    def test(phi: Tensor, task: Any) -> Tensor:
        return 0.5 * (phi - goal).square().sum()

    problem = ProximalProblem.from_losses(train, test, WELL_LAM)
    rows: list[Numbers] = []
    words: Numbers = {}
    for k in steps:
        solver = gradient_descent(WELL_STEP, k)
        implicit = bilevel.hypergradient(problem, theta, solver=solver, linsys=CG(max_steps=4))
        path = bilevel.unrolled(problem, theta, solver=solver).grad
        reference = differences(partial(well_loss, steps=k), np.array(WELL_THETA))
        rows.append(
            {
                "steps": k,
                "eigenvalue": float(np.linalg.eigvalsh(well_hessian(implicit.phi.numpy()))[0]),
                "run": reference.tolist(),
                "maml": relative(path, reference),
                "imaml": relative(implicit.grad, reference),
                "status": Status(int(implicit.linear.codes)).name,
            }
        )
        if not implicit.ok and not words:
            words = said(implicit)
    return {"rows": rows, "said": words}


def well_hessian(phi: Array) -> Array:
    """d2G/dphi2 of the double well."""
    return np.array([[3 * phi[0] ** 2 + WELL_LAM, -1.0], [-1.0, 1 + WELL_LAM]])


def well_loss(theta: Array, steps: int) -> float:
    """The outer loss after so many steps of gradient descent, in NumPy."""
    phi = theta.copy()
    for _ in range(steps):
        pull = phi[1] - phi[0]
        slope = np.array([phi[0] ** 3 - phi[0] - pull, pull]) + WELL_LAM * (phi - theta)
        phi = phi - WELL_STEP * slope
    return 0.5 * float(np.sum((phi - WELL_GOAL) ** 2))


def differences(fn: Callable[[Array], float], at: Array, h: float = 1e-6) -> Array:
    """The gradient by central differences."""
    return np.array([(fn(at + h * e) - fn(at - h * e)) / (2 * h) for e in np.eye(len(at))])


def unconverged(lams: tuple[float, ...], steps: int, seed: int) -> Numbers:
    """Ten steps for an inner problem that needs thousands, where lambda is small.

    The tasks are quadratic, so phi_K and the meta-gradient are affine in theta: where a method's gradient vanishes, found from its
    values at 0 and at the unit vectors, is where meta-training with it ends.
    """
    d, tasks = 6, 20
    rng = np.random.default_rng(seed)
    curvature = np.logspace(-2, 0, d)
    turns = np.linalg.qr(rng.standard_normal((tasks, d, d)))[0]
    a = 10 ** rng.uniform(-1, 0, (tasks, 1, 1)) * (turns * curvature @ np.swapaxes(turns, 1, 2))
    w = rng.standard_normal(d) + rng.standard_normal((tasks, d))
    data = {"a": torch.tensor(a), "w": torch.tensor(w)}

    def train(phi: Tensor, task: Any) -> Tensor:
        return 0.5 * (phi - task["w"]) @ (task["a"] @ (phi - task["w"]))

    def test(phi: Tensor, task: Any) -> Tensor:
        return 0.5 * (phi - task["w"]).square().sum()

    rows: list[Numbers] = []
    words: Numbers = {}
    for lam in lams:
        problem = ProximalProblem.from_losses(train, test, lam)
        solver = gradient_descent(1 / (1 + lam), steps)
        solve = partial(bilevel.hypergradient, problem, solver=solver, linsys=CG(max_steps=d), batched=True)
        through = partial(bilevel.unrolled, problem, solver=solver, batched=True)
        ends = {"imaml": where_it_vanishes(solve, data, d), "maml": where_it_vanishes(through, data, d)}
        best = best_start(a, w, lam, steps)
        least = loss_after(best, a, w, lam, steps)
        found = solve(torch.zeros(d, dtype=F64), data)
        exact, of_the_run = exact_gradient(np.zeros(d), a, w, lam), run_gradient(np.zeros(d), a, w, lam, steps)
        if not rows:
            words = {"explain": found.explain().splitlines()}
        rows.append(
            {
                "lam": lam,
                **{name: loss_after(end, a, w, lam, steps) / least - 1 for name, end in ends.items()},
                "error": relative(found.grad, exact),
                "run_error": relative(found.grad, of_the_run),
                "estimate": float(found.error_estimate) / float(np.linalg.norm(exact)),
            }
        )
    return {"rows": rows, "steps": steps, "said": words}


def where_it_vanishes(gradient: Callable[..., Hypergradient], data: Any, d: int) -> Array:
    """The root of an affine function of theta."""
    at_zero = gradient(torch.zeros(d, dtype=F64), data).grad
    columns = [gradient(e, data).grad - at_zero for e in torch.eye(d, dtype=F64)]
    return np.asarray(np.linalg.solve(torch.stack(columns, 1).numpy(), -at_zero.numpy()))


def contraction(a: Array, lam: float, steps: int) -> Array:
    """dphi_K / dtheta of gradient descent with step 1 / (1 + lambda) that starts at theta, (tasks, d, d)."""
    eye = np.eye(a.shape[-1])
    h = a + lam * eye
    left = np.linalg.matrix_power(eye - h / (1 + lam), steps)
    return np.asarray(left + (eye - left) @ (lam * np.linalg.inv(h)))


def loss_after(theta: Array, a: Array, w: Array, lam: float, steps: int) -> float:
    """The mean outer loss after adaptation: phi_K - w = (dphi_K / dtheta) (theta - w), for w is where the training loss ends."""
    left = np.einsum("tij,tj->ti", contraction(a, lam, steps), theta - w)
    return 0.5 * float(np.mean(np.sum(left**2, -1)))


def best_start(a: Array, w: Array, lam: float, steps: int) -> Array:
    """The theta of the smallest such loss."""
    j = contraction(a, lam, steps)
    jj = np.swapaxes(j, 1, 2) @ j
    return np.asarray(np.linalg.solve(jj.sum(0), np.einsum("tij,tj->i", jj, w)))


def run_gradient(theta: Array, a: Array, w: Array, lam: float, steps: int) -> Array:
    """Of the mean outer loss after so many steps."""
    j = contraction(a, lam, steps)
    return np.asarray(np.einsum("tji,tjk,tk->i", j, j, theta - w) / len(w))


def exact_gradient(theta: Array, a: Array, w: Array, lam: float) -> Array:
    """Of the outer loss at the exact inner solution."""
    j = lam * np.linalg.inv(a + lam * np.eye(a.shape[-1]))
    return np.asarray(np.einsum("tji,tjk,tk->i", j, j, theta - w) / len(w))


def flat(lams: tuple[float, ...], seed: int) -> Numbers:
    """Fewer examples than parameters and no proximal term: a whole plane of minima, of which the start chooses one.

    Exact: gradient descent goes to the projection of theta on the plane, so dphi/dtheta is the projector P on the null space.
    """
    d, n = 20, 5
    rng = np.random.default_rng(seed)
    rows_of_x = np.linalg.qr(rng.standard_normal((d, n)))[0].T * np.linspace(0.7, 1, n)[:, None]
    y, goal, theta = rng.standard_normal(n), rng.standard_normal(d), rng.standard_normal(d)
    inverse = np.linalg.pinv(rows_of_x)
    p = np.eye(d) - inverse @ rows_of_x
    exact = p @ (theta + inverse @ (y - rows_of_x @ theta) - goal)
    found: dict[str, Any] = {"lams": list(lams)}
    for dtype in (torch.float64, torch.float32):
        x_, y_, goal_, theta_ = (torch.tensor(v, dtype=dtype) for v in (rows_of_x, y, goal, theta))

        def train(phi: Tensor, task: Any, x: Tensor = x_, y: Tensor = y_) -> Tensor:
            return 0.5 * (x @ phi - y).square().sum()

        def test(phi: Tensor, task: Any, goal: Tensor = goal_) -> Tensor:
            return 0.5 * (phi - goal).square().sum()

        plain = BilevelProblem.from_functions(
            lambda phi, theta, task, f=train: f(phi, task),
            lambda phi, theta, task, f=test: f(phi, task),
            lambda theta, task: theta.clone(),
        )
        name = str(dtype).removeprefix("torch.")
        found[f"maml {name}"] = relative(bilevel.unrolled(plain, theta_, solver=gradient_descent(1.0, 200)).grad, exact)
        errors = []
        for lam in lams:
            problem = ProximalProblem.from_losses(train, test, lam)
            solve = partial(bilevel.hypergradient, problem, theta_, solver=gradient_descent(1 / (1 + lam), 200))
            errors.append(relative(solve(linsys=CG(max_steps=2 * d)).grad, exact))
        found[f"imaml {name}"] = errors
    found["without"] = refusal(
        lambda: bilevel.hypergradient(plain, theta_, solver=gradient_descent(1.0, 200), linsys=CG(max_steps=d))
    )
    return found


def refusal(call: Callable[[], Any]) -> str:
    """The words with which the library refuses a call."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("expected the library to refuse this")


# --- MAML fails, iMAML works


def too_large_a_step(steps: tuple[int, ...]) -> Numbers:
    """Gradient descent beyond its stability limit: it stays bounded, and its derivative grows like an exponential."""

    def train(phi: Tensor, task: Any) -> Tensor:
        return 0.25 * (phi.square() - 1).square()

    def test(phi: Tensor, task: Any) -> Tensor:
        return 0.5 * (phi - CHAOS_GOAL).square()

    problem, theta = ProximalProblem.from_losses(train, test, CHAOS_LAM), torch.tensor(CHAOS_THETA, dtype=F64)
    exact = chaos_exact()
    found: dict[str, Any] = {"steps": list(steps), "exact": exact}
    for name, step_size in CHAOS_STEPS.items():
        runs = [bilevel.unrolled(problem, theta, solver=gradient_descent(step_size, k)) for k in steps]
        found[name] = {
            "step_size": step_size,
            "grad": [float(run.grad) for run in runs],
            "phi": [float(run.phi) for run in runs],
        }
    same = bilevel.hypergradient(problem, theta, solver=gradient_descent(1.8, steps[-1]), linsys=Exact())
    newton = bilevel.hypergradient(problem, theta, solver=NewtonCG(max_steps=50, tol=1e-12), linsys=Exact())
    found["imaml, same solver"] = {"error": relative(same.grad, np.array(exact)), "said": said(same)}
    found["imaml, Newton-CG"] = {"error": relative(newton.grad, np.array(exact)), "said": said(newton)}
    return found


def chaos_exact() -> float:
    """The minimum from the roots of the cubic dG/dphi, and lambda / G'' there times the slope of the outer loss.

    The minimum is that into whose well gradient descent goes from theta: the largest root.
    """
    roots = np.roots([1.0, 0.0, CHAOS_LAM - 1, -CHAOS_LAM * CHAOS_THETA])
    phi = float(max(roots[np.abs(roots.imag) < 1e-9].real))
    return CHAOS_LAM / (3 * phi**2 - 1 + CHAOS_LAM) * (phi - CHAOS_GOAL)


def black_boxes(generations: tuple[int, ...], tolerances: tuple[float, ...], repeats: int, seed: int) -> Numbers:
    """Logistic regression whose inner solver is SciPy's L-BFGS-B, or one that only draws samples (the cross-entropy method)."""
    d, n, lam = 4, 60, 0.1
    rng = np.random.default_rng(seed)
    x, x_test = rng.standard_normal((2, n, d))
    truth, theta = rng.standard_normal(d), rng.standard_normal(d)
    y, y_test = (np.sign(z @ truth + 0.3 * rng.standard_normal(n)) for z in (x, x_test))
    data = {"x": torch.tensor(x), "y": torch.tensor(y), "x_test": torch.tensor(x_test), "y_test": torch.tensor(y_test)}

    def train(phi: Tensor, task: Any) -> Tensor:
        return torch.nn.functional.softplus(-task["y"] * (task["x"] @ phi)).mean()

    def test(phi: Tensor, task: Any) -> Tensor:
        return torch.nn.functional.softplus(-task["y_test"] * (task["x_test"] @ phi)).mean()

    problem, start = ProximalProblem.from_losses(train, test, lam), torch.tensor(theta)
    exact = logistic_exact(x, y, x_test, y_test, theta, lam)
    solvers = [("SciPy", BlackBox(partial(by_scipy, gtol=tolerance))) for tolerance in tolerances]
    solvers += [
        ("samples", BlackBox(partial(by_samples, generations=g, seed=seed + r)))
        for g in generations
        for r in range(repeats)
    ]
    rows = []
    for name, solver in solvers:
        found = bilevel.hypergradient(problem, start, data, solver=solver, linsys=CG(max_steps=2 * d))
        assert found.inner is not None
        rows.append(
            {
                "solver": name,
                "residual": float(found.inner.residual),
                "error": relative(found.grad, exact),
                "estimate": float(found.error_estimate) / float(np.linalg.norm(exact)),
            }
        )
    refused = refusal(lambda: bilevel.unrolled(problem, start, data, solver=solvers[0][1]))  # type: ignore[arg-type]  # that is the point
    return {"rows": rows, "maml": refused}


def by_scipy(problem: ProximalProblem, theta: Tensor, data: Any, init: Tensor, *, gtol: float) -> Tensor:
    """L-BFGS-B of SciPy, in compiled code."""

    def value_and_slope(phi: Array) -> tuple[float, Array]:
        slope, value = torch.func.grad_and_value(problem.inner_objective)(torch.tensor(phi), theta, data)
        return float(value), slope.numpy()

    found = minimize(value_and_slope, init.numpy(), jac=True, method="L-BFGS-B", options={"gtol": gtol, "ftol": 0.0})
    return torch.tensor(found.x)


def by_samples(
    problem: ProximalProblem, theta: Tensor, data: Any, init: Tensor, *, generations: int, seed: int
) -> Tensor:
    """The cross-entropy method: a normal distribution, fitted again and again to the best quarter of what it draws.

    It asks for values of G only, never for a slope.
    """
    generator = torch.Generator().manual_seed(seed)
    value = torch.func.vmap(lambda phi: problem.inner_objective(phi, theta, data))
    mean, spread = init, torch.ones_like(init)
    for _ in range(generations):
        drawn = mean + spread * torch.randn(64, len(init), generator=generator, dtype=init.dtype)
        best = drawn[value(drawn).argsort()[:16]]
        mean, spread = best.mean(0), best.std(0)
    return mean


def logistic_exact(x: Array, y: Array, x_test: Array, y_test: Array, theta: Array, lam: float) -> Array:
    """By Newton's method and dense algebra."""
    phi, eye = theta.copy(), np.eye(len(theta))

    def slope(x: Array, y: Array, phi: Array) -> Array:
        return np.asarray(-(x.T @ (y / (1 + np.exp(y * (x @ phi))))) / len(y))

    for _ in range(50):
        s = 1 / (1 + np.exp(-(x @ phi)))
        h = (x.T * (s * (1 - s))) @ x / len(y) + lam * eye
        phi = phi - np.linalg.solve(h, slope(x, y, phi) + lam * (phi - theta))
    return np.asarray(lam * np.linalg.solve(h, slope(x_test, y_test, phi)))


def dependence(steps: tuple[int, ...], seed: int) -> Numbers:
    """Section 2.2: |dphi_k / dtheta| over steps of gradient descent, with and without the proximal term.

    `determined`: the training loss has a curvature of at least 0.01 in every direction. `few examples`: none in half of them.
    """
    d, lam = 8, 0.1
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    spectra = {
        "determined": np.logspace(-2, 0, d),
        "few examples": np.append(np.zeros(d // 2), np.logspace(-2, 0, d // 2)),
    }
    curves = []
    for name, values in spectra.items():
        a = torch.tensor(turn * values @ turn.T)
        for weight in (0.0, lam):
            found = [largest_stretch(a, weight, k) for k in steps]
            exact = [float(stretch(values, weight, k).max()) for k in steps]
            curves.append({"case": name, "lam": weight, "norm": found, "exact": exact})
    return {"steps": list(steps), "lam": lam, "curves": curves}


def largest_stretch(a: Tensor, lam: float, steps: int) -> float:
    """The spectral norm of dphi_k / dtheta, a row of it from each unit vector as outer loss."""
    d = len(a)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, e: 0.5 * phi @ (a @ phi) + 0.5 * lam * (phi - theta).square().sum(),
        lambda phi, theta, e: e @ phi,
        lambda theta, e: theta.clone(),
    )
    rows = bilevel.unrolled(
        problem,
        torch.ones(d, dtype=F64),
        torch.eye(d, dtype=F64),
        solver=gradient_descent(1 / (1 + lam), steps),
        batched=True,
        reduction="none",
    )
    return float(torch.linalg.matrix_norm(rows.grad, ord=2))


def stretch(values: Array, lam: float, steps: int) -> Array:
    """The eigenvalues of dphi_k / dtheta, for eigenvalues of the training loss."""
    left = (1 - (values + lam) / (1 + lam)) ** steps
    return np.asarray(left + (1 - left) * lam / (values + lam) if lam else left)


# --- Both fail


def kink(thetas: tuple[float, ...]) -> Numbers:
    """|phi - 1| as training loss: phi* stays at the kink for theta within 1 / lambda of it, where its derivative is 0."""

    def train(phi: Tensor, task: Any) -> Tensor:
        return (phi - KINK_AT).abs()

    def test(phi: Tensor, task: Any) -> Tensor:
        return phi.clone()

    def shrink(phi: Tensor, theta: Tensor, task: Any) -> Tensor:
        pulled = phi - KINK_STEP * KINK_LAM * (phi - theta) - KINK_AT
        return KINK_AT + torch.nn.functional.softshrink(pulled, KINK_STEP)

    problem, solver = ProximalProblem.from_losses(train, test, KINK_LAM), gradient_descent(KINK_STEP, 200)
    rows: list[Numbers] = []
    words: Numbers = {}
    for value in thetas:
        theta = torch.tensor(value, dtype=F64)
        implicit = bilevel.hypergradient(problem, theta, solver=solver, linsys=Exact())
        assert implicit.inner is not None
        if abs(value - KINK_AT) < 1 / KINK_LAM:
            words = said(implicit)
        held = theta.clone().requires_grad_()
        phi = bilevel.fixed_point(
            shrink, held, solver=FixedPointIteration(max_steps=2000, tol=1e-12), linsys=Exact(), init=theta.clone()
        )
        rows.append(
            {
                "theta": value,
                "exact": float(abs(value - KINK_AT) > 1 / KINK_LAM),
                "maml": float(bilevel.unrolled(problem, theta, solver=solver).grad),
                "imaml": float(implicit.grad),
                "residual": float(implicit.inner.residual),
                "fixed point": float(torch.autograd.grad(phi, held)[0]),
            }
        )
    return {"rows": rows, "said": words}


# --- A question of the reviewers


def scaled(steps: tuple[int, ...], seed: int) -> Numbers:
    """Is MAML's loss numerical? Linear regression with features of unlike size, and the same scaled to one size; both precisions."""
    d, n, lam = 20, 40, 0.1
    rng = np.random.default_rng(seed)
    sizes = np.logspace(1.5, 0, d)
    x, x_test = rng.standard_normal((2, n, d)) * sizes
    y, y_test = ((z / sizes) @ np.ones(d) + 0.1 * rng.standard_normal(n) for z in (x, x_test))
    curves = []
    for kind, scale in (("as they are", np.ones(d)), ("scaled", x.std(0))):
        arrays = {"x": x / scale, "y": y, "x_test": x_test / scale, "y_test": y_test}
        h = arrays["x"].T @ arrays["x"] / n + lam * np.eye(d)
        phi = np.linalg.solve(h, arrays["x"].T @ y / n)
        slope = arrays["x_test"].T @ (arrays["x_test"] @ phi - y_test) / n
        exact = lam * np.linalg.solve(h, slope)
        values = np.linalg.eigvalsh(h)
        for dtype in (torch.float64, torch.float32):
            data = {key: torch.tensor(value, dtype=dtype) for key, value in arrays.items()}
            for method in ("MAML", "iMAML"):
                errors = [relative(regression_gradient(method, data, lam, 1 / values[-1], k), exact) for k in steps]
                name = str(dtype).removeprefix("torch.")
                condition = float(values[-1] / values[0])
                curves.append({"data": kind, "dtype": name, "method": method, "condition": condition, "error": errors})
    return {"steps": list(steps), "curves": curves}


def regression_gradient(method: str, data: dict[str, Tensor], lam: float, step_size: float, steps: int) -> Tensor:
    """The meta-gradient at theta = 0, (d,)."""

    def train(phi: Tensor, task: Any) -> Tensor:
        return 0.5 * (task["x"] @ phi - task["y"]).square().mean()

    def test(phi: Tensor, task: Any) -> Tensor:
        return 0.5 * (task["x_test"] @ phi - task["y_test"]).square().mean()

    problem, theta = ProximalProblem.from_losses(train, test, lam), data["x"].new_zeros(data["x"].shape[1])
    solver = gradient_descent(float(step_size), steps)
    if method == "MAML":
        return bilevel.unrolled(problem, theta, data, solver=solver).grad
    linsys = CG(max_steps=200, rtol=1e-10 if theta.dtype == F64 else 1e-6)
    return bilevel.hypergradient(problem, theta, data, solver=solver, linsys=linsys).grad
