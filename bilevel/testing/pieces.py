"""The five derivatives that a hypergradient is made of, each against differences of what it is the derivative of.

First derivatives are compared with differences of the values of G and L; second derivatives with differences of dG/dphi, in the way
in which they are used: as products. What is detached, has a wrong sign or a wrong transpose is consistent for autograd, but not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.testing.differences import Differences, Directions, Gap
from bilevel.testing.reference import Point
from bilevel.testing.report import Part, Verdict, judged
from bilevel.testing.view import View, aside, moves_of_phi, moves_of_theta

ALONE = 1e-2  # a leaf or an entry of its own is judged for what is wrong in it, and not for its last digits

FIRST_ORDER = (
    "the gradient by autograd is not that of the values. Look in {function} for .detach(), .data, torch.no_grad() or a tensor made "
    "anew from numbers, for a torch.autograd.Function whose backward has a wrong sign, factor or transpose, or for a kink (abs, max) "
    "exactly here."
)
NOT_A_NUMBER = (
    "autograd gives NaN or infinity where the values are finite. Look in {function} for a torch.where, or a mask, over something that has "
    "no finite derivative where it is not used (sqrt, log, a power, a quotient: its zero is multiplied by infinity, so make the argument "
    "harmless there before), or for sqrt, norm or abs(x) ** p at exactly zero."
)
SECOND_ORDER = (
    "the first derivative is right and its derivative is not. Look in inner_objective for a torch.autograd.Function whose backward is "
    "not differentiable itself (tensors saved after .detach(), numbers kept on ctx), or has a wrong sign or transpose in what it "
    "differentiates to{detached}."
)


KINK_AT_START = "Differences give no reliable dG/dphi where the inner solve starts (a kink, as of abs or norm at zero): not judged there."


def derivative_parts(view: View, phis: Sequence[Tensor], theta: Tensor, rtol: float) -> tuple[list[Part], list[str]]:
    """The five comparisons, each at its worst over the points where it is used, and notes. ``phis``: the point that was solved for, and
    the start, where the solver asks for dG/dphi and nobody for anything else.
    """
    points = [*phis, *aside(view, phis, theta)]
    along_phi, along_theta = moves_of_phi(view, points, theta), moves_of_theta(view, points[0], theta)
    firsts = [_first(view, phi, theta, along_phi, along_theta) for phi in points]
    # at the solution, and at the point without special zeros
    seconds = [_second(view, phi, theta, along_phi, along_theta) for phi in [points[0], *points[len(phis) :]]]
    rough = [i for i in range(1, len(phis)) if _is_unclear(firsts[i][0], rtol)]
    slope = _worst([gaps[0] for i, gaps in enumerate(firsts) if i not in rough])
    used = [firsts[0], *firsts[len(phis) :]]
    outer_slope, direct = (_worst(gaps) for gaps in zip(*(gaps[1:] for gaps in used), strict=True))
    hessian, cross = (_worst(gaps) for gaps in zip(*(gaps for gaps, _ in seconds), strict=True))
    skew = max(skew for _, skew in seconds)
    symmetry = f" The Hessian by autograd is not symmetric: |H - H^T| = {skew:.1e} |H|." if skew > rtol else ""
    parts = [
        _part("dG/dphi", slope, rtol, "autograd with differences of G", FIRST_ORDER, "inner_objective"),
        _part("dL/dphi", outer_slope, rtol, "autograd with differences of L", FIRST_ORDER, "outer_loss"),
        _part("dL/dtheta", direct, rtol, "autograd with differences of L", FIRST_ORDER, "outer_loss"),
        _part(
            "d2G/dphi2",
            hessian,
            rtol,
            "products with differences of dG/dphi",
            SECOND_ORDER.format(detached="") + symmetry,
        ),
        _part(
            "d2G/dphi dtheta",
            cross,
            rtol,
            "products with differences of dG/dphi",
            SECOND_ORDER.format(detached=", and for theta.detach()"),
        ),
    ]
    if parts[0].is_at_fault:
        parts = [part.following() if part.name.startswith("d2G") else part for part in parts]
    return parts, [KINK_AT_START] * bool(rough)


def _is_unclear(gap: Gap, rtol: float) -> bool:
    """Whether the differences are too uncertain to judge by, and show no fault all the same."""
    error, uncertainty = gap.relative
    return judged("", error, rtol, uncertainty, "", "").verdict is Verdict.UNCLEAR


def _first(
    view: View, phi: Tensor, theta: Tensor, along_phi: Directions, along_theta: Directions
) -> tuple[Gap, Gap, Gap]:
    """dG/dphi, dL/dphi, dL/dtheta."""
    point = Point(view, phi, theta)
    return (
        Differences.of(lambda x: view.inner(x, theta).detach(), phi, along_phi).gap(point.slope),
        Differences.of(lambda x: view.outer(x, theta).detach(), phi, along_phi).gap(point.b),
        Differences.of(lambda t: view.outer(phi, t).detach(), theta, along_theta).gap(point.a),
    )


def _second(
    view: View, phi: Tensor, theta: Tensor, along_phi: Directions, along_theta: Directions
) -> tuple[tuple[Gap, Gap], float]:
    """d2G/dphi2 and d2G/dphi dtheta, and how far the former is from symmetric, relative."""
    point = Point(view, phi, theta)
    rows = along_phi.vectors * along_phi.weights.sqrt().unsqueeze(-1)
    hessian, cross = (torch.stack([product(row) for row in rows]) for product in (point.hessian, point.cross))
    in_phi = Differences.of(lambda x: rows @ view.slope(x, theta), phi, along_phi)
    in_theta = Differences.of(lambda t: rows @ view.slope(phi, t), theta, along_theta)
    square = hessian @ rows.mT
    skew = float((square - square.mT).norm() / square.norm().clamp_min(torch.finfo(square.dtype).tiny))
    return (in_phi.gap(hessian), in_theta.gap(cross)), skew


def _worst(gaps: Sequence[Gap]) -> Gap:
    worst = gaps[0]
    for gap in gaps[1:]:
        worst = worst.over(gap)
    return worst


def _part(name: str, gap: Gap, rtol: float, compared: str, remark: str, function: str = "inner_objective") -> Part:
    where = f"largest in {gap.where}; " if gap.where not in ("", "phi", "theta") else ""
    error, uncertainty = gap.relative
    remark = (remark if math.isfinite(gap.error) else NOT_A_NUMBER).format(function=function)
    found = judged(name, error, rtol, uncertainty, compared, where + remark)
    alone, error, uncertainty = gap.alone
    if found.verdict is Verdict.OK and error > ALONE + uncertainty:
        remark = f"in {alone}, which is small beside the others, and relative to it alone; {remark}"
        found = judged(name, error, ALONE, uncertainty, compared, remark)
    return found
