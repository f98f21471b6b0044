"""Nothing is kept: 200 calls in a row leave as many tensors alive as one, and no graph outlives its call."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import BilevelProblem, GaussNewton, argmin, hypergradient, implicit_gradient, solve, sum_over_parts
from bilevel.linsys import CG, Exact, Identity, Neumann
from bilevel.solvers import BlackBox, GradientDescent, NesterovAGD, NewtonCG
from tests.cases import PROBLEMS

F64 = torch.float64
RIDGE, COUPLED, PROXIMAL, EXPONENTIAL = PROBLEMS[:4]
NEWTON = NewtonCG(max_steps=3, cg_steps=3)
DESCENT = GradientDescent(step_size=0.01, max_steps=5)


def live_tensors() -> int:
    """Tensors that Python knows of (what only a graph in C++ holds is seen by the tests below)."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def backward() -> None:
    theta = EXPONENTIAL.theta.clone().requires_grad_()
    (argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=NEWTON, linsys=CG(max_steps=4)) ** 2).sum().backward()


def double_backward() -> None:
    theta = EXPONENTIAL.theta.clone().requires_grad_()
    value = (argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=NEWTON, linsys=CG(max_steps=4)) ** 2).sum()
    (first,) = torch.autograd.grad(value, theta, create_graph=True)
    torch.autograd.grad((first**2).sum(), theta)


def transformed(transform: Callable[..., Any]) -> Callable[[], Any]:
    def f(theta: Tensor) -> Tensor:
        solver = GradientDescent(step_size=0.05, max_steps=2)
        return (argmin(EXPONENTIAL.problem, theta, EXPONENTIAL.data, solver=solver, linsys=CG(max_steps=1)) ** 2).sum()

    return lambda: transform(f)(EXPONENTIAL.theta)


def gradient_of(case: Any, **options: Any) -> Callable[[], Any]:
    return lambda: hypergradient(case.problem, case.theta, case.data, **options)


def training() -> Callable[[], Any]:
    theta = {key: leaf.clone().requires_grad_() for key, leaf in PROXIMAL.theta.items()}

    def step() -> None:
        got = hypergradient(
            PROXIMAL.problem, theta, PROXIMAL.data, solver=DESCENT, linsys=CG(max_steps=3), curvature=GaussNewton()
        )
        for key, leaf in theta.items():
            leaf.grad = got.grad[key]
        with torch.no_grad():
            for leaf in theta.values():
                leaf -= 1e-3 * leaf.grad

    return step


def by_parts() -> None:
    theta = EXPONENTIAL.theta.clone().requires_grad_()
    tail = torch.ones(2, dtype=theta.dtype)
    value = sum_over_parts(lambda theta, part: (theta.sin() * part).sum(), tail, theta)
    (first,) = torch.autograd.grad(value, theta, create_graph=True)
    torch.autograd.grad((first**2).sum(), theta)


CALLS: dict[str, Callable[[], Any]] = {
    "a sum over parts": by_parts,
    "hypergradient gd cg": gradient_of(RIDGE, solver=DESCENT, linsys=CG(max_steps=3)),
    "hypergradient agd neumann": gradient_of(
        COUPLED, solver=NesterovAGD(step_size=0.1, max_steps=5), linsys=Neumann(num_terms=3, step_size=0.1)
    ),
    "hypergradient newton exact": gradient_of(PROXIMAL, solver=NEWTON, linsys=Exact()),
    "hypergradient gauss-newton": gradient_of(
        PROXIMAL, solver=DESCENT, linsys=CG(max_steps=3), curvature=GaussNewton()
    ),
    "hypergradient gauss-newton exact": gradient_of(PROXIMAL, solver=DESCENT, linsys=Exact(), curvature=GaussNewton()),
    "hypergradient identity": gradient_of(PROXIMAL, solver=DESCENT, linsys=Identity()),
    "hypergradient black box": gradient_of(
        EXPONENTIAL, solver=BlackBox(lambda problem, theta, data, init: torch.log(data @ theta)), linsys=Exact()
    ),
    "implicit_gradient": lambda: implicit_gradient(
        EXPONENTIAL.problem, torch.ones(4, dtype=F64), EXPONENTIAL.theta, EXPONENTIAL.data, linsys=CG(max_steps=3)
    ),
    "solve": lambda: solve(RIDGE.problem, RIDGE.theta, RIDGE.data, solver=NEWTON),
    "training with theta that requires grad": training(),
    "argmin and backward": backward,
    "argmin and double backward": double_backward,
    "argmin under hessian": transformed(torch.func.hessian),
    "argmin under jacfwd": transformed(torch.func.jacfwd),
    "argmin under vmap(grad)": transformed(
        lambda f: lambda theta: torch.func.vmap(torch.func.grad(f))(torch.stack([theta, 2 * theta]))
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_two_hundred_calls_leave_nothing_behind(name: str) -> None:
    """With the collector off, so that not even a reference cycle is made."""
    call = CALLS[name]
    for _ in range(3):
        call()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(200):
            call()
        after = live_tensors()
    finally:
        gc.enable()
    assert after <= before


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc/self/statm to know the memory in use")
@pytest.mark.parametrize("name", ["hypergradient", "argmin and backward", "argmin under grad"])
def test_two_hundred_calls_on_big_tensors_take_no_more_memory(name: str) -> None:
    """One tensor of the problem is 0.4 MB: a single one kept by each call would be 80 MB. Allowed are 20 of them."""
    d = 50_000
    curvature = 1 + torch.rand(d, dtype=F64, generator=torch.Generator().manual_seed(0))
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (data * phi * phi).sum() - theta @ phi,
        lambda phi, theta, data: (phi**2).sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    solver, linsys = GradientDescent(step_size=0.5, max_steps=2), CG(max_steps=1, rtol=0.0)
    theta = torch.ones(d, dtype=F64, requires_grad=True)

    def f(theta: Tensor) -> Tensor:
        return argmin(problem, theta, curvature, solver=solver, linsys=linsys).sum()

    calls: dict[str, Callable[[], Any]] = {
        "hypergradient": lambda: hypergradient(problem, theta, curvature, solver=solver, linsys=linsys),
        "argmin and backward": lambda: torch.autograd.grad(f(theta), theta),
        "argmin under grad": lambda: torch.func.grad(f)(theta.detach()),
    }

    def resident() -> int:
        return int(STATM.read_text().split()[1]) * mmap.PAGESIZE

    for _ in range(5):
        calls[name]()
    before = resident()
    for _ in range(200):
        calls[name]()
    assert resident() - before <= 20 * d * 8


class Witness:
    """A problem that remembers, weakly, a tensor of every graph that it was a part of."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Any]] = []
        self.problem = BilevelProblem.from_functions(
            self.inner, self.outer, lambda theta, data: torch.zeros_like(theta)
        )

    def remember(self, x: Tensor) -> None:
        # the grad_fn holds what the backward pass needs: while it lives, the graph lives
        if x.grad_fn is not None:
            token = Token()
            x.grad_fn.metadata["witness"] = token
            self.seen.append(weakref.ref(token))

    def inner(self, phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        hidden = torch.sin(phi) * theta
        self.remember(hidden)
        return (hidden**2).sum() + 3 * ((phi - theta) ** 2).sum()

    def outer(self, phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        hidden = phi * theta
        self.remember(hidden)
        return (hidden**2).sum()

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.seen)


class Token:
    pass


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("linsys", [CG(max_steps=3), Neumann(num_terms=3), Exact()])
@pytest.mark.parametrize("solver", [DESCENT, NesterovAGD(step_size=0.01, max_steps=5), NEWTON])
def test_the_graph_is_gone_when_the_call_returns(solver: Any, linsys: Any, requires_grad: bool) -> None:
    """The results are kept, and the collector is off."""
    witness = Witness()
    theta = torch.tensor([0.5, 1.0], dtype=F64, requires_grad=requires_grad)
    gc.collect()
    gc.disable()
    try:
        kept = [
            hypergradient(witness.problem, theta, solver=solver, linsys=linsys),
            implicit_gradient(witness.problem, torch.ones(2, dtype=F64), theta, linsys=linsys),
            solve(witness.problem, theta, solver=solver),
        ]
        assert len(witness.seen) >= 5
        assert witness.alive() == 0
    finally:
        gc.enable()
    assert all(
        bool((~torch.as_tensor(result.failed if hasattr(result, "failed") else not result.ok)).all()) for result in kept
    )


def test_the_witness_sees_a_graph_that_lives() -> None:
    witness = Witness()
    value = witness.inner(torch.ones(2, requires_grad=True), torch.ones(2), None)
    assert witness.alive() == 1
    del value
    assert witness.alive() == 0


def test_the_graph_of_an_argmin_is_freed_with_its_answer() -> None:
    """Inner iterations leave no graph; the answer holds theta and phi only."""
    witness = Witness()
    theta = torch.tensor([0.5, 1.0], dtype=F64, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        phi = argmin(witness.problem, theta, solver=NEWTON, linsys=Exact())
        assert witness.alive() == 0
        (grad,) = torch.autograd.grad((phi**2).sum(), theta, create_graph=True)
        torch.autograd.grad(grad.sum(), theta)
        del grad, phi
        assert witness.alive() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("steps", [20, 200])
def test_the_memory_of_a_solve_does_not_grow_with_its_steps(steps: int) -> None:
    """At most a few tensors are alive at any evaluation, however many went before (an unrolled graph would hold them all)."""
    alive: list[int] = []
    witness = Witness()

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        alive.append(witness.alive())
        return witness.inner(phi, theta, data)

    problem = BilevelProblem.from_functions(inner, witness.outer, lambda theta, data: torch.zeros_like(theta))
    theta = torch.tensor([0.5, 1.0], dtype=F64, requires_grad=True)
    hypergradient(problem, theta, solver=GradientDescent(step_size=0.01, max_steps=steps), linsys=CG(max_steps=3))
    assert len(alive) > steps
    assert max(alive) <= 1
