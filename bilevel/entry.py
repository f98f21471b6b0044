"""The border: the user's trees are checked here once, and made flat. Inside the library there is one format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.derivatives import (
    TENSOR,
    Flat,
    Levels,
    Objective,
    is_transformed,
    over_levels,
    refuse_writes,
    transforms_active,
    versions,
)
from bilevel.isolation import without_checkpoints
from bilevel.linsys.base import LinearSolver, norm, some_direction
from bilevel.problem import BilevelProblem
from bilevel.quadratic import QuadraticObjective
from bilevel.recorded import Programs, Session, TracedObjective
from bilevel.residual import Residual, RootFlat
from bilevel.result import Result
from bilevel.trees import Layout, Structure, Tree, flatten, how_to_tree, layout_of, unflatten

_STATIC = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """One call of the library, flat.

    Attributes:
        flat: the functions of one task.
        tensors: the leaves of theta, then the tensor leaves of data.
        levels: one entry for the task axis if there is one: which tensors have it.
        sizes: the batch shape, ``()`` or ``(tasks,)``.
        phi: the start of the inner solve, or the point that was handed in, ``(*sizes, d)``.
        u: the start of the linear solve, ``(*sizes, d)``; None: zero.
        programs: the derivatives of the problem, as recorded; None: taken by autograd each time.
    """

    flat: Flat
    tensors: list[Tensor]
    levels: Levels
    sizes: tuple[int, ...]
    phi: Tensor
    u: Tensor | None = None
    programs: Programs | Session | None = None

    def chunks(self, chunk_size: int | None) -> list[Call]:
        """The call cut along the task axis into pieces of at most ``chunk_size`` tasks."""
        if chunk_size is None or not self.sizes or self.sizes[0] <= chunk_size:
            return [self]
        (flags,) = self.levels
        pieces = []
        for start in range(0, self.sizes[0], chunk_size):
            cut = slice(start, start + chunk_size)
            tensors = [tensor[cut] if flag else tensor for tensor, flag in zip(self.tensors, flags, strict=True)]
            phi, u = self.phi[cut], None if self.u is None else self.u[cut]
            pieces.append(Call(self.flat, tensors, self.levels, (len(phi),), phi, u, self.programs))
        return pieces

    def not_finite(self) -> list[str]:
        """Which leaves of theta and data hold numbers that are none, and how many of them."""
        names = [f"theta{path}" for path in self.flat.theta.paths()]
        names += [
            f"data{path}"
            for path, leaf in zip(self.flat.data.paths(), self.flat.data_static, strict=True)
            if leaf is TENSOR
        ]
        stored = (x.coalesce().values() if x.layout is torch.sparse_coo else x.to_dense() for x in self.tensors)
        counts = ((name, int((~x.isfinite()).sum()), x.numel()) for name, x in zip(names, stored, strict=True))
        return [f"{name} holds NaN or infinity ({bad} of {of} numbers)" for name, bad, of in counts if bad]

    def objective(self, *, trusting: bool = True) -> Objective:
        """G over the tasks of this call. ``trusting``: with what was recorded, and what the problem says of itself, in its place."""
        if not trusting and not isinstance(self.flat, RootFlat):
            return Objective(self.flat, self.levels, self.tensors, self.sizes)
        if self.programs is None:
            return objective_of(self.flat, self.levels, self.tensors, self.sizes)
        traced = TracedObjective(self.flat, self.levels, self.tensors, self.sizes, self.programs)
        return QuadraticObjective(traced) if self.flat.problem.quadratic else traced

    def outer_gradient(self, phi: Tensor, chunk_size: int | None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """L and its gradients at phi, for at most ``chunk_size`` tasks at once: :meth:`Objective.outer_gradient`."""
        parts = [piece.objective().outer_gradient(piece.phi) for piece in replace(self, phi=phi).chunks(chunk_size)]
        if len(parts) == 1:
            return parts[0]
        values, grads, directs = zip(*parts, strict=True)
        direct = [None if leaf[0] is None else torch.cat(leaf) for leaf in zip(*directs, strict=True)]
        return torch.cat(values), torch.cat(grads), direct


def objective_of(flat: Flat, levels: Levels, tensors: Sequence[Tensor], sizes: tuple[int, ...]) -> Objective:
    """Numbers at base level over a batch: of G, or of equations."""
    if isinstance(flat, RootFlat):
        return Residual(flat, levels, tensors, sizes)
    objective = Objective(flat, levels, tensors, sizes)
    return QuadraticObjective(objective) if flat.problem.quadratic else objective


def prepare(
    problem: BilevelProblem,
    theta: Tree,
    data: Any,
    phi: Tree | None,
    *,
    batched: bool = False,
    theta_batched: bool = False,
    phi_name: str = "init",
    flat_type: type[Flat] = Flat,
    compile: bool = False,
) -> Call:
    """Check the arguments of a call and make them flat. ``phi`` None: the problem's own start. ``flat_type``: the kind of condition.
    ``compile``: record the derivatives.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    _check_circumstances(problem, batched, theta_batched)
    theta_leaves, theta_structure = _usable(*flatten(theta))
    _check_variable("theta", theta_leaves, theta_structure.paths())
    data_leaves, data_structure = _usable(*flatten(data))
    data_tensors = _check_data(data_leaves, data_structure.paths(), theta_leaves[0].device)
    tensors = [*theta_leaves, *data_tensors]
    flags = (theta_batched,) * len(theta_leaves) + (True,) * len(data_tensors)
    levels: Levels = ()
    sizes: tuple[int, ...] = ()
    if batched:
        paths = [f"theta{path}" for path in theta_structure.paths()]
        paths += [f"data{p}" for p, x in zip(data_structure.paths(), data_leaves, strict=True) if isinstance(x, Tensor)]
        levels = (flags,)
        sizes = (_task_count([(path, x) for path, x, flag in zip(paths, tensors, flags, strict=True) if flag]),)
    static = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in data_leaves)
    flat = flat_type(problem, Layout(theta_structure, ()), theta_structure, data_structure, static)
    if phi is None:
        layout, phi_leaves = _initial(flat, tensors, levels)
        phi_name = "initial_phi"
    else:
        layout, phi_leaves = _given(phi, sizes, phi_name)
    _check_variable(phi_name, phi_leaves, layout.structure.paths(), like=theta_leaves[0])
    if sum(layout.sizes) == 0:
        raise ValueError(
            f"{phi_name}: expected at least one number, got tensors without entries: there is nothing to solve for."
        )
    start = layout.ravel(phi_leaves).detach().contiguous()  # what all tasks share is a view, which forward mode refuses
    start = start.clone() if phi is not None and len(phi_leaves) == 1 else start  # the caller's own stays as it is
    programs = Programs.of(problem) if compile else None
    return Call(replace(flat, phi=layout), tensors, levels, sizes, start, programs=programs)


def _usable(leaves: list[Any], structure: Structure) -> tuple[list[Any], Structure]:
    """Autograd refuses what was made in inference mode, such as the features of a frozen network; copies it takes."""
    return [x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in leaves], structure


def _check_circumstances(problem: BilevelProblem, batched: bool, theta_batched: bool) -> None:
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"problem: expected a BilevelProblem, got {type(problem).__name__}. "
            f"BilevelProblem.from_functions makes one from two functions."
        )
    if theta_batched and not batched:
        raise ValueError("theta_batched=True needs batched=True: it says that theta has the task axis of the batch.")


def refuse_unused(call: Call, unused: Sequence[int], where: str) -> None:
    """A leaf of theta that enters nothing is a mistake, or wants to be told so. ``unused``: the numbers of such leaves."""
    if unused:
        paths = call.flat.theta.paths()
        raise ValueError(
            f"{', '.join(f'theta{paths[i]}' for i in unused)}: expected every leaf of theta to enter {where} or the outer loss, but the "
            "graph shows no use. Does it enter as a constant in phi, as the last bias of an energy does? Its gradient is zero then: pass "
            "allow_unused=True, or remove it from theta."
        )


def refuse_transforms(call: Call, name: str) -> None:
    """The functions that return numbers cannot be differentiated or mapped from outside."""
    if transforms_active() or any(is_transformed(tensor) for tensor in [*call.tensors, call.phi]):
        raise TypeError(
            f"{name} returns plain numbers and cannot run under a torch.func transform. Use bilevel.argmin "
            f"there, or batched=True instead of vmap."
        )


def refuse_lost_gradients(call: Call, name: str) -> None:
    """What differentiates in theta alone must not be handed data that were computed from it: nobody would see that a part is missing.

    A leaf that requires grad is another matter; what is asked for here does not depend on it.
    """
    n = call.flat.num_theta
    paths = [path for path, x in zip(call.flat.data.paths(), call.flat.data_static, strict=True) if x is TENSOR]
    own = {id(leaf) for leaf in call.tensors[:n] if leaf.requires_grad}
    for path, tensor in zip(paths, call.tensors[n:], strict=True):
        if tensor.grad_fn is not None or id(tensor) in own:
            raise ValueError(
                f"data{path}: expected a constant, got {'a leaf of theta' if id(tensor) in own else 'a tensor with a graph'}. {name} "
                "differentiates in theta alone, so what reaches theta, or other tensors, through data would be missing. Compute it "
                "within the functions of the problem, from theta; use bilevel.argmin, which differentiates in data too; or hand "
                "over .detach()."
            )


CHANGED = {torch.float32: 1e-4, torch.float64: 1e-6}
"""So much may a condition differ from what it was; 1 is what moving phi by its own size would do.

Less would take rounding, and the power iterations of spectral norm, for another problem.
"""


def has_changed(objective: Objective, phi: Tensor, now: Tensor, excess: Tensor) -> Tensor:
    """Whether a condition at phi, ``now`` ``(*batch, d)``, that differs by ``excess`` ``(*batch,)`` from what it was is that of another
    problem. A change that leaves it at phi as it was is not seen.
    """
    if not bool((excess > 0).any()):  # the usual case: the same numbers
        return torch.zeros_like(excess, dtype=torch.bool)
    size = torch.where(phi == 0, phi.abs().amax(-1, keepdim=True), phi.abs())
    near = phi + 0.1 * some_direction(phi) * torch.where(size > 0, size, 1)
    unit = 10 * norm(objective.value_and_grad(near)[1] - now)
    return excess > CHANGED[phi.dtype] * unit


def _given(phi: Tree, sizes: tuple[int, ...], name: str) -> tuple[Layout, list[Tensor]]:
    leaves, structure = _usable(*flatten(phi))
    for path, leaf in zip(structure.paths(), leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.shape[: len(sizes)] != sizes:
            raise ValueError(
                f"{name}{path}: expected a leading task axis of {sizes[0]}, got shape {tuple(leaf.shape)}."
            )
    _check_variable(name, leaves, structure.paths())
    return Layout(structure, tuple(leaf.shape[len(sizes) :] for leaf in leaves)), leaves


def initial(flat: Flat, tensors: Sequence[Tensor], levels: Levels) -> Tensor:
    """``initial_phi`` of every task as vectors ``(*batch, d)``, with its dependence on the tensors."""
    layout, leaves = _initial(flat, tensors, levels)
    return layout.ravel(leaves)


def _initial(flat: Flat, tensors: Sequence[Tensor], levels: Levels) -> tuple[Layout, list[Tensor]]:
    """``initial_phi`` of every task."""
    structure: list[Any] = []

    def start(*own: Tensor) -> list[Tensor]:
        leaves, spec = flatten(flat.problem.initial_phi(*flat.trees(own)))
        _check_variable("initial_phi", leaves, spec.paths())
        structure[:] = [spec]
        return [leaf.clone() for leaf in leaves]

    batch_ndim, before = len(levels), versions(tensors)
    leaves = over_levels(start, levels)(*tensors)
    refuse_writes(before, tensors, "initial_phi")
    return layout_of(unflatten(structure[0], leaves), batch_ndim)


def _check_variable(name: str, leaves: Sequence[Any], paths: Sequence[str], like: Tensor | None = None) -> None:
    if not leaves:
        raise ValueError(f"{name}: expected at least one tensor, got an empty tree.")
    first = like
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}{path}: expected a tensor, got {type(leaf).__name__}. A tree is a tensor or nested "
                f"dicts, lists and tuples of tensors{how_to_tree(leaf)}."
            )
        if leaf.dtype not in (torch.float32, torch.float64):
            remedy = "; convert it with .float()" if leaf.is_floating_point() else ""
            if name == "theta" and not leaf.is_floating_point() and "num_batches_tracked" in path:
                remedy = "; buffers are no part of theta: dict(module.named_parameters())"
            raise TypeError(f"{name}{path}: expected float32 or float64, got {leaf.dtype}{remedy}.")
        first = leaf if first is None else first
        if leaf.dtype != first.dtype:
            raise TypeError(
                f"{name}{path}: expected one dtype for theta and phi, got {leaf.dtype} beside {first.dtype}"
                f"{'' if like is None else ' of theta'}. Convert one of them with .to(dtype)."
            )
        if leaf.device != first.device:
            raise ValueError(
                f"{name}{path}: expected one device, got {leaf.device} beside {first.device}. Move "
                f"everything with .to(device)."
            )


def _as_data(thing: Any) -> str:
    """How an object with tensors becomes data."""
    if isinstance(thing, Mapping):
        return "of a mapping hand over dict(...); "
    return (
        "of an object with fields hand over vars(...); "
        if is_dataclass(thing) or type(thing) is SimpleNamespace
        else ""
    )


def _check_data(leaves: Sequence[Any], paths: Sequence[str], device: torch.device) -> list[Tensor]:
    tensors = []
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, Tensor):
            if leaf.device != device:
                raise ValueError(
                    f"data{path}: expected one device, got {leaf.device} beside theta on {device}. Move "
                    f"everything with .to(device)."
                )
            tensors.append(leaf)
        elif not isinstance(leaf, _STATIC):
            raise TypeError(
                f"data{path}: expected tensors, None, numbers or strings, got {type(leaf).__name__}. "
                f"Convert arrays with torch.as_tensor; {_as_data(leaf)}keep other objects in the problem itself."
            )
    return tensors


def _task_count(named: list[tuple[str, Tensor]]) -> int:
    if not named:
        raise ValueError(
            "batched=True: expected at least one tensor with a leading task axis in data (or theta_batched=True), got none."
        )
    count = None
    for name, tensor in named:
        if tensor.ndim == 0:
            raise ValueError(
                f"{name}: expected a leading task axis (batched=True), got a 0-d tensor. Expand it, or make "
                f"it a Python number."
            )
        count = len(tensor) if count is None else count
        if len(tensor) != count:
            raise ValueError(
                f"{name}: expected {count} tasks along the first axis like {named[0][0]}, got {len(tensor)}."
                + (
                    " A list of tasks? Stack their tensors: one tree, in which each has the task axis."
                    if name.startswith("data[") and name[5].isdigit()
                    else ""
                )
            )
    if not count:
        raise ValueError(f"{named[0][0]}: expected at least one task, got an empty task axis.")
    return count


class Solver(Protocol):
    """An inner solver: those of :mod:`bilevel.solvers`, or any object with this method."""

    def run(self, objective: Any, phi: Tensor) -> Any:
        """From the start phi ``(*batch, d)`` to a run, which has the point and tells how it came there."""


@without_checkpoints()
def run_solver(objective: Objective, phi: Tensor, solver: Solver) -> Result:
    """The result of an inner solver, its value a vector ``(*batch, d)``."""
    run = solver.run(objective, phi.detach())
    return run.result(*objective.measure(run.phi), run.phi, objective.num_grads, objective.num_matvecs)


def check_solver(solver: Any) -> None:
    """Refuse what is no inner solver."""
    if isinstance(solver, type) or not hasattr(solver, "run"):
        hint = f" Did you mean {solver.__name__}(...)?" if isinstance(solver, type) else ""
        raise TypeError(
            f"solver: expected an inner solver such as GradientDescent(step_size=0.1, max_steps=100), got "
            f"{solver!r}.{hint}"
        )


def check_linsys(linsys: Any) -> None:
    """Refuse what is no linear solver."""
    if not isinstance(linsys, LinearSolver):
        hint = f" Did you mean {linsys.__name__}(...)?" if isinstance(linsys, type) else ""
        raise TypeError(f"linsys: expected a linear solver such as CG(max_steps=20), got {linsys!r}.{hint}")
