"""The same numbers on a CUDA device as on the CPU, in float64. Needs a GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import GaussNewton, ProximalProblem, Status, argmin, hypergradient, implicit_gradient, solve
from bilevel.linsys import CG, Exact, Identity
from bilevel.solvers import GradientDescent, NewtonCG
from bilevel.trees import flatten, tree_map
from tests.cases import PAIRS, PROBLEMS, Case, inner_solvers, linear_solvers

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
F64 = torch.float64
NEWTON = NewtonCG(max_steps=30, cg_steps=20, tol=1e-11)


def on_gpu(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, tree)


def moved(case: Case) -> Case:
    return replace(case, theta=on_gpu(case.theta), data=on_gpu(case.data))


def vector(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *trees)


def perturbed(tree: Any, k: int) -> Any:
    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf * (1 + 0.07 * k) if leaf.is_floating_point() else leaf.roll(k)

    return tree_map(change, tree)


def assert_on_gpu_and_same(got: Any, expected: Any, relative: float = 1e-9) -> None:
    for one, other in zip(flatten(got)[0], flatten(expected)[0], strict=True):
        assert one.is_cuda and one.dtype == other.dtype
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=relative * (1 + float(other.abs().max())))


@pytest.mark.parametrize(("solver", "linsys"), PAIRS)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_every_row(case: Case, solver: str, linsys: str) -> None:
    options: dict[str, Any] = {"solver": inner_solvers(case, 1e-9)[solver], "linsys": linear_solvers(1e-11)[linsys]}
    gpu = moved(case)
    got = hypergradient(gpu.problem, gpu.theta, gpu.data, **options)
    expected = hypergradient(case.problem, case.theta, case.data, **options)
    assert got.inner.status is expected.inner.status is Status.CONVERGED
    assert got.linear.status is expected.linear.status is Status.CONVERGED
    assert_on_gpu_and_same((got.grad, got.phi, got.outer), (expected.grad, expected.phi, expected.outer), 1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_a_batch_with_a_sick_task(case: Case, reduction: str) -> None:
    data = stack([perturbed(case.data, k) for k in range(4)])
    first = next(leaf for leaf in flatten(data)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point())
    first[2] = torch.nan
    options: dict[str, Any] = {
        "solver": NEWTON,
        "linsys": CG(max_steps=60, rtol=1e-12),
        "batched": True,
        "reduction": reduction,
    }
    got = hypergradient(case.problem, on_gpu(case.theta), on_gpu(data), **options)
    expected = hypergradient(case.problem, case.theta, data, **options)
    assert got.ok.cpu().tolist() == expected.ok.tolist() == [True, True, False, True]
    assert torch.equal(got.inner.codes.cpu(), expected.inner.codes) and torch.equal(
        got.linear.codes.cpu(), expected.linear.codes
    )
    for one, other in zip(flatten(got.grad)[0], flatten(expected.grad)[0], strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one.cpu(), other, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("linsys", [CG(max_steps=60, rtol=1e-12, steihaug=True), Exact(), Identity()])
def test_gauss_newton_damping_and_a_dense_lambda(linsys: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    root = normal(6, 6)
    problem = ProximalProblem.from_model(
        lambda phi, data: torch.tanh(data["x"] @ phi),
        lambda outputs, data: torch.nn.functional.cross_entropy(outputs, data["label"]),
        lambda phi, data: torch.nn.functional.cross_entropy(data["x"] @ phi, data["label"]),
        root @ root.T + torch.eye(6, dtype=F64),  # a matrix on the CPU; theta decides where it goes
    )
    theta, data = normal(3, 2), {"x": normal(4, 5, 3), "label": torch.randint(2, (4, 5), generator=generator)}
    options: dict[str, Any] = {
        "solver": NEWTON,
        "linsys": linsys,
        "curvature": GaussNewton(),
        "damping": 0.2,
        "batched": True,
    }
    got = hypergradient(problem, theta.cuda(), on_gpu(data), **options)
    assert_on_gpu_and_same(got.unwrap(), hypergradient(problem, theta, data, **options).unwrap())


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "hessian", "vmap(grad)", "vmap(hessian)"])
@pytest.mark.parametrize("linsys", [CG(max_steps=60, rtol=1e-13), Exact()], ids=["cg", "exact"])
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_argmin_under_transforms(case: Case, linsys: Any, transform: str) -> None:
    transforms: dict[str, Callable[..., Any]] = {
        "grad": torch.func.grad,
        "jacfwd": torch.func.jacfwd,
        "hessian": torch.func.hessian,
        "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(f)),
        "vmap(hessian)": lambda f: torch.func.vmap(torch.func.hessian(f)),
    }
    gpu = moved(case)

    def outer(case: Case) -> Callable[[Any], Tensor]:
        return lambda theta: case.problem.outer_loss(
            argmin(case.problem, theta, case.data, solver=NEWTON, linsys=linsys), theta, case.data
        )

    theta = stack([perturbed(case.theta, k) for k in range(3)]) if "vmap" in transform else case.theta
    got = torch.utils._pytree.tree_leaves(transforms[transform](outer(gpu))(on_gpu(theta)))
    assert_on_gpu_and_same(got, torch.utils._pytree.tree_leaves(transforms[transform](outer(case))(theta)), 1e-8)


def test_eager_backward() -> None:
    case = PROBLEMS[2]
    theta = {key: leaf.cuda().requires_grad_() for key, leaf in case.theta.items()}
    phi = argmin(case.problem, theta, on_gpu(case.data), solver=NEWTON, linsys=Exact())
    case.problem.outer_loss(phi, theta, on_gpu(case.data)).backward()
    expected = torch.func.grad(case.outer)(case.theta, case.data)
    assert_on_gpu_and_same({key: leaf.grad for key, leaf in theta.items()}, expected)


def test_mixed_devices_are_refused() -> None:
    case = PROBLEMS[0]
    with pytest.raises(ValueError, match=r"data\['train'\]\[0\]: expected one device, got cpu beside theta on cuda:0"):
        solve(case.problem, case.theta.cuda(), case.data, solver=NEWTON)
    with pytest.raises(ValueError, match=r"phi: expected one device, got cpu beside cuda:0"):
        implicit_gradient(case.problem, torch.ones(4, dtype=F64), case.theta.cuda(), on_gpu(case.data), linsys=Exact())


def test_a_fixed_step_run_never_waits_for_the_device() -> None:
    """tol = 0 and rtol = 0: no number is read back to the host inside the solve or the linear solve."""
    case = moved(PROBLEMS[0])
    data = stack([case.data] * 3)
    call = lambda: hypergradient(  # noqa: E731
        case.problem,
        case.theta,
        data,
        solver=GradientDescent(step_size=0.01, max_steps=5),
        linsys=CG(max_steps=3, rtol=0.0),
        batched=True,
    )
    call()  # what is set up once may wait
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert got.num_ok == 3
