"""The derivatives of a problem as flat lists of tensor operations: recorded once, replayed without autograd.

Autograd builds a graph for each gradient and walks it for each Hessian product. Where the tensors are small, that costs more
than the arithmetic. Here the value, the gradient, the Hessian product and the cross product at a point are recorded together
as one program, which is then cut into what depends on the point alone and is done once there, and the two linear maps
``v -> H v`` and ``u -> C^T u``, done for every vector.

A program holds for the shapes, strides, dtypes and static leaves of data that it was recorded for, and for the Python values
that the user's functions captured. Whether those are still the same is checked at the end of every solve, by one gradient that
autograd takes. The products are compared with those of autograd when they are recorded.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bilevel.curvature import Curvature
from bilevel.derivatives import Flat, Levels, Linearisation, Objective
from bilevel.lowering import direct, put_skinny_factors_in_front
from bilevel.problem import BilevelProblem
from bilevel.simplify import FORMULAS, simplify

Function = Callable[..., Any]
P = TypeVar("P")
R = TypeVar("R")


class _Call(Protocol):
    @property
    def programs(self) -> Any: ...


C = TypeVar("C", bound=_Call)

FEWEST = 64
"""Batches of fewer tasks are not recorded for those tasks that a solver goes on with."""

_logger = logging.getLogger(__name__)
_aten = torch.ops.aten

SMALL = 2**14  # numbers in what is kept to save the time of making it again
STEP = 1e-2  # relative: to points nearby, where a derivative shows in the gradient and rounding does not


@dataclass(frozen=True)
class Linearised:
    """``prepare(phi, *tensors)`` -> (value, grad, saved for the product, saved for the cross product), and the two products."""

    prepare: Function
    product: Function
    cross: Function
    exact: bool


class Stale(Exception):
    """What was recorded is not what the problem does now."""


class Programs:
    """What was recorded for a problem, from one call of the library to the next."""

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = weakref.ref(problem)
        self._programs: dict[Any, Any] = {}
        self.old = False
        """Whether there may be some that an earlier call has recorded."""

    @staticmethod
    def of(problem: BilevelProblem) -> Programs:
        """Those of this problem; they live as long as it does. A copy of the problem has its own."""
        found = problem.__dict__.get("_programs")
        if found is None or found._problem() is not problem:
            found = problem.__dict__["_programs"] = Programs(problem)
        return found

    def __reduce__(self) -> Any:
        """Copied and pickled without the programs; ``of`` then makes new ones."""
        return (_Nothing, ())

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        """Forget everything."""
        self._programs.clear()

    def get(self, key: Any, record: Callable[[], P]) -> P | None:
        """The program, recorded if it is not there yet; None if it cannot be recorded."""
        if key not in self._programs:
            try:
                self._programs[key] = record()
            except Exception as error:
                # whatever it is, the same function without recording works, or says what is wrong
                reason = str(error).strip().splitlines() or [""]
                _logger.warning(
                    "compile=True: could not record the %s (%s: %s); it is computed without.",
                    key[0],
                    type(error).__name__,
                    reason[0],
                )
                self._programs[key] = None
        return self._programs[key]


class _Nothing:
    """In the place of the programs of another problem."""

    @staticmethod
    def _problem() -> None:
        return None


def with_programs(call: C, run: Callable[[C], R]) -> R:
    """``run(call)``; once more, with new programs, where those of an earlier call turn out to be out of date, and without any where
    they cannot be replayed.

    Raises:
        ValueError: the objective is no function of its arguments.
    """
    if call.programs is None:
        return run(call)
    call.programs.old = len(call.programs) > 0
    try:
        return run(call)
    except Stale:
        failure: Exception | None = None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a program, or the user's own: the same call without programs tells
        failure = error
    call.programs.clear()
    call.programs.old = False
    if failure is not None:
        found = run(replace(call, programs=None))  # type: ignore[type-var]
        reason = str(failure).strip().splitlines() or [""]
        _logger.warning(
            "compile=True: what was recorded could not be replayed (%s: %s); the call was made without. Does a shape depend on the "
            "numbers in data?",
            type(failure).__name__,
            reason[0],
        )
        return found
    try:
        return run(call)
    except Stale as error:
        raise ValueError(
            "compile=True: expected an inner objective that is a function of phi, theta and data, but two evaluations at the same "
            "point differ. Is there dropout in it, or another source of chance? bilevel.testing.check_deterministic tells."
        ) from error


class TracedObjective(Objective):
    """An objective that records its derivatives at their first use and replays them from then on."""

    def __init__(
        self, flat: Flat, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...], programs: Programs
    ) -> None:
        super().__init__(flat, levels, tensors, sizes)
        self._programs = programs
        layout = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in self.tensors)
        static = tuple((type(leaf), leaf) for leaf in flat.data_static)  # 1, 1.0 and True are equal
        self._key = (flat.phi, flat.theta, flat.data, static, levels, sizes, layout)
        self._of_phi: dict[str, Function | None] = {}

    def value(self, phi: Tensor) -> Tensor:
        """See the base class."""
        self._gradient_program(phi)
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
        self._gradient_program(phi)
        program = self._whole("gradient alone", lambda objective, phi: objective.value_and_grad(phi)[1], phi)
        if program is None:
            return super().gradient(phi)
        self.num_grads += 1
        return program(phi)

    def verify(self, phi: Tensor) -> None:
        """Raise :class:`Stale` where the recorded gradient is not the one that autograd takes now: near phi and theta and not at them, so
        that a term whose gradient is zero there is seen by its derivatives.
        """
        parts = self._parts("gradient", _value_and_grad, phi.detach())
        if parts is None:
            return
        near, elsewhere, grad = self._gradient_nearby(phi)
        before, rest = parts
        # a program of this very call is the objective's own but for chance; for an old one, a false alarm costs a recording
        least = torch.finfo(phi.dtype).eps ** 0.5 if self._programs.old else 1.0
        if not _same(grad, rest(near, *before(*elsewhere))[1], least):
            raise Stale

    def _gradient_nearby(self, phi: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """A point near phi, tensors with a theta near this one, and the gradient there; phi and theta themselves may lie at the edge of
        what G is defined for.
        """
        n, near = self.flat.num_theta, _near(phi, 0)
        moved = [*(_near(leaf, 1 + i) for i, leaf in enumerate(self.tensors[:n])), *self.tensors[n:]]
        for point, tensors in ((near, moved), (near, list(self.tensors))):
            try:
                grad = self._over(tensors).value_and_grad(point)[1]
            except (RuntimeError, ValueError):  # of a factorisation, or of a distribution
                continue
            if bool(grad.isfinite().all()):
                return point, tensors, grad
        return near, list(self.tensors), self._over(self.tensors).value_and_grad(near)[1]

    def only(self, rows: Tensor) -> Objective | None:
        """See the base class. Each size is recorded for itself, which few tasks do not earn back."""
        return super().only(rows) if len(rows) >= FEWEST else None

    def _of(self, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
        return TracedObjective(self.flat, self.levels, tensors, sizes, self._programs)

    def linearise(self, phi: Tensor, curvature: Curvature, damping: float, *, with_theta: bool = False) -> Any:
        """See the base class."""
        phi = phi.detach()
        self._gradient_program(phi)
        program = self._programs.get(
            ("linearisation", curvature, damping, with_theta, *self._key),
            lambda: self._linearised(phi, curvature, damping, with_theta),
        )
        if program is None:
            return super().linearise(phi, curvature, damping, with_theta=with_theta)
        self.num_grads += 1
        return TracedLinearisation(self, program, phi)

    def _gradient_program(self, phi: Tensor) -> Function | None:
        """The one that `verify` looks at: none of the others is older."""
        return self._whole("gradient", _value_and_grad, phi.detach())

    def _whole(self, name: str, function: Function, phi: Tensor) -> Function | None:
        """``function(objective, phi)`` as a program of phi; what does not depend on phi is computed once."""
        if name not in self._of_phi:
            parts = self._parts(name, function, phi)
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
            before, rest = _without_constants(whole)
            if name != "gradient":  # which is verified in every call
                _check(function(self._over(self.tensors), phi), rest(phi, *before(*self.tensors)))
            return before, rest

        return self._programs.get((name, *self._key), record)

    def _linearised(self, phi: Tensor, curvature: Curvature, damping: float, with_theta: bool) -> Linearised:
        exact: list[bool] = []

        def everything(v: Tensor, u: Tensor, phi: Tensor, *tensors: Tensor) -> list[Any]:
            local = Linearisation(self._over(tensors), phi, curvature, damping, with_theta)
            product = local.matvec(v)
            cross = local.cross(u, keep=True) if with_theta else []
            exact[:] = [local.exact]
            return [local.value, local.grad, product, cross]

        # u and v are not phi, so that the program knows them apart
        found = Linearised(*_cut(recorded(everything, phi.clone(), phi.clone(), phi, *self.tensors)), exact[0])
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

    def __init__(self, objective: TracedObjective, program: Linearised, phi: Tensor) -> None:
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
    """A point near x, with the same strides, in another direction for each number; x itself where entries share their memory."""
    x = x.detach()
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return x
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


def _check(expected: Tensor, found: Tensor) -> None:
    if not _same(expected, found, torch.finfo(expected.dtype).eps ** 0.5):
        raise RuntimeError("what was recorded does not give the same numbers")


def recorded(function: Function, *arguments: Tensor) -> fx.GraphModule:
    """The tensor operations of ``function`` at these arguments, without in-place ones, and without what only autograd needs."""
    module = make_fx(function, decomposition_table=FORMULAS)(*arguments)
    if any(node.op == "call_function" and _is_mutable(node.target) for node in module.graph.nodes):
        functional = torch.func.functionalize(module, remove="mutations")
        module = make_fx(functional, decomposition_table=FORMULAS)(*arguments)
    for node in module.graph.nodes:
        if node.target is _aten.view.default:  # of vectors whose strides may be others next time
            node.target = _aten.reshape.default
    simplify(module.graph)
    if arguments[0].device.type == "cpu":
        put_skinny_factors_in_front(module.graph)
    module.recompile()
    return module


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _cut(whole: fx.GraphModule) -> tuple[Function, Function, Function]:
    """(v, u, phi, *tensors) -> [value, grad, H v, C^T u], cut into what depends on v, what on u, and the rest."""
    nodes = list(whole.graph.nodes)
    v, u = nodes[:2]
    value, grad, product, cross = nodes[-1].args[0]
    of_v, of_u = _depending(nodes, v), _depending(nodes, u)
    saved_v, product_graph = _part(nodes, of_v, v, product)
    saved_u, cross_graph = _part(nodes, of_u, u, cross)
    prepare = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:-1]:
        if node not in of_v | of_u:
            copies[node] = prepare.node_copy(node, copies.__getitem__)
    prepare.output(fx.map_arg((value, grad, tuple(saved_v), tuple(saved_u)), copies.__getitem__))
    graphs = (prepare, product_graph, cross_graph)
    for graph in graphs:
        graph.eliminate_dead_code()
    one, two, three = (fx.GraphModule(whole, direct(graph)).forward for graph in graphs)
    return one, two, three


def _without_constants(whole: fx.GraphModule) -> tuple[Function, Function]:
    """(phi, *tensors) -> outputs, cut into (*tensors) -> constants and (phi, *constants) -> outputs."""
    nodes = list(whole.graph.nodes)
    phi, output = nodes[0], nodes[-1].args[0]
    constants, rest = _part(nodes, _depending(nodes, phi), phi, output)
    before = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[1:-1]:
        if node.op == "placeholder" or all(argument in copies for argument in node.all_input_nodes):
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in constants))
    before.eliminate_dead_code()
    return fx.GraphModule(whole, direct(before)).forward, fx.GraphModule(whole, direct(rest)).forward


def _depending(nodes: list[fx.Node], source: fx.Node) -> set[fx.Node]:
    found = {source}
    for node in nodes[:-1]:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _part(nodes: list[fx.Node], own: set[fx.Node], source: fx.Node, output: Any) -> tuple[list[fx.Node], fx.Graph]:
    """A function of the source and of the nodes that its own nodes need from outside; these nodes."""
    outputs: set[fx.Node] = set()
    fx.map_arg(output, outputs.add)
    saved = [node for node in nodes if node not in own and (node in outputs or any(user in own for user in node.users))]
    graph = fx.Graph()
    copies = {source: graph.placeholder("vector")}
    for node in saved:
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        if node in own and node is not source:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(output, copies.__getitem__))
    return saved, graph
