"""ConvNet's layers against PyTorch's convolution and batch norm, to second order, for one task and for many."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from applications.meta_learning.models import ConvNet
from applications.meta_learning.problem import Theta, cross_entropy, few_shot_problem
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, Exact
from bilevel.solvers import GradientDescent

WAYS, CHANNELS, LAM = 3, 4, 0.7
SIZES = [28, 12, 9]


def reference(in_size: int) -> nn.Module:
    """The same network from PyTorch's modules."""
    layers: list[nn.Module] = []
    size, inputs = in_size, 1
    for _ in range(4):
        layers += [
            nn.Conv2d(inputs, CHANNELS, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS, track_running_stats=False),
            nn.ReLU(),
        ]
        size, inputs = (size + 1) // 2, CHANNELS
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * size * size, WAYS)).double()


def theta_of(net: ConvNet) -> Theta:
    """Parameters that are not the initial ones: scales and shifts count."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in net.named_parameters()
    }


def translated(theta: Theta) -> Theta:
    """Our parameters under PyTorch's names and in its layout."""
    out = {"13.weight" if "weight" in k else "13.bias": v for k, v in theta.items() if k.startswith("head.")}
    for i in range(4):
        out[f"{3 * i}.weight"] = theta[f"body.{i}.kernel"].permute(3, 2, 0, 1)
        out[f"{3 * i + 1}.weight"] = theta[f"body.{i}.scale"]
        out[f"{3 * i + 1}.bias"] = theta[f"body.{i}.shift"]
    return out


def tasks(count: int, in_size: int) -> Any:
    generator = torch.Generator().manual_seed(4)

    def part(n: int) -> dict[str, Tensor]:
        x = torch.rand(count, n, 1, in_size, in_size, generator=generator, dtype=torch.float64)
        return {"x": x, "y": torch.randint(0, WAYS, (count, n), generator=generator)}

    return {"support": part(6), "query": part(5)}


def losses(in_size: int) -> tuple[Any, Any]:
    """(ours, PyTorch's): functions of (theta, images, labels)."""
    net, plain = ConvNet(WAYS, channels=CHANNELS, in_size=in_size).double(), reference(in_size)
    return (
        lambda theta, x, y: nn.functional.cross_entropy(functional_call(net, theta, (x,)), y),
        lambda theta, x, y: nn.functional.cross_entropy(functional_call(plain, translated(theta), (x,)), y),
    )


def assert_trees(found: Theta, expected: Theta, rtol: float = 1e-9) -> None:
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=rtol, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("in_size", SIZES)
def test_one_task(in_size: int) -> None:
    ours, plain = losses(in_size)
    theta = theta_of(ConvNet(WAYS, channels=CHANNELS, in_size=in_size).double())
    data = tasks(1, in_size)["support"]
    x, y = data["x"][0], data["y"][0]
    torch.testing.assert_close(ours(theta, x, y), plain(theta, x, y), rtol=1e-12, atol=0)
    v = {name: torch.randn_like(leaf) for name, leaf in theta.items()}

    def gradient(loss: Any) -> Any:
        return torch.func.grad(lambda t: loss(t, x, y))

    assert_trees(gradient(ours)(theta), gradient(plain)(theta))
    products = [torch.func.vjp(gradient(loss), theta)[1](v)[0] for loss in (ours, plain)]
    assert_trees(*products)
    forward = torch.func.jvp(gradient(ours), (theta,), (v,))[1]
    assert_trees(forward, products[1])
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in theta.items()}
    eager = torch.autograd.grad(ours(leaves, x, y), list(leaves.values()), create_graph=True)
    assert_trees(dict(zip(leaves, eager, strict=True)), gradient(plain)(theta))
    again = torch.autograd.grad(eager, list(leaves.values()), list(v.values()))
    assert_trees(dict(zip(leaves, again, strict=True)), products[1])


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("in_size", SIZES)
@pytest.mark.parametrize("count", [1, 3])
def test_meta_gradient_of_many_tasks(count: int, in_size: int, curvature: Any) -> None:
    """The whole of Algorithm 2 against a loop over tasks with PyTorch's modules."""
    net = ConvNet(WAYS, channels=CHANNELS, in_size=in_size).double()
    theta, data = theta_of(net), tasks(count, in_size)
    solver, linsys = GradientDescent(step_size=0.05, max_steps=3), CG(max_steps=3, rtol=0.0, steihaug=True)
    options = {"solver": solver, "linsys": linsys, "curvature": curvature}
    found = bilevel.hypergradient(few_shot_problem(net, cross_entropy, LAM), theta, data, batched=True, **options)
    plain = reference(in_size)
    total = {name: torch.zeros_like(leaf) for name, leaf in theta.items()}
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, task: functional_call(plain, translated(phi), (task["support"]["x"],)),
        lambda out, task: nn.functional.cross_entropy(out, task["support"]["y"]),
        lambda phi, task: nn.functional.cross_entropy(
            functional_call(plain, translated(phi), (task["query"]["x"],)), task["query"]["y"]
        ),
        LAM,
    )
    for i in range(count):
        own = {part: {key: value[i] for key, value in tensors.items()} for part, tensors in data.items()}
        lone = bilevel.hypergradient(problem, theta, own, **options).unwrap()
        total = {name: total[name] + leaf / count for name, leaf in lone.items()}
    assert found.ok.all()
    assert_trees(found.grad, total, rtol=1e-8)


def test_hessian_of_many_tasks_is_that_of_pytorch() -> None:
    """The retained graph with several right-hand sides at once, column by column."""
    in_size = 9
    _, plain = losses(in_size)
    net = ConvNet(WAYS, channels=CHANNELS, in_size=in_size).double()
    theta, data = theta_of(net), tasks(2, in_size)
    problem = few_shot_problem(net, cross_entropy, LAM)
    found = bilevel.implicit_gradient(
        problem,
        {name: leaf.expand(2, *leaf.shape) for name, leaf in theta.items()},
        theta,
        data,
        linsys=Exact(),
        batched=True,
        reduction="none",
    )
    for i in range(2):
        x, y = data["support"]["x"][i], data["support"]["y"][i]
        names = sorted(theta)
        shapes = [theta[name].shape for name in names]
        flat = torch.cat([theta[name].reshape(-1) for name in names])

        def unflatten(vector: Tensor, names: Any = names, shapes: Any = shapes) -> Theta:
            parts = vector.split([shape.numel() for shape in shapes])
            return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

        h = torch.autograd.functional.hessian(lambda v, x=x, y=y: plain(unflatten(v), x, y), flat)
        h = h + LAM * torch.eye(len(flat), dtype=torch.float64)
        query = torch.func.grad(lambda v, i=i: plain(unflatten(v), data["query"]["x"][i], data["query"]["y"][i]))(flat)
        expected = LAM * torch.linalg.solve(h, query)
        grad = torch.cat([found.grad[name][i].reshape(-1) for name in names])
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


def test_a_bad_task_leaves_the_others_as_they_were() -> None:
    net = ConvNet(WAYS, channels=CHANNELS, in_size=12).double()
    problem, theta, data = few_shot_problem(net, cross_entropy, LAM), theta_of(net), tasks(3, 12)
    options: Any = {
        "solver": GradientDescent(step_size=0.05, max_steps=3),
        "linsys": CG(max_steps=3, rtol=0.0, steihaug=True),
        "batched": True,
        "reduction": "none",
    }
    good = bilevel.hypergradient(problem, theta, data, **options)
    data["support"]["x"][1] = torch.nan
    bad = bilevel.hypergradient(problem, theta, data, **options)
    assert bad.ok.tolist() == [True, False, True]
    for name in theta:
        assert torch.equal(bad.grad[name][[0, 2]], good.grad[name][[0, 2]])
