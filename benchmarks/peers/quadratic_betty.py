"""Work C with Betty: two problems and its engine, conjugate gradients.

In version 0.1.1 the next search direction is built from the residual before the last (`betty/hypergradient/cg.py`, `zip(r, p)` in place of
`zip(r_new, p)`), so the answer is wrong after the first step, however many follow.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from fixed import serve
from quadratic_problem import CG_STEPS, GD_STEPS, REFERENCE, STEP_SIZE, inner, outer, start, theta

logging.disable(logging.CRITICAL)
GRAD: list[torch.Tensor] = []


class Point(torch.nn.Module):
    """One variable as a module."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())

    def forward(self) -> torch.Tensor:
        """The variable."""
        return self.value


class Upper(ImplicitProblem):
    """theta."""

    def training_step(self, batch: Any) -> torch.Tensor:
        """L."""
        return outer(self.lower(), self())

    def custom_optimizer_step(self) -> None:
        """The gradient is what is wanted; theta stays."""
        GRAD[:] = [self.module.value.grad.clone()]


class Lower(ImplicitProblem):
    """phi."""

    def training_step(self, batch: Any) -> torch.Tensor:
        """G."""
        return inner(self(), self.upper())


def module(name: str, value: torch.Tensor, kind: type[ImplicitProblem], config: Config) -> ImplicitProblem:
    """A problem with plain gradient steps; there is no data to load."""
    net = Point(value)
    optimizer = torch.optim.SGD(net.parameters(), STEP_SIZE)
    return kind(name, config, net, optimizer, train_data_loader=[()])


UPPER = module("upper", theta, Upper, Config(retain_graph=True))
LOWER = module(
    "lower",
    start(),
    Lower,
    Config(type="cg", cg_iterations=CG_STEPS, unroll_steps=GD_STEPS),
)
ENGINE = Engine(
    problems=[UPPER, LOWER],
    config=EngineConfig(train_iters=GD_STEPS),
    dependencies={"u2l": {UPPER: [LOWER]}, "l2u": {LOWER: [UPPER]}},
)


def hypergradient() -> torch.Tensor:
    """dL/dtheta."""
    with torch.no_grad():
        LOWER.module.value.zero_()
    ENGINE.run()
    return GRAD[0]


serve(hypergradient, REFERENCE)
