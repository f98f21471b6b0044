"""BiCGStab against SciPy, and the ways in which it breaks down."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Status
from bilevel.linsys import BiCGStab, Operator
from tests.systems import BATCHES, DTYPES, Counter, System, build, build_general, shifted, spectrum, status_of

F64 = torch.float64
quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def scipy_iterates(a: np.ndarray, b: np.ndarray, steps: int, m: np.ndarray | None = None) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    scipy.sparse.linalg.bicgstab(a, b, M=m, rtol=0.0, maxiter=steps, callback=lambda x: found.append(x.copy()))
    return found


@quick
@given(d=st.integers(4, 9), batch=st.sampled_from(BATCHES), seed=seeds, preconditioned=st.booleans())
def test_the_iterates_are_those_of_scipy(d: int, batch: tuple[int, ...], seed: int, preconditioned: bool) -> None:
    system = shifted(build_general(np.linspace(0.5, 2.0, d), batch=batch, seed=seed), 3.0)
    m = build(np.linspace(0.7, 1.5, d), batch=batch, seed=seed + 1)
    a, b, m_matrix = (x.reshape(-1, *x.shape[len(batch) :]).numpy() for x in (system.a, system.b, m.a))
    for k in (1, 2, 3):
        counter = Counter(system)
        solver = BiCGStab(max_steps=k, rtol=0.0, preconditioner=m.matvec if preconditioned else None)
        result = solver.solve(counter, system.b)
        assert counter.calls == result.num_matvecs == 2 * k and (result.steps == k).all()
        for i, u in enumerate(result.value.reshape(-1, d).numpy()):
            expected = scipy_iterates(a[i], b[i], k, m_matrix[i] if preconditioned else None)[-1]
            np.testing.assert_allclose(u, expected, rtol=0, atol=1e-8 * np.linalg.norm(expected))
        np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0, atol=1e-9)


@quick
@given(
    d=st.integers(1, 9),
    batch=st.sampled_from(BATCHES),
    seed=seeds,
    dtype=st.sampled_from(DTYPES),
    log_scale=st.floats(-3, 3),
)
def test_it_solves_systems_with_their_eigenvalues_on_one_side(
    d: int, batch: tuple[int, ...], seed: int, dtype: torch.dtype, log_scale: float
) -> None:
    scale = 10**log_scale
    system = shifted(build_general(scale * np.linspace(0.5, 1.0, d), batch=batch, dtype=dtype, seed=seed), 1.5 * scale)
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    result = BiCGStab(max_steps=200, rtol=rtol).solve(Operator(system.matvec, symmetric=False), system.b)
    assert result.value.dtype == dtype and set(status_of(result.codes)) == {Status.CONVERGED}
    size = np.linalg.norm(system.b.double().numpy(), axis=-1)
    assert (system.true_residual(result.value) <= 1.1 * rtol * size).all()
    expected = system.solution()
    assert (np.linalg.norm(result.value.double().numpy() - expected, axis=-1) <= 4 * rtol * size / scale).all()


def test_it_reports_the_true_residual_and_goes_on_with_it() -> None:
    """float32, kappa = 3e4: the recurrence falls far below what b - A u can reach."""
    system = build(spectrum(20, 3e4), batch=(4,), dtype=torch.float32)
    result = BiCGStab(max_steps=2000, rtol=1e-7).solve(system.matvec, system.b)
    np.testing.assert_allclose(result.residual.numpy(), system.true_residual(result.value), rtol=0.5)
    assert not result.failed.any()
    assert ((result.residual <= 1e-7 * system.b.norm(dim=-1)) == (result.codes == int(Status.CONVERGED))).all()


def test_steps_are_counted_per_problem_and_half_a_step_may_do() -> None:
    """On a multiple of the identity the first half step is the solution: omega would be 0 / 0."""
    parts = [build([2.0] * 4, seed=1), build([1.0, 1.0, 2.0, 2.0], seed=2), build([1.0, 2.0, 3.0, 4.0], seed=3)]
    system = System(torch.stack([p.a for p in parts]), torch.stack([p.b for p in parts]))
    for rtol in (1e-10, 0.0):
        result = BiCGStab(max_steps=9, rtol=rtol).solve(system.matvec, system.b)
        assert set(status_of(result.codes)) == {Status.CONVERGED}
        assert result.steps[0] == 1 and result.steps[0] < result.steps[1] <= result.steps[2]
        np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=1e-8)


def test_max_steps_tolerances_and_start() -> None:
    system = shifted(build_general(np.linspace(0.5, 2.0, 12), batch=(2,)), 2.5)
    short = BiCGStab(max_steps=2, rtol=1e-14).solve(system.matvec, system.b)
    assert status_of(short.codes) == [Status.MAX_STEPS] * 2 and short.num_matvecs == 5
    loose = BiCGStab(max_steps=50, rtol=0.0, atol=0.3).solve(system.matvec, system.b)
    assert status_of(loose.codes) == [Status.CONVERGED] * 2 and (loose.residual <= 0.3).all()
    noise = torch.randn(2, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    init = torch.tensor(system.solution()) + 0.02 * noise  # better than zero
    warm = BiCGStab(max_steps=2, rtol=0.0).solve(system.matvec, system.b, init=init)
    rest = BiCGStab(max_steps=2, rtol=0.0).solve(system.matvec, system.b - system.matvec(init))
    torch.testing.assert_close(warm.value, init + rest.value, rtol=0, atol=1e-11)


# --- breakdowns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-8, 0.0])
def test_a_skew_symmetric_matrix_is_a_breakdown(rtol: float) -> None:
    """r^T A r = 0 for every r: no step is defined, and none after a fresh start."""
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    healthy = shifted(build_general([1.0, 2.0], batch=(3,)), 2.5)
    system = healthy.with_problem(1, a=a)
    result = BiCGStab(max_steps=20, rtol=rtol).solve(system.matvec, system.b)
    assert status_of(result.codes)[1] is Status.BREAKDOWN and result.failed.tolist() == [False, True, False]
    assert result.steps[1] == 0
    expected = BiCGStab(max_steps=20, rtol=rtol).solve(healthy.matvec, healthy.b)
    assert torch.equal(result.value[[0, 2]], expected.value[[0, 2]])
    with pytest.raises(Exception, match=r"BREAKDOWN .*Solve with GMRES or Exact"):
        BiCGStab(max_steps=20, rtol=rtol).solve(lambda v: v @ a.T, torch.ones(2, dtype=F64)).unwrap()


@pytest.mark.parametrize("seed", range(4))
def test_a_residual_that_grows_until_it_overflows_is_a_breakdown(seed: int) -> None:
    """A condition number of 1e6 in float32. The numbers of A and b are innocent; a NaN among them is another matter."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(100, 100, generator=g, dtype=F64))[0]
    a, b = ((q * torch.logspace(0, 6, 100, dtype=F64)) @ q.T).float(), torch.randn(100, generator=g)
    solver = BiCGStab(max_steps=5000, rtol=1e-6)
    result = solver.solve(Operator(lambda v: v @ a.T, symmetric=False), b)
    assert result.status is Status.BREAKDOWN and result.residual.isfinite() and result.value.isfinite().all()
    a[0, 0] = torch.nan
    assert solver.solve(Operator(lambda v: v @ a.T, symmetric=False), b).status is Status.NON_FINITE


def test_a_breakdown_that_a_fresh_start_mends() -> None:
    """Small integers make exact zeros: where SciPy gives up with -10 or -11, a fresh start or another shadow residual goes on."""
    found = 0
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        a = rng.integers(-2, 3, (3, 3)).astype(float)
        b = rng.integers(-2, 3, 3).astype(float)
        if abs(np.linalg.det(a)) < 0.5 or not b.any() or np.linalg.eigvals(a).real.min() < 0.3:
            continue
        _, info = scipy.sparse.linalg.bicgstab(a, b, rtol=1e-10, maxiter=100)
        if info >= 0:
            continue
        found += 1
        system = System(torch.tensor(a), torch.tensor(b))
        result = BiCGStab(max_steps=100, rtol=1e-10).solve(system.matvec, system.b)
        assert result.status is Status.CONVERGED
        np.testing.assert_allclose(result.value.numpy(), np.linalg.solve(a, b), rtol=0, atol=1e-7)
    assert found >= 8


BREAKDOWNS = {
    "rho = 0": ([[2, 1, 1], [2, -1, -1], [-1, -2, 0]], [0, 2, -2]),
    "omega = 0": ([[-2, 1, -1], [-1, 1, -2], [2, 2, -1]], [2, -1, -2]),
    "sigma = 0": ([[-1, 2, 2], [0, 2, 0], [-2, 1, 2]], [1, -1, 1]),
}


@pytest.mark.parametrize("name", BREAKDOWNS)
def test_each_kind_of_breakdown(name: str) -> None:
    """Found by search: without the fresh start each of them divides zero by zero."""
    a, b = (torch.tensor(x, dtype=F64) for x in BREAKDOWNS[name])
    result = BiCGStab(max_steps=60, rtol=1e-9).solve(System(a, b).matvec, b)
    assert result.status is Status.CONVERGED
    np.testing.assert_allclose(result.value.numpy(), np.linalg.solve(a.numpy(), b.numpy()), rtol=0, atol=1e-7)


def test_an_answer_that_only_a_singular_matrix_has_is_called_so() -> None:
    """|u| is so large that A u would not be of the size of b if A had no singular value at the rounding level.

    Rounding may make the residual of a few explode first.
    """
    system = build([*np.linspace(0.1, 3, 30), 0, 0], batch=(40,))
    result = BiCGStab(max_steps=200, rtol=1e-10).solve(system.matvec, system.b)
    assert result.failed.all()
    assert status_of(result.codes).count(Status.SINGULAR) >= 30


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
def test_a_singular_inconsistent_system_fails(values: list[float]) -> None:
    system = build(values, batch=(4,))
    result = BiCGStab(max_steps=100).solve(system.matvec, system.b)
    assert result.failed.all()
    if not any(values):
        assert status_of(result.codes) == [Status.SINGULAR] * 4


def test_an_answer_worse_than_none_has_failed() -> None:
    """Eigenvalues on a circle around zero: the residual does not fall."""
    angle = 2 * torch.pi * torch.arange(12, dtype=F64) / 12
    a = torch.block_diag(*[torch.tensor([[t.cos(), -t.sin()], [t.sin(), t.cos()]], dtype=F64) for t in angle])
    b = torch.randn(24, dtype=F64, generator=torch.Generator().manual_seed(0))
    system = System(a, b)
    for steps in range(1, 12):
        result = BiCGStab(max_steps=steps, rtol=0.0).solve(system.matvec, b)
        worse = system.true_residual(result.value) >= float(b.norm())
        assert bool(result.failed) == worse or result.status is Status.BREAKDOWN


def test_the_recurrence_is_not_believed_after_it_has_been_large() -> None:
    """A permutation with a sign: the residual passes through 1e14, and a hundredth of the answer with it."""
    a = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, -1]], dtype=torch.float64)
    b = torch.tensor([2.0, 2, -2, 2], dtype=torch.float64)
    found = BiCGStab(max_steps=8, rtol=0.0).solve(Operator(lambda v: a @ v, symmetric=False), b)
    assert (b - a @ found.value).norm() > 1e-3 and found.status is Status.MAX_STEPS
