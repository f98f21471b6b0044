"""The methods of ``scipy.optimize.minimize`` as inner solvers. SciPy is imported when one of them runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.checks import check_number, keep_python_numbers
from bilevel.curvature import Hessian
from bilevel.derivatives import Linearisation, Objective
from bilevel.linsys.base import norm
from bilevel.solvers.black_box import Answer, TaskByTask
from bilevel.solvers.line_search import not_above

# The methods by what they are given besides G, each with the options that switch off its own stopping tests.
_NO_GRADIENT: dict[str, dict[str, Any]] = {"nelder-mead": {}, "powell": {}, "cobyla": {}, "cobyqa": {}}
_GRADIENT: dict[str, dict[str, Any]] = {
    "cg": {"gtol": 0.0},
    "bfgs": {"gtol": 0.0},
    "l-bfgs-b": {"gtol": 0.0, "ftol": 0.0},
    "tnc": {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0, "maxfun": 15_000},
    "slsqp": {"ftol": 0.0, "maxiter": 1_000},
}
_PRODUCTS: dict[str, dict[str, Any]] = {
    "newton-cg": {"xtol": 0.0},
    "trust-ncg": {"gtol": 0.0},
    "trust-krylov": {"gtol": 0.0},
    "trust-constr": {"gtol": 0.0, "xtol": 0.0},
}
_MATRIX: dict[str, dict[str, Any]] = {"dogleg": {"gtol": 0.0}, "trust-exact": {"gtol": 0.0}}
_OPTIONS = {**_NO_GRADIENT, **_GRADIENT, **_PRODUCTS, **_MATRIX}


@dataclass(frozen=True, kw_only=True)
class ScipyMinimize(TaskByTask):
    """A method of ``scipy.optimize.minimize``: one task at a time, on the CPU, in float64.

    G and its derivatives are evaluated where the problem lives and in its dtype, and handed over as float64. Methods that use second
    derivatives get products with the Hessian (``Newton-CG``, ``trust-ncg``, ``trust-krylov``, ``trust-constr``) or the whole matrix
    (``dogleg``, ``trust-exact``). A method that uses gradients is stopped at the first point with ``|dG/dphi| <= tol``; its own
    stopping tests are switched off as far as SciPy allows it. One that uses none (``Nelder-Mead``, ..) gets ``tol`` as SciPy's.

    The status comes from the gradient that is measured at the answer, not from SciPy. What SciPy says of a task that it gives up goes
    to the log as a warning. ``steps`` are evaluations of G, those in line searches included.

    Args:
        method: a method of ``scipy.optimize.minimize``, by its name there.
        tol: stop a problem where ``|dG/dphi| <= tol``.
        options: SciPy's options for the method, for example ``{"maxiter": 50}``.

    Raises:
        ImportError: at use, SciPy is not installed.
        TypeError, ValueError: there is no such method; at use, the method has no such option. What the problem's functions raise
            reaches the caller.
    """

    method: str = "L-BFGS-B"
    tol: float = 1e-6
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method.lower() not in _OPTIONS:
            raise ValueError(f"method: expected one of {', '.join(_OPTIONS)}, got {self.method!r}.")
        check_number("tol", self.tol)
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options: expected a dict of SciPy's options, got {type(self.options).__name__}.")
        object.__setattr__(self, "options", dict(self.options))  # what the caller does to theirs later is not ours
        keep_python_numbers(self)

    def find(self, objective: Objective, phi: Tensor) -> Answer:
        optimize = _scipy_optimize()
        calls = _Calls(objective, phi, self.tol)
        start = calls.size(phi) if calls.is_defined(phi) else torch.nan
        if not self.tol < start < torch.inf:  # nothing to do, or nothing that can be done
            return Answer(phi, 0, start)
        try:
            found, message = self._minimize(optimize, calls, phi)
        except _Reached as reached:
            return Answer(reached.phi, calls.evaluations, start)
        size = calls.size(found)
        note = (
            ""
            if size <= self.tol
            else f"|dG/dphi| = {size:.1e} after {calls.evaluations} evaluations. SciPy: {message}"
        )
        return Answer(found, calls.evaluations, start, note)

    def _minimize(self, optimize: Any, calls: _Calls, phi: Tensor) -> tuple[Tensor, str]:
        """SciPy's answer, and what it says of it."""
        name = self.method.lower()
        arguments: dict[str, Any] = {"fun": calls.value_and_grad, "jac": True}
        if name in _NO_GRADIENT:
            arguments = {"fun": calls.value, "tol": self.tol}
        elif name in _PRODUCTS:
            arguments["hessp"] = calls.hessian_product
        elif name in _MATRIX:
            arguments["hess"] = calls.hessian
        options = {**_OPTIONS[name], **self.options}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"scipy\.")  # overflow in a trial
                warnings.filterwarnings("error", "Unknown solver options", optimize.OptimizeWarning)
                found = optimize.minimize(x0=_array(phi), method=self.method, options=options, **arguments)
        except optimize.OptimizeWarning as error:
            raise ValueError(f"options: {self.method} of SciPy says: {error}.") from None
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            # some methods cannot go on where G is not finite; all other errors are the caller's
            if error is calls.error or not calls.met_non_finite:
                raise
            return calls.lowest, str(error)
        defined = np.isfinite(found.fun) or not calls.found_any
        return calls.tensor(found.x) if defined else calls.lowest, str(found.message)


def _scipy_optimize() -> Any:
    try:
        import scipy.optimize
    except ImportError as error:
        raise ImportError("ScipyMinimize needs SciPy. Install it with: pip install scipy") from error
    return scipy.optimize


def _array(x: Tensor) -> Any:
    return x.double().numpy(force=True)


class _Reached(Exception):
    """The gradient is small enough at phi: one way out of every method."""

    def __init__(self, phi: Tensor) -> None:
        super().__init__()
        self.phi = phi


class _Calls:
    """G of one task as SciPy wants it: functions of float64 arrays ``(d,)``.

    Attributes:
        evaluations: of G.
        lowest: the point with the lowest G so far.
        met_non_finite: whether G or a derivative was NaN or infinite somewhere.
        error: what the problem's functions raised.
    """

    def __init__(self, objective: Objective, phi: Tensor, tol: float) -> None:
        self._objective, self._phi, self._tol = objective, phi, tol
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._linearised: tuple[Any, Linearisation] | None = None
        self._value = torch.inf
        self.evaluations = 0
        self.lowest = phi
        self.met_non_finite = False
        self.error: Exception | None = None

    @property
    def found_any(self) -> bool:
        """Whether G was a number somewhere."""
        return self._value < torch.inf

    def tensor(self, x: Any) -> Tensor:
        return torch.tensor(x, device="cpu").to(self._phi)

    def size(self, phi: Tensor) -> float:
        """``|dG/dphi|``."""
        return norm(self._measured(phi)[1]).item()

    def is_defined(self, phi: Tensor) -> bool:
        """Whether G is a number there."""
        return bool(self._measured(phi)[0].isfinite())

    def value(self, x: Any) -> float:
        phi = self.tensor(x)
        with self._users():
            value = self._objective.value(phi)
        return self._seen(phi, value)

    def value_and_grad(self, x: Any) -> tuple[float, Any]:
        phi = self.tensor(x)
        with self._users():
            value, grad = self._measured(phi)
        lowest = value.new_tensor(self._value)
        seen = self._seen(phi, value, grad)
        # a trial that SciPy is about to reject may lie on a plateau uphill
        if value.isfinite() and norm(grad) <= self._tol and not_above(value, lowest):
            raise _Reached(phi)
        return seen, _array(grad)

    def hessian_product(self, x: Any, v: Any) -> Any:
        return self._products(x, self.tensor(v))

    def hessian(self, x: Any) -> Any:
        return self._products(x, torch.eye(len(x), device="cpu").to(self._phi))

    def _measured(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """G and its gradient; the last of them is kept, because the start and the end of a run are wanted twice."""
        if self._last is None or not torch.equal(self._last[0], phi):
            self._last = (phi, *self._objective.value_and_grad(phi))
        return self._last[1:]

    def _products(self, x: Any, v: Tensor) -> Any:
        """Products with the Hessian at x, on a graph that is kept until they are wanted elsewhere."""
        with self._users():
            if self._linearised is None or not np.array_equal(self._linearised[0], x):
                self._linearised = (np.copy(x), self._objective.linearise(self.tensor(x), Hessian(), 0.0))
            products = self._linearised[1].matvec(v)
        self.met_non_finite |= not bool(products.isfinite().all())
        return _array(products)

    def _seen(self, phi: Tensor, *numbers: Tensor) -> float:
        self.evaluations += 1
        self.met_non_finite |= not all(bool(number.isfinite().all()) for number in numbers)
        value = numbers[0].item()
        if value < self._value:
            self._value, self.lowest = value, phi
        return value

    @contextmanager
    def _users(self) -> Iterator[None]:
        """Around the problem's own functions: what they raise is remembered."""
        try:
            yield
        except Exception as error:
            self.error = error
            raise
