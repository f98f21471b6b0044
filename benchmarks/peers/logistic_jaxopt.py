"""Work D with JAXopt: its L-BFGS with implicit differentiation (conjugate gradients), compiled as a whole."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import jaxopt
from worker import problem, serve

jax.config.update("jax_enable_x64", True)
X, y, X_val, y_val, theta, reference = (jnp.asarray(array) for array in problem(sys.argv[1]))
CLASSES, FEATURES = int(y.max()) + 1, X.shape[1]


def cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the examples, with the classes in front, which is a third faster."""
    return jnp.mean(jax.nn.logsumexp(scores, axis=0) - jnp.take_along_axis(scores, labels[None], 0)[0])


def objective(phi: jax.Array, theta: jax.Array) -> jax.Array:
    """G."""
    return cross_entropy(phi @ X.T, y) + 0.5 * (jnp.exp(theta) * phi**2).sum()


@functools.cache
def compiled(tol: float, rtol: float) -> object:
    """The hypergradient as a function of theta."""
    linear = functools.partial(jaxopt.linear_solve.solve_cg, tol=rtol, maxiter=500)
    solver = jaxopt.LBFGS(objective, maxiter=500, tol=tol, implicit_diff_solve=linear)

    def outer(theta: jax.Array) -> jax.Array:
        phi = solver.run(jnp.zeros((CLASSES, FEATURES)), theta).params
        return cross_entropy(phi @ X_val.T, y_val)

    return jax.jit(jax.grad(outer))


def hypergradient(tol: float, rtol: float) -> jax.Array:
    """With these tolerances of the inner and the linear solve."""
    return compiled(tol, rtol)(theta).block_until_ready()


serve(hypergradient, lambda grad: float(jnp.linalg.norm(grad - reference) / jnp.linalg.norm(reference)))
