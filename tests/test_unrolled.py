"""unrolled: the derivative of the path, against plain autograd through loops written here, and against differences of `solve`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import bilevel
from bilevel import BilevelProblem, Hypergradient, ProximalProblem, SolverError, Status, hypergradient, solve, unrolled
from bilevel.curvature import GaussNewton
from bilevel.linsys import Exact, Jacobi
from bilevel.solvers import (
    LBFGS,
    Anderson,
    BlackBox,
    FixedPointIteration,
    GradientDescent,
    IterativeSolver,
    NesterovAGD,
    Newton,
    NewtonCG,
)
from bilevel.trees import flatten, tree_map, unflatten
from tests.cases import PROBLEMS, Case
from tests.test_argmin import assert_same, scaled, stack, vector

F32, F64 = torch.float32, torch.float64
BY_NAME = {case.name: case for case in PROBLEMS}
RIDGE, COUPLED, PROXIMAL, EXPONENTIAL = (BY_NAME[name] for name in ("ridge", "coupled", "proximal", "exponential"))
IDS = {"ids": lambda case: case.name}
MODES = pytest.mark.parametrize("forward_mode", [False, True], ids=["reverse", "forward"])


def tensor(*values: Any) -> Tensor:
    return torch.tensor(*values, dtype=F64)


def quadratic_in_phi(case: Case) -> bool:
    return case is not EXPONENTIAL


# ----------------------------------------------------------------------------------------------------------------------
# Loops written by hand, without a line of the library's algorithms.


@dataclass
class Plain:
    """G of a case as a function of one vector, with derivatives by plain autograd, and theta as leaves of autograd."""

    case: Case
    live: bool = True

    def __post_init__(self) -> None:
        leaves, self.structure = flatten(self.case.theta)
        self.leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    @property
    def theta(self) -> Any:
        return unflatten(self.structure, self.leaves if self.live else [leaf.detach() for leaf in self.leaves])

    def start(self) -> Tensor:
        phi = self.case.problem.initial_phi(self.theta, self.case.data)
        self.shapes = [leaf.shape for leaf in flatten(phi)[0]]
        self.phi_structure = flatten(phi)[1]
        return torch.cat([leaf.reshape(-1) for leaf in flatten(phi)[0]])

    def tree(self, x: Tensor) -> Any:
        parts = x.split([shape.numel() for shape in self.shapes])
        return unflatten(self.phi_structure, [part.reshape(s) for part, s in zip(parts, self.shapes, strict=True)])

    def value(self, x: Tensor) -> Tensor:
        return self.case.problem.inner_objective(self.tree(x), self.theta, self.case.data)

    def gradient(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(self.value(x), x, create_graph=True)[0]

    def product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hessian times v."""
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(self.gradient(x), x, v, create_graph=True)[0]

    def hypergradient(self, x: Tensor) -> list[Tensor]:
        outer = self.case.problem.outer_loss(self.tree(x), self.theta, self.case.data)
        found = torch.autograd.grad(outer, self.leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(self.leaves, found, strict=True)]


def descent(plain: Plain, x: Tensor, step_size: float, steps: int) -> Tensor:
    for _ in range(steps):
        x = x - step_size * plain.gradient(x)
    return x


def accelerated(plain: Plain, x: Tensor, step_size: float, steps: int, momentum: float | None) -> Tensor:
    """Nesterov with a constant momentum, or with (t - 1) / t+, restarted where the gradient points along the movement."""
    y, t = x, 1.0
    for _ in range(steps):
        g = plain.gradient(y)
        new = y - step_size * g
        if momentum is None:
            if (g @ (new - x)).item() > 0:
                t = 1.0
            ahead = (1 + (1 + 4 * t * t) ** 0.5) / 2
            beta, t = (t - 1) / ahead, ahead
        else:
            beta = momentum
        x, y = new, new + beta * (new - x)
    return x


def newton_cg(plain: Plain, x: Tensor, steps: int, cg_steps: int) -> Tensor:
    """With full steps, which are taken where they lower G enough: asserted."""
    for _ in range(steps):
        g = plain.gradient(x)
        p = torch.zeros_like(g)
        r = d = -g
        for _ in range(cg_steps):
            if r.norm().item() <= 1e-15 * g.norm().item():
                break
            hd = plain.product(x, d)
            a = (r @ r) / (d @ hd)
            p, new = p + a * d, r - a * hd
            d, r = new + (new @ new) / (r @ r) * d, new
        assert plain.value(x + p) <= plain.value(x) + 1e-4 * (g @ p)
        x = x + p
    return x


def backtracking(plain: Plain, x: Tensor, steps: int) -> Tensor:
    """Descent with a step size that grows by 1.25 and is halved when G falls too little. The first one is |g| / |H g|."""
    g = plain.gradient(x)
    step_size = g.norm() / plain.product(x, g).norm()
    value, grad = plain.value(x), g
    best, point = x, x - step_size * g
    for _ in range(steps - 1):
        trial = plain.gradient(point)
        if plain.value(point) <= value - 1e-4 * step_size * (grad @ grad):
            best, value, grad, step_size = point, plain.value(point), trial, 1.25 * step_size
        else:
            step_size = 0.5 * step_size
        point = best - step_size * grad
    return best


STEPS = 7


def by_hand(name: str, plain: Plain, x: Tensor, steps: int = STEPS) -> Tensor:
    step_size = 1 / plain.case.lipschitz
    return {
        "gd": lambda: descent(plain, x, step_size, steps),
        "agd": lambda: accelerated(plain, x, step_size, steps, None),
        "agd, momentum": lambda: accelerated(plain, x, step_size, steps, 0.7),
        "newton-cg": lambda: newton_cg(plain, x, steps, 3),
        "gd, backtracking": lambda: backtracking(plain, x, steps),
    }[name]()


def ours(name: str, case: Case, steps: int = STEPS) -> IterativeSolver:
    step_size = 1 / case.lipschitz
    solvers: dict[str, IterativeSolver] = {
        "gd": GradientDescent(step_size=step_size, max_steps=steps),
        "agd": NesterovAGD(step_size=step_size, max_steps=steps),
        "agd, momentum": NesterovAGD(step_size=step_size, max_steps=steps, momentum=0.7),
        "newton-cg": NewtonCG(max_steps=steps, cg_steps=3),
        "gd, backtracking": GradientDescent(step_size=None, max_steps=steps),
    }
    return solvers[name]


@MODES
@pytest.mark.parametrize("name", ["gd", "agd", "agd, momentum", "newton-cg"])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_the_derivative_is_that_of_the_loop_by_hand(case: Case, name: str, forward_mode: bool) -> None:
    steps = 2 if name == "newton-cg" else STEPS
    plain = Plain(case)
    x = by_hand(name, plain, plain.start(), steps)
    result = unrolled(case.problem, case.theta, case.data, solver=ours(name, case, steps), forward_mode=forward_mode)
    assert_same(vector(result.phi), x.detach(), 1e-12)
    assert_same(flatten(result.grad)[0], plain.hypergradient(x), 1e-10)
    assert result.ok and result.linear is None
    assert result.inner.status is Status.MAX_STEPS and result.inner.num_steps == steps


@MODES
@pytest.mark.parametrize("case", [case for case in PROBLEMS if quadratic_in_phi(case)], **IDS)
def test_step_sizes_that_are_searched_are_part_of_the_path(case: Case, forward_mode: bool) -> None:
    """On a quadratic G the first step size has a closed form; the library takes it from one difference of gradients, which has
    1e-8 of rounding error."""
    plain = Plain(case)
    x = backtracking(plain, plain.start(), 12)
    result = unrolled(
        case.problem, case.theta, case.data, solver=ours("gd, backtracking", case, 12), forward_mode=forward_mode
    )
    assert_same(vector(result.phi), x.detach(), 1e-6)
    assert_same(flatten(result.grad)[0], plain.hypergradient(x), 1e-5)


@MODES
@pytest.mark.parametrize("k", [1, 3, STEPS, 50])
@pytest.mark.parametrize("name", ["gd", "agd, momentum"])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_truncated_is_the_loop_that_is_cut(case: Case, name: str, k: int, forward_mode: bool) -> None:
    """The last k steps of the same path; what comes before is a constant, the start as well."""
    plain = Plain(case)
    solver = ours(name, case)
    if k < STEPS:
        # with momentum the state of the cut is two points: go there without derivatives, and on with them
        plain.live = False
        start = plain.start()
        at = [by_hand(name, plain, start.detach(), steps).detach() for steps in (STEPS - k, STEPS - k - 1)]
        plain.live = True
        x = descent(plain, at[0], 1 / case.lipschitz, k) if name == "gd" else _resumed(plain, at, k)
    else:
        x = by_hand(name, plain, plain.start())
    got = unrolled(case.problem, case.theta, case.data, solver=solver, truncate=k, forward_mode=forward_mode)
    assert_same(vector(got.phi), x.detach(), 1e-12)
    assert_same(flatten(got.grad)[0], plain.hypergradient(x), 1e-10)
    full = unrolled(case.problem, case.theta, case.data, solver=solver)
    different = (vector(got.grad) - vector(full.grad)).norm() > 1e-3 * vector(full.grad).norm()
    assert different == (k < STEPS)


def _resumed(plain: Plain, at: list[Tensor], k: int) -> Tensor:
    """Momentum 0.7 from the last two points."""
    x, y = at[0], at[0] + 0.7 * (at[0] - at[1])
    for _ in range(k):
        new = y - plain.gradient(y) / plain.case.lipschitz
        x, y = new, new + 0.7 * (new - x)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Differences of `solve`.

SOLVERS: dict[str, Callable[[Case], IterativeSolver]] = {
    "gd": lambda case: GradientDescent(step_size=1 / case.lipschitz, max_steps=9),
    "gd, tol": lambda case: GradientDescent(step_size=1 / case.lipschitz, max_steps=100, tol=1.0, check_every=1),
    "gd, backtracking": lambda case: GradientDescent(step_size=None, max_steps=9),
    "agd": lambda case: NesterovAGD(step_size=1 / case.lipschitz, max_steps=12),
    "agd, known mu": lambda case: NesterovAGD(step_size=1 / case.lipschitz, strong_convexity=0.2, max_steps=9),
    "agd, backtracking": lambda case: NesterovAGD(step_size=None, max_steps=9),
    "newton-cg": lambda case: NewtonCG(max_steps=2, cg_steps=2),
    "newton-cg, damped": lambda case: NewtonCG(max_steps=3, cg_steps=3, damping=0.5),
    "newton-cg, tol": lambda case: NewtonCG(max_steps=20, cg_steps=9, tol=1e-9),
    "newton-cg, jacobi": lambda case: NewtonCG(max_steps=2, cg_steps=2, preconditioner=Jacobi()),
    "lbfgs": lambda case: LBFGS(max_steps=6),
    "iteration": lambda case: FixedPointIteration(max_steps=9, relaxation=1 / case.lipschitz),
    "anderson": lambda case: Anderson(max_steps=6, relaxation=1 / case.lipschitz, memory=3),
}


def differences(case: Case, solver: IterativeSolver, step: float) -> Tensor:
    leaves, structure = flatten(case.theta)
    found = []
    for i, leaf in enumerate(leaves):
        for j in range(leaf.numel()):
            values = []
            for sign in (1, -1):
                moved = [x.clone() for x in leaves]
                moved[i].view(-1)[j] += sign * step
                theta = unflatten(structure, moved)
                phi = solve(case.problem, theta, case.data, solver=solver).value
                values.append(case.problem.outer_loss(phi, theta, case.data))
            found.append((values[0] - values[1]) / (2 * step))
    return torch.stack(found)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_both_modes_are_the_differences_of_solve(case: Case, name: str) -> None:
    solver = SOLVERS[name](case)
    reverse = unrolled(case.problem, case.theta, case.data, solver=solver)
    forward = unrolled(case.problem, case.theta, case.data, solver=solver, forward_mode=True)
    assert reverse.inner.num_steps >= 1
    # a difference of gradients inside (the first step size) has noise of 1e-8, Anderson's weights 1e-11: a small step blows it up
    noisy = "backtracking" in name or name == "lbfgs"
    step, relative = (1e-4, 1e-2) if noisy else (1e-4, 1e-5) if name == "anderson" else (1e-6, 1e-6)
    expected = differences(case, solver, step)
    assert_same(vector(reverse.grad), expected, relative)
    assert_same(vector(forward.grad), vector(reverse.grad), 1e-6 if noisy else 1e-9)
    run = solve(case.problem, case.theta, case.data, solver=solver)
    # the path takes every gradient from G, solve those of a quadratic from a matrix: the noise blows up the rounding between them
    assert_same(vector(reverse.phi), vector(run.value), 1e-7 if noisy and case.problem.quadratic else 1e-9)
    assert reverse.inner.num_steps == run.num_steps and reverse.inner.status is run.status
    torch.testing.assert_close(reverse.inner.residual, run.residual, rtol=1e-6, atol=1e-12)


@MODES
def test_float32(forward_mode: bool) -> None:
    for case in PROBLEMS:
        single = case.to(F32)
        solver = GradientDescent(step_size=1 / case.lipschitz, max_steps=9)
        got = unrolled(single.problem, single.theta, single.data, solver=solver, forward_mode=forward_mode)
        assert vector(got.grad).dtype == F32
        expected = unrolled(case.problem, case.theta, case.data, solver=solver)
        assert_same(vector(got.grad), vector(expected.grad), 1e-4)


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(step_size=None, max_steps=5),
        NesterovAGD(step_size=None, max_steps=5),
        NesterovAGD(step_size=None, max_steps=5, strong_convexity=0.5),
        NesterovAGD(step_size=None, max_steps=5, momentum=0.5),
        LBFGS(max_steps=4),
        NewtonCG(max_steps=3, damping=0.1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("scalar", [True, False])
def test_forwards_in_float32_with_scalars_of_the_solver(solver: Any, scalar: bool) -> None:
    """PyTorch's tangent of a 0-d float32 times a number of Python is float64: step sizes are such, and a theta may be."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (
            ((phi - theta.sin()) ** 2).sum() + 0.1 * (phi**4).sum() + 0.3 * phi.sum() * theta.sum()
        ),
        lambda phi, theta, data: (phi - 1).square().sum(),
        lambda theta, data: torch.zeros(2, dtype=theta.dtype),
    )
    theta = tensor(0.3) if scalar else tensor([0.3, -0.7])
    expected = unrolled(problem, theta, solver=solver)
    got = unrolled(problem, theta.float(), solver=solver, forward_mode=True)
    assert got.grad.dtype == F32
    assert_same(got.grad, expected.grad, 1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# As the steps grow.


@pytest.mark.parametrize("eigenvalues", [(0.5, 4.0), (1.0, 3.0)])
def test_it_tends_to_the_implicit_gradient_as_k_times_rho_to_the_k(eigenvalues: tuple[float, float]) -> None:
    """Grazzi et al. 2020, theorem 2.1. With G = 1/2 sum exp(theta) a_i phi_i^2 - phi_i the error is (c0 + c1 K) rho^K exactly."""
    low, high = eigenvalues
    a = torch.linspace(low, high, 4, dtype=F64)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (0.5 * theta.exp() * a * phi**2 - phi).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros(4, dtype=F64),
    )
    theta, step_size = tensor(0.1), 0.6 / high
    exact = -(theta.neg().exp() / a).sum()
    rho = 1 - step_size * theta.exp() * low

    def error(k: int) -> Tensor:
        got = unrolled(problem, theta, solver=GradientDescent(step_size=step_size, max_steps=k))
        return (got.grad - exact).abs()

    ks = [20, 40, 60, 80]
    ratios = torch.stack([error(k) / (k * rho**k) for k in ks])
    assert ratios[-1] > 0.1 * step_size  # not faster, either
    assert ((ratios[1:] / ratios[:-1] - 1).abs() < 0.2).all()
    # truncated to the last k steps of a path that has converged, the error is of the order of rho^k
    solver = GradientDescent(step_size=step_size, max_steps=400)
    cut = [(unrolled(problem, theta, solver=solver, truncate=k).grad - exact).abs() for k in (10, 20, 30)]
    for before, after in pairwise(cut):
        assert abs(float(after / before / rho**10) - 1) < 0.15


@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_a_path_that_has_converged_has_the_implicit_gradient(case: Case) -> None:
    expected = grad(case.outer)(case.theta, case.data)
    for solver in (NewtonCG(max_steps=12, cg_steps=20, tol=1e-12), NesterovAGD(step_size=None, max_steps=250)):
        got = unrolled(case.problem, case.theta, case.data, solver=solver)
        assert_same(vector(got.grad), vector(expected), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The start.


@MODES
def test_the_dependence_through_the_start_counts_unless_it_is_given(forward_mode: bool) -> None:
    """phi_K = (1 - s)^K phi_0 for G = phi^2 / 2: theta enters through the start only."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi**2).sum(),
        lambda phi, theta, data: (phi**2).sum(),
        lambda theta, data: theta**3,
    )
    theta, solver = tensor([0.5, 2.0]), GradientDescent(step_size=0.1, max_steps=4)
    got = unrolled(problem, theta, solver=solver, forward_mode=forward_mode)
    assert_same(got.grad, 6 * 0.9**8 * theta**5, 1e-12)
    options = {"solver": solver, "forward_mode": forward_mode, "init": theta**3}
    with pytest.raises(ValueError, match=r"theta: expected every leaf of theta to enter the path of the inner solver"):
        unrolled(problem, theta, **options)
    assert unrolled(problem, theta, allow_unused=True, **options).grad.tolist() == [0.0, 0.0]


@MODES
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_a_start_that_is_given_is_a_constant(case: Case, forward_mode: bool) -> None:
    init = tree_map(lambda leaf: 0.5 + 0 * leaf, case.phi_star(case.theta, case.data))
    plain = Plain(case)
    plain.start()
    x = descent(plain, vector(init), 1 / case.lipschitz, STEPS)
    leaf = tree_map(lambda x: x.clone().requires_grad_(), init)
    got = unrolled(case.problem, case.theta, case.data, solver=ours("gd", case), init=leaf, forward_mode=forward_mode)
    assert_same(flatten(got.grad)[0], plain.hypergradient(x), 1e-10)
    assert all(x.grad is None for x in flatten(leaf)[0])


def network() -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return net


def sinusoids(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = 4 * torch.rand(2, count, 6, 1, generator=generator, dtype=F64) - 2
    phase = 3 * torch.rand(count, 1, 1, generator=generator, dtype=F64)
    y = torch.sin(x + phase)
    return {"x": x[0], "y": y[0], "xt": x[1], "yt": y[1]}


@MODES
@pytest.mark.parametrize("truncate", [None, 2])
def test_maml(truncate: int | None, forward_mode: bool) -> None:
    """Finn et al. 2017 in ten lines of plain PyTorch."""
    net, tasks = network(), sinusoids(3)
    for i in range(3):
        adapted = dict(net.named_parameters())
        for k in range(5):
            loss = (functional_call(net, adapted, (tasks["x"][i],)) - tasks["y"][i]).square().mean()
            grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
            adapted = {name: p - 0.1 * g for (name, p), g in zip(adapted.items(), grads, strict=True)}
            if truncate is not None and k == 4 - truncate:
                adapted = {name: p.detach().requires_grad_() for name, p in adapted.items()}
        ((functional_call(net, adapted, (tasks["xt"][i],)) - tasks["yt"][i]).square().mean() / 3).backward()

    def loss_on(x: str, y: str) -> Callable[[Any, Any, Any], Tensor]:
        return lambda phi, theta, task: (functional_call(net, phi, (task[x],)) - task[y]).square().mean()

    problem = BilevelProblem.from_functions(loss_on("x", "y"), loss_on("xt", "yt"), lambda theta, task: theta)
    options = {"solver": GradientDescent(step_size=0.1, max_steps=5), "batched": True, "forward_mode": forward_mode}
    theta = {name: p.detach() for name, p in net.named_parameters()}
    if truncate is not None:  # the start is all that theta is here
        with pytest.raises(ValueError, match=r"theta\['0.bias'\], theta\['0.weight'\].*: expected every leaf of theta"):
            unrolled(problem, theta, tasks, truncate=truncate, **options)
        return
    got = unrolled(problem, theta, tasks, **options).unwrap()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Batches.


def batch(case: Case, count: int) -> Any:
    """Labels are different in every task."""

    def changed(leaf: Any, k: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf * (1 + 0.2 * k) if leaf.is_floating_point() else leaf.roll(k)

    return stack([tree_map(lambda leaf, k=k: changed(leaf, k), case.data) for k in range(count)])


def one(data: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, data)


OPTIONS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward": {"forward_mode": True},
    "truncated": {"truncate": 2},
    "forward, truncated": {"forward_mode": True, "truncate": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["gd", "gd, tol", "agd, backtracking", "newton-cg, tol"])
@pytest.mark.parametrize("case", [RIDGE, PROXIMAL, EXPONENTIAL], **IDS)
def test_a_batch_is_its_tasks(case: Case, name: str, options: dict[str, Any]) -> None:
    """Each task takes steps of its own, and is truncated by its own; chunks change nothing."""
    data, solver = batch(case, 4), SOLVERS[name](case)
    singles = [unrolled(case.problem, case.theta, one(data, i), solver=solver, **options) for i in range(4)]
    expected = tree_map(lambda *leaves: torch.stack(leaves), *[single.grad for single in singles])
    relative = 1e-6 if "backtracking" in name else 1e-9

    def call(**more: Any) -> Hypergradient:
        return unrolled(case.problem, case.theta, data, solver=solver, batched=True, **options, **more)

    each = call(reduction="none")
    assert_same(vector(each.grad), vector(expected), relative)
    assert each.inner.num_steps.tolist() == [single.inner.num_steps for single in singles]
    assert each.ok.tolist() == [True] * 4
    if name == "gd, tol":
        assert len(set(each.inner.num_steps.tolist())) > 1
    for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum)):
        got = call(reduction=reduction)
        assert_same(vector(got.grad), vector(tree_map(lambda leaf, reduce=reduce: reduce(leaf, 0), expected)), relative)
        assert_same(got.outer, reduce(torch.stack([single.outer for single in singles])), relative)
        assert got.num_ok == 4
    for size in (1, 3):
        chunked = call(reduction="none", chunk_size=size)
        assert_same(vector(chunked.grad), vector(each.grad), relative)
        assert torch.equal(chunked.inner.num_steps, each.inner.num_steps)


@MODES
def test_theta_of_each_task(forward_mode: bool) -> None:
    case = PROXIMAL
    data, thetas = batch(case, 3), stack([scaled(case.theta, k) for k in range(3)])
    solver = ours("gd", case)
    got = unrolled(
        case.problem, thetas, data, solver=solver, batched=True, theta_batched=True, forward_mode=forward_mode
    )
    for i in range(3):
        theta = tree_map(lambda leaf, i=i: leaf[i], thetas)
        single = unrolled(case.problem, theta, one(data, i), solver=solver)
        assert_same(vector(tree_map(lambda leaf, i=i: leaf[i], got.grad)), vector(single.grad) / 3, 1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "name", ["gd", "gd, tol", "gd, backtracking", "agd, backtracking", "newton-cg, tol", "anderson", "lbfgs"]
)
def test_a_failed_task_leaves_the_others_as_they_were(name: str, options: dict[str, Any]) -> None:
    case = EXPONENTIAL
    data, solver = batch(case, 3), SOLVERS[name](case)
    bad = data.clone()
    bad[1, 0, 0] = torch.nan

    def call(data: Any, **more: Any) -> Hypergradient:
        return unrolled(case.problem, case.theta, data, solver=solver, batched=True, **options, **more)

    healthy, got = call(data, reduction="none"), call(bad, reduction="none")
    assert got.ok.tolist() == [True, False, True]
    assert got.inner.codes[1] == Status.NON_FINITE and got.grad[1].isnan().all()
    assert torch.equal(got.grad[[0, 2]], healthy.grad[[0, 2]])
    assert torch.equal(got.phi[[0, 2]], healthy.phi[[0, 2]])
    mean = call(bad)
    assert mean.num_ok == 2 and mean.ok.tolist() == [True, False, True]
    assert_same(mean.grad, healthy.grad[[0, 2]].mean(0), 1e-14)
    with pytest.raises(SolverError, match="3 problems, 1 failed"):
        got.unwrap()
    nothing = unrolled(case.problem, case.theta, bad[1:2], solver=solver, batched=True, **options)
    assert nothing.num_ok == 0 and nothing.grad.isnan().all() and nothing.outer.isnan()


def test_a_path_that_diverges_is_reported() -> None:
    case = RIDGE
    got = unrolled(case.problem, case.theta, case.data, solver=GradientDescent(step_size=1.0, max_steps=300))
    assert got.inner.status is Status.DIVERGED and not got.ok and got.grad.isnan().all()
    with pytest.raises(SolverError, match="DIVERGED"):
        got.unwrap()


def test_a_gradient_that_is_not_finite_is_reported() -> None:
    """sqrt(theta) in the outer loss at theta = 0: a finite path with an infinite derivative."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta) ** 2,
        lambda phi, theta, data: phi + theta.sqrt(),
        lambda theta, data: 0 * theta,
    )
    got = unrolled(problem, tensor(0.0), solver=GradientDescent(step_size=0.5, max_steps=3))
    assert got.inner.status is Status.NON_FINITE and not got.ok and got.grad.isnan()


# ----------------------------------------------------------------------------------------------------------------------
# 0 / 0 behind a mask is NaN in reverse mode.

SPREAD = tensor([1.0, 2.0, 5.0])


def bowl(start: Callable[[Tensor], Tensor]) -> BilevelProblem:
    """phi* = theta; dL/dtheta = 2 theta + 1 at the solution."""
    return BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta) @ (SPREAD * (phi - theta)),
        lambda phi, theta, data: (phi**2).sum() + theta.sum(),
        lambda theta, data: start(theta),
    )


CONVERGING: dict[str, IterativeSolver] = {
    "gd": GradientDescent(step_size=0.3, max_steps=120),
    "gd, backtracking": GradientDescent(step_size=None, max_steps=120),
    "gd, backtracking, tol": GradientDescent(step_size=None, max_steps=300, tol=1e-10),
    "agd": NesterovAGD(step_size=0.2, max_steps=100),
    "agd, backtracking": NesterovAGD(step_size=None, max_steps=100),
    "agd, backtracking, mu": NesterovAGD(step_size=None, max_steps=100, strong_convexity=1.0),
    "agd, backtracking, long": NesterovAGD(step_size=None, max_steps=250),
    "newton-cg": NewtonCG(max_steps=8, cg_steps=5),
    "newton-cg, tol": NewtonCG(max_steps=8, cg_steps=5, tol=1e-10),
    "lbfgs": LBFGS(max_steps=40),
    "lbfgs, tol": LBFGS(max_steps=40, tol=1e-10),
    "iteration": FixedPointIteration(max_steps=120, relaxation=0.3),
    "anderson": Anderson(max_steps=40, relaxation=0.2),
    "anderson, tol": Anderson(max_steps=40, tol=1e-10, relaxation=0.2),
}


@MODES
@pytest.mark.parametrize("name", CONVERGING)
@pytest.mark.parametrize("start", ["at zero", "at the solution"])
def test_no_nan_at_a_task_that_has_converged(start: str, name: str, forward_mode: bool) -> None:
    """Down to where steps, differences and gradients are exactly zero; from the solution all of them are from the first step on."""
    theta = tensor([1.0, 2.0, 3.0])
    problem = bowl(torch.zeros_like if start == "at zero" else lambda theta: 1 * theta)
    got = unrolled(problem, theta, solver=CONVERGING[name], forward_mode=forward_mode)
    assert got.ok
    assert_same(got.grad, 2 * theta + 1, 1e-6)


@MODES
@pytest.mark.parametrize("name", CONVERGING)
def test_no_nan_in_a_batch_of_tasks_that_end_at_different_times(name: str, forward_mode: bool) -> None:
    """Starts: the solution, near it, and far away."""
    theta = tensor([1.0, 2.0, 3.0])
    starts = torch.stack([theta, theta + 1e-8, 0 * theta])
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta) @ (SPREAD * (phi - theta)),
        lambda phi, theta, data: (phi**2).sum() + theta.sum() + 0 * data.sum(),
    )
    got = unrolled(
        problem,
        theta,
        starts,
        solver=CONVERGING[name],
        init=starts,
        batched=True,
        reduction="none",
        forward_mode=forward_mode,
    )
    assert got.ok.all()
    assert got.grad.isfinite().all()
    assert_same(got.grad[2], 2 * theta + 1, 1e-4)
    if got.inner.num_steps[0] == 0:  # it does not move with theta
        assert got.grad[0].tolist() == [1.0, 1.0, 1.0]


@MODES
def test_a_trial_that_overflows_is_rejected_with_its_derivative(forward_mode: bool) -> None:
    """G = sum exp(phi) - theta phi from -8: flat, so the first trial is far too long, and exp overflows there."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi.exp() - theta * phi).sum(),
        lambda phi, theta, data: (phi**2).sum(),
        lambda theta, data: torch.full_like(theta, -8.0),
    )
    theta = tensor([1.5, 2.0, 3.0])
    evaluated: list[bool] = []
    plain = problem.inner_objective

    def watched(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        value = plain(phi, theta, data)
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        evaluated.append(bool(value.isfinite()))
        return plain(phi, theta, data)

    seen = BilevelProblem.from_functions(watched, problem.outer_loss, problem.initial_phi)
    solver = GradientDescent(step_size=None, max_steps=400, tol=1e-9)
    solve(seen, theta, solver=solver)
    assert not all(evaluated)  # the case is what it says
    got = unrolled(problem, theta, solver=solver, forward_mode=forward_mode)
    assert got.ok and got.inner.status is Status.CONVERGED
    assert_same(got.grad, 2 * theta.log() / theta, 1e-6)  # phi* = log theta


@MODES
def test_a_random_batch_has_no_nan(forward_mode: bool) -> None:
    """Whatever the solver does with 40 problems of different scale."""
    generator = torch.Generator().manual_seed(8)
    data = 10 ** (2 * torch.rand(40, 3, generator=generator, dtype=F64) - 1)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (data * (phi - theta) ** 2 + 0.1 * (phi - theta) ** 4).sum(),
        lambda phi, theta, data: (phi**2).sum(),
        lambda theta, data: 0 * theta,
    )
    theta = tensor([1.0, -2.0, 0.5])
    for name in ("gd, backtracking", "agd, backtracking", "newton-cg", "newton-cg, tol", "lbfgs"):
        if forward_mode and name != "newton-cg":
            continue
        solver = CONVERGING[name]
        got = unrolled(problem, theta, data, solver=solver, batched=True, reduction="none", forward_mode=forward_mode)
        assert got.grad.isfinite().all(), name
        done = got.inner.residual < 1e-6
        assert done.sum() > 20
        torch.testing.assert_close(got.grad[done], (2 * theta).expand(40, 3)[done], rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Errors.


def simple(
    inner: Callable[..., Tensor] = lambda phi, theta, data: 0.5 * ((phi - theta) ** 2).sum(),
    outer: Callable[..., Tensor] = lambda phi, theta, data: (phi**2).sum(),
    start: Callable[..., Any] = lambda theta, data: 0 * theta,
) -> BilevelProblem:
    return BilevelProblem.from_functions(inner, outer, start)


GD = GradientDescent(step_size=0.1, max_steps=3)
ONES = torch.ones(2, dtype=F64)


@pytest.mark.parametrize("solver", [BlackBox(lambda *_: ONES), Newton(max_steps=3)], ids=lambda s: type(s).__name__)
def test_solvers_without_a_path(solver: Any) -> None:
    words = rf"unrolled: expected an iterative solver such as GradientDescent or NewtonCG, got {type(solver).__name__}.*no path"
    with pytest.raises(TypeError, match=words):
        unrolled(simple(), ONES, solver=solver)
    with pytest.raises(TypeError, match=r"solver: expected an inner solver.*Did you mean GradientDescent\(\.\.\.\)"):
        unrolled(simple(), ONES, solver=GradientDescent)


def test_gauss_newton_steps() -> None:
    with pytest.raises(
        NotImplementedError, match=r"unrolled: the path through GaussNewton\(\).*use curvature=Hessian\(\)"
    ):
        unrolled(PROXIMAL.problem, PROXIMAL.theta, PROXIMAL.data, solver=NewtonCG(curvature=GaussNewton()))


@pytest.mark.parametrize(("truncate", "words"), [(0, "at least 1, got 0"), (-1, "at least 1"), (1.5, "an integer")])
def test_truncate_is_a_count(truncate: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"truncate: expected {words}"):
        unrolled(simple(), ONES, solver=GD, truncate=truncate)


@MODES
def test_a_leaf_of_theta_that_is_not_used(forward_mode: bool) -> None:
    problem = simple(
        lambda phi, theta, data: 0.5 * ((phi - theta["a"]) ** 2).sum(),
        lambda phi, theta, data: (phi**2).sum(),
        lambda theta, data: 0 * theta["a"],
    )
    theta = {"a": ONES, "b": ONES, "c": [ONES]}
    words = r"theta\['b'\], theta\['c'\]\[0\]: expected every leaf of theta to enter the path of the inner solver or the outer loss"
    with pytest.raises(ValueError, match=words):
        unrolled(problem, theta, solver=GD, forward_mode=forward_mode)
    got = unrolled(problem, theta, solver=GD, forward_mode=forward_mode, allow_unused=True)
    assert got.grad["b"].tolist() == [0.0, 0.0] and got.grad["c"][0].tolist() == [0.0, 0.0]
    assert (got.grad["a"] != 0).all()


@MODES
def test_a_path_of_no_steps_is_no_misuse(forward_mode: bool) -> None:
    """Solved at the start: theta enters G, but no step was taken."""
    problem = simple()
    got = unrolled(problem, ONES, solver=replace(GD, tol=1e-3), init=ONES.clone(), forward_mode=forward_mode)
    assert got.inner.num_steps == 0 and got.grad.tolist() == [0.0, 0.0]


@MODES
def test_theta_in_the_outer_loss_only(forward_mode: bool) -> None:
    problem = simple(
        lambda phi, theta, data: (phi**2).sum(), lambda phi, theta, data: (phi + theta**3).sum(), lambda t, d: ONES
    )
    assert_same(unrolled(problem, 2 * ONES, solver=GD, forward_mode=forward_mode).grad, 12 * ONES, 1e-14)


@MODES
@pytest.mark.parametrize("where", ["inner_objective", "outer_loss", "initial_phi"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "non-leaf"])
def test_captured_tensors_are_refused(where: str, leaf: bool, forward_mode: bool) -> None:
    weight = (2 * ONES).requires_grad_()
    c = weight if leaf else 3 * weight
    parts: dict[str, dict[str, Any]] = {
        "inner_objective": {"inner": lambda phi, theta, data: 0.5 * ((phi - theta * c) ** 2).sum()},
        "outer_loss": {"outer": lambda phi, theta, data: (c * phi**2).sum()},
        "initial_phi": {"start": lambda theta, data: theta * c},
    }
    with pytest.raises(
        ValueError, match=f"{where} uses a tensor that carries a gradient.*Pass it through theta or data, or detach"
    ):
        unrolled(simple(**parts[where]), ONES, solver=GD, forward_mode=forward_mode)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{where} uses a tensor that carries a gradient"):
        unrolled(simple(**parts[where]), ONES, solver=GD, forward_mode=forward_mode)


def test_under_no_grad_and_with_theta_that_requires_grad() -> None:
    """The call needs no gradient mode and leaves the user's tensors alone."""
    theta = tensor([0.5, 1.0]).requires_grad_()
    expected = unrolled(simple(), theta.detach(), solver=GD).grad
    with torch.no_grad():
        got = unrolled(simple(), theta, solver=GD)
    assert torch.equal(got.grad, expected)
    assert not got.grad.requires_grad and theta.grad is None and theta._version == 0
    assert not any(x.requires_grad for x in (got.outer, got.phi, got.inner.residual))


def test_transforms_are_refused() -> None:
    for transform in (grad, lambda f: lambda x: vmap(f)(x[None])):
        with pytest.raises(
            TypeError, match="unrolled returns plain numbers and cannot run under a torch.func transform"
        ):
            transform(lambda theta: unrolled(simple(), theta, solver=GD).outer)(ONES)


def test_a_wrong_reduction() -> None:
    with pytest.raises(ValueError, match='reduction: expected "mean", "sum" or "none"'):
        unrolled(simple(), ONES, solver=GD, reduction="median")


def test_there_is_no_certificate() -> None:
    got = unrolled(simple(), ONES, solver=GD)
    for question in (lambda: got.error_bound, lambda: got.error_estimate, got.diagnose, got.explain):
        with pytest.raises(ValueError, match="an unrolled gradient has no certificate"):
            question()
    assert "inner solve: MAX_STEPS after 3 steps" in got.describe()


# ----------------------------------------------------------------------------------------------------------------------
# Memory.


class Token:
    pass


class Witness:
    """A problem that counts, at each evaluation of G, the graphs of the evaluations before that are still alive."""

    def __init__(self) -> None:
        self.tokens: list[weakref.ref[Token]] = []
        self.most = 0
        self.problem = simple(self.inner)

    def alive(self) -> int:
        return sum(token() is not None for token in self.tokens)

    def inner(self, phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        self.most = max(self.most, self.alive())
        hidden = x = torch.sin(phi) * theta
        while True:  # the graph of each level that the tensor belongs to
            if x.grad_fn is not None:
                token = Token()
                x.grad_fn.metadata["witness"] = token
                self.tokens.append(weakref.ref(token))
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                break
            x = torch._C._functorch.get_unwrapped(x)
        return (hidden**2).sum() + 3 * ((phi - theta) ** 2).sum()


@pytest.mark.parametrize("solver", [GD, NesterovAGD(step_size=0.01, max_steps=3)], ids=lambda s: type(s).__name__)
def test_memory_grows_with_the_steps_that_are_differentiated_backwards_only(solver: Any) -> None:
    def most(steps: int, **options: Any) -> int:
        witness = Witness()
        gc.collect()
        gc.disable()
        try:
            unrolled(witness.problem, ONES, solver=replace(solver, max_steps=steps), **options)
            unrolled(witness.problem, ONES, solver=replace(solver, max_steps=steps), **options)
            assert witness.tokens
            del witness.tokens[:]
            witness.most = 0
            unrolled(witness.problem, ONES, solver=replace(solver, max_steps=steps), **options)
            assert witness.alive() == 0  # nothing is left when the call returns
        finally:
            gc.enable()
        return witness.most

    assert most(40) >= 39
    assert most(80) >= 79
    for steps in (40, 80):
        assert most(steps, forward_mode=True) <= 2
        assert most(steps, truncate=3) <= 5


def test_the_problem_is_not_changed() -> None:
    for case in PROBLEMS:
        tensors = [leaf for leaf in flatten((case.theta, case.data))[0] if isinstance(leaf, Tensor)]
        before = [(leaf.clone(), leaf._version) for leaf in tensors]
        unrolled(case.problem, case.theta, case.data, solver=ours("gd", case), truncate=2)
        for leaf, (value, version) in zip(tensors, before, strict=True):
            assert torch.equal(leaf, value) and leaf._version == version and not leaf.requires_grad


def test_unrolled_and_implicit_side_by_side() -> None:
    """iMAML's own comparison: the same proximal problem, solved well."""
    case = PROXIMAL
    solver = NesterovAGD(step_size=1 / case.lipschitz, max_steps=400)
    path = unrolled(case.problem, case.theta, case.data, solver=solver)
    point = hypergradient(case.problem, case.theta, case.data, solver=solver, linsys=Exact())
    assert_same(vector(path.grad), vector(point.grad), 1e-8)
    assert isinstance(case.problem, ProximalProblem) and isinstance(path, bilevel.Hypergradient)


def test_forward_mode_of_leaves_that_are_expanded_or_empty() -> None:
    """One step of 1/2 arrives: phi = a, L = |a|^2 and the sum of b."""
    problem = BilevelProblem.from_functions(
        lambda p, theta, data: (p - theta["a"]).square().sum(),
        lambda p, theta, data: p.square().sum() + theta["b"].sum(),
        lambda theta, data: torch.zeros(3, dtype=torch.float64),
    )
    shared = torch.tensor(0.7, dtype=torch.float64)
    for size in (0, 2):
        theta = {"a": shared.expand(3), "b": torch.zeros(size, dtype=torch.float64)}
        got = unrolled(problem, theta, solver=GradientDescent(step_size=0.5, max_steps=1), forward_mode=True)
        torch.testing.assert_close(got.grad, {"a": 2 * theta["a"], "b": torch.ones(size, dtype=torch.float64)})
