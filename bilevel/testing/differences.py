"""Derivatives from values alone: central differences, extrapolated, with an estimate of their own error.

Extrapolation after C. J. F. Ridders, Accurate computation of F'(x) and F'(x) F''(x), Advances in Engineering Software 4 (1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST, RATIO, LEVELS = 2.0**-6, 8.0, 8  # steps: FIRST times the size of the variable, then each RATIO times shorter
RESOLVED = 1e-3  # a leaf whose derivative is this well known is judged by itself
ENOUGH = 1e-7  # a relative error with which no further level is spent
EVERY_COORDINATE = 50  # up to so many variables each of them is a direction of its own
RANDOM_DIRECTIONS = 16  # for more variables
MOST_LEAVES = 128  # up to so many, each leaf has a direction of its own


def difference(f: Callable[[float], Tensor], size: float, at: Tensor, noise: float) -> tuple[Tensor, float]:
    """df/dt at t = 0 and an estimate of its error (of its norm); NaN and inf where f is nowhere finite around 0.

    At a kink the error is the jump of the slope: whatever lies between the slopes of both sides may be called the derivative.

    Args:
        f: a function of a number; a tensor of any fixed shape.
        size: over which f changes noticeably: the steps are fractions of it.
        at: f(0).
        noise: the error of the values of f.
    """
    best, best_error = torch.full_like(at, torch.nan), math.inf
    row: list[Tensor] = []  # the extrapolations of the previous level, plain differences first
    last_bend = None
    for level in range(LEVELS):
        h = size * FIRST / RATIO**level
        ahead, behind = f(h), f(-h)
        new = [(ahead - behind) / (2 * h)]
        if not bool(new[0].isfinite().all()):
            row, last_bend = [], None
            continue
        # of the values, and of the point at which they were taken
        floor = (noise + torch.finfo(at.dtype).eps * size * float(new[0].norm())) / h
        bend = (ahead + behind - 2 * at) / h  # jump of the slope + h f'' + ..
        jump = math.inf if last_bend is None else float((RATIO * bend - last_bend).norm()) / (RATIO - 1)
        least, level_error, last_bend = max(floor, jump), math.inf, bend
        for order, shorter in enumerate(row, 1):
            factor = RATIO ** (2 * order)
            new.append((factor * new[-1] - shorter) / (factor - 1))
            error = max(float((new[-1] - new[-2]).norm()), float((new[-1] - shorter).norm()), least)
            level_error = min(level_error, error)
            if error < best_error:
                best, best_error = new[-1], error
        if best_error <= max(ENOUGH * float(best.norm()), 8 * floor) or level_error > 100 * best_error:
            break  # accurate enough, or rounding has taken over
        row = new
    return best, best_error


@dataclass(frozen=True)
class Directions:
    """Directions in which a variable is moved. In mean, ``sum_k weight_k (e . v_k)^2 = |e|^2`` for every e.

    Attributes:
        vectors: ``(k, n)``.
        weights: ``(k,)``.
        sizes: the size of the variable along each.
        names: the name of the leaf that is moved; '' where all of them are.
        alone: the name of what is judged by itself: an entry where it is moved alone, else the leaf.
    """

    vectors: Tensor
    weights: Tensor
    sizes: Sequence[float]
    names: Sequence[str]
    alone: Sequence[str]


def directions(
    like: Tensor,
    lengths: Sequence[int],
    names: Sequence[str],
    sizes: Sequence[float],
    *,
    every: int = EVERY_COORDINATE,
    count: int = RANDOM_DIRECTIONS,
) -> Directions:
    """Every coordinate of a variable of up to ``every`` entries, else random directions, always the same.

    Args:
        like: the variable, ``(n,)``.
        lengths, names, sizes: the number of entries, the name and the typical size of an entry of each leaf.
        every: see above.
        count: about so many random directions, within one leaf each and at least one for each leaf. Over all leaves if there are very many.
    """
    n, generator = like.numel(), torch.Generator().manual_seed(0)
    if n <= every:
        repeat = [i for i, length in enumerate(lengths) for _ in range(length)]
        entries = [i for length in lengths for i in range(length)]
        return Directions(
            torch.eye(n, device=like.device).to(like),
            like.new_ones(n),
            [sizes[i] for i in repeat],
            [names[i] for i in repeat],
            [
                names[i] if lengths[i] == 1 else f"entry {entry} of {names[i]}"
                for i, entry in zip(repeat, entries, strict=True)
            ],
        )
    if len(lengths) > MOST_LEAVES:
        lengths, names, sizes = [n], [""], [max(min(sizes), 1e-3 * max(sizes))]
    each = math.ceil(count / len(lengths))
    vectors, start = [], 0
    for length in lengths:
        block = torch.zeros(each, n, dtype=torch.float64, device="cpu")
        block[:, start : start + length] = torch.randn(
            each, length, generator=generator, dtype=torch.float64, device="cpu"
        )
        vectors.append(block)
        start += length
    repeat = [i for i in range(len(lengths)) for _ in range(each)]
    weights, moved = like.new_full((len(repeat),), 1 / each), [names[i] for i in repeat]
    return Directions(torch.cat(vectors).to(like), weights, [sizes[i] for i in repeat], moved, moved)


def relative(error: float, size: float) -> float:
    """error / size; zero is no error even where the size is zero."""
    return 0.0 if error == 0 else error / size if size > 0 else math.inf


@dataclass(frozen=True)
class Gap:
    """How far a derivative is from differences.

    Attributes:
        error: norm of the deviation.
        uncertainty: norm of the error of the differences themselves.
        size: norm of the derivative by differences, or the smallest derivative that rounding lets them see.
        where: the name of the leaf with the largest deviation.
        alone: the name of the leaf, or of the entry where it was moved alone, that is furthest off relative to itself, and that error
            and its uncertainty: a small one may be wrong altogether without a trace in the norm of all. What differences do not see is
            left out.
    """

    error: float
    uncertainty: float
    size: float
    where: str = ""
    alone: tuple[str, float, float] = ("", 0.0, 0.0)

    @property
    def relative(self) -> tuple[float, float]:
        """The error and the uncertainty, relative to the size."""
        return relative(self.error, self.size), relative(self.uncertainty, self.size)

    def over(self, other: Gap) -> Gap:
        """The worst of both."""
        worst = other if other.error > self.error or math.isnan(other.error) else self
        uncertainty = max(self.uncertainty, other.uncertainty)
        alone = self.alone if self.alone[1] >= other.alone[1] else other.alone
        return Gap(worst.error, uncertainty, max(self.size, other.size), worst.where, alone)


@dataclass(frozen=True)
class Differences:
    """The derivatives of one function along several directions.

    Attributes:
        along: the directions.
        columns: df/dv for each, tensors ``(k,)``, or 0-d of a scalar f.
        uncertainties: of their norms.
        floor: the smallest derivative that rounding lets differences see.
    """

    along: Directions
    columns: list[Tensor]
    uncertainties: list[float]
    floor: float

    @staticmethod
    def of(f: Callable[[Tensor], Tensor], x: Tensor, along: Directions, noise: float = 0.0) -> Differences:
        """At x ``(n,)``, of f with values of a fixed shape; ``noise``: the error of these values beyond their own rounding."""
        at, eps = f(x), torch.finfo(x.dtype).eps
        noise += eps * float(at.norm())
        found = []
        for v, size in zip(along.vectors, along.sizes, strict=True):
            found.append(difference(lambda t, v=v: f(x + t * v), size, at, noise))  # type: ignore[misc]
        columns, uncertainties = zip(*found, strict=True)
        return Differences(along, list(columns), list(uncertainties), eps**0.5 * float(at.norm()) / max(along.sizes))

    def gap(self, rows: Tensor) -> Gap:
        """To a Jacobian ``(k, n)``, or the gradient ``(n,)`` of a scalar f."""
        leaves = {name: [0.0, 0.0, 0.0] for name in self.along.names}  # squares of error, uncertainty and size
        single = {name: [0.0, 0.0, 0.0] for name in self.along.alone}
        for i, (column, weight) in enumerate(zip(self.columns, self.along.weights.tolist(), strict=True)):
            for squares in (leaves[self.along.names[i]], single[self.along.alone[i]]):
                squares[0] += weight * float((rows @ self.along.vectors[i] - column).square().sum())
                squares[1] += weight * self.uncertainties[i] * self.uncertainties[i]  # ** raises where this overflows
                squares[2] += weight * float(column.square().sum())
        error, uncertainty, size = (sum(squares) ** 0.5 for squares in zip(*leaves.values(), strict=True))
        own = [("", 0.0, 0.0)]
        for name, squares in single.items():
            off, unsure, large = (square**0.5 for square in squares)
            if large > self.floor and unsure < RESOLVED * large:
                own.append((name, off / large, unsure / large))
        where = max(leaves, key=lambda name: leaves[name][0])
        return Gap(error, uncertainty, max(size, self.floor), where, max(own, key=lambda one: one[1]))
