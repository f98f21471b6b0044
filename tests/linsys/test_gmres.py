"""GMRES against SciPy, the definition (the smallest residual in the Krylov space), and matrices on which it must fail."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Status
from bilevel.linsys import GMRES, Operator
from tests.linsys.test_minres import smallest_residual
from tests.systems import BATCHES, DTYPES, Counter, System, build, build_general, shifted, spectrum, status_of

F64 = torch.float64
quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def scipy_iterates(a: np.ndarray, b: np.ndarray, restart: int, cycles: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    scipy.sparse.linalg.gmres(
        a, b, rtol=0.0, restart=restart, maxiter=cycles, callback=lambda x: found.append(x.copy()), callback_type="x"
    )
    return found


def cyclic(d: int) -> System:
    """The cyclic shift of d entries and the first unit vector: no residual falls before step d."""
    return System(torch.eye(d, dtype=F64).roll(1, 0), torch.eye(d, dtype=F64)[0])


@quick
@given(d=st.integers(1, 8), batch=st.sampled_from(BATCHES), seed=seeds)
def test_every_step_has_the_smallest_residual(d: int, batch: tuple[int, ...], seed: int) -> None:
    system = build_general(np.linspace(0.5, 3.0, d), batch=batch, seed=seed)
    a, b = system.a.reshape(-1, d, d).numpy(), system.b.reshape(-1, d).numpy()
    for k in range(1, d + 1):
        result = GMRES(max_steps=k, rtol=0.0).solve(Operator(system.matvec, symmetric=False), system.b)
        assert result.num_matvecs == k
        for i, u in enumerate(result.value.reshape(-1, d).numpy()):
            best = smallest_residual(a[i], b[i], k)
            np.testing.assert_allclose(u, best, rtol=0, atol=1e-8 * (1 + np.linalg.norm(best)))
        np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0, atol=1e-10)


@quick
@given(d=st.integers(2, 9), restart=st.integers(1, 4), seed=seeds)
def test_the_restarts_are_those_of_scipy(d: int, restart: int, seed: int) -> None:
    system = shifted(build_general(np.linspace(0.5, 2.0, d), seed=seed), 2.5)
    restart = min(restart, d)
    expected = scipy_iterates(system.a.numpy(), system.b.numpy(), restart, 3)
    for k, theirs in enumerate(expected, start=1):
        counter = Counter(system)
        result = GMRES(max_steps=k * restart, restart=restart, rtol=0.0).solve(counter, system.b)
        assert counter.calls == result.num_matvecs == k * restart + k - 1  # the true residual at every restart
        np.testing.assert_allclose(result.value.numpy(), theirs, rtol=0, atol=1e-8 * np.linalg.norm(theirs))


@quick
@given(d=st.integers(2, 8), seed=seeds)
def test_a_preconditioner_acts_from_the_right(d: int, seed: int) -> None:
    """A M y = b, u = M y; M is not symmetric. The residual is that of u."""
    system = build_general(np.linspace(0.5, 3.0, d), seed=seed)
    m = build_general(np.linspace(0.7, 2.0, d), seed=seed + 1)
    for k in range(1, d + 1):
        result = GMRES(max_steps=k, rtol=0.0, preconditioner=m.matvec).solve(system.matvec, system.b)
        expected = m.a.numpy() @ smallest_residual((system.a @ m.a).numpy(), system.b.numpy(), k)
        np.testing.assert_allclose(result.value.numpy(), expected, rtol=0, atol=1e-7 * (1 + np.linalg.norm(expected)))
        np.testing.assert_allclose(float(result.residual), system.true_residual(result.value), rtol=0, atol=1e-9)


@quick
@given(
    d=st.integers(1, 9),
    batch=st.sampled_from(BATCHES),
    seed=seeds,
    log_kappa=st.floats(0, 3),
    dtype=st.sampled_from(DTYPES),
    log_scale=st.floats(-3, 3),
)
def test_without_restarts_it_solves_any_system_in_d_steps(
    d: int, batch: tuple[int, ...], seed: int, log_kappa: float, dtype: torch.dtype, log_scale: float
) -> None:
    system = build_general(spectrum(d, 10**log_kappa, 10**log_scale), batch=batch, dtype=dtype, seed=seed)
    rtol = 1e-3 if dtype == torch.float32 else 1e-9
    result = GMRES(max_steps=d, rtol=rtol).solve(Operator(system.matvec, symmetric=False), system.b)
    assert result.value.dtype == dtype and result.codes.shape == batch
    assert set(status_of(result.codes)) == {Status.CONVERGED}
    size = np.linalg.norm(system.b.double().numpy(), axis=-1)
    assert (system.true_residual(result.value) <= 1.1 * rtol * size).all()


def test_steps_are_counted_per_problem_and_a_happy_breakdown_is_one() -> None:
    """k distinct eigenvalues take k steps; the Krylov space then ends."""
    parts = [
        build(values, seed=i) for i, values in enumerate(([2.0] * 4, [-1.0, 2, 2, 2], [-1.0, 2, 3, 3], [1.0, 2, 3, 4]))
    ]
    system = System(torch.stack([p.a for p in parts]), torch.stack([p.b for p in parts]))
    counter = Counter(system)
    result = GMRES(max_steps=30, rtol=1e-10).solve(counter, system.b)
    assert result.steps.tolist() == [1, 2, 3, 4] and set(status_of(result.codes)) == {Status.CONVERGED}
    assert result.num_matvecs == counter.calls == 5  # one more for the true residual
    np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=1e-8)
    fixed = GMRES(max_steps=12, rtol=0.0, restart=4).solve(system.matvec, system.b)  # goes on after it
    np.testing.assert_allclose(fixed.value.numpy(), system.solution(), rtol=1e-8)
    assert not fixed.failed.any()


def test_max_steps_tolerances_and_start() -> None:
    system = shifted(build_general(np.linspace(0.5, 2.0, 12), batch=(2,)), 2.2)
    for restart in (3, 30):
        short = GMRES(max_steps=5, rtol=1e-14, restart=restart).solve(system.matvec, system.b)
        assert status_of(short.codes) == [Status.MAX_STEPS] * 2 and short.steps.tolist() == [5, 5]
        np.testing.assert_allclose(short.residual.numpy(), system.true_residual(short.value), rtol=1e-9)
    loose = GMRES(max_steps=50, rtol=0.0, atol=0.3).solve(system.matvec, system.b)
    assert status_of(loose.codes) == [Status.CONVERGED] * 2 and (loose.steps < 12).all()
    noise = torch.randn(2, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    init = torch.tensor(system.solution()) + 0.02 * noise  # better than zero
    warm = GMRES(max_steps=4, rtol=0.0).solve(system.matvec, system.b, init=init)
    rest = GMRES(max_steps=4, rtol=0.0).solve(system.matvec, system.b - system.matvec(init))
    torch.testing.assert_close(warm.value, init + rest.value, rtol=0, atol=1e-12)
    solved = GMRES(max_steps=20).solve(system.matvec, system.b, init=torch.tensor(system.solution()))
    assert solved.steps.tolist() == [0, 0] and status_of(solved.codes) == [Status.CONVERGED] * 2


@pytest.mark.parametrize("rtol", [1e-8, 0.0])
def test_a_restart_that_stalls_for_ever_is_seen(rtol: float) -> None:
    system = cyclic(6)
    assert GMRES(max_steps=6, rtol=rtol).solve(system.matvec, system.b).status is Status.CONVERGED
    counter = Counter(system)
    stuck = GMRES(max_steps=60, restart=3, rtol=rtol).solve(counter, system.b)
    assert stuck.status is Status.DIVERGED and stuck.failed  # "or did not fall at all"
    assert counter.calls < 10 if rtol else counter.calls == 60 + 19
    assert GMRES(max_steps=5, rtol=rtol).solve(system.matvec, system.b).failed  # zero is no answer


def test_a_stall_below_where_zero_is_keeps_what_was_gained() -> None:
    """diag(1, rotation by 90 degrees), from a start that has the first entry right: r^T A r = 0 for what is left."""
    a = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]], dtype=F64)
    b, init = torch.tensor([4.0, 1.0, 0.0], dtype=F64), torch.tensor([4.0, 0.0, 0.0], dtype=F64)
    result = GMRES(max_steps=500, restart=1).solve(System(a, b).matvec, b, init=init)
    assert result.status is Status.MAX_STEPS and int(result.steps) < 5
    assert torch.equal(result.value, init) and result.residual == 1.0


def test_small_restarts_reach_the_same_solution() -> None:
    system = shifted(build_general(np.linspace(0.5, 2.0, 10), batch=(3,)), 2.5)
    for restart in (1, 2, 5):
        result = GMRES(max_steps=300, restart=restart, rtol=1e-10).solve(system.matvec, system.b)
        assert set(status_of(result.codes)) == {Status.CONVERGED}
        np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=0, atol=1e-8)


def test_the_basis_stays_orthogonal() -> None:
    """kappa = 1e10: with one pass of Gram-Schmidt the residual of the recurrence is far off in a single long cycle."""
    system = build_general(spectrum(40, 1e10), batch=(4,))
    result = GMRES(max_steps=39, restart=40, rtol=0.0).solve(system.matvec, system.b)
    size = np.linalg.norm(result.value.numpy(), axis=-1)
    np.testing.assert_allclose(
        result.residual.numpy(), system.true_residual(result.value), rtol=1e-6, atol=1e-14 * size.max()
    )


def test_it_goes_on_to_the_rounding_floor() -> None:
    system = build(spectrum(30, 1e8), batch=(4,))
    result = GMRES(max_steps=400, restart=60, rtol=1e-14).solve(system.matvec, system.b)
    assert (system.true_residual(result.value) < 1e8 * 2.2e-16 * 10 * np.linalg.norm(system.b.numpy(), axis=-1)).all()
    assert status_of(result.codes) == [Status.MAX_STEPS] * 4 and (result.steps < 400).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [[1.0, 2, 3, 4, 0], [*np.linspace(0.1, 3, 30), 0, 0], [0.0, 0.0, 0.0]])
def test_a_singular_inconsistent_system_is_reported(values: list[float], dtype: torch.dtype) -> None:
    system = build(values, batch=(5,), dtype=dtype)
    result = GMRES(max_steps=200, restart=40, rtol=1e-4).solve(system.matvec, system.b)
    assert status_of(result.codes) == [Status.SINGULAR] * 5 and (result.steps < 200).all()
    # a cycle that made it worse is not taken
    assert (system.true_residual(result.value) <= 1.001 * np.linalg.norm(system.b.double().numpy(), axis=-1)).all()


def test_a_nilpotent_matrix_is_reported() -> None:
    """Its Krylov space ends at once, without a solution: the hard breakdown."""
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    system = System(a, torch.tensor([1.0, 0.0], dtype=F64))
    result = GMRES(max_steps=10).solve(system.matvec, system.b)
    assert result.status is Status.SINGULAR and result.steps == 0
    consistent = GMRES(max_steps=10).solve(lambda v: v @ torch.diag(torch.tensor([2.0, 0.0], dtype=F64)), system.b)
    assert consistent.status is Status.CONVERGED and consistent.value.tolist() == [0.5, 0.0]


def test_an_ill_conditioned_matrix_is_not_called_singular() -> None:
    for seed in range(5):
        system = build_general([*np.linspace(1, 3, 12), 1e-11], seed=seed)
        result = GMRES(max_steps=100, rtol=1e-14).solve(system.matvec, system.b)
        assert result.status is not Status.SINGULAR


def test_what_stops_early_is_nothing_to_the_others() -> None:
    """Problems that end in the middle of a cycle, or of the last one."""
    system = shifted(build_general(np.linspace(0.5, 2.0, 10), batch=(3,)), 2.5)
    for max_steps, restart in ((7, 30), (40, 4), (9, 4), (200, 3)):
        solver = GMRES(max_steps=max_steps, restart=restart, rtol=1e-13)
        expected = solver.solve(system.matvec, system.b)
        easy = system.with_problem(1, a=2 * torch.eye(10, dtype=F64))
        result = solver.solve(easy.matvec, easy.b)
        assert result.steps[1] == 1
        for field in ("value", "codes", "steps", "residual"):
            assert torch.equal(getattr(result, field)[[0, 2]], getattr(expected, field)[[0, 2]]), field


def test_restart_is_checked() -> None:
    with pytest.raises(ValueError, match="restart: expected at least 1, got 0"):
        GMRES(max_steps=5, restart=0)
    with pytest.raises(ValueError, match="max_steps: expected at least 1, got 0"):
        GMRES(max_steps=0)


def test_a_task_that_fails_changes_no_bit_of_the_others() -> None:
    """One task needs many more columns than the others, or none because b is NaN: the others' sums must not notice."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        a = 0.5 * torch.randn(4, 20, 20, generator=g) / 20**0.5 + torch.eye(20)
        a[0], b = torch.randn(20, 20, generator=g), torch.randn(4, 20, generator=g)
        broken = b.clone()
        broken[0] = torch.nan
        one, other = (
            GMRES(max_steps=60, rtol=1e-4).solve(
                Operator(lambda v, a=a: torch.einsum("bij,bj->bi", a, v), symmetric=False), rhs
            )
            for rhs in (b, broken)
        )
        assert torch.equal(one.value[1:], other.value[1:]) and torch.equal(one.steps[1:], other.steps[1:])
        assert one.steps[0] > one.steps[1:].max() and other.failed.tolist() == [True, False, False, False]
