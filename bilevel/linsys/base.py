"""What a linear solver is: a method that turns ``v -> A v`` and ``b`` into ``u`` with ``A u = b``. It knows no bilevel problem.

One shape for everything: vectors are ``(*batch, d)``, every per-problem scalar is ``(*batch,)``, a single problem has
batch shape ``()``. Each algorithm is written once over that shape, with masks instead of branches on tensor values, so
that one problem of a batch cannot disturb another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch import pyfunctorch

from bilevel.result import Result
from bilevel.status import Status

Matvec = Callable[[Tensor], Tensor]
"""``v -> A v`` over ``(*batch, d)``; also over ``(k, *batch, d)``: several vectors for each problem at once."""


@dataclass(frozen=True)
class Operator:
    """A matvec, and what its maker knows of A. A plain function counts as ``Operator(function)``.

    Attributes:
        apply: ``v -> A v``.
        symmetric: A is symmetric.
        shared: the first ``shared`` batch axes of b are several right-hand sides of the same A: apply also takes vectors without
            them, ``(*batch[shared:], d)``, and any number of axes in front of these.
    """

    apply: Matvec
    symmetric: bool = True
    shared: int = 0

    def __call__(self, v: Tensor) -> Tensor:
        return self.apply(v)


def as_operator(matvec: Matvec) -> Operator:
    """The operator, or one made of a plain function."""
    return matvec if isinstance(matvec, Operator) else Operator(matvec)


def batch_of(operator: Operator, b: Tensor) -> torch.Size:
    """The batch shape of the matrices: that of b, without the axes of several right-hand sides.

    Raises:
        ValueError: b has not so many batch axes.
    """
    if not 0 <= operator.shared < b.ndim:
        raise ValueError(
            f"shared: expected at most {b.ndim - 1} axes in front of a right-hand side of shape {tuple(b.shape)}, got {operator.shared}."
        )
    return b.shape[operator.shared : -1]


class LinearSolver(ABC):
    """A method for A u = b. Subclasses are frozen keyword-only dataclasses; their fields are the options."""

    requires_symmetric: ClassVar[bool] = True
    """Whether the method is right for symmetric A only."""

    needs_known_inverse: ClassVar[bool] = False
    """Whether the method only works with the inverse of a known part of A, and so is no solve."""

    @abstractmethod
    def solve(
        self, matvec: Matvec, b: Tensor, init: Tensor | None = None, preconditioner: Matvec | None = None
    ) -> Result:
        """Solve A u = b for every problem of the batch.

        Args:
            matvec: ``v -> A v`` over ``(*batch, d)``, and over ``(k, *batch, d)`` if the method needs it. An :class:`Operator` says
                more of A than a function can.
            b: right-hand side ``(*batch, d)``.
            init: start ``(*batch, d)``; zero if None.
            preconditioner: ``v -> M v`` with M an approximate inverse of A, symmetric positive definite.

        Returns:
            A :class:`~bilevel.Result` with ``value`` u ``(*batch, d)`` and ``residual`` ``|b - A u|`` ``(*batch,)``.

        Raises:
            ValueError: the operator is not symmetric, and the method needs that.
        """

    def operator(self, matvec: Matvec) -> Operator:
        """The matvec as an operator; refused if the method is wrong for it."""
        operator = as_operator(matvec)
        if self.requires_symmetric and not operator.symmetric:
            raise ValueError(
                f"{type(self).__name__} needs a symmetric matrix, got one that is declared symmetric=False. Use Exact, GMRES or BiCGStab."
            )
        return operator


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``(*batch,)`` of vectors ``(*batch, d)``."""
    return torch.linalg.vecdot(x, y)


def norm(x: Tensor) -> Tensor:
    """Euclidean norms ``(*batch,)`` of vectors ``(*batch, d)``."""
    return torch.linalg.vector_norm(x, dim=-1)


def select(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``torch.where`` with a mask ``(*batch,)`` over tensors ``(*batch, ...)``. Never mixes in a
    NaN of the other side.
    """
    own = mask if yes.ndim == mask.ndim else mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim))
    return torch.where(own, yes, no)


ROUNDING = 4
"""An A whose least singular value is below this many eps |A| may be a singular one after rounding.

A singular matrix is stored with errors of about one eps, so the limit must be above that. Ten would refuse matrices
with a condition number of 1e6 in float32, which are solved to a digit (tests/linsys/test_exact.py).
"""


def rank_rounding(v: Tensor) -> float:
    """The part of |A| below which a singular value may be rounding: d eps, as usual for small d; the errors of d terms partly cancel, and
    for large d they would otherwise be as large as |A|.
    """
    d = v.shape[-1]
    return min(d, 4 * d**0.5) * torch.finfo(v.dtype).eps


def all_finite(v: Tensor) -> Tensor:
    """Whether no entry is NaN or infinite ``(*batch,)``. On a CPU in a sixth of the time of ``isfinite().all(-1)``."""
    return largest(v) < torch.inf


def largest(v: Tensor) -> Tensor:
    """The largest absolute entry ``(*batch,)``, NaN where there is one; 0 of none."""
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])


def unit_of(size: Tensor) -> Tensor:
    """Numbers ``(*batch,)`` rounded down to powers of two ``(*batch, 1)``; 1 for 0 and what is not finite."""
    size = size.detach()
    size = torch.where((size > 0) & size.isfinite(), size, 1)
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    return unit.clamp_min(torch.finfo(size.dtype).tiny).unsqueeze(
        -1
    )  # of subnormal numbers: there is nothing to divide by


def long_norm(v: Tensor) -> Tensor:
    """The norm ``(*batch,)`` of vectors whose squares may be too large to be numbers."""
    unit = unit_of(largest(v))
    return norm(v / unit) * unit.squeeze(-1)


def some_direction(b: Tensor) -> Tensor:
    """Numbers in [-1, 1) ``(d,)`` that look random (the mixing of SplitMix64, Steele et al. 2014), the same on every device. Made where
    they are needed: the host would wait for a copy.
    """
    k = torch.arange(1, b.shape[-1] + 1, device=b.device) * -0x61C8864680B583EB  # wraps, as it should
    k = (k ^ (k >> 30)) * -0x40A7B892E31B1A47
    k = (k ^ (k >> 27)) * -0x6B2FB644ECCEEE15
    return ((k ^ (k >> 31)) % 2**24).to(b.dtype) / 2**23 - 1


def outside_transforms() -> AbstractContextManager[Any]:
    """Within it, no transform of ``torch.func`` is seen: what a generator of one's own draws is the same each time, and under ``vmap``
    PyTorch refuses all that is drawn.
    """
    return pyfunctorch.temporarily_clear_interpreter_stack()


def unit_of_matrix(v: Tensor, av: Tensor) -> Tensor:
    """Of A ``(*batch, 1)``, as a product with it shows."""
    return unit_of(largest(av) / largest(v))


def in_own_unit(b: Tensor) -> tuple[Tensor, Tensor]:
    """A right-hand side ``(*batch, d)`` in its unit, and that unit ``(*batch, 1)``.

    A power of two: the numbers stay the same, and their squares are neither lost nor too large.
    """
    unit = unit_of(largest(b))
    return b / unit, unit


def left_by(init: Tensor, matvec: Matvec, b: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """What a start leaves of b, and where that is less than a start at zero leaves ``(*batch,)``; not where it is NaN.

    b is in this unit, init is not. One product.
    """
    left = b - matvec(init) / unit
    return left, norm(left) < norm(b)


def not_reduced(residual: Tensor, start: Tensor) -> Tensor:
    """Where a residual is no smaller than at the start, as far as rounding lets it be told; not where it is NaN.

    Where nothing was gained, rounding decides whether the one norm comes out a few eps below the other. Ten are above
    that, and far below any progress with which a solve would ever end.
    """
    return residual >= (1 - 10 * torch.finfo(residual.dtype).eps) * start


def to_columns(v: Tensor, batch: torch.Size) -> Tensor:
    """``(*axes, *batch, d)`` -> ``(*batch, d, k)``: several vectors for each problem as the columns of one matrix."""
    return v.reshape(-1, *batch, v.shape[-1]).movedim(0, -1)


def from_columns(x: Tensor, shape: torch.Size) -> Tensor:
    """The way back: ``(*batch, d, k)`` -> ``shape`` = ``(*axes, *batch, d)``."""
    return x.movedim(-1, 0).reshape(shape)


def mark(codes: Tensor, mask: Tensor, status: Status) -> Tensor:
    """Status codes with ``status`` where the mask is set."""
    return torch.where(mask, int(status), codes)


def check_system(b: Tensor, init: Tensor | None) -> None:
    """Refuse a right-hand side or a start that is no ``(*batch, d)`` floating tensor."""
    if not b.is_floating_point() or b.ndim == 0:
        raise ValueError(
            f"b: expected a real floating tensor of shape (*batch, d), got {b.dtype} of shape {tuple(b.shape)}."
        )
    if init is not None and (init.shape != b.shape or init.dtype != b.dtype):
        raise ValueError(
            f"init: expected shape {tuple(b.shape)} and {b.dtype} like b, got {tuple(init.shape)} and {init.dtype}."
        )
