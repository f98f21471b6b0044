"""What was recorded for a problem (:mod:`bilevel.recorded.tracing`): kept from call to call, and made anew where it no longer
holds.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from bilevel.derivatives.forward import alone
from bilevel.problem import BilevelProblem

P = TypeVar("P")
R = TypeVar("R")


class _Call(Protocol):
    @property
    def programs(self) -> Any: ...


C = TypeVar("C", bound=_Call)

_logger = logging.getLogger(__name__)

MOST = 128
"""Programs kept for one problem. A call needs up to six, of each size that a batch shrinks to; that makes the last twenty shapes or
more. A recording takes as much memory as a small model.
"""


MOST_FAILURES = 2
"""So many calls in a row whose recordings were of no use, and further ones are made without: each would take as long as the recording."""


class Stale(Exception):
    """What was recorded is not what the problem does now. ``by_chance``: two evaluations of it differ, too."""

    def __init__(self, by_chance: bool = False) -> None:
        super().__init__("what was recorded does not give the same numbers")
        self.by_chance = by_chance


class Programs:
    """What was recorded for a problem, from one call of the library to the next."""

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = weakref.ref(problem)
        self._programs: dict[Any, Any] = {}  # the one used last at the end
        self._told, self._lock = False, threading.Lock()
        self._refused: set[Any] = set()  # what could not be recorded the first time
        self.failures = 0
        """Calls in a row whose recordings were of no use."""

    @staticmethod
    def of(problem: BilevelProblem) -> Programs:
        """Those of this problem; they live as long as it does. A copy of the problem has its own."""
        found = problem.__dict__.get("_programs")
        if found is None or found._problem() is not problem:
            found = problem.__dict__["_programs"] = Programs(problem)
        return found

    def __reduce__(self) -> Any:
        """Copied and pickled without the programs; ``of`` then makes new ones."""
        return (_Nothing, ())

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._programs.clear()

    def get(self, key: Any, record: Callable[[], P]) -> P | None:
        """The program, recorded if it is not there yet; None if it cannot be recorded. What fails is tried once more: the first evaluation
        of an objective may be another one than those that follow.
        """
        if (found := self._kept(key)) is not self:
            return found
        if torch.is_anomaly_enabled():  # which cannot be recorded
            return None
        with alone():
            if (found := self._kept(key)) is not self:  # by another thread, meanwhile
                return found
            try:
                program = record()
            except Exception as error:
                # whatever it is, the same function without recording works, or says what is wrong
                reason = str(error).strip().splitlines() or [""]
                first = key not in self._refused
                if first:
                    _logger.warning(
                        "compile=True: could not record the %s (%s: %s); it is computed without.",
                        key[0],
                        type(error).__name__,
                        reason[0],
                    )
                if first:
                    self._refused = {key} if len(self._refused) >= MOST else {*self._refused, key}
                    return None
                program = None
            with self._lock:  # before another thread may find that it is missing, and clear what is there
                if key[0] == "gradient":  # which is verified for all of its kind: none of them may be older
                    self._programs = {k: p for k, p in self._programs.items() if k[-len(key) + 1 :] != key[1:]}
                self._make_room()
                self._programs[key] = program
                self._refused.discard(key)
        return program

    def _kept(self, key: Any) -> Any:
        """The program, which is then the one used last; ``self`` if there is none."""
        with self._lock:
            if key in self._programs:
                self._programs[key] = self._programs.pop(key)
            return self._programs.get(key, self)

    def _make_room(self) -> None:
        while len(self._programs) >= MOST:
            del self._programs[next(iter(self._programs))]
            if not self._told:
                _logger.warning(
                    "compile=True: %d recordings for one problem, so the oldest are forgotten, and made again when they are needed, which "
                    "takes longer than without. Do shapes in data change from call to call? Pad them to a few sizes. Plain numbers? Make "
                    "them tensors. Or leave compile out.",
                    MOST,
                )
            self._told = True


@dataclass(frozen=True)
class Session:
    """The programs in one call of the library.

    Attributes:
        old: whether there may be some that an earlier call has recorded.
    """

    programs: Programs
    old: bool

    def get(self, key: Any, record: Callable[[], P]) -> P | None:
        """See :class:`Programs`."""
        return self.programs.get(key, record)


class _Nothing:
    """In the place of the programs of another problem."""

    @staticmethod
    def _problem() -> None:
        return None


def with_programs(call: C, run: Callable[[C], R]) -> R:
    """``run(call)``; once more, with new programs, where those of an earlier call turn out to be out of date, and
    without any where they cannot be replayed.

    Raises:
        ValueError: the objective is no function of its arguments.
    """
    programs = call.programs
    if programs is None or programs.failures >= MOST_FAILURES:
        return run(_with(call, None))
    hint = "Does a shape depend on the numbers in data?"
    failure: Exception
    try:
        try:
            found = run(_with(call, Session(programs, old=len(programs) > 0)))
        except Stale:
            programs.clear()
            found = run(_with(call, Session(programs, old=False)))
        programs.failures = 0
        return found
    except torch.OutOfMemoryError:
        raise
    except Stale as error:
        if error.by_chance:
            raise ValueError(
                "compile=True: expected an inner objective that is a function of phi, theta and data, but two evaluations at the same "
                "point differ. Is there dropout in it, or another source of chance? bilevel.testing.check_deterministic tells."
            ) from error
        failure, hint = error, "Does the objective seed a generator of its own, or leave PyTorch, as by .numpy()?"
    except Exception as error:  # of a program, or the user's own: the same call without programs tells
        failure = error
    programs.clear()
    found = run(_with(call, None))
    programs.failures += 1
    _logger.warning(
        "compile=True: what was recorded could not be replayed (%s: %s); the call was made without%s. %s",
        type(failure).__name__,
        (str(failure).strip().splitlines() or [""])[0],
        "" if programs.failures < MOST_FAILURES else ", and so are all that follow",
        hint,
    )
    return found


def _with(call: C, programs: Session | None) -> C:
    return replace(call, programs=programs)  # type: ignore[type-var]
