"""BilevelProblem.from_model: Gauss-Newton of a network whose penalties, weights and inputs depend on theta, against dense algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, GaussNewton, Hessian, ProximalProblem, Status
from bilevel.linsys import CG, Exact, Jacobi
from bilevel.solvers import NewtonCG
from bilevel.testing import Verdict, check_hypergradient
from bilevel.trees import flatten, layout_of

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def predict(phi: Any, theta: Any, data: Any) -> Tensor:
    """A network of two layers on inputs that theta scales."""
    return torch.tanh(data["x"] * theta["scale"].exp() @ phi["in"]) @ phi["out"]


def output_loss(outputs: Tensor, theta: Any, data: Any) -> Tensor:
    """Cross-entropy, each example with a weight."""
    each = torch.nn.functional.cross_entropy(outputs, data["label"], reduction="none")
    return (theta["weight"].sigmoid() * each).sum()


def penalty(phi: Any, theta: Any, data: Any) -> Tensor:
    """Not quadratic, and it couples the leaves."""
    decay = theta["decay"].exp()
    return (
        decay[0] * phi["in"].cosh().sum()
        + decay[1] * (phi["out"].sum() + phi["in"].sum()).square()
        + phi["out"].square().sum()
    )


def outer_loss(phi: Any, theta: Any, data: Any) -> Tensor:
    return (torch.tanh(data["x_test"] @ phi["in"]) @ phi["out"]).square().sum() + theta["decay"].square().sum()


def start(theta: Any, data: Any) -> Any:
    return {"in": 0.3 * normal(20, 3, 2), "out": 0.3 * normal(21, 2, 3)}


PROBLEM = BilevelProblem.from_model(predict, output_loss, outer_loss, start, penalty=penalty)
THETA = {"scale": 0.2 * normal(0, 3), "weight": normal(1, 7), "decay": torch.tensor([-1.0, -2.0], dtype=F64)}


def inputs(seed: int = 0, *batch: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": normal(seed + 2, *batch, 7, 3),
        "label": torch.randint(3, (*batch, 7), generator=generator),
        "x_test": normal(seed + 3, *batch, 4, 3),
    }


def vector(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def dense(phi: Any, theta: Any, data: Any, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """J^T H_out J + penalty'' + damping, and the gradient that follows from it, by torch.func alone."""
    layout, theta_layout = layout_of(phi)[0], layout_of(theta)[0]
    at, t = vector(phi), vector(theta)

    def inner(p: Tensor, t: Tensor) -> Tensor:
        phi, theta = layout.unravel(p), theta_layout.unravel(t)
        return output_loss(predict(phi, theta, data), theta, data) + penalty(phi, theta, data)

    j = torch.func.jacrev(lambda p: predict(layout.unravel(p), theta, data).reshape(-1))(at)
    h_out = torch.func.hessian(lambda z: output_loss(z.reshape(7, 3), theta, data))(
        predict(phi, theta, data).reshape(-1)
    )
    rest = torch.func.hessian(lambda p: penalty(layout.unravel(p), theta, data))(at)
    matrix = j.T @ h_out @ j + rest + damping * torch.eye(len(at), dtype=F64)
    b, a = torch.func.grad(lambda p, t: outer_loss(layout.unravel(p), theta_layout.unravel(t), data), (0, 1))(at, t)
    cross = torch.func.jacrev(torch.func.grad(inner), 1)(at, t)
    return matrix, a - cross.T @ torch.linalg.solve(matrix, b)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize(
    "linsys",
    [CG(max_steps=60, rtol=1e-13), Exact(), CG(max_steps=60, rtol=1e-13, preconditioner=Jacobi())],
    ids=["cg", "exact", "jacobi"],
)
def test_the_gauss_newton_matrix_with_a_penalty(linsys: Any, damping: float, compile: bool) -> None:
    phi, data = {"in": normal(5, 3, 2), "out": normal(6, 2, 3)}, inputs()
    matrix, expected = dense(phi, THETA, data, damping)
    exact = torch.func.hessian(lambda p: PROBLEM.inner_objective(layout_of(phi)[0].unravel(p), THETA, data))(
        vector(phi)
    )
    assert torch.linalg.eigvalsh(matrix)[0] > 0 > torch.linalg.eigvalsh(exact)[0] - damping  # what it is for
    found = bilevel.implicit_gradient(
        PROBLEM, phi, THETA, data, linsys=linsys, curvature=GaussNewton(), damping=damping, compile=compile
    )
    torch.testing.assert_close(vector(found.unwrap()), expected, rtol=1e-9, atol=1e-11)


def test_a_batch_in_chunks() -> None:
    data = inputs(7, 3)
    phi = {"in": normal(8, 3, 3, 2), "out": normal(9, 3, 2, 3)}
    found = bilevel.implicit_gradient(
        PROBLEM,
        phi,
        THETA,
        data,
        linsys=CG(max_steps=60, rtol=1e-13),
        curvature=GaussNewton(),
        batched=True,
        reduction="none",
        chunk_size=2,
    )
    for task in range(3):
        one = {key: leaf[task] for key, leaf in data.items()}
        expected = dense({key: leaf[task] for key, leaf in phi.items()}, THETA, one)[1]
        torch.testing.assert_close(
            vector({key: leaf[task] for key, leaf in found.grad.items()}), expected, rtol=1e-9, atol=1e-11
        )


def test_a_linear_model_has_the_exact_gradient() -> None:
    """Weighted ridge in closed form: phi = (X^T W X + Lambda)^{-1} X^T W y."""
    X, y, Xv = normal(30, 9, 4), normal(31, 9), normal(32, 5, 4)
    problem = BilevelProblem.from_model(
        lambda phi, theta, data: X @ phi,
        lambda z, theta, data: 0.5 * (theta["w"].exp() * (z - y) ** 2).sum(),
        lambda phi, theta, data: (Xv @ phi).square().sum(),
        lambda theta, data: torch.zeros(4, dtype=F64),
        penalty=lambda phi, theta, data: 0.5 * (theta["lam"].exp() * phi**2).sum(),
    )
    theta = {"w": normal(33, 9), "lam": normal(34, 4)}

    def closed(theta: Any) -> Tensor:
        w = theta["w"].exp()
        return (Xv @ (torch.linalg.inv(X.T * w @ X + theta["lam"].exp().diag()) @ (X.T @ (w * y)))).square().sum()

    expected = torch.func.grad(closed)(theta)
    for curvature in (GaussNewton(), Hessian()):
        found = bilevel.hypergradient(
            problem,
            theta,
            solver=NewtonCG(max_steps=9, cg_steps=20, tol=1e-11, curvature=curvature),
            linsys=CG(max_steps=20, rtol=1e-13),
            curvature=curvature,
        ).unwrap()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_without_a_penalty_and_with_one_that_is_linear_or_constant() -> None:
    X = normal(40, 8, 3)
    expected = None
    for rest in (None, lambda phi, theta, data: 3.0 * phi.sum(), lambda phi, theta, data: theta.square().sum()):
        problem = BilevelProblem.from_model(
            lambda phi, theta, data: X @ phi * theta.exp(),
            lambda z, theta, data: z.cosh().sum(),
            lambda phi, theta, data: phi.sum(),
            penalty=rest,
        )
        found = bilevel.implicit_gradient(
            problem, normal(41, 3), torch.tensor(0.3, dtype=F64), linsys=Exact(), curvature=GaussNewton()
        ).unwrap()
        assert expected is None or torch.allclose(found, expected, rtol=1e-12)
        expected = found


def test_a_network_that_its_hessian_cannot_solve() -> None:
    """The reason for all of this: with the Hessian the linear solve meets negative curvature; with Gauss-Newton both solves work."""
    data = inputs()
    phi = {"in": normal(5, 3, 2), "out": normal(6, 2, 3)}
    failed = bilevel.implicit_gradient(PROBLEM, phi, THETA, data, linsys=CG(max_steps=20))
    assert failed.linear.status is Status.NEGATIVE_CURVATURE and "use GaussNewton()" in failed.explain()
    assert bilevel.implicit_gradient(PROBLEM, phi, THETA, data, linsys=CG(max_steps=20), curvature=GaussNewton()).ok
    solver = NewtonCG(max_steps=60, cg_steps=12, tol=1e-9, curvature=GaussNewton())
    solved = bilevel.solve(PROBLEM, THETA, data, solver=solver)
    assert solved.status is Status.CONVERGED
    checked = check_hypergradient(
        PROBLEM, THETA, data, solver=solver, linsys=CG(max_steps=60, rtol=1e-12), curvature=GaussNewton()
    )
    assert checked.ok and checked["curvature"].verdict is Verdict.CHOICE
    matrix, biased = dense(solved.value, THETA, data)
    layout = layout_of(solved.value)[0]
    hessian = torch.func.hessian(lambda p: PROBLEM.inner_objective(layout.unravel(p), THETA, data))(
        vector(solved.value)
    )
    assert torch.linalg.eigvalsh(hessian)[0] > 0 and not torch.allclose(hessian, matrix, rtol=1e-3)
    exact = bilevel.implicit_gradient(PROBLEM, solved.value, THETA, data, linsys=Exact()).unwrap()
    size = float((biased - vector(exact)).norm()) / (2.0**2 + 4.0**2) ** 0.5  # of the larger term, dL/dtheta = 2 decay
    assert checked["curvature"].error == pytest.approx(size, rel=1e-4)


def test_the_objective_is_the_sum_of_its_parts_and_argmin_takes_it() -> None:
    data, phi = inputs(), start(None, None)
    total = output_loss(predict(phi, THETA, data), THETA, data) + penalty(phi, THETA, data)
    assert torch.equal(PROBLEM.inner_objective(phi, THETA, data), total)
    assert PROBLEM.composition is not None and PROBLEM.composition.penalty is penalty
    solver, linsys = NewtonCG(max_steps=60, cg_steps=12, tol=1e-11), CG(max_steps=60, rtol=1e-13)
    mine = bilevel.hypergradient(PROBLEM, THETA, data, solver=solver, linsys=linsys).unwrap()
    through = torch.func.grad(
        lambda theta: outer_loss(bilevel.argmin(PROBLEM, theta, data, solver=solver, linsys=linsys), theta, data)
    )(THETA)
    torch.testing.assert_close(vector(through), vector(mine), rtol=1e-8, atol=1e-10)


def test_words() -> None:
    arguments: dict[str, Any] = {"linsys": CG(max_steps=3), "curvature": GaussNewton()}
    plain = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta).square().sum(), lambda phi, theta, data: phi.sum()
    )
    one = torch.ones(2, dtype=F64)
    with pytest.raises(
        ValueError,
        match=r"GaussNewton\(\) needs a problem of the form .* build it with BilevelProblem.from_model, Prox",
    ):
        bilevel.implicit_gradient(plain, one, one, **arguments)
    with pytest.raises(TypeError, match=r"penalty: expected a function of \(phi, theta, data\), got float"):
        BilevelProblem.from_model(predict, output_loss, outer_loss, penalty=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="outer_loss: expected a function"):
        BilevelProblem.from_model(predict, output_loss, None)  # type: ignore[arg-type]
    vectors = BilevelProblem.from_model(
        lambda phi, theta, data: phi,
        lambda z, theta, data: z.square().sum(),
        lambda phi, theta, data: phi.sum(),
        penalty=lambda phi, theta, data: phi * theta,
    )
    with pytest.raises(ValueError, match=r"expected a 0-d tensor|scalar"):
        bilevel.implicit_gradient(vectors, one, one, **arguments)


def test_proximal_problems_have_the_same_composition() -> None:
    problem = ProximalProblem.from_model(
        lambda phi, data: data["x"] @ phi,
        lambda z, data: (z - data["y"]).square().sum(),
        lambda phi, data: phi.sum(),
        2.0,
    )
    assert problem.composition is not None and problem.composition.penalty is None
    data, phi = {"x": normal(50, 4, 2), "y": normal(51, 4)}, normal(52, 2)
    assert torch.equal(problem.composition.objective(phi, 0 * phi, data), problem.train_loss(phi, data))
    assert (
        ProximalProblem.from_losses(lambda phi, data: phi.sum(), lambda phi, data: phi.sum(), 1.0).composition is None
    )
