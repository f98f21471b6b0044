"""Is the problem a function? The same arguments must give the same values, and nothing else may change."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bilevel import BilevelProblem
from bilevel.entry import prepare, refuse_transforms
from bilevel.isolation import isolated
from bilevel.problem import require_functions_of
from bilevel.residual import Condition, RootFlat
from bilevel.testing.modules import Modules, same_entries
from bilevel.trees import Tree, flatten, tree_map

ROUNDS = 3
CUDA_ROUNDING = 1e3  # many CUDA kernels add in any order: differences of so many eps are let pass there


@isolated
def check_deterministic(
    problem: BilevelProblem | Callable[[Tree, Tree, Any], Tree],
    theta: Tree,
    data: Any = None,
    *,
    init: Tree | None = None,
) -> None:
    """Check that G and L are functions of their arguments: the same values each time, bit for bit, and no side effects.

    Evaluates both and their gradients in phi and theta three times, a little beside the start of the inner solve. What this moves is
    put back: random number generators and the buffers of modules. Tensors are handed over as copies. On CUDA, differences of the
    order of rounding are let pass.

    Args:
        problem: the problem; or the function of (phi, theta, data) that is handed to :func:`bilevel.root` or
            :func:`bilevel.fixed_point`, looked at by a fixed combination of its entries.
        theta, data, init: as in :func:`bilevel.solve`, for one task; as in :func:`bilevel.root` for such a function.

    Raises:
        ValueError: values change, random numbers are drawn, a module changes its buffers (running statistics of batch norm), or an
            argument is written to. The message says which function does that and in which module, and what to do.
        TypeError, ValueError: an argument that the library refuses.
    """
    with _random_numbers_put_back(), Modules() as modules:
        own_theta, own_data = _copy((theta, data))
        if isinstance(problem, BilevelProblem) and not isinstance(problem, Condition):
            call = prepare(problem, own_theta, own_data, init)  # the library checks the arguments and gives the start
            functions = {"inner_objective": problem.inner_objective, "outer_loss": problem.outer_loss}
        else:
            condition = _condition(problem)
            call = prepare(condition, own_theta, own_data, init, flat_type=_ConditionFlat)
            call.objective().value_and_grad(call.phi)  # whether it returns a tree like phi
            functions = {_ConditionFlat.source: lambda *arguments: _combined(condition(*arguments))}
        refuse_transforms(call, "check_deterministic")
        arguments = (tree_map(_moved, call.flat.phi.unravel(call.phi)), theta, data)
        rounds: dict[str, list[_Round]] = {name: [] for name in functions}
        for _ in range(ROUNDS):
            for name, function in functions.items():
                rounds[name].append(_evaluate(name, function, arguments, modules))
    findings = [f"- {name} {finding}" for name in functions for finding in _findings(rounds[name])]
    if findings:
        raise ValueError("expected deterministic functions of phi, theta and data, but\n" + "\n".join(findings))
    call.objective().value_and_grad(call.phi)  # what else the library refuses, such as a G that does not depend on phi


@dataclass(frozen=True)
class _Round:
    """One evaluation: values and gradients, the states of the random number generators before and after, and what was seen."""

    values: dict[str, Tensor]
    before: dict[str, Any]
    after: dict[str, Any]
    written: list[str]
    changed: list[str]
    drawing: list[str]


class _ConditionFlat(RootFlat):
    """Either of the two: what is looked at is the function."""

    source: ClassVar[str] = "F or T"


def _condition(function: Any) -> Condition:
    if isinstance(function, Condition):  # as a black box is handed it
        return function
    if isinstance(function, type) or not callable(function):
        raise TypeError(
            "problem: expected a BilevelProblem, or a function of (phi, theta, data) as for root and fixed_point, got "
            f"{function.__name__ if isinstance(function, type) else type(function).__name__}."
        )
    require_functions_of("phi", "theta", "data", problem=function)
    return Condition(function)


def _combined(tree: Tree) -> Tensor:
    """One number that moves when any entry does, also when two change places."""
    return torch.stack([(leaf * _noise(leaf)).sum() for leaf in flatten(tree)[0]]).sum()


def _moved(leaf: Tensor) -> Tensor:
    """A little beside the start, where derivatives are less likely to be zero."""
    return leaf + 1e-3 * _noise(leaf) * torch.where(leaf == 0, 1, leaf.abs())


def _noise(leaf: Tensor) -> Tensor:
    """Always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf)


def _evaluate(
    name: str, function: Callable[..., Tensor], arguments: tuple[Tree, Tree, Any], modules: Modules
) -> _Round:
    copies = _copy(arguments)
    with torch.enable_grad():
        variables = [leaf.requires_grad_() for tree in copies[:2] for leaf in flatten(tree)[0]]
        num_phi = len(flatten(copies[0])[0])
        before = _generators()
        with modules.watched() as watched:
            value = function(*copies)
            if not isinstance(value, Tensor) or value.ndim:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected a 0-d tensor, got {got}. Reduce it, for example with .sum().")
            grads: list[Tensor | None] = [None] * len(variables)
            if value.requires_grad:
                grads = list(torch.autograd.grad(value, variables, allow_unused=True))
        after = _generators()
    # a leaf may be used in one call and not in the next, where the function keeps something of the first
    found = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(variables, grads, strict=True)]
    values = {
        "value": value.detach(),
        "gradient in phi": torch.cat([grad.reshape(-1) for grad in found[:num_phi]]),
        "gradient in theta": torch.cat([grad.reshape(-1) for grad in found[num_phi:]]),
    }
    return _Round(values, before, after, _written(arguments, copies), watched.changed, watched.drawing)


def _findings(rounds: list[_Round]) -> Iterator[str]:
    """What is wrong with one function, as predicates."""
    first = rounds[0]
    changes = [
        f"its {name} by up to {change:.1e}"
        for name in first.values
        if (change := max(_difference(first.values[name], other.values[name]) for other in rounds[1:])) > 0
    ]
    drawn = [name for name in first.before if _is_drawn(rounds, name)]
    drawing = sorted({name for one in rounds for name in one.drawing})
    changed = sorted({name for one in rounds for name in one.changed})
    written = sorted({name for one in rounds for name in one.written})
    if changes:
        yield f"changes from call to call, {', '.join(changes)} (relative)" + (
            "." if drawn or changed or written else STATE
        )
    if drawn:
        layers = f" In training mode: {', '.join(drawing)}: call .eval() on the module." if drawing else ""
        yield f"draws random numbers from {', '.join(drawn)}.{layers}" + ("" if drawing else DRAW)
    if changed:
        yield f"changes buffers of modules: {', '.join(changed)}.{BUFFERS}"
    if written:
        yield f"writes to its arguments in place: {', '.join(written)}. Work on a copy (.clone())."


BUFFERS = " Call .eval() on the module, or build norm layers with track_running_stats=False."
DRAW = " Draw them once, before the call, and pass them in data; for layers such as dropout call .eval() on the module."
STATE = (
    ", though it draws no random numbers that can be seen. Does it keep a state of its own: a counter, an iterator over batches, a "
    "generator? Pass in data what changes."
)


def _is_drawn(rounds: list[_Round], name: str) -> bool:
    """Whether the state moves on; a function that seeds the generator itself ends in the same state each time."""
    ends = [one.after[name] for one in rounds]
    return any(one.before[name] != one.after[name] for one in rounds) and any(end != ends[0] for end in ends)


def _difference(a: Tensor, b: Tensor) -> float:
    """0 for the same bits (NaN like NaN), else the largest difference relative to the largest entry."""
    same = same_entries(a, b)
    if bool(same.all()):
        return 0.0
    size = max(float(a.abs().max()), float(b.abs().max()))
    change = float(torch.where(same, 0, a - b).abs().max()) / size
    change = change if change == change and size < float("inf") else float("inf")
    return 0.0 if a.is_cuda and change <= CUDA_ROUNDING * torch.finfo(a.dtype).eps else change


def _copy(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def _written(originals: tuple[Tree, Tree, Any], copies: tuple[Tree, Tree, Any]) -> list[str]:
    names = []
    for name, original, copy in zip(("phi", "theta", "data"), originals, copies, strict=True):
        leaves, structure = flatten(original)
        for path, old, new in zip(structure.paths(), leaves, flatten(copy)[0], strict=True):
            if isinstance(old, Tensor) and not bool(same_entries(old, new).all()):
                names.append(name + path)
    return names


# ----------------------------------------------------------------------------------------------------------------------
# The global random number generators.


def _generators() -> dict[str, Any]:
    """The states, as values that can be compared."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch (CPU)": torch.get_rng_state().numpy().tobytes(),
        "numpy.random": (kind, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch (CUDA)"] = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    return states


@contextmanager
def _random_numbers_put_back() -> Iterator[None]:
    on_cpu, numbers, plain = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        np.random.set_state(numbers)
        random.setstate(plain)
        if on_cuda is not None:
            torch.cuda.set_rng_state_all(on_cuda)
