"""The references of the experiment, on softmax regression, against scipy, finite differences and dense algebra."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import bilevel
from applications.meta_learning.experiments import e7_gradient_accuracy as e7
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.problem import cross_entropy, few_shot_problem
from bilevel import Hypergradient
from bilevel.linsys import Exact

LAM, D = 0.7, 8


@pytest.fixture(autouse=True)
def _long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e7, "SMOOTHNESS", 3.0)  # that of these small problems, so that 150 steps are many


def _case() -> tuple[bilevel.BilevelProblem, dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Two tasks of softmax regression, three inputs and two classes; theta has eight entries."""
    g = torch.Generator().manual_seed(4)

    def part(n: int) -> dict[str, torch.Tensor]:
        x = torch.randn(2, n, 3, generator=g, dtype=torch.float64)
        return {"x": x, "y": torch.randint(2, (2, n), generator=g)}

    theta = {
        "weight": torch.randn(2, 3, generator=g, dtype=torch.float64),
        "bias": torch.randn(2, generator=g, dtype=torch.float64),
    }
    return few_shot_problem(nn.Linear(3, 2).double(), cross_entropy, LAM), theta, {"support": part(6), "query": part(5)}


def _loss(phi: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    z = x @ phi[:6].reshape(2, 3).T + phi[6:]
    z = z - z.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]))


def _outer_by_scipy(theta: np.ndarray, data: dict[str, dict[str, torch.Tensor]], task: int) -> float:
    x, y, xq, yq = (data[part][key][task].numpy() for part in ("support", "query") for key in ("x", "y"))

    def slope(phi: np.ndarray) -> np.ndarray:
        z = x @ phi[:6].reshape(2, 3).T + phi[6:]
        p = np.exp(z - z.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True) - np.eye(2)[y]
        return np.concatenate([(p.T @ x / len(y)).reshape(-1), p.mean(0)]) + LAM * (phi - theta)

    found = scipy.optimize.root(slope, theta, tol=1e-14)  # G is strongly convex: its one stationary point
    assert np.abs(slope(found.x)).max() < 1e-13
    return _loss(found.x, xq, yq)


def _as_vector(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tree["weight"].flatten(-2), tree["bias"]], dim=-1)


def _path(k: int) -> Hypergradient:
    problem, theta, data = _case()
    return bilevel.unrolled(problem, theta, data, solver=e7._gd(LAM, k), batched=True, reduction="none")


def test_the_solution_against_scipy_and_finite_differences() -> None:
    problem, theta, data = _case()
    found = e7._solved(problem, theta, data, _path(4).phi)
    start = _as_vector(theta).numpy()
    for task in range(2):
        differences = [
            (_outer_by_scipy(start + 1e-4 * e, data, task) - _outer_by_scipy(start - 1e-4 * e, data, task)) / 2e-4
            for e in np.eye(D)
        ]
        np.testing.assert_allclose(_as_vector(found.grad)[task].numpy(), differences, rtol=1e-5, atol=1e-7)


def test_what_is_said_of_the_solution() -> None:
    problem, theta, data = _case()
    paths = [_path(k) for k in (1, 150)]
    rows = e7._solution(problem, theta, data, paths[0].phi, paths)
    for row in rows:
        assert row["solved"] and row["residual"] <= 1e-11
        early, late = row["path_error"]
        assert early > 1e-2 and late < 1e-8  # the gradient of a long path is that of the solution


def test_the_path_is_checked_against_differences() -> None:
    right = e7._path_against_differences(*_case(), LAM, 5)["path"]
    wrong = e7._path_against_differences(*_case(), LAM, 5, scale=1.01)["path"]
    assert max(right) < 1e-5
    assert wrong == pytest.approx([0.01, 0.01], rel=1e-2)


def test_error_and_cosine_of_known_vectors() -> None:
    exact = _path(1)
    ones = {name: torch.ones_like(leaf) for name, leaf in exact.grad.items()}
    exact = replace(exact, grad=ones)
    turned = {name: leaf.clone() for name, leaf in ones.items()}
    turned["bias"] = -turned["bias"]  # two of eight entries
    found = e7._compare(replace(exact, grad=turned), exact)
    assert found["error"] == pytest.approx([1.0, 1.0]) and found["cosine"] == pytest.approx([0.5, 0.5])
    half = e7._compare(replace(exact, grad=turned, ok_per_task=torch.tensor([True, False])), exact)
    assert half["error"] == [pytest.approx(1.0), None] and half["cosine"] == [pytest.approx(0.5), None]
    assert e7._by_task(half["error"]) == "1.0e+00 / –" and e7._drawn([half["error"]]) == [pytest.approx(1.0)]


def test_from_first_order_to_the_dense_solution() -> None:
    problem, theta, data = _case()
    phi = _path(3).phi
    dense = bilevel.implicit_gradient(problem, phi, theta, data, linsys=Exact(), batched=True, reduction="none")
    points = e7._over_linear_steps(problem, phi, theta, data, dense)["Hessian"]
    query = {
        name: torch.stack(
            [torch.func.grad(_query_loss)({n: v[t] for n, v in phi.items()}, data, t)[name] for t in (0, 1)]
        )
        for name in theta
    }
    a, b = _as_vector(query), _as_vector(dense.grad)
    assert points[0]["error"] == pytest.approx(((a - b).norm(dim=-1) / b.norm(dim=-1)).tolist(), rel=1e-9)
    assert e7.LINEAR_STEPS[-2] >= D and max(points[-2]["error"]) < 1e-10  # CG has ended after as many steps as entries
    largest = [max(point["error"]) for point in points[:4]]
    assert largest == sorted(largest, reverse=True) and largest[3] < 0.01 * largest[0]


def _query_loss(phi: dict[str, torch.Tensor], data: dict[str, dict[str, torch.Tensor]], task: int) -> torch.Tensor:
    logits = data["query"]["x"][task] @ phi["weight"].mT + phi["bias"]
    return cross_entropy(logits, data["query"]["y"][task])


def test_page_says_where_the_solution_was_not_reached(tmp_path: Path) -> None:
    row = {"residual": 0.3, "linear_residual": None, "solved": False, "path_error": None}
    cell = {
        "start": e7.STARTS[0],
        "lam": 2.0,
        "residual": 0.3,
        "residual_finer": 0.2,
        "path": [1e-7],
        "solution": [row],
    }
    lines = "\n".join(e7._references({"cells": [cell], "steps": [1, 4]}))
    assert "0 of 1" in lines and "not reached, at λ = 2 (initial network)" in lines and "None" not in lines
    cell["solution"] = [row | {"solved": True, "path_error": [0.5, 0.1]}]
    lines = "\n".join(e7._references({"cells": [cell], "steps": [1, 4]}))
    assert "1 of 1" in lines and "at least one task at λ = 2 (initial network)" in lines


def test_config_is_the_real_network(tmp_path: Path) -> None:
    request = Request(quick=False, seed=0, data_dir=Path("somewhere"), parts=tmp_path)
    config = e7._config(request)
    assert (config.dataset, config.ways, config.shots, config.image_size) == ("omniglot", 5, 1, 28)
