"""Several threads of one process: each gets its own numbers, in forward mode and while derivatives are recorded too."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.curvature import ForwardOverReverse, GaussNewton, Hessian
from bilevel.derivatives.forward import alone, tangent_along
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent, NewtonCG

F64 = torch.float64
PROBLEM = bilevel.ProximalProblem.from_model(
    lambda w, data: torch.tanh(data["x"] @ w),
    lambda out, data: (out - data["y"]).square().mean(),
    lambda w, data: w.sin().sum(),
    lam=2.0,
)
NEWTON = NewtonCG(max_steps=6, cg_steps=4)


def tasks(count: int) -> list[tuple[Any, Tensor]]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64)

    return [({"x": normal(10, 4), "y": normal(10)}, normal(4)) for _ in range(count)]


def in_threads(count: int, work: Callable[[int], None]) -> list[Exception]:
    errors: list[Exception] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize(
    "call",
    [
        lambda data, theta: bilevel.unrolled(
            PROBLEM, theta, data, solver=GradientDescent(step_size=0.1, max_steps=8), forward_mode=True
        ),
        lambda data, theta: bilevel.hypergradient(
            PROBLEM, theta, data, solver=NEWTON, linsys=CG(max_steps=6), curvature=GaussNewton()
        ),
        lambda data, theta: bilevel.hypergradient(
            PROBLEM, theta, data, solver=NEWTON, linsys=CG(max_steps=6), curvature=Hessian(product=ForwardOverReverse())
        ),
    ],
    ids=["unrolled", "gauss-newton", "forward-over-reverse"],
)
def test_forward_mode(call: Any) -> None:
    """PyTorch counts its levels for the whole process: before they waited for each other, one in eight gradients was zero here, and ok."""
    all_tasks = tasks(30)
    expected = [call(*task).unwrap() for task in all_tasks]

    def work(_: int) -> None:
        for task, grad in zip(all_tasks, expected, strict=True):
            torch.testing.assert_close(call(*task).unwrap(), grad, rtol=1e-9, atol=1e-12)

    assert in_threads(3, work) == []


def test_recordings(caplog: pytest.LogCaptureFixture) -> None:
    """Each thread has a size of its own."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda p, theta, x: (x @ p - 1).square().mean() + (theta.exp() * p.square()).sum(),
        lambda p, theta, x: p.sum(),
        lambda theta, x: torch.zeros_like(theta),
    )
    g = torch.Generator().manual_seed(0)
    x = {d: torch.randn(9, d, generator=g, dtype=F64) for d in (3, 4, 5)}

    def gradient(d: int, compile: bool) -> Tensor:
        found = bilevel.hypergradient(
            problem, torch.zeros(d, dtype=F64), x[d], solver=NEWTON, linsys=CG(max_steps=9), compile=compile
        )
        return found.unwrap()

    expected = {d: gradient(d, False) for d in x}

    def work(i: int) -> None:
        for _ in range(3):
            torch.testing.assert_close(gradient(3 + i, True), expected[3 + i])

    assert in_threads(3, work) == []
    assert not caplog.messages, "nothing was computed without its recording"


def test_a_thread_of_autograd_does_not_wait_for_the_one_that_waits_for_it() -> None:
    """They are made by PyTorch, and run the backward of a CUDA tensor, or of a deeply nested call."""
    results: list[Tensor] = []
    done = threading.Event()

    def work() -> None:
        results.append(tangent_along(torch.sin, torch.zeros(2), torch.ones(2)))
        done.set()

    with alone():
        _thread.start_new_thread(work, ())  # which Python's own threads do not know, as those
        assert done.wait(60)
    assert results[0].tolist() == [1.0, 1.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_child_of_a_fork_has_its_turn() -> None:
    """Another thread is in forward mode while the process forks; in the child it is gone."""
    code = """
import os, threading, torch
from bilevel.derivatives.forward import alone, tangent_along
torch.set_num_threads(1)
inside, leave = threading.Event(), threading.Event()
def stay():
    with alone():
        inside.set()
        leave.wait()
threading.Thread(target=stay, daemon=True).start()
inside.wait()
pid = os.fork()
if pid == 0:
    os._exit(0 if tangent_along(torch.sin, torch.zeros(2), torch.ones(2)).tolist() == [1.0, 1.0] else 1)
status = os.waitpid(pid, 0)[1]
leave.set()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
