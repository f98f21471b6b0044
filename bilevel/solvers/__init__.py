"""Inner solvers: how a point phi is found. They do not know how it is differentiated."""

from bilevel.solvers.base import InnerSolver, IterativeSolver, State
from bilevel.solvers.black_box import BlackBox
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.nesterov import NesterovAGD
from bilevel.solvers.newton_cg import NewtonCG

__all__ = ["BlackBox", "GradientDescent", "InnerSolver", "IterativeSolver", "NesterovAGD", "NewtonCG", "State"]
