"""Beside torch.compile and autocast: derivatives are those without them, or there is an error that says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from bilevel.isolation import isolated
from bilevel.linsys import CG, GMRES, Exact, Jacobi, Neumann, Nystrom, NystromPreconditioner, Operator
from bilevel.solvers import Anderson, GradientDescent, Newton, NewtonCG, ScipyMinimize
from bilevel.testing import check_hypergradient

BACKEND = "aot_eager"  # what makes the graph and its derivatives, without the seconds of the code generator
NEWTON, SOLVE = NewtonCG(max_steps=30, tol=1e-12), CG(max_steps=50, rtol=1e-12)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
THETA = torch.tensor([-1.0, 0.5, 0.2, -0.3], dtype=torch.float64)
START = torch.zeros(4, dtype=torch.float64)


def ridge() -> bilevel.BilevelProblem:
    def inner(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        return 0.5 * ((data @ phi - data[:, 0].exp()) ** 2).mean() + 0.5 * (theta.exp() * phi**2).sum()

    return bilevel.BilevelProblem.from_functions(inner, lambda phi, theta, data: phi.square().sum())


def closed_form(theta: Tensor) -> Tensor:
    """phi* by dense algebra."""
    return torch.linalg.inv(X.T @ X / 12 + torch.diag(theta.exp())) @ (X.T @ X[:, 0].exp() / 12)


POINT = closed_form(THETA)


def composed(solution: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a user puts around a solve: something before it and something behind it."""
    return lambda theta: (solution(theta.sin() * 2).cos() * X[0]).sum()


EXACT = composed(closed_form)
OURS = composed(lambda theta: bilevel.argmin(ridge(), theta, X, solver=NEWTON, linsys=SOLVE, init=START))


def by_backward(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(f(theta), theta)[0]

    return gradient


ASKED: dict[str, Callable[[Callable[[Any], Tensor]], Callable[[Any], Tensor]]] = {
    "value": lambda f: f,
    "backward": by_backward,
    "grad": torch.func.grad,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "vmap": lambda f: lambda theta: torch.func.vmap(f)(torch.stack([theta, theta + 0.1])),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_argmin_in_compiled_code(asked: Any) -> None:
    expected = asked(EXACT)(THETA)
    torch.testing.assert_close(torch.compile(asked(OURS), backend=BACKEND)(THETA), expected, rtol=1e-8, atol=1e-10)
    # PyTorch: code that is compiled has neither forward mode nor a second derivative
    if asked not in (ASKED["jacfwd"], ASKED["hessian"]):
        torch.testing.assert_close(asked(torch.compile(OURS, backend=BACKEND))(THETA), expected, rtol=1e-8, atol=1e-10)


def test_the_rest_is_compiled() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method")])
        return graph.forward

    torch.compile(OURS, backend=backend)(THETA)
    names = [str(target) for graph in graphs for target in graph]
    assert any("sin" in name for name in names) and any("cos" in name for name in names)
    assert not any("matmul" in name or "exp" in name for name in names)  # G, which is inside


CALLS: dict[str, Callable[[bilevel.BilevelProblem, Tensor], Tensor]] = {
    "hypergradient": lambda p, t: bilevel.hypergradient(p, t, X, solver=NEWTON, linsys=SOLVE, init=START).grad,
    "implicit_gradient": lambda p, t: bilevel.implicit_gradient(p, POINT.to(t.dtype), t, X, linsys=Exact()).grad,
    "unrolled": lambda p, t: (
        bilevel.unrolled(p, t, X, solver=GradientDescent(step_size=0.3, max_steps=3000), init=START).grad
    ),
    "root": lambda p, t: by_backward(
        lambda theta: (
            bilevel.root(
                lambda phi, theta, data: torch.func.grad(p.inner_objective)(phi, theta, data),
                theta,
                X,
                solver=bilevel.solvers.Newton(max_steps=20, tol=1e-12),
                linsys=Exact(),
                init=START,
            )
            .square()
            .sum()
        )
    )(t),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_other_calls_in_compiled_code(call: Any) -> None:
    expected = torch.func.grad(lambda theta: closed_form(theta).square().sum())(THETA)
    found = torch.compile(lambda theta: 2 * call(ridge(), theta), backend=BACKEND)(THETA)
    torch.testing.assert_close(found, 2 * expected, rtol=1e-8, atol=1e-10)


def test_a_whole_graph_is_refused_by_name() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="argmin"):
        torch.compile(OURS, fullgraph=True, backend=BACKEND)(THETA)


class Network(bilevel.BilevelProblem):
    """The objective of a network that may be compiled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def inner_objective(self, phi: Any, theta: Tensor, data: Tensor) -> Tensor:
        penalty = sum(leaf.square().sum() for leaf in phi.values())
        return (
            functional_call(self.module, phi, (data,)).squeeze(-1) - data[:, 0].exp()
        ).square().mean() + theta.exp() * penalty

    def outer_loss(self, phi: Any, theta: Tensor, data: Tensor) -> Tensor:
        return (functional_call(self.module, phi, (data,)).squeeze(-1) - 1).square().mean()


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def asked_of_network(name: str, module: nn.Module) -> Tensor:
    problem, theta = Network(module), torch.tensor(-1.0, dtype=torch.float64)
    init = {key: leaf.detach() for key, leaf in module.named_parameters()}
    solver = NewtonCG(max_steps=60, cg_steps=30, tol=1e-10)
    if name == "hypergradient":
        return bilevel.hypergradient(problem, theta, X, solver=solver, linsys=SOLVE, init=init).unwrap()
    if name == "recorded":
        return bilevel.hypergradient(problem, theta, X, solver=solver, linsys=SOLVE, init=init, compile=True).unwrap()
    if name == "estimate":
        return bilevel.hypergradient(problem, theta, X, solver=solver, linsys=SOLVE, init=init).error_estimate < 1e-6
    if name == "unrolled":
        return bilevel.unrolled(problem, theta, X, solver=GradientDescent(step_size=0.05, max_steps=5), init=init).grad
    if name == "tasks":
        data = torch.stack([X, X + 0.1])
        init = {key: leaf.expand(2, *leaf.shape) for key, leaf in init.items()}
        return bilevel.hypergradient(
            problem, theta, data, solver=solver, linsys=SOLVE, init=init, batched=True
        ).unwrap()

    def loss(theta: Tensor) -> Tensor:
        phi = bilevel.argmin(problem, theta, X, solver=solver, linsys=SOLVE, init=init)
        return sum(leaf.sin().sum() for leaf in phi.values())  # type: ignore[return-value]

    if name == "second":
        return torch.func.grad(torch.func.grad(loss))(theta)
    return by_backward(loss)(theta)


@pytest.mark.parametrize("name", ["hypergradient", "recorded", "estimate", "unrolled", "tasks", "argmin", "second"])
def test_a_compiled_network_in_the_objective_is_right_or_refused(name: str, network: nn.Module) -> None:
    """Under torch.func PyTorch does not compile, and gives the right derivatives; elsewhere its error gets a remedy."""
    expected = asked_of_network(name, network)
    compiled = torch.compile(network, backend=BACKEND)
    try:
        found = asked_of_network(name, compiled)
    except RuntimeError as error:
        assert "double backward" in str(error) and "module._orig_mod" in error.__notes__[0]
        assert name not in ("tasks", "second", "unrolled")
        found = asked_of_network(name, compiled._orig_mod)  # the remedy
    else:
        assert name in ("tasks", "second", "unrolled")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_what_torch_compiles_for_itself_stays_compiled() -> None:
    """torch.cond makes what its branches close over visible by compiling them: eager, it would lose their derivatives."""
    bends = bilevel.BilevelProblem.from_functions(
        ridge().inner_objective,
        lambda phi, theta, data: torch.cond(data.sum() < 1e9, lambda: phi.square().sum(), lambda: (2 * phi).sum(), ()),
    )
    expected = torch.func.grad(lambda theta: closed_form(theta).square().sum())(THETA)
    for _ in range(3):
        found = bilevel.hypergradient(bends, THETA, X, solver=NEWTON, linsys=SOLVE, init=START)
        torch.testing.assert_close(found.grad, expected, rtol=1e-8, atol=1e-10)
        assert found.error_estimate < 1e-8


def test_a_black_box_may_be_compiled() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda phi, theta: phi - 0.1 * (phi - theta), backend=backend)

    def solve(problem: Any, theta: Tensor, data: None, phi: Tensor) -> Tensor:
        for _ in range(400):
            phi = step(phi, theta)
        return phi

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta).square().sum(), lambda phi, theta, data: phi.square().sum()
    )
    solver = bilevel.solvers.BlackBox(solve, tol=1e-8)
    found = bilevel.hypergradient(problem, THETA, solver=solver, linsys=SOLVE, init=START)
    torch.testing.assert_close(found.unwrap(), 2 * THETA, rtol=1e-8, atol=1e-10)
    assert len(graphs) == 1


def test_a_failure_in_compiled_code_is_described() -> None:
    def bad(theta: Tensor) -> Tensor:
        return bilevel.hypergradient(ridge(), theta * torch.nan, X, solver=NEWTON, linsys=SOLVE, init=START).unwrap()

    with pytest.raises(bilevel.SolverError, match=r"inner solve: NON_FINITE after \d+ steps"):
        torch.compile(bad, backend=BACKEND)(THETA)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6 compiles the few lines around a disabled function anew, up to its limit",
)
def test_many_calls_in_compiled_code_are_compiled_once() -> None:
    problem, solver = ridge(), GradientDescent(step_size=0.3, max_steps=10)

    def all_of_them(theta: Tensor) -> Tensor:
        phi = bilevel.argmin(problem, theta, X, solver=NEWTON, linsys=SOLVE, init=START)
        whole = bilevel.hypergradient(problem, theta, X, solver=NEWTON, linsys=SOLVE, init=START)
        at_point = bilevel.implicit_gradient(problem, POINT, theta, X, linsys=SOLVE)
        path = bilevel.unrolled(problem, theta, X, solver=solver, init=START)
        found = bilevel.solve(problem, theta, X, solver=NEWTON, init=START)
        return phi + whole.grad + at_point.grad + path.grad + found.value

    compiled = torch.compile(all_of_them, backend=BACKEND)
    once = compiled(THETA)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            torch.testing.assert_close(compiled(THETA), once)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_around_a_call_changes_nothing(call: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "X", X.to(dtype))
    monkeypatch.setattr(sys.modules[__name__], "START", START.to(dtype))
    expected = call(ridge(), THETA.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(ridge(), THETA.to(dtype))
        product = X @ X.T
    assert product.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)  # what it does around them
    assert torch.equal(found, expected) and found.dtype == dtype


def test_what_autocast_has_made_is_refused_with_a_remedy() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theta = torch.eye(4) @ THETA.float()
        with pytest.raises(
            TypeError, match=r"theta: expected float32 or float64, got torch.bfloat16; convert it with .float\(\)"
        ):
            bilevel.hypergradient(ridge(), theta, X.float(), solver=NEWTON, linsys=SOLVE, init=START.float())


def test_what_a_result_is_asked_later_is_without_autocast() -> None:
    def found() -> bilevel.Hypergradient:
        return bilevel.hypergradient(ridge(), THETA.float(), X.float(), solver=NEWTON, linsys=SOLVE, init=START.float())

    before = found()
    expected = before.error_estimate, before.explain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = found()
        assert torch.equal(result.error_estimate, expected[0]) and result.explain() == expected[1]


def test_autocast_in_the_objective_is_the_users() -> None:
    seen = []

    def inner(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = data @ phi
        seen.append(product.dtype)
        return 0.5 * (product.float() - 1).square().mean() + 0.5 * (theta.exp() * phi**2).sum()

    problem = bilevel.BilevelProblem.from_functions(inner, lambda phi, theta, data: phi.sum())
    found = bilevel.hypergradient(
        problem, THETA.float(), X.float(), solver=NewtonCG(max_steps=5), linsys=CG(max_steps=5), init=START.float()
    )
    assert set(seen) == {torch.bfloat16} and found.grad.dtype == torch.float32


def test_data_that_autocast_has_made_get_a_remedy() -> None:
    """Within the call nothing converts them."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        data = X.float() @ torch.eye(4)
        assert data.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype|scalar type") as caught:
            bilevel.hypergradient(ridge(), THETA.float(), data, solver=NEWTON, linsys=SOLVE, init=START.float())
        assert "torch.autocast is on around this call and off within it" in caught.value.__notes__[0]
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError, match="dtype|scalar type") as caught:
        bilevel.hypergradient(ridge(), THETA.float(), data, solver=NEWTON, linsys=SOLVE, init=START.float())
    assert not any("autocast" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "solver",
    [Exact(), GMRES(max_steps=20, rtol=1e-6), CG(max_steps=20, rtol=1e-6), Neumann(num_terms=3000, rtol=1e-7)],
    ids=str,
)
def test_linear_solvers_by_themselves_are_without_autocast(solver: Any) -> None:
    a = (X.T @ X).float() + torch.eye(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solver.solve(Operator(lambda v: v @ a, symmetric=isinstance(solver, CG | Neumann)), THETA.float())
    expected = torch.linalg.solve(a.double(), THETA).float()
    torch.testing.assert_close(found.unwrap(), expected, rtol=1e-5, atol=1e-6)
    assert found.residual < 1e-5


def test_the_compiler_is_not_imported() -> None:
    """It takes seconds. What imports it soon enough is torch.func.grad itself."""
    code = """
import sys, torch, bilevel
from bilevel.linsys import CG
from bilevel.solvers import NewtonCG
problem = bilevel.BilevelProblem.from_functions(
    lambda phi, theta, data: (phi - theta).square().sum(), lambda phi, theta, data: phi.sum(), lambda theta, data: theta * 0
)
options = dict(solver=NewtonCG(max_steps=5, tol=1e-8), linsys=CG(max_steps=5, rtol=1e-8))
assert bilevel.hypergradient(problem, torch.ones(2), **options).unwrap().tolist() == [1, 1]
bilevel.argmin(problem, torch.ones(2), **options)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_dropout_in_training_mode_gets_a_note() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (torch.func.functional_call(net, phi, (data,)) - theta).square().sum(),
        lambda phi, theta, data: phi["0.bias"].square().sum(),
        lambda theta, data: dict(net.named_parameters()),
    )
    options = {"solver": bilevel.solvers.GradientDescent(step_size=0.1, max_steps=3), "batched": True}
    with pytest.raises(RuntimeError, match="randomness") as caught:
        bilevel.solve(problem, torch.zeros(3), torch.ones(4, 3), **options)
    assert ".eval() on the module" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1
    net.eval()
    assert bilevel.solve(problem, torch.zeros(3), torch.ones(4, 3), **options).steps.tolist() == [3] * 4


def test_sparse_data_that_cannot_be_mapped_come_with_a_note() -> None:
    """COO works for one problem; PyTorch's words for the rest ("do not have strides") do not say so."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, X: ((X @ phi - 1) ** 2).sum() + (theta.exp() * phi**2).sum(),
        lambda phi, theta, X: (phi**2).sum(),
        lambda theta, X: torch.zeros_like(theta),
    )
    X = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.zeros(2, dtype=torch.float64)
    options: dict[str, Any] = {"solver": NewtonCG(max_steps=9, tol=1e-10), "linsys": CG(max_steps=9, rtol=1e-12)}
    dense = bilevel.hypergradient(problem, theta, X[0], **options).unwrap()
    result = bilevel.hypergradient(problem, theta, X[0].to_sparse(), **options)
    torch.testing.assert_close(result.unwrap(), dense, rtol=1e-10, atol=0)
    assert "Nothing to change" in result.explain()
    bad = torch.where(X[0] == X[0][1, 1], torch.nan, X[0]).to_sparse()
    assert (
        "data holds NaN or infinity (1 of 12 numbers)"
        in bilevel.hypergradient(problem, theta, bad, **options).explain()
    )
    assert check_hypergradient(problem, theta, X[0].to_sparse(), **options).ok
    black = bilevel.solve(problem, theta, X[0].to_sparse(), solver=ScipyMinimize())
    torch.testing.assert_close(black.unwrap(), result.phi, rtol=1e-5, atol=1e-7)
    moved = torch.func.jacfwd(lambda theta: bilevel.argmin(problem, theta, X[0].to_sparse(), **options).square().sum())(
        theta
    )
    torch.testing.assert_close(moved, dense, rtol=1e-10, atol=0)
    leaf = theta.clone().requires_grad_()
    layer = bilevel.argmin(problem, leaf, X[0].to_sparse(), **options)
    torch.testing.assert_close(torch.autograd.grad(layer.square().sum(), leaf)[0], dense, rtol=1e-10, atol=0)
    with pytest.raises(RuntimeError) as caught:
        bilevel.argmin(problem, leaf, X[0].to_sparse_csr(), **options).sum().backward()
    assert "X.to_sparse_coo()" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError) as caught:
        bilevel.hypergradient(problem, theta, X.to_sparse(), batched=True, **options)
    assert "need dense tensors" in caught.value.__notes__[0]


def test_running_statistics_in_a_batch_come_with_a_note() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, x: (
            functional_call(net, phi, (x,)).square().mean() + theta * sum(p.square().sum() for p in phi.values())
        ),
        lambda phi, theta, x: sum(p.sum() for p in phi.values()),
        lambda theta, x: {name: p.detach() for name, p in net.named_parameters()},
    )
    x, one = torch.randn(5, 6, 3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    options: dict[str, Any] = {"solver": NewtonCG(max_steps=2), "linsys": CG(max_steps=3), "batched": True}
    with pytest.raises(RuntimeError) as caught:
        bilevel.hypergradient(problem, one, x, **options)
    assert "track_running_stats=False" in caught.value.__notes__[0]
    net.eval()
    assert bilevel.hypergradient(problem, one, x, **options).num_ok == 5


def small_ridge(inner: Callable[..., Tensor] | None = None, outer: Callable[..., Tensor] | None = None) -> Any:
    """One penalty, 3 unknowns, 8 equations; and theta, data."""

    def plain(w: Any, theta: Any, data: Any) -> Tensor:
        return 0.5 * (data["x"] @ w - data["y"]).square().mean() + 0.5 * theta.exp() * w.square().sum()

    g = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(8, 3, generator=g), "y": torch.randn(8, generator=g)}
    problem = bilevel.BilevelProblem.from_functions(
        inner or plain,
        outer or (lambda w, theta, data: w.square().sum()),
        lambda theta, data: torch.zeros_like(data["x"][0]),
    )
    return problem, torch.tensor(-1.0), data


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("where", ["inner_objective", "outer_loss"])
def test_a_function_that_writes_to_its_arguments_is_refused(where: str, batched: bool, compiled: bool) -> None:
    """Before: ok, a gradient that moved with every call, and the caller's y drifting away."""

    def inner(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        residual = data["y"]
        residual -= 0.01 * data["x"][:, 0]  # no clone
        return 0.5 * (data["x"] @ w - residual).square().mean() + 0.5 * theta.exp() * w.square().sum()

    def outer(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        return (w * data["y"].mul_(0.5).sum()).sum()

    problem, theta, data = small_ridge(inner) if where == "inner_objective" else small_ridge(outer=outer)
    if batched:
        data = {name: torch.stack([leaf, leaf.flip(0)]) for name, leaf in data.items()}
    with pytest.raises(ValueError, match=f"^{where} writes to theta or data in place.*let it work on clones"):
        bilevel.hypergradient(
            problem,
            theta,
            data,
            solver=NewtonCG(max_steps=10, tol=1e-4),
            linsys=CG(max_steps=5),
            batched=batched,
            compile=compiled,
        )


def test_argmin_refuses_an_objective_that_writes_to_theta() -> None:
    problem, theta, data = small_ridge(lambda w, theta, data: (w - 1).square().sum() * theta.exp_())
    with pytest.raises(ValueError, match="^inner_objective writes to theta or data in place"):
        bilevel.argmin(
            problem,
            theta,
            data,
            solver=GradientDescent(step_size=0.1, max_steps=3),
            linsys=CG(max_steps=5),
            check=False,
        )


@pytest.mark.parametrize("solve", [bilevel.root, bilevel.fixed_point])
def test_equations_that_write_to_their_data_are_refused(solve: Any) -> None:
    """Before: another answer than the right one, converged, and the caller's numbers gone."""

    def function(p: Tensor, theta: Tensor, x: Tensor) -> Tensor:
        x -= theta
        return p / 2 - theta * x

    x, theta = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.7)
    for call in (lambda f: f(x), lambda f: torch.func.vmap(f)(x[None])):
        with pytest.raises(ValueError, match="^[FT] writes to theta or data in place.*let it work on clones"):
            call(lambda x: solve(function, theta, x, solver=Newton(max_steps=20), linsys=Exact(), init=torch.zeros(3)))


def test_a_start_that_writes_to_theta_is_refused() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda p, theta, data: (p - theta.exp()).square().sum(),
        lambda p, theta, data: p.sum(),
        lambda theta, data: theta.zero_(),
    )
    for call in (bilevel.hypergradient, bilevel.argmin):
        with pytest.raises(ValueError, match="^initial_phi writes to theta or data in place"):
            call(problem, torch.ones(3), solver=NewtonCG(max_steps=9, tol=1e-4), linsys=CG(max_steps=5))


def test_running_statistics_in_a_derivative_come_with_a_note() -> None:
    """The forward pass goes through; the words of PyTorch in the backward pass do not name batch norm."""
    norm = nn.BatchNorm1d(4, affine=False).double().train()
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    phi = bilevel.fixed_point(
        lambda z, t, x: torch.tanh(t * norm(z) + x),
        theta,
        X,
        solver=Anderson(max_steps=200, tol=1e-8),
        linsys=Exact(),
        init=torch.zeros_like(X),
    )
    with pytest.raises(RuntimeError, match="captured Tensor") as caught:
        phi.sum().backward()
    assert "track_running_stats=False" in caught.value.__notes__[0]


class Old(torch.autograd.Function):
    """Without setup_context, as most code outside PyTorch has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


def rows_of(phi: Tensor) -> Tensor:
    return nn.functional.embedding(torch.tensor([0, 1]), phi.reshape(2, 2), sparse=True)


def attended(phi: Tensor) -> Tensor:
    x = phi.expand(1, 1, 3, 4)
    return nn.functional.scaled_dot_product_attention(x, x + X[:3], x)


@pytest.mark.parametrize(
    ("function", "order", "match", "note"),
    [
        (rows_of, 0, "sparse tensors", "without sparse=True"),
        (Old.apply, 1, "setup_context", "generate_vmap_rule = True"),
        (attended, 2, "scaled_dot_product", r"SDPBackend.MATH"),
    ],
    ids=["sparse gradients", "old Function", "fused attention"],
)
def test_what_torch_cannot_do_comes_with_a_note(
    function: Callable[[Tensor], Tensor], order: int, match: str, note: str
) -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: function(phi).square().mean() + (phi - theta).square().sum(),
        lambda phi, theta, data: phi.square().sum(),
    )

    def loss(theta: Tensor) -> Tensor:
        return bilevel.argmin(problem, theta, solver=NEWTON, linsys=Exact(), init=START).square().sum()

    with pytest.raises(RuntimeError, match=match) as caught:
        if order == 0:
            bilevel.hypergradient(problem, THETA, solver=NEWTON, linsys=SOLVE, init=START)
        elif order == 1:
            torch.func.grad(loss)(THETA)
        else:
            torch.func.hessian(loss)(THETA)
    assert note in caught.value.__notes__[0]


@pytest.mark.parametrize("which", ["theta", "data", "init"])
def test_tensors_of_inference_mode_are_taken(which: str) -> None:
    """The features of a frozen network are such. Before, an error of PyTorch about tensors saved for backward."""
    problem, theta, data = small_ridge()
    options: dict[str, Any] = {"solver": NewtonCG(max_steps=10, tol=1e-4), "linsys": CG(max_steps=5)}
    init = torch.zeros(3)
    expected = bilevel.hypergradient(problem, theta, data, init=init, **options).unwrap()
    with torch.inference_mode():
        if which == "theta":
            theta = theta.clone()
        elif which == "data":
            data = {name: leaf.clone() for name, leaf in data.items()}
        else:
            init = init.clone()
    found = bilevel.hypergradient(problem, theta, data, init=init, **options)
    torch.testing.assert_close(found.unwrap(), expected, rtol=0, atol=0)
    phi = bilevel.argmin(problem, theta, data, init=init, **options)
    torch.testing.assert_close(phi, found.phi)


def test_a_lambda_may_be_handed_over_in_inference_mode() -> None:
    lam, theta = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def made() -> bilevel.ProximalProblem:
        return bilevel.ProximalProblem.from_losses(lambda p, d: p.square().sum(), lambda p, d: p.sum(), lam)

    with torch.inference_mode():
        problem = made()
        inside = bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVE).unwrap()
    outside = bilevel.hypergradient(problem, theta, solver=NEWTON, linsys=SOLVE).unwrap()
    torch.testing.assert_close(outside, lam / (2 + lam), rtol=1e-9, atol=0)
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize(
    "linsys",
    [
        CG(max_steps=5, preconditioner=Jacobi()),
        CG(max_steps=5, preconditioner=Jacobi(num_probes=4)),
        CG(max_steps=5, preconditioner=NystromPreconditioner(rank=2)),
        Nystrom(rank=3, shift=0.3),
        GMRES(max_steps=5),
        Exact(),
    ],
    ids=repr,
)
def test_the_default_device_does_not_matter(linsys: Any) -> None:
    """ "meta" stands for one that is not where the tensors are: what is made there has no numbers."""
    problem, theta, data = small_ridge()
    solver = ScipyMinimize(tol=1e-3)
    expected = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=linsys)
    text = expected.explain()
    checked = str(check_hypergradient(problem, theta, data, solver=solver, linsys=linsys)) if linsys == Exact() else ""
    torch.set_default_device("meta")
    try:
        found = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=linsys)
        assert found.explain() == text
        if checked:
            assert str(check_hypergradient(problem, theta, data, solver=solver, linsys=linsys)) == checked
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found.unwrap(), expected.unwrap(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("term", "advice"),
    [
        (lambda phi, x: phi.sum() if phi.sum() > 0 else 2 * phi.sum(), "Write torch.where in the place of if"),
        (lambda phi, x: phi.sum() * x.sum().item(), "leave out .item()"),
        (lambda phi, x: phi.sum() * torch.from_numpy(x.numpy()).sum(), "leave out .item(), float() and .numpy()"),
        (lambda phi, x: phi[x > 0].sum(), r"a weight in the place of x[mask]"),
        (lambda phi, x: LSTM(phi[None, :, None])[0].sum(), "as those of recurrent layers"),
    ],
    ids=["if", "item", "numpy", "mask", "recurrent"],
)
def test_what_several_tasks_at_once_cannot_do_is_said(term: Any, advice: str) -> None:
    """And one task by itself is no problem."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, x: (phi - theta).square().sum() + 1e-3 * term(phi, x),
        lambda phi, theta, x: phi.sum(),
        lambda theta, x: torch.zeros_like(theta),
    )
    theta, x = torch.ones(3), torch.ones(2, 3)
    options: Any = {"solver": NewtonCG(max_steps=3), "linsys": CG(max_steps=3)}
    with pytest.raises(RuntimeError) as caught:
        bilevel.hypergradient(problem, theta, x, batched=True, **options)
    assert advice in caught.value.__notes__[0]
    assert bilevel.hypergradient(problem, theta, x[0], **options).ok


LSTM = nn.LSTM(1, 2).requires_grad_(False)


@pytest.mark.parametrize("name", ["argmin", "hypergradient", "compiled", "root"])
def test_a_checkpoint_around_a_call_costs_one_more_call(name: str) -> None:
    """And not, for every gradient of the solve, all that came before it again."""
    evaluations = []

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        evaluations.append(1)
        return 0.5 * (phi - 1).square().sum() + 0.5 * (theta.exp() * phi.square()).sum()

    def slope(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        evaluations.append(1)
        return phi - 1 + theta.exp() * phi

    problem = bilevel.BilevelProblem.from_functions(
        inner, lambda phi, theta, data: phi.sum(), lambda theta, data: torch.zeros_like(theta)
    )
    steps, linsys = GradientDescent(step_size=0.3, max_steps=40), CG(max_steps=5)

    def run(theta: Tensor) -> Tensor:
        if name == "argmin":
            return bilevel.argmin(problem, theta, solver=steps, linsys=linsys).sum()
        if name == "root":
            solver = Newton(max_steps=20, tol=1e-10)
            return bilevel.root(slope, theta, init=torch.zeros(2), solver=solver, linsys=Exact()).sum()
        found = bilevel.hypergradient(problem, theta, solver=steps, linsys=linsys, compile=name == "compiled")
        return (found.grad * theta).sum()

    plain, checkpointed = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    run(plain).backward()
    alone = len(evaluations)
    evaluations.clear()
    torch.utils.checkpoint.checkpoint(run, checkpointed, use_reentrant=False).backward()
    assert len(evaluations) <= 2 * alone
    torch.testing.assert_close(checkpointed.grad, plain.grad)
    if name in ("argmin", "root"):  # which take no hooks of others
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):  # they stay
        before = torch._C._autograd._top_saved_tensors_default_hooks(True)
        torch.utils.checkpoint.checkpoint(run, plain, use_reentrant=False).backward()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) == before


def test_hooks_of_any_kind_and_none_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of C have no module; before torch 2.8 nobody tells which hooks there are."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta).square().sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )

    def run() -> Tensor:
        found = bilevel.hypergradient(
            problem, torch.ones(2), solver=GradientDescent(step_size=0.5, max_steps=5), linsys=CG(max_steps=2)
        )
        return found.unwrap()

    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.cpu, torch.Tensor.cpu):
        torch.testing.assert_close(run(), torch.ones(2))
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    torch.testing.assert_close(run(), torch.ones(2))


def test_a_note_is_given_once_of_a_call_within_a_call() -> None:
    def failing() -> None:
        raise RuntimeError("vmap: called random operation while in randomness error mode")

    with pytest.raises(RuntimeError) as caught:
        isolated(lambda: isolated(failing)())()
    assert len(caught.value.__notes__) == 1


class TestWhereAnErrorWasRaised:
    """The errors of PyTorch within the functions of the user do not say of which shapes."""

    DATA: ClassVar[dict[str, Any]] = {
        "x": torch.ones(20, 4),
        "labels": torch.zeros(20, dtype=torch.int64),
        "name": "tables",
    }

    @staticmethod
    def problem(**other: Any) -> bilevel.BilevelProblem:
        functions = {
            "inner": lambda phi, theta, data: (data["x"] @ phi["w"]).square().mean() + (theta * phi["w"] ** 2).sum(),
            "outer": lambda phi, theta, data: phi["w"].sum(),
        } | other
        return bilevel.BilevelProblem.from_functions(
            functions["inner"], functions["outer"], lambda theta, data: {"w": torch.zeros(4)}
        )

    @pytest.mark.parametrize("compile", [False, True])
    def test_in_the_inner_objective(self, compile: bool) -> None:
        with pytest.raises(RuntimeError, match="size of tensor") as caught:
            bilevel.hypergradient(
                self.problem(), torch.ones(3), self.DATA, solver=NewtonCG(), linsys=CG(max_steps=2), compile=compile
            )
        (note,) = caught.value.__notes__
        assert note == (
            "bilevel: raised in inner_objective, for one task with phi['w'] (4,), theta (3,) float32, data['labels'] (20,) int64, "
            "data['x'] (20, 4) float32."
        )

    def test_in_the_outer_loss_of_a_batch(self) -> None:
        problem = self.problem(outer=lambda phi, theta, data: (phi["w"] @ data["missing"]).sum())
        data = {"x": torch.ones(5, 20, 4)}
        with pytest.raises(KeyError) as caught:
            bilevel.hypergradient(problem, torch.ones(4), data, solver=NewtonCG(), linsys=CG(max_steps=2), batched=True)
        (note,) = caught.value.__notes__
        assert note.startswith(
            "bilevel: raised in outer_loss, for one task with phi['w'] (4,), theta (4,) float32, data['x'] (20, 4)"
        )

    def test_in_a_condition(self) -> None:
        with pytest.raises(RuntimeError) as caught:
            bilevel.fixed_point(
                lambda z, p, x: torch.tanh(p @ z + x),
                torch.eye(3),
                torch.ones(4),
                init=torch.zeros(4),
                solver=Anderson(max_steps=5),
                linsys=GMRES(max_steps=5),
            )
        (note,) = caught.value.__notes__
        assert note == "bilevel: raised in T, for one task with phi (4,), theta (3, 3) float32, data (4,) float32."

    def test_not_where_more_is_known(self) -> None:
        problem = self.problem(inner=lambda phi, theta, data: (phi["w"] * torch.rand(4)).sum())
        with pytest.raises(RuntimeError) as caught:
            bilevel.hypergradient(
                problem,
                torch.ones(4),
                {"x": torch.ones(5, 2, 4)},
                solver=NewtonCG(),
                linsys=CG(max_steps=2),
                batched=True,
            )
        assert ["raised in" in note for note in caught.value.__notes__] == [False]


def test_inference_mode_around_a_transform_is_named_as_the_cause() -> None:
    """Of a theta made outside. The solve is then in no graph, whatever the functions do."""
    problem, theta, data = small_ridge()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"is torch\.inference_mode\(\) on around a transform"):
        torch.func.jacrev(
            lambda theta: bilevel.argmin(problem, theta, data, solver=NewtonCG(max_steps=9, tol=1e-4), linsys=Exact())
        )(theta)
