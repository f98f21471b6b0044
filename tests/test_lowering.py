"""The last steps to a recorded program change its form, and no number but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import bilevel
from bilevel.linsys import CG
from bilevel.recorded.lowering import _FUNCTIONS, direct, leave_out_transposed_copies, put_skinny_factors_in_front
from bilevel.recorded.recording import recorded
from bilevel.solvers import GradientDescent, NewtonCG

F32, F64 = torch.float32, torch.float64


def operators(module: fx.GraphModule) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


M, V, B3 = (
    torch.linspace(0.1, 0.9, 9, dtype=F64).reshape(3, 3),
    torch.linspace(-1, 1, 3, dtype=F64),
    torch.rand(2, 3, 3, dtype=F64),
)
aten = torch.ops.aten
CALLS: dict[object, list[tuple[object, ...]]] = {  # what each operator is called with; the others: one matrix
    aten.addcmul.default: [(M, M, M), (M, V, M)],
    aten.addmm.default: [(M, M, M), (V, M, M)],
    aten.addmv.default: [(V, M, V)],
    aten.baddbmm.default: [(B3, B3, B3)],
    aten.bmm.default: [(B3, B3)],
    aten.bitwise_and.Scalar: [(torch.tensor([1, 2, 3]), 2)],
    aten.bitwise_and.Tensor: [(M > 0.5, M < 0.8)],
    aten.bitwise_not.default: [(M > 0.5,)],
    aten.bitwise_or.Scalar: [(torch.tensor([1, 2, 3]), 2)],
    aten.bitwise_or.Tensor: [(M > 0.5, M < 0.2)],
    aten.cat.default: [([M, M],), ([M, M], 1)],
    aten.dot.default: [(V, V)],
    aten.mean.dim: [(M, [0]), (M, [-1], True)],
    aten.mm.default: [(M, M)],
    aten.mv.default: [(M, V)],
    aten.permute.default: [(B3, [2, 0, 1])],
    aten.pow.Tensor_Scalar: [(M, 2), (M, 0.5)],
    aten.pow.Tensor_Tensor: [(M, M)],
    aten.reshape.default: [(M, [9]), (M.mT, [-1])],
    aten.split_with_sizes.default: [(M, [1, 2]), (B3, [1, 0, 2], 1)],
    aten.squeeze.dim: [(M[:1], 0)],
    aten.sum.default: [(M,), (M > 0.5,)],
    aten.sum.dim_IntList: [(M, [0]), (M, [-1], True), (M, [])],
    aten.transpose.int: [(B3, 0, -1)],
    aten.unsqueeze.default: [(M, -1)],
    aten.vdot.default: [(V, V)],
    aten.where.self: [(M > 0.5, M, V)],
}
PAIRS = ("add", "div", "eq", "ge", "gt", "le", "lt", "mul", "ne", "sub")


@pytest.mark.parametrize("operator", _FUNCTIONS, ids=str)
def test_the_functions_are_the_operators(operator: torch._ops.OpOverload) -> None:
    """Bit by bit, in dtype and layout: every entry of the table, with every kind of argument that it has."""
    calls = CALLS.get(operator)
    if calls is None and operator.overloadpacket.__name__ in PAIRS:
        numbers, whole = [2.0, -0.0, 3], torch.tensor([1, 2, 3])
        others = [M, V, M.float(), whole] if operator._overloadname == "Tensor" else numbers
        calls = [(own, other) for own in (M, M.float(), whole) for other in others]
    for arguments in calls or [(M,), (M.mT,), (M.float(),)]:
        all_found, all_expected = _FUNCTIONS[operator](*arguments), operator(*arguments)
        parts = (
            [(all_found, all_expected)] if isinstance(all_found, Tensor) else zip(all_found, all_expected, strict=True)
        )
        for found, expected in parts:
            assert torch.equal(found, expected) and found.dtype == expected.dtype
            assert found.stride() == expected.stride()


def test_keywords_stay() -> None:
    """alpha, beta, value and dtype are given by name."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.add(x, x, alpha=-0.5),
            torch.sub(x, x.mT, alpha=3),
            torch.addcmul(x, x, x, value=-1),
            torch.addmm(x, x, x, alpha=0.5, beta=2),
            torch.sum(x, 0, dtype=F32),
        )

    module = make_fx(function)(M)
    direct(module.graph)
    module.recompile()
    for found, expected in zip(module(M.mT), function(M.mT), strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert "aten" not in module.code


# ----------------------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("right", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "columns", "swapped"),
    [
        ((200, 120), 5, True),
        ((200, 120), 10, True),
        ((200, 120), 11, False),  # too many
        ((200, 120), 1, False),  # a matrix and a vector
        ((120, 100), 5, False),  # too small to pay
        ((30, 700), 8, False),  # not so much longer than wide
        ((3, 40, 20), 1, True),
        ((3, 40, 20), 5, True),
        ((3, 40, 20), 11, False),
        ((3, 20, 20), 1, False),
    ],
    ids=str,
)
def test_skinny_factors(shape: Any, columns: int, swapped: bool, left: Any, right: Any) -> None:
    g = torch.Generator().manual_seed(0)
    a = left(torch.randn(shape, generator=g, dtype=F64))
    b = right(torch.randn((*shape[:-2], shape[-1], columns), generator=g, dtype=F64))
    product = torch.mm if len(shape) == 2 else torch.bmm
    module = make_fx(lambda a, b: product(a, b))(a, b)
    put_skinny_factors_in_front(module.graph)
    module.recompile()
    assert ("clone.default" in operators(module)) is swapped
    found, expected = module(a, b), product(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride()
    again = left(a.neg())  # another call, with other numbers
    torch.testing.assert_close(module(again, b), product(again, b), rtol=1e-12, atol=1e-12)


def test_views_of_views_are_left_out() -> None:
    """x @ w.T with few rows in w, and the way back: the transposed factor is there already."""
    x, w = torch.randn(300, 100, dtype=F64), torch.randn(4, 100, dtype=F64)
    module = make_fx(lambda x, w: torch.mm(x, w.t()))(x, w)
    put_skinny_factors_in_front(module.graph)
    assert operators(module).count("t.default") == 2  # of x, and of the result


@pytest.mark.parametrize("right", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("axes", [(1, 2), (-2, -1)], ids=str)
def test_copies_of_transposed_products_are_left_out(axes: tuple[int, int], left: Any, right: Any) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = left(torch.randn(3, 7, 5, generator=g, dtype=F64)), right(torch.randn(3, 5, 4, generator=g, dtype=F64))

    def copied(a: Tensor, b: Tensor) -> Tensor:
        product = torch.bmm(a, b).transpose(*axes)
        return product.clone(memory_format=torch.contiguous_format).reshape(3, -1)

    module = make_fx(copied)(a, b)
    assert "clone.default" in operators(module)
    leave_out_transposed_copies(module.graph)
    module.recompile()
    assert "clone.default" not in operators(module)
    for first in (a, left(a.neg())):
        found, expected = module(first, b), copied(first, b)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: (torch.bmm(a, b).mT.contiguous(), torch.bmm(a, b)),  # the product is wanted as well
        lambda a, b: (2 * (view := torch.bmm(a, b).mT), view.contiguous()),  # and so is the view
        lambda a, b: (torch.bmm(a, b).mT.clone(memory_format=torch.preserve_format),),
        lambda a, b: (torch.add(a, 1).mT.contiguous(),),  # no product
        lambda a, b: (torch.bmm(a, b).transpose(0, 1).contiguous(),),  # other axes
        lambda a, b: (torch.mm(a[0], b[0]).t().contiguous(),),  # one product
    ],
)
def test_other_copies_stay(function: Any) -> None:
    a, b = torch.randn(2, 7, 5, dtype=F64), torch.randn(2, 5, 4, dtype=F64)
    module = recorded(function, a, b)
    assert "clone.default" in operators(module)
    for found, expected in zip(module(a, b), function(a, b), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize(("inputs", "rows", "outputs", "swapped"), [(5, 7, 4, 0), (40, 20, 5, 1)])
def test_the_weights_of_linear_layers_in_batches_are_not_copied(
    inputs: int, rows: int, outputs: int, swapped: int
) -> None:
    """Their gradient is what a batch of networks is trained with."""

    def loss(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias).sin().sum()

    def gradient(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        parts = torch.func.grad(lambda *parts: torch.func.vmap(loss)(*parts, x).sum(), (0, 1))(weight, bias)
        return torch.cat([part.reshape(3, -1) for part in parts], -1)

    shapes = (3, outputs, inputs), (3, outputs), (3, rows, inputs)
    arguments = [torch.randn(shape, dtype=F64) for shape in shapes]
    traced = make_fx(gradient)(*arguments)
    assert operators(traced).count("clone.default") == 1
    module = recorded(gradient, *arguments)
    assert operators(module).count("bmm.default") == 2 and operators(module).count("clone.default") == swapped
    torch.testing.assert_close(module(*arguments), gradient(*arguments))


def test_only_on_a_cpu() -> None:
    x, w = torch.empty(300, 100, device="meta"), torch.empty(100, 4, device="meta")
    assert "clone.default" not in operators(recorded(torch.mm, x, w))
    assert "clone.default" in operators(recorded(torch.mm, torch.rand(300, 100), torch.rand(100, 4)))


@pytest.mark.parametrize("inner", [GradientDescent(step_size=0.5, max_steps=30), NewtonCG(max_steps=8, cg_steps=20)])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_hypergradients_with_such_products(inner: Any, batched: bool) -> None:
    """A multinomial logistic regression with its weights as (features, classes), which puts the few columns last everywhere."""
    g = torch.Generator().manual_seed(1)
    tasks, n, d, classes = (6,) if batched else (), 200, 110, 4
    x, v = (torch.randn(*tasks, n, d, generator=g, dtype=F64) / 4 for _ in range(2))
    y = torch.randint(classes, (*tasks, n), generator=g)
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, data: (
            torch.nn.functional.cross_entropy(data[0] @ w, data[1]) + (theta.exp() * w.square().sum(1)).sum()
        ),
        lambda w, theta, data: torch.nn.functional.cross_entropy(data[2] @ w, data[1]),
        lambda theta, data: theta.new_zeros(d, classes),
    )
    theta = torch.full((d,), -3.0, dtype=F64)
    plain, replayed = (
        bilevel.hypergradient(
            problem, theta, (x, y, v), solver=inner, linsys=CG(max_steps=40, rtol=0.0), batched=batched, compile=c
        )
        for c in (False, True)
    )
    torch.testing.assert_close(replayed.unwrap(), plain.unwrap(), rtol=1e-9, atol=1e-13)
