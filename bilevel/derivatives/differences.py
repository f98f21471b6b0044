"""Products with the Hessian of G and with its cross derivative by finite differences.

With g(phi) = (dG/dphi, dG/dtheta), both products along a direction v are the derivative of g along v: H v and (d2G/dphi dtheta)^T v.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

WARNING = (
    "FiniteDifference(): differences of two steps differ by %.0f %%: products with the Hessian are not known to one digit. "
    "Use float64, smooth operators, or another product."
)

Gradient = Callable[[Tensor], list[Tensor | None]]
"""phi ``(*batch, d)`` -> [dG/dphi ``(*batch, d)``, dG/dtheta leaf by leaf ``(*batch, *shape)``, None where unused]."""


class Differences:
    """v -> (g(phi + h v) - g(phi - h v)) / 2 h with h |v| = step (1 + |phi|).

    Without a step, it starts with the cube root of the machine epsilon and compares the first difference with one of an eighth of the
    step. Where they disagree, either g curves over shorter lengths, and the step is made shorter while that brings differences nearer to
    each other; or rounding is all that they show, and the step stays.

    Args:
        gradient: g.
        phi: the point ``(*batch, d)``.
        step: relative to ``1 + |phi|``; None: to be found.
        said: what the log has been told of this problem.
    """

    def __init__(self, gradient: Gradient, phi: Tensor, step: float | None, said: set[str]) -> None:
        self._gradient, self._phi, self._said = gradient, phi, said
        self._eps = torch.finfo(phi.dtype).eps
        self._length = (step or self._eps ** (1 / 3)) * (1 + _norm(phi))
        self._settled = step is not None

    def __call__(self, v: Tensor) -> list[Tensor | None]:
        if self._settled:
            return self._along(v, self._length)
        self._settled = True
        return self._settle(v)

    def rows(self, v: Tensor) -> Tensor:
        """The first part alone, for v ``(*batch, d)`` or with further axes in front, one after the other."""
        phi = self._phi
        rows = v.reshape(-1, *phi.shape)
        if not self._settled and len(rows) > 1:  # by a direction that has a part in each of them
            self(rows.sum(0))
        found = [self(row)[0] for row in rows]
        stacked = torch.stack([row for row in found if row is not None])
        return stacked.reshape(*v.shape[: v.ndim - phi.ndim], *stacked.shape[1:])

    def _along(self, v: Tensor, length: Tensor) -> list[Tensor | None]:
        size = _norm(v)
        h = torch.where(size > 0, length / size, 1.0)

        def scaled(difference: Tensor) -> Tensor:
            return difference / (2 * h).reshape(h.shape[:-1] + (1,) * (difference.ndim - h.ndim + 1))

        ahead, behind = self._gradient(self._phi + h * v), self._gradient(self._phi - h * v)
        return [None if a is None or b is None else scaled(a - b) for a, b in zip(ahead, behind, strict=True)]

    def _settle(self, v: Tensor) -> list[Tensor | None]:
        """The first difference, with the length found that all have from then on."""

        def first(found: list[Tensor | None]) -> Tensor:
            """Of dG/dphi, or of the outputs of a model, as one vector for each problem."""
            assert found[0] is not None
            return found[0].reshape(*v.shape[:-1], -1)

        def gap(one: Tensor, other: Tensor) -> Tensor:
            # not finite: a step left the domain of g; both zero: they agree
            off = _norm(one - other)
            return torch.where(off == 0, off, torch.nan_to_num(off / _norm(other), nan=torch.inf))

        found = self._along(v, self._length)
        shorter = self._length / 8
        here = first(self._along(v, shorter))
        apart = gap(first(found), here)
        enough = self._eps ** (1 / 3)
        searching = (apart > enough) & (_norm(v) > 0)
        if not bool(searching.any()):
            return found
        searching &= first(self._gradient(self._phi)).isfinite().all(-1, keepdim=True)
        in_doubt = searching
        for _ in range(12):
            there = first(self._along(v, shorter / 8))
            now = gap(here, there)
            searching = searching & ((now < apart / 4) | apart.isinf())  # shorter was better, and not by chance
            if not bool(searching.any()):
                break
            self._length = torch.where(searching, shorter, self._length)
            shorter = self._length / 8
            here, apart = torch.where(searching, there, here), torch.where(searching, now, apart)
            done = searching & (apart <= enough)
            self._length = torch.where(done, shorter, self._length)  # which is off by a 64th of what they are apart
            searching = searching & ~done
        if bool((apart[in_doubt] > 0.1).any()) and WARNING not in self._said:
            self._said.add(WARNING)
            _logger.warning(WARNING, 100 * float(apart[in_doubt].max()))
        return self._along(v, self._length)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True)
