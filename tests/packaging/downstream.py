"""A file of somebody who uses the wheel, for a type checker; check.py runs mypy on it. It is never executed."""

from typing import Any, assert_type

from torch import Tensor

import bilevel
from bilevel.linsys import CG, LinearSolver
from bilevel.solvers import NewtonCG


def inner(phi: Tensor, theta: Tensor, data: Any) -> Tensor:
    return (phi - theta).square().sum()


problem = bilevel.BilevelProblem.from_functions(inner, inner)
assert_type(problem, bilevel.BilevelProblem)

linsys: LinearSolver = CG(max_steps=5)
result = bilevel.hypergradient(problem, Tensor(), solver=NewtonCG(max_steps=5, cg_steps=5), linsys=linsys)
assert_type(result, bilevel.Hypergradient)
assert_type(result.ok, bool | Tensor)
assert_type(bilevel.Status.DIVERGED.message, str)

# The checker sees a mistake. Without the types of the package there would be none, and the comments would be in vain,
# which mypy --strict reports.
bilevel.hypergradient(problem, Tensor(), solver=NewtonCG(), linsys="CG")  # type: ignore[arg-type]
bilevel.hypergradient(problem, Tensor(), solver=NewtonCG(), linsys=linsys, max_steps=5)  # type: ignore[call-arg]
