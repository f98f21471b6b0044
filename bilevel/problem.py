"""The vocabulary of the user: what a bilevel problem is.

    theta* = argmin_theta  L(phi*(theta), theta, data)        outer problem
    phi*(theta) = argmin_phi  G(phi, theta, data)             inner problem

Everything here is written for *one* task; the library applies it to a batch of tasks.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.trees import Tree, flatten, layout_of, tree_map, unflatten

Loss = Callable[[Tree, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is known of a problem, for rigorous error bounds (paper, Assumption 2). State what you know; None is unknown.

    Each is a number that holds for every task, or a tensor ``(tasks,)`` with one for each. A bound is as true as they are. *Between the
    points* means: on the line from phi, where the hypergradient is taken, to the exact inner solution. What holds everywhere holds there.

    Attributes:
        mu: at most the smallest eigenvalue of d2G/dphi2 at phi, > 0. For a proximal problem whose training loss is convex: lam.
        rho: Lipschitz constant, in phi, of d2G/dphi2 and of d2G/dphi dtheta between the points (without ``everywhere``: as far as
            ``2 |dG/dphi| / mu`` around phi). 0 where G is quadratic in (phi, theta).
        B: at least ``|dL/dphi|`` between the points. Not needed; may sharpen the bound of a proximal problem.
        L: Lipschitz constant, in phi, of the gradient of the outer loss (with respect to phi and theta) between the points.
        C: at least the spectral norm of d2G/dphi dtheta at phi. A proximal problem knows it: the largest eigenvalue of Lambda.
        everywhere: mu holds between the points too. The bound is then sharper and needs no condition.
    """

    mu: float | Tensor | None = None
    rho: float | Tensor | None = None
    B: float | Tensor | None = None
    L: float | Tensor | None = None
    C: float | Tensor | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real | Tensor):
                raise TypeError(f"Constants: {field.name}: expected a number, got {type(value).__name__} {value!r}.")
            numbers = torch.as_tensor(value)
            if not bool(
                ((numbers > 0) if field.name == "mu" else (numbers >= 0)).logical_and(numbers.isfinite()).all()
            ):
                raise ValueError(
                    f"Constants: {field.name}: expected {'a positive number' if field.name == 'mu' else 'a number >= 0'}, got {value!r}."
                )


@dataclass(frozen=True)
class Composition:
    """An inner objective that is a loss of a network's outputs, and a rest: the parts of :meth:`BilevelProblem.from_model`.

    Attributes:
        predict: (phi, theta, data) -> outputs, one tensor.
        output_loss: (outputs, theta, data) -> 0-d tensor.
        penalty: (phi, theta, data) -> 0-d tensor, the rest of G apart from what the problem knows in closed form; None: nothing.
    """

    predict: Callable[..., Tensor]
    output_loss: Callable[..., Tensor]
    penalty: Callable[..., Tensor] | None = None

    def objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        """The sum."""
        value = self.output_loss(self.predict(phi, theta, data), theta, data)
        return value if self.penalty is None else value + self.penalty(phi, theta, data)


@dataclass(frozen=True)
class ModelLoss:
    """A training loss of (phi, data) that remembers the model that it is made of: output_loss(predict(phi, data), data).

    Attributes:
        predict: (phi, data) -> outputs, one tensor.
        output_loss: (outputs, data) -> 0-d tensor.
    """

    predict: Loss
    output_loss: Loss

    def __call__(self, phi: Tree, data: Any) -> Tensor:
        return self.output_loss(self.predict(phi, data), data)

    @property
    def composition(self) -> Composition:
        """The same as a part of G, which theta does not enter."""
        return Composition(
            lambda phi, theta, data: self.predict(phi, data),
            lambda outputs, theta, data: self.output_loss(outputs, data),
        )


def composition_of(train_loss: Loss) -> Composition | None:
    """What a training loss is made of, where it remembers that."""
    return train_loss.composition if isinstance(train_loss, ModelLoss) else None


class Split(NamedTuple):
    """G = remainder(phi, theta, data) + 1/2 (phi - c)^T K (phi - c), with c = centre(theta) and K the known part of the inner Hessian.

    Attributes:
        remainder: (phi, theta, data) -> 0-d tensor.
        centre: theta -> a tree like phi.
    """

    remainder: Callable[[Tree, Tree, Any], Tensor]
    centre: Callable[[Tree], Tree]


class BilevelProblem(ABC):
    """Two scalar functions of phi (inner variable), theta (outer variable) and data, and a start for the inner
    solve.
    """

    def __new__(cls, *_args: Any, **_options: Any) -> Self:
        """Python's own words for an abstract class do not say that there are functions for this."""
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            ready = _constructors(cls)
            raise TypeError(
                f"{cls.__name__} is a base class: {f'use {ready}, or ' if ready else ''}write a subclass with {' and '.join(missing)}."
            )
        return super().__new__(cls)

    @abstractmethod
    def inner_objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        """G(phi, theta, data), a 0-d tensor, twice differentiable."""

    @abstractmethod
    def outer_loss(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        """L(phi, theta, data), a 0-d tensor. May depend on theta directly, or not at all."""

    def initial_phi(self, theta: Tree, data: Any = None) -> Tree:
        """Where the inner solve starts. It also fixes the structure, shapes and dtype of phi."""
        raise ValueError(
            f"{type(self).__name__} has no initial_phi, so the library does not know the shape of phi: pass "
            f"init=, or define initial_phi(theta, data)."
        )

    constants: Constants | None = None
    """What is known of the problem, for :attr:`bilevel.Hypergradient.error_bound`."""

    quadratic: bool = False
    """State here that G is quadratic in phi, as in ridge regression: for any data and theta, d2G/dphi2 does not depend on phi. G is then
    linearised once for each call, and solvers work with the matrix. Where a solve ends, gradient and Hessian are compared with those of
    G; where they differ by more than rounding, the call raises ``ValueError``."""

    @property
    def constant_cross_norm(self) -> float | None:
        """The spectral norm of d2G/dphi dtheta where that is the same at every phi and known; else None."""
        return None

    # What a problem may know about its inner Hessian in closed form. Optional: `Identity()`, `GaussNewton()` and the
    # preconditioner of the linear solve need it.

    knows_curvature: bool = False
    """Whether part of the inner Hessian is known in closed form: the next two methods."""

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
        """G, apart from the known part, as a loss of a network's outputs, which ``GaussNewton()`` needs; None: not known."""
        return None

    @property
    def split(self) -> Split | None:
        """G as a remainder and the quadratic form of its known part, where it is such a sum; else None. The library then differentiates
        the remainder only.
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
            TypeError: a function does not take these arguments; or this is called of a subclass, whose methods it would leave out.
        """
        _require_own(cls, BilevelProblem, "from_functions")
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
        """A problem with G(phi, theta, data) = output_loss(predict(phi, theta, data), theta, data) + penalty(phi, theta, data).

        This form allows :class:`bilevel.curvature.GaussNewton` where theta is anything: penalties, weights of examples, a part of the
        network. Its matrix is J^T H_out J of the first term and the Hessian of the penalty, so it is positive semi-definite where
        ``output_loss`` is convex in the outputs (squared error, cross-entropy) and the penalty is convex in phi.

        Args:
            predict: the outputs, one tensor of any shape.
            output_loss: a function of (outputs, theta, data), 0-d.
            outer_loss: L, a function of (phi, theta, data), 0-d.
            initial_phi: the start, of (theta, data). Without it every call needs ``init=``.
            penalty: what of G is no function of the outputs, 0-d; None: nothing.
            quadratic: :attr:`BilevelProblem.quadratic`.

        Raises:
            TypeError: a function does not take these arguments; or this is called of a subclass, whose methods it would leave out.
        """
        _require_own(cls, BilevelProblem, "from_model")
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


def _require_own(cls: type, base: type, name: str) -> None:
    """Refuse the constructor ``name`` of ``base`` where a subclass inherits it: the problem would lack what the subclass adds, such as a
    regulariser, and nothing would say so.
    """
    if cls is not base:
        use = _constructors(cls) or f"{cls.__name__}(...)"
        raise TypeError(
            f"{cls.__name__}.{name} would make a plain {base.__name__}, without what {cls.__name__} adds (a regulariser, methods). Use "
            f"{use}; for the plain one, {base.__name__}.{name}(...)."
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
        return super().initial_phi(theta, data) if self._initial is None else self._initial(theta, data)


class _ComposedProblem(_FunctionProblem):
    def __init__(self, composition: Composition, outer: Callable[..., Tensor], initial: Any) -> None:
        super().__init__(composition.objective, outer, initial)
        self._composition = composition

    @property
    def composition(self) -> Composition:
        return self._composition


class ProximalProblem(BilevelProblem):
    """The problem of iMAML (Eqs. 3 and 4): G = train_loss(phi) + 1/2 (phi - theta)^T Lambda (phi - theta), L = test_loss(phi).

    theta is the proximal centre and the start of the inner solve; phi has the structure and shapes of theta.

    Args:
        lam: Lambda. A positive number or 0-d tensor; a tree of these like theta (one per leaf); a tree of tensors like
            theta
            (diagonal); or a symmetric positive definite matrix ``(d, d)`` in ravel order (leaves by sorted key).

    Raises:
        TypeError: lam is no number or floating tensor, or requires grad.
        ValueError: lam is not positive (definite), or (at use) does not match theta.
    """

    knows_curvature = True

    def __init__(self, lam: Any) -> None:
        self.lam = tree_map(_as_weight, lam)
        # A square matrix may be Lambda in full or, for a theta of that shape, its diagonal: theta decides, at use.
        self._square = isinstance(self.lam, Tensor) and self.lam.ndim == 2 and self.lam.shape[0] == self.lam.shape[1]
        self._checked_matrix = False
        self._inverses: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._positive = all(
            bool(((weights := torch.as_tensor(leaf)) > 0).logical_and(weights.isfinite()).all())
            for leaf in flatten(self.lam)[0]
        )
        if not self._positive and not (self._square and is_positive_definite(self.lam)):
            raise ValueError(
                f"lam: expected positive numbers or a symmetric positive definite matrix, got {described(self.lam)}."
            )

    def train_loss(self, phi: Tree, data: Any) -> Tensor:
        """The training loss of one task, a 0-d tensor. A subclass defines this method, or the property ``composition`` (whose functions
        must then leave theta alone: they get None here).
        """
        if self.composition is None:
            raise NotImplementedError(f"{type(self).__name__} must define train_loss(phi, data).")
        return self.composition.objective(phi, None, data)

    @abstractmethod
    def test_loss(self, phi: Tree, data: Any) -> Tensor:
        """The test loss of one task, a 0-d tensor."""

    def inner_objective(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self.train_loss(phi, data) + self.regulariser(phi, theta)

    @property
    def split(self) -> Split | None:
        for name in ("inner_objective", "regulariser"):
            if getattr(type(self), name) is not getattr(ProximalProblem, name):
                return None  # a subclass has another G
        return Split(lambda phi, theta, data: self.train_loss(phi, data), lambda theta: theta)

    def outer_loss(self, phi: Tree, theta: Tree, data: Any = None) -> Tensor:
        return self.test_loss(phi, data)

    def initial_phi(self, theta: Tree, data: Any = None) -> Tree:
        return tree_map(torch.clone, theta)

    def regulariser(self, phi: Tree, theta: Tree) -> Tensor:
        """1/2 (phi - theta)^T Lambda (phi - theta)."""
        step = tree_map(torch.sub, phi, theta)
        if self._is_matrix_for(step):
            terms = [torch.sum(a * b) for a, b in self._pairs(self.curvature_product(step), step)]
        else:  # numbers outside the sum, for they then cost nothing
            terms = [
                lam * s.square().sum() if isinstance(lam, float) else (_like(s, lam) * s.square()).sum()
                for s, lam in self._pairs(step, self._per_leaf(step))
            ]
        return 0.5 * (terms[0] if len(terms) == 1 else torch.stack(terms).sum())

    @staticmethod
    def _pairs(a: Tree, b: Tree) -> Iterable[tuple[Any, Any]]:
        return zip(flatten(a)[0], flatten(b)[0], strict=True)

    @property
    def constant_cross_norm(self) -> float:
        """The largest eigenvalue of Lambda: the cross derivative is -Lambda."""
        leaves = [torch.as_tensor(leaf, dtype=torch.float64) for leaf in flatten(self.lam)[0]]
        if not self._square:
            return max(float(leaf.max()) for leaf in leaves)
        in_full = float(torch.linalg.eigvalsh(leaves[0])[-1])
        return max(in_full, float(leaves[0].max())) if self._positive else in_full  # or a diagonal: theta decides

    @property
    def curvature_scale(self) -> float | None:  # type: ignore[override]  # lam decides
        return self.lam if isinstance(self.lam, float) else None

    def curvature_product(self, v: Tree, theta: Tree = None) -> Tree:
        if self._is_matrix_for(v):
            return self._through_vector(lambda x: _like(x, self.lam) @ x, v)
        return tree_map(lambda x, lam: _like(x, lam) * x, v, self._per_leaf(v))

    def curvature_inverse(self, v: Tree, theta: Tree = None, damping: float = 0.0) -> Tree:
        if self._is_matrix_for(v):
            return self._through_vector(lambda x: self._inverse(x, damping) @ x, v)
        return tree_map(lambda x, lam: x / (_like(x, lam) + damping), v, self._per_leaf(v))

    def _inverse(self, x: Tensor, damping: float) -> Tensor:
        key = (damping, x.dtype, x.device)
        if key not in self._inverses:
            eye = torch.eye(len(self.lam), dtype=self.lam.dtype, device=self.lam.device)
            self._inverses[key] = _like(x, torch.cholesky_inverse(torch.linalg.cholesky(self.lam + damping * eye)))
        return self._inverses[key]

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

    def _per_leaf(self, v: Tree) -> Tree:
        leaves, structure = flatten(v)
        if isinstance(self.lam, float):
            return unflatten(structure, [self.lam] * len(leaves))
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
        return self.lam

    @classmethod
    def from_losses(cls, train_loss: Loss, test_loss: Loss, lam: Any, *, quadratic: bool = False) -> ProximalProblem:
        """A proximal problem from two functions of (phi, data).

        Args:
            train_loss, test_loss: of one task, 0-d.
            lam: Lambda, as in :class:`ProximalProblem`.
            quadratic: the training loss is quadratic in phi, and so G is: :attr:`BilevelProblem.quadratic`.

        Raises:
            TypeError, ValueError: a loss is no function of (phi, data), or lam as in :class:`ProximalProblem`; or (TypeError) this is
                called of a subclass, whose methods it would leave out.
        """
        _require_own(cls, ProximalProblem, "from_losses")
        require_functions_of("phi", "data", train_loss=train_loss, test_loss=test_loss)
        problem = _LossesProblem(train_loss, test_loss, lam)
        problem.quadratic = quadratic
        return problem

    @classmethod
    def from_model(  # type: ignore[override]  # another kind of problem, another signature
        cls, predict: Loss, output_loss: Loss, test_loss: Loss, lam: Any, *, quadratic: bool = False
    ) -> ProximalProblem:
        """A proximal problem with train_loss(phi, data) = output_loss(predict(phi, data), data).

        This form allows :class:`bilevel.curvature.GaussNewton`.

        Args:
            predict: the outputs, a function of (phi, data): one tensor of any shape.
            output_loss: a function of (outputs, data), 0-d.
            test_loss: a function of (phi, data), 0-d.
            lam, quadratic: as in :meth:`from_losses`.

        Raises:
            TypeError, ValueError: as in :meth:`from_losses`.
        """
        _require_own(cls, ProximalProblem, "from_model")
        require_functions_of("phi", "data", predict=predict, test_loss=test_loss)
        require_functions_of("outputs", "data", output_loss=output_loss)
        return cls.from_losses(ModelLoss(predict, output_loss), test_loss, lam, quadratic=quadratic)


class _LossesProblem(ProximalProblem):
    def __init__(self, train_loss: Loss, test_loss: Loss, lam: Any) -> None:
        super().__init__(lam)
        self._train_loss, self._test_loss = train_loss, test_loss

    @property
    def composition(self) -> Composition | None:
        return composition_of(self._train_loss)

    def train_loss(self, phi: Tree, data: Any) -> Tensor:
        return self._train_loss(phi, data)

    def test_loss(self, phi: Tree, data: Any) -> Tensor:
        return self._test_loss(phi, data)


def _as_weight(lam: Any) -> float | Tensor:
    """A number as a Python float, so that it takes the dtype and device of what it multiplies; a tensor as a copy."""
    if isinstance(lam, Tensor):
        if lam.requires_grad:
            raise TypeError(
                "lam: got a tensor that requires grad, and no gradient would reach it. To learn lam, use "
                "LearnedProximalProblem; to keep it fixed, pass lam.detach()."
            )
        if lam.is_floating_point():
            return float(lam) if lam.ndim == 0 else lam.clone()
    elif isinstance(lam, Real) and not isinstance(lam, bool):
        return float(lam)
    raise TypeError(f"lam: expected positive numbers or real floating tensors, got {type(lam).__name__} {lam!r}.")


def is_positive_definite(matrix: Tensor) -> bool:
    """Whether the matrix ``(d, d)`` is symmetric positive definite."""
    return not _fault(matrix)


def _fault(matrix: Tensor) -> str:
    """What keeps a square matrix from being symmetric positive definite; nothing: "". In NumPy: what PyTorch records must not see it."""
    plain = matrix.detach().cpu()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    numbers = np.array(plain.tolist()) if transformed else plain.numpy()  # below torch.func it has no memory to look at
    if not np.isfinite(numbers).all():
        return "has entries that are no numbers"
    if not np.allclose(numbers, numbers.swapaxes(-1, -2)):
        return "is not symmetric"
    smallest = np.linalg.eigvalsh(numbers).min(initial=np.inf)
    return "" if smallest > 0 else f"has the eigenvalue {smallest:.3g}"


def described(lam: Any) -> str:
    """For a message: no pages of numbers."""
    if isinstance(lam, Tensor) and lam.ndim == 2 and lam.shape[0] == lam.shape[1] and (fault := _fault(lam)):
        return f"a {tuple(lam.shape)} matrix that {fault}"
    return repr(lam)


def _like(x: Tensor, lam: float | Tensor) -> Any:
    return lam.to(dtype=x.dtype, device=x.device) if isinstance(lam, Tensor) else lam


def require_functions_of(*parameters: str, **functions: Any) -> None:
    """Refuse what is no function of so many arguments, by the name of the argument."""
    if torch.compiler.is_compiling():  # which cannot follow `inspect`, and would give up the caller's function
        return
    for name, fn in functions.items():
        wanted = f"{name}: expected a function of ({', '.join(parameters)})"
        if not callable(fn):
            raise TypeError(f"{wanted}, got {type(fn).__name__}.")
        try:
            signature = inspect.signature(fn)
        except ValueError:  # of a function in C
            continue
        try:
            signature.bind(*parameters)
        except TypeError:
            raise TypeError(f"{wanted}, got one of {signature}.") from None
