"""MINRES against SciPy, the definition (the smallest residual in the Krylov space), and known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Status
from bilevel.linsys import CG, MINRES
from tests.systems import BATCHES, DTYPES, Counter, System, build, spectrum, status_of

F64 = torch.float64
quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def mixed(d: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues of both signs, away from zero, all different."""
    return np.linspace(0.5, 3.0, d) * rng.choice([-1.0, 1.0], d)


def smallest_residual(a: np.ndarray, b: np.ndarray, k: int, m: np.ndarray | None = None) -> np.ndarray:
    """The minimiser of |b - A u| (in the norm of M) over the Krylov space of M A and M b, of dimension k, by dense least squares."""
    m = np.eye(len(b)) if m is None else m
    basis = np.zeros((len(b), 0))
    v = m @ b
    for _ in range(k):
        for _ in range(2):
            v = v - basis @ (basis.T @ v)
        v = v / np.linalg.norm(v)
        basis, v = np.column_stack([basis, v]), m @ (a @ v)
    root = np.linalg.cholesky(m).T
    return basis @ np.linalg.lstsq(root @ a @ basis, root @ b, rcond=None)[0]


@quick
@given(d=st.integers(1, 8), batch=st.sampled_from(BATCHES), seed=seeds)
def test_every_step_has_the_smallest_residual(d: int, batch: tuple[int, ...], seed: int) -> None:
    system = build(mixed(d, np.random.default_rng(seed)), batch=batch, seed=seed)
    a, b = system.a.reshape(-1, d, d).numpy(), system.b.reshape(-1, d).numpy()
    for k in range(1, d + 1):
        result = MINRES(max_steps=k, rtol=0.0).solve(system.matvec, system.b)
        assert result.num_matvecs == k + 1  # which measures
        for i, u in enumerate(result.value.reshape(-1, d).numpy()):
            best = smallest_residual(a[i], b[i], k)
            np.testing.assert_allclose(u, best, rtol=0, atol=1e-8 * (1 + np.linalg.norm(best)))
        np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0, atol=1e-10)


def scipy_iterates(a: np.ndarray, b: np.ndarray, steps: int, m: np.ndarray | None) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    scipy.sparse.linalg.minres(a, b, M=m, rtol=1e-300, maxiter=steps, callback=lambda x: found.append(x.copy()))
    return found


@quick
@given(d=st.integers(3, 8), seed=seeds)
def test_the_iterates_are_those_of_scipy(d: int, seed: int) -> None:
    system = build(mixed(d, np.random.default_rng(seed)), seed=seed)
    m = build(np.linspace(0.5, 3.0, d), seed=seed + 1)
    a, b, m_matrix = system.a.numpy(), system.b.numpy(), m.a.numpy()
    for own in (None, m_matrix):
        for k, theirs in enumerate(scipy_iterates(a, b, d - 1, own), start=1):
            ours = MINRES(max_steps=k, rtol=0.0).solve(
                system.matvec, system.b, preconditioner=None if own is None else m.matvec
            )
            np.testing.assert_allclose(ours.value.numpy(), theirs, rtol=0, atol=1e-8 * (1 + np.linalg.norm(theirs)))
            np.testing.assert_allclose(float(ours.residual), system.true_residual(ours.value), rtol=1e-7)


@quick
@given(d=st.integers(2, 7), seed=seeds)
def test_a_preconditioner_changes_the_norm_that_is_minimised(d: int, seed: int) -> None:
    system = build(mixed(d, np.random.default_rng(seed)), seed=seed)
    m = build(np.linspace(0.5, 3.0, d), seed=seed + 1)
    for k in range(1, d + 1):
        result = MINRES(max_steps=k, rtol=0.0, preconditioner=m.matvec).solve(system.matvec, system.b)
        best = smallest_residual(system.a.numpy(), system.b.numpy(), k, m.a.numpy())
        np.testing.assert_allclose(result.value.numpy(), best, rtol=0, atol=1e-7 * (1 + np.linalg.norm(best)))


@quick
@given(
    d=st.integers(1, 9),
    batch=st.sampled_from(BATCHES),
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    log_scale=st.floats(-3, 3),
)
def test_it_solves_indefinite_systems_and_says_so(
    d: int, batch: tuple[int, ...], seed: int, dtype: torch.dtype, log_scale: float
) -> None:
    values = mixed(d, np.random.default_rng(seed))
    system = build(10**log_scale * values, batch=batch, dtype=dtype, seed=seed)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    result = MINRES(max_steps=200, rtol=rtol).solve(system.matvec, system.b)
    assert result.value.dtype == dtype and result.codes.shape == batch
    assert (system.true_residual(result.value) <= 1.1 * rtol * np.linalg.norm(system.b.double().numpy(), axis=-1)).all()
    expected = Status.SOLVED_INDEFINITE if (values < 0).any() else Status.CONVERGED
    assert set(status_of(result.codes)) == {expected} and not result.failed.any()
    assert (result.negative_curvature == int((values < 0).any())).all()


@pytest.mark.parametrize("seed", range(20))
def test_no_negative_curvature_is_seen_where_there_is_none(seed: int) -> None:
    """Ill-conditioned and long: rounding must not be taken for a negative eigenvalue."""
    for dtype in DTYPES:
        system = build(spectrum(12, 10 ** (1 + seed % 10)), batch=(4,), dtype=dtype, seed=seed)
        for solver in (MINRES(max_steps=200, rtol=1e-12), MINRES(max_steps=60, rtol=0.0)):
            result = solver.solve(system.matvec, system.b)
            assert (result.negative_curvature == 0).all()
            assert int(Status.SOLVED_INDEFINITE) not in result.codes.tolist()


def test_noise_after_the_answer_is_no_negative_curvature() -> None:
    """b in the span of two eigenvectors of positive curvature: what the others do with rounding after step 2 is not counted."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    values = np.array([1.0, 2.0, -1, -2, -3, -4, -5, -6])
    a = torch.tensor((q * values) @ q.T)
    b = torch.tensor(np.stack([q[:, 0] + q[:, 1], q.sum(1)]))
    result = MINRES(max_steps=20, rtol=1e-10).solve(lambda v: v @ a, b)
    assert status_of(result.codes) == [Status.CONVERGED, Status.SOLVED_INDEFINITE]
    assert result.steps.tolist() == [2, 8] and result.negative_curvature.tolist() == [0, 1]


def test_one_product_per_step_and_one_for_the_true_residual() -> None:
    """k distinct eigenvalues take k steps, of whatever sign."""
    parts = [
        build(values, seed=i)
        for i, values in enumerate(([2.0] * 4, [-1.0, 2, 2, 2], [-1.0, 2, -3, -3], [1.0, -2, 3, 4]))
    ]
    system = System(torch.stack([p.a for p in parts]), torch.stack([p.b for p in parts]))
    counter = Counter(system)
    result = MINRES(max_steps=30, rtol=1e-10).solve(counter, system.b)
    assert result.steps.tolist() == [1, 2, 3, 4]
    assert result.num_matvecs == counter.calls == 5
    np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=1e-8)


def test_max_steps_tolerances_and_start() -> None:
    system = build([*np.linspace(1, 30, 12), -2.0], batch=(2,))
    short = MINRES(max_steps=3, rtol=1e-12).solve(system.matvec, system.b)
    assert status_of(short.codes) == [Status.MAX_STEPS] * 2 and short.steps.tolist() == [3, 3]
    assert not short.failed.any()
    loose = MINRES(max_steps=50, rtol=0.0, atol=1.0).solve(system.matvec, system.b)
    assert status_of(loose.codes) == [Status.SOLVED_INDEFINITE] * 2
    tight = MINRES(max_steps=50, rtol=1e-9).solve(system.matvec, system.b)
    assert (loose.residual <= 1.0).all() and (loose.steps < tight.steps).all()
    both = MINRES(max_steps=50, rtol=1e-9, atol=1.0).solve(system.matvec, system.b)
    assert torch.equal(both.steps, loose.steps)  # the looser of the two decides
    noise = torch.randn(2, 13, dtype=F64, generator=torch.Generator().manual_seed(1))
    init = torch.tensor(system.solution()) + 0.02 * noise  # better than zero
    for k in (1, 3):  # from a start it is the same as for b - A init from zero
        warm = MINRES(max_steps=k, rtol=0.0).solve(system.matvec, system.b, init=init)
        rest = MINRES(max_steps=k, rtol=0.0).solve(system.matvec, system.b - system.matvec(init))
        torch.testing.assert_close(warm.value, init + rest.value, rtol=0, atol=1e-12)
        assert warm.num_matvecs == k + 2
    solved = MINRES(max_steps=20).solve(system.matvec, system.b, init=torch.tensor(system.solution()))
    assert solved.steps.tolist() == [0, 0] and status_of(solved.codes) == [Status.CONVERGED] * 2


def test_on_a_definite_matrix_it_takes_the_steps_of_cg_and_has_the_smaller_residual() -> None:
    system = build(np.linspace(1, 20, 12), batch=(3,))
    for k in (2, 5, 8):
        minres = MINRES(max_steps=k, rtol=0.0).solve(system.matvec, system.b)
        cg = CG(max_steps=k, rtol=0.0).solve(system.matvec, system.b)
        assert (minres.residual < cg.residual).all()


def test_fixed_steps_after_the_answer_do_nothing() -> None:
    for dtype in DTYPES:
        for seed in range(20):
            system = build([3.0, -1.0, 0.5], batch=(8,), dtype=dtype, seed=seed)
            counter = Counter(system)
            result = MINRES(max_steps=20, rtol=0.0, atol=0.0).solve(counter, system.b)
            assert counter.calls == result.num_matvecs == 20 + 1
            assert not result.failed.any(), result.describe()
            size = np.linalg.norm(system.b.double().numpy(), axis=-1)
            assert (system.true_residual(result.value) <= 200 * torch.finfo(dtype).eps * size).all()


# --- what rounding does --------------------------------------------------------------------------


def test_it_reaches_the_rounding_floor_where_one_pass_does_not() -> None:
    """The short recurrences lose kappa^2 eps; going on from the true residual brings it to kappa eps (with a factor of about 10)."""
    system = build(spectrum(30, 1e7), batch=(4,))
    one_pass = MINRES(max_steps=250, rtol=0.0).solve(system.matvec, system.b)
    assert (one_pass.residual < 1e-8).all()  # so the recurrence says
    size = np.linalg.norm(system.b.numpy(), axis=-1)
    assert (system.true_residual(one_pass.value) > 1e-7 * size).all()
    result = MINRES(max_steps=2000, rtol=1e-14).solve(system.matvec, system.b)
    assert (system.true_residual(result.value) < 1e7 * 2.2e-16 * 10 * size).all()
    np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0.5)  # noise by now
    assert status_of(result.codes) == [Status.MAX_STEPS] * 4  # and it says that this is not what was asked for
    assert (result.steps < 2000).all()  # and stops where another pass does not help


def test_the_steps_of_all_passes_together_stay_below_max_steps() -> None:
    system = build(spectrum(30, 1e7), batch=(4,))
    for max_steps in (150, 200, 260):
        result = MINRES(max_steps=max_steps, rtol=1e-14).solve(system.matvec, system.b)
        assert (result.steps <= max_steps).all()


def test_what_another_pass_does_for_one_problem_is_nothing_to_the_others() -> None:
    system = build(spectrum(20, 1e6), batch=(3,))
    for limit in (60, 70, 90, 120, 400):
        solver = MINRES(max_steps=limit, rtol=1e-13)
        expected = solver.solve(system.matvec, system.b)
        easy = system.with_problem(1, a=torch.eye(20, dtype=F64))
        result = solver.solve(easy.matvec, easy.b)
        for field in ("value", "codes", "steps", "residual"):
            assert torch.equal(getattr(result, field)[[0, 2]], getattr(expected, field)[[0, 2]]), field


# --- singular matrices ---------------------------------------------------------------------------

SINGULAR = {
    "small": [1.0, 2, 3, 4, 0],
    "two": [*np.linspace(0.1, 3, 30), 0, 0],
    "indefinite": [*np.logspace(0, -3, 40), *-np.logspace(0, -2, 10), 0, 0, 0],
    "exact": [2.0, 2.0, 2.0, 0.0],
    "zero": [0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_inconsistent_system_is_reported(name: str, dtype: torch.dtype) -> None:
    system = build(SINGULAR[name], batch=(5,), dtype=dtype)
    result = MINRES(max_steps=600, rtol=1e-4).solve(system.matvec, system.b)
    assert status_of(result.codes) == [Status.SINGULAR] * 5
    assert (result.steps < 600).all()  # it knows when to stop
    # as far as float32 can tell at the size of u, which may have begun to grow
    rounding = (
        30 * torch.finfo(dtype).eps * np.linalg.norm(result.value.double().numpy(), axis=-1) * max(SINGULAR[name])
    )
    assert (np.abs(result.residual.double().numpy() - system.true_residual(result.value)) <= 1e-6 + rounding).all()


@pytest.mark.parametrize("name", ["small", "two", "exact", "zero"])
def test_its_value_is_near_a_least_squares_solution(name: str) -> None:
    """Its residual is that of the pseudo-inverse. In a few of many systems rounding lets one step too many pass."""
    system = build(SINGULAR[name], batch=(40,))
    best = np.einsum("bij,bj->bi", np.linalg.pinv(system.a.numpy(), rcond=1e-10), system.b.numpy())
    least = system.true_residual(torch.tensor(best))
    result = MINRES(max_steps=600).solve(system.matvec, system.b)
    assert status_of(result.codes) == [Status.SINGULAR] * 40
    excess = system.true_residual(result.value) / least - 1
    assert np.quantile(excess, 0.85) < 1e-6 and np.mean(excess) < 0.5


@pytest.mark.parametrize("name", ["small", "two", "indefinite", "exact"])
def test_a_singular_consistent_system_has_the_solution_of_least_norm(name: str) -> None:
    system = build(SINGULAR[name], batch=(3,))
    b = system.matvec(system.b)  # in the range of A
    result = MINRES(max_steps=600, rtol=1e-8).solve(system.matvec, b)
    assert not result.failed.any()
    expected = np.einsum("bij,bj->bi", np.linalg.pinv(system.a.numpy(), rcond=1e-10), b.numpy())
    np.testing.assert_allclose(result.value.numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ill_conditioned_matrix_is_not_called_singular(dtype: torch.dtype) -> None:
    """One tiny eigenvalue, which b has a part of: the residual nearly stops on the way, as it does at a least-squares solution."""
    tiny = 1e-9 if dtype == F64 else 1e-4
    system = build([*np.linspace(1, 10, 30), tiny], batch=(5,), dtype=dtype)
    for solver in (MINRES(max_steps=k, rtol=1e-14) for k in (10, 20, 30, 40, 300)):
        assert int(Status.SINGULAR) not in solver.solve(system.matvec, system.b).codes.tolist()


def test_a_solve_that_gains_nothing_at_all_has_failed() -> None:
    """A = [[0, 1], [1, 0]], b = (1, 0): the first step cannot lower the residual, and u = 0 is no answer."""
    a, b = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    system = System(a, b)
    for rtol in (1e-6, 0.0):
        nothing = MINRES(max_steps=1, rtol=rtol).solve(system.matvec, b)
        assert nothing.status is Status.DIVERGED and nothing.failed
    two = MINRES(max_steps=2).solve(system.matvec, b)
    assert two.status is Status.SOLVED_INDEFINITE and two.value.tolist() == [0.0, 1.0]


# --- preconditioners that are none ---------------------------------------------------------------


def test_an_indefinite_preconditioner_is_refused() -> None:
    system = build([1.0, 2.0, 3.0], batch=(2,))
    bad = build([1.0, 1.0, -1.0], batch=(2,), seed=1)
    for solver in (MINRES(max_steps=9), CG(max_steps=9)):
        with pytest.raises(
            ValueError, match=r"preconditioner: expected a symmetric positive definite M, got v\^T M v < 0"
        ):
            solver.solve(system.matvec, system.b, preconditioner=bad.matvec)


def test_a_preconditioner_is_found_out_on_the_way_too() -> None:
    """b^T M b > 0, and then r^T M r < 0."""
    system = build([1.0, 2.0, 3.0])
    m = torch.diag(torch.tensor([1.0, 1.0, -10.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.0], dtype=F64)
    for solver in (MINRES(max_steps=1), MINRES(max_steps=9), CG(max_steps=9)):
        with pytest.raises(ValueError, match=r"v\^T M v < 0"):
            solver.solve(system.matvec, b, preconditioner=lambda v: v @ m)


def test_overflow_is_a_failure_and_not_called_singular() -> None:
    system = build([1e25, 2e25, -3e25], dtype=torch.float32)
    for rtol in (1e-6, 0.0):
        result = MINRES(max_steps=9, rtol=rtol).solve(lambda v: 1e20 * system.matvec(v), system.b)
        assert result.failed and result.status is not Status.SINGULAR


def test_a_full_solve_against_scipy_with_a_tolerance() -> None:
    system = build([*np.linspace(1, 100, 40), *-np.linspace(1, 50, 20)], batch=(2,))
    result = MINRES(max_steps=500, rtol=1e-9).solve(system.matvec, system.b)
    for i in range(2):
        expected = scipy.linalg.solve(system.a[i].numpy(), system.b[i].numpy(), assume_a="sym")
        np.testing.assert_allclose(result.value[i].numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "kappa"), [(torch.float32, 1e5), (F64, 1e10)])
def test_fixed_steps_are_not_called_converged_where_the_recurrence_has_drifted(
    dtype: torch.dtype, kappa: float
) -> None:
    """Its error grows with the square of the condition number: all of these said CONVERGED, with errors of b in u of more than its
    size. What is called so now has no more left than rounding explains, and of the others the residual is the true one.
    """
    drifted = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.standard_normal((5, 5)))[0]
        a = torch.as_tensor(q * np.geomspace(1, 1 / kappa, 5) @ q.T).to(dtype)
        b = torch.as_tensor(rng.standard_normal(5)).to(dtype)
        found = MINRES(max_steps=100, rtol=0.0).solve(lambda v, a=a: v @ a, b)
        left = (b.double() - a.double() @ found.value.double()).norm()
        eps = torch.finfo(dtype).eps
        if found.status is Status.CONVERGED:
            assert left <= 2e3 * eps * b.norm()
        else:
            drifted += 1
            rounding = eps * a.double().norm() * found.value.double().norm()
            assert (found.residual - left).abs() <= 100 * rounding + 1e-3 * left
    assert drifted > 5
