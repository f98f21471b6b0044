"""The only list of problems, inner solvers and linear solvers: a row added here is tested everywhere.

Every problem has a closed form that is written without our library (``torch.linalg.inv``, which is right under every
transform). The problems are chosen so that the likely bug shows: phi and theta of different sizes and structures,
leaves coupled through H, a cross derivative that is not symmetric, data that are not zero, an outer loss that depends
on theta directly, a third derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel import linsys, solvers
from bilevel.regularisation import Matrix
from bilevel.trees import flatten, unflatten


@dataclass(frozen=True)
class Case:
    """A problem with its closed form.

    ``theta``, ``data``: an instance. ``phi_star(theta, data)``: the exact inner solution, a tree. ``lipschitz``: at
    least the largest eigenvalue of the inner Hessian near the solution.
    """

    name: str
    problem: bilevel.BilevelProblem
    theta: Any
    data: Any
    phi_star: Callable[[Any, Any], Any]
    lipschitz: float

    def outer(self, theta: Any, data: Any) -> Tensor:
        """F(theta) = L(phi*(theta), theta), by the closed form."""
        return self.problem.outer_loss(self.phi_star(theta, data), theta, data)

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another precision."""

        return replace(self, theta=_cast(self.theta, dtype), data=_cast(self.data, dtype))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    leaves, spec = flatten(tree)
    return unflatten(spec, [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves])


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _spd(seed: int, d: int, low: float, high: float) -> Tensor:
    q = torch.linalg.qr(_normal(seed, d, d)).Q
    return q @ torch.diag(torch.linspace(low, high, d, dtype=torch.float64)) @ q.T


def ridge() -> Case:
    """One log-penalty per feature; X, y and the validation data are data. The outer loss knows theta directly."""

    def inner(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        x, y = data["train"]
        return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * (theta.exp() * w**2).sum()

    def outer(w: Tensor, theta: Tensor, data: Any) -> Tensor:
        x, y = data["valid"]
        return 0.5 * ((x @ w - y) ** 2).sum() + 0.1 * (theta**3).sum()

    def phi_star(theta: Tensor, data: Any) -> Tensor:
        x, y = data["train"]
        return torch.linalg.inv(x.mT @ x + torch.diag_embed(theta.exp())) @ (x.mT @ y)

    data = {"train": (_normal(1, 9, 4), _normal(2, 9)), "valid": (_normal(3, 5, 4), _normal(4, 5)), "tag": "ridge"}
    problem = bilevel.BilevelProblem.from_functions(
        inner, outer, lambda theta, data: torch.ones_like(data["train"][0][0])
    )
    return Case("ridge", problem, 0.3 * _normal(5, 4), data, phi_star, 30.0)


def coupled() -> Case:
    """phi: 6 numbers in a dict with a list; theta: 4 numbers in a tuple with a dict; H couples the leaves; C is 6
    x 4.
    """
    a, c, d = _spd(11, 6, 0.5, 4.0), _normal(12, 6, 4), _normal(13, 4, 6)

    def vector(theta: Any) -> Tensor:
        return torch.cat([theta[0], theta[1]["s"].reshape(1)])

    def flat(phi: Any) -> Tensor:
        return torch.cat([phi["a"][0].reshape(-1), phi["b"]])

    def inner(phi: Any, theta: Any, data: Any) -> Tensor:
        x = flat(phi)
        return 0.5 * x @ (a.to(x) @ x) - x @ (c.to(x) @ vector(theta) + data["shift"] * data["scale"])

    def outer(phi: Any, theta: Any, data: Any) -> Tensor:
        x, t = flat(phi), vector(theta)
        return 0.5 * ((x - data["target"]) ** 2).sum() + t @ (d.to(x) @ x) + torch.sin(t).sum()

    def phi_star(theta: Any, data: Any) -> Any:
        t = vector(theta)
        x = torch.linalg.inv(a.to(t)) @ (c.to(t) @ t + data["shift"] * data["scale"])
        return {"b": x[4:], "a": [x[:4].reshape(2, 2)]}

    def start(theta: Any, data: Any) -> Any:
        zero = 0 * data["shift"]
        return {"b": zero[4:], "a": [zero[:4].reshape(2, 2)]}

    theta = (_normal(14, 3), {"s": _normal(15, 1)[0]})
    data = {"shift": _normal(16, 6), "target": _normal(17, 6), "scale": 1.5}
    return Case("coupled", bilevel.BilevelProblem.from_functions(inner, outer, start), theta, data, phi_star, 4.0)


def proximal() -> Case:
    """Least squares with a proximal term, one lambda per leaf: iMAML's problem in closed form. Labels are carried
    as int64 data.
    """
    lam = {"w": 0.7, "b": 2.0}

    def residual(phi: Any, part: Any) -> Tensor:
        x, label = part
        return x @ phi["w"] + phi["b"] - torch.eye(2, dtype=x.dtype, device=x.device)[label]

    problem = bilevel.ProximalProblem.from_model(
        lambda phi, data: residual(phi, data["train"]),
        lambda outputs, data: 0.5 * (outputs**2).sum(),
        lambda phi, data: 0.5 * (residual(phi, data["test"]) ** 2).sum() + (phi["w"] ** 3).sum(),
        lam,
    )

    def phi_star(theta: Any, data: Any) -> Any:
        x, label = data["train"]
        ones = torch.ones_like(x[:, :1])
        z, y = torch.cat([x, ones], 1), torch.eye(2, dtype=x.dtype, device=x.device)[label]
        weights = torch.tensor([lam["w"]] * 3 + [lam["b"]], dtype=x.dtype, device=x.device)
        centre = torch.cat([theta["w"], theta["b"][None]])
        w = torch.linalg.inv(z.mT @ z + torch.diag(weights)) @ (z.mT @ y + weights[:, None] * centre)
        return {"w": w[:3], "b": w[3]}

    theta = {"w": _normal(21, 3, 2), "b": _normal(22, 2)}
    data = {
        "train": (_normal(23, 7, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0])),
        "test": (_normal(24, 5, 3), torch.tensor([1, 0, 1, 1, 0])),
    }
    return Case("proximal", problem, theta, data, phi_star, 30.0)


def exponential() -> Case:
    """G = sum exp(phi) - phi^T M theta with a positive 4 x 3 matrix M: phi* = log(M theta). Not quadratic; the
    third derivative counts.
    """

    def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return phi.exp().sum() - phi @ (data @ theta)

    def outer(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return (phi**2).sum() + 0.5 * phi[0] * phi[2] * theta[1]

    problem = bilevel.BilevelProblem.from_functions(inner, outer, lambda theta, data: 0 * (data @ theta))
    data = 0.3 + torch.rand(4, 3, generator=torch.Generator().manual_seed(31), dtype=torch.float64)
    theta = 0.5 + torch.rand(3, generator=torch.Generator().manual_seed(32), dtype=torch.float64)
    return Case("exponential", problem, theta, data, lambda theta, data: torch.log(data @ theta), 8.0)


def learned() -> Case:
    """Least squares with a learned regulariser, Lambda = L D L^T in full: theta is the centre and the raw parameter. d2G/dphi dtheta
    depends on phi; what stands above the diagonal of the raw matrix does not enter.
    """

    def residual(phi: Any, part: Any) -> Tensor:
        x, y = part
        return x @ phi["w"] + phi["b"] - y

    problem = bilevel.LearnedProximalProblem.from_model(
        lambda phi, data: residual(phi, data["train"]),
        lambda outputs, data: 0.5 * (outputs**2).sum(),
        lambda phi, data: 0.5 * (residual(phi, data["test"]) ** 2).sum() + (phi["w"] ** 3).sum() + phi["b"],
        Matrix(),
    )

    def phi_star(theta: Any, data: Any) -> Any:
        x, y = data["train"]
        z = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        raw = theta["lam"]
        lower = raw.tril(-1) + torch.eye(4, dtype=x.dtype, device=x.device)
        lam = lower @ torch.diag(torch.diagonal(raw).exp()) @ lower.mT
        centre = torch.cat([theta["centre"]["b"][None], theta["centre"]["w"]])
        phi = torch.linalg.inv(z.mT @ z + lam) @ (z.mT @ y + lam @ centre)
        return {"w": phi[1:], "b": phi[0]}

    theta = {"lam": 0.5 * _normal(41, 4, 4), "centre": {"w": _normal(42, 3), "b": _normal(43, 1)[0]}}
    data = {"train": (_normal(44, 7, 3), _normal(45, 7)), "test": (_normal(46, 5, 3), _normal(47, 5))}
    return Case("learned", problem, theta, data, phi_star, 30.0)


def quadratic() -> Case:
    """Ridge regression that says what it is. H and d2G/dphi dtheta depend on theta, and the latter on phi."""
    case = ridge()
    case.problem.quadratic = True
    return replace(case, name="quadratic")


PROBLEMS: list[Case] = [ridge(), coupled(), proximal(), exponential(), learned(), quadratic()]


def inner_solvers(case: Case, tol: float) -> dict[str, solvers.InnerSolver]:
    """Every inner solver, set to reach ``tol`` on this problem."""
    step = 1 / case.lipschitz
    return {
        "gd": solvers.GradientDescent(step_size=step, max_steps=5000, tol=tol),
        "gd-backtracking": solvers.GradientDescent(step_size=None, max_steps=5000, tol=tol),
        "agd": solvers.NesterovAGD(step_size=step, max_steps=2000, tol=tol),
        "agd-backtracking": solvers.NesterovAGD(step_size=None, max_steps=2000, tol=tol),
        "agd-known-mu": solvers.NesterovAGD(step_size=step, strong_convexity=0.2, max_steps=2000, tol=tol),
        "newton-cg": solvers.NewtonCG(max_steps=30, cg_steps=20, tol=tol),
        "newton-cg-jacobi": solvers.NewtonCG(max_steps=30, cg_steps=20, tol=tol, preconditioner=linsys.Jacobi()),
        "lbfgs": solvers.LBFGS(max_steps=500, tol=tol),
        "scipy": solvers.ScipyMinimize(method="trust-ncg", tol=tol),
        "torch-sgd": solvers.TorchOptim(
            lambda params: torch.optim.SGD(params, lr=step, momentum=0.6), max_steps=2000, tol=tol
        ),
        "black-box": solvers.BlackBox(lambda problem, theta, data, init: case.phi_star(theta, data), tol=tol),
    }


def linear_solvers(rtol: float) -> dict[str, linsys.LinearSolver]:
    """Every linear solver that solves symmetric systems, set to reach ``rtol`` on small and well-conditioned ones."""
    return {
        "cg": linsys.CG(max_steps=60, rtol=rtol),
        "neumann": linsys.Neumann(num_terms=5000, rtol=rtol),
        "cg-jacobi": linsys.CG(max_steps=60, rtol=rtol, preconditioner=linsys.Jacobi()),
        "cg-nystrom": linsys.CG(max_steps=60, rtol=rtol, preconditioner=linsys.NystromPreconditioner(rank=3)),
        "minres": linsys.MINRES(max_steps=60, rtol=rtol),
        "nystrom": linsys.Nystrom(rank=20, shift=0.1, rtol=rtol),
        **general_linear_solvers(rtol),
    }


def general_linear_solvers(rtol: float) -> dict[str, linsys.LinearSolver]:
    """Those of them that need no symmetric matrix."""
    return {
        "exact": linsys.Exact(),
        "gmres": linsys.GMRES(max_steps=60, rtol=rtol),
        "bicgstab": linsys.BiCGStab(max_steps=60, rtol=rtol),
    }


SOLVER_NAMES = list(inner_solvers(PROBLEMS[0], 1e-10))
LINSYS_NAMES = list(linear_solvers(1e-10))
GENERAL_LINSYS_NAMES = list(general_linear_solvers(1e-10))


# ----------------------------------------------------------------------------------------------------------------------
# Conditions that are no gradients.


@dataclass(frozen=True)
class Equation:
    """F(phi) = 0, or phi = T(phi) where ``is_map``, with its closed form. dF/dphi is symmetric in none of them.

    ``init``: a start. ``outer_loss(phi, theta, data)``: a number to differentiate. ``relaxation``: with which the plain
    iteration converges.
    """

    name: str
    fn: Callable[[Any, Any, Any], Any]
    is_map: bool
    theta: Any
    data: Any
    init: Any
    phi_star: Callable[[Any, Any], Any]
    outer_loss: Callable[[Any, Any, Any], Tensor]
    relaxation: float = 1.0

    def solution(self, theta: Any, data: Any, init: Any = None, **options: Any) -> Any:
        """phi*, by the library."""
        solve = bilevel.fixed_point if self.is_map else bilevel.root
        return solve(self.fn, theta, data, init=self.init if init is None else init, **options)

    def outer(self, theta: Any, data: Any) -> Tensor:
        """The number, by the closed form."""
        return self.outer_loss(self.phi_star(theta, data), theta, data)

    def to(self, dtype: torch.dtype) -> Equation:
        """The same numbers in another precision."""
        names = ("theta", "data", "init")
        return replace(self, **{name: _cast(getattr(self, name), dtype) for name in names})


def affine() -> Equation:
    """(I + N) phi = C theta + c, with N, C and c as data: 5 unknowns, 3 parameters."""

    def fn(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
        return phi + data["n"] @ phi - data["c"] @ theta - data["shift"]

    def phi_star(theta: Tensor, data: Any) -> Tensor:
        n = data["n"]
        eye = torch.eye(5, dtype=n.dtype, device=n.device)
        return torch.linalg.inv(eye + n) @ (data["c"] @ theta + data["shift"])

    data = {"n": 0.2 * _normal(51, 5, 5), "c": _normal(52, 5, 3), "shift": _normal(53, 5)}
    return Equation(
        "affine",
        fn,
        False,
        _normal(54, 3),
        data,
        torch.zeros(5, dtype=torch.float64),
        phi_star,
        lambda phi, theta, data: (phi**3).sum() + phi[0] * theta[1] + torch.sin(theta).sum(),
        0.7,
    )


def tree_map_equation() -> Equation:
    """phi = M phi + C theta + shift over coupled leaves; labels in data pick entries of theta."""
    m, c = 0.25 * _normal(61, 6, 6), _normal(62, 6, 4)

    def vector(theta: Any) -> Tensor:
        return torch.cat([theta[0], theta[1]["s"].reshape(1)])

    def right_hand_side(theta: Any, data: Any) -> Tensor:
        t = vector(theta)
        return c.to(t) @ t[data["label"]] + data["scale"] * data["shift"]

    def tree(x: Tensor) -> Any:
        return {"b": x[4:], "a": [x[:4].reshape(2, 2)]}

    def fn(phi: Any, theta: Any, data: Any) -> Any:
        x = torch.cat([phi["a"][0].reshape(-1), phi["b"]])
        return tree(m.to(x) @ x + right_hand_side(theta, data))

    def phi_star(theta: Any, data: Any) -> Any:
        b = right_hand_side(theta, data)
        return tree(torch.linalg.inv(torch.eye(6, dtype=b.dtype, device=b.device) - m.to(b)) @ b)

    def outer(phi: Any, theta: Any, data: Any) -> Tensor:
        return (phi["a"][0] ** 3).sum() + phi["b"][0] * phi["a"][0][0, 1] * theta[1]["s"] + phi["b"].sum()

    theta = (_normal(63, 3), {"s": _normal(64, 1)[0]})
    data = {"label": torch.tensor([3, 0, 1, 2]), "shift": _normal(65, 6), "scale": 1.5}
    return Equation("tree", fn, True, theta, data, tree(torch.zeros(6, dtype=torch.float64)), phi_star, outer)


def hyperbolic() -> Equation:
    """P sinh(phi) = B theta with P = I + N: the derivative P diag(cosh phi) depends on phi, and so has derivatives of its own."""
    p = torch.eye(4, dtype=torch.float64) + 0.2 * _normal(71, 4, 4)

    def fn(phi: Tensor, theta: Tensor, data: Tensor) -> Tensor:
        return p.to(phi) @ torch.sinh(phi) - data @ theta

    def phi_star(theta: Tensor, data: Tensor) -> Tensor:
        return torch.asinh(torch.linalg.inv(p.to(theta)) @ (data @ theta))

    return Equation(
        "hyperbolic",
        fn,
        False,
        0.5 + 0.2 * _normal(72, 3),
        0.4 * _normal(73, 4, 3),
        torch.zeros(4, dtype=torch.float64),
        phi_star,
        lambda phi, theta, data: (phi**2).sum() + 0.5 * phi[0] * phi[2] * theta[1],
        0.5,
    )


def constrained() -> Equation:
    """min 1/2 x^T Q x + c^T x with A x = b, as its optimality system in x and the multipliers: a saddle."""
    a = _normal(81, 2, 4)

    def fn(phi: Any, theta: Any, data: Any) -> Any:
        at = a.to(phi["x"])
        return {"x": data["q"] @ phi["x"] + theta["c"] - at.mT @ phi["nu"], "nu": at @ phi["x"] - theta["b"]}

    def phi_star(theta: Any, data: Any) -> Any:
        at = a.to(theta["c"])
        upper = torch.cat([data["q"], -at.mT], 1)
        lower = torch.cat([at, torch.zeros(2, 2, dtype=at.dtype, device=at.device)], 1)
        z = torch.linalg.inv(torch.cat([upper, lower])) @ torch.cat([-theta["c"], theta["b"]])
        return {"x": z[:4], "nu": z[4:]}

    theta = {"c": _normal(82, 4), "b": _normal(83, 2)}
    init = {"x": torch.zeros(4, dtype=torch.float64), "nu": torch.zeros(2, dtype=torch.float64)}
    return Equation(
        "constrained",
        fn,
        False,
        theta,
        {"q": _spd(84, 4, 1.0, 3.0)},
        init,
        phi_star,
        lambda phi, theta, data: (phi["x"] ** 3).sum() + phi["nu"] @ theta["b"] * phi["x"][0],
        0.3,
    )


EQUATIONS: list[Equation] = [affine(), tree_map_equation(), hyperbolic(), constrained()]


def equation_solvers(case: Equation, tol: float) -> dict[str, solvers.InnerSolver]:
    """Every solver of equations, set to reach ``tol`` on this problem."""
    return {
        "newton": solvers.Newton(max_steps=30, tol=tol),
        "newton-gmres": solvers.Newton(max_steps=30, tol=tol, linsys=linsys.GMRES(max_steps=20, rtol=1e-6)),
        "iteration": solvers.FixedPointIteration(max_steps=5000, tol=tol, relaxation=case.relaxation),
        "anderson": solvers.Anderson(max_steps=500, tol=tol, relaxation=case.relaxation),
        "black-box": solvers.BlackBox(lambda fn, theta, data, init: case.phi_star(theta, data), tol=tol),
    }


EQUATION_SOLVER_NAMES = list(equation_solvers(EQUATIONS[0], 1e-10))

# Every solver of either kind with one of the other: the two do not know each other, and the full product would take minutes.
PAIRS = [(name, "cg") for name in SOLVER_NAMES] + [("newton-cg", name) for name in LINSYS_NAMES if name != "cg"]
