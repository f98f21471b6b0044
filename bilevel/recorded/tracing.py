"""An objective whose derivatives are recorded programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel.curvature import Curvature
from bilevel.derivatives import Flat, Levels, Linearisation, Objective
from bilevel.linsys.base import all_finite
from bilevel.recorded.programs import Programs, Session, Stale
from bilevel.recorded.recording import Function, recorded, split_constants, split_linearisation

FEWEST = 64
"""Tasks that a solver goes on with, when others are done, are recorded for their own number only if there are so
many. A recording costs up to a millisecond for each operator (benchmarks/NOTES.md, work C), which few tasks do
not earn back."""

STEP = 1e-2
"""Relative, to points nearby: so far that a derivative which changed shows in the gradient there by more than the
tolerance of the comparison, sqrt(eps), in float32 too; and so near that G is mostly still defined."""

ROUNDINGS = 64
"""So many eps of the largest entry of a task's gradient may be rounding. A change that shows by less is hidden in the rounding of the
solve itself."""

SMALL = 2**14
"""Directions of at most so many numbers are kept, to save the time of making them again; for larger ones that time
matters less, and the 64 that are kept are 8 MiB at most."""


@dataclass(frozen=True)
class LinearisationProgram:
    """``prepare(phi, *tensors)`` -> (value, grad, saved for the product, saved for the cross product), and the two products."""

    prepare: Function
    product: Function
    cross: Function
    exact: bool


class TracedObjective(Objective):
    """An objective that records its derivatives at their first use and replays them from then on."""

    def __init__(
        self,
        flat: Flat,
        levels: Levels,
        tensors: Sequence[Tensor],
        sizes: tuple[int, ...],
        programs: Programs | Session,
    ) -> None:
        super().__init__(flat, levels, tensors, sizes)
        self._programs = programs
        layout = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in self.tensors)
        static = tuple((type(leaf), leaf) for leaf in flat.data_static)  # 1, 1.0 and True are equal
        self._key = (flat.phi, flat.theta, flat.data, static, levels, sizes, layout)
        self._of_phi: dict[
            str, Function | None
        ] = {}  # to find one among the programs of the problem takes as long as to replay it
        self._linearisations: dict[Any, LinearisationProgram | None] = {}
        self._verified: tuple[Function, Function] | None = None  # the parts of the gradient that is replayed here

    def value(self, phi: Tensor) -> Tensor:
        """See the base class."""
        if self._gradient_program(phi) is None:
            return super().value(phi)
        program = self._whole("value", lambda objective, phi: objective.value(phi), phi)
        return super().value(phi) if program is None else program(phi)

    def value_and_grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        phi = phi.detach()
        program = self._gradient_program(phi)
        if program is None:
            return super().value_and_grad(phi)
        self.num_grads += 1
        value, grad = program(phi)
        return value, grad

    def gradient(self, phi: Tensor) -> Tensor:
        """See the base class. What only G needs is not computed."""
        phi = phi.detach()
        if self._gradient_program(phi) is None:
            return super().gradient(phi)
        program = self._whole("gradient alone", lambda objective, phi: objective.value_and_grad(phi)[1], phi)
        if program is None:
            return super().gradient(phi)
        self.num_grads += 1
        return program(phi)

    def verify(self, phi: Tensor) -> None:
        """Raise :class:`Stale` where the recorded gradient is not the one that autograd takes now: near phi and theta and not at them, so
        that a term whose gradient is zero there is seen by its derivatives.
        """
        if self._gradient_program(phi) is None:  # nothing was replayed
            return
        phi = phi.detach()
        n, near, here = self.flat.num_theta, _near(phi, 0), list(self.tensors)
        moved = [_near(leaf, 1 + i) for i, leaf in enumerate(here[:n])]
        seen = self._compare(near, [*moved, *here[n:]])
        if bool(seen.all()):
            return
        # where G is not defined there, next to the edge of its domain: one leaf of theta after the other, and phi alone
        seen = seen | ~self._compare(phi, here, at_solution=True)
        if bool(seen.all()):
            return
        alone = [self._compare(near, [*here[:i], moved[i], *here[i + 1 :]]) for i in range(n)]
        if not bool((seen | torch.stack(alone).all(0)).all()):
            self._compare(near, here)

    def _compare(self, phi: Tensor, tensors: list[Tensor], *, at_solution: bool = False) -> Tensor:
        """For which tasks ``(*batch,)`` G has a gradient there. Raises :class:`Stale` where the recorded one is another, and what G
        raises at the solution itself.
        """
        nowhere = torch.zeros(phi.shape[:-1], dtype=torch.bool, device=phi.device)
        try:
            grad = self._over(tensors).value_and_grad(phi)[1]
        except (RuntimeError, ValueError):  # of a factorisation, or of a distribution
            if at_solution:
                raise
            return nowhere
        assert self._verified is not None
        before, rest = self._verified
        found = rest(phi, *before(*tensors))[1]
        # a program of this very call is the objective's own but for chance; for an old one, a false alarm costs a recording
        old = isinstance(self._programs, Session) and self._programs.old
        if not (_same_but_for_rounding(grad, found) if old else _same(grad, found, 1.0)):
            again = self._over(tensors).value_and_grad(phi)[1]
            raise Stale(by_chance=not _same_but_for_rounding(grad, again))
        return all_finite(grad)

    def only(self, rows: Tensor) -> Objective | None:
        """See the base class. Each size is recorded for itself, which few tasks do not earn back."""
        return super().only(rows) if len(rows) >= FEWEST else None

    def _like(self, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        """See the base class. One task after the other is for solvers that know nothing of programs."""
        if not sizes:
            return Objective(self.flat, levels, tensors, sizes)
        return TracedObjective(self.flat, levels, tensors, sizes, self._programs)

    def linearise(self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False) -> Any:
        """See the base class."""
        phi = phi.detach()
        if self._gradient_program(phi) is None:
            return super().linearise(phi, curvature, damping, with_theta=with_theta)
        kind = (curvature, damping, with_theta)
        program = self._linearisations.get(kind) or self._programs.get(
            ("linearisation", *kind, *self._key),
            lambda: self._linearisation_program(phi, curvature, damping, with_theta),
        )
        if program is None:
            return super().linearise(phi, curvature, damping, with_theta=with_theta)
        self._linearisations[kind] = program
        self.num_grads += 1
        return TracedLinearisation(self, program, phi)

    def _gradient_program(self, phi: Tensor) -> Function | None:
        """The one that `verify` looks at: none of the others is older."""
        return self._whole("gradient", _value_and_grad, phi.detach())

    def _whole(self, name: str, function: Function, phi: Tensor) -> Function | None:
        """``function(objective, phi)`` as a program of phi; what does not depend on phi is computed once."""
        if name not in self._of_phi:
            parts = self._parts(name, function, phi)
            self._verified = parts if name == "gradient" else self._verified
            if parts is None:
                self._of_phi[name] = None
            else:
                constants, rest = parts[0](*self.tensors), parts[1]
                self._of_phi[name] = lambda phi: rest(phi, *constants)
        return self._of_phi[name]

    def _parts(self, name: str, function: Function, phi: Tensor) -> tuple[Function, Function] | None:
        """The program in two parts: ``(*tensors) -> constants`` and ``(phi, *constants) -> function(objective, phi)``."""

        def record() -> tuple[Function, Function]:
            whole = recorded(lambda phi, *tensors: function(self._over(tensors), phi), phi, *self.tensors)
            before, rest = split_constants(whole)
            if name != "gradient":  # which is verified in every call
                _check(function(self._over(self.tensors), phi), rest(phi, *before(*self.tensors)))
            return before, rest

        return self._programs.get((name, *self._key), record)

    def _linearisation_program(
        self, phi: Tensor, curvature: Curvature, damping: float, with_theta: bool
    ) -> LinearisationProgram:
        exact: list[bool] = []

        def everything(v: Tensor, u: Tensor, phi: Tensor, *tensors: Tensor) -> list[Any]:
            local = Linearisation(self._over(tensors), phi, curvature, damping, with_theta)
            product = local.matvec(v)
            cross = local.cross(u, keep=True) if with_theta else []
            exact[:] = [local.exact]
            return [local.value, local.grad, product, cross]

        # u and v are not phi, so that the program knows them apart
        found = LinearisationProgram(
            *split_linearisation(recorded(everything, phi.clone(), phi.clone(), phi, *self.tensors)), exact[0]
        )
        if exact[0]:
            v = (_near(phi, 0) - phi) / STEP
            local = Linearisation(self._over(self.tensors), phi, curvature, damping, with_theta)
            _, _, for_product, for_cross = found.prepare(phi, *self.tensors)
            _check(local.matvec(v), found.product(v, *for_product))
            if with_theta:
                for expected, leaf in zip(local.cross(v), found.cross(v, *for_cross), strict=True):
                    if expected is not None and leaf is not None:
                        _check(expected, leaf)
        return found

    def _over(self, tensors: Sequence[Tensor]) -> Objective:
        """The same objective of other tensors, not recorded."""
        return Objective(self.flat, self.levels, tensors, self.sizes)


class TracedLinearisation:
    """As :class:`~bilevel.derivatives.Linearisation`."""

    def __init__(self, objective: TracedObjective, program: LinearisationProgram, phi: Tensor) -> None:
        self._objective, self._program, self._phi = objective, program, phi
        self.value, self.grad, self._for_product, self._for_cross = program.prepare(phi, *objective.tensors)

    @property
    def exact(self) -> bool:
        """Whether all products so far were exact but for rounding."""
        return self._program.exact

    def matvec(self, v: Tensor) -> Tensor:
        """(curvature + damping I) v for v ``(*batch, d)`` or ``(k, *batch, d)``."""
        self._objective.num_matvecs += 1
        if v.ndim == self._phi.ndim:
            return self._program.product(v, *self._for_product)
        rows = torch.func.vmap(lambda row: self._program.product(row, *self._for_product))
        return rows(v.reshape(-1, *self._phi.shape)).reshape(v.shape)

    def transposed_matvec(self, v: Tensor) -> Tensor:
        """The same: the curvature is symmetric."""
        return self.matvec(v)

    def cross(self, u: Tensor, *, keep: bool = False) -> list[Tensor | None]:
        """(d2G/dphi dtheta)^T u: leaves ``(*batch, *shape)``, None where dG/dphi does not depend on the leaf."""
        return list(self._program.cross(u, *self._for_cross))


def _value_and_grad(objective: Objective, phi: Tensor) -> tuple[Tensor, Tensor]:
    return objective.value_and_grad(phi)


def _near(x: Tensor, number: int) -> Tensor:
    """A point near x, with the same strides, in another direction for each number."""
    x = x.detach()
    if shared := [axis for axis in range(x.ndim) if x.shape[axis] > 1 and x.stride(axis) == 0]:  # as after expand
        own = tuple(slice(0, 1) if axis in shared else slice(None) for axis in range(x.ndim))
        return _near(x[own], number).expand(x.shape)
    found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    wave = _kept_wave if x.numel() <= SMALL else _wave
    return torch.addcmul(x, wave(x.shape, number, x.dtype, x.device), 1 + x.abs(), value=STEP, out=found)


def _wave(shape: torch.Size, number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.arange(shape.numel(), device=device).to(dtype) + number).cos().reshape(shape)


_kept_wave = lru_cache(maxsize=64)(_wave)


def _same(expected: Tensor, found: Tensor, least: float) -> bool:
    """Whether they are equal but for rounding where the expected one is finite; ``least``: what counts as zero is below its share of it."""
    if expected.numel() == 0:
        return True
    scale = least + expected.abs().nan_to_num(0, 0, 0).amax()
    same = (expected - found).abs() <= torch.finfo(expected.dtype).eps ** 0.5 * scale
    return bool((same | ~expected.isfinite()).all())


def _same_but_for_rounding(expected: Tensor, found: Tensor) -> bool:
    """The same entry by entry: a variable in small units, or a task beside others, must not hide behind the largest entry of all. What
    rounding leaves is as large as some eps of the task's own largest entry.
    """
    eps, size = torch.finfo(expected.dtype).eps, expected.abs().nan_to_num(0, 0, 0)
    if expected.numel() == 0:
        return True
    allowed = eps**0.5 * (eps**0.5 + size) + ROUNDINGS * eps * size.amax(-1, keepdim=True)
    return bool((((expected - found).abs() <= allowed) | ~expected.isfinite()).all())


def _check(expected: Tensor, found: Tensor) -> None:
    if not _same(expected, found, torch.finfo(expected.dtype).eps ** 0.5):
        raise RuntimeError("what was recorded does not give the same numbers")
