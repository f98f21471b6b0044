"""The paper's figures and tables, one command each: `imaml experiment NAME`."""

from applications.meta_learning.experiments.base import Experiment
from applications.meta_learning.experiments.e1_meta_gradient import E1
from applications.meta_learning.experiments.e2_compute_memory import E2
from applications.meta_learning.experiments.e3_complexity import E3
from applications.meta_learning.experiments.e4_omniglot import E4, E4CPU
from applications.meta_learning.experiments.e6_sinusoid import E6
from applications.meta_learning.experiments.e7_assumptions import E7Assumptions
from applications.meta_learning.experiments.e7_failures import E7Failures
from applications.meta_learning.experiments.e7_gradient_accuracy import E7GradientAccuracy
from applications.meta_learning.experiments.e7_inner_solvers import E7InnerSolvers
from applications.meta_learning.experiments.e7_linear_steps import E7LinearSteps
from applications.meta_learning.experiments.e7_regularisation import E7Regularisation
from applications.meta_learning.experiments.e7_step_sizes import E7StepSizes

EXPERIMENTS: tuple[Experiment, ...] = (
    E1(),
    E2(),
    E3(),
    E4CPU(),
    E4(),
    E6(),
    E7Assumptions(),
    E7Failures(),
    E7GradientAccuracy(),
    E7InnerSolvers(),
    E7LinearSteps(),
    E7Regularisation(),
    E7StepSizes(),
)

__all__ = ["EXPERIMENTS", "Experiment"]
