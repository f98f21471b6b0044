"""The networks of the experiments. Any other `nn.Module` may take their place if `check_module` accepts it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from applications.meta_learning.outputs import adapted_parameters
from applications.meta_learning.products import has_tangents, is_large, product

# ----------------------------------------------------------------------------------------------------------------------
# The layers of ConvNet for many tasks at once, each task with weights of its own.
#
# Activations are channels-last, (tasks, n, height, width, channels), so that a convolution is one matrix product for each
# task, of the windows of its images with its kernel. PyTorch's route is a grouped convolution: for the few images of a support
# set that is slower, and its second derivative, like that of batch norm, is composed of many passes over the activations.
# benchmarks/NOTES.md has the numbers.

EPS = 1e-5  # of batch norm


class _Windows(torch.autograd.Function):
    """The windows of a 3x3 convolution with a border of zeros: (tasks, n, h, w, c) -> (tasks, n h' w', 9 c). Stride 1 or 2."""

    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:
        tasks, n, height, width, channels = x.shape
        rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
        right, below = stride * (columns - 1) + 2 - width, stride * (rows - 1) + 2 - height
        padded = nn.functional.pad(x, (0, 0, 1, right, 1, below)).flatten(0, 1)
        image, row, pixel, _ = padded.stride()
        size = (tasks * n, rows, columns, 3, 3 * channels)  # the three pixels of a row of a window lie side by side
        windows = padded.as_strided(size, (image, stride * row, stride * pixel, row, 1))
        return windows.reshape(tasks, n * rows * columns, 9 * channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.images, ctx.stride = inputs[0].shape[1:], inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Overlap.apply(grad, ctx.images, ctx.stride), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _stride: None) -> Any:
        return _Windows.apply(tangent, ctx.stride)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, stride: int) -> tuple[Tensor, int]:
        windows = _Windows.apply(x.movedim(in_dims[0], 0).flatten(0, 1), stride)
        return windows.unflatten(0, (info.batch_size, -1)), 0


class _Overlap(torch.autograd.Function):
    """The adjoint of :class:`_Windows`: a pixel is the sum of its copies. ``images`` is (n, h, w, c)."""

    @staticmethod
    def forward(windows: Tensor, images: torch.Size, stride: int) -> Tensor:
        return _overlapped(windows, images, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.Size, int], output: Tensor) -> None:
        ctx.images, ctx.stride = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Windows.apply(grad, ctx.stride), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _images: None, _stride: None) -> Any:
        return _Overlap.apply(tangent, ctx.images, ctx.stride)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], windows: Tensor, images: torch.Size, stride: int
    ) -> tuple[Tensor, int]:
        pixels = _Overlap.apply(windows.movedim(in_dims[0], 0).flatten(0, 1), images, stride)
        return pixels.unflatten(0, (info.batch_size, -1)), 0


def _overlapped(windows: Tensor, images: torch.Size, stride: int) -> Tensor:
    """See :class:`_Overlap`."""
    n, height, width, channels = images
    rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
    windows = windows.reshape(-1, rows, columns, 3, 3, channels)
    if stride == 1:  # windows[.., y, x, i, j, :] belongs to the pixel (y + i - 1, x + j - 1)
        padded = windows.new_zeros(len(windows), rows + 2, columns + 2, channels)
        for i, j in itertools.product(range(3), range(3)):
            padded[:, i : i + rows, j : j + columns] += windows[:, :, :, i, j]
        return padded[:, 1:-1, 1:-1].unflatten(0, (-1, n)).contiguous()
    # windows[.., y, i, x, j, :] belongs to the pixel (2 y + i - 1, 2 x + j - 1): those with i, j > 0 have every pixel once
    windows = windows.transpose(2, 3)
    pixels = windows[:, :, 1:, :, 1:].contiguous()
    pixels[:, :-1, 1] += windows[:, 1:, 0, :, 1:]
    pixels[:, :, :, :-1, 1] += windows[:, :, 1:, 1:, 0]
    pixels[:, :-1, 1, :-1, 1] += windows[:, 1:, 0, 1:, 0]
    return pixels.reshape(-1, n, 2 * rows, 2 * columns, channels)[:, :, :height, :width]


def _first_layer(x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Convolution, batch norm, ReLU of images: as :func:`_layer`.

    Mean and variance of the output are those of the windows, mapped by the kernel. A window has few numbers, nine of a grey
    image, so this saves most passes over the largest activation of the network.
    """
    windows = _Windows.apply(x, stride)
    windows = windows - windows.mean(1, keepdim=True)
    covariance = windows.mT @ windows / windows.shape[1]
    kernel = kernel.flatten(1, 3)
    variance = (kernel * (covariance @ kernel)).sum(1)
    kernel = kernel * (scale * (variance + EPS).rsqrt()).unsqueeze(1)
    return torch.baddbmm(shift.unsqueeze(1), windows, kernel).relu()


def _layer(x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Convolution, batch norm, ReLU: (tasks, n, h, w, c) -> (tasks, n h' w', c').

    kernel: (tasks, 3, 3, c, c'). scale, shift: of batch norm, (tasks, c').
    """
    if len(x) > 1 and not _transforms_active():
        return _Layer.apply(x, kernel, scale, shift, stride)[0]
    if len(x) > 1:
        y = _Windows.apply(x, stride) @ kernel.flatten(1, 3)
    else:  # PyTorch's convolution is made for that
        y = nn.functional.conv2d(
            x.squeeze(0).movedim(-1, 1), kernel.squeeze(0).permute(3, 2, 0, 1), stride=stride, padding=1
        )
        y = y.movedim(1, -1).flatten(0, 2).unsqueeze(0)
    y = y - y.mean(1, keepdim=True)
    r = ((y * y).mean(1, keepdim=True) + EPS).rsqrt()
    return torch.addcmul(shift.unsqueeze(1), y, scale.unsqueeze(1) * r).relu()


class _Layer(torch.autograd.Function):
    """:func:`_layer` for eager mode, with its derivatives in closed form. With c the windows of x,

        y = c kernel - mean,    r = (mean y^2 + eps)^(-1/2),    z = max(0, scale r y + shift)

    over the rows of each task. y and r are outputs beside z: the first derivative is a function of them, and so the second
    derivative comes back here with their cotangents, and goes through the product once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor, stride: int) -> tuple[Tensor, ...]:
        c = _Windows.forward(x, stride)
        y = product(c, kernel.flatten(1, 3))
        y -= y.mean(1, keepdim=True)
        r = (y * y).mean(1, keepdim=True).add_(EPS).rsqrt_()
        z = torch.addcmul(shift.unsqueeze(1), y, scale.unsqueeze(1) * r).relu_()
        ctx.stride = stride
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, kernel, scale, z, y, r, c)
        ctx.save_for_forward(x, kernel, scale, z, y, r, c)
        return z, y, r

    @staticmethod
    def backward(ctx: Any, gz: Tensor | None, gy: Tensor | None, gr: Tensor | None) -> Any:
        x, kernel, scale, z, y, r, c = ctx.saved_tensors
        g = torch.zeros_like(z) if gz is None else torch.ops.aten.threshold_backward(gz, z, 0)
        owed = None
        if gy is not None and gr is not None:  # they come together
            owed = torch.addcmul(gy, y, gr * r**3 / -y.shape[1])
            owed = owed - owed.mean(1, keepdim=True)
        again = torch.is_grad_enabled() and not _transforms_active()
        gradient = _LayerGradient.apply if again else _layer_gradient
        c = c if again else _with_derivatives(c, x, ctx.stride)
        dx, dkernel, dscale, dshift = gradient(g, owed, x, kernel.flatten(1, 3), scale, c, y, r, ctx.stride)
        return dx, dkernel.reshape(kernel.shape), dscale, dshift, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        x, kernel, scale, z, y, r, c = ctx.saved_tensors
        c = _with_derivatives(c, x, ctx.stride)
        likes = (x, kernel, scale, scale)
        tx, tkernel, tscale, tshift = (
            torch.zeros_like(x) if t is None else t for t, x in zip(tangents[:4], likes, strict=True)
        )
        kernel, tkernel, scale, tscale, tshift = (
            kernel.flatten(1, 3),
            tkernel.flatten(1, 3),
            *(t.unsqueeze(1) for t in (scale, tscale, tshift)),
        )
        ty = product(c, tkernel, product(_Windows.apply(tx, ctx.stride), kernel))
        ty = ty - ty.mean(1, keepdim=True)
        tr = -(r**3) * (y * ty).mean(1, keepdim=True)
        tz = torch.addcmul(torch.addcmul(tshift, y, tscale * r + scale * tr), ty, scale * r)
        return torch.ops.aten.threshold_backward(tz, z, 0), ty, tr


def _with_derivatives(c: Tensor, x: Tensor, stride: int) -> Tensor:
    """c; the windows of x anew where somebody differentiates on, which c does not carry."""
    backwards = torch.is_grad_enabled() and x.requires_grad
    return _Windows.apply(x, stride) if backwards or has_tangents() else c


def _layer_gradient(
    g: Tensor,
    owed: Tensor | None,
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    c: Tensor,
    y: Tensor,
    r: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cotangents of x, kernel, scale and shift: with means over the rows,

        dscale = r sum(g y),    dshift = sum(g),    dy = scale r (g - mean g - r^2 y mean(g y)) + owed

    g: cotangent of scale r y + shift. owed: what is added to that of y.
    """
    m, scale = y.shape[1], scale.unsqueeze(1)
    dshift, dscale = g.sum(1, keepdim=True), (g * y).sum(1, keepdim=True) * r
    dy = torch.addcmul(scale * r * dshift / -m, g, scale * r).addcmul_(y, scale * r * r * dscale / -m)
    dy = dy if owed is None else dy + owed
    return _to_pixels(dy, kernel, x.shape[1:], stride), product(c.mT, dy), dscale.squeeze(1), dshift.squeeze(1)


def _to_pixels(dy: Tensor, kernel: Tensor, images: torch.Size, stride: int) -> Tensor:
    """The cotangent of x from that of y: (tasks, n, h, w, c)."""
    kernel = kernel.mT
    if not is_large(dy, kernel):
        return _Overlap.apply(dy @ kernel, images, stride)
    out = dy.new_empty(len(dy), *images)
    for own, one, its_kernel in zip(out, dy, kernel, strict=True):  # while the windows of a task are in the cache
        own.copy_(_overlapped(product(one.unsqueeze(0), its_kernel.unsqueeze(0)), images, stride).squeeze(0))
    return out


class _LayerGradient(torch.autograd.Function):
    """:func:`_layer_gradient` with its derivative. That c are the windows of x is in the derivative for x."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tensors, ctx.stride = inputs
        outputs = _layer_gradient(*inputs)
        ctx.save_for_backward(*tensors, *outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, vx: Tensor, vkernel: Tensor, vscale: Tensor, vshift: Tensor) -> Any:
        g, owed, x, kernel, scale, c, y, r, *sums = ctx.saved_tensors
        c = _with_derivatives(c, x, ctx.stride)
        m = y.shape[1]
        scale, vscale, vshift, dscale, dshift = (t.unsqueeze(1) for t in (scale, vscale, vshift, *sums))
        s = scale * r
        dy = torch.addcmul(s * dshift / -m, g, s).addcmul_(y, s * r * dscale / -m)
        dy = dy if owed is None else dy + owed
        vc = _Windows.apply(vx, ctx.stride)
        v = product(c, vkernel, product(vc, kernel))  # the cotangent of dy
        mean, along = v.mean(1, keepdim=True), (v * y).mean(1, keepdim=True)
        k = vscale * r - s * along * r * r
        vg = torch.addcmul(vshift - s * mean, v, s).addcmul_(y, k)
        vy = (g * k).addcmul_(v, s * r * dscale / -m)
        t = (v * g).sum(1, keepdim=True) - mean * dshift - r * dscale * along  # (v, dy) / s
        vr = scale * t - 2 * s * along * dscale + vscale * dscale / r
        to_x, to_kernel = _to_pixels(dy, vkernel, x.shape[1:], ctx.stride), product(vc.mT, dy)
        return vg, None if owed is None else v, to_x, to_kernel, (r * t).squeeze(1), None, vy, vr, None


def _max_pool(x: Tensor) -> Tensor:
    """The largest of each 2x2 pixels, an odd last row or column left out: (tasks, n, h, w, c) -> (tasks, n, h // 2, w // 2, c).

    PyTorch says which pixels they are; taking them is a linear operation, with derivatives of every order in every direction.
    """
    tasks, n, height, width, channels = x.shape
    images = x.detach().flatten(0, 1).movedim(-1, 1)
    where = nn.functional.max_pool2d(images, 2, return_indices=True)[1].movedim(1, -1)
    pooled = x.flatten(2, 3).gather(2, where.reshape(tasks, n, -1, channels))
    return pooled.unflatten(2, (height // 2, width // 2))


def _strided_logits(x: Tensor, weight: Tensor, bias: Tensor, *layers: Tensor) -> Tensor:
    """:class:`ConvNet` for a batch of tasks: images (tasks, n, c, h, w), and kernel, scale, shift of each layer."""
    x, layer = x.movedim(2, -1), _first_layer
    for i in range(0, len(layers), 3):
        n, height, width = x.shape[1:4]
        kernel, scale, shift = layers[i : i + 3]
        x = layer(x, kernel, scale, shift, stride=2).unflatten(1, (n, (height + 1) // 2, (width + 1) // 2))
        layer = _layer
    return x.movedim(-1, 2).flatten(2) @ weight.mT + bias.unsqueeze(1)


def _pooled_logits(x: Tensor, weight: Tensor, bias: Tensor, *layers: Tensor) -> Tensor:
    """The same with stride 1 and max-pooling."""
    x, layer = x.movedim(2, -1), _first_layer
    for i in range(0, len(layers), 3):
        kernel, scale, shift = layers[i : i + 3]
        x = _max_pool(layer(x, kernel, scale, shift, stride=1).unflatten(1, x.shape[1:4]))
        layer = _layer
    return x.movedim(-1, 2).flatten(2) @ weight.mT + bias.unsqueeze(1)


# ----------------------------------------------------------------------------------------------------------------------
# What takes such a function to the transforms of torch.func.


def _transforms_active() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def over_tasks(fn: Callable[..., Tensor], *tensors: Tensor, axes: int = 0) -> Tensor:
    """``fn``, written for tensors with one leading axis of tasks, of tensors with ``axes`` of them, and those of `vmap`.

    Under `vmap` that is one call for all tasks, instead of a rule for each operator.
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Vmap:
        return _OverTasks.apply(fn, axes, *tensors)
    if axes == 1:
        return fn(*tensors)
    out = fn(*[tensor.reshape(-1, *tensor.shape[axes:]) for tensor in tensors])
    return out.reshape(*tensors[0].shape[:axes], *out.shape[1:])


class _OverTasks(torch.autograd.Function):
    @staticmethod
    def forward(fn: Callable[..., Tensor], axes: int, *tensors: Tensor) -> Tensor:
        raise NotImplementedError("only ever called under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], fn: Callable[..., Tensor], axes: int, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        moved = [
            tensor.expand(info.batch_size, *tensor.shape)
            if axis is None
            else tensor.movedim(axis, 0)
            if axis
            else tensor
            for tensor, axis in zip(tensors, in_dims[2:], strict=True)
        ]
        return over_tasks(fn, *moved, axes=axes + 1), 0


# ----------------------------------------------------------------------------------------------------------------------


class ConvLayer(nn.Module):
    """The parameters of one layer of :class:`ConvNet`: a kernel (3, 3, inputs, outputs), scale and shift of batch norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        initial = nn.Conv2d(inputs, outputs, kernel_size=3, bias=False).weight.detach()
        self.kernel = nn.Parameter(initial.permute(2, 3, 1, 0).contiguous())
        self.scale = nn.Parameter(torch.ones(outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))


class ConvNet(nn.Module):
    """Four times (3x3 convolution, batch norm, ReLU), then a linear layer. Each of the four halves the image.

    Batch norm uses the statistics of the batch at hand, in training and in test, so the predictions for the images of
    one task depend on one another ("transductive"; so in all published code of this method).
    The convolutions have no bias: batch norm would subtract it again.

    Images (n, in_channels, in_size, in_size) -> logits (n, ways).

    Args:
        ways: classes to tell apart.
        channels: of each layer.
        in_size: height and width of the images in pixels; 28 gives the 256 inputs of the last layer of the paper, and 84 with
            pooling and 32 channels the 800 of MAML's. At least 16 with pooling.
        zero_head: start the last layer at zero, so that no label is preferred before the first adaptation.
        in_channels: 1 for grey images, 3 for colour.
        pooled: False: by a stride of 2 (paper, appendix F, for Omniglot); a size is rounded up. True: by max-pooling over 2x2
            pixels after the ReLU (for Mini-ImageNet; Finn et al. 2017); a size is rounded down.
    """

    def __init__(
        self,
        ways: int,
        channels: int = 64,
        in_size: int = 28,
        zero_head: bool = False,
        *,
        in_channels: int = 1,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        size = in_size
        for _ in range(4):
            size = size // 2 if pooled else (size + 1) // 2
        if not size:
            raise ValueError(f"in_size: expected at least 16, which pooling halves four times, got {in_size}")
        self._logits = _pooled_logits if pooled else _strided_logits
        self.body = nn.ModuleList([ConvLayer(channels if i else in_channels, channels) for i in range(4)])
        self.head = nn.Linear(channels * size * size, ways)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        tensors = [x, self.head.weight, self.head.bias]
        for layer in self.body:
            assert isinstance(layer, ConvLayer)
            tensors += [layer.kernel, layer.scale, layer.shift]
        return over_tasks(self._logits, *tensors)


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
        ValueError: a layer keeps running statistics (the forward pass would change them), drops units at random, or has no
            derivatives; or the module has no parameter, or frozen ones only.
    """
    if not adapted_parameters(module):
        found = (
            "all of them frozen; call .requires_grad_() on some"
            if any(True for _ in module.parameters())
            else "without any"
        )
        raise ValueError(f"expected a module with parameters to adapt, got {type(module).__name__} {found}")
    for name, part in module.named_modules():
        where = f"layer {name or '(the module itself)'!r} ({type(part).__name__})"
        if getattr(part, "running_mean", None) is not None:
            raise ValueError(
                f"{where} keeps running statistics, which every evaluation of the inner objective would change; "
                "expected batch statistics: build it with track_running_stats=False"
            )
        if part.training and _dropout_rate(part) > 0:
            raise ValueError(
                f"{where} drops units at random, so the inner objective is not a function and has no Hessian; {_without(part)}"
            )
        if _on_the_fast_path(part):
            raise ValueError(
                f"{where} is in eval mode, where PyTorch takes a fast path that has no derivatives; build it with dropout=0.0 and call "
                ".train() on it, or turn that path off with torch.backends.mha.set_fastpath_enabled(False)"
            )


def _without(part: nn.Module) -> str:
    """How to get rid of its dropout."""
    if isinstance(part, nn.MultiheadAttention):  # in eval mode it would be on the fast path
        return "build it, or the layer that it is in, with dropout=0.0"
    return "set its rate to 0, or call .eval() on it"


def _on_the_fast_path(part: nn.Module) -> bool:
    return isinstance(part, nn.MultiheadAttention) and not part.training and torch.backends.mha.get_fastpath_enabled()


def _dropout_rate(part: nn.Module) -> float:
    rate = (
        part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0.0)
    )  # attention, RNNs
    return float(rate) if isinstance(rate, int | float) else 0.0


def count_parameters(module: nn.Module) -> int:
    """Number of entries of all parameters that are not frozen, tied ones once."""
    return sum(parameter.numel() for parameter in adapted_parameters(module).values())


def initial_theta(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A copy of the module's parameters, by name: where meta-training starts. Frozen ones (``requires_grad=False``) are left out."""
    return {
        name: p.detach().to(device=device, dtype=dtype, copy=True) for name, p in adapted_parameters(module).items()
    }
