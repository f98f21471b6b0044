"""The only list of problems, inner solvers and linear solvers: a row added here is tested everywhere.

Every problem has a closed form that is written without our library (``torch.linalg.inv``, which is right under every
transform). The problems are chosen so that the likely bug shows: phi and theta of different sizes and structures,
leaves coupled through H, a cross derivative that is not symmetric, data that are not zero, an outer loss that depends
on theta directly, a third derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel import linsys, solvers
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

        def cast(tree: Any) -> Any:
            leaves, spec = flatten(tree)
            return unflatten(
                spec, [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
            )

        return Case(self.name, self.problem, cast(self.theta), cast(self.data), self.phi_star, self.lipschitz)


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


PROBLEMS: list[Case] = [ridge(), coupled(), proximal(), exponential()]


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
        "black-box": solvers.BlackBox(lambda problem, theta, data, init: case.phi_star(theta, data), tol=tol),
    }


def linear_solvers(rtol: float) -> dict[str, linsys.LinearSolver]:
    """Every linear solver that solves, set to reach ``rtol`` on well-conditioned systems."""
    return {
        "cg": linsys.CG(max_steps=60, rtol=rtol),
        "neumann": linsys.Neumann(num_terms=5000, rtol=rtol),
        "exact": linsys.Exact(),
    }


SOLVER_NAMES = list(inner_solvers(PROBLEMS[0], 1e-10))
LINSYS_NAMES = list(linear_solvers(1e-10))
