"""A graph on the CPU, as strict as CUDA's: capturing executes nothing, and replaying executes operators on the memory of the capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel import CapturedStep

FORBIDDEN = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


class FakeGraphs:
    """In the place of ``bilevel.captured.cuda_graphs.CudaGraphs``; ``calls`` lists what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reason_against(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"this is for the CPU, and the tensors are on {device}"

    def aside(self, run: Callable[[], Any]) -> Any:
        self.calls.append("aside")
        return run()

    def watched(self, run: Callable[[], Any]) -> Any:
        self.calls.append("watched")
        with _Watch("called a synchronizing operation"):
            return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.calls.append("capture")
        recording = _Recording()
        try:
            with recording:
                out = run()
        finally:
            recording.undo()

        def replay() -> None:
            self.calls.append("replay")
            recording.replay()

        return out, replay


def captured_by(graphs: FakeGraphs) -> type[CapturedStep]:
    """CapturedStep with these in the place of CUDA's."""
    return type("CapturedStepOnTheCPU", (CapturedStep,), {"_graphs": graphs})


class _Watch(TorchDispatchMode):
    """Raises where CUDA would make the host wait."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in FORBIDDEN:
            raise RuntimeError(f"{self.message}: {func}")
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Recording(_Watch):
    """The operators of a capture with their tensors. They have to be executed to be recorded, so that is undone afterwards: what was
    there before gets its numbers back, what is new becomes NaN, as memory that nobody has written to."""

    def __init__(self) -> None:
        super().__init__("operation not permitted when stream is capturing")
        self._steps: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self._own: dict[int, Tensor] = {}  # by the storage
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in given if func._schema.is_mutable else []:
            key = _storage(tensor)
            if key not in self._own and key not in self._before:
                self._before[key] = (tensor, tensor.detach().clone())
        storages = {_storage(tensor) for tensor in given}
        out = func(*args, **kwargs)
        new = [(i, t) for i, t in enumerate(tree_leaves(out)) if isinstance(t, Tensor) and _storage(t) not in storages]
        for _, tensor in new:
            self._own[_storage(tensor)] = tensor
        self._steps.append((func, args, kwargs, new))
        return out

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, copy in self._before.values():
                tensor.copy_(copy)
            for tensor in self._own.values():
                if tensor.is_floating_point() and not tensor._is_zerotensor():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, new in self._steps:
                again = tree_leaves(func(*args, **kwargs))
                for i, tensor in new:
                    if not tensor._is_zerotensor():
                        tensor.copy_(again[i])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
