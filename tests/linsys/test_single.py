"""One problem on the CPU: the steps of CG with numbers of Python are those with masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bilevel.linsys.cg
import bilevel.solvers.newton_cg
from bilevel.linsys import CG
from bilevel.linsys.base import unit_of
from bilevel.linsys.single import is_single, single_cg, unit_of_number
from bilevel.solvers import NewtonCG
from bilevel.status import Status

F32, F64 = torch.float32, torch.float64


def matrix(eigenvalues: Any, seed: int = 0) -> Tensor:
    d = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    a = q @ np.diag(eigenvalues) @ q.T
    return torch.from_numpy((a + a.T) / 2)


NAN = matrix(np.ones(5))
NAN[2, 3] = NAN[3, 2] = float("nan")
MATRICES = {
    "definite": matrix(np.linspace(1, 10, 12)),
    "ill-conditioned": matrix(np.logspace(-5, 0, 15)),
    "indefinite": matrix(np.linspace(-1, 5, 10)),
    "negative": -matrix(np.linspace(1, 2, 6)),
    "singular": matrix([0.0, 1, 2, 3]),
    "zero": torch.zeros(4, 4, dtype=F64),
    "not a number": NAN,
    "one variable": matrix([3.0]),
    "tiny": matrix([1e-12, 2e-12]),  # times 1e-30: the inverse is no number in float32
    "no variable": torch.zeros(0, 0, dtype=F64),
}
SCALES = [1.0, 1e-30, 1e30]


@pytest.mark.parametrize("steihaug", [False, True])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MATRICES)
def test_as_with_masks(
    name: str, scale: float, dtype: torch.dtype, warm: bool, steihaug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, status, steps and products."""
    a = (MATRICES[name] * scale).to(dtype)
    d = len(a)
    b, init = torch.linspace(1, -0.3, d, dtype=dtype), torch.linspace(0.2, 1, d, dtype=dtype) / scale if warm else None
    before = b.clone()
    for max_steps, rtol in ((3, 1e-3), (40, 1e-4)):
        solver = CG(max_steps=max_steps, rtol=rtol, steihaug=steihaug)
        one = solver.solve(lambda v: v @ a, b, init)
        with monkeypatch.context() as patch:
            patch.setattr(bilevel.linsys.cg, "is_single", lambda v: False)
            masked = solver.solve(lambda v: v @ a, b, init)
        assert one.codes == masked.codes
        if name in (
            "ill-conditioned",
            "singular",
        ):  # there rounding decides how masked steps it takes, and how long u becomes
            assert one.status is not Status.CONVERGED or float((b - one.value @ a).norm()) <= 1.1 * rtol * float(
                b.norm()
            )
            continue
        assert one.steps == masked.steps and one.num_matvecs == masked.num_matvecs
        assert one.negative_curvature == masked.negative_curvature
        tolerance = 1e-4 if dtype is F32 else 1e-9
        size = float(masked.value.double().nan_to_num(0, 0, 0).norm()) + (d == 0)
        assert torch.allclose(one.value, masked.value, rtol=0, atol=tolerance * size, equal_nan=True)
        assert torch.allclose(one.residual, masked.residual, rtol=0, atol=tolerance * float(b.norm()), equal_nan=True)
    assert torch.equal(b, before)


def test_against_numpy() -> None:
    a, b = MATRICES["definite"], torch.linspace(1, -0.3, 12, dtype=F64)
    found = CG(max_steps=30, rtol=1e-12).solve(lambda v: a @ v, b)
    assert found.status is Status.CONVERGED
    assert np.allclose(found.value, np.linalg.solve(a, b), rtol=1e-10)


def test_the_directions_are_conjugate_and_stay_as_they_were() -> None:
    """Whoever keeps what the product was asked for keeps it."""
    a, b, kept = MATRICES["definite"], torch.linspace(1, -0.3, 12, dtype=F64), []

    def product(v: Tensor) -> Tensor:
        kept.append(v)
        return a @ v

    x = torch.zeros(12, dtype=F64)
    steps = single_cg(product, x, b, 1e-9, 20)
    p = torch.stack(kept)
    gram = p @ a @ p.T
    scale = gram.diagonal().sqrt()
    assert steps.taken == len(kept) > 8 and torch.equal(kept[0], b) and not x.any()
    assert float((gram / scale / scale[:, None] - torch.eye(len(p))).abs().max()) < 1e-6
    assert torch.allclose(b - a @ steps.x, steps.r, atol=1e-12) and abs(steps.rr - float(steps.r @ steps.r)) < 1e-20


def test_what_is_told_of_each_direction() -> None:
    a, b, kept, told = MATRICES["definite"], torch.linspace(1, -0.3, 12, dtype=F64), [], []

    def product(v: Tensor) -> Tensor:
        kept.append(v)
        return a @ v

    def is_flat(curvature: float, p: float, ap: Tensor, top: float) -> bool:
        told.append((curvature, p, float(ap.norm()), top))
        return False

    steps = single_cg(product, torch.zeros(12, dtype=F64), b, 1e-9, 20, is_flat)
    p = np.array([v.tolist() for v in kept])
    ap = p @ a.numpy()
    curvature, size = (p * ap).sum(1), np.linalg.norm(p, axis=1)
    tops = np.maximum.accumulate(curvature / size**2)
    expected = np.stack([curvature, size, np.linalg.norm(ap, axis=1), [0, *tops[:-1]]], 1)
    assert len(told) == steps.taken > 8
    np.testing.assert_allclose(np.array(told), expected, rtol=1e-6)
    assert steps.top == pytest.approx(tops[-1])


def test_a_direction_whose_square_is_no_number() -> None:
    a, b = torch.tensor([1, 1e-200, 1e200], dtype=F64), torch.tensor([1, 1e-100, 1e-90], dtype=F64)
    steps = single_cg(lambda v: a * v, torch.zeros(3, dtype=F64), b, 1e-300, 5, lambda *_: False)
    assert steps.taken == 5 and max(steps.shares) > 1e160


def test_a_product_may_return_its_argument_or_a_buffer() -> None:
    b, buffer, a = torch.linspace(1, 2, 6, dtype=F64), torch.empty(6, dtype=F64), matrix(np.linspace(1, 3, 6))
    assert torch.equal(CG(max_steps=5, rtol=1e-9).solve(lambda v: v, b).value, b)
    found = CG(max_steps=20, rtol=1e-12).solve(lambda v: torch.mv(a, v, out=buffer), b)
    assert np.allclose(found.value, np.linalg.solve(a, b), rtol=1e-10)


def test_derivatives_of_the_steps_are_left_to_the_masked_loop() -> None:
    """Of a matrix, which the vectors know nothing of, and of the right-hand side: as masked steps as variables make it the inverse."""
    a = matrix([1.0, 2, 4]).requires_grad_()
    b = torch.tensor([1.0, -1, 0.5], dtype=F64, requires_grad=True)
    solver = CG(max_steps=3, rtol=1e-14)
    assert torch.autograd.gradcheck(lambda a: solver.solve(lambda v: 0.5 * (a + a.T) @ v, b.detach()).value, a)
    assert torch.autograd.gradcheck(lambda b: solver.solve(lambda v: a.detach() @ v, b).value, b)
    moved = torch.func.jvp(lambda b: solver.solve(lambda v: a.detach() @ v, b).value, (b.detach(),), (b.detach(),))[1]
    assert torch.allclose(moved, torch.linalg.solve(a, b).detach(), atol=1e-9)


def test_what_is_single() -> None:
    v = torch.ones(3)
    assert is_single(v)
    assert not is_single(v[None]) and not is_single(v.clone().requires_grad_()) and not is_single(v.to("meta"))
    seen: list[bool] = []
    torch.func.vmap(lambda v: seen.append(is_single(v)) or v)(v[None])
    with FakeTensorMode():  # or whatever follows the operators
        seen.append(is_single(v))
    with torch.autograd.forward_ad.dual_level():
        seen.append(is_single(torch.autograd.forward_ad.make_dual(v, v)))
    assert seen == [False, False, False]


# ----------------------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "quadratic": lambda phi, theta: 0.5 * phi @ MATRICES["definite"].to(phi.dtype) @ phi - (theta * phi).sum(),
    "quartic": lambda phi, theta: ((phi - theta) ** 4).sum() + 0.1 * phi.square().sum(),
    "from a saddle": lambda phi, theta: (phi.square() - theta.square()).square().sum() + 0.3 * phi[0] * phi[3],
    "valley": lambda phi, theta: (20 * (phi[1:] - phi[:-1].square()).square()).sum() + (theta - phi).square().sum(),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_newton_cg_as_with_masks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: OBJECTIVES[name](phi, theta),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0.01 * theta + 0.001,
    )
    theta = torch.linspace(0.5, 1.5, 12, dtype=dtype)
    solver = NewtonCG(max_steps=60, cg_steps=12, cg_rtol=1e-2, tol=1e-4 if dtype is F32 else 1e-8)
    one = bilevel.solve(problem, theta, None, solver=solver)
    monkeypatch.setattr(bilevel.solvers.newton_cg, "is_single", lambda v: False)
    masked = bilevel.solve(problem, theta, None, solver=solver)
    assert not bool(one.failed | masked.failed) and one.steps == masked.steps
    assert one.num_matvecs == masked.num_matvecs and one.negative_curvature == masked.negative_curvature
    assert torch.allclose(one.value, masked.value, rtol=0, atol=1e-3 if dtype is F32 else 1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_newton_cg_of_a_fixed_number_of_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same; and no products any more where CG has met its threshold."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: OBJECTIVES[name](phi, theta),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: 0.01 * theta + 0.001,
    )
    theta, solver = torch.linspace(0.5, 1.5, 12, dtype=F64), NewtonCG(max_steps=9, cg_steps=12, cg_rtol=1e-2)
    one = bilevel.solve(problem, theta, None, solver=solver)
    monkeypatch.setattr(bilevel.solvers.newton_cg, "is_single", lambda v: False)
    masked = bilevel.solve(problem, theta, None, solver=solver)
    assert one.codes == masked.codes and one.steps == masked.steps
    assert one.negative_curvature == masked.negative_curvature and one.num_matvecs <= masked.num_matvecs
    assert torch.allclose(one.value, masked.value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_unit_of_a_number_is_that_of_a_tensor(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    numbers = [0.0, 1.0, 0.75, 3.0, 1e-30, 1e30, info.tiny, info.tiny / 8, info.max, torch.inf, torch.nan]
    for number in torch.tensor(numbers, dtype=dtype):
        assert unit_of_number(float(number), info.tiny) == float(unit_of(number))
