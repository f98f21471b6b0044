"""Problems: every form of lambda against the dense quadratic form, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, ProximalProblem, solvers
from bilevel.linsys import CG, Identity

# theta = {"w": (2, 2), "b": (2,)}: d = 6, ravel order b_0 b_1 w_00 w_01 w_10 w_11


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tree(seed: int) -> dict[str, Tensor]:
    return {"w": normal(seed, 2, 2), "b": normal(seed + 100, 2)}


def permuted(leaves: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(leaves.items()))


def vector(leaves: dict[str, Tensor]) -> np.ndarray:
    """The ravel order, by hand."""
    return np.concatenate([leaves["b"].numpy().ravel(), leaves["w"].numpy().ravel()])


def spd(d: int, seed: int = 3) -> Tensor:
    a = normal(seed, d, d)
    return a @ a.mT + d * torch.eye(d, dtype=torch.float64)


DIAGONAL = {
    "w": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64),
    "b": torch.tensor([0.5, 0.25], dtype=torch.float64),
}
PER_LEAF = np.diag([3.0, 3.0, 0.5, 0.5, 0.5, 0.5])

# lambda as the user gives it, and its dense matrix
FORMS: dict[str, tuple[Any, np.ndarray]] = {
    "float": (0.7, 0.7 * np.eye(6)),
    "int": (2, 2.0 * np.eye(6)),
    "numpy float": (np.float32(0.5), 0.5 * np.eye(6)),
    "0-d tensor": (torch.tensor(0.7, dtype=torch.float64), 0.7 * np.eye(6)),
    "per leaf": ({"w": 0.5, "b": 3}, PER_LEAF),
    "per leaf, permuted": ({"b": 3, "w": 0.5}, PER_LEAF),
    "per leaf, 0-d tensors": ({"w": torch.tensor(0.5), "b": torch.tensor(3.0)}, PER_LEAF),
    "diagonal": (DIAGONAL, np.diag([0.5, 0.25, 1, 2, 3, 4])),
    "diagonal, permuted": (permuted(DIAGONAL), np.diag([0.5, 0.25, 1, 2, 3, 4])),
    "mixed": ({"b": 3.0, "w": DIAGONAL["w"]}, np.diag([3.0, 3, 1, 2, 3, 4])),
    "matrix": (spd(6), spd(6).numpy()),
    "matrix with negative entries": (spd(6, seed=8), spd(6, seed=8).numpy()),
}


def zero(phi: Any, data: Any) -> Tensor:
    return 0 * phi["w"].sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("permute", [False, True])
def test_lambda_is_its_dense_matrix(form: str, permute: bool) -> None:
    lam, dense = FORMS[form]
    problem = ProximalProblem.from_losses(zero, zero, lam)
    phi, theta, v = tree(1), tree(2), tree(5)
    if permute:
        phi, v = permuted(phi), permuted(v)
    step = vector(phi) - vector(theta)
    expected = 0.5 * step @ dense @ step
    np.testing.assert_allclose(problem.regulariser(phi, theta).item(), expected, rtol=1e-12)
    np.testing.assert_allclose(problem.inner_objective(phi, theta).item(), expected, rtol=1e-12)
    np.testing.assert_allclose(vector(problem.curvature_product(v)), dense @ vector(v), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(vector(problem.curvature_inverse(v)), np.linalg.solve(dense, vector(v)), rtol=1e-11)
    for damping in (0.3, 2.0, 0.3):
        damped = np.linalg.solve(dense + damping * np.eye(6), vector(v))
        np.testing.assert_allclose(vector(problem.curvature_inverse(v, damping=damping)), damped, rtol=1e-11)
    assert list(problem.curvature_product(v)) == list(v) and problem.knows_curvature


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_takes_the_dtype_of_theta(form: str, dtype: torch.dtype) -> None:
    lam, dense = FORMS[form]
    problem = ProximalProblem.from_losses(zero, zero, lam)
    v = {key: leaf.to(dtype) for key, leaf in tree(5).items()}
    for result, expected in (
        (problem.curvature_product(v), dense @ vector(tree(5))),
        (problem.curvature_inverse(v), np.linalg.solve(dense, vector(tree(5)))),
    ):
        assert {leaf.dtype for leaf in result.values()} == {dtype}
        np.testing.assert_allclose(
            vector(result),
            expected,
            rtol=1e-5 if dtype == torch.float32 else 1e-11,
            atol=1e-5 if dtype == torch.float32 else 1e-12,
        )
    assert problem.regulariser(v, v).dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_lambda_in_a_batched_solve(form: str) -> None:
    """With linear losses c.phi: phi* = theta - Lambda^{-1} c, and dF/dtheta = c whatever Lambda is."""
    lam, dense = FORMS[form]

    def linear(phi: Any, data: Any) -> Tensor:
        return (data["w"] * phi["w"]).sum() + (data["b"] * phi["b"]).sum()

    problem = ProximalProblem.from_losses(linear, linear, lam)
    theta, data = tree(2), {"w": normal(7, 3, 2, 2), "b": normal(8, 3, 2)}
    newton = solvers.NewtonCG(max_steps=5, cg_steps=10, tol=1e-11)
    result = bilevel.hypergradient(
        problem,
        permuted(theta),
        data,
        solver=newton,
        linsys=CG(max_steps=20, rtol=1e-13),
        batched=True,
        reduction="none",
    )
    phi, grad = result.phi, result.unwrap()
    for i in range(3):
        c = vector({key: leaf[i] for key, leaf in data.items()})
        ours = vector({key: leaf[i] for key, leaf in phi.items()})
        np.testing.assert_allclose(ours, vector(theta) - np.linalg.solve(dense, c), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(vector({key: leaf[i] for key, leaf in grad.items()}), c, rtol=1e-9, atol=1e-9)
    first = bilevel.hypergradient(
        problem, theta, data, solver=newton, linsys=Identity(), batched=True, reduction="none"
    ).unwrap()
    torch.testing.assert_close(first["w"], data["w"])


def test_a_square_theta_has_its_lambda_as_diagonal_or_in_full() -> None:
    theta, step = normal(1, 2, 2), normal(2, 2, 2)

    def product(lam: Tensor) -> Tensor:
        return ProximalProblem.from_losses(
            lambda phi, data: phi.sum(), lambda phi, data: phi.sum(), lam
        ).curvature_product(step)

    diagonal = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(product(diagonal), diagonal * step)
    torch.testing.assert_close(product(spd(4)), (spd(4) @ step.reshape(-1)).reshape(2, 2))
    problem = ProximalProblem.from_losses(lambda phi, data: 0 * phi.sum(), lambda phi, data: phi.sum(), diagonal)
    torch.testing.assert_close(problem.regulariser(theta + step, theta), 0.5 * (diagonal * step**2).sum())


def test_a_diagonal_with_negative_entries_is_refused_although_it_is_a_positive_definite_matrix() -> None:
    """For a 2 x 2 theta this is the diagonal (2, -1, -1, 2); construction cannot know, use must."""
    lam = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    problem = ProximalProblem.from_losses(lambda phi, data: 0 * phi.sum(), lambda phi, data: phi.sum(), lam)
    assert problem.curvature_product(torch.ones(2, dtype=torch.float64)).tolist() == [1.0, 1.0]  # a vector: the matrix
    with pytest.raises(ValueError, match="lam: expected positive"):
        problem.curvature_product(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="lam: expected positive"):
        problem.curvature_inverse(torch.ones(2, 2, dtype=torch.float64))


def test_lambda_is_a_copy() -> None:
    lam = {"w": DIAGONAL["w"].clone(), "b": DIAGONAL["b"].clone()}
    problem = ProximalProblem.from_losses(zero, zero, lam)
    before = vector(problem.curvature_product(tree(5)))
    lam["w"].zero_()
    np.testing.assert_array_equal(vector(problem.curvature_product(tree(5))), before)


@pytest.mark.parametrize(
    ("lam", "error", "match"),
    [
        (torch.tensor(1.0, requires_grad=True), TypeError, r"lam: got a tensor that requires grad.*lam.detach\(\)"),
        ({"w": 1.0, "b": torch.ones(2, requires_grad=True)}, TypeError, "requires grad"),
        (0.0, ValueError, "lam: expected positive numbers or a symmetric positive definite matrix, got 0.0"),
        (-1.0, ValueError, "lam: expected positive"),
        (float("nan"), ValueError, "lam: expected positive"),
        (float("inf"), ValueError, "lam: expected positive"),
        (torch.tensor(-2.0), ValueError, "lam: expected positive"),
        ({"w": 1.0, "b": 0.0}, ValueError, "lam: expected positive"),
        ({"w": torch.tensor([[1.0, float("nan")], [1, 1]]), "b": 1.0}, ValueError, "lam: expected positive"),
        ({"w": torch.tensor([[1.0, -1.0], [1, 1]]), "b": 1.0}, ValueError, "lam: expected positive"),
        (torch.tensor([[1.0, -2.0], [-2.0, 1.0]]), ValueError, "lam: expected positive"),
        (torch.tensor([[2.0, 0.0], [1.0, 2.0]]) - 0.1, ValueError, "lam: expected positive"),
        (torch.full((3, 3), float("nan")), ValueError, "lam: expected positive"),
        (True, TypeError, "lam: expected positive numbers or real floating tensors, got bool"),
        ("0.5", TypeError, "lam: expected positive numbers or real floating tensors, got str"),
        (None, TypeError, "lam: expected positive numbers or real floating tensors, got NoneType"),
        (1j, TypeError, "lam: expected positive numbers or real floating tensors, got complex"),
        (torch.tensor(1), TypeError, "lam: expected positive numbers or real floating tensors, got Tensor"),
        (torch.tensor(1j), TypeError, "lam: expected positive numbers or real floating tensors, got Tensor"),
        (np.ones(3), TypeError, "lam: expected positive numbers or real floating tensors, got ndarray"),
    ],
)
def test_a_bad_lambda_is_refused_at_once(lam: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ProximalProblem.from_losses(zero, zero, lam)


@pytest.mark.parametrize(
    ("lam", "match"),
    [
        (spd(5), r"lam: expected a \(6, 6\) matrix for this theta, got \(5, 5\)"),
        (
            torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(3, 3),
            "symmetric positive definite matrix, got a .6, 6. matrix that has the eigenvalue -3",
        ),
        (spd(6).abs() + torch.ones(6, 6).triu(1), "got a .6, 6. matrix that is not symmetric"),
        (torch.ones(6), "expected a tree like theta with leaves .*, got leaves"),
        ({"w": 1.0}, "expected a tree like theta"),
        ({"w": 1.0, "c": 1.0}, "expected a tree like theta"),
        ([1.0, 2.0], "expected a tree like theta"),
        ({"w": torch.ones(2), "b": 1.0}, r"lam\['w'\]: expected a number or shape \(2, 2\) like theta, got \(2,\)"),
        (
            {"w": torch.ones(1, 1), "b": 1.0},
            r"lam\['w'\]: expected a number or shape \(2, 2\) like theta, got \(1, 1\)",
        ),
    ],
)
def test_a_lambda_that_does_not_match_theta_is_refused_at_use(lam: Any, match: str) -> None:
    problem = ProximalProblem.from_losses(zero, zero, lam)
    for use in (problem.curvature_product, problem.curvature_inverse, lambda v: problem.regulariser(v, v)):
        with pytest.raises(ValueError, match=match):
            use(tree(5))
    with pytest.raises(ValueError, match=match):
        bilevel.solve(problem, tree(2), solver=solvers.GradientDescent(step_size=0.1, max_steps=2))


# --- the ways to write a problem -----------------------------------------------------------------


def test_from_losses_is_the_sum_of_its_parts() -> None:
    problem = ProximalProblem.from_losses(lambda phi, data: data * phi.sum(), lambda phi, data: (phi**data).sum(), 0.5)
    phi, theta = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert problem.train_loss(phi, 3.0).item() == 12.0
    assert problem.inner_objective(phi, theta, 3.0).item() == 12.0 + 0.25 * (1 + 4)
    assert problem.outer_loss(phi, theta, 3.0).item() == problem.test_loss(phi, 3.0).item() == 28.0
    start = problem.initial_phi(theta)
    assert torch.equal(start, theta) and start.data_ptr() != theta.data_ptr()
    assert problem.model is None


def test_from_model_composes_and_remembers_its_model() -> None:
    problem = ProximalProblem.from_model(
        lambda phi, data: data["x"] @ phi,
        lambda outputs, data: ((outputs - data["y"]) ** 2).sum(),
        lambda phi, data: phi.sum(),
        2.0,
    )
    data = {"x": torch.eye(2), "y": torch.tensor([1.0, 1.0])}
    phi, theta = torch.tensor([3.0, 1.0]), torch.tensor([3.0, 0.0])
    assert problem.train_loss(phi, data).item() == 4.0
    assert problem.inner_objective(phi, theta, data).item() == 5.0
    assert problem.model is not None
    predict, output_loss = problem.model
    assert output_loss(predict(phi, data), data).item() == 4.0


def test_a_subclass_needs_two_methods() -> None:
    class Quadratic(ProximalProblem):
        def train_loss(self, phi: Any, data: Any) -> Tensor:
            return (phi**2).sum()

        def test_loss(self, phi: Any, data: Any) -> Tensor:
            return phi.sum()

    solved = bilevel.solve(
        Quadratic(lam=2.0), torch.tensor([1.0, -2.0]), solver=solvers.NewtonCG(max_steps=3, tol=1e-6)
    ).unwrap()
    torch.testing.assert_close(solved, torch.tensor([0.5, -1.0]))  # 2 phi + 2 (phi - theta) = 0

    class Forgetful(ProximalProblem):
        def test_loss(self, phi: Any, data: Any) -> Tensor:
            return phi.sum()

    with pytest.raises(NotImplementedError, match=r"Forgetful must define train_loss\(phi, data\)"):
        Forgetful(lam=1.0).inner_objective(torch.ones(2), torch.ones(2))


def test_a_base_class_says_what_to_use() -> None:
    words = (
        r"^BilevelProblem is a base class: use BilevelProblem.from_functions\(...\) or BilevelProblem.from_model\(...\), or write a "
        r"subclass with inner_objective and outer_loss.$"
    )
    with pytest.raises(TypeError, match=words):
        BilevelProblem(lambda phi, theta, data: phi.sum())  # type: ignore[abstract,call-arg]
    with pytest.raises(
        TypeError, match=r"use ProximalProblem.from_losses\(...\) or ProximalProblem.from_model\(...\), or write"
    ):
        ProximalProblem(1.0)  # type: ignore[abstract]

    class Half(BilevelProblem):
        def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return phi.sum()

    with pytest.raises(TypeError, match=r"^Half is a base class: write a subclass with outer_loss.$"):
        Half()  # type: ignore[abstract]


def test_a_problem_without_a_start_asks_for_one() -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: phi.sum()
    )
    solver = solvers.NewtonCG(max_steps=3, tol=1e-6)
    with pytest.raises(ValueError, match=r"has no initial_phi.*pass init=, or define initial_phi\(theta, data\)"):
        bilevel.solve(problem, torch.ones(2), solver=solver)
    torch.testing.assert_close(
        bilevel.solve(problem, torch.ones(2), init=torch.zeros(2), solver=solver).unwrap(), torch.ones(2)
    )
    assert not problem.knows_curvature and problem.model is None
    with pytest.raises(ValueError, match=r"Identity\(\) needs a problem that knows part of its Hessian"):
        bilevel.hypergradient(problem, torch.ones(2), init=torch.zeros(2), solver=solver, linsys=Identity())


def fine(*args: Any) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: BilevelProblem.from_functions(None, fine),
            r"inner_objective: expected a function of \([a-z, ]*\), got NoneType",
        ),
        (
            lambda: BilevelProblem.from_functions(fine, 3.0),
            r"outer_loss: expected a function of \([a-z, ]*\), got float",
        ),
        (
            lambda: BilevelProblem.from_functions(fine, fine, torch.zeros(3)),
            r"initial_phi: expected a function of \([a-z, ]*\), got Tensor",
        ),
        (
            lambda: ProximalProblem.from_losses("loss", fine, 1.0),
            r"train_loss: expected a function of \([a-z, ]*\), got str",
        ),
        (
            lambda: ProximalProblem.from_losses(fine, None, 1.0),
            r"test_loss: expected a function of \([a-z, ]*\), got NoneType",
        ),
        (
            lambda: ProximalProblem.from_model(None, fine, fine, 1.0),
            r"predict: expected a function of \([a-z, ]*\), got NoneType",
        ),
        (
            lambda: ProximalProblem.from_model(fine, 1, fine, 1.0),
            r"output_loss: expected a function of \([a-z, ]*\), got int",
        ),
        (
            lambda: ProximalProblem.from_model(fine, fine, 1, 1.0),
            r"test_loss: expected a function of \([a-z, ]*\), got int",
        ),
        (
            lambda: BilevelProblem.from_functions(fine, fine, lambda theta: theta),
            r"initial_phi: expected a function of \(theta, data\), got one of \(theta\).$",
        ),
        (
            lambda: BilevelProblem.from_functions(lambda phi, theta: phi.sum(), fine),
            r"inner_objective: expected a function of \(phi, theta, data\), got one of \(phi, theta\).$",
        ),
        (
            lambda: ProximalProblem.from_model(fine, lambda z: z.sum(), fine, 1.0),
            r"output_loss: expected a function of \(outputs, data\), got one of \(z\).$",
        ),
    ],
)
def test_functions_must_be_functions(make: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make()


def test_functions_without_a_signature_and_with_defaults_are_taken() -> None:
    ProximalProblem.from_losses(lambda phi, data=None, *, scale=1.0: phi.sum(), torch.dot, 1.0)
    BilevelProblem.from_functions(max, fine, lambda theta, *rest: theta)
