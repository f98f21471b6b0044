"""The Nystrom solver against dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bilevel import ProximalProblem, Status, implicit_gradient
from bilevel.linsys import Nystrom, Operator
from tests.systems import BATCHES, DTYPES, Counter, build, build_general, spectrum, status_of

F64 = torch.float64


def woodbury(h: np.ndarray, b: np.ndarray, rank: int, shift: float, seed: int) -> np.ndarray:
    """(H_k + shift I)^{-1} b by the formula of the paper, with the sketch that the documentation promises, in NumPy."""
    g = torch.randn(len(b), rank, generator=torch.Generator().manual_seed(seed), dtype=F64).numpy()
    omega = np.linalg.qr(g)[0]
    c = h @ omega  # H Omega
    return b / shift - c @ np.linalg.solve(shift * omega.T @ c + c.T @ c, c.T @ b) / shift


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_is_woodburys_formula(rank: int, batch: tuple[int, ...]) -> None:
    h = build(spectrum(9, 100.0), batch=batch)
    counter = Counter(h)
    result = Nystrom(rank=rank, shift=0.2, seed=4).solve(lambda v: counter(v) + 0.2 * v, h.b)
    assert counter.shapes == [(rank, *batch, 9), (*batch, 9)] and result.num_matvecs == rank + 1
    a, b = h.a.reshape(-1, 9, 9).numpy(), h.b.reshape(-1, 9).numpy()
    for i, u in enumerate(result.value.reshape(-1, 9).numpy()):
        np.testing.assert_allclose(u, woodbury(a[i], b[i], rank, 0.2, 4), rtol=0, atol=1e-9)
    whole = h.a + 0.2 * torch.eye(9, dtype=F64)
    residual = np.linalg.norm(h.b.numpy() - (whole @ result.value.unsqueeze(-1)).squeeze(-1).numpy(), axis=-1)
    np.testing.assert_allclose(result.residual.numpy(), residual, rtol=1e-10)
    # not what was asked for, and it says so; further off than zero is a failure
    worse = residual.reshape(-1) > np.linalg.norm(b, axis=-1)
    assert status_of(result.codes) == [Status.DIVERGED if fails else Status.MAX_STEPS for fails in worse]
    assert rank > 1 or worse.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_exact_where_the_rank_is_enough(dtype: torch.dtype) -> None:
    system = build(np.array([50.0, 20, 3, *[0.0] * 20]) + 0.7, batch=(3,), dtype=dtype)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    result = Nystrom(rank=5, shift=0.7, rtol=rtol).solve(system.matvec, system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED} and result.value.dtype == dtype
    np.testing.assert_allclose(result.value.double().numpy(), system.solution(), rtol=0, atol=10 * rtol)
    short = Nystrom(rank=2, shift=0.7, rtol=rtol).solve(system.matvec, system.b)
    assert set(status_of(short.codes)) == {Status.DIVERGED} and short.failed.all()
    assert (short.residual > torch.linalg.vector_norm(system.b, dim=-1)).all()


def test_more_rank_is_better_and_d_is_exact() -> None:
    system = build(spectrum(20, 1e4), batch=(4,))
    residuals = [Nystrom(rank=k, shift=1e-4).solve(system.matvec, system.b).residual for k in (2, 8, 14, 20, 100)]
    medians = [float(r.median()) for r in residuals]
    assert medians[0] > medians[1] > medians[2] > 1e3 * medians[3]
    assert medians[3] == medians[4] < 1e-9


def test_a_tiny_shift_does_not_blow_rounding_up() -> None:
    """rank = d: nothing is left outside the range of U but rounding, which is not to be divided by 1e-12."""
    system = build(np.linspace(1, 9, 12), batch=(3,))
    result = Nystrom(rank=12, shift=1e-12, rtol=1e-9).solve(system.matvec, system.b)
    assert set(status_of(result.codes)) == {Status.CONVERGED}
    np.testing.assert_allclose(result.value.numpy(), system.solution(), rtol=0, atol=1e-9)


def test_the_same_sketch_in_every_call_and_another_for_another_seed() -> None:
    system = build(spectrum(9, 100.0), batch=(2,))
    solve = lambda seed: Nystrom(rank=3, shift=0.01, seed=seed).solve(system.matvec, system.b).value  # noqa: E731
    torch.manual_seed(5)
    first = solve(0)
    torch.manual_seed(6)
    assert torch.equal(first, solve(0)) and not torch.equal(first, solve(1))


def test_eigenvalues_below_the_shift_count_as_shift() -> None:
    """A singular H without damping: where the paper has H + shift I, eigenvalues far above shift stay as they are."""
    system = build([10.0, 5.0, 0.0, 0.0], batch=(2,))
    q = np.linalg.eigh(system.a.numpy())[1]  # ascending: 0, 0, 5, 10
    expected = np.einsum("bij,j,bkj,bk->bi", q, 1 / np.array([0.1, 0.1, 5, 10]), q, system.b.numpy())
    result = Nystrom(rank=4, shift=0.1).solve(system.matvec, system.b)
    np.testing.assert_allclose(result.value.numpy(), expected, rtol=0, atol=1e-8)
    assert not result.failed.any() and set(status_of(result.codes)) == {Status.MAX_STEPS}


def test_negative_curvature_fails() -> None:
    healthy = build([3.0, 2.0, 1.0, 0.5], batch=(3,))
    system = healthy.with_problem(1, a=build([3.0, 2.0, 1.0, -0.5], seed=8).a)
    result = Nystrom(rank=4, shift=0.1).solve(system.matvec, system.b)
    assert status_of(result.codes) == [Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.CONVERGED]
    assert result.negative_curvature is not None and result.negative_curvature.tolist() == [0, 1, 0]
    expected = Nystrom(rank=4, shift=0.1).solve(healthy.matvec, healthy.b)
    assert torch.equal(result.value[[0, 2]], expected.value[[0, 2]])


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_right_hand_sides_cost_one_sketch(shared: int) -> None:
    system = build(np.linspace(1, 5, 4), batch=(3,))
    axes = (5, 2)[:shared]
    rhs = torch.randn(*axes, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    counter = Counter(system)
    result = Nystrom(rank=4, shift=0.5).solve(Operator(counter, shared=shared), rhs)
    assert counter.shapes == [(4, 3, 4), (*axes, 3, 4)]
    np.testing.assert_allclose(
        result.value.numpy(), np.linalg.solve(system.a.numpy(), rhs.numpy()[..., None])[..., 0], rtol=0, atol=1e-12
    )
    assert result.codes.shape == (*axes, 3) == result.negative_curvature.shape


def test_on_a_proximal_problem_with_few_examples() -> None:
    """Rank of the loss's Hessian: the number of examples. Against the closed form, with damping."""
    x = torch.randn(4, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    problem = ProximalProblem.from_losses(
        lambda phi, _: 0.5 * (x @ phi).square().sum(), lambda phi, _: phi.cos().sum(), 2.0
    )
    theta = torch.linspace(-1, 1, 30, dtype=F64)
    for damping in (0.0, 0.5):
        got = implicit_gradient(problem, theta, theta, linsys=Nystrom(rank=6, shift=2.0 + damping), damping=damping)
        assert got.linear.status is Status.CONVERGED
        h = (x.T @ x).numpy() + (2.0 + damping) * np.eye(30)
        np.testing.assert_allclose(got.grad.numpy(), 2 * np.linalg.solve(h, -np.sin(theta.numpy())), rtol=0, atol=1e-10)


def test_errors() -> None:
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        Nystrom(rank=0, shift=1.0)
    with pytest.raises(ValueError, match="shift: expected a finite number > 0, got 0"):
        Nystrom(rank=3, shift=0.0)
    with pytest.raises(TypeError, match="shift"):
        Nystrom(rank=3)
    system = build_general([1.0, 2.0])
    with pytest.raises(ValueError, match="Nystrom needs a symmetric matrix"):
        Nystrom(rank=2, shift=0.1).solve(Operator(system.matvec, symmetric=False), system.b)
