"""The border: every wrong argument is answered with what was expected, what came and what to do."""

from __future__ import annotations

import re
from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import (
    BilevelProblem,
    GaussNewton,
    Hessian,
    ProximalProblem,
    argmin,
    hypergradient,
    implicit_gradient,
    solve,
)
from bilevel.linsys import CG, Exact
from bilevel.solvers import GradientDescent, NewtonCG

F32, F64 = torch.float32, torch.float64
SOLVER, LINSYS = NewtonCG(max_steps=5, tol=1e-8), Exact()
ONES = torch.ones(2, dtype=F64)


def pull(phi: Tensor, theta: Any, data: Any) -> Tensor:
    return ((phi - ONES.to(phi)) ** 2).sum()


def problem(
    inner: Callable[..., Any] = pull, outer: Callable[..., Any] = pull, start: Callable[..., Any] | None = None
) -> BilevelProblem:
    return BilevelProblem.from_functions(inner, outer, start or (lambda theta, data: 0 * ONES))


def uses_theta(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    return ((phi - theta) ** 2).sum()


GOOD = problem(uses_theta)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "solve": lambda theta, data=None, problem=GOOD, **options: solve(problem, theta, data, solver=SOLVER, **options),
    "hypergradient": lambda theta, data=None, problem=GOOD, **options: hypergradient(
        problem, theta, data, **{"solver": SOLVER, "linsys": LINSYS, **options}
    ),
    "implicit_gradient": lambda theta, data=None, problem=GOOD, phi=ONES, **options: implicit_gradient(
        problem, phi, theta, data, **{"linsys": LINSYS, **options}
    ),
    "argmin": lambda theta, data=None, problem=GOOD, **options: argmin(
        problem, theta, data, **{"solver": SOLVER, "linsys": LINSYS, **options}
    ),
}
BATCHED = ["solve", "hypergradient", "implicit_gradient"]
STARTING = ["solve", "hypergradient", "argmin"]


def test_the_calls_of_this_file_work_with_right_arguments() -> None:
    assert torch.allclose(FUNCTIONS["solve"](ONES).unwrap(), ONES)
    assert torch.allclose(FUNCTIONS["hypergradient"](2 * ONES).unwrap(), 2 * ONES)
    assert torch.allclose(FUNCTIONS["implicit_gradient"](2 * ONES, phi=2 * ONES).unwrap(), 2 * ONES)
    assert torch.allclose(FUNCTIONS["argmin"](ONES), ONES)


# ----------------------------------------------------------------------------------------------------------------------
# problem, theta, data.


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wrong", [None, pull, BilevelProblem], ids=["None", "function", "class"])
def test_the_problem(name: str, wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=r"problem: expected a BilevelProblem, got \w+\. BilevelProblem.from_functions makes one"
    ):
        FUNCTIONS[name](ONES, problem=wrong)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("theta", "match"),
    [
        pytest.param(
            ONES.to(torch.complex128), "theta: expected float32 or float64, got torch.complex128", id="complex"
        ),
        pytest.param(ONES.half(), "theta: expected float32 or float64, got torch.float16", id="half"),
        pytest.param(ONES.bfloat16(), "theta: expected float32 or float64, got torch.bfloat16", id="bfloat16"),
        pytest.param(ONES.long(), "theta: expected float32 or float64, got torch.int64", id="int"),
        pytest.param(ONES.bool(), "theta: expected float32 or float64, got torch.bool", id="bool"),
        pytest.param(
            {"a": ONES, "b": [ONES.long()]},
            r"theta\['b'\]\[0\]: expected float32 or float64, got torch.int64",
            id="leaf",
        ),
        pytest.param(
            {"a": ONES, "b": ONES.float()},
            r"theta\['b'\]: expected one dtype for theta and phi, got torch.float32 beside torch.float64\. Convert",
            id="mixed",
        ),
        pytest.param(
            1.0,
            "theta: expected a tensor, got float. A tree is a tensor or nested dicts, lists and tuples of tensors",
            id="number",
        ),
        pytest.param(np.ones(2), "theta: expected a tensor, got ndarray", id="numpy"),
        pytest.param(None, "theta: expected a tensor, got NoneType", id="None"),
        pytest.param([ONES, {"x": None}], r"theta\[1\]\['x'\]: expected a tensor, got NoneType", id="None leaf"),
        pytest.param({}, "theta: expected at least one tensor, got an empty tree", id="empty dict"),
        pytest.param([(), {}], "theta: expected at least one tensor, got an empty tree", id="empty nest"),
        pytest.param(
            torch.nn.Linear(2, 2), r"theta: .*got Linear.*it is dict\(module.named_parameters\(\)\)", id="module"
        ),
        pytest.param(torch.nn.Linear(2, 2).parameters(), r"theta: .*got generator.*list\(\.\.\.\)", id="iterator"),
        pytest.param(torch.nn.ParameterDict(), r"theta: .*got ParameterDict.*dict\(\.\.\.\)", id="parameter dict"),
    ],
)
def test_theta(name: str, theta: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        FUNCTIONS[name](theta)
    assert caught.type is (ValueError if "empty" in match else TypeError)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("data", "match"),
    [
        pytest.param(
            np.ones(2),
            "data: expected tensors, None, numbers or strings, got ndarray. Convert arrays with torch.as_tensor",
            id="numpy",
        ),
        pytest.param(
            {"x": SimpleNamespace(y=ONES)}, r"data\['x'\]: .*of an object with fields hand over vars", id="object"
        ),
        pytest.param(UserDict(x=ONES), r"data: .*of a mapping hand over dict", id="mapping"),
        pytest.param(
            {"x": ONES, "y": [np.float64(1.0), {1, 2}]}, r"data\['y'\]\[1\]: expected tensors.*got set", id="set"
        ),
        pytest.param(
            (ONES, lambda: 0),
            r"data\[1\]: expected tensors.*got function.*keep other objects in the problem itself",
            id="function",
        ),
    ],
)
def test_data(name: str, data: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        FUNCTIONS[name](ONES, data)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_devices(name: str) -> None:
    """The meta device stands for a second one."""
    meta = torch.ones(2, dtype=F64, device="meta")
    with pytest.raises(
        ValueError, match=r"theta\['b'\]: expected one device, got meta beside cpu. Move everything with .to\(device\)"
    ):
        FUNCTIONS[name]({"a": ONES, "b": meta})
    with pytest.raises(
        ValueError,
        match=r"data\['x'\]: expected one device, got meta beside theta on cpu. Move everything with .to\(device\)",
    ):
        FUNCTIONS[name](ONES, {"x": meta})
    if name in STARTING:
        with pytest.raises(ValueError, match="init: expected one device, got meta beside cpu"):
            FUNCTIONS[name](ONES, init=meta)
        with pytest.raises(ValueError, match="initial_phi: expected one device, got meta beside cpu"):
            FUNCTIONS[name](ONES, problem=problem(start=lambda theta, data: meta))


def test_trees_of_many_kinds_are_theta() -> None:
    """Ordered dicts, keys of several types, nested lists; a leaf without entries."""
    theta = OrderedDict([("w", ONES), (3, [torch.ones((), dtype=F64), ()]), ("none", torch.ones(0, 4, dtype=F64))])
    inner = lambda phi, theta, data: ((phi - theta["w"] * theta[3][0]) ** 2).sum() + phi.sum() * theta["none"].sum()  # noqa: E731
    got = FUNCTIONS["hypergradient"](theta, problem=problem(inner, lambda phi, theta, data: phi.sum()))
    assert list(got.grad) == ["w", 3, "none"]
    torch.testing.assert_close(got.grad["w"], ONES)
    torch.testing.assert_close(got.grad[3][0], torch.tensor(2.0, dtype=F64))
    assert got.grad["none"].shape == (0, 4)


# ----------------------------------------------------------------------------------------------------------------------
# The start, or the point that is handed in.


@pytest.mark.parametrize("name", STARTING)
def test_no_start(name: str) -> None:
    without = BilevelProblem.from_functions(uses_theta, pull)
    with pytest.raises(
        ValueError,
        match=r"initial_phi: this problem was made without one, .* Pass init=, a tree like phi, to the call; or initial_phi=, a function",
    ):
        FUNCTIONS[name](ONES, problem=without)
    FUNCTIONS[name](ONES, problem=without, init=ONES)


@pytest.mark.parametrize("name", STARTING)
@pytest.mark.parametrize(
    ("start", "error", "match"),
    [
        pytest.param(np.zeros(2), TypeError, "expected a tensor, got ndarray", id="numpy"),
        pytest.param(0.0, TypeError, "expected a tensor, got float", id="number"),
        pytest.param({}, ValueError, "expected at least one tensor, got an empty tree", id="empty"),
        pytest.param(ONES.long(), TypeError, "expected float32 or float64, got torch.int64", id="int"),
        pytest.param(
            ONES.float(),
            TypeError,
            r"got torch.float32 beside torch.float64 of theta\. Convert one of them with \.to\(dtype\)\.",
            id="float32",
        ),
        pytest.param([ONES, ONES.float()], TypeError, "expected one dtype for theta and phi", id="mixed"),
    ],
)
def test_the_start(name: str, start: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"init.*{match}"):
        FUNCTIONS[name](ONES, init=start)
    with pytest.raises(error, match=f"initial_phi.*{match}"):
        FUNCTIONS[name](ONES, problem=problem(start=lambda theta, data: start))
    with pytest.raises(error, match=f"phi.*{match}"):
        FUNCTIONS["implicit_gradient"](ONES, phi=start)


# ----------------------------------------------------------------------------------------------------------------------
# Batches.


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(
    ("data", "match"),
    [
        pytest.param(
            {"x": torch.ones(3, 2), "y": torch.ones(4, 2)},
            r"data\['y'\]: expected 3 tasks along the first axis like data\['x'\], got 4",
            id="count",
        ),
        pytest.param(
            {"x": torch.ones(3, 2), "y": torch.ones(())},
            r"data\['y'\]: expected a leading task axis \(batched=True\), got a 0-d tensor. Expand it",
            id="0-d",
        ),
        pytest.param(torch.ones(0, 2), "data: expected at least one task, got an empty task axis", id="empty"),
        pytest.param(
            None,
            r"batched=True: expected at least one tensor with a leading task axis in data \(or theta_batched=True\), got none",
            id="none",
        ),
        pytest.param(
            {"k": 3, "s": "x"},
            "batched=True: expected at least one tensor with a leading task axis in data",
            id="static",
        ),
        pytest.param(
            (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)),
            r"data\[1\]: expected 3 tasks along the first axis like data\[0\], got 2",
            id="labels",
        ),
    ],
)
def test_the_task_axis_of_data(name: str, data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FUNCTIONS[name](
            ONES, data, batched=True, **({"phi": torch.ones(3, 2, dtype=F64)} if name == "implicit_gradient" else {})
        )


@pytest.mark.parametrize("name", BATCHED)
def test_the_task_axis_of_theta(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"theta_batched=True needs batched=True: it says that theta has the task axis of the batch"
    ):
        FUNCTIONS[name](torch.ones(3, 2, dtype=F64), torch.ones(3), theta_batched=True)
    with pytest.raises(ValueError, match=r"data\['x'\]: expected 4 tasks along the first axis like theta, got 3"):
        FUNCTIONS[name](torch.ones(4, 2, dtype=F64), {"x": torch.ones(3)}, batched=True, theta_batched=True)
    with pytest.raises(
        ValueError, match=r"theta\['b'\]: expected a leading task axis \(batched=True\), got a 0-d tensor"
    ):
        FUNCTIONS[name](
            {"a": torch.ones(4, 2, dtype=F64), "b": torch.ones((), dtype=F64)}, batched=True, theta_batched=True
        )


def test_the_task_axis_of_the_start_and_of_phi() -> None:
    data = torch.ones(3, 2, dtype=F64)
    for start in (ONES, torch.ones(2, 2, dtype=F64), torch.ones((), dtype=F64)):
        for name in ("solve", "hypergradient"):
            with pytest.raises(
                ValueError,
                match=rf"init: expected a leading task axis of 3, got shape {re.escape(str(tuple(start.shape)))}",
            ):
                FUNCTIONS[name](ONES, data, batched=True, init=start)
        with pytest.raises(ValueError, match="phi: expected a leading task axis of 3, got shape"):
            FUNCTIONS["implicit_gradient"](ONES, data, batched=True, phi=start)
    with pytest.raises(ValueError, match=r"init\['b'\]: expected a leading task axis of 3"):
        FUNCTIONS["solve"](ONES, data, batched=True, init={"a": torch.ones(3, 2, dtype=F64), "b": ONES})


def test_argmin_has_no_batched() -> None:
    with pytest.raises(TypeError, match="batched"):
        FUNCTIONS["argmin"](ONES, torch.ones(3, 2), batched=True)


# ----------------------------------------------------------------------------------------------------------------------
# What the user's functions return.

NOT_SCALAR = [
    pytest.param(
        lambda phi: phi**2,
        "expected a 0-d tensor, got shape (2,). Reduce it, for example with .sum() or .mean()",
        id="vector",
    ),
    pytest.param(lambda phi: (phi**2).sum()[None], "expected a 0-d tensor, got shape (1,)", id="one entry"),
    pytest.param(lambda phi: 1.0, "expected a 0-d tensor, got float", id="number"),
    pytest.param(lambda phi: None, "expected a 0-d tensor, got NoneType", id="forgotten return"),
    pytest.param(lambda phi: (phi.sum(), {}), "expected a 0-d tensor, got tuple", id="with extras"),
    pytest.param(
        lambda phi: (phi**2).sum().float(),
        "expected torch.float64 like phi, got torch.float32. Convert the data to the dtype of theta",
        id="float32",
    ),
    pytest.param(lambda phi: (phi > 0).sum(), "expected torch.float64 like phi, got torch.int64", id="int"),
]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("wrong", "match"), NOT_SCALAR)
def test_the_inner_objective_returns_a_scalar(
    name: str, wrong: Callable[[Tensor], Any], match: str, batched: bool
) -> None:
    if batched and name == "argmin":
        return
    options: dict[str, Any] = {"batched": True} if batched else {}
    if batched and name == "implicit_gradient":
        options["phi"] = torch.ones(3, 2, dtype=F64)
    with pytest.raises(ValueError, match=re.escape(f"inner_objective: {match}")):
        FUNCTIONS[name](
            ONES, torch.ones(3, 2, dtype=F64), problem=problem(lambda phi, theta, data: wrong(phi)), **options
        )


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["hypergradient", "implicit_gradient"])
@pytest.mark.parametrize(("wrong", "match"), NOT_SCALAR)
def test_the_outer_loss_returns_a_scalar(name: str, wrong: Callable[[Tensor], Any], match: str, batched: bool) -> None:
    options: dict[str, Any] = {"batched": True} if batched else {}
    if batched and name == "implicit_gradient":
        options["phi"] = torch.ones(3, 2, dtype=F64)
    with pytest.raises(ValueError, match=re.escape(f"outer_loss: {match}")):
        FUNCTIONS[name](
            ONES,
            torch.ones(3, 2, dtype=F64),
            problem=problem(uses_theta, lambda phi, theta, data: wrong(phi)),
            **options,
        )


def test_the_objective_under_a_transform_returns_a_scalar() -> None:
    bad = problem(lambda phi, theta, data: (phi - theta) ** 2)
    for transform in (torch.func.grad, torch.func.jacfwd, lambda f: lambda x: torch.func.vmap(f)(x[None])):
        with pytest.raises(ValueError, match=r"inner_objective: expected a 0-d tensor, got shape \(2,\)"):
            transform(lambda theta: argmin(bad, theta, solver=SOLVER, linsys=LINSYS).sum())(ONES)


def test_float32_data_beside_a_float64_theta() -> None:
    """Promotion gives float64, which is right; where the objective comes out in float32 the message says what to convert."""
    data = torch.ones(2, dtype=F32)
    fine = problem(lambda phi, theta, data: ((phi - theta * data) ** 2).sum(), pull)
    assert FUNCTIONS["hypergradient"](ONES, data, problem=fine).grad.dtype == F64
    wider = problem(
        lambda phi, theta, data: ((phi - theta * data) ** 2).sum(), pull, lambda theta, data: torch.zeros(2)
    )
    with pytest.raises(
        ValueError,
        match="inner_objective: expected torch.float32 like phi, got torch.float64. Convert the data to the dtype of theta",
    ):
        FUNCTIONS["hypergradient"](ONES.float(), data.double(), problem=wider)


def test_the_parts_of_a_model() -> None:
    def call(predict: Callable[..., Any], output_loss: Callable[..., Any]) -> None:
        model = ProximalProblem.from_model(predict, output_loss, lambda phi, data: phi.sum(), 1.0)
        FUNCTIONS["hypergradient"](ONES, problem=model, curvature=GaussNewton())

    with pytest.raises(
        TypeError, match=r"predict: expected one tensor, got tuple. GaussNewton\(\) needs a single tensor of outputs"
    ):
        call(lambda phi, data: (phi, phi), lambda outputs, data: (outputs[0] ** 2).sum())
    with pytest.raises(ValueError, match=r"inner_objective|output_loss: expected a 0-d tensor"):
        call(lambda phi, data: phi, lambda outputs, data: outputs**2)


# ----------------------------------------------------------------------------------------------------------------------
# Methods and options.


@pytest.mark.parametrize("name", STARTING)
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        pytest.param(
            NewtonCG,
            r"solver: expected an inner solver such as GradientDescent\(step_size=0.1, max_steps=100\).*Did you mean NewtonCG\(...\)\?",
            id="class",
        ),
        pytest.param("newton-cg", "solver: expected an inner solver such as", id="string"),
        pytest.param(None, "solver: expected an inner solver such as", id="None"),
        pytest.param(Exact(), r"solver: expected an inner solver such as.*got Exact\(\)", id="linear solver"),
        pytest.param(
            lambda problem, theta, data, init: init, "solver: expected an inner solver such as", id="function"
        ),
    ],
)
def test_the_solver(name: str, wrong: Any, match: str) -> None:
    call = {
        "solve": lambda: solve(problem(uses_theta), ONES, solver=wrong),
        "hypergradient": lambda: hypergradient(problem(uses_theta), ONES, solver=wrong, linsys=LINSYS),
        "argmin": lambda: argmin(problem(uses_theta), ONES, solver=wrong, linsys=LINSYS),
    }[name]
    with pytest.raises(TypeError, match=match):
        call()


@pytest.mark.parametrize("name", ["hypergradient", "implicit_gradient", "argmin"])
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        pytest.param(
            CG, r"linsys: expected a linear solver such as CG\(max_steps=20\).*Did you mean CG\(...\)\?", id="class"
        ),
        pytest.param("cg", "linsys: expected a linear solver such as", id="string"),
        pytest.param(None, "linsys: expected a linear solver such as", id="None"),
        pytest.param(
            GradientDescent(step_size=0.1, max_steps=2),
            "linsys: expected a linear solver such as.*got GradientDescent",
            id="inner solver",
        ),
    ],
)
def test_the_linear_solver(name: str, wrong: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        FUNCTIONS[name](ONES, linsys=wrong)


@pytest.mark.parametrize("name", ["hypergradient", "implicit_gradient"])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        pytest.param(
            {"curvature": Hessian},
            TypeError,
            r"curvature: expected Hessian\(\) or GaussNewton\(\), got",
            id="curvature class",
        ),
        pytest.param(
            {"curvature": "hessian"},
            TypeError,
            r"curvature: expected Hessian\(\) or GaussNewton\(\), got 'hessian'",
            id="curvature string",
        ),
        pytest.param(
            {"damping": -0.1}, ValueError, "damping: expected a finite number >= 0, got -0.1", id="negative damping"
        ),
        pytest.param(
            {"damping": float("nan")}, ValueError, "damping: expected a finite number >= 0, got nan", id="nan damping"
        ),
        pytest.param(
            {"damping": float("inf")},
            ValueError,
            "damping: expected a finite number >= 0, got inf",
            id="infinite damping",
        ),
        pytest.param({"damping": "0.1"}, TypeError, "damping: expected a number, got str", id="damping string"),
        pytest.param({"damping": True}, TypeError, "damping: expected a number, got bool", id="damping bool"),
        pytest.param(
            {"reduction": "avg"}, ValueError, 'reduction: expected "mean", "sum" or "none", got \'avg\'', id="reduction"
        ),
        pytest.param(
            {"reduction": None},
            ValueError,
            'reduction: expected "mean", "sum" or "none", got None',
            id="reduction None",
        ),
        pytest.param({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0", id="chunk 0"),
        pytest.param(
            {"chunk_size": 1.5}, TypeError, "chunk_size: expected an integer, got float 1.5", id="chunk float"
        ),
        pytest.param({"chunk_size": True}, TypeError, "chunk_size: expected an integer, got bool", id="chunk bool"),
        pytest.param({"allow_unsued": True}, TypeError, "allow_unsued", id="misspelt"),
    ],
)
def test_options(name: str, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        FUNCTIONS[name](ONES, **options)


def test_a_misspelt_field_of_a_method_fails_at_once() -> None:
    with pytest.raises(TypeError, match="max_step"):
        CG(max_step=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        CG(3)  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------------------------------
# Modes.


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inference_mode_changes_nothing(name: str) -> None:
    """A trained network with an implicit layer is served in it. What comes out carries no graph, as under no_grad."""
    outside = FUNCTIONS[name](torch.full((2,), 2.0, dtype=F64))
    with torch.inference_mode():
        found = FUNCTIONS[name](torch.full((2,), 2.0, dtype=F64).requires_grad_())
    expected, got = (x if isinstance(x, Tensor) else x.unwrap() for x in (outside, found))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not got.requires_grad and not got.is_inference()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_inference_mode_around_a_transform_says_what_to_use(transform: Any) -> None:
    def loss(theta: Tensor) -> Tensor:
        return FUNCTIONS["argmin"](theta).sum()

    theta = torch.full((2,), 2.0, dtype=F64)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"^argmin: torch.inference_mode\(\) is on .*torch.no_grad\(\)"),
    ):
        transform(loss)(theta.clone())
    with torch.no_grad():
        torch.testing.assert_close(transform(loss)(theta), torch.ones(2, dtype=F64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_grad_changes_nothing(name: str) -> None:
    def value() -> Tensor:
        got = FUNCTIONS[name](2 * ONES)
        return got if isinstance(got, Tensor) else got.unwrap()

    with torch.no_grad():
        inside = value()
    assert torch.equal(inside, value())
    assert torch.is_grad_enabled()


def test_nan_in_theta_is_a_failed_result_and_no_endless_loop() -> None:
    theta = torch.tensor([1.0, torch.nan], dtype=F64)
    for solver in (
        GradientDescent(step_size=0.1, max_steps=50, tol=1e-6),
        GradientDescent(step_size=None, max_steps=50),
        SOLVER,
    ):
        got = hypergradient(problem(uses_theta), theta, solver=solver, linsys=CG(max_steps=5))
        assert got.ok is False and got.grad.isnan().all()
        assert got.inner.status.failed


@pytest.mark.parametrize("which", ["inner_objective", "outer_loss"])
@pytest.mark.parametrize("options", [{}, {"batched": True}, {"compile": True}], ids=str)
def test_functions_that_write_to_phi(which: str, options: dict[str, Any]) -> None:
    """Their values and derivatives would be those of another point than the solver asked for. The start stays the caller's."""

    def projected(phi: Tensor, theta: Any, data: Any) -> Tensor:
        with torch.no_grad():
            phi.clamp_(min=0)
        return pull(phi, theta, data) + 0 * theta.sum()

    wrong = problem(projected) if which == "inner_objective" else problem(uses_theta, projected)
    batched = "batched" in options
    start = torch.full((3, 2) if batched else (2,), -0.5, dtype=F64)
    with pytest.raises(ValueError, match=f"{which} writes to phi in place.*work on a clone"):
        hypergradient(
            wrong, ONES, torch.zeros(3, 1) if batched else None, solver=SOLVER, linsys=LINSYS, init=start, **options
        )
    assert bool((start == -0.5).all())


def test_words_for_what_people_hand_over_by_mistake() -> None:
    problem = BilevelProblem.from_functions(uses_theta, pull)
    options = {"solver": NewtonCG(max_steps=3), "linsys": CG(max_steps=3), "init": ONES}
    with pytest.raises(
        TypeError, match=r"torch.int64; buffers are no part of theta: dict\(module.named_parameters\(\)\)"
    ):
        bilevel.hypergradient(problem, {"1.num_batches_tracked": torch.zeros((), dtype=torch.int64)}, **options)
    tasks = [{"x": torch.ones(10, 2), "y": torch.ones(20, 2)}, {"x": torch.ones(10, 2), "y": torch.ones(20, 2)}]
    with pytest.raises(ValueError, match="expected 10 tasks .* A list of tasks[?] Stack their tensors"):
        bilevel.hypergradient(problem, ONES, tasks, batched=True, **options)
    constant = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta["a"]).square().sum() + theta["b"], lambda phi, theta, data: phi.sum()
    )
    theta = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones((), dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"theta\['b'\]: .* a constant in phi, as the last bias of an energy does"):
        bilevel.hypergradient(constant, theta, **options)
