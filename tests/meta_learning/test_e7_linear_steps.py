"""The ladder of E7 from first-order MAML to iMAML: dense algebra and hand-written CG, E4's settings, SciPy's Student's t."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.func import functional_call, jacrev

from applications.meta_learning.algorithms import ImplicitMAML
from applications.meta_learning.checkpoint import load_checkpoint
from applications.meta_learning.config import Config
from applications.meta_learning.data import DataError
from applications.meta_learning.evaluate import Protocol
from applications.meta_learning.experiments import e4_omniglot as e4
from applications.meta_learning.experiments import e7_linear_steps as e7
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.experiments.training import trained
from applications.meta_learning.method import build_method, build_network
from applications.meta_learning.run import CHECKPOINT
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer
from bilevel.linsys import CG, Identity

LADDER = (0, 1, 3)


def request_for(folder: Path, **changes: Any) -> Request:
    return Request(**{"quick": True, "seed": 0, "data_dir": None, "parts": folder, **changes})


def test_rows_have_the_settings_of_e4(tmp_path: Path) -> None:
    request = request_for(tmp_path, quick=False, data_dir=Path("omniglot"))
    size = {"channels", "device", "outer_steps", "eval_interval", "eval_tasks", "linear_steps"}
    for steps in e7.LADDER:
        config = e7.settings(request, 0, steps)
        other = e4.E4CPU().config(e4.Cell("5w1s", e4.FIXED_FIRST_ORDER, "random", 0), request).to_dict()
        linear = {"linear", "curvature"} if steps else set()
        assert {key for key, value in config.to_dict().items() if value != other[key]} <= size | linear
        algorithm = build_method(config, build_network(config)).algorithm
        assert isinstance(algorithm, ImplicitMAML)
        assert algorithm.linsys == (CG(max_steps=steps, rtol=0.0) if steps else Identity())


def test_without_the_images_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        e7.E7LinearSteps().run(request_for(tmp_path / "parts", data_dir=tmp_path))


def pcg(matrix: np.ndarray, b: np.ndarray, weights: np.ndarray, steps: int) -> np.ndarray:
    """Conjugate gradients with the diagonal preconditioner 1 / weights, from 0 (Shewchuk 1994, B3); 0 steps: b / weights."""
    if not steps:
        return b / weights
    u, r = np.zeros_like(b), b.copy()
    d = r / weights
    delta = r @ d
    for _ in range(steps):
        q = matrix @ d
        alpha = delta / (d @ q)
        u, r = u + alpha * d, r - alpha * q
        s = r / weights
        delta, before = r @ s, delta
        d = s + delta / before * d
    return u


def flat(tree: dict[str, Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([tree[name].detach().flatten().numpy() for name in names])


def dense(trainer: Trainer, phi: Any, task: Any, names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda, Lambda + Gauss-Newton matrix, and the gradient of the query loss, of one task."""
    config, module = trainer.config, trainer.module
    weights = np.concatenate(
        [
            np.full(phi[name].numel(), config.lam_head if name.startswith("head.") else config.lam)
            for name in names
        ]
    )  # fmt: skip
    jacobian = jacrev(lambda p: functional_call(module, p, (task["support"]["x"],)))(phi)
    n, ways = task["support"]["y"].numel(), config.ways
    j = np.concatenate([jacobian[name].reshape(n * ways, -1).numpy() for name in names], axis=1)
    p = functional_call(module, phi, (task["support"]["x"],)).softmax(-1).detach().numpy()
    of_outputs = np.zeros((n * ways, n * ways))
    for i in range(n):
        block = slice(i * ways, (i + 1) * ways)
        of_outputs[block, block] = (np.diag(p[i]) - np.outer(p[i], p[i])) / n

    def query_loss(p: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(functional_call(module, p, (task["query"]["x"],)), task["query"]["y"])

    return weights, np.diag(weights) + j.T @ of_outputs @ j, flat(torch.func.grad(query_loss)(phi), names)


def expected_rows(trainer: Trainer, data: Any) -> list[dict[str, float]]:
    """Error and cosine of each rung, by dense algebra at the adapted parameters."""
    names, method = list(trainer.theta), trainer.method
    phi = method.algorithm.meta_gradient(method.problem, trainer.theta, data).phi
    rungs: dict[int | None, list[np.ndarray]] = {steps: [] for steps in (*LADDER, None)}
    for i in range(len(data["query"]["x"])):
        task = {part: {key: value[i] for key, value in examples.items()} for part, examples in data.items()}
        weights, matrix, b = dense(trainer, {name: leaf[i].detach() for name, leaf in phi.items()}, task, names)
        for steps, found in rungs.items():
            found.append(weights * (np.linalg.solve(matrix, b) if steps is None else pcg(matrix, b, weights, steps)))
    means = {steps: np.mean(found, axis=0) for steps, found in rungs.items()}
    exact = means.pop(None)
    size = np.linalg.norm
    return [
        {
            "linear_steps": steps,
            "error": float(size(mean - exact) / size(exact)),
            "cosine": float(mean @ exact / size(mean) / size(exact)),
        }
        for steps, mean in means.items()
    ]


def trained_network(tmp_path: Path) -> tuple[Config, Path]:
    request = request_for(tmp_path)
    config = replace(e7.settings(request, 0, 5), channels=2)
    trained(request, "one", config, (Protocol(name="test", tasks=2, query_shots=2),), trace_every=1)
    return config, tmp_path / "one" / CHECKPOINT


def test_gradients_are_those_of_dense_algebra(tmp_path: Path) -> None:
    config, checkpoint = trained_network(tmp_path)
    found = e7.gradients(config, None, checkpoint, LADDER)
    assert found["tasks"] == e7.GRADIENT_TASKS
    double = replace(config, dtype="float64")
    trainer = Trainer(double, load_source(double))
    data = trainer.source.sampler(
        double, held_out=True, query_shots=10, seed=e7.GRADIENT_SEED, device=torch.device("cpu")
    ).sample(e7.GRADIENT_TASKS)
    for network, measured in found["networks"].items():
        if network == "trained network":
            before = {name: leaf.clone() for name, leaf in trainer.theta.items()}
            for name, leaf in trainer.theta.items():
                leaf.copy_(load_checkpoint(checkpoint)["theta"][name].double())
            assert any(not torch.equal(before[name], leaf) for name, leaf in trainer.theta.items())
        assert measured["unsolved"] == 0
        for row, expected in zip(measured["rows"], expected_rows(trainer, data), strict=True):
            assert row == pytest.approx(expected, rel=1e-6)


def test_first_step_is_along_first_order_maml_for_one_task(tmp_path: Path) -> None:
    """What the page says of one step."""
    config = replace(e7.settings(request_for(tmp_path), 0, 1), dtype="float64")
    trainer = Trainer(config, load_source(config))
    data = trainer.sampler.sample(1)
    grads = []
    for changes in ({}, {"linear": "identity"}):
        method = build_method(replace(config, **changes), trainer.module)  # type: ignore[arg-type]
        grads.append(
            flat(method.algorithm.meta_gradient(method.problem, trainer.theta, data).grad, list(trainer.theta))
        )
    assert grads[0] @ grads[1] / np.linalg.norm(grads[0]) / np.linalg.norm(grads[1]) == pytest.approx(1, abs=1e-12)


def run(steps: int, seed: int, means: list[float], seconds: float, final: float) -> dict[str, Any]:
    """A run whose evaluations come at equal times."""
    times = np.linspace(0, seconds, len(means))
    return {
        "linear_steps": steps,
        "seed": seed,
        "steps": 10,
        "step_seconds": seconds,
        "curve": [{"step_seconds": float(t), "mean": m} for t, m in zip(times, means, strict=True)],
        "tests": {"test": {"mean": final, "interval": 0.01}},
    }


def test_differences_are_taken_seed_by_seed() -> None:
    gains = [0.04, 0.05, 0.06]
    first = [run(0, seed, [0.2, 0.6, 0.8], 10.0, 0.7 + 0.05 * seed) for seed in range(3)]
    dear = [run(5, seed, [0.2, 0.7, 0.9], 20.0, 0.7 + 0.05 * seed + gains[seed]) for seed in range(3)]
    same = [run(1, seed, [0.2, 0.6, 0.8], 10.0, 0.71 + 0.05 * seed - 0.02 * (seed == 1)) for seed in range(3)]
    assert e7.equal_steps(dear, first) == pytest.approx([4, 5, 6])
    # at 10 s the dear run is half-way, at 70 %, and the cheap one at its end, at 80 %
    assert e7.equal_time(dear, first) == pytest.approx([-10] * 3)
    assert e7.equal_time(first, dear) == pytest.approx([10] * 3)
    lines = e7._accuracies({"ladder": [0, 1, 5], "seeds": 3, "runs": [*first, *same, *dear]})
    low, high = stats.t.interval(0.95, 2, loc=5, scale=stats.sem([4, 5, 6]))
    row = next(line for line in lines if line.startswith("| 5 |"))
    assert f"| +5.0 ± {(high - low) / 2:.1f} | -10.0 ± 0.0 | 2.00 | 2.0 |" in row
    assert lines[-1].endswith("at equal outer steps: 5 (above).")
