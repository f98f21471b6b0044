"""What every strategy draws: sizes within limits, a spectrum, a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]

SPECTRA = ["geometric", "one small", "one large", "random"]
DIRECT = ", theta also in L"  # in the name of a case
DEFAULT_KAPPA = {torch.float64: 1e6, torch.float32: 1e3}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the user asked for, checked. ``top`` is the largest condition number, by default that of the dtype."""

    min_dim: int
    max_dim: int
    min_kappa: float
    max_kappa: float | None
    dtype: torch.dtype
    least_dim: int = 1
    least_kappa: float = 1.0
    num_zero: int = 0  # eigenvalues that are zero and do not count

    def __post_init__(self) -> None:
        if self.dtype not in DEFAULT_KAPPA:
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {self.dtype}.")
        for name in ("min_dim", "max_dim"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a whole number, got {value!r}.")
        for name in ("min_kappa", "max_kappa"):
            value = getattr(self, name)
            if name == "max_kappa" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number >= 1, got {value!r}.")
            if not 1 <= value < math.inf:
                raise ValueError(f"{name}: expected a number >= 1, got {value!r}.")
        if not self.least_dim <= self.min_dim <= self.max_dim:
            raise ValueError(
                f"expected {self.least_dim} <= min_dim <= max_dim, got min_dim={self.min_dim}, max_dim={self.max_dim}."
            )
        if not self.bottom <= self.top:
            raise ValueError(f"expected max_kappa >= {self.bottom:g}, got {self.top:g}.")
        if self.min_kappa > 1 and self.min_dim < 2 + self.num_zero:
            raise ValueError(
                f"min_kappa > 1 needs min_dim >= {2 + self.num_zero}: the condition number of one number is 1."
            )
        largest = 0.01 / (self.max_dim * torch.finfo(self.dtype).eps)
        if self.top > largest:
            raise ValueError(
                f"expected max_kappa <= {largest:.1e}, beyond which {self.dtype} cannot store a matrix of {self.max_dim} rows that is "
                f"still definite, got {self.top:g}. Lower max_kappa or max_dim{', or use float64' * (self.dtype == torch.float32)}."
            )

    @property
    def bottom(self) -> float:
        """The smallest condition number."""
        return max(self.min_kappa, self.least_kappa)

    @property
    def top(self) -> float:
        """The largest condition number."""
        return DEFAULT_KAPPA[self.dtype] if self.max_kappa is None else self.max_kappa

    def dims(self) -> st.SearchStrategy[int]:
        """Sizes; they shrink to the smallest."""
        return st.integers(self.min_dim, self.max_dim)

    def kappas(self) -> st.SearchStrategy[float]:
        """Condition numbers, spread over their orders of magnitude; they shrink to the smallest."""
        # integers, for Hypothesis spreads them evenly, and floats not at all
        return st.integers(0, 100).map(lambda k: float(self.bottom * (self.top / self.bottom) ** (k / 100)))


SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.integers(-20, 20).map(lambda k: float(10 ** (k / 10)))
"""The size of a problem: shrinks to 1."""


class Source:
    """Numbers from a seed. Seed 0 gives the simplest ones: ones, zeros and the identity."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._rng = None if seed == 0 else np.random.default_rng(seed)

    def normal(self, *shape: int) -> Array:
        """Standard normal numbers."""
        return np.ones(shape) if self._rng is None else self._rng.standard_normal(shape)

    def uniform(self, *shape: int) -> Array:
        """Numbers in [0, 1)."""
        return np.zeros(shape) if self._rng is None else self._rng.random(shape)

    def permuted(self, values: Array) -> Array:
        """The same numbers in another order."""
        return values if self._rng is None else self._rng.permutation(values)

    def orthogonal(self, n: int, k: int) -> Array:
        """``(n, k)``, k <= n, with orthonormal columns."""
        return np.eye(n, k) if self._rng is None else np.linalg.qr(self._rng.standard_normal((n, k)))[0]

    def spectrum(self, d: int, kappa: float, shape: str) -> Array:
        """d numbers from 1 / kappa to 1, in ascending order; both ends are among them if d > 1, and 1 alone if d = 1."""
        if d == 1:
            return np.ones(1)
        if shape == "geometric":
            power = np.linspace(1, 0, d)
        elif shape == "one small":
            power = np.eye(d)[0]
        elif shape == "one large":
            power = 1 - np.eye(d)[-1]
        else:
            power = np.concatenate([[1.0], np.sort(self.uniform(d - 2))[::-1], [0.0]])
        return kappa**-power


def with_spectrum(basis: Array, eigenvalues: Array) -> Array:
    """The symmetric matrix with these eigenvectors (columns) and eigenvalues, to rounding: d eps times the largest."""
    matrix = (basis * eigenvalues) @ basis.T
    return 0.5 * (matrix + matrix.T)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was drawn for a problem before its family draws the rest.

    Attributes:
        d: the dimension of phi.
        kappas: the condition number of each task.
        shape: one of ``SPECTRA``.
        scale: the size of the inner Hessian, or of its regularisation.
        source: of the numbers.
        max_dim: the largest dimension of theta.
        structured: variables may be trees.
        dtype: of the tensors.
    """

    d: int
    kappas: tuple[float, ...]
    shape: str
    scale: float
    source: Source
    max_dim: int
    structured: bool
    dtype: torch.dtype

    def name(self, family: str) -> str:
        """For the report of a failure."""
        kappas = ", ".join(f"{kappa:.3g}" for kappa in self.kappas)
        return f"{family}, dim={self.d}, kappa={kappas}, scale={self.scale:.3g}, seed={self.source.seed}"


def columns(factors: Any, v: Array) -> Array:
    """diag(factors) v for v ``(n,)`` or ``(n, k)``; factors ``(n,)`` or one number."""
    return (factors * v.T).T
