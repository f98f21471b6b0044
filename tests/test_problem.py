"""Problems: every form of lambda against the dense quadratic form, and what is refused."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Composition, LearnedProximalProblem, ProximalProblem, Split, solvers
from bilevel.curvature import GaussNewton
from bilevel.linsys import CG, Identity
from bilevel.regularisation import Diagonal, Scalar
from bilevel.testing import check_hypergradient

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


def test_of_a_matrix_the_last_inverse_is_kept_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search over the damping would otherwise keep a d x d matrix for each value."""
    problem, v = ProximalProblem.from_losses(zero, zero, spd(6)), tree(5)
    factorised = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: factorised.append(0) or cholesky(matrix))
    for damping in (0.5, 0.5, 0.25, 0.25, 0.5):
        expected = np.linalg.solve(spd(6).numpy() + damping * np.eye(6), vector(v))
        np.testing.assert_allclose(vector(problem.curvature_inverse(v, damping=damping)), expected, rtol=1e-11)
    assert len(factorised) == 3


def test_the_kept_inverse_may_be_replaced_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one puts that of another damping there between two looks."""
    problem, v = ProximalProblem.from_losses(zero, zero, spd(6)), tree(5)
    kept: dict[float, Any] = {}
    for damping in (0.5, 2.0):
        problem.curvature_inverse(v, damping=damping)
        kept[damping] = problem._weights._last_inverse
    expected = np.linalg.solve(spd(6).numpy() + 0.5 * np.eye(6), vector(v))
    for looks in range(1, 4):
        reads = [kept[0.5]] * looks

        class Replaced:
            def __get__(self, instance: Any, owner: Any = None, reads: list[Any] = reads) -> Any:
                return reads.pop() if reads else kept[2.0]

            def __set__(self, instance: Any, value: Any) -> None:
                pass

        with monkeypatch.context() as patch:
            patch.setattr(type(problem._weights), "_last_inverse", Replaced(), raising=False)
            found = problem.curvature_inverse(v, damping=0.5)
        np.testing.assert_allclose(vector(found), expected, rtol=1e-11)


def test_the_largest_eigenvalue_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ProximalProblem.from_losses(zero, zero, spd(6))
    norm = problem.constant_cross_norm
    np.testing.assert_allclose(norm, np.linalg.eigvalsh(spd(6).numpy())[-1], rtol=1e-12)
    monkeypatch.setattr(torch.linalg, "eigvalsh", None)
    assert problem.constant_cross_norm == norm


def test_lambda_cannot_be_set_where_nothing_would_look_at_it() -> None:
    with pytest.raises(AttributeError):
        ProximalProblem.from_losses(zero, zero, 1.0).lam = 2.0  # type: ignore[misc]


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
        (1e-9 * (spd(6).abs() + torch.ones(6, 6).triu(1)), "got a .6, 6. matrix that is not symmetric"),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_matrix_lambda_in_half_precision_is_refused_by_the_dtype_of_theta(dtype: torch.dtype) -> None:
    """Before: TypeError of NumPy, whose linear algebra knows no such type."""
    problem = ProximalProblem.from_losses(zero, zero, torch.eye(3, dtype=dtype))
    with pytest.raises(TypeError, match="theta: expected float32 or float64, got torch.b?float16"):
        bilevel.solve(problem, torch.zeros(3, dtype=dtype), solver=solvers.GradientDescent(step_size=0.1, max_steps=2))


# --- the ways to write a problem -----------------------------------------------------------------


def test_from_losses_is_the_sum_of_its_parts() -> None:
    problem = ProximalProblem.from_losses(lambda phi, data: data * phi.sum(), lambda phi, data: (phi**data).sum(), 0.5)
    phi, theta = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    assert problem.train_loss(phi, 3.0).item() == 12.0
    assert problem.inner_objective(phi, theta, 3.0).item() == 12.0 + 0.25 * (1 + 4)
    assert problem.outer_loss(phi, theta, 3.0).item() == problem.test_loss(phi, 3.0).item() == 28.0
    start = problem.initial_phi(theta)
    assert torch.equal(start, theta) and start.data_ptr() != theta.data_ptr()
    assert problem.composition is None


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
    made_of = problem.composition
    assert made_of is not None
    assert made_of.output_loss(made_of.predict(phi, theta, data), theta, data).item() == 4.0


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


def test_a_subclass_may_say_what_its_training_loss_is_made_of() -> None:
    """One hook, for the training loss and for GaussNewton(); by hand: H = 2 J^T J + lam I, u = H^{-1} 1, dF/dtheta = lam u."""

    class Line(ProximalProblem):
        @property
        def composition(self) -> Composition:
            return Composition(lambda phi, theta, data: data @ phi, lambda outputs, theta, data: outputs.square().sum())

        def test_loss(self, phi: Any, data: Any) -> Tensor:
            return phi.sum()

    problem, data, phi, theta = Line(lam=2.0), normal(60, 4, 2), normal(61, 2), normal(62, 2)
    torch.testing.assert_close(problem.train_loss(phi, data), (data @ phi).square().sum())
    found = bilevel.implicit_gradient(
        problem, phi, theta, data, linsys=CG(max_steps=9, rtol=1e-13), curvature=bilevel.GaussNewton()
    )
    hessian = 2 * data.mT @ data + 2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found.unwrap(), 2 * torch.linalg.solve(hessian, torch.ones(2, dtype=torch.float64)))


def test_a_split_may_be_any_pair() -> None:
    """The rest and the centre of G = 2 |phi|^2 + |phi - theta|^2; phi* = theta / 3 and L = sum(phi*)."""

    class Named(BilevelProblem):
        knows_curvature, curvature_scale = True, 2.0

        def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return 2 * phi.square().sum() + (phi - theta).square().sum()

        def outer_loss(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return phi.sum()

        @property
        def split(self) -> Split | None:
            return Split(lambda phi, theta, data: 2 * phi.square().sum(), lambda theta: theta)

    class Plain(Named):
        @property
        def split(self) -> Any:
            return tuple(super().split)

    theta = normal(63, 3)
    for problem in (Named(), Plain()):
        found = bilevel.hypergradient(
            problem,
            theta,
            init=torch.zeros_like(theta),
            solver=solvers.NewtonCG(max_steps=3, tol=1e-12),
            linsys=CG(max_steps=4, rtol=1e-13),
        )
        torch.testing.assert_close(found.phi, theta / 3)
        torch.testing.assert_close(found.unwrap(), torch.full_like(theta, 1 / 3))
    split = Named().split
    assert split is not None and split.remainder is split[0] and split.centre is split[1]


class Shifted(ProximalProblem):
    def train_loss(self, phi: Any, data: Any) -> Tensor:
        return (phi - 1).square().sum()

    def test_loss(self, phi: Any, data: Any) -> Tensor:
        return phi.sum()


class Learned(LearnedProximalProblem):
    pass


class Own(BilevelProblem):
    @classmethod
    def from_scratch(cls) -> BilevelProblem:
        return cls()

    def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
        return phi.square().sum()

    def outer_loss(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
        return phi.sum()


@pytest.mark.parametrize(
    ("of", "name", "plain", "use"),
    [
        (
            ProximalProblem,
            "from_functions",
            "BilevelProblem",
            r"ProximalProblem.from_losses\(...\) or ProximalProblem.from_model\(...\)",
        ),
        (
            LearnedProximalProblem,
            "from_functions",
            "BilevelProblem",
            r"LearnedProximalProblem.from_losses\(...\) or LearnedProximalProblem.from_model\(...\)",
        ),
        (Shifted, "from_functions", "BilevelProblem", r"Shifted\(...\)"),
        (Shifted, "from_losses", "ProximalProblem", r"Shifted\(...\)"),
        (Shifted, "from_model", "ProximalProblem", r"Shifted\(...\)"),
        (Learned, "from_functions", "BilevelProblem", r"Learned\(...\)"),
        (Own, "from_functions", "BilevelProblem", r"Own.from_scratch\(...\)"),
        (Own, "from_model", "BilevelProblem", r"Own.from_scratch\(...\)"),
    ],
)
def test_a_constructor_that_would_leave_the_class_out_is_refused(of: Any, name: str, plain: str, use: str) -> None:
    """Before, ProximalProblem.from_functions gave a problem without its regulariser, and said nothing."""
    words = (
        rf"^{of.__name__}.{name} would make a plain {plain}, without what {of.__name__} adds \(a regulariser, methods\). Use {use}; for "
        rf"the plain one, {plain}.{name}\(...\)\.$"
    )

    def fn(*_: Any) -> Tensor:
        return torch.tensor(0.0)

    number = {"from_functions": 2, "from_losses": 3, "from_model": 4 if plain == "ProximalProblem" else 3}[name]
    with pytest.raises(TypeError, match=words):
        getattr(of, name)(*[fn] * number)


def test_a_subclass_of_the_learned_problem_makes_its_own() -> None:
    made = Learned.from_model(lambda phi, data: phi, lambda z, data: z.sum(), lambda phi, data: phi.sum(), Scalar())
    assert type(made) is Learned and made.composition is not None


def by_every_constructor(quadratic: bool, power: int) -> dict[str, tuple[BilevelProblem, Any]]:
    """G = |data phi|^power / power + the rest, with its theta; quadratic where power = 2."""

    def predict(phi: Any, data: Any) -> Tensor:
        return data @ phi

    def output_loss(z: Tensor, data: Any) -> Tensor:
        return (z.abs() ** power).sum() / power

    def train(phi: Any, data: Any) -> Tensor:
        return output_loss(predict(phi, data), data)

    def test(phi: Any, data: Any) -> Tensor:
        return (phi - 1).square().sum()

    def penalty(phi: Any, theta: Any, data: Any) -> Tensor:
        return 0.5 * (phi - theta).square().sum()

    centre, q = normal(70, 3), quadratic
    learned = LearnedProximalProblem.from_losses(train, test, Diagonal(), quadratic=q)
    of_model = LearnedProximalProblem.from_model(predict, output_loss, test, Diagonal(), quadratic=q)
    theta = learned.initial_theta(centre, lam=1.0)
    return {
        "BilevelProblem.from_functions": (
            BilevelProblem.from_functions(
                lambda phi, theta, data: train(phi, data) + penalty(phi, theta, data),
                lambda phi, theta, data: test(phi, data),
                lambda theta, data: theta.clone(),
                quadratic=q,
            ),
            centre,
        ),
        "BilevelProblem.from_model": (
            BilevelProblem.from_model(
                lambda phi, theta, data: predict(phi, data),
                lambda z, theta, data: output_loss(z, data),
                lambda phi, theta, data: test(phi, data),
                lambda theta, data: theta.clone(),
                penalty=penalty,
                quadratic=q,
            ),
            centre,
        ),
        "ProximalProblem.from_losses": (ProximalProblem.from_losses(train, test, 1.0, quadratic=q), centre),
        "ProximalProblem.from_model": (
            ProximalProblem.from_model(predict, output_loss, test, 1.0, quadratic=q),
            centre,
        ),
        "LearnedProximalProblem.from_losses": (learned, theta),
        "LearnedProximalProblem.from_model": (of_model, theta),
    }


CONSTRUCTORS = list(by_every_constructor(False, 2))


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_gives_the_same_problem_and_takes_quadratic(name: str) -> None:
    """Lambda = I and G quadratic: phi* = H^{-1} theta and dF/dtheta = H^{-1} 2 (phi* - 1), with H = data^T data + I."""
    data = normal(71, 5, 3)
    options: dict[str, Any] = {
        "solver": solvers.NewtonCG(max_steps=5, cg_steps=9, tol=1e-12),
        "linsys": CG(max_steps=9, rtol=1e-13),
    }
    hessian = data.mT @ data + torch.eye(3, dtype=torch.float64)
    for quadratic in (False, True):
        problem, theta = by_every_constructor(quadratic, 2)[name]
        assert problem.quadratic is quadratic and (problem.composition is not None) == name.endswith("from_model")
        found = bilevel.hypergradient(problem, theta, data, **options)
        centre = theta["centre"] if isinstance(theta, dict) else theta
        grad = found.unwrap()["centre"] if isinstance(theta, dict) else found.unwrap()
        phi = torch.linalg.solve(hessian, centre)
        torch.testing.assert_close(found.phi, phi, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad, torch.linalg.solve(hessian, 2 * (phi - 1)), rtol=1e-10, atol=1e-12)
    problem, theta = by_every_constructor(True, 4)[name]
    with pytest.raises(ValueError, match="quadratic"):
        bilevel.hypergradient(problem, theta, data, **options)


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

    with pytest.raises(TypeError, match=r"^Half lacks outer_loss: every problem has to define it.$"):
        Half()  # type: ignore[abstract]


def test_a_class_beside_a_problem_gets_its_arguments() -> None:
    class Named:
        def __new__(cls, name: str) -> Any:
            made = super().__new__(cls)
            made.name = name
            return made

    class Mine(BilevelProblem, Named):
        def __init__(self, name: str) -> None: ...

        def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return phi.sum()

        outer_loss = inner_objective

    assert Mine("a").name == "a"


def test_arguments_that_nobody_takes_are_refused() -> None:
    class Mine(BilevelProblem):
        penalty = 0.1

        def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return phi.sum()

        outer_loss = inner_objective

    with pytest.raises(TypeError, match=r"^Mine\(\) takes no arguments: it has no __init__.$"):
        Mine(penalty=5.0)
    assert Mine().penalty == 0.1


def test_a_regulariser_of_ones_own_is_the_one_that_counts() -> None:
    """Five times Lambda, with its two products: closed forms by hand."""

    class Five(ProximalProblem):
        def train_loss(self, phi: Any, data: Any) -> Tensor:
            return (phi**2).sum()

        def test_loss(self, phi: Any, data: Any) -> Tensor:
            return phi.sum()

        def regulariser(self, phi: Any, theta: Any) -> Tensor:
            return 5 * super().regulariser(phi, theta)

        def curvature_product(self, v: Any, theta: Any = None) -> Any:
            return 5 * super().curvature_product(v, theta)

        def curvature_inverse(self, v: Any, theta: Any = None, damping: float = 0.0) -> Any:
            return v / (5 * self.lam + damping)

    zero = torch.zeros(2, dtype=torch.float64)
    for linsys, expected in ((CG(max_steps=5), 5 / 7), (Identity(), 1.0)):
        found = bilevel.implicit_gradient(Five(1.0), zero, zero, linsys=linsys)
        torch.testing.assert_close(found.grad, torch.full_like(zero, expected))
    assert Five(1.0).constant_cross_norm is None and Five(1.0).curvature_scale is None
    with pytest.raises(AttributeError, match=r"lam: Five takes it once, by super\(\).__init__\(lam\)"):
        Five(1.0).lam = 2.0


def test_a_decorated_function_is_judged_by_its_own_parameters() -> None:
    def loss(phi: Tensor, data: Tensor) -> Tensor:
        return (phi - data).square().sum()

    @functools.wraps(loss)
    def inner(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        return loss(phi, data) + theta @ phi

    problem = BilevelProblem.from_functions(inner, lambda phi, theta, data: phi.sum())
    solver, zero = solvers.NewtonCG(max_steps=3, tol=1e-6), torch.zeros(2)
    found = bilevel.solve(problem, zero, torch.ones(2), init=zero, solver=solver)
    torch.testing.assert_close(found.unwrap(), torch.ones(2))


def test_a_problem_without_a_start_asks_for_one() -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta) ** 2).sum(), lambda phi, theta, data: phi.sum()
    )
    solver = solvers.NewtonCG(max_steps=3, tol=1e-6)
    with pytest.raises(ValueError, match="initial_phi: this problem was made without one.*Pass init="):
        bilevel.solve(problem, torch.ones(2), solver=solver)

    class Own(BilevelProblem):
        def inner_objective(self, phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
            return (phi - theta).square().sum()

        def outer_loss(self, phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
            return phi.sum()

    with pytest.raises(ValueError, match=r"Own has no initial_phi.*pass init=, or define initial_phi\(theta, data\)"):
        bilevel.solve(Own(), torch.ones(2), solver=solver)
    torch.testing.assert_close(
        bilevel.solve(problem, torch.ones(2), init=torch.zeros(2), solver=solver).unwrap(), torch.ones(2)
    )
    assert not problem.knows_curvature and problem.composition is None
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


class _Stiff(ProximalProblem):
    """H = 1 + 30, whatever lam is: the regulariser is this class's own."""

    composition = bilevel.Composition(
        predict=lambda phi, theta, data: phi, output_loss=lambda out, theta, data: 0.5 * (out - 1).square().sum()
    )

    def test_loss(self, phi: Any, data: Any) -> Tensor:
        return 0.5 * (phi - 5).square().sum()

    def regulariser(self, phi: Any, theta: Any) -> Tensor:
        return 15 * (phi - theta).square().sum()


class _StiffAndKnown(_Stiff):
    def curvature_product(self, v: Any, theta: Any = None) -> Any:
        return 30 * v

    def curvature_inverse(self, v: Any, theta: Any = None, damping: float = 0.0) -> Any:
        return v / (30 + damping)


def test_gauss_newton_and_identity_do_not_take_lambda_for_the_curvature_of_another_regulariser() -> None:
    """phi* = (1 + 30 theta) / 31, dL/dtheta = (phi* - 5) 30 / 31. Before, lam = 2 was used in the place of 30, and ok said True."""
    theta = torch.tensor([4.0], dtype=torch.float64)
    phi = (1 + 30 * theta) / 31
    exact = (phi - 5) * 30 / 31
    solver = solvers.NewtonCG(max_steps=20, tol=1e-12)

    def gradient(problem: ProximalProblem, **options: Any) -> Tensor:
        return bilevel.hypergradient(problem, theta, solver=solver, **options).unwrap()

    known = _StiffAndKnown(2.0)
    for problem in (_Stiff(2.0), known):
        torch.testing.assert_close(gradient(problem, linsys=CG(max_steps=5)), exact)
    torch.testing.assert_close(gradient(known, linsys=CG(max_steps=5), curvature=GaussNewton()), exact)
    torch.testing.assert_close(gradient(known, linsys=Identity()), phi - 5)
    with pytest.raises(
        TypeError, match=r"GaussNewton\(\): _Stiff has a regulariser of its own.*Define curvature_product"
    ):
        gradient(_Stiff(2.0), linsys=CG(max_steps=5), curvature=GaussNewton())
    with pytest.raises(ValueError, match=r"Identity\(\) needs a problem.*which a regulariser of your own needs too"):
        gradient(_Stiff(2.0), linsys=Identity())
    assert (
        not _Stiff(2.0).knows_curvature
        and known.knows_curvature
        and ProximalProblem.from_losses(zero, zero, 1.0).knows_curvature
    )


def test_the_curvature_of_a_regulariser_is_not_that_of_the_one_below_or_above_it() -> None:
    """A class that knows its curvature, under one that has yet another regulariser; and one object with its own."""

    class Stiffer(_StiffAndKnown):
        def regulariser(self, phi: Any, theta: Any) -> Tensor:
            return 2 * super().regulariser(phi, theta)

    class Same(_StiffAndKnown):
        pass

    assert not Stiffer(2.0).knows_curvature and Same(2.0).knows_curvature
    problem: Any = ProximalProblem.from_losses(lambda phi, data: (phi - 1).square().sum() / 2, zero, 2.0)
    problem.regulariser = lambda phi, theta: 15 * (phi - theta).square().sum()
    assert not problem.knows_curvature
    theta = torch.tensor([4.0], dtype=torch.float64)
    found = bilevel.solve(problem, theta, solver=solvers.NewtonCG(max_steps=20, tol=1e-12))
    torch.testing.assert_close(found.value, (1 + 30 * theta) / 31)


def test_a_composition_without_the_regulariser_is_checked_only_where_it_is_used() -> None:
    theta = torch.tensor([4.0], dtype=torch.float64)
    solver = solvers.NewtonCG(max_steps=20, tol=1e-12)
    assert check_hypergradient(_Stiff(2.0), theta, solver=solver, linsys=CG(max_steps=5)).ok


def test_what_a_problem_says_of_its_curvature_counts() -> None:
    """A regulariser that is the same one in another dress may say so; and a composition may be all of G."""

    class Logged(ProximalProblem):
        knows_curvature = True
        composition = bilevel.Composition(
            predict=lambda phi, theta, data: phi, output_loss=lambda out, theta, data: (out - 1).square().sum()
        )

        def test_loss(self, phi: Any, data: Any) -> Tensor:
            return phi.sum()

        def regulariser(self, phi: Any, theta: Any) -> Tensor:
            return super().regulariser(phi, theta)

    zeros = torch.zeros(2, dtype=torch.float64)
    for linsys, expected in ((CG(max_steps=5), 2 / 4), (Identity(), 1.0)):
        found = bilevel.implicit_gradient(Logged(2.0), zeros, zeros, linsys=linsys, curvature=GaussNewton())
        torch.testing.assert_close(found.grad, torch.full_like(zeros, expected))
    problem = _Stiff(2.0)
    problem.knows_curvature = True
    assert problem.knows_curvature and not problem._curvature_is_missing
    problem.knows_curvature = False
    assert not problem.knows_curvature and not problem._curvature_is_missing


def test_a_learned_problem_with_another_regulariser_does_not_know_its_curvature() -> None:
    class Other(bilevel.LearnedProximalProblem):
        def regulariser(self, phi: Any, theta: Any) -> Tensor:
            return 3 * super().regulariser(phi, theta)

    for cls, knows in ((Other, False), (bilevel.LearnedProximalProblem, True)):
        assert cls(zero, zero, bilevel.regularisation.Scalar()).knows_curvature is knows


class _Penalised(LearnedProximalProblem):
    def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
        return super().inner_objective(phi, theta, data) + 5 * phi.square().sum()


class _PenalisedAndComposed(_Penalised):
    @property
    def composition(self) -> Composition:
        return Composition(
            lambda phi, theta, data: phi,
            lambda outputs, theta, data: 0.5 * (outputs - 1).square().sum(),
            lambda phi, theta, data: 5 * phi.square().sum(),
        )


def test_gauss_newton_refuses_a_composition_that_is_older_than_the_inner_objective() -> None:
    """G = |phi - 1|^2 / 2 + lam |phi - c|^2 / 2 + 5 |phi|^2, so phi* = (1 + lam c) / (11 + lam) and dphi*/dc = lam / (11 + lam)."""

    def make(cls: type[LearnedProximalProblem]) -> LearnedProximalProblem:
        return cls.from_model(
            lambda phi, data: phi,
            lambda outputs, data: 0.5 * (outputs - 1).square().sum(),
            lambda phi, data: 0.5 * phi.square().sum(),
            Scalar(),
        )

    centre = torch.tensor([0.3, -2.0], dtype=torch.float64)
    solver = solvers.NewtonCG(max_steps=20, tol=1e-12)

    def gradient(problem: LearnedProximalProblem, **options: Any) -> Tensor:
        theta = problem.initial_theta(centre, lam=1.5)
        return bilevel.hypergradient(problem, theta, solver=solver, linsys=CG(max_steps=5), **options).unwrap()[
            "centre"
        ]

    exact = (1 + 1.5 * centre) / 12.5 * 1.5 / 12.5
    torch.testing.assert_close(gradient(make(_Penalised)), exact)
    torch.testing.assert_close(gradient(make(_PenalisedAndComposed), curvature=GaussNewton()), exact)
    with pytest.raises(
        TypeError, match=r"GaussNewton\(\): _Penalised has an inner objective or a train_loss of its own"
    ):
        gradient(make(_Penalised), curvature=GaussNewton())
    torch.testing.assert_close(
        gradient(make(LearnedProximalProblem), curvature=GaussNewton()), (1 + 1.5 * centre) / 2.5 * 1.5 / 2.5
    )


@pytest.mark.parametrize("way", ["hypergradient", "batched", "argmin", "jacrev"])
def test_a_leaf_that_the_objective_makes_is_explained(way: str) -> None:
    def inner(phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
        x = torch.ones(3, dtype=torch.float64).requires_grad_()
        (slope,) = torch.autograd.grad((phi * x.square()).sum(), x, create_graph=True)
        return (slope - theta).square().sum()

    def with_func(phi: Tensor, theta: Tensor, data: Any = None) -> Tensor:
        slope = torch.func.grad(lambda x: (phi * x.square()).sum())(torch.ones(3, dtype=torch.float64))
        return (slope - theta).square().sum()

    def gradient(inner: Any) -> Any:
        problem = BilevelProblem.from_functions(
            inner, lambda phi, theta, data: phi.sum(), lambda theta, data: 0 * theta
        )
        theta = torch.ones(3, dtype=torch.float64)
        options: Any = {"solver": solvers.NewtonCG(max_steps=9, tol=1e-9), "linsys": CG(max_steps=5)}
        if way == "hypergradient":
            return bilevel.hypergradient(problem, theta, **options).unwrap()
        if way == "batched":
            data = torch.zeros(2, 1)
            return bilevel.hypergradient(problem, theta, data, batched=True, **options).unwrap()
        if way == "argmin":
            leaf = theta.requires_grad_()
            return torch.autograd.grad(bilevel.argmin(problem, leaf, **options).sum(), leaf)[0]
        return torch.func.jacrev(lambda t: bilevel.argmin(problem, t, **options).sum())(theta)

    torch.testing.assert_close(gradient(with_func), torch.full((3,), 0.5, dtype=torch.float64))
    with pytest.raises((ValueError, RuntimeError)) as refused:
        gradient(inner)
    text = str(refused.value) + "".join(getattr(refused.value, "__notes__", []))
    assert "torch.func.grad or torch.func.jvp" in text


def test_help_shows_the_parameters_of_a_class() -> None:
    assert list(inspect.signature(ProximalProblem).parameters) == ["lam"]
    assert list(inspect.signature(LearnedProximalProblem).parameters) == ["train_loss", "test_loss", "kind"]
    assert not inspect.signature(BilevelProblem).parameters


class _Network:
    """A mixin: no problem, and without a G of its own."""

    @property
    def composition(self) -> Composition:
        return Composition(lambda phi, theta, data: phi, lambda outputs, theta, data: (outputs - 1).square().sum())


class _Mixed(_Network, BilevelProblem):
    def inner_objective(self, phi: Any, theta: Any, data: Any) -> Tensor:
        return self.composition.objective(phi, theta, data) + 0 * theta.sum()

    def outer_loss(self, phi: Any, theta: Any, data: Any) -> Tensor:
        return (phi - theta).square().sum()

    def initial_phi(self, theta: Any, data: Any) -> Tensor:
        return theta.clone()

    def __call__(self, phi: Tensor, data: Any) -> Tensor:
        return (phi - 1).square().sum()


def test_a_problem_may_be_a_mixture_and_may_be_called() -> None:
    options: Any = {"solver": solvers.NewtonCG(max_steps=3), "linsys": CG(max_steps=5), "curvature": GaussNewton()}
    assert bilevel.hypergradient(_Mixed(), torch.zeros(3), **options).ok
    as_loss = ProximalProblem.from_losses(_Mixed(), _Mixed(), 1.0)
    assert bilevel.solve(as_loss, torch.zeros(3), solver=solvers.NewtonCG(max_steps=3)).unwrap().shape == (3,)
    assert list(inspect.signature(_Mixed()).parameters) == ["phi", "data"]
