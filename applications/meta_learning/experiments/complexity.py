"""Gradient computations, memory and error of one meta-gradient over the condition number, on a problem that is solved in closed form.

The Hessian of G is diagonal, h from mu = lam = 1 to kappa with equal steps of log h, and L = 1/2 |phi - t|^2. So

    phi* = theta + q,    d_theta = (phi* - t) / h,    with q and phi* - t standard normal,

and K steps of a first-order method from theta leave phi_K - phi* = p_K(h) (theta - phi*), with a polynomial p_K that depends on the method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import bilevel
from applications.meta_learning.experiments.base import Numbers
from applications.meta_learning.experiments.cost import peak_bytes
from bilevel import Hypergradient, ProximalProblem
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent, NesterovAGD
from bilevel.theory import theorem2_iterations, theorem2_tolerances

LAM = 1.0
GD, AGD = "gradient descent", "accelerated"
MANY = 10**7


@dataclass(frozen=True)
class Diagonal:
    """One problem: all tensors ``(d,)``, float64."""

    h: Tensor
    theta: Tensor
    star: Tensor  # phi*
    target: Tensor

    @property
    def data(self) -> dict[str, Tensor]:
        return {"a": self.h - LAM, "c": self.h * self.star - LAM * self.theta, "target": self.target}

    @property
    def exact(self) -> Tensor:
        """The exact meta-gradient."""
        return LAM * (self.star - self.target) / self.h

    def through_path(self, method: str, steps: int) -> Tensor:
        """The exact derivative through so many steps from theta (Definition 4)."""
        p = next(islice(polynomials(method, self.h), steps, None))
        jacobian = LAM / self.h + p * (1 - LAM / self.h)
        return jacobian * (self.star + p * (self.theta - self.star) - self.target)


def diagonal(kappa: float, d: int, seed: int) -> Diagonal:
    """A problem with this condition number."""
    g = torch.Generator().manual_seed(seed)
    theta, q, v = (torch.randn(d, generator=g, dtype=torch.float64) for _ in range(3))
    h = torch.logspace(0, math.log10(kappa), d, dtype=torch.float64)
    return Diagonal(h, theta, theta + q, theta + q - v)


def problem() -> ProximalProblem:
    """The functions of every problem here."""

    def train(phi: Tensor, data: dict[str, Tensor]) -> Tensor:
        return 0.5 * (data["a"] * phi).dot(phi) - data["c"].dot(phi)

    def test(phi: Tensor, data: dict[str, Tensor]) -> Tensor:
        return 0.5 * (phi - data["target"]).square().sum()

    return ProximalProblem.from_losses(train, test, LAM)


def solver(method: str, kappa: float, steps: int, tol: float = 0.0) -> GradientDescent | NesterovAGD:
    """The inner solver with its known constants."""
    if method == GD:
        return GradientDescent(step_size=1 / kappa, max_steps=steps, tol=tol, check_every=1)
    return NesterovAGD(step_size=1 / kappa, strong_convexity=LAM, max_steps=steps, tol=tol, check_every=1)


def polynomials(method: str, h: Tensor) -> Iterator[Tensor]:
    """p_0(h), p_1(h), ... for step size 1/kappa and, accelerated, the momentum of Lemma 2."""
    q = math.sqrt(float(h.min() / h.max()))
    momentum = 0.0 if method == GD else (1 - q) / (1 + q)
    x = y = torch.ones_like(h)
    while True:
        yield x
        x, last = (1 - h / h.max()) * y, x
        y = x + momentum * (x - last)


def to_accuracy(method: str, kappa: float, d: int, accuracy: float, seed: int) -> Numbers:
    """Gradient computations for a relative error of the meta-gradient, with the tolerances of Theorem 2.

    L and the constants are exact: rho = 0, L = 1. B is |dL/dphi| at phi*, all that the proof asks for.
    """
    p = diagonal(kappa, d, seed)
    eps, slope = accuracy * float(p.exact.norm()), float((p.star - p.target).norm())
    constants: Any = {"lam": LAM, "rho": 0.0, "mu": LAM, "B": slope, "L": 1.0, "eps": eps}
    delta, delta_prime = theorem2_tolerances(**constants)
    found = bilevel.hypergradient(
        problem(),
        p.theta,
        p.data,
        solver=solver(method, kappa, MANY, LAM * delta),
        linsys=CG(max_steps=d, rtol=0.0, atol=delta_prime),
    )
    promised = theorem2_iterations(kappa=kappa, D=float((p.star - p.theta).norm()), **constants)
    assert found.inner is not None
    return {
        "kappa": kappa,
        "method": method,
        "inner": found.inner.num_grads,
        "linear": found.linear.num_matvecs,
        "error": float((found.grad - p.exact).norm() / p.exact.norm()),
        "promised inner": promised[0],
        "promised linear": promised[1],
    }


def table_1(kappa: float, d: int, delta: float, eps: float, seed: int) -> Numbers:
    """Compute, memory and both errors of the four rows of Table 1.

    delta: wanted |phi - phi*| as a part of |theta - phi*|.
    eps: truncated back-propagation keeps kappa log(1/eps) steps.
    """
    p = diagonal(kappa, d, seed)
    distance = delta * float((p.theta - p.star).norm())
    unit = peak_bytes(lambda: torch.func.grad(problem().inner_objective)(p.theta, p.theta, p.data))[0]
    last = math.ceil(kappa * math.log(1 / eps))
    rows = [
        _row("MAML, GD", p, GD, distance, unit),
        _row("MAML, AGD", p, AGD, distance, unit),
        _row("truncated back-propagation, GD", p, GD, distance, unit, truncate=last),
        _row("iMAML, AGD and CG", p, AGD, distance, unit, implicit=True),
    ]
    return {"kappa": kappa, "unit": unit / (8 * d), "rows": rows}


def _row(
    name: str,
    p: Diagonal,
    method: str,
    distance: float,
    unit: float,
    *,
    truncate: int | None = None,
    implicit: bool = False,
) -> Numbers:
    kappa, d = float(p.h.max()), len(p.h)
    away = p.theta - p.star
    steps = next(k for k, x in enumerate(polynomials(method, p.h)) if float((x * away).norm()) <= distance)

    def call() -> Hypergradient:
        inner = solver(method, kappa, steps)
        if implicit:  # Lemma 3: lam L / mu = 1 times delta, and delta' the same
            linsys = CG(max_steps=d, rtol=0.0, atol=distance)
            return bilevel.hypergradient(problem(), p.theta, p.data, solver=inner, linsys=linsys)
        return bilevel.unrolled(problem(), p.theta, p.data, solver=inner, truncate=truncate)

    memory, found = peak_bytes(call)
    size, path = p.exact.norm(), p.through_path(method, steps)
    assert found.inner is not None
    backwards = found.linear.num_matvecs if implicit else min(steps, truncate or steps)
    return {
        "name": name,
        "gradients": found.inner.num_grads,
        "products": backwards,
        "memory": memory / unit,
        "delta": float((found.phi - p.star).norm() / away.norm()),
        "exact-solve error": float((found.grad - p.exact).norm() / size),
        "approx-solve error": float((found.grad - path).norm() / size),
    }
