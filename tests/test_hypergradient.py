"""hypergradient and implicit_gradient against closed forms, dense matrices and loops over single tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import (
    BilevelProblem,
    GaussNewton,
    Hessian,
    Hypergradient,
    ProximalProblem,
    Result,
    SolverError,
    Status,
    hypergradient,
    implicit_gradient,
    solve,
)
from bilevel.linsys import CG, Exact, Identity, Neumann
from bilevel.solvers import BlackBox, GradientDescent, NesterovAGD, NewtonCG
from bilevel.trees import flatten, layout_of, tree_map
from tests.cases import LINSYS_NAMES, PAIRS, PROBLEMS, SOLVER_NAMES, Case, inner_solvers, linear_solvers

F32, F64 = torch.float32, torch.float64
NEWTON = NewtonCG(max_steps=30, cg_steps=20, tol=1e-11)
IDS = {"ids": lambda case: case.name}


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def vector(tree: Any) -> Tensor:
    """All leaves in one vector, in ravel order."""
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def rows(tree: Any) -> Tensor:
    """A tree with a task axis as one row for each task."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in flatten(tree)[0]], 1)


def statuses(result: Result) -> list[Status]:
    return [Status(int(code)) for code in result.codes.reshape(-1)]


def assert_near(got: Tensor, expected: Any, relative: float) -> None:
    """The difference is at most ``relative`` times the largest entry."""
    expected = torch.as_tensor(expected).to(got.dtype)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=relative * float(expected.abs().max()))


def perturbed(tree: Any, k: int) -> Any:
    """Another instance of the same kind: numbers 7 k % larger (the exponential problem needs positive ones), labels rolled by k."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf * (1 + 0.07 * k) if leaf.is_floating_point() else leaf.roll(k)

    return tree_map(change, tree)


def stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *trees)


def reversed_dicts(tree: Any) -> Any:
    """The same tree, every dict with its keys inserted in the opposite order."""
    if isinstance(tree, dict):
        return {key: reversed_dicts(value) for key, value in reversed(tree.items())}
    if isinstance(tree, tuple | list):
        return type(tree)(reversed_dicts(value) for value in tree)
    return tree


# ----------------------------------------------------------------------------------------------------------------------
# One task: closed forms.


@pytest.mark.parametrize(("solver_name", "linsys_name"), PAIRS)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_every_row_gives_the_gradient_of_the_closed_form(case: Case, solver_name: str, linsys_name: str) -> None:
    expected = torch.func.grad(case.outer)(case.theta, case.data)
    got = hypergradient(
        case.problem,
        case.theta,
        case.data,
        solver=inner_solvers(case, 1e-10)[solver_name],
        linsys=linear_solvers(1e-12)[linsys_name],
    )
    assert got.inner is not None
    assert got.inner.status is Status.CONVERGED and got.linear.status is Status.CONVERGED
    assert got.ok is True and got.num_ok == 1
    assert flatten(got.grad)[1] == flatten(case.theta)[1]
    assert [leaf.shape for leaf in flatten(got.grad)[0]] == [leaf.shape for leaf in flatten(case.theta)[0]]
    assert_near(vector(got.grad), vector(expected), 1e-9)
    assert_near(vector(got.phi), vector(case.phi_star(case.theta, case.data)), 1e-9)
    torch.testing.assert_close(got.outer, case.outer(case.theta, case.data), rtol=1e-9, atol=1e-9)
    assert got.unwrap() is got.grad


@pytest.mark.parametrize(("solver_name", "linsys_name"), PAIRS)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_float32_stays_float32_and_is_right_to_its_rounding(case: Case, solver_name: str, linsys_name: str) -> None:
    """The oracle is the closed form in float64 at the same numbers.

    |dG/dphi| <= 1e-4 puts phi within 1e-4 / mu of the solution (mu >= 0.5 in every case), and the linear residual of 1e-6 times a
    condition number of at most 60 is as much again: 2e-4 of vectors of size 1 with a factor of 5 for the cross derivative.
    """
    single = case.to(F32)
    expected = torch.func.grad(case.outer)(single.to(F64).theta, single.to(F64).data)
    got = hypergradient(
        single.problem,
        single.theta,
        single.data,
        solver=inner_solvers(single, 1e-4)[solver_name],
        linsys=linear_solvers(1e-6)[linsys_name],
    )
    assert got.ok is True
    assert {leaf.dtype for leaf in flatten((got.grad, got.phi, got.linear.value))[0]} == {F32}
    assert got.outer.dtype == got.linear.residual.dtype == F32
    assert_near(vector(got.grad).to(F64), vector(expected), 1e-3)


@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_central_differences_of_the_solved_problem(case: Case) -> None:
    """No derivative of anybody: F is evaluated by solving again at theta +- h e_i."""
    layout, _ = layout_of(case.theta)
    flat = vector(case.theta)
    h = 1e-5  # truncation h^2 and rounding 1e-15 / h are both about 1e-10

    def outer(x: Tensor) -> float:
        theta = layout.unravel(x)
        phi = solve(case.problem, theta, case.data, solver=NEWTON).unwrap()
        return float(case.problem.outer_loss(phi, theta, case.data))

    numeric = [(outer(flat + h * e) - outer(flat - h * e)) / (2 * h) for e in torch.eye(len(flat), dtype=F64)]
    got = hypergradient(case.problem, case.theta, case.data, solver=NEWTON, linsys=Exact())
    assert_near(vector(got.grad), numeric, 1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Dense algebra.


def dense_implicit_gradient(
    problem: BilevelProblem, phi: Any, theta: Any, data: Any, matrix: Tensor | None = None, damping: float = 0.0
) -> np.ndarray:
    """dL/dtheta - C^T (H + damping I)^{-1} dL/dphi from dense derivatives of torch.func, solved by numpy; ``matrix`` in place of H."""
    phi_layout, _ = layout_of(phi)
    theta_layout, _ = layout_of(theta)
    x, t = vector(phi), vector(theta)

    def inner(x: Tensor, t: Tensor) -> Tensor:
        return problem.inner_objective(phi_layout.unravel(x), theta_layout.unravel(t), data)

    def outer(x: Tensor, t: Tensor) -> Tensor:
        return problem.outer_loss(phi_layout.unravel(x), theta_layout.unravel(t), data)

    h = torch.func.hessian(inner)(x, t) if matrix is None else matrix
    c = torch.func.jacrev(torch.func.grad(inner), argnums=1)(x, t).numpy()  # (phi, theta)
    b, direct = (g.numpy() for g in torch.func.grad(outer, argnums=(0, 1))(x, t))
    return direct - c.T @ np.linalg.solve(h.numpy() + damping * np.eye(len(x)), b)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("linsys_name", LINSYS_NAMES)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_at_any_point_it_is_the_dense_formula_at_that_point(case: Case, linsys_name: str, damping: float) -> None:
    """The point is no solution: nothing may be re-solved, and H must be taken there."""
    phi = tree_map(lambda leaf: leaf + 0.2 * torch.cos(5 * leaf), case.phi_star(case.theta, case.data))
    expected = dense_implicit_gradient(case.problem, phi, case.theta, case.data, damping=damping)
    got = implicit_gradient(
        case.problem, phi, case.theta, case.data, linsys=linear_solvers(1e-12)[linsys_name], damping=damping
    )
    assert got.inner is None
    assert got.damping == damping and got.curvature == Hessian()
    assert_near(vector(got.grad), expected, 1e-9)
    assert torch.equal(vector(got.phi), vector(phi))
    torch.testing.assert_close(got.outer, case.problem.outer_loss(phi, case.theta, case.data))
    if damping == 0 and case.name != "coupled":  # (where the outer loss is not the exact solution's by construction)
        assert (vector(got.grad) - vector(torch.func.grad(case.outer)(case.theta, case.data))).abs().max() > 1e-3


def classifier(lam: Any) -> ProximalProblem:
    """Softmax regression behind a tanh layer: H differs from Gauss-Newton, and is indefinite where lam is small."""

    def predict(phi: Any, data: Any) -> Tensor:
        return torch.tanh(data["x"] @ phi["in"] + phi["shift"]) @ phi["out"]

    return ProximalProblem.from_model(
        predict,
        lambda outputs, data: torch.nn.functional.cross_entropy(outputs, data["label"], reduction="sum"),
        lambda phi, data: torch.nn.functional.cross_entropy(predict(phi, {"x": data["x_test"]}), data["label_test"]),
        lam,
    )


def classifier_inputs(seed: int, dtype: torch.dtype = F64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """theta and the data of one task: 3 features, 4 hidden units, 3 classes."""
    theta = {"shift": normal(seed, 4), "out": normal(seed + 1, 4, 3), "in": normal(seed + 2, 3, 4)}
    generator = torch.Generator().manual_seed(seed)
    data = {
        "x": normal(seed + 3, 6, 3),
        "label": torch.randint(3, (6,), generator=generator),
        "x_test": normal(seed + 4, 5, 3),
        "label_test": torch.randint(3, (5,), generator=generator),
    }
    cast = lambda tree: tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)  # noqa: E731
    return cast(theta), cast(data)


def dense_gauss_newton(problem: ProximalProblem, phi: Any, data: Any, lam: dict[str, float]) -> Tensor:
    """J^T H_out J + Lambda."""
    made_of = problem.composition
    assert made_of is not None
    layout, _ = layout_of(phi)
    j = torch.func.jacrev(lambda x: made_of.predict(layout.unravel(x), None, data).reshape(-1))(vector(phi))
    z = made_of.predict(phi, None, data)
    h_out = torch.func.hessian(lambda z: made_of.output_loss(z.reshape(6, 3), None, data))(z.reshape(-1))
    weights = torch.cat([torch.full((leaf.numel(),), lam[key], dtype=F64) for key, leaf in sorted(phi.items())])
    return j.T @ h_out @ j + torch.diag(weights)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize(
    "linsys", [CG(max_steps=100, rtol=1e-13), Neumann(num_terms=20000, rtol=1e-12), Exact()], ids=repr
)
def test_gauss_newton_is_its_dense_matrix(linsys: Any, damping: float) -> None:
    lam = {"in": 0.8, "shift": 1.5, "out": 2.5}
    problem = classifier(lam)
    theta, data = classifier_inputs(1)
    phi = {"in": normal(9, 3, 4), "out": normal(10, 4, 3), "shift": normal(11, 4)}
    matrix = dense_gauss_newton(problem, phi, data, lam)
    expected = dense_implicit_gradient(problem, phi, theta, data, matrix, damping)
    got = implicit_gradient(problem, phi, theta, data, linsys=linsys, curvature=GaussNewton(), damping=damping)
    assert got.linear.status is Status.CONVERGED
    assert (got.curvature, got.damping) == (GaussNewton(), damping)
    assert_near(vector(got.grad), expected, 1e-10)
    # the test would see it if the Hessian were taken
    with_hessian = dense_implicit_gradient(problem, phi, theta, data, damping=damping)
    assert np.abs(with_hessian - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("theta_batched", [False, True])
@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
def test_curvature_over_a_batch_with_labels_is_the_dense_matrix_of_each_task(
    curvature: Any, theta_batched: bool
) -> None:
    lam = {"in": 6.0, "shift": 7.0, "out": 8.0}
    problem = classifier(lam)
    tasks = [classifier_inputs(20 * k) for k in range(3)]
    thetas = [theta if theta_batched else tasks[0][0] for theta, _ in tasks]
    phis = [tree_map(lambda leaf, k=k: leaf + 0.1 * (k + 1), theta) for k, theta in enumerate(thetas)]
    expected = []
    for phi, theta, (_, data) in zip(phis, thetas, tasks, strict=True):
        matrix = dense_gauss_newton(problem, phi, data, lam) if curvature == GaussNewton() else None
        expected.append(dense_implicit_gradient(problem, phi, theta, data, matrix, 0.1))
    got = implicit_gradient(
        problem,
        stack(phis),
        stack(thetas) if theta_batched else thetas[0],
        stack([data for _, data in tasks]),
        linsys=CG(max_steps=100, rtol=1e-13),
        curvature=curvature,
        damping=0.1,
        batched=True,
        theta_batched=theta_batched,
        reduction="none",
    )
    assert statuses(got.linear) == [Status.CONVERGED] * 3
    assert_near(rows(got.grad), np.stack(expected), 1e-10)


def test_gauss_newton_without_a_model_is_an_error() -> None:
    case = PROBLEMS[0]
    with pytest.raises(
        ValueError,
        match=r"GaussNewton\(\) needs a problem of the form output_loss\(predict\(phi, ...\), ...\).*BilevelProblem.from_model",
    ):
        hypergradient(case.problem, case.theta, case.data, solver=NEWTON, linsys=Exact(), curvature=GaussNewton())
    losses = ProximalProblem.from_losses(lambda phi, data: (phi**2).sum(), lambda phi, data: phi.sum(), 1.0)
    with pytest.raises(ValueError, match=r"GaussNewton\(\) needs"):
        implicit_gradient(losses, torch.ones(2), torch.ones(2), linsys=Exact(), curvature=GaussNewton())


# ----------------------------------------------------------------------------------------------------------------------
# Identity: first-order MAML.


@pytest.mark.parametrize("batched", [False, True])
def test_identity_is_first_order_maml(batched: bool) -> None:
    """For the proximal problem Lambda Lambda^{-1} dL/dphi = dL/dphi, whatever Lambda is."""
    case = PROBLEMS[2]
    tasks = [perturbed(case.data, k) for k in range(3)] if batched else [case.data]
    solver = GradientDescent(step_size=0.02, max_steps=7)
    got = hypergradient(
        case.problem,
        case.theta,
        stack(tasks) if batched else case.data,
        solver=solver,
        linsys=Identity(),
        batched=batched,
        reduction="none",
    )
    phis = [solve(case.problem, case.theta, data, solver=solver).value for data in tasks]
    first_order = [
        vector(torch.func.grad(case.problem.test_loss)(phi, data)) for phi, data in zip(phis, tasks, strict=True)
    ]
    assert_near(
        rows(got.grad) if batched else vector(got.grad), torch.stack(first_order) if batched else first_order[0], 1e-12
    )
    assert got.num_ok == len(tasks)
    assert got.linear.num_matvecs == 0


def test_identity_with_damping_is_the_dense_formula_with_lambda_for_h() -> None:
    case = PROBLEMS[2]
    phi = tree_map(lambda leaf: leaf + 0.2, case.theta)
    lam = torch.diag(torch.tensor([2.0, 2.0] + [0.7] * 6, dtype=F64))  # ravel order: b, then w
    expected = dense_implicit_gradient(case.problem, phi, case.theta, case.data, lam, damping=0.4)
    got = implicit_gradient(case.problem, phi, case.theta, case.data, linsys=Identity(), damping=0.4)
    assert_near(vector(got.grad), expected, 1e-12)


@pytest.mark.parametrize("case", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[3]], **IDS)
def test_identity_on_other_problems_is_an_error(case: Case) -> None:
    with pytest.raises(
        ValueError, match=r"Identity\(\) needs a problem that knows part of its Hessian.*Use CG, Neumann or Exact"
    ):
        hypergradient(case.problem, case.theta, case.data, solver=NEWTON, linsys=Identity())


# ----------------------------------------------------------------------------------------------------------------------
# Trees.


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_the_insertion_order_of_dicts_does_not_matter(case: Case, batched: bool) -> None:
    data = stack([perturbed(case.data, k) for k in range(2)]) if batched else case.data
    start = case.phi_star(case.theta, case.data)
    init = stack([start, start]) if batched else start
    options: dict[str, Any] = {
        "solver": GradientDescent(step_size=0.02, max_steps=5),
        "linsys": CG(max_steps=3, rtol=0.0),
        "batched": batched,
    }
    one = hypergradient(case.problem, case.theta, data, init=init, **options)
    other = hypergradient(
        case.problem, reversed_dicts(case.theta), reversed_dicts(data), init=reversed_dicts(init), **options
    )
    assert torch.equal(vector(one.grad), vector(other.grad))
    assert torch.equal(vector(one.phi), vector(other.phi))
    assert torch.equal(vector(one.linear.value), vector(other.linear.value))
    at = implicit_gradient(
        case.problem, reversed_dicts(one.phi), case.theta, data, linsys=options["linsys"], batched=batched
    )
    assert torch.equal(vector(at.grad), vector(one.grad))


def test_the_result_has_the_users_order_of_keys_and_lam_is_paired_by_key() -> None:
    def problem(lam: dict[str, float]) -> ProximalProblem:
        return ProximalProblem.from_losses(
            lambda phi, data: 0.5 * ((phi["a"] - data["a"]) ** 2).sum() + 0.5 * (phi["b"] ** 2).sum(),
            lambda phi, data: (phi["a"] * phi["b"]).sum(),
            lam,
        )

    theta, data = {"b": normal(1, 3), "a": normal(2, 3)}, {"a": normal(3, 3)}
    got = hypergradient(problem({"b": 3.0, "a": 0.5}), theta, data, solver=NEWTON, linsys=Exact())
    swapped = hypergradient(
        problem({"a": 0.5, "b": 3.0}), {"a": theta["a"], "b": theta["b"]}, data, solver=NEWTON, linsys=Exact()
    )
    assert list(got.grad) == list(got.phi) == list(got.linear.value) == ["b", "a"]
    assert list(swapped.grad) == ["a", "b"]
    # by hand: phi_a = (a + lam_a theta_a) / (1 + lam_a), phi_b = lam_b theta_b / (1 + lam_b)
    phi_a, phi_b = (data["a"] + 0.5 * theta["a"]) / 1.5, 3 * theta["b"] / 4
    for result in (got, swapped):
        torch.testing.assert_close(result.grad["a"], phi_b * 0.5 / 1.5)
        torch.testing.assert_close(result.grad["b"], phi_a * 3 / 4)


class Linear(NamedTuple):
    weight: Tensor
    bias: Tensor


def test_theta_and_phi_of_different_structure_and_a_theta_of_many_leaves() -> None:
    """phi a list with a 0-d tensor and a matrix; theta a dict of a named tuple and a tensor; shapes that are all different."""

    def inner(phi: Any, theta: Any, data: Any) -> Tensor:
        target = theta["p"].weight @ theta["q"]  # (2, 4) @ (4,)
        return (
            2 * (phi[0] - target.sum()) ** 2
            + ((phi[1] - torch.outer(target, theta["p"].bias)) ** 2).sum()
            + phi[0] * phi[1].sum() / 8
        )

    def outer(phi: Any, theta: Any, data: Any) -> Tensor:
        return phi[0] ** 2 + torch.sin(phi[1]).sum() * theta["q"][0]

    theta = {"q": normal(1, 4), "p": Linear(normal(2, 2, 4), normal(3, 3))}
    problem = BilevelProblem.from_functions(inner, outer)
    init = [torch.zeros((), dtype=F64), torch.zeros(2, 3, dtype=F64)]
    got = hypergradient(problem, theta, solver=NEWTON, linsys=CG(max_steps=30, rtol=1e-13), init=init)
    assert isinstance(got.grad["p"], Linear) and list(got.grad) == ["q", "p"]
    assert [leaf.shape for leaf in got.phi] == [(), (2, 3)]
    assert_near(vector(got.grad), dense_implicit_gradient(problem, got.phi, theta, None), 1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Batches.

BATCH_SOLVERS = {
    "gd": lambda case: GradientDescent(step_size=1 / case.lipschitz, max_steps=4000, tol=1e-6, check_every=1),
    "gd-fixed-steps": lambda case: GradientDescent(step_size=1 / case.lipschitz, max_steps=12),
    "agd-backtracking": lambda case: NesterovAGD(step_size=None, max_steps=2000, tol=1e-6, check_every=1),
    "newton-cg": lambda case: NewtonCG(max_steps=30, cg_steps=20, tol=1e-10),
    "black-box": lambda case: inner_solvers(case, 1e-10)["black-box"],
}
BATCH_PAIRS = [(name, "cg") for name in BATCH_SOLVERS] + [("newton-cg", name) for name in LINSYS_NAMES if name != "cg"]


@pytest.mark.parametrize("theta_batched", [False, True], ids=["shared theta", "theta per task"])
@pytest.mark.parametrize(("solver_name", "linsys_name"), BATCH_PAIRS)
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_a_batch_is_a_loop_over_its_tasks(case: Case, solver_name: str, linsys_name: str, theta_batched: bool) -> None:
    tasks = [perturbed(case.data, k) for k in range(3)]
    thetas = [perturbed(case.theta, 2 * k if theta_batched else 0) for k in range(3)]
    linsys = linear_solvers(1e-11)[linsys_name]
    options: dict[str, Any] = {"solver": BATCH_SOLVERS[solver_name](case), "linsys": linsys}
    singles = [hypergradient(case.problem, theta, data, **options) for theta, data in zip(thetas, tasks, strict=True)]
    got = hypergradient(
        case.problem,
        stack(thetas) if theta_batched else case.theta,
        stack(tasks),
        batched=True,
        theta_batched=theta_batched,
        reduction="none",
        **options,
    )
    assert got.inner is not None
    assert isinstance(got.ok, Tensor) and got.ok.tolist() == [True] * 3
    assert statuses(got.inner) == [single.inner.status for single in singles]
    assert statuses(got.linear) == [single.linear.status for single in singles]
    assert got.inner.num_steps.tolist() == [single.inner.num_steps for single in singles]
    assert got.linear.num_steps.tolist() == [single.linear.num_steps for single in singles]
    assert_near(rows(got.grad), torch.stack([vector(single.grad) for single in singles]), 1e-9)
    assert_near(rows(got.phi), torch.stack([vector(single.phi) for single in singles]), 1e-9)
    assert_near(got.outer, torch.stack([single.outer for single in singles]), 1e-9)
    assert torch.equal(got.outer, got.outer_per_task)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("theta_batched", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_chunks(reduction: str, theta_batched: bool, chunk_size: int) -> None:
    """With theta_batched the gradient keeps its axis and is that of the reduced loss: dF/dtheta_k = (1/n) dF_k/dtheta_k for "mean"."""
    case, n = PROBLEMS[0], 4
    tasks = [perturbed(case.data, k) for k in range(n)]
    thetas = [perturbed(case.theta, k if theta_batched else 0) for k in range(n)]
    each = torch.stack([torch.func.grad(case.outer)(theta, data) for theta, data in zip(thetas, tasks, strict=True)])
    outer = torch.stack([case.outer(theta, data) for theta, data in zip(thetas, tasks, strict=True)])
    got = hypergradient(
        case.problem,
        torch.stack(thetas) if theta_batched else case.theta,
        stack(tasks),
        solver=NEWTON,
        linsys=Exact(),
        batched=True,
        theta_batched=theta_batched,
        reduction=reduction,
        chunk_size=chunk_size,
        outer_chunk_size=None if chunk_size == 100 else chunk_size % 3 + 1,
    )
    scale = 1 / n if reduction == "mean" else 1
    keep = theta_batched or reduction == "none"
    assert_near(got.grad, each * scale if keep else each.sum(0) * scale, 1e-10)
    assert_near(got.outer, outer if reduction == "none" else outer.sum() * scale, 1e-10)
    assert_near(got.outer_per_task, outer, 1e-10)
    assert got.num_ok == n
    assert got.phi.shape == (n, 4) and got.linear.value.shape == (n, 4)
    assert got.inner.codes.shape == got.linear.codes.shape == got.linear.residual.shape == (n,)


@pytest.mark.parametrize("sick", [None, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_change_nothing(reduction: str, sick: int | None) -> None:
    """Sums in another order differ by rounding; everything that is per task by the shape of the batch only."""
    case = PROBLEMS[2]
    data = stack([perturbed(case.data, k) for k in range(5)])
    if sick is not None:
        data["train"][0][sick, 0, 0] = torch.nan
    options: dict[str, Any] = {
        "solver": GradientDescent(step_size=0.02, max_steps=20),
        "linsys": CG(max_steps=4, rtol=0.0),
    }
    whole = hypergradient(case.problem, case.theta, data, batched=True, reduction=reduction, **options)
    for chunk_size in (1, 2, 5):
        cut = hypergradient(
            case.problem, case.theta, data, batched=True, reduction=reduction, chunk_size=chunk_size, **options
        )
        assert cut.ok.tolist() == whole.ok.tolist() == [k != sick for k in range(5)]
        assert statuses(cut.inner) == statuses(whole.inner) and statuses(cut.linear) == statuses(whole.linear)
        for name in ("grad", "outer", "outer_per_task", "phi"):
            torch.testing.assert_close(
                vector(getattr(cut, name)), vector(getattr(whole, name)), rtol=1e-12, atol=1e-12, equal_nan=True
            )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    tasks=st.integers(1, 5),
    d_phi=st.integers(1, 8),
    d_theta=st.integers(1, 5),
    log_kappa=st.floats(0, 3),
    dtype=st.sampled_from([F32, F64]),
    theta_batched=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    chunk_size=st.sampled_from([None, 1, 2]),
    linsys=st.sampled_from(["cg", "exact"]),
    seed=st.integers(0, 2**31),
)
def test_random_quadratic_batches(
    tasks: int,
    d_phi: int,
    d_theta: int,
    log_kappa: float,
    dtype: torch.dtype,
    theta_batched: bool,
    reduction: str,
    chunk_size: int | None,
    linsys: str,
    seed: int,
) -> None:
    """G = 1/2 phi^T A_k phi - phi^T (C_k theta + s_k), L = 1/2 |phi - t_k|^2 + theta^T D_k phi, against numpy in float64."""
    rng = np.random.default_rng(seed)
    kappa = 10**log_kappa
    q = np.linalg.qr(rng.normal(size=(tasks, d_phi, d_phi)))[0]
    spectrum = np.geomspace(1, kappa, d_phi)
    numbers = {
        "a": (q * spectrum) @ q.swapaxes(-1, -2),
        "c": rng.normal(size=(tasks, d_phi, d_theta)),
        "s": rng.normal(size=(tasks, d_phi)),
        "t": rng.normal(size=(tasks, d_phi)),
        "d": rng.normal(size=(tasks, d_theta, d_phi)),
    }
    theta = rng.normal(size=(tasks, d_theta) if theta_batched else (d_theta,))
    grads = []
    for k in range(tasks):
        a, c, s, t, d = (numbers[name][k] for name in "acstd")
        theta_k = theta[k] if theta_batched else theta
        phi = np.linalg.solve(a, c @ theta_k + s)
        grads.append(d @ phi + c.T @ np.linalg.solve(a, phi - t + d.T @ theta_k))
    expected = np.stack(grads) if reduction == "none" or theta_batched else np.sum(grads, 0)
    expected = expected / tasks if reduction == "mean" else expected

    def inner(phi: Tensor, theta: Tensor, data: dict[str, Tensor]) -> Tensor:
        return 0.5 * phi @ (data["a"] @ phi) - phi @ (data["c"] @ theta + data["s"])

    def outer(phi: Tensor, theta: Tensor, data: dict[str, Tensor]) -> Tensor:
        return 0.5 * ((phi - data["t"]) ** 2).sum() + theta @ (data["d"] @ phi)

    problem = BilevelProblem.from_functions(inner, outer, lambda theta, data: torch.zeros_like(data["s"]))
    eps = torch.finfo(dtype).eps
    got = hypergradient(
        problem,
        torch.as_tensor(theta).to(dtype),
        {name: torch.as_tensor(value).to(dtype) for name, value in numbers.items()},
        solver=NewtonCG(max_steps=20, cg_steps=50, tol=100 * eps * kappa),
        linsys=CG(max_steps=200, rtol=10 * eps) if linsys == "cg" else Exact(),
        batched=True,
        theta_batched=theta_batched,
        reduction=reduction,
        chunk_size=chunk_size,
    )
    assert got.num_ok == tasks
    # H has the smallest eigenvalue 1, so phi is off by at most tol = 100 eps kappa; the numbers are of size sqrt(d) and d
    scale = np.abs(np.stack(grads)).max() + 10
    np.testing.assert_allclose(got.grad.double().numpy(), expected, rtol=0, atol=2e3 * eps * kappa * scale)


# ----------------------------------------------------------------------------------------------------------------------
# One task fails; all fail.


@pytest.mark.parametrize(("solver_name", "linsys_name"), BATCH_PAIRS)
@pytest.mark.parametrize("sick", ["train", "test"])
def test_nan_in_one_task_leaves_the_others_equal_to_the_bit(sick: str, solver_name: str, linsys_name: str) -> None:
    linsys = linear_solvers(1e-8)[linsys_name]
    case = PROBLEMS[2]
    healthy = stack([perturbed(case.data, k) for k in range(4)])
    bad = tree_map(torch.clone, healthy)
    bad[sick][0][2, 1, 1] = torch.nan
    options: dict[str, Any] = {"solver": BATCH_SOLVERS[solver_name](case), "linsys": linsys, "batched": True}
    before = hypergradient(case.problem, case.theta, healthy, reduction="none", **options)
    after = hypergradient(case.problem, case.theta, bad, reduction="none", **options)
    others = [0, 1, 3]
    assert after.ok.tolist() == [True, True, False, True] and after.num_ok == 3
    for name in ("grad", "phi"):
        assert torch.equal(rows(getattr(after, name))[others], rows(getattr(before, name))[others])
    assert torch.equal(rows(after.linear.value)[others], rows(before.linear.value)[others])
    assert torch.equal(after.outer[others], before.outer[others])
    for name in ("codes", "steps", "residual"):
        assert torch.equal(getattr(after.inner, name)[others], getattr(before.inner, name)[others])
        assert torch.equal(getattr(after.linear, name)[others], getattr(before.linear, name)[others])
    assert rows(after.grad)[2].isnan().all()
    assert after.outer[2].isnan()
    failed = after.inner if sick == "train" else after.linear
    assert statuses(failed)[2] is Status.NON_FINITE
    with pytest.raises(SolverError, match=r"4 problems, 1 failed(.|\n)*1 x NON_FINITE"):
        after.unwrap()
    for reduction, scale in (("mean", 1 / 3), ("sum", 1.0)):
        reduced = hypergradient(case.problem, case.theta, bad, reduction=reduction, **options)
        assert_near(vector(reduced.grad), rows(before.grad)[others].sum(0) * scale, 1e-13)
        torch.testing.assert_close(reduced.outer, before.outer[others].sum() * scale, rtol=1e-13, atol=0)
        assert reduced.num_ok == 3 and reduced.unwrap() is reduced.grad


@pytest.mark.parametrize("theta_batched", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_when_all_tasks_fail_there_is_no_number(reduction: str, theta_batched: bool) -> None:
    case = PROBLEMS[0]
    data = stack([case.data] * 3)
    data["train"][0][:, 0, 0] = torch.nan
    theta = torch.stack([case.theta] * 3) if theta_batched else case.theta
    got = hypergradient(
        case.problem,
        theta,
        data,
        solver=NEWTON,
        linsys=Exact(),
        batched=True,
        theta_batched=theta_batched,
        reduction=reduction,
    )
    assert got.num_ok == 0 and got.ok.tolist() == [False] * 3
    assert got.grad.isnan().all() and got.outer.isnan().all()
    with pytest.raises(SolverError, match=r"inner solve: 3 problems, 3 failed:\n  3 x NON_FINITE"):
        got.unwrap()


def test_with_theta_per_task_a_failed_task_is_nan_in_its_row_only() -> None:
    case = PROBLEMS[0]
    data = stack([case.data] * 3)
    data["train"][0][1, 0, 0] = torch.nan
    got = hypergradient(
        case.problem,
        torch.stack([case.theta] * 3),
        data,
        solver=NEWTON,
        linsys=Exact(),
        batched=True,
        theta_batched=True,
    )
    expected = torch.func.grad(case.outer)(case.theta, case.data) / 2  # the mean runs over two tasks
    assert got.grad[1].isnan().all()
    assert_near(got.grad[0], expected, 1e-9)
    assert_near(got.grad[2], expected, 1e-9)


def test_a_nan_in_the_cross_derivative_alone_is_seen() -> None:
    """phi and u are finite, and the gradient is not: sqrt has no derivative at 0."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi**2).sum() - (phi * torch.sqrt(theta * data)).sum(),
        lambda phi, theta, data: (phi**2).sum() + phi.sum(),
        lambda theta, data: torch.ones_like(theta),
    )
    data = torch.tensor([[1.0, 2.0], [0.0, 2.0]], dtype=F64)
    theta = torch.tensor([0.5, 0.3], dtype=F64)
    got = hypergradient(problem, theta, data, solver=NEWTON, linsys=Exact(), batched=True)
    assert got.ok.tolist() == [True, False]
    assert statuses(got.linear)[1] is Status.NON_FINITE
    # F = theta.x + sqrt(theta.x) summed: dF/dtheta = x + sqrt(x / theta) / 2
    assert_near(got.grad, data[0] + 0.5 * torch.sqrt(data[0] / theta), 1e-9)


def saddle(lam: float) -> ProximalProblem:
    """train_loss = 1/2 phi^T diag(curve) phi: indefinite where lam < -min(curve). One number per task decides."""
    return ProximalProblem.from_losses(
        lambda phi, data: 0.5 * (data["curve"] * phi**2).sum(), lambda phi, data: ((phi - data["goal"]) ** 2).sum(), lam
    )


SADDLE_DATA = {
    "curve": torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0], [4.0, 1.0, 1.0]], dtype=F64),
    "goal": normal(41, 3, 3),
}
SADDLE_THETA = normal(42, 3)


def saddle_gradient(k: int, lam: float) -> Tensor:
    """phi* = lam theta / (curve + lam), dF/dtheta = lam 2 (phi* - goal) / (curve + lam)."""
    shifted = SADDLE_DATA["curve"][k] + lam
    return lam * 2 * (lam * SADDLE_THETA / shifted - SADDLE_DATA["goal"][k]) / shifted


def stationary(problem: BilevelProblem, theta: Tensor, data: Any, init: Tensor) -> Tensor:
    return problem.lam * theta / (data["curve"] + problem.lam)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_negative_curvature_in_one_task_fails_that_task(reduction: str) -> None:
    problem = saddle(0.5)
    got = hypergradient(
        problem,
        SADDLE_THETA,
        SADDLE_DATA,
        solver=BlackBox(stationary),
        linsys=CG(max_steps=10),
        batched=True,
        reduction=reduction,
    )
    assert statuses(got.inner) == [Status.CONVERGED] * 3  # a saddle is stationary; the linear solve sees it
    assert statuses(got.linear)[1] is Status.NEGATIVE_CURVATURE
    assert got.linear.negative_curvature.tolist() == [0, 1, 0]
    assert got.ok.tolist() == [True, False, True] and got.num_ok == 2
    ok = torch.stack([saddle_gradient(0, 0.5), saddle_gradient(2, 0.5)])
    if reduction == "none":
        assert got.grad[1].isnan().all()
        assert_near(got.grad[[0, 2]], ok, 1e-9)
        with pytest.raises(SolverError, match=r"1 x NEGATIVE_CURVATURE(.|\n)*raise the regularisation"):
            got.unwrap()
    else:
        assert_near(got.unwrap(), ok.mean(0), 1e-9)


def test_steihaug_makes_the_task_ok_and_says_so() -> None:
    problem = saddle(0.5)
    options: dict[str, Any] = {"solver": BlackBox(stationary), "batched": True, "reduction": "none"}
    got = hypergradient(problem, SADDLE_THETA, SADDLE_DATA, linsys=CG(max_steps=10, steihaug=True), **options)
    assert statuses(got.linear) == [Status.CONVERGED, Status.STOPPED_AT_NEGATIVE_CURVATURE, Status.CONVERGED]
    assert got.linear.negative_curvature.tolist() == [0, 1, 0]
    assert got.num_ok == 3
    assert "1 x STOPPED_AT_NEGATIVE_CURVATURE" in got.describe()
    for k in (0, 2):
        assert_near(got.grad[k], saddle_gradient(k, 0.5), 1e-9)
    assert got.grad[1].isfinite().all() and got.grad[1].abs().max() > 0
    # the other remedy: with damping 2 the matrix is definite
    damped = hypergradient(problem, SADDLE_THETA, SADDLE_DATA, linsys=CG(max_steps=10), damping=2.0, **options)
    assert damped.num_ok == 3 and damped.damping == 2.0
    shifted = SADDLE_DATA["curve"] + 0.5
    expected = 0.5 * 2 * (0.5 * SADDLE_THETA / shifted - SADDLE_DATA["goal"]) / (shifted + 2.0)
    assert_near(damped.grad, expected, 1e-9)


def test_at_a_saddle_an_exact_solve_says_so() -> None:
    got = hypergradient(
        saddle(0.5),
        SADDLE_THETA,
        SADDLE_DATA,
        solver=BlackBox(stationary),
        linsys=Exact(),
        batched=True,
        reduction="none",
    )
    assert statuses(got.linear) == [Status.CONVERGED, Status.SOLVED_INDEFINITE, Status.CONVERGED]
    assert_near(got.grad, torch.stack([saddle_gradient(k, 0.5) for k in range(3)]), 1e-9)


def test_indefinite_in_all_tasks() -> None:
    data = {"curve": -SADDLE_DATA["curve"].abs() - 1, "goal": SADDLE_DATA["goal"]}
    got = hypergradient(
        saddle(0.5), SADDLE_THETA, data, solver=BlackBox(stationary), linsys=CG(max_steps=10), batched=True
    )
    assert got.grad.isnan().all() and got.outer.isnan() and got.num_ok == 0
    assert got.outer_per_task.isfinite().all()
    with pytest.raises(SolverError, match=r"linear solve: 3 problems, 3 failed:\n  3 x NEGATIVE_CURVATURE"):
        got.unwrap()


@pytest.mark.parametrize("max_steps", [40, 2000])
def test_a_diverged_inner_solve_is_no_gradient(max_steps: int) -> None:
    case = PROBLEMS[0]
    got = hypergradient(
        case.problem, case.theta, case.data, solver=GradientDescent(step_size=1.0, max_steps=max_steps), linsys=Exact()
    )
    assert got.inner.status is Status.DIVERGED
    if max_steps == 40:  # after so few, nothing else has failed
        assert not got.linear.failed and got.inner.residual.isfinite()
    assert got.ok is False and got.num_ok == 0
    assert got.grad.isnan().all() and got.outer.isnan()
    with pytest.raises(SolverError, match=r"inner solve: DIVERGED after \d+ steps.*Reduce step_size"):
        got.unwrap()


def test_a_singular_inner_problem_is_no_gradient() -> None:
    """phi_1 does not enter G."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * ((phi[0] - theta) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros(2, dtype=F64),
    )
    for linsys in (CG(max_steps=10), Exact()):
        got = hypergradient(problem, torch.ones(1, dtype=F64), solver=NEWTON, linsys=linsys)
        assert got.ok is False and got.grad.isnan().all()
        assert got.linear.status.failed


# ----------------------------------------------------------------------------------------------------------------------
# What depends on what, found from the graph.


def toy(inner: Callable[..., Tensor], outer: Callable[..., Tensor]) -> BilevelProblem:
    return BilevelProblem.from_functions(inner, outer, lambda theta, data: torch.zeros(2, dtype=F64))


def test_an_outer_loss_that_does_not_know_phi() -> None:
    problem = toy(lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: (theta**3).sum())
    theta = torch.tensor([2.0, 3.0], dtype=F64)
    for linsys in (CG(max_steps=5), Neumann(num_terms=5), Exact()):
        got = hypergradient(problem, theta, solver=NEWTON, linsys=linsys)
        assert_near(got.unwrap(), 3 * theta**2, 1e-13)


def test_an_outer_loss_that_is_a_constant() -> None:
    problem = toy(
        lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: torch.ones((), dtype=F64)
    )
    got = hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=Exact())
    assert got.ok is True and got.grad.tolist() == [0.0, 0.0] and float(got.outer) == 1.0


def test_an_outer_loss_that_does_not_know_theta() -> None:
    problem = toy(lambda phi, theta, data: ((phi - theta.exp()) ** 2).sum(), lambda phi, theta, data: (phi**2).sum())
    theta = torch.tensor([0.2, -0.3], dtype=F64)
    got = hypergradient(problem, theta, solver=NEWTON, linsys=Exact())
    assert_near(got.unwrap(), 2 * torch.exp(2 * theta), 1e-12)


def test_an_inner_objective_that_does_not_know_theta() -> None:
    """The cross derivative is zero; theta enters the outer loss."""
    problem = toy(lambda phi, theta, data: ((phi - 1) ** 2).sum(), lambda phi, theta, data: (phi * theta).sum())
    got = hypergradient(problem, torch.tensor([3.0, 4.0], dtype=F64), solver=NEWTON, linsys=Exact())
    assert_near(got.unwrap(), torch.ones(2, dtype=F64), 1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_a_theta_leaf_without_use_is_an_error_that_names_it(batched: bool) -> None:
    problem = toy(
        lambda phi, theta, data: ((phi - theta["used"] * data) ** 2).sum(),
        lambda phi, theta, data: (phi * theta["direct"]).sum(),
    )
    theta = {
        "used": torch.ones(2, dtype=F64),
        "direct": torch.ones(2, dtype=F64),
        "idle": {"x": torch.ones(3, dtype=F64)},
    }
    data = torch.ones(4, 2, dtype=F64) if batched else torch.ones(2, dtype=F64)
    options: dict[str, Any] = {"solver": NEWTON, "linsys": Exact(), "batched": batched}
    with pytest.raises(
        ValueError, match=r"theta\['idle'\]\['x'\]: expected every leaf of theta to enter.*allow_unused=True"
    ):
        hypergradient(problem, theta, data, **options)
    with pytest.raises(ValueError, match=r"theta\['idle'\]\['x'\]"):
        implicit_gradient(problem, data.clone(), theta, data, linsys=Exact(), batched=batched)
    got = hypergradient(problem, theta, data, allow_unused=True, **options)
    assert got.grad["idle"]["x"].tolist() == [0.0] * 3
    assert_near(got.grad["used"], torch.ones(2, dtype=F64), 1e-12)
    if batched:
        each = hypergradient(problem, theta, data, allow_unused=True, reduction="none", **options)
        assert each.grad["idle"]["x"].tolist() == [[0.0] * 3] * 4


def test_a_leaf_whose_value_gives_a_zero_gradient_is_used() -> None:
    """The graph decides, not the number: x^2 at 0, and a product with a zero in the data."""
    problem = toy(
        lambda phi, theta, data: ((phi - theta["a"] ** 2) ** 2).sum() + data * (phi * theta["b"]).sum(),
        lambda phi, theta, data: (phi**2).sum() + phi.sum(),
    )
    theta = {"a": torch.zeros(2, dtype=F64), "b": torch.ones(2, dtype=F64)}
    got = hypergradient(problem, theta, torch.zeros((), dtype=F64), solver=NEWTON, linsys=Exact())
    assert got.unwrap()["a"].tolist() == [0.0, 0.0]
    # phi* = a^2 - data b / 2 and data = 0
    assert_near(got.grad["b"], torch.zeros(2, dtype=F64), 0.0)


def test_an_inner_objective_without_phi_is_an_error() -> None:
    problem = toy(lambda phi, theta, data: (theta**2).sum(), lambda phi, theta, data: (phi * theta).sum())
    for call in (
        lambda: hypergradient(
            problem, torch.ones(2, dtype=F64), solver=GradientDescent(step_size=0.1, max_steps=3), linsys=Exact()
        ),
        lambda: implicit_gradient(problem, torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), linsys=Exact()),
    ):
        with pytest.raises(
            ValueError, match="inner_objective: expected a function of phi, but the graph shows no dependence on it"
        ):
            call()


def test_a_detached_phi_is_an_error() -> None:
    problem = toy(lambda phi, theta, data: ((phi.detach() - theta) ** 2).sum(), lambda phi, theta, data: phi.sum())
    with pytest.raises(ValueError, match="inner_objective: expected a function of phi.*Was phi detached"):
        hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=Exact())


def test_an_inner_objective_that_is_linear_in_phi_has_no_solution_and_no_gradient() -> None:
    problem = toy(lambda phi, theta, data: (phi * theta).sum(), lambda phi, theta, data: phi.sum())
    for linsys in (CG(max_steps=5), Exact()):
        got = implicit_gradient(problem, torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), linsys=linsys)
        assert got.ok is False and got.grad.isnan().all()
        assert got.linear.status is Status.SINGULAR


# ----------------------------------------------------------------------------------------------------------------------
# What the objectives capture.


@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_captured_tensor_that_requires_grad_is_an_error(where: str, leaf: bool, batched: bool) -> None:
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    captured = weight if leaf else 2 * weight
    problem = toy(
        lambda phi, theta, data: ((phi - theta * data * (captured if where == "inner" else 1)) ** 2).sum(),
        lambda phi, theta, data: (phi * theta * (captured if where == "outer" else 1)).sum(),
    )
    name = "inner_objective" if where == "inner" else "outer_loss"
    data = torch.ones(3, 2, dtype=F64) if batched else torch.ones(2, dtype=F64)
    with pytest.raises(
        ValueError,
        match=rf"{name} uses a tensor that carries a gradient \(shape \(2,\), requires_grad=True\).*Pass it through theta or data",
    ):
        hypergradient(problem, torch.ones(2, dtype=F64), data, solver=NEWTON, linsys=Exact(), batched=batched)


def test_a_captured_tensor_that_only_the_outer_loss_uses_without_theta_or_phi_is_an_error() -> None:
    weight = torch.ones((), dtype=F64, requires_grad=True)
    problem = toy(lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: weight**2)
    with pytest.raises(ValueError, match="outer_loss uses a tensor that carries a gradient"):
        hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=Exact())


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf of theta", "computed"])
@pytest.mark.parametrize("batched", [True, False])
def test_data_that_were_computed_from_theta_are_an_error(leaf: bool, batched: bool) -> None:
    """That part of the gradient would be missing without a word."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta["a"] * data["x"][0]) ** 2).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta["a"]),
    )
    shape = (3, 2) if batched else (2,)
    theta = {name: torch.ones(shape, dtype=F64, requires_grad=True) for name in ("a", "b")}
    options: Any = {"batched": batched, "theta_batched": batched, "allow_unused": True}
    data = {"labels": torch.arange(3), "x": [theta["b"] if leaf else theta["b"] * 2, None]}
    calls = {
        "hypergradient": lambda d: hypergradient(problem, theta, d, solver=NEWTON, linsys=CG(max_steps=4), **options),
        "implicit_gradient": lambda d: implicit_gradient(
            problem, torch.ones(shape, dtype=F64), theta, d, linsys=CG(max_steps=4), **options
        ),
        "unrolled": lambda d: bilevel.unrolled(problem, theta, d, solver=NewtonCG(max_steps=2), **options),
    }
    for name, call in calls.items():
        got = "a leaf of theta" if leaf else "a tensor with a graph"
        match = rf"^data\['x'\]\[0\]: expected a constant, got {got}. {name} differentiates in theta alone"
        with pytest.raises(ValueError, match=match):
            call(data)
        call({**data, "x": [data["x"][0].detach(), None]})
        call({**data, "x": [torch.ones(shape, dtype=F64, requires_grad=True), None]})  # a leaf that is none of theta
    solve(problem, theta, data, solver=NEWTON, batched=batched, theta_batched=batched)  # which promises no derivative


def test_captured_constants_are_fine() -> None:
    weight = torch.full((2,), 3.0, dtype=F64)
    problem = toy(
        lambda phi, theta, data: ((phi - weight * theta) ** 2).sum(), lambda phi, theta, data: (weight * phi).sum()
    )
    assert_near(
        hypergradient(problem, torch.ones(2, dtype=F64), solver=NEWTON, linsys=Exact()).unwrap(),
        torch.full((2,), 9.0, dtype=F64),
        1e-12,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The user's tensors and modes.


@pytest.mark.parametrize("grad_mode", ["enabled", "no_grad"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", PROBLEMS, **IDS)
def test_the_users_tensors_are_as_they_were(case: Case, requires_grad: bool, grad_mode: str) -> None:
    own = lambda tree: tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)  # noqa: E731
    theta, data, init = own(case.theta), own(case.data), own(case.phi_star(case.theta, case.data))
    tensors = [leaf for leaf in flatten((theta, data, init))[0] if isinstance(leaf, Tensor)]
    for leaf in tensors:
        leaf.requires_grad_(requires_grad and leaf.is_floating_point())
    before = [(leaf.detach().clone(), leaf.requires_grad, leaf._version, leaf.data_ptr()) for leaf in tensors]
    for solver, start in itertools.product((GradientDescent(step_size=0.01, max_steps=3), NEWTON), (None, init)):
        with torch.set_grad_enabled(grad_mode == "enabled"):
            got = hypergradient(case.problem, theta, data, solver=solver, linsys=CG(max_steps=5), init=start)
        for leaf in flatten((got.grad, got.phi, got.linear.value))[0]:
            assert not leaf.requires_grad and leaf.grad_fn is None
        assert not got.outer.requires_grad
        implicit_gradient(case.problem, init, theta, data, linsys=Exact())
    for leaf, (value, grad_flag, version, pointer) in zip(tensors, before, strict=True):
        assert (
            torch.equal(leaf, value)
            and leaf.requires_grad == grad_flag
            and leaf._version == version
            and leaf.data_ptr() == pointer
        )
        assert leaf.grad is None and leaf.grad_fn is None


def test_the_results_do_not_alias_the_users_tensors() -> None:
    """phi starts at theta: writing into the answer must not move theta."""
    case = PROBLEMS[2]
    theta = tree_map(torch.clone, case.theta)
    before = vector(theta).clone()
    for got in (
        hypergradient(
            case.problem, theta, case.data, solver=GradientDescent(step_size=0.01, max_steps=1), linsys=Identity()
        ),
        hypergradient(case.problem, theta, case.data, solver=NEWTON, linsys=Exact()),
        implicit_gradient(case.problem, tree_map(torch.clone, theta), theta, case.data, linsys=Identity()),
    ):
        for leaf in flatten((got.phi, got.grad))[0]:
            leaf.fill_(7.0)
        assert torch.equal(vector(theta), before)


def test_a_theta_on_a_graph_is_taken_as_a_number() -> None:
    """theta = f(w) with a graph: the result is dF/dtheta, ready for theta.backward(grad)."""
    case = PROBLEMS[0]
    w = normal(8, 4).requires_grad_()
    theta = torch.tanh(w)
    got = hypergradient(case.problem, theta, case.data, solver=NEWTON, linsys=Exact())
    theta.backward(got.unwrap())
    assert_near(w.grad, torch.func.grad(lambda w: case.outer(torch.tanh(w), case.data))(w.detach()), 1e-9)


def test_parameters_of_a_module_as_theta() -> None:
    case = PROBLEMS[0]
    theta = torch.nn.Parameter(case.theta.clone())
    got = hypergradient(case.problem, theta, case.data, solver=NEWTON, linsys=Exact())
    assert theta.grad is None
    theta.grad = got.unwrap()
    torch.optim.SGD([theta], lr=0.1).step()
    assert_near(theta.detach(), case.theta - 0.1 * torch.func.grad(case.outer)(case.theta, case.data), 1e-9)


def test_data_that_are_not_tensors_are_carried() -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (
            data["scale"] * ((phi - theta) ** 2).sum() + (0 if data["nothing"] is None else torch.nan)
        ),
        lambda phi, theta, data: (phi**2).sum() if data["kind"] == "square" else phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    data = {"scale": 2, "kind": "square", "nothing": None, "mask": torch.tensor([True, False])}
    theta = torch.tensor([1.0, 2.0], dtype=F64)
    assert_near(hypergradient(problem, theta, data, solver=NEWTON, linsys=Exact()).unwrap(), 2 * theta, 1e-12)


def test_no_data_at_all() -> None:
    problem = toy(lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: (phi**2).sum())
    theta = torch.tensor([1.0, 2.0], dtype=F64)
    assert_near(hypergradient(problem, theta, solver=NEWTON, linsys=Exact()).unwrap(), 2 * theta, 1e-12)
    both = hypergradient(
        problem,
        torch.stack([theta, 3 * theta]),
        solver=NEWTON,
        linsys=Exact(),
        batched=True,
        theta_batched=True,
        reduction="sum",
    )
    assert_near(both.unwrap(), 2 * torch.stack([theta, 3 * theta]), 1e-12)


@pytest.mark.parametrize("call", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("what", ["hypergradient", "implicit_gradient", "solve"])
def test_the_functions_that_return_numbers_refuse_transforms(what: str, call: str) -> None:
    case = PROBLEMS[0]

    def outer(theta: Tensor) -> Tensor:
        if what == "solve":
            return solve(case.problem, theta, case.data, solver=NEWTON).value.sum()
        if what == "hypergradient":
            return hypergradient(case.problem, theta, case.data, solver=NEWTON, linsys=Exact()).outer
        return implicit_gradient(case.problem, torch.ones(4, dtype=F64), theta, case.data, linsys=Exact()).outer

    apply: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(outer)(case.theta),
        "vmap": lambda: torch.func.vmap(outer)(torch.stack([case.theta, case.theta])),
        "jvp": lambda: torch.func.jvp(outer, (case.theta,), (case.theta,)),
    }
    with pytest.raises(
        TypeError,
        match=rf"{what} returns plain numbers and cannot run under a torch.func transform. Use bilevel.argmin",
    ):
        apply[call]()


# ----------------------------------------------------------------------------------------------------------------------
# Counting.


def test_the_costs_are_counted_and_paid_once() -> None:
    """12 gradients in the inner solve and one, shared, at its end; one product for each CG step (rtol = 0: the residual is free)."""
    calls = {"inner": 0}
    case = PROBLEMS[0]

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        calls["inner"] += 1
        return case.problem.inner_objective(phi, theta, data)

    problem = BilevelProblem.from_functions(inner, case.problem.outer_loss, case.problem.initial_phi)
    got = hypergradient(
        problem,
        case.theta,
        case.data,
        solver=GradientDescent(step_size=0.02, max_steps=12),
        linsys=CG(max_steps=3, rtol=0.0),
    )
    assert (got.inner.num_grads, got.linear.num_matvecs, got.linear.num_steps) == (13, 3, 3)
    assert calls["inner"] == 13


def test_hypergradient_is_solve_and_then_implicit_gradient() -> None:
    for case in PROBLEMS:
        solver = GradientDescent(step_size=0.5 / case.lipschitz, max_steps=9)
        together = hypergradient(case.problem, case.theta, case.data, solver=solver, linsys=CG(max_steps=4, rtol=0.0))
        run = solve(case.problem, case.theta, case.data, solver=solver)
        apart = implicit_gradient(case.problem, run.value, case.theta, case.data, linsys=CG(max_steps=4, rtol=0.0))
        assert torch.equal(vector(run.value), vector(together.phi))
        assert torch.equal(vector(apart.grad), vector(together.grad))
        assert torch.equal(run.residual, together.inner.residual)
        assert isinstance(together, Hypergradient) and bilevel.Hypergradient is Hypergradient


def test_gauss_newton_steps_from_a_start_that_all_tasks_share() -> None:
    """A theta of one tensor is that start as a view; one Gauss-Newton step solves this linear least-squares problem."""
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = ProximalProblem.from_model(
        lambda phi, x: x @ phi, lambda out, x: 0.5 * (out - 1).square().sum(), lambda phi, x: phi.sum(), 1.0
    )
    theta = torch.tensor([0.5, -1.0], dtype=torch.float64)
    solver = NewtonCG(max_steps=1, cg_steps=4, curvature=GaussNewton())
    found = bilevel.solve(problem, theta, x, solver=solver, batched=True).unwrap()
    expected = torch.linalg.solve(x.mT @ x + torch.eye(2, dtype=torch.float64), x.sum(1) + theta)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_gradient_with_a_row_for_each_task_is_not_handed_out_where_one_failed(reduction: Any) -> None:
    """Its row is NaN, which an optimizer would take."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta).square().sum() * (1 + 0 * data.sum()),
        lambda phi, theta, data: phi.sin().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta, data = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    data[1] = torch.nan
    options: Any = {"solver": NewtonCG(max_steps=3), "linsys": CG(max_steps=3), "batched": True, "reduction": reduction}
    found = bilevel.hypergradient(problem, theta, data, theta_batched=True, **options)
    assert found.ok.tolist() == [True, False, True] and found.grad[1].isnan().all()
    with pytest.raises(bilevel.SolverError, match="NON_FINITE"):
        found.unwrap()
    with pytest.raises(bilevel.SolverError):
        found.assign_grad(theta)
    assert theta.grad is None
    shared = bilevel.hypergradient(problem, theta[0], data, **options)
    if reduction == "none":
        with pytest.raises(bilevel.SolverError):
            shared.unwrap()
    else:
        assert shared.unwrap().isfinite().all()


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_the_default_dtype_does_not_matter(case: Case, solver: str) -> None:
    """float32 stays float32 where PyTorch's default is float64."""
    case = case.to(torch.float32)
    method = inner_solvers(case, 1e-3)[solver]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = bilevel.hypergradient(case.problem, case.theta, case.data, solver=method, linsys=CG(max_steps=30))
        assert found.inner is not None
        tensors = flatten((found.grad, found.phi, found.outer, found.inner.residual, found.linear.residual))[0]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    finally:
        torch.set_default_dtype(before)


def test_a_gradient_whose_square_is_no_number_is_not_zero() -> None:
    """In float32. No tolerance was asked for, so it is not met."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, _: 1e-25 * ((w - theta).square().sum()),
        lambda w, theta, _: w.sum(),
        lambda theta, _: 0 * theta,
    )
    found = bilevel.solve(problem, torch.ones(2), solver=GradientDescent(step_size=0.1, max_steps=3))
    assert found.status is bilevel.Status.MAX_STEPS and found.residual == pytest.approx(2e-25, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# What a result says of a point that is no solution.


def quadratic(theta: Tensor, a: Tensor) -> tuple[bilevel.BilevelProblem, Tensor]:
    """G = a (phi - theta)^2 / 2, L = phi^2 / 2: phi* = theta, F' = theta."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, a: 0.5 * (a * (phi - theta).square()).sum(),
        lambda phi, theta, a: 0.5 * phi.square().sum(),
        lambda theta, a: torch.zeros_like(theta),
    )
    return problem, a


def test_unwrap_can_ask_for_solves_that_converged() -> None:
    theta, a = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=F64)
    problem, data = quadratic(theta, a)
    one_step = GradientDescent(step_size=1.0, max_steps=1, tol=1e-9)
    linsys = CG(max_steps=5, rtol=1e-12)
    # with a = (1, 1) one step of length 1 is enough; with (1, 3) it is not, and ends at 3 theta
    short = hypergradient(problem, theta, data[0], solver=one_step, linsys=linsys)
    assert short.ok and short.unwrap() is short.grad and short.inner is not None
    assert short.inner.status is Status.MAX_STEPS or short.inner.failed
    with pytest.raises(
        bilevel.SolverError, match=r"^inner solve: 1 of 1 not converged.\ninner solve: MAX_STEPS after 1 steps"
    ):
        hypergradient(
            problem, theta, data[0], solver=GradientDescent(step_size=0.1, max_steps=1, tol=1e-9), linsys=linsys
        ).unwrap(check="converged")
    good = hypergradient(
        problem, theta, data[1], solver=GradientDescent(step_size=1.0, max_steps=3, tol=1e-9), linsys=linsys
    )
    torch.testing.assert_close(good.unwrap(check="converged"), theta)
    slow = GradientDescent(step_size=0.9, max_steps=5, tol=1e-3)
    both = hypergradient(problem, theta, torch.stack([a[1], 0.01 * a[1]]), solver=slow, linsys=linsys, batched=True)
    assert both.num_ok == 2 and both.unwrap() is both.grad
    with pytest.raises(bilevel.SolverError, match="^inner solve: 1 of 2 not converged."):
        both.unwrap(check="converged")
    cut = hypergradient(
        problem, theta, data[0], solver=NewtonCG(max_steps=3, tol=1e-9), linsys=CG(max_steps=1, rtol=1e-12)
    )
    with pytest.raises(bilevel.SolverError, match="^linear solve: 1 of 1 not converged."):
        cut.unwrap(check="converged")
    assert good.unwrap(check=True) is good.unwrap(check="failed") is good.grad


def test_a_task_that_failed_is_not_asked_whether_it_converged() -> None:
    theta = torch.tensor([1.0, -2.0], dtype=F64)
    problem, a = quadratic(theta, torch.tensor([[1.0, 3.0], [torch.nan, 1.0]], dtype=F64))
    found = hypergradient(
        problem, theta, a, solver=NewtonCG(max_steps=3, tol=1e-9), linsys=CG(max_steps=5, rtol=1e-12), batched=True
    )
    assert found.num_ok == 1
    torch.testing.assert_close(found.unwrap(check="converged"), theta)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_slope_is_that_of_the_objective_at_phi(chunk_size: int | None) -> None:
    theta = torch.tensor([1.0, -2.0], dtype=F64)
    problem, a = quadratic(theta, 1 + torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64))
    phi = normal(7, 3, 2)
    found = implicit_gradient(problem, phi, theta, a, linsys=Exact(), batched=True, chunk_size=chunk_size)
    expected = (a * (phi - theta)).norm(dim=-1)
    assert found.slope is not None and found.inner is None
    torch.testing.assert_close(found.slope, expected)
    assert f"phi, as it was handed in: |dG/dphi| = {float(expected.max()):.3e} at most" in found.describe()
    one = implicit_gradient(problem, phi[0], theta, a[0], linsys=Exact())
    assert one.slope is not None and float(one.slope) == pytest.approx(float(expected[0]))
    assert f"handed in: |dG/dphi| = {float(expected[0]):.3e}\n" in one.describe()
    solved = hypergradient(problem, theta, a, solver=NewtonCG(max_steps=3, tol=1e-9), linsys=Exact(), batched=True)
    assert solved.slope is not None and solved.inner is not None and "handed in" not in solved.describe()
    torch.testing.assert_close(solved.slope, solved.inner.residual)
