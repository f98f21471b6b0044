"""Ritz values against dense eigenvalues (numpy) and ARPACK (scipy)."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from bilevel.linsys import ritz_values
from bilevel.linsys.lanczos import spread


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))[0]
    a = (q * np.asarray(eigenvalues)) @ q.T
    return 0.5 * (a + a.T)


def look(a, b, steps, dtype=torch.float64):
    a, b = torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)
    return ritz_values(lambda v: (a @ v.unsqueeze(-1)).squeeze(-1), b, steps)


@pytest.mark.parametrize("d", [1, 2, 7, 25])
def test_all_eigenvalues_after_d_steps(d):
    rng = np.random.default_rng(d)
    a = symmetric(rng.standard_normal(d) * 3, d)
    values, residuals = look(a, rng.standard_normal(d), 100)
    assert values.shape == residuals.shape == (d,)  # more than d products would be noise
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a), atol=1e-12)
    assert residuals.max() < 1e-12


def test_the_ends_agree_with_arpack():
    d = 400
    rng = np.random.default_rng(1)
    a = symmetric(np.concatenate([[-5.0, -1.0], rng.random(d - 4), [20.0, 300.0]]))
    values, residuals = look(a, rng.standard_normal(d), 40)
    ends = scipy.sparse.linalg.eigsh(a, k=2, which="BE", return_eigenvectors=False)
    np.testing.assert_allclose([values[0], values[-1]], np.sort(ends), rtol=1e-10)
    assert residuals[0] < 1e-8 and residuals[-1] < 1e-8


def test_ritz_values_lie_inside_and_residuals_tell_how_far_an_eigenvalue_is():
    rng = np.random.default_rng(2)
    exact = np.sort(rng.standard_normal(200))
    values, residuals = look(symmetric(exact), rng.standard_normal(200), 12)
    assert exact[0] <= values[0] and values[-1] <= exact[-1]
    distance = np.abs(exact[None] - values.numpy()[:, None]).min(1)
    assert (distance <= residuals.numpy() + 1e-12).all()
    assert residuals[0] > 1e-3  # not converged after 12 steps, and it says so
    # the definition: |A y - value y| of the Ritz vector, from a Krylov basis by QR
    start = np.random.default_rng(2)
    start.standard_normal(200)
    krylov = [start.standard_normal(200)]
    for _ in range(11):
        krylov.append(symmetric(exact) @ krylov[-1])
    q = np.linalg.qr(np.stack(krylov, 1))[0]
    dense, vectors = np.linalg.eigh(q.T @ symmetric(exact) @ q)
    np.testing.assert_allclose(values, dense, atol=1e-6)
    y = q @ vectors[:, 0]
    np.testing.assert_allclose(residuals[0], np.linalg.norm(symmetric(exact) @ y - dense[0] * y), rtol=1e-4)


def test_no_ghosts_of_a_converged_eigenvalue():
    """Without reorthogonalisation, 60 steps find the largest eigenvalue several times."""
    d = 300
    a = symmetric(np.concatenate([np.linspace(0, 1, d - 1), [1e4]]))
    values, _ = look(a, np.random.default_rng(3).standard_normal(d), 60)
    assert (values > 2).sum() == 1


def test_an_invariant_subspace_ends_the_process():
    a = np.diag([1.0, 2.0, 3.0, 4.0, -7.0])
    values, residuals = look(a, [1.0, 0.0, 1.0, 0.0, 0.0], 5)
    np.testing.assert_allclose(values, [1, 3, 3, 3, 3], atol=1e-14)  # the largest is repeated; -7 is not seen
    assert residuals.max() < 1e-14


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_small_and_large_matrices_keep_their_digits(scale):
    """Also where the Krylov space ends early."""
    values, _ = look(scale * np.diag([1.0, 1e-3, 5.0]), [1.0, 1.0, 0.0], 3)
    np.testing.assert_allclose(values / scale, [1e-3, 1, 1], rtol=1e-12)


def test_multiples_of_the_identity_and_zero():
    values, _ = look(3 * np.eye(4), np.ones(4), 4)
    np.testing.assert_allclose(values, [3] * 4)
    values, _ = look(np.zeros((4, 4)), np.ones(4), 4)
    assert (values == 0).all()


def test_a_batch_is_what_its_problems_are_alone():
    rng = np.random.default_rng(5)
    a = np.stack([symmetric(rng.standard_normal(6), seed) for seed in range(3)] + [2 * np.eye(6)])
    b = rng.standard_normal((4, 6))
    values, residuals = look(a, b, 4)
    for i in range(4):
        alone = look(a[i], b[i], 4)
        torch.testing.assert_close(values[i], alone.values)
        torch.testing.assert_close(residuals[i], alone.residuals)
    two_axes, _ = look(a.reshape(2, 2, 6, 6), b.reshape(2, 2, 6), 4)
    torch.testing.assert_close(two_axes, values.reshape(2, 2, 4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_infinity_in_one_problem_leaves_the_others(bad):
    a = np.stack([symmetric([1.0, 2.0, 3.0], seed) for seed in range(3)])
    b = np.ones((3, 3))
    clean = look(a, b, 3)
    a[1, 0, 0] = bad
    values, residuals = look(a, b, 3)
    assert values[1].isnan().all() and residuals[1].isnan().all()
    assert torch.equal(values[[0, 2]], clean.values[[0, 2]])
    assert torch.equal(residuals[[0, 2]], clean.residuals[[0, 2]])


def test_a_zero_start_sees_nothing():
    values, _ = look(np.eye(3), np.zeros(3), 3)
    assert values.isnan().all()


def test_float32():
    rng = np.random.default_rng(7)
    a = symmetric(np.concatenate([[-2.0], rng.random(100), [50.0]]))
    values, _ = look(a, rng.standard_normal(102), 30, torch.float32)
    assert values.dtype == torch.float32
    np.testing.assert_allclose([values[0], values[-1]], [-2, 50], rtol=1e-5)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        look(np.eye(2), np.ones(2), 0)
    with pytest.raises(ValueError, match="b: expected a real floating tensor"):
        ritz_values(lambda v: v, torch.ones(2, dtype=torch.int64), 1)


def test_the_spread_start_has_a_part_of_every_axis_and_of_b():
    b = torch.zeros(3, 50, dtype=torch.float64)
    b[0, 7] = 1e-8
    b[1] = 1e8
    start = spread(b)
    assert start.isfinite().all() and (start != 0).all()
    assert start[0, 7] > 0.5  # b counts, however small it is
    assert torch.allclose(start[2].norm(), torch.tensor(1.0, dtype=torch.float64))
    one = torch.tensor([[1e-3], [-1e-3]], dtype=torch.float64)
    assert spread(one).abs().min() > 1.9  # in one dimension the two parts must not cancel
    # b alone is blind for what it is orthogonal to
    a = np.diag([1.0, 2.0, -3.0])
    blind, _ = look(a, [1.0, 1.0, 0.0], 3)
    seen, _ = look(a, spread(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)), 3)
    assert blind[0] > 0 and seen[0] < -2.9


@pytest.mark.parametrize("batch", [(), (3,)])
def test_nothing_has_no_eigenvalues(batch):
    values, residuals = ritz_values(lambda v: v, torch.zeros(*batch, 0), 5)
    assert values.shape == residuals.shape == (*batch, 1) and values.isnan().all()
