"""Linear solvers: ``matvec`` and ``b`` to ``u`` with A u = b. Linear algebra only; they know no bilevel problem."""

from bilevel.linsys.base import LinearSolver, Operator
from bilevel.linsys.bicgstab import BiCGStab
from bilevel.linsys.cg import CG
from bilevel.linsys.exact import Exact
from bilevel.linsys.gmres import GMRES
from bilevel.linsys.identity import Identity
from bilevel.linsys.jacobi import Jacobi
from bilevel.linsys.lanczos import RitzValues, ritz_values
from bilevel.linsys.minres import MINRES
from bilevel.linsys.neumann import Neumann
from bilevel.linsys.nystrom import Nystrom
from bilevel.linsys.nystrom_preconditioner import NystromPreconditioner
from bilevel.linsys.preconditioner import Preconditioner

__all__ = [
    # for symmetric matrices
    "CG",
    "MINRES",
    "Neumann",
    "Nystrom",
    "Identity",
    # for any
    "Exact",
    "GMRES",
    "BiCGStab",
    # preconditioners
    "Jacobi",
    "NystromPreconditioner",
    # what they are
    "LinearSolver",
    "Operator",
    "Preconditioner",
    "RitzValues",
    "ritz_values",
]
