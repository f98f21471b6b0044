"""The solvers that E7 compares, and its table, against closed forms and a gradient descent written out here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

import bilevel
from applications.meta_learning.experiments import e7_inner_solvers as e7
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer
from bilevel import ProximalProblem
from tests.meta_learning.tiny import TINY


@pytest.mark.parametrize("name", list(e7.solvers(1, 0.1)))
def test_every_solver_finds_the_minimum_of_a_quadratic(name: str) -> None:
    """phi = (A + 2 I)^-1 (c + 2 theta)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64)
    a, c = x.mT @ x / 8, torch.randn(3, 5, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)

    def train(phi: dict[str, torch.Tensor], task: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.5 * phi["w"] @ task["a"] @ phi["w"] - task["c"] @ phi["w"]

    problem = ProximalProblem.from_losses(train, lambda phi, task: phi["w"].sum(), lam=2.0)
    solver = e7.solvers(96, 0.1)[name]
    found = bilevel.solve(problem, {"w": theta}, {"a": a, "c": c}, solver=solver, batched=True)
    for i in range(3):
        exact = np.linalg.solve(a[i].numpy() + 2 * np.eye(5), (c[i] + 2 * theta).numpy())
        np.testing.assert_allclose(found.value["w"][i], exact, rtol=0, atol=1e-6)


def test_black_box_leaves_its_arguments_as_they_were() -> None:
    theta, init = {"w": torch.ones(3)}, {"w": torch.full((3,), 4.0)}
    problem = ProximalProblem.from_losses(
        lambda phi, _: phi["w"].square().sum(), lambda phi, _: phi["w"].sum(), lam=1.0
    )
    found = e7.torch_lbfgs(20, problem, theta, None, init)
    torch.testing.assert_close(found["w"], torch.full((3,), 1 / 3), rtol=1e-5, atol=1e-6)  # 2 w + (w - 1) = 0
    assert torch.equal(theta["w"], torch.ones(3)) and torch.equal(init["w"], torch.full((3,), 4.0))
    assert theta["w"].grad is None and not found["w"].requires_grad


def test_table_of_gradient_descent_written_out(tmp_path: Path) -> None:
    config = replace(TINY, dtype="float64", inner_step_size=0.05, threads=1)
    trainer = Trainer(config, load_source(config))
    theta = {name: leaf + 0.1 for name, leaf in trainer.theta.items()}  # not what a fresh trainer would have
    torch.save(theta, tmp_path / "theta.pt")
    rows = e7._in_turns(config, None, tmp_path / "theta.pt", (3,), 3, 2)["rows"]
    assert [row["name"] for row in rows] == list(e7.solvers(1, 1.0))
    assert rows[0]["ratio_low"] == rows[0]["ratio"] == rows[0]["ratio_high"] == 1 and rows[0]["seconds"] > 0
    assert all(0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in rows)

    data = e7._Bench(config, None, tmp_path / "theta.pt", 3).data["support"]
    slopes, values = [], []
    for i in range(3):
        phi = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
        for _ in range(4):
            outputs = functional_call(trainer.module, phi, (data["x"][i],))
            value = torch.nn.functional.cross_entropy(outputs, data["y"][i])
            value = value + config.lam / 2 * sum((phi[name] - theta[name]).square().sum() for name in theta)
            grads = torch.autograd.grad(value, list(phi.values()))
            last = float(value), float(torch.cat([g.flatten() for g in grads]).norm())
            phi = {
                name: (leaf - 0.05 * g).detach().requires_grad_()
                for (name, leaf), g in zip(phi.items(), grads, strict=True)
            }
        values.append(last[0])
        slopes.append(last[1])
    np.testing.assert_allclose(rows[0]["residual"], np.median(slopes), rtol=1e-9)
    np.testing.assert_allclose(rows[0]["objective"], np.median(values), rtol=1e-9)
