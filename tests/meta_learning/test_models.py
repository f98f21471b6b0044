"""The networks, and what is refused as one."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from applications.meta_learning.models import MLP, BatchNorm, ConvNet, check_module, count_parameters, initial_theta


def test_the_last_layer_of_the_papers_network_has_256_inputs() -> None:
    net = ConvNet(5)
    assert net.head.weight.shape == (5, 256)
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    # 9*64 + 3 * 9*64*64 weights, 4 * 2*64 of batch norm, 256*5 + 5 of the last layer
    assert count_parameters(net) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 256 * 5 + 5


@pytest.mark.parametrize("size", [8, 20, 28, 33])
def test_any_image_size(size: int) -> None:
    assert ConvNet(3, channels=4, in_size=size)(torch.rand(6, 1, size, size)).shape == (6, 3)


def test_batch_norm_uses_the_batch_in_training_and_in_test() -> None:
    net = ConvNet(5, channels=4)
    x = torch.rand(6, 1, 28, 28)
    trained = net.train()(x)
    torch.testing.assert_close(net.eval()(x), trained, rtol=0, atol=0)
    assert not torch.allclose(net(x[:3]), trained[:3], atol=1e-3)  # transductive: the other images matter
    assert not list(net.buffers())


def test_a_zero_head_prefers_no_label() -> None:
    assert torch.equal(ConvNet(5, channels=4, zero_head=True)(torch.rand(4, 1, 28, 28)), torch.zeros(4, 5))


@pytest.mark.parametrize(
    ("net", "x"), [(ConvNet(3, channels=4).double(), (4, 5, 1, 28, 28)), (MLP(8).double(), (4, 5, 1))]
)
def test_networks_over_tasks_are_the_networks_of_each_task(net: nn.Module, x: tuple[int, ...]) -> None:
    images = torch.rand(x, dtype=torch.float64)
    thetas = {name: torch.randn(4, *p.shape, dtype=torch.float64) for name, p in net.named_parameters()}
    together = vmap(lambda phi, x: functional_call(net, phi, (x,)))(thetas, images)
    for task in range(4):
        alone = functional_call(net, {name: leaf[task] for name, leaf in thetas.items()}, (images[task],))
        torch.testing.assert_close(together[task], alone, rtol=1e-9, atol=1e-9)


def test_initial_theta_is_a_copy() -> None:
    net = MLP(4)
    theta = initial_theta(net, torch.float64, torch.device("cpu"))
    assert theta.keys() == dict(net.named_parameters()).keys()
    before = net.head.bias.detach().clone()
    theta["head.bias"].fill_(7.0)
    assert torch.equal(net.head.bias, before) and theta["head.bias"].dtype == torch.float64


def with_dropout_in_eval() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    return net.eval()


@pytest.mark.parametrize(
    "module",
    [
        ConvNet(5, channels=4),
        MLP(),
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)),
        with_dropout_in_eval(),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2)),
    ],
)
def test_deterministic_modules_are_accepted(module: nn.Module) -> None:
    check_module(module)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
            "layer '1' .BatchNorm2d. keeps running statistics.*track_running_stats=False",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), "keeps running statistics"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)),
            "layer '1' .Dropout. drops units at random.*set its rate to 0",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout2d(0.1)), "drops units"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "the module itself.*drops units"),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), "drops units"),
        (nn.ReLU(), "expected a module with parameters"),
    ],
)
def test_others_are_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_module(module)


@pytest.mark.parametrize("channels", [1, 3])
def test_batch_norm_is_that_of_pytorch_under_every_nesting(channels: int) -> None:
    """Value, gradient, Hessian product and forward mode, mapped over tasks, against PyTorch's own rules."""
    from torch.func import grad, jvp, vmap

    torch.manual_seed(channels)
    ours = BatchNorm(channels).double()
    theirs = nn.BatchNorm2d(channels, track_running_stats=False).double()
    x = torch.randn(4, 6, channels, 3, 2, dtype=torch.float64)
    weights = {"weight": torch.rand(4, channels).double() + 0.5, "bias": torch.randn(4, channels).double()}
    direction = {name: torch.randn_like(leaf) for name, leaf in weights.items()}

    def results(module: nn.Module) -> list[torch.Tensor]:
        def loss(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return (functional_call(module, w, (x,)) ** 3).cos().sum()

        leaves = [leaf.clone().requires_grad_() for leaf in [*weights.values(), x]]
        value = vmap(loss)(dict(zip(weights, leaves, strict=False)), leaves[-1])
        first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        shared = vmap(loss, in_dims=(None, 0))({name: leaf[0] for name, leaf in weights.items()}, x)
        forward = jvp(lambda w: vmap(loss)(w, x), (weights,), (direction,))
        nested = vmap(vmap(loss, in_dims=(None, 0)), in_dims=(0, None))(weights, x)
        return [
            value,
            *first,
            *second,
            shared,
            *forward,
            *vmap(grad(loss))(weights, x).values(),
            nested,
            loss(weights_of(0), x[0]),
        ]

    def weights_of(task: int) -> dict[str, torch.Tensor]:
        return {name: leaf[task] for name, leaf in weights.items()}

    for got, expected in zip(results(ours), results(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
