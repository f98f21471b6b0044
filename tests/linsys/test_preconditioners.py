"""Jacobi and Nystrom preconditioners: what M is, that it is positive definite, what it costs and what it saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import BilevelProblem, Status, argmin, implicit_gradient
from bilevel.linsys import CG, GMRES, MINRES, BiCGStab, Jacobi, NystromPreconditioner, Operator
from bilevel.linsys.preconditioner import Preconditioner
from bilevel.solvers import NewtonCG
from tests.systems import BATCHES, DTYPES, Counter, System, build, build_general, spectrum, status_of

F64 = torch.float64
RECIPES: dict[str, Preconditioner] = {
    "jacobi": Jacobi(),
    "jacobi estimated": Jacobi(num_probes=6),
    "nystrom": NystromPreconditioner(rank=3),
    "nystrom shifted": NystromPreconditioner(rank=3, shift=0.5),
}


def dense(recipe: Preconditioner, system: System, operator: Operator | None = None) -> np.ndarray:
    """M as matrices ``(*batch, d, d)``."""
    m, _ = recipe.build(Operator(system.matvec) if operator is None else operator, system.b)
    d = system.b.shape[-1]
    return np.stack([m(e.expand_as(system.b)).double().numpy() for e in torch.eye(d, dtype=system.b.dtype)], axis=-1)


def random_signs(seed: int, count: int, d: int) -> np.ndarray:
    """The probes that the documentation promises: random signs, the same for every problem."""
    return (2 * torch.randint(0, 2, (count, d), generator=torch.Generator().manual_seed(seed)) - 1).double().numpy()


# --- what every one of them is -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "values", [np.linspace(1, 9, 5), [3.0, 1, 0, 0, 0], [-2.0, -1, 0, 1, 2], [0.0] * 5, [-1.0] * 5]
)
def test_it_is_positive_definite_for_every_matrix(
    values: Any, name: str, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    system = build(values, batch=batch, dtype=dtype)
    m = dense(RECIPES[name], system)
    size = np.abs(m).max((-2, -1), keepdims=True)
    assert m.dtype == np.float64 and np.isfinite(m).all()
    assert (np.abs(m - np.swapaxes(m, -1, -2)) <= 1e-5 * size).all()
    assert (np.linalg.eigvalsh(m / size) > 0).all()


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_same_in_every_call_and_for_every_place_in_a_batch(name: str) -> None:
    one = build(np.linspace(1, 9, 6), seed=3)
    many = System(torch.stack([one.a] * 4), torch.stack([one.b] * 4))
    single, batch = dense(RECIPES[name], one), dense(RECIPES[name], many)
    torch.manual_seed(123)  # and the global generator does not enter, nor is it moved
    state = torch.get_rng_state()
    assert (dense(RECIPES[name], one) == single).all()
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(batch, np.stack([single] * 4), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shared", [1, 2])
def test_with_shared_axes_it_is_built_once(name: str, shared: int) -> None:
    system = build(np.linspace(1, 9, 6), batch=(3,))
    axes = (5, 2)[:shared]
    rhs = torch.randn(*axes, 3, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    counter = Counter(system)
    m, spent = RECIPES[name].build(Operator(counter, shared=shared), rhs)
    assert counter.shapes == [(spent, 3, 6)]
    own, _ = RECIPES[name].build(Operator(system.matvec), system.b)
    expected = torch.stack([own(row) for row in rhs.reshape(-1, 3, 6)]).reshape(rhs.shape)
    torch.testing.assert_close(m(rhs), expected, rtol=0, atol=1e-12)
    result = CG(max_steps=30, rtol=1e-10, preconditioner=RECIPES[name]).solve(Operator(counter, shared=shared), rhs)
    np.testing.assert_allclose(
        result.value.numpy(), np.linalg.solve(system.a.numpy(), rhs.numpy()[..., None])[..., 0], atol=1e-9
    )


@pytest.mark.parametrize("sick", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", RECIPES)
def test_a_sick_matrix_leaves_the_others_as_they_were(name: str, sick: float) -> None:
    healthy = build(np.linspace(1, 9, 5), batch=(3,))
    a = healthy.a[1].clone()
    a[2, 2] = sick
    system = healthy.with_problem(1, a)
    before, after = dense(RECIPES[name], healthy), dense(RECIPES[name], system)
    assert (before[[0, 2]] == after[[0, 2]]).all()
    assert (
        np.isfinite(after[1]).all() and (np.diag(after[1]) > 0).all()
    )  # what is wrong with A is for its products to show
    for solver in (CG(max_steps=20, preconditioner=RECIPES[name]), MINRES(max_steps=20, preconditioner=RECIPES[name])):
        expected, result = solver.solve(healthy.matvec, healthy.b), solver.solve(system.matvec, system.b)
        assert status_of(result.codes) == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
        assert torch.equal(result.value[[0, 2]], expected.value[[0, 2]])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("make", [CG, MINRES])
def test_its_products_are_counted(make: Any, name: str) -> None:
    system = build(np.linspace(1, 9, 8), batch=(2,))
    counter = Counter(system)
    result = make(max_steps=5, rtol=0.0, preconditioner=RECIPES[name]).solve(counter, system.b)
    products = sum(shape[0] if len(shape) == 3 else 1 for shape in counter.shapes)
    spent = {"jacobi": 8, "jacobi estimated": 6, "nystrom": 3, "nystrom shifted": 3}[name]
    assert result.num_matvecs == products == spent + 5 + (make is MINRES)  # which measures


# --- Jacobi --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_jacobi_is_the_inverse_of_the_diagonal(batch: tuple[int, ...]) -> None:
    system = build(np.linspace(1, 9, 6), batch=batch)
    diagonal = np.diagonal(system.a.numpy(), axis1=-2, axis2=-1)
    np.testing.assert_allclose(dense(Jacobi(), system), np.eye(6) / diagonal[..., None], rtol=1e-13, atol=1e-15)


def test_jacobi_of_a_matrix_that_is_not_symmetric() -> None:
    system = build_general(np.linspace(1, 9, 6))
    expected = np.diag(1 / np.abs(np.diag(system.a.numpy())))
    got = dense(Jacobi(), system, Operator(system.matvec, symmetric=False))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_the_estimated_diagonal_is_the_mean_of_the_probes() -> None:
    system = build(np.linspace(5, 9, 6))
    z = random_signs(3, 8, 6)
    samples = z * (z @ system.a.numpy())
    assert (samples.mean(0) > samples.std(0, ddof=1) / 8**0.5).all()  # so none is replaced
    got = dense(Jacobi(num_probes=8, seed=3), system)
    np.testing.assert_allclose(got, np.diag(1 / samples.mean(0)), rtol=1e-12, atol=1e-15)
    other = dense(Jacobi(num_probes=8, seed=4), system)
    assert np.abs(other - got).max() > 1e-3


def test_the_estimate_converges_to_the_diagonal() -> None:
    system = build(np.linspace(1, 9, 20))
    exact = np.diag(dense(Jacobi(), system))
    errors = [np.abs(np.diag(dense(Jacobi(num_probes=n), system)) / exact - 1).max() for n in (10, 1000, 100_000)]
    assert errors[1] < 0.3 * errors[0] and errors[2] < 0.3 * errors[1] and errors[2] < 0.02


def test_a_diagonal_matrix_takes_one_step_however_badly_scaled() -> None:
    values = torch.logspace(-8, 8, 30, dtype=F64)
    b = torch.ones(30, dtype=F64)
    for recipe in (Jacobi(), Jacobi(num_probes=2)):  # the estimate has no error here
        result = CG(max_steps=30, rtol=1e-10, preconditioner=recipe).solve(lambda v: values * v, b)
        assert result.status is Status.CONVERGED and result.steps == 1
        np.testing.assert_allclose(result.value.numpy(), 1 / values.numpy(), rtol=1e-12)


def test_entries_that_are_not_positive_are_handled_as_documented() -> None:
    a = torch.diag(torch.tensor([4.0, -2.0, 0.0], dtype=F64))
    a[0, 2] = a[2, 0] = 1.0
    got = dense(Jacobi(), System(a, torch.ones(3, dtype=F64)))
    np.testing.assert_allclose(np.diag(got), [1 / 4, 1 / 2, 1 / 3])  # absolute value; the mean of the others
    zero = dense(Jacobi(), System(0 * a, torch.ones(3, dtype=F64)))
    np.testing.assert_allclose(np.diag(zero), [1.0, 1.0, 1.0])


def test_an_estimate_below_its_error_counts_as_its_error() -> None:
    """A = [[1, 10], [10, 200]]: the first entry is not to be told from zero, or below, by two probes."""
    a = torch.tensor([[1.0, 10.0], [10.0, 200.0]], dtype=F64)
    system = System(a, torch.ones(2, dtype=F64))
    seed = next(s for s in range(20) if len({tuple(row) for row in random_signs(s, 2, 2).prod(1, keepdims=True)}) == 2)
    # z1 z2 is once 1 and once -1: the samples of the first entry are 11 and -9
    np.testing.assert_allclose(np.diag(dense(Jacobi(num_probes=2, seed=seed), system)), [1 / 10, 1 / 200], rtol=1e-12)


# --- Nystrom -------------------------------------------------------------------------------------


def frangella(a: np.ndarray, rank: int, shift: float, seed: int) -> np.ndarray:
    """The paper's preconditioner (eq. 1.3) for A + shift I, from the Nystrom approximation of A by the pseudo-inverse, dense."""
    d = len(a)
    g = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed), dtype=F64).numpy()
    omega = np.linalg.qr(g)[0]
    y = a @ omega
    nystrom = y @ np.linalg.pinv(omega.T @ y) @ y.T
    values, vectors = np.linalg.eigh(0.5 * (nystrom + nystrom.T))
    u, low = vectors[:, -rank:], values[-rank:]
    inverse = u @ np.diag((low[0] + shift) / (low + shift)) @ u.T + np.eye(d) - u @ u.T
    return inverse / (low[0] + shift)  # scaled to be an inverse


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_nystrom_is_the_formula_of_the_paper(rank: int, shift: float) -> None:
    system = build(spectrum(9, 1e3, 5.0), seed=2)
    operator = Operator(lambda v: system.matvec(v) + shift * v)
    got = dense(NystromPreconditioner(rank=rank, shift=shift, seed=5), system, operator)
    np.testing.assert_allclose(got, frangella(system.a.numpy(), rank, shift, 5), rtol=0, atol=1e-9 * np.abs(got).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_on_low_rank_plus_shift_one_step_is_enough(shift: float, dtype: torch.dtype) -> None:
    values = np.array([100.0, 30, 5, *[0.0] * 9]) + 0.5
    system = build(values, batch=(3,), dtype=dtype)
    recipe = NystromPreconditioner(rank=4 if shift else 12, shift=shift)
    result = CG(max_steps=30, rtol=1e-5, preconditioner=recipe).solve(system.matvec, system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED} and (result.steps <= 3).all()
    assert (CG(max_steps=30, rtol=1e-5).solve(system.matvec, system.b).steps >= 4).all()


def test_a_rank_above_d_is_the_inverse() -> None:
    system = build(np.linspace(1, 9, 6), batch=(2,))
    for shift in (0.0, 0.9):
        got = dense(NystromPreconditioner(rank=50, shift=shift), system)
        np.testing.assert_allclose(got, np.linalg.inv(system.a.numpy()), rtol=0, atol=1e-11)


def test_a_shift_above_the_smallest_eigenvalue_is_lowered() -> None:
    """A - shift I would be indefinite, and its approximation of no use. The eigenvalue that is lowered to counts as the next one."""
    system = build([50.0, 20, 5, 1, 0.2, 0.1], batch=(2,))
    m = dense(NystromPreconditioner(rank=6, shift=3.0), system)
    values = np.sort(np.linalg.eigvals(m @ system.a.numpy()).real, axis=-1)
    np.testing.assert_allclose(values, [[0.5, 1, 1, 1, 1, 1]] * 2, rtol=0, atol=1e-7)


def test_the_known_shift_of_a_proximal_problem_pays() -> None:
    """H = low rank + lambda: told lambda, the preconditioner needs only the rank of the loss."""
    values = np.array([*np.logspace(3, 1, 8), *[0.0] * 40]) + 2.0
    system = build(values, seed=1)

    def steps(recipe: Preconditioner | None) -> int:
        return int(CG(max_steps=200, rtol=1e-10, preconditioner=recipe).solve(system.matvec, system.b).steps)

    assert (
        steps(NystromPreconditioner(rank=10, shift=2.0))
        <= 2
        < steps(NystromPreconditioner(rank=6, shift=2.0))
        < steps(None)
    )


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    system = build_general([1.0, 2.0, 3.0])
    solver = GMRES(max_steps=9, preconditioner=NystromPreconditioner(rank=2))
    with pytest.raises(ValueError, match=r"NystromPreconditioner needs a symmetric matrix, .* Use Jacobi"):
        solver.solve(Operator(system.matvec, symmetric=False), system.b)


# --- on the solvers ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CG, MINRES, GMRES, BiCGStab])
@pytest.mark.parametrize("name", RECIPES)
def test_every_krylov_method_takes_it(name: str, make: Any) -> None:
    system = build(np.linspace(1, 9, 8), batch=(3,))
    result = make(max_steps=60, rtol=1e-10, preconditioner=RECIPES[name]).solve(system.matvec, system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED}
    np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=0, atol=1e-8)


def test_minres_with_jacobi_on_an_indefinite_matrix() -> None:
    scale = np.logspace(-3, 3, 12)
    base = build([*np.linspace(1, 2, 7), *-np.linspace(1, 2, 5)], seed=4)
    s = torch.tensor(scale, dtype=F64)
    system = System(s[:, None] * (base.a + 3 * torch.diag(torch.tensor([1.0, -1.0] * 6))) * s, base.b)
    plain = MINRES(max_steps=60, rtol=1e-8).solve(system.matvec, system.b)
    scaled = MINRES(max_steps=60, rtol=1e-8, preconditioner=Jacobi()).solve(system.matvec, system.b)
    assert scaled.status is Status.SOLVED_INDEFINITE and scaled.negative_curvature == 1
    assert plain.residual > 1e3 * scaled.residual


def test_the_field_takes_the_place_of_what_is_handed_over() -> None:
    system = build(spectrum(6, 1e4), batch=(3,))
    inverse = System(torch.linalg.inv(system.a), system.b)

    def never(v: Tensor) -> Tensor:
        raise AssertionError("the field has precedence")

    own = CG(max_steps=50, rtol=1e-8, preconditioner=inverse.matvec)
    assert own.solve(system.matvec, system.b, preconditioner=never).steps.tolist() == [1, 1, 1]
    handed = CG(max_steps=50, rtol=1e-8).solve(system.matvec, system.b, preconditioner=inverse.matvec)
    assert handed.steps.tolist() == [1, 1, 1]


def test_in_a_hypergradient_and_in_argmin() -> None:
    """The preconditioner sees the matrix of the problem, with damping, and changes nothing but the steps."""
    scale = torch.logspace(-3, 3, 8, dtype=F64)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (scale * phi.square()).sum() + 0.1 * phi.sum() ** 2 - theta @ phi,
        lambda phi, theta, data: phi.cos().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.linspace(0.5, 1, 8, dtype=F64)
    h = (torch.diag(scale) + 0.2 * torch.ones(8, 8, dtype=F64)).numpy()
    phi = torch.tensor(np.linalg.solve(h, theta.numpy()))
    for damping in (0.0, 0.5):
        expected = np.linalg.solve(h + damping * np.eye(8), -np.sin(phi.numpy()))
        linsys = CG(max_steps=12, rtol=1e-12, preconditioner=Jacobi())
        got = implicit_gradient(problem, phi, theta, linsys=linsys, damping=damping)
        assert got.linear.status is Status.CONVERGED
        np.testing.assert_allclose(got.grad.numpy(), expected, rtol=1e-9)
    solver = NewtonCG(max_steps=20, cg_steps=60, tol=1e-8)
    for recipe in (Jacobi(), NystromPreconditioner(rank=8)):
        linsys = CG(max_steps=30, rtol=1e-12, preconditioner=recipe)
        jacobian = torch.func.jacrev(lambda t, linsys=linsys: argmin(problem, t, solver=solver, linsys=linsys))(theta)
        np.testing.assert_allclose(
            jacobian.numpy(), np.linalg.inv(h), rtol=0, atol=1e-7 * np.abs(np.linalg.inv(h)).max()
        )


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: CG(max_steps=5, preconditioner=Jacobi), TypeError, r"preconditioner: .* Did you mean Jacobi\(\)\?"),
        (lambda: MINRES(max_steps=5, preconditioner="jacobi"), TypeError, r"preconditioner: expected None, Jacobi\(\)"),
        (lambda: GMRES(max_steps=5, preconditioner=3.0), TypeError, "preconditioner: .* got 3.0"),
        (lambda: Jacobi(num_probes=1), ValueError, "num_probes: expected at least 2, got 1"),
        (lambda: Jacobi(seed=-1), ValueError, "seed: expected at least 0"),
        (lambda: Jacobi(8), TypeError, "positional"),
        (lambda: NystromPreconditioner(), TypeError, "rank"),
        (lambda: NystromPreconditioner(rank=0), ValueError, "rank: expected at least 1, got 0"),
        (lambda: NystromPreconditioner(rank=2, shift=-1.0), ValueError, "shift: expected a finite number >= 0"),
        (lambda: NystromPreconditioner(rank=2, seed=0.5), TypeError, "seed: expected an integer"),
    ],
)
def test_constructor_errors(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
