"""Linear systems with known spectra, for the tests of linear solvers. The oracle is NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel import Status

BATCHES: list[tuple[int, ...]] = [(), (3,), (2, 3)]
DTYPES = [torch.float32, torch.float64]


@dataclass(frozen=True)
class System:
    """A x = b over a batch, and its solution by numpy.linalg in float64."""

    a: Tensor  # (*batch, d, d)
    b: Tensor  # (*batch, d)

    def matvec(self, v: Tensor) -> Tensor:
        return (self.a @ v.unsqueeze(-1)).squeeze(-1)

    def solution(self) -> np.ndarray:
        return np.linalg.solve(self.a.double().numpy(), self.b.double().numpy()[..., None])[..., 0]

    def true_residual(self, u: Tensor) -> np.ndarray:
        a, b, x = self.a.double().numpy(), self.b.double().numpy(), u.double().numpy()
        return np.linalg.norm(b - (a @ x[..., None])[..., 0], axis=-1)

    def with_problem(self, index: int, a: Tensor | None = None, b: Tensor | None = None) -> System:
        """The same batch with another matrix or right-hand side at ``index``."""
        new_a, new_b = self.a.clone(), self.b.clone()
        if a is not None:
            new_a[index] = a
        if b is not None:
            new_b[index] = b
        return System(new_a, new_b)


class Counter:
    """Counts calls of a matvec, and the vectors in them."""

    def __init__(self, system: System) -> None:
        self.system, self.calls, self.shapes = system, 0, []

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(tuple(v.shape))
        return self.system.matvec(v)


def build(
    eigenvalues: Any, *, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, seed: int = 0
) -> System:
    """Symmetric matrices with these eigenvalues, in a random basis of its own for each problem of the batch."""
    rng = np.random.default_rng(seed)
    values = np.asarray(eigenvalues, dtype=float)
    d = len(values)
    q = np.linalg.qr(rng.standard_normal((*batch, d, d)))[0]
    a = (q * values) @ np.swapaxes(q, -1, -2)
    a = 0.5 * (a + np.swapaxes(a, -1, -2))
    b = rng.standard_normal((*batch, d))
    return System(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))


def build_general(
    singular_values: Any, *, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, seed: int = 0
) -> System:
    """Matrices with these singular values between two random bases: far from symmetric, eigenvalues all around zero."""
    rng = np.random.default_rng(seed)
    values = np.asarray(singular_values, dtype=float)
    d = len(values)
    left = np.linalg.qr(rng.standard_normal((*batch, d, d)))[0]
    right = np.linalg.qr(rng.standard_normal((*batch, d, d)))[0]
    b = rng.standard_normal((*batch, d))
    return System(torch.tensor((left * values) @ np.swapaxes(right, -1, -2), dtype=dtype), torch.tensor(b, dtype=dtype))


def shifted(system: System, shift: float) -> System:
    """A + shift I: the eigenvalues of ``build_general`` moved to one side."""
    eye = torch.eye(system.a.shape[-1], dtype=system.a.dtype)
    return System(system.a + shift * eye, system.b)


def spectrum(d: int, kappa: float, scale: float = 1.0) -> np.ndarray:
    return scale * np.logspace(0, -np.log10(kappa), d) if d > 1 else np.array([scale])


def status_of(codes: Tensor) -> list[Status]:
    return [Status(int(code)) for code in codes.reshape(-1)]
