"""Lemma 3, Theorem 2 and Corollary 1 against random problems, whose solutions are found by Newton's method on dense matrices.

One task has the losses (1/n) sum log cosh(X phi - y), so that all constants of the paper are known. With s the largest singular value of X:
the Hessian of L_train is at most s^2/n and rho-Lipschitz with rho = c (s^2/n) max |x_i|, c = max |tanh''| = 4 / (3 sqrt 3); the outer loss
has B = s/sqrt(n) and L = s^2/n, of its own X.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel
from applications.meta_learning.experiments.base import Numbers
from bilevel import ProximalProblem
from bilevel.linsys import CG
from bilevel.solvers import NesterovAGD
from bilevel.theory import corollary1_calls, implicit_gradient_error, theorem2_iterations, theorem2_tolerances

D, N = 10, 20
LAMS = (0.01, 0.1, 1.0)
ACCURACIES = (1e-2, 1e-4, 1e-6)  # relative to the exact gradient
# inner steps, CG steps; the last three solve the linear system, so that the bound is that of the inner solve alone
BUDGETS = ((1, 1), (3, 2), (10, 3), (30, 5), (100, 8), (3, D), (10, D), (30, D))
ROUNDING = 1e-12  # relative: what a bound may miss by rounding alone

Task = dict[str, Tensor]


@dataclass(frozen=True)
class Constants:
    """Those of Assumption 2 for one task: mu holds everywhere, because the training loss is convex."""

    lam: float
    beta: float
    rho: float
    B: float
    L: float

    @property
    def mu(self) -> float:
        return self.lam

    @property
    def lipschitz(self) -> float:
        """A Lipschitz constant of the gradient of the outer loss of phi*(theta)."""
        slope = implicit_gradient_error(self.lam, self.rho, self.mu, self.B, self.L, 1.0, 0.0, everywhere=True)
        return self.lam / self.mu * slope


def constants_of(task: Task, lam: float) -> Constants:
    """See the module. The task has no batch axis."""
    s, s_test = (float(torch.linalg.matrix_norm(task[key], ord=2)) for key in ("x", "x_test"))
    rho = 4 / (3 * math.sqrt(3)) * s**2 / N * float(task["x"].norm(dim=-1).max())
    return Constants(lam, lam + s**2 / N, rho, s_test / math.sqrt(N), s_test**2 / N)


def random_task(seed: int, scale: float = 1.0) -> Task:
    """Linear models with noise; the columns of X have sizes from `scale` down to a tenth of it."""
    g = torch.Generator().manual_seed(seed)
    sizes = scale * torch.logspace(0, -1, D, dtype=torch.float64)
    x, x_test = (torch.randn(N, D, generator=g, dtype=torch.float64) * sizes for _ in range(2))
    true = torch.randn(D, generator=g, dtype=torch.float64)
    y, y_test = (z @ true + 0.1 * torch.randn(N, generator=g, dtype=torch.float64) for z in (x, x_test))
    return {"x": x, "y": y, "x_test": x_test, "y_test": y_test}


def log_cosh(z: Tensor) -> Tensor:
    """Without overflow."""
    return z.abs() + torch.log1p(torch.exp(-2 * z.abs())) - math.log(2)


def problem(lam: float) -> ProximalProblem:
    """The functions of one task."""

    def train(phi: Tensor, task: Task) -> Tensor:
        return log_cosh(task["x"] @ phi - task["y"]).mean()

    def test(phi: Tensor, task: Task) -> Tensor:
        return log_cosh(task["x_test"] @ phi - task["y_test"]).mean()

    return ProximalProblem.from_losses(train, test, lam)


def hessian(task: Task, phi: Tensor, lam: float) -> Tensor:
    """Of G at phi, (d, d)."""
    weights = 1 - torch.tanh(task["x"] @ phi - task["y"]).square()
    return task["x"].mT @ (weights.unsqueeze(-1) * task["x"]) / N + lam * torch.eye(D, dtype=phi.dtype)


def implicit(task: Task, phi: Tensor, lam: float) -> Tensor:
    """lam H(phi)^-1 dL/dphi (d,): the exact meta-gradient where phi is phi*."""
    slope = task["x_test"].mT @ torch.tanh(task["x_test"] @ phi - task["y_test"]) / N
    return lam * torch.linalg.solve(hessian(task, phi, lam), slope)


def minimiser(task: Task, theta: Tensor, lam: float) -> Tensor:
    """phi* (d,), to rounding: Newton's method, halved where the gradient does not fall."""

    def gradient(phi: Tensor) -> Tensor:
        return task["x"].mT @ torch.tanh(task["x"] @ phi - task["y"]) / N + lam * (phi - theta)

    phi = theta
    for _ in range(100):
        grad = gradient(phi)
        step = torch.linalg.solve(hessian(task, phi, lam), grad)
        while float(gradient(phi - step).norm()) > float(grad.norm()) and float(step.norm()) > 1e-15:
            step = step / 2
        phi = phi - step
        if float(step.norm()) <= 1e-15 * (1 + float(phi.norm())):
            break
    return phi


def lemma_3(count: int, lams: tuple[float, ...], seed: int) -> Numbers:
    """Error over bound for every problem, lambda and budget of steps: as printed (None where its condition fails) and `everywhere`."""
    points = []
    for index in range(count):
        task = random_task(seed + index)
        for lam in lams:
            c = constants_of(task, lam)
            theta = torch.zeros(D, dtype=torch.float64)
            star = minimiser(task, theta, lam)
            exact = implicit(task, star, lam)
            for steps, cg in BUDGETS:
                solver = NesterovAGD(step_size=1 / c.beta, strong_convexity=c.mu, max_steps=steps)
                found = bilevel.hypergradient(
                    problem(lam), theta, task, solver=solver, linsys=CG(max_steps=cg, rtol=0.0)
                )
                delta = float((found.phi - star).norm())
                delta_prime = float((found.grad - implicit(task, found.phi, lam)).norm())
                error, slack = float((found.grad - exact).norm()), ROUNDING * float(exact.norm())
                printed, sharper = (
                    implicit_gradient_error(c.lam, c.rho, c.mu, c.B, c.L, delta, delta_prime, everywhere=everywhere)
                    for everywhere in (False, True)
                )
                points.append(
                    {
                        "lam": lam,
                        "error": error / float(exact.norm()),
                        "printed": printed / float(exact.norm()) if math.isfinite(printed) else None,
                        "everywhere": sharper / float(exact.norm()),
                        "violated": error > printed + slack or error > sharper + slack,
                    }
                )
    return {"points": points}


def theorem_2(count: int, lams: tuple[float, ...], seed: int) -> Numbers:
    """The promised iterations: the error after them, and how many a solver took that stopped at the tolerances of the theorem."""
    points = []
    for index in range(count):
        task = random_task(seed + index)
        for lam in lams:
            c = constants_of(task, lam)
            theta = torch.zeros(D, dtype=torch.float64)
            star = minimiser(task, theta, lam)
            exact = implicit(task, star, lam)
            for accuracy in ACCURACIES:
                points.append(_promise(task, theta, star, exact, c, accuracy))
    return {"points": points}


def _promise(task: Task, theta: Tensor, star: Tensor, exact: Tensor, c: Constants, accuracy: float) -> Numbers:
    eps = accuracy * float(exact.norm())
    delta, delta_prime = theorem2_tolerances(lam=c.lam, rho=c.rho, mu=c.mu, B=c.B, L=c.L, eps=eps)
    distance = float((star - theta).norm())
    inner, linear = theorem2_iterations(
        kappa=c.beta / c.mu, D=distance, lam=c.lam, rho=c.rho, mu=c.mu, B=c.B, L=c.L, eps=eps
    )

    def run(tol: float, atol: float) -> bilevel.Hypergradient:
        solver = NesterovAGD(
            step_size=1 / c.beta, strong_convexity=c.mu, max_steps=max(inner, 1), tol=tol, check_every=1
        )
        linsys = CG(max_steps=max(linear, 1), rtol=0.0, atol=atol)
        return bilevel.hypergradient(problem(c.lam), theta, task, solver=solver, linsys=linsys)

    promised, stopped = run(0.0, 0.0), run(c.mu * delta, c.mu * delta_prime / c.lam)
    error = float((promised.grad - exact).norm())
    assert stopped.inner is not None
    return {
        "lam": c.lam,
        "kappa": c.beta / c.mu,
        "accuracy": accuracy,
        "error": error / float(exact.norm()),
        "violated": error > eps + ROUNDING * float(exact.norm()),
        "stopped error": float((stopped.grad - exact).norm()) / float(exact.norm()),
        "promised": [inner, linear],
        "taken": [int(stopped.inner.steps), stopped.linear.num_matvecs],
    }


def corollary_1(tasks: int, steps: int, seed: int) -> Numbers:
    """|grad F| over gradient descent with steps 1/L_F, its smallest value so far, and what the corollary allows for it.

    The gap F(0) - min F is bounded by F(0), as the losses are not negative. The meta-gradients are iMAML's, to 1e-3 (the library's
    estimate); `errors` are the true ones over the smallest |grad F| so far divided by sqrt 2, which the corollary needs to be at most 1.
    """
    lam = 1.0
    every = [random_task(seed + i, scale=0.5) for i in range(tasks)]
    batch = {key: torch.stack([task[key] for task in every]) for key in every[0]}
    constants = [constants_of(task, lam) for task in every]
    lipschitz = sum(c.lipschitz for c in constants) / tasks
    beta = max(c.beta for c in constants)
    solver = NesterovAGD(step_size=1 / beta, strong_convexity=lam, max_steps=1000, check_every=1)
    theta, norms, values, errors = torch.zeros(D, dtype=torch.float64), [], [], []
    for _ in range(steps):
        stars = [minimiser(task, theta, lam) for task in every]
        exact = torch.stack([implicit(task, star, lam) for task, star in zip(every, stars, strict=True)]).mean(0)
        values.append(sum(float(problem(lam).test_loss(s, t)) for s, t in zip(stars, every, strict=True)) / tasks)
        norms.append(float(exact.norm()))
        found = bilevel.hypergradient(
            problem(lam), theta, batch, solver=solver, linsys=CG(max_steps=D), batched=True, accuracy=1e-3
        )
        errors.append(float((found.grad - exact).norm()) * math.sqrt(2) / min(norms))
        theta = theta - found.grad / lipschitz
    gap = values[0]
    allowed = [math.sqrt(4 * lipschitz * gap / (k + 1)) for k in range(steps)]
    reached = [min(norms[: k + 1]) for k in range(steps)]
    # calls that the corollary promises for the gradient norm of the last step, which took tasks * steps of them
    promised = corollary1_calls(M=tasks, L_F=lipschitz, gap=gap, eps=reached[-1])
    return {
        "tasks": tasks,
        "norms": norms,
        "values": values,
        "allowed": allowed,
        "L_F": lipschitz,
        "worst inexactness": max(errors),
        "violations": sum(r > a for r, a in zip(reached, allowed, strict=True)),
        "calls": tasks * steps,
        "promised calls": promised,
    }
