"""Inner solvers: how a point phi is found. They do not know how it is differentiated."""

from bilevel.solvers.anderson import Anderson
from bilevel.solvers.base import InnerSolver, IterativeSolver, State
from bilevel.solvers.black_box import BlackBox
from bilevel.solvers.fixed_point_iteration import FixedPointIteration
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.nesterov import NesterovAGD
from bilevel.solvers.newton import Newton
from bilevel.solvers.newton_cg import NewtonCG
from bilevel.solvers.scipy_minimize import ScipyMinimize
from bilevel.solvers.torch_optim import TorchOptim

__all__ = [
    "Anderson",
    "BlackBox",
    "FixedPointIteration",
    "GradientDescent",
    "InnerSolver",
    "IterativeSolver",
    "LBFGS",
    "NesterovAGD",
    "Newton",
    "NewtonCG",
    "ScipyMinimize",
    "State",
    "TorchOptim",
]
