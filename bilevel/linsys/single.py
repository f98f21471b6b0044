"""Conjugate gradients for a single problem on the CPU, with numbers of Python in the place of tensors and masks.

For small problems masks take longer than the vectors. These are the ordinary steps only; whatever else may happen is for the masked loop
of the caller, which goes on from where they end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import frexp, inf, ldexp, sqrt

import torch
from torch import Tensor

from bilevel.linsys.base import Matvec


def is_single(v: Tensor) -> bool:
    """Whether the vector is that of one problem, on the CPU, and nothing but its numbers is wanted: no derivative, no transform, and
    nobody who follows the operators.
    """
    return (
        v.ndim == 1
        and type(v) is Tensor
        and v.device.type == "cpu"
        and not v.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(v)
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def unit_of_number(size: float, tiny: float) -> float:
    """:func:`bilevel.linsys.base.unit_of` of one number; ``tiny``: the smallest normal one of its dtype."""
    return max(ldexp(1.0, frexp(size)[1] - 1), tiny) if 0 < size < inf else 1.0


@dataclass
class Steps:
    """Where CG is: ``r`` = b - A x, ``p`` the next direction, ``rr`` = r^T r, the quotients of each step, and the largest p^T A p / p^T p
    where it is wanted.
    """

    x: Tensor
    r: Tensor
    p: Tensor
    rr: float
    lengths: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    top: float = 0.0
    ap: Tensor | None = None
    """A p, where it was no ordinary step that came next."""

    @property
    def taken(self) -> int:
        """How many steps."""
        return len(self.lengths)


def single_cg(
    matvec: Matvec,
    x: Tensor,
    r: Tensor,
    threshold: float,
    most: int,
    is_flat: Callable[[float, float, Tensor, float], bool] | None = None,
) -> Steps:
    """Steps of CG from x with the residual r, until its norm is at most ``threshold``, until there are ``most``, or until p^T A p is no
    positive number, or none but for rounding: ``is_flat`` of it, |p|, A p and the largest p^T A p / p^T p so far.
    """
    x, r, p = x.clone(), r.clone(), r  # x and r change in place; the directions do not, for whoever keeps them
    steps, largest = Steps(x, r, p, float(torch.dot(r, r))), torch.finfo(r.dtype).max
    pp = steps.rr  # p^T p: r is across the direction before

    def quotient(a: float, b: float) -> float:
        """As a tensor of this dtype would have it."""
        return inf if a / b > largest else a / b

    while steps.taken < most and sqrt(steps.rr) > threshold:
        ap = matvec(steps.p)
        curvature = float(torch.dot(steps.p, ap)) if is_single(ap) else 0.0
        if is_flat is not None and curvature > 0:
            curvature = 0.0 if is_flat(curvature, sqrt(pp), ap, steps.top) else curvature
            steps.top = max(steps.top, quotient(curvature, pp))
        if not curvature > 0:
            steps.ap = ap
            break
        alpha = quotient(steps.rr, curvature)
        x.add_(steps.p, alpha=alpha)
        r.sub_(ap, alpha=alpha)
        rr = float(torch.dot(r, r))
        beta = quotient(rr, steps.rr)
        steps.p = torch.add(r, steps.p, alpha=beta)
        steps.rr, pp = rr, rr + beta * beta * pp  # no power: it raises where a product is infinite
        steps.lengths.append(alpha)
        steps.shares.append(beta)
    return steps
