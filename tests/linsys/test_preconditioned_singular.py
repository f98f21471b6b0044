"""Singular systems under a preconditioner, and general ones: an answer of 1e16 is no answer, by whatever name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import Status
from bilevel.linsys import CG, GMRES, MINRES, BiCGStab, Jacobi, NystromPreconditioner
from bilevel.solvers import LBFGS

PRECONDITIONERS = [Jacobi(), Jacobi(num_probes=4), NystromPreconditioner(rank=3)]


def singular_least_squares(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, torch.Tensor, float]:
    """10 unknowns, 6 equations, and an outer gradient with a part in the null space."""
    generator = torch.Generator().manual_seed(seed)
    X, y, q = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((6, 10), (6,), (10,))
    )
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, data: (X @ w - theta * y).square().mean(),
        lambda w, theta, data: q @ w,
        lambda theta, data: torch.zeros(10, dtype=dtype),
    )
    return problem, torch.tensor(1.0, dtype=dtype), float(q.norm())


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_preconditioned_cg_does_not_answer_a_singular_system(dtype: torch.dtype, preconditioner: Any) -> None:
    """Before: MAX_STEPS, ok, a gradient of 1e17 and an estimate of 0, for a quarter of the seeds."""
    for seed in range(12):
        problem, theta, _ = singular_least_squares(seed, dtype)
        solver = LBFGS(max_steps=300, tol=1e-8 if dtype == torch.float64 else 1e-4)
        found = bilevel.hypergradient(
            problem, theta, solver=solver, linsys=CG(max_steps=50, preconditioner=preconditioner)
        )
        assert found.linear.status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE), (seed, found.describe())


@pytest.mark.parametrize(
    "linsys",
    [
        BiCGStab(max_steps=50),
        *(BiCGStab(max_steps=50, preconditioner=one) for one in (Jacobi(), NystromPreconditioner(rank=3))),
        GMRES(max_steps=200, rtol=1e-10, preconditioner=NystromPreconditioner(rank=30)),
    ],
    ids=repr,
)
def test_a_huge_answer_has_no_estimate(linsys: Any) -> None:
    """One eigenvalue is 0 and b has a part there: what is left of b after all steps cannot be known to be small in the gradient."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64)).Q
        values = torch.logspace(0, -3, 20, dtype=torch.float64)
        values[-1] = 0
        H = Q @ values.diag() @ Q.T
        H = (H + H.T) / 2
        c, q = H @ torch.randn(20, generator=g, dtype=torch.float64), torch.randn(20, generator=g, dtype=torch.float64)
        problem = bilevel.BilevelProblem.from_functions(
            lambda w, theta, data, H=H, c=c: 0.5 * w @ H @ w - theta * (c @ w),
            lambda w, theta, data, q=q: q @ w,
            lambda theta, data: torch.zeros(20, dtype=torch.float64),
        )
        found = bilevel.hypergradient(
            problem, torch.tensor(1.0, dtype=torch.float64), solver=LBFGS(max_steps=300, tol=1e-10), linsys=linsys
        )
        if linsys.preconditioner is None:  # and so much is known of the norm of A
            assert not (found.ok and float(found.linear.value.norm()) > 1e15)
        if found.ok and float(found.linear.value.norm()) > 1e12:
            text = found.explain()
            assert found.error_estimate.isinf() and "There is no estimate of the error" in text
            assert "add regularisation or damping" in text and "raise its number of steps" not in text


def test_an_ill_conditioned_system_is_still_answered_with_a_preconditioner() -> None:
    """kappa = 1e10, b along the smallest eigenvalue: a huge u that is right, up to rounding in A u, eps |A| |u| = 2e-6."""
    values = torch.logspace(-10, 0, 12, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    A, u = Q @ values.diag() @ Q.T, Q[:, 0] * 1e10
    A = (A + A.T) / 2
    b = A @ u
    for solver in (CG, MINRES):
        found = solver(max_steps=400, rtol=1e-9, preconditioner=lambda v: v).solve(lambda v: A @ v, b)
        assert not found.failed and float((b - A @ found.value).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
def test_a_truncated_solve_of_a_small_matrix_is_not_singular(unit: float) -> None:
    """u is huge because A is small: what counts is the size of A, and not that of the preconditioned matrix, which is about 1."""
    g = torch.Generator().manual_seed(5)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    A = unit * (Q @ torch.linspace(1, 50, 12, dtype=torch.float64).diag() @ Q.T)
    A, b = (A + A.T) / 2, torch.randn(12, generator=g, dtype=torch.float64)
    found = CG(max_steps=2, rtol=1e-10, preconditioner=Jacobi()).solve(lambda v: v @ A, b)
    assert found.status is Status.MAX_STEPS and float((b - A @ found.value).norm()) < float(b.norm())


@pytest.mark.parametrize("lam", [1e-5, 3e-6])
@pytest.mark.parametrize("max_steps", [8, 12, 20])
def test_a_small_lambda_in_float32_is_not_singular(max_steps: int, lam: float) -> None:
    """kappa = 1e6, so that truncated CG leaves many times |b|, and rounding in H u more than a tenth of b; but lam u is good."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(8, 40, generator=g, dtype=torch.float64)
        w = torch.randn(40, generator=g, dtype=torch.float64)
        exact = lam * torch.linalg.solve(X.T @ X / 8 + lam * torch.eye(40, dtype=torch.float64), w)
        problem = bilevel.ProximalProblem.from_losses(
            lambda phi, data: 0.5 * (data[0] @ phi).square().mean(), lambda phi, data: data[1] @ phi, lam
        )
        zero, data = torch.zeros(40), (X.float(), w.float())
        found = bilevel.implicit_gradient(problem, zero, zero, data, linsys=CG(max_steps=max_steps))
        assert not found.linear.failed, (seed, found.describe())
        if max_steps > 8:  # 8 directions, with rounding, are not quite the 8 that X has
            assert float((found.grad.double() - exact).norm()) < 1e-2 * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("part", [1.0, 1e-1, 1e-3, 1e-5])
def test_one_eigenvalue_of_zero_is_seen_whatever_the_number_of_steps(part: float, d: int, dtype: torch.dtype) -> None:
    """A u that is longer than |b| / eps is no answer, even where the residual has stayed at the size of b.

    b has only a small part outside the null space: then A p is small for every direction p, and |A| cannot be read from the products.
    """
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
        values = 1 + torch.rand(d, generator=g, dtype=torch.float64)
        values[-1] = 0
        A = (Q * values @ Q.T).to(dtype)
        A, b = (A + A.T) / 2, (Q[:, -1] + part * torch.randn(d, generator=g, dtype=torch.float64)).to(dtype)
        for max_steps in (2, d, 100):
            for preconditioner in (None, Jacobi(), lambda v: v):
                solver = CG(max_steps=max_steps, preconditioner=preconditioner)
                found = solver.solve(lambda v, A=A: v @ A, b)
                assert found.failed or float(found.value.norm()) * torch.finfo(dtype).eps <= float(b.norm())


@pytest.mark.parametrize("preconditioner", [None, lambda v: v], ids=["plain", "preconditioned"])
def test_a_long_answer_that_leaves_little_is_one(preconditioner: Any) -> None:
    """In float32 the norm of A says that it may be singular. But its entries are exact, and so is u, which leaves next to nothing of b."""
    A, b = torch.tensor([1.0, 0.5, 2.0**-24]), torch.tensor([0.01, 0.01, 0.5])
    found = CG(max_steps=4, preconditioner=preconditioner).solve(lambda v: A * v, b)
    assert found.status is Status.MAX_STEPS and float(found.residual) < 0.01 * float(b.norm())
    torch.testing.assert_close(found.value[2], b[2] / A[2])
    b = torch.tensor([1.0, 1.0, 0.5])  # too much is left
    assert CG(max_steps=4, preconditioner=preconditioner).solve(lambda v: A * v, b).status is Status.SINGULAR


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_of_rank_one_is_singular(dtype: torch.dtype) -> None:
    v = torch.tensor([1.0, 0.1], dtype=dtype)
    rank_one = torch.outer(v, v)
    found = CG(max_steps=10, preconditioner=Jacobi()).solve(
        lambda x: x @ rank_one, torch.tensor([1.0, 0.0], dtype=dtype)
    )
    assert found.failed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lam", [1e-2, 1e-4, 1e-5, 1e-8])
def test_what_steihaug_keeps_is_not_called_singular(lam: float, dtype: torch.dtype) -> None:
    """At negative curvature in the first direction that is M b = b / lam, whose residual is many times b. lam u is b: first order."""
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: -0.5 * phi.square().sum(), lambda phi, data: phi.sum(), lam
    )
    zero = torch.zeros(3, dtype=dtype)
    found = bilevel.implicit_gradient(problem, zero, zero, linsys=CG(max_steps=5, steihaug=True))
    assert found.linear.status is Status.STOPPED_AT_NEGATIVE_CURVATURE
    torch.testing.assert_close(found.grad, torch.ones(3, dtype=dtype))


@pytest.mark.parametrize(
    "solver", [CG(max_steps=20, rtol=0.0), GMRES(max_steps=3, rtol=0.0), BiCGStab(max_steps=20, rtol=0.0)]
)
def test_fixed_steps_do_not_call_a_singular_system_converged(solver: Any) -> None:
    """Their residual is that of the recurrence, which may come to nothing where A u is far from b; the length of u tells. What is
    called converged is no longer than an answer to a regular A may be.
    """
    eps = torch.finfo(torch.float64).eps
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
        for least in (0.0, 1e-3):
            e = 0.1 + 3 * torch.rand(3, generator=g, dtype=torch.float64)
            e[0] = least
            a = (q * e) @ q.T
            a, b = (a + a.T) / 2, torch.randn(3, generator=g, dtype=torch.float64)
            found = solver.solve(lambda v, a=a: v @ a, b)
            if least:
                assert found.status is Status.CONVERGED
                torch.testing.assert_close(found.value, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
            elif found.status is Status.CONVERGED:
                assert isinstance(solver, CG) and found.value.norm() < b.norm() / (eps * e.max())


def test_fixed_steps_with_a_preconditioner_solve_variables_in_other_units() -> None:
    """float32, a block of condition number 10 and three variables in units of 1e4: u is long, and an answer."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
        a = torch.block_diag(
            (q * torch.logspace(-1, 0, 8, dtype=torch.float64)) @ q.T, 1e-8 * torch.eye(3, dtype=torch.float64)
        )
        a, b = a.float(), torch.randn(11, generator=g)
        found = CG(max_steps=20, rtol=0.0, preconditioner=Jacobi()).solve(lambda v, a=a: v @ a, b)
        assert found.status is Status.CONVERGED
        torch.testing.assert_close(
            found.value.double(), torch.linalg.solve(a.double(), b.double()), rtol=1e-4, atol=1e-4
        )
