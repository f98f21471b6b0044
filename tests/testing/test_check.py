"""check_hypergradient against closed forms, planted faults and problems that have no answer.

That a fault is found is half of it: the part must be named, and the numbers in the report must be the true errors.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import bilevel
from bilevel import BilevelProblem, GaussNewton, ProximalProblem
from bilevel.linsys import CG, Exact, Identity
from bilevel.solvers import BlackBox, GradientDescent, NewtonCG
from bilevel.testing import CheckFailed, Verdict, check_hypergradient
from bilevel.trees import flatten
from tests import cases
from tests.testing import planted
from tests.testing.planted import (
    by_hand,
    constant_backward,
    detached,
    negative,
    right,
    right_then,
    wrong_sign,
    wrong_transpose,
)

F64, F32 = torch.float64, torch.float32
DTYPES = [F64, F32]


def accurate(dtype: torch.dtype) -> dict[str, Any]:
    """Solvers that are good enough in this precision."""
    tol, rtol = (1e-9, 1e-9) if dtype == F64 else (1e-4, 1e-6)
    return {"solver": NewtonCG(max_steps=50, cg_steps=20, tol=tol), "linsys": CG(max_steps=60, rtol=rtol)}


def check(
    dtype: torch.dtype = F64, places: dict[str, planted.Map] | None = None, **options: Any
) -> bilevel.testing.Report:
    """The planted problem."""
    theta, data = planted.cast(planted.make_theta(), dtype), planted.cast(planted.make_data(), dtype)
    return check_hypergradient(planted.problem(**places or {}), theta, data, **{**accurate(dtype), **options})


def vector(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree)[0]])


def failure(*args: Any, **options: Any) -> str:
    """The report of a check that must fail."""
    with pytest.raises(AssertionError) as caught:
        check(*args, **options)
    return str(caught.value)


def at_fault(text: str) -> str:
    return text.splitlines()[0].removeprefix("check_hypergradient FAILED, at fault: ")


# ----------------------------------------------------------------------------------------------------------------------
# What is right passes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.PROBLEMS, ids=lambda case: case.name)
def test_problems_with_a_closed_form_pass(case: cases.Case, dtype: torch.dtype) -> None:
    case = case.to(dtype)
    report = check_hypergradient(case.problem, case.theta, case.data, **accurate(dtype))
    assert report.ok and str(report).startswith("check_hypergradient passed\n")
    assert report["hypergradient"].error < (1e-8 if dtype == F64 else 1e-4)
    # the references are in float64 in both
    assert max(part.error for part in report.parts[:7]) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [by_hand(right), right_then(planted.product)], ids=["first order", "second order"])
def test_rules_by_hand_that_are_right_pass(rule: planted.Map, dtype: torch.dtype) -> None:
    places = dict.fromkeys(["phi_in_G", "theta_in_G", "phi_in_L", "theta_in_L"], rule)
    assert check(dtype, places).ok


def ill_conditioned(kappa: float, dtype: torch.dtype, seed: int, **options: Any) -> bilevel.testing.Report:
    """A quadratic problem with this condition number; the linear solver is as good as its precision."""
    q = torch.linalg.qr(planted.normal(seed, 8, 8)).Q
    spectrum = torch.tensor([kappa ** (-k / 7) for k in range(8)], dtype=F64)
    data = planted.cast((q @ torch.diag(spectrum) @ q.T, planted.normal(2, 8, 3)), dtype)
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * phi @ (data[0] @ phi) - phi @ (data[1] @ theta.exp()),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(data[0][0]),
    )
    solver = NewtonCG(max_steps=50, cg_steps=50, tol=1e-9 if dtype == F64 else 1e-5)
    return check_hypergradient(problem, torch.zeros(3, dtype=dtype), data, solver=solver, linsys=Exact(), **options)


@pytest.mark.parametrize(("kappa", "dtype"), [(1e3, F64), (1e6, F64), (1e10, F64), (1e3, F32), (1e6, F32)])
def test_an_ill_conditioned_problem_is_judged_by_what_its_precision_can_do(kappa: float, dtype: torch.dtype) -> None:
    report = ill_conditioned(kappa, dtype, seed=3)
    expected = max(1e-5 if dtype == F64 else 1e-3, min(16 * torch.finfo(dtype).eps * kappa, 0.1))
    assert report.rtol == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("kappa", "seed"), [(1e8, 10), (1e10, 9)])
def test_the_rounding_of_the_solved_problem_is_counted_as_uncertainty(kappa: float, seed: int) -> None:
    """Even where less is allowed than can be had, the solves may be at fault for it, but not the formula."""
    with pytest.raises(AssertionError) as caught:
        ill_conditioned(kappa, F64, seed, rtol=1e-12)
    assert "implicit formula" not in at_fault(str(caught.value))


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong is found, and named.

FAULTS = [
    ("inner solve", {}, {"solver": GradientDescent(step_size=0.02, max_steps=20)}),
    ("linear solve", {}, {"linsys": CG(max_steps=2)}),
    ("dG/dphi", {"phi_in_G": detached}, {}),
    ("dG/dphi", {"phi_in_G": by_hand(wrong_transpose)}, {}),
    ("dG/dphi", {"phi_in_G": by_hand(wrong_sign)}, {}),
    ("d2G/dphi2", {"phi_in_G": right_then(right)}, {}),
    ("d2G/dphi2", {"phi_in_G": right_then(negative)}, {}),
    ("d2G/dphi2", {"phi_in_G": constant_backward}, {}),
    ("d2G/dphi dtheta", {"theta_in_G": detached}, {}),
    ("d2G/dphi dtheta", {"theta_in_G": by_hand(wrong_transpose)}, {}),
    ("d2G/dphi dtheta", {"theta_in_G": by_hand(wrong_sign)}, {}),
    ("dL/dphi", {"phi_in_L": detached}, {}),
    ("dL/dphi", {"phi_in_L": by_hand(wrong_transpose)}, {}),
    ("dL/dphi", {"phi_in_L": by_hand(wrong_sign)}, {}),
    ("dL/dtheta", {"theta_in_L": detached}, {}),
    ("dL/dtheta", {"theta_in_L": by_hand(wrong_transpose)}, {}),
    ("dL/dtheta", {"theta_in_L": by_hand(wrong_sign)}, {}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("part", "places", "options"), FAULTS)
def test_each_planted_fault_is_found_and_nothing_else_is_named(
    part: str, places: dict[str, planted.Map], options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert at_fault(failure(dtype, places, **options)) == part


def test_two_faults_are_both_named() -> None:
    text = failure(F64, {"theta_in_L": detached}, linsys=CG(max_steps=2))
    assert at_fault(text) == "dL/dtheta, linear solve"


def test_a_hessian_that_is_not_symmetric_is_called_so() -> None:
    assert "not symmetric" in failure(F64, {"phi_in_G": right_then(right)})
    assert "not symmetric" not in failure(F64, {"phi_in_G": constant_backward})


def test_the_leaf_at_fault_is_named() -> None:
    data = planted.make_data()
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: phi["w"].square().sum() + phi["b"].pow(4).sum() - (phi["w"][0] * theta).sum(),
        lambda phi, theta, data: phi["w"].sum() * phi["b"].detach().exp().sum(),
        lambda theta, data: {"w": theta.new_ones(2, 2), "b": theta.new_ones(2)},
    )
    with pytest.raises(AssertionError, match=r"dL/dphi: largest in phi\['b'\]; .* Look in outer_loss"):
        check_hypergradient(problem, data["target"][:2], **accurate(F64))


def test_a_fault_that_cannot_be_seen_at_the_solution_is_found_beside_it() -> None:
    """Start and solution are 0, where the gradient of phi^2 is zero, and so is half of it."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta).square().sum() + (phi * phi.detach()).sum(),
        lambda phi, theta, data: (phi - 1).square().sum(),
    )
    zero = torch.zeros(3, dtype=F64)
    with pytest.raises(AssertionError, match="at fault: dG/dphi\n"):
        check_hypergradient(problem, zero, init=zero, **accurate(F64))


def test_a_linear_solver_with_a_sign_error_is_named() -> None:
    class Negated(CG):
        def solve(self, *args: Any, **kwargs: Any) -> bilevel.Result:
            found = super().solve(*args, **kwargs)
            return bilevel.Result(value=-found.value, codes=found.codes, steps=found.steps, residual=found.residual)

    assert at_fault(failure(linsys=Negated(max_steps=60, rtol=1e-9))) == "linear solve"


def test_code_that_does_something_else_in_float32_is_found() -> None:
    def sine(matrix: Tensor, t: Tensor) -> Tensor:
        return matrix @ (t.detach() if t.dtype == F32 else t)

    assert check(F64, {"theta_in_L": sine}).ok
    text = failure(F32, {"theta_in_L": sine})
    assert at_fault(text) == "arithmetic" and "something else in float32" in text


@pytest.mark.parametrize("steps", [1, 3])
def test_the_errors_in_the_report_are_the_true_ones(steps: int) -> None:
    """Truncated solves of the ridge problem; the oracle is its closed form and dense algebra."""
    case = cases.ridge()
    exact = torch.func.grad(lambda theta: case.outer(theta, case.data))(case.theta)
    x, _ = case.data["train"]
    xv, yv = case.data["valid"]

    def formula(phi: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dtheta and C^T u at phi."""
        u = torch.linalg.solve(x.T @ x + case.theta.exp().diag(), xv.T @ (xv @ phi - yv))
        return 0.3 * case.theta**2, case.theta.exp() * phi * u

    solver, linsys = GradientDescent(step_size=1 / 30, max_steps=10 * steps), CG(max_steps=steps)
    answer = bilevel.hypergradient(case.problem, case.theta, case.data, solver=solver, linsys=linsys)
    direct, through = formula(case.phi_star(case.theta, case.data))
    torch.testing.assert_close(direct - through, exact)
    here, scale = formula(answer.phi), max(direct.norm(), through.norm())
    report = check_hypergradient(case.problem, case.theta, case.data, solver=solver, linsys=linsys, rtol=10.0)
    expected = {
        "hypergradient": (answer.grad - exact).norm() / scale,
        "inner solve": (here[0] - here[1] - exact).norm() / scale,
        "linear solve": (answer.grad - (here[0] - here[1])).norm() / scale,
    }
    for name, error in expected.items():
        assert report[name].error == pytest.approx(float(error), rel=1e-5, abs=1e-9), name


def test_a_truncated_solve_is_at_fault_only_above_rtol() -> None:
    report = check(linsys=CG(max_steps=4), rtol=0.9)
    assert report.ok
    error = report["linear solve"].error
    assert error > 1e-4
    assert check(linsys=CG(max_steps=4), rtol=max(1.01 * error, 1.01 * report["hypergradient"].error)).ok
    assert "linear solve" in at_fault(failure(linsys=CG(max_steps=4), rtol=0.9 * error))


def test_small_errors_that_add_up_are_the_fault_of_the_largest() -> None:
    options = {"solver": GradientDescent(step_size=0.05, max_steps=60), "linsys": CG(max_steps=4)}
    report = check(**options, rtol=10.0)
    parts, whole = [report["inner solve"].error, report["linear solve"].error], report["hypergradient"].error
    assert whole > 1.01 * max(parts)  # the errors point the same way in this problem
    text = failure(**options, rtol=0.5 * (whole + max(parts)))
    assert at_fault(text) == ("inner solve" if parts[0] > parts[1] else "linear solve") and "add up" in text


# ----------------------------------------------------------------------------------------------------------------------
# The references, and where there are none.


def captured(detach: bool = False) -> BilevelProblem:
    """A ridge problem that holds float32 tensors, so that it cannot run in float64."""
    x, y, xv = (planted.normal(k, *shape).float() for k, shape in ((1, (20, 5)), (2, (20,)), (3, (20, 5))))

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        penalty = phi * (phi.detach() if detach else phi)
        return 0.5 * (x @ phi - y).square().sum() + 0.5 * (theta.exp() * penalty).sum()

    return BilevelProblem.from_functions(
        inner, lambda phi, theta, data: (xv @ phi).square().sum(), lambda theta, data: 0 * theta
    )


def test_a_problem_that_cannot_run_in_float64_is_checked_in_float32() -> None:
    theta, options = torch.zeros(5), {"solver": NewtonCG(max_steps=20, tol=1e-4), "linsys": CG(max_steps=20)}
    report = check_hypergradient(captured(), theta, **options)
    assert "cannot be evaluated in float64" in str(report) and "references in float32" in str(report)
    assert report["implicit formula"].tolerance > report.rtol  # the differences are less certain, and say so
    with pytest.raises(AssertionError, match="at fault: linear solve\n"):
        check_hypergradient(captured(), theta, **{**options, "linsys": CG(max_steps=1)})
    with pytest.raises(AssertionError, match="at fault: dG/dphi\n"):
        check_hypergradient(captured(detach=True), theta, **options)


def model(seed: int = 0) -> tuple[ProximalProblem, Any, Any]:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    theta = {name: planted.normal(seed + k, *p.shape) for k, (name, p) in enumerate(net.named_parameters())}
    x = planted.normal(99, 12, 2)
    problem = ProximalProblem.from_model(
        lambda phi, data: functional_call(net, phi, (data["x"],)),
        lambda output, data: (output - data["y"]).square().sum(),
        lambda phi, data: functional_call(net, phi, (data["x"] + 0.3,)).square().sum(),
        lam=1.0,
    )
    return problem, theta, {"x": x, "y": x.prod(1, keepdim=True)}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"curvature": GaussNewton()}, r"GaussNewton\(\)"),
        ({"damping": 0.5}, r"damping=0\.5"),
        ({"curvature": GaussNewton(), "damping": 0.5}, r"GaussNewton\(\) and damping=0\.5"),
        ({"linsys": Identity()}, r"Identity\(\)"),
    ],
)
def test_a_bias_by_choice_is_measured_and_is_no_fault(options: dict[str, Any], what: str) -> None:
    """The oracle for its size: dense matrices at the solution; C = -I, so that the gradient is K^{-1} dL/dphi."""
    problem, theta, data = model()
    report = check_hypergradient(problem, theta, data, **{**accurate(F64), **options})
    assert report.ok and report["curvature"].verdict is report["hypergradient"].verdict is Verdict.CHOICE
    assert report["linear solve"].error < 1e-6
    solution = bilevel.solve(problem, theta, data, solver=accurate(F64)["solver"]).value
    leaves, structure = flatten(solution)
    phi, sizes = vector(solution), [leaf.numel() for leaf in leaves]

    def tree(x: Tensor) -> Any:
        parts = [part.reshape(leaf.shape) for part, leaf in zip(x.split(sizes), leaves, strict=True)]
        return bilevel.trees.unflatten(structure, parts)

    eye = torch.eye(len(phi), dtype=F64)
    hessian = eye + torch.func.hessian(lambda x: problem.train_loss(tree(x), data))(phi)
    jacobian = torch.func.jacrev(lambda x: problem.composition.predict(tree(x), theta, data).reshape(-1))(phi)
    matrix = eye + 2 * jacobian.T @ jacobian if "curvature" in options else eye if "linsys" in options else hessian
    matrix = matrix + options.get("damping", 0.0) * eye
    b = torch.func.grad(lambda x: problem.test_loss(tree(x), data))(phi)
    exact, biased = torch.linalg.solve(hessian, b), torch.linalg.solve(matrix, b)
    assert report["curvature"].error == pytest.approx(float((biased - exact).norm() / exact.norm()), rel=1e-6)
    with pytest.raises(AssertionError) as caught:
        check_hypergradient(
            problem, theta, data, **{**accurate(F64), **options, "solver": GradientDescent(step_size=1e-3, max_steps=3)}
        )
    assert at_fault(str(caught.value)) == "inner solve"
    assert re.search(f"curvature: {what}", str(report))


def test_a_linear_solve_with_gauss_newton_that_stops_early_is_found() -> None:
    problem, theta, data = model()
    with pytest.raises(AssertionError, match="at fault: linear solve\n"):
        check_hypergradient(
            problem, theta, data, **{**accurate(F64), "linsys": CG(max_steps=1)}, curvature=GaussNewton()
        )


COSINE = BilevelProblem.from_functions(
    lambda phi, theta, data: (-phi.cos() + theta * phi).sum(), lambda phi, theta, data: phi.square().sum()
)


def cosine(solution: Any, linsys: Any, start: float) -> bilevel.testing.Report:
    """-cos(phi) + theta phi: minima at -asin(theta) + 2 pi k, maxima between them."""
    solver = BlackBox(lambda problem, theta, data, init: solution(theta.asin()), tol=1e-8)
    theta, init = torch.tensor([0.1], dtype=F64), torch.tensor([start], dtype=F64)
    return check_hypergradient(COSINE, theta, init=init, solver=solver, linsys=linsys)


def test_another_minimum_is_judged_for_itself_and_noted() -> None:
    report = cosine(lambda asin: 2 * torch.pi - asin, CG(max_steps=5), 0.5)
    assert report.ok and "several minima" in str(report) and "G = -1.005" in str(report)
    assert not cosine(lambda asin: -asin, CG(max_steps=5), 0.5).notes


@pytest.mark.parametrize("linsys", [Exact(), CG(max_steps=5)], ids=["Exact", "CG"])
def test_a_maximum_is_no_minimum(linsys: Any) -> None:
    with pytest.raises(AssertionError, match="near no minimum") as caught:
        cosine(lambda asin: torch.pi + asin, linsys, 3.1)
    assert at_fault(str(caught.value)) == "inner solve"


def test_a_descent_from_a_region_of_negative_curvature_finds_the_minimum() -> None:
    """At 2 the curvature is cos(2) < 0: plain Newton steps would go up to the maximum beside it."""
    with pytest.raises(AssertionError) as caught:
        cosine(lambda asin: 2.0 + 0 * asin, CG(max_steps=5), 0.5)
    assert at_fault(str(caught.value)) == "inner solve"
    assert "phi is 2.1e+00 away from the minimum (|phi*| = 1.0e-01)" in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (lambda phi, theta, data: (theta * phi).sum() + (phi[0] - theta[0]) ** 4, "no minimum of G was found"),
        (lambda phi, theta, data: torch.nn.functional.softplus(-phi * theta.exp()).sum(), "no minimum of G was found"),
        (lambda phi, theta, data: (phi - theta).square().sum() + phi.abs().sum(), "no minimum of G was found"),
        (lambda phi, theta, data: (phi.sum() - theta.sum()) ** 2, "singular at its minimum"),
    ],
    ids=["unbounded", "separable", "kink", "flat"],
)
def test_no_minimum_is_called_so(inner: Any, reason: str) -> None:
    problem = BilevelProblem.from_functions(inner, lambda phi, theta, data: phi.square().sum())
    theta, init = torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.5, 0.1], dtype=F64)
    with pytest.raises(AssertionError, match=reason) as caught:
        check_hypergradient(
            problem,
            theta,
            init=init,
            solver=GradientDescent(step_size=0.01, max_steps=20),
            linsys=CG(max_steps=5, steihaug=True),
        )
    assert at_fault(str(caught.value)) == "inner solve"


def test_a_divergence_and_a_nan_are_reported_as_what_they_are() -> None:
    text = failure(solver=GradientDescent(step_size=10.0, max_steps=100))
    assert at_fault(text) == "inner solve" and "DIVERGED" in text
    data = {**planted.make_data(), "target": torch.full((6,), torch.nan, dtype=F64)}
    words = "(?s)at fault: start\n.*not finite where the inner solve starts.*NON_FINITE"
    with pytest.raises(CheckFailed, match=words) as caught:
        init = {"w": torch.full((2, 2), torch.nan, dtype=F64), "b": torch.zeros(2, dtype=F64)}
        check_hypergradient(planted.problem(), planted.make_theta(), data, init=init, **accurate(F64))
    assert caught.value.report.at_fault == ("start",)


def test_arguments_that_are_no_batch_are_refused_by_the_library() -> None:
    """And not by what the check does with the first task."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta - data[0]).square().sum(),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros(3, dtype=F64),
    )
    theta, empty, two = torch.ones(3, dtype=F64), torch.zeros(0, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)
    for data, init, words in (
        ((empty,), None, "expected at least one task, got an empty task axis"),
        ((two,), empty, r"init: expected a leading task axis of 2, got shape \(0, 3\)"),
        ((two, two[:1]), None, "expected 2 tasks along the first axis"),
    ):
        with pytest.raises(ValueError, match=words):
            check_hypergradient(problem, theta, data, init=init, batched=True, **accurate(F64))


def test_a_kink_at_the_point_makes_the_reference_uncertain_and_no_derivative_wrong() -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (phi - theta).square().sum(),
        lambda phi, theta, data: phi.abs().sum() + phi.square().sum(),
    )
    theta = torch.tensor([0.0, 1.0], dtype=F64)  # phi* = theta: one entry of phi at the kink of L
    with pytest.raises(
        AssertionError, match=r"dL/dphi: differences give no reliable number here: .* \(a kink"
    ) as caught:
        check_hypergradient(problem, theta, init=theta + 1, **accurate(F64))
    assert at_fault(str(caught.value)) == "dL/dphi"


def test_a_gradient_that_vanishes_is_judged_by_its_size_nearby() -> None:
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 2 * (phi - theta).square() + phi**4, lambda phi, theta, data: phi.square()
    )
    zero, one = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    assert check_hypergradient(
        problem, zero, init=one, solver=NewtonCG(max_steps=50, tol=1e-10), linsys=CG(max_steps=1)
    ).ok
    with pytest.raises(AssertionError, match="at fault: inner solve"):
        check_hypergradient(problem, zero, init=one, solver=NewtonCG(max_steps=2), linsys=CG(max_steps=1))


# ----------------------------------------------------------------------------------------------------------------------
# Many variables: no matrix, random directions.


def many(detach: str = "") -> tuple[BilevelProblem, Any, Any]:
    """600 numbers in phi, 60 in theta, coupled by a convolution."""

    def cut(name: str, x: Tensor) -> Tensor:
        return x.detach() if name == detach else x

    def inner(phi: Any, theta: Any, data: Any) -> Tensor:
        x = torch.cat([phi["a"], phi["b"]])
        coupled = x - 0.5 * x.roll(1)
        pull = (x.reshape(60, 10) * cut("theta", theta["t"].tanh())[:, None]).sum()
        return 0.5 * coupled.square().sum() + (1 + cut("phi", x).square()).sqrt().sum() - pull

    def outer(phi: Any, theta: Any, data: Any) -> Tensor:
        return 0.5 * (phi["a"] - 1).square().sum() + cut("b", phi["b"]).sin().sum() + theta["t"].square().sum()

    problem = BilevelProblem.from_functions(inner, outer)
    return problem, {"t": planted.normal(1, 60)}, {"a": torch.zeros(350, dtype=F64), "b": torch.zeros(250, dtype=F64)}


def test_many_variables() -> None:
    problem, theta, init = many()
    report = check_hypergradient(problem, theta, init=init, **accurate(F64))
    assert report.ok and "condition number" not in str(report)
    with pytest.raises(AssertionError, match="at fault: linear solve\n"):
        check_hypergradient(problem, theta, init=init, **{**accurate(F64), "linsys": CG(max_steps=2)})
    with pytest.raises(AssertionError, match="at fault: inner solve\n"):
        check_hypergradient(problem, theta, init=init, **{**accurate(F64), "solver": NewtonCG(max_steps=1)})


@pytest.mark.parametrize(
    ("where", "part"),
    [("phi", "dG/dphi\n"), ("theta", "d2G/dphi dtheta\n"), ("b", r"dL/dphi\n[^@]*largest in phi\['b'\]")],
)
def test_many_variables_with_a_fault(where: str, part: str) -> None:
    problem, theta, init = many(where)
    if where == "theta":  # theta enters G only through what is detached, but L as well
        assert bilevel.hypergradient(problem, theta, init=init, **accurate(F64)).ok
    with pytest.raises(AssertionError, match=f"at fault: {part}"):
        check_hypergradient(problem, theta, init=init, **accurate(F64))


# ----------------------------------------------------------------------------------------------------------------------
# Batches.


class Square(torch.autograd.Function):
    """x^2; under vmap it mixes the tasks up."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        return Square.apply(x.mean(in_dims[0], keepdim=True).expand_as(x)), in_dims[0]


def tasks(square: Any = torch.square) -> BilevelProblem:
    return ProximalProblem.from_losses(
        lambda phi, data: square(phi - data).sum() + phi.pow(4).sum(),
        lambda phi, data: (phi * data).sum().square(),
        2.0,
    )


def test_the_first_tasks_of_a_batch_are_checked_as_they_come_out_of_the_batched_call() -> None:
    theta, data = planted.normal(1, 3), planted.normal(2, 5, 3)
    report = check_hypergradient(tasks(), theta, data, batched=True, **accurate(F64))
    assert report.ok and " of 5: 3 numbers in phi" in str(report)
    init = planted.normal(3, 5, 3)
    assert check_hypergradient(tasks(), theta, data, init=init, batched=True, **accurate(F64)).ok
    data[2] = torch.nan
    with pytest.raises(AssertionError, match="(?s)task 2 of 5: .* not finite"):
        check_hypergradient(tasks(), theta, data, batched=True, **accurate(F64))
    data[2], data[3] = 0.0, torch.nan  # beyond the first three, but it failed
    with pytest.raises(AssertionError, match="(?s)task 3 of 5: .* not finite"):
        check_hypergradient(tasks(), theta, data, batched=True, **accurate(F64))


def test_a_function_whose_vmap_is_wrong_is_found() -> None:
    theta, data = planted.normal(1, 3), planted.normal(2, 5, 3)
    assert check_hypergradient(tasks(Square.apply), theta, data[0], **accurate(F64)).ok
    with pytest.raises(AssertionError, match="whose vmap is wrong"):
        check_hypergradient(tasks(Square.apply), theta, data, batched=True, **accurate(F64))


# ----------------------------------------------------------------------------------------------------------------------
# The report, the arguments, the user's tensors.


def test_the_report_is_a_table_to_act_on() -> None:
    text = failure(linsys=CG(max_steps=2))
    lines = text.splitlines()
    assert lines[1].startswith("6 numbers in phi, 4 in theta; gradient in float64, references in float64; rtol 1.0e-05")
    rows = [line for line in lines[3:] if not line.startswith(("-", " "))]
    assert 8 <= len(rows) <= 12 and all(len(line) <= 120 for line in lines)
    assert "- linear solve: CG(max_steps=2" in text and "raise max_steps" in text
    report = check()
    assert report["dG/dphi"].verdict is Verdict.OK and report.at_fault == ()
    with pytest.raises(KeyError, match="expected one of"):
        report["nonsense"]
    with pytest.raises(AttributeError):
        report.rtol = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rtol": 0.0}, ValueError, "rtol: expected a finite number > 0"),
        ({"rtol": "1e-3"}, TypeError, "rtol: expected a number"),
        ({"solver": CG}, TypeError, "solver: expected an inner solver"),
        ({"linsys": "cg"}, TypeError, "linsys: expected a linear solver"),
        ({"batched": True, "data": None}, ValueError, "batched=True"),
        ({"problem": 3}, TypeError, "problem: expected a BilevelProblem"),
        ({"theta": torch.ones(3, dtype=torch.int64)}, TypeError, "theta: expected float32 or float64"),
        ({"theta": torch.ones(3, dtype=F64)}, Exception, ""),
    ],
)
def test_wrong_arguments_are_refused_in_the_words_of_the_library(
    change: dict[str, Any], error: type, words: str
) -> None:
    arguments = {
        "problem": tasks(),
        "theta": planted.normal(1, 3),
        "data": planted.normal(2, 3),
        **accurate(F64),
        **change,
    }
    if not words:
        assert check_hypergradient(**arguments).ok  # the row that shows that the others differ by their mistake only
        return
    with pytest.raises(error, match=words):
        check_hypergradient(**arguments)


def test_an_objective_that_is_no_function_is_refused() -> None:
    problem = ProximalProblem.from_losses(
        lambda phi, data: torch.nn.functional.dropout(phi).square().sum(), lambda phi, data: phi.sum(), 1.0
    )
    with pytest.raises(ValueError, match="inner_objective draws random numbers from torch"):
        check_hypergradient(problem, planted.normal(1, 3), **accurate(F64))


def test_nothing_of_the_user_is_changed() -> None:
    theta, data = planted.make_theta(), planted.make_data()
    for leaf in flatten(theta)[0]:
        leaf.requires_grad_()
    before = [leaf.clone() for leaf in flatten((theta, data))[0]]
    state = torch.get_rng_state()
    check_hypergradient(planted.problem(), theta, data, **accurate(F64))
    assert torch.equal(state, torch.get_rng_state())
    for leaf, copy in zip(flatten((theta, data))[0], before, strict=True):
        assert torch.equal(leaf, copy) and leaf.grad is None and leaf.requires_grad == copy.requires_grad


def test_it_gives_the_same_numbers_each_time() -> None:
    first, second = check(), check()
    assert [part.error for part in first.parts] == [part.error for part in second.parts]


def test_it_can_be_imported_without_the_extra() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = sys.modules['pytest'] = None; import bilevel\n"
        "assert not [name for name in sys.modules if name.startswith('bilevel.testing')]\n"
        "import bilevel.testing; bilevel.testing.check_hypergradient"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_small_leaf_that_is_wrong_altogether() -> None:
    """The derivative in log_wd has the wrong sign, and 3e-4 of the norm of all: in float32 the whole is right to the tolerance."""

    def inner(phi: Tensor, theta: Any, data: Any) -> Tensor:
        decay = theta["log_wd"] if right else 2 * theta["log_wd"].detach() - theta["log_wd"]
        return (data["x"] @ phi - data["y"] * theta["unit"]).square().mean() + 0.5 * decay.exp() * phi.square().sum()

    problem = bilevel.BilevelProblem.from_functions(
        inner,
        lambda phi, theta, data: (data["xv"] @ phi - 1).square().mean(),
        lambda theta, data: data["x"].new_zeros(3),
    )
    data = {
        "x": planted.normal(0, 20, 3).float(),
        "y": planted.normal(1, 20).float(),
        "xv": planted.normal(2, 10, 3).float(),
    }
    theta = {"unit": torch.tensor(1.0), "log_wd": torch.tensor(-7.6)}
    options: dict[str, Any] = {"solver": NewtonCG(max_steps=30, cg_steps=12, tol=1e-5), "linsys": Exact()}
    right = True
    assert check_hypergradient(problem, theta, data, **options).ok
    right = False
    with pytest.raises(
        CheckFailed, match=r"d2G/dphi dtheta: in theta\['log_wd'\], which is small beside the others"
    ) as caught:
        check_hypergradient(problem, theta, data, **options)
    report = caught.value.report
    assert report.at_fault == ("d2G/dphi dtheta",) and report["d2G/dphi dtheta"].error == pytest.approx(2, rel=1e-4)
    assert report["implicit formula"].verdict is Verdict.OK  # in norm nothing is to be seen
    assert pickle.loads(pickle.dumps(caught.value)).report["hypergradient"].error == report["hypergradient"].error


def least_squares() -> tuple[bilevel.BilevelProblem, Tensor, dict[str, Tensor], dict[str, Any]]:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (data["x"] @ phi - data["y"]).square().mean() + (theta.exp() * phi.square()).sum(),
        lambda phi, theta, data: (data["x"] @ phi).square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    data = {"x": planted.normal(3, 5, 9, 2), "y": planted.normal(4, 5, 9)}
    return (
        problem,
        planted.normal(5, 2),
        data,
        {"solver": NewtonCG(max_steps=9, cg_steps=9, tol=1e-10), "linsys": Exact()},
    )


@pytest.mark.parametrize("numpy", [False, True])
def test_a_procedure_that_writes_to_data_is_refused(numpy: bool) -> None:
    problem, theta, data, options = least_squares()
    one = {key: leaf[0].clone() for key, leaf in data.items()}

    def centred(problem: Any, theta: Tensor, data: Any, init: Tensor) -> Tensor:
        if numpy:  # PyTorch does not see it
            x = data["x"].numpy()
            x -= x.mean(0)
        else:
            data["x"] -= data["x"].mean(0)
        return bilevel.solve(problem, theta, data, solver=options["solver"]).value

    words = r"^data\['x'\]: changed during the call" if numpy else "^BlackBox: fn writes to theta or data in place"
    with pytest.raises(ValueError, match=words):
        check_hypergradient(problem, theta, one, solver=BlackBox(centred), linsys=Exact())


def test_of_a_batch_the_tasks_that_failed_come_first() -> None:
    problem, theta, data, options = least_squares()
    report = check_hypergradient(problem, theta, data, batched=True, **options)
    assert report.ok and report.notes == ("2 more tasks of the batch were not checked.",)
    data["y"][4, 0] = torch.nan
    with pytest.raises(AssertionError, match="(?s)task 4 of 5: .* not finite"):
        check_hypergradient(problem, theta, data, batched=True, **options)


def test_a_batch_is_left_alone_by_an_objective_that_writes_to_it() -> None:
    """Before, the call came first, and with it the damage."""
    _, theta, data, options = least_squares()

    def writes(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        data["x"].mul_(0.5)
        return (data["x"] @ phi - data["y"]).square().mean() + (theta.exp() * phi.square()).sum()

    problem = bilevel.BilevelProblem.from_functions(
        writes, lambda phi, theta, data: phi.sum(), lambda theta, data: torch.zeros_like(theta)
    )
    before = data["x"].clone()
    with pytest.raises(ValueError, match="writes to its arguments|writes to"):
        check_hypergradient(problem, theta, data, batched=True, **options)
    assert torch.equal(data["x"], before)


def test_an_unused_leaf_of_theta() -> None:
    problem, theta, data, options = least_squares()
    one = {key: leaf[0] for key, leaf in data.items()}
    both = {"used": theta, "unused": torch.ones(3, dtype=F64)}
    wrapped = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: problem.inner_objective(phi, theta["used"], data),
        lambda phi, theta, data: problem.outer_loss(phi, theta["used"], data),
        lambda theta, data: torch.zeros_like(theta["used"]),
    )
    with pytest.raises(ValueError, match="allow_unused=True"):
        check_hypergradient(wrapped, both, one, **options)
    assert check_hypergradient(wrapped, both, one, allow_unused=True, **options).ok


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 1.0])
def test_variables_in_any_unit(unit: float) -> None:
    """Logistic regression of features in units of 1e-9, as nanoseconds are: right, and well-conditioned."""
    x, y = planted.normal(6, 12, 2) / unit, (planted.normal(7, 12) > 0).to(F64)

    def loss(phi: Tensor, y: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(x @ phi) - y * (x @ phi)).mean()

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: loss(phi, y) + 0.5 * ((theta / unit).sigmoid() * (phi / unit).square()).sum(),
        lambda phi, theta, data: loss(phi, 1 - y),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = unit * torch.tensor([1.0, -0.5], dtype=F64)
    solver = NewtonCG(max_steps=50, cg_steps=10, tol=1e-9 / unit)
    assert check_hypergradient(problem, theta, solver=solver, linsys=Exact()).ok


def test_a_linear_solver_that_lies_is_contradicted() -> None:
    problem, theta, data, options = least_squares()
    one = {key: leaf[0] for key, leaf in data.items()}

    class Lies(CG):
        def solve(self, *arguments: Any, **options: Any) -> Any:
            found = super().solve(*arguments, **options)
            zero = torch.zeros_like(found.residual)
            return dataclasses.replace(found, codes=torch.zeros_like(found.codes), residual=zero)

    with pytest.raises(AssertionError, match=r"(?s)CONVERGED after 1 steps.*That is not\s+so: \|b - A u\| = "):
        check_hypergradient(problem, theta, one, solver=options["solver"], linsys=Lies(max_steps=1))


def test_float32_inside_is_unclear_and_not_a_fault() -> None:
    problem, theta, data, _ = least_squares()
    one = {key: leaf[0] for key, leaf in data.items()}
    rounded = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: problem.inner_objective(phi.float().double(), theta, data),
        problem.outer_loss,
        problem.initial_phi,
    )
    with pytest.raises(
        CheckFailed, match=r"rounded to less than the\s+precision of the references, as by .float\(\)"
    ) as caught:
        check_hypergradient(rounded, theta, one, solver=NewtonCG(max_steps=9, cg_steps=9, tol=1e-4), linsys=Exact())
    assert Verdict.UNCLEAR in {part.verdict for part in caught.value.report.parts}


@pytest.mark.parametrize("right", [True, False])
def test_a_composition_that_is_not_the_objective_is_refused(right: bool) -> None:
    class Mine(BilevelProblem):
        def inner_objective(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return (1 if right else 3) * (phi - theta).square().sum() + phi.square().sum()

        def outer_loss(self, phi: Any, theta: Any, data: Any = None) -> Tensor:
            return (phi - 1).square().sum()

        def initial_phi(self, theta: Any, data: Any = None) -> Tensor:
            return theta.clone()  # where both are equal

        @property
        def composition(self) -> bilevel.Composition:
            return bilevel.Composition(
                lambda phi, theta, data: phi - theta,
                lambda outputs, theta, data: outputs.square().sum(),
                lambda phi, theta, data: phi.square().sum(),
            )

    theta, options = torch.tensor([0.5, -0.3], dtype=F64), {**accurate(F64), "curvature": GaussNewton()}
    if right:
        assert check_hypergradient(Mine(), theta, **options).ok
    else:
        with pytest.raises(ValueError, match="composition: expected what inner_objective is"):
            check_hypergradient(Mine(), theta, **options)


def failed_check(*args: Any, **options: Any) -> bilevel.testing.Report:
    with pytest.raises(CheckFailed) as caught:
        check_hypergradient(*args, **options)
    return caught.value.report


NEWTON = {"solver": NewtonCG(max_steps=20, cg_steps=6, tol=1e-5), "linsys": CG(max_steps=6)}


def test_a_small_leaf_among_many_that_is_wrong_altogether() -> None:
    """Of a network with more leaves than there are random directions."""
    names = [f"layer{i}.{kind}" for i in range(9) for kind in ("weight", "bias")]

    def problem(seen: Any) -> BilevelProblem:
        def inner(phi: Any, theta: Any, data: Any) -> Tensor:
            penalty = seen(theta["log_penalty"]).exp()
            fit = sum(0.5 * (phi[k] - theta["centre"][k]).square().sum() for k in names)
            return fit + 0.5 * penalty * sum(phi[k].square().sum() for k in names)

        def outer(phi: Any, theta: Any, data: Any) -> Tensor:
            return sum((phi[k] - 1).square().sum() for k in names) + 1e-6 * theta["log_penalty"]

        return BilevelProblem.from_functions(inner, outer, lambda theta, data: theta["centre"])

    torch.manual_seed(0)
    centre = {k: torch.randn(2, 2) if k.endswith("weight") else torch.randn(3) for k in names}
    theta = {"centre": centre, "log_penalty": torch.tensor(-10.0)}
    assert check_hypergradient(problem(lambda x: x), theta, **NEWTON).ok
    report = failed_check(problem(torch.Tensor.detach), theta, **NEWTON)
    assert report.at_fault == ("d2G/dphi dtheta",) and "log_penalty" in report["d2G/dphi dtheta"].remark


def test_a_small_entry_of_a_leaf_that_is_wrong_altogether() -> None:
    torch.manual_seed(0)
    data = {"x": torch.randn(40, 6) + 0.5, "y": torch.randn(40), "x_valid": torch.randn(30, 6) + 0.5}

    def problem(seen: Any) -> BilevelProblem:
        def inner(phi: Any, theta: Any, data: Any) -> Tensor:
            penalty = torch.stack([theta[0], seen(theta[1])]).exp().repeat_interleave(3)
            return 0.5 * (data["x"] @ phi - data["y"]).square().mean() + 0.5 * (penalty * phi.square()).sum()

        return BilevelProblem.from_functions(
            inner,
            lambda phi, theta, data: 0.5 * (data["x_valid"] @ phi - 1).square().mean(),
            lambda theta, data: data["x"].new_zeros(6),
        )

    theta = torch.tensor([0.0, -10.0])
    assert check_hypergradient(problem(lambda x: x), theta, data, **NEWTON).ok
    report = failed_check(problem(torch.Tensor.detach), theta, data, **NEWTON)
    assert report.at_fault == ("d2G/dphi dtheta",)
    assert report["d2G/dphi dtheta"].remark.startswith("in entry 1 of theta, which is small beside the others")


@pytest.mark.parametrize(
    "kink", [lambda p: p.topk(3).values.mean(), lambda p: (p - 1e-9 * p.detach()).norm(), lambda p: p[p.argmax()]]
)
def test_a_kink_of_the_outer_loss_at_the_start_is_nobodys_business(kink: Any) -> None:
    """Nobody asks for dL/dphi there."""
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=F64) + 0.5
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: (
            torch.nn.functional.softplus(-data @ phi).mean() + 0.5 * (theta.exp() * phi.square()).sum()
        ),
        lambda phi, theta, data: kink(data[:20] @ phi),
        lambda theta, data: torch.zeros_like(theta),
    )
    report = check_hypergradient(problem, torch.full((5,), -1.0, dtype=F64), x, **accurate(F64), rtol=1e-4)
    assert report.ok and not report.notes


def test_a_kink_of_the_inner_objective_at_the_start_is_noted() -> None:
    """Group lasso: the norm has a kink at zero, and none where the solution is."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta).square().sum() + 0.1 * phi.norm(),
        lambda phi, theta, data: (phi - 1).square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    report = check_hypergradient(problem, torch.tensor([1.0, -2.0, 0.5], dtype=F64), **accurate(F64))
    assert report.ok and "where the inner solve starts (a kink" in report.notes[0]


@pytest.mark.parametrize("where", ["outer", "cross"])
def test_a_derivative_that_is_nan_is_the_only_part_at_fault(where: str) -> None:
    """The branch of a torch.where that is not taken."""

    def root(x: Tensor) -> Tensor:
        return torch.where(x > 0, x.sqrt(), x)

    def inner(phi: Any, theta: Any, data: Any) -> Tensor:
        return 0.5 * (phi - (root(theta) if where == "cross" else theta)).square().sum() + 0.1 * phi.pow(4).sum()

    def outer(phi: Any, theta: Any, data: Any) -> Tensor:
        return root(phi).sum() if where == "outer" else phi.sum()

    problem = BilevelProblem.from_functions(inner, outer, lambda theta, data: torch.zeros_like(theta))
    theta = torch.tensor([1.0, -1.0], dtype=F64)
    report = failed_check(problem, theta, solver=NewtonCG(max_steps=60, tol=1e-11), linsys=Exact())
    part = {"outer": "dL/dphi", "cross": "d2G/dphi dtheta"}[where]
    assert report.at_fault == (part,)
    function = {"outer": "outer_loss", "cross": "inner_objective"}[where]
    assert f"NaN or infinity where the values are finite. Look in {function} for a torch.where" in report[part].remark


def test_identity_with_an_inverse_that_is_none_is_told_so() -> None:
    weights = torch.tensor([1.0, 10.0, 100.0, 0.1], dtype=F64)

    class Weighted(ProximalProblem):
        def train_loss(self, phi: Any, data: Any) -> Tensor:
            return 0.5 * (phi - 1).square().sum()

        def test_loss(self, phi: Any, data: Any) -> Tensor:
            return 0.5 * (phi - 2).square().sum()

        def regulariser(self, phi: Any, theta: Any) -> Tensor:
            return 0.5 * (weights.to(phi) * (phi - theta).square()).sum()

        def curvature_product(self, v: Any, theta: Any = None) -> Any:
            return weights.to(v) * v

        def curvature_inverse(self, v: Any, theta: Any = None, damping: float = 0.0) -> Any:
            return v * weights.to(v)  # should be v / (weights + damping)

    theta = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=F64)
    report = failed_check(Weighted(1.0), theta, solver=accurate(F64)["solver"], linsys=Identity())
    assert report.at_fault == ("linear solve",)
    assert (
        "its curvature_inverse (or curvature_scale), with the damping, is not the inverse"
        in report["linear solve"].remark
    )


def test_second_derivatives_of_a_first_one_that_is_unclear_are_not_blamed() -> None:
    """The lasso, with its solution on the kink."""
    problem = BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - 0.1).square().sum() + theta.exp().sum() * phi.abs().sum(),
        lambda phi, theta, data: (phi - 1).square().sum(),
        lambda theta, data: torch.zeros(2, dtype=F64),
    )
    report = failed_check(
        problem, torch.zeros(1, dtype=F64), solver=GradientDescent(step_size=0.1, max_steps=50), linsys=Exact()
    )
    assert not any(name.startswith("d2G") for name in report.at_fault)


def test_pytest_shows_the_lines_of_the_user_and_the_report(tmp_path: Path) -> None:
    """And not those of the library between them."""
    (tmp_path / "test_mine.py").write_text(
        """
import torch, bilevel
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent
from bilevel.testing import check_hypergradient

def test_mine():
    problem = bilevel.BilevelProblem.from_functions(
        lambda p, t, d: (p - t).square().sum(), lambda p, t, d: p.square().sum(), lambda t, d: torch.zeros_like(t))
    few = GradientDescent(step_size=0.1, max_steps=1)
    check_hypergradient(problem, torch.ones(2, dtype=torch.float64), solver=few, linsys=CG(max_steps=5))
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False).stdout
    assert ">       check_hypergradient(problem" in shown or ">   check_hypergradient(problem" in shown, shown
    assert "FAILED, at fault: inner solve" in shown
    assert (
        "def check_hypergradient" not in shown and "return explained(" not in shown and "return function(" not in shown
    )
