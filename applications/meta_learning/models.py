"""The networks of the experiments. Any other `nn.Module` may take their place if `check_module` accepts it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _TasksAsChannels(torch.autograd.Function):
    """Batch norm whose rule under `vmap` is one call over (n, tasks * channels, ...), for any number of tasks.

    PyTorch's own rule normalises without weight and bias and applies these in two more passes, with copies in between. The
    result is the same; a meta-gradient of eight tasks at once took a tenth less time and a quarter less memory.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass  # `vmap` below replaces this function by an ordinary operator before autograd sees it

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, int]:
        tasks = info.batch_size
        x, weight, bias = (
            t.expand(tasks, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in zip((x, weight, bias), in_dims[:3], strict=True)
        )
        n, channels = x.shape[1:3]
        folded = x.transpose(0, 1).reshape(n, tasks * channels, *x.shape[3:])
        out = _TasksAsChannels.forward(folded, weight.reshape(-1), bias.reshape(-1), eps)
        return out.reshape(n, tasks, channels, *x.shape[3:]), 1


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of the batch at hand, fast under `torch.func.vmap`. (n, channels, h, w) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised batch."""
        if torch._C._functorch.is_batchedtensor(x):
            return _TasksAsChannels.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class ConvNet(nn.Module):
    """Four times (3x3 convolution with stride 2, batch norm, ReLU), then a linear layer (paper, appendix F).

    Batch norm uses the statistics of the batch at hand, in training and in test, so the predictions for the images of
    one task depend on one another ("transductive"; so in all published code of this method).
    The convolutions have no bias: batch norm would subtract it again.

    in_size: height and width of the images in pixels; 28 gives the 256 inputs of the last layer of the paper.
    zero_head: start the last layer at zero, so that no label is preferred before the first adaptation.

    Images (n, 1, in_size, in_size) -> logits (n, ways).
    """

    def __init__(self, ways: int, channels: int = 64, in_size: int = 28, zero_head: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size, inputs = in_size, 1
        for _ in range(4):
            layers += [
                nn.Conv2d(inputs, channels, kernel_size=3, stride=2, padding=1, bias=False),
                BatchNorm(channels),
                nn.ReLU(),
            ]
            size, inputs = (size + 1) // 2, channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels * size * size, ways)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.head(self.body(x).flatten(1))


class MLP(nn.Module):
    """1 - hidden - hidden - 1 with ReLU, for sinusoid regression (Finn et al. 2017). (n, 1) -> (n, 1)."""

    def __init__(self, hidden: int = 40) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predicted values."""
        return self.head(self.body(x))


def check_module(module: nn.Module) -> None:
    """Refuse what makes the inner objective something else than a function of the parameters.

    Raises:
        ValueError: a layer keeps running statistics (the forward pass would change them), drops units at random, or the
            module has no parameter.
    """
    if not any(True for _ in module.parameters()):
        raise ValueError(f"expected a module with parameters to adapt, got {type(module).__name__} without any")
    for name, part in module.named_modules():
        where = f"layer {name or '(the module itself)'!r} ({type(part).__name__})"
        if getattr(part, "running_mean", None) is not None:
            raise ValueError(
                f"{where} keeps running statistics, which every evaluation of the inner objective would change; "
                "expected batch statistics: build it with track_running_stats=False"
            )
        if part.training and _dropout_rate(part) > 0:
            raise ValueError(
                f"{where} drops units at random, so the inner objective is not a function and has no Hessian; "
                "set its rate to 0, or call .eval() on it"
            )


def _dropout_rate(part: nn.Module) -> float:
    rate = (
        part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0.0)
    )  # attention, RNNs
    return float(rate) if isinstance(rate, int | float) else 0.0


def count_parameters(module: nn.Module) -> int:
    """Number of entries of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def initial_theta(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A copy of the module's parameters, by name: where meta-training starts."""
    return {name: p.detach().to(device=device, dtype=dtype, copy=True) for name, p in module.named_parameters()}
