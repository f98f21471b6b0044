"""The rigorous bound of the error of a hypergradient. Letters and the two parts of the error as in
:mod:`bilevel.certificates`.

With the constants of :class:`bilevel.Constants` the linear part is at most C |r| / mu. For the inner part,

    w* - w = H*^{-1} ((b* - b) + (H - H*) w),
    C*^T w* - C^T w = C*^T (w* - w) + (C* - C)^T w,
    |w| <= |u| + |r| / mu,

so that it is at most

    L delta + C* (L + rho |w|) delta / mu* + rho |w| delta

(first term: only if L depends on theta directly; last term: only if C is not constant; C* = C if it is, else C + rho
delta; mu* = mu if that holds everywhere, else mu - rho delta). With |b*| <= B the last two terms are at most

    C (2 rho B / mu^2 + L / mu) delta + rho (B / mu*) delta

too (1 for the 2 if mu holds everywhere; last term: as above): Lemma 3 of the paper, there for C = -lam I. The smaller
one is used.

delta comes from the gradient of G: |dG/dphi| / mu under strong convexity everywhere; else, by the theorem
of Newton and Kantorovich, (mu - sqrt(mu^2 - 2 rho |dG/dphi|)) / rho, under the condition of Lemma 3, delta < mu /
(2 rho). That theorem also says that there is a solution so near, and H* >= mu - rho delta > 0 that it is a minimum.

|r| and |dG/dphi| are measured, and enter with what rounding may hide in them (:mod:`bilevel.certificates.evaluation`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.certificates.evaluation import Evaluation
from bilevel.constants import Constants
from bilevel.entry import Call
from bilevel.linsys.base import norm

NAMES = ("mu", "rho", "B", "L", "C")


def constants_per_task(constants: Constants, call: Call) -> dict[str, Tensor | None]:
    """The constants as tensors ``(*batch,)``."""

    def of(name: str) -> Tensor | None:
        value = getattr(constants, name)
        if value is None:
            return None
        value = torch.as_tensor(value, dtype=call.phi.dtype, device=call.phi.device)
        if value.ndim and value.shape != call.sizes:
            raise ValueError(
                f"Constants: {name}: expected a number, or one for each task of shape {tuple(call.sizes)}, got shape {tuple(value.shape)}."
            )
        return value.expand(call.sizes)

    known = {name: of(name) for name in NAMES}
    constant = call.flat.problem.constant_cross_norm
    return known if constant is None else known | {"C": torch.full_like(call.phi[..., 0], constant)}


def constants_of(known: dict[str, Tensor | None], tasks: Any) -> dict[str, Tensor | None]:
    """Those of some tasks."""
    return {name: None if value is None else value[tasks] for name, value in known.items()}


def bound(here: Evaluation, known: dict[str, Tensor | None]) -> Tensor | None:
    """The formula at the top of this module, for each task ``(*batch,)``; inf where its condition fails."""
    mu, rho, B, L, C = (known[name] for name in NAMES)
    if mu is None or rho is None or L is None or C is None:
        return None
    problem = here.call.flat.problem
    assert problem.constants is not None
    everywhere, constant_cross = problem.constants.everywhere, problem.constant_cross_norm is not None
    rounding_r, rounding_slope = here.rounding_bound()
    theta = norm(here.vector([leaf.detach() for leaf in here.objective.theta_per_task()]))
    outer_terms = L * norm(here.phi) + (2 * L * here.outer.abs()).sqrt()
    r = norm(here.b - here.local.matvec(here.u)) + rounding_r + here.eps * outer_terms
    slope = norm(here.local.grad) + rounding_slope + here.eps * C * theta
    if not here.local.exact:
        return None  # products by finite differences
    if everywhere:
        delta = slope / mu
        mu_star = mu
        condition = torch.ones_like(delta, dtype=torch.bool)
    else:
        # 2 s / (mu + sqrt(mu^2 - 2 rho s)) is the root in a form that does not cancel
        delta = 2 * slope / (mu + (mu**2 - 2 * rho * slope).clamp_min(0).sqrt())
        mu_star = mu - rho * delta
        condition = (2 * rho * slope <= mu**2) & (2 * rho * delta < mu)
    w = norm(here.u) + r / mu
    change_of_w = (L + rho * w) * delta / mu_star
    inner = C * change_of_w if constant_cross else (C + rho * delta) * change_of_w + rho * w * delta
    if B is not None:
        lemma_3 = C * ((1 if everywhere else 2) * rho * B / mu**2 + L / mu) * delta
        inner = torch.minimum(inner, lemma_3 if constant_cross else lemma_3 + rho * B / mu_star * delta)
    direct = norm(here.vector(here.direct))
    if any(leaf is not None for leaf in here.direct):
        inner = inner + L * delta
    rounding = here.eps * (direct + C * norm(here.u))
    total = (1 + here.eps) * (C * r / mu + inner + rounding)
    return torch.where(condition & total.isfinite(), total, torch.inf)
