"""What is around a call and does not enter: the tracer of ``torch.compile``, autocast, inference mode. And what errors of PyTorch mean
here.

The tracer cannot see through a solve that asks for numbers to know when to stop. Autocast would take the sums of the solvers in half
precision, and none would reach its tolerance. Inference mode forbids the derivatives that every solve needs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("cpu", "cuda", "mps", "xpu")  # those that have autocast

OFF = (
    "bilevel: torch.autocast is on around this call and off within it; convert half-precision data, theta and phi with .float(), or enter "
    "torch.autocast in the objective."
)
COMPILED = (
    "bilevel: a solve differentiates the objective twice, which PyTorch cannot do with compiled code. Hand over the network that was "
    "compiled: module._orig_mod of module = torch.compile(...)."
)
RANDOM = (
    "bilevel: a function of the problem draws random numbers, so no two evaluations agree. Dropout does in training mode: call .eval() "
    "on the module. Draw random numbers before the call and pass them in data."
)

STATISTICS = (
    "bilevel: a function of the problem writes to a tensor that it captured. Batch norm in training mode does, to its running statistics, "
    "which the tasks of a batch share: make the layers with track_running_stats=False (each task then uses its own batch, as in few-shot "
    "learning), or call .eval() on the module."
)
HOOKS = (
    "bilevel: torch.func is used here, which takes no hooks of saved tensors. Leave torch.autograd.graph.save_on_cpu() and "
    "saved_tensors_hooks() before this call and its backward. Within an objective, torch.utils.checkpoint works in hypergradient(), where "
    "what it calls gets its parameters as arguments: of torch.func.functional_call it would recompute with the module's own."
)
SPARSE = (
    "bilevel: torch.func and torch.vmap take sparse tensors in the COO layout only: hand over X.to_sparse_coo(). Batches of tasks need "
    "dense tensors, or sparse ones in the problem itself and not in data."
)
NUMBERS = (
    "bilevel: the functions run on tensors of torch.func here (for batched=True, argmin, root and fixed_point), whose values cannot "
    "be read. Write torch.where in the place of if, a weight in the place of x[mask], and leave out .item(), float() and .numpy(); or "
    "hand tasks over one by one, without batched=True."
)
NO_RULE = (
    "bilevel: PyTorch cannot run this operation for several tasks at once, as those of recurrent layers. Hand tasks over one by one, "
    "without batched=True, or write the layer with other operations."
)
SPARSE_GRADIENTS = (
    "bilevel: a layer has a sparse gradient, and the vectors of a solve are dense: nn.Embedding without sparse=True."
)
ATTENTION = (
    "bilevel: the derivatives of argmin, root and fixed_point go through the model twice and more, which fused attention has no derivative "
    "for. Evaluate the model, in the call and its backward, under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
LEAF = (
    "bilevel: torch.func is used here (for batched=True, argmin, root, fixed_point and unrolled). A derivative in an input, within a "
    "function of the problem, is taken by torch.func.grad or torch.func.jvp."
)
OLD_FUNCTION = (
    "bilevel: torch.func is used here (for batched=True, argmin, root and fixed_point). An autograd.Function needs setup_context and "
    "generate_vmap_rule = True for it; torch.utils.checkpoint(use_reentrant=True) is such a function, and has no other form."
)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Within it, ``torch.utils.checkpoint(use_reentrant=False)`` around the call packs nothing: for each of the graphs that a solve makes
    and throws away, it would compute its region anew from the start.
    """
    hooks, found = torch._C._autograd, []
    innermost = getattr(
        hooks, "_top_saved_tensors_default_hooks", lambda _: None
    )  # before torch 2.8 there is no way to ask
    while (top := innermost(True)) and getattr(top[0], "__module__", None) == "torch.utils.checkpoint":
        hooks._pop_saved_tensors_default_hooks()
        found.append(top)
    try:
        yield
    finally:
        for pair in reversed(found):
            hooks._push_saved_tensors_default_hooks(*pair)


def precise(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, in which the caller's autocast is off, and inference mode is ``no_grad`` instead."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # of pytest: these frames say nothing to its reader
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return call(*args, **kwargs)
        devices = [device for device in DEVICES if torch.is_autocast_enabled(device)]
        if not devices:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if "dtype" in str(error) or "scalar type" in str(error):
                    error.add_note(OFF)
                raise

    return call


NOTES = (
    (("aot_autograd", "donated buffer"), COMPILED),
    (("randomness error mode",), RANDOM),
    (("running_mean", "would mutate a captured Tensor"), STATISTICS),
    (("saved tensor hooks",), HOOKS),
    (("data-dependent control flow", "calling .item()", "doesn't have storage", "dynamic shape"), NUMBERS),
    (("Batching rule not implemented",), NO_RULE),
    (("implemented for sparse tensors",), SPARSE_GRADIENTS),
    (("scaled_dot_product",), ATTENTION),
    (("setup_context staticmethod",), OLD_FUNCTION),
    (("attempting to call Tensor.requires_grad_()",), LEAF),
    (("Sparse CSR", "Sparse CSC", "Sparse BSR", "Sparse BSC", "for Sparse tensors"), SPARSE),
)
"""Words of PyTorch's, and what they mean here."""


def locate(error: Exception, where: str) -> None:
    """Let the error say where it was raised, if nothing better is known of it when it leaves the library."""
    if not hasattr(error, "_bilevel_where"):
        error._bilevel_where = where  # type: ignore[attr-defined]


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which ``torch.compile`` does not look into, and in which the caller's autocast and inference mode are off.

    It costs microseconds.
    """
    inner = precise(function)

    @functools.wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        try:
            return inner(*args, **kwargs)
        except Exception as error:
            if isinstance(error, RuntimeError):
                for words, note in NOTES:
                    if note not in getattr(error, "__notes__", ()) and any(part in str(error) for part in words):
                        error.add_note(note)  # once, of a call within a call too
            where = getattr(error, "_bilevel_where", None)
            if where is not None and not getattr(error, "__notes__", ()):  # of what nobody knows more
                error.add_note(where)
            raise

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        if "torch._dynamo" not in sys.modules:  # importing it takes seconds
            return explained(*args, **kwargs)
        # made anew each time: what is kept between calls would be guarded by the compiler, and make it compile again
        return torch.compiler.disable(explained)(*args, **kwargs)

    return call
