"""Implicit differentiation and bilevel optimisation in PyTorch."""

from bilevel import curvature, linsys, regularisation, solvers, theory
from bilevel.accuracy import Tolerances, tolerances
from bilevel.captured import CapturedStep
from bilevel.composition import Composition
from bilevel.constants import Constants
from bilevel.curvature import GaussNewton, Hessian
from bilevel.gradient import Diagnosis, Hypergradient
from bilevel.implicit import hypergradient, implicit_gradient, solve
from bilevel.learned_proximal import LearnedProximalProblem
from bilevel.parts import sum_over_parts
from bilevel.problem import BilevelProblem, Split
from bilevel.proximal import ProximalProblem
from bilevel.result import Result
from bilevel.solution import argmin, fixed_point, root
from bilevel.status import SolverError, Status
from bilevel.trees import tree_leaves
from bilevel.unrolling import unrolled

__version__ = "0.1.0"

__all__ = [
    "BilevelProblem",
    "CapturedStep",
    "Composition",
    "Constants",
    "Diagnosis",
    "GaussNewton",
    "Hessian",
    "Hypergradient",
    "LearnedProximalProblem",
    "ProximalProblem",
    "Result",
    "SolverError",
    "Split",
    "Status",
    "Tolerances",
    "argmin",
    "curvature",
    "fixed_point",
    "hypergradient",
    "implicit_gradient",
    "linsys",
    "regularisation",
    "root",
    "solve",
    "solvers",
    "sum_over_parts",
    "theory",
    "tolerances",
    "tree_leaves",
    "unrolled",
]
