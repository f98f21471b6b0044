"""Quadratic and non-quadratic problems over general matrices.

    G = 1/2 phi^T A phi - phi^T c  -  phi^T C theta              quadratic
                                   +  sum s(W phi + V theta)     non-quadratic, s(z) = sqrt(1 + z^2)
    L = sum f(F phi + G theta - t)                               f squared or s; G absent: no direct dependence on theta

C and W^T diag(s'') V are d x p matrices that differ from their transposes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.constants import Constants
from bilevel.problem import BilevelProblem
from bilevel.testing.strategies.case import Model, extreme_eigenvalues, longest_row, spectral_norm
from bilevel.testing.strategies.draws import DIRECT, Array, Setup, Source, columns, with_spectrum
from bilevel.testing.strategies.elementwise import BOUNDED, SQUARED, Loss
from bilevel.testing.strategies.oracle import Arrays, Derivatives
from bilevel.testing.strategies.structures import layouts, raveled
from bilevel.trees import Layout, Tree


def quadratic(draw: st.DrawFn, setup: Setup) -> Model:
    """A with the drawn spectrum, from scale / kappa to scale."""

    def numbers(kappa: float, p: int, m: int) -> Arrays:
        source, d = setup.source, setup.d
        A = with_spectrum(source.orthogonal(d, d), setup.scale * source.spectrum(d, kappa, setup.shape))
        return {"A": A, "C": source.normal(d, p), "c": source.normal(d), **_outer_numbers(source, m, d, p, 1.0)}

    return _model(draw, setup, numbers, "quadratic")


def nonquadratic(draw: st.DrawFn, setup: Setup) -> Model:
    """A from mu to mu (kappa + 1) / 2 with mu = scale / kappa, and |W|^2 = mu (kappa - 1) / 2: beta = kappa mu."""
    rows = draw(st.integers(1, setup.max_dim))

    def numbers(kappa: float, p: int, m: int) -> Arrays:
        source, d, mu = setup.source, setup.d, setup.scale / kappa
        half = (kappa + 1) / 2
        values = half * source.spectrum(d, half, setup.shape) if d > 1 else np.ones(1)
        A = with_spectrum(source.orthogonal(d, d), mu * values)
        size = (mu * (kappa - 1) / 2) ** 0.5
        W = source.normal(rows, d)
        W = W * (size / spectral_norm(W))
        V = source.normal(rows, p) / p**0.5
        # about 1 / |W|, so that the arguments of s are neither tiny nor huge
        c = A @ source.normal(d) / size
        return {"A": A, "W": W, "V": V, "c": c, **_outer_numbers(source, m, d, p, size)}

    return _model(draw, setup, numbers, "nonquadratic")


def _outer_numbers(source: Source, m: int, d: int, p: int, size: float) -> Arrays:
    return {
        "F": source.normal(m, d) * (size / d**0.5),
        "G": source.normal(m, p) / p**0.5,
        "t": source.normal(m),
    }


def _model(draw: st.DrawFn, setup: Setup, numbers: Callable[[float, int, int], Arrays], family: str) -> Model:
    p, m = draw(st.integers(1, setup.max_dim)), draw(st.integers(1, setup.max_dim))
    loss = draw(st.sampled_from([SQUARED, BOUNDED]))
    direct = draw(st.booleans())
    phi_layout, theta_layout = draw(layouts(setup.d, setup.structured)), draw(layouts(p, setup.structured))
    tasks = [numbers(kappa, p, m) for kappa in setup.kappas]
    if not direct:
        tasks = [{name: array for name, array in task.items() if name != "G"} for task in tasks]
    outer = "squared" if loss is SQUARED else "bounded"
    return Model(
        name=setup.name(f"{family}, {outer} outer loss{DIRECT * direct}"),
        problem=_problem(loss, phi_layout, theta_layout),
        theta=setup.source.normal(p),
        tasks=tasks,
        derive=lambda n: _derivatives(n, loss),
        bound=lambda n: _bounds(n, loss),
        phi_layout=phi_layout,
        theta_layout=theta_layout,
    )


def _problem(loss: Loss, phi_layout: Layout, theta_layout: Layout) -> BilevelProblem:
    def inner(phi: Tree, theta: Tree, data: dict[str, Tensor]) -> Tensor:
        x, y = raveled(phi_layout, phi), raveled(theta_layout, theta)
        value = 0.5 * (x @ (data["A"] @ x)) - x @ data["c"]
        if "W" in data:
            return value + BOUNDED.value(data["W"] @ x + data["V"] @ y).sum()
        return value - x @ (data["C"] @ y)

    def outer(phi: Tree, theta: Tree, data: dict[str, Tensor]) -> Tensor:
        z = data["F"] @ raveled(phi_layout, phi) - data["t"]
        if "G" in data:
            z = z + data["G"] @ raveled(theta_layout, theta)
        return loss.value(z).sum()

    def start(theta: Tree, data: dict[str, Tensor]) -> Tree:
        return phi_layout.unravel(torch.zeros_like(data["c"]))

    return BilevelProblem.from_functions(inner, outer, start)


def _derivatives(n: Arrays, loss: Loss) -> Derivatives:
    theta = n["theta"]

    def bends(phi: Array) -> Array:
        return n["W"] @ phi + n["V"] @ theta

    def gradient(phi: Array) -> Array:
        fixed = n["A"] @ phi - n["c"]
        return fixed + n["W"].T @ BOUNDED.first(bends(phi)) if "W" in n else fixed - n["C"] @ theta

    def product(phi: Array, v: Array) -> Array:
        fixed = n["A"] @ v
        return fixed + n["W"].T @ columns(BOUNDED.second(bends(phi)), n["W"] @ v) if "W" in n else fixed

    def cross(phi: Array, u: Array) -> Array:
        return n["V"].T @ (BOUNDED.second(bends(phi)) * (n["W"] @ u)) if "W" in n else -(n["C"].T @ u)

    def outer(phi: Array) -> tuple[Array, Array | int]:
        slope = loss.first(n["F"] @ phi - n["t"] + (n["G"] @ theta if "G" in n else 0))
        return n["F"].T @ slope, n["G"].T @ slope if "G" in n else 0

    return Derivatives(gradient=gradient, product=product, cross=cross, outer=outer)


def _bounds(n: Arrays, loss: Loss) -> tuple[Constants, float]:
    mu, beta = extreme_eigenvalues(n["A"])
    if "W" in n:
        _, second, third = BOUNDED.bounds
        w, v = spectral_norm(n["W"]), spectral_norm(n["V"])
        beta, C, rho = beta + second * w * w, second * w * v, third * longest_row(n["W"]) * w * max(w, v)
    else:
        C, rho = spectral_norm(n["C"]), 0.0
    first, second, _ = loss.bounds
    f = spectral_norm(n["F"])
    both = spectral_norm(np.hstack([n["F"], n["G"]])) if "G" in n else f
    B = None if first is None else first * f * len(n["F"]) ** 0.5
    return Constants(mu=mu, rho=rho, B=B, L=second * f * both, C=C, everywhere=True), beta
