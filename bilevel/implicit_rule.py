"""The differentiation rules behind :func:`argmin`, :func:`root` and :func:`fixed_point`.

See :mod:`bilevel.solution` for the formulas. A solution is a function of theta and data whose derivatives are linear solves, and a linear
solve is a function whose derivatives are linear solves again: so every derivative has derivatives. Both take all axes of nested ``vmap``
themselves, as ``levels``, in the place of PyTorch's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Hessian
from bilevel.derivatives import (
    Flat,
    Levels,
    Objective,
    condition,
    condition_product,
    pullback,
    pushforward,
    refuse_batched_gradients,
    refuse_captured_under_transforms,
    refuse_eager_forward_mode,
    refuse_nested_forward_mode,
    transforms_active,
    with_axis,
)
from bilevel.entry import Call, has_changed, objective_of, run_solver
from bilevel.isolation import isolated, without_checkpoints
from bilevel.linsys.base import LinearSolver, Operator, norm
from bilevel.result import Result
from bilevel.status import Check, converged, failed
from bilevel.trees import Tree


def differentiable_solution(call: Call, rule: Rule) -> Tree:
    """phi* of this call, with the derivatives of the rule."""
    tensors = [call.phi.detach(), *call.tensors]
    if not transforms_active():
        refuse_eager_forward_mode(call.flat, tensors[0], tensors[1:])
    else:
        refuse_captured_under_transforms(call.flat, tensors[0], tensors[1:])
    return call.flat.phi.unravel(_Solution.apply(_Mapped(rule), *_guarded(tensors)))


@dataclass(frozen=True)
class Rule:
    """What the differentiation rules of one call share.

    ``left``: the size of the condition where the solve has ended ``(*batch,)``, once it has.
    """

    flat: Flat
    solver: Any
    linsys: LinearSolver
    check: Check
    report: Callable[[Result], None] | None
    name: str
    left: list[Tensor] = field(default_factory=list, compare=False)

    def require_same(self, objective: Objective, phi: Tensor, now: Tensor) -> None:
        """Refuse the derivative of another problem than the one that was solved. ``now``: the condition at phi ``(*batch, d)``.

        Only where the solver reads numbers too. A change that leaves the condition at phi as it was is not seen.
        """
        if not self.left or transforms_active() or getattr(self.solver, "tol", None) == 0:
            return
        (before,) = self.left
        size = norm(now)
        if before.shape == size.shape and bool(has_changed(objective, phi, now, size - 10 * before).any()):
            raise ValueError(
                f"{self.name}: {self.flat.source} is not what was solved: its condition at the solution is {float(size.max()):.1e} "
                f"now, and was {float(before.max()):.1e} then. Derivatives call the functions again, and something that they captured has "
                "changed in between: an attribute, the variable of a loop, a buffer, train() or eval(), random numbers. Pass it in data, "
                "or take the derivative before it changes."
            )

    def require_function(self, objective: Objective, result: Result) -> None:
        """Refuse a condition with chance in it, where that may be why its solve has not converged: its residual would hide it from
        :meth:`require_same`.
        """
        if not self.check or transforms_active() or getattr(self.solver, "tol", None) == 0:
            return
        left = ~converged(result.codes)
        if not bool(left.any()):
            return
        now = objective.value_and_grad(result.value)[1]
        size, before = norm(now), result.residual
        changed = left & has_changed(objective, result.value, now, (size - before).abs().nan_to_num(0, 0, 0))
        if bool(changed.any()):
            raise ValueError(
                f"{self.name}: expected a function, but two evaluations of {self.flat.source} at the point where the solve has ended "
                f"differ: its condition is {float(before[changed].max()):.1e}, then {float(size[changed].max()):.1e}. Is there chance in "
                "it, as in dropout, or something that each call changes, as spectral normalisation does in training? Call .eval() on the "
                "module, or pass what is drawn in data; bilevel.testing.check_deterministic tells more."
            )

    def tell(self, result: Result, value: Any, what: str) -> None:
        """Report and check, where there is somebody to hear it."""
        if transforms_active():
            return
        result = replace(result, value=value, what=what)
        if self.report is not None:
            self.report(result)
        result.unwrap(check=self.check)


@dataclass(frozen=True)
class _Mapped:
    """A rule under ``vmap``: the batch axes that its arguments have, outermost first, and their sizes.

    ``transposed`` (linear solves): A^T in the place of A.
    """

    rule: Rule
    levels: Levels = ()
    sizes: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def at_solution(self) -> Levels:
        """Those where the solution stands in the place of the first argument: it has every axis."""
        return tuple((True, *flags[1:]) for flags in self.levels)

    def mapped(
        self, size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple[_Mapped, list[Tensor]]:
        """The same with one more axis outside."""
        moved = [
            tensor if axis is None else tensor.movedim(axis, 0) for tensor, axis in zip(tensors, in_dims, strict=True)
        ]
        flags = tuple(axis is not None for axis in in_dims)
        return _Mapped(self.rule, (flags, *self.levels), (size, *self.sizes), self.transposed), moved


def _guarded(tensors: Sequence[Tensor]) -> list[Tensor]:
    refuse_nested_forward_mode(tensors)
    refuse_batched_gradients(tensors)
    return list(tensors)


class _Solution(torch.autograd.Function):
    """(phi0, *tensors) -> phi*. Its rules solve with :class:`_LinearSolve`, and so have derivatives themselves."""

    @staticmethod
    def forward(mapped: _Mapped, phi: Tensor, *tensors: Tensor) -> Tensor:
        rule = mapped.rule
        if phi.is_inference() or any(
            tensor.is_inference() for tensor in tensors
        ):  # those of the caller are copies that are none
            raise RuntimeError(
                f"{rule.name}: torch.inference_mode() is on around a transform of torch.func. Use torch.no_grad() in its place."
            )
        phi = _expand(phi, [flags[0] for flags in mapped.levels], mapped.sizes)
        objective = objective_of(rule.flat, tuple(flags[1:] for flags in mapped.levels), tensors, mapped.sizes)
        result = run_solver(objective, phi.clone(), rule.solver)
        rule.require_function(objective, result)
        rule.left[:] = [result.residual]
        rule.tell(result, rule.flat.phi.unravel(result.value), f"{rule.name}, inner solve")
        return torch.where(result.failed.unsqueeze(-1), torch.nan, result.value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mapped = inputs[0]
        ctx.set_materialize_grads(False)  # no tangent is not a tangent of zero: 0 times an infinite derivative is NaN
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @isolated
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        if cotangent is None:
            return (None,) * len(ctx.needs_input_grad)
        phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = mapped.at_solution
        u = _LinearSolve.apply(
            _Mapped(mapped.rule, with_axis(levels), mapped.sizes, True),
            *_guarded([_nan_after_failure(cotangent, phi), phi, *tensors]),
        )
        wanted = [want and _has_derivatives(t) for want, t in zip(ctx.needs_input_grad[2:], tensors, strict=True)]
        products = pullback(condition(mapped.rule.flat, levels), [phi, *tensors], -u, [False, *wanted])
        return (None, None, *products[1:])

    @staticmethod
    @isolated
    def jvp(ctx: Any, _mapped: None, _phi: Tensor | None, *tangents: Tensor | None) -> Tensor:
        phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = mapped.at_solution
        change = pushforward(
            condition(mapped.rule.flat, levels), [phi, *tensors], [None, *_floating(tangents, tensors)]
        )
        if change is None:
            return torch.zeros_like(phi)
        return _LinearSolve.apply(
            _Mapped(mapped.rule, with_axis(levels), mapped.sizes),
            *_guarded([_nan_after_failure(-change, phi), phi, *tensors]),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], mapped: _Mapped, *tensors: Tensor) -> tuple[Tensor, int]:
        more, moved = mapped.mapped(info.batch_size, in_dims[1:], tensors)
        return _Solution.apply(more, *moved), 0


class _LinearSolve(torch.autograd.Function):
    """(b, phi, *tensors) -> u with A(phi, tensors) u = b, or A^T u = b."""

    @staticmethod
    @without_checkpoints()
    def forward(mapped: _Mapped, b: Tensor, phi: Tensor, *tensors: Tensor) -> Tensor:
        rule, levels, sizes = mapped.rule, mapped.levels, mapped.sizes
        b = _expand(b, [flags[0] for flags in levels], sizes)
        # axes that only b has are several right-hand sides of one matrix: they go in front, and the matrix is
        # linearised once
        only_b = [axis for axis, flags in enumerate(levels) if not any(flags[1:])]
        shared = [axis for axis, flags in enumerate(levels) if any(flags[1:])]
        b = b.permute(*only_b, *shared, b.ndim - 1)
        point_levels = tuple(levels[axis] for axis in shared)
        point_sizes = tuple(sizes[axis] for axis in shared)
        phi = _expand(phi, [flags[1] for flags in point_levels], point_sizes)
        objective = objective_of(rule.flat, tuple(flags[2:] for flags in point_levels), tensors, point_sizes)
        local = objective.linearise(phi, Hessian(), 0.0)
        rule.require_same(objective, phi, local.grad)
        matvec = Operator(
            local.transposed_matvec if mapped.transposed else local.matvec,
            symmetric=rule.flat.symmetric,
            shared=len(only_b),
        )
        result = rule.linsys.solve(matvec, b, preconditioner=objective.curvature_inverse(0.0))
        rule.tell(result, rule.flat.phi.unravel(result.value), f"{rule.name}, linear solve")
        u = torch.where(failed(result.codes).unsqueeze(-1), torch.nan, result.value)
        back = sorted(range(len(levels)), key=lambda axis: [*only_b, *shared][axis])
        return u.permute(*back, u.ndim - 1).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mapped = inputs[0]
        ctx.set_materialize_grads(False)  # no tangent is not a tangent of zero: 0 times an infinite derivative is NaN
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @isolated
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        if cotangent is None:
            return (None,) * len(ctx.needs_input_grad)
        u, phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = mapped.at_solution
        flipped = _Mapped(mapped.rule, levels, mapped.sizes, not mapped.transposed)
        w = _LinearSolve.apply(flipped, *_guarded([_nan_after_failure(cotangent, u), phi, *tensors]))
        wanted = [
            want and _has_derivatives(t) for want, t in zip(ctx.needs_input_grad[2:], [phi, *tensors], strict=True)
        ]
        product = condition_product(mapped.rule.flat, levels, mapped.transposed)
        products = pullback(product, [u, phi, *tensors], -w, [False, *wanted])
        return (None, _sum_to(w, mapped.levels), *products[1:])

    @staticmethod
    @isolated
    def jvp(ctx: Any, _mapped: None, b: Tensor | None, *tangents: Tensor | None) -> Tensor:
        u, phi, *tensors = ctx.saved_tensors
        mapped = ctx.mapped
        levels = mapped.at_solution
        product = condition_product(mapped.rule.flat, levels, mapped.transposed)
        change = pushforward(product, [u, phi, *tensors], [None, *_floating(tangents, [phi, *tensors])])
        rhs = None if b is None else _expand(b, [flags[0] for flags in mapped.levels], mapped.sizes)
        if change is not None:
            rhs = -change if rhs is None else rhs - change
        if rhs is None:
            return torch.zeros_like(u)
        same = _Mapped(mapped.rule, levels, mapped.sizes, mapped.transposed)
        return _LinearSolve.apply(same, *_guarded([_nan_after_failure(rhs, u), phi, *tensors]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], mapped: _Mapped, *tensors: Tensor) -> tuple[Tensor, int]:
        more, moved = mapped.mapped(info.batch_size, in_dims[1:], tensors)
        return _LinearSolve.apply(more, *moved), 0


def _nan_after_failure(v: Tensor, answer: Tensor) -> Tensor:
    """v, for a derivative of this answer; NaN where the solve failed and the answer is NaN: where A and the condition's other derivatives
    do not depend on the answer, as of a quadratic, the derivative would be finite. Not where v is zero, for nobody looks at that answer.
    """
    failed = answer.isnan().all(-1, keepdim=True) & (v != 0).any(-1, keepdim=True)
    # a sum: where a constant took the place of v, the next derivative would be zero
    return v + torch.where(failed, torch.nan, torch.zeros_like(v))


def _expand(x: Tensor, has_axis: Sequence[bool], sizes: Sequence[int]) -> Tensor:
    """Give x every batch axis, as a view."""
    own = x.shape[sum(has_axis) :]
    return x.reshape([size if has else 1 for size, has in zip(sizes, has_axis, strict=True)] + list(own)).expand(
        [*sizes, *own]
    )


def _sum_to(x: Tensor, levels: Levels) -> Tensor:
    """The cotangent of a first argument that was expanded by :func:`_expand`."""
    axes = [axis for axis, flags in enumerate(levels) if not flags[0]]
    return x.sum(axes) if axes else x


def _has_derivatives(tensor: Tensor) -> bool:
    """Not of labels and masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def _floating(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tangent if _has_derivatives(tensor) else None for tangent, tensor in zip(tangents, tensors, strict=True)]
