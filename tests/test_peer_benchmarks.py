"""The benchmarks that run beside peers: their references against other ways, this library's part in each, the protocol and the pages.

The peers' own scripts run in environments of their own, so here only where the peer is installed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

for package in ("matplotlib", "platformdirs", "pooch", "PIL", "rich", "scipy", "sklearn", "typer"):
    pytest.importorskip(package, reason="needs the extra 'benchmarks'")

ROOT = Path(__file__).parents[1]
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "docs" / "results"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of benchmarks/, benchmarks/peers/ or docs/results/ by name."""
    threads = torch.get_num_threads()
    for folder in (RESULTS, BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    torch.set_num_threads(threads)


def error(found: Any, reference: np.ndarray) -> float:
    found = np.asarray(found)
    return float((np.linalg.norm(found - reference, axis=-1) / np.linalg.norm(reference, axis=-1)).max())


def run_peer(scripts: Any, monkeypatch: pytest.MonkeyPatch, name: str, arrays: dict, folder: Path, *mode: str) -> float:
    """The error that the script of a peer would report."""
    np.savez(folder / "problem.npz", **arrays)
    served: list[float] = []

    def serve(hypergradient: Any, reference: np.ndarray, *, check: Any = None, **_: Any) -> None:
        served.append(error((check or hypergradient)(), reference))

    monkeypatch.setattr(scripts("fixed"), "serve", serve)
    monkeypatch.setattr("applications.meta_learning.allocator.keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", [name, str(folder / "problem.npz"), "1", *mode])
    for module in [module for module in sys.modules if module.endswith("_problem") and "." not in module]:
        monkeypatch.delitem(sys.modules, module)
    runpy.run_path(str(BENCHMARKS / "peers" / f"{name}.py"))
    for module in [module for module in sys.modules if module.endswith("_problem") and "." not in module]:
        del sys.modules[module]
    return served[0]


# the references, by another way


def test_reference_of_the_quadratic(scripts: Any) -> None:
    """Central differences of L at the solution of the dense system."""
    p = scripts("quadratic").instance(3)

    def outer(theta: np.ndarray) -> float:
        phi = np.linalg.solve(p["A"], p["b"] + p["W"] @ theta)
        return np.logaddexp(0, -p["target"] * phi).sum() + 0.05 * theta @ theta

    steps = 1e-5 * np.eye(len(p["theta"]))
    slope = [(outer(p["theta"] + step) - outer(p["theta"] - step)) / 2e-5 for step in steps]
    assert error(np.array(slope), p["reference"]) < 1e-8
    assert np.linalg.cond(p["A"]) == pytest.approx(10)


@pytest.mark.parametrize("work", ["E", "F"])
def test_reference_of_the_batch(scripts: Any, work: str) -> None:
    """Central differences over scipy's own minimiser, task by task."""
    from scipy.optimize import minimize

    p = scripts("batch").instance(work, 3, 5)

    def outer(theta: np.ndarray, i: int) -> float:
        x, y, lam = p["X"][i], p["y"][i], p["lam"]

        def inner(phi: np.ndarray) -> tuple[float, np.ndarray]:
            margin = y * (x @ phi)
            grad = x.T @ (-y / (1 + np.exp(margin))) / len(y) + lam * (phi - theta)
            return np.logaddexp(0, -margin).mean() + lam / 2 * ((phi - theta) ** 2).sum(), grad

        def hessian(phi: np.ndarray) -> np.ndarray:
            q = 1 / (1 + np.exp(x @ phi))
            return (x * (q * (1 - q))[:, None]).T @ x / len(y) + lam * np.eye(len(phi))

        phi = minimize(inner, theta, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-11}).x
        return np.logaddexp(0, -p["y_val"][i] * (p["X_val"][i] @ phi)).mean()

    for i in range(3):
        steps = 1e-4 * np.eye(len(p["theta"]))
        slope = [(outer(p["theta"] + step, i) - outer(p["theta"] - step, i)) / 2e-4 for step in steps]
        assert error(np.array(slope), p["reference"][i]) < 1e-4


def test_reference_of_the_smoothing(scripts: Any) -> None:
    """The same by dense matrices, and this library within the limit of it."""
    scaling = scripts("scaling")
    hypergradient, exact = scaling.smoothing(40)
    assert error(hypergradient(), exact()) < scaling.LIMIT
    generator = torch.Generator().manual_seed(40)
    clean = torch.linspace(0, 6 * 40**0.25, 40, dtype=torch.float64).sin().numpy()
    noisy = clean + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64).numpy()
    theta = torch.rand(39, generator=generator, dtype=torch.float64).numpy() - 1
    difference = np.diff(np.eye(40), axis=0)
    matrix = np.eye(40) + difference.T @ (np.exp(theta)[:, None] * difference)
    phi = np.linalg.solve(matrix, noisy)
    u = np.linalg.solve(matrix, phi - clean)
    assert error(exact(), -np.exp(theta) * (difference @ phi) * (difference @ u)) < 1e-12


def test_the_loops_by_hand_of_few_shot_learning(scripts: Any) -> None:
    """A model so small that 5 CG steps are exact: the implicit gradient by dense algebra, MAML's by differences."""
    by_hand = scripts("few_shot_problem")
    g = torch.Generator().manual_seed(0)
    x, query, theta = (torch.randn(n, generator=g, dtype=torch.float64) for n in ((6, 4), (5, 4), (4,)))
    y, query_y = x[:, 0].sin(), query[:, 1].cos()

    def loss(phi: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x @ phi[0]).tanh() - y).square().mean()

    (phi,) = by_hand.adapted(loss, (theta,), x, y, 3.0)
    hessian = torch.func.hessian(lambda phi: loss((phi,), x, y))(phi.detach())
    slope = torch.func.grad(lambda phi: loss((phi,), query, query_y))(phi.detach())
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + hessian / 3.0, slope)
    (found,) = by_hand.imaml(loss, (theta,), (x, y, query, query_y), 3.0)
    assert error(found, exact.numpy()) < 1e-10

    def after_steps(theta: torch.Tensor) -> torch.Tensor:
        for _ in range(by_hand.INNER_STEPS):
            theta = theta - by_hand.STEP_SIZE * torch.func.grad(lambda phi: loss((phi,), x, y))(theta)
        return loss((theta,), query, query_y)

    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(after_steps(theta + step) - after_steps(theta - step)) / 2e-5 for step in steps])
    (found,) = by_hand.maml(loss, (theta,), (x, y, query, query_y))
    assert error(found, differences.numpy()) < 1e-7


# what every method computes


@pytest.mark.parametrize("mode", ["eager", "compile", "quadratic", "quadratic-compile"])
def test_this_library_on_the_quadratic(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    quadratic = scripts("quadratic")
    assert mode in quadratic.OURS.values()
    found = run_peer(scripts, monkeypatch, "quadratic_bilevel", quadratic.instance(1), tmp_path, mode)
    assert found < quadratic.LIMIT


@pytest.mark.parametrize("peer", ["torch", "numpy", "torchopt", "higher", "xitorch", "jaxopt", "betty"])
def test_peers_on_the_quadratic(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, peer: str) -> None:
    pytest.importorskip(peer)
    quadratic = scripts("quadratic")
    found = run_peer(scripts, monkeypatch, f"quadratic_{peer}", quadratic.instance(1), tmp_path)
    assert (found < quadratic.LIMIT) == (peer != "betty")  # its CG is wrong


@pytest.mark.parametrize("method", ["bilevel", "torch", "torchopt", "jaxopt"])
def test_methods_of_the_logistic_regression(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    if method != "bilevel":
        pytest.importorskip(method)
    logistic, errors = scripts("logistic"), []
    for name, size in (("EXAMPLES", 60), ("FEATURES", 7), ("CLASSES", 3)):
        monkeypatch.setattr(logistic, name, size)
    np.savez(tmp_path / "problem.npz", **logistic.instance(1))

    def serve(hypergradient: Any, error: Any) -> None:
        errors.append(error(hypergradient(1e-9, 1e-9)))

    monkeypatch.setattr(scripts("worker"), "serve", serve)
    monkeypatch.setattr(sys, "argv", [method, str(tmp_path / "problem.npz"), "1", "compile"])
    runpy.run_path(str(BENCHMARKS / "peers" / f"logistic_{method}.py"))
    assert errors[0] < 1e-7


@pytest.mark.parametrize(
    ("name", "work", "mode"),
    [
        ("batch_bilevel", "E", "fixed"),
        ("batch_bilevel", "E", "fixed-compile"),
        ("batch_bilevel", "F", "masked"),
        ("batch_bilevel", "F", "unmasked"),
        ("batch_torch", "E", "E"),
        ("batch_torch", "F", "F"),
    ],
)
def test_methods_of_the_batch(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, work: str, mode: str
) -> None:
    batch = scripts("batch")
    assert run_peer(scripts, monkeypatch, name, batch.instance(work, 8, 2), tmp_path, mode) < batch.LIMIT


def test_this_library_on_few_shot_learning(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few_shot = scripts("few_shot")
    monkeypatch.setitem(few_shot.WORKS, "A", {"count": 2, "ways": 3, "shots": 1})
    arrays = few_shot.instance("A", 0)
    assert run_peer(scripts, monkeypatch, "few_shot_bilevel", arrays, tmp_path, "2,1") < few_shot.LIMIT


# protocol and pages


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::mm", 0),
        ("aten::_convolution", 0),
        ("aten::mkldnn_convolution", 0),
        ("aten::convolution_backward", 0),
        ("aten::addmv_", 0),
        ("mkldnn::_linear_pointwise", 0),
        ("aten::copy_", 1),
        ("aten::_to_copy", 1),
        ("aten::im2col", 1),
        ("aten::mul", 2),
        ("aten::sum", 2),
        ("aten::mean", 2),
    ],
)
def test_kinds_of_operators(scripts: Any, operator: str, expected: int) -> None:
    shares = scripts("shares")
    assert shares.kind(operator) == [*shares.KINDS, shares.REST][expected]


def test_shares_of_a_product_and_a_pause(scripts: Any) -> None:
    x = torch.randn(400, 400)

    def work() -> None:
        for _ in range(10):
            x @ x
        time.sleep(0.02)

    found = scripts("shares").spent(work, 0.2)
    assert found["milliseconds"] > 20 and found["operators"] >= 10
    assert found["shares"]["between operators"] > 0.1 and sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["products and convolutions"] > 10 * found["shares"]["copies and layout"]


def test_the_script_of_the_shares(scripts: Any, tmp_path: Path) -> None:
    command = [
        sys.executable,
        BENCHMARKS / "shares.py",
        "--works",
        "C",
        "--seconds",
        "0.01",
        "--json",
        tmp_path / "found.json",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]["C"]
    assert rows["bilevel"]["operators"] < rows["by hand"]["operators"]  # what quadratic=True is for


def test_turns_on_the_command_line(tmp_path: Path, scripts: Any) -> None:
    """Processes that take turns, from the command to the page."""
    path = tmp_path / "quadratic.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "quadratic.py"), "--quick", "--json", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["options"]["best"] == "PyTorch by hand" and result["rows"]["PyTorch by hand"]["faster"] == 1
    assert all(len(row["turns"]) == 3 and row["peak_mb"] >= 0 for row in result["rows"].values())
    page = scripts("peers_page").quadratic(result)
    assert "A quick run" in page and not re.search(r"\b(nan|inf|None)\b|/\w+/", page), page


def rows_of(**milliseconds: float) -> dict[str, Any]:
    turns = {
        name: [{"seconds": value * k, "cpu": value * k} for k in (1, 2, 3)] for name, value in milliseconds.items()
    }
    return {name: {"error": 1e-9, "right": True, "peak_mb": 1.0, "turns": turns[name]} for name in turns}


def test_ratios_are_those_of_the_same_round(scripts: Any) -> None:
    """A machine that becomes slower and slower changes no ratio; a wrong method is no peer."""
    rows = rows_of(bilevel=1.0, slow=10.0, fast=5.0) | {
        "wrong": {"error": 1.0, "right": False, "peak_mb": 0, "turns": []}
    }
    assert scripts("turns").summarise(rows, ["slow", "fast", "wrong"]) == "fast"
    assert rows["bilevel"]["faster"] == 5 and rows["bilevel"]["faster_quartiles"] == [5, 5]
    assert rows["slow"]["faster"] == 0.5 and "faster" not in rows["wrong"]


@pytest.mark.parametrize(("target", "words"), [(4.0, "; reached: 5.00"), (8.0, "**not reached**: 5.00")])
def test_the_page_says_whether_the_target_is_reached(scripts: Any, target: float, words: str) -> None:
    rows = rows_of(bilevel=1.0, peer=5.0)
    scripts("turns").summarise(rows, ["peer"])
    assert words in scripts("peers_page").verdict(rows, "peer", target)


def test_the_page_says_how_much_faster_than_a_published_package(scripts: Any) -> None:
    rows = rows_of(**{"bilevel": 1.0, "by hand": 5.0, "TorchOpt, loop": 6.0, "xitorch": 7.0, "JAXopt": 0.1})
    scripts("turns").summarise(rows, ["by hand", "TorchOpt, loop", "xitorch"])
    assert scripts("peers_page").verdict(rows, "by hand", 8).endswith("was *TorchOpt, loop*: 6.00 times.")
    assert "published" not in scripts("peers_page").verdict(rows, "TorchOpt, loop", 8)


@pytest.mark.parametrize("name", ["quadratic", "batch", "few_shot", "scaling"])
def test_pages_are_those_of_their_numbers(scripts: Any, name: str) -> None:
    publish: ModuleType = scripts("publish")
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert "--quick" not in result["environment"]["command"]
    page = (RESULTS / f"{name}.md").read_text()
    assert page == publish.BENCHMARKS[name](name, result)
    assert not re.search(r"\b(nan|inf|None)\b", page), page
