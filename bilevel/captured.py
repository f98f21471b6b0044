"""A step as one CUDA graph: recorded once, then replayed without Python and without a launch for each operator."""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bilevel.isolation import DEVICES
from bilevel.trees import Structure, Tree, flatten, tree_map, unflatten

_logger = logging.getLogger(__name__)

Mutable = Tensor | nn.Module | Optimizer


class Graphs(Protocol):
    """What a device offers: the primitives that :class:`bilevel.CapturedStep` is made of."""

    def reason_against(self, device: torch.device) -> str | None:
        """Why nothing can be captured on this device; None if nothing speaks against it."""

    def aside(self, run: Callable[[], Any]) -> Any:
        """Run it where the capture will be."""

    def watched(self, run: Callable[[], Any]) -> Any:
        """The same; raises where the host waits for the device."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record it without executing it: what it returned, and what replays it."""


class CapturedStep:
    """A function of trees of tensors, replayed as a CUDA graph: one launch in the place of thousands.

    A meta-step is thousands of small kernels, and on a fast device the time goes into launching them. A graph holds all of them, with
    the addresses of their memory. So what is captured must be the same work every time: no number is read back (solvers with
    tolerances of 0), shapes do not change, and what is kept from step to step is written in place::

        outer = torch.optim.Adam(theta.values(), capturable=True)

        def meta_step(tasks):
            found = bilevel.hypergradient(problem, theta, tasks, solver=solver, linsys=linsys, batched=True)
            for name, leaf in theta.items():
                leaf.grad = found.grad[name]
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
        graphs: what captures, for tests; None: CUDA.

    Raises:
        torch.OutOfMemoryError: as ``fn`` does; what it mutates is then as it was before the call, if that was to be captured.
        TypeError: an argument of a call has a leaf of another kind.
    """

    def __init__(
        self,
        fn: Callable[..., Tree],
        *,
        mutates: Iterable[Mutable] = (),
        warmup: int = 3,
        max_captures: int = 4,
        static_outputs: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn: expected a function of trees of tensors, got {type(fn).__name__}.")
        for name, value in (("warmup", warmup), ("max_captures", max_captures)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}.")
        self._fn, self._mutated = fn, _Mutated(mutates)
        self._warmup, self._max_captures, self._static_outputs = warmup, max_captures, static_outputs
        self._graphs: Graphs = CudaGraphs() if graphs is None else graphs
        self._said: set[str] = set()
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
            return _detached(self._fn(*inputs))
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
        self._say(
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
        return _detached(self._fn(*inputs))

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
        self._say(f"nothing is captured, and every call runs as it is: {reason}.")

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
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


class _Mutated:
    """What a function writes to."""

    def __init__(self, things: Iterable[Mutable]) -> None:
        things = list(things)
        for thing in things:
            if not isinstance(thing, Mutable):
                raise TypeError(f"mutates: expected tensors, modules and optimizers, got {type(thing).__name__}.")
        self._things = things
        self._optimizers = [thing for thing in things if isinstance(thing, Optimizer)]

    def tensors(self) -> list[Tensor]:
        """All tensors, those that optimizers keep and options that are tensors included; gradients not, they are made anew."""
        found: list[Any] = [thing for thing in self._things if isinstance(thing, Tensor)]
        for thing in self._things:
            if isinstance(thing, nn.Module):
                found += [*thing.parameters(), *thing.buffers()]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                found += flatten(list(group.values()))[0]
            for state in optimizer.state.values():
                found += state.values()
        return [thing for thing in found if isinstance(thing, Tensor)]

    def kept_elsewhere(self) -> str | None:
        """What an optimizer keeps on another device than the parameter that it is about, in words."""
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.device != parameter.device:
                        return f"{type(optimizer).__name__} keeps {name!r} on {value.device}, its parameters are on {parameter.device}"
        return None

    def addresses(self) -> tuple[int, ...]:
        """Where the tensors are."""
        return tuple(tensor.data_ptr() for tensor in self.tensors())

    def numbers(self) -> dict[tuple[Any, ...], Any]:
        """The options of the optimizers that are no tensors; the last part of a key is the name."""
        return {
            (type(optimizer).__name__, i, j, k, name): leaf
            for i, optimizer in enumerate(self._optimizers)
            for j, group in enumerate(optimizer.param_groups)
            for name, value in group.items()
            for k, leaf in enumerate(flatten(value)[0])
            if not isinstance(leaf, Tensor)
        }

    def saved(self) -> Callable[[], None]:
        """What brings everything back to where it is now."""
        grads = [(tensor, tensor.grad) for tensor in self.tensors() if tensor.is_leaf]
        tensors = [*self.tensors(), *(grad for _, grad in grads if grad is not None)]
        copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
        states = [{key: dict(state) for key, state in optimizer.state.items()} for optimizer in self._optimizers]

        def restore() -> None:
            for optimizer, state in zip(self._optimizers, states, strict=True):
                optimizer.state.clear()
                optimizer.state.update(state)
            for tensor, grad in grads:
                tensor.grad = grad
            with torch.no_grad():
                for tensor, copy in copies:
                    tensor.copy_(copy)

        return restore


class CudaGraphs:
    """CUDA graphs as PyTorch has them. Warm-up and capture share a stream, for which libraries keep their handles."""

    def reason_against(self, device: torch.device) -> str | None:
        """See :class:`Graphs`."""
        if device.type != "cuda":
            return f"a graph needs a CUDA device, and the tensors are on {device}"
        if device.index != torch.cuda.current_device():
            return f"the tensors are on {device}, which is not the current device; see torch.cuda.set_device"
        return None

    @property
    def _stream(self) -> Any:
        return _stream_of(torch.cuda.current_device())

    def aside(self, run: Callable[[], Any]) -> Any:
        """See :class:`Graphs`."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return run()
        finally:  # also of a run that failed, whose traces are about to be removed
            current.wait_stream(self._stream)

    def watched(self, run: Callable[[], Any]) -> Any:
        """See :class:`Graphs`."""
        with _waiting_is_an_error():
            return self.aside(run)

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """See :class:`Graphs`."""
        gc.collect()  # graphs in cycles that nobody holds any more keep their memory
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # a capture that fails leaves its own stream as the current one
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, stream=self._stream),
            ):
                out = run()
        except BaseException:
            _close(pool)
            raise
        return out, graph.replay


@functools.cache
def _stream_of(device: int) -> Any:
    """One for all captures: libraries keep a workspace for each stream that they have seen, and graphs point into it."""
    return torch.cuda.Stream(device)


def _close(pool: Any) -> None:
    """End a capture that failed for the allocator, too. Where PyTorch leaves that out, emptying the cache, and so every later capture,
    fails with an internal error. And for the random numbers: up to 2.11 their generator would go on as in a capture, and raise.
    """
    device = torch.cuda.current_device()
    with suppress(AttributeError, IndexError, RuntimeError):
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())  # a copy has no part in a capture
    with suppress(AttributeError, RuntimeError):  # of a PyTorch that has ended it already
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # it is a prototype, as PyTorch says once
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
