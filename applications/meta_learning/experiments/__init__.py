"""The paper's figures and tables, one command each: `imaml experiment NAME`."""

from applications.meta_learning.experiments.base import Experiment
from applications.meta_learning.experiments.e1_meta_gradient import E1
from applications.meta_learning.experiments.e4_omniglot import E4, E4CPU

EXPERIMENTS: tuple[Experiment, ...] = (E1(), E4CPU(), E4())

__all__ = ["EXPERIMENTS", "Experiment"]
