"""The strategies that draw a problem with its exact answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st

from bilevel.checks import check_count
from bilevel.testing.strategies.affine import nonquadratic, quadratic
from bilevel.testing.strategies.case import Case, Model
from bilevel.testing.strategies.draws import SCALES, SEEDS, SPECTRA, Limits, Setup, Source
from bilevel.testing.strategies.regression import logistic, proximal, ridge

LEAST_KAPPA = 2.0
"""Of problems with a regularisation of their own: with kappa = 1 nothing else would be left of them."""

Family = Callable[[st.DrawFn, Setup], Model]


@st.composite
def _cases(
    draw: st.DrawFn, family: Family, limits: Limits, structured: bool, tasks: tuple[int, int] | None = None
) -> Case:
    d, source = draw(limits.dims()), Source(draw(SEEDS))  # first what matters most in a small example
    kappa = draw(limits.kappas())
    count = 1 if tasks is None else draw(st.integers(*tasks))
    shape, scale = draw(st.sampled_from(SPECTRA)), draw(SCALES)
    kappas = [kappa] if count == 1 else source.permuted(np.geomspace(limits.bottom, kappa, count))
    setup = Setup(
        d=d,
        kappas=tuple(map(float, kappas)),
        shape=shape,
        scale=scale,
        source=source,
        max_dim=limits.max_dim,
        structured=structured,
        dtype=limits.dtype,
    )
    return family(draw, setup).case(limits.dtype, batched=tasks is not None)


def quadratic_problems(
    *,
    min_dim: int = 1,
    max_dim: int = 10,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
    structured: bool = True,
) -> st.SearchStrategy[Case]:
    """G = 1/2 phi^T A phi - phi^T (C theta + c), with L a sum of squares or of sqrt(1 + z^2), with and without theta.

    phi and theta have sizes of their own, C is no symmetric matrix, and every leaf is coupled with every other through A.

    Args:
        min_dim, max_dim: the dimension of phi; those of theta and of the data go up to ``max_dim`` (in :func:`ridge_problems` and
            :func:`logistic_problems`, where theta may belong to the examples, to three times as much).
        min_kappa, max_kappa: the condition number ``case.kappa`` (beta / mu), spread over its orders of magnitude. The default of
            ``max_kappa`` is 1e6 in float64 and 1e3 in float32; it may be raised to 0.01 / (max_dim eps).
        dtype: float64 or float32.
        structured: phi and theta may be trees; False: they are vectors.

    Returns:
        A strategy for :class:`Case`.

    Raises:
        ValueError: limits that contradict each other, or a condition number that the dtype cannot store.
    """
    limits = Limits(min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype)
    return _cases(quadratic, limits, structured)


def nonquadratic_problems(
    *,
    min_dim: int = 1,
    max_dim: int = 10,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
    structured: bool = True,
) -> st.SearchStrategy[Case]:
    """G = 1/2 phi^T A phi - phi^T c + sum s(W phi + V theta), s(z) = sqrt(1 + z^2): H and the cross derivative depend on phi.

    L and the options are those of :func:`quadratic_problems`; ``max_kappa`` is at least 2.
    """
    limits = Limits(
        min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype, least_kappa=LEAST_KAPPA
    )
    return _cases(nonquadratic, limits, structured)


def ridge_problems(
    *,
    min_dim: int = 1,
    max_dim: int = 10,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
    structured: bool = True,
) -> st.SearchStrategy[Case]:
    """Ridge regression, judged by validation data; L depends on theta directly in half of the cases.

    theta are the logarithms of the penalties (one for each feature, or one for all), the logits of the example weights, or the
    targets. Options: :func:`quadratic_problems`; ``max_kappa`` is at least 2.
    """
    limits = Limits(
        min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype, least_kappa=LEAST_KAPPA
    )
    return _cases(ridge, limits, structured)


def logistic_problems(
    *,
    min_dim: int = 1,
    max_dim: int = 10,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
    structured: bool = True,
) -> st.SearchStrategy[Case]:
    """Logistic regression of int64 labels with an l2 penalty, judged by the logistic loss of validation data.

    theta are the logarithms of the penalties (one for each feature, or one for all) or the logits of the example weights. L depends
    on theta directly in half of the cases. Options: :func:`quadratic_problems`; ``max_kappa`` is at least 2, and is a bound here:
    the logistic loss bends less than it could where its argument is large.
    """
    limits = Limits(
        min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype, least_kappa=LEAST_KAPPA
    )
    return _cases(logistic, limits, structured)


def proximal_problems(
    *,
    min_dim: int = 1,
    max_dim: int = 10,
    min_kappa: float = 1.0,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
    structured: bool = True,
) -> st.SearchStrategy[Case]:
    """iMAML's problem: a :class:`bilevel.ProximalProblem` of a linear model with squared or logistic loss, theta the centre.

    ``lam`` is a number, one number for each leaf, a diagonal or a matrix. The problem has a model and an output loss, so
    ``GaussNewton()`` works, and equals ``Hessian()`` here. Options: :func:`quadratic_problems`; ``max_kappa`` is at least 2.
    """
    limits = Limits(
        min_dim=min_dim, max_dim=max_dim, min_kappa=min_kappa, max_kappa=max_kappa, dtype=dtype, least_kappa=LEAST_KAPPA
    )
    return _cases(proximal, limits, structured)


def task_batches(
    *,
    min_tasks: int = 2,
    max_tasks: int = 5,
    min_dim: int = 1,
    max_dim: int = 6,
    max_kappa: float | None = None,
    dtype: torch.dtype = torch.float64,
    structured: bool = True,
) -> st.SearchStrategy[Case]:
    """Batches of tasks of unequal difficulty, for ``batched=True``: problems of any of the other strategies.

    The condition numbers of the tasks of one batch are spread evenly, on a logarithmic scale, from that of an easy task to one that
    is drawn up to ``max_kappa``; in any order. data, phi and grad have a leading task axis, the constants are tensors ``(tasks,)``,
    theta is shared. A batch shrinks to few tasks, all of them easy.

    Args:
        min_tasks, max_tasks: the number of tasks.
        min_dim, max_dim, max_kappa, dtype, structured: as in :func:`quadratic_problems`.

    Raises:
        ValueError: limits that contradict each other, or a condition number that the dtype cannot store.
    """
    check_count("min_tasks", min_tasks)
    check_count("max_tasks", max_tasks)
    if min_tasks > max_tasks:
        raise ValueError(f"expected min_tasks <= max_tasks, got min_tasks={min_tasks}, max_tasks={max_tasks}.")
    limits = Limits(
        min_dim=min_dim, max_dim=max_dim, min_kappa=1.0, max_kappa=max_kappa, dtype=dtype, least_kappa=LEAST_KAPPA
    )
    families = [quadratic, proximal, ridge, logistic, nonquadratic]
    return st.one_of([_cases(family, limits, structured, (min_tasks, max_tasks)) for family in families])
