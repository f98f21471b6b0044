"""Hessian products in every way, and what happens where an operator lacks a derivative."""

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel
from bilevel.curvature import (
    FiniteDifference,
    ForwardOverReverse,
    GaussNewton,
    Hessian,
    HessianProduct,
    ReverseOverReverse,
)
from bilevel.entry import prepare
from bilevel.linsys import CG, Exact, Jacobi
from bilevel.solvers import NewtonCG
from bilevel.trees import flatten
from tests.cases import PROBLEMS, Case

PRODUCTS: list[tuple[HessianProduct, float]] = [
    (ReverseOverReverse(), 1e-9),
    (ForwardOverReverse(), 1e-9),
    (FiniteDifference(), 1e-6),
]


def exact(case: Case) -> Tensor:
    leaves, spec = flatten(case.theta)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outer = case.outer(bilevel.trees.unflatten(spec, leaves), case.data)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(outer, leaves)])


def vector(tree: Any) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1) for leaf in flatten(tree)[0]])


@pytest.mark.parametrize(("product", "rtol"), PRODUCTS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("linsys", [CG(max_steps=60, rtol=1e-12), Exact()], ids=["cg", "exact"])
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_every_product_gives_the_exact_gradient(case: Case, linsys: Any, product: HessianProduct, rtol: float) -> None:
    curvature = Hessian(product=product)
    solver = NewtonCG(max_steps=40, cg_steps=30, tol=1e-10, curvature=curvature)
    found = bilevel.hypergradient(
        case.problem, case.theta, case.data, solver=solver, linsys=linsys, curvature=curvature
    )
    torch.testing.assert_close(vector(found.unwrap()), exact(case), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("product", "rtol"), PRODUCTS, ids=lambda x: type(x).__name__)
def test_batches_and_leaves_that_do_not_enter(product: HessianProduct, rtol: float) -> None:
    def inner(phi: Tensor, theta: Any, data: Tensor) -> Tensor:
        return (phi.exp() * theta["a"].exp()).sum() - phi @ data

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: (phi**2).sum() * (1 + theta["b"]), lambda theta, data: 0 * data
    )
    theta = {"a": torch.tensor([0.3, -0.2], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}
    data = torch.tensor([[1.0, 2.0], [0.5, 3.0], [torch.nan, 1.0]], dtype=torch.float64)
    found = bilevel.hypergradient(
        problem,
        theta,
        data,
        solver=NewtonCG(max_steps=30, cg_steps=5, tol=1e-12),
        linsys=CG(max_steps=5, rtol=1e-12),
        curvature=Hessian(product=product),
        batched=True,
        reduction="none",
    )
    phi = torch.log(data) - theta["a"]  # L = sum (log d - a)^2 (1 + b)
    assert found.ok.tolist() == [True, True, False]
    torch.testing.assert_close(found.grad["a"][:2], (-2 * phi * (1 + theta["b"]))[:2], rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.grad["b"][:2], (phi**2).sum(-1)[:2], rtol=rtol, atol=rtol)
    assert found.grad["a"][2].isnan().all()


class Attention(nn.Module):
    """A small transformer block with PyTorch's fused attention, which has a first derivative only on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.mlp, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head((x + torch.tanh(self.mlp(x))).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def few_shot(module: nn.Module, dtype: torch.dtype) -> tuple[bilevel.ProximalProblem, Any, Any]:
    module.to(dtype)
    generator = torch.Generator().manual_seed(1)

    def part() -> tuple[Tensor, Tensor]:
        x = torch.randn(6, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(0, 3, (6,), generator=generator)

    def loss(which: int) -> Any:
        return lambda phi, data: nn.functional.cross_entropy(
            functional_call(module, phi, (data[which][0],)), data[which][1]
        )

    theta = {name: p.detach() for name, p in module.named_parameters()}
    return bilevel.ProximalProblem.from_losses(loss(0), loss(1), 0.5), theta, (part(), part())


def gradient(module: nn.Module, dtype: torch.dtype, product: HessianProduct) -> Tensor:
    problem, theta, data = few_shot(module, dtype)
    curvature = Hessian(product=product)
    found = bilevel.hypergradient(
        problem,
        theta,
        data,
        solver=NewtonCG(max_steps=20, cg_steps=40, tol=1e-9 if dtype == torch.float64 else 1e-5, curvature=curvature),
        linsys=CG(max_steps=80, rtol=1e-10 if dtype == torch.float64 else 1e-4),
        curvature=curvature,
    )
    return vector(found.unwrap())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 2e-2)], ids=["float64", "float32"])
@pytest.mark.parametrize("product", [product for product, _ in PRODUCTS], ids=lambda x: type(x).__name__)
def test_transformer_block_falls_back_and_says_so(
    product: HessianProduct, dtype: torch.dtype, rtol: float, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module = Attention()
    with sdpa_kernel(SDPBackend.MATH):  # composed of operators that have all derivatives
        expected = gradient(module, torch.float64, ReverseOverReverse())
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        found = gradient(module, dtype, product)
    assert float((found - expected.to(dtype)).norm() / expected.norm()) < rtol
    if not isinstance(product, FiniteDifference):
        words = caplog.text
        assert (
            "going on with FiniteDifference" in words and "scaled_dot_product" in words and "SDPBackend.MATH" in words
        )


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 2e-2)], ids=["float64", "float32"])
def test_gauss_newton_of_a_transformer_block(dtype: torch.dtype, rtol: float, caplog: pytest.LogCaptureFixture) -> None:
    """Fused attention has neither a forward mode nor a second reverse pass; several right-hand sides at once, too."""
    torch.manual_seed(0)
    module = Attention()
    _, theta, data = few_shot(module, dtype)

    def predict(phi: Any, data: Any) -> Tensor:
        return functional_call(module, phi, (data[0][0],))

    def found(theta: Any, data: Any, linsys: Any) -> bilevel.Hypergradient:
        problem = bilevel.ProximalProblem.from_model(
            predict,
            lambda z, data: nn.functional.cross_entropy(z, data[0][1]),
            lambda phi, data: nn.functional.cross_entropy(functional_call(module, phi, (data[1][0],)), data[1][1]),
            0.5,
        )
        return bilevel.implicit_gradient(problem, theta, theta, data, linsys=linsys, curvature=GaussNewton())

    cg, jacobi = (
        CG(max_steps=60, rtol=rtol / 100),
        CG(max_steps=60, rtol=rtol / 100, preconditioner=Jacobi(num_probes=3)),
    )
    with sdpa_kernel(SDPBackend.MATH):
        wide = {name: leaf.double() for name, leaf in theta.items()}
        data64 = tuple((x.double(), y) for x, y in data)
        expected = vector(found(wide, data64, cg).unwrap())
    for linsys in (cg, jacobi):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="bilevel"):
            result = found(theta, data, linsys)
        assert float((vector(result.unwrap()) - expected.to(dtype)).norm() / expected.norm()) < rtol
        assert result.error_bound is None  # differences are not exact
        told = [words for words in caplog.messages if "GaussNewton" in words]
        assert len(told) == 1 and "going on with FiniteDifference" in told[0] and "SDPBackend.MATH" in told[0]


def test_the_log_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    module = Attention()
    problem, theta, data = few_shot(module, torch.float64)
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        for _ in range(2):
            bilevel.hypergradient(
                problem, theta, data, solver=NewtonCG(max_steps=4, cg_steps=3), linsys=CG(max_steps=5)
            )
    assert len(caplog.messages) == len(set(caplog.messages)) == 2


@pytest.mark.parametrize("product", [product for product, _ in PRODUCTS], ids=lambda x: type(x).__name__)
def test_lstm(product: HessianProduct) -> None:
    torch.manual_seed(0)
    module = Recurrent()
    expected = gradient(module, torch.float64, ReverseOverReverse())
    assert float((gradient(module, torch.float64, product) - expected).norm() / expected.norm()) < 1e-6
    found = gradient(module, torch.float32, product)  # forward mode is missing in float32
    assert float((found.double() - expected).norm() / expected.norm()) < 2e-2


def test_an_error_of_the_users_own_is_not_taken_for_a_missing_derivative() -> None:
    calls = []

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("the disk is full")
        return ((phi - theta) ** 2).sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: 0 * theta
    )
    with pytest.raises(RuntimeError, match="the disk is full"):
        bilevel.hypergradient(
            problem,
            torch.ones(2),
            solver=NewtonCG(max_steps=3),
            linsys=CG(max_steps=3),
            curvature=Hessian(product=FiniteDifference()),
        )


UNITS = torch.tensor([[1e-8], [1e-6], [1e-4], [1.0], [1e4]], dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-5), (torch.float32, 2e-2)])
def test_the_step_of_differences_knows_no_units(
    dtype: torch.dtype, rtol: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The same curved problem with phi in five units, against its Hessian by hand."""
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=dtype)

    def inner(phi: Tensor, theta: Tensor, unit: Tensor) -> Tensor:
        psi = phi / unit
        return psi.cosh().sum() + (psi.sum() - 1).square() / 2 + (psi * theta.sin()).sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, unit: (phi / unit * weights).sum(), lambda theta, unit: torch.zeros_like(theta)
    )
    theta = torch.tensor([0.3, -0.4, 1.2], dtype=dtype)
    psi = torch.tensor([0.2, 0.4, -0.3], dtype=dtype)  # near the solution
    hessian = psi.cosh().diag() + 1
    expected = -theta.cos() * torch.linalg.solve(hessian, weights)
    units = UNITS.to(dtype)
    with caplog.at_level(logging.WARNING):
        found = bilevel.implicit_gradient(
            problem,
            psi * units,
            theta,
            units,
            linsys=Exact(),
            curvature=Hessian(product=FiniteDifference()),
            batched=True,
            reduction="none",
        )
    torch.testing.assert_close(found.grad, expected.expand(5, 3), rtol=rtol, atol=0)
    assert not caplog.messages


def test_a_step_that_is_asked_for_is_kept() -> None:
    """A cubic along one direction: the central difference is off by its step squared, exactly."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (phi**4 / 4 + phi**2 / 2 - phi * theta).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    phi = torch.tensor([1.0], dtype=torch.float64)
    found = bilevel.implicit_gradient(
        problem, phi, 2 * phi, linsys=Exact(), curvature=Hessian(product=FiniteDifference(step=0.05))
    )
    torch.testing.assert_close(found.grad, 1 / (3 * phi**2 + 1 + 0.1**2), rtol=1e-10, atol=0)


@pytest.mark.parametrize("level", [1e3, 1e4])
def test_rounding_does_not_shorten_the_step(level: float) -> None:
    """A large gradient and a mild Hessian in float32: shorter steps show more rounding, not less curvature."""
    torch.manual_seed(0)
    half = torch.randn(20, 20)
    matrix, slope = half @ half.T / 20 + torch.eye(20), level * torch.randn(20)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 10 * (1 - (0.1 * matrix @ phi).cos()).sum() + (slope + theta) @ phi,
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    phi, eps = torch.randn(20), torch.finfo(torch.float32).eps
    found, fixed = (
        bilevel.implicit_gradient(
            problem,
            phi,
            torch.zeros(20),
            linsys=CG(max_steps=3),
            curvature=Hessian(product=FiniteDifference(step=step)),
        ).grad
        for step in (None, eps ** (1 / 3))
    )
    torch.testing.assert_close(found, fixed, rtol=0, atol=0)


def test_the_step_suits_all_directions_that_are_asked_for_at_once() -> None:
    """G curves sharply along the second axis only; the first product of Exact is along the first."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            phi.square().sum() + 1e-6 * (3e4 * (phi[1] - theta[1])).cosh() + 0.1 * (phi * theta).sum()
        ),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: theta.clone(),
    )
    zero = torch.zeros(2, dtype=torch.float64)
    found = bilevel.implicit_gradient(
        problem, zero, zero, linsys=Exact(), curvature=Hessian(product=FiniteDifference())
    )
    second = 1e-6 * 3e4**2  # of cosh at 0
    expected = torch.tensor([-0.1 / 2, (second - 0.1) / (2 + second)], dtype=torch.float64)
    torch.testing.assert_close(found.grad, expected, rtol=1e-6, atol=0)


def test_the_first_product_costs_two_gradients_more() -> None:
    calls = []

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        calls.append(1)
        return (phi**2 / 2 - phi * theta).sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: torch.zeros_like(theta)
    )
    one = torch.ones(2, dtype=torch.float64)
    counts = []
    for step in (None, 1e-5):
        calls.clear()
        curvature = Hessian(product=FiniteDifference(step=step))
        bilevel.implicit_gradient(problem, one, one, linsys=CG(max_steps=1), curvature=curvature)
        counts.append(len(calls))
    assert counts[0] == counts[1] + 2


def test_differences_that_would_leave_the_domain_of_the_gradient() -> None:
    """sqrt(phi) has no value below 0, and phi is 2.5e-7: the first two steps are longer than that."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (theta * phi - phi.sqrt()).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.ones_like(theta),
    )
    theta = torch.tensor([1e3], dtype=torch.float64)
    found = bilevel.implicit_gradient(
        problem, 1 / (4 * theta**2), theta, linsys=Exact(), curvature=Hessian(product=FiniteDifference())
    )
    torch.testing.assert_close(found.grad, -1 / (2 * theta**3), rtol=1e-5, atol=0)


def test_a_hessian_of_zero_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (phi * theta).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    one = torch.ones(2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        found = bilevel.implicit_gradient(
            problem, one, one, linsys=Exact(), curvature=Hessian(product=FiniteDifference())
        )
    assert not found.ok and not caplog.messages


def test_differences_of_a_kink_say_that_they_know_nothing(caplog: pytest.LogCaptureFixture) -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: phi.abs().sum() + (phi * theta).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    zero = torch.zeros(2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bilevel.implicit_gradient(
                problem, zero, zero, linsys=Exact(), curvature=Hessian(product=FiniteDifference())
            )
    (message,) = caplog.messages  # once for each problem
    assert "differences of two steps differ by 88 %" in message


def test_no_rigorous_bound_with_differences() -> None:
    case = PROBLEMS[0]
    case.problem.constants = bilevel.Constants(mu=0.1, rho=1.0, L=50.0, C=10.0)
    try:
        bounds = [
            bilevel.implicit_gradient(
                case.problem,
                case.phi_star(case.theta, case.data),
                case.theta,
                case.data,
                linsys=Exact(),
                curvature=Hessian(product=product),
            ).error_bound
            for product, _ in PRODUCTS
        ]
    finally:
        case.problem.constants = None
    assert bounds[0] is not None and bounds[1] is not None and bounds[2] is None


def test_wrong_options() -> None:
    with pytest.raises(TypeError, match="product: expected ReverseOverReverse"):
        Hessian(product="forward")  # type: ignore[arg-type]
    for step in (-1.0, 0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"step: expected a finite number > 0, got {step}"):
            FiniteDifference(step=step)
    for wrong in (True, "a"):
        with pytest.raises(TypeError, match=f"step: expected a number, got {type(wrong).__name__} {wrong!r}"):
            FiniteDifference(step=wrong)  # type: ignore[arg-type]


def linear_model() -> tuple[bilevel.ProximalProblem, Tensor, Tensor, Tensor]:
    """|X phi - y|^2 / 2 + |phi - theta|^2 / 2: the problem, X, y, and (X^T X + I)^{-1}."""
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(7, 4, generator=g, dtype=torch.float64), torch.randn(7, generator=g, dtype=torch.float64)
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: X @ phi, lambda z, data: 0.5 * (z - y).square().sum(), lambda phi, data: phi.sin().sum(), 1.0
    )
    return problem, X, y, torch.linalg.inv(X.T @ X + torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("way", ["solve", "argmin", "vmap of argmin", "in dual numbers"])
def test_gauss_newton_steps_wherever_a_solver_runs(way: str) -> None:
    """Within an autograd.Function, as in argmin, PyTorch switches forward mode off, and a product would be zero without a word."""
    problem, X, y, inverse = linear_model()
    solver = NewtonCG(max_steps=5, cg_steps=20, tol=1e-10, curvature=GaussNewton())
    theta = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def solution(theta: Tensor) -> Tensor:
        return bilevel.argmin(problem, theta, solver=solver, linsys=CG(max_steps=9))

    if way == "solve":
        found = bilevel.solve(problem, theta, solver=solver).unwrap()
    elif way == "argmin":
        leaf = theta.clone().requires_grad_()
        found = solution(leaf)
        (grad,) = torch.autograd.grad(found.sin().sum(), leaf)
        torch.testing.assert_close(grad, inverse @ found.detach().cos(), rtol=1e-9, atol=1e-12)
    elif way == "vmap of argmin":
        found = torch.func.vmap(solution)(theta.expand(3, 4))[1]
    else:
        with torch.autograd.forward_ad.dual_level():
            found = bilevel.solve(problem, theta, solver=solver).unwrap()
    torch.testing.assert_close(found.detach(), inverse @ (X.T @ y + theta), rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_a_model_that_does_not_depend_on_its_variables() -> None:
    """No tangent is a product of zero, and what is left is the regulariser."""
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: 2 * data, lambda z, data: z.square().sum(), lambda phi, data: phi.square().sum(), 2.0
    )
    theta = torch.linspace(1, 2, 3, dtype=torch.float64)
    found = bilevel.implicit_gradient(problem, theta, theta, theta, linsys=CG(max_steps=5), curvature=GaussNewton())
    torch.testing.assert_close(found.unwrap(), 2 * theta)


class Tanh(torch.autograd.Function):
    """As users write one: no forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y**2)


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_gauss_newton_of_a_function_without_forward_mode(batched: bool, caplog: pytest.LogCaptureFixture) -> None:
    def gradient(tanh: Any) -> Tensor:
        problem = bilevel.ProximalProblem.from_model(
            lambda phi, data: tanh(data @ phi),
            lambda z, data: (z - 0.3).square().sum(),
            lambda phi, data: phi.sin().sum(),
            1.0,
        )
        data = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 4, 3)
        return bilevel.hypergradient(
            problem,
            torch.ones(3, dtype=torch.float64),
            data if batched else data[0],
            solver=NewtonCG(max_steps=2, curvature=GaussNewton()),
            linsys=CG(max_steps=5),
            curvature=GaussNewton(),
            batched=batched,
        ).unwrap()

    torch.testing.assert_close(gradient(Tanh.apply), gradient(torch.tanh), rtol=1e-9, atol=1e-12)
    assert sum("GaussNewton" in record.message for record in caplog.records) <= 1


def test_gauss_newton_of_a_loss_that_ignores_the_outputs() -> None:
    """A task whose points are all masked. Before, an error of autograd's; what is left is the penalty, with H = 2."""
    problem = bilevel.BilevelProblem.from_model(
        lambda phi, theta, data: phi * theta,
        lambda out, theta, data: torch.ones((), dtype=torch.float64),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros(2, dtype=torch.float64),
        penalty=lambda phi, theta, data: (phi - theta).square().sum(),
    )
    theta = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = bilevel.hypergradient(
        problem, theta, solver=NewtonCG(max_steps=5, tol=1e-9), linsys=CG(max_steps=5), curvature=GaussNewton()
    )
    torch.testing.assert_close(found.unwrap(), torch.ones(2, dtype=torch.float64))


def test_forward_over_reverse_keeps_no_graph() -> None:
    """Of the tensors that a linearisation saves for backward passes, none is left once the gradient is there."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 1, dtype=torch.float64)
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: (torch.func.functional_call(layers, phi, (x,)) - y).square().mean(),
        lambda phi, data: sum(leaf.square().sum() for leaf in phi.values()),  # type: ignore[arg-type,return-value]
        1.0,
    )
    call = prepare(problem, {name: leaf.detach() for name, leaf in layers.named_parameters()}, None, None)

    def kept(product: HessianProduct) -> int:
        alive: list[Any] = []

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor
                alive.append(weakref.ref(self))

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            local = call.objective().linearise(call.phi, Hessian(product=product), 0.0, with_theta=True)
        count = sum(ref() is not None for ref in alive)
        local.matvec(torch.ones_like(call.phi))
        return count

    assert kept(ReverseOverReverse()) > 0
    assert kept(ForwardOverReverse()) == kept(FiniteDifference()) == 0


@pytest.mark.parametrize("curvature", [Hessian(product=FiniteDifference()), Hessian(product=ForwardOverReverse())])
def test_a_linearisation_ends_with_its_last_reference(curvature: Hessian) -> None:
    """Without the garbage collector, which lets memory grow until it comes."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: ((phi - theta) ** 4).sum() + phi.square().sum(), lambda phi, theta, data: phi.sum()
    )
    call = prepare(problem, torch.ones(3), None, torch.zeros(3))
    gc.disable()
    try:
        local = call.objective().linearise(call.phi, curvature, 0.0, with_theta=True)
        local.matvec(torch.ones(3))
        local.cross(torch.ones(3))
        ended = weakref.ref(local)
        del local
        assert ended() is None
    finally:
        gc.enable()
