"""Few-shot learning from a folder of images

A folder with one sub-folder for each class, PNG or JPEG files in it, becomes a classifier of *other* classes that has seen one image
of each. The whole path is here in code: read the folder, hold classes out, meta-train a small convolutional network with implicit
gradients (iMAML), adapt it to new classes, predict. `--folder` names images of your own; without it the script draws characters
into a temporary folder (`examples/_glyphs.py`). The program `imaml train --dataset folder` has the same path with checkpoints and
settings ([your own images](../own_images.md)).

The comparison is on tasks from the held-out classes: the nearest image in pixels, the same network adapted without meta-training,
first-order MAML, and iMAML. First-order MAML leaves out the linear system; it gets the same processor time and so takes more steps.
Each run has another division of the classes, other initial weights and other tasks; the intervals are for the mean over the runs,
and the last column is taken run by run. The networks use the statistics of the images at hand (batch norm), so a query is judged
together with the others of its task.
"""

import argparse
import tempfile
import time
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib
import scipy.stats
import torch
from _glyphs import write_folder

import bilevel
from applications.meta_learning.data import TaskSampler, load_folder, random_split
from applications.meta_learning.models import ConvNet, initial_theta
from applications.meta_learning.problem import batched_outputs, cross_entropy, few_shot_problem, head_and_body
from bilevel.linsys import CG, Identity
from bilevel.solvers import NesterovAGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WAYS, SHOTS, QUERIES, SIZE = 5, 1, 5, 20
SOLVER = NesterovAGD(step_size=0.1, max_steps=5, momentum=0.6)  # adapts the network to a task
NEAREST, UNTRAINED, FIRST_ORDER, IMAML = "nearest in pixels", "not meta-trained", "first-order MAML", "iMAML"


def sampler(classes, indices, seed, rotations=False):
    """Tasks of some classes. `rotations`: a class turned by 90, 180 or 270 degrees is another class."""
    return TaskSampler(
        classes.images,
        indices,
        ways=WAYS,
        shots=SHOTS,
        query_shots=QUERIES,
        rotations=rotations,
        seed=seed,
        device="cpu",
        counts=classes.counts,
    )


def meta_train(problem, theta, tasks, linsys, steps, seconds):
    """At most so many steps or processor seconds; changes theta in place. Returns both."""
    begin, outer = time.process_time(), torch.optim.Adam(theta.values(), lr=3e-3)
    for step in range(steps):
        if time.process_time() - begin > seconds:
            return step, time.process_time() - begin
        meta = bilevel.hypergradient(
            problem,
            theta,
            tasks.sample(8),
            solver=SOLVER,
            linsys=linsys,
            curvature=bilevel.GaussNewton(),
            batched=True,
        )
        meta.assign_grad(theta)
        outer.step()
    return steps, time.process_time() - begin


def predict(problem, network, theta, tasks):
    """Adapt to the support images of each task and classify its queries: ``(tasks, queries)``."""
    phi = bilevel.solve(problem, theta, tasks, solver=SOLVER, batched=True).unwrap()
    return batched_outputs(network, phi, tasks["query"]["x"]).argmax(-1)


def nearest(tasks):
    """The class of the support image that is nearest to each query."""
    distances = torch.cdist(tasks["query"]["x"].flatten(2), tasks["support"]["x"].flatten(2))
    return tasks["support"]["y"].gather(1, distances.argmin(-1))


def one_run(classes, seed, rotations, steps, num_tasks):
    """({method: accuracy in %}, {method: (steps, seconds)}, a task and the answers of iMAML)"""
    torch.manual_seed(seed)
    split = random_split(classes, num_train=2 * classes.num_classes // 3, seed=seed)
    network = ConvNet(WAYS, channels=32, in_size=SIZE, zero_head=True)
    start = initial_theta(network, torch.float32, torch.device("cpu"))
    lam = head_and_body(network, lam=0.5, lam_head=0.1)  # the last layer may move farther than the others
    problem = few_shot_problem(network, cross_entropy, lam)
    held_out = sampler(classes, split.test, seed).sample(num_tasks)

    answers, spent, seconds = (
        {NEAREST: nearest(held_out), UNTRAINED: predict(problem, network, start, held_out)},
        {},
        0.0,
    )
    for name, linsys in ((IMAML, CG(max_steps=4)), (FIRST_ORDER, Identity())):
        theta, tasks = (
            {key: leaf.clone() for key, leaf in start.items()},
            sampler(classes, split.train, seed, rotations),
        )
        limits = (steps, float("inf")) if name == IMAML else (10**9, seconds)
        spent[name] = meta_train(problem, theta, tasks, linsys, *limits)
        seconds = spent[name][1]
        answers[name] = predict(problem, network, theta, held_out)
    right = {name: 100 * (given == held_out["query"]["y"]).double().mean() for name, given in answers.items()}
    return right, spent, (held_out["support"]["x"][0], held_out["query"]["x"][0], answers[IMAML][0])


def interval(values):
    """Mean and half-width of the 95 % interval over runs, by Student's t."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return float(values.mean()), float(half)


def draw(rights, task, path):
    """Left: the accuracies. Right: one task, a row for each class; the first image was learned from, the others are predicted."""
    support, query, answers = task
    figure = plt.figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    axes = left.subplots()
    for row, (mean, half) in enumerate(map(interval, rights.values())):
        axes.errorbar(mean, row, xerr=half, fmt="o", color="#4477aa", capsize=3)
        axes.annotate(f"{mean:.0f} %", (mean, row), (0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rights)), list(rights))
    axes.set(xlabel="accuracy on new classes, %", ylim=(-0.5, len(rights) - 0.3))
    panels = right.subplots(WAYS, 1 + QUERIES)
    for label in range(WAYS):
        own = range(label * QUERIES, (label + 1) * QUERIES)
        shown = [(support[label * SHOTS], f"class {label + 1}", "black")]
        marks = {i: "" if answers[i] == label else " (wrong)" for i in own}
        shown += [
            (query[i], f"{answers[i] + 1}{marks[i]}", "#4477aa" if answers[i] == label else "#cc3311") for i in own
        ]
        for panel, (image, title, colour) in zip(panels[label], shown, strict=True):
            panel.imshow(image.movedim(0, -1), cmap="gray", vmin=0, vmax=1)
            panel.set_title(title, fontsize=8, color=colour, pad=2)
            panel.set(xticks=[], yticks=[])
    right.suptitle("a new task: one image of each class, then predictions", fontsize=9)
    figure.savefig(path, dpi=130)


def main(quick: bool, out: Path, folder: Path | None) -> None:
    torch.set_num_threads(1)
    runs, steps, num_tasks, num_classes = (2, 4, 20, 40) if quick else (4, 50, 160, 150)
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            write_folder(Path(temporary, "images"), num_classes, images=12, size=SIZE)
        classes = load_folder(folder or Path(temporary, "images"), cache_dir=temporary, size=SIZE, colours="grey")
    results = [one_run(classes, seed, folder is None, steps, num_tasks) for seed in range(runs)]
    print(
        f"{classes.num_classes} classes, two thirds of them to meta-train on; {runs} runs, {num_tasks} tasks of new classes each"
    )
    print(f"{WAYS} classes per task, {SHOTS} image of each to adapt to, {QUERIES} to classify\n")
    print(f"{'':22}{'steps':>8}{'seconds':>9}{'accuracy, %':>15}{'iMAML minus it':>19}")
    rights = {
        name: torch.stack([right[name] for right, _, _ in results]) for name in (NEAREST, UNTRAINED, FIRST_ORDER, IMAML)
    }
    for name, values in rights.items():
        spent = [spent[name] for _, spent, _ in results if name in spent]
        taken = "{:8.0f}{:9.1f}".format(*torch.tensor(spent).mean(0)) if spent else " " * 17
        line = f"{name:22}{taken}" + "{:9.1f} ± {:.1f}".format(*interval(values))
        print(line + ("" if name == IMAML else "{:13.1f} ± {:.1f}".format(*interval(rights[IMAML] - values))))
    draw(rights, results[0][2], out / "few_shot.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Few-shot learning from a folder of images")
    parser.add_argument("--quick", action="store_true", help="fewer runs, steps and tasks")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figure")
    parser.add_argument("--folder", type=Path, help="your images, <class>/*.png; without it characters are drawn")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.out, arguments.folder)
