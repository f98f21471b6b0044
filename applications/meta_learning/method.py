"""From settings to the parts of the library: network, problem, inner solver, linear solver, curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from applications.meta_learning.algorithms import MAML, Algorithm, FirstOrderMAML, ImplicitMAML, Reptile
from applications.meta_learning.config import Config, ConfigError
from applications.meta_learning.models import MLP, ConvNet, count_parameters
from applications.meta_learning.problem import (
    cross_entropy,
    few_shot_problem,
    head_and_body,
    plain_problem,
    squared_error,
)
from bilevel import BilevelProblem
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG, Exact, Identity, Neumann
from bilevel.solvers import GradientDescent, NesterovAGD, NewtonCG

Solver = GradientDescent | NesterovAGD | NewtonCG
LinearSolver = CG | Neumann | Identity | Exact

REGIME = "statistics of the batch at hand (transductive)"
IMAGES = {
    "glyphs": "generated strokes, ink 1 on background 0",
    "omniglot": "Omniglot, 105x105 reduced by Lanczos, ink 1 on background 0",
    "mini-imagenet": "Mini-ImageNet in RGB, 0 to 1, classes of Ravi and Larochelle (64 for training, 20 for test)",
    "folder": "the user's own, squeezed to a square and reduced by Lanczos, 0 to 1",
}
EXACT_LIMIT = 5_000  # parameters: beyond, a dense Hessian for each task is out of reach


@dataclass(frozen=True, kw_only=True)
class Method:
    """The problem of one task, how theta is adapted to it, and what the outer step gets from that."""

    problem: BilevelProblem
    algorithm: Algorithm

    @property
    def solver(self) -> Solver:
        """The inner solver, in training and in test."""
        return self.algorithm.solver  # type: ignore[return-value]  # build_solver made it


def build_network(config: Config) -> nn.Module:
    """The network of the settings, initialised from their seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.is_regression:
            return MLP(hidden=config.channels)
        return ConvNet(
            config.ways,
            channels=config.channels,
            in_size=config.image_size,
            zero_head=config.zero_head,
            in_channels=3 if config.colours == "rgb" else 1,
            pooled=config.network == "pooled",
        )


def conditions(config: Config) -> dict[str, str]:
    """What an accuracy depends on beside the settings."""
    if config.is_regression:
        return {}
    size = config.image_size
    inputs = build_network(config).get_submodule("head").in_features
    halving = "stride 2" if config.network == "strided" else "stride 1 and 2x2 max-pooling"
    return {
        "batch norm": REGIME,
        "images": f"{size}x{size}, {IMAGES[config.dataset]}; test images are not rotated",
        "network": f"4 convolutions with {halving}, without bias (batch norm would subtract it), {inputs} inputs of the last layer",
    } | ({"colours": config.colours} if config.dataset == "folder" else {})


def build_method(config: Config, module: nn.Module) -> Method:
    """The problem and the algorithms of the settings.

    Raises:
        ConfigError: the linear solver is too expensive for this network.
    """
    size = count_parameters(module)
    if config.linear == "exact" and size > EXACT_LIMIT:
        raise ConfigError(
            f"linear: 'exact' builds a dense Hessian; expected at most {EXACT_LIMIT} parameters, the network has "
            f"{size}; use cg, or a smaller network (--channels)"
        )
    loss = squared_error if config.is_regression else cross_entropy
    problem: BilevelProblem
    if config.lam:
        lam = head_and_body(module, config.lam, config.lam_head) if config.lam_head else config.lam
        problem = few_shot_problem(module, loss, lam)
    else:
        problem = plain_problem(module, loss)
    return Method(problem=problem, algorithm=_algorithm(config))


def _algorithm(config: Config) -> Algorithm:
    solver, chunk_size, outer_chunk_size = (
        build_solver(config),
        config.chunk_size or None,
        config.outer_chunk_size or None,
    )
    if config.algorithm == "maml":
        return MAML(solver=solver, chunk_size=chunk_size, truncate=config.truncate or None)
    if config.algorithm == "imaml":
        return ImplicitMAML(
            solver=solver,
            chunk_size=chunk_size,
            outer_chunk_size=outer_chunk_size,
            linsys=_linear_solver(config),
            curvature=_curvature(config.curvature),
            damping=config.damping,
            compile=config.compile,
        )
    kind = FirstOrderMAML if config.algorithm == "first-order" else Reptile
    return kind(solver=solver, chunk_size=chunk_size, outer_chunk_size=outer_chunk_size)


def build_solver(config: Config) -> Solver:
    """The inner solver of the settings."""
    if config.inner == "newton-cg":
        return NewtonCG(
            max_steps=config.inner_steps,
            cg_steps=config.direction_steps,
            tol=config.inner_tol,
            curvature=_curvature(config.inner_curvature),
            damping=config.inner_damping,
        )
    step_size = config.inner_step_size or None
    if config.inner == "gd":
        return GradientDescent(step_size=step_size, max_steps=config.inner_steps, tol=config.inner_tol)
    return NesterovAGD(
        step_size=step_size,
        max_steps=config.inner_steps,
        tol=config.inner_tol,
        momentum=config.inner_momentum or None,
    )


def _linear_solver(config: Config) -> LinearSolver:
    if config.linear == "cg":
        return CG(max_steps=config.linear_steps, rtol=config.linear_rtol, steihaug=config.steihaug)
    if config.linear == "neumann":
        return Neumann(num_terms=config.linear_steps, rtol=config.linear_rtol)
    return Identity() if config.linear == "identity" else Exact()


def _curvature(name: str) -> Hessian | GaussNewton:
    return GaussNewton() if name == "gauss-newton" else Hessian()
