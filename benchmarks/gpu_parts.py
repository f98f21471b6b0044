"""What `gpu.py` measures: a whole meta-step (inner solve, outer gradient, linear solve, Adam) of the paper's settings, and its floor.

Everything runs on any device, so that it can be tried on a CPU with tiny sizes. Times on a GPU are those of CUDA events.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peers.few_shot_problem as by_hand
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.method import build_method, build_network
from applications.meta_learning.models import initial_theta
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import cross_entropy
from applications.meta_learning.step import MetaStep
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent

Numbers = dict[str, Any]

WORKS = {"5w1s": "omniglot-5w1s-gd", "20w5s": "omniglot-20w5s-gd"}
TARGETS_MS = {"5w1s": 10.0, "20w5s": 120.0}
TARGET_LOOP = 30.0
INNER_STEPS = (1, 2, 4, 8, 16, 32, 64)
PRECISIONS = {
    "float32": False,
    "TensorFloat-32": True,
}  # of products and convolutions: whether inputs may be rounded to TF32
LIMIT = 1e-8


@dataclass(frozen=True)
class Setting:
    """A work on a device. tiny: sizes that a CPU does in seconds."""

    work: str
    device: torch.device
    tiny: bool
    seed: int

    def config(self, **changes: Any) -> Config:
        """The paper's settings."""
        config = replace(preset(WORKS[self.work]), device=str(self.device), seed=self.seed)
        if self.tiny:
            config = replace(config, ways=3, shots=1, query_shots=1, channels=4, meta_batch=2, inner_steps=2)
        return replace(config, **changes)

    @property
    def repeats(self) -> int:
        """Of what is quick."""
        return 3 if self.tiny else 50

    def tasks(self, config: Config, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
        """Random images with the labels of few-shot tasks."""
        generator = torch.Generator().manual_seed(self.seed)

        def part(per_class: int) -> dict[str, Tensor]:
            labels = torch.arange(config.ways).repeat_interleave(per_class).expand(config.meta_batch, -1)
            images = torch.rand(config.meta_batch, labels.shape[1], 1, 28, 28, generator=generator, dtype=torch.float64)
            return {"x": images.to(self.device, dtype), "y": labels.contiguous().to(self.device)}

        return {"support": part(config.shots), "query": part(config.query_shots)}

    def step(self, config: Config) -> MetaStep:
        """The meta-step of the training program."""
        module = build_network(config).to(self.device)
        theta = initial_theta(module, torch.float32, self.device)
        return MetaStep(config, build_method(config, module), theta, self.device)


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 4) -> Numbers:
    """The median of the repetitions, and the quartiles."""
    for _ in range(warm_up):
        run()
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    else:
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begun))
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": median, "quartiles": [low, high], "repeats": repeats}


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """In products and in convolutions; PyTorch allows it in convolutions, if nothing is said."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ----------------------------------------------------------------------------------------------------------------------


def meta_step(setting: Setting) -> Numbers:
    """Captured, as it is, and as a loop over the tasks by hand; how far from the floor."""
    config = setting.config()
    error = loop_error(setting)
    if not error <= LIMIT:
        raise SystemExit(f"{setting.work}: the loop by hand and the library differ by {error:.1e} in float64")
    data, found = setting.tasks(config), {}
    for name, capture in (("captured", True), ("plain", False)):
        step = setting.step(replace(config, capture=capture))
        found[name] = milliseconds(partial(step, data), setting.device, setting.repeats)
        if capture:
            found[name]["graphs"], found[name]["why_not"] = step._take.num_captures, step._take.why_not  # type: ignore[attr-defined]
    found["loop"] = milliseconds(
        loop(setting, config, torch.float32), setting.device, 2 if setting.tiny else 5, warm_up=1
    )
    speed = found["loop"]["median"] / found["captured"]["median"]
    return {
        "error_to_loop": error,
        "milliseconds": found,
        "times_faster_than_loop": speed,
        "target_ms": TARGETS_MS[setting.work],
        "target_times": TARGET_LOOP,
        "floor": floor(setting, config),
        "settings": config.to_dict(),
    }


def loop(setting: Setting, config: Config, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The meta-gradient as the public codes take it: one task after the other, each with its own graph; one vector."""
    steps = (config.inner_steps, config.inner_step_size, config.linear_steps)
    net = by_hand.network(config.ways, config.channels).to(setting.device, dtype)
    names = [name for name, _ in net.named_parameters()]
    theta = tuple(in_torch_layout(leaf) for leaf in start(setting, config, dtype).values())
    data = setting.tasks(config, dtype)
    tasks = list(zip(*(data[part][kind] for part in ("support", "query") for kind in ("x", "y")), strict=True))

    def loss(phi: by_hand.Phi, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, dict(zip(names, phi, strict=True)), (x,)), y)

    return lambda: by_hand.flat(by_hand.average(by_hand.imaml(loss, theta, task, config.lam, *steps) for task in tasks))


def start(setting: Setting, config: Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """theta, its leaves in the order of the parameters."""
    return initial_theta(build_network(config), dtype, setting.device)


def in_torch_layout(leaf: Tensor) -> Tensor:
    """A kernel as PyTorch's convolutions have it."""
    return leaf.permute(3, 2, 0, 1).contiguous() if leaf.ndim == 4 else leaf


def loop_error(setting: Setting) -> float:
    """Relative difference of the two meta-gradients of two tasks, in float64. With a lambda that leaves no Hessian indefinite: there one
    stops and the other does not.
    """
    config = setting.config(meta_batch=2, lam=50.0, inner_step_size=0.01)
    expected = loop(setting, config, torch.float64)()
    got = gradient(setting, config, torch.float64)
    return float((got - expected).norm() / expected.norm())


def gradient(setting: Setting, config: Config, dtype: torch.dtype, curvature: Any = bilevel.Hessian()) -> Tensor:
    """The library's meta-gradient as one vector, in the layout of the loop."""
    module = build_network(config).to(setting.device, dtype)
    found = bilevel.hypergradient(
        build_method(config, module).problem,
        start(setting, config, dtype),
        setting.tasks(config, dtype),
        solver=GradientDescent(step_size=config.inner_step_size, max_steps=config.inner_steps),
        linsys=CG(max_steps=config.linear_steps, rtol=0.0),
        curvature=curvature,
        batched=True,
    )
    return by_hand.flat(tuple(in_torch_layout(leaf) for leaf in found.grad.values()))


# ----------------------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Operators that do work, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        places = {leaf.untyped_storage()._cdata for leaf in given}
        is_view = not func._schema.is_mutable and all(leaf.untyped_storage()._cdata in places for leaf in made)
        if not is_view:
            self.operators += 1
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in [*given, *made])
        return out


def floor(setting: Setting, config: Config) -> Numbers:
    """What a step takes at least: its operations at the rate of a large product, its bytes at the rate of a copy, its launches.

    Bytes are those of one operator after the other; fused, they would be fewer.
    """
    step, data = setting.step(config), setting.tasks(config)
    step(data)
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        step(data)
    device, size = setting.device, 256 if setting.tiny else 8192
    x = torch.rand(size, size, device=device)
    product = milliseconds(lambda: x @ x, device, setting.repeats)["median"]
    rate = 2 * size**3 / product  # per millisecond
    copied = torch.empty_like(x)
    bandwidth = (
        2 * x.numel() * x.element_size() / milliseconds(lambda: copied.copy_(x), device, setting.repeats)["median"]
    )
    return {
        "operations": flops.get_total_flops(),
        "bytes": traffic.bytes,
        "operators": traffic.operators,
        "operations_per_ms": rate,
        "bytes_per_ms": bandwidth,
        "compute_ms": flops.get_total_flops() / rate,
        "memory_ms": traffic.bytes / bandwidth,
        "launch_ms": traffic.operators * launch(device, setting.repeats, captured=False),
        "launch_in_graph_ms": traffic.operators * launch(device, setting.repeats, captured=True),
    }


def launch(device: torch.device, repeats: int, *, captured: bool, count: int = 200) -> float:
    """Milliseconds of one operator that has nothing to do."""
    x = torch.zeros(1, device=device)

    def many(x: Tensor) -> Tensor:
        for _ in range(count):
            x.add_(1)
        return x

    run = bilevel.CapturedStep(many, mutates=[x], warmup=1) if captured and device.type == "cuda" else many
    return milliseconds(lambda: run(x), device, repeats)["median"] / count


# ----------------------------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> Numbers:
    """Memory of a step over the number of inner steps: the peak as it is, and what its graph keeps. Without a GPU there is none to ask."""
    rows = []
    for count in INNER_STEPS[:3] if setting.tiny else INNER_STEPS:
        row: Numbers = {"inner_steps": count}
        for name, capture in (("peak_mib", False), ("captured_mib", True)):
            row[name] = memory_of(setting, setting.config(inner_steps=count, capture=capture))
        rows.append(row)
    return {"rows": rows}


def memory_of(setting: Setting, config: Config) -> float | None:
    """MiB above theta and the tasks. Of a graph: of its pool, which stays."""
    step, data = setting.step(config), setting.tasks(config)
    if setting.device.type != "cuda":
        step(data)
        return None
    step(data)  # so that the workspaces of libraries, which stay, are there
    free_what_nobody_holds()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5 if config.capture else 1):  # three as they are, the capture, a replay
        step(data)
    torch.cuda.synchronize()
    if not config.capture:
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    free_what_nobody_holds()
    return (torch.cuda.memory_reserved() - reserved) / 2**20


def free_what_nobody_holds() -> None:
    """For the next measurement of memory."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def precision(setting: Setting) -> Numbers:
    """Time of a captured step and error of the meta-gradient with and without TF32.

    The error is that of the Gauss-Newton gradient: where the Hessian is indefinite, rounding decides where CG stops.
    """
    config, rows, gauss_newton = setting.config(), [], bilevel.GaussNewton()
    exact = gradient(setting, config, torch.float64, gauss_newton)
    for name, allowed in PRECISIONS.items():
        with tensor_float_32(allowed):
            got = gradient(setting, config, torch.float32, gauss_newton).double()
            step = setting.step(replace(config, capture=True))
            times = milliseconds(partial(step, setting.tasks(config)), setting.device, setting.repeats)
        cosine = torch.nn.functional.cosine_similarity(got, exact, dim=0)
        rows.append(
            {
                "precision": name,
                "relative_error": float((got - exact).norm() / exact.norm()),
                "cosine": float(cosine),
                "milliseconds": times,
            }
        )
    return {"rows": rows}


def throughput(setting: Setting) -> Numbers:
    """Tasks per second of a plain meta-gradient over the number of tasks at once: where the device is full."""
    rows = []
    for tasks in (1, 2) if setting.tiny else (1, 4, 8, 16, 32, 64, 128):
        config = setting.config(meta_batch=tasks, capture=True)
        step = setting.step(config)
        times = milliseconds(partial(step, setting.tasks(config)), setting.device, 3 if setting.tiny else 10)
        rows.append({"tasks": tasks, "tasks_per_second": 1e3 * tasks / times["median"], "milliseconds": times})
    return {"rows": rows}


PARTS: dict[str, Callable[[Setting], Numbers]] = {
    "meta_step": meta_step,
    "memory": memory,
    "precision": precision,
    "throughput": throughput,
}
