"""The paper's figures and tables, one command each: `imaml experiment NAME`."""

from applications.meta_learning.experiments.base import Experiment
from applications.meta_learning.experiments.e1_meta_gradient import E1

EXPERIMENTS: tuple[Experiment, ...] = (E1(),)

__all__ = ["EXPERIMENTS", "Experiment"]
