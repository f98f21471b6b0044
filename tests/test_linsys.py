"""Linear solvers against NumPy, SciPy and hand-written sums."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import Status, linsys
from bilevel.linsys import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    Exact,
    Identity,
    Jacobi,
    LinearSolver,
    Neumann,
    Nystrom,
    NystromPreconditioner,
)
from bilevel.linsys.base import all_finite
from tests.cases import LINSYS_NAMES, linear_solvers
from tests.systems import BATCHES, DTYPES, Counter, System, build, spectrum, status_of


def scipy_iterates(
    a: np.ndarray, b: np.ndarray, steps: int, m: np.ndarray | None = None, start: np.ndarray | None = None
) -> list[np.ndarray]:
    """The iterates of SciPy's CG after 1, 2, .., steps steps."""
    found: list[np.ndarray] = []
    scipy.sparse.linalg.cg(a, b, x0=start, rtol=0.0, maxiter=steps, M=m, callback=lambda x: found.append(x.copy()))
    return found


sizes = st.integers(1, 9)
batches = st.sampled_from(BATCHES)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=50, deadline=None)


# --- CG ------------------------------------------------------------------------------------------


@quick
@given(d=sizes, batch=batches, seed=seeds, log_kappa=st.floats(0.1, 2), log_scale=st.floats(-3, 3))
def test_cg_takes_the_steps_of_scipy(
    d: int, batch: tuple[int, ...], seed: int, log_kappa: float, log_scale: float
) -> None:
    system = build(spectrum(d, 10**log_kappa, 10**log_scale), batch=batch, seed=seed)
    a, b = system.a.reshape(-1, d, d).numpy(), system.b.reshape(-1, d).numpy()
    expected = [scipy_iterates(a[i], b[i], d) for i in range(len(a))]
    for k in range(1, d + 1):
        result = CG(max_steps=k, rtol=0.0).solve(system.matvec, system.b)
        ours = result.value.reshape(-1, d).numpy()
        for i in range(len(a)):
            theirs = expected[i][k - 1]
            if np.linalg.norm(b[i] - a[i] @ expected[i][max(k - 2, 0)]) < 1e-10 * np.linalg.norm(b[i]):
                theirs = np.linalg.solve(a[i], b[i])  # SciPy divides rounding by rounding from here on
            np.testing.assert_allclose(ours[i], theirs, rtol=0, atol=1e-8 * np.linalg.norm(theirs))
        assert result.num_matvecs == k


@quick
@given(d=st.integers(2, 8), seed=seeds)
def test_preconditioned_cg_takes_the_steps_of_scipy(d: int, seed: int) -> None:
    system = build(spectrum(d, 50.0), seed=seed)
    m = build(np.linspace(0.5, 3.0, d), seed=seed + 1)
    expected = scipy_iterates(system.a.numpy(), system.b.numpy(), d, m.a.numpy())
    for k in range(1, d + 1):
        result = CG(max_steps=k, rtol=0.0).solve(system.matvec, system.b, preconditioner=m.matvec)
        np.testing.assert_allclose(
            result.value.numpy(), expected[k - 1], rtol=0, atol=1e-7 * np.linalg.norm(expected[k - 1])
        )


def test_cg_with_the_inverse_as_preconditioner_takes_one_step() -> None:
    system = build(spectrum(6, 1e4), batch=(3,))
    inverse = System(torch.linalg.inv(system.a), system.b)
    result = CG(max_steps=50, rtol=1e-8).solve(system.matvec, system.b, preconditioner=inverse.matvec)
    assert result.steps.tolist() == [1, 1, 1]
    np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=1e-7)


@quick
@given(d=sizes, batch=batches, seed=seeds, log_kappa=st.floats(0, 6), dtype=st.sampled_from(DTYPES))
def test_cg_on_any_positive_definite_matrix(
    d: int, batch: tuple[int, ...], seed: int, log_kappa: float, dtype: torch.dtype
) -> None:
    log_kappa = min(log_kappa, 2.5) if dtype == torch.float32 else log_kappa
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    kappa = 10**log_kappa
    system = build(spectrum(d, kappa), batch=batch, dtype=dtype, seed=seed)
    result = CG(max_steps=300, rtol=rtol).solve(system.matvec, system.b)
    assert result.value.dtype == dtype and result.value.shape == (*batch, d)
    assert result.codes.shape == result.steps.shape == result.residual.shape == batch
    size = np.linalg.norm(system.b.double().numpy(), axis=-1)
    rounding = (
        30 * torch.finfo(dtype).eps * np.linalg.norm(result.value.double().numpy(), axis=-1)
    )  # of b - A u, |A| = 1
    assert (system.true_residual(result.value) <= rtol * size + rounding).all()
    assert (np.abs(system.true_residual(result.value) - result.residual.double().numpy()) <= rounding).all()
    # the true residual decides, even where the recurrence has met the tolerance and rounding keeps u a hair above it
    met = result.residual <= rtol * system.b.norm(dim=-1)
    assert torch.equal(result.codes, torch.where(met, int(Status.CONVERGED), int(Status.MAX_STEPS)))
    if (rounding < 1e-3 * rtol * size).all() and kappa < 100:
        assert met.all()
    error = np.linalg.norm(result.value.double().numpy() - system.solution(), axis=-1)
    assert (error <= kappa * (rtol * size + rounding)).all()


def test_cg_reports_the_true_residual_and_not_that_of_the_recurrence() -> None:
    # kappa = 1e6 in float32: the recurrence falls far below what b - A u can reach
    system = build(spectrum(30, 1e6), batch=(4,), dtype=torch.float32)
    result = CG(max_steps=1500, rtol=1e-6).solve(system.matvec, system.b)
    np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0.3)
    assert ((result.residual <= 1e-6 * system.b.norm(dim=-1)) == (result.codes == int(Status.CONVERGED))).all()


@pytest.mark.parametrize("batch", BATCHES)
def test_cg_solves_the_identity_in_one_step(batch: tuple[int, ...]) -> None:
    b = build(np.ones(5), batch=batch).b
    for solver in (CG(max_steps=10), CG(max_steps=1, rtol=0.0), CG(max_steps=10, rtol=0.0)):
        result = solver.solve(lambda v: v.clone(), b)
        assert torch.equal(result.value, b)
        assert (result.steps == 1).all()
        assert set(status_of(result.codes)) == {Status.CONVERGED}


def test_cg_fixed_steps_after_the_answer_do_nothing() -> None:
    """Rounding beyond step d is no negative curvature and no failure."""
    for dtype in DTYPES:
        for seed in range(40):
            system = build(spectrum(3, 10 ** (seed % 5)), batch=(8,), dtype=dtype, seed=seed)
            result = CG(max_steps=20, rtol=0.0, atol=0.0).solve(system.matvec, system.b)
            assert not result.failed.any(), result.describe()
            assert (result.negative_curvature == 0).all()
            # of the residual, not the error: what a backward stable method can promise
            floor = 100 * torch.finfo(dtype).eps * 10 ** (seed % 5) * np.linalg.norm(system.b.double().numpy(), axis=-1)
            assert (system.true_residual(result.value) <= floor).all()


def test_cg_steps_are_counted_per_problem() -> None:
    """k distinct eigenvalues take k steps."""
    parts = [
        build(values, seed=i) for i, values in enumerate(([2.0] * 4, [1.0, 2, 2, 2], [1.0, 2, 3, 3], [1.0, 2, 3, 4]))
    ]
    system = System(torch.stack([p.a for p in parts]), torch.stack([p.b for p in parts]))
    counter = Counter(system)
    result = CG(max_steps=30, rtol=1e-10).solve(counter, system.b)
    assert result.steps.tolist() == [1, 2, 3, 4]
    assert result.num_matvecs == counter.calls == 5  # one more for the true residual
    np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=1e-8)


def test_cg_max_steps_and_tolerances() -> None:
    system = build(spectrum(8, 1e3), batch=(2,))
    short = CG(max_steps=2, rtol=1e-12).solve(system.matvec, system.b)
    assert status_of(short.codes) == [Status.MAX_STEPS] * 2
    assert short.steps.tolist() == [2, 2] and not short.failed.any()
    loose = CG(max_steps=50, rtol=0.0, atol=0.3).solve(system.matvec, system.b)
    assert status_of(loose.codes) == [Status.CONVERGED] * 2
    assert (loose.residual <= 0.3).all() and (loose.steps < 8).all()
    both = CG(max_steps=50, rtol=1e-9, atol=0.3).solve(system.matvec, system.b)
    assert torch.equal(both.steps, loose.steps)  # the looser of the two decides


def test_cg_starts_from_init() -> None:
    system = build(spectrum(6, 100.0), batch=(3,))
    noise = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    init = torch.tensor(system.solution()) + 0.1 * noise
    kept = init.clone()
    for k in (1, 2, 4):
        result = CG(max_steps=k, rtol=0.0).solve(system.matvec, system.b, init=init)
        for i in range(3):
            expected = scipy_iterates(system.a[i].numpy(), system.b[i].numpy(), k, start=init[i].numpy())
            np.testing.assert_allclose(result.value[i].numpy(), expected[-1], rtol=1e-8)
    solved = CG(max_steps=20, rtol=1e-6).solve(system.matvec, system.b, init=torch.tensor(system.solution()))
    assert solved.steps.tolist() == [0, 0, 0] and status_of(solved.codes) == [Status.CONVERGED] * 3
    assert torch.equal(init, kept)


# --- CG at negative curvature --------------------------------------------------------------------


def first_negative_step(a: np.ndarray, b: np.ndarray) -> int:
    """How many steps CG takes before p^T A p <= 0.

    CG's curvatures are the pivots of the tridiagonal Q_k^T A Q_k, so the first that is not positive comes with the
    first k at which this matrix is not positive definite.
    """
    for k in range(1, len(b) + 1):
        krylov = np.stack([np.linalg.matrix_power(a, j) @ b for j in range(k)], axis=1)
        q = np.linalg.qr(krylov)[0]
        if np.linalg.eigvalsh(q.T @ a @ q)[0] <= 0:
            return k - 1
    return len(b)


def indefinite(seed: int = 0) -> System:
    """A system on which CG takes some steps before it meets negative curvature."""
    system = build([3.0, 2.5, 2.0, 1.0, 0.5, -0.2], seed=seed)
    return system


def test_cg_negative_curvature_fails() -> None:
    system = indefinite()
    for rtol in (1e-10, 0.0):
        result = CG(max_steps=50, rtol=rtol).solve(system.matvec, system.b)
        assert result.status is Status.NEGATIVE_CURVATURE
        assert result.failed and result.negative_curvature == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_steihaug_keeps_the_iterate_before(seed: int, rtol: float) -> None:
    system = indefinite(seed)
    a, b = system.a.numpy(), system.b.numpy()
    steps = first_negative_step(a, b)
    assert 1 <= steps < 6
    result = CG(max_steps=50, rtol=rtol, steihaug=True).solve(system.matvec, system.b)
    assert result.status is Status.STOPPED_AT_NEGATIVE_CURVATURE
    assert not result.failed and result.negative_curvature == 1 and result.num_steps == steps
    np.testing.assert_allclose(result.value.numpy(), scipy_iterates(a, b, steps)[-1], rtol=1e-8)
    np.testing.assert_allclose(float(result.residual), system.true_residual(result.value), rtol=1e-8)


def test_steihaug_at_the_first_direction() -> None:
    system = build([-1.0, -2.0, -3.0], batch=(2,))
    m = build([1.0, 2.0, 5.0], seed=3)
    kept = CG(max_steps=10, steihaug=True).solve(system.matvec, system.b, preconditioner=m.matvec)
    assert status_of(kept.codes) == [Status.STOPPED_AT_NEGATIVE_CURVATURE] * 2
    np.testing.assert_allclose(kept.value.numpy(), system.b.numpy() @ m.a.numpy(), rtol=1e-12)
    assert not kept.failed.any()
    without = CG(max_steps=10, steihaug=True).solve(system.matvec, system.b)
    assert status_of(without.codes) == [Status.NEGATIVE_CURVATURE] * 2


def test_steihaug_changes_nothing_on_a_positive_definite_matrix() -> None:
    system = build(spectrum(7, 100.0), batch=(2,))
    plain = CG(max_steps=50).solve(system.matvec, system.b)
    named = CG(max_steps=50, steihaug=True).solve(system.matvec, system.b)
    assert torch.equal(plain.value, named.value) and torch.equal(plain.codes, named.codes)


def test_cg_singular() -> None:
    """A = diag(1, 0), b = (1, 1): the second direction is (0, 2), exactly, and A p = 0."""
    a, b = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    system = System(a, b)
    result = CG(max_steps=10).solve(system.matvec, b)
    assert result.status is Status.SINGULAR and result.failed
    first = CG(max_steps=10).solve(lambda v: 0 * v, b)
    assert first.status is Status.SINGULAR
    kept = CG(max_steps=10, steihaug=True).solve(system.matvec, b)
    assert kept.status is Status.STOPPED_AT_NEGATIVE_CURVATURE, "steihaug keeps the iterate wherever p^T A p <= 0"
    assert kept.value.tolist() == [2.0, 2.0]


def test_cg_starts_where_the_energy_is_lower_though_the_residual_is_not() -> None:
    """What is left of that start is one eigenvector, so that it takes one step from there, and many from zero."""
    system = build(spectrum(12, 100.0, 1.0), seed=3)
    eigenvalues, vectors = np.linalg.eigh(system.a.numpy())
    solution = system.solution()
    start = solution + 1.5 * np.linalg.norm(system.b.numpy()) / eigenvalues[-1] * vectors[:, -1]
    assert np.linalg.norm(system.b.numpy() - system.a.numpy() @ start) > np.linalg.norm(system.b.numpy())
    assert 0.5 * start @ system.a.numpy() @ start < system.b.numpy() @ start  # the energy, which is 0 at zero
    result = CG(max_steps=30, rtol=1e-9).solve(system.matvec, system.b, init=torch.tensor(start))
    assert result.status is Status.CONVERGED and result.steps == 1
    assert CG(max_steps=30, rtol=1e-9).solve(system.matvec, system.b).steps > 5


# --- Neumann -------------------------------------------------------------------------------------


@quick
@given(d=sizes, batch=batches, seed=seeds, terms=st.integers(1, 12), dtype=st.sampled_from(DTYPES))
def test_neumann_is_the_partial_sum(d: int, batch: tuple[int, ...], seed: int, terms: int, dtype: torch.dtype) -> None:
    system = build(np.linspace(1.0, 4.0, d), batch=batch, dtype=dtype, seed=seed)
    step = 0.3
    a, b = system.a.double().numpy(), system.b.double().numpy()[..., None]
    power, expected = b, 0 * b
    for _ in range(terms):  # a sum_{k < terms} (I - a A)^k b
        expected = expected + step * power
        power = power - step * (a @ power)
    result = Neumann(num_terms=terms, step_size=step).solve(system.matvec, system.b)
    tolerance = 100 * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        result.value.double().numpy(), expected[..., 0], rtol=0, atol=tolerance * np.abs(b).max()
    )
    np.testing.assert_allclose(
        result.residual.double().numpy(),
        system.true_residual(result.value),
        rtol=0,
        atol=30 * tolerance * np.linalg.norm(b),
    )
    assert (result.steps == terms).all() and result.num_matvecs == terms


@quick
@given(d=sizes, batch=batches, seed=seeds, log_kappa=st.floats(0, 2), log_scale=st.floats(-3, 3))
def test_neumann_finds_its_step_size(
    d: int, batch: tuple[int, ...], seed: int, log_kappa: float, log_scale: float
) -> None:
    system = build(spectrum(d, 10**log_kappa, 10**log_scale), batch=batch, seed=seed)
    counter = Counter(system)
    result = Neumann(num_terms=5000, rtol=1e-8).solve(counter, system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED}
    assert result.num_matvecs == counter.calls
    expected = system.solution()
    np.testing.assert_allclose(
        result.value.numpy(), expected, rtol=0, atol=1.1e-8 * 10**log_kappa * np.linalg.norm(expected)
    )


def test_neumann_reports_the_true_residual_when_it_has_a_tolerance() -> None:
    # float32, kappa = 1e3: terms below the rounding of u are lost, the recurrence goes on falling
    system = build(spectrum(12, 1e3), batch=(3,), dtype=torch.float32)
    result = Neumann(num_terms=20_000, step_size=1.0, rtol=3e-6).solve(system.matvec, system.b)
    np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0.1)
    assert status_of(result.codes) == [Status.MAX_STEPS] * 3


@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_neumann_reports_divergence(rtol: float) -> None:
    good, steep, bent = build(np.linspace(1, 3, 4)), build([1.0, 2, 3, 8], seed=1), build([-0.5, 1, 2, 3], seed=2)
    system = System(torch.stack([good.a, steep.a, bent.a]), torch.stack([good.b, steep.b, bent.b]))
    result = Neumann(num_terms=300, step_size=0.4, rtol=rtol).solve(system.matvec, system.b)
    first = Status.CONVERGED if rtol else Status.MAX_STEPS
    assert status_of(result.codes) == [first, Status.DIVERGED, Status.DIVERGED]
    assert result.failed.tolist() == [False, True, True]
    np.testing.assert_allclose(result.value[0].numpy(), good.solution(), rtol=1e-8)


def test_neumann_that_grows_out_of_rounding_has_not_diverged() -> None:
    """The step is a little too long for an eigenvector that b has next to nothing of."""
    a, b = torch.tensor([0.5, 2.05], dtype=torch.float64), torch.tensor([1.0, 1e-16], dtype=torch.float64)
    result = Neumann(num_terms=60, step_size=1.0).solve(lambda v: a * v, b)
    assert result.residual > 1e-15 > 0.5**60  # it has grown: the first entry alone would have left less
    assert not result.failed, result.describe()
    np.testing.assert_allclose(result.value.numpy(), b.numpy() / a.numpy(), atol=1e-14)
    assert Neumann(num_terms=700, step_size=1.0).solve(lambda v: a * v, b).status is Status.DIVERGED


@pytest.mark.parametrize(
    "solver", [Neumann(num_terms=5), Neumann(num_terms=5, rtol=1e-6), Nystrom(rank=2, shift=0.5)], ids=repr
)
def test_a_matrix_of_zeros_is_not_answered(solver: LinearSolver) -> None:
    """Whatever the answer, nothing of b is met; (1, 2) is a batch beside it that is solved or on its way, and b = 0 is solved."""
    matrices = torch.diag_embed(torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    b = torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    result = solver.solve(lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1), b)
    assert Status(int(result.codes[0])) is Status.DIVERGED and result.failed.tolist() == [True, False, False]
    assert Status(int(result.codes[2])) is Status.CONVERGED


def test_neumann_that_overflows_has_diverged() -> None:
    system = build([1.0, 50.0], dtype=torch.float32)
    result = Neumann(num_terms=400, step_size=1.0).solve(system.matvec, system.b)
    assert result.status is Status.DIVERGED and not result.value.isfinite().all()


def test_neumann_is_not_fooled_by_a_residual_that_falls_first() -> None:
    """Indefinite with a small negative eigenvalue: the residual falls for many terms before it grows."""
    system = build([-0.02, 1.0, 1.5, 2.0])
    a = Neumann(num_terms=2, step_size=0.4).solve(system.matvec, system.b)
    assert a.status is Status.MAX_STEPS  # nothing to see yet
    b = Neumann(num_terms=400, step_size=0.4).solve(system.matvec, system.b)
    assert b.status is Status.DIVERGED


def test_neumann_steps_are_counted_per_problem_and_rounding_is_no_divergence() -> None:
    parts = [build(values, seed=i) for i, values in enumerate(([1.0] * 4, [0.5, 1, 1, 1], [0.1, 1, 1, 1]))]
    system = System(torch.stack([p.a for p in parts]), torch.stack([p.b for p in parts]))
    result = Neumann(num_terms=2000, step_size=1.0, rtol=1e-8).solve(system.matvec, system.b)
    assert status_of(result.codes) == [Status.CONVERGED] * 3
    for steps, factor in zip(result.steps.tolist(), (0.0, 0.5, 0.9), strict=True):
        bound = 1 if factor == 0 else np.log(1e-8) / np.log(factor)
        assert 0.6 * bound <= steps <= bound + 2
    forever = Neumann(num_terms=2000, step_size=0.9).solve(system.matvec, system.b)  # hundreds of terms of rounding
    assert not forever.failed.any()


def test_neumann_starts_from_init() -> None:
    system = build(np.linspace(1, 2, 4), batch=(2,))
    start = system.solution() + 0.1
    result = Neumann(num_terms=1, step_size=0.25).solve(system.matvec, system.b, init=torch.tensor(start))
    expected = start + 0.25 * (system.b.numpy() - np.einsum("bij,bj->bi", system.a.numpy(), start))
    np.testing.assert_allclose(result.value.numpy(), expected, rtol=1e-12)


# --- Exact and Identity --------------------------------------------------------------------------


@quick
@given(
    d=sizes, batch=batches, seed=seeds, log_kappa=st.floats(0, 6), dtype=st.sampled_from(DTYPES), signs=st.booleans()
)
def test_exact_is_numpy_solve(
    d: int, batch: tuple[int, ...], seed: int, log_kappa: float, dtype: torch.dtype, signs: bool
) -> None:
    kappa = 10 ** (min(log_kappa, 3) if dtype == torch.float32 else log_kappa)
    values = spectrum(d, kappa)
    if signs:
        values[seed % d] *= -1
    system = build(values, batch=batch, dtype=dtype, seed=seed)
    result = Exact().solve(system.matvec, system.b)
    assert result.value.dtype == dtype
    assert set(status_of(result.codes)) == {Status.SOLVED_INDEFINITE if signs else Status.CONVERGED}
    assert not result.failed.any()
    expected = system.solution()
    size = np.linalg.norm(expected, axis=-1)
    eps = torch.finfo(dtype).eps
    error = np.linalg.norm(result.value.double().numpy() - expected, axis=-1)
    assert (error <= 50 * d * eps * kappa * size).all()
    rounding = 50 * d * eps * size
    assert (np.abs(result.residual.double().numpy() - system.true_residual(result.value)) <= rounding).all()


@pytest.mark.parametrize("values", [[1.0, 1.0, 0.0], [2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1e-18, 0.5]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_reports_singular(values: list[float], dtype: torch.dtype) -> None:
    healthy = build([1.0, 2.0, 3.0], batch=(3,), dtype=dtype)
    system = healthy.with_problem(1, a=build(values, dtype=dtype, seed=5).a)
    result = Exact().solve(system.matvec, system.b)
    assert status_of(result.codes) == [Status.CONVERGED, Status.SINGULAR, Status.CONVERGED]
    expected = Exact().solve(healthy.matvec, healthy.b)
    assert torch.equal(result.value[[0, 2]], expected.value[[0, 2]])


def test_exact_refuses_an_asymmetric_matrix() -> None:
    a = torch.tensor([[2.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Exact\(\) needs a symmetric matrix"):
        Exact().solve(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), torch.ones(2, dtype=torch.float64))


def test_identity_is_the_preconditioner() -> None:
    m = build([0.5, 1.0, 2.0], seed=2)
    b = build([1.0, 1.0, 1.0], batch=(2,)).b

    def never(v: Tensor) -> Tensor:
        raise AssertionError("Identity() spends no product")

    result = Identity().solve(never, b, preconditioner=m.matvec)
    np.testing.assert_allclose(result.value.numpy(), b.numpy() @ m.a.numpy(), rtol=1e-12)
    assert result.residual.isnan().all() and result.num_matvecs == 0 and not result.failed.any()
    with pytest.raises(ValueError, match="known|knows part of its Hessian"):
        Identity().solve(never, b)
    broken = Identity().solve(
        never, torch.where(torch.tensor([[True], [False]]), torch.nan, b), preconditioner=m.matvec
    )
    assert broken.failed.tolist() == [True, False]


# --- what holds for every method -----------------------------------------------------------------


@pytest.mark.parametrize("name", LINSYS_NAMES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_solves(name: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    system = build(np.linspace(1, 10, 6), batch=batch, dtype=dtype)
    result = linear_solvers(rtol)[name].solve(system.matvec, system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED}
    np.testing.assert_allclose(result.value.double().numpy(), system.solution(), rtol=0, atol=20 * rtol)
    rounding = 100 * torch.finfo(dtype).eps * np.abs(system.solution()).max()
    np.testing.assert_allclose(
        result.residual.double().numpy(), system.true_residual(result.value), rtol=0, atol=10 * rounding
    )


@pytest.mark.parametrize("name", LINSYS_NAMES)
@pytest.mark.parametrize("batch", BATCHES)
def test_several_right_hand_sides(name: str, batch: tuple[int, ...]) -> None:
    """(k, *batch, d) with one matrix for each problem of the batch."""
    system = build(np.linspace(1, 5, 4), batch=batch)
    rhs = torch.randn(3, *batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = linear_solvers(1e-11)[name].solve(system.matvec, rhs)
    expected = np.linalg.solve(system.a.numpy(), rhs.numpy()[..., None])[..., 0]
    assert result.codes.shape == (3, *batch) and not result.failed.any()
    np.testing.assert_allclose(result.value.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LINSYS_NAMES)
def test_zero_right_hand_side_of_any_matrix(name: str) -> None:
    singular = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    expected = Status.SINGULAR if name == "exact" else Status.CONVERGED  # it has the matrix, and does not answer
    for matrix in (singular, 0 * singular):
        result = linear_solvers(1e-9)[name].solve(lambda v, a=matrix: v @ a, torch.zeros(2, 4, dtype=torch.float64))
        assert status_of(result.codes) == [expected] * 2
        assert name == "exact" or not (result.value.any() or result.residual.any())


@pytest.mark.parametrize("name", LINSYS_NAMES)
def test_zero_right_hand_side(name: str) -> None:
    system = build(np.linspace(1, 5, 4), batch=(3,)).with_problem(1, b=torch.zeros(4, dtype=torch.float64))
    for solver in (linear_solvers(1e-9)[name], linear_solvers(0.0)[name]):
        result = solver.solve(system.matvec, system.b)
        assert torch.equal(result.value[1], torch.zeros(4, dtype=torch.float64))
        assert Status(int(result.codes[1])) is Status.CONVERGED and float(result.residual[1]) == 0.0
        np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in LINSYS_NAMES if name not in ("exact", "nystrom")]
)  # these need no start
def test_a_start_that_is_worse_than_zero_is_not_used(name: str) -> None:
    system = build(np.linspace(1, 10, 6), batch=(4,))
    solution = torch.tensor(system.solution())
    start = torch.stack([1e12 * solution[0], -solution[1], torch.full_like(solution[2], torch.nan), 0.99 * solution[3]])
    solver = linear_solvers(1e-9)[name]
    found, plain = solver.solve(system.matvec, system.b, start), solver.solve(system.matvec, system.b)
    assert not found.failed.any() and torch.equal(found.codes, plain.codes)
    assert torch.equal(found.value[:3], plain.value[:3]) and torch.equal(found.steps[:3], plain.steps[:3])
    # 0.99 u leaves 0.01 b: a straight line to the answer for Krylov methods, too
    assert 0 < found.steps[3] <= plain.steps[3] and not torch.equal(found.value[3], plain.value[3])


def test_cg_uses_a_start_of_lower_energy_although_its_residual_is_larger() -> None:
    a = torch.diag(torch.tensor([1e6, 1.0], dtype=torch.float64))
    b, start = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1e-5, 1.0], dtype=torch.float64)
    assert (b - a @ start).norm() > b.norm()
    assert CG(max_steps=9).solve(lambda v: v @ a, b, start).steps == 1
    assert CG(max_steps=9, rtol=1e-9).solve(lambda v: v @ a, b, torch.tensor([1.0, 1.0]).double()).steps == 1


@pytest.mark.parametrize(
    "method", [MINRES(max_steps=30, rtol=1e-4), GMRES(max_steps=30, rtol=1e-4, restart=8)], ids=repr
)
def test_many_variables_do_not_look_like_a_singular_matrix(method: Any) -> None:
    """In float32 d eps is near 1 for a network."""
    values = torch.linspace(1 / 3, 1, 4_000_000)
    b = torch.randn(len(values), generator=torch.Generator().manual_seed(0))
    found = method.solve(lambda v: values * v, b)
    assert found.status is Status.CONVERGED and (found.value - b / values).norm() < 1e-3 * (b / values).norm()


@pytest.mark.parametrize("method", [CG(max_steps=500, rtol=1e-8), MINRES(max_steps=500, rtol=1e-8)], ids=repr)
def test_a_round_of_refinement_that_meets_the_tolerance_counts(method: Any) -> None:
    """However little it gains: the recurrence of MINRES ends between once and twice the tolerance here, for some of the problems."""
    system = build(np.logspace(0, -5.7, 20), batch=(300,))
    found = method.solve(system.matvec, system.b)
    assert set(status_of(found.codes)) == {Status.CONVERGED}
    assert (system.true_residual(found.value) <= 1.01e-8 * np.linalg.norm(system.b.numpy(), axis=-1)).all()


UNITS = [(60, 0), (-60, 0), (0, 60), (0, -60), (-100, -100), (90, 90), (-40, -60), (40, 60), (-30, 55), (30, -55)]


@pytest.mark.parametrize(
    "name", [name for name in LINSYS_NAMES if name != "nystrom"]
)  # which has a shift, in the units of A
@pytest.mark.parametrize("log_a, log_b", UNITS)
@pytest.mark.parametrize("warm", [False, True])
def test_the_units_of_a_system_do_not_matter(name: str, log_a: int, log_b: int, warm: bool) -> None:
    """In float32, whose numbers end at 2^128 and 2^-126, and their squares halfway."""
    system, solver = build(np.linspace(1, 10, 6), batch=(3,), dtype=torch.float32), linear_solvers(1e-5)[name]
    start = system.b.flip(-1) if warm else None
    in_units = None if start is None else start * 2.0**log_b / 2.0**log_a
    plain = solver.solve(system.matvec, system.b, start)
    found = solver.solve(lambda v: system.matvec(v) * 2.0**log_a, system.b * 2.0**log_b, in_units)
    assert torch.equal(found.codes, plain.codes) and not found.failed.any(), found.describe()
    assert torch.equal(found.steps, plain.steps)
    torch.testing.assert_close(found.value / 2.0**log_b * 2.0**log_a, plain.value, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name", [name for name in LINSYS_NAMES if name not in ("exact", "nystrom", "neumann", "cg-nystrom")]
)
@pytest.mark.parametrize("size", [1e-22, 1.0, 1e25])
def test_a_start_that_is_not_used_says_nothing_of_the_units(name: str, size: float) -> None:
    """Zero, and one that A maps to next to nothing."""
    diagonal = torch.tensor([1e-10, 1.0, 2.0, 3.0]) * size
    for start in ([0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]):
        b = torch.tensor([0.0, 1.0, 1.0, 1.0])
        found = linear_solvers(1e-5)[name].solve(lambda v: diagonal * v, b, torch.tensor(start))
        assert found.status is Status.CONVERGED
        torch.testing.assert_close(found.value * size, torch.tensor([0.0, 1.0, 1 / 2, 1 / 3]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_too_small_a_rank_is_no_solution_in_any_unit(scale: float) -> None:
    system = build(np.linspace(1, 10, 6), dtype=torch.float32)
    found = [Nystrom(rank=rank, shift=0.1, rtol=1e-5).solve(system.matvec, system.b * scale) for rank in (2, 6)]
    assert [one.status for one in found] == [Status.DIVERGED, Status.CONVERGED] and found[0].residual > 0
    np.testing.assert_allclose(found[1].value.numpy() / scale, system.solution(), rtol=1e-4)


@pytest.mark.parametrize("method", [CG(max_steps=9), MINRES(max_steps=9), GMRES(max_steps=9), BiCGStab(max_steps=9)])
def test_a_solution_beyond_the_largest_number_is_a_failure(method: Any) -> None:
    found = method.solve(lambda v: 1e-30 * v, torch.tensor([[1e20, 2e20], [1.0, 2.0]]))
    assert status_of(found.codes) == [Status.NON_FINITE, Status.CONVERGED]


TWINS: dict[str, LinearSolver] = {
    **linear_solvers(1e-10),
    "cg fixed": CG(max_steps=8, rtol=0.0),
    "cg steihaug": CG(max_steps=8, steihaug=True),
    "neumann fixed": Neumann(num_terms=30, step_size=0.2),
    "minres fixed": MINRES(max_steps=8, rtol=0.0),
    "gmres restarted": GMRES(max_steps=40, restart=2),
    "gmres fixed": GMRES(max_steps=7, restart=3, rtol=0.0),
    "bicgstab fixed": BiCGStab(max_steps=8, rtol=0.0),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("sick", ["nan in A", "inf in A", "nan in b", "inf in b", "negative", "singular", "huge"])
def test_one_sick_problem_leaves_the_others_as_they_were(name: str, sick: str) -> None:
    healthy = build(np.linspace(1, 5, 4), batch=(3,), seed=7)
    nan, inf = healthy.a[1].clone(), healthy.a[1].clone()
    nan[0, 0], inf[2, 2] = torch.nan, torch.inf
    bad_b = healthy.b[1].clone()
    bad_b[3] = torch.nan if sick == "nan in b" else torch.inf
    matrices = {
        "nan in A": nan,
        "inf in A": inf,
        "negative": build([-1.0, 1, 2, 3], seed=3).a,
        "singular": build([0.0, 0, 0, 0]).a,
        "huge": 1e200 * healthy.a[1],
    }
    system = healthy.with_problem(1, matrices.get(sick), None if sick in matrices else bad_b)
    expected = TWINS[name].solve(healthy.matvec, healthy.b)
    result = TWINS[name].solve(system.matvec, system.b)
    for field in ("value", "codes", "steps", "residual"):
        assert torch.equal(getattr(result, field)[[0, 2]], getattr(expected, field)[[0, 2]]), field
    if "nan" in sick or "inf" in sick:
        assert Status(int(result.codes[1])) is Status.NON_FINITE


@pytest.mark.parametrize("name", TWINS)
def test_a_problem_that_is_done_keeps_its_answer_while_others_go_on(name: str) -> None:
    """Two distinct eigenvalues need two steps; the one in the middle needs more."""
    easy = build([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], batch=(3,), seed=7)
    system = easy.with_problem(1, build(spectrum(6, 100.0, 2.0), seed=8).a)
    expected, result = (TWINS[name].solve(s.matvec, s.b) for s in (easy, system))
    for field in ("value", "codes", "steps", "residual"):
        assert torch.equal(getattr(result, field)[[0, 2]], getattr(expected, field)[[0, 2]]), field


class NoHostReads(TorchDispatchMode):
    """Raises where a number of a tensor becomes one of Python: on a device that is a wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in TWINS if "fixed" in name])
def test_fixed_steps_read_nothing_back_and_are_all_taken(name: str) -> None:
    system = build(np.linspace(1, 5, 12), batch=(3,))
    counter = Counter(system)
    with NoHostReads():
        result = TWINS[name].solve(counter, system.b)
    expected = {"cg fixed": 8, "neumann fixed": 30, "minres fixed": 8 + 1, "gmres fixed": 7 + 2, "bicgstab fixed": 16}[
        name
    ]
    assert counter.calls == result.num_matvecs == expected
    with pytest.raises(AssertionError), NoHostReads():  # the test would see it
        CG(max_steps=3).solve(system.matvec, system.b)


@pytest.mark.parametrize("name", TWINS)
def test_inputs_are_not_changed(name: str) -> None:
    system = build(np.linspace(1, 5, 4), batch=(3,))
    b, init = system.b.clone(), torch.ones_like(system.b)
    result = TWINS[name].solve(system.matvec, system.b, init=init)
    assert torch.equal(system.b, b) and torch.equal(init, torch.ones_like(b))
    assert result.value.data_ptr() not in (system.b.data_ptr(), init.data_ptr())


OF_RTOL_2 = [
    *(partial(kind, max_steps=5, rtol=2.0) for kind in (CG, MINRES, GMRES, BiCGStab)),
    partial(Neumann, num_terms=5, rtol=2.0),
    partial(Nystrom, rank=2, shift=1.0, rtol=2.0),
]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: CG(max_steps=0), ValueError, "max_steps: expected at least 1, got 0"),
        (lambda: CG(max_steps=2.0), TypeError, "max_steps: expected an integer, got float"),
        (lambda: CG(max_steps=True), TypeError, "max_steps: expected an integer, got bool"),
        (lambda: CG(max_steps=5, rtol=-1e-3), ValueError, "rtol: expected a finite number >= 0, got -0.001"),
        (lambda: CG(max_steps=5, rtol=float("nan")), ValueError, "rtol: expected a finite number"),
        (lambda: CG(max_steps=5, atol=float("inf")), ValueError, "atol: expected a finite number"),
        (lambda: CG(max_steps=5, atol="small"), TypeError, "atol: expected a number, got str"),
        (lambda: CG(max_steps=5, atol=1j), TypeError, "atol: expected a number, got complex"),
        (lambda: CG(max_steps=5, atol=torch.ones(())), TypeError, "atol: expected a number, got Tensor"),
        (lambda: CG(max_steps=np.bool_(True)), TypeError, "max_steps: expected an integer, got bool"),
        (lambda: CG(max_steps=np.float64(2)), TypeError, "max_steps: expected an integer, got float64"),
        (lambda: CG(max_steps=np.int64(0)), ValueError, "max_steps: expected at least 1, got 0"),
        (lambda: CG(max_steps=5, rtol=np.float32("nan")), ValueError, "rtol: expected a finite number >= 0, got .*nan"),
        (lambda: CG(max_steps=5, rtol=np.float32("inf")), ValueError, "rtol: expected a finite number >= 0, got .*inf"),
        (lambda: CG(max_steps=5, tol=1e-3), TypeError, "tol"),
        (lambda: CG(5), TypeError, "positional"),
        (lambda: CG(), TypeError, "max_steps"),
        (lambda: Neumann(num_terms=0), ValueError, "num_terms: expected at least 1, got 0"),
        (lambda: Neumann(num_terms=5, step_size=0.0), ValueError, "step_size: expected a finite number > 0, got 0"),
        (lambda: Neumann(num_terms=5, rtol=-1.0), ValueError, "rtol: expected"),
        (lambda: Neumann(num_terms=5, max_steps=3), TypeError, "max_steps"),
        *(
            (make, ValueError, "rtol: expected a relative residual below 1, such as 1e-3, got 2.0: that of zero is 1")
            for make in OF_RTOL_2
        ),
        (lambda: Exact(rtol=1e-3), TypeError, "rtol"),
        (lambda: Identity(damping=1.0), TypeError, "damping"),
    ],
)
def test_constructor_errors(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (lambda: CG(max_steps=np.int8(5), rtol=np.float32(0.5)), CG(max_steps=5, rtol=0.5)),
        (lambda: CG(max_steps=5, rtol=np.float16(0.25), atol=np.int64(1)), CG(max_steps=5, rtol=0.25, atol=1)),
        (lambda: GMRES(max_steps=np.int64(5), restart=np.uint8(2)), GMRES(max_steps=5, restart=2)),
        (lambda: Neumann(num_terms=np.int32(5), step_size=np.float64(0.1)), Neumann(num_terms=5, step_size=0.1)),
        (lambda: Nystrom(rank=np.int64(2), shift=np.float32(0.5)), Nystrom(rank=2, shift=0.5)),
        (
            lambda: NystromPreconditioner(rank=np.int64(2), shift=np.float32(0.5)),
            NystromPreconditioner(rank=2, shift=0.5),
        ),
        (lambda: Jacobi(num_probes=np.int64(2)), Jacobi(num_probes=2)),
    ],
)
def test_numbers_of_any_kind_become_those_of_python(given: Any, same: Any) -> None:
    assert repr(given()) == repr(same)


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (10**400, ValueError, "expected a finite number"),
        (np.float32(np.inf), ValueError, "expected a finite number"),
        (Fraction(1, 2), TypeError, "expected a number, got Fraction"),
        (torch.tensor(0.5), TypeError, "expected a number, got Tensor"),
        (np.array(0.5), TypeError, "expected a number, got ndarray"),
    ],
)
def test_what_is_no_number_of_python_or_numpy_is_refused(number: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"rtol: {words}"):
        CG(max_steps=5, rtol=number)


def test_the_first_term_of_neumann_is_counted() -> None:
    system = build(spectrum(3, 10.0))
    found = Neumann(num_terms=1, step_size=0.1).solve(system.matvec, system.b)
    assert torch.allclose(found.value, 0.1 * system.b, rtol=1e-12) and found.num_matvecs == 1


@pytest.mark.parametrize("solver", [*TWINS.values(), Identity()], ids=repr)
def test_bad_systems_are_refused(solver: LinearSolver) -> None:
    def matvec(v: Tensor) -> Tensor:
        return v.clone()

    with pytest.raises(
        ValueError, match=r"b: expected a real floating tensor of shape \(\*batch, d\), got torch.int64"
    ):
        solver.solve(matvec, torch.ones(3, dtype=torch.int64), preconditioner=matvec)
    with pytest.raises(ValueError, match=r"init: expected shape \(2, 3\) and torch.float32 like b, got \(3,\)"):
        solver.solve(matvec, torch.ones(2, 3), init=torch.ones(3), preconditioner=matvec)


@pytest.mark.parametrize("solver", [*TWINS.values(), Identity()], ids=repr)
def test_the_repr_is_the_log_line(solver: LinearSolver) -> None:
    assert eval(repr(solver), vars(linsys).copy()) == solver
    with pytest.raises(AttributeError):
        solver.rtol = 1.0  # type: ignore[attr-defined, misc]


def test_the_repr_reads_as_written() -> None:
    assert repr(CG(max_steps=5)) == "CG(max_steps=5, rtol=1e-06, atol=0.0, preconditioner=None, steihaug=False)"


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_cg_of_a_singular_matrix_is_no_answer(dtype: torch.dtype) -> None:
    """b is not in its range: a residual that is still there after many times as many steps as variables stays."""
    g = torch.Generator().manual_seed(0)
    for d, rank in ((2, 1), (3, 2), (10, 9)) * 30:
        x = torch.randn(rank, d, generator=g, dtype=torch.float64).to(dtype)
        a, b = x.T @ x, torch.randn(d, generator=g, dtype=torch.float64).to(dtype)
        found = CG(max_steps=20 * d).solve(lambda v, a=a: v @ a, b)
        assert found.failed or found.residual <= 0.5 * b.norm(), found.describe()


@pytest.mark.parametrize(("d", "kappa"), [(3, 1e12), (5, 1e8), (50, 1e6)])
def test_a_residual_says_little_where_the_matrix_is_ill_conditioned(d: int, kappa: float) -> None:
    """As many steps as variables leave much of b, and an answer that is good to some digits: no failure."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        q = np.linalg.qr(rng.standard_normal((d, d)))[0]
        a, b = q * np.geomspace(1, 1 / kappa, d) @ q.T, rng.standard_normal(d)
        matrix = torch.from_numpy((a + a.T) / 2)
        found = CG(max_steps=d).solve(lambda v, a=matrix: v @ a, torch.from_numpy(b))
        assert not found.failed, found.describe()


@pytest.mark.parametrize(
    "method", [CG(max_steps=9), MINRES(max_steps=9), GMRES(max_steps=9), BiCGStab(max_steps=9)], ids=repr
)
def test_a_start_may_be_larger_than_the_right_hand_side_by_any_factor(method: Any) -> None:
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    found = method.solve(lambda v: v @ a, torch.full((2,), 1e-25), init=torch.ones(2))
    assert not found.failed and found.value.abs().max() < 1e-5
    b = torch.full((2,), 1e-25)
    assert method.solve(lambda v: v @ a, b, init=torch.linalg.solve(a, b)).steps == 0


@pytest.mark.parametrize("method", [CG(max_steps=9), GMRES(max_steps=9)], ids=repr)
def test_no_variables_are_no_error(method: Any) -> None:
    assert method.solve(lambda v: v, torch.zeros(3, 0)).value.shape == (3, 0)


def test_cg_that_was_stopped_early_may_be_no_better_than_zero() -> None:
    """Its residual is not what it reduces: with fewer steps than variables that is no failure."""
    a = torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64))
    b = torch.cat([torch.ones(1), torch.full((29,), 1e-1)]).double()
    found = CG(max_steps=3, rtol=0.0).solve(lambda v: v @ a, b)
    assert found.residual > b.norm() and found.status is Status.MAX_STEPS


@pytest.mark.parametrize(
    "method", [CG(max_steps=9), MINRES(max_steps=9), GMRES(max_steps=9), BiCGStab(max_steps=9)], ids=repr
)
@pytest.mark.parametrize("scale", [1e-22, 1e-23, 1e-30, 1e22, 1e30])
def test_right_hand_sides_whose_squares_are_no_numbers(method: Any, scale: float) -> None:
    """In float32: below the smallest number, or above the largest."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    b = torch.tensor([1.0, 1.0]) * scale
    found = method.solve(lambda v: v @ a, b)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.unwrap() / scale, torch.linalg.solve(a, torch.ones(2)), rtol=1e-5, atol=0)
    batch = method.solve(lambda v: v @ a, torch.stack([b, torch.ones(2)]))
    torch.testing.assert_close(batch.unwrap()[0] / scale, torch.linalg.solve(a, torch.ones(2)), rtol=1e-5, atol=0)
    assert torch.equal(batch.unwrap()[1], method.solve(lambda v: v @ a, torch.ones(2, 2)).unwrap()[1])


def test_an_absolute_tolerance_is_in_the_units_of_the_system() -> None:
    a, b = torch.diag(torch.logspace(0, 2, 8)), torch.ones(8) * 1e-25
    assert CG(max_steps=50, rtol=0.0, atol=1e-24).solve(lambda v: v @ a, b).steps == 0
    assert CG(max_steps=50, rtol=0.0, atol=1e-27).solve(lambda v: v @ a, b).steps > 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0,), (3, 0)], ids=str)
def test_all_finite(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What ``isfinite`` says, wherever NaN and infinity stand, beside numbers of any size."""
    x = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    flat = x.reshape(-1)
    for i in range(-1, flat.numel()):
        for bad in (torch.nan, torch.inf, -torch.inf):
            y = flat.clone()
            if i >= 0:
                y[i] = bad
            y = y.reshape(shape)
            for found in (all_finite(y), torch.func.vmap(all_finite)(y) if len(shape) > 1 else all_finite(y)):
                assert torch.equal(found, y.isfinite().all(-1))


@pytest.mark.parametrize(
    "solver", [CG(max_steps=10), MINRES(max_steps=10), GMRES(max_steps=10), BiCGStab(max_steps=10), Exact()], ids=repr
)
@pytest.mark.parametrize("dtype, size", [(torch.float32, 3e-39), (torch.float64, 1e-310)], ids=str)
def test_right_hand_sides_that_are_subnormal(solver: LinearSolver, dtype: torch.dtype, size: float) -> None:
    """Of a saturated loss: such a task must not fail beside the others."""
    b = torch.tensor([[1.0, 2.0], [size, 2 * size]], dtype=dtype)
    found = solver.solve(lambda v: 2 * v, b)
    assert not found.failed.any(), found.describe()
    np.testing.assert_allclose(found.value[0].numpy(), b[0].numpy() / 2, rtol=1e-6)
    np.testing.assert_allclose(found.value[1].double().numpy() / size, [0.5, 1.0], rtol=1e-5)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e-20), (torch.float64, 1e-160)], ids=str)
def test_cg_calls_a_small_matrix_no_singular_one(dtype: torch.dtype, scale: float) -> None:
    """Nor where the length of the answer has a square that is no number."""
    d = 30
    a = scale * torch.tensor(2.1 * np.eye(d) - np.eye(d, k=1) - np.eye(d, k=-1), dtype=dtype)
    for steps, rtol in ((1, 1e-6), (2, 1e-6), (2, 0.0)):
        found = CG(max_steps=steps, rtol=rtol).solve(lambda v: a @ v, torch.ones(d, dtype=dtype))
        assert found.status is Status.MAX_STEPS, found.describe()
