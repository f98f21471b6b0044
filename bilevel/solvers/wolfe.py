"""A strong Wolfe line search as a state: one trial at a time, for each problem of a batch at its own pace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.solvers.line_search import NOISE, SUFFICIENT_DECREASE

CURVATURE = 0.9  # c2 of the Wolfe conditions; SUFFICIENT_DECREASE is c1
# a trial keeps this distance to the ends of its bracket, as a part of the width; a bracket without upper end grows at most so much
MARGIN, LENGTHEN = 0.1, 10.0


@dataclass(frozen=True)
class Trial:
    """What was found at a trial, every field ``(*batch,)``."""

    taken: Tensor
    too_long: Tensor
    finite: Tensor
    slope: Tensor
    change: Tensor  # of the objective, from length 0
    noise: Tensor  # such a change may be rounding


@dataclass(frozen=True)
class Search:
    """The line search of each problem, every field ``(*batch,)``.

    The bracket (low, high) holds a strong Wolfe point: at ``low`` the objective is low enough and still falls, at ``high`` it is too
    large or rises. ``high`` is infinite until such a length was met.
    """

    length: Tensor  # the trial
    slope: Tensor  # of the objective along the direction, at length 0
    low: Tensor
    low_slope: Tensor
    low_change: Tensor  # of the objective, from length 0 to low
    high: Tensor
    high_slope: Tensor
    rejected: Tensor  # trials so far

    @staticmethod
    def start(length: Tensor, slope: Tensor) -> Search:
        """A new search with this first trial."""
        zero, infinite = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        return Search(length, slope, zero, slope, zero, infinite, infinite, zero)

    def tried(
        self,
        value: Tensor,
        value_at_0: Tensor,
        ceiling: Tensor,
        slope: Tensor,
        short_will_do: Tensor,
        max_rejected: int,
    ) -> Trial:
        """Whether the trial is taken; :meth:`narrowed` is the search that goes on where it is not.

        Args:
            value, slope: of the objective at the trial.
            value_at_0: infinite takes any finite value.
            ceiling: the lowest value so far, of all searches, and what rounding may hide in it: that must not add up.
            short_will_do: accept although the curvature condition fails, that is, although the trial is too short: the
                first probe, which is short on purpose.
            max_rejected: after so many a trial that is too short is taken as well: the objective falls for ever, or its slope at length 0
                is next to nothing, as at a saddle.
        """
        finite = (value.abs() < torch.inf) & (slope.abs() < torch.inf)  # not so for NaN
        # changes this small may be rounding, and the slopes decide (Hager and Zhang 2005, section 4)
        change, noise = value - value_at_0, NOISE * torch.finfo(value.dtype).eps * value_at_0.abs()
        low_enough = (change <= SUFFICIENT_DECREASE * self.length * self.slope + noise) & (value <= ceiling + noise)
        too_long = ~(finite & low_enough & (slope <= -CURVATURE * self.slope))
        last_resort = (self.high == torch.inf) | self.has_lowered(self.length, change, value_at_0)
        last_resort = last_resort & (self.rejected >= max_rejected)
        long_enough = (slope >= CURVATURE * self.slope) | short_will_do | last_resort
        return Trial(~too_long & long_enough, too_long, finite, slope, change, noise)

    def narrowed(self, trial: Trial) -> Search:
        """After a trial that was too long or too short."""
        too_long, slope = trial.too_long, torch.where(trial.finite, trial.slope, torch.inf)
        # from here on quotients and roots of ones where they are not used: infinity would be NaN in the derivative of a solver's
        # path, mask or not. The mean slope up to the trial is NaN where it is not known
        known = trial.finite & (trial.change.abs() > trial.noise)
        mean_slope = torch.where(known, trial.change, torch.nan) / torch.where(known, self.length, 1.0)
        low, low_slope = torch.where(too_long, self.low, self.length), torch.where(too_long, self.low_slope, slope)
        low_change = torch.where(too_long, self.low_change, trial.change)
        high, high_slope = torch.where(too_long, self.length, self.high), torch.where(too_long, slope, self.high_slope)
        # closed brackets: where a cubic is least; every third time the middle. Unknown means are those of a parabola
        closed, regular = high < torch.inf, high_slope < torch.inf
        end_slope = torch.where(regular, high_slope, -low_slope)
        mean_slope = torch.where((low == 0) & ~mean_slope.isnan(), mean_slope, 0.5 * (low_slope + end_slope))
        part = _least_of_cubic(low_slope, end_slope, mean_slope)
        part = torch.where(part.isnan() | (self.rejected % 3 == 2), 0.5, part.clamp(MARGIN, 1 - MARGIN))
        inside = low + torch.where(regular, part, MARGIN) * torch.where(closed, high - low, 0.0)
        # open ones: where a line through the slopes is zero
        rise = low_slope - self.low_slope
        ahead = self.length - (self.length - self.low) * low_slope / torch.where(rise > 0, rise, 1.0)
        ahead = torch.where(rise > 0, ahead.clamp(2 * self.length, LENGTHEN * self.length), LENGTHEN * self.length)
        length = torch.where(closed, inside, ahead)
        return Search(length, self.slope, low, low_slope, low_change, high, high_slope, self.rejected + 1)

    def has_lowered(self, length: Tensor, change: Tensor, value_at_0: Tensor) -> Tensor:
        """Whether a trial of this length that was low enough has lowered the objective by more than rounding: by what was asked of it, or
        by far more than its slope promised, as on the way down from a saddle (and not at a kink).
        """
        noise = NOISE * torch.finfo(length.dtype).eps * value_at_0.abs()
        promised = length * self.slope
        return (-SUFFICIENT_DECREASE * promised > noise) | ((change < -noise) & (change < 2 * promised))

    def back_to_low(self, mask: Tensor, max_rejected: int) -> Search:
        """With the best length so far as the last trial, where the mask is set."""
        rejected = torch.where(mask, float(max_rejected), self.rejected)
        return replace(self, length=torch.where(mask, self.low, self.length), rejected=rejected)

    def has_room(self, size: Tensor, rounding: Tensor) -> Tensor:
        """Whether the ends of the bracket differ for a direction of this size."""
        return (self.high == torch.inf) | ((self.high - self.low) * size > rounding)


def _least_of_cubic(slope: Tensor, end_slope: Tensor, mean_slope: Tensor) -> Tensor:
    """Where in (0, 1) the cubic with these slopes at 0, at 1 and on average is least; NaN if it has no minimum (Nocedal and Wright
    2006, Eq. 3.59).
    """
    d1 = slope + end_slope - 3 * mean_slope
    square = d1**2 - slope * end_slope
    exists = (square > 0) & (square < torch.inf)
    d2 = torch.where(exists, square, 1.0).sqrt()
    steepening = end_slope - slope + 2 * d2
    exists = exists & (steepening > 0)
    return torch.where(exists, 1 - (end_slope + d2 - d1) / torch.where(exists, steepening, 1.0), torch.nan)
