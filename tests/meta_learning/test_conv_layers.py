"""ConvNet's layers against PyTorch's convolution, batch norm and max-pooling, to second order, for one task and for many."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from applications.meta_learning.models import ConvNet, _max_pool
from applications.meta_learning.problem import Theta, cross_entropy, few_shot_problem
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, Exact
from bilevel.solvers import GradientDescent

WAYS, CHANNELS, LAM = 3, 4, 0.7


@dataclass(frozen=True)
class Kind:
    """What the images and the network are."""

    in_size: int
    in_channels: int = 1
    pooled: bool = False

    def net(self) -> ConvNet:
        options: Any = {"in_size": self.in_size, "in_channels": self.in_channels, "pooled": self.pooled}
        return ConvNet(WAYS, channels=CHANNELS, **options).double()

    def __str__(self) -> str:
        return f"{self.in_size}-{self.in_channels}-{'pooled' if self.pooled else 'strided'}"


KINDS = pytest.mark.parametrize(
    "kind", [Kind(28), Kind(12), Kind(9), Kind(9, 3), Kind(16, 3, True), Kind(21, 3, True), Kind(26, 1, True)], ids=str
)


def reference(kind: Kind) -> nn.Module:
    """The same network from PyTorch's modules."""
    layers: list[nn.Module] = []
    size, inputs = kind.in_size, kind.in_channels
    for _ in range(4):
        layers += [
            nn.Conv2d(inputs, CHANNELS, 3, stride=1 if kind.pooled else 2, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2) if kind.pooled else nn.Identity(),
        ]
        size, inputs = size // 2 if kind.pooled else (size + 1) // 2, CHANNELS
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
    out = {"17.weight" if "weight" in k else "17.bias": v for k, v in theta.items() if k.startswith("head.")}
    for i in range(4):
        out[f"{4 * i}.weight"] = theta[f"body.{i}.kernel"].permute(3, 2, 0, 1)
        out[f"{4 * i + 1}.weight"] = theta[f"body.{i}.scale"]
        out[f"{4 * i + 1}.bias"] = theta[f"body.{i}.shift"]
    return out


def tasks(count: int, kind: Kind) -> Any:
    generator = torch.Generator().manual_seed(4)

    def part(n: int) -> dict[str, Tensor]:
        shape = (count, n, kind.in_channels, kind.in_size, kind.in_size)
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        return {"x": x, "y": torch.randint(0, WAYS, (count, n), generator=generator)}

    return {"support": part(6), "query": part(5)}


def losses(kind: Kind) -> tuple[Any, Any]:
    """(ours, PyTorch's): functions of (theta, images, labels)."""
    net, plain = kind.net(), reference(kind)
    return (
        lambda theta, x, y: nn.functional.cross_entropy(functional_call(net, theta, (x,)), y),
        lambda theta, x, y: nn.functional.cross_entropy(functional_call(plain, translated(theta), (x,)), y),
    )


def assert_trees(found: Theta, expected: Theta, rtol: float = 1e-9) -> None:
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=rtol, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@KINDS
def test_one_task(kind: Kind) -> None:
    ours, plain = losses(kind)
    theta = theta_of(kind.net())
    data = tasks(1, kind)["support"]
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
@KINDS
@pytest.mark.parametrize("count", [1, 3])
def test_meta_gradient_of_many_tasks(count: int, kind: Kind, curvature: Any) -> None:
    """The whole of Algorithm 2 against a loop over tasks with PyTorch's modules."""
    net = kind.net()
    theta, data = theta_of(net), tasks(count, kind)
    solver, linsys = GradientDescent(step_size=0.05, max_steps=3), CG(max_steps=3, rtol=0.0, steihaug=True)
    options = {"solver": solver, "linsys": linsys, "curvature": curvature}
    found = bilevel.hypergradient(few_shot_problem(net, cross_entropy, LAM), theta, data, batched=True, **options)
    plain = reference(kind)
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


@pytest.mark.parametrize("kind", [Kind(9), Kind(17, 3, True)], ids=str)
def test_hessian_of_many_tasks_is_that_of_pytorch(kind: Kind) -> None:
    """The retained graph with several right-hand sides at once, column by column."""
    _, plain = losses(kind)
    net = kind.net()
    theta, data = theta_of(net), tasks(2, kind)
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
    kind = Kind(12)
    net = kind.net()
    problem, theta, data = few_shot_problem(net, cross_entropy, LAM), theta_of(net), tasks(3, kind)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_is_that_of_pytorch(dtype: torch.dtype) -> None:
    """Also in the gradient where pixels tie: zeros after a ReLU, and an image of one grey level."""
    random = torch.rand(2, 3, 5, 7, 4, dtype=dtype)
    for x in (random, (random - 0.5).relu(), torch.ones_like(random)):
        ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        found = _max_pool(ours)
        expected = nn.functional.max_pool2d(plain.flatten(0, 1).movedim(-1, 1), 2).movedim(1, -1).unflatten(0, (2, 3))
        assert torch.equal(found, expected)
        weights = torch.rand(found.shape, dtype=dtype)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        assert torch.equal(ours.grad, plain.grad)


def test_a_network_whose_pooling_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="in_size: expected at least 16, which pooling halves four times, got 15"):
        ConvNet(WAYS, in_size=15, pooled=True)
