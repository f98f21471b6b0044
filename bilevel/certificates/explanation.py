"""A hypergradient in words: what happened, how good it is, what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.certificates.estimate import Doubts
from bilevel.curvature import GaussNewton
from bilevel.gradient import Diagnosis, Hypergradient
from bilevel.problem import BilevelProblem
from bilevel.proximal import ProximalProblem
from bilevel.result import Result
from bilevel.status import Status
from bilevel.trees import flatten

ENOUGH = 1e-6
"""Six digits of the gradient need no advice."""

ENOUGH_IN_EPS = 1e4
"""Nor does a relative error of so many eps, 1e-3 in float32: the tolerances for a much smaller one are so near the
rounding floor that a solve may not keep them."""

COUNTS_TOO = 0.1
"""The inner solve is named beside a linear solve that has the larger error, if its own is at least this part of it:
else the next question would be about it."""

NOTHING = 0.01
"""dL/dphi has nothing along an eigenvector whose |eigenvalue| |u| is below this part of it: its part there is smaller still."""

ZERO_IN_EPS = 100
"""Lanczos sees a zero eigenvalue as one of a few eps times the largest, of either sign. What is called negative is
well above that; a negative eigenvalue smaller than this is taken for a zero."""

ROUND_UP = 1.001
"""A number that is enough is multiplied by this before its three digits are rounded up, so that rounding cannot make
it too small."""


class Spectrum(NamedTuple):
    """What some steps of Lanczos see of the curvature at phi, with damping, for each task ``(*batch,)``; NaN where that is.

    Attributes:
        smallest: the smallest eigenvalue is at most this.
        largest: the largest is at least this.
        doubt: an eigenvalue is no further from ``smallest`` than this.
    """

    smallest: Tensor
    largest: Tensor
    doubt: Tensor


def explain(
    result: Hypergradient,
    problem: BilevelProblem,
    spectrum: Spectrum,
    solves: bool,
    doubts: Doubts,
    kinks: Tensor,
    not_finite: list[str],
) -> str:
    """The sentences of :meth:`bilevel.Hypergradient.explain`. ``kinks``: the tasks that are at one ``(*batch,)``; ``not_finite``: the
    leaves of theta and data that hold NaN or infinity.
    """
    found = result.diagnose()
    lines = [] if result.inner is None else [_solve("Inner solve", result.inner, "|dG/dphi|")]
    lines += [
        _solve("Linear solve", result.linear, "|b - H u|"),
        *_error(result, found, doubts),
        *_eigenvalues(result, spectrum),
    ]
    advice = [
        *(f"{leaf}." for leaf in not_finite),
        *_failures(result),
        *_nothing_to_solve(result),
        *_negative_curvature(result, spectrum, problem),
        *_singular(result, found, spectrum),
        *_bias(result),
    ]
    known = all(bool(part[result.ok_per_task].isfinite().all()) for part in _relative(found))
    advice += _accuracy(result, found, solves, doubts, kinks) or ([] if advice or not known else ["Nothing to change."])
    return "\n".join([*lines, *[f"- {line}" for line in advice]])


def _solve(what: str, solve: Result, residual: str) -> str:
    if solve.codes.ndim == 0:
        size = "not measured" if solve.residual.isnan() and not solve.failed else f"{float(solve.residual):.2e}"
        return f"{what}: {Status(int(solve.codes)).name} after {int(solve.steps)} steps, {residual} = {size}."
    counts = [f"{int((solve.codes == int(status)).sum())} {status.name}" for status in _statuses(solve.codes)]
    known = solve.residual[solve.residual.isfinite()]
    worst = f", {residual} at most {float(known.max()):.2e}" if len(known) else ""
    return f"{what}: {', '.join(counts)} of {solve.codes.numel()} tasks; at most {int(solve.steps.max())} steps{worst}."


def _statuses(codes: Tensor) -> list[Status]:
    return [status for status in Status if bool((codes == int(status)).any())]


def _error(result: Hypergradient, found: Diagnosis, doubts: Doubts) -> list[str]:
    ok = result.ok_per_task
    if not bool(ok.any()):
        return ["There is no gradient: grad is NaN."]
    lines = []
    if not bool(ok.all()):
        lines.append(f"{int(ok.sum())} of {ok.numel()} tasks are ok and in the gradient; that of the others is NaN.")
    linear, inner = (_worst(ok, part) for part in _relative(found))
    if math.isinf(inner) and bool((doubts.ran_out | ~found.inner.isinf())[ok].all()):
        lines.append(
            "There is no estimate of the error: the products that an estimate may cost did not suffice for a step of Newton's method. That "
            "says nothing against the gradient."
        )
    elif math.isinf(inner):
        lines.append(
            "There is no estimate of the error: from phi, Newton's method meets negative curvature or comes no nearer to a minimum "
            "in the steps that an estimate may take."
        )
    elif math.isinf(linear):
        lines.append("There is no estimate of the error: H is singular at phi as far as rounding lets it be told.")
    else:
        each = "" if ok.ndim == 0 else " of a task, at most"
        lines.append(
            f"Estimated relative error of the gradient{each}: {linear:.1e} from the linear solve, {inner:.1e} from the inner solve."
        )
        if found.error.ndim == 0:
            lines.append(f"Estimated absolute error of grad: {float(found.error):.2e}.")
    bound = result.error_bound
    if bound is not None:
        worst = _worst(ok, bound) if bound.ndim else float(bound)
        lines.append(
            f"Rigorous bound of the absolute error: {worst:.2e}."
            if math.isfinite(worst)
            else "There is no rigorous bound yet: the inner gradient is too large for the condition of Lemma 3, delta < mu / (2 rho)."
        )
    return lines


def _relative(found: Diagnosis) -> tuple[Tensor, Tensor]:
    """The linear and the inner part of each task, relative to its gradient."""
    size = found.size.clamp_min(torch.finfo(found.size.dtype).tiny)
    return found.linear / size, found.inner / size


def _worst(ok: Tensor, values: Tensor) -> float:
    return float(torch.where(ok, values, 0).amax())


def _eigenvalues(result: Hypergradient, spectrum: Spectrum) -> list[str]:
    seen = spectrum.smallest.isfinite() & spectrum.largest.isfinite()
    if not bool(seen.any()):
        return []
    name = "the Gauss-Newton matrix" if isinstance(result.curvature, GaussNewton) else "the Hessian of G"
    name += f" + {result.damping:g} I" if result.damping else ""
    low, high = spectrum.smallest[seen], spectrum.largest[seen]
    condition = float((high / low).max())
    remark = f" (condition number about {condition:.1e})" if bool((low > 0).all()) else ""
    return [
        f"Eigenvalues of {name} at phi, as far as Lanczos sees: {float(low.min()):.2e} to {float(high.max()):.2e}{remark}."
    ]


def _failures(result: Hypergradient) -> list[str]:
    solves = (("inner solve", result.inner), ("linear solve", result.linear))
    return [
        f"The {what}{': ' if status.message.startswith('the ') else ' '}{status.message}"
        for what, solve in solves
        if solve is not None
        for status in _statuses(solve.codes)
        if status.failed and status is not Status.NEGATIVE_CURVATURE and not _follows(result, what, status)
    ]


def _follows(result: Hypergradient, what: str, status: Status) -> bool:
    """Whether a linear solve has met no more than the NaN of the inner solves before it."""
    if what == "inner solve" or status is not Status.NON_FINITE or result.inner is None:
        return False
    here, before = (part.codes == int(Status.NON_FINITE) for part in (result.linear, result.inner))
    return not bool((here & ~before).any())


def _nothing_to_solve(result: Hypergradient) -> list[str]:
    """Where u is zero, and that solves the system: its right-hand side dL/dphi is zero."""
    zero = result.ok_per_task & (result.linear.residual == 0)
    for leaf in flatten(result.linear.value)[0]:
        zero = zero & (leaf == 0).unsqueeze(-1).flatten(zero.ndim).all(-1)
    if not bool(zero.any()):
        return []
    where = "" if zero.ndim == 0 else f" in {int(zero.sum())} of {zero.numel()} tasks"
    return [
        f"dL/dphi is zero at phi{where}, so the gradient has no implicit part there. If the outer loss depends on phi, look for what "
        "cuts it off: detach(), item(), torch.no_grad()."
    ]


def _bias(result: Hypergradient) -> list[str]:
    biased = isinstance(result.curvature, GaussNewton), bool(result.damping)
    if not any(biased):
        return []
    what = " and ".join(
        name for name, there in zip(("GaussNewton()", f"damping={result.damping:g}"), biased, strict=True) if there
    )
    return [
        f"The bias of {what} is not counted in these numbers; Hessian() without damping has none, but needs a minimum."
    ]


def _accuracy(result: Hypergradient, found: Diagnosis, solves: bool, doubts: Doubts, kinks: Tensor) -> list[str]:
    """Which of the two solves limits the accuracy, and what it would take."""
    ok = result.ok_per_task
    linear, inner = _relative(found)
    enough = max(ENOUGH, ENOUGH_IN_EPS * torch.finfo(linear.dtype).eps)
    lines = []
    if not solves and bool(ok.any()):
        lines.append(
            "Identity() solves no linear system: this is the first-order gradient. CG comes closer to the exact one."
        )
    elif bool((ok & linear.isinf()).any()):
        lines.append(
            "H is singular or indefinite at phi, so more steps of the linear solver do not help: add regularisation or damping, or "
            "solve the inner problem further."
        )
    elif bool((rough := ok & (linear > enough) & (linear >= inner)).any()):
        lines.append("The linear solve limits the accuracy: " + _more(result.linear.codes[rough], "rtol"))
    if bool((ok & doubts.ran_out).any()):
        lines.append(
            "H is too ill-conditioned to tell what the inner solve has left: compare with the gradient of a smaller tol, or scale the "
            "variables of phi."
        )
    if bool(kinks.any()):
        where = "" if kinks.ndim == 0 else f" in {int(kinks.sum())} of {kinks.numel()} tasks"
        lines.append(
            f"G has a kink at phi{where}: along -dG/dphi its slope ends in a jump, as of an absolute value, a ReLU or a maximum, and no "
            "step makes dG/dphi small. The implicit gradient knows one side of the kink and not the other: write the condition as a fixed "
            "point of a proximal step or a projection (fixed_point), or round the kink off."
        )
    late = ok & ~doubts.ran_out & (inner > enough) & (inner > COUNTS_TOO * linear) & ~kinks
    if bool(late.any()):
        lines.append(
            "phi limits the accuracy: solve the inner problem further before you call."
            if result.inner is None
            else "The inner solve limits the accuracy: " + _more(result.inner.codes[late], "tol")
        )
    return lines


def _more(codes: Tensor, tolerance: str) -> str:
    advice = {
        Status.CONVERGED: f"lower its {tolerance}",
        Status.MAX_STEPS: "raise its number of steps"
        + (
            ", or lower its step size, where it has one, if |dG/dphi| does not fall with them"
            if tolerance == "tol"
            else ""
        ),
        Status.LINE_SEARCH_FAILED: "its line search found nothing lower; either that is the rounding floor, then use float64, or G has a "
        "kink there or is no function of phi (chance in it)",
        Status.STOPPED_AT_NEGATIVE_CURVATURE: "it stopped at negative curvature, see there",
    }
    return _listed(advice[status] for status in _statuses(codes) if status in advice) + "."


def _listed(words: Iterable[str]) -> str:
    return "; ".join(words) or "it is at its limit"


def _negative_curvature(result: Hypergradient, spectrum: Spectrum, problem: BilevelProblem) -> list[str]:
    linear, inner = result.linear, result.inner
    at_phi = (linear.codes == int(Status.SOLVED_INDEFINITE)) | (linear.codes == int(Status.NEGATIVE_CURVATURE))
    if linear.negative_curvature is not None:
        at_phi = at_phi | ((linear.negative_curvature > 0) & (linear.codes != int(Status.SINGULAR)))
    zero = at_phi & _is_zero(spectrum)  # there it may have been rounding
    at_phi = at_phi & ~zero
    on_the_way = torch.zeros_like(at_phi)
    if inner is not None and inner.negative_curvature is not None:
        on_the_way = (inner.negative_curvature > 0) & ~_is_zero(
            spectrum
        )  # there it may have been rounding, and that is said elsewhere
    negative = _is_negative(spectrum)
    if bool((at_phi | negative).any()):
        count = int((at_phi | negative).sum())
        where = "" if at_phi.ndim == 0 else f" in {count} of {at_phi.numel()} tasks"
        known = bool(negative.any())
        seen = f"{_remedy(result, spectrum, problem)} Or solve" if known else "Lanczos does not see how much. Solve"
        return [
            f"The curvature at phi is negative{where}, so phi is not a minimum of G: {seen} {_other_remedies(result, problem)}"
        ]
    if bool(zero.any()):
        where = "" if zero.ndim == 0 else f" in {int(zero.sum())} of {zero.numel()} tasks"
        return [
            f"H is singular at phi{where}: an eigenvalue is zero but for rounding, and the linear solve took it for negative curvature. "
            "Add a penalty on the variables that G does not depend on, or damping."
        ]
    if bool(on_the_way.any()):
        where = "" if on_the_way.ndim == 0 else f" in {int(on_the_way.sum())} of {on_the_way.numel()} tasks"
        return [
            f"The inner solve met negative curvature{where} on the way. At phi there is none: nothing to change for the gradient."
        ]
    return []


def _singular(result: Hypergradient, found: Diagnosis, spectrum: Spectrum) -> list[str]:
    """Of tasks that have a gradient all the same, because dL/dphi has nothing along the null vectors: or u would be as long as 1 / 0."""
    zero = result.ok_per_task & _is_zero(spectrum)
    square = torch.zeros_like(found.rhs)
    for leaf in flatten(result.linear.value)[0]:
        square = square + leaf.square().unsqueeze(-1).flatten(zero.ndim).sum(-1)
    zero = zero & (spectrum.smallest.abs() * square.sqrt() <= NOTHING * found.rhs)
    if result.linear.negative_curvature is not None:
        zero = zero & ~(result.linear.negative_curvature > 0)  # which is spoken of
    if not bool(zero.any()):
        return []
    where = "" if zero.ndim == 0 else f" in {int(zero.sum())} of {zero.numel()} tasks"
    return [
        f"H is singular at phi{where}: an eigenvalue is zero but for rounding. dL/dphi has nothing along that direction, so the gradient "
        "is that of all the others. That is right where neither L nor, whatever theta is, G changes along it, as with softmax and a bias "
        "without a penalty; a small penalty on such variables leaves no doubt."
    ]


def _is_negative(spectrum: Spectrum) -> Tensor:
    """Which smallest eigenvalues are negative, and not a zero with rounding: that is a singular matrix, which has a status of its own."""
    return spectrum.smallest < -_rounding(spectrum)


def _is_zero(spectrum: Spectrum) -> Tensor:
    return spectrum.smallest.abs() <= _rounding(spectrum)


def _rounding(spectrum: Spectrum) -> Tensor:
    return ZERO_IN_EPS * torch.finfo(spectrum.smallest.dtype).eps * spectrum.largest.abs()


def _remedy(result: Hypergradient, spectrum: Spectrum, problem: BilevelProblem) -> str:
    """By how much the worst task must be shifted; what Lanczos may have missed is added."""
    negative = _is_negative(spectrum)
    low = float(spectrum.smallest[negative].min())
    needed = float((spectrum.doubt - spectrum.smallest)[negative].max())
    if isinstance(problem, ProximalProblem):
        lam = f"lam, now {problem.lam:g}," if isinstance(problem.lam, float) else "Lambda (every eigenvalue)"
        shift = f"Raising {lam} by {_up(needed)}"
    else:
        shift = f"A term of {_up(needed)} |phi|^2 / 2 in G"
    return (
        f"the smallest eigenvalue is about {low:.2e}. {shift}, or damping={_up(result.damping + needed)}, would make it positive at this "
        "phi, as far as seen."
    )


def _up(x: float) -> str:
    """Three digits, rounded up and a little more: the number that is named is enough."""
    if not 0 < x < math.inf:
        return f"{x:g}" if x else "a little"
    step = 10.0 ** (math.floor(math.log10(x)) - 2)
    return f"{step * (math.floor(ROUND_UP * x / step) + 1):.3g}"


def _other_remedies(result: Hypergradient, problem: BilevelProblem) -> str:
    ways = ["the inner problem further"]
    if problem.composition is not None and not isinstance(result.curvature, GaussNewton):
        ways.append("use GaussNewton(), which is never negative for a convex output loss")
    if not bool((result.linear.codes == int(Status.STOPPED_AT_NEGATIVE_CURVATURE)).any()):
        ways.append("or let CG(steihaug=True) keep what it found before")
    return ", ".join(ways) + "."
