"""A hypergradient in words: what happened, how good it is, what to change."""

from __future__ import annotations

import torch

from bilevel.curvature import GaussNewton
from bilevel.problem import BilevelProblem, ProximalProblem
from bilevel.result import Diagnosis, Hypergradient, Result, Status

ACCURATE = 1e-6  # relative errors below this need no advice


def explain(result: Hypergradient, problem: BilevelProblem) -> str:
    """The sentences of :meth:`bilevel.Hypergradient.explain`."""
    found = result.diagnose()
    lines = [] if result.inner is None else [_solve("Inner solve", result.inner, "|dG/dphi|")]
    lines += [_solve("Linear solve", result.linear, "|b - H u|"), *_error(result, found), *_spectrum(result, found)]
    lines += [f"- {line}" for line in _advice(result, found, problem)]
    return "\n".join(lines)


def _solve(what: str, solve: Result, residual: str) -> str:
    if solve.codes.ndim == 0:
        size = "not measured" if solve.residual.isnan() and not solve.failed else f"{float(solve.residual):.2e}"
        return f"{what}: {Status(int(solve.codes)).name} after {int(solve.steps)} steps, {residual} = {size}."
    counts = [
        f"{int((solve.codes == int(status)).sum())} {status.name}"
        for status in Status
        if (solve.codes == int(status)).any()
    ]
    known = solve.residual[solve.residual.isfinite()]
    worst = f", {residual} at most {float(known.max()):.2e}" if len(known) else ""
    return f"{what}: {', '.join(counts)} of {solve.codes.numel()} tasks; at most {int(solve.steps.max())} steps{worst}."


def _error(result: Hypergradient, found: Diagnosis) -> list[str]:
    if not bool(result.ok_per_task.any()):
        return ["There is no gradient: grad is NaN."]
    ok = result.ok_per_task
    lines = []
    if not bool(ok.all()):
        lines.append(f"{int(ok.sum())} of {ok.numel()} tasks are ok and in the gradient; that of the others is NaN.")
    linear, inner = _relative(result, found)
    each = "" if ok.ndim == 0 else " of a task, at most"
    lines.append(
        f"Estimated relative error of the gradient{each}: {linear:.1e} from the linear solve, {inner:.1e} from the inner solve."
    )
    if result.error_estimate.ndim == 0:
        lines.append(f"Estimated absolute error of grad: {float(result.error_estimate):.2e}.")
    bound = result.error_bound
    if bound is not None:
        worst = torch.where(ok, bound, 0).amax() if bound.ndim else bound
        lines.append(
            f"Rigorous bound of the absolute error: {float(worst):.2e}."
            if bool(worst.isfinite())
            else "There is no rigorous bound yet: the inner gradient is too large for the condition of Lemma 3, delta < mu / (2 rho)."
        )
    return lines


def _relative(result: Hypergradient, found: Diagnosis) -> tuple[float, float]:
    """The largest relative errors of the tasks that are ok: the linear and the inner part."""
    size = found.size.clamp_min(torch.finfo(found.size.dtype).tiny)
    return tuple(float(torch.where(result.ok_per_task, part / size, 0).amax()) for part in (found.linear, found.inner))  # type: ignore[return-value]


def _spectrum(result: Hypergradient, found: Diagnosis) -> list[str]:
    smallest, largest = found.smallest[found.smallest.isfinite()], found.largest[found.largest.isfinite()]
    if not len(smallest.reshape(-1)):
        return []
    name = "the Gauss-Newton matrix" if isinstance(result.curvature, GaussNewton) else "the Hessian of G"
    name += f" + {result.damping:g} I" if result.damping else ""
    low, high = float(smallest.min()), float(largest.max())
    condition = f" (condition number about {high / low:.1e})" if low > 0 else ""
    return [f"Eigenvalues of {name} at phi, as far as 30 products see: {low:.2e} to {high:.2e}{condition}."]


def _advice(result: Hypergradient, found: Diagnosis, problem: BilevelProblem) -> list[str]:
    ok = result.ok_per_task
    failed = [status for status in Status if status.failed and status is not Status.NEGATIVE_CURVATURE]
    lines = []
    for what, solve in (("inner solve", result.inner), ("linear solve", result.linear)):
        lines += [
            f"The {what} {s.message}" for s in failed if solve is not None and bool((solve.codes == int(s)).any())
        ]
    lines += _negative_curvature(result, found, problem)
    if isinstance(result.curvature, GaussNewton) or result.damping:
        what = "GaussNewton()" if isinstance(result.curvature, GaussNewton) else f"damping={result.damping:g}"
        lines.append(
            f"{what} biases the gradient by an amount that these numbers do not count; Hessian() without damping does not."
        )
    if bool(ok.any()):
        linear, inner = _relative(result, found)
        if result.certificate.measured is False:
            lines.append(
                "Identity() solves no linear system: this is the first-order gradient. CG comes closer to the exact one."
            )
        elif linear > ACCURATE and linear >= inner:
            lines.append("The linear solve limits the accuracy: raise its max_steps (num_terms), or lower its rtol.")
        if inner > ACCURATE and inner > 0.1 * linear:
            lines.append(
                "The inner solve limits the accuracy: raise its max_steps, or lower its tol."
                if result.inner is not None
                else "phi is not solved well enough: solve the inner problem further before you call."
            )
        if max(linear, inner) <= ACCURATE and not lines:
            lines.append("Nothing to change.")
    return lines


def _negative_curvature(result: Hypergradient, found: Diagnosis, problem: BilevelProblem) -> list[str]:
    met = torch.zeros_like(result.ok_per_task)
    for solve in (result.inner, result.linear):
        if solve is not None and solve.negative_curvature is not None:
            met = met | (solve.negative_curvature > 0)
    met = met | (result.linear.codes == int(Status.SOLVED_INDEFINITE))
    negative = found.smallest <= 0
    if not bool((met | negative).any()):
        return []
    where = "" if met.ndim == 0 else f" in {int((met | negative).sum())} of {met.numel()} tasks"
    if not bool(negative.any()):
        return [
            f"Negative curvature was met{where} on the way, but is not there at phi: nothing to change for the gradient."
        ]
    low = -float(found.smallest[negative].min())
    lam = "every entry of lam" if isinstance(problem, ProximalProblem) else "the regulariser's curvature"
    if isinstance(problem, ProximalProblem) and isinstance(problem.lam, float):
        lam = f"lam, now {problem.lam:g},"
    return [
        f"The curvature is negative{where}: its smallest eigenvalue is {-low:.2e} or below, so phi is no minimum of G. "
        f"Raising {lam} by more than {low:.2e}, or damping of more than {result.damping + low:.2e}, would make it positive at this "
        "phi, as far as seen. GaussNewton() is never negative for a convex output loss; CG(steihaug=True) keeps what was found before; "
        "or solve the inner problem further."
    ]
