"""Works E and F with JAXopt, all tasks at once by `jax.vmap`, compiled as a whole. E: gradient steps; F: L-BFGS."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import jaxopt
from fixed import load, serve

jax.config.update("jax_enable_x64", True)
ARRAYS = load(sys.argv[1])
X, y, X_val, y_val, theta = (jnp.asarray(ARRAYS[name]) for name in ("X", "y", "X_val", "y_val", "theta"))
LAM = float(ARRAYS["lam"])


def loss(phi: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The logistic loss of one task."""
    return jax.nn.softplus(-y * (x @ phi)).mean()


def inner(phi: jax.Array, theta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """G of one task."""
    return loss(phi, x, y) + 0.5 * LAM * ((phi - theta) ** 2).sum()


if sys.argv[3] == "E":
    LINEAR = functools.partial(jaxopt.linear_solve.solve_cg, maxiter=10, tol=0.0)
    SOLVER = jaxopt.GradientDescent(
        inner, stepsize=float(ARRAYS["step_size"]), maxiter=25, tol=0.0, acceleration=False, implicit_diff_solve=LINEAR
    )
else:
    LINEAR = functools.partial(jaxopt.linear_solve.solve_cg, maxiter=200, tol=1e-8)
    SOLVER = jaxopt.LBFGS(inner, maxiter=500, tol=1e-8, history_size=20, implicit_diff_solve=LINEAR)


def outer(theta: jax.Array, x: jax.Array, y: jax.Array, x_val: jax.Array, y_val: jax.Array) -> jax.Array:
    """L of one task at phi*(theta)."""
    return loss(SOLVER.run(theta, theta, x, y).params, x_val, y_val)


COMPILED = jax.jit(jax.vmap(jax.grad(outer), in_axes=(None, 0, 0, 0, 0)))
serve(lambda: COMPILED(theta, X, y, X_val, y_val).block_until_ready(), ARRAYS["reference"])
