"""Hypothesis strategies for property tests of gradients, solvers and linear solvers (extra ``testing``).

Hypothesis draws sizes, a spectrum and a seed, and the numbers come from ``numpy.random.default_rng(seed)``: a case is small to store
and quick to shrink, and the same draw gives the same numbers. Seed 0, to which examples shrink, stands for the simplest ones that there
are: the identity for every orthogonal basis, ones for normal numbers.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "bilevel.testing.strategies needs hypothesis, which is not installed: pip install hypothesis."
    ) from error

from bilevel.testing.strategies.case import Case
from bilevel.testing.strategies.matrices import Matrix, indefinite_matrices, singular_matrices, spd_matrices
from bilevel.testing.strategies.problems import (
    logistic_problems,
    nonquadratic_problems,
    proximal_problems,
    quadratic_problems,
    ridge_problems,
    task_batches,
)
from bilevel.testing.strategies.structures import trees

__all__ = [
    # matrices
    "Matrix",
    "indefinite_matrices",
    "singular_matrices",
    "spd_matrices",
    # problems
    "Case",
    "logistic_problems",
    "nonquadratic_problems",
    "proximal_problems",
    "quadratic_problems",
    "ridge_problems",
    "task_batches",
    # variables
    "trees",
]
