"""Meta-test: the numbers, the classes, and what fails."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.data import TaskBatch
from applications.meta_learning.evaluate import PAPER, TIGHT, Evaluation, Stopped, evaluate
from applications.meta_learning.problem import cross_entropy, few_shot_problem, squared_error
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer
from bilevel.solvers import GradientDescent
from tests.meta_learning.tiny import SINUSOID, TINY, tiny_source

GD = GradientDescent(step_size=0.5, max_steps=3)


class Fixed:
    """A sampler that hands out prepared tasks one batch after the other."""

    def __init__(self, data: TaskBatch) -> None:
        self.data, self.next = data, 0

    def sample(self, num_tasks: int) -> TaskBatch:
        cut = slice(self.next, self.next + num_tasks)
        self.next += num_tasks
        return {part: {key: value[cut] for key, value in tensors.items()} for part, tensors in self.data.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


def easy_tasks(tasks: int) -> TaskBatch:
    """Two classes on either side of zero; in the query set of task t, t % 3 of the four labels are wrong."""
    x = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]]).expand(tasks, 4, 1)
    y = torch.tensor([0, 1, 0, 1]).repeat(tasks, 1)
    wrong = y.clone()
    for task in range(tasks):
        wrong[task, : task % 3] = 1 - wrong[task, : task % 3]
    return {"support": {"x": x, "y": y}, "query": {"x": x, "y": wrong}}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(1, 2)


def run(data: TaskBatch, tasks: int, net: nn.Module | None = None) -> Evaluation:
    net = net or linear()
    theta = {name: p.detach().clone() for name, p in net.named_parameters()}
    loss = squared_error if data["query"]["y"].is_floating_point() else cross_entropy
    return evaluate(few_shot_problem(net, loss, 0.01), net, theta, Fixed(data), solver=GD, tasks=tasks, query_shots=2)


def test_a_trainer_tests_as_many_tasks_at_once_as_it_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    solve = bilevel.solve

    def spy(*args: Any, chunk_size: int | None, **options: Any) -> Any:
        seen.add(chunk_size or 25)
        return solve(*args, chunk_size=chunk_size, **options)

    monkeypatch.setattr(bilevel, "solve", spy)
    results = []
    for size in (0, 4):
        trainer = Trainer(replace(TINY, chunk_size=size), tiny_source())
        results.append(trainer.test(tasks=30, query_shots=2, seed=1))
        ((steps, _), *_) = trainer.test_over_inner_steps(tasks=5, query_shots=2, seed=1)
        assert seen == {size or 25} and steps == 1
        seen.clear()
    assert replace(results[0], inner_residual=0.0) == replace(results[1], inner_residual=0.0)
    assert results[0].inner_residual == pytest.approx(results[1].inner_residual)


def test_accuracy_and_its_interval() -> None:
    result = run(easy_tasks(60), 60)  # three batches, the last one short
    scores = [1.0, 0.75, 0.5] * 20
    mean = sum(scores) / 60
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 59)
    assert result.metric == "accuracy" and result.tasks == 60 and result.failed == 0
    assert result.mean == pytest.approx(mean) and result.interval == pytest.approx(1.96 * deviation / math.sqrt(60))
    assert str(result) == f"{100 * mean:.2f} ± {100 * result.interval:.2f} %"


def test_a_failed_task_counts_as_wrong() -> None:
    data = easy_tasks(6)
    data["support"]["x"] = data["support"]["x"].clone()
    data["support"]["x"][0] = torch.nan
    result = run(data, 6)
    assert result.failed == 1 and result.mean == pytest.approx((0 + 0.75 + 0.5 + 1 + 0.75 + 0.5) / 6)


def test_a_failed_regression_task_is_left_out_and_counted() -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 5, 1)
    data = {"support": {"x": x, "y": 2 * x}, "query": {"x": x, "y": 2 * x}}
    net = nn.Linear(1, 1)
    whole = run(data, 4, net)
    data["support"]["x"] = x.clone()
    data["support"]["x"][3] = torch.inf
    result = run(data, 4, net)
    assert whole.metric == "mse" and whole.failed == 0 and result.failed == 1
    assert math.isfinite(result.mean) and result.mean != whole.mean


def test_mean_squared_error_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    x = torch.ones(2, 2, 1)
    data = {
        "support": {"x": x, "y": torch.zeros_like(x)},
        "query": {"x": x, "y": torch.tensor([[[1.0], [3.0]], [[2.0], [2.0]]])},
    }
    result = run(data, 2, net)  # the best answer to the support set is theta, 0
    assert result.mean == pytest.approx(((1 + 9) / 2 + 4) / 2)


def test_the_protocols_are_the_papers_and_a_tight_one() -> None:
    assert (PAPER.tasks, PAPER.query_shots) == (600, None) and (TIGHT.tasks, TIGHT.query_shots) == (1000, 15)


def test_held_out_classes_only_and_never_rotated() -> None:
    """Each image of a test task is, as it is, a drawing of a class of split.test."""
    source = load_source(replace(TINY, rotations=True))
    assert source.classes is not None and source.split is not None
    sampler = source.sampler(TINY, held_out=True, query_shots=2, seed=0, device=torch.device("cpu"))
    data = sampler.sample(20)
    held_out = {drawing.numpy().tobytes() for index in source.split.test for drawing in source.classes.images[index]}
    training = {drawing.numpy().tobytes() for index in source.split.train for drawing in source.classes.images[index]}
    for part in ("support", "query"):
        for image in (data[part]["x"] * 255).round().byte().flatten(0, 2):
            assert image.numpy().tobytes() in held_out and image.numpy().tobytes() not in training


def test_a_seed_stands_for_the_same_tasks() -> None:
    trainer = Trainer(TINY, tiny_source())
    first = trainer.test(tasks=30, query_shots=2, seed=1)
    assert trainer.test(tasks=30, query_shots=2, seed=1) == first
    assert trainer.test(tasks=30, query_shots=2, seed=2).mean != first.mean


def test_an_evaluation_can_be_abandoned() -> None:
    trainer = Trainer(TINY, tiny_source())
    with pytest.raises(Stopped):
        trainer.test(tasks=30, query_shots=2, seed=1, should_stop=lambda: True)


def test_theta_and_the_training_tasks_are_not_touched_by_an_evaluation() -> None:
    trainer, twin = Trainer(TINY, tiny_source()), Trainer(TINY, tiny_source())
    trainer.check_progress()
    trainer.meta_step()
    twin.meta_step()
    assert all(torch.equal(leaf, twin.theta[name]) for name, leaf in trainer.theta.items())


def test_the_best_evaluation_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def sequence(config: Config, means: list[float], metric: str) -> tuple[float | None, int | None]:
        trainer = Trainer(config, tiny_source(config))
        given = iter(means)
        monkeypatch.setattr(
            trainer,
            "test",
            lambda **_: Evaluation(
                metric=metric, mean=next(given), interval=0, tasks=1, query_shots=1, failed=0, inner_residual=0
            ),
        )
        for step in range(len(means)):
            trainer.progress.step = step
            trainer.check_progress()
        return trainer.progress.best, trainer.progress.best_step

    assert sequence(TINY, [0.2, 0.5, 0.4], "accuracy") == (0.5, 1)
    assert sequence(SINUSOID, [0.5, 0.2, math.nan, 0.4], "mse") == (0.2, 1)


def test_error_over_inner_steps_of_sinusoids() -> None:
    config = replace(SINUSOID, inner_step_size=0.0)
    trainer = Trainer(config, tiny_source(config))
    curve = trainer.test_over_inner_steps(tasks=10, query_shots=5, seed=0)
    assert [steps for steps, _ in curve] == [1, 2, 3, 5, 10, 20, 50, 100]
    assert curve[-1][1].inner_residual < curve[0][1].inner_residual


def test_held_out_sinusoids_are_not_the_training_sinusoids() -> None:
    source = tiny_source(SINUSOID)
    samplers = [
        source.sampler(SINUSOID, held_out=held_out, query_shots=5, seed=0, device=torch.device("cpu"))
        for held_out in (False, True)
    ]
    first, second = (sampler.sample(4) for sampler in samplers)
    assert not torch.equal(first["support"]["x"], second["support"]["x"])
