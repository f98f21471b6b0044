"""The products of ConvNet's layers by oneDNN, and the layers where they are used, against the same in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

import bilevel
from applications.meta_learning import models, products
from applications.meta_learning.models import ConvNet
from applications.meta_learning.problem import cross_entropy, few_shot_problem
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

SHAPES = [(3, 40, 50, 60), (1, 200, 30, 7), (2, 7, 300, 30)]
needs_onednn = pytest.mark.skipif(not products._has_onednn(), reason="needs oneDNN on a processor with AVX-512")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The operator is called for every product; a call is noted here."""
    products._has_onednn()  # tries it
    found, one = [], products._one
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "_one", lambda *args: found.append(1) or one(*args))
    return found


def matrices(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    tasks, m, k, n = shape
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=g, dtype=dtype) for s in ((tasks, m, k), (tasks, k, n), (tasks, m, n)))


def transposed(x: Tensor) -> Tensor:
    """The same numbers, column by column."""
    return x.mT.contiguous().mT


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("left", [lambda x: x, transposed], ids=["rows", "columns"])
@pytest.mark.parametrize("right", [lambda x: x, transposed], ids=["rows", "columns"])
@pytest.mark.parametrize("added", [False, True], ids=["", "plus"])
def test_product(
    calls: list[int], shape: Any, left: Callable[..., Tensor], right: Callable[..., Tensor], added: bool
) -> None:
    a, b, c = matrices(shape)
    found = products.product(left(a), right(b), c if added else None)
    expected = a.double() @ b.double() + (c.double() if added else 0)
    assert len(calls) == len(a)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_product_falls_back(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operator does not know the numbers, would lose a derivative, or a call for each task does not pay."""
    a, b, c = matrices(SHAPES[0], torch.float64)
    torch.testing.assert_close(products.product(a, b, c), a @ b + c)
    a, b, c = matrices(SHAPES[0])
    for i, expected in enumerate(
        (b.sum(2).unsqueeze(1).expand_as(a), a.sum(1).unsqueeze(2).expand_as(b), torch.ones_like(c))
    ):
        factors = [x.clone().requires_grad_(j == i) for j, x in enumerate((a, b, c))]
        (grad,) = torch.autograd.grad(products.product(*factors).sum(), factors[i])
        torch.testing.assert_close(grad, expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(products.product(forward_ad.make_dual(a, a.cos()), b)).tangent
    torch.testing.assert_close(tangent, a.cos() @ b)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.product(a, b).dtype == torch.bfloat16
    found = torch.func.vmap(lambda x: products.product(x.unsqueeze(0), x.mT.unsqueeze(0)))(a)
    torch.testing.assert_close(found.squeeze(1), a @ a.mT)
    assert not calls
    for least, large in ((3 * 40 * 50 * 60, False), (40 * 50 * 60 + 1, False), (40 * 50 * 60, True)):
        monkeypatch.setattr(products, "LEAST", least)
        assert products.is_large(a, b) is large


@pytest.mark.parametrize("what", ["operator", "kind of call", "processor", "oneDNN"])
def test_where_the_operator_is_not_to_be_had(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are then those of `torch.bmm`."""

    def missing(*_: Any) -> Tensor:
        raise AttributeError if what == "operator" else TypeError

    if what in ("operator", "kind of call"):
        monkeypatch.setattr(products, "_one", missing)
    elif what == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    products._has_onednn.cache_clear()
    try:
        monkeypatch.setattr(products, "LEAST", 1)
        a, b, c = matrices(SHAPES[0])
        assert not products.is_large(a, b)
        torch.testing.assert_close(products.product(a, b, c), torch.baddbmm(c, a, b))
    finally:
        monkeypatch.undo()
        products._has_onednn.cache_clear()


@pytest.mark.parametrize("pooled", [False, True], ids=["strided", "pooled"])
@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
@needs_onednn
def test_meta_gradient(calls: list[int], curvature: Any, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 as in float64, where oneDNN has no part in it."""
    torch.manual_seed(0)
    net = ConvNet(3, channels=16, in_size=16, pooled=pooled)
    theta = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in net.named_parameters()}
    part = {"x": torch.rand(4, 6, 1, 16, 16), "y": torch.arange(3).repeat(4, 2)}
    data = {"support": part, "query": {**part, "x": torch.rand(4, 6, 1, 16, 16)}}

    def meta_gradient(dtype: torch.dtype) -> dict[str, Tensor]:
        def convert(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return bilevel.hypergradient(
            few_shot_problem(net.to(dtype), cross_entropy, 2.0),
            {name: leaf.to(dtype) for name, leaf in theta.items()},
            {name: {key: convert(x) for key, x in each.items()} for name, each in data.items()},
            solver=GradientDescent(step_size=0.02, max_steps=3),
            linsys=CG(max_steps=3, rtol=0.0),
            curvature=curvature,
            batched=True,
        ).unwrap()

    tangents: list[int] = []
    jvp = models._Layer.jvp
    monkeypatch.setattr(models._Layer, "jvp", staticmethod(lambda *args: tangents.append(1) or jvp(*args)))
    exact = meta_gradient(torch.float64)
    assert not calls and bool(tangents) is isinstance(curvature, GaussNewton)
    found = meta_gradient(torch.float32)
    assert calls
    for name, leaf in exact.items():
        error = (found[name] - leaf).norm() / leaf.norm()
        assert error < 1e-3, f"{name}: {error:.1e}"


def two_tasks() -> tuple[dict[str, Tensor], Callable[[Any], Tensor]]:
    """Their parameters, and their loss."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 6, 1, 12, 12, generator=g, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ConvNet(3, channels=4, in_size=12).double()
    phi = {
        name: (p.detach() + 0.3 * torch.randn((2, *p.shape), generator=g, dtype=p.dtype)).requires_grad_()
        for name, p in net.named_parameters()
    }
    outputs = torch.func.vmap(lambda phi, x: functional_call(net, phi, (x,)))
    return phi, lambda phi: (outputs(phi, x) * (1.0 + y.unsqueeze(-1))).tanh().sum()


def test_reverse_mode_over_forward_mode() -> None:
    """Eager autograd through the closed form of forward mode: the Hessian, as by two reverse passes."""
    phi, loss = two_tasks()
    v = {name: torch.randn_like(leaf) for name, leaf in phi.items()}
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(loss({n: forward_ad.make_dual(leaf, v[n]) for n, leaf in phi.items()})).tangent
        found = torch.autograd.grad(slope, list(phi.values()))
    grads = torch.autograd.grad(loss(phi), list(phi.values()), create_graph=True)
    expected = torch.autograd.grad(grads, list(phi.values()), list(v.values()))
    for name, one, other in zip(phi, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_third_derivatives() -> None:
    """Against central differences of something that is made of second derivatives."""
    phi, loss = two_tasks()

    def second(phi: dict[str, Tensor]) -> Tensor:
        leaves = list(phi.values())
        grads = torch.autograd.grad(loss(phi), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, create_graph=True)
        return sum(g.tanh().sum() for g in again)

    g = torch.Generator().manual_seed(2)
    v = {name: torch.randn(leaf.shape, generator=g, dtype=leaf.dtype) for name, leaf in phi.items()}
    slopes = torch.autograd.grad(second(phi), list(phi.values()))
    found = sum(float((slope * v[name]).sum()) for slope, name in zip(slopes, phi, strict=True))

    def away(h: float) -> float:
        return float(second({n: (leaf + h * v[n]).detach().requires_grad_() for n, leaf in phi.items()}))

    h = 1e-6  # no ReLU changes its side
    expected = (8 * (away(h) - away(-h)) - (away(2 * h) - away(-2 * h))) / (12 * h)
    assert found == pytest.approx(expected, rel=1e-5)  # the rounding of such differences


# ----------------------------------------------------------------------------------------------------------------------
# One layer, in every order of differentiation, against two reverse passes.

DTYPES = pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-9), pytest.param(torch.float32, 1e-3, marks=needs_onednn)],
    ids=["f64", "f32"],
)
"""In float32 the products would be oneDNN's, where they may."""


def a_layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 6, 6, 4, generator=g, dtype=torch.float64).to(dtype)
    kernel = torch.randn(2, 3, 3, 4, 5, generator=g, dtype=torch.float64).to(dtype)
    scale, shift = (torch.rand(2, 5, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, kernel, lambda x, kernel: models._layer(x, kernel, scale, shift, 1).sin().sum()


def mixed_product(dtype: torch.dtype, v: Tensor) -> Tensor:
    """(d2f / dkernel dx) v by two reverse passes."""
    x, kernel, f = a_layer(dtype)
    x.requires_grad_(), kernel.requires_grad_()
    (gx,) = torch.autograd.grad(f(x, kernel), x, create_graph=True)
    return torch.autograd.grad(gx, kernel, v)[0]


@DTYPES
def test_forward_mode_over_reverse_mode(calls: list[int], dtype: torch.dtype, rtol: float) -> None:
    x, kernel, f = a_layer(dtype)
    x.requires_grad_(), kernel.requires_grad_()
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(f(forward_ad.make_dual(x, v), kernel), kernel)
        found = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(found, mixed_product(dtype, v), rtol=rtol, atol=rtol)


@DTYPES
def test_reverse_mode_over_forward_mode_of_what_is_no_leaf(calls: list[int], dtype: torch.dtype, rtol: float) -> None:
    """x has a tangent, and needs no gradient."""
    x, kernel, f = a_layer(dtype)
    kernel.requires_grad_()
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v), kernel)).tangent
        (found,) = torch.autograd.grad(slope, kernel)
    torch.testing.assert_close(found, mixed_product(dtype, v), rtol=rtol, atol=rtol)


@DTYPES
def test_several_first_derivatives_at_once_and_their_derivative(
    calls: list[int], dtype: torch.dtype, rtol: float
) -> None:
    x, kernel, _ = a_layer(dtype)
    x.requires_grad_(), kernel.requires_grad_()
    g = torch.Generator().manual_seed(6)
    z = models._layer(x, kernel, torch.ones(2, 5, dtype=dtype), torch.zeros(2, 5, dtype=dtype), 1)
    w = torch.randn(3, *z.shape, generator=g, dtype=torch.float64).to(dtype)

    def one(w: Tensor) -> Tensor:
        return torch.autograd.grad(z, kernel, w, create_graph=True)[0]

    found = torch.autograd.grad(torch.func.vmap(one)(w).sin().sum(), x, retain_graph=True)[0]
    expected = torch.autograd.grad(torch.stack([one(row) for row in w]).sin().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=10 * rtol)


def test_autocast() -> None:
    """Less precise, and no error."""
    torch.manual_seed(0)
    net = ConvNet(3, channels=64, in_size=28)
    part = {"x": torch.rand(2, 15, 1, 28, 28), "y": torch.arange(3).repeat(2, 5)}
    with torch.autocast("cpu", torch.bfloat16):
        found = bilevel.hypergradient(
            few_shot_problem(net, cross_entropy, 2.0),
            {name: p.detach() for name, p in net.named_parameters()},
            {"support": part, "query": part},
            solver=GradientDescent(step_size=0.01, max_steps=2),
            linsys=CG(max_steps=2, rtol=0.0),
            curvature=GaussNewton(),
            batched=True,
        )
    assert found.ok.all()
