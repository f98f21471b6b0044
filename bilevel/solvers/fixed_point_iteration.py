"""Plain iteration of a map, with relaxation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from bilevel.checks import check_count, check_number, keep_python_numbers
from bilevel.derivatives import Objective
from bilevel.solvers.base import NO_PROGRESS, IterativeSolver, Local, State


@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(IterativeSolver):
    """phi <- phi - relaxation F(phi); for ``fixed_point``, where F = phi - T(phi), phi <- T(phi) (Banach 1922).

    Converges where the map is a contraction near the solution, at the rate of its largest eigenvalue. Where it is none (a rotation
    about a centre, say), the residual is at the end what it was at the start, or larger, and the status is ``DIVERGED``.

    Args:
        max_steps: evaluations of F, >= 1.
        tol: stop a problem where ``|F| <= tol``; 0 takes all steps without reading a number back to the host.
        relaxation: 1 is the plain iteration; less damps it (Krasnoselskii 1955), > 0.
        check_every: with ``tol > 0`` on an accelerator, steps between two looks at whether all problems are done. On the CPU every step.
    """

    minimises: ClassVar[bool] = False
    growth: ClassVar[float] = NO_PROGRESS

    max_steps: int
    tol: float = 0.0
    relaxation: float = 1.0
    check_every: int = 10

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_number("tol", self.tol)
        check_number("relaxation", self.relaxation, positive=True)
        check_count("check_every", self.check_every)
        keep_python_numbers(self)

    def init(self, objective: Objective, phi: Tensor) -> State:
        return State.start(phi)

    def step(self, objective: Objective, state: State, local: Local) -> State:
        phi = state.point - self.relaxation * local.grad
        return replace(state, phi=phi, point=phi, stalled=state.stalled | ~local.value.isfinite())
