"""With tolerances of 0 a meta-step reads no number back to the host, and moves nothing between the devices: what a CUDA graph of it needs.

Shown without a GPU, in two ways. With numbers on the CPU, every operator passes through a mode that refuses those which read. On the
device "meta", whose tensors have no numbers, whatever looks at one fails by itself, and a tensor made on the CPU is on the wrong device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilevel
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, GMRES, MINRES, BiCGStab, Exact, Identity, Jacobi, Neumann, Nystrom, NystromPreconditioner
from bilevel.regularisation import Diagonal, Matrix, PerLeaf, Scalar
from bilevel.solvers import LBFGS, Anderson, FixedPointIteration, GradientDescent, NesterovAGD, NewtonCG
from bilevel.trees import flatten, tree_map

pytest.importorskip("platformdirs", reason="needs the extra 'meta-learning'")

from applications.meta_learning.models import MLP, ConvNet
from applications.meta_learning.problem import cross_entropy, few_shot_problem, squared_error

aten = torch.ops.aten

READS = {
    "_assert_scalar",
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",  # torch.tensor(data): made on the host, then copied
    "masked_select",
    "nanmedian.default",  # on a GPU; along an axis it does not
    "nonzero",
    "nonzero_numpy",
    "repeat_interleave",  # Tensor: the size of the answer is in the numbers
    "unique_consecutive",
    "unique_dim",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
MOVES = {"_to_copy", "to", "copy_"}


class HostWaits(Exception):
    """An operator would make the host wait for the device."""


class NoWait(TorchDispatchMode):
    """Refuses what reads numbers, and every tensor that is not on ``device``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in READS or f"{name}.{func._overloadname}" in READS:
            raise HostWaits(f"{func} makes the host wait")
        if name in INDEXING and any(
            t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if t is not None
        ):
            raise HostWaits(f"{func} with a mask counts it")
        out = func(*args, **(kwargs or {}))
        both = [t for t in [*tensors, *tree_leaves(out)] if isinstance(t, Tensor)]
        foreign = [t for t in both if self._is_foreign(t)]
        moved = name in MOVES and 0 < len(foreign) < len(both)
        if moved or any(t.ndim > 0 for t in foreign):  # a number from the code is on the CPU, and nobody waits for it
            raise HostWaits(f"{func} has a tensor on {foreign[0].device}, expected all on {self.device}")
        return out

    def _is_foreign(self, tensor: Tensor) -> bool:
        """On another device, and not one of the tensors without numbers by which PyTorch finds shapes."""
        return tensor.device.type not in (self.device, "meta") and not tensor._is_zerotensor()


DEVICES = ["cpu", "meta"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), x[:1]),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.unique(x),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.nanmedian(),
        lambda x: torch.where(x > 0),
        lambda x: torch.linalg.inv(x.expand(3, 3) + torch.eye(3, device=x.device)),
        lambda x: torch.linalg.cholesky(torch.eye(3, device=x.device) * x),
    ],
)
def test_what_reads_is_refused(reads: Callable[[Tensor], Any], device: str) -> None:
    x = torch.ones(3, device=device)
    with NoWait(device), pytest.raises((HostWaits, RuntimeError, NotImplementedError)):
        reads(x)


def test_a_tensor_made_of_python_numbers_is_refused() -> None:
    """Only seen on the CPU: on "meta" PyTorch makes it without an operator."""
    with NoWait("cpu"), pytest.raises(HostWaits):
        torch.tensor(2.0)


@pytest.mark.parametrize(
    "moves",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3),
        lambda x: torch.randn(3),
        lambda x: torch.as_tensor([1.0, 2.0]).to(x),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_what_moves_is_refused(moves: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device="meta")
    with NoWait("meta"), pytest.raises((HostWaits, RuntimeError, NotImplementedError)):
        moves(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "allowed",
    [
        lambda x: torch.where(x > 0, x, torch.nan) * 2 + 1,
        lambda x: x[1:, None].expand(-1, 2).index_select(0, torch.zeros(1, dtype=torch.long, device=x.device)),
        lambda x: x.sort().values.nanmedian(0).values,
        lambda x: torch.func.jvp(lambda y: (y * 3.0 + 1.0).sin(), (x,), (x,)),
    ],
)
def test_what_does_neither_is_let_through(allowed: Callable[[Tensor], Any], device: str) -> None:
    with NoWait(device) as mode:
        allowed(torch.ones(3, device=device))
    assert mode.count > 1


# ----------------------------------------------------------------------------------------------------------------------
# Whole meta-steps of the application.

FIXED = GradientDescent(step_size=0.02, max_steps=2, tol=0.0)
ALL_STEPS = CG(max_steps=2, rtol=0.0, atol=0.0)


def images(device: str) -> tuple[Any, Any, Any]:
    """A problem, theta and two tasks: the convolutional network of the paper, small."""
    torch.manual_seed(0)
    net = ConvNet(3, channels=4, in_size=12)
    x, y = torch.rand(2, 6, 1, 12, 12), torch.arange(3).repeat(2, 2)
    return few_shot_problem(net, cross_entropy, 10.0), _theta(net, device), _tasks(x, y, device)


def numbers(device: str) -> tuple[Any, Any, Any]:
    """The same with a small regression, one lambda for each parameter, and three tasks."""
    torch.manual_seed(0)
    net = MLP(hidden=5)
    lam = {name: 9.0 + 0.1 * i for i, (name, _) in enumerate(net.named_parameters())}
    x = torch.randn(3, 6, 1)
    return few_shot_problem(net, squared_error, lam), _theta(net, device), _tasks(x, x.sin(), device)


def _theta(net: torch.nn.Module, device: str) -> dict[str, Tensor]:
    return {name: p.detach().to(device) for name, p in net.named_parameters()}


def _tasks(x: Tensor, y: Tensor, device: str) -> dict[str, dict[str, Tensor]]:
    return {part: {"x": x.to(device), "y": y.to(device)} for part in ("support", "query")}


@pytest.fixture
def capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam(capturable=True), the one for CUDA graphs, on these devices too: it refuses them although it works there."""
    module = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu", "meta"])


@pytest.mark.usefixtures("capturable")
@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("setting", [images, numbers])
@pytest.mark.parametrize(("device", "foreach"), [("cpu", False), ("meta", False), ("meta", True)])
def test_a_whole_meta_step(device: str, setting: Any, curvature: Any, foreach: bool) -> None:
    """Inner solve, outer gradient, linear solve and Adam, twice: the second time the state of Adam is there.

    ``foreach`` is what Adam does on a GPU; on the CPU it makes a tensor of a number, and only there.
    """
    problem, theta, tasks = setting(device)
    outer = torch.optim.Adam(list(theta.values()), capturable=True, foreach=foreach)
    outer.param_groups[0]["lr"] = torch.full((), 1e-2, device=device)  # as a tensor, so that a schedule can write to it
    before = tree_map(torch.clone, theta)
    for _ in range(2):
        with NoWait(device) as mode:
            found = bilevel.hypergradient(
                problem,
                theta,
                tasks,
                solver=FIXED,
                linsys=ALL_STEPS,
                curvature=curvature,
                batched=True,
                chunk_size=2,
            )
            for name, leaf in theta.items():
                leaf.grad = found.grad[name]
            outer.step()
        assert mode.count > 500
    assert {t.device.type for t in [*theta.values(), found.outer, found.ok_per_task]} == {device}
    if device == "cpu":  # with numbers: it has moved, and along numbers
        assert found.num_ok > 0 and not any(torch.equal(theta[name], leaf) for name, leaf in before.items())


# ----------------------------------------------------------------------------------------------------------------------
# Every solver that says so.

INNER = {
    "gradient descent": FIXED,
    "gradient descent, line search": GradientDescent(step_size=None, max_steps=4),
    "nesterov": NesterovAGD(step_size=0.02, max_steps=3),
    "nesterov, no step size": NesterovAGD(step_size=None, max_steps=3),
    "nesterov, known mu": NesterovAGD(step_size=0.02, max_steps=3, strong_convexity=0.5),
    "nesterov, momentum": NesterovAGD(step_size=0.02, max_steps=3, momentum=0.5),
    "l-bfgs": LBFGS(max_steps=4, memory=2),
}
LINEAR = {
    "cg": ALL_STEPS,
    "cg, steihaug": CG(max_steps=3, rtol=0.0, steihaug=True),
    "cg, jacobi": CG(max_steps=3, rtol=0.0, preconditioner=Jacobi()),
    "minres": MINRES(max_steps=3, rtol=0.0),
    "gmres": GMRES(max_steps=5, rtol=0.0, restart=2),
    "bicgstab": BiCGStab(max_steps=3, rtol=0.0),
    "neumann": Neumann(num_terms=3, step_size=0.1),
    "neumann, no step size": Neumann(num_terms=3),
    "identity": Identity(),
}


@pytest.mark.parametrize("solver", INNER.values(), ids=INNER)
@pytest.mark.parametrize("device", DEVICES)
def test_inner_solvers(device: str, solver: Any) -> None:
    problem, theta, tasks = numbers(device)
    with NoWait(device):
        found = bilevel.hypergradient(problem, theta, tasks, solver=solver, linsys=ALL_STEPS, batched=True)
    assert found.outer.device.type == device


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("linsys", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("device", DEVICES)
def test_linear_solvers(device: str, linsys: Any, init: bool) -> None:
    problem, theta, tasks = numbers(device)
    options: dict[str, Any] = {"solver": FIXED, "linsys": linsys, "curvature": GaussNewton(), "batched": True}
    warm = bilevel.hypergradient(problem, theta, tasks, **options) if init else None
    with NoWait(device):
        found = bilevel.hypergradient(problem, theta, tasks, **options, warm_start=warm)
    assert found.outer.device.type == device


def linear(phi: Any, task: Any) -> Tensor:
    return task[0] @ phi["w"]


def squares(outputs: Tensor, task: Any) -> Tensor:
    return (outputs - task[1]).square().mean()


def on(device: str, tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(device), tree)


@pytest.mark.parametrize("kind", [Scalar(), PerLeaf(), Diagonal(), Matrix()], ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("device", DEVICES)
def test_a_learned_lambda(device: str, kind: Any) -> None:
    problem = bilevel.LearnedProximalProblem.from_model(
        linear, squares, lambda phi, task: squares(linear(phi, task), task), kind
    )
    lam = 2 * torch.eye(4) if isinstance(kind, Matrix) else 2.0
    theta = on(device, problem.initial_theta({"w": torch.zeros(4)}, lam))
    x = torch.randn(3, 6, 4)
    tasks = on(device, (x, x.sum(-1)))
    with NoWait(device):
        bilevel.hypergradient(problem, theta, tasks, solver=FIXED, linsys=ALL_STEPS, batched=True)


@pytest.mark.parametrize("lam", [torch.full((4,), 2.0), 2 * torch.eye(4)], ids=["diagonal", "matrix"])
def test_a_lambda_of_tensors(lam: Tensor) -> None:
    """That a matrix is positive definite is looked at once, and not again."""
    tree = lam if lam.ndim == 2 else {"w": lam}
    problem = bilevel.ProximalProblem.from_model(
        linear, squares, lambda phi, task: squares(linear(phi, task), task), tree
    )
    x, theta = torch.randn(3, 6, 4), {"w": torch.zeros(4)}
    tasks = (x, x.sum(-1))
    for mode in (nullcontext(), NoWait("cpu")):
        with mode:
            bilevel.hypergradient(problem, theta, tasks, solver=FIXED, linsys=ALL_STEPS, batched=True)


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=3), Anderson(max_steps=4, memory=2)], ids=repr)
@pytest.mark.parametrize("device", DEVICES)
def test_solvers_of_equations(device: str, solver: Any) -> None:
    theta = torch.linspace(0.1, 0.5, 4, device=device).requires_grad_()
    with NoWait(device):
        phi = bilevel.fixed_point(
            lambda phi, theta, data: 0.5 * (phi + theta).cos(),
            theta,
            solver=solver,
            linsys=GMRES(max_steps=4, rtol=0.0),
            init=torch.zeros(4, device=device),
        )
        phi.sum().backward()
    assert theta.grad is not None and theta.grad.device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_newton_cg_looks_at_numbers_and_does_not_say_otherwise(device: str) -> None:
    """Its line search asks whether anybody still searches. Where this has changed, so must docs/gpu.md."""
    problem, theta, tasks = numbers(device)
    with NoWait(device), pytest.raises((HostWaits, RuntimeError)):
        bilevel.solve(problem, theta, tasks, solver=NewtonCG(max_steps=2, tol=0.0), batched=True)


@pytest.mark.parametrize(
    "linsys",
    [
        Exact(),
        Nystrom(rank=2, shift=9.0),
        CG(max_steps=2, rtol=0.0, preconditioner=Jacobi(num_probes=2)),
        CG(max_steps=2, rtol=0.0, preconditioner=NystromPreconditioner(rank=2)),
    ],
    ids=repr,
)
def test_linear_solvers_that_look_at_numbers_or_bring_some_from_the_host(linsys: Any) -> None:
    """As docs/gpu.md says."""
    problem, theta, tasks = numbers("meta")
    with NoWait("meta"), pytest.raises((HostWaits, RuntimeError)):
        bilevel.hypergradient(problem, theta, tasks, solver=FIXED, linsys=linsys, batched=True)


def test_a_tolerance_above_zero_looks() -> None:
    """So the tests above can fail."""
    problem, theta, tasks = numbers("cpu")
    for options in (
        {"solver": GradientDescent(step_size=0.02, max_steps=3, tol=1e-9), "linsys": ALL_STEPS},
        {"solver": FIXED, "linsys": CG(max_steps=3, rtol=1e-6)},
        {"solver": FIXED, "linsys": Neumann(num_terms=3, step_size=0.1, rtol=1e-6)},
    ):
        with NoWait("cpu"), pytest.raises(HostWaits):
            bilevel.hypergradient(problem, theta, tasks, **options, batched=True)  # type: ignore[arg-type]


def test_the_flattened_trees_have_no_tensor_of_another_device() -> None:
    """What the user gets back, leaf by leaf."""
    problem, theta, tasks = images("meta")
    found = bilevel.hypergradient(problem, theta, tasks, solver=FIXED, linsys=ALL_STEPS, batched=True)
    leaves = flatten([found.grad, found.phi, found.outer_per_task, found.inner.codes, found.linear.residual])[0]
    assert {leaf.device.type for leaf in leaves} == {"meta"}


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: what reads nothing can be captured, and gives the same numbers.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
class TestCuda:
    @pytest.mark.parametrize("name", [*INNER, *LINEAR])
    def test_every_solver_is_captured(self, name: str) -> None:
        problem, theta, tasks = (
            tree_map(torch.Tensor.double, part) if isinstance(part, dict) else part for part in numbers("cuda")
        )
        solver, linsys = INNER.get(name, FIXED), LINEAR.get(name, ALL_STEPS)

        def gradient(tasks: Any) -> Any:
            options: dict[str, Any] = {"solver": solver, "linsys": linsys, "curvature": GaussNewton(), "batched": True}
            return bilevel.hypergradient(problem, theta, tasks, **options).grad

        step = bilevel.CapturedStep(gradient)
        for _ in range(5):
            got = step(tasks)
        assert step.why_not is None and step.num_captures == 1
        torch.testing.assert_close(got, gradient(tasks), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize(
        "solver", [FixedPointIteration(max_steps=3), Anderson(max_steps=4, memory=2)], ids=["plain", "anderson"]
    )
    def test_solvers_of_equations_are_captured(self, solver: Any) -> None:
        def gradient(theta: Tensor) -> Tensor:
            theta = theta.detach().requires_grad_()
            phi = bilevel.fixed_point(
                lambda phi, theta, data: 0.5 * (phi + theta).cos(),
                theta,
                solver=solver,
                linsys=GMRES(max_steps=4, rtol=0.0),
                init=torch.zeros_like(theta),
            )
            return torch.autograd.grad(phi.sum(), theta)[0]

        theta = torch.linspace(0.1, 0.5, 4, device="cuda", dtype=torch.float64)
        step = bilevel.CapturedStep(gradient)
        for _ in range(5):
            got = step(theta)
        assert step.why_not is None and step.num_captures == 1
        torch.testing.assert_close(got, gradient(theta), rtol=1e-8, atol=1e-10)
