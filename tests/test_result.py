"""What a solve says about itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bilevel
from bilevel import Hypergradient, Result, SolverError, Status
from bilevel.linsys import CG, Exact, Identity
from bilevel.solvers import GradientDescent
from bilevel.status import converged, failed

NOT_FAILED = {
    Status.CONVERGED,
    Status.MAX_STEPS,
    Status.LINE_SEARCH_FAILED,
    Status.STOPPED_AT_NEGATIVE_CURVATURE,
    Status.SOLVED_INDEFINITE,
}
FAILED = {Status.DIVERGED, Status.NON_FINITE, Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.BREAKDOWN}


def result(codes: Any, steps: Any = None, residual: Any = None, value: Any = None) -> Result:
    codes = torch.tensor(codes, dtype=torch.int64)
    steps = torch.full_like(codes, 7) if steps is None else torch.tensor(steps)
    residual = torch.full(codes.shape, 0.25) if residual is None else torch.tensor(residual)
    return Result(value=torch.ones(3) if value is None else value, codes=codes, steps=steps, residual=residual)


def test_which_statuses_are_failures() -> None:
    assert set(Status) == NOT_FAILED | FAILED
    assert {status for status in Status if status.failed} == FAILED


def test_the_codes_of_failures_come_last() -> None:
    """A batch is judged by comparing numbers, as fast as that is; a new member must keep to it."""
    assert [status.failed for status in sorted(Status)] == [False] * len(NOT_FAILED) + [True] * len(FAILED)
    codes = torch.tensor(sorted(Status))
    assert failed(codes).tolist() == [status.failed for status in sorted(Status)]
    assert {Status(int(code)) for code in codes[converged(codes)]} == {Status.CONVERGED, Status.SOLVED_INDEFINITE}


def test_results_survive_a_pickle() -> None:
    found = pickle.loads(pickle.dumps(result([0, 6])))
    assert found.failed.tolist() == [False, True] and torch.equal(found.value, torch.ones(3))


@pytest.mark.parametrize("status", Status)
def test_a_status_is_its_number_and_its_sentence(status: Status) -> None:
    assert Status(int(status)) is status
    assert Status(torch.tensor(int(status)).item()) is status
    assert len(status.message) > 20 and status.message.endswith(".")
    assert pickle.loads(pickle.dumps(status)) is status
    one = result(int(status))
    assert one.status is status and isinstance(one.num_steps, int) and one.num_steps == 7
    assert bool(one.failed) is status.failed
    assert result([int(status)]).failed.tolist() == [status.failed]


@pytest.mark.parametrize("status", sorted(FAILED))
def test_every_failure_names_a_remedy(status: Status) -> None:
    assert any(word in status.message for word in ("Reduce", "Look for", "Solve", "raise", "Add"))


@pytest.mark.parametrize("status", sorted(NOT_FAILED))
def test_unwrap_gives_the_value(status: Status) -> None:
    value = {"w": torch.ones(2)}
    assert result(int(status), value=value).unwrap() is value
    assert result([0, int(status)], value=value).unwrap() is value


@pytest.mark.parametrize("status", sorted(FAILED))
def test_unwrap_of_one_failed_problem_says_why(status: Status) -> None:
    one = result(int(status), steps=12, residual=0.00125)
    with pytest.raises(SolverError) as error:
        one.unwrap()
    text = str(error.value)
    assert status.name in text and status.message in text and "12 steps" in text and "1.250e-03" in text
    assert issubclass(SolverError, RuntimeError)


MET = {Status.CONVERGED, Status.SOLVED_INDEFINITE}
PASSES: list[tuple[Any, set[Status]]] = [
    ("failed", NOT_FAILED),
    (True, NOT_FAILED),
    ("converged", MET),
    (False, set(Status)),
]


@pytest.mark.parametrize(
    ("check", "passes"), PASSES, ids=lambda value: str(value) if not isinstance(value, set) else ""
)
@pytest.mark.parametrize("status", Status)
def test_check_means_the_same_everywhere(status: Status, check: Any, passes: set[Status]) -> None:
    """Of one result and of a batch, of a hypergradient, and of the calls that solve: through a solver that ends with this status."""
    one = result(int(status))
    ways: list[Callable[[], Any]] = [
        lambda: one.unwrap(check=check),
        lambda: result([0, int(status)]).unwrap(check=check),
        lambda: by_hand(one, result(0)).unwrap(check=check),
        lambda: by_hand(None, one).unwrap(check=check),
        lambda: argmin_that_ends_with(status, check),
    ]
    for way in ways:
        if status in passes:
            way()
        else:
            with pytest.raises(SolverError, match=status.name):
                way()


def by_hand(inner: Result | None, linear: Result) -> Hypergradient:
    ok = ~(linear.failed if inner is None else inner.failed | linear.failed)
    return Hypergradient(
        grad=torch.ones(2),
        outer=torch.tensor(0.0),
        outer_per_task=torch.tensor(0.0),
        phi=torch.ones(2),
        inner=inner,
        linear=linear,
        curvature=bilevel.Hessian(),
        damping=0.0,
        ok_per_task=ok,
        reduction="mean",
    )


@dataclass(frozen=True)
class Ends(bilevel.solvers.NewtonCG):
    """Says at the end what it is told to."""

    status: Status = Status.CONVERGED

    def run(self, *args: Any, **options: Any) -> Any:
        run = super().run(*args, **options)

        def ended(*of: Any) -> Result:
            found = run.result(*of)
            return replace(found, codes=torch.full_like(found.codes, int(self.status)))

        return SimpleNamespace(phi=run.phi, result=ended)


def argmin_that_ends_with(status: Status, check: Any) -> Any:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return bilevel.argmin(
        problem(),
        theta,
        torch.tensor(2.0, dtype=torch.float64),
        init=theta,
        solver=Ends(max_steps=5, tol=1e-9, status=status),
        linsys=CG(max_steps=9),
        check=check,
    )


@pytest.mark.parametrize("check", ["solved", 1, None, torch.tensor(True)])
def test_what_is_no_check_is_refused_by_all_in_the_same_words(check: Any) -> None:
    for way in (
        lambda: result(0).unwrap(check=check),
        lambda: by_hand(None, result(0)).unwrap(check=check),
        lambda: argmin_that_ends_with(Status.CONVERGED, check),
    ):
        with pytest.raises(ValueError, match=r'check: expected "failed" \(or True\), "converged" or False, got '):
            way()


def test_unwrap_says_why_a_result_that_did_not_fail_is_refused() -> None:
    with pytest.raises(SolverError, match="^check='converged': solve: MAX_STEPS after 7 steps"):
        result(int(Status.MAX_STEPS)).unwrap(check="converged")
    with pytest.raises(SolverError, match="^solve: DIVERGED"):
        result(int(Status.DIVERGED)).unwrap(check="converged")


def test_unwrap_of_a_batch_counts_per_status() -> None:
    codes = [[0, 6, 6], [5, 1, 0]]
    batch = result(codes, steps=[[1, 2, 30], [4, 50, 6]], residual=[[0.1, 0.5, float("nan")], [2.0, 0.3, 0.4]])
    assert isinstance(batch.status, torch.Tensor) and batch.status.tolist() == codes
    assert isinstance(batch.num_steps, torch.Tensor)
    with pytest.raises(SolverError) as error:
        batch.unwrap()
    lines = str(error.value).splitlines()
    assert "6 problems, 3 failed:" in lines[0]
    by_name = {line.split()[2]: line for line in lines[1:]}
    assert set(by_name) == {"CONVERGED", "MAX_STEPS", "DIVERGED", "NON_FINITE"}
    assert (
        by_name["CONVERGED"].startswith("  2 x ")
        and "6 steps" in by_name["CONVERGED"]
        and "4.000e-01" in by_name["CONVERGED"]
    )
    assert (
        by_name["NON_FINITE"].startswith("  2 x ")
        and "30 steps" in by_name["NON_FINITE"]
        and "inf" in by_name["NON_FINITE"]
    )
    assert by_name["DIVERGED"].startswith("  1 x ") and Status.DIVERGED.message in by_name["DIVERGED"]
    assert (
        "(index (1, 0); at most" in by_name["DIVERGED"] and "(indices (0, 1), (0, 2); at most" in by_name["NON_FINITE"]
    )
    assert "ind" not in by_name["CONVERGED"].split(":")[0]


def test_which_of_a_batch_failed() -> None:
    codes = torch.zeros(100, dtype=torch.int64)
    codes[[37, 41, 5, 77, 78, 90]] = int(Status.DIVERGED)
    assert "  6 x DIVERGED (indices 5, 37, 41, 77, 78, ...; at most 7 steps" in result(codes.tolist()).describe()
    assert "  2 x DIVERGED (at most 7 steps" in result([int(Status.DIVERGED)] * 2).describe()  # all of them
    assert result([0]).describe().startswith("solve: 1 problem, 0 failed:")


def test_describe_names_what_it_describes() -> None:
    assert result(0).describe("inner solve").startswith("inner solve: CONVERGED after 7 steps, residual 2.500e-01: ")
    assert result([0, 1]).describe("linear solve").startswith("linear solve: 2 problems, 0 failed:")


def test_a_failed_solve_raises_through_the_library() -> None:
    """From a real solve, not from a result made by hand."""
    indefinite = CG(max_steps=5).solve(lambda v: -v, torch.ones(2, 3))
    with pytest.raises(SolverError, match=r"2 problems, 2 failed:\n  2 x NEGATIVE_CURVATURE .*CG\(steihaug=True\)"):
        indefinite.unwrap()


# --- Hypergradient -------------------------------------------------------------------------------


def problem() -> bilevel.BilevelProblem:
    """H = diag(data, 1): indefinite where data < 0."""
    return bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (data * phi[0] ** 2 + phi[1] ** 2) - phi @ theta,
        lambda phi, theta, data: (phi**2).sum(),
    )


def hypergradient(data: list[float] | float, reduction: str = "mean") -> Hypergradient:
    theta, data = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(data, dtype=torch.float64)
    batched = data.ndim == 1
    phi = torch.stack([theta[0] / data, theta[1].expand(data.shape)], -1)
    return bilevel.implicit_gradient(
        problem(),
        phi,
        theta,
        data,
        linsys=CG(max_steps=10),
        batched=batched,
        reduction=reduction if batched else "mean",  # type: ignore[arg-type]
    )


def test_unwrap_of_a_hypergradient() -> None:
    one = hypergradient(2.0)
    assert one.ok is True and one.num_ok == 1
    # F = (theta_0 / data)^2 + theta_1^2
    torch.testing.assert_close(one.unwrap(), torch.tensor([0.5, 4.0], dtype=torch.float64))
    some = hypergradient([2.0, -1.0])
    assert some.ok.tolist() == [True, False] and some.num_ok == 1
    torch.testing.assert_close(some.unwrap(), one.grad)  # the mean over those that are ok
    with pytest.raises(SolverError, match="1 x NEGATIVE_CURVATURE"):
        hypergradient([2.0, -1.0], "none").unwrap()


def test_a_hypergradient_without_an_ok_task_is_nan_and_raises() -> None:
    for bad in (hypergradient([-1.0, -2.0]), hypergradient([-1.0, -2.0], "sum"), hypergradient(-1.0)):
        assert bad.grad.isnan().all() and bad.num_ok == 0
        with pytest.raises(SolverError, match=r"linear solve: .*NEGATIVE_CURVATURE|linear solve: 2 problems, 2 failed"):
            bad.unwrap()
    assert hypergradient(-1.0).ok is False


def test_describe_of_a_hypergradient_tells_of_both_solves() -> None:
    theta = torch.tensor([1.0, 2.0])
    both = bilevel.hypergradient(
        problem(),
        theta,
        torch.tensor(2.0),
        init=torch.zeros(2),
        solver=bilevel.solvers.GradientDescent(step_size=0.4, max_steps=50),
        linsys=CG(max_steps=9),
    )
    first, second = both.describe().splitlines()
    assert first.startswith("inner solve: MAX_STEPS after 50 steps") and second.startswith(
        "linear solve: CONVERGED after 2 steps"
    )


def meta(**options: Any) -> tuple[dict[str, torch.Tensor], Hypergradient]:
    """Three tasks of (w - b)^2 with w = a at the solution, so dL/da = 2 (a - b), dL/db = -2 (a - b)."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (data * (phi - theta["a"])).square().sum(),
        lambda phi, theta, data: (phi - theta["b"]).square().sum(),
        lambda theta, data: torch.zeros_like(theta["a"]),
    )
    theta = {"b": torch.ones(2, dtype=torch.float64), "a": torch.full((2,), 4.0, dtype=torch.float64)}
    data = torch.tensor([[1.0], [2.0], [options.pop("last", 3.0)]], dtype=torch.float64)
    solver = bilevel.solvers.NewtonCG(max_steps=5, cg_steps=2, tol=1e-12)
    return theta, bilevel.hypergradient(
        problem, theta, data, solver=solver, linsys=CG(max_steps=2), batched=True, **options
    )


def test_assign_grad_is_what_an_optimizer_takes() -> None:
    theta, found = meta()
    before = theta["a"].clone()
    assert [leaf is theta[name] for leaf, name in zip(bilevel.tree_leaves(theta), ("a", "b"), strict=True)] == [
        True
    ] * 2
    outer = torch.optim.SGD(bilevel.tree_leaves(theta), lr=0.5)
    for _ in range(2):  # the second time in the place of the first, not on top of it
        found.assign_grad(theta)
    torch.nn.utils.clip_grad_norm_(bilevel.tree_leaves(theta), 1e-3)
    assert found.grad["a"].norm() > 1  # the gradient of the result is its own
    found.assign_grad(theta)
    outer.step()
    torch.testing.assert_close(theta["a"], before - 0.5 * torch.full((2,), 6.0, dtype=torch.float64))
    torch.testing.assert_close(theta["b"], torch.full((2,), 4.0, dtype=torch.float64))


def test_assign_grad_without_a_check_reads_no_number() -> None:
    theta, found = meta()
    failed = replace(
        found, ok_per_task=torch.zeros_like(found.ok_per_task), grad={k: v * torch.nan for k, v in found.grad.items()}
    )
    with pytest.raises(SolverError):
        failed.assign_grad(theta)
    assert all(leaf.grad is None for leaf in theta.values())
    failed.assign_grad(theta, check=False)
    assert all(leaf.grad is not None and bool(leaf.grad.isnan().all()) for leaf in theta.values())
    on_meta = replace(found, grad={name: leaf.to("meta") for name, leaf in found.grad.items()})
    elsewhere = {name: leaf.detach().to("meta") for name, leaf in theta.items()}
    on_meta.assign_grad(elsewhere, check=False)  # nothing on this device can be read
    assert all(leaf.grad is not None for leaf in elsewhere.values())


def test_what_was_refused_comes_with_the_error() -> None:
    single, (_, found) = result(Status.SINGULAR), meta()
    with pytest.raises(SolverError) as refused:
        single.unwrap()
    assert refused.value.result is single
    none = replace(found, ok_per_task=torch.zeros_like(found.ok_per_task))
    with pytest.raises(SolverError) as refused:
        none.unwrap()
    kept = refused.value.result
    assert kept.ok_per_task is none.ok_per_task and kept.grad is none.grad
    assert kept.certificate is None  # the problem, and all data
    assert pickle.loads(pickle.dumps(refused.value)).result.num_ok == 0
    assert str(pickle.loads(pickle.dumps(SolverError("words", single)))) == "words"


def test_each_solve_says_which_one_it_was() -> None:
    _, found = meta()
    assert found.inner is not None and (found.inner.what, found.linear.what) == ("inner solve", "linear solve")
    assert found.inner.describe().startswith("inner solve: ")
    assert repr(found.linear).startswith("Result(linear solve: ")
    _, chunked = meta(chunk_size=1)
    assert chunked.inner is not None and (chunked.inner.what, chunked.linear.what) == ("inner solve", "linear solve")


def test_assign_grad_writes_nothing_that_is_wrong() -> None:
    theta, found = meta(last=float("nan"), reduction="none")
    with pytest.raises(SolverError):
        found.assign_grad(theta)
    assert theta["a"].grad is None and theta["b"].grad is None
    theta, found = meta(reduction="none")
    with pytest.raises(ValueError, match=r"assign_grad: expected a theta with leaves .* the gradient has a task axis"):
        found.assign_grad(theta)
    theta, found = meta()
    with pytest.raises(
        ValueError, match=r"assign_grad: expected a theta with leaves \[\"\['a'\]\", \"\['b'\]\"\] of shapes .*, got"
    ):
        found.assign_grad(theta["a"])
    for wrong, remedy in (
        (torch.nn.ParameterDict({}), r"; this one becomes one by dict\(...\)"),
        (iter(()), r".* by list\(...\)"),
        (3, ""),
    ):
        with pytest.raises(TypeError, match=rf"assign_grad: theta: expected a tree of tensors, got \w+{remedy}\.$"):
            found.assign_grad(wrong)
    assert theta["a"].grad is None


def test_results_are_compared_as_objects() -> None:
    _, found = meta()
    _, other = meta()
    assert found != other and found == found and other in [found, other]
    assert found.linear != other.linear and len({found, other, found.linear}) == 3


def tied() -> tuple[Callable[..., Hypergradient], Callable[[torch.Tensor], torch.Tensor]]:
    """G = |phi - a - 3 b|^2 / 2 and L = sum phi^2 / 2: L(a, b) = |a + 3 b|^2 / 2."""
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - theta["a"] - 3 * theta["b"]).square().sum(),
        lambda phi, theta, data: 0.5 * phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta["a"]),
    )

    def of(theta: Any) -> Hypergradient:
        solver = bilevel.solvers.NewtonCG(max_steps=5, cg_steps=4, tol=1e-12)
        return bilevel.hypergradient(problem, theta, solver=solver, linsys=CG(max_steps=4))

    return of, lambda p: 0.5 * (p + 3 * p).square().sum()


def test_assign_grad_adds_up_what_reaches_one_tensor_twice() -> None:
    """Tied weights. Before, .grad was the part of one place only."""
    of, closed = tied()
    p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(closed(p), p)
    for _ in range(2):  # in the place of the one before
        of({"a": p, "b": p}).assign_grad({"a": p, "b": p})
        torch.testing.assert_close(p.grad, expected)


def test_assign_grad_leaves_frozen_leaves_alone() -> None:
    """Adam moves whatever has a .grad."""
    of, _ = tied()
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=free) for free in (True, False))
    of({"a": a, "b": b}).assign_grad({"a": a, "b": b})
    assert a.grad is not None and b.grad is None
    plain = {"a": torch.ones(2, dtype=torch.float64), "b": b}  # nothing was said: all of them
    of(plain).assign_grad(plain)
    assert plain["a"].grad is not None and b.grad is not None


def test_assign_grad_refuses_what_was_computed() -> None:
    """Its .grad would reach nobody; the words give what does."""
    of, _ = tied()
    raw = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.ones(2, dtype=torch.float64, requires_grad=True)
    theta = {"a": 2 * raw, "b": b}
    result = of(theta)
    with pytest.raises(ValueError, match=r"^assign_grad: theta\['a'\] was computed from other tensors") as caught:
        result.assign_grad(theta)
    assert b.grad is None
    exec(str(caught.value).split("Use ")[1].split(", or hand over")[0])  # what it says, as it stands
    expected = torch.autograd.grad(0.5 * (2 * raw + 3 * b).square().sum(), (raw, b))
    torch.testing.assert_close((raw.grad, b.grad), expected)


def test_what_is_printed_is_short_and_has_names() -> None:
    """And not a number, or every tensor."""
    assert str(Status.CONVERGED) == f"{Status.CONVERGED}" == "CONVERGED" and f"{Status.SINGULAR:>10}" == "  SINGULAR"
    assert f"{Status.MAX_STEPS:d}" == "1"
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: (phi - data).square().sum(), lambda phi, data: phi.sum(), lam=1.0
    )
    data = torch.randn(5, 1000)
    found = bilevel.hypergradient(
        problem,
        torch.zeros(1000),
        data,
        solver=GradientDescent(step_size=0.1, max_steps=4),
        linsys=Exact(),
        batched=True,
    )
    assert repr(found) == (
        "Hypergradient(5 of 5 tasks ok; inner solve 5 problems: 5 MAX_STEPS; at most 4 steps; "
        "linear solve 5 problems: 5 CONVERGED; at most 1 steps)"
    )
    assert repr(result(0)) == "Result(solve: CONVERGED after 7 steps, residual 2.50e-01)"
    shown = []

    def under_vmap(codes: torch.Tensor) -> torch.Tensor:
        shown.append(repr(Result(value=None, codes=codes, steps=codes, residual=codes.float())))
        return codes

    torch.func.vmap(under_vmap)(torch.zeros(3, dtype=torch.int64))
    assert shown == ["Result(solve: ...)"]


def test_identity_is_not_told_to_take_more_steps() -> None:
    problem = bilevel.ProximalProblem.from_losses(
        lambda phi, data: (phi - 1).square().sum(), lambda phi, data: phi.sum(), lam=1.0
    )
    found = bilevel.implicit_gradient(problem, torch.zeros(2), torch.zeros(2), linsys=Identity())
    assert "Identity() solves no system. CG does." in found.describe() and "raise max_steps" not in found.describe()
