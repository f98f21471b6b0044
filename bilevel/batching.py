"""Chunk by chunk and then one gradient: what every kind of hypergradient does with its tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bilevel.checks import check_count
from bilevel.curvature import Curvature, Hessian
from bilevel.entry import Call, refuse_lost_gradients, refuse_transforms
from bilevel.gradient import Hypergradient
from bilevel.linsys.base import all_finite, select
from bilevel.result import Result
from bilevel.trees import unflatten

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Part:
    """What some tasks give: everything per task.

    ``grads`` has a leaf ``(tasks, *shape)`` for each leaf of theta, NaN where a task is not ok; or a sum ``(*shape)``. ``inner_grad`` is
    dG/dphi at phi, and ``slope`` its norm.
    """

    phi: Tensor
    outer: Tensor
    grads: list[Tensor]
    inner: Result | None
    linear: Result | None
    ok: Tensor
    slope: Tensor | None = None
    inner_grad: Tensor | None = None


@dataclass(frozen=True)
class Gathered:
    """All tasks: ``part`` with the reduced gradient, the reduced outer loss, and how they were reduced.

    ``scale`` is what the gradients were multiplied by; ``per_task`` says that they still have the task axis.
    """

    part: Part
    outer: Tensor
    scale: Tensor
    per_task: bool

    def hypergradient(
        self, call: Call, reduction: Reduction, curvature: Curvature = Hessian(), damping: float = 0.0
    ) -> Hypergradient:
        """As the user gets it."""
        part = self.part
        return Hypergradient(
            grad=unflatten(call.flat.theta, part.grads),
            outer=self.outer,
            outer_per_task=part.outer,
            phi=call.flat.phi.unravel(part.phi),
            inner=None if part.inner is None else as_tree(part.inner, call),
            linear=None if part.linear is None else as_tree(part.linear, call),  # type: ignore[arg-type]  # unrolled
            curvature=curvature,
            damping=damping,
            ok_per_task=part.ok,
            reduction=reduction,
            grad_per_task=bool(call.sizes) and self.per_task,
            slope=part.slope,
        )


def gather(
    call: Call,
    part_of: Callable[[Call], Part],
    theta_batched: bool,
    reduction: Reduction,
    chunk_size: int | None,
    name: str,
) -> Gathered:
    """``part_of`` each chunk of tasks, and the reduction. With none ok the result is NaN, never zero."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}.')
    refuse_transforms(call, name)
    refuse_lost_gradients(call, name)
    per_task = theta_batched or reduction == "none" or not call.sizes
    parts = []
    for piece in chunks(call, chunk_size):
        part = part_of(piece)
        # one gradient of the size of theta for each chunk, not for each task
        parts.append(part if per_task else replace(part, grads=[_sum_ok(grad, part.ok) for grad in part.grads]))
    joined = parts[0]
    if call.sizes:
        joined = Part(
            phi=torch.cat([part.phi for part in parts]),
            outer=torch.cat([part.outer for part in parts]),
            grads=[
                torch.cat(leaf) if per_task else torch.stack(leaf).sum(0)
                for leaf in zip(*[part.grads for part in parts], strict=True)
            ],
            inner=concatenate([part.inner for part in parts]),
            linear=concatenate([part.linear for part in parts]),
            ok=torch.cat([part.ok for part in parts]),
            slope=_joined([part.slope for part in parts]),
            inner_grad=_joined([part.inner_grad for part in parts]),
        )
    outer = torch.where(joined.ok, joined.outer, torch.nan)
    scale = torch.ones((), dtype=outer.dtype, device=outer.device)
    if call.sizes and reduction != "none":
        count = joined.ok.sum().to(outer.dtype)
        scale = torch.where(count > 0, 1 / count if reduction == "mean" else scale, torch.nan)
        joined = replace(joined, grads=[grad * scale for grad in joined.grads])
        outer = _sum_ok(joined.outer, joined.ok) * scale
    return Gathered(joined, outer, scale, per_task)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) > 1 else next(iter(found), None)


def chunks(call: Call, chunk_size: int | None) -> list[Call]:
    """The call in pieces of at most ``chunk_size`` tasks."""
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    return call.chunks(chunk_size)


def concatenate(parts: Sequence[Result | None]) -> Result | None:
    """The results of the chunks as one; None where there are none."""
    results = [part for part in parts if part is not None]
    if len(results) <= 1:
        return results[0] if results else None
    counts = [part.negative_curvature for part in results if part.negative_curvature is not None]
    return Result(
        value=torch.cat([part.value for part in results]),
        codes=torch.cat([part.codes for part in results]),
        steps=torch.cat([part.steps for part in results]),
        residual=torch.cat([part.residual for part in results]),
        num_grads=sum(part.num_grads for part in results),
        num_matvecs=sum(part.num_matvecs for part in results),
        negative_curvature=torch.cat(counts) if counts else None,
        what=results[0].what,
    )


def as_tree(result: Result, call: Call) -> Result:
    """The result with its value as the user knows it."""
    return replace(result, value=call.flat.phi.unravel(result.value))


def ok_where_finite(ok: Tensor, outer: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """``ok``, and outer loss and gradient ``(*batch, *shape)`` are finite."""
    finite = outer.isfinite()
    for grad in grads:
        finite = finite & all_finite(grad.reshape([*ok.shape, -1]))
    return ok & finite


def nan_where_not(ok: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the tasks that are ok, NaN for the others."""
    return [select(ok, grad, grad.new_full((), torch.nan)) for grad in grads]


def _sum_ok(x: Tensor, ok: Tensor) -> Tensor:
    return select(ok, x, x.new_zeros(())).sum(0)
