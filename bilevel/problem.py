"""The vocabulary of the user: what a bilevel problem is.

    theta* = argmin_theta  L(phi*(theta), theta, data)        outer problem
    phi*(theta) = argmin_phi  G(phi, theta, data)             inner problem

Everything here is written for *one* task; the library applies it to a batch of tasks.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from bilevel.composition import Composition
from bilevel.constants import Constants
from bilevel.trees import Tree


class Split(NamedTuple):
    """G = remainder(phi, theta, data) + 1/2 (phi - c)^T K (phi - c), with K the known part of the inner Hessian.

    Attributes:
        remainder: (phi, theta, data) -> 0-d tensor.
        centre: theta -> c, a tree like phi.
    """

    remainder: Callable[..., Tensor]
    centre: Callable[..., Any]


class _OwnSignature:
    """The parameters of ``__init__``: :mod:`inspect`, and so ``help``, would show those of ``__new__``."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:  # that of its __call__
            raise AttributeError("__signature__")
        if owner.__init__ is object.__init__:  # type: ignore[misc]
            return inspect.Signature()
        whole = inspect.signature(owner.__init__)  # type: ignore[misc]
        return whole.replace(parameters=list(whole.parameters.values())[1:])


class BilevelProblem(ABC):
    """Two scalar functions of phi (inner variable), theta (outer variable) and data, and a start for the inner
    solve.
    """

    __signature__ = _OwnSignature()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Python's own words for an abstract class do not say that there are functions for this."""
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            lacks = " and ".join(missing)
            if ready := _constructors(cls):
                raise TypeError(f"{cls.__name__} is a base class: use {ready}, or write a subclass with {lacks}.")
            raise TypeError(
                f"{cls.__name__} lacks {lacks}: every problem has to define {'them' if missing[1:] else 'it'}."
            )
        if cls.__init__ is object.__init__ and (args or options) and super().__new__ is object.__new__:
            raise TypeError(
                f"{cls.__name__}() takes no arguments: it has no __init__."
            )  # Python's own check is off with a __new__
        make: Callable[..., Self] = super().__new__
        return make(cls) if make is object.__new__ else make(cls, *args, **options)

    @abstractmethod
    def inner_objective(self, phi: Tree, theta: Tree, data: Any) -> Tensor:
        """G(phi, theta, data), a 0-d tensor, twice differentiable."""

    @abstractmethod
    def outer_loss(self, phi: Tree, theta: Tree, data: Any) -> Tensor:
        """L(phi, theta, data), a 0-d tensor. May depend on theta directly, or not at all."""

    def initial_phi(self, theta: Tree, data: Any) -> Tree:
        """Where the inner solve starts. It also fixes the structure, shapes and dtype of phi."""
        raise ValueError(
            f"{type(self).__name__} has no initial_phi, so the library does not know the shape of phi: pass "
            f"init=, or define initial_phi(theta, data)."
        )

    constants: Constants | None = None
    """What is known of the problem, for :attr:`bilevel.Hypergradient.error_bound`."""

    quadratic: bool = False
    """State here that G is quadratic in phi, as in ridge regression: for any data and theta, d2G/dphi2 does not depend
    on phi. G is then linearised once for each call, and solvers work with the matrix. Where a solve ends, gradient and
    Hessian are compared with those of G; where they differ by more than rounding, the call raises ``ValueError``.
    """

    @property
    def constant_cross_norm(self) -> float | None:
        """The spectral norm of d2G/dphi dtheta where that is the same at every phi and known; else None."""
        return None

    # What a problem may know about its inner Hessian in closed form. Optional: `Identity()`, `GaussNewton()` and the
    # preconditioner of the linear solve need it.

    knows_curvature: bool = False
    """Whether part of the inner Hessian is known in closed form: the next two methods."""

    _curvature_is_missing: bool = False
    """Whether the regulariser is a subclass's own, and its curvature is not told; ``GaussNewton()`` needs that beside the composition."""

    curvature_scale: float | None = None
    """k where that part is k I. The library then works with whole vectors, without the two methods."""

    def curvature_product(self, v: Tree, theta: Tree) -> Tree:
        """(known part of the inner Hessian at theta) v, for a tree like phi."""
        raise NotImplementedError

    def curvature_inverse(self, v: Tree, theta: Tree, damping: float = 0.0) -> Tree:
        """(known part + damping I)^{-1} v, for a tree like phi."""
        raise NotImplementedError

    @property
    def composition(self) -> Composition | None:
        """G without the known part as a loss of a network's outputs, which ``GaussNewton()`` needs; None: not known."""
        return None

    @property
    def _composes_another(self) -> bool:
        """Whether ``composition`` is older than G: a subclass of the problem that has it has redefined what it is a part of."""
        at = self._definer("composition")
        names = [name for name in ("inner_objective", "train_loss") if hasattr(type(self), name)]
        # not of a mixin without a G; an attribute of the object itself may be what the composition is read from
        is_of_problem = at > 0 and issubclass(type(self).__mro__[at - 1], BilevelProblem)
        return is_of_problem and any(0 < self._definer(name) < at for name in names)

    def _definer(self, name: str) -> int:
        """How far from this object, along its bases, the method or property ``name`` is defined."""
        return next(i for i, where in enumerate((self, *type(self).__mro__)) if name in vars(where))

    @property
    def split(self) -> Split | None:
        """G as a remainder and the quadratic form of its known part, where it is such a sum; else None. The library
        then differentiates the remainder only.
        """
        return None

    @classmethod
    def from_functions(
        cls,
        inner_objective: Callable[..., Tensor],
        outer_loss: Callable[..., Tensor],
        initial_phi: Callable[..., Tree] | None = None,
        *,
        quadratic: bool = False,
    ) -> BilevelProblem:
        """A problem from functions of (phi, theta, data) and, for the start, of (theta, data).

        Args:
            inner_objective: G, 0-d.
            outer_loss: L, 0-d.
            initial_phi: the start, a tree like phi. Without it every call needs ``init=``.
            quadratic: :attr:`BilevelProblem.quadratic`.

        Raises:
            TypeError: a function does not take these arguments; or this is called of a subclass, whose methods it would
                leave out.
        """
        require_own(cls, BilevelProblem, "from_functions")
        problem = _FunctionProblem(inner_objective, outer_loss, initial_phi)
        problem.quadratic = quadratic
        return problem

    @classmethod
    def from_model(
        cls,
        predict: Callable[..., Tensor],
        output_loss: Callable[..., Tensor],
        outer_loss: Callable[..., Tensor],
        initial_phi: Callable[..., Tree] | None = None,
        *,
        penalty: Callable[..., Tensor] | None = None,
        quadratic: bool = False,
    ) -> BilevelProblem:
        """A problem with G = output_loss(predict(phi, theta, data), theta, data) + penalty(phi, theta, data).

        This form allows :class:`bilevel.curvature.GaussNewton` where theta is anything: penalties, weights of examples,
        a part of the network. Its matrix is J^T H_out J of the first term and the Hessian of the penalty, so it is
        positive semi-definite where ``output_loss`` is convex in the outputs (squared error, cross-entropy) and the
        penalty is convex in phi.

        Args:
            predict: the outputs, one tensor of any shape.
            output_loss: a function of (outputs, theta, data), 0-d.
            outer_loss: L, a function of (phi, theta, data), 0-d.
            initial_phi: the start, of (theta, data). Without it every call needs ``init=``.
            penalty: what of G is no function of the outputs, 0-d; None: nothing.
            quadratic: :attr:`BilevelProblem.quadratic`.

        Raises:
            TypeError: a function does not take these arguments; or this is called of a subclass, whose methods it would
                leave out.
        """
        require_own(cls, BilevelProblem, "from_model")
        require_functions_of("phi", "theta", "data", predict=predict)
        require_functions_of("outputs", "theta", "data", output_loss=output_loss)
        if penalty is not None:
            require_functions_of("phi", "theta", "data", penalty=penalty)
        problem = _ComposedProblem(Composition(predict, output_loss, penalty), outer_loss, initial_phi)
        problem.quadratic = quadratic
        return problem


def _constructors(cls: type) -> str:
    """The ready-made ways to a problem of this class, for a message."""
    return " or ".join(f"{cls.__name__}.{name}(...)" for name in vars(cls) if name.startswith("from_"))


def require_own(cls: type, base: type, name: str) -> None:
    """Refuse the constructor ``name`` of ``base`` where a subclass inherits it: the problem would lack what the
    subclass adds, such as a regulariser, and nothing would say so.
    """
    if cls is not base:
        use = _constructors(cls) or f"{cls.__name__}(...)"
        raise TypeError(
            f"{cls.__name__}.{name} would make a plain {base.__name__}, without what {cls.__name__} adds "
            f"(a regulariser, methods). Use {use}; for the plain one, {base.__name__}.{name}(...)."
        )


class _FunctionProblem(BilevelProblem):
    def __init__(
        self, inner: Callable[..., Tensor], outer: Callable[..., Tensor], initial: Callable[..., Tree] | None
    ) -> None:
        require_functions_of("phi", "theta", "data", inner_objective=inner, outer_loss=outer)
        if initial is not None:
            require_functions_of("theta", "data", initial_phi=initial)
        self._inner, self._outer, self._initial = inner, outer, initial

    def inner_objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self._inner(phi, theta, data)

    def outer_loss(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self._outer(phi, theta, data)

    def initial_phi(self, theta: Tree, data: Any = None) -> Tree:
        if self._initial is None:
            raise ValueError(
                "initial_phi: this problem was made without one, so the library does not know the shape of phi. Pass init=, a tree like "
                "phi, to the call; or initial_phi=, a function of (theta, data), where the problem is made."
            )
        return self._initial(theta, data)


class _ComposedProblem(_FunctionProblem):
    def __init__(self, composition: Composition, outer: Callable[..., Tensor], initial: Any) -> None:
        super().__init__(composition.objective, outer, initial)
        self._composition = composition

    @property
    def composition(self) -> Composition:
        return self._composition


def require_functions_of(*parameters: str, **functions: Any) -> None:
    """Refuse what is no function of so many arguments, by the name of the argument."""
    if torch.compiler.is_compiling():  # which cannot follow `inspect`, and would give up the caller's function
        return
    for name, fn in functions.items():
        wanted = f"{name}: expected a function of ({', '.join(parameters)})"
        if not callable(fn):
            raise TypeError(f"{wanted}, got {type(fn).__name__}.")
        try:
            # a decorator with functools.wraps shows the parameters of another function
            signature = inspect.signature(fn, follow_wrapped=False)
        except (TypeError, ValueError):  # of a function in C, or with a signature that is none
            continue
        try:
            signature.bind(*parameters)
        except TypeError:
            raise TypeError(f"{wanted}, got one of {signature}.") from None
