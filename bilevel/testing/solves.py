"""The error of a hypergradient as a sum of parts.

With K the matrix that was chosen for the Hessian H, g(K, phi) the implicit formula at phi with K u = dL/dphi solved accurately, and
phi* the minimum, the error of the answer ``grad`` at the point phi with the linear solution u is a sum, of which each term is the
fault of one part:

    grad - dF/dtheta  =    grad - (dL/dtheta - C^T u)              arithmetic, in the precision of the call
                         + (dL/dtheta - C^T u) - g(K, phi)         linear solve
                         + g(K, phi) - g(K, phi*)                  inner solve
                         + g(K, phi*) - g(H, phi*)                 curvature: GaussNewton, damping, Identity
                         + g(H, phi*) - dF/dtheta                  implicit formula: the derivatives
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel import GaussNewton, Result, Status
from bilevel.curvature import Curvature
from bilevel.linsys.base import LinearSolver
from bilevel.testing.differences import Differences, relative
from bilevel.testing.minimum import Minimum, minimise, solved_outer
from bilevel.testing.reference import Formula, Point, System, reattached
from bilevel.testing.report import Part, Verdict, judged, not_judged
from bilevel.testing.view import View, aside, moves_of_theta

INDEFINITE = (Status.NEGATIVE_CURVATURE, Status.SINGULAR)
UNEXPLAINED = (
    "the derivatives agree with differences at the points above, but the gradient that they make does not agree with differences of "
    "F(theta) = L(phi*(theta), theta). Is G smooth near phi* (a kink, a branch), and is a derivative wrong only where these points are "
    "not? An ill-conditioned Hessian makes small errors large."
)
ANOTHER = (
    "The solver saw another |dG/dphi| at the same point: in the batched call, or in float32, G is another function (a "
    "torch.autograd.Function whose vmap is wrong, code that depends on the precision). "
)
ASYMMETRIC = "the Hessian by autograd is not symmetric at phi*."
NO_INVERSE = (
    "Identity() takes the problem at its word: its curvature_inverse (or curvature_scale), with the damping, is not the inverse of its "
    "curvature_product. ({told})"
)
ARITHMETIC = (
    "grad is not dL/dtheta - C^T u for the phi and u that came with it. In float32: rounding, or code that does something else in "
    "float32 than in float64. In a batch: a torch.autograd.Function whose vmap is wrong. In a problem with a split or a curvature_scale of "
    "its own: these are not those of inner_objective."
)


@dataclass(frozen=True)
class Answer:
    """What the library gave for one task; vectors in the precision of the references."""

    grad: Tensor
    phi: Tensor
    u: Tensor
    inner: Result
    linear: Result


@dataclass(frozen=True)
class Choices:
    """What was chosen for the linear system."""

    linsys: LinearSolver
    curvature: Curvature
    damping: float

    @property
    def bias(self) -> str:
        """What makes the gradient biased; '' if nothing does."""
        if self.linsys.needs_known_inverse:
            return repr(self.linsys)
        names = [repr(self.curvature)] if isinstance(self.curvature, GaussNewton) else []
        return " and ".join(names + [f"damping={self.damping:g}"] * bool(self.damping))

    def formula(self, point: Point) -> Formula:
        """g(K, phi)."""
        return Formula.at(point, System.of(point.chosen(self.curvature, self.damping, self.linsys), point.at))


def find_minimum(view: View, answer: Answer, start: Tensor, theta: Tensor) -> tuple[Minimum, str]:
    """The minimum to which the answer belongs, or that of the start if a descent from the answer reaches none; and a note on both."""
    there = minimise(view, start, theta)
    if bool(answer.inner.failed):
        return there, ""
    here = minimise(view, answer.phi, theta)
    if here.fault:
        return (here if there.fault else there), ""
    if there.fault or float((here.phi - there.phi).norm()) <= 1e-3 * (1 + float(here.phi.norm())):
        return here, ""
    values = [float(view.inner(minimum.phi, theta)) for minimum in (here, there)]
    return here, (
        f"G has several minima. A descent from the answer ends at one with G = {values[0]:.4g}, and the answer is judged for that one; a "
        f"descent from the start of the inner solve ends at another, with G = {values[1]:.4g}."
    )


@dataclass(frozen=True)
class Sum:
    """The sum at the top of this module, for one answer."""

    view: View
    theta: Tensor
    answer: Answer
    choices: Choices
    minimum: Minimum
    rtol: float

    def parts(self) -> list[Part]:
        """Its terms, and the whole."""
        if self.minimum.fault:
            remark = f"{self.minimum.fault}. {self.answer.inner.describe('The solver')}"
            inner = judged("inner solve", math.nan, self.rtol, 0.0, "phi with a minimum of G", remark)
            return [not_judged("implicit formula"), inner, not_judged("linear solve"), not_judged("hypergradient")]
        exact = Point(self.view, self.minimum.phi, self.theta)
        hessian = System.of(exact.hessian, exact.at)
        true, chosen = Formula.at(exact, hessian), self.choices.formula(exact)
        bias, scale = chosen.grad - true.grad, self._scale(true)
        few = hessian.dense is None  # then each value of F takes many products
        along = moves_of_theta(self.view, self.minimum.phi, self.theta, few=few)
        outer = Differences.of(
            solved_outer(self.view, self.minimum, hessian), self.theta, along, self._noise(true, hessian)
        )
        uncertainty = relative(outer.gap(true.grad).uncertainty, scale)

        def against_outer(name: str, grad: Tensor, compared: str, remark: str) -> Part:
            error = relative(outer.gap(grad).error, scale)
            return judged(name, error, self.rtol, uncertainty, f"{compared} with differences of F(theta)", remark)

        parts = [against_outer("implicit formula", true.grad, "formula at phi*", UNEXPLAINED)]
        if hessian.dense is not None:
            newton = reattached(self.view, self.minimum.phi, self.theta, hessian.dense)
            error = relative(float((newton - true.grad).norm()), scale)
            compared = "formula at phi* with autograd through one step"
            parts.append(judged("Newton step", error, self.rtol, 0.0, compared, ASYMMETRIC))
        parts += self._solves(chosen, scale)
        if self.choices.bias:
            parts.append(self._bias(relative(float(bias.norm()), scale)))
        whole = against_outer("hypergradient", self.answer.grad, "the answer", "")
        if whole.verdict is Verdict.FAULT and self.choices.bias:
            unbiased = against_outer("", self.answer.grad - bias, "", "")
            whole = replace(whole, verdict=Verdict.CHOICE) if unbiased.verdict is Verdict.OK else whole
        return _explained(parts, whole)

    def _scale(self, true: Formula) -> float:
        """What errors are relative to. Where the gradient vanishes: 1 % of what it is nearby."""
        nearby = []
        for phi in aside(self.view, [self.minimum.phi], self.theta):
            point = Point(self.view, phi, self.theta)
            nearby.append(Formula.at(point, System.of(point.hessian, phi)).scale)
        return max([true.scale, *(0.01 * scale for scale in nearby if math.isfinite(scale))])

    def _noise(self, true: Formula, hessian: System) -> float:
        """The error of a value of F: that of dG/dphi, eps |H| |phi*|, is multiplied by u."""
        if hessian.dense is None:
            return 0.0
        size = float(torch.linalg.matrix_norm(hessian.dense, 2) * self.minimum.phi.norm())
        return torch.finfo(self.theta.dtype).eps * size * float(true.u.norm())

    def _solves(self, chosen: Formula, scale: float) -> list[Part]:
        """Inner solve, linear solve, arithmetic."""
        answer, choices = self.answer, self.choices
        point = Point(self.view, answer.phi, self.theta)
        there, through = choices.formula(point), point.cross(answer.u)
        gaps = [there.grad - chosen.grad, through - there.through, answer.grad - (there.direct - through)]
        errors = [relative(float(gap.norm()), scale) for gap in gaps]
        remarks = [
            self._inner_remark(point),
            self._linear_remark(point),
            ARITHMETIC,
        ]
        names = ["inner solve", "linear solve", "arithmetic"]
        compared = [
            "formula at phi with formula at phi*",
            "u with an accurate solve at phi",
            "the answer with dL/dtheta - C^T u",
        ]
        inner, linear, arithmetic = (
            judged(name, error, self.rtol, 0.0, what, remark)
            for name, error, what, remark in zip(names, errors, compared, remarks, strict=True)
        )
        if bool(answer.inner.failed):
            inner = replace(inner, verdict=Verdict.FAULT)
        if bool(answer.linear.failed):
            linear = replace(linear, verdict=Verdict.FAULT)
        if bool(answer.inner.failed | answer.linear.failed):
            arithmetic = not_judged("arithmetic")  # the answer is NaN on purpose
        if inner.verdict is Verdict.FAULT and (
            bool(answer.inner.failed) or Status(int(answer.linear.codes)) in INDEFINITE
        ):
            linear = linear.following()  # the matrix is that of a wrong point
        return [inner, linear, arithmetic]

    def _inner_remark(self, point: Point) -> str:
        away, size = float((self.answer.phi - self.minimum.phi).norm()), float(self.minimum.phi.norm())
        low, residual, slope = _lowest_eigenvalue(point), float(self.answer.inner.residual), float(point.slope.norm())
        other = abs(slope - residual) > 0.5 * max(slope, residual)
        return (
            f"phi is {away:.1e} away from the minimum (|phi*| = {size:.1e}), with |dG/dphi| = {slope:.1e}. "
            + (ANOTHER if other else "")
            + (f"The Hessian of G at phi has the eigenvalue {low:.1e}: this is near no minimum. " if low <= 0 else "")
            + self.answer.inner.describe("The solver")
        )

    def _linear_remark(self, point: Point) -> str:
        answer, choices = self.answer, self.choices
        product = point.chosen(choices.curvature, choices.damping, choices.linsys)
        residual, claimed = float((point.b - product(answer.u)).norm()), float(answer.linear.residual)
        told = answer.linear.describe(repr(choices.linsys))
        if choices.linsys.needs_known_inverse:
            return NO_INVERSE.format(told=told)
        if residual > 10 * claimed + 1e3 * torch.finfo(point.b.dtype).eps * float(point.b.norm()):
            return f"{told} That is not so: |b - A u| = {residual:.1e}, with |b| = {float(point.b.norm()):.1e}."
        return f"{told} Allow more steps, or ask for a smaller residual."

    def _bias(self, error: float) -> Part:
        remark = (
            f"{self.choices.bias} changes the gradient by {error:.1e} of its size. That is a choice and no fault; Hessian() without "
            "damping, and a linear solver that solves, would not."
        )
        verdict = Verdict.OK if error <= self.rtol else Verdict.CHOICE
        compared = "formula with the chosen matrix and with H"
        return Part(
            name="curvature", error=error, tolerance=self.rtol, compared=compared, verdict=verdict, remark=remark
        )


def _lowest_eigenvalue(point: Point) -> float:
    """Of the Hessian; inf where it is not known."""
    dense = System.of(point.hessian, point.at).dense
    if dense is None or not bool(dense.isfinite().all()):
        return math.inf
    return float(torch.linalg.eigvalsh((dense + dense.mT) / 2)[0])


def _explained(parts: list[Part], whole: Part) -> list[Part]:
    """A wrong answer is the fault of a part: where none of them is too large alone, of the largest."""
    found = any(part.is_at_fault for part in parts)
    if whole.verdict is Verdict.FAULT and not found:
        largest = max((part for part in parts if part.name != "curvature"), key=lambda part: part.error)
        remark = f"no part is too large alone, but they add up, and this is the largest. {largest.remark}"
        parts[parts.index(largest)] = replace(largest, verdict=Verdict.FAULT, remark=remark)
        found = True
    return [*parts, whole.following() if found else whole]
