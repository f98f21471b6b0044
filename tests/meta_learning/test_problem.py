"""The few-shot problem against plain autograd."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from applications.meta_learning.models import MLP, ConvNet, count_parameters, initial_theta
from applications.meta_learning.problem import (
    batched_outputs,
    cross_entropy,
    few_shot_problem,
    head_and_body,
    plain_problem,
    squared_error,
)
from bilevel.curvature import GaussNewton
from bilevel.linsys import Exact, Identity
from bilevel.solvers import GradientDescent

TASKS = 3
SOLVER = GradientDescent(step_size=0.1, max_steps=2)


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


# --- modules that use something twice, that have buffers, that are partly frozen -------------------------------------


class Scaled(nn.Module):
    """Multiplies by a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def reused() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 1))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1))
    net[4].weight = net[2].weight
    return net


def with_buffers() -> nn.Module:
    scaled = Scaled(3)
    return nn.Sequential(nn.Linear(1, 3), scaled, nn.Tanh(), scaled, nn.Linear(3, 1))


def partly_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    return net


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def query_loss(net: nn.Module, theta: dict[str, Tensor], data: dict[str, dict[str, Tensor]], lam: float) -> float:
    """Mean over the tasks after three steps of gradient descent, by plain autograd on a copy whose own weights are moved."""
    losses = []
    for task in range(TASKS):
        x, y = data["support"]["x"][task], data["support"]["y"][task]
        query_x, query_y = data["query"]["x"][task], data["query"]["y"][task]
        copied = copy.deepcopy(net)
        leaves = {name: p for name, p in copied.named_parameters() if name in theta}
        copied.load_state_dict(dict(theta), strict=False)
        for _ in range(3):
            near = sum((p - theta[name]).square().sum() for name, p in leaves.items())
            loss = (copied(x) - y).square().mean() + lam / 2 * near
            grads = torch.autograd.grad(loss, list(leaves.values()))
            with torch.no_grad():
                for p, g in zip(leaves.values(), grads, strict=True):
                    p -= 0.1 * g
        losses.append((copied(query_x) - query_y).square().mean().item())
    return sum(losses) / TASKS


@pytest.mark.parametrize("lam", [0.0, 2.0])
@pytest.mark.parametrize("make", [reused, tied, with_buffers, partly_frozen])
def test_a_module_stays_as_it_was_and_its_gradient_is_that_of_differences(
    make: Callable[[], nn.Module], lam: float
) -> None:
    net, data = made(make), regression_tasks()
    before, parameters = copy.deepcopy(net.state_dict()), dict(net.named_parameters(remove_duplicate=False))
    theta = initial_theta(net, torch.float64, torch.device("cpu"))
    problem = few_shot_problem(net, squared_error, lam) if lam else plain_problem(net, squared_error)
    for _ in range(2):  # what the first call leaves is what the second one finds
        meta = bilevel.unrolled(problem, theta, data, solver=GradientDescent(step_size=0.1, max_steps=3), batched=True)
        outputs = batched_outputs(net, meta.phi, data["query"]["x"])
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    after = dict(net.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys() and all(after[name] is p for name, p in parameters.items())
    assert all(torch.equal(leaf, before[name]) for name, leaf in net.state_dict().items())
    by_hand = (outputs - data["query"]["y"]).square().mean().item()
    assert by_hand == pytest.approx(query_loss(net, theta, data, lam), rel=1e-10)
    for name, leaf in theta.items():
        way, step = torch.randn(leaf.shape, dtype=torch.float64), 1e-5
        up, down = (query_loss(net, {**theta, name: leaf + sign * step * way}, data, lam) for sign in (1, -1))
        assert (meta.grad[name] * way).sum().item() == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9), name


def test_frozen_parameters_are_neither_adapted_nor_meta_trained() -> None:
    """They are the module's own: the answer is that of a module that has them as constants."""
    net, data = made(partly_frozen), regression_tasks()
    assert list(initial_theta(net, torch.float64, torch.device("cpu"))) == ["2.weight", "2.bias"]
    assert count_parameters(net) == 4
    own = MLP(4)
    own.body.requires_grad_(False)
    lam = head_and_body(own, 2.0, 0.5)
    assert lam == {"head.weight": 0.5, "head.bias": 0.5}
    few_shot_problem(own, squared_error, lam)
    with pytest.raises(
        ValueError, match=r"lam: expected one entry for each of the parameters \['head.bias', 'head.weight'\]"
    ):
        few_shot_problem(own, squared_error, dict.fromkeys(dict(own.named_parameters()), 1.0))
    everything = theta_of(net)
    with pytest.raises(
        ValueError, match=r"no entry for a frozen parameter, got \['0.bias', '0.weight'\]; leave them out, as"
    ):
        bilevel.solve(few_shot_problem(net, squared_error, 1.0), everything, data, solver=SOLVER, batched=True)
    with pytest.raises(ValueError, match="got Sequential all of them frozen; call .requires_grad_"):
        few_shot_problem(net.requires_grad_(False), squared_error, 1.0)


def test_a_second_name_of_a_tensor_is_refused() -> None:
    net, data = made(reused), regression_tasks()
    problem = few_shot_problem(net, squared_error, 1.0)
    with pytest.raises(ValueError, match=r"got \['4.bias', '4.weight'\] too; .*named_parameters"):
        bilevel.solve(problem, dict(net.state_dict()), data, solver=SOLVER, batched=True)
