"""Symmetric matrices with known spectra."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.testing.strategies.draws import SCALES, SEEDS, SPECTRA, Limits, Source, with_spectrum


@dataclass(frozen=True, eq=False)
class Matrix:
    """A symmetric matrix, and what is known of it before any computation.

    ``value`` is what the construction gives after rounding: its eigenvalues are those listed up to ``d eps |A|``.

    Attributes:
        value: A ``(d, d)``, exactly symmetric.
        eigenvalues: ``(d,)`` in ascending order.
        eigenvectors: ``(d, d)``, one in each column.
    """

    value: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    @property
    def kappa(self) -> float:
        """The condition number, largest over smallest absolute eigenvalue; inf for a singular matrix."""
        size = self.eigenvalues.abs()
        return float(size.max() / size.min())

    def matvec(self, v: Tensor) -> Tensor:
        """A v over ``(*batch, d)``: what a linear solver of :mod:`bilevel.linsys` asks for."""
        return (self.value @ v.unsqueeze(-1)).squeeze(-1)


@st.composite
def _matrices(draw: st.DrawFn, limits: Limits, kind: str) -> Matrix:
    d, source = draw(limits.dims()), Source(draw(SEEDS))  # first what matters most in a small example
    kappa, shape, scale = draw(limits.kappas()), draw(st.sampled_from(SPECTRA)), draw(SCALES)
    most = (
        d - 2 if kind == "singular" and limits.min_kappa > 1 else d - 1
    )  # one positive eigenvalue has a condition number of 1
    changed = 0 if kind == "spd" else draw(st.integers(1, most))
    if kind == "singular":
        eigenvalues = np.concatenate([np.zeros(changed), scale * source.spectrum(d - changed, kappa, shape)])
    else:
        eigenvalues = scale * source.spectrum(d, kappa, shape)
        eigenvalues[source.permuted(np.arange(d))[:changed]] *= -1
    eigenvalues = np.sort(eigenvalues)
    basis = source.orthogonal(d, d)
    value, values, vectors = (
        torch.tensor(array, dtype=limits.dtype) for array in (with_spectrum(basis, eigenvalues), eigenvalues, basis)
    )
    return Matrix(value, values, vectors)


def spd_matrices(
    *,
    min_dim: int = 1,
    max_dim: int = 20,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Matrix]:
    """Symmetric positive definite matrices with known eigenvalues. They shrink to a small identity.

    The spectra are geometric, random, or a cluster with one eigenvalue far below or above it; the largest eigenvalue lies between
    0.01 and 100.

    Args:
        min_dim, max_dim: the number of rows.
        min_kappa, max_kappa: the condition number, spread over its orders of magnitude. The default of ``max_kappa`` is 1e6 in
            float64 and 1e3 in float32; it may be raised to 0.01 / (max_dim eps).
        dtype: float64 or float32.

    Returns:
        A strategy for :class:`Matrix`.

    Raises:
        ValueError: limits that contradict each other, or a condition number that the dtype cannot store.
    """
    return _matrices(
        Limits(min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype), "spd"
    )


def indefinite_matrices(
    *,
    min_dim: int = 2,
    max_dim: int = 20,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Matrix]:
    """Symmetric matrices with at least one negative and one positive eigenvalue, none of them zero.

    ``min_kappa`` and ``max_kappa`` are about the absolute values of the eigenvalues; the rest is as in :func:`spd_matrices`.
    """
    return _matrices(
        Limits(min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype, least_dim=2),
        "indefinite",
    )


def singular_matrices(
    *,
    min_dim: int = 2,
    max_dim: int = 20,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Matrix]:
    """Symmetric positive semi-definite matrices with at least one eigenvalue zero (to rounding) and one positive.

    ``eigenvectors`` has the null space in its first columns. ``min_kappa`` and ``max_kappa`` are about the positive eigenvalues
    (``min_kappa`` > 1 needs at least two of them, so ``min_dim`` >= 3); the rest is as in :func:`spd_matrices`.
    """
    return _matrices(
        Limits(
            min_dim=min_dim,
            max_dim=max_dim,
            min_kappa=min_kappa,
            max_kappa=max_kappa,
            dtype=dtype,
            least_dim=2,
            num_zero=1,
        ),
        "singular",
    )
