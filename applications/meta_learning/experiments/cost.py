"""Time and peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from applications.meta_learning.allocator import keep_freed_memory
from applications.meta_learning.experiments.base import Numbers

Call = Callable[[], Any]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # malloc.h
LONG = 20.0  # seconds: no further repetition beyond


def fresh_processes(*, reuse: bool) -> ProcessPoolExecutor:
    """One process at a time, a new one for every measurement unless `reuse`: what a process has once had, it may keep."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=None if reuse else 1)


def cost(call: Call, warm_up: Call, *, device: torch.device, repeats: int) -> Numbers:
    """Peak memory of one call above what there was before it, in MB, and the median time of several, in seconds (None: of none).

    warm_up: loads libraries and fills caches; it may be smaller than the call.

    Memory is what PyTorch allocated. Time is that between two events on CUDA, and on the CPU that of the processor, with the allocator of
    the program.
    """
    warm_up()
    peak = _peak_on_cuda(call, device) if device.type == "cuda" else peak_bytes(call)[0] / 1e6
    if device.type == "cpu" and repeats:
        keep_freed_memory()
        warm_up()
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < LONG:
        seconds.append(_cuda_seconds(call) if device.type == "cuda" else _cpu_seconds(call))
    return {"peak_mb": peak, "seconds": statistics.median(seconds) if seconds else None, "repeats": len(seconds)}


def peak_bytes(call: Call) -> tuple[int, Any]:
    """What PyTorch has allocated on the CPU at the peak of the call above what it had before, and what the call returned. From the events
    of the profiler: the same in every run, which resident memory is not; what libraries take for themselves is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say when it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True) as profiled:
        value = call()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0)), value


def peak_resident(call: Call) -> float:
    """Peak resident memory of this process during the call above that before it, in MB. The kernel keeps the peak, so no moment is missed.

    Raises:
        RuntimeError: it is only known on Linux with the GNU C library.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"peak memory on the CPU: expected Linux, got {sys.platform}; measure on CUDA")
    gc.collect()
    _return_freed_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again (proc(5))
    call()
    return _status("VmHWM") - before


def _peak_on_cuda(call: Call, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _cuda_seconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _cpu_seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _return_freed_memory() -> None:
    """The opposite of `keep_freed_memory`: every tensor of 64 KiB or more is mapped and unmapped by itself."""
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError) as error:
        raise RuntimeError("peak memory on the CPU: expected the GNU C library; measure on CUDA") from error
    for option, value in ((_MMAP_MAX, 2**16), (_MMAP_THRESHOLD, 2**16), (_TRIM_THRESHOLD, 0), (_TOP_PAD, 0)):
        mallopt(option, value)
    trim(0)  # and what is free by now: it would be used again, and the peak hidden


def _status(key: str) -> float:
    """A line of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status: expected a line {key}, got none")
