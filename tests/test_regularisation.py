"""Learned regularisers: every kind against dense algebra in numpy, central differences of an independent solve, and what is refused.

theta["centre"] = {"w": (2, 2), "b": (2,)}: d = 6, ravel order b_0 b_1 w_00 w_01 w_10 w_11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Constants, GaussNewton, LearnedProximalProblem, ProximalProblem, hypergradient
from bilevel.linsys import CG, Exact, Identity
from bilevel.regularisation import Diagonal, Kind, Matrix, PerLeaf, Scalar
from bilevel.solvers import GradientDescent, NewtonCG
from bilevel.trees import flatten, tree_map

F32, F64 = torch.float32, torch.float64
NEWTON = NewtonCG(max_steps=30, cg_steps=20, tol=1e-12)
TIGHT = CG(max_steps=60, rtol=1e-13)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tree(seed: int) -> dict[str, Tensor]:
    return {"w": normal(seed, 2, 2), "b": normal(seed + 100, 2)}


def vector(leaves: dict[str, Any]) -> np.ndarray:
    """The ravel order, by hand."""
    return np.concatenate([np.asarray(leaves["b"]).ravel(), np.asarray(leaves["w"]).ravel()])


def from_vector(x: np.ndarray | Tensor) -> dict[str, Tensor]:
    x = torch.as_tensor(x)
    return {"w": x[2:].reshape(2, 2), "b": x[:2]}


def joined(phi: dict[str, Tensor]) -> Tensor:
    return torch.cat([phi["b"], phi["w"].reshape(4)])


def permuted(leaves: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(leaves.items()))


# ----------------------------------------------------------------------------------------------------------------------
# The four kinds in numpy. A row: the raw parameter as one vector, Lambda from it, and the chain rule back from dF/dLambda.

GROUPS: dict[type[Kind], list[int]] = {Scalar: [6], PerLeaf: [2, 4], Diagonal: [1] * 6}  # entries that share a number


@dataclass(frozen=True)
class Row:
    kind: Kind
    raw: Any

    def numbers(self) -> np.ndarray:
        return vector(self.raw) if isinstance(self.raw, dict) else np.asarray(self.raw).ravel()

    def with_numbers(self, x: np.ndarray) -> Any:
        """The inverse of ``numbers``."""
        if isinstance(self.kind, PerLeaf):
            return {"w": torch.as_tensor(x[1]), "b": torch.as_tensor(x[0])}
        if isinstance(self.kind, Diagonal):
            return from_vector(x)
        return torch.as_tensor(x).reshape(self.raw.shape)

    def dense(self, x: np.ndarray | None = None) -> np.ndarray:
        x = self.numbers() if x is None else x
        if isinstance(self.kind, Matrix):
            lower, pivots = self.factors(x)
            return lower @ np.diag(pivots) @ lower.T
        return np.diag(np.repeat(np.exp(x), GROUPS[type(self.kind)]))

    def factors(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        square = x.reshape(6, 6)
        return np.tril(square, -1) + np.eye(6), np.exp(np.diag(square))

    def chain(self, g: np.ndarray) -> np.ndarray:
        """dF/draw from g with dF = sum(g * dLambda)."""
        if isinstance(self.kind, Matrix):
            lower, pivots = self.factors(self.numbers())
            off = np.tril((g + g.T) @ lower @ np.diag(pivots), -1)
            return (off + np.diag(np.diag(lower.T @ g @ lower) * pivots)).ravel()
        each = np.diag(g) * np.diag(self.dense())
        return np.add.reduceat(each, np.cumsum([0, *GROUPS[type(self.kind)][:-1]]))


ROWS = {
    "scalar": Row(Scalar(), torch.tensor(0.4, dtype=F64)),
    "per leaf": Row(PerLeaf(), {"w": torch.tensor(-0.7, dtype=F64), "b": torch.tensor(0.9, dtype=F64)}),
    "diagonal": Row(Diagonal(), from_vector(np.linspace(-1.5, 1.5, 6))),
    "matrix": Row(Matrix(), 0.6 * normal(9, 6, 6)),
}
KINDS = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def spd(seed: int) -> Tensor:
    a = normal(seed, 6, 6)
    return a @ a.mT / 3 + 0.1 * torch.eye(6, dtype=F64)


def predict(phi: Any, data: Any) -> Tensor:
    return data["root"] @ joined(phi) - data["shift"]


def half_square(outputs: Tensor, data: Any) -> Tensor:
    return 0.5 * outputs.square().sum()


def train(phi: Any, data: Any) -> Tensor:
    return half_square(predict(phi, data), data)


def test(phi: Any, data: Any) -> Tensor:
    step = joined(phi) - data["target"]
    return 0.5 * step @ data["metric"] @ step


test.__test__ = False  # type: ignore[attr-defined]  # the loss, no test


def task(seed: int) -> dict[str, Tensor]:
    return {
        "root": normal(seed, 5, 6),  # rank 5: without the regulariser singular
        "shift": normal(seed + 1, 5),
        "metric": spd(seed + 2),
        "target": normal(seed + 3, 6),
    }


def theta_of(row: Row, seed: int = 1) -> dict[str, Any]:
    return {"centre": tree(seed), "lam": row.raw}


def problem_of(row: Row) -> LearnedProximalProblem:
    return LearnedProximalProblem(train, test, row.kind)


def closed_form(row: Row, centre: np.ndarray, data: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """phi*, dF/dcentre, dF/draw as vectors."""
    lam = row.dense()
    d = {key: leaf.numpy() for key, leaf in data.items()}
    h = d["root"].T @ d["root"] + lam
    phi = np.linalg.solve(h, d["root"].T @ d["shift"] + lam @ centre)
    u = np.linalg.solve(h, d["metric"] @ (phi - d["target"]))
    return phi, lam @ u, row.chain(-np.outer(u, phi - centre))


def numbers_of(row: Row, grad: Any) -> np.ndarray:
    return Row(row.kind, grad).numbers()


def stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def assert_near(got: np.ndarray, expected: np.ndarray, relative: float = 1e-9) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * np.abs(expected).max())


# ----------------------------------------------------------------------------------------------------------------------
# Hypergradients.


@KINDS
@pytest.mark.parametrize("linsys", [TIGHT, Exact()], ids=["cg", "exact"])
@pytest.mark.parametrize("permute", [False, True])
def test_centre_and_lam_together_by_the_closed_form(row: Row, linsys: Any, permute: bool) -> None:
    theta, data = theta_of(row), task(10)
    phi, centre, raw = closed_form(row, vector(theta["centre"]), data)
    if permute:
        theta = permuted({key: permuted(leaf) if isinstance(leaf, dict) else leaf for key, leaf in theta.items()})
    got = hypergradient(problem_of(row), theta, data, solver=NEWTON, linsys=linsys)
    assert list(got.grad) == list(theta) and got.ok
    assert_near(vector(got.phi), phi)
    assert_near(vector(got.grad["centre"]), centre)
    assert_near(numbers_of(row, got.grad["lam"]), raw)


@KINDS
def test_central_differences_of_an_independent_solve(row: Row) -> None:
    """A training loss that is not quadratic, its minimum found by SciPy; not a line of ours."""
    x, y, data = normal(3, 8, 6).numpy(), np.sign(normal(4, 8).numpy()), task(10)
    metric, target = data["metric"].numpy(), data["target"].numpy()

    def outer(centre: np.ndarray, numbers: np.ndarray) -> float:
        lam = row.dense(numbers)

        def slope(phi: np.ndarray) -> np.ndarray:
            return -x.T @ (y / (1 + np.exp(y * (x @ phi)))) + lam @ (phi - centre)

        def hessian(phi: np.ndarray) -> np.ndarray:
            p = 1 / (1 + np.exp(y * (x @ phi)))
            return x.T @ np.diag(p * (1 - p)) @ x + lam

        found = scipy.optimize.root(slope, centre, jac=hessian, tol=1e-14)
        assert np.abs(slope(found.x)).max() < 1e-12
        return float(0.5 * (found.x - target) @ metric @ (found.x - target))

    theta = theta_of(row)
    start, h = np.concatenate([vector(theta["centre"]), row.numbers()]), 1e-5
    steps = h * np.eye(len(start))
    numeric = [
        (outer(*np.split(start + e, [6])) - outer(*np.split(start - e, [6]))) / (2 * h) for e in steps
    ]  # truncation h^2, rounding 1e-15 / h
    xs, ys = torch.as_tensor(x), torch.as_tensor(y)
    problem = LearnedProximalProblem(
        lambda phi, data: torch.nn.functional.softplus(-ys * (xs @ joined(phi))).sum(), test, row.kind
    )
    got = hypergradient(problem, theta, data, solver=NEWTON, linsys=Exact()).unwrap()
    assert_near(np.concatenate([vector(got["centre"]), numbers_of(row, got["lam"])]), np.array(numeric), 1e-8)


@KINDS
def test_with_lam_held_fixed_it_is_the_proximal_problem(row: Row) -> None:
    theta, data = theta_of(row), task(20)
    learned = hypergradient(problem_of(row), theta, data, solver=NEWTON, linsys=TIGHT)
    fixed = ProximalProblem.from_losses(train, test, problem_of(row).lam(theta))
    got = hypergradient(fixed, theta["centre"], data, solver=NEWTON, linsys=TIGHT)
    assert_near(vector(learned.phi), vector(got.phi), 1e-10)
    assert_near(vector(learned.unwrap()["centre"]), vector(got.unwrap()), 1e-10)


X, Y = np.array([[1.0, 0], [0, 2], [1, 1]]), np.array([1.0, 2, 3])
XV, YV = np.array([[1.0, -1], [2, 1]]), np.array([0.0, 1])
RIDGE_TASK = tuple(map(torch.as_tensor, (X, Y, XV, YV)))
BY_FEATURE, SHARED, SHARED_SECOND = [-1.19037271, -0.18491943], -1.37529214, 3.30847853


def fit(w: Tensor, data: Any) -> Tensor:
    return 0.5 * (data[0] @ w - data[1]).square().mean()


def validate(w: Tensor, data: Any) -> Tensor:
    return 0.5 * (data[2] @ w - data[3]).square().mean()


def ridge_by_hand(lam: np.ndarray) -> float:
    w = np.linalg.solve(X.T @ X / 3 + np.diag(lam), X.T @ Y / 3)
    return float(0.5 * np.mean((XV @ w - YV) ** 2))


def test_the_numbers_of_the_ridge_problem_are_those_of_central_differences() -> None:
    """So that what follows compares with arithmetic, and not with a number that came from somewhere."""
    f, h = ridge_by_hand, 1e-4
    steps = h * np.eye(2)
    numeric = [(f(0.5 + e) - f(0.5 - e)) / (2 * h) for e in steps]
    np.testing.assert_allclose(numeric, BY_FEATURE, rtol=0, atol=1e-6)
    both = np.array([h, h])
    np.testing.assert_allclose((f(0.5 + both) - f(0.5 - both)) / (2 * h), SHARED, rtol=0, atol=1e-6)
    second = (f(0.5 + both) - 2 * f(0.5 + 0 * both) + f(0.5 - both)) / h**2
    np.testing.assert_allclose(second, SHARED_SECOND, rtol=0, atol=1e-6)


def test_ridge_with_lambda_itself_as_theta() -> None:
    problem = BilevelProblem.from_functions(
        lambda w, lam, data: fit(w, data) + 0.5 * (lam * w.square()).sum(),
        lambda w, lam, data: validate(w, data),
        lambda lam, data: torch.zeros(2, dtype=F64),
    )
    half = torch.full((2,), 0.5, dtype=F64)
    got = hypergradient(problem, half, RIDGE_TASK, solver=NEWTON, linsys=TIGHT).unwrap()
    np.testing.assert_allclose(got, BY_FEATURE, rtol=0, atol=1e-6)

    def outer(lam: Tensor) -> Tensor:
        return validate(bilevel.argmin(problem, lam, RIDGE_TASK, solver=NEWTON, linsys=Exact()), RIDGE_TASK)

    np.testing.assert_allclose(torch.func.grad(outer)(half), BY_FEATURE, rtol=0, atol=1e-6)
    np.testing.assert_allclose(torch.func.grad(outer)(half[0]), SHARED, rtol=0, atol=1e-6)
    np.testing.assert_allclose(torch.func.hessian(outer)(half[0]), SHARED_SECOND, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Scalar(), PerLeaf(), Diagonal(), Matrix()], ids=repr)
def test_ridge_through_the_parametrisation(kind: Kind) -> None:
    """raw = log lam: dF/dlam = (dF/draw) / lam and F'' = (d2F/draw2 - dF/draw) / lam^2."""
    problem = LearnedProximalProblem(fit, validate, kind)
    theta = problem.initial_theta(torch.zeros(2, dtype=F64), lam=0.5)
    raw = hypergradient(problem, theta, RIDGE_TASK, solver=NEWTON, linsys=TIGHT).unwrap()["lam"]

    def outer(log_lam: Tensor) -> Tensor:
        own = {"centre": theta["centre"], "lam": theta["lam"] * 0 + log_lam}
        return validate(bilevel.argmin(problem, own, RIDGE_TASK, solver=NEWTON, linsys=Exact()), RIDGE_TASK)

    if isinstance(kind, Diagonal | Matrix):
        by_feature = raw if isinstance(kind, Diagonal) else raw.diagonal()
        np.testing.assert_allclose(by_feature / 0.5, BY_FEATURE, rtol=0, atol=1e-6)
    else:
        at = torch.tensor(0.5, dtype=F64).log()
        first, second = torch.func.grad(outer)(at), torch.func.hessian(outer)(at)
        np.testing.assert_allclose(raw / 0.5, SHARED, rtol=0, atol=1e-6)
        np.testing.assert_allclose(first / 0.5, SHARED, rtol=0, atol=1e-6)
        np.testing.assert_allclose((second - first) / 0.25, SHARED_SECOND, rtol=0, atol=1e-6)


@KINDS
@pytest.mark.parametrize("theta_batched", [False, True])
def test_a_batch_of_tasks(row: Row, theta_batched: bool) -> None:
    thetas = [
        {"centre": tree(k), "lam": row.with_numbers(row.numbers() + 0.2 * k)} if theta_batched else theta_of(row)
        for k in range(3)
    ]
    tasks = [task(30 + 7 * k) for k in range(3)]
    got = hypergradient(
        problem_of(row),
        stack(thetas) if theta_batched else thetas[0],
        stack(tasks),
        solver=NEWTON,
        linsys=TIGHT,
        batched=True,
        theta_batched=theta_batched,
        reduction="none",
    ).unwrap()
    for k, (theta, data) in enumerate(zip(thetas, tasks, strict=True)):
        _, centre, raw = closed_form(Row(row.kind, theta["lam"]), vector(theta["centre"]), data)
        own = tree_map(lambda leaf, k=k: leaf[k], got)
        assert_near(vector(own["centre"]), centre)
        assert_near(numbers_of(row, own["lam"]), raw)


@KINDS
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_sick_theta_leaves_the_other_tasks_as_they_were(row: Row, damping: float) -> None:
    def run(sick: float) -> Any:
        thetas = [
            {"centre": tree(k), "lam": row.with_numbers(row.numbers() + (sick if k == 1 else 0.0))} for k in range(3)
        ]
        return hypergradient(
            problem_of(row),
            stack(thetas),
            stack([task(30 + 7 * k) for k in range(3)]),
            solver=NEWTON,
            linsys=TIGHT,
            damping=damping,
            batched=True,
            theta_batched=True,
            reduction="none",
        )

    healthy, got = run(0.0), run(float("nan"))
    assert got.ok.tolist() == [True, False, True] and healthy.ok.all()
    for key in ("centre", "lam"):
        for ours, theirs in zip(flatten(got.grad[key])[0], flatten(healthy.grad[key])[0], strict=True):
            assert torch.equal(ours[[0, 2]], theirs[[0, 2]]) and ours[1].isnan().all()


@KINDS
def test_unrolled_differentiation_tends_to_the_same_gradient(row: Row) -> None:
    """The other route to the derivative: through the steps, and through the start at the centre."""
    theta, data = theta_of(row), task(10)
    _, centre, raw = closed_form(row, vector(theta["centre"]), data)
    largest = np.linalg.eigvalsh(data["root"].T.numpy() @ data["root"].numpy() + row.dense())[-1]
    solver = GradientDescent(step_size=1 / largest, max_steps=2000, tol=1e-12)
    got = bilevel.unrolled(problem_of(row), theta, data, solver=solver).unwrap()
    assert_near(vector(got["centre"]), centre, 1e-7)
    assert_near(numbers_of(row, got["lam"]), raw, 1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# The curvature that the problem knows.


@KINDS
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("permute", [False, True])
def test_products_and_inverses_are_those_of_the_dense_matrix(row: Row, dtype: torch.dtype, permute: bool) -> None:
    cast = lambda leaves: tree_map(lambda leaf: leaf.to(dtype), leaves)  # noqa: E731
    problem, theta, v, dense = problem_of(row), cast(theta_of(row)), cast(tree(5)), row.dense()
    if permute:
        v, theta = permuted(v), permuted(theta)
    relative = 1e-5 if dtype == F32 else 1e-13
    step = vector(v) - vector(theta["centre"])
    np.testing.assert_allclose(problem.regulariser(v, theta), 0.5 * step @ dense @ step, rtol=relative)
    product = problem.curvature_product(v, theta)
    assert list(product) == list(v) and {leaf.dtype for leaf in product.values()} == {dtype}
    assert_near(vector(product), dense @ vector(v), relative)
    for damping in (0.0, 0.3, 2.0):
        inverse = problem.curvature_inverse(v, theta, damping)
        assert {leaf.dtype for leaf in inverse.values()} == {dtype}
        assert_near(vector(inverse), np.linalg.solve(dense + damping * np.eye(6), vector(v)), 10 * relative)


@KINDS
def test_the_regulariser_preconditions_cg(row: Row) -> None:
    """One training example: Lambda^{-1} H is the identity plus rank one, and CG needs two steps whatever Lambda is."""
    wide = Row(row.kind, row.with_numbers(3 * row.numbers()))
    data = {key: leaf[:1] if key in ("root", "shift") else leaf for key, leaf in task(10).items()}
    got = hypergradient(problem_of(wide), theta_of(wide), data, solver=NEWTON, linsys=CG(max_steps=60, rtol=1e-9))
    assert got.ok and got.linear.num_steps <= 2


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_damped_matrix_that_cholesky_would_give_up_on(dtype: torch.dtype) -> None:
    """Lambda + damping I, formed in this dtype, is singular as far as its digits say; its inverse is asked for all the same."""
    a, s = 1e4, {F32: 1e-7, F64: 1e-15}[dtype]
    raw = torch.tensor([[np.log(a), 0.0], [3.0, np.log(s)]], dtype=dtype)
    assert s < 1e-2 * torch.finfo(dtype).eps * a  # the damping is lost where the two are added
    # the inverse of [[a + s, 3 a], [3 a, 9 a + 2 s]] by hand, where nothing cancels
    expected = np.array([3 * a + 2 * s, 2 * s - a]) / (11 * a * s + 2 * s * s)
    got = Matrix().inverse(raw, torch.tensor([1.0, 2.0], dtype=dtype), s)
    assert_near(got.double().numpy(), expected, 1e-2)


def dense_formula(row: Row, h: np.ndarray, phi: np.ndarray, centre: np.ndarray, data: Any) -> tuple[np.ndarray, ...]:
    """The implicit gradient at phi with h in the place of the Hessian."""
    u = np.linalg.solve(h, data["metric"].numpy() @ (phi - data["target"].numpy()))
    return row.dense() @ u, row.chain(-np.outer(u, phi - centre))


@KINDS
@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("what", ["hessian", "gauss-newton", "identity"])
def test_every_curvature_is_its_dense_matrix(row: Row, what: str, damping: float) -> None:
    """At a point that is not solved, with outputs that are not linear, so that H, Gauss-Newton and Lambda differ."""

    def bent(phi: Any, data: Any) -> Tensor:
        return torch.sin(predict(phi, data))

    problem = LearnedProximalProblem.from_model(bent, half_square, test, row.kind)
    theta, data, phi = theta_of(row), task(10), from_vector(0.3 * normal(8, 6))
    x = joined(phi)
    j = torch.func.jacrev(lambda x: bent(from_vector(x), data))(x).numpy()
    h = torch.func.hessian(lambda x: half_square(bent(from_vector(x), data), data))(x).numpy()
    matrix = {"hessian": h, "gauss-newton": j.T @ j, "identity": 0 * h}[what] + row.dense() + damping * np.eye(6)
    centre, raw = dense_formula(row, matrix, x.numpy(), vector(theta["centre"]), data)
    got = bilevel.implicit_gradient(
        problem,
        phi,
        theta,
        data,
        linsys=Identity() if what == "identity" else Exact(),
        curvature=GaussNewton() if what == "gauss-newton" else bilevel.Hessian(),
        damping=damping,
    ).grad
    assert_near(vector(got["centre"]), centre)
    assert_near(numbers_of(row, got["lam"]), raw)
    assert what == "hessian" or np.abs(h + row.dense() + damping * np.eye(6) - matrix).max() > 0.1


@KINDS
def test_gauss_newton_in_a_batch(row: Row) -> None:
    """Linear outputs: Gauss-Newton is the Hessian, so the closed form holds."""
    problem = LearnedProximalProblem.from_model(predict, half_square, test, row.kind)
    theta, tasks = theta_of(row), [task(30 + 7 * k) for k in range(3)]
    got = hypergradient(
        problem,
        theta,
        {key: torch.stack([data[key] for data in tasks]) for key in tasks[0]},
        solver=NewtonCG(max_steps=30, cg_steps=20, tol=1e-12, curvature=GaussNewton()),
        linsys=TIGHT,
        curvature=GaussNewton(),
        batched=True,
        reduction="sum",
    ).unwrap()
    forms = [closed_form(row, vector(theta["centre"]), data) for data in tasks]
    assert_near(vector(got["centre"]), sum(form[1] for form in forms))
    assert_near(numbers_of(row, got["lam"]), sum(form[2] for form in forms))


@KINDS
def test_identity_differentiates_one_step_with_the_training_gradient_held_fixed(row: Row) -> None:
    """At the solution phi = centre - Lambda^{-1} g, g the training gradient: first-order MAML for the centre, and for lam the
    derivative of the inverse step sizes (Meta-SGD).
    """
    theta, data = theta_of(row), task(10)
    phi, _, _ = closed_form(row, vector(theta["centre"]), data)
    slope = data["metric"].numpy() @ (phi - data["target"].numpy())
    got = hypergradient(problem_of(row), theta, data, solver=NEWTON, linsys=Identity()).grad
    assert_near(vector(got["centre"]), slope)
    g = -row.dense() @ (phi - vector(theta["centre"]))
    h, numeric = 1e-6, []
    for e in h * np.eye(len(row.numbers())):
        ahead, behind = (-np.linalg.solve(row.dense(row.numbers() + sign * e), g) for sign in (1, -1))
        numeric.append(slope @ (ahead - behind) / (2 * h))
    assert_near(numbers_of(row, got["lam"]), np.array(numeric), 1e-8)
    if isinstance(row.kind, Diagonal):
        assert_near(numbers_of(row, got["lam"]), -(phi - vector(theta["centre"])) * slope)


@KINDS
def test_an_error_bound_needs_constants_that_count_the_cross_derivative(row: Row) -> None:
    """d2G/dphi draw = dLambda (phi - centre) changes with phi: nothing about it is known beforehand."""
    problem, theta, data = problem_of(row), theta_of(row), task(10)
    assert problem.constant_cross_norm is None
    loose = GradientDescent(step_size=0.02, max_steps=60)
    lam, h = row.dense(), data["root"].T.numpy() @ data["root"].numpy()
    values = np.linalg.eigvalsh(h + lam)
    known = {"mu": float(values[0]), "L": float(np.linalg.eigvalsh(data["metric"].numpy())[-1])}
    problem.constants = Constants(**known, rho=0.0, everywhere=True)
    assert hypergradient(problem, theta, data, solver=loose, linsys=CG(max_steps=3)).error_bound is None

    def cross(phi: np.ndarray) -> np.ndarray:
        """d2G/dphi dtheta by the chain rule, one row of phi at a time."""
        step = phi - vector(theta["centre"])
        return np.stack([np.concatenate([-lam[i], row.chain(np.outer(np.eye(6)[i], step))]) for i in range(6)])

    phi, centre, raw = closed_form(row, vector(theta["centre"]), data)
    got = hypergradient(problem, theta, data, solver=loose, linsys=CG(max_steps=3))
    # the cross derivative is affine in phi: its Lipschitz constant is at most the root of the summed squares of its slopes
    slopes = [np.linalg.norm(cross(phi + e) - cross(phi), 2) for e in np.eye(6)]
    problem.constants = Constants(
        **known,
        rho=float(np.sqrt(np.sum(np.square(slopes)))),
        C=float(max(np.linalg.norm(cross(phi), 2), np.linalg.norm(cross(vector(got.phi)), 2))),
        everywhere=True,
    )
    error = np.linalg.norm(
        np.concatenate([vector(got.grad["centre"]) - centre, numbers_of(row, got.grad["lam"]) - raw])
    )
    assert error > 1e-6
    bound = hypergradient(problem, theta, data, solver=loose, linsys=CG(max_steps=3)).error_bound
    assert error <= float(bound) < np.inf


# ----------------------------------------------------------------------------------------------------------------------
# The parametrisation.


EXTREME = [0.0, 1.0, -1.0, 20.0, -20.0, 88.0, -88.0, 104.0, -104.0, 1e3, -1e3, 1e30, -1e30, float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", [Scalar(), PerLeaf(), Diagonal(), Matrix()], ids=repr)
def test_lambda_is_positive_for_every_raw_number(kind: Kind, dtype: torch.dtype) -> None:
    """exp alone is 0 below -103 and inf above 88 in float32."""
    problem = LearnedProximalProblem(lambda phi, data: 0 * phi.sum(), lambda phi, data: phi.sum(), kind)
    centre = torch.zeros(2, dtype=dtype)
    for number in EXTREME:
        raw = problem.initial_theta(centre)["lam"] * 0
        raw = (torch.diag(torch.full((2,), number, dtype=dtype)) if raw.ndim == 2 else raw + number).requires_grad_()
        theta = {"centre": centre, "lam": raw}
        lam = problem.lam(theta)
        entries = lam.diagonal() if lam.ndim == 2 else lam
        assert (entries > 0).all() and lam.isfinite().all()
        v = torch.ones(2, dtype=dtype)
        product, inverse = problem.curvature_product(v, theta), problem.curvature_inverse(v, theta)
        for positive in (product, inverse, product.square(), inverse.square()):
            assert (positive > 0).all() and positive.isfinite().all()
        (grad,) = torch.autograd.grad(problem.regulariser(v, theta), raw)
        assert grad.isfinite().all()
        if abs(number) <= 20:
            np.testing.assert_allclose(entries.detach(), np.exp(number), rtol=1e-5 if dtype == F32 else 1e-14)
            assert grad.abs().sum() > 0


def test_a_matrix_with_extreme_entries_off_the_diagonal_has_no_negative_curvature() -> None:
    """L D L^T as formed has, to rounding, negative eigenvalues here; the quadratic form has not."""
    raw = 30 * normal(1, 6, 6).float()
    theta = {"centre": from_vector(torch.zeros(6)), "lam": raw}
    problem = LearnedProximalProblem(train, test, Matrix())
    values, vectors = torch.linalg.eigh(problem.lam(theta))
    assert values[0] < 0
    for direction in vectors.T:
        assert problem.regulariser(from_vector(direction), theta) > 0


def test_the_part_above_the_diagonal_is_not_used() -> None:
    row = ROWS["matrix"]
    theta, data = theta_of(row), task(10)
    other = {**theta, "lam": row.raw.tril() + 7 * torch.ones(6, 6, dtype=F64).triu(1)}
    one, two = (hypergradient(problem_of(row), t, data, solver=NEWTON, linsys=TIGHT).unwrap() for t in (theta, other))
    assert torch.equal(one["lam"], two["lam"]) and one["lam"].triu(1).eq(0).all()


def test_with_a_diagonal_raw_matrix_it_is_the_diagonal_kind() -> None:
    raw, data = from_vector(np.linspace(-1.5, 1.5, 6)), task(10)
    diagonal, matrix = LearnedProximalProblem(train, test, Diagonal()), LearnedProximalProblem(train, test, Matrix())
    one = hypergradient(diagonal, {"centre": tree(1), "lam": raw}, data, solver=NEWTON, linsys=TIGHT).unwrap()
    theta = {"centre": tree(1), "lam": torch.diag(joined(raw))}
    two = hypergradient(matrix, theta, data, solver=NEWTON, linsys=TIGHT).unwrap()
    assert_near(two["lam"].diagonal().numpy(), vector(one["lam"]), 1e-10)


SPD = (spd(6) + spd(7)).round(decimals=3)
PER_LEAF = {"w": 0.5, "b": 3}
ENTRIES = from_vector(np.array([0.5, 0.25, 1, 2, 3, 4]))
STARTS: list[tuple[Kind, Any, np.ndarray]] = [
    (Scalar(), 2, np.full(6, 2.0)),
    (Scalar(), torch.tensor(1e-4, dtype=F64), np.full(6, 1e-4)),
    (Scalar(), np.float32(0.5), np.full(6, 0.5)),
    (PerLeaf(), 0.3, np.full(6, 0.3)),
    (PerLeaf(), PER_LEAF, np.array([3.0, 3, 0.5, 0.5, 0.5, 0.5])),
    (PerLeaf(), permuted(PER_LEAF), np.array([3.0, 3, 0.5, 0.5, 0.5, 0.5])),
    (Diagonal(), 1e5, np.full(6, 1e5)),
    (Diagonal(), PER_LEAF, np.array([3.0, 3, 0.5, 0.5, 0.5, 0.5])),
    (Diagonal(), permuted(ENTRIES), vector(ENTRIES)),
    (Matrix(), 0.7, np.full(6, 0.7)),
    (Matrix(), ENTRIES, vector(ENTRIES)),
    (Matrix(), SPD, SPD.numpy()),
]


@pytest.mark.parametrize(("kind", "lam", "expected"), STARTS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_lambda_in_is_lambda_out(kind: Kind, lam: Any, expected: np.ndarray, dtype: torch.dtype) -> None:
    problem = LearnedProximalProblem(train, test, kind)
    centre = tree_map(lambda leaf: leaf.to(dtype), tree(1))
    theta = problem.initial_theta(centre, lam=lam)
    assert theta["centre"] is centre
    out = problem.lam(theta)
    assert {leaf.dtype for leaf in flatten(out)[0]} == {dtype}
    dense = np.diag(expected) if expected.ndim == 1 else expected
    if isinstance(kind, Matrix):
        got = out.double().numpy()
    elif isinstance(kind, Scalar):
        got = float(out) * np.eye(6)
    else:
        got = np.diag(vector(tree_map(lambda leaf, like: leaf.expand_as(like).double(), out, centre)))
    # exp(log(lam)) has the rounding of log(lam), which grows with its size
    np.testing.assert_allclose(got, dense, rtol=0, atol=(2e-6 if dtype == F32 else 4e-15) * np.abs(dense).max())
    product = problem.curvature_product(tree_map(torch.ones_like, centre), theta)
    np.testing.assert_allclose(vector(product), dense.sum(1), rtol=1e-4 if dtype == F32 else 1e-12)


@pytest.mark.parametrize("kind", [Scalar(), PerLeaf(), Diagonal(), Matrix()], ids=repr)
def test_theta_as_a_training_loop_uses_it(kind: Kind) -> None:
    """The centre is the network's own parameters; lam is a new leaf that requires grad as they do."""
    net, problem = torch.nn.Linear(2, 2).double(), LearnedProximalProblem(train, test, kind)
    theta = problem.initial_theta({"w": net.weight, "b": net.bias}, lam=torch.tensor(2.0, requires_grad=True))
    raw = flatten(theta["lam"])[0]
    assert theta["centre"]["w"] is net.weight and all(leaf.is_leaf and leaf.requires_grad for leaf in raw)
    phi = bilevel.argmin(problem, theta, task(10), solver=NEWTON, linsys=TIGHT)
    problem.outer_loss(phi, theta, task(10)).backward()
    got = hypergradient(problem, theta, task(10), solver=NEWTON, linsys=TIGHT).unwrap()
    for leaf, grad in zip([*raw, net.weight], [*flatten(got["lam"])[0], got["centre"]["w"]], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-9, atol=1e-12)
    start = problem.initial_phi(theta)
    assert torch.equal(start["w"], net.weight) and start["w"].data_ptr() != net.weight.data_ptr()
    assert not flatten(problem.initial_theta(tree(1))["lam"])[0][0].requires_grad


def test_lam_can_be_penalised_in_the_outer_loss() -> None:
    class Penalised(LearnedProximalProblem):
        def outer_loss(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return self.test_loss(phi, data) + self.lam(theta).square()

    theta, data = {"centre": tree(1), "lam": ROWS["scalar"].raw}, task(10)
    plain = hypergradient(problem_of(ROWS["scalar"]), theta, data, solver=NEWTON, linsys=TIGHT).unwrap()
    more = hypergradient(Penalised(train, test, Scalar()), theta, data, solver=NEWTON, linsys=TIGHT).unwrap()
    expected = plain["lam"] + 2 * np.exp(2 * 0.4)  # d exp(raw)^2 / draw
    torch.testing.assert_close(more["lam"], expected)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    ("kind", "theta", "match"),
    [
        (Scalar(), tree(1), r"theta: expected {\"centre\": tree, \"lam\": raw}, got keys \['w', 'b'\].*initial_theta"),
        (
            Scalar(),
            torch.ones(2, dtype=F64),
            r"theta: expected .*, got Tensor. problem.initial_theta\(centre, lam=...\)",
        ),
        (Scalar(), {"centre": tree(1)}, r"theta: expected .*got keys \['centre'\]"),
        (
            Scalar(),
            {"centre": tree(1), "lam": tree(2)},
            r"theta\['lam'\]: expected for Scalar\(\) one tensor, got a tree",
        ),
        (
            Scalar(),
            {"centre": tree(1), "lam": torch.ones(1, dtype=F64)},
            r"expected for Scalar\(\) shape \(\), got \(1,\)",
        ),
        (PerLeaf(), {"centre": tree(1), "lam": tree(2)}, r"theta\['lam'\]\['b'\]: expected for PerLeaf\(\) shape \(\)"),
        (
            Diagonal(),
            {"centre": tree(1), "lam": torch.ones((), dtype=F64)},
            r"Diagonal\(\) a tree with leaves \[\"\['b'\]\", \"\['w'\]\"\], got one tensor",
        ),
        (
            Diagonal(),
            {"centre": tree(1), "lam": {"w": torch.ones(4, dtype=F64), "b": torch.ones(2, dtype=F64)}},
            r"theta\['lam'\]\['w'\]: expected for Diagonal\(\) shape \(2, 2\), got \(4,\)",
        ),
        (Matrix(), {"centre": tree(1), "lam": torch.ones(5, 5, dtype=F64)}, r"Matrix\(\) shape \(6, 6\), got \(5, 5\)"),
    ],
)
def test_a_theta_of_the_wrong_form_is_refused(kind: Kind, theta: Any, match: str) -> None:
    problem = LearnedProximalProblem(train, test, kind)
    for use in (
        lambda: hypergradient(problem, theta, task(10), solver=NEWTON, linsys=TIGHT),
        lambda: bilevel.solve(problem, theta, task(10), solver=NEWTON, init=tree(1)),
        lambda: problem.lam(theta),
        lambda: problem.curvature_product(tree(1), theta),
        lambda: problem.curvature_inverse(tree(1), theta),
    ):
        with pytest.raises(ValueError, match=match):
            use()


@pytest.mark.parametrize(
    ("kind", "lam", "error", "match"),
    [
        (Scalar(), 0.0, ValueError, "lam: expected positive numbers, 5e-18 to 2e.17 for torch.float32, got 0.0"),
        (Scalar(), -1, ValueError, "lam: expected positive numbers"),
        (Scalar(), float("nan"), ValueError, "lam: expected positive numbers"),
        (Scalar(), float("inf"), ValueError, "lam: expected positive numbers"),
        (Scalar(), 1e30, ValueError, "lam: expected positive numbers"),
        (Diagonal(), {"w": 1.0, "b": torch.tensor([1.0, -1.0])}, ValueError, r"lam\['b'\]: expected positive numbers"),
        (
            PerLeaf(),
            {"w": 1.0, "b": torch.ones(2)},
            ValueError,
            r"lam\['b'\]: expected a number or shape \(\), got \(2,\)",
        ),
        (
            Diagonal(),
            {"w": torch.ones(4), "b": 1.0},
            ValueError,
            r"lam\['w'\]: expected a number or shape \(2, 2\), got \(4,\)",
        ),
        (Diagonal(), {"w": 1.0}, ValueError, r"lam: expected a number or a tree with leaves .*'b'.*, got a tree"),
        (Scalar(), {"w": 1.0, "b": 1.0}, ValueError, "lam: expected a number or one tensor, got a tree"),
        (Diagonal(), torch.ones(6), ValueError, "lam: expected a number or a tree with leaves .*, got one tensor"),
        (
            Matrix(),
            torch.eye(5),
            ValueError,
            r"lam: expected a number or a \(6, 6\) matrix for this centre, got \(5, 5\)",
        ),
        (Matrix(), -torch.eye(6), ValueError, "lam: expected a symmetric positive definite matrix"),
        (Matrix(), torch.eye(6) + torch.ones(6, 6).triu(1), ValueError, "lam: expected a symmetric positive definite"),
        (Matrix(), torch.full((6, 6), float("nan")), ValueError, "lam: expected a symmetric positive definite matrix"),
        (Matrix(), 1e30 * torch.eye(6), ValueError, "lam, pivots: expected positive numbers"),
        (Matrix(), torch.eye(6, dtype=torch.int64), TypeError, "lam: expected a real floating matrix, got torch.int64"),
        (Scalar(), True, TypeError, "lam: expected positive numbers or real floating tensors, got bool"),
        (
            Diagonal(),
            {"w": "1", "b": 1.0},
            TypeError,
            r"lam\['w'\]: expected positive numbers or real floating .* got str",
        ),
        (Scalar(), None, TypeError, "lam: expected positive numbers or real floating tensors, got NoneType"),
        (Scalar(), torch.tensor(1), TypeError, "lam: expected positive numbers or real floating tensors, got Tensor"),
        (Scalar(), 1j, TypeError, "lam: expected positive numbers or real floating tensors, got complex"),
    ],
)
def test_a_bad_first_lambda_is_refused(kind: Kind, lam: Any, error: type[Exception], match: str) -> None:
    centre = tree_map(lambda leaf: leaf.float(), tree(1))
    with pytest.raises(error, match=match):
        LearnedProximalProblem(train, test, kind).initial_theta(centre, lam=lam)


def test_the_range_of_lambda_is_that_of_the_dtype() -> None:
    problem = LearnedProximalProblem(train, test, Scalar())
    assert float(problem.lam(problem.initial_theta(tree(1), lam=1e30))) == pytest.approx(1e30)
    assert float(problem.lam(problem.initial_theta(tree(1), lam=1e-30))) == pytest.approx(1e-30)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: LearnedProximalProblem(None, test, Scalar()),
            TypeError,
            r"train_loss: expected a function of \([a-z, ]*\), got NoneType",
        ),
        (
            lambda: LearnedProximalProblem(train, 1, Scalar()),
            TypeError,
            r"test_loss: expected a function of \([a-z, ]*\), got int",
        ),
        (
            lambda: LearnedProximalProblem(train, test, "diagonal"),
            TypeError,
            r"kind: expected Scalar\(\), .* got 'diagonal'",
        ),
        (lambda: LearnedProximalProblem(train, test, Diagonal), TypeError, r"Did you mean Diagonal\(\)\?"),
        (
            lambda: LearnedProximalProblem(train, test, 2.0),
            TypeError,
            r"kind: expected Scalar\(\), PerLeaf\(\), .* got 2.0",
        ),
        (
            lambda: LearnedProximalProblem.from_losses(None, test, Scalar()),
            TypeError,
            r"train_loss: expected a function of \(phi, data\), got NoneType",
        ),
        (
            lambda: LearnedProximalProblem.from_losses(train, test, 2.0),
            TypeError,
            r"kind: expected Scalar\(\), PerLeaf\(\), .* got 2.0",
        ),
        (
            lambda: LearnedProximalProblem.from_model(predict, None, test, Scalar()),
            TypeError,
            r"output_loss: expected a function of \([a-z, ]*\), got NoneType",
        ),
        (
            lambda: LearnedProximalProblem(train, test, Scalar()).initial_theta({"w": 1.0}),
            TypeError,
            r"centre\['w'\]: expected a float32 or float64 tensor, got float",
        ),
        (
            lambda: LearnedProximalProblem(train, test, Scalar()).initial_theta(torch.ones(2, dtype=torch.float16)),
            TypeError,
            "centre: expected a float32 or float64 tensor, got torch.float16",
        ),
        (
            lambda: LearnedProximalProblem(train, test, Scalar()).initial_theta(torch.nn.Linear(2, 1)),
            TypeError,
            r"centre: .*, got Linear; of a module it is dict\(module\.named_parameters\(\)\)",
        ),
        (
            lambda: LearnedProximalProblem(train, test, Scalar()).initial_theta({}),
            ValueError,
            "centre: expected at least one tensor",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_gauss_newton_needs_the_model() -> None:
    row = ROWS["diagonal"]
    with pytest.raises(ValueError, match="GaussNewton.*needs a problem of the form"):
        hypergradient(problem_of(row), theta_of(row), task(10), solver=NEWTON, linsys=TIGHT, curvature=GaussNewton())


# ----------------------------------------------------------------------------------------------------------------------
# Learning it.


def test_the_learned_lambda_is_the_bayes_optimal_one() -> None:
    """Tasks: w = centre + deviations of known size for each coordinate, y = x w + noise. With the mean squared error over n examples
    as training loss, the posterior mean is the proximal solution with lam_j = noise^2 / (n deviation_j^2), and no other lam has a
    smaller expected test loss. The minimum over these tasks, found here by SciPy with numpy alone, is near it; ours must be there.
    """
    count, n, noise = 2000, 4, 0.5
    deviation, truth = np.array([1.0, 0.125, 0.5, 0.25]), np.array([1.0, -2.0, 0.5, 3.0])
    bayes = noise**2 / (n * deviation**2)
    x, x_test = normal(1, count, n, 4).numpy(), normal(2, count, 20, 4).numpy()
    w = truth + deviation * normal(3, count, 4).numpy()
    y = np.einsum("tnd,td->tn", x, w) + noise * normal(4, count, n).numpy()
    y_test = np.einsum("tnd,td->tn", x_test, w)

    def outer(z: np.ndarray) -> float:
        lam, centre = np.exp(z[4:]), z[:4]
        h = np.einsum("tni,tnj->tij", x, x) / n + np.diag(lam)
        phi = np.linalg.solve(h, (np.einsum("tni,tn->ti", x, y) / n + lam * centre)[..., None])[..., 0]
        return float(0.5 * np.mean((np.einsum("tnd,td->tn", x_test, phi) - y_test) ** 2))

    best = scipy.optimize.minimize(outer, np.zeros(8), method="BFGS", options={"gtol": 1e-6})
    problem = LearnedProximalProblem.from_model(
        lambda phi, task: task["x"] @ phi,
        lambda outputs, task: 0.5 * (outputs - task["y"]).square().mean(),
        lambda phi, task: 0.5 * (task["x_test"] @ phi - task["y_test"]).square().mean(),
        Diagonal(),
    )
    theta = problem.initial_theta(torch.zeros(4, dtype=F64, requires_grad=True), lam=1.0)
    tasks = {key: torch.as_tensor(a) for key, a in {"x": x, "y": y, "x_test": x_test, "y_test": y_test}.items()}
    optimizer = torch.optim.LBFGS([theta["centre"], theta["lam"]], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        got = hypergradient(
            problem,
            theta,
            tasks,
            solver=NewtonCG(max_steps=5, cg_steps=4, tol=1e-9),
            linsys=CG(max_steps=8, rtol=1e-9),
            curvature=GaussNewton(),
            batched=True,
        )
        theta["centre"].grad, theta["lam"].grad = got.unwrap()["centre"], got.unwrap()["lam"]
        return got.outer

    optimizer.step(closure)
    lam, centre = problem.lam(theta).detach().numpy(), theta["centre"].detach().numpy()
    np.testing.assert_allclose(lam, np.exp(best.x[4:]), rtol=1e-3)
    np.testing.assert_allclose(centre, best.x[:4], rtol=0, atol=1e-3)
    assert (np.argsort(lam) == np.argsort(bayes)).all()
    np.testing.assert_allclose(
        np.log(lam), np.log(bayes), rtol=0, atol=0.5
    )  # 600 tasks know lam to some tens of per cent
    np.testing.assert_allclose(centre, truth, rtol=0, atol=0.15)
