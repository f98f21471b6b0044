"""The optimizers of ``torch.optim`` as inner solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.derivatives import Objective
from bilevel.linsys.base import norm
from bilevel.solvers.black_box import Answer, TaskByTask
from bilevel.trees import flatten


@dataclass(frozen=True)
class TorchOptim(TaskByTask):
    """An optimizer of ``torch.optim``, or one with its interface, on a copy of the start: one task at a time.

    An optimizer of its own for each task, so that no task can disturb another, not by the optimizer's state either. One gradient for
    each step, more for optimizers that evaluate a closure several times (``torch.optim.LBFGS``). It reads the gradient norm back at
    each step; for many tasks at once and steps of plain gradient descent :class:`~bilevel.solvers.GradientDescent` is faster.

    Args:
        factory: makes the optimizer of one task, ``lambda params: torch.optim.Adam(params, lr=1e-2)``; ``params`` are the leaves of
            phi, a list.
        max_steps: calls of ``optimizer.step``, >= 1.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps, unless it is exactly zero.

    Raises:
        TypeError, ValueError: at use, the factory makes no optimizer, or one of other tensors than it is given.
    """

    factory: Callable[[list[Tensor]], Any]
    max_steps: int
    _: KW_ONLY
    tol: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.factory):
            raise TypeError(
                f"factory: expected a function of the parameters that makes an optimizer, for example "
                f"lambda params: torch.optim.Adam(params, lr=1e-2), got {type(self.factory).__name__}."
            )
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        keep_python_numbers(self)

    def find(self, objective: Objective, phi: Tensor) -> Answer:
        layout = objective.flat.phi
        leaves = [leaf.clone().requires_grad_() for leaf in flatten(layout.unravel(phi))[0]]
        optimizer = self.factory(leaves)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"factory: expected it to make a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not all(id(leaf) in held for leaf in leaves):
            raise ValueError(
                "factory: expected an optimizer of the parameters that it is given, got one that does not hold all of them. "
                "Write lambda params: torch.optim.Adam(params, lr=1e-2), and not with module.parameters()."
            )
        seen: list[Tensor] = []  # the last point, and G and its gradient there

        def closure() -> Tensor:
            point = layout.ravel([leaf.detach() for leaf in leaves])
            if not seen or not torch.equal(seen[0], point):  # an optimizer asks for where it starts, which was measured
                found = objective.value_and_grad(point)
                seen[:] = point.clone(), *found
            for leaf, grad in zip(leaves, flatten(layout.unravel(seen[2]))[0], strict=True):
                leaf.grad = grad.clone()
            return seen[1]

        start, k = torch.nan, 0
        while k < self.max_steps:
            closure()
            size = norm(seen[2]).item()
            start = size if k == 0 and seen[1].isfinite() else start
            if not self.tol < size < torch.inf:  # done, or NaN
                break
            try:
                optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, its own optimizers take tensors
            except IndexError:  # the line search of torch.optim.LBFGS, where G was no number
                if seen[1].isfinite():
                    raise
                break
            k += 1
        return Answer(layout.ravel([leaf.detach() for leaf in leaves]).clone(), k, start)
