"""Tolerances from an accuracy, and warm starts: against closed forms, and counted by the products that they cost."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import bilevel
from bilevel import BilevelProblem, Status, Tolerances
from bilevel.linsys import CG, Exact, Identity, LinearSolver, Neumann
from bilevel.solvers import LBFGS, BlackBox, GradientDescent, NesterovAGD, NewtonCG

F64 = torch.float64
NEWTON = NewtonCG(max_steps=5, cg_steps=2, tol=1e-10)


def t(x):
    return torch.as_tensor(np.asarray(x, dtype=np.float64))


class Ridge:
    """One log-penalty for each feature; for one task or several. The exact hypergradient of each by dense algebra."""

    def __init__(self, tasks=None, d=12, n=40, seed=0, spread=1.0):
        rng = np.random.default_rng(seed)
        lead = () if tasks is None else (tasks,)
        scale = np.geomspace(spread, 1, d)
        self.x, self.xv = rng.standard_normal((*lead, n, d)) * scale, rng.standard_normal((*lead, n, d)) * scale
        self.y, self.yv = rng.standard_normal((*lead, n)), rng.standard_normal((*lead, n))
        self.data = {name: t(getattr(self, name)) for name in ("x", "y", "xv", "yv")}
        self.theta = t(rng.standard_normal(d) - 1)
        self.problem = bilevel.BilevelProblem.from_functions(
            lambda phi, theta, data: (
                0.5 * (data["x"] @ phi - data["y"]).square().mean() + 0.5 * (theta.exp() * phi.square()).sum()
            ),
            lambda phi, theta, data: 0.5 * (data["xv"] @ phi - data["yv"]).square().mean(),
            lambda theta, data: torch.zeros_like(theta),
        )

    def exact(self, theta):
        e, n = np.exp(np.asarray(theta)), self.x.shape[-2]
        xt = np.swapaxes(self.x, -1, -2)
        hessian = xt @ self.x / n + np.diag(e)
        phi = np.linalg.solve(hessian, xt @ self.y[..., None] / n)
        u = np.linalg.solve(hessian, np.swapaxes(self.xv, -1, -2) @ (self.xv @ phi - self.yv[..., None]) / n)
        return -e * phi[..., 0] * u[..., 0]

    def error(self, result, theta=None):
        """Relative, of each task."""
        exact = self.exact(self.theta if theta is None else theta)
        return np.linalg.norm(result.grad.numpy() - exact, axis=-1) / np.linalg.norm(exact, axis=-1)

    def run(self, solver=None, linsys=None, theta=None, **options):
        if self.x.ndim == 3:
            options = {"batched": True, "reduction": "none"} | options
        return bilevel.hypergradient(
            self.problem,
            self.theta if theta is None else theta,
            self.data,
            solver=solver or GradientDescent(step_size=None, max_steps=5000, check_every=1),
            linsys=linsys or CG(max_steps=200),
            **options,
        )


SOLVERS = [
    GradientDescent(step_size=None, max_steps=5000, check_every=1),
    NesterovAGD(step_size=None, max_steps=5000, check_every=1),
    NewtonCG(max_steps=50, cg_steps=50),
]
LINSYS = [CG(max_steps=200), Neumann(num_terms=5000), Exact()]


# --- tolerances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", [1e-2, 1e-4])
def test_tolerances_give_the_accuracy(accuracy):
    """From a rough result to one of the accuracy that was asked for: to first order."""
    ridge = Ridge()
    rough = ridge.run(
        GradientDescent(step_size=None, max_steps=5000, tol=1e-2, check_every=1), CG(max_steps=200, rtol=0.1)
    )
    wanted = bilevel.tolerances(rough, accuracy)
    assert isinstance(wanted, Tolerances) and wanted.tol > 0 and wanted.rtol > 0
    result = ridge.run(
        GradientDescent(step_size=None, max_steps=5000, tol=wanted.tol, check_every=1),
        CG(max_steps=200, rtol=wanted.rtol),
    )
    assert ridge.error(result) < 10 * accuracy < 100 * ridge.error(rough)


def test_tolerances_are_proportional_and_in_the_units_of_the_solvers():
    """tol is absolute on |dG/dphi|, rtol relative to |dL/dphi|: each is what was reached, times what is allowed."""
    ridge = Ridge()
    result = ridge.run(GradientDescent(step_size=None, max_steps=20), CG(max_steps=3, rtol=0.0))
    found = result.diagnose()
    tol, rtol = bilevel.tolerances(result, 1e-3)
    half = 0.5e-3 * float(result.grad.norm())
    assert tol == pytest.approx(float(result.inner.residual) * half / float(found.inner))
    rhs = ridge.data["xv"].T @ (ridge.data["xv"] @ result.phi - ridge.data["yv"]) / 40
    assert rtol == pytest.approx(float(result.linear.residual / rhs.norm()) * half / float(found.linear))
    assert bilevel.tolerances(result, 1e-5) == pytest.approx((tol / 100, rtol / 100))


def test_tolerances_of_a_batch_are_those_of_the_task_that_needs_most():
    ridge = Ridge(tasks=4)
    result = ridge.run(GradientDescent(step_size=None, max_steps=20), CG(max_steps=3, rtol=0.0))
    alone = []
    for i in range(4):
        each = bilevel.hypergradient(
            ridge.problem,
            ridge.theta,
            {name: x[i] for name, x in ridge.data.items()},
            solver=GradientDescent(step_size=None, max_steps=20),
            linsys=CG(max_steps=3, rtol=0.0),
        )
        alone.append(bilevel.tolerances(each, 1e-3))
    wanted = bilevel.tolerances(result, 1e-3)
    assert wanted.tol == pytest.approx(min(each.tol for each in alone), rel=1e-5)
    assert wanted.rtol == pytest.approx(min(each.rtol for each in alone), rel=1e-5)


def test_nothing_to_measure_is_none_and_not_a_number():
    """A tolerance that was made up would be taken for one that was measured."""
    ridge = Ridge()
    direct = ridge.run(GradientDescent(step_size=None, max_steps=20), Exact())
    wanted = bilevel.tolerances(direct, 1e-3)
    assert wanted.rtol is None and wanted.tol > 0
    solved = ridge.run(NewtonCG(max_steps=20, cg_steps=50, tol=1e-14), CG(max_steps=3, rtol=0.0))
    wanted = bilevel.tolerances(solved, 1e-3)
    assert wanted.tol is None and wanted.rtol > 0
    with pytest.raises(TypeError, match="tol: expected a number, got NoneType None"):
        GradientDescent(step_size=0.1, max_steps=1, tol=wanted.tol)


def test_a_tolerance_with_which_zero_would_be_the_solution_is_not_proposed() -> None:
    """The outer loss knows theta itself, so that next to nothing of the gradient comes through phi: any residual would do."""
    h = torch.tensor([1.0, 3.0], dtype=F64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (h * phi * phi).sum() - (phi * theta).sum(),
        lambda phi, theta, data: phi.sum() + 100 * theta.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    exact = 100 + 1 / h
    rough = bilevel.hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=CG(max_steps=1, rtol=1e-9))
    found = rough.diagnose()
    assert rough.linear is not None and float(found.residual / found.rhs * found.size / found.linear) > 10
    wanted = bilevel.tolerances(rough, 0.5)
    assert wanted.rtol == 0.5
    grad = bilevel.hypergradient(
        problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=CG(max_steps=9, rtol=wanted.rtol)
    )
    assert float((grad.unwrap() - exact).norm() / exact.norm()) < 0.5


def test_tolerances_refuse_what_they_cannot_use():
    ridge = Ridge(tasks=2)
    few = GradientDescent(step_size=None, max_steps=5)
    result = ridge.run(few)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="accuracy: expected a finite number > 0"):
            bilevel.tolerances(result, bad)
    with pytest.raises(ValueError, match="accuracy: expected a relative error below 1.*For five per cent write 0.05"):
        bilevel.tolerances(result, 5)
    ridge.data["x"][:] = torch.nan
    with pytest.raises(ValueError, match=r"(?s)expected a result with at least one task that is ok, got\n.*NON_FINITE"):
        bilevel.tolerances(ridge.run(few), 1e-3)


# --- accuracy= --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linsys", LINSYS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("accuracy", [1e-1, 1e-3, 1e-6])
def test_accuracy_is_reached(solver, linsys, accuracy):
    ridge = Ridge()
    result = ridge.run(solver, linsys, accuracy=accuracy)
    assert ridge.error(result) <= 2 * accuracy
    assert result.inner.status is Status.CONVERGED and result.linear.status is Status.CONVERGED
    found = result.diagnose()
    assert float(found.linear + found.inner) <= accuracy * float(found.size)


@pytest.mark.parametrize("spread", [1e-2, 1e-3])
def test_accuracy_is_reached_where_proportion_is_too_optimistic(spread):
    """kappa up to 1e4: what is left of the error lies in the directions of small curvature."""
    ridge = Ridge(spread=spread, d=20)
    theta = ridge.theta - 6
    result = ridge.run(
        NesterovAGD(step_size=None, max_steps=20000, check_every=1), CG(max_steps=500), theta, accuracy=1e-4
    )
    assert result.inner.status is result.linear.status is Status.CONVERGED
    assert ridge.error(result, theta) <= 2e-4


def test_accuracy_is_not_exceeded_by_far():
    """It is there to save work: a loose accuracy costs fewer steps than a tight one."""
    ridge = Ridge()
    costs = [ridge.run(accuracy=accuracy) for accuracy in (1e-1, 1e-3, 1e-7)]
    steps = [(int(result.inner.steps), int(result.linear.steps)) for result in costs]
    assert steps[0][0] < steps[1][0] < steps[2][0]
    assert steps[0][1] < steps[1][1] < steps[2][1]
    assert ridge.error(costs[0]) > 1e-6


def test_accuracy_for_every_task_of_a_batch():
    ridge = Ridge(tasks=5)
    result = ridge.run(accuracy=1e-4, chunk_size=2)
    assert (ridge.error(result) <= 2e-4).all() and result.ok.all()
    mean = ridge.run(accuracy=1e-4, reduction="mean")
    np.testing.assert_allclose(mean.grad, ridge.exact(ridge.theta).mean(0), rtol=1e-2, atol=1e-6)


def test_the_work_of_all_rounds_and_of_the_estimates_is_counted(monkeypatch):
    """num_grads and num_matvecs against the calls that were made."""
    from bilevel.derivatives import Linearisation, Objective

    counted = {"matvec": 0, "value_and_grad": 0, "linearise": 0}

    def count(cls, name):
        original = getattr(cls, name)

        def method(self, *args, **kwargs):
            counted[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, method)

    count(Linearisation, "matvec")
    count(Objective, "value_and_grad")
    count(Objective, "linearise")
    result = Ridge().run(NewtonCG(max_steps=50, cg_steps=3), accuracy=1e-6)
    assert counted["matvec"] == result.inner.num_matvecs + result.linear.num_matvecs
    grads = result.inner.num_grads + result.linear.num_grads
    assert counted["value_and_grad"] + counted["linearise"] == grads + 1  # one at the start, for the first tolerance


@dataclass(frozen=True, kw_only=True)
class Stubborn(LinearSolver):
    """Converges to what it is asked for, except that it never goes below a floor of its own, and does not say so."""

    rtol: float = 1e-6
    floor: float = 0.05

    def solve(self, matvec, b, init=None, preconditioner=None):
        result = CG(max_steps=200, rtol=max(self.rtol, self.floor)).solve(matvec, b)
        return bilevel.Result(
            value=result.value,
            codes=torch.full_like(result.codes, int(Status.CONVERGED)),
            steps=result.steps,
            residual=result.residual,
            num_matvecs=result.num_matvecs,
        )


def test_an_accuracy_that_is_not_reached_is_said_so():
    ridge = Ridge()
    few = ridge.run(GradientDescent(step_size=None, max_steps=5), accuracy=1e-6)
    assert few.ok and few.inner.status is Status.MAX_STEPS and ridge.error(few) > 1e-6
    few = ridge.run(linsys=CG(max_steps=2), accuracy=1e-6)
    assert few.linear.status is Status.MAX_STEPS and ridge.error(few) > 1e-6
    floor = ridge.run(NewtonCG(max_steps=50, cg_steps=50), CG(max_steps=200), accuracy=1e-17)
    assert not (floor.inner.status is floor.linear.status is Status.CONVERGED)
    black_box = BlackBox(lambda problem, theta, data, init: init + 0.1, tol=1e-3)
    assert ridge.run(black_box, accuracy=1e-3).inner.status is Status.MAX_STEPS
    # a solver that claims more than it did is not believed
    stubborn = ridge.run(linsys=Stubborn(), accuracy=1e-6)
    assert stubborn.linear.status is Status.MAX_STEPS and ridge.error(stubborn) > 1e-6


def test_an_accuracy_below_rounding_is_not_said_to_be_reached():
    """In float32 the estimate itself is often zero."""
    theta = torch.ones(3)
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, _: 0.5 * (w - theta).square().sum(),
        lambda w, theta, _: 0.5 * (w - 2).square().sum(),
        lambda theta, _: torch.zeros_like(theta),
    )

    def run(accuracy):
        solver = NewtonCG(max_steps=20)
        return bilevel.hypergradient(problem, theta, solver=solver, linsys=CG(max_steps=20), accuracy=accuracy)

    found, impossible = run(1e-6), run(1e-9)
    assert found.inner.status is found.linear.status is Status.CONVERGED
    assert impossible.ok and impossible.error_estimate == 0
    assert impossible.linear.status is Status.MAX_STEPS and impossible.inner.status is not Status.CONVERGED


def test_a_task_that_cannot_reach_it_does_not_keep_the_others_from_it():
    """The first task is ill-conditioned, and its inner solve ends at max_steps; the others go on to their accuracy."""
    ridge = Ridge(tasks=3, spread=1.0)
    hard = Ridge(tasks=3, spread=1e-4)
    for name in ("x", "xv"):
        getattr(ridge, name)[0] = getattr(hard, name)[0]
        ridge.data[name][0] = hard.data[name][0]
    theta = ridge.theta - 14
    result = ridge.run(GradientDescent(step_size=None, max_steps=400, check_every=1), theta=theta, accuracy=1e-5)
    errors = ridge.error(result, theta)
    assert errors[0] > 1e-3 and (errors[1:] < 2e-5).all()
    assert Status(int(result.inner.codes[0])) is Status.MAX_STEPS
    assert (result.inner.codes[1:] == int(Status.CONVERGED)).all() and (result.linear.codes[1:] == 0).all()


def test_failed_tasks_and_no_estimate_under_accuracy():
    ridge = Ridge(tasks=3)
    ridge.data["x"][1] = torch.nan
    result = ridge.run(accuracy=1e-4)
    assert result.ok.tolist() == [True, False, True] and (ridge.error(result)[[0, 2]] < 2e-4).all()
    ridge.data["x"][:] = torch.nan
    assert not ridge.run(accuracy=1e-4).ok.any()
    # at a saddle there is no estimate, so no accuracy is claimed
    saddle = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, _: 0.5 * (t([-1.0, 1.0]) * phi.square()).sum() - phi @ theta,
        lambda phi, theta, _: phi.sum(),
        lambda theta, _: t([-0.9, 0.9]),
    )
    stay = BlackBox(lambda problem, theta, data, init: init, tol=1.0)
    result = bilevel.hypergradient(saddle, t([1.0, 1.0]), solver=stay, linsys=Exact(), accuracy=1e-3)
    assert result.inner.status is Status.MAX_STEPS and float(result.error_estimate) == np.inf


def test_accuracy_needs_tolerances_to_choose():
    ridge = Ridge()
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="accuracy: expected a finite number > 0"):
            ridge.run(accuracy=bad)
    for bad in (1.0, 5):  # per cent?
        with pytest.raises(ValueError, match="accuracy: expected a relative error below 1, such as 1e-3, got"):
            ridge.run(accuracy=bad)

    class NoTol:
        def run(self, objective, phi):
            raise AssertionError

    with pytest.raises(TypeError, match=r"accuracy: expected an inner solver with a field tol to choose, got .*NoTol"):
        ridge.run(NoTol(), accuracy=1e-3)
    proximal = bilevel.ProximalProblem.from_losses(lambda phi, _: phi.sum(), lambda phi, _: phi.sum(), 1.0)
    with pytest.raises(
        ValueError, match=r"accuracy: Identity\(\) is no solve, so no tolerance makes the gradient exact"
    ):
        bilevel.hypergradient(proximal, torch.zeros(2), solver=NewtonCG(), linsys=Identity(), accuracy=1e-3)


# --- warm starts ------------------------------------------------------------------------------------------------------

TIGHT = {
    "solver": GradientDescent(step_size=None, max_steps=5000, tol=1e-10, check_every=1),
    "linsys": CG(max_steps=200, rtol=1e-10),
}


@pytest.mark.parametrize(
    "linsys", [CG(max_steps=200, rtol=1e-10), Neumann(num_terms=5000, rtol=1e-10), Exact()], ids=repr
)
@pytest.mark.parametrize("tasks", [None, 3])
def test_warm_starts_give_the_same_gradient(tasks, linsys):
    ridge = Ridge(tasks=tasks)
    before = ridge.run(TIGHT["solver"], linsys)
    theta = ridge.theta + 0.01 * torch.linspace(-1, 1, 12, dtype=F64)
    warm = ridge.run(TIGHT["solver"], linsys, theta, warm_start=before)
    assert np.max(ridge.error(warm, theta)) < 1e-7
    torch.testing.assert_close(warm.grad, ridge.run(TIGHT["solver"], linsys, theta).grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tasks", [None, 3])
def test_warm_starts_save_products_and_gradients(tasks):
    ridge = Ridge(tasks=tasks, d=60, n=120)
    before = ridge.run(**TIGHT)
    again = ridge.run(**TIGHT, warm_start=before)  # nothing has changed: nothing is left to do
    assert int(again.linear.steps.max()) == 0 and int(again.inner.steps.max()) == 0
    assert torch.equal(again.phi, before.phi) and torch.equal(again.linear.value, before.linear.value)
    theta = ridge.theta + 1e-4
    cold, warm = ridge.run(**TIGHT, theta=theta), ridge.run(**TIGHT, theta=theta, warm_start=before)
    assert warm.linear.num_matvecs < cold.linear.num_matvecs
    assert warm.inner.num_grads < 0.8 * cold.inner.num_grads
    at = bilevel.implicit_gradient(
        ridge.problem,
        warm.phi,
        theta,
        ridge.data,
        linsys=TIGHT["linsys"],
        batched=tasks is not None,
        reduction="none" if tasks else "mean",
        warm_start=before,
    )
    torch.testing.assert_close(at.grad, warm.grad, rtol=1e-8, atol=1e-12)
    assert at.linear.num_matvecs == warm.linear.num_matvecs


def test_implicit_gradient_keeps_the_point_that_was_brought():
    """Only the linear solve starts from the earlier result."""
    ridge = Ridge()
    before = ridge.run(**TIGHT)
    phi = before.phi + 1.0
    cold = bilevel.implicit_gradient(ridge.problem, phi, ridge.theta, ridge.data, linsys=TIGHT["linsys"])
    warm = bilevel.implicit_gradient(
        ridge.problem, phi, ridge.theta, ridge.data, linsys=TIGHT["linsys"], warm_start=before
    )
    assert torch.equal(warm.phi, phi)
    torch.testing.assert_close(warm.grad, cold.grad, rtol=1e-8, atol=1e-12)


def test_the_start_is_that_of_the_earlier_result():
    """With no steps to take, the start is the answer."""
    ridge = Ridge()
    before = ridge.run(**TIGHT)
    hold = BlackBox(lambda problem, theta, data, init: init)
    stay = ridge.run(hold, warm_start=before)
    assert torch.equal(stay.phi, before.phi)
    one = ridge.run(hold, CG(max_steps=1, rtol=0.5), warm_start=before)
    assert torch.equal(one.linear.value, before.linear.value)


def test_failed_tasks_start_cold():
    ridge = Ridge(tasks=3)
    bad = {name: x.clone() for name, x in ridge.data.items()}
    bad["x"][1] *= 100
    good, ridge.data = ridge.data, bad
    fixed = TIGHT | {"solver": GradientDescent(step_size=0.2, max_steps=2000, tol=1e-10, check_every=1)}
    before = ridge.run(**fixed)  # diverges in the second task
    assert before.ok.tolist() == [True, False, True] and not before.phi[1].abs().max() < 1e6
    ridge.data = good
    warm, cold = ridge.run(**fixed, warm_start=before), ridge.run(**fixed)
    assert warm.ok.all() and (ridge.error(warm) < 1e-7).all()
    assert int(warm.inner.steps[0]) == int(warm.inner.steps[2]) == 0
    assert int(warm.inner.steps[1]) == int(cold.inner.steps[1]) > 0
    assert int(warm.linear.steps[1]) == int(cold.linear.steps[1]) > 0


def test_the_linear_solve_of_a_failed_task_starts_from_zero():
    """Also where what it found is of use: the second task runs away from a point next to its solution, and its system was solved."""
    slopes = t([1.0, 0.5, 0.2])
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, h: 0.5 * h * (slopes * (phi - theta).square()).sum(),
        lambda phi, theta, h: (phi.exp() * slopes.flip(0)).sum(),
        lambda theta, h: theta + 1e-9,
    )
    h, theta, options = t([1.0, 2.5]), t([0.3, -0.2, 0.1]), {"batched": True, "reduction": "none"}
    before = bilevel.hypergradient(
        problem, theta, h, solver=GradientDescent(step_size=1.0, max_steps=45), linsys=Exact(), **options
    )
    assert (
        before.ok.tolist() == [True, False] and not before.linear.failed.any() and (before.phi - theta).abs().max() < 1
    )
    one_step = {"solver": NewtonCG(max_steps=10, tol=1e-12), "linsys": CG(max_steps=1, rtol=0.0)} | options
    cold = bilevel.hypergradient(problem, theta, h, **one_step)
    warm = bilevel.hypergradient(problem, theta, h, **one_step, warm_start=before)
    assert not torch.allclose(warm.grad[0], cold.grad[0], rtol=1e-3)
    assert torch.equal(warm.grad[1], cold.grad[1])


def test_chunks_start_from_their_own_tasks():
    ridge = Ridge(tasks=5)
    before = ridge.run(**TIGHT)
    again = ridge.run(**TIGHT, warm_start=before, chunk_size=2)
    assert int(again.inner.steps.max()) == 0 and int(again.linear.steps.max()) == 0


def test_a_tree_of_another_order_is_the_same_tree():
    ridge = Ridge(d=4)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: ridge.problem.inner_objective(torch.cat([phi["a"], phi["b"]]), theta, data),
        lambda phi, theta, data: ridge.problem.outer_loss(torch.cat([phi["a"], phi["b"]]), theta, data),
    )
    zero = torch.zeros(2, dtype=F64)
    before = bilevel.hypergradient(problem, ridge.theta, ridge.data, **TIGHT, init={"a": zero, "b": zero})
    turned = bilevel.BilevelProblem.from_functions(
        problem.inner_objective, problem.outer_loss, lambda theta, data: {"b": zero, "a": zero}
    )
    again = bilevel.hypergradient(turned, ridge.theta, ridge.data, **TIGHT, warm_start=before)
    assert int(again.inner.steps) == 0
    torch.testing.assert_close(again.phi["a"], before.phi["a"])


def test_an_outer_loop_with_an_optimizer_that_changes_theta_in_place():
    """Warm starts and accuracy together, as one would write it; the earlier result cannot look at theta any more."""
    ridge = Ridge()
    theta = ridge.theta.clone().requires_grad_()
    outer = torch.optim.SGD([theta], lr=0.5)
    for first in (None, ridge.run(theta=theta.detach(), **TIGHT)):  # nothing, or a result that was never diagnosed
        result = first
        for _ in range(3):
            theta.data.add_(0)  # a change of version as optimizers make it
            result = ridge.run(theta=theta, accuracy=1e-4, warm_start=result)
            assert result.ok and ridge.error(result, theta.detach()) < 2e-4
            theta.grad = result.unwrap()
            outer.step()


def test_warm_starts_of_something_else_are_refused():
    ridge = Ridge()
    result = ridge.run(**TIGHT)
    with pytest.raises(
        ValueError, match="expected init or warm_start, got both: each says where the inner solve starts"
    ):
        ridge.run(**TIGHT, init=ridge.theta, warm_start=result)
    with pytest.raises(
        TypeError, match=r"warm_start: expected what hypergradient\(\) or implicit_gradient\(\) returned, got Tensor"
    ):
        ridge.run(**TIGHT, warm_start=result.phi)
    with pytest.raises(TypeError, match="warm_start: expected what .*, got Tensor"):
        ridge.run(**TIGHT, warm_start=result.phi, accuracy=1e-3)
    unrolled = bilevel.unrolled(
        ridge.problem, ridge.theta, ridge.data, solver=GradientDescent(step_size=0.1, max_steps=2)
    )
    with pytest.raises(TypeError, match=r"got Hypergradient of unrolled\(\)"):
        ridge.run(**TIGHT, warm_start=unrolled)
    message = r"the same phi and number of tasks \(raveled: \(12,\), torch.float64, cpu\), got one for "
    for other, shape in ((Ridge(d=5), "(5,)"), (Ridge(tasks=2), "(2, 12)")):
        with pytest.raises(ValueError, match=message + re.escape(shape)):
            ridge.run(**TIGHT, warm_start=other.run(**TIGHT))


def ill_conditioned_ridge() -> tuple[BilevelProblem, torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Ridge regression with features of sizes from 1 to 0.01 and a tiny penalty, theta, data and the exact gradient, in float64."""
    g, f64 = torch.Generator().manual_seed(0), torch.float64
    scales = torch.logspace(0, -2, 20, dtype=f64)
    X, w, X_val = (torch.randn(*shape, generator=g, dtype=f64) for shape in ((100, 20), (20,), (100, 20)))
    X = X * scales
    y, y_val = X @ w + 0.3 * torch.randn(100, generator=g, dtype=f64), X_val @ w
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (
            0.5 * (data[0] @ phi - data[1]).square().mean() + 0.5 * (theta.exp() * phi.square()).sum()
        ),
        lambda phi, theta, data: 0.5 * (data[2] @ phi - data[3]).square().mean(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.full((20,), -13.0, dtype=f64)
    H = X.T @ X / 100 + theta.exp().diag()
    phi = torch.linalg.solve(H, X.T @ y / 100)
    u = torch.linalg.solve(H, X_val.T @ (X_val @ phi - y_val) / 100)
    return problem, theta, (X, y, X_val, y_val), -theta.exp() * phi * u


@pytest.mark.parametrize("accuracy", [0.1, 0.01])
def test_float32_is_precise_enough_for_an_ill_conditioned_problem(accuracy: float) -> None:
    """kappa = 1e4: rounding in H u may be a percent of b, and hides what the solve has left; that is no reason to give up."""
    problem, theta, data, exact = ill_conditioned_ridge()
    found = bilevel.hypergradient(
        problem,
        theta.float(),
        tuple(tensor.float() for tensor in data),
        solver=NewtonCG(max_steps=20, cg_steps=40, tol=1e-3),
        linsys=CG(max_steps=60),
        accuracy=accuracy,
    )
    assert found.inner.status is Status.CONVERGED and found.linear.status is Status.CONVERGED
    assert float((found.grad.double() - exact).norm()) < accuracy * float(exact.norm())
    assert found.error_estimate.isfinite()


def test_an_exact_answer_in_float32_has_an_estimate() -> None:
    """Eigenvalues 1 and 1e-4, everything exact in float32."""
    eigenvalues = torch.tensor([1.0, 2.0**-13])
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (eigenvalues * phi * phi).sum() - (theta * phi).sum(),
        lambda phi, theta, data: phi.sum(),
    )
    for linsys in (Exact(), CG(max_steps=5)):
        found = bilevel.implicit_gradient(problem, torch.ones(2), eigenvalues, linsys=linsys)
        torch.testing.assert_close(found.grad, 1 / eigenvalues)
        assert float(found.error_estimate) == 0 and "Nothing to change." in found.explain()


def least_squares(seed: int, d: int, n: int, kappa: float, dtype: torch.dtype):
    """|X phi - theta|^2 / 2 with H = X^T X of this condition number, and the exact gradient by a pseudo-inverse in float64."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    left, right = torch.linalg.qr(numbers(n, d)).Q, torch.linalg.qr(numbers(d, d)).Q
    X = (left * torch.logspace(0, -np.log10(kappa) / 2, d, dtype=F64)) @ right.T
    X, y, X_val, y_val = (a.to(dtype) for a in (X, numbers(n), numbers(n, d), numbers(n)))
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (data[0] @ phi - theta).square().sum(),
        lambda phi, theta, data: 0.5 * (data[1] @ phi - data[2]).square().sum(),
        lambda theta, data: theta.new_zeros(d),
    )
    inverse = torch.linalg.pinv(X.double(), rtol=1e-14)
    exact = inverse.T @ (X_val.T.double() @ (X_val.double() @ (inverse @ y.double()) - y_val.double()))
    return problem, y, (X, X_val, y_val), exact


@pytest.mark.parametrize("linsys", [CG(max_steps=100), Exact()], ids=repr)
@pytest.mark.parametrize("solver", [LBFGS(max_steps=800), NewtonCG(max_steps=100, cg_steps=60, cg_rtol=0.1)], ids=repr)
@pytest.mark.parametrize(
    ("dtype", "kappa", "accuracy", "seed"),
    [(torch.float32, 1e4, 0.01, 2), (torch.float32, 1e5, 0.01, 0), (torch.float32, 1e6, 0.1, 1), (F64, 1e10, 1e-6, 1)],
)
def test_rounding_is_not_taken_for_accuracy(dtype, kappa, accuracy, seed, solver, linsys):
    """Where phi is long along small eigenvalues, |H| |phi| eps in dG/dphi would be an error of the gradient of many per cent."""
    problem, theta, data, exact = least_squares(seed, 8, 20, kappa, dtype)
    found = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=linsys, accuracy=accuracy)
    error = float((found.grad.double() - exact).norm() / exact.norm())
    assert found.ok and float(found.error_estimate) > 0.3 * error * float(exact.norm())
    if found.inner.status is found.linear.status is Status.CONVERGED:
        assert error < 1.2 * accuracy


def test_no_estimate_from_far_away_is_no_reason_to_give_up():
    """120 different eigenvalues: 100 steps of CG come nowhere near a step of Newton's method, but that says nothing of phi."""
    problem, theta, data, exact = least_squares(0, 120, 240, 1e6, F64)
    solver = NewtonCG(max_steps=100, cg_steps=1000, cg_rtol=0.1)
    found = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=Exact(), accuracy=0.01)
    assert found.inner.status is found.linear.status is Status.CONVERGED
    assert (found.grad - exact).norm() < 0.012 * exact.norm()


def test_a_smaller_gradient_is_asked_for_where_there_is_no_estimate(monkeypatch):
    """With too few products for any estimate, the solve goes on as far as it can keep its tolerance, and says that it is not known."""
    monkeypatch.setattr("bilevel.certificates.estimate._affordable", lambda dim: 20)
    problem, theta, data, exact = least_squares(0, 60, 120, 1e6, F64)
    solver = NewtonCG(max_steps=100, cg_steps=1000, cg_rtol=0.1)
    found = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=Exact(), accuracy=0.01)
    assert (found.grad - exact).norm() < 1e-3 * exact.norm()
    assert found.inner.status is Status.MAX_STEPS and found.error_estimate == torch.inf
