"""The step: when it is captured, replayed or called as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.captured.cuda_graphs import CudaGraphs, Graphs
from bilevel.captured.mutated import Mutable, Mutated
from bilevel.checks import check_count
from bilevel.isolation import DEVICES
from bilevel.trees import Structure, Tree, flatten, tree_map, unflatten

_logger = logging.getLogger("bilevel.captured")


class CapturedStep:
    """A function of trees of tensors, replayed as a CUDA graph: one launch in the place of thousands.

    A meta-step is thousands of small kernels, and on a fast device the time goes into launching them. A graph holds all of them, with
    the addresses of their memory. So what is captured must be the same work every time: no number is read back (solvers with
    tolerances of 0), shapes do not change, and what is kept from step to step is written in place::

        outer = torch.optim.Adam(theta.values(), capturable=True)

        def meta_step(tasks):
            found = bilevel.hypergradient(problem, theta, tasks, solver=solver, linsys=linsys, batched=True)
            found.assign_grad(theta, check=False)
            outer.step()
            return {"loss": found.outer, "ok": found.ok_per_task}

        step = bilevel.CapturedStep(meta_step, mutates=[outer])
        for tasks in stream:
            result = step(tasks)

    For each new signature (structure, shapes and dtypes of the inputs) the first ``warmup`` calls run as they are, on the stream of
    the capture. The call after these is captured; from then on the inputs are copied into place and the graph is replayed. Every call
    is one step, warm-up calls too: nothing is done twice. The Python code of ``fn`` does not run in a replay: counters, prints and
    schedules belong outside, and a learning rate that changes must be a tensor.

    Where nothing can be captured (no CUDA device, ``fn`` reads a number back, an optimizer without ``capturable=True``), every call
    runs as it is, and one line of the log says why.

    Args:
        fn: a function of trees of tensors on one device, which returns a tree. Other leaves (None, numbers, strings) are a part of
            the signature. The tensors that it returns are detached.
        mutates: tensors, modules and optimizers that ``fn`` writes to. All of them must be named. A call that could not be captured
            and is made again begins where it began the first time. Where one of their tensors is not the one that was captured any
            more (after ``load_state_dict`` of an optimizer), the step is captured anew.
        warmup: calls before the capture, >= 1. The last one is watched: if the host waits in it, nothing is captured.
        max_captures: signatures that are captured, each with memory of its own; calls with others run as they are.
        static_outputs: return the memory of the graph itself, which the next call overwrites, and no copies.

    Raises:
        torch.OutOfMemoryError: as ``fn`` does; what it mutates is then as it was before the call, if that was to be captured.
        TypeError: an argument of a call has a leaf of another kind.
    """

    _graphs: ClassVar[Graphs] = CudaGraphs()
    """What captures. A subclass in the tests has another one, of the CPU."""

    def __init__(
        self,
        fn: Callable[..., Tree],
        *,
        mutates: Iterable[Mutable] = (),
        warmup: int = 3,
        max_captures: int = 4,
        static_outputs: bool = False,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a function of trees of tensors, got {type(fn).__name__}.")
        check_count("warmup", warmup)
        check_count("max_captures", max_captures)
        self._fn, self._mutated = fn, Mutated(mutates)
        self._warmup, self._max_captures, self._static_outputs = warmup, max_captures, static_outputs
        self._logged: set[str] = set()
        self.reset()

    @property
    def num_captures(self) -> int:
        """How many graphs there are."""
        return len(self._captures)

    @property
    def why_not(self) -> str | None:
        """Why every call runs as it is; None as long as nothing speaks against a capture."""
        return self._why_not

    def reset(self) -> None:
        """Forget the captures, which frees their memory, and begin again with the warm-up."""
        self._calls: dict[Any, int] = {}
        self._captures: dict[Any, _Capture] = {}
        self._why_not: str | None = None

    def __call__(self, *inputs: Tree) -> Tree:
        """``fn(*inputs)``."""
        leaves, structure = flatten(inputs)
        written = set(self._mutated.addresses())
        key = _signature(leaves, structure, written)
        if self._is_current(key):
            return self._captures[key].replayed(leaves, copied=not self._static_outputs)
        if self._why_not is None:
            self._consider(leaves)
        if self._why_not is not None or self._is_one_too_many(key):
            return self._as_it_is(inputs)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] < self._warmup:
            return _copied(self._graphs.aside(lambda: _detached(self._fn(*inputs))))
        if self._calls[key] == self._warmup:
            return self._or_as_it_is(
                lambda: _copied(self._graphs.watched(lambda: _detached(self._fn(*inputs)))), inputs
            )
        return self._or_as_it_is(lambda: self._captured(key, leaves, structure), inputs)

    def _is_current(self, key: Any) -> bool:
        """Whether there is a graph, and it still does what ``fn`` would do."""
        capture = self._captures.get(key)
        if capture is None:
            return False
        now = self._mutated.numbers()
        for name, value in capture.numbers.items():
            if now.get(name) != value:
                self._give_up(
                    f"{name[-1]} of {name[0]} was {value!r} at the capture and is {now.get(name)!r}, which a graph does not see; make it a "
                    "tensor"
                )
                return False
        if capture.addresses != self._mutated.addresses():
            del self._captures[key]
            return False
        return True

    def _consider(self, leaves: list[Any]) -> None:
        devices = {leaf.device for leaf in (*leaves, *self._mutated.tensors()) if isinstance(leaf, Tensor)}
        if len(devices) == 1:
            reason = self._graphs.reason_against(devices.pop())
        elif (kept := self._mutated.kept_elsewhere()) is not None:
            reason = f"{kept}; make the optimizer with capturable=True"
        else:
            reason = f"expected all tensors on one device, got {', '.join(sorted(map(str, devices))) or 'no tensor'}"
        if reason is not None:
            self._give_up(reason)

    def _is_one_too_many(self, key: Any) -> bool:
        if key in self._calls or len(self._calls) < self._max_captures:
            return False
        self._log_once(
            f"there are {self._max_captures} captures already (max_captures), and calls with other inputs run as they are."
        )
        return True

    def _or_as_it_is(self, attempt: Callable[[], Tree], inputs: tuple[Tree, ...]) -> Tree:
        """The attempt; where it fails, the call as it is, from the same start."""
        restore = self._mutated.saved()
        try:
            return attempt()
        except torch.OutOfMemoryError:
            restore()
            raise
        except Exception as error:  # whatever it is, the call as it is works, or says what is wrong
            restore()
            lines = str(error).strip().splitlines() or [""]
            self._give_up(f"{type(error).__name__}: {lines[0]}")
        return self._as_it_is(inputs)

    def _as_it_is(self, inputs: tuple[Tree, ...]) -> Tree:
        """The call itself. A copy, as always: what it returns may be memory that the next call writes to."""
        found = _detached(self._fn(*inputs))
        return found if self._static_outputs else _copied(found)

    def _captured(self, key: Any, leaves: list[Any], structure: Structure) -> Tree:
        """Capture, and replay for the first time: capturing executes nothing."""
        written = set(self._mutated.addresses())  # an input that fn writes to is itself, and no copy
        static = [
            _static(leaf) if isinstance(leaf, Tensor) and leaf.data_ptr() not in written else leaf for leaf in leaves
        ]
        out, replay = self._graphs.capture(lambda: _detached(self._fn(*unflatten(structure, static))))
        capture = _Capture(static, out, replay, self._mutated.addresses(), self._mutated.numbers())
        result = capture.replayed(leaves, copied=not self._static_outputs)
        self._captures[key] = capture
        return result

    def _give_up(self, reason: str) -> None:
        self.reset()
        self._why_not = reason
        self._log_once(f"nothing is captured, and every call runs as it is: {reason}.")

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            _logger.warning("CapturedStep: %s", line)


@dataclass(frozen=True)
class _Capture:
    """A graph: ``inputs`` are its own memory, ``out`` is what it writes; ``addresses`` and ``numbers`` of what it mutates."""

    inputs: list[Any]
    out: Tree
    replay: Callable[[], None]
    addresses: tuple[int, ...]
    numbers: dict[tuple[Any, ...], Any]

    def replayed(self, leaves: list[Any], *, copied: bool) -> Tree:
        with torch.no_grad():
            for own, given in zip(self.inputs, leaves, strict=True):
                if isinstance(own, Tensor) and own is not given:
                    own.copy_(given)
        self.replay()
        return _copied(self.out) if copied else self.out


def _signature(leaves: list[Any], structure: Structure, written: set[int]) -> Any:
    """Equal for calls that one graph can serve. Of an input that is written to, it has to be the same tensor."""
    own: list[Any] = []
    for path, leaf in zip(structure.paths(), leaves, strict=True):
        if isinstance(leaf, Tensor):
            same = id(leaf) if leaf.data_ptr() in written else None
            own.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad, same))
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            own.append((type(leaf), leaf))  # 1, 1.0 and True are equal
        else:
            raise TypeError(f"inputs{path}: expected tensors, None, numbers or strings, got {type(leaf).__name__}.")
    autocast = [torch.get_autocast_dtype(device) for device in DEVICES if torch.is_autocast_enabled(device)]
    return structure, tuple(own), torch.is_grad_enabled(), tuple(autocast)


def _static(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _detached(tree: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _copied(tree: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
