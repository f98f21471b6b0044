"""One meta-step as a function of its tasks: the meta-gradient, Adam, and what the log wants to know. On a GPU it can be one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import bilevel
from applications.meta_learning.algorithms import MetaGradient
from applications.meta_learning.config import Config
from applications.meta_learning.method import Method
from applications.meta_learning.problem import Theta
from bilevel import Status

_logger = logging.getLogger(__name__)

Found = dict[str, Any]
"""numbers: float64, as `NAMES`. phi: the adapted parameters. inner, linear (or None): codes, steps and residual of each task."""

NAMES = ("ok_tasks", "loss", "inner_residual", "linear_residual", "negative_tasks", "accuracy")
NEGATIVE_CURVATURE = (Status.NEGATIVE_CURVATURE, Status.STOPPED_AT_NEGATIVE_CURVATURE, Status.SOLVED_INDEFINITE)


class MetaStep:
    """theta <- Adam along its meta-gradient over the tasks that did not fail; without any, theta and Adam stay as they are.

    Where the settings ask for a capture and the device has graphs, the host never waits for a step (`is_deferred`): whether any
    task is usable is then known to Adam alone. Where the memory of a GPU does not suffice for all tasks at once, and the settings
    leave the number open, it is halved until they do.

    captured_step: what captures in the place of `bilevel.CapturedStep`, for tests: it has graphs where CUDA is not.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        theta: Theta,
        device: torch.device,
        captured_step: type[bilevel.CapturedStep] | None = None,
    ) -> None:
        self.config, self.problem, self.algorithm, self.theta = config, method.problem, method.algorithm, theta
        self.is_deferred = config.capture and (device.type == "cuda" or captured_step is not None)
        self._captured_step = captured_step or bilevel.CapturedStep
        self.outer = torch.optim.AdamW(
            list(theta.values()), lr=config.outer_rate, eps=config.outer_eps, weight_decay=config.weight_decay
        )
        self.rates: torch.optim.Optimizer = self.outer
        """The optimizer whose rate a schedule sets. A graph needs the rate as a tensor, and a schedule is simpler with numbers."""
        if self.is_deferred:
            self.rates = torch.optim.SGD([torch.zeros(())], lr=config.outer_rate)
            self._prepare_adam(device)
        self._take = self._made()

    def __call__(self, data: Any) -> Found:
        """Take the step.

        Raises:
            torch.OutOfMemoryError: not even one task fits, or not so many as the settings ask for. Nothing has changed then.
        """
        if self.is_deferred:
            self.rates.step()  # nothing; it tells the schedule that all is in order
            self.outer.param_groups[0]["lr"].fill_(self.rate)
        while True:
            try:
                return self._take(data)
            except torch.OutOfMemoryError:
                at_once = self.algorithm.chunk_size or self.config.meta_batch
                if self.config.chunk_size or at_once == 1:
                    raise
            self._work_on((at_once + 1) // 2)  # here, where the error does not hold on to any memory

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.rates.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """The state of Adam, the same with and without graphs."""
        state = self.outer.state_dict()
        if not self.is_deferred:
            return state
        own = {key: self.rates.param_groups[0][key] for key in ("lr", "initial_lr")}
        return {
            "state": {i: {**each, "step": each["step"].cpu()} for i, each in state["state"].items()},
            "param_groups": [{**group, "capturable": False, "fused": None, **own} for group in state["param_groups"]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of Adam.

        Raises:
            ValueError, KeyError: it belongs to something else.
        """
        self.outer.load_state_dict(state)
        if self.is_deferred:
            self._prepare_adam(next(iter(self.theta.values())).device)

    def set_options(self, *, rate: float, eps: float, weight_decay: float) -> None:
        """Other options than those of the loaded state; the schedule sets the rate of a step."""
        self.outer.param_groups[0].update(eps=eps, weight_decay=weight_decay)
        self.rates.param_groups[0].update(lr=rate, initial_lr=self.config.outer_rate)

    def _made(self) -> Callable[[Any], Found]:
        if not self.config.capture:
            return self._plain
        step = self._without_waiting if self.is_deferred else self._plain
        return self._captured_step(step, mutates=[self.outer])

    def _prepare_adam(self, device: torch.device) -> None:
        """Everything that Adam keeps on the device, where a graph can change it."""
        if device.index is not None:
            torch.cuda.set_device(device)  # graphs are those of the current device
        rate = torch.full((), self.rate, dtype=torch.float32, device=device)
        self.outer.param_groups[0].update(capturable=True, fused=True, lr=rate)
        for state in self.outer.state.values():
            state["step"] = state["step"].to(device, torch.float32)

    def _plain(self, data: Any) -> Found:
        meta = self.algorithm.meta_gradient(self.problem, self.theta, data)
        if bool(meta.ok.any()):
            self._step_along(meta)
        return _found(meta)

    def _without_waiting(self, data: Any) -> Found:
        meta = self.algorithm.meta_gradient(self.problem, self.theta, data)
        # what torch.amp.GradScaler tells an optimizer: where this is 1, everything stays as it is
        self.outer.found_inf = (~meta.ok.any()).float()  # type: ignore[attr-defined]
        self._step_along(meta)
        return _found(meta)

    def _step_along(self, meta: MetaGradient) -> None:
        for name, leaf in self.theta.items():
            leaf.grad = meta.grad[name]
        self.outer.step()

    def _work_on(self, tasks: int) -> None:
        _logger.warning("Out of memory; going on with %d tasks at once (--chunk-size sets the number).", tasks)
        self.algorithm = replace(self.algorithm, chunk_size=tasks)
        self._take = self._made()  # the memory of an earlier graph goes with it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _found(meta: MetaGradient) -> Found:
    """Everything as tensors, so that nothing waits for the device."""
    linear = meta.linear
    negative, residual = torch.zeros_like(meta.ok), torch.full_like(meta.inner.residual, torch.nan)
    if linear is not None:
        for status in NEGATIVE_CURVATURE:
            negative = negative | (linear.codes == int(status))
        residual = linear.residual
    if meta.inner.negative_curvature is not None:  # Newton-CG goes on where it meets some, and counts
        negative = negative | (meta.inner.negative_curvature > 0)
    numbers = [meta.ok.sum(), meta.outer, _median(meta.inner.residual), _median(residual), negative.sum()]
    return {
        "numbers": torch.stack([number.double() for number in numbers]),
        "phi": meta.phi,
        "inner": _of_tasks(meta.inner),
        "linear": None if linear is None else _of_tasks(linear),
    }


def _median(x: Tensor) -> Tensor:
    """Without the NaN. With an axis it does not make the host wait, as it does without."""
    return x.nanmedian(0).values


def _of_tasks(result: bilevel.Result) -> dict[str, Tensor]:
    return {"codes": result.codes, "steps": result.steps, "residual": result.residual}


def describe(found: Found) -> str:
    """What went wrong, in sentences."""
    solves = (("adaptation", found["inner"]), ("linear solve", found["linear"]))
    return "\n".join(bilevel.Result(value=None, **own).describe(what) for what, own in solves if own is not None)
