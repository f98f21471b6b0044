"""The minimum of G, found again without the solver that is checked, and the outer loss of the solved problem around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel
from bilevel.solvers import NewtonCG
from bilevel.testing.reference import DENSE, Point, System
from bilevel.testing.view import View
from bilevel.trees import flatten

NEWTON_STEPS = 100


@dataclass(frozen=True)
class Minimum:
    """Where a descent ended.

    Attributes:
        phi: the point ``(d,)``.
        fault: why it is no strict minimum; '' if it is one.
        kappa: the condition number of the Hessian there; None where it was not computed.
    """

    phi: Tensor
    fault: str = ""
    kappa: float | None = None


def minimise(view: View, phi: Tensor, theta: Tensor) -> Minimum:
    """Descend from phi to a minimum of G: Newton's method with |eigenvalues| for eigenvalues and a line search on values.

    For more than ``DENSE`` variables: ``NewtonCG``.
    """
    if phi.numel() > DENSE:
        return _minimise_without_matrix(view, phi, theta)
    step, values = torch.full_like(phi, torch.inf), phi
    for _ in range(NEWTON_STEPS):
        point = Point(view, phi, theta)
        system = System.of(point.hessian, phi)
        assert system.dense is not None
        if not bool(system.dense.isfinite().all() and point.slope.isfinite().all()):
            return Minimum(phi, "G or its derivatives are not finite there")
        values, basis = torch.linalg.eigh((system.dense + system.dense.mT) / 2)
        step = _newton_step(point.slope, values, basis, 1 + phi.norm())
        moved = _line_search(view, phi, theta, point, step)
        if moved is None:
            break
        phi = moved
    return _judge(phi, values, float(step.norm()))


def _singular(values: Tensor) -> float:
    """Below this an eigenvalue cannot be told from zero."""
    return 10 * len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())


def _newton_step(slope: Tensor, values: Tensor, basis: Tensor, size: Tensor) -> Tensor:
    lengths = values.abs()
    floor = (torch.finfo(slope.dtype).eps ** 0.5 * lengths.max()).clamp_min(torch.finfo(slope.dtype).tiny)
    step = -basis @ ((basis.mT @ slope) / lengths.clamp_min(floor))
    return step * (100 * size / step.norm()).clamp_max(1)


def _line_search(view: View, phi: Tensor, theta: Tensor, point: Point, step: Tensor) -> Tensor | None:
    """The first of 1, 1/2, 1/4, .. that lowers G; where rounding hides that, the full step if it lowers the slope."""
    value, slope = view.inner(phi, theta).detach(), torch.dot(point.slope, step)
    if float(slope.abs()) > 10 * torch.finfo(phi.dtype).eps * float(value.abs()):
        for k in range(20):
            trial = phi + 0.5**k * step
            if bool(view.inner(trial, theta) <= value + 1e-4 * 0.5**k * slope):
                return trial
    trial = phi + step
    return trial if bool(view.slope(trial, theta).norm() < point.slope.norm()) else None


def _judge(phi: Tensor, values: Tensor, step: float) -> Minimum:
    low, high, least = float(values[0]), float(values.abs().max()), _singular(values)
    eps, kappa = torch.finfo(phi.dtype).eps, high / low if low > least else 0.0
    if not step <= max(eps**0.5, min(10 * eps * kappa, 1e-2)) * (1 + float(phi.norm())):
        return Minimum(
            phi,
            f"no minimum of G was found in {NEWTON_STEPS} Newton steps: it may not be bounded below, not be smooth, or be very "
            "ill-conditioned",
        )
    if low < -least:
        return Minimum(phi, f"the descent ends at a saddle of G (smallest eigenvalue {low:.1e})")
    if low <= least:
        return Minimum(phi, "the Hessian of G is singular at its minimum, so phi* is not unique: add a penalty on phi")
    return Minimum(phi, "", kappa)


def _minimise_without_matrix(view: View, phi: Tensor, theta: Tensor) -> Minimum:
    eps = torch.finfo(phi.dtype).eps
    tol = 1e-3 * eps**0.5 * (1e-3 + float(view.slope(phi, theta).norm()))
    found = bilevel.solve(
        view.problem,
        view.theta.unravel(theta),
        view.data,
        init=view.phi.unravel(phi),
        solver=NewtonCG(max_steps=NEWTON_STEPS, cg_steps=200, tol=tol, cg_rtol=1e-4),
    )
    end = view.phi.ravel(flatten(found.value)[0])
    point = Point(view, end, theta)
    system = System.of(point.hessian, end)
    step = system.solve(point.slope)
    if not bool((step + system.solve(point.b)).isfinite().all()):
        return Minimum(end, "CG meets a Hessian of G that is not positive definite there")
    if float(step.norm()) > eps**0.5 * (1 + float(end.norm())):
        return Minimum(end, f"no minimum of G was found: {found.describe('NewtonCG')}")
    return Minimum(end - step)


def solved_outer(view: View, minimum: Minimum, system: System) -> Callable[[Tensor], Tensor]:
    """F(theta) = L(phi*(theta), theta) near the theta of the minimum; NaN where the way from there is lost.

    Each value solves dG/dphi = 0 anew, with the Hessian of the minimum: the answer depends on dG/dphi only, H just leads to it.
    """
    eps = torch.finfo(minimum.phi.dtype).eps
    floor = max(1e-3 * eps**0.5, 10 * eps * (minimum.kappa or 0.0)) * (1 + float(minimum.phi.norm()))

    def outer(theta: Tensor) -> Tensor:
        phi, previous = minimum.phi, torch.inf
        for _ in range(50):
            step = system.solve(view.slope(phi, theta), rtol=1e-3)
            phi, size = phi - step, float(step.norm())
            at_rest = size <= eps * float(phi.norm()) or (size <= floor and size >= 0.5 * previous)
            if at_rest:
                return view.outer(phi, theta).detach()
            if not size <= 2 * previous:  # growing, or NaN
                break
            previous = size
        return torch.full_like(view.outer(phi, theta).detach(), torch.nan)

    return outer
