"""Few-shot learning as a bilevel problem: adapt to the support set near theta, be judged on the query set."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from applications.meta_learning.data import TaskBatch
from applications.meta_learning.models import check_module
from applications.meta_learning.outputs import adapted_parameters, outputs_of
from bilevel import BilevelProblem, ProximalProblem

Theta = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
OfTask = Callable[[Theta, TaskBatch], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits (n, ways) for labels (n,)."""
    return nn.functional.cross_entropy(logits, y)


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of outputs (n, 1) for targets (n, 1)."""
    return nn.functional.mse_loss(outputs, y)


def few_shot_losses(module: nn.Module, loss: Loss) -> tuple[OfTask, Callable[[Tensor, TaskBatch], Tensor], OfTask]:
    """The parts of :func:`few_shot_problem`, in the order of ``from_model``: predict, output_loss, test_loss.

    Args:
        module, loss: as there.

    Raises:
        ValueError: the module keeps statistics or draws random numbers.
    """
    check_module(module)
    outputs_at = outputs_of(module)

    def predict(phi: Theta, task: TaskBatch) -> Tensor:
        return outputs_at(phi, task["support"]["x"])

    def output_loss(outputs: Tensor, task: TaskBatch) -> Tensor:
        return loss(outputs, task["support"]["y"])

    def test_loss(phi: Theta, task: TaskBatch) -> Tensor:
        return loss(outputs_at(phi, task["query"]["x"]), task["query"]["y"])

    return predict, output_loss, test_loss


def few_shot_problem(module: nn.Module, loss: Loss, lam: float | Mapping[str, float]) -> ProximalProblem:
    """One task: ``G(phi) = support loss + lambda/2 |phi - theta|^2``, ``L(phi) = query loss`` (paper, Eq. 3 and 4).

    Args:
        module: gives the architecture; phi and theta are dicts like ``dict(module.named_parameters())`` (``initial_theta``
            copies them). Its own parameters are not used, except frozen ones (``requires_grad=False``): they are in neither phi nor
            theta, and the module's own stay as they are.
        loss: (outputs, targets) -> scalar, a mean over the examples, convex in the outputs if ``GaussNewton()`` is used.
        lam: lambda of the paper, one for all parameters or one for each by name.

    The data of a task are ``{"support": {"x": ..., "y": ...}, "query": {"x": ..., "y": ...}}``.

    Raises:
        ValueError: the module keeps statistics or draws random numbers, or lam does not name its parameters.
    """
    parts = few_shot_losses(module, loss)
    names = adapted_parameters(module).keys()
    if isinstance(lam, Mapping) and set(lam) != names:
        raise ValueError(f"lam: expected one entry for each of the parameters {sorted(names)}, got {sorted(lam)}")
    return ProximalProblem.from_model(*parts, dict(lam) if isinstance(lam, Mapping) else lam)


def plain_problem(module: nn.Module, loss: Loss) -> BilevelProblem:
    """One task without the proximal term, G(phi) = support loss: what MAML and Reptile adapt with. It starts at theta, and theta is
    in it only through that start.
    """
    check_module(module)
    outputs_at = outputs_of(module)

    def part(name: str) -> Callable[[Theta, Theta, TaskBatch], Tensor]:
        return lambda phi, theta, task: loss(outputs_at(phi, task[name]["x"]), task[name]["y"])

    def start(theta: Theta, task: TaskBatch) -> Theta:
        return {name: leaf.clone() for name, leaf in theta.items()}

    return BilevelProblem.from_functions(part("support"), part("query"), start)


def head_and_body(module: nn.Module, lam: float, lam_head: float) -> dict[str, float]:
    """lambda of each parameter that is not frozen: ``lam_head`` in the submodule ``head``, ``lam`` in all others."""
    return {name: lam_head if name.startswith("head.") else lam for name in adapted_parameters(module)}


def batched_outputs(module: nn.Module, phi: Theta, x: Tensor) -> Tensor:
    """Outputs of each task's own network: phi has leaves (tasks, ...), x is (tasks, n, ...) -> (tasks, n, outputs)."""
    with torch.no_grad():
        return torch.func.vmap(outputs_of(module))(phi, x)
