"""L-BFGS, SciPy's and PyTorch's optimizers as inner solvers, beyond what the rows of tests/cases.py meet everywhere."""

import copy
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import bilevel
from bilevel import BilevelProblem, Status
from bilevel.entry import prepare
from bilevel.linsys import CG
from bilevel.solvers import LBFGS, BlackBox, GradientDescent, InnerSolver, ScipyMinimize, TorchOptim

SGD = TorchOptim(lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.5), max_steps=500, tol=1e-9)
BOXES: dict[str, InnerSolver] = {"scipy": ScipyMinimize(tol=1e-6), "torch": SGD}


def quadratic(kappa: float, d: int, seed: int) -> tuple[BilevelProblem, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a = q @ np.diag(np.geomspace(1, kappa, d)) @ q.T
    b, matrix = rng.standard_normal(d), torch.tensor(a)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * phi @ matrix @ phi - phi @ theta,
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    return problem, a, b


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e5])
def test_lbfgs_goes_where_scipy_does_in_about_as_many_gradients(kappa: float) -> None:
    problem, a, b = quadratic(kappa, 40, 0)
    sizes = []

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        grad = a @ x - b
        sizes.append(float(np.linalg.norm(grad)))
        return float(0.5 * x @ a @ x - b @ x), grad

    options = {"gtol": 1e-8, "ftol": 0.0, "maxiter": 10**5, "maxfun": 10**5, "maxcor": 10}
    scipy.optimize.minimize(value, np.zeros(40), jac=True, method="L-BFGS-B", options=options)
    tol = 2 * min(sizes)  # on ill-conditioned problems it gives up ("ABNORMAL") long before gtol
    needed = 1 + next(k for k, size in enumerate(sizes) if size <= tol)
    ours = bilevel.solve(problem, torch.tensor(b), solver=LBFGS(max_steps=2 * needed, tol=tol, check_every=1))
    assert ours.status is Status.CONVERGED and ours.num_grads <= 2 * needed
    np.testing.assert_allclose(ours.value.numpy(), np.linalg.solve(a, b), atol=1.01 * tol)  # mu = 1
    gd = bilevel.solve(problem, torch.tensor(b), solver=GradientDescent(step_size=1 / kappa, max_steps=ours.num_grads))
    assert float(gd.residual) > 3 * tol


def test_lbfgs_on_a_curved_valley() -> None:
    """Rosenbrock's function, per problem of a batch from its own start."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (100 * (phi[1:] - phi[:-1] ** 2) ** 2 + (theta - phi[:-1]) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: data,
    )
    starts = torch.tensor([[-1.2, 1.0], [2.0, -3.0], [0.0, 0.0]], dtype=torch.float64)
    found = bilevel.solve(
        problem, torch.ones((), dtype=torch.float64), starts, solver=LBFGS(max_steps=300, tol=1e-10), batched=True
    )
    assert (found.codes == int(Status.CONVERGED)).all()
    torch.testing.assert_close(found.value, torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "solver",
    [LBFGS(max_steps=60), LBFGS(max_steps=200, tol=1e-8), *BOXES.values()],
    ids=["lbfgs", "lbfgs to tol", *BOXES],
)
def test_a_bad_task_leaves_the_others_as_they_were(solver: InnerSolver) -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi.exp() * theta.exp()).sum() - phi @ data,
        lambda phi, theta, data: (phi**2).sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    data = torch.tensor([[1.0, 2.0], [0.5, 3.0], [2.0, 1.0]], dtype=torch.float64)
    good = bilevel.solve(problem, theta, data, solver=solver, batched=True)
    torch.testing.assert_close(good.value, torch.log(data) - theta, rtol=1e-4, atol=1e-4)
    spoilt = data.clone()
    spoilt[1, 0] = torch.nan
    bad = bilevel.solve(problem, theta, spoilt, solver=solver, batched=True)
    assert bad.failed.tolist() == [False, True, False]
    assert torch.equal(bad.value[[0, 2]], good.value[[0, 2]])


@pytest.mark.parametrize("name", BOXES)
def test_black_boxes_are_measured_and_leave_the_users_tensors(name: str) -> None:
    problem, a, b = quadratic(10.0, 5, 1)
    theta, init = torch.tensor(b), torch.ones(5, dtype=torch.float64)
    before = (theta.clone(), init.clone())
    found = bilevel.solve(problem, theta, solver=BOXES[name], init=init)
    assert torch.equal(theta, before[0]) and torch.equal(init, before[1]) and not init.requires_grad
    residual = np.linalg.norm(a @ found.value.numpy() - b)
    assert float(found.residual) == pytest.approx(residual, rel=1e-6, abs=1e-14)
    assert (found.status is Status.CONVERGED) == (residual <= BOXES[name].tol)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BOXES)
def test_truncated_black_boxes_say_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    problem, _, b = quadratic(1e3, 10, 2)
    short: dict[str, InnerSolver] = {
        "scipy": ScipyMinimize(tol=1e-12, options={"maxiter": 2}),
        "torch": TorchOptim(lambda params: torch.optim.Adam(params, lr=1e-3), max_steps=2, tol=1e-12),
    }
    found = bilevel.solve(problem, torch.tensor(b), solver=short[name])
    assert found.status is Status.MAX_STEPS and float(found.residual) > 1e-3


@pytest.mark.parametrize("name", BOXES)
def test_hypergradient_through_a_black_box(name: str) -> None:
    problem, a, b = quadratic(20.0, 6, 3)
    found = bilevel.hypergradient(problem, torch.tensor(b), solver=BOXES[name], linsys=CG(max_steps=50, rtol=1e-10))
    expected = 2 * np.linalg.solve(a, np.linalg.solve(a, b))
    np.testing.assert_allclose(found.unwrap().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BOXES)
def test_what_the_users_function_raises_reaches_the_caller(name: str) -> None:
    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        raise RuntimeError("no more paper")

    problem = BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: theta.clone()
    )
    with pytest.raises(RuntimeError, match="no more paper"):
        bilevel.solve(problem, torch.ones(2), solver=BOXES[name])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LBFGS(max_steps=0), ValueError, "max_steps: expected at least 1, got 0"),
        (lambda: LBFGS(max_steps=5, memory=0), ValueError, "memory: expected at least 1, got 0"),
        (lambda: TorchOptim(torch.optim.Adam, max_steps=0), ValueError, "max_steps"),
        (lambda: TorchOptim("adam", max_steps=1), TypeError, "factory: expected a function of the parameters"),  # type: ignore[arg-type]
        (
            lambda: TorchOptim(lambda params: torch.optim.Adam(torch.nn.Linear(2, 2).parameters()), max_steps=1),
            ValueError,
            "expected an optimizer of the parameters that it is given.*not with module",
        ),
        (lambda: ScipyMinimize(method="no such method"), ValueError, "method"),
    ],
    ids=["steps", "memory", "optimizer steps", "factory", "other parameters", "method"],
)
def test_wrong_options(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        solver = make()
        problem, _, b = quadratic(2.0, 2, 4)
        bilevel.solve(problem, torch.tensor(b), solver=solver)


def test_the_library_does_not_import_scipy_and_says_what_to_install() -> None:
    code = """
import sys
import bilevel, torch
assert "scipy" not in sys.modules
sys.modules["scipy"] = sys.modules["scipy.optimize"] = None
problem = bilevel.BilevelProblem.from_functions(
    lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: phi.sum(), lambda theta, data: 0 * theta)
try:
    bilevel.solve(problem, torch.ones(2), solver=bilevel.solvers.ScipyMinimize())
except ImportError as error:
    assert "pip install scipy" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scipy_minimize_is_a_value() -> None:
    """Its options are copied, and it can be a key."""
    options = {"maxiter": 5}
    solver = ScipyMinimize(options=options)
    options["maxiter"] = 1
    assert solver.options == {"maxiter": 5}
    assert {solver: 1}[ScipyMinimize(options={"maxiter": 5})] == 1
    assert solver != ScipyMinimize(options={"maxiter": 6})


def test_a_task_whose_objective_is_no_number_leaves_the_others_alone() -> None:
    """The line search of torch.optim.LBFGS raises IndexError there; a log of a negative number has a gradient all the same."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (phi * data - theta * (phi * data).log()).sum(), lambda phi, theta, data: phi.sum()
    )
    data, start = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, 1.0]]).double(), torch.full((3, 2), 0.5).double()
    solver = TorchOptim(lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"), 20, tol=1e-8)
    found = bilevel.solve(problem, torch.ones(()).double(), data, solver=solver, init=start, batched=True)
    rest = [0, 2]
    alone = bilevel.solve(problem, torch.ones(()).double(), data[rest], solver=solver, init=start[rest], batched=True)
    assert torch.equal(found.value[rest], alone.value) and torch.equal(found.codes[rest], alone.codes)
    assert (alone.residual < 0.1 * torch.tensor([2.2, 2.2])).all()  # of 1 and more at the start


def test_a_black_box_may_return_the_same_buffer_for_every_task() -> None:
    """Before, all tasks got the answer of the last one."""
    buffer = torch.empty(2, dtype=torch.float64)
    problem = BilevelProblem.from_functions(
        lambda w, theta, y: 0.5 * (w - theta * y).square().sum(),
        lambda w, theta, y: w.sum(),
        lambda theta, y: torch.zeros(2, dtype=torch.float64),
    )

    def work(problem: Any, theta: Tensor, y: Tensor, init: Tensor) -> Tensor:
        return buffer.copy_(theta * y)

    y = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    found = bilevel.solve(problem, torch.tensor(2.0, dtype=torch.float64), y, solver=BlackBox(work), batched=True)
    torch.testing.assert_close(found.unwrap(check="converged"), 2 * y)


ROSENBROCK = BilevelProblem.from_functions(
    lambda p, theta, data: (1 - p[0]) ** 2 + theta * (p[1] - p[0] ** 2) ** 2, lambda p, theta, data: p.sum()
)
RAISED = BilevelProblem.from_functions(  # rounding hides what the last steps gain
    lambda p, theta, data: 1e7 + (1 - p[0]) ** 2 + theta * (p[1] - p[0] ** 2) ** 2, lambda p, theta, data: p.sum()
)
BOWL = BilevelProblem.from_functions(  # the second trial meets a gradient of exactly zero
    lambda p, theta, data: 0.5 * theta * p.square().sum(), lambda p, theta, data: p.sum()
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("problem", "scale"), [(ROSENBROCK, 20.0), (RAISED, 20.0), (BOWL, 1.0)], ids=["rosenbrock", "raised", "bowl"]
)
def test_the_short_cut_of_lbfgs_changes_nothing(problem: BilevelProblem, scale: float, dtype: Any) -> None:
    """Where every trial is taken and numbers may be read (tol > 0); without a tolerance the same step goes the long way."""
    theta, start = torch.tensor(scale, dtype=dtype), torch.tensor([-1.2, 1.0], dtype=dtype)
    call = prepare(problem, theta, None, start)
    objective, short, general = call.objective(), LBFGS(max_steps=1, tol=1e-30), LBFGS(max_steps=1)
    state, taken = general.init(objective, call.phi), 0
    for _ in range(80):  # to the rounding floor and beyond
        local = general.evaluate(objective, state.point)
        found, state = short.step(objective, copy.deepcopy(state), local), general.step(objective, state, local)
        for mine, other in zip(tree_leaves(asdict(found)), tree_leaves(asdict(state)), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
        taken += int(state.search.rejected == 0)
    assert taken > 2


@pytest.mark.parametrize("method", ["trust-exact", "Newton-CG", "trust-constr"])
def test_scipy_gets_numbers_where_a_hessian_is_zero_by_itself(method: str) -> None:
    """That of a sum of absolute values is a tensor without memory."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta).abs().sum(), lambda phi, theta, data: phi.sum()
    )
    found = bilevel.solve(problem, torch.tensor([1.0, 2.0]), solver=ScipyMinimize(method=method), init=torch.zeros(2))
    assert found.value.isfinite().all()
