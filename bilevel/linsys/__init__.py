"""Linear solvers: ``matvec`` and ``b`` to ``u`` with A u = b. Linear algebra only; they know no bilevel problem."""

from bilevel.linsys.base import LinearSolver
from bilevel.linsys.cg import CG
from bilevel.linsys.exact import Exact
from bilevel.linsys.identity import Identity
from bilevel.linsys.neumann import Neumann

__all__ = ["CG", "Exact", "Identity", "LinearSolver", "Neumann"]
