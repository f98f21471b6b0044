"""The networks, and what is refused as one."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

import bilevel
from applications.meta_learning.models import MLP, ConvNet, check_module, count_parameters, initial_theta
from applications.meta_learning.problem import few_shot_problem
from bilevel.solvers import GradientDescent


def test_the_last_layer_of_the_papers_network_has_256_inputs() -> None:
    net = ConvNet(5)
    assert net.head.weight.shape == (5, 256)
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    # 9*64 + 3 * 9*64*64 weights, 4 * 2*64 of batch norm, 256*5 + 5 of the last layer
    assert count_parameters(net) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 256 * 5 + 5


def test_the_network_for_mini_imagenet_has_the_800_inputs_of_mamls() -> None:
    net = ConvNet(5, channels=32, in_size=84, in_channels=3, pooled=True)
    assert net(torch.rand(2, 3, 84, 84)).shape == (2, 5)
    assert count_parameters(net) == 9 * 3 * 32 + 3 * 9 * 32 * 32 + 4 * 2 * 32 + 800 * 5 + 5


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
    ("net", "x"),
    [
        (ConvNet(3, channels=4).double(), (4, 5, 1, 28, 28)),
        (ConvNet(3, channels=4, in_size=19, in_channels=3, pooled=True).double(), (4, 5, 3, 19, 19)),
        (MLP(8).double(), (4, 5, 1)),
    ],
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
        (nn.MultiheadAttention(4, 2, dropout=0.1), "the module itself.*drops units.*build it.*with dropout=0.0$"),
        (nn.MultiheadAttention(4, 2).eval(), "the module itself.*fast path that has no derivatives.*call .train"),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), "drops units"),
        (nn.ReLU(), "expected a module with parameters"),
    ],
)
def test_others_are_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_module(module)


class Attention(nn.Module):
    """Rows of images (n, 1, 4, 4) as words."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x[:, 0]).mean(1))


def test_what_is_advised_for_attention_works() -> None:
    """The inner problem has the gradient of plain autograd, on either way that the messages name."""
    with pytest.raises(ValueError, match="layer 'layer.self_attn'.*or the layer that it is in, with dropout=0.0"):
        check_module(Attention(0.1))
    with pytest.raises(
        ValueError, match=r"layer 'layer.self_attn' .* is in eval mode.*dropout=0.0 and call .train\(\)"
    ):
        check_module(Attention(0.1).eval())
    torch.manual_seed(0)
    without = Attention(0.0).double()
    off = copy.deepcopy(without).eval()
    x, y = torch.rand(1, 4, 1, 4, 4, dtype=torch.float64), torch.tensor([[0, 1, 1, 0]])
    for net in (without, off):
        torch.backends.mha.set_fastpath_enabled(net is not off)
        try:
            theta = initial_theta(net, torch.float64, torch.device("cpu"))
            solver = GradientDescent(step_size=0.1, max_steps=1)
            problem, task = few_shot_problem(net, nn.functional.cross_entropy, 1.0), {"support": {"x": x, "y": y}}
            phi = bilevel.solve(problem, theta, task, solver=solver, batched=True).unwrap()
            grads = torch.autograd.grad(nn.functional.cross_entropy(net(x[0]), y[0]), list(net.parameters()))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        for (name, leaf), g in zip(theta.items(), grads, strict=True):
            torch.testing.assert_close(phi[name][0], leaf - 0.1 * g, rtol=1e-9, atol=1e-9)
