"""Inner solvers against closed forms, SciPy, dense algebra and hand-written loops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, GaussNewton, Hessian, ProximalProblem, Result, Status, solve
from bilevel.curvature import FiniteDifference, ReverseOverReverse
from bilevel.linsys import Jacobi
from bilevel.solvers import BlackBox, GradientDescent, InnerSolver, NesterovAGD, NewtonCG, ScipyMinimize
from bilevel.trees import flatten
from tests.cases import PROBLEMS, SOLVER_NAMES, Case, inner_solvers

F64 = torch.float64


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def statuses(result: Result) -> list[Status]:
    return [Status(int(code)) for code in result.codes.reshape(-1)]


def of(inner: Any, start: Any = None) -> BilevelProblem:
    """A problem of which only the inner part matters."""
    return BilevelProblem.from_functions(inner, lambda phi, theta, data: 0 * theta.sum(), start)


def quadratic() -> BilevelProblem:
    """G = 1/2 sum h phi^2 - theta . phi with data h; phi* = theta / h."""
    return of(lambda phi, theta, h: 0.5 * (h * phi**2).sum() - theta @ phi, lambda theta, h: 0 * theta)


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp z). The default threshold replaces it by z above 20, which is wrong by 2e-9."""
    return torch.nn.functional.softplus(z, threshold=40)


def logistic() -> BilevelProblem:
    """Regularised logistic regression: strongly convex, smooth, not quadratic."""

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        z = data["x"] @ phi
        return softplus(z).sum() - data["y"] @ z + 0.5 * (theta.exp() * phi**2).sum()

    return of(inner, lambda theta, data: torch.zeros_like(theta))


def logistic_data(tasks: int, dtype: torch.dtype = F64) -> tuple[Tensor, dict[str, Tensor]]:
    x = (
        normal(1, tasks, 12, 3, dtype=dtype) * torch.logspace(-0.5, 0.3, tasks, dtype=dtype)[:, None, None]
    )  # unequal difficulty
    y = (normal(2, tasks, 12) > 0).to(dtype)
    return torch.tensor([-0.5, 0.0, 0.5], dtype=dtype), {"x": x, "y": y}


def logistic_by_scipy(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    def value(phi: np.ndarray) -> float:
        z = x @ phi
        return np.logaddexp(0, z).sum() - y @ z + 0.5 * (np.exp(theta) * phi**2).sum()

    def jac(phi: np.ndarray) -> np.ndarray:
        return x.T @ (1 / (1 + np.exp(-(x @ phi))) - y) + np.exp(theta) * phi

    def hess(phi: np.ndarray) -> np.ndarray:
        s = 1 / (1 + np.exp(-(x @ phi)))
        return (x.T * (s * (1 - s))) @ x + np.diag(np.exp(theta))

    phi = scipy.optimize.minimize(value, np.zeros_like(theta), jac=jac, hess=hess, method="trust-exact").x
    for _ in range(3):  # its test of the decrease of the value can stop it half the digits early
        phi = phi - np.linalg.solve(hess(phi), jac(phi))
    assert np.linalg.norm(jac(phi)) < 1e-12
    return phi


def black_box(problem: BilevelProblem, theta: Any, data: Any, init: Tensor) -> Tensor:
    """SciPy as the procedure, with gradients from our user's own function."""

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        phi = torch.tensor(x, dtype=init.dtype, requires_grad=True)
        value = problem.inner_objective(phi, theta, data)
        (grad,) = torch.autograd.grad(value, phi)
        return value.item(), grad.double().numpy()

    found = scipy.optimize.minimize(
        value_and_grad, init.double().numpy(), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    return torch.tensor(found.x, dtype=init.dtype)


# backtracking stops above the rounding floor of G, where rounding would decide which trial is taken
LOGISTIC_SOLVERS: dict[str, InnerSolver] = {
    "gd": GradientDescent(step_size=0.02, max_steps=3000, tol=1e-8),
    "gd fixed": GradientDescent(step_size=0.02, max_steps=30),
    "gd-backtracking": GradientDescent(step_size=None, max_steps=2000, tol=1e-6),
    "agd": NesterovAGD(step_size=0.02, max_steps=2000, tol=1e-8),
    "agd fixed": NesterovAGD(step_size=0.02, max_steps=30),
    "agd-backtracking": NesterovAGD(step_size=None, max_steps=2000, tol=1e-6),
    "agd-known-mu": NesterovAGD(step_size=0.02, strong_convexity=0.5, max_steps=2000, tol=1e-8),
    "newton-cg": NewtonCG(max_steps=30, cg_steps=6, tol=1e-8),
    "newton-cg fixed": NewtonCG(max_steps=2, cg_steps=3),
    "black-box": BlackBox(black_box, tol=1e-6),
}


# --- every row of the list -----------------------------------------------------------------------


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
@pytest.mark.parametrize("name", SOLVER_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_row_reaches_the_closed_form(case: Case, name: str, dtype: torch.dtype) -> None:
    tol = 2e-4 if dtype == torch.float32 else 1e-9
    case = case.to(dtype)
    result = solve(case.problem, case.theta, case.data, solver=inner_solvers(case, tol)[name])
    assert result.status is Status.CONVERGED, result.describe()
    assert float(result.residual) <= tol
    assert isinstance(result.num_steps, int)
    expected = case.phi_star(case.theta, case.data)
    ours, ours_structure = flatten(result.value)
    theirs, structure = flatten(expected)
    assert ours_structure == structure
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=20 * tol)


@pytest.mark.parametrize("name", LOGISTIC_SOLVERS)
def test_a_batch_is_its_tasks(name: str) -> None:
    """Masks: a task of a batch takes the steps that it takes alone, and ends where SciPy ends."""
    solver = LOGISTIC_SOLVERS[name]
    theta, data = logistic_data(5)
    batch = solve(logistic(), theta, data, solver=solver, batched=True)
    assert not batch.failed.any()
    for i in range(5):
        alone = solve(logistic(), theta, {"x": data["x"][i], "y": data["y"][i]}, solver=solver)
        torch.testing.assert_close(batch.value[i], alone.value, rtol=1e-9, atol=1e-11)
        assert int(batch.steps[i]) == alone.num_steps and int(batch.codes[i]) == alone.status
        if "fixed" not in name:
            assert alone.status is Status.CONVERGED, alone.describe()
            exact = logistic_by_scipy(theta.numpy(), data["x"][i].numpy(), data["y"][i].numpy())
            np.testing.assert_allclose(batch.value[i].numpy(), exact, rtol=0, atol=2 * solver.tol)  # type: ignore[attr-defined]
    if "fixed" not in name and name != "black-box":
        assert len(set(batch.steps.tolist())) > 1, "the tasks are meant to be of unequal difficulty"


@pytest.mark.parametrize("name", LOGISTIC_SOLVERS)
@pytest.mark.parametrize("sick", ["nan", "inf"])
def test_a_sick_task_leaves_the_others_as_they_were(name: str, sick: str) -> None:
    if name == "black-box":
        solver: InnerSolver = BlackBox(lambda problem, theta, data, init: init + data["y"].sum(), tol=1e3)
    else:
        solver = LOGISTIC_SOLVERS[name]
    theta, data = logistic_data(4)
    healthy = solve(logistic(), theta, data, solver=solver, batched=True)
    broken = {key: value.clone() for key, value in data.items()}
    broken["x"][1, 2, 0] = broken["y"][1, 2] = float(sick)
    result = solve(logistic(), theta, broken, solver=solver, batched=True)
    others = [0, 2, 3]
    for field in ("codes", "steps", "negative_curvature"):
        ours, theirs = getattr(result, field), getattr(healthy, field)
        assert ours is theirs is None or torch.equal(ours[others], theirs[others]), field
    for field in ("value", "residual"):  # the order of summation in a product depends on how many tasks are left
        ours, theirs = getattr(result, field), getattr(healthy, field)
        torch.testing.assert_close(ours[others], theirs[others], rtol=1e-12, atol=1e-14)
    assert Status(int(result.codes[1])) is Status.NON_FINITE
    assert result.failed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", LOGISTIC_SOLVERS)
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(name: str, chunk_size: int) -> None:
    theta, data = logistic_data(5)
    whole = solve(logistic(), theta, data, solver=LOGISTIC_SOLVERS[name], batched=True)
    parts = solve(logistic(), theta, data, solver=LOGISTIC_SOLVERS[name], batched=True, chunk_size=chunk_size)
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-9, atol=1e-11)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.steps, whole.steps)
    torch.testing.assert_close(parts.residual, whole.residual, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("name", LOGISTIC_SOLVERS)
def test_the_users_tensors_are_not_changed(name: str) -> None:
    theta, data = logistic_data(3)
    init = normal(9, 3, 3)
    used = [theta, data["x"], data["y"], init]
    before = [tensor.clone() for tensor in used]
    theta.requires_grad_()
    data["x"].requires_grad_()
    init.requires_grad_()
    with torch.no_grad():  # a solve needs gradients of its own and must not ask for the caller's mode
        result = solve(logistic(), theta, data, solver=LOGISTIC_SOLVERS[name], init=init, batched=True)
        assert not torch.is_grad_enabled()
    for tensor, value, grad in zip(used, before, (True, True, False, True), strict=True):
        assert torch.equal(tensor.detach(), value) and tensor.grad is None and tensor.requires_grad is grad
        assert result.value.data_ptr() != tensor.data_ptr()
    assert not result.value.requires_grad and not result.residual.requires_grad


def test_init_and_theta_batched() -> None:
    solver = NewtonCG(max_steps=10, cg_steps=5, tol=1e-10)
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.5]], dtype=F64)
    theta = normal(4, 3, 2)
    result = solve(quadratic(), theta, h, solver=solver, batched=True, theta_batched=True)
    torch.testing.assert_close(result.value, theta / h)
    without_data = of(lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda theta, data: 0 * theta)
    torch.testing.assert_close(solve(without_data, theta, solver=solver, batched=True, theta_batched=True).value, theta)
    # from the solution there is nothing to do; from elsewhere there is
    starts = torch.stack([theta[0] / h[0], theta[1] / h[1] + 1, theta[2] / h[2]])
    again = solve(quadratic(), theta, h, solver=solver, init=starts, batched=True, theta_batched=True)
    assert again.steps.tolist()[::2] == [0, 0] and int(again.steps[1]) > 0
    assert torch.equal(again.value[0], starts[0])
    alone = solve(
        quadratic(), theta[0], h[0], solver=GradientDescent(step_size=0.1, max_steps=1), init=torch.ones(2, dtype=F64)
    )
    torch.testing.assert_close(alone.value, 1 - 0.1 * (h[0] - theta[0]))


def test_gradient_evaluations_are_counted() -> None:
    calls = []

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        calls.append(1)
        return ((phi - theta) ** 2).sum()

    for solver in (GradientDescent(step_size=0.1, max_steps=7), NesterovAGD(step_size=0.1, max_steps=7)):
        calls.clear()
        result = solve(of(inner), torch.ones(2), solver=solver, init=torch.zeros(2))
        assert result.num_grads == len(calls) == 8  # one more to measure the residual
        assert result.num_matvecs == 0 and result.negative_curvature is None  # first-order methods cannot see curvature
    newton = solve(of(inner), torch.ones(2), solver=NewtonCG(max_steps=2, cg_steps=2), init=torch.zeros(2))
    assert 1 <= newton.num_matvecs <= 4 and newton.negative_curvature is not None


# --- GradientDescent -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 17])
def test_gradient_descent_is_the_loop(steps: int) -> None:
    theta, data = logistic_data(4)
    result = solve(logistic(), theta, data, solver=GradientDescent(step_size=0.02, max_steps=steps), batched=True)
    assert (result.steps == steps).all() and statuses(result) == [Status.MAX_STEPS] * 4
    x, y, t = data["x"].numpy(), data["y"].numpy(), theta.numpy()
    for i in range(4):
        phi = np.zeros(3)
        for _ in range(steps):
            phi = phi - 0.02 * (x[i].T @ (1 / (1 + np.exp(-x[i] @ phi)) - y[i]) + np.exp(t) * phi)
        np.testing.assert_allclose(result.value[i].numpy(), phi, rtol=1e-12)
        grad = x[i].T @ (1 / (1 + np.exp(-x[i] @ phi)) - y[i]) + np.exp(t) * phi
        np.testing.assert_allclose(float(result.residual[i]), np.linalg.norm(grad), rtol=1e-10)


def test_gradient_descent_stops_at_the_first_point_below_tol() -> None:
    """G = phi^2 / 2 with step 1/2 halves the gradient: |grad| = 2^-k after k steps."""
    problem = of(lambda phi, theta, data: 0.5 * (phi**2).sum())
    for check_every in (1, 3, 10):
        solver = GradientDescent(step_size=0.5, max_steps=100, tol=2.0**-6, check_every=check_every)
        result = solve(problem, torch.ones(1), solver=solver, init=torch.ones(1))
        assert (
            result.status is Status.CONVERGED
            and result.num_steps == 6
            and result.value.item() == result.residual.item() == 2.0**-6
        )
        assert (
            result.num_grads == 8
        )  # on the CPU not one more than the six steps, the last point, and the one that is measured
    short = solve(
        problem, torch.ones(1), solver=GradientDescent(step_size=0.5, max_steps=5, tol=2.0**-6), init=torch.ones(1)
    )
    assert short.status is Status.MAX_STEPS and short.num_steps == 5 and short.value.item() == 2.0**-5


@pytest.mark.parametrize("tol", [0.0, 1e-8])
@pytest.mark.parametrize("steps", [60, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", [GradientDescent, NesterovAGD])
def test_divergence_of_one_task(kind: Any, tol: float, steps: int, dtype: torch.dtype) -> None:
    """Step 0.5 where 2 / h = 0.02: grows 49-fold a step, to overflow or not."""
    h = torch.tensor([[1.0, 1.5], [1.0, 100.0], [1.2, 1.0]], dtype=dtype)
    theta = torch.ones(2, dtype=dtype)
    result = solve(quadratic(), theta, h, solver=kind(step_size=0.5, max_steps=steps, tol=tol), batched=True)
    assert Status(int(result.codes[1])) is Status.DIVERGED
    assert result.failed.tolist() == [False, True, False]
    torch.testing.assert_close(result.value[[0, 2]], (theta / h)[[0, 2]], rtol=0, atol=1e-6)
    with pytest.raises(bilevel.SolverError, match="1 x DIVERGED .*Reduce step_size"):
        result.unwrap()


def test_backtracking_needs_no_step_size() -> None:
    """The same problem over twelve orders of magnitude."""
    h = torch.logspace(-6, 6, 9, dtype=F64)[:, None] * torch.tensor([1.0, 3.0], dtype=F64)
    theta = h * torch.tensor([1.0, -2.0], dtype=F64)
    for solver in (GradientDescent(step_size=None, max_steps=300), NesterovAGD(step_size=None, max_steps=300)):
        result = solve(quadratic(), theta, h, solver=solver, batched=True, theta_batched=True)
        assert not result.failed.any()
        torch.testing.assert_close(result.value, torch.tensor([[1.0, -2.0]], dtype=F64).expand(9, 2), rtol=1e-6, atol=0)


def test_backtracking_never_raises_the_objective() -> None:
    """Rosenbrock's valley, from the textbook start."""

    def rosenbrock(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return (1 - phi[0]) ** 2 + 100 * (phi[1] - phi[0] ** 2) ** 2

    start = torch.tensor([-1.2, 1.0], dtype=F64)
    values = [24.2]
    for steps in (1, 3, 10, 30, 100, 1000):
        found = solve(
            of(rosenbrock), start, solver=GradientDescent(step_size=None, max_steps=steps), init=start
        ).value.numpy()
        values.append(scipy.optimize.rosen(found))
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 1.0
    newton = solve(of(rosenbrock), start, solver=NewtonCG(max_steps=100, cg_steps=5, tol=1e-9), init=start)
    assert newton.status is Status.CONVERGED
    torch.testing.assert_close(newton.value, torch.ones(2, dtype=F64))


# --- NesterovAGD ---------------------------------------------------------------------------------


KAPPA = 1e4
AGD = {
    "unknown mu": NesterovAGD(step_size=1.0, max_steps=5000, tol=1e-11),
    "known mu": NesterovAGD(step_size=1.0, strong_convexity=1 / KAPPA, max_steps=5000, tol=1e-11),
    "backtracking": NesterovAGD(step_size=None, max_steps=5000, tol=1e-11),
    "backtracking, known mu": NesterovAGD(step_size=None, strong_convexity=1 / KAPPA, max_steps=5000, tol=1e-11),
}


@pytest.mark.parametrize("name", AGD)
def test_agd_has_the_square_root_rate(name: str) -> None:
    """d = 200, kappa = 1e4, log-spaced spectrum: 1e-11 within 5,000 steps, where gradient descent has hardly moved."""
    h = torch.logspace(-np.log10(KAPPA), 0, 200, dtype=F64)
    theta = normal(3, 200)
    result = solve(quadratic(), theta, h, solver=AGD[name])
    assert result.status is Status.CONVERGED, result.describe()
    assert isinstance(result.num_steps, int) and result.num_steps < 5000
    np.testing.assert_allclose(result.value.numpy(), theta.numpy() / h.numpy(), rtol=0, atol=1.01e-11 * KAPPA)
    same_steps = GradientDescent(step_size=1.0, max_steps=result.num_steps)
    assert float(solve(quadratic(), theta, h, solver=same_steps).residual) > 1e6 * 1e-11


def test_agd_steps_grow_like_the_square_root_of_kappa() -> None:
    steps = {}
    for kappa in (1e2, 1e4):
        h = torch.logspace(-np.log10(kappa), 0, 50, dtype=F64)
        for name, mu in (("known", 1 / kappa), ("unknown", None)):
            solver = NesterovAGD(step_size=1.0, strong_convexity=mu, max_steps=20_000, tol=1e-6, check_every=1)
            steps[name, kappa] = int(solve(quadratic(), normal(3, 50), h, solver=solver).steps)
    for name in ("known", "unknown"):
        assert 4 < steps[name, 1e4] / steps[name, 1e2] < 25, steps  # sqrt(100) = 10; linear in kappa would be 100


@pytest.mark.parametrize("option", [{"momentum": 0.6}, {"strong_convexity": 0.5}])
def test_agd_is_the_loop(option: dict[str, float]) -> None:
    """x_{k+1} = y_k - s g(y_k), y_{k+1} = x_{k+1} + beta (x_{k+1} - x_k)."""
    step, steps = 0.02, 15
    q = np.sqrt(0.5 * step)
    beta = option.get("momentum", (1 - q) / (1 + q))
    theta, data = logistic_data(3)
    result = solve(logistic(), theta, data, solver=NesterovAGD(step_size=step, max_steps=steps, **option), batched=True)
    x, y, t = data["x"].numpy(), data["y"].numpy(), theta.numpy()
    for i in range(3):
        phi = ahead = np.zeros(3)
        for _ in range(steps):
            new = ahead - step * (x[i].T @ (1 / (1 + np.exp(-x[i] @ ahead)) - y[i]) + np.exp(t) * ahead)
            ahead, phi = new + beta * (new - phi), new
        np.testing.assert_allclose(result.value[i].numpy(), phi, rtol=1e-11)


def test_agd_restarts_by_the_rule_of_the_paper() -> None:
    """O'Donoghue and Candes 2015: t <- (1 + sqrt(1 + 4 t^2)) / 2, back to 1 where g(y_k) . (x_{k+1} - x_k) > 0."""
    h, theta, step = np.array([1.0, 0.01]), np.array([1.0, 0.1]), 1.0
    x = y = np.zeros(2)
    t, restarts = 1.0, 0
    for _ in range(120):
        grad = h * y - theta
        new = y - step * grad
        if grad @ (new - x) > 0:
            t, restarts = 1.0, restarts + 1
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y, x, t = new + (t - 1) / t_next * (new - x), new, t_next
    assert restarts > 1
    result = solve(quadratic(), torch.tensor(theta), torch.tensor(h), solver=NesterovAGD(step_size=step, max_steps=120))
    np.testing.assert_allclose(result.value.numpy(), x, rtol=1e-6)


# --- NewtonCG ------------------------------------------------------------------------------------


def badly_scaled() -> BilevelProblem:
    """Logistic regression whose features differ by a factor of 1,000 in size; the weights are alike in nothing."""
    g = torch.Generator().manual_seed(8)
    x = torch.randn(80, 12, generator=g, dtype=torch.float64) * torch.logspace(-1.5, 1.5, 12, dtype=torch.float64)
    sign = (x[:, :6].sum(1) + torch.randn(80, generator=g, dtype=torch.float64)).sign()
    return BilevelProblem.from_functions(
        lambda w, theta, data: torch.nn.functional.softplus(-sign * (x @ w)).sum() + 0.5 * theta * w.square().sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros(12, dtype=torch.float64),
    )


def test_a_preconditioner_saves_steps() -> None:
    """To the point of SciPy, which knows none of this."""
    theta = torch.tensor(1e-3, dtype=torch.float64)
    known = solve(badly_scaled(), theta, solver=ScipyMinimize(method="trust-exact", tol=1e-10)).unwrap()
    scale = torch.logspace(3, -3, 12, dtype=torch.float64)  # the features' sizes, squared and inverted
    found = {
        name: solve(
            badly_scaled(),
            theta,
            solver=NewtonCG(max_steps=20, cg_steps=6, cg_rtol=1e-3, tol=1e-8, preconditioner=preconditioner),
        )
        for name, preconditioner in {
            "none": None,
            "identity": lambda v: v,
            "jacobi": Jacobi(),
            "function": lambda v: scale * v,
        }.items()
    }
    assert found["none"].status is Status.MAX_STEPS and float(found["none"].residual) > 1e-3
    assert found["identity"].num_matvecs == found["none"].num_matvecs
    torch.testing.assert_close(found["identity"].value, found["none"].value, rtol=1e-6, atol=0)
    for name in ("jacobi", "function"):
        assert found[name].status is Status.CONVERGED
        torch.testing.assert_close(found[name].value, known, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (lambda v: -v, ValueError, "NewtonCG: preconditioner: expected a symmetric positive definite M, got"),
        (Jacobi, TypeError, r"preconditioner: expected None, Jacobi\(\), .* Did you mean Jacobi\(\)\?"),
        ("jacobi", TypeError, "preconditioner: expected None, Jacobi"),
    ],
)
def test_preconditioners_that_are_none(preconditioner: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        solve(
            badly_scaled(),
            torch.tensor(1.0, dtype=torch.float64),
            solver=NewtonCG(max_steps=3, preconditioner=preconditioner),
        )


def test_a_preconditioner_at_negative_curvature() -> None:
    """M times the negative gradient is a direction of descent there too."""
    result = solve(
        of(lambda phi, theta, data: (1 - phi[0]) ** 2 + 100 * (phi[1] - phi[0] ** 2) ** 2),
        torch.zeros(2, dtype=torch.float64),
        init=torch.tensor([0.0, 3.0], dtype=torch.float64),
        solver=NewtonCG(max_steps=100, cg_steps=2, tol=1e-9, preconditioner=Jacobi()),
    )
    assert result.status is Status.CONVERGED and result.negative_curvature > 0
    torch.testing.assert_close(result.value, torch.ones(2, dtype=torch.float64))


def zoo() -> BilevelProblem:
    """Smooth 4-d problems of two kinds, weighted per task: softplus sums with log-sum-exp, and coupled double wells."""

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        z = data["a"] @ phi + data["c"]
        soft = softplus(z).sum() + torch.logsumexp(z, 0)
        wells = (0.25 * phi**4 - 0.5 * phi**2).sum() + 0.1 * (phi[:-1] * phi[1:]).sum()
        return data["soft"] * soft + data["wells"] * wells + 0.5 * data["mu"] * (phi**2).sum() - data["b"] @ phi

    return of(inner)


def zoo_data(tasks: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    kind = torch.arange(tasks) % 3
    wells = (kind == 2).to(F64)
    data = {
        "a": normal(11, tasks, 8, 4),
        "c": normal(12, tasks, 8),
        "b": normal(13, tasks, 4),
        "soft": 1 - wells,
        "wells": wells,
        "mu": torch.where(
            kind == 2, 0.0, 10 ** (-2 + 2 * torch.rand(tasks, generator=torch.Generator().manual_seed(14), dtype=F64))
        ),
    }
    return {key: value.to(dtype) for key, value in data.items()}, 1.5 * normal(15, tasks, 4, dtype=dtype)


def zoo_derivatives(phi: np.ndarray, data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Gradients and Hessians by hand, (tasks, 4) and (tasks, 4, 4)."""
    z = np.einsum("tij,tj->ti", data["a"], phi) + data["c"]
    s = 1 / (1 + np.exp(-z))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    coupling = 0.1 * (np.eye(4, k=1) + np.eye(4, k=-1))
    soft, wells, mu = (data[key][:, None] for key in ("soft", "wells", "mu"))
    grad = (
        soft * np.einsum("tij,ti->tj", data["a"], s + p)
        + wells * (phi**3 - phi + phi @ coupling)
        + mu * phi
        - data["b"]
    )
    outer = np.einsum("ti,ij->tij", s * (1 - s) + p, np.eye(8)) - np.einsum("ti,tj->tij", p, p)
    hess = np.einsum("tij,tik,tkl->tjl", data["a"], outer, data["a"]) * soft[..., None]
    hess += wells[..., None] * (np.einsum("ti,ij->tij", 3 * phi**2 - 1, np.eye(4)) + coupling) + mu[..., None] * np.eye(
        4
    )
    return grad, hess


@pytest.mark.parametrize(("dtype", "tasks", "tol"), [(F64, 1000, 1e-12), (torch.float32, 200, 1e-5)])
def test_newton_cg_reaches_the_rounding_floor(dtype: torch.dtype, tasks: int, tol: float) -> None:
    """Textbook Armijo misses this tolerance in about 5 % of such problems (the steps drown in the rounding of G)."""
    data, start = zoo_data(tasks, dtype)
    solver = NewtonCG(max_steps=60, cg_steps=10, tol=tol)
    result = solve(zoo(), torch.zeros(1, dtype=dtype), data, solver=solver, init=start, batched=True)
    assert set(statuses(result)) == {Status.CONVERGED}, result.describe()
    numbers = {key: value.double().numpy() for key, value in data.items()}
    grad, hess = zoo_derivatives(result.value.double().numpy(), numbers)
    assert (np.linalg.norm(grad, axis=1) <= tol + 100 * torch.finfo(dtype).eps).all()
    # minima, also where the start was on a hill
    _, at_start = zoo_derivatives(start.double().numpy(), numbers)
    indefinite = np.linalg.eigvalsh(at_start)[:, 0] < 0
    assert indefinite.mean() > 0.2 and (np.linalg.eigvalsh(hess)[:, 0] > 0).all()
    assert result.negative_curvature is not None
    met = result.negative_curvature.numpy() > 0
    assert met[indefinite].any() and not met[numbers["wells"] == 0].any()


def test_newton_cg_takes_few_steps_on_small_well_behaved_problems() -> None:
    theta, data = logistic_data(6)
    result = solve(logistic(), theta, data, solver=NewtonCG(max_steps=8, cg_steps=6, tol=1e-10), batched=True)
    assert statuses(result) == [Status.CONVERGED] * 6 and (result.steps <= 8).all()
    one = solve(
        quadratic(),
        normal(1, 5),
        torch.linspace(1, 3, 5, dtype=F64),
        solver=NewtonCG(max_steps=8, cg_steps=5, tol=1e-9),
    )
    assert one.status is Status.CONVERGED and one.num_steps == 1  # a quadratic: one Newton step


def test_newton_cg_goes_on_at_negative_curvature() -> None:
    """sum phi^4 / 4 - phi^2 / 2 from its hill and from a saddle: to a minimum, as SciPy, and it says so."""
    problem = of(lambda phi, theta, data: (phi**4 / 4 - phi**2 / 2).sum())
    starts = torch.tensor([[0.1, -0.2, 0.3], [0.9, 0.05, -1.1], [1.1, -0.95, 1.05]], dtype=F64)
    data = torch.zeros(3, 1, dtype=F64)
    for cg_steps in (1, 2, 10):
        solver = NewtonCG(max_steps=300, cg_steps=cg_steps, tol=1e-10)
        result = solve(problem, torch.zeros(1, dtype=F64), data, solver=solver, init=starts, batched=True)
        assert statuses(result) == [Status.CONVERGED] * 3, result.describe()
        for i in range(3):
            scipys = scipy.optimize.minimize(lambda x: (x**4 / 4 - x**2 / 2).sum(), starts[i].numpy())
            np.testing.assert_allclose(np.abs(result.value[i].numpy()), np.abs(scipys.x), atol=1e-4)
            np.testing.assert_allclose(np.abs(result.value[i].numpy()), 1.0, atol=1e-9)
        assert result.negative_curvature is not None
        assert result.negative_curvature.tolist()[0] > 0 and result.negative_curvature.tolist()[2] == 0


def dense_newton(phi: np.ndarray, matrix: np.ndarray, grad: np.ndarray) -> np.ndarray:
    return phi - np.linalg.solve(matrix, grad)


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()])
@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_newton_cg_direction_is_the_dense_one(curvature: Any, damping: float) -> None:
    """One full step of (curvature + damping I)^{-1} grad: tanh(X phi) with a logistic loss and a proximal term."""
    x, y, lam = normal(21, 9, 4), (normal(22, 9) > 0).to(F64), 0.8
    problem = ProximalProblem.from_model(
        lambda phi, data: torch.tanh(x @ phi),
        lambda z, data: softplus(z).sum() - y @ z,
        lambda phi, data: phi.sum(),
        lam,
    )
    theta = 0.3 * normal(23, 4)
    start = theta + 0.05 * normal(24, 4)
    a, t, p = x.numpy(), theta.numpy(), start.numpy()
    z = np.tanh(a @ p)
    s = 1 / (1 + np.exp(-z))
    jacobian = (1 - z**2)[:, None] * a
    grad = jacobian.T @ (s - y.numpy()) + lam * (p - t)
    gauss_newton = (jacobian.T * (s * (1 - s))) @ jacobian
    rest = (a.T * ((s - y.numpy()) * -2 * z * (1 - z**2))) @ a
    matrix = gauss_newton + (rest if isinstance(curvature, Hessian) else 0) + (lam + damping) * np.eye(4)
    assert np.linalg.eigvalsh(matrix)[0] > 0 and np.linalg.norm(rest) > 0.1
    solver = NewtonCG(max_steps=1, cg_steps=8, curvature=curvature, damping=damping)
    result = solve(problem, theta, solver=solver, init=start)
    np.testing.assert_allclose(result.value.numpy(), dense_newton(p, matrix, grad), rtol=1e-8)


def test_gauss_newton_meets_no_negative_curvature_where_the_hessian_does() -> None:
    """tanh model with squared loss at a start where its Hessian is indefinite."""
    x, y = normal(31, 20, 3), torch.sign(normal(32, 20))
    problem = ProximalProblem.from_model(
        lambda phi, data: torch.tanh(x @ phi), lambda z, data: ((z - y) ** 2).sum(), lambda phi, data: phi.sum(), 0.01
    )
    start = 2 * normal(33, 3)
    runs = {
        kind: solve(
            problem,
            torch.zeros(3, dtype=F64),
            init=start,
            solver=NewtonCG(max_steps=300, cg_steps=6, tol=1e-7, curvature=kind),
        )
        for kind in (Hessian(), GaussNewton())
    }
    dense = torch.func.hessian(lambda phi: problem.inner_objective(phi, torch.zeros(3, dtype=F64)))(start)
    assert np.linalg.eigvalsh(dense.numpy())[0] < 0
    assert int(runs[Hessian()].negative_curvature) > 0 and int(runs[GaussNewton()].negative_curvature) == 0
    assert runs[GaussNewton()].status is Status.CONVERGED


def test_truncated_cg_takes_the_steps_asked_for() -> None:
    """One CG step from a quadratic's start is steepest descent with the exact step."""
    h, theta = torch.tensor([1.0, 4.0, 9.0], dtype=F64), torch.tensor([1.0, 1.0, 1.0], dtype=F64)
    result = solve(quadratic(), theta, h, solver=NewtonCG(max_steps=1, cg_steps=1))
    g = theta.numpy()
    np.testing.assert_allclose(result.value.numpy(), g * (g @ g) / (g @ (h.numpy() * g)), rtol=1e-12)
    assert result.num_matvecs == 1


def test_the_line_search_halves_the_step() -> None:
    """G = sqrt(1 + phi^2): a full Newton step goes from phi to -phi^3, away for |phi| > 1; halvings help."""
    problem = of(lambda phi, theta, data: torch.sqrt(1 + phi**2).sum())
    start = torch.tensor([2.0], dtype=F64)
    result = solve(problem, start, init=start, solver=NewtonCG(max_steps=30, cg_steps=2, tol=1e-12))
    assert result.status is Status.CONVERGED and abs(result.value.item()) <= 1e-12
    # by hand: G falls by 1e-4 t |slope| first at t = 1/4
    direction = -(2.0 + 8.0)
    slope = direction * 2 / np.sqrt(5)
    length = next(
        t for t in 0.5 ** np.arange(9) if np.sqrt(1 + (2 + t * direction) ** 2) <= np.sqrt(5) + 1e-4 * t * slope
    )
    assert length < 1
    one = solve(problem, start, init=start, solver=NewtonCG(max_steps=1, cg_steps=2))
    np.testing.assert_allclose(one.value.item(), 2 + length * direction, rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(step_size=None, max_steps=500, tol=1e-9),
        NewtonCG(max_steps=10, cg_steps=3, tol=1e-9),
        NewtonCG(max_steps=10, cg_steps=3, tol=1e-9, max_backtracks=0),
        NewtonCG(max_steps=10, cg_steps=3, tol=0.0),
    ],
    ids=repr,
)
def test_an_objective_that_cannot_be_lowered(solver: InnerSolver) -> None:
    """The value is 3 + phi^2, the gradient says -phi: no step against it lowers it. The healthy task is not held up."""

    def lying(phi: Tensor, theta: Tensor, lie: Tensor) -> Tensor:
        truth = (phi**2).sum()
        return 3 + torch.where(lie > 0, 1.5 * truth.detach() - 0.5 * truth, truth)

    start = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=F64)
    lie = torch.tensor([1.0, 0.0], dtype=F64)
    result = solve(of(lying), torch.zeros(1, dtype=F64), lie, solver=solver, init=start, batched=True)
    assert statuses(result) == [Status.LINE_SEARCH_FAILED, Status.CONVERGED], result.describe()
    assert torch.equal(result.value[0], start[0]) and not result.failed.any()


# --- BlackBox ------------------------------------------------------------------------------------


def test_a_black_box_is_called_once_per_task_with_detached_tensors_and_gradient_mode_on() -> None:
    theta, data = logistic_data(3)
    theta.requires_grad_()
    data["x"].requires_grad_()
    seen: list[Any] = []
    problem = logistic()

    def fn(given: BilevelProblem, own_theta: Tensor, own: Any, init: Tensor) -> Tensor:
        assert given is problem and torch.is_grad_enabled()
        for tensor in (own_theta, own["x"], own["y"], init):
            assert not tensor.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        assert own["x"].shape == (12, 3) and init.shape == (3,) and own["tag"] == "a"
        seen.append((own["x"].clone(), init.clone()))
        return own["y"][:3].clone()

    init = normal(5, 3, 3)
    with torch.no_grad():
        result = solve(problem, theta, {**data, "tag": "a"}, solver=BlackBox(fn), init=init, batched=True)
    assert len(seen) == 3
    for i, (x, start) in enumerate(seen):
        assert torch.equal(x, data["x"][i]) and torch.equal(start, init[i])
    assert torch.equal(result.value, data["y"][:, :3])
    assert statuses(result) == [Status.MAX_STEPS] * 3 and result.steps.tolist() == [0, 0, 0] and not result.failed.any()
    for i in range(3):  # measured, not believed
        x, y, phi = data["x"][i].detach().numpy(), data["y"][i].numpy(), result.value[i].numpy()
        grad = x.T @ (1 / (1 + np.exp(-x @ phi)) - y) + np.exp(theta.detach().numpy()) * phi
        np.testing.assert_allclose(float(result.residual[i]), np.linalg.norm(grad), rtol=1e-10)


def test_a_black_box_around_scipy_on_one_task() -> None:
    theta, data = logistic_data(1)
    one = {"x": data["x"][0], "y": data["y"][0]}
    result = solve(logistic(), theta, one, solver=BlackBox(black_box, tol=1e-6))
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(
        result.value.numpy(), logistic_by_scipy(theta.numpy(), one["x"].numpy(), one["y"].numpy()), atol=1e-7
    )
    loose = BlackBox(lambda problem, theta, data, init: init, tol=1e9)
    assert solve(logistic(), theta, one, solver=loose).status is Status.CONVERGED


def test_a_black_box_may_optimise_its_start_in_place() -> None:
    """The natural way with torch.optim; it must not reach the caller's tensors."""

    def fn(problem: BilevelProblem, theta: Tensor, data: Any, init: Tensor) -> Tensor:
        phi = init.requires_grad_()
        optimiser = torch.optim.LBFGS(
            [phi], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = problem.inner_objective(phi, theta, data)
            loss.backward()
            return loss

        optimiser.step(closure)
        return phi

    theta, data = logistic_data(2)
    starts = normal(6, 2, 3)
    kept = starts.clone()
    result = solve(logistic(), theta, data, solver=BlackBox(fn, tol=1e-5), init=starts, batched=True)
    assert statuses(result) == [Status.CONVERGED] * 2 and not result.value.requires_grad
    assert torch.equal(starts, kept) and not starts.requires_grad and starts.grad is None
    single = kept[0].clone()
    solve(logistic(), theta, {"x": data["x"][0], "y": data["y"][0]}, solver=BlackBox(fn), init=single)
    assert torch.equal(single, kept[0]) and not single.requires_grad and single.grad is None


def test_a_black_box_with_trees() -> None:
    case = PROBLEMS[1]
    result = solve(
        case.problem,
        case.theta,
        case.data,
        solver=BlackBox(lambda problem, theta, data, init: case.phi_star(theta, data)),
    )
    assert result.status is Status.CONVERGED
    permuted = BlackBox(lambda problem, theta, data, init: dict(reversed(case.phi_star(theta, data).items())))
    again = solve(case.problem, case.theta, case.data, solver=permuted)
    assert torch.equal(again.value["b"], result.value["b"]) and torch.equal(again.value["a"][0], result.value["a"][0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_black_box_that_answers_nonsense_has_failed(bad: float) -> None:
    h = torch.ones(2, 2)
    fn = BlackBox(lambda problem, theta, data, init: init + torch.where(data[0] > 1, bad, 0.0))
    h[1] = 2.0
    result = solve(quadratic(), torch.ones(2), h, solver=fn, batched=True)
    assert statuses(result) == [Status.MAX_STEPS, Status.NON_FINITE]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (
            lambda init: {"w": init},
            r"BlackBox: expected a tree like init with leaves \[''\], got leaves \[\"\['w'\]\"\]",
        ),
        (lambda init: None, "BlackBox: phi: expected a tensor torch.float64 .* like init, got NoneType"),
        (lambda init: init.numpy(), "BlackBox: phi: expected a tensor .* like init, got ndarray"),
        (
            lambda init: init[:1],
            r"BlackBox: phi: expected a tensor torch.float64 \(2,\) like init, got torch.float64 \(1,\)",
        ),
        (lambda init: init[None], r"got torch.float64 \(1, 2\)"),
        (lambda init: init.float(), r"got torch.float32 \(2,\)"),
    ],
)
def test_the_answer_of_a_black_box_is_checked(answer: Any, match: str) -> None:
    solver = BlackBox(lambda problem, theta, data, init: answer(init))
    with pytest.raises(ValueError, match=match):
        solve(quadratic(), torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), solver=solver)


def test_what_a_black_box_raises_reaches_the_caller() -> None:
    def fn(*args: Any) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        solve(quadratic(), torch.ones(2), torch.ones(2), solver=BlackBox(fn))


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: GradientDescent(step_size=0.0, max_steps=5),
            ValueError,
            "step_size: expected a finite number > 0, got 0",
        ),
        (
            lambda: GradientDescent(step_size=-1.0, max_steps=5),
            ValueError,
            "step_size: expected a finite number > 0, got -1",
        ),
        (lambda: GradientDescent(step_size="auto", max_steps=5), TypeError, "step_size: expected a number, got str"),
        (lambda: GradientDescent(step_size=0.1, max_steps=0), ValueError, "max_steps: expected at least 1, got 0"),
        (lambda: GradientDescent(step_size=0.1, max_steps=5.0), TypeError, "max_steps: expected an integer, got float"),
        (
            lambda: GradientDescent(step_size=0.1, max_steps=5, tol=-1.0),
            ValueError,
            "tol: expected a finite number >= 0",
        ),
        (
            lambda: GradientDescent(step_size=0.1, max_steps=5, tol=float("nan")),
            ValueError,
            "tol: expected a finite number >= 0",
        ),
        (
            lambda: GradientDescent(step_size=0.1, max_steps=5, check_every=0),
            ValueError,
            "check_every: expected at least 1",
        ),
        (lambda: GradientDescent(step_size=0.1, max_step=5), TypeError, "max_step"),
        (lambda: GradientDescent(max_steps=5), TypeError, "step_size"),
        (
            lambda: NesterovAGD(step_size=0.1, max_steps=5, momentum=1.0),
            ValueError,
            r"momentum: expected a number in \[0, 1\), got 1",
        ),
        (
            lambda: NesterovAGD(step_size=0.1, max_steps=5, momentum=-0.1),
            ValueError,
            "momentum: expected a finite number >= 0",
        ),
        (
            lambda: NesterovAGD(step_size=0.1, max_steps=5, strong_convexity=0.0),
            ValueError,
            "strong_convexity: expected a finite number > 0",
        ),
        (
            lambda: NesterovAGD(step_size=0.1, max_steps=5, strong_convexity=11.0),
            ValueError,
            "strong_convexity: expected at most 1 / step_size = 10",
        ),
        (
            lambda: NesterovAGD(step_size=0.1, max_steps=5, strong_convexity=1.0, momentum=0.5),
            ValueError,
            "expected strong_convexity or momentum, got both",
        ),
        (lambda: NesterovAGD(step_size=0.1, max_steps=5, mu=1.0), TypeError, "mu"),
        (lambda: NewtonCG(max_steps=0), ValueError, "max_steps: expected at least 1"),
        (lambda: NewtonCG(cg_steps=0), ValueError, "cg_steps: expected at least 1"),
        (lambda: NewtonCG(max_backtracks=-1), ValueError, "max_backtracks: expected at least 0, got -1"),
        (lambda: NewtonCG(damping=-1.0), ValueError, "damping: expected a finite number >= 0"),
        (lambda: NewtonCG(cg_rtol=float("nan")), ValueError, "cg_rtol: expected a finite number >= 0"),
        (
            lambda: NewtonCG(cg_rtol=1),
            ValueError,
            "cg_rtol: expected a relative residual below 1, such as 1e-3, got 1: that of zero is",
        ),
        (
            lambda: NewtonCG(curvature="gauss-newton"),
            TypeError,
            r"curvature: expected Hessian\(\) or GaussNewton\(\), got 'gauss-newton'",
        ),
        (lambda: NewtonCG(curvature=GaussNewton), TypeError, r"curvature: expected Hessian\(\) or GaussNewton\(\)"),
        (lambda: NewtonCG(step_size=0.1), TypeError, "step_size"),
        (lambda: BlackBox(3), TypeError, r"fn: expected a function of \(problem, theta, data, init\), got int"),
        (lambda: BlackBox(black_box, tol=-1.0), ValueError, "tol: expected a finite number >= 0"),
        (lambda: BlackBox(black_box, 1e-3), TypeError, "positional"),
        (lambda: BlackBox(black_box, atol=1e-3), TypeError, "atol"),
    ],
)
def test_constructor_errors(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (
            lambda: GradientDescent(step_size=np.float32(0.5), max_steps=np.int8(5), tol=np.float16(0.25)),
            GradientDescent(step_size=0.5, max_steps=5, tol=0.25),
        ),
        (
            lambda: NesterovAGD(step_size=np.float32(0.25), max_steps=np.int64(5), momentum=np.float32(0.5)),
            NesterovAGD(step_size=0.25, max_steps=5, momentum=0.5),
        ),
        (
            lambda: NewtonCG(max_steps=np.int64(3), damping=np.float64(0.1), curvature=GaussNewton()),
            NewtonCG(max_steps=3, damping=0.1, curvature=GaussNewton()),
        ),
        (lambda: Hessian(product=FiniteDifference(step=np.float32(0.5))), Hessian(product=FiniteDifference(step=0.5))),
    ],
)
def test_numbers_of_any_kind_become_those_of_python(given: Any, same: Any) -> None:
    assert repr(given()) == repr(same)


@pytest.mark.parametrize("solver", [GradientDescent, NesterovAGD])
def test_a_step_size_that_is_sought_costs_two_gradients(solver: Any) -> None:
    theta, h = torch.ones(2), torch.tensor([1.0, 3.0])
    given, sought = (solve(quadratic(), theta, h, solver=solver(step_size=size, max_steps=6)) for size in (0.1, None))
    assert sought.num_grads == given.num_grads + 2 and sought.steps == given.steps == 6


@pytest.mark.parametrize("name", LOGISTIC_SOLVERS)
def test_the_repr_is_the_log_line(name: str) -> None:
    solver = LOGISTIC_SOLVERS[name]
    with pytest.raises(AttributeError):
        solver.tol = 1.0  # type: ignore[attr-defined]
    if name == "black-box":
        assert repr(solver).startswith("BlackBox(fn=<function black_box") and "tol=1e-06" in repr(solver)
        return
    namespace = {
        "GradientDescent": GradientDescent,
        "NesterovAGD": NesterovAGD,
        "NewtonCG": NewtonCG,
        "Hessian": Hessian,
        "ReverseOverReverse": ReverseOverReverse,
    }
    assert eval(repr(solver), namespace) == solver


def test_the_repr_reads_as_written() -> None:
    assert (
        repr(GradientDescent(step_size=0.1, max_steps=5))
        == "GradientDescent(step_size=0.1, max_steps=5, tol=0.0, check_every=10)"
    )


def test_a_solver_class_is_no_solver() -> None:
    with pytest.raises(TypeError, match=r"solver: expected an inner solver .*Did you mean NewtonCG\(\.\.\.\)\?"):
        solve(quadratic(), torch.ones(2), torch.ones(2), solver=NewtonCG)
    with pytest.raises(TypeError, match="solver: expected an inner solver"):
        solve(quadratic(), torch.ones(2), torch.ones(2), solver="newton")


def test_gauss_newton_needs_a_model() -> None:
    with pytest.raises(
        ValueError, match=r"GaussNewton\(\) needs a problem of the form output_loss\(predict\(phi, ...\), ...\)"
    ):
        solve(quadratic(), torch.ones(2), torch.ones(2), solver=NewtonCG(curvature=GaussNewton()))
