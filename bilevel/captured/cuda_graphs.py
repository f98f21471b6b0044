"""What a device offers to capture a step (:mod:`bilevel.captured`): recording its work once and replaying it. CUDA's
graphs.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    """The primitives that :class:`bilevel.CapturedStep` is made of."""

    def reason_against(self, device: torch.device) -> str | None:
        """Why nothing can be captured on this device; None if nothing speaks against it."""

    def aside(self, run: Callable[[], Any]) -> Any:
        """Run it where the capture will be."""

    def watched(self, run: Callable[[], Any]) -> Any:
        """The same; raises where the host waits for the device."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record it without executing it: what it returned, and what replays it."""


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
    """End a capture that failed for the allocator, too. Where PyTorch leaves that out, emptying the cache, and so every
    later capture, fails with an internal error. And for the random numbers: up to 2.11 their generator would go on
    as in a capture, and raise.
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
