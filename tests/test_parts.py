"""A sum over parts of the data: the numbers of a plain sum and of closed forms, and one graph at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bilevel
from bilevel import curvature, sum_over_parts, unrolled
from bilevel.linsys import CG, Exact
from bilevel.solvers import GradientDescent, NewtonCG

F64 = torch.float64
G = np.random.default_rng(0)
X, Y = (torch.from_numpy(G.standard_normal(shape)) for shape in ((11, 3), (11,)))
W, S = torch.tensor([0.3, -0.2, 0.5], dtype=F64), torch.tensor(0.7, dtype=F64)
NEWTON, LINSYS = NewtonCG(max_steps=30, cg_steps=20, cg_rtol=1e-8, tol=1e-12), CG(max_steps=50, rtol=1e-12)


def loss(w: Tensor, tree: dict[str, Tensor], part: tuple[Tensor, Tensor]) -> Tensor:
    x, y = part
    return ((torch.tanh(x @ w) * tree["s"] - y) ** 2).sum() * tree["s"]


def parts(size: int = 3, x: Tensor = X, y: Tensor = Y) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


def by_parts(w: Tensor, s: Tensor) -> Tensor:
    return sum_over_parts(loss, parts(), w, {"s": s})


def at_once(w: Tensor, s: Tensor) -> Tensor:
    return loss(w, {"s": s}, (X, Y))


def test_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    inputs = (W.clone().requires_grad_(), S.clone().requires_grad_())
    assert gradcheck(by_parts, inputs) and gradgradcheck(by_parts, inputs)
    assert float(by_parts(*inputs)) == pytest.approx(float(at_once(*inputs)), rel=1e-14)


def test_without_a_gradient_it_is_a_number() -> None:
    for value in (by_parts(W, S), by_parts(W.clone().requires_grad_(), S).detach()):
        torch.testing.assert_close(value, at_once(W, S), rtol=1e-14, atol=0)
    with torch.no_grad():
        assert not by_parts(W.clone().requires_grad_(), S).requires_grad


def test_third_derivatives() -> None:
    def third(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        w, s = W.clone().requires_grad_(), S.clone().requires_grad_()
        g = torch.autograd.grad(f(w, s), (w, s), create_graph=True)
        h = torch.autograd.grad((g[0] ** 3).sum() + g[1] ** 2, (w, s), create_graph=True)
        return torch.autograd.grad((h[0] ** 2).sum() + h[1], (w, s))

    torch.testing.assert_close(third(by_parts), third(at_once), rtol=1e-10, atol=0)


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "hessian": lambda f: torch.func.hessian(f, argnums=(0, 1)),
    "jacfwd": lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
    "per-example gradients": lambda f: (
        lambda w, s: torch.func.vmap(torch.func.grad(f), (0, None))(torch.stack([w, 2 * w]), s)
    ),
    "forward mode": lambda f: lambda w, s: torch.func.jvp(lambda w: f(w, s), (w,), (w,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_under_a_transform_it_is_the_plain_sum(transform: Callable[[Any], Any]) -> None:
    torch.testing.assert_close(transform(by_parts)(W, S), transform(at_once)(W, S), rtol=1e-10, atol=1e-12)


def test_eager_forward_mode() -> None:
    with torch.autograd.forward_ad.dual_level():
        found, expected = (
            torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(W, W), S))
            for f in (by_parts, at_once)
        )
        torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------------------------


def squares(phi: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
    x, y = part
    return 0.5 * (x @ phi - y).square().sum()


def ridge(sum_up: Callable[..., Tensor]) -> bilevel.BilevelProblem:
    """A penalty for each coordinate but the last two, which share theirs: dim theta is not dim phi."""
    return bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            sum_up(squares, parts(4, *data), phi) / len(data[0]) + 0.5 * (theta[[0, 1, 1]].exp() * phi.square()).sum()
        ),
        lambda phi, theta, data: sum_up(lambda phi, theta, part: phi @ part * theta[0].sin(), [W, X[0]], phi, theta),
        lambda theta, data: torch.zeros(3, dtype=F64),
    )


def plain_sum(loss: Callable[..., Tensor], parts: Any, *arguments: Any) -> Tensor:
    values = [loss(*arguments, part) for part in parts]
    return torch.stack(values).sum()


THETA = torch.tensor([-1.0, 0.4], dtype=F64)


def closed_form() -> np.ndarray:
    """By dense algebra: phi = H^-1 X^T y / n, dphi/dtheta = -H^-1 diag(e^theta) phi."""
    x, y, theta, target = (t.numpy() for t in (X, Y, THETA, W + X[0]))
    which = np.array([[1.0, 0], [0, 1], [0, 1]])
    penalty = np.exp(which @ theta)
    hessian = x.T @ x / len(x) + np.diag(penalty)
    phi = np.linalg.solve(hessian, x.T @ y / len(x))
    implicit = -np.linalg.solve(hessian, target * np.sin(theta[0])) * penalty * phi @ which
    return implicit + np.array([phi @ target * np.cos(theta[0]), 0.0])


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"linsys": Exact()},
    "gradient descent": {"solver": GradientDescent(step_size=None, max_steps=3000, tol=1e-12)},
    "compiled": {"compile": True},
    "forward over reverse": {"curvature": bilevel.Hessian(product=curvature.ForwardOverReverse())},
    "differences": {"curvature": bilevel.Hessian(product=curvature.FiniteDifference())},
    "to an accuracy": {"accuracy": 1e-9},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_hypergradient_of_a_ridge(way: dict[str, Any]) -> None:
    found = bilevel.hypergradient(ridge(sum_over_parts), THETA, (X, Y), **{"solver": NEWTON, "linsys": LINSYS, **way})
    rtol = 1e-6 if "curvature" in way else 1e-8
    np.testing.assert_allclose(found.unwrap().numpy(), closed_form(), rtol=rtol)


def test_a_batch_of_problems() -> None:
    data = (torch.stack([X, 2 * X, X - 1]), torch.stack([Y, Y, Y + 1]))
    found, expected = (
        bilevel.hypergradient(ridge(sum_up), THETA, data, solver=NEWTON, linsys=LINSYS, batched=True).unwrap()
        for sum_up in (sum_over_parts, plain_sum)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_argmin_to_second_order() -> None:
    def f(theta: Tensor) -> Tensor:
        phi = bilevel.argmin(ridge(sum_over_parts), theta, (X, Y), solver=NEWTON, linsys=LINSYS)
        return (phi @ (W + X[0])) * theta[0].sin()

    (found,) = torch.autograd.grad(f(theta := THETA.clone().requires_grad_()), theta)
    np.testing.assert_allclose(found.numpy(), closed_form(), rtol=1e-8)
    assert gradgradcheck(f, THETA.clone().requires_grad_(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_unrolled(forward_mode: bool) -> None:
    found, expected = (
        unrolled(
            ridge(sum_up),
            THETA,
            (X, Y),
            solver=GradientDescent(step_size=0.2, max_steps=4),
            forward_mode=forward_mode,
        ).unwrap()
        for sum_up in (sum_over_parts, plain_sum)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_one_graph_at_a_time() -> None:
    """Alive at any evaluation: the graph that is being made, and no other. A plain sum has those of all parts."""
    alive: dict[str, list[int]] = {}

    def problem(name: str, sum_up: Callable[..., Tensor]) -> bilevel.BilevelProblem:
        seen: list[weakref.ref[Any]] = []
        counts = alive.setdefault(name, [])

        def witnessed(phi: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
            counts.append(sum(ref() is not None for ref in seen))
            hidden = phi.sin() * part[0]
            value = (hidden.sum(1) - part[1]).square().sum()
            for tensor in (hidden, value):
                if tensor.grad_fn is not None:
                    token = Token()
                    tensor.grad_fn.metadata["witness"] = token  # lives as long as the graph
                    seen.append(weakref.ref(token))
            return value

        return bilevel.BilevelProblem.from_functions(
            lambda phi, theta, data: (
                sum_up(witnessed, parts(2, *data), phi) + (theta[[0, 1, 1]].exp() * phi.square()).sum()
            ),
            lambda phi, theta, data: sum_up(witnessed, parts(2, *data), phi),
            lambda theta, data: torch.zeros(3, dtype=F64),
        )

    gc.collect()
    gc.disable()
    try:
        for name, sum_up in (("by parts", sum_over_parts), ("at once", plain_sum)):
            bilevel.hypergradient(problem(name, sum_up), THETA, (X, Y), solver=NEWTON, linsys=LINSYS).unwrap()
    finally:
        gc.enable()
    assert max(alive["by parts"]) == 0 and max(alive["at once"]) >= 5


class Token:
    pass


RELATED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "twice the same": lambda w: (w, w),
    "and a part of it": lambda w: (w, w[:2]),
    "and what is made of it": lambda w: (w, w.sigmoid()),
}


@pytest.mark.parametrize("related", RELATED.values(), ids=RELATED)
def test_arguments_that_depend_on_one_another(related: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def own(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return (x @ a) * b.sum() + (a[:2] * b[:2]).sum() ** 3

    found, expected = (
        torch.autograd.functional.hessian(lambda w, sum_up=sum_up: sum_up(own, X, *related(2 * w)), W)  # type: ignore[misc]
        for sum_up in (sum_over_parts, plain_sum)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_hooks_are_called_as_for_the_plain_sum() -> None:
    calls: list[list[Tensor]] = []
    for sum_up in (sum_over_parts, plain_sum):
        w, y = W.clone().requires_grad_(), Y[:3].clone().requires_grad_()
        seen: list[Tensor] = []
        middle = 3 * w
        middle.register_hook(seen.append)
        grad = torch.autograd.grad(
            sum_up(lambda w, y, x: (x @ w) ** 2 * y.sum(), X, middle, y), (w, y), create_graph=True
        )
        torch.autograd.grad(grad[1].sum(), w)
        calls.append([tensor.detach() for tensor in seen])
    torch.testing.assert_close(*calls)
    assert len(calls[0]) == 2


def test_what_nobody_asked_for_makes_no_nan() -> None:
    """The second derivative of |t|^1.5 is infinite at 0."""
    w, t = W.clone().requires_grad_(), torch.zeros((), dtype=F64, requires_grad=True)
    value = sum_over_parts(lambda w, t, x: (x @ w) ** 2 * (1 + t) + t.abs() ** 1.5, X, w, t)
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    found = torch.autograd.grad(grad.sum(), (w, t))
    torch.testing.assert_close(found[1], 2 * (X.T @ (X @ W)).sum())


def test_scaled_gradients_in_float16() -> None:
    """As GradScaler has it: what would underflow on its way is scaled before."""
    w, x = torch.tensor([[0.3], [-0.2], [0.5]], requires_grad=True), torch.full((4, 3), 0.1)
    with torch.autocast("cpu", torch.float16):
        value = sum_over_parts(lambda w, p: (p[None] @ w).float().square().sum() * 1e-7, x, w)
    (grad,) = torch.autograd.grad(value * 2.0**16, w)
    torch.testing.assert_close(grad, 2.0**16 * 1e-7 * 2 * x.T @ (x @ w.detach()), rtol=1e-2, atol=0)


@pytest.mark.parametrize("which", ["part", "argument"])
def test_data_that_were_written_to_are_refused(which: str) -> None:
    data = {"part": list(X.clone()), "argument": torch.ones(3, dtype=F64)}
    w = W.clone().requires_grad_()
    value = sum_over_parts(lambda w, a, p: ((p * a) @ w) ** 2, data["part"], w, data["argument"])
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    (data["part"][1] if which == "part" else data["argument"]).mul_(3)
    with pytest.raises(
        ValueError,
        match=r"^sum_over_parts: expected the data of the gradient in the product, too, but they were written",
    ):
        torch.autograd.grad(grad.sum(), w)


def test_tangents_of_the_parts() -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        found, expected = (
            torch.autograd.forward_ad.unpack_dual(
                sum_up(lambda w, p: (p @ w) ** 2, list(x), W.clone().requires_grad_())
            ).tangent
            for sum_up in (sum_over_parts, plain_sum)
        )
        torch.testing.assert_close(found, expected)


def test_one_piece_of_data_at_a_time() -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Any]] = []

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            for i in range(6):
                alive.append(sum(ref() is not None for ref in seen))
                piece = X[i].clone()
                seen.append(weakref.ref(piece))
                yield piece
                del piece

    w = W.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sum_over_parts(lambda w, x: (x @ w).sin(), Loader(), w), w, create_graph=True)
    torch.autograd.grad(grad.sum(), w)
    with torch.no_grad():
        sum_over_parts(lambda w, x: (x @ w).sin(), Loader(), w)
    assert len(alive) == 18 and max(alive) == 0


def test_several_cotangents_at_once() -> None:
    w = W.clone().requires_grad_()
    value = sum_over_parts(lambda w, x: (x @ w) ** 2, X, w)
    cotangents = torch.tensor([1.0, 2.0], dtype=F64)
    (found,) = torch.func.vmap(lambda c: torch.autograd.grad(value, w, c, retain_graph=True))(cotangents)
    torch.testing.assert_close(found, cotangents[:, None] * (2 * X.T @ (X @ W)))


def test_a_gradient_may_be_asked_for_again() -> None:
    w = W.clone().requires_grad_()
    value = sum_over_parts(lambda w, x: (x @ w) ** 2, X, w)
    grads = [torch.autograd.grad(value, w, create_graph=True)[0] for _ in range(2)]
    products = [torch.autograd.grad(grad.sum(), w, retain_graph=True)[0] for grad in (*grads, *grads)]
    for product in products:
        torch.testing.assert_close(product, 2 * X.T @ X.sum(1))


def test_shapes_alone() -> None:
    w = torch.empty(3, device="meta", requires_grad=True)
    value = sum_over_parts(lambda w, x: (x @ w) ** 2, torch.empty(5, 3, device="meta"), w)
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    assert torch.autograd.grad(grad.sum(), w)[0].shape == (3,)


def test_the_sum_is_a_number_of_its_own() -> None:
    s = S.clone().requires_grad_()
    value = sum_over_parts(lambda s, part: s, [None], s)
    with torch.no_grad():
        value += 1
    assert float(s) == float(S)


@pytest.mark.parametrize("parts", [{"x": X}, None, squares], ids=["a dict", "None", "the loss"])
def test_what_is_no_iterable_of_parts(parts: Any) -> None:
    loss: Any = X if parts is squares else squares
    with pytest.raises(
        TypeError,
        match=r"^sum_over_parts: expected a loss and an iterable of parts, sum_over_parts\(loss, parts, \*arg",
    ):
        sum_over_parts(loss, parts, W)


def test_what_can_be_read_again_is_not_kept() -> None:
    """A loader makes its pieces when they are asked for: for the value and gradient, and for each product."""

    class Loader:
        def __init__(self) -> None:
            self.reads = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.reads += 1
            return parts()

    loader, w = Loader(), W.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sum_over_parts(squares, loader, w), w, create_graph=True)
    assert loader.reads == 1
    (product,) = torch.autograd.grad(grad, w, W, retain_graph=True)
    torch.testing.assert_close(product, X.T @ (X @ W), rtol=1e-12, atol=0)
    torch.autograd.grad(grad, w, W)
    assert loader.reads == 3


class Loader:
    """Cuts its data anew whenever it is read."""

    def __init__(self, x: Tensor, y: Tensor, *, keep: int | None = None, noise: float = 0.0) -> None:
        self.x, self.y, self.keep, self.noise = x, y, keep, noise
        self.generator = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.randperm(len(self.x), generator=self.generator)[: self.keep]
        x = self.x + self.noise * torch.randn(self.x.shape, generator=self.generator, dtype=self.x.dtype)
        return zip(x[rows].split(2), self.y[rows].split(2), strict=True)


def product_of(loader: Loader, w: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sum_over_parts(squares, loader, w), w, create_graph=True)
    return torch.autograd.grad(grad, w, torch.ones_like(w))[0]


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("fits", [False, True])
def test_a_loader_may_shuffle(fits: bool, dtype: torch.dtype) -> None:
    """Where the model fits its data, too, and the loss is rounding alone."""
    x, w = X.to(dtype), W.to(dtype)
    for _ in range(5):
        loader = Loader(x, x @ w if fits else Y.to(dtype))
        torch.testing.assert_close(product_of(loader, w), x.T @ x.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loader", [Loader(X, Y, keep=10), Loader(X, Y, noise=1e-3), Loader(X, Y.int(), noise=1e-6)])
def test_a_loader_may_not_change_its_data(loader: Loader) -> None:
    """Another example is left out each time; a little noise on them."""
    with pytest.raises(
        ValueError,
        match=r"^sum_over_parts: expected the same data for the gradient and for each product, got others when the parts were iterated "
        r"anew\. Let them be the same each time \(.*\), or pass a list of them\.$",
    ):
        product_of(loader, W)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.complex64], ids=str)
def test_data_of_any_type_are_watched(dtype: torch.dtype) -> None:
    data = (torch.arange(12) % 5).to(dtype).reshape(4, 3)

    class Parts:
        rows = data

        def __iter__(self) -> Iterator[Tensor]:
            return iter(self.rows)

    def grad_of(parts: Parts, w: Tensor) -> Tensor:
        loss = sum_over_parts(lambda w, x: (w * x.to(torch.complex128).abs()).square().sum(), parts, w)
        return torch.autograd.grad(loss, w, create_graph=True)[0].sum()

    parts, w = Parts(), W.clone().requires_grad_()
    expected = 2 * data.to(torch.complex128).abs().square().sum(0)
    torch.testing.assert_close(torch.autograd.grad(grad_of(parts, w), w)[0], expected)
    grad = grad_of(parts, w)
    parts.rows = data[[0, 1, 2, 2]]
    with pytest.raises(ValueError, match="got others when the parts were iterated anew"):
        torch.autograd.grad(grad, w)


def test_autocast_is_that_of_the_call() -> None:
    """A product is taken outside of it, when the objective has returned."""
    x, w = X.float(), W.float().requires_grad_()
    types: list[torch.dtype] = []

    def half(w: Tensor, x: Tensor) -> Tensor:
        scores = torch.nn.functional.linear(x, w.unsqueeze(0))
        types.append(scores.dtype)
        return scores.float().square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sum_over_parts(half, x.split(4), w)
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    torch.autograd.grad(grad.sum(), w)
    assert len(types) == 6 and set(types) == {torch.bfloat16}


def test_what_nothing_depends_on_has_no_gradient() -> None:
    w, s = W.clone().requires_grad_(), S.clone().requires_grad_()
    value = sum_over_parts(lambda w, s, part: squares(w, part), parts(), w, s)
    grad = torch.autograd.grad(value, (w, s), allow_unused=True, create_graph=True)
    assert grad[1] is None
    assert torch.autograd.grad(grad[0].sum(), (w, s), allow_unused=True)[1] is None
    number = sum_over_parts(lambda w, part: part.sum(), X.split(2), w)
    assert torch.autograd.grad(number, w, allow_unused=True) == (None,)
    torch.testing.assert_close(number.detach(), X.sum())


def test_a_linear_loss_has_no_products() -> None:
    w = W.clone().requires_grad_()
    value = sum_over_parts(lambda w, part: part @ w, X, w)
    (grad,) = torch.autograd.grad(value, w, create_graph=True)
    torch.testing.assert_close(grad, X.sum(0))
    assert torch.autograd.grad(grad.sum(), w, allow_unused=True) == (None,)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "no part": (
        lambda w: sum_over_parts(squares, [], w),
        "sum_over_parts: expected at least one part, got none. Has an iterator been used before?",
    ),
    "a vector": (
        lambda w: sum_over_parts(lambda w, part: part * w, X, w),
        "sum_over_parts: expected a loss that is a scalar tensor, got shape (3,).",
    ),
    "a number": (
        lambda w: sum_over_parts(lambda w, part: 1.0, X, w),  # type: ignore[arg-type, return-value]
        "sum_over_parts: expected a loss that is a scalar tensor, got float.",
    ),
    "captured": (
        lambda w: sum_over_parts(lambda own, part: (part @ own) * w.sum(), X, 2 * w),
        "sum_over_parts: the loss uses a tensor that carries a gradient and is not one of its arguments, so no derivative would reach it. "
        "Pass it after the parts: sum_over_parts(loss, parts, phi, theta) calls loss(phi, theta, part). Of a module pass "
        "dict(module.named_parameters()), all of them, and call it by torch.func.functional_call.",
    ),
    "a module": (
        lambda w: sum_over_parts(lambda module, part: module(part).sum(), X, torch.nn.Linear(3, 1, dtype=F64)),
        "sum_over_parts: the loss uses a tensor that carries a gradient and is not one of its arguments, so no derivative would reach it. "
        "Pass it after the parts: sum_over_parts(loss, parts, phi, theta) calls loss(phi, theta, part). Of a module pass "
        "dict(module.named_parameters()), all of them, and call it by torch.func.functional_call.",
    ),
    "data made of theta": (
        lambda w: sum_over_parts(lambda own, part: part @ own, [w * x for x in X], 2 * w),
        "sum_over_parts: expected parts that are data, got one that carries a gradient, which would not be seen. Pass what it was made of "
        "after the parts, as theta, and make it in the loss.",
    ),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_wrong_is_refused(call: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(ValueError) as raised:
        call(W.clone().requires_grad_())
    assert str(raised.value) == words
