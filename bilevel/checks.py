"""Numbers among the options: which are refused, and with what words."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Refuse an option that is no number (Python's or NumPy's), or not in its range (NaN is in no range)."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}.")
    if not ((value > 0 if positive else value >= 0) and _is_finite(value)):
        raise ValueError(f"{name}: expected a finite number {'> 0' if positive else '>= 0'}, got {value!r}.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # of an integer that no float holds
        return False


def check_rtol(name: str, value: float) -> None:
    """Refuse what is no relative residual below that of zero, which would pass for a solution."""
    check_number(name, value)
    if value >= 1:
        raise ValueError(
            f"{name}: expected a relative residual below 1, such as 1e-3, got {value!r}: that of zero is 1, and zero would be a solution. "
            "For two per cent write 0.02."
        )


def check_accuracy(accuracy: float) -> None:
    """Refuse what is no relative error below that of zeros: 1 is that of a gradient of zeros."""
    check_number("accuracy", accuracy, positive=True)
    if accuracy >= 1:
        raise ValueError(
            f"accuracy: expected a relative error below 1, such as 1e-3, got {accuracy!r}. For five per cent write 0.05."
        )


def check_count(name: str, value: int, *, at_least: int = 1) -> None:
    """Refuse an option that is no integer (Python's or NumPy's), or too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}.")
    if value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}.")


def keep_python_numbers(options: Any) -> None:
    """Turn NumPy's numbers in the fields of a frozen dataclass into Python's: sums in its small types overflow."""
    for field in fields(options):
        value: Any = getattr(options, field.name)
        if isinstance(value, np.floating | np.integer):
            object.__setattr__(options, field.name, value.item())
