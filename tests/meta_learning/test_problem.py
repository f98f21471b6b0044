"""The few-shot problem against plain autograd."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from applications.meta_learning.models import MLP, ConvNet
from applications.meta_learning.problem import (
    batched_outputs,
    cross_entropy,
    few_shot_problem,
    head_and_body,
    squared_error,
)
from bilevel.curvature import GaussNewton
from bilevel.linsys import Exact, Identity
from bilevel.solvers import GradientDescent

TASKS = 3


def regression_tasks() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def part() -> dict[str, Tensor]:
        x = torch.randn(TASKS, 6, 1, generator=generator, dtype=torch.float64)
        return {"x": x, "y": torch.sin(2 * x)}

    return {"support": part(), "query": part()}


def theta_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def test_first_order_maml_is_the_query_gradient_at_phi() -> None:
    """The linear solver Identity() turns the meta-gradient into dL/dphi (paper, Appendix A): here by plain autograd."""
    net, data = smooth_net(), regression_tasks()
    theta = theta_of(net)
    meta = bilevel.hypergradient(
        few_shot_problem(net, squared_error, 2.0),
        theta,
        data,
        solver=GradientDescent(step_size=0.1, max_steps=5),
        linsys=Identity(),
        batched=True,
    )
    expected = {name: torch.zeros_like(leaf) for name, leaf in theta.items()}
    for task in range(TASKS):
        phi = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
        for _ in range(5):
            fit = (
                (functional_call(net, phi, (data["support"]["x"][task],)) - data["support"]["y"][task]).square().mean()
            )
            near = sum((phi[name] - theta[name]).square().sum() for name in theta)
            grads = torch.autograd.grad(fit + 2.0 / 2 * near, list(phi.values()))
            phi = {
                name: (leaf - 0.1 * g).detach().requires_grad_()
                for (name, leaf), g in zip(phi.items(), grads, strict=True)
            }
        query = (functional_call(net, phi, (data["query"]["x"][task],)) - data["query"]["y"][task]).square().mean()
        for name, g in zip(phi, torch.autograd.grad(query, list(phi.values())), strict=True):
            expected[name] += g / TASKS
            torch.testing.assert_close(meta.phi[name][task], phi[name].detach(), rtol=1e-10, atol=1e-12)
    for name in theta:
        torch.testing.assert_close(meta.grad[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lam", [2.0, {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 3.0, "2.bias": 4.0}])
def test_imaml_is_lemma_1(lam: float | dict[str, float]) -> None:
    """(I + H/lambda)^{-1} dL/dphi with the dense Hessian of the support loss by autograd."""
    net, data = smooth_net(), regression_tasks()
    theta = theta_of(net)
    meta = bilevel.hypergradient(
        few_shot_problem(net, squared_error, lam),
        theta,
        data,
        solver=GradientDescent(step_size=0.05, max_steps=3),
        linsys=Exact(),
        batched=True,
        reduction="none",
    )
    names = list(theta)
    weights = torch.cat(
        [torch.full((theta[n].numel(),), lam if isinstance(lam, float) else lam[n]) for n in names]
    ).double()

    def unflat(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([theta[name].numel() for name in names])
        return {name: part.view_as(theta[name]) for name, part in zip(names, parts, strict=True)}

    def loss(vector: Tensor, part: str, task: int) -> Tensor:
        return (functional_call(net, unflat(vector), (data[part]["x"][task],)) - data[part]["y"][task]).square().mean()

    for task in range(TASKS):
        phi = torch.cat([meta.phi[name][task].flatten() for name in names])
        H = torch.autograd.functional.hessian(lambda v, task=task: loss(v, "support", task), phi)
        (g,) = torch.autograd.functional.jacobian(lambda v, task=task: loss(v, "query", task), (phi,))
        expected = weights * torch.linalg.solve(H + weights.diag(), g)
        found = torch.cat([meta.grad[name][task].flatten() for name in names])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_the_problem_of_classification_allows_gauss_newton() -> None:
    torch.manual_seed(0)
    net = ConvNet(3, channels=2, in_size=8)
    x = torch.rand(2, 6, 1, 8, 8)
    y = torch.arange(3).repeat(2).expand(2, 6)
    data = {"support": {"x": x, "y": y}, "query": {"x": x.flip(1), "y": y.flip(1)}}
    problem = few_shot_problem(net, cross_entropy, 1.0)
    meta = bilevel.hypergradient(
        problem,
        theta_of(net),
        data,
        solver=GradientDescent(step_size=0.1, max_steps=2),
        linsys=bilevel.linsys.CG(max_steps=3),
        curvature=GaussNewton(),
        batched=True,
    )
    assert meta.num_ok == 2 and all(g.isfinite().all() for g in meta.grad.values())
    # the outer loss is the mean cross-entropy on the query set at phi
    logits = batched_outputs(net, meta.phi, data["query"]["x"])
    by_hand = -torch.log_softmax(logits, -1).gather(-1, data["query"]["y"].unsqueeze(-1)).mean()
    torch.testing.assert_close(meta.outer, by_hand, rtol=1e-5, atol=1e-6)


def test_head_and_body() -> None:
    lam = head_and_body(MLP(4), 2.0, 0.5)
    assert lam == {
        "body.0.weight": 2.0,
        "body.0.bias": 2.0,
        "body.2.weight": 2.0,
        "body.2.bias": 2.0,
        "head.weight": 0.5,
        "head.bias": 0.5,
    }


def test_unfit_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps running statistics"):
        few_shot_problem(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), squared_error, 1.0)
    with pytest.raises(ValueError, match="lam: expected one entry for each of the parameters.*head"):
        few_shot_problem(MLP(4), squared_error, {"head.weight": 1.0})
