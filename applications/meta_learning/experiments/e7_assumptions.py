"""E7: do the assumptions of the paper's theory hold on a real network? (A question of the reviewers.)

Theorem 1 asks that G(., theta) is mu-strongly convex and beta-smooth, that the test loss is B-Lipschitz with an L-Lipschitz gradient, that
the Hessian of the training loss is rho-Lipschitz, and (Lemma 3) that the distance delta to the minimiser is below mu / (2 rho). For each
task, at the adapted parameters phi and at the point p where L-BFGS leads from there:

    mu, beta    ends of the spectrum of d2G/dphi2, by Lanczos. The smallest Ritz value is never below the smallest eigenvalue, so that a
                negative one proves that G is not convex, as does negative curvature in CG; a positive one proves nothing.
    B, L        |grad L_test| and the largest |eigenvalue| of its Hessian: what the constants are at least.
    rho         |H(phi) - H(p)| / |phi - p|, in the spectral norm: what rho is at least, and all that Lemma 3 needs between the two.
    delta       at most |dG/dphi| / mu, where mu > 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import bilevel
from applications.meta_learning.config import Config
from applications.meta_learning.data import TaskBatch
from applications.meta_learning.experiments.base import Experiment, Numbers, Request, table
from applications.meta_learning.method import conditions
from applications.meta_learning.presets import preset
from applications.meta_learning.problem import Theta
from applications.meta_learning.report import PALETTE, STYLE
from applications.meta_learning.tasks import load_source
from applications.meta_learning.train import Trainer, TrainingFailed
from bilevel import ProximalProblem
from bilevel.linsys import CG, ritz_values
from bilevel.solvers import LBFGS

STAGES = (0, 50, 100, 150)  # meta-steps
TASKS, LANCZOS, FURTHER, MANY = 8, 30, 100, 50
TEST_TASKS, TEST_QUERIES = 100, 5
CHANNELS, META_BATCH = 32, 8
AUDIT_SEED = 7_001  # tasks of the training classes, other than those of the training
POINTS = ("adapted", "further")

Loss = Callable[[Tensor], Tensor]  # flat parameters (tasks, d) -> (tasks,)


@dataclass(frozen=True)
class Setting:
    """A meta-training: lambda, and the matrix of its linear systems."""

    lam: float
    curvature: str

    @property
    def name(self) -> str:
        """For the page and for files."""
        return f"lambda {self.lam:g}, {self.curvature}"


SETTINGS = (
    Setting(0.5, "gauss-newton"),
    Setting(2.0, "gauss-newton"),
    Setting(8.0, "gauss-newton"),
    Setting(2.0, "hessian"),
)


class E7Assumptions(Experiment):
    """See the module."""

    name = "e7_assumptions"
    uses_gpu = True
    title = "E7. The assumptions of the theory on a real network"
    paper = "nothing; the reviewers asked. Assumptions 1 and 2, Lemma 3 and Theorem 1 are what is looked at."

    def run(self, request: Request) -> Numbers:
        settings, stages = (SETTINGS[1:2], (0, 1)) if request.quick else (SETTINGS, STAGES)
        runs = []
        for setting in settings:
            config = _config(setting, request)
            measure = partial(_training, config, request.data_dir, stages, 2 if request.quick else TASKS)
            runs.append({"name": setting.name, **request.part(setting.name.replace(" ", "-"), measure)})
        return {
            "dataset": config.dataset,
            "conditions": conditions(config),
            "channels": config.channels,
            "meta_batch": config.meta_batch,
            "inner_steps": config.inner_steps,
            "inner_step_size": config.inner_step_size,
            "cg_steps": config.linear_steps,
            "many": MANY,
            "further": FURTHER,
            "lanczos": LANCZOS,
            "runs": runs,
        }

    def draw(self, result: Numbers, path: Path) -> None:
        with plt.rc_context(STYLE):
            figure, (eigenvalue, curvature, constants) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
            for i, (run, colour) in enumerate(zip(result["runs"], PALETTE, strict=False)):
                _draw_run(run, colour, 2.0 * (i - 1.5), eigenvalue, curvature, constants)
            eigenvalue.axhline(0, color="black", lw=0.8)
            eigenvalue.set(title="smallest eigenvalue of the Hessian of G", ylabel="each task, and the median")
            eigenvalue.set_yscale("symlog", linthresh=1)
            eigenvalue.margins(y=0.1)
            curvature.set(
                title=f"negative curvature (dashed: met in {result['cg_steps']} CG steps)",
                ylabel="share of tasks, %",
            )
            curvature.set_ylim(-4, 104)
            constants.set(title="at least: rho, beta (dashed), B (dotted)", ylabel="median", yscale="log")
            for axes in (eigenvalue, curvature, constants):
                axes.set_xlabel("meta-steps")
            figure.legend(*eigenvalue.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
            figure.savefig(path)
            plt.close(figure)

    def findings(self, result: Numbers) -> list[str]:
        return [*_setup(result), "", *_curvature_table(result), "", *_constants_table(result), "", *_summary(result)]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def _config(setting: Setting, request: Request) -> Config:
    """The paper's settings for 5-way 1-shot and gradient descent, with fewer filters and tasks; on GPU or CPU."""
    config = replace(
        preset("omniglot-5w1s-gd"),
        lam=setting.lam,
        curvature=setting.curvature,  # type: ignore[arg-type]  # one of the names that Config knows
        channels=CHANNELS,
        meta_batch=META_BATCH,
        seed=request.seed,
        threads=1,
    )
    if request.data_dir is None:
        config = replace(config, dataset="glyphs")
    return (
        replace(config, channels=4, meta_batch=2, glyph_classes=12, train_classes=7, image_size=12)
        if request.quick
        else config
    )


def _training(config: Config, data_dir: Path | None, stages: tuple[int, ...], tasks: int) -> Numbers:
    """Meta-train and stop at each stage for an audit."""
    torch.set_num_threads(config.threads)
    trainer = Trainer(config, load_source(config, data_dir=data_dir))
    audits, failure = [], None
    for stage in stages:
        try:
            while trainer.progress.step < stage:
                trainer.meta_step()
        except TrainingFailed:
            failure = trainer.progress.step
            break
        audits.append({"step": stage, **_audit(trainer, tasks)})
    progress = trainer.progress
    return {
        "lam": config.lam,
        "curvature": config.curvature,
        "audits": audits,
        "gave_up_at": failure,
        "trained_tasks": progress.tasks,
        "failed_tasks": progress.failed_tasks,
        "negative_tasks": progress.negative_tasks,
    }


def _audit(trainer: Trainer, tasks: int) -> Numbers:
    """The quantities of the module, in float64, one list over the tasks for each. Tasks whose adaptation failed are left out."""
    config, problem = trainer.config, trainer.method.problem
    assert isinstance(problem, ProximalProblem)
    precise = replace(config, dtype="float64")
    sampler = trainer.source.sampler(
        precise, held_out=False, query_shots=config.query_shots, seed=config.seed + AUDIT_SEED, device=trainer.device
    )
    theta, data = {name: leaf.detach().double() for name, leaf in trainer.theta.items()}, sampler.sample(tasks)
    adapted = bilevel.solve(problem, theta, data, solver=trainer.method.solver, batched=True)
    kept = ~adapted.failed
    data = _keep(data, kept)
    start = {name: leaf[kept] for name, leaf in adapted.value.items()}
    further = bilevel.solve(problem, theta, data, solver=LBFGS(max_steps=FURTHER, tol=1e-8), init=start, batched=True)
    found: dict[str, Tensor] = {}
    centre = flat(theta, tasks=0)
    points = {"adapted": flat(start), "further": flat(further.value)}
    inner = partial(_inner, problem, theta, data)
    for name, phi in points.items():
        slope, product = products(inner, phi)
        low, high, doubt = ends(product, phi)
        found |= {f"{name}_slope": slope.norm(dim=-1), f"{name}_mu": low, f"{name}_beta": high, f"{name}_doubt": doubt}
        found[f"{name}_move"] = (phi - centre).norm(dim=-1)
        slope, product = products(partial(_outer, problem, theta, data), phi)
        low, high, _ = ends(product, phi)
        found |= {f"{name}_B": slope.norm(dim=-1), f"{name}_L": torch.maximum(-low, high)}
    found["rho"] = hessian_change(inner, points["adapted"], points["further"])
    found["distance"] = (points["adapted"] - points["further"]).norm(dim=-1)
    for key, steps in (("cg", config.linear_steps), ("cg_many", MANY)):
        found[f"adapted_{key}"] = _meets_negative_curvature(problem, start, theta, data, steps)
        found[f"further_{key}"] = _meets_negative_curvature(problem, further.value, theta, data, steps)
    accuracy = trainer.test(tasks=TEST_TASKS, query_shots=TEST_QUERIES, seed=config.seed)
    return {
        "tasks": tasks,
        "failed": tasks - int(kept.sum()),
        "accuracy": accuracy.mean,
        "interval": accuracy.interval,
        **{key: value.tolist() for key, value in found.items()},
    }


def _keep(data: TaskBatch, kept: Tensor) -> TaskBatch:
    return {part: {key: value[kept] for key, value in examples.items()} for part, examples in data.items()}


def _meets_negative_curvature(problem: ProximalProblem, phi: Theta, theta: Theta, data: Any, steps: int) -> Tensor:
    """Whether CG for the implicit gradient does within so many steps, (tasks,)."""
    found = bilevel.implicit_gradient(problem, phi, theta, data, linsys=CG(max_steps=steps, rtol=1e-10), batched=True)
    assert found.linear.negative_curvature is not None
    return found.linear.negative_curvature > 0


def _inner(problem: ProximalProblem, theta: Theta, data: Any, phi: Tensor) -> Tensor:
    """G of each task, (tasks,)."""
    return torch.func.vmap(lambda p, task: problem.inner_objective(p, theta, task))(unflat(phi, theta), data)


def _outer(problem: ProximalProblem, theta: Theta, data: Any, phi: Tensor) -> Tensor:
    return torch.func.vmap(lambda p, task: problem.outer_loss(p, theta, task))(unflat(phi, theta), data)


def flat(parameters: Theta, tasks: int = 1) -> Tensor:
    """One vector for each task: leaves (tasks, ...) -> (tasks, d); with `tasks=0` leaves without that axis -> (d,)."""
    return torch.cat([leaf.flatten(tasks) for leaf in parameters.values()], -1)


def unflat(phi: Tensor, like: Theta) -> Theta:
    """The inverse: (tasks, d) -> leaves (tasks, ...) in the shapes of `like`."""
    parts = phi.split([leaf.numel() for leaf in like.values()], -1)
    return {name: part.unflatten(-1, leaf.shape) for (name, leaf), part in zip(like.items(), parts, strict=True)}


def products(loss: Loss, phi: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gradient (tasks, d) of each task's loss at phi, and products with its Hessian on one retained graph."""
    phi = phi.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(phi).sum(), phi, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, phi, v, retain_graph=True)[0]

    return gradient.detach(), product


def ends(product: Callable[[Tensor], Tensor], phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and the largest Ritz value of symmetric matrices (tasks,), and how far from the smallest an eigenvalue may be."""
    start = torch.randn(phi.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ritz_values(product, start.to(phi).expand_as(phi).contiguous(), LANCZOS)
    return found.values[..., 0], found.values[..., -1], found.residuals[..., 0]


def hessian_change(loss: Loss, first: Tensor, second: Tensor) -> Tensor:
    """|H(first) - H(second)| / |first - second| in the spectral norm, (tasks,): no rho is smaller. 0 where the points are one."""
    (_, at_first), (_, at_second) = products(loss, first), products(loss, second)
    low, high, _ = ends(lambda v: at_first(v) - at_second(v), first)
    distance = (first - second).norm(dim=-1)
    return torch.where(distance > 0, torch.maximum(-low, high) / distance, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Reporting


def _outside(audit: Numbers, point: str) -> list[bool]:
    """Tasks for which Lemma 3 is not known to hold: negative curvature, or |dG/dphi| / mu >= mu / (2 rho)."""
    rows = zip(_negative(audit, point), audit[f"{point}_mu"], audit[f"{point}_slope"], audit["rho"], strict=True)
    return [negative or 2 * rho * slope >= mu * mu for negative, mu, slope, rho in rows]


def _outside_if_convex(audit: Numbers, point: str, lam: float) -> list[bool]:
    """The same if the training loss were convex, so that mu is lambda at least."""
    return [2 * rho * slope >= lam * lam for slope, rho in zip(audit[f"{point}_slope"], audit["rho"], strict=True)]


def _share(flags: list[bool]) -> float:
    return 100 * sum(flags) / max(1, len(flags))


def _negative(audit: Numbers, point: str) -> list[bool]:
    """Tasks with negative curvature that Lanczos or the many steps of CG have seen."""
    seen = zip(audit[f"{point}_mu"], audit[f"{point}_cg"], audit[f"{point}_cg_many"], strict=True)
    return [mu <= 0 or few or many for mu, few, many in seen]


def _middle(values: list[float]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{statistics.median(known):.2g}" if known else "-"


def _draw_run(run: Numbers, colour: str, shift: float, eigenvalue: Axes, curvature: Axes, constants: Axes) -> None:
    audits = [audit for audit in run["audits"] if audit["adapted_mu"]]
    steps = [audit["step"] for audit in audits]
    for audit in audits:
        values = audit["adapted_mu"]
        eigenvalue.plot([audit["step"] + shift] * len(values), values, ".", color=colour, alpha=0.4, ms=5)
    medians = [statistics.median(audit["adapted_mu"]) for audit in audits]
    eigenvalue.plot([step + shift for step in steps], medians, color=colour, label=run["name"])
    curvature.plot(steps, [_share(_negative(audit, "adapted")) for audit in audits], "o-", ms=3, color=colour)
    curvature.plot(steps, [_share(audit["adapted_cg"]) for audit in audits], "o--", ms=3, color=colour)
    for key, dashes in (("rho", "-"), ("adapted_beta", "--"), ("adapted_B", ":")):
        constants.plot(steps, [statistics.median(audit[key]) for audit in audits], f"o{dashes}", ms=3, color=colour)


def _setup(result: Numbers) -> list[str]:
    told, tasks = result["conditions"], result["runs"][0]["audits"][0]["tasks"]
    return [
        f"5-way 1-shot tasks of the training classes; images: {told['images']}. Network: {told['network']}, "
        f"{result['channels']} filters. Batch norm: {told['batch norm']}.",
        "",
        f"Meta-training as in the paper ({result['inner_steps']} steps of gradient descent of {result['inner_step_size']:g}, "
        f"{result['cg_steps']} CG steps, Adam), but with {result['meta_batch']} tasks in a meta-step: once for each lambda with the "
        "Gauss-Newton matrix in the linear systems, and once with the Hessian, to the letter. The audit is in float64, of "
        f"{tasks} tasks that the training has not drawn: at the adapted parameters, and further on, where up to {result['further']} steps "
        f"of L-BFGS lead from there. Eigenvalues by {result['lanczos']} Lanczos steps. Test accuracies are of {TEST_TASKS} tasks of "
        f"held-out classes with {TEST_QUERIES} queries each ({preset('omniglot-5w1s-gd').split} split, one seed).",
    ]


def _curvature_table(result: Numbers) -> list[str]:
    header = ["training", "meta-step", "test accuracy, %", "failed", "smallest Ritz value, median (lowest)"]
    header += ["negative curvature, %", f"met in {result['cg_steps']} / {result['many']} CG steps, %", "slope"]
    header += ["further on: Ritz value (doubt)", "negative curvature, %", "slope"]
    rows = []
    for run in result["runs"]:
        for audit in run["audits"]:
            mu = audit["adapted_mu"]
            rows.append(
                [
                    run["name"],
                    str(audit["step"]),
                    f"{100 * audit['accuracy']:.1f} ± {100 * audit['interval']:.1f}",
                    f"{audit['failed']} of {audit['tasks']}",
                    f"{_middle(mu)} ({min(mu):.2g})" if mu else "-",
                    f"{_share(_negative(audit, 'adapted')):.0f}",
                    f"{_share(audit['adapted_cg']):.0f} / {_share(audit['adapted_cg_many']):.0f}",
                    _middle(audit["adapted_slope"]),
                    f"{_middle(audit['further_mu'])} ({_middle(audit['further_doubt'])})",
                    f"{_share(_negative(audit, 'further')):.0f}",
                    _middle(audit["further_slope"]),
                ]
            )
    note = (
        "Accuracy: 100 tasks of held-out classes with 5 queries each, one seed, ± a 95 % interval over the tasks. Slope: |dG/dphi|; "
        "a median, like the Ritz value further on "
        "and its doubt, within which there is an eigenvalue, but not always the smallest. Negative curvature: seen by Lanczos or by "
        f"{result['many']} CG steps for the meta-gradient."
    )
    return ["## Strong convexity", "", *table(header, rows), "", note]


def _constants_table(result: Numbers) -> list[str]:
    header = ["training", "meta-step", "beta", "B", "L", "rho", "delta at most", "mu / (2 rho)"]
    header += ["distance to the point further on", "outside Lemma 3, %", "outside further on, %"]
    rows = []
    for run in result["runs"]:
        for audit in run["audits"]:
            convex = [
                (slope / mu, mu / (2 * rho) if rho else math.inf)
                for mu, slope, rho in zip(audit["adapted_mu"], audit["adapted_slope"], audit["rho"], strict=True)
                if mu > 0
            ]
            keys = ("adapted_beta", "adapted_B", "adapted_L", "rho")
            rows.append(
                [run["name"], str(audit["step"])]
                + [_middle(audit[key]) for key in keys]
                + [_middle([pair[i] for pair in convex]) for i in (0, 1)]
                + [_middle(audit["distance"])]
                + [f"{_share(_outside(audit, point)):.0f}" for point in POINTS]
            )
    return [
        "## The other constants",
        "",
        "Medians over the tasks. beta, B, L and rho are what the constants are at least, from these points alone; with ReLU the Hessian "
        "jumps, so that no rho holds everywhere. `delta at most`: |dG/dphi| / mu, of the tasks with mu > 0; a dash where none is.",
        "",
        *table(header, rows),
    ]


def _summary(result: Numbers) -> list[str]:
    audits = [audit for run in result["runs"] for audit in run["audits"]]
    negative = {p: [flag for audit in audits for flag in _negative(audit, p)] for p in POINTS}
    outside = {p: sum(sum(_outside(audit, p)) for audit in audits) for p in POINTS}
    convex = {
        p: sum(sum(_outside_if_convex(audit, p, run["lam"])) for run in result["runs"] for audit in run["audits"])
        for p in POINTS
    }
    met = [flag for audit in audits for flag in audit["adapted_cg"]]
    unstable = [result["inner_step_size"] * beta >= 2 for audit in audits for beta in audit["adapted_beta"]]
    seen = [flag for flag, there in zip(met, negative["adapted"], strict=True) if there]
    return [
        "## What it comes to",
        "",
        f"- In {len(met)} audits of a task, there was negative curvature at the adapted parameters in {sum(negative['adapted'])}, and "
        f"further on in {sum(negative['further'])}. There G is not convex, and Theorem 1 does not apply.",
        f"- Lemma 3 says nothing of {outside['adapted']} of them, and of {outside['further']} further on: there is negative curvature, or "
        f"the bound of delta is not below mu / (2 rho). With lambda in place of mu, as for a convex training loss, it would say nothing of "
        f"{convex['adapted']} and {convex['further']}.",
        f"- The step size {result['inner_step_size']:g} of the adaptation is at least 2 / beta in {sum(unstable)} of them: there gradient "
        "descent cannot settle at such a point.",
        f"- {result['cg_steps']} CG steps met negative curvature in {sum(seen)} of the {len(seen)} where there is some. In the other "
        f"{len(seen) - sum(seen)} they give a direction, and no sign that the system is not positive definite.",
        *map(_run_summary, result["runs"]),
    ]


def _run_summary(run: Numbers) -> str:
    needed = [max(0.0, run["lam"] - min(audit["adapted_mu"])) for audit in run["audits"] if audit["adapted_mu"]]
    ended = "" if run["gave_up_at"] is None else f" It gave up at meta-step {run['gave_up_at']}."
    return (
        f"- {run['name']}: of {run['trained_tasks']} training tasks {run['failed_tasks']} failed, and {run['negative_tasks']} met negative "
        "curvature in the linear system. Lambda would have to be above "
        f"{', '.join(f'{value:.2g}' for value in needed)} at the stages in turn for all Hessians of G at these adapted parameters to be "
        f"positive definite, as far as Lanczos saw.{ended}"
    )
