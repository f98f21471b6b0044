"""Lambda of a proximal problem: 1/2 s^T Lambda s, Lambda v and (Lambda + damping I)^{-1} v.

Where Lambda is diagonal, three functions say all of it, for what is given (:class:`Weights`) and what is learned
(:mod:`bilevel.regularisation`): one weight for each leaf, a number or a tensor like the leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.trees import Tree, flatten, layout_of, tree_map, unflatten

Weight = float | Tensor


def quadratic(weights: Sequence[Weight], step: Tree) -> Tensor:
    """1/2 step^T Lambda step, 0-d."""
    terms = [  # a number outside the sum costs nothing
        lam * s.square().sum() if _is_number(lam) else (lam * s.square()).sum()
        for lam, s in zip(weights, flatten(step)[0], strict=True)
    ]
    return 0.5 * (terms[0] if len(terms) == 1 else torch.stack(terms).sum())


def product(weights: Sequence[Weight], v: Tree) -> Tree:
    """Lambda v."""
    leaves, structure = flatten(v)
    return unflatten(structure, [lam * x for lam, x in zip(weights, leaves, strict=True)])


def inverse(weights: Sequence[Weight], v: Tree, damping: float) -> Tree:
    """(Lambda + damping I)^{-1} v."""
    leaves, structure = flatten(v)
    return unflatten(structure, [x / (lam + damping) for lam, x in zip(weights, leaves, strict=True)])


def _is_number(lam: Weight) -> bool:
    return not isinstance(lam, Tensor) or lam.ndim == 0


class Weights:
    """A fixed Lambda, as the user gives it.

    Args:
        lam: as in :class:`bilevel.ProximalProblem`.

    Raises:
        TypeError, ValueError: as there.
    """

    def __init__(self, lam: Any) -> None:
        self.lam = tree_map(_as_weight, lam)
        # A square matrix may be Lambda in full or, for a theta of that shape, its diagonal: theta decides, at use.
        self._square = isinstance(self.lam, Tensor) and self.lam.ndim == 2 and self.lam.shape[0] == self.lam.shape[1]
        self._checked_matrix = False
        self._last_inverse: tuple[tuple[float, torch.dtype, torch.device], Tensor] | None = None
        self._positive = all(
            bool(((weights := torch.as_tensor(leaf)) > 0).logical_and(weights.isfinite()).all())
            for leaf in flatten(self.lam)[0]
        )
        if not self._positive and not (self._square and is_positive_definite(self.lam)):
            raise ValueError(
                f"lam: expected positive numbers or a symmetric positive definite matrix, got {described(self.lam)}."
            )

    def quadratic(self, step: Tree) -> Tensor:
        """1/2 step^T Lambda step, 0-d."""
        if not self._is_matrix_for(step):
            return quadratic(self._per_leaf(step), step)
        pairs = zip(flatten(self.product(step))[0], flatten(step)[0], strict=True)
        terms = [torch.sum(a * b) for a, b in pairs]
        return 0.5 * (terms[0] if len(terms) == 1 else torch.stack(terms).sum())

    def product(self, v: Tree) -> Tree:
        """Lambda v."""
        if self._is_matrix_for(v):
            return self._through_vector(lambda x: _like(x, self.lam) @ x, v)
        return product(self._per_leaf(v), v)

    def inverse(self, v: Tree, damping: float) -> Tree:
        """(Lambda + damping I)^{-1} v."""
        if self._is_matrix_for(v):
            return self._through_vector(lambda x: self._inverse(x, damping) @ x, v)
        return inverse(self._per_leaf(v), v, damping)

    @cached_property
    def largest(self) -> float:
        """The largest eigenvalue of Lambda."""
        leaves = [torch.as_tensor(leaf, dtype=torch.float64) for leaf in flatten(self.lam)[0]]
        if not self._square:
            return max(float(leaf.max()) for leaf in leaves)
        in_full = float(torch.linalg.eigvalsh(leaves[0])[-1])
        return max(in_full, float(leaves[0].max())) if self._positive else in_full  # or a diagonal: theta decides

    def _inverse(self, x: Tensor, damping: float) -> Tensor:
        """The matrix, kept for the next call: a linear solve asks for one damping, again and again."""
        key, kept = (damping, x.dtype, x.device), self._last_inverse  # read once: another thread may put its own there
        if kept is not None and kept[0] == key:
            return kept[1]
        eye = torch.eye(len(self.lam), dtype=self.lam.dtype, device=self.lam.device)
        found = _like(x, torch.cholesky_inverse(torch.linalg.cholesky(self.lam + damping * eye)))
        if not torch._C._functorch.is_functorch_wrapped_tensor(found):  # which must not outlive its transform
            self._last_inverse = key, found
        return found

    def _is_matrix_for(self, v: Tree) -> bool:
        return self._square and not (isinstance(v, Tensor) and v.shape == self.lam.shape)

    def _through_vector(self, fn: Callable[[Tensor], Tensor], v: Tree) -> Tree:
        layout, leaves = layout_of(v)
        d = sum(layout.sizes)
        if d != len(self.lam):
            raise ValueError(f"lam: expected a ({d}, {d}) matrix for this theta, got {tuple(self.lam.shape)}.")
        if not self._checked_matrix:
            if not is_positive_definite(self.lam):
                raise ValueError(f"lam: expected a symmetric positive definite matrix, got {described(self.lam)}.")
            self._checked_matrix = True
        return layout.unravel(fn(layout.ravel(leaves)))

    def _per_leaf(self, v: Tree) -> list[Weight]:
        """One weight for each leaf of v, of its dtype and device."""
        leaves, structure = flatten(v)
        if isinstance(self.lam, float):
            return [self.lam] * len(leaves)
        if self._square and not self._positive:
            raise ValueError(
                f"lam: expected positive numbers for a theta of the shape of lam (a diagonal), got {self.lam!r}."
            )
        lams, lam_structure = flatten(self.lam)
        if lam_structure != structure:
            raise ValueError(
                f"lam: expected a tree like theta with leaves {structure.paths()}, got leaves {lam_structure.paths()}."
            )
        for path, leaf, lam in zip(structure.paths(), leaves, lams, strict=True):
            if isinstance(lam, Tensor) and lam.shape != leaf.shape:
                raise ValueError(
                    f"lam{path}: expected a number or shape {tuple(leaf.shape)} like theta, got {tuple(lam.shape)}."
                )
        return [_like(leaf, lam) if isinstance(lam, Tensor) else lam for lam, leaf in zip(lams, leaves, strict=True)]


def _as_weight(lam: Any) -> float | Tensor:
    """A number as a Python float, so that it takes the dtype and device of what it multiplies; a tensor as a copy."""
    if isinstance(lam, Tensor):
        if lam.requires_grad:
            raise TypeError(
                "lam: got a tensor that requires grad, and no gradient would reach it. To learn lam, use "
                "LearnedProximalProblem; to keep it fixed, pass lam.detach()."
            )
        if lam.is_floating_point():
            with torch.inference_mode(False):  # where the copy could be in no graph
                return float(lam) if lam.ndim == 0 else lam.clone()
    elif isinstance(lam, Real) and not isinstance(lam, bool):
        return float(lam)
    raise TypeError(f"lam: expected positive numbers or real floating tensors, got {type(lam).__name__} {lam!r}.")


def is_positive_definite(matrix: Tensor) -> bool:
    """Whether the matrix ``(d, d)`` is symmetric positive definite."""
    return not _fault(matrix)


def _fault(matrix: Tensor) -> str:
    """What keeps a square matrix from being symmetric positive definite, or "". In NumPy, which no recording sees."""
    plain = matrix.detach().cpu().double()  # NumPy has no linear algebra in half precision, some devices no double
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    numbers = np.array(plain.tolist()) if transformed else plain.numpy()  # below torch.func it has no memory to look at
    if not np.isfinite(numbers).all():
        return "has entries that are no numbers"
    if not np.allclose(numbers, numbers.swapaxes(-1, -2), rtol=0, atol=1e-5 * np.abs(numbers).max(initial=0)):
        return "is not symmetric"
    smallest = np.linalg.eigvalsh(numbers).min(initial=np.inf)
    return "" if smallest > 0 else f"has the eigenvalue {smallest:.3g}"


def described(lam: Any) -> str:
    """For a message: no pages of numbers."""
    if isinstance(lam, Tensor) and lam.ndim == 2 and lam.shape[0] == lam.shape[1] and (fault := _fault(lam)):
        return f"a {tuple(lam.shape)} matrix that {fault}"
    return repr(lam)


def _like(x: Tensor, lam: Tensor) -> Tensor:
    return lam.to(dtype=x.dtype, device=x.device)
