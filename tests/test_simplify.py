"""A program that was simplified computes what it computed before: the oracle is the function itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.recorded.simplify import FORMULAS, simplify

F32, F64 = torch.float32, torch.float64
X = torch.tensor([[1.0, -2.0, 0.0], [float("nan"), float("inf"), -0.5]], dtype=F64)


def simplified(function: Callable[..., object], *arguments: Tensor) -> fx.GraphModule:
    module = make_fx(function)(*arguments)
    simplify(module.graph)
    module.recompile()
    return module


def operators(module: fx.GraphModule) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


GONE: dict[str, Callable[[Tensor], Tensor]] = {
    "times one": lambda x: x * torch.ones_like(x),
    "one times": lambda x: torch.ones_like(x) * x,
    "times one, broadcast": lambda x: x * torch.ones_like(x[0]).expand(2, 3),
    "plus zero": lambda x: x + torch.zeros_like(x),
    "zero plus": lambda x: torch.zeros_like(x) + x,
    "power of one": lambda x: x.pow(1),
    "times the number one": lambda x: torch.ops.aten.mul.Scalar(x, 1.0),
    "times the power of zero": lambda x: x * x.pow(0.0),
    "transposed twice": lambda x: x.t().t(),
    "transposed twice, with other names of the axes": lambda x: torch.ops.aten.transpose.int(x.transpose(0, 1), 1, 0),
    "detached": lambda x: x.detach(),
    "in the shape that it has": lambda x: x.reshape(2, 3),
    "expanded to the shape that it has": lambda x: x.expand(2, 3),
    "viewed as it is": lambda x: torch.ops.aten._unsafe_view.default(x, [2, -1]),
}


@pytest.mark.parametrize("function", GONE.values(), ids=GONE)
def test_what_changes_nothing_is_left_out(function: Callable[[Tensor], Tensor]) -> None:
    module = simplified(function, X)
    torch.testing.assert_close(module(X), function(X), rtol=0, atol=0, equal_nan=True)
    assert not operators(module)


KEPT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "times zero, which keeps NaN": (lambda x: x * torch.zeros_like(x), (X,)),
    "a product that has another shape": (lambda x: x[0] * torch.ones_like(x), (X,)),
    "a sum that has another shape": (lambda x: x[0] + torch.zeros_like(x), (X,)),
    "a product that has another dtype": (lambda x: x * torch.ones_like(x, dtype=F64), (X.float(),)),
    "a sum that has another dtype": (lambda x: x + torch.zeros_like(x, dtype=F64), (X.float(),)),
    "a power that has another dtype": (lambda n: torch.ops.aten.mul.Scalar(n, 1.0), (torch.arange(3),)),
    "a sum with a factor": (lambda x: torch.add(torch.ones_like(x), x, alpha=3), (X,)),
    "zero plus, with a factor": (lambda x: torch.add(torch.zeros_like(x), x, alpha=3), (X,)),
    "a sum of a vector": (lambda x: x.sum(), (X[0],)),
    "a product whose factor repeats one row": (lambda x: x[:1].expand(4, 3) * torch.ones(4, 3, dtype=F64), (X,)),
    "a product that is stored in rows": (lambda x: x.t() * torch.ones_like(x.t().contiguous()), (X,)),
    "a power that is stored without gaps": (lambda x: x[:, :2].pow(1), (X,)),
    "in another shape": (lambda x: x.reshape(3, 2), (X,)),
    "expanded": (lambda x: x[:1].expand(4, 3), (X,)),
    "transposed": (lambda x: x.mT.reshape(2, 3), (X,)),
    "transposed twice, and not back": (lambda x: x.transpose(0, 1).transpose(1, 2), (torch.rand(2, 3, 4),)),
    "not one": (lambda x: x * (2 * torch.ones_like(x)), (X,)),
    "one plus": (lambda x: x + torch.ones_like(x), (X,)),
    "a power of two": (lambda x: x.pow(2), (X,)),
}


@pytest.mark.parametrize(("function", "arguments"), KEPT.values(), ids=KEPT)
def test_what_changes_something_stays(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> None:
    found, expected = simplified(function, *arguments)(*arguments), function(*arguments)
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_minus_one() -> None:
    module = simplified(lambda x: x * -torch.ones_like(x), X)
    assert operators(module) == ["neg.default"]
    torch.testing.assert_close(module(X), -X, rtol=0, atol=0, equal_nan=True)


def test_the_same_is_computed_once() -> None:
    module = simplified(
        lambda x: x.exp() * x.sin() + x.exp() + x.sum(0) + x.sum(1)[:1], X.nan_to_num(0, 0, 0).repeat(1, 1)
    )
    assert operators(module).count("exp.default") == 1 and operators(module).count("sum.dim_IntList") == 2


def test_ones_like_something_do_not_depend_on_it() -> None:
    """What every backward pass begins with is made once for all points, not at each (benchmarks/NOTES.md)."""
    module = simplified(lambda x: (x * (torch.ones_like(x.sum()).expand(2, 3) / 6)).to(F64), X.float())
    (ones,) = (node for node in module.graph.nodes if "full" in str(node.target))
    assert not ones.all_input_nodes and not any("sum" in operator for operator in operators(module))
    found = module(X.float())
    assert found.dtype == F64
    torch.testing.assert_close(found, (X.float() * (torch.ones(()) / 6)).double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "like",
    [
        lambda x: x.int(),
        lambda x: x.mT,
        lambda x: x[:, ::2],
        lambda x: x > 0,
        lambda x: x[:, None, :, None].to(memory_format=torch.channels_last),
    ],
)
def test_ones_have_the_type_and_the_layout_of_what_they_are_like(like: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(like(x)), torch.zeros_like(like(x))

    for found, expected in zip(simplified(function, X)(X), function(X), strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype and found.stride() == expected.stride()


def test_a_captured_tensor_of_which_nothing_is_known() -> None:
    """Old versions of PyTorch record it without its shape."""
    captured = torch.rand(6, dtype=F64)
    module = make_fx(lambda x: (x + captured.view(2, 3)).reshape(2, 3))(X)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.meta.clear()
    simplify(module.graph)
    module.recompile()
    assert operators(module).count("view.default") == 1
    torch.testing.assert_close(module(X), X + captured.view(2, 3), equal_nan=True)


def test_parts_of_the_same_are_the_same() -> None:
    """A network of a flat vector of parameters takes it apart once for every pass over it."""

    def function(x: Tensor) -> Tensor:
        return x.split([1, 2], 1)[1].exp() + x.split([1, 2], 1)[1].exp()

    module = simplified(function, X)
    found = operators(module)
    assert found.count("exp.default") == 1 and len(found) == 4  # with the part and the sum
    torch.testing.assert_close(module(X), function(X), rtol=0, atol=0, equal_nan=True)


def test_numbers_that_are_equal_and_not_the_same_are_told_apart() -> None:
    def function(n: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.mul.Scalar(n, 3), torch.ops.aten.mul.Scalar(n, 3.0)

    n = torch.arange(3)
    found = simplified(function, n)(n)
    assert [part.dtype for part in found] == [part.dtype for part in function(n)]


def test_zeros_of_both_signs_are_told_apart() -> None:
    module = simplified(lambda x: torch.copysign(x, 0.0) - torch.copysign(x, -0.0), X[0])
    assert module(X[0]).tolist() == (2 * X[0].abs()).tolist()


def test_chance_is_asked_anew() -> None:
    module = simplified(lambda x: torch.rand_like(x) - torch.rand_like(x), X)
    assert operators(module).count("rand_like.default") == 2


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_derivative_of_the_log_softmax(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g, v = (torch.randn(4, 6, dtype=dtype) for _ in range(3))

    def derivatives(x: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad((torch.log_softmax(x, dim) * g).sin().sum(), x, create_graph=True)
        return first, torch.autograd.grad(first, x, v)[0]

    module = make_fx(derivatives, decomposition_table=FORMULAS)(x, g, v)
    simplify(module.graph)
    module.recompile()
    assert not any("softmax_backward" in operator for operator in operators(module))
    other = torch.randn_like(x)
    for found, expected in zip(module(other, g, v), derivatives(other, g, v), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps
        )


def test_a_hessian_product_has_no_work_of_branches_that_are_zero() -> None:
    """Cross-entropy and a square: two products with the data, and one operator for each step of the formula."""
    torch.manual_seed(0)
    data, labels = torch.randn(9, 4, dtype=F64), torch.randint(0, 3, (9,))

    def product(phi: Tensor, v: Tensor) -> Tensor:
        phi = phi.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(data, phi), labels) + phi.square().sum()
        (grad,) = torch.autograd.grad(loss, phi, create_graph=True)
        return torch.autograd.grad(grad, phi, v)[0]

    phi, v = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    module = make_fx(product, decomposition_table=FORMULAS)(phi, v)
    before = len(operators(module))
    simplify(module.graph)
    module.recompile()
    assert len(operators(module)) <= 0.6 * before and "zeros_like.default" not in operators(module)
    phi = torch.randn_like(phi)
    torch.testing.assert_close(module(phi, v), product(phi, v), rtol=1e-12, atol=1e-14)


def test_what_is_simplified_twice_is_computed_once() -> None:
    """The negative that stands for a product with minus one is an operator of its own, which others may have a use for."""
    module = simplified(lambda x: (x * -torch.ones_like(x)).exp() + (x * -torch.ones_like(x)).sin(), X[0])
    assert operators(module).count("neg.default") == 1
