"""Newton's method without Hessians: CG for the direction, a backtracking line search on G for the length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from bilevel.checks import check_count, check_number, check_rtol, keep_python_numbers
from bilevel.curvature import Curvature, Hessian, check_curvature
from bilevel.derivatives import Linearisation, Objective
from bilevel.linsys.base import Matvec, all_finite, as_operator, dot, largest, norm, select, unit_of
from bilevel.linsys.preconditioner import Preconditioner, check_preconditioner, prepare
from bilevel.linsys.single import is_single, single_cg, unit_of_number
from bilevel.solvers.base import IterativeSolver, State
from bilevel.solvers.line_search import SUFFICIENT_DECREASE, not_above
from bilevel.solvers.masks import compact_batch, gather_rows, nowhere, scatter_rows

FLOOR_TRIALS = 5
"""Lengths of a step that gradients judge, from 1 to 1/16.

A step with Gauss-Newton may be a few times too long; more of them would cost a gradient each, where mostly the rounding
floor is reached and nothing helps.
"""

HALVINGS = 8
"""Where these are not enough, the step is wrong by orders of magnitude, and tenths find its length in fewer trials."""

PATIENCE = 5
"""Steps in a row, taken because the gradient is smaller or because G falls, that may pass without the smallest gradient so far: the one
may undo the other for ever at the rounding floor, and fewer would end where the gradient has to grow a while.
"""

ACROSS = 0.01
"""p and A p are across each other where the cosine between them is below this part of the root of eps: what rounding leaves of a null
vector. Of a positive definite A it is at least 2 / sqrt(condition number).
"""

LEAST = 0.1
"""Of p^T A p along the first direction, when it is no positive number: at least this part of |p| |A p| makes the length of the step."""

HIDDEN_IN_EPS = 10
"""A change of so many eps |G| may be rounding, and the test on G says nothing."""

ALMOST_FLAT = 0.01
"""G falls along the whole of a step if at its end it rises by less than this part of the slope at its beginning.

Not zero: near a minimum along the step rounding decides which sign the slope at the end has.
"""


@dataclass(frozen=True)
class _State(State):
    negative_curvature: Tensor  # steps at which CG met negative curvature
    lowest: Tensor  # the smallest gradient norm since a test on G was last passed; infinity right after one
    idle: Tensor  # steps since it was reached


@dataclass(frozen=True)
class _CG:
    """Where CG is: A x = r0 - r, ``rz`` = r^T M r, and ``top`` the largest p^T A p / p^T p."""

    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    threshold: Tensor
    active: Tensor
    negative: Tensor
    top: Tensor


@dataclass(frozen=True, kw_only=True)
class NewtonCG(IterativeSolver):
    """Newton-CG, the Hessian-free method of the paper (section 4 and Appendix F.2; Nocedal and Wright 2006, algorithm 7.1).

    The direction solves (curvature + damping I) p = -dG/dphi by at most ``cg_steps`` steps of CG. At negative curvature, and where
    the curvature is none but for rounding, it goes on with the direction found so far; at the first with the negative gradient, as
    long as the size of the curvature says, so that units do not matter. The step length is the first of 1, 1/2, 1/4, .., 1/256, and
    tenths from there on, that lowers G enough (Armijo). Where that test says nothing (near the rounding floor of G; where it is never
    passed; where 1/256 or less has passed it, with a change of G that may be rounding), gradients decide: the first of 1, 1/2, .., 1/16
    with which the gradient norm falls, or G falls along the whole step, as long as every few of these steps reach the smallest gradient
    so far. Where there is none either, what has passed the first test is taken; without that the method stops.

    Args:
        max_steps: Newton steps, >= 1.
        cg_steps: CG steps for each direction, >= 1.
        tol: stop a problem where ``|dG/dphi| <= tol``; 0 takes all steps.
        cg_rtol: stop CG where its residual is below this fraction of the gradient norm.
        max_backtracks: shorter steps to try before the line search fails: eight times half, then a tenth each time.
        curvature: ``Hessian()`` or ``GaussNewton()``.
        damping: added to the diagonal of the curvature.
        preconditioner: for CG, made anew at each Newton step: :class:`~bilevel.linsys.Jacobi` for variables of very different scales,
            :class:`~bilevel.linsys.NystromPreconditioner`, or a function ``v -> M v`` over ``(*batch, d)`` with M an approximate
            inverse, symmetric positive definite. The products that it takes count in ``num_matvecs``.

    Raises:
        ValueError: (in a solve) M is not positive definite.
    """

    max_steps: int = 3
    cg_steps: int = 5
    tol: float = 0.0
    cg_rtol: float = 0.0
    max_backtracks: int = 20
    curvature: Curvature = Hessian()
    damping: float = 0.0
    preconditioner: Preconditioner | Matvec | None = None

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_count("cg_steps", self.cg_steps)
        check_number("tol", self.tol)
        check_rtol("cg_rtol", self.cg_rtol)
        check_count("max_backtracks", self.max_backtracks, at_least=0)
        check_curvature(self.curvature)
        check_number("damping", self.damping)
        check_preconditioner(self.preconditioner)
        keep_python_numbers(self)

    @property
    def can_compact(self) -> bool:
        """Not with a function as preconditioner: it is for the whole batch."""
        return self.preconditioner is None or isinstance(self.preconditioner, Preconditioner)

    def init(self, objective: Objective, phi: Tensor) -> _State:
        return _State(phi, phi, nowhere(phi), nowhere(phi).long(), *_fresh(phi))

    def negative_curvature_count(self, state: _State) -> Tensor:
        return state.negative_curvature

    def evaluate(self, objective: Objective, point: Tensor) -> Linearisation:
        return objective.linearise(point, self.curvature, self.damping)

    def step(self, objective: Objective, state: _State, local: Linearisation) -> _State:
        direction, negative = self._direction(objective, state.point, local)
        slope = dot(local.grad, direction)
        if not bool(slope.isfinite().all()):  # G is not asked at NaN: some raise there, for the whole batch
            direction = select(all_finite(direction), direction, torch.zeros_like(direction))
            slope = dot(local.grad, direction)
        point, stalled, lowest, idle = self._line_search(objective, state, local, direction, slope, negative)
        return _State(point, point, stalled, state.negative_curvature + negative, lowest, idle)

    def _direction(self, objective: Objective, point: Tensor, local: Linearisation) -> tuple[Tensor, Tensor]:
        """An approximate solution of A p = -g, always a direction of descent, and where negative curvature was met."""
        share = max(self.cg_rtol, torch.finfo(local.grad.dtype).eps)  # of |g|, where CG stops
        if self.preconditioner is None and is_single(local.grad):
            return self._single_direction(objective, point, local, share)
        unit = unit_of(largest(local.grad))  # whose squares are numbers
        r = -local.grad / unit
        m, products = prepare(self.preconditioner, None, as_operator(local.matvec), r)
        objective.num_matvecs += max(0, products - 1)  # all at once, and counted once already
        p = r if m is None else m(r)
        rz, rr = dot(r, p), dot(r, r)
        threshold = (share * norm(r)) ** 2
        active = (rr > threshold) & (norm(local.grad) > self.tol)  # a problem that is done needs no direction
        if m is not None and bool((active & (rz < 0)).any()):
            raise ValueError(
                "NewtonCG: preconditioner: expected a symmetric positive definite M, got v^T M v < 0 for some v. Jacobi() and "
                "NystromPreconditioner(rank=...) are positive definite for every matrix."
            )
        none = torch.zeros_like(active)
        begin = _CG(torch.zeros_like(r), r, p, rz, threshold, active, none, torch.zeros_like(rz))
        end = self._cg(objective, point, local, m, begin, 0)
        return end.x * unit, end.negative

    def _single_direction(
        self, objective: Objective, point: Tensor, local: Linearisation, share: float
    ) -> tuple[Tensor, Tensor]:
        """The same with numbers of Python, as long as the steps of CG are ordinary ones. ``share``: of |g|, where CG stops."""
        unit = unit_of_number(float(largest(local.grad)), torch.finfo(local.grad.dtype).tiny)
        r = local.grad / -unit
        x, rr, none = torch.zeros_like(r), float(dot(r, r)), torch.zeros_like(local.value, dtype=torch.bool)
        threshold = share * sqrt(rr)
        if not (sqrt(rr) > threshold and sqrt(rr) * unit > self.tol):
            return x, none
        flat = partial(_is_flat_single, torch.finfo(r.dtype).eps)
        done = single_cg(local.matvec, x, r, threshold, self.cg_steps, flat)
        if done.ap is None:
            return done.x * unit, none
        rz, active = r.new_tensor(done.rr), torch.ones_like(none)
        begin = _CG(done.x, done.r, done.p, rz, r.new_tensor(threshold**2), active, none, r.new_tensor(done.top))
        end = self._cg(objective, point, local, None, begin, done.taken, done.ap)
        return end.x * unit, end.negative

    def _cg(
        self,
        objective: Objective,
        point: Tensor,
        local: Linearisation,
        m: Matvec | None,
        begin: _CG,
        first: int,
        known: Tensor | None = None,
    ) -> _CG:
        """The steps of CG from number ``first`` on; ``known``: A p of the first of them, where somebody has it.

        Not ``linsys.CG``: every operation here has a derivative (``unrolled``), problems that are done leave the batch,
        and negative curvature at the first direction still leaves a direction to go along (Steihaug 1983).
        """
        x, r, p, rz, threshold = begin.x, begin.r, begin.p, begin.rz, begin.threshold
        active, negative, top = begin.active, begin.negative, begin.top
        for k in range(first, self.cg_steps):
            if self.tol > 0:
                left = int(active.sum())
                if left == 0:
                    break
                # The rest of the batch is linearised anew, which costs a few products: so only from a quarter on. The
                # loop over the Newton steps linearises in any case, and goes on without the others from half on
                may = m is None and 4 * left <= active.numel()
                fewer = compact_batch(objective, active, left) if may else None
                if fewer is not None:
                    now, (few, rows) = _CG(x, r, p, rz, threshold, active, negative, top), fewer
                    few_points = point.index_select(0, rows)
                    few_local = few.linearise(few_points, self.curvature, self.damping)
                    end = self._cg(few, few_points, few_local, m, gather_rows(now, rows), k)
                    few.verify(few_points)
                    objective.num_grads += few.num_grads
                    objective.num_matvecs += few.num_matvecs
                    return scatter_rows(now, rows, end)
            ap, known = local.matvec(p) if known is None else known, None
            curvature, p_norm, ap_norm = dot(p, ap), norm(p), norm(ap)
            bad = active & (~(curvature > 0) | _is_flat(torch.finfo(r.dtype).eps, curvature, p_norm, ap_norm, top))
            negative = negative | (bad & (curvature <= 0))
            top = torch.maximum(top, torch.where(active & ~bad, curvature / torch.where(active, p_norm, 1).square(), 0))
            if k == 0:
                size = torch.maximum(curvature.abs(), LEAST * p_norm * ap_norm)
                long = bad & (size > 0) & size.isfinite()
                x = select(bad, torch.where(long, rz / torch.where(long, size, 1), 1).unsqueeze(-1) * p, x)
            active = active & ~bad
            # a problem that is done keeps x and r because its alpha is zero, if its A p is a number. Quotients of one there: 0 / 0
            # would be NaN in the derivative of the path, mask or not
            alpha = torch.where(active, rz / torch.where(active, curvature, 1), 0).unsqueeze(-1)
            x = torch.addcmul(x, alpha, p)
            r = torch.addcmul(r, alpha, select(active, ap, r), value=-1)
            z = r if m is None else m(r)
            rz_new = dot(r, z)
            beta = (rz_new / torch.where(active, rz, 1)).unsqueeze(-1)
            p = select(active, torch.addcmul(z, beta, p), p)
            rz = torch.where(active, rz_new, rz)
            active = active & ((rz if m is None else dot(r, r)) > threshold)
        return _CG(x, r, p, rz, threshold, active, negative, top)

    def _line_search(
        self,
        objective: Objective,
        state: _State,
        local: Linearisation,
        direction: Tensor,
        slope: Tensor,
        negative: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next point, which problems can go no further, their ``lowest`` and ``idle``. ``negative``: where the curvature is."""
        point = state.point
        trial = point + direction
        value = objective.value(trial)
        part = HIDDEN_IN_EPS * torch.finfo(slope.dtype).eps
        if is_single(trial) and not bool(state.stalled):  # the same test with numbers of Python, which mostly is all
            begin, rise = float(local.value), float(slope)
            if abs(rise) > part * abs(begin) and float(value) <= begin + SUFFICIENT_DECREASE * rise:
                return trial, state.stalled, *_fresh(trial)
        hidden = part * local.value.abs()
        at_floor = slope.abs() <= hidden
        searching = ~(state.stalled | at_floor)
        length = torch.ones_like(slope)
        best = point
        short = torch.zeros_like(searching)  # so short a step, and so little of G, that rounding may have chosen it
        for k in range(self.max_backtracks + 1):
            if k > 0:
                trial = point + length.unsqueeze(-1) * direction
                value = objective.value(trial)
            accept = searching & (value <= local.value + SUFFICIENT_DECREASE * length * slope)
            best = select(accept, trial, best)
            if k >= HALVINGS:
                short = short | (accept & (value >= local.value - hidden))
            searching = searching & ~accept
            if not bool(searching.any()):
                break
            length = torch.where(searching, (0.5 if k < HALVINGS else 0.1) * length, length)
        doubtful = at_floor | searching | short
        if not bool(doubtful.any()):  # as mostly
            return best, state.stalled, *_fresh(best)
        short = short & (best != point).any(-1)
        return self._by_gradients(objective, state, local, direction, slope, negative, best, doubtful, short)

    def _by_gradients(
        self,
        objective: Objective,
        state: _State,
        local: Linearisation,
        direction: Tensor,
        slope: Tensor,
        negative: Tensor,
        best: Tensor,
        doubtful: Tensor,
        short: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`_line_search`, where the test on G left it ``doubtful``: the gradient decides. It is smaller, or G falls along the
        whole step, as on the way down from a saddle. ``short``: that test was passed by a very short step, to ``best``.
        """
        point, hidden = state.point, HIDDEN_IN_EPS * torch.finfo(slope.dtype).eps * local.value.abs()
        size = norm(local.grad)
        lowest, idle = torch.minimum(state.lowest, size), torch.where(size < state.lowest, 0, state.idle + 1)
        patient = (idle <= PATIENCE) | negative  # next to a saddle the gradient has to grow for long
        undecided = ~state.stalled & doubtful & ~(size <= self.tol)  # a problem that is done has no direction
        length = torch.ones_like(slope)
        for _ in range(FLOOR_TRIALS):
            if not bool(undecided.any()):
                break
            trial = point + length.unsqueeze(-1) * direction
            value, grad = objective.value_and_grad(trial)
            along = dot(grad, direction)
            level = torch.where(short, value <= local.value + hidden, not_above(value, local.value))
            smaller = norm(grad)
            falls = (smaller < size) & level
            falls = falls | ((along < ALMOST_FLAT * slope.abs()) & (value <= local.value))
            moved = (trial != point).any(-1)  # or a step that rounding undoes would be taken again and again
            falls = falls & moved & (patient | (smaller < lowest))
            best = select(undecided & falls, trial, best)
            undecided = undecided & ~falls
            length = 0.5 * length  # a step with Gauss-Newton may be too long
        fresh = _fresh(phi=best)
        lowest, idle = torch.where(doubtful, lowest, fresh[0]), torch.where(doubtful, idle, fresh[1])
        return best, state.stalled | (undecided & ~short), lowest, idle


def _is_flat(eps: float, curvature: Tensor, p: Tensor, ap: Tensor, top: Tensor) -> Tensor:
    """Whether a positive p^T A p is rounding along a null vector of A, as where pieces of G are flat; ``p`` and ``ap`` are the norms."""
    return (curvature <= eps * top * p**2) & (curvature <= ACROSS * eps**0.5 * p * ap)


def _is_flat_single(eps: float, curvature: float, p: float, ap: Tensor, top: float) -> bool:
    """The same of a single problem, whose A p is mostly not asked."""
    return curvature <= eps * top * p * p and curvature <= ACROSS * eps**0.5 * p * float(norm(ap))


def _fresh(phi: Tensor) -> tuple[Tensor, Tensor]:
    """``lowest`` and ``idle`` where a test on G decides."""
    return phi.new_full(phi.shape[:-1], torch.inf), torch.zeros(phi.shape[:-1], dtype=torch.int64, device=phi.device)
