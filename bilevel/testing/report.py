"""What a check found: the numbers, and the text that a reader can act on."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

TOO_UNCERTAIN = 0.1  # a reference that is less certain than this decides nothing
ROUGH = (
    "differences give no reliable number here: the function is too rough (a kink, noise, a result that was rounded to less than the "
    "precision of the references, as by .float() or tensors of float32 inside), the inner problem is nearly singular (the condition number "
    "stands in the second line), or its variable changes on a scale far from its own size. In float32: let the problem run in float64 as "
    "well, by tensors in data instead of captured ones."
)


class Verdict(StrEnum):
    """What a number means."""

    OK = "ok"
    FAULT = "FAULT"
    FOLLOWS = "follows"  # wrong, as a consequence of another part
    CHOICE = "by choice"  # the bias of GaussNewton, damping or Identity
    UNCLEAR = "UNCLEAR"  # the reference itself is too uncertain
    OPEN = "not judged"  # needs a part that is at fault


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison.

    Attributes:
        name: as it stands in the report.
        error: relative; NaN where it could not be measured.
        tolerance: ``rtol``, and what the reference itself is uncertain by.
        compared: what with what.
        verdict: what the number means.
        remark: where it comes from and what to do; printed where the verdict asks for it.
    """

    name: str
    error: float
    tolerance: float
    compared: str
    verdict: Verdict
    remark: str = ""

    def following(self) -> Part:
        """The same, as the consequence of another part."""
        return replace(self, verdict=Verdict.FOLLOWS) if self.is_at_fault else self

    @property
    def is_at_fault(self) -> bool:
        """Whether the check fails because of this part."""
        return self.verdict in (Verdict.FAULT, Verdict.UNCLEAR)


def judged(name: str, error: float, rtol: float, uncertainty: float, compared: str, remark: str) -> Part:
    """A part whose error counts where it is larger than ``rtol`` and the uncertainty of the reference. NaN counts."""
    verdict = Verdict.OK
    uncertainty = 0.0 if error == 0 else uncertainty  # both are exactly zero
    if math.isnan(error) and math.isinf(uncertainty):  # there is no reference
        verdict, remark = Verdict.UNCLEAR, ROUGH
    elif not error <= rtol + uncertainty:
        verdict = Verdict.FAULT
    elif not uncertainty <= TOO_UNCERTAIN:
        verdict, remark = Verdict.UNCLEAR, ROUGH
    return Part(name=name, error=error, tolerance=rtol + uncertainty, compared=compared, verdict=verdict, remark=remark)


def not_judged(name: str) -> Part:
    """A part whose reference rests on one that is at fault."""
    return Part(
        name=name, error=math.nan, tolerance=math.nan, compared="needs what is at fault above", verdict=Verdict.OPEN
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of :func:`bilevel.testing.check_hypergradient`; ``str(report)`` is the table.

    Attributes:
        parts: the comparisons, in the order in which to read them. ``report["inner solve"]`` is the one of that name.
        rtol: the tolerance.
        setting: precisions, sizes, condition number.
        notes: what else was seen.
    """

    parts: tuple[Part, ...]
    rtol: float
    setting: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Part:
        """The part of this name."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"{name!r}: expected one of {[part.name for part in self.parts]}")

    @property
    def at_fault(self) -> tuple[str, ...]:
        """The names of the parts at fault; consequences are not among them."""
        return tuple(part.name for part in self.parts if part.is_at_fault)

    @property
    def ok(self) -> bool:
        """Whether nothing is at fault."""
        return not self.at_fault

    def __str__(self) -> str:
        """The verdict, a line for each part, and what to do."""
        head = "passed" if self.ok else f"FAILED, at fault: {', '.join(self.at_fault)}"
        width = max(len(part.name) for part in self.parts)
        lines = [f"check_hypergradient {head}", self.setting]
        lines.append(f"{'part':<{width}}  {'error':>7}  {'allowed':>7}  {'verdict':<10}  compared")
        for part in self.parts:
            numbers = (
                "      -        -" if part.verdict is Verdict.OPEN else f"{part.error:7.1e}  {part.tolerance:7.1e}"
            )
            lines.append(f"{part.name:<{width}}  {numbers}  {part.verdict:<10}  {part.compared}")
        told = (Verdict.FAULT, Verdict.UNCLEAR, Verdict.CHOICE)
        lines += _items([f"{part.name}: {part.remark}" for part in self.parts if part.verdict in told and part.remark])
        return "\n".join(lines + _items(self.notes))


class CheckFailed(AssertionError):
    """What :func:`bilevel.testing.check_hypergradient` raises; the message is the report.

    Attributes:
        report: the :class:`~bilevel.testing.Report`.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> Any:
        return (CheckFailed, (self.report,))


def _items(texts: Iterable[str]) -> list[str]:
    return [textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ") for text in texts]
