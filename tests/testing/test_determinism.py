"""check_deterministic: what is no function is refused, with the culprit named; nothing is left changed; an ordinary call pays nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel
from bilevel import BilevelProblem, ProximalProblem
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent
from bilevel.testing import check_deterministic

F64 = torch.float64
THETA = torch.tensor([0.5, -1.0, 2.0], dtype=F64)


def with_module(*layers: nn.Module, training: bool = True) -> tuple[nn.Module, BilevelProblem, Any, Any]:
    net = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 1)).double().train(training)
    problem = ProximalProblem.from_losses(
        lambda phi, data: functional_call(net, phi, (data["x"],)).square().mean(),
        lambda phi, data: functional_call(net, phi, (data["x"],)).sum(),
        1.0,
    )
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    return net, problem, {name: p.detach() for name, p in net.named_parameters()}, {"x": x}


def functions(inner: Callable[..., Tensor], outer: Callable[..., Tensor] | None = None) -> BilevelProblem:
    return BilevelProblem.from_functions(
        inner, outer or (lambda phi, theta, data: phi.sum()), lambda theta, data: torch.zeros_like(theta)
    )


def quadratic(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    return (phi - theta).square().sum()


def finding(problem: BilevelProblem, theta: Any = THETA, data: Any = None) -> str:
    with pytest.raises(ValueError, match="expected deterministic functions of phi, theta and data, but\n- ") as caught:
        check_deterministic(problem, theta, data)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Modules.


@pytest.mark.parametrize(
    "layers",
    [
        (),
        (nn.ReLU(), nn.LayerNorm(4)),
        (nn.Dropout(0.0),),
        (nn.BatchNorm1d(4, track_running_stats=False),),
    ],
    ids=["plain", "layer norm", "dropout 0", "batch norm without statistics"],
)
def test_networks_that_are_functions_pass_in_training_mode(layers: tuple[nn.Module, ...]) -> None:
    _, problem, theta, data = with_module(*layers)
    check_deterministic(problem, theta, data)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.RReLU()], ids=lambda layer: type(layer).__name__
)
def test_the_same_layers_pass_in_evaluation_mode_and_not_in_training_mode(layer: nn.Module) -> None:
    _, problem, theta, data = with_module(layer, training=False)
    check_deterministic(problem, theta, data)
    _, problem, theta, data = with_module(layer)
    text = finding(problem, theta, data)
    assert "inner_objective" in text and "outer_loss" in text and "Sequential.1" in text and ".eval()" in text


def test_dropout_is_named() -> None:
    _, problem, theta, data = with_module(nn.Sequential(nn.Tanh(), nn.Dropout(0.3)))
    text = finding(problem, theta, data)
    assert "In training mode: Sequential.1.1 = Dropout(p=0.3, inplace=False): call .eval() on the module." in text
    assert "changes from call to call, its value by up to" in text
    assert "draws random numbers from torch (CPU)" in text


@pytest.mark.parametrize(
    "modules", [nn.LSTM(3, 3, 2, dropout=0.5), nn.MultiheadAttention(3, 1, dropout=0.5)], ids=["LSTM", "attention"]
)
def test_layers_with_dropout_inside_are_named(modules: nn.Module) -> None:
    module = modules.double().train()

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        x = (phi - theta).expand(2, 1, 3)
        with torch.no_grad():
            noise = module(x) if isinstance(module, nn.LSTM) else module(x, x, x)
        return quadratic(phi, theta, data) + noise[0].sum() * phi.sum()

    assert type(module).__name__ in finding(functions(inner)).split("In training mode: ")[1]


def test_running_statistics_are_named_and_put_back() -> None:
    net, problem, theta, data = with_module(nn.BatchNorm1d(4))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    text = finding(problem, theta, data)
    assert (
        "inner_objective changes buffers of modules: Sequential.1.num_batches_tracked, Sequential.1.running_mean"
        in text
    )
    assert "track_running_stats=False" in text and "value" not in text
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


class Running(nn.Module):
    """Statistics by assignment, not in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x


def test_buffers_that_are_replaced_are_put_back_too() -> None:
    net, problem, theta, data = with_module(Running())
    own = net[1].mean
    assert "Sequential.1.mean" in finding(problem, theta, data)
    assert net[1].mean is own and own == 0


def test_buffers_that_are_passed_in_data_are_arguments_that_are_written_to() -> None:
    net, _, theta, data = with_module(nn.BatchNorm1d(4))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    problem = ProximalProblem.from_losses(
        lambda phi, data: functional_call(net, {**phi, **data["buffers"]}, (data["x"],)).square().mean(),
        lambda phi, data: sum(p.sum() for p in phi.values()),
        1.0,
    )
    data["buffers"] = dict(net.named_buffers())
    text = finding(problem, theta, data)
    assert "inner_objective writes to its arguments in place: data['buffers']['1.num_batches_tracked']" in text
    assert "outer_loss" not in text
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


# ----------------------------------------------------------------------------------------------------------------------
# Functions.


def shuffled(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    order = torch.as_tensor(np.random.permutation(3))
    return ((phi - theta)[order] * torch.arange(3, dtype=F64)).sum() + phi.square().sum()


def augmented(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    return quadratic(phi, theta + random.random(), data)


def noisy(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    return quadratic(phi, theta + torch.rand(3, dtype=F64), data)


@pytest.mark.parametrize(
    ("function", "generator"),
    [(shuffled, "numpy.random"), (augmented, "random"), (noisy, r"torch (CPU)")],
    ids=["shuffled", "augmented", "noisy"],
)
def test_the_generator_is_named_and_the_function(function: Any, generator: str) -> None:
    text = finding(functions(function))
    assert f"inner_objective draws random numbers from {generator}. Draw them once" in text
    assert "its gradient in phi by up to" in text and "outer_loss" not in text
    text = finding(functions(quadratic, function))
    assert f"outer_loss draws random numbers from {generator}." in text and "inner_objective" not in text


def test_random_numbers_without_effect_are_refused_too() -> None:
    """Three evaluations may well miss a rare event."""
    text = finding(functions(lambda phi, theta, data: quadratic(phi, theta, data) + 0 * torch.rand(()).item()))
    assert "draws random numbers" in text and "changes from call to call" not in text


def test_functions_that_seed_their_generator_are_functions() -> None:
    def seeded(seed: int) -> Any:
        def function(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
            torch.manual_seed(seed)
            return (torch.rand(3, dtype=F64) * (phi - theta).square()).sum()

        return function

    check_deterministic(functions(seeded(0), seeded(1)), THETA)


def test_a_state_of_its_own_is_found() -> None:
    count = [0]

    def counting(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        count[0] += 1
        return quadratic(phi, theta, data) * (1 + 1e-12 * count[0])

    assert "keep a state of its own" in finding(functions(counting))
    generator = torch.Generator()
    text = finding(functions(lambda phi, theta, data: phi.square().sum() * torch.rand((), generator=generator).item()))
    assert "keep a state of its own" in text  # at the start itself, phi = 0, nothing would be seen


def test_a_cache_that_only_the_first_call_fills_is_found() -> None:
    """Later calls do not use the leaf of theta that went into it: the graph shows other leaves than in the first."""
    theta = {"log": torch.zeros(4, dtype=F64), "centre": torch.ones(4, dtype=F64)}

    def remembers(phi: Tensor, theta: Any, data: Any, cache: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006 - the mistake
        if "weights" not in cache:
            cache["weights"] = theta["log"].exp()
        return (cache["weights"] * phi.square()).sum() + (phi - theta["centre"]).square().sum()

    def counts(phi: Tensor, theta: Any, data: Any, calls: list[int] = []) -> Tensor:  # noqa: B006
        calls.append(0)
        extra = theta["log"].sum() if len(calls) == 1 else 0.0
        return (phi - theta["centre"]).square().sum() + extra

    for function in (remembers, counts):
        problem = BilevelProblem.from_functions(
            function, lambda phi, theta, data: phi.sum(), lambda theta, data: theta["centre"]
        )
        with pytest.raises(ValueError, match=r"inner_objective changes from call to call.*keep a state of its own"):
            check_deterministic(problem, theta)


def test_a_change_of_one_bit_is_found() -> None:
    count = [0]

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        count[0] += 1
        value = quadratic(phi, theta, data)
        return (
            value + torch.where(torch.tensor(count[0] % 2 == 0), torch.nextafter(value, value + 1) - value, 0).detach()
        )

    assert "changes from call to call" in finding(functions(inner))


def test_arguments_that_are_written_to_are_named_and_the_original_is_not() -> None:
    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        data["batch"][0] += 1
        return quadratic(phi, theta, data) + phi.sum() * data["batch"][0].sum()

    data = {"batch": [torch.zeros(2, dtype=F64)], "label": torch.arange(2)}
    assert "inner_objective writes to its arguments in place: data['batch'][0]. Work on a copy" in finding(
        functions(inner), data=data
    )
    assert not data["batch"][0].any()


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (lambda phi, theta, data: theta.square().sum(), "expected a function of phi"),
        (lambda phi, theta, data: (phi.detach() - theta).square().sum(), "expected a function of phi"),
        (lambda phi, theta, data: (phi * CAPTURED).sum(), "carries a gradient"),
        (lambda phi, theta, data: phi.float().square().sum(), "expected torch.float64 like phi"),
    ],
)
def test_what_the_library_refuses_is_refused_here_too(inner: Callable[..., Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_deterministic(functions(inner), THETA)


def test_it_does_not_run_under_a_transform() -> None:
    def value(theta: Tensor) -> Tensor:
        check_deterministic(functions(quadratic), theta)
        return theta.sum()

    with pytest.raises(
        TypeError, match="check_deterministic returns plain numbers and cannot run under a torch.func transform"
    ):
        torch.func.grad(value)(THETA)


CAPTURED = torch.ones(3, dtype=F64, requires_grad=True)


def test_nan_is_the_same_as_nan() -> None:
    check_deterministic(functions(lambda phi, theta, data: (phi - 1e3).log().sum()), THETA)


@pytest.mark.parametrize(
    ("problem", "error", "words"),
    [
        (3, TypeError, "problem: expected a BilevelProblem"),
        (
            BilevelProblem.from_functions(quadratic, quadratic),
            ValueError,
            "initial_phi: this problem was made without one",
        ),
        (
            functions(lambda phi, theta, data: phi),
            ValueError,
            "inner_objective: expected a 0-d tensor, got shape \\(3,\\)",
        ),
        (
            functions(quadratic, lambda phi, theta, data: phi),
            ValueError,
            "outer_loss: expected a 0-d tensor, got shape \\(3,\\)",
        ),
    ],
)
def test_wrong_arguments(problem: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_deterministic(problem, THETA)


def test_the_generators_are_put_back_also_after_an_error() -> None:
    def failing(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        noisy(phi, theta, data)
        np.random.rand(), random.random()
        raise RuntimeError("on purpose")

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for problem, error in (
        (functions(quadratic), None),
        (functions(noisy), ValueError),
        (functions(quadratic, failing), RuntimeError),
    ):
        if error is None:
            check_deterministic(problem, THETA)
        else:
            with pytest.raises(error):
                check_deterministic(problem, THETA)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == np.random.get_state()[1].tolist() and states[2] == random.getstate()
    assert not nn.modules.module._global_forward_pre_hooks


# ----------------------------------------------------------------------------------------------------------------------
# Functions for root and fixed_point.


def test_what_root_and_fixed_point_take_is_looked_at_too() -> None:
    dropout, norm = nn.Dropout(0.3), nn.BatchNorm1d(2, affine=False).double()
    init, x = {"z": torch.zeros(3, 2, dtype=F64)}, torch.ones(3, 2, dtype=F64)

    def layer(*modules: nn.Module) -> Callable[..., Any]:
        return lambda z, p, x: {"z": nn.Sequential(*modules)(torch.tanh(0.3 * z["z"] + p.sum() * x))}

    check_deterministic(layer(), THETA, x, init=init)
    check_deterministic(layer(dropout.eval(), norm.eval()), THETA, x, init=init)
    with pytest.raises(ValueError) as caught:
        check_deterministic(layer(dropout.train(), norm.train()), THETA, x, init=init)
    text = str(caught.value)
    assert "F or T changes from call to call, its value by up to" in text
    assert "its gradient in phi by up to" in text and "its gradient in theta by up to" in text
    assert "draws random numbers from torch (CPU). In training mode: Sequential.0 = Dropout" in text
    assert "changes buffers of modules: Sequential.1.num_batches_tracked, Sequential.1.running_mean" in text
    assert norm.num_batches_tracked == 0


def test_a_condition_whose_value_changes_while_its_sum_does_not() -> None:
    calls = iter(range(100))

    def swaps(z: Tensor, p: Tensor, data: Any) -> Tensor:
        shift = torch.tensor([1.0, -1.0, 0.0], dtype=F64).roll(next(calls))
        return 0 * z + p + shift  # sums without rounding

    with pytest.raises(ValueError, match="F or T changes from call to call, its value by up to"):
        check_deterministic(swaps, THETA, init=torch.zeros(3, dtype=F64))


@pytest.mark.parametrize(
    "function, error, words",
    [
        (
            lambda z, p, data: z.sum(),
            ValueError,
            r"F or T: expected torch.float64 \(3,\) like phi, got torch.float64 \(\)",
        ),
        (lambda z, p, data: z.detach() + p, ValueError, "F or T: expected a function of phi, but the graph shows no"),
        (lambda z, p: z, TypeError, r"problem: expected a function of \(phi, theta, data\), got one of \(z, p\)"),
        (
            ProximalProblem,
            TypeError,
            "expected a BilevelProblem, or a function of .* as for root and fixed_point, got Pro",
        ),
        (3, TypeError, "expected a BilevelProblem, or a function of .* as for root and fixed_point, got int"),
    ],
)
def test_wrong_conditions(function: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_deterministic(function, THETA, init=torch.zeros(3, dtype=F64))


def test_a_condition_needs_a_start() -> None:
    with pytest.raises(ValueError, match="init: expected a start, a tree like phi, got None"):
        check_deterministic(lambda z, p, data: z - p, THETA)


# ----------------------------------------------------------------------------------------------------------------------
# The cost of an ordinary call.

COUNT = """
import sys, torch, bilevel
from torch.nn.modules import module
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

calls = {"G": 0, "L": 0}

def G(phi, theta, data):
    calls["G"] += 1
    return ((phi - theta) ** 2 * data).sum() + (phi ** 4).sum()

def L(phi, theta, data):
    calls["L"] += 1
    return (phi * theta).sum()

problem = bilevel.BilevelProblem.from_functions(G, L, lambda theta, data: torch.zeros_like(theta))
theta, data = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
options = {"solver": GradientDescent(step_size=0.01, max_steps=5), "linsys": CG(max_steps=3)}

def count(call):
    calls.update(G=0, L=0)
    call()
    return dict(calls)

def with_argmin():
    own = theta.clone().requires_grad_()
    L(bilevel.argmin(problem, own, data, **options), own, data).backward()

def measured():
    return [
        count(lambda: bilevel.hypergradient(problem, theta, data, **options)),
        count(lambda: bilevel.hypergradient(problem, theta, torch.stack([data] * 7), batched=True, **options)),
        count(lambda: bilevel.solve(problem, theta, data, solver=options["solver"])),
        count(with_argmin),
    ]

first = measured()
assert "bilevel.testing" not in sys.modules
import bilevel.testing
assert not module._global_forward_pre_hooks and not module._global_forward_hooks
bilevel.testing.check_deterministic(problem, theta, data)
bilevel.testing.check_hypergradient(problem, theta, data, rtol=10.0, **options)
assert not module._global_forward_pre_hooks
assert measured() == first, (first, measured())
print(first)
"""


def test_neither_check_costs_an_ordinary_call_anything() -> None:
    """In a fresh interpreter: the calls of G and L are those of the method, before and after the tests are imported and used.

    The check for captured tensors is part of each of these calls, and walks a graph that is there anyway.
    """
    done = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True)
    # five steps and one linearisation, which has the gradient at the last point too; one L, also for seven tasks
    hypergradient = {"G": 5 + 1, "L": 1}
    # five steps and the residual; for argmin's backward one linearisation, and one derivative in theta and data
    assert eval(done.stdout) == [hypergradient, hypergradient, {"G": 5 + 1, "L": 0}, {"G": 6 + 2, "L": 1}]


def test_a_captured_tensor_is_found_on_the_first_evaluation() -> None:
    """So that what the test above counts has the check in it."""
    calls, hidden = [0], torch.ones(3, dtype=F64, requires_grad=True)

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        calls[0] += 1
        return quadratic(phi, theta, data) + (hidden * phi).sum()

    with pytest.raises(ValueError, match="inner_objective uses a tensor that carries a gradient"):
        bilevel.hypergradient(
            functions(inner), THETA, solver=GradientDescent(step_size=0.1, max_steps=5), linsys=CG(max_steps=2)
        )
    assert calls[0] == 1
