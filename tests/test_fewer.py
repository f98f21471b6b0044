"""Tasks that are done leave the batch: the same answers, statuses and steps, from less work. The oracle is the same solve of each task
alone, and of the whole batch to the end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Status
from bilevel.derivatives import Objective
from bilevel.linsys import CG, Exact, Jacobi
from bilevel.solvers import LBFGS, GradientDescent, IterativeSolver, NesterovAGD, NewtonCG

F64 = torch.float64
TASKS, D = 40, 5


def problem() -> BilevelProblem:
    """Logistic regression with the logarithm of the penalty as theta."""
    return BilevelProblem.from_functions(
        lambda w, theta, data: (
            torch.nn.functional.softplus(-data["y"] * (data["x"] @ w)).sum() + 0.5 * theta.exp() * w.square().sum()
        ),
        lambda w, theta, data: (data["v"] @ w).square().mean() + theta,
        lambda theta, data: torch.zeros_like(data["x"][0]),
    )


def tasks() -> dict[str, Any]:
    """Curvatures of 10 to 10^3, so that tasks end at very different steps; every eighth is hard; one has a NaN."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(TASKS, 12, D, generator=g, dtype=F64)
    x = x * torch.linspace(0.2, 1.0, TASKS, dtype=F64)[:, None, None]
    x[::8] *= torch.logspace(-1, 0.8, D, dtype=F64)
    sign = (x.sum(-1) + torch.randn(TASKS, 12, generator=g, dtype=F64)).sign()
    x[3, 0, 0] = torch.nan
    return {"x": x, "y": sign, "v": torch.randn(TASKS, 6, D, generator=g, dtype=F64), "name": "fewer"}


SOLVERS: dict[str, IterativeSolver] = {
    "gd": GradientDescent(step_size=0.01, max_steps=3000, tol=1e-7),
    "gd, backtracking": GradientDescent(step_size=None, max_steps=3000, tol=1e-7, check_every=1),
    "agd": NesterovAGD(step_size=0.01, max_steps=2000, tol=1e-7),
    "agd, backtracking": NesterovAGD(step_size=None, max_steps=2000, tol=1e-7),
    "newton-cg": NewtonCG(max_steps=50, cg_steps=8, cg_rtol=0.1, tol=1e-9),
    "newton-cg, jacobi": NewtonCG(max_steps=50, cg_steps=8, cg_rtol=0.1, tol=1e-9, preconditioner=Jacobi()),
    "lbfgs": LBFGS(max_steps=300, tol=1e-8, check_every=2),
    "out of steps": GradientDescent(step_size=0.05, max_steps=220, tol=1e-4, check_every=3),
}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("theta_batched", [False, True], ids=["one theta", "a theta for each"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_as_with_all_of_them(
    name: str, theta_batched: bool, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = torch.linspace(-1, 1, TASKS, dtype=F64) if theta_batched else torch.tensor(-0.5, dtype=F64)
    options: dict[str, Any] = {
        "solver": SOLVERS[name],
        "linsys": CG(max_steps=20, rtol=1e-10),
        "batched": True,
        "theta_batched": theta_batched,
        "reduction": "none",
        "compile": compile,
    }
    sizes = watched(monkeypatch)
    found = bilevel.hypergradient(problem(), theta, tasks(), **options)
    if compile:
        assert not sizes or min(sizes) > TASKS  # so few are not recorded
    else:
        assert sizes and min(sizes) <= TASKS // (2 if name == "out of steps" else 4)
    monkeypatch.setattr(Objective, "only", lambda self, rows: None)
    whole = bilevel.hypergradient(problem(), theta, tasks(), **options)
    assert found.inner is not None and whole.inner is not None
    # no task knows of the others; the order of summation in a product may depend on how many there are
    assert found.inner.codes.equal(whole.inner.codes)
    assert found.inner.steps.equal(whole.inner.steps)
    assert Status(int(found.inner.codes[3])).failed
    for mine, theirs in (
        (found.phi, whole.phi),
        (found.grad, whole.grad),
        (found.inner.residual, whole.inner.residual),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, equal_nan=True)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that solvers go on with."""
    sizes: list[int] = []
    only = Objective.only

    def watch(self: Objective, rows: Tensor) -> Objective | None:
        assert len(set(rows.tolist())) == len(rows)
        sizes.append(len(rows))
        return only(self, rows)

    monkeypatch.setattr(Objective, "only", watch)
    return sizes


def test_each_task_alone_gives_the_same() -> None:
    theta, data = torch.tensor(-0.5, dtype=F64), tasks()
    together = bilevel.solve(problem(), theta, data, solver=SOLVERS["newton-cg"], batched=True)
    for i in range(TASKS):
        own = {key: value[i] if isinstance(value, Tensor) else value for key, value in data.items()}
        alone = bilevel.solve(problem(), theta, own, solver=SOLVERS["newton-cg"])
        assert alone.status is Status(int(together.codes[i])) and alone.num_steps == int(together.steps[i])
        torch.testing.assert_close(alone.value, together.value[i], rtol=1e-8, atol=1e-10, equal_nan=True)


def test_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of halves, so that what is recorded for a shape serves again."""
    sizes = watched(monkeypatch)
    bilevel.solve(problem(), torch.tensor(-0.5, dtype=F64), tasks(), solver=SOLVERS["gd"], batched=True)
    assert set(sizes) <= {20, 10, 5, 3, 2, 1}


def test_the_work_gets_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hard task among many: the rows that are evaluated, over all steps."""
    rows = 0
    value_and_grad = Objective.value_and_grad

    def counting(self: Objective, phi: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal rows
        rows += phi.shape[0]
        return value_and_grad(self, phi)

    curvature = torch.ones(64, 1, dtype=F64)
    curvature[17] = 1e-2
    simple = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * data @ (w - theta).square(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    monkeypatch.setattr(Objective, "value_and_grad", counting)
    found = bilevel.solve(
        simple,
        torch.ones(1, dtype=F64),
        curvature,
        solver=GradientDescent(step_size=1.0, max_steps=3000, tol=1e-8, check_every=1),
        batched=True,
    )
    assert (found.codes == int(Status.CONVERGED)).all()
    steps = int(found.steps[17])
    assert steps > 1000
    assert steps < rows < steps + 10 * 64  # not 64 times as many
    assert found.num_grads >= steps


def test_argmin_under_vmap() -> None:
    """The rows of an outer vmap leave like those of batched=True."""
    data = {key: value for key, value in tasks().items() if isinstance(value, Tensor)}
    data["x"][3, 0, 0] = 0.5

    def fitted(theta: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        own = {"x": x, "y": y, "v": v}
        w = bilevel.argmin(problem(), theta, own, solver=SOLVERS["newton-cg"], linsys=Exact())
        return problem().outer_loss(w, theta, own)

    theta = torch.tensor(-0.5, dtype=F64)
    grads = torch.func.vmap(torch.func.grad(fitted), (None, 0, 0, 0))(theta, data["x"], data["y"], data["v"])
    whole = bilevel.hypergradient(
        problem(), theta, data, solver=SOLVERS["newton-cg"], linsys=Exact(), batched=True, reduction="none"
    )
    torch.testing.assert_close(grads, whole.grad, rtol=1e-6, atol=1e-9)


def test_recorded_programs_of_fewer_tasks_are_verified_too() -> None:
    """A batch of 64 that was recorded when a captured number was another one, met again inside a batch of 128."""
    factor = 1.0
    problem = BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * data @ (w - factor * theta).square(),
        lambda w, theta, data: w.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.tensor([3.0], dtype=F64)

    def solved(tasks: int) -> Tensor:
        curvature = torch.ones(tasks, 1, dtype=F64)
        curvature[: 64 if tasks > 128 else tasks // 2] = 0.1
        solver = GradientDescent(step_size=1.0, max_steps=400, tol=1e-9, check_every=1)
        return bilevel.solve(problem, theta, curvature, solver=solver, batched=True, compile=True).unwrap()

    torch.testing.assert_close(solved(256), torch.full((256, 1), 3.0, dtype=F64))
    factor = 2.0
    torch.testing.assert_close(solved(128), torch.full((128, 1), 6.0, dtype=F64))
    torch.testing.assert_close(solved(256), torch.full((256, 1), 6.0, dtype=F64))


def test_a_function_as_preconditioner_is_for_the_whole_batch() -> None:
    scale = torch.linspace(1, 2, TASKS, dtype=F64).unsqueeze(-1).expand(TASKS, D)
    data = tasks()
    data["x"][3, 0, 0] = 0.5
    solver = NewtonCG(max_steps=50, cg_steps=8, cg_rtol=0.1, tol=1e-9, preconditioner=lambda v: scale * v)
    found = bilevel.solve(problem(), torch.tensor(-0.5, dtype=F64), data, solver=solver, batched=True)
    assert (found.codes == int(Status.CONVERGED)).all()
