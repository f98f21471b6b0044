"""Work C with JAXopt: its gradient descent with implicit differentiation (conjugate gradients), compiled as a whole."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import jaxopt
from fixed import load, serve

jax.config.update("jax_enable_x64", True)
ARRAYS = load(sys.argv[1])
A, b, W, target, theta = (jnp.asarray(ARRAYS[name]) for name in ("A", "b", "W", "target", "theta"))
GD_STEPS, CG_STEPS = 100, 5


def inner(phi: jax.Array, theta: jax.Array) -> jax.Array:
    """G."""
    return 0.5 * phi @ (A @ phi) - (b + W @ theta) @ phi


SOLVER = jaxopt.GradientDescent(
    inner,
    stepsize=float(ARRAYS["step_size"]),
    maxiter=GD_STEPS,
    tol=0.0,
    acceleration=False,
    implicit_diff_solve=functools.partial(jaxopt.linear_solve.solve_cg, maxiter=CG_STEPS, tol=0.0),
)


@jax.jit
@jax.grad
def compiled(theta: jax.Array) -> jax.Array:
    """L at phi*(theta)."""
    phi = SOLVER.run(jnp.zeros_like(b), theta).params
    return jax.nn.softplus(-target * phi).sum() + 0.05 * theta @ theta


serve(lambda: compiled(theta).block_until_ready(), ARRAYS["reference"])
