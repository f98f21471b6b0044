"""How far may each parameter move? Lambda learned with the network

In few-shot learning with iMAML a task adapts the shared parameters, and $\\lambda$ holds it near them. `LearnedProximalProblem` makes
$\\lambda$ a part of what is learned: one number, one for each leaf (a kernel, a bias, ...), or one for each parameter. The hypergradient is
with respect to the shared parameters and $\\lambda$ together, so nothing has to be tried out
([learning the regulariser](../regularisation.md)).

The problem is that of [few-shot learning from a folder of images](few_shot.md), with a smaller network. Every row has the same
initial weights, tasks, solvers and number of meta-steps. The learned ones start at the largest $\\lambda$ of the grid, and are
compared with the fixed value that does best on the tasks that the table is from, which is more than a user can know. The grid costs one
training for each value. The intervals are for the mean over the runs; the last column is taken run by run.

Below the table: half of the steps bring the one number down, the other half move it by less than a factor of two. The many are not
settled: each follows the noise of single meta-steps, most of all where every parameter has its own.
"""

import argparse
import tempfile
import time
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib
import torch
from _glyphs import write_folder
from few_shot import SIZE, WAYS, interval, sampler

import bilevel
from applications.meta_learning.data import load_folder, random_split
from applications.meta_learning.models import ConvNet, initial_theta
from applications.meta_learning.problem import batched_outputs, cross_entropy
from bilevel.linsys import CG
from bilevel.regularisation import Diagonal, PerLeaf, Scalar
from bilevel.solvers import LBFGS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRID = (0.02, 0.2, 2.0)
START = GRID[-1]
LEARNED = {"a number, learned": Scalar(), "per leaf, learned": PerLeaf(), "diagonal, learned": Diagonal()}
SOLVER = LBFGS(max_steps=6)  # its line search suits every lambda


def regularised_problem(network, kind):
    """Adapt to the support images, be judged on the queries."""

    def predict(phi, task):
        return torch.func.functional_call(network, phi, (task["support"]["x"],))

    def query_loss(phi, task):
        return cross_entropy(torch.func.functional_call(network, phi, (task["query"]["x"],)), task["query"]["y"])

    return bilevel.LearnedProximalProblem.from_model(
        predict, lambda logits, task: cross_entropy(logits, task["support"]["y"]), query_loss, kind
    )


def meta_train(problem, theta, tasks, steps, rate):
    """Changes theta in place. `rate`: of the logarithm of lambda, 0 leaves it as it is. Returns lambda half way."""
    groups = [{"params": bilevel.tree_leaves(theta[part]), "lr": lr} for part, lr in (("centre", 3e-3), ("lam", rate))]
    outer = torch.optim.Adam(groups)
    for step in range(steps):
        if step == steps // 2:
            half_way = problem.lam(theta)
        meta = bilevel.hypergradient(
            problem,
            theta,
            tasks.sample(8),
            solver=SOLVER,
            linsys=CG(max_steps=4),
            curvature=bilevel.GaussNewton(),
            batched=True,
        )
        meta.assign_grad(theta)
        outer.step()
    return half_way


def one_run(classes, seed, steps, num_tasks):
    """{row: (accuracy in %, seconds, lambda, lambda half way)}"""
    torch.manual_seed(seed)
    split = random_split(classes, num_train=2 * classes.num_classes // 3, seed=seed)
    network = ConvNet(WAYS, channels=16, in_size=SIZE, zero_head=True)
    held_out, found = sampler(classes, split.test, seed).sample(num_tasks), {}
    arms = [(f"{lam:g}, fixed", Scalar(), lam, 0.0) for lam in GRID]
    arms += [(name, kind, START, 0.25) for name, kind in LEARNED.items()]
    for name, kind, lam, rate in arms:
        problem = regularised_problem(network, kind)
        theta = problem.initial_theta(initial_theta(network, torch.float32, torch.device("cpu")), lam)
        begin = time.process_time()
        half_way = meta_train(problem, theta, sampler(classes, split.train, seed, rotations=True), steps, rate)
        seconds = time.process_time() - begin
        phi = bilevel.solve(problem, theta, held_out, solver=SOLVER, batched=True).unwrap()
        right = batched_outputs(network, phi, held_out["query"]["x"]).argmax(-1) == held_out["query"]["y"]
        found[name] = 100 * right.double().mean(), seconds, problem.lam(theta), half_way
    return found


def draw(results, rights, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for row, (mean, half) in enumerate(map(interval, rights.values())):
        left.errorbar(mean, row, xerr=half, fmt="o", color="#4477aa" if row < len(GRID) else "#cc3311", capsize=3)
    left.set_yticks(range(len(rights)), list(rights))
    left.set(xlabel="accuracy on new classes, %")
    left.invert_yaxis()
    first = results[0]
    names, per_leaf, diagonal = sorted(first["per leaf, learned"][2]), *(first[name][2] for name in list(LEARNED)[1:])
    for row, name in enumerate(names):
        low, middle, high = diagonal[name].flatten().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        right.plot(per_leaf[name], row, "o", color="#cc3311", label=None if row else "per leaf")
        right.plot([low, high], [row + 0.3] * 2, color="#228833", label=None if row else "diagonal, 5 to 95 %")
        right.plot(middle, row + 0.3, "|", color="#228833")
    right.axvline(float(first["a number, learned"][2]), color="#4477aa", label="a number")
    right.axvline(START, color="grey", ls=":", label="start")
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set(xscale="log", xlabel="lambda, first run")
    right.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    right.minorticks_off()
    right.invert_yaxis()
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def main(quick: bool, out: Path) -> None:
    torch.set_num_threads(1)
    runs, steps, num_tasks, num_classes = (2, 2, 20, 40) if quick else (3, 28, 100, 150)
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(Path(temporary, "images"), num_classes, images=12, size=SIZE)
        classes = load_folder(Path(temporary, "images"), cache_dir=temporary, size=SIZE, colours="grey")
    results = [one_run(classes, seed, steps, num_tasks) for seed in range(runs)]
    rights = {name: torch.stack([found[name][0] for found in results]) for name in results[0]}
    best = max(list(rights)[: len(GRID)], key=lambda name: rights[name].mean())
    print(f"{runs} runs of {steps} meta-steps, {num_tasks} tasks of new classes each, {WAYS} classes per task\n")
    print(f"{'lambda':20}{'seconds':>9}{'accuracy, %':>16}{f'minus {best}':>22}")
    for name, values in rights.items():
        seconds = sum(found[name][1] for found in results) / runs
        line = f"{name:20}{seconds:9.1f}" + "{:10.1f} ± {:.1f}".format(*interval(values))
        print(line + ("" if name == best else "{:16.1f} ± {:.1f}".format(*interval(values - rights[best]))))
    print("\nlambda that was learned, from", START)
    for name, part in (("a number", 2), ("half way", 3)):
        print(
            f"  {name:14}" + "".join(f"{found['a number, learned'][part]:8.2f}" for found in results) + "  (each run)"
        )
    for name in sorted(results[0]["per leaf, learned"][2]):
        values = [found["per leaf, learned"][2][name] for found in results]
        print(f"  {name:14}" + "".join(f"{value:8.2f}" for value in values))
    draw(results, rights, out / "learned_regularisation.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How far may each parameter move? Lambda learned with the network")
    parser.add_argument("--quick", action="store_true", help="fewer runs, steps and tasks")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figure")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.out)
