"""Inner solvers where the objective misleads them: plateaus uphill, saddles, constants, extreme units. The oracles are closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Status
from bilevel.linsys import CG
from bilevel.solvers import LBFGS, BlackBox, GradientDescent, NesterovAGD, NewtonCG, ScipyMinimize, TorchOptim
from bilevel.solvers.base import InnerSolver

Make = Callable[[float], InnerSolver]

SOLVERS: dict[str, Make] = {
    "gd": lambda tol: GradientDescent(step_size=None, max_steps=3000, tol=tol),
    "agd": lambda tol: NesterovAGD(step_size=None, max_steps=3000, tol=tol),
    "lbfgs": lambda tol: LBFGS(max_steps=1000, tol=tol),
    "newton-cg": lambda tol: NewtonCG(max_steps=200, cg_steps=40, tol=tol),
    "scipy": lambda tol: ScipyMinimize(tol=tol),
    "scipy-tnc": lambda tol: ScipyMinimize(method="TNC", tol=tol),
}
OURS = [name for name in SOLVERS if not name.startswith("scipy")]


def solve(solver: InnerSolver, objective: Callable[[Tensor], Tensor], start: Tensor) -> bilevel.Result:
    """From the start to a minimum of a function without theta and data."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: objective(phi), lambda phi, theta, data: phi.sum()
    )
    return bilevel.solve(problem, torch.zeros((), dtype=start.dtype), solver=solver, init=start)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("start", [0.3, 0.99, 1.01, 1.7])
@pytest.mark.parametrize("ridge", [0.0, 1e-12, 1e-9])
def test_a_plateau_uphill_is_no_answer(name: str, start: float, ridge: float) -> None:
    """At the inflection the curvature along the gradient is next to 0, and the first trial lands where G is flat and near 1."""

    def welsch(phi: Tensor) -> Tensor:
        return (1 - (-0.5 * phi.square()).exp() + 0.5 * ridge * phi.square()).sum()

    found = solve(SOLVERS[name](1e-8), welsch, torch.tensor([start], dtype=torch.float64))
    assert found.status is Status.CONVERGED and found.value.abs() < 1e-7


@pytest.mark.parametrize("name", SOLVERS)
def test_no_answer_lies_above_the_start(name: str) -> None:
    """Sigmoids with a squared error: flat far out, on the wrong side as well."""
    for seed in range(25):
        g = torch.Generator().manual_seed(seed)
        X, w, phi = (
            torch.randn(20, 2, generator=g).double(),
            torch.randn(20, generator=g),
            torch.randn(2, generator=g).double(),
        )
        y = (w > 0).double()

        def loss(phi: Tensor, X: Tensor = X, y: Tensor = y) -> Tensor:
            return ((X @ phi).sigmoid() - y).square().mean() + 0.5e-9 * phi.square().sum()

        found = solve(SOLVERS[name](1e-6), loss, 2 * phi)
        assert loss(found.value) <= loss(2 * phi) + 1e-12


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "size, dtype", [(1e-3, torch.float32), (1e-4, torch.float32), (1e-4, torch.float64), (1e-8, torch.float64)]
)
def test_they_leave_a_saddle_that_they_start_next_to(name: str, size: float, dtype: torch.dtype) -> None:
    """|UV - M|^2 / 2 + r (|U|^2 + |V|^2) / 2 from small numbers: the first steps lower G by less than its rounding. At its minimum every
    singular value s > r of M adds r s - r^2 / 2, the others s^2 / 2.
    """
    g = torch.Generator().manual_seed(0)
    M = (torch.randn(8, 3, generator=g).double() @ torch.randn(3, 6, generator=g).double()).to(dtype)
    start, r = size * torch.randn(14, 3, generator=g).to(dtype), 0.1
    s = torch.linalg.svdvals(M.double())
    least = torch.where(s > r, r * s - r**2 / 2, s**2 / 2).sum()

    def factorised(phi: Tensor) -> Tensor:
        return 0.5 * (phi[:8] @ phi[8:].mT - M).square().sum() + 0.5 * r * phi.square().sum()

    found = solve(SOLVERS[name](1e-3 if dtype == torch.float32 else 1e-7), factorised, start)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(
        factorised(found.value.double()) if dtype == torch.float64 else factorised(found.value),
        least.to(dtype),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("constant, dtype", [(1e4, torch.float32), (1e10, torch.float64)])
def test_a_large_constant_is_no_licence_to_climb(name: str, constant: float, dtype: torch.dtype) -> None:
    found = solve(
        SOLVERS[name](1e-2 if dtype == torch.float32 else 1e-4),
        lambda phi: constant - phi.cos().sum(),
        torch.tensor([3.0, -2.5], dtype=dtype),
    )
    assert found.status is Status.CONVERGED and (found.value.cos() > 0.9).all()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12])
def test_the_units_of_the_objective_do_not_matter(name: str, size: float) -> None:
    """In float32. The squares of gradients near 1e-25 are no numbers: then it may fail, but must not take the start for an answer."""
    weights, solver = torch.tensor([1.0, 3.0, 10.0]), SOLVERS[name](1e-3 * size)
    found = solve(solver, lambda phi: 0.5 * size * (weights * (phi - 1).square()).sum(), torch.zeros(3))
    assert found.status is Status.CONVERGED or size == 1e-25
    if found.status is Status.CONVERGED:
        assert found.residual <= 1e-3 * size and found.steps > 0
        torch.testing.assert_close(found.value, torch.ones(3), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", OURS)
def test_large_variables_of_little_curvature(name: str) -> None:
    target = torch.tensor([1e6, 5e5])
    found = solve(SOLVERS[name](1e-9), lambda phi: 0.5e-12 * (phi - target).square().sum(), torch.zeros(2))
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.value, target, rtol=5e-3, atol=0)


def test_newton_steps_that_are_too_long_by_orders_of_magnitude() -> None:
    """Next to a kink: the curvature outside is 1e-12 / |phi|^3, so the full step is 10^12 times too long."""
    found = solve(
        NewtonCG(max_steps=60, cg_steps=4, tol=1e-4),
        lambda phi: (phi.square() + 1e-12).sqrt().sum(),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    assert not found.failed and found.value.abs().max() < 0.1


def quadratics(condition: float, count: int = 40, d: int = 8) -> tuple[bilevel.BilevelProblem, Tensor, Tensor]:
    """1/2 (phi - x)^T H (phi - x) as 1/2 phi^T H phi - b^T phi + c, whose terms cancel at the minimum 0; H, b, c and x, in float32."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(count, d, d, generator=g).double()).Q
    H = (q * torch.logspace(0, -condition, d, dtype=torch.float64)) @ q.mT
    x = torch.randn(count, d, generator=g).double()
    b = (H @ x.unsqueeze(-1)).squeeze(-1)
    data = (H.float(), b.float(), 0.5 * (x * b).sum(-1).float())

    def objective(phi: Tensor, theta: Tensor, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        H, b, c = data
        return 0.5 * phi @ (H @ phi) - b @ phi + c

    return bilevel.BilevelProblem.from_functions(objective, lambda phi, theta, data: phi.sum()), data, x.float()  # type: ignore[return-value]


@pytest.mark.parametrize(
    "name, tol, share", [("agd", 2e-5, 1.0), ("agd", 1e-3, 1.0), ("gd", 1e-3, 0.8), ("lbfgs", 1e-3, 0.7)]
)
def test_rounding_of_terms_that_cancel_is_not_uphill(name: str, tol: float, share: float) -> None:
    """From a start so near that G cannot tell it from the minimum; the shares are what a line search in float32 allows."""
    problem, data, x = quadratics(2.0)
    start = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = bilevel.solve(problem, torch.zeros(()), data, solver=SOLVERS[name](tol), init=start, batched=True)
    assert (found.codes == int(Status.CONVERGED)).float().mean() >= share


def test_steps_of_an_ulp_do_not_let_the_step_size_grow() -> None:
    """The gradient is the same before and after them, bit by bit, which says nothing of the curvature."""
    problem, data, x = quadratics(-3.0, 100)  # eigenvalues of 1 to 1000
    solver = NesterovAGD(step_size=None, max_steps=1000)
    found = bilevel.solve(problem, torch.zeros(()), data, solver=solver, init=torch.zeros_like(x), batched=True)
    # of 1000 at the start; steps that grow end in NaN. On some processors single tasks go astray for a while, up to 5e-2
    assert found.residual.max() < 0.1 and found.residual.median() < 1e-3


def test_a_line_search_ends_at_the_rounding_floor() -> None:
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 50, 6, generator=g), torch.randn(40, 50, generator=g).sign()
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            torch.nn.functional.softplus(-(data[0] @ phi) * data[1]).mean() + 0.01 * phi.square().sum()
        ),
        lambda phi, theta, data: phi.sum(),
    )
    found = bilevel.solve(
        problem, torch.zeros(()), (X, y), solver=LBFGS(max_steps=400), init=torch.zeros(40, 6), batched=True
    )
    assert (found.codes == int(Status.LINE_SEARCH_FAILED)).all() and found.residual.max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "level", "depth", "width"),
    [
        (torch.float32, 1.0, 1e-5, 1e-4),
        (torch.float32, 1.0, 1e-4, 1e-4),
        (torch.float32, 10.0, 1e-4, 1e-4),
        (torch.float64, 1e6, 1e-7, 1e-6),
    ],
)
def test_newton_cg_stays_in_a_shallow_well(dtype: torch.dtype, level: float, depth: float, width: float) -> None:
    """The first Newton step points out of the well, to where G is flat: the gradient is smaller there, and G no minimum."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: level - (depth / (1 + (phi / width) ** 2)).sum() + 0 * theta.sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.full((1,), width, dtype=dtype),
    )
    solver = NewtonCG(max_steps=40, cg_steps=3, tol=1e-5)
    found = bilevel.solve(problem, torch.zeros(1, dtype=dtype), solver=solver)
    assert found.status is Status.CONVERGED and abs(float(found.value)) < 1e-3 * width


def test_newton_cg_keeps_a_short_step_that_lowers_g_by_much() -> None:
    """The full step ends on a plateau a millionth below the start, where G is flat; the shorter ones in a well that is far deeper."""
    width, start = 1e-3, 0.7e-3

    def far(x: Tensor) -> Tensor:  # 0 in the well, 1 outside
        return x**2 / (x**2 + 0.02**2)

    at_start = torch.tensor(start, dtype=torch.float64)
    plateau = (1 / (1 + (start / width) ** 2) + 1e-6) / (1 - float(far(at_start)))
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (-1 / (1 + (phi / width) ** 2) - plateau * far(phi)).sum() + 0 * theta,
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: at_start.reshape(1),
    )
    solver = NewtonCG(max_steps=60, cg_steps=3, tol=1e-6)
    found = bilevel.solve(problem, torch.tensor(0.0, dtype=torch.float64), solver=solver)
    assert found.status is Status.CONVERGED and abs(float(found.value)) < 1e-6 * width


def test_a_task_of_nan_ends_at_once() -> None:
    """And does not keep the others waiting for max_steps line searches."""
    calls: list[int] = []

    def inner(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        calls.append(1)
        return ((phi - theta) ** 2).sum() * data

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: 0 * theta
    )
    solver = NewtonCG(max_steps=50, cg_steps=3, tol=1e-5)
    found = bilevel.solve(problem, torch.ones(2), torch.tensor([1.0, torch.nan]), solver=solver, batched=True)
    assert found.codes.tolist() == [int(Status.CONVERGED), int(Status.NON_FINITE)] and found.steps.tolist() == [1, 1]
    assert len(calls) < 50


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_nobody_is_asked_at_nan_because_one_start_is_none(name: str, tol: float) -> None:
    """exp overflows at one start: G is infinite there, its gradient NaN. At a phi of NaN the factorisation raises for the whole batch."""

    def inner(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        matrix = torch.eye(3) + phi.square().tanh().diag()
        return torch.linalg.cholesky(matrix).logdet() + phi.exp().sum().log() + theta * phi.square().sum()

    problem = bilevel.BilevelProblem.from_functions(inner, lambda phi, theta, data: phi.sum())
    init, theta = torch.zeros(4, 3), torch.tensor(0.1)
    init[2] = 1000.0
    solver = replace(SOLVERS[name](tol), max_steps=60)
    result = bilevel.solve(problem, theta, torch.ones(4), init=init, batched=True, solver=solver)
    alone = bilevel.solve(problem, theta, torch.ones(()), init=init[0], solver=solver)
    assert [Status(int(code)) for code in result.status][2] is Status.NON_FINITE
    assert torch.equal(result.value[2], init[2]) and not result.failed[[0, 1, 3]].any()
    torch.testing.assert_close(result.value[[0, 1, 3]], alone.value.expand(3, 3), rtol=1e-4, atol=1e-5)
    assert alone.value.abs().min() > 0.1


def test_tasks_that_are_done_cost_no_gradients() -> None:
    """Newton-CG of a batch asks for as many gradients as its longest task alone."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(8, 40, 20, generator=g, dtype=torch.float64)
    labels = X.sum(-1).sign()

    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, data: torch.nn.functional.softplus(-data[1] * (data[0] @ w)).mean() + theta * w.square().sum(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros(20, dtype=torch.float64),
    )
    theta, solver = torch.tensor(1e-3, dtype=torch.float64), NewtonCG(max_steps=50, cg_steps=20, tol=1e-9)
    alone = [bilevel.solve(problem, theta, (x, y), solver=solver) for x, y in zip(X, labels, strict=True)]
    starts = torch.zeros(8, 20, dtype=torch.float64)
    for done in range(4):  # half of the tasks start where they end, so that the batch is not made smaller
        starts[done] = alone[done].value
    found = bilevel.solve(problem, theta, (X, labels), solver=solver, init=starts, batched=True)
    assert found.steps[:4].max() <= 1 < found.steps[4:].min()
    assert found.num_grads <= max(one.num_grads for one in alone) + 2


@pytest.mark.parametrize(("scale", "status"), [(1e-25, Status.CONVERGED), (1e25, Status.LINE_SEARCH_FAILED)])
def test_the_length_of_a_gradient_of_one_entry(scale: float, status: Status) -> None:
    """In float32 the square of the entry underflows, and then nothing is a descent, or overflows, and then nothing is too short a step.
    The length of one entry does neither."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: scale * (phi - theta).square().sum(),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    solver = GradientDescent(step_size=None, max_steps=200, tol=scale * 1e-5)
    result = bilevel.solve(problem, torch.tensor([3.0]), solver=solver)
    assert result.codes == int(status) and result.steps < 100
    if status is Status.CONVERGED:
        torch.testing.assert_close(result.value, torch.tensor([3.0]), rtol=1e-5, atol=0)


def test_a_gradient_that_stays_the_same_is_no_smaller_one() -> None:
    """G falls by less than its rounding along a slope that never ends. Lengths that were measured in two ways differed in the last digit
    for a tenth of the tasks, which walked on and on."""
    directions = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 1e-12 * (phi @ data) + theta.sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.ones(3),
    )
    solver = GradientDescent(step_size=None, max_steps=200, tol=1e-30)
    result = bilevel.solve(problem, torch.ones(1), directions, solver=solver, batched=True)
    assert set(result.codes.tolist()) == {int(Status.LINE_SEARCH_FAILED)} and int(result.steps.max()) < 20


def walled(bad: float) -> BilevelProblem:
    """No number, and no slope, beyond 1, as a domain is usually written down."""
    return BilevelProblem.from_functions(
        lambda phi, theta, data: torch.where((phi < 1).all(), (phi - theta).square().sum(), bad),
        lambda phi, theta, data: phi.square().sum(),
    )


HARD_WALL = [
    GradientDescent(step_size=0.3, max_steps=50, tol=1e-6),
    GradientDescent(step_size=0.3, max_steps=50),
    GradientDescent(step_size=None, max_steps=50, tol=1e-6),
    NesterovAGD(step_size=0.3, max_steps=50, tol=1e-6),
    NesterovAGD(step_size=None, max_steps=50, tol=1e-6),
    LBFGS(max_steps=50, tol=1e-6),
    NewtonCG(max_steps=20, cg_steps=5, tol=1e-6),
    ScipyMinimize(method="BFGS"),
    ScipyMinimize(method="SLSQP"),
    TorchOptim(lambda parameters: torch.optim.SGD(parameters, lr=0.3), max_steps=50, tol=1e-6),
    BlackBox(lambda problem, theta, data, init: init + 2),
]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("start", [[0.0, 0.5], [2.0, 0.5]], ids=["inside", "outside"])
@pytest.mark.parametrize("solver", HARD_WALL, ids=lambda solver: f"{type(solver).__name__}{HARD_WALL.index(solver)}")
def test_a_point_where_g_is_no_number_is_no_minimum(solver: Any, start: list[float], bad: float) -> None:
    """Its gradient is zero."""
    problem, theta, begin = (
        walled(bad),
        torch.full((2,), 2.0, dtype=torch.float64),
        torch.tensor(start, dtype=torch.float64),
    )
    found = bilevel.solve(problem, theta, solver=solver, init=begin)
    defined = bool((found.value < 1).all())
    assert found.status is not Status.CONVERGED
    if start[0] < 1:
        unknown = isinstance(solver, BlackBox)  # where it began
        assert defined or found.status is (Status.NON_FINITE if unknown else Status.DIVERGED)
    else:
        assert not defined and found.status in (Status.NON_FINITE, Status.DIVERGED)
    if not defined:
        gradient = bilevel.hypergradient(problem, theta, solver=solver, linsys=CG(max_steps=5), init=begin)
        assert not gradient.ok and gradient.grad.isnan().all()


@pytest.mark.parametrize("unit", [1e4, 1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("of", ["objective", "variables"])
def test_newton_cg_leaves_a_hill_in_any_units(of: str, unit: float) -> None:
    """A double well, from next to its hill: the first step along negative curvature is as long as the curvature says, not as the
    gradient. With a length of 1 for all units these were up to 1,000 steps that led nowhere.
    """
    in_phi = unit if of == "variables" else 1.0
    scale = unit if of == "objective" else 1.0
    start = in_phi * torch.full((3,), 1e-3, dtype=torch.float64)
    solver = NewtonCG(max_steps=40, cg_steps=3, tol=1e-8 * scale / in_phi)
    found = solve(solver, lambda phi: scale * ((phi / in_phi).square() - 1).square().sum() / 4, start)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.value / in_phi, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["huber", "squared hinge"])
def test_newton_cg_where_pieces_are_flat(name: str, batched: bool) -> None:
    """Convex, with a Hessian that is singular where examples have no part in it: p^T A p of some 1e-34 there is no curvature.
    The oracle is SciPy.
    """
    g = torch.Generator().manual_seed(0)
    X = torch.randn(18, 6, generator=g, dtype=torch.float64)
    y = 3 * torch.randn(18, generator=g, dtype=torch.float64)

    def loss(phi: Tensor) -> Tensor:
        if name == "huber":
            return torch.nn.functional.huber_loss(X @ phi, y, delta=0.3)
        return (1 - y.sign() * (X @ phi)).relu().square().mean()

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: loss(phi), lambda phi, theta, data: phi.sum()
    )
    starts = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64).unsqueeze(-1).expand(3, 6).clone()
    theta, data = torch.zeros((), dtype=torch.float64), torch.zeros(3)
    for options in ({}, {"cg_rtol": 0.1}):
        solver = NewtonCG(max_steps=60, cg_steps=6, tol=1e-6, **options)
        if batched:
            found = bilevel.solve(problem, theta, data, solver=solver, init=starts, batched=True)
            assert (found.codes == int(Status.CONVERGED)).all()
        for k, start in enumerate(starts):
            single = bilevel.solve(problem, theta, solver=solver, init=start)
            assert single.status is Status.CONVERGED
            least = scipy.optimize.minimize(lambda x: float(loss(torch.as_tensor(x))), start.numpy(), tol=1e-12).fun
            assert float(loss(found.value[k] if batched else single.value)) <= least + 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_cg_ends_where_rounding_undoes_its_steps(dtype: torch.dtype) -> None:
    """Below the rounding floor it took the same step again and again, until there were no more."""
    g = torch.Generator().manual_seed(1)
    X, y = torch.randn(60, 8, generator=g).to(dtype), (torch.rand(60, generator=g) < 0.5).to(dtype)
    asked = []

    def loss(phi: Tensor) -> Tensor:
        asked.append(0)
        data = torch.nn.functional.binary_cross_entropy_with_logits(X @ phi, y)
        return data + 0.005 * phi.square().sum()

    solver = NewtonCG(max_steps=500, cg_steps=8, tol=1e-25)
    found = solve(solver, loss, torch.zeros(8, dtype=dtype))
    assert found.status is Status.LINE_SEARCH_FAILED and found.steps < 50 and len(asked) < 500
    assert found.residual < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("size", [1e-5, 1e-9, 1e-11])
def test_they_leave_a_saddle_of_many_directions(name: str, size: float) -> None:
    """50 problems beside a maximum: next to it a line search sees next to no slope, and G falls by far more than that promises."""
    g = torch.Generator().manual_seed(1)
    weights = torch.rand(50, 6, generator=g, dtype=torch.float64) + 0.5
    starts = size * torch.randn(50, 6, generator=g, dtype=torch.float64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.25 * (data["weights"] * (phi.square() - 1).square()).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: data["start"].clone(),
    )
    solver = SOLVERS[name](1e-3 * size)
    found = bilevel.solve(
        problem,
        torch.zeros((), dtype=torch.float64),
        {"weights": weights, "start": starts},
        solver=solver,
        batched=True,
    )
    assert (found.codes == int(Status.CONVERGED)).all()
    torch.testing.assert_close(found.value.abs(), torch.ones_like(starts))


@pytest.mark.parametrize("stiff", [1e7, 1e8, 1e9, 1e10])
def test_newton_cg_takes_small_curvature_for_what_it_is(stiff: float) -> None:
    """In float32, beside curvature that is 1 / eps times as large and more: no rounding is as regular."""
    weights = torch.tensor([stiff] * 3 + [1.0] * 3)

    def bowl(phi: Tensor) -> Tensor:
        x = phi - 1
        return 0.5 * (weights * x.square()).sum() + 0.3 * (stiff**0.5 * x[0] * x[3] + x[4] * x[5])

    found = solve(NewtonCG(max_steps=10, cg_steps=6, tol=1e-3), bowl, torch.zeros(6))
    assert found.status is Status.CONVERGED


def test_newton_cg_lets_the_gradient_grow_for_a_while_where_g_is_hidden() -> None:
    """Rosenbrock's function with a large constant in float32: on the way down the gradient has to grow, and rounding hides G."""
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        start = torch.randn(4, generator=g)

        def valley(phi: Tensor) -> Tensor:
            return 1e4 + (1 - phi[:-1]).square().sum() + 100 * (phi[1:] - phi[:-1].square()).square().sum()

        found = solve(NewtonCG(max_steps=100, cg_steps=20, tol=2e-2), valley, start)
        assert found.status is Status.CONVERGED


def test_lbfgs_ends_at_a_kink() -> None:
    """A lasso: what its searches find there is no more than their slope promises, and each of them next to nothing."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=g, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2.0, 0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    y = y + 0.1 * torch.randn(40, generator=g, dtype=torch.float64)

    def lasso(phi: Tensor) -> Tensor:
        return 0.5 * (X @ phi - y).square().mean() + 0.15 * phi.abs().sum()

    phi = torch.zeros(6, dtype=torch.float64)
    for _ in range(5000):  # proximal gradient steps
        phi = phi - 0.1 * X.mT @ (X @ phi - y) / 40
        phi = phi.sign() * (phi.abs() - 0.015).clamp_min(0)
    found = solve(LBFGS(max_steps=1000, tol=1e-8), lasso, torch.ones(6, dtype=torch.float64))
    assert found.status is Status.LINE_SEARCH_FAILED and found.steps < 300
    assert lasso(found.value) - lasso(phi) < 1e-3
