"""The exact solution and hypergradient, without autograd and without the solvers of the library.

The derivatives of each problem are written by hand, over NumPy. Newton's method in float64 finds the solution, and iterative refinement
makes it exact: residuals are evaluated in decimal arithmetic of 38 digits (``decimal``, from the standard library), corrections come
from a dense solve in float64. Each correction gains about 15 - log10(kappa) digits, until the result, rounded to float64 once at the
end, is right to its last digits also where kappa is 1e12: it is exact for the numbers as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

from bilevel.testing.strategies.draws import Array

DIGITS = 38
EXACT = 1e-20  # the last correction, relative to the solution


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """Of one problem at one theta. Every function works on float64 and on arrays of ``Decimal`` alike.

    Attributes:
        gradient: phi ``(d,)`` -> dG/dphi ``(d,)``.
        product: phi, v ``(d,)`` or ``(d, k)`` -> (d2G/dphi2) v.
        cross: phi, u ``(d,)`` -> (d2G/dphi dtheta)^T u ``(p,)``.
        outer: phi -> dL/dphi ``(d,)``, dL/dtheta ``(p,)`` or 0.
    """

    gradient: Callable[[Array], Array]
    product: Callable[[Array, Array], Array]
    cross: Callable[[Array, Array], Array]
    outer: Callable[[Array], tuple[Array, Array | int]]

    def hessian(self, phi: Array) -> Array:
        """d2G/dphi2 ``(d, d)``."""
        return self.product(phi, np.eye(len(phi)))


Arrays = dict[str, Array]
Derive = Callable[[Arrays], Derivatives]


def exact(derive: Derive, arrays: Arrays, d: int) -> tuple[Array, Array]:
    """phi ``(d,)`` and the hypergradient ``(p,)`` of a strongly convex inner problem, rounded to float64.

    Args:
        derive: makes the derivatives from arrays in either arithmetic.
        arrays: the numbers of the problem, float64 or integers.
        d: the dimension of phi.

    Raises:
        ArithmeticError: the refinement did not converge: the problem is too ill-conditioned for float64.
    """
    low = derive(arrays)
    start = _newton(low, np.zeros(d))
    with localcontext(prec=DIGITS):
        high = derive({name: extended(array) for name, array in arrays.items()})
        phi = _refine(lambda x: -high.gradient(x), lambda x: low.hessian(_rounded(x)), start)
        hessian = low.hessian(_rounded(phi))
        b, direct = high.outer(phi)
        u = _refine(lambda x: b - high.product(phi, x), lambda _: hessian, np.zeros(d))
        grad = direct - high.cross(phi, u)
        return _rounded(phi), _rounded(grad)


def _newton(of: Derivatives, phi: Array) -> Array:
    """Newton's method with backtracking on the norm of the gradient, down to its rounding floor."""
    g = of.gradient(phi)
    for _ in range(200):
        step = np.linalg.solve(of.hessian(phi), -g)
        for halvings in range(40):
            trial = phi + 0.5**halvings * step
            g_trial = of.gradient(trial)
            if np.linalg.norm(g_trial) <= (1 - 1e-4 * 0.5**halvings) * np.linalg.norm(g):
                break
        else:
            return phi
        phi, g = trial, g_trial
        if not g.any() or np.linalg.norm(step) <= 1e-8 * np.linalg.norm(phi):
            break
    return phi


def _refine(residual: Callable[[Array], Array], matrix: Callable[[Array], Array], start: Array) -> Array:
    """x <- x + A^{-1} r(x), with r in decimal arithmetic and A^{-1} in float64 (Wilkinson 1963; Higham 2002, section 12.1)."""
    x = extended(start)
    for _ in range(40):
        r = residual(x)
        size = max(abs(r))
        if size == 0:
            return x
        # r may lie below the range of float64
        step = extended(np.linalg.solve(matrix(x), _rounded(r / size))) * size
        x = x + step
        if max(abs(step)) <= Decimal(EXACT) * max(abs(x)):
            return x
    raise ArithmeticError("the exact solution was not found: the problem is too ill-conditioned for float64.")


def extended(array: Array) -> Array:
    """Floating numbers as ``Decimal``, exactly but for what 38 digits leave out. Integers stay as they are."""
    if array.dtype.kind != "f":
        return array
    numbers: list[Any] = [+Decimal(x) for x in array.ravel().tolist()]
    out = np.empty(len(numbers), dtype=object)
    out[:] = numbers
    return out.reshape(array.shape)


def _rounded(array: Array) -> Array:
    return array.astype(np.float64)
