"""The dense solve: one matrix and one factorisation for all right-hand sides, and matrices that are not symmetric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import bilevel
from bilevel import Status
from bilevel.derivatives import Linearisation
from bilevel.linsys import CG, Exact, Operator
from bilevel.solvers import BlackBox, NewtonCG
from tests.cases import PROBLEMS, Case
from tests.systems import BATCHES, DTYPES, Counter, System, build, build_general, spectrum, status_of

F64 = torch.float64


def general(system: System, shared: int = 0) -> Operator:
    return Operator(system.matvec, symmetric=False, shared=shared)


# --- several right-hand sides of one matrix ------------------------------------------------------


@pytest.fixture
def factorisations(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each factorisation of torch.linalg is called."""
    counts: dict[str, int] = {}

    def counted(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return fn(*args, **kwargs)

        return call

    for name in ("cholesky", "cholesky_ex", "inv", "inv_ex", "lu_factor", "lu_factor_ex", "solve", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, counted(name, getattr(torch.linalg, name)))
    return counts


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_shared_axes_cost_one_matrix(
    batch: tuple[int, ...], shared: int, symmetric: bool, factorisations: dict[str, int]
) -> None:
    system = (build if symmetric else build_general)(np.linspace(1, 5, 4), batch=batch)
    axes = (5, 2)[:shared]
    rhs = torch.randn(*axes, *batch, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    counter = Counter(system)
    result = Exact().solve(Operator(counter, symmetric=symmetric, shared=shared), rhs)
    expected = np.linalg.solve(system.a.numpy(), rhs.numpy()[..., None])[..., 0]
    np.testing.assert_allclose(result.value.numpy(), expected, rtol=0, atol=1e-12)
    assert result.codes.shape == result.residual.shape == (*axes, *batch)
    assert set(status_of(result.codes)) == {Status.CONVERGED}
    assert counter.shapes == [(4, *batch, 4)] and result.num_matvecs == 4
    assert factorisations == {"cholesky_ex" if symmetric else "inv_ex": 1}


def test_a_sick_right_hand_side_leaves_the_others_of_its_matrix_as_they_were() -> None:
    system = build(np.linspace(1, 5, 4), batch=(2,))
    rhs = torch.randn(3, 2, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    sick = rhs.clone()
    sick[1, 0, 2] = torch.nan
    for symmetric in (True, False):
        operator = Operator(system.matvec, symmetric=symmetric, shared=1)
        before, after = Exact().solve(operator, rhs), Exact().solve(operator, sick)
        assert after.codes.tolist() == [[0, 0], [int(Status.NON_FINITE), 0], [0, 0]]
        assert after.value[1, 0].isnan().all() and after.residual[1, 0].isnan()
        others = torch.ones(3, 2, dtype=torch.bool)
        others[1, 0] = False
        assert torch.equal(after.value[others], before.value[others])
        assert torch.equal(after.residual[others], before.residual[others])


@pytest.mark.parametrize("shared", [-1, 3])
def test_more_shared_axes_than_there_are(shared: int) -> None:
    system = build([1.0, 2.0], batch=(2,))
    with pytest.raises(ValueError, match=r"shared: expected at most 2 axes .* of shape \(3, 2, 2\), got"):
        Exact().solve(Operator(system.matvec, shared=shared), torch.ones(3, 2, 2, dtype=F64))


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_the_jacobian_of_argmin_costs_one_matrix_and_one_factorisation(
    case: Case, monkeypatch: pytest.MonkeyPatch, factorisations: dict[str, int]
) -> None:
    products: list[tuple[int, ...]] = []
    original = Linearisation.matvec

    def counted(self: Linearisation, v: Tensor) -> Tensor:
        products.append(tuple(v.shape))
        return original(self, v)

    monkeypatch.setattr(Linearisation, "matvec", counted)
    solver = BlackBox(lambda problem, theta, data, init: case.phi_star(theta, data))

    def solution(theta: Any) -> Any:
        return bilevel.argmin(case.problem, theta, case.data, solver=solver, linsys=Exact())

    expected = jacrev(lambda theta: case.phi_star(theta, case.data))(case.theta)
    products.clear()
    factorisations.clear()
    got = jacrev(solution)(case.theta)
    d = sum(leaf.numel() for leaf in bilevel.trees.flatten(case.phi_star(case.theta, case.data))[0])
    assert factorisations.pop("inv", 0) <= 2  # of the closed forms, in the black box
    assert factorisations == {"cholesky_ex": 1}
    assert products == [(d, d)]  # d columns at once, and not d of them for each of the d rows of the Jacobian
    for one, other in zip(*(torch.utils._pytree.tree_leaves(tree) for tree in (got, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# --- matrices that are not symmetric -------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    d=st.integers(1, 9),
    batch=st.sampled_from(BATCHES),
    seed=st.integers(0, 2**31 - 1),
    log_kappa=st.floats(0, 6),
    dtype=st.sampled_from(DTYPES),
)
def test_a_general_matrix_is_numpy_solve(
    d: int, batch: tuple[int, ...], seed: int, log_kappa: float, dtype: torch.dtype
) -> None:
    kappa = 10 ** (min(log_kappa, 3) if dtype == torch.float32 else log_kappa)
    system = build_general(spectrum(d, kappa), batch=batch, dtype=dtype, seed=seed)
    result = Exact().solve(general(system), system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED} and result.value.dtype == dtype
    expected = system.solution()
    size, eps = np.linalg.norm(expected, axis=-1), torch.finfo(dtype).eps
    assert (np.linalg.norm(result.value.double().numpy() - expected, axis=-1) <= 50 * d * eps * kappa * size).all()
    # |A| = 1: the residual of a backward stable method, which the inverse alone would miss by kappa
    assert (system.true_residual(result.value) <= 10 * d * eps * size).all()
    assert (np.abs(result.residual.double().numpy() - system.true_residual(result.value)) <= 10 * d * eps * size).all()


def test_a_general_solve_has_the_residual_of_a_stable_method() -> None:
    """kappa = 1e9 and a solution of size 1: A^{-1} b alone leaves kappa eps |A| |u|."""
    system = build_general(spectrum(20, 1e9), batch=(4,))
    solution = build_general(np.ones(20), batch=(4,), seed=1).b
    b = system.matvec(solution)
    result = Exact().solve(general(system), b)
    residual = System(system.a, b).true_residual(result.value)
    assert (residual <= 20 * 2.2e-16 * np.linalg.norm(solution.numpy(), axis=-1)).all()
    alone = torch.tensor(np.einsum("bij,bj->bi", np.linalg.inv(system.a.numpy()), b.numpy()))
    assert (System(system.a, b).true_residual(alone) > 1e3 * residual).all()  # the test would see it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "values", [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1e-18, 0.5]], ids=["rank 2", "zero", "numerically"]
)
def test_a_singular_general_matrix(values: list[float], dtype: torch.dtype) -> None:
    healthy = build_general([1.0, 2.0, 3.0], batch=(3,), dtype=dtype)
    system = healthy.with_problem(1, a=build_general(values, dtype=dtype, seed=5).a)
    result = Exact().solve(general(system), system.b)
    assert status_of(result.codes) == [Status.CONVERGED, Status.SINGULAR, Status.CONVERGED]
    assert torch.equal(result.value[[0, 2]], Exact().solve(general(healthy), healthy.b).value[[0, 2]])


def test_singular_without_a_small_pivot() -> None:
    """Kahan's and Wilkinson's warning: ones on the diagonal, -1 above, d = 60. Every pivot is 1, the smallest singular value 1e-18."""
    d = 60
    a = torch.eye(d, dtype=F64) - torch.ones(d, d, dtype=F64).triu(1)
    assert np.linalg.svd(a.numpy(), compute_uv=False)[-1] < 1e-16
    result = Exact().solve(Operator(lambda v: v @ a.T, symmetric=False), torch.ones(d, dtype=F64))
    assert result.status is Status.SINGULAR


def test_a_badly_conditioned_matrix_is_no_singular_one() -> None:
    """A large Frobenius condition number is only the reason to look at the singular values."""
    d = 200
    system = build_general([*np.ones(d - 1), 2 * d * 2.3e-16], seed=3)
    norms = np.linalg.norm(system.a.numpy()) * np.linalg.norm(np.linalg.inv(system.a.numpy()))
    assert norms * d * 2.2e-16 > 1
    assert Exact().solve(general(system), system.b).status is Status.CONVERGED


@pytest.mark.parametrize("sick", ["nan in A", "inf in A", "nan in b"])
def test_one_sick_general_problem(sick: str) -> None:
    healthy = build_general(np.linspace(1, 5, 4), batch=(3,), seed=7)
    a, b = healthy.a[1].clone(), healthy.b[1].clone()
    if sick == "nan in b":
        b[3] = torch.nan
    else:
        a[0, 2] = torch.nan if sick == "nan in A" else torch.inf
    system = healthy.with_problem(1, a, b)
    expected, result = Exact().solve(general(healthy), healthy.b), Exact().solve(general(system), system.b)
    for field in ("value", "codes", "steps", "residual"):
        assert torch.equal(getattr(result, field)[[0, 2]], getattr(expected, field)[[0, 2]]), field
    assert Status(int(result.codes[1])) is Status.NON_FINITE and result.value[1].isnan().all()


def test_an_asymmetric_matrix_is_refused_unless_it_is_meant() -> None:
    system = build_general([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"Exact\(\) needs a symmetric matrix, .*Operator\(matvec, symmetric=False\)"):
        Exact().solve(system.matvec, system.b)
    np.testing.assert_allclose(Exact().solve(general(system), system.b).value.numpy(), system.solution(), rtol=1e-12)


def test_solvers_that_need_symmetry_refuse_an_operator_without() -> None:
    system = build_general([1.0, 2.0, 3.0])
    with pytest.raises(
        ValueError, match=r"CG needs a symmetric matrix, got one that is declared symmetric=False. Use Exact, GMRES"
    ):
        CG(max_steps=5).solve(general(system), system.b)


# --- directly under transforms -------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "grad": lambda f: grad(lambda t: f(t).sin().sum()),
    "hessian": lambda f: hessian(lambda t: f(t).sin().sum()),
    "jvp(jvp)": lambda f: lambda t: jvp(lambda s: jvp(f, (s,), (s.cos(),))[1], (t,), (s_like(t),))[1],
    "vjp(vjp)": lambda f: lambda t: vjp(lambda s: vjp(f, s)[1](f(s))[0], t)[1](s_like(t))[0],
}


SLOPES = torch.randn(4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def s_like(t: Tensor) -> Tensor:
    return torch.cos(3 * torch.arange(t.numel(), dtype=t.dtype) + 1)


def matrix_of(t: Tensor, kind: str) -> Tensor:
    """Depends on t: symmetric positive definite, indefinite with an eigenvalue that is double, or not symmetric."""
    a = 3 * torch.eye(4, dtype=F64) + 0.4 * torch.einsum("i,ijk->jk", torch.sin(t * torch.arange(1, 5)), SLOPES)
    if kind == "general":
        return a
    definite = a @ a.mT
    sign = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=F64))
    return definite if kind == "definite" else sign + 0 * definite + 0.1 * torch.outer(t, t)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["definite", "indefinite", "general"])
def test_derivatives_through_a_direct_solve_are_those_of_the_inverse(kind: str, transform: str) -> None:
    """The other dense solvers of torch.linalg are silently wrong under some of these."""
    b = s_like(torch.zeros(4, dtype=F64))

    def ours(t: Tensor) -> Tensor:
        a = matrix_of(t, kind)
        operator = Operator(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), symmetric=kind != "general")
        return Exact().solve(operator, b * t[0]).value

    def theirs(t: Tensor) -> Tensor:
        return torch.linalg.inv(matrix_of(t, kind)) @ (b * t[0])

    t = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=F64)
    expected = TRANSFORMS[transform](theirs)(t)
    torch.testing.assert_close(
        TRANSFORMS[transform](ours)(t), expected, rtol=0, atol=1e-12 * float(expected.abs().max())
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transform", [lambda f: f, jacfwd, grad])
def test_under_vmap_it_raises(transform: Any, symmetric: bool) -> None:
    """It would have to look at numbers that vmap hides; the batch belongs in the leading axes."""

    def f(t: Tensor) -> Tensor:
        a = matrix_of(t, "definite")
        operator = Operator(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), symmetric=symmetric)
        return Exact().solve(operator, t).value.sum()

    with pytest.raises(RuntimeError, match="vmap"):
        vmap(transform(f))(torch.ones(2, 4, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("d", "rank"), [(2, 1), (3, 2), (10, 9), (20, 19), (50, 20)])
def test_least_squares_with_too_few_examples_are_singular(d: int, rank: int, dtype: torch.dtype) -> None:
    """X^T X with random X: rounding leaves a last pivot of any small size, and the ratio of the pivots tells nothing."""
    g = torch.Generator().manual_seed(d)
    for _ in range(40):
        x = torch.randn(rank, d, generator=g, dtype=torch.float64).to(dtype)
        a, b = x.T @ x, torch.randn(d, generator=g, dtype=torch.float64).to(dtype)
        assert Exact().solve(lambda v, a=a: v @ a, b).status is Status.SINGULAR


@pytest.mark.parametrize("kappa", [1e2, 1e8, 1e12, 1e14])
def test_regular_matrices_are_never_called_singular(kappa: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        q = np.linalg.qr(rng.standard_normal((10, 10)))[0]
        a = torch.from_numpy(q * np.geomspace(1, 1 / kappa, 10) @ q.T)
        assert (
            Exact().solve(lambda v, a=a: v @ (a + a.T) / 2, torch.from_numpy(rng.standard_normal(10))).status
            is Status.CONVERGED
        )


@pytest.mark.parametrize(("d", "kappa"), [(8, 1e6), (10, 1e5), (50, 5e4), (200, 5e4), (300, 5e4)])
def test_float32_is_not_called_singular_because_there_are_many_variables(d: int, kappa: float) -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = q * np.geomspace(1, 1 / kappa, d) @ q.T, rng.standard_normal(d)
    matrix = torch.from_numpy(a).float()
    matrix = (matrix + matrix.T) / 2
    exact = np.linalg.solve(a, b)
    for symmetric in (True, False):
        found = Exact().solve(Operator(lambda v: v @ matrix, symmetric=symmetric), torch.from_numpy(b).float())
        assert found.status is Status.CONVERGED and np.linalg.norm(found.value - exact) < 0.2 * np.linalg.norm(exact)


def test_one_example_for_two_weights_is_no_hypergradient() -> None:
    x = torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, t, _: 0.5 * (x @ w - t).square().sum(),
        lambda w, t, _: (w - 1).square().sum(),
        lambda t, _: torch.zeros(2, dtype=torch.float64),
    )
    found = bilevel.hypergradient(
        problem, torch.tensor(1.0, dtype=torch.float64), solver=NewtonCG(max_steps=20, tol=1e-12), linsys=Exact()
    )
    assert found.linear.status is Status.SINGULAR and not found.ok
    assert "is negative" not in found.explain()


def test_a_matrix_that_no_memory_holds_is_explained() -> None:
    with pytest.raises(RuntimeError) as caught:
        Exact().solve(lambda v: v, torch.ones(20_000_000))
    assert "Exact() makes a matrix of 20000000 x 20000000" in caught.value.__notes__[0]
    assert "CG needs some vectors" in caught.value.__notes__[0]
