"""A deep-equilibrium layer, trained with `backward()`

The output $z$ of the layer solves $z = \\tanh(Wz + Ux + b)$. In code it is an ordinary `torch.nn.Module` whose `forward` calls
`bilevel.fixed_point`; Anderson mixing finds the point, GMRES solves the linear system of the backward pass, whose matrix has no
symmetry. With $W = (1 - m) I - A^T A + B - B^T$ and $m > 0$ there is exactly one solution, whatever $A$ and $B$ are (Winston and Kolter,
NeurIPS 2020), but the steps $z \\leftarrow \\tanh(Wz + Ux + b)$ need not lead to it. The layer learns scikit-learn's handwritten digits.

Two comparisons. *One gradient* at a trained layer, for a batch of images, beside back-propagation through $k$ steps, plain or damped (by
0.3 of the way at a time): the error of $dL/dU$ against dense linear algebra, the peak of the memory that one forward and backward pass
allocates, and processor time. *Training*, over several divisions and initial weights: the same layer as $k$ steps, and an ordinary
hidden layer with as many parameters. The intervals are for the mean over the runs; differences are taken run by run.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

import _extras  # noqa: F401 - says what to install
import matplotlib
import scipy.stats
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.linsys import GMRES, BiCGStab
from bilevel.solvers import Anderson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, MARGIN = 40, 0.5
os.environ["KINETO_LOG_LEVEL"] = "6"  # or the profiler, which measures the memory, writes to stderr


def update(z, theta, drive):
    """The map whose fixed point is the output: z and drive are ``(batch, WIDTH)``."""
    return torch.tanh(z @ theta["W"].T + drive)


class Equilibrium(torch.nn.Module):
    """``steps``: None solves the equation; a number takes so many steps from zero, for autograd to go through."""

    def __init__(self, inputs, steps=None, damping=1.0):
        super().__init__()
        self.A, self.B = (torch.nn.Parameter(0.5 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for _ in range(2))
        self.U = torch.nn.Linear(inputs, WIDTH)
        self.steps, self.damping, self.tol, self.linsys = steps, damping, 1e-3, GMRES

    def W(self):
        return (1 - MARGIN) * torch.eye(WIDTH) - self.A.T @ self.A + self.B - self.B.T

    def forward(self, x):
        theta, drive = {"W": self.W()}, self.U(x)
        z = torch.zeros_like(drive)
        if self.steps is None:
            return bilevel.fixed_point(
                update,
                theta,
                drive,
                solver=Anderson(max_steps=100, tol=self.tol, check_every=5),
                linsys=self.linsys(max_steps=100, rtol=self.tol),
                init=z,
                check=True,
            )
        for _ in range(self.steps):
            z = z.lerp(update(z, theta, drive), self.damping)
        return z


def exact_gradient(network, x, y):
    """dL/dU by dense algebra, image by image: with J = dT/dz, (I - J^T) u = dL/dz."""
    layer, head = network
    with torch.no_grad():
        W, drive, z = layer.W(), layer.U(x), torch.zeros(len(x), WIDTH)
        for _ in range(2000):
            z.lerp_(update(z, {"W": W}, drive), 0.2)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(head(z), y), z)
    gain = 1 - z.detach().square()  # the derivative of tanh there
    A = torch.eye(WIDTH) - gain[:, :, None] * W
    return (gain * torch.linalg.solve(A.mT, slope)).T @ x


def peak_memory(call):
    """MB that are allocated at once, at most. (The sums that `profile.events()` has per operator leave out frees between them.)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes)) / 1e6


def compare_gradients(network, x, y, repeats):
    """Error, memory and time of dL/dU with the layer solved, and with it unrolled: {name: (error, MB, ms)}."""
    layer, exact, rows = network[0], exact_gradient(network, x, y), {}

    def gradient():
        return torch.autograd.grad(cross_entropy(network(x), y), layer.U.weight)[0]

    for name, layer.steps, layer.damping, layer.tol, layer.linsys in (
        ("solved, as in training", None, 1.0, 1e-3, GMRES),
        ("solved, BiCGStab", None, 1.0, 1e-3, BiCGStab),
        ("solved to 1e-10", None, 1.0, 1e-10, GMRES),
        *((f"k = {k}", k, 1.0, None, None) for k in (1, 5, 20, 100)),
        *((f"k = {k}, damped", k, 0.3, None, None) for k in (5, 20, 50, 100)),
    ):
        error = float((gradient() - exact).norm() / exact.norm())
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            gradient()
            times.append(1e3 * (time.process_time() - begin))
        rows[name] = error, peak_memory(gradient), min(times)
    return rows


def train(network, x, y, epochs):
    """Processor seconds that it took."""
    begin, optimizer = time.process_time(), torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return time.process_time() - begin


def networks():
    """All with a linear layer on top."""
    for name, *steps in (("equilibrium",), ("k = 1", 1), ("k = 5", 5), ("k = 20", 20), ("k = 20, damped", 20, 0.3)):
        yield name, torch.nn.Sequential(Equilibrium(64, *steps), torch.nn.Linear(WIDTH, 10))
    hidden = WIDTH * (2 * WIDTH + 75) // 75
    yield (
        "ordinary layer",
        torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 10)),
    )


def interval(values):
    """Mean and half-width of the 95 % interval over runs, by Student's t."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return float(values.mean()), float(half)


def draw(gradients, accuracies, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, (error, memory, _) in gradients.items():
        colour = "#cc3311" if name.startswith("solved") else "#228833" if name.endswith("damped") else "#4477aa"
        left.loglog(memory, error, "o", color=colour)
        side, gap = ("right", -6) if name == "solved, BiCGStab" else ("left", 6)  # its neighbour is on the right
        left.annotate(name, (memory, error), (gap, 0), textcoords="offset points", fontsize=8, va="center", ha=side)
    left.set(xlabel="peak memory, MB", ylabel="relative error of the gradient")
    left.set_xlim(right=6 * max(memory for _, memory, _ in gradients.values()))
    for row, (_, values) in enumerate(reversed(accuracies.items())):
        mean, half = interval(values)
        right.errorbar(mean, row, xerr=half, fmt="o", color="#4477aa", capsize=3)
    right.set_yticks(range(len(accuracies)), list(reversed(accuracies)))
    right.set(xlabel="test accuracy, %")
    figure.savefig(path, dpi=130)


def main(quick: bool, out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    seeds, epochs, size = (2, 4, 100) if quick else (6, 20, 500)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16), torch.tensor(labels)
    accuracies, seconds, sizes = {}, {}, {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        mine, test = torch.randperm(len(labels)).split([1000, len(labels) - 1000])
        for name, network in networks():
            torch.manual_seed(seed)
            seconds.setdefault(name, []).append(train(network, images[mine], labels[mine], epochs))
            with torch.no_grad():
                right = (network(images[test]).argmax(-1) == labels[test]).double().mean()
            accuracies.setdefault(name, []).append(100 * right)
            sizes[name] = sum(parameter.numel() for parameter in network.parameters())
            if seed == 0 and name == "equilibrium":
                gradients = compare_gradients(network, images[test][:size], labels[test][:size], 2 if quick else 10)
    print(f"One gradient, {size} images{'error':>20}{'MB':>9}{'ms':>9}")
    for name, (error, memory, spent) in gradients.items():
        print(f"  {name:28}{error:16.1e}{memory:9.2f}{spent:9.1f}")
    print(f"\nTraining, {seeds} runs of {epochs} epochs\n{'':18}parameters{'seconds':>9}{'accuracy, %':>16}", end="")
    print(f"{'minus equilibrium':>20}")
    accuracies = {name: torch.stack(values) for name, values in accuracies.items()}
    for name, values in accuracies.items():
        line = f"  {name:16}{sizes[name]:10}{sum(seconds[name]) / seeds:9.1f}"
        for numbers in (values, values - accuracies["equilibrium"])[: 1 if name == "equilibrium" else 2]:
            line += "{:12.1f} ± {:.1f}".format(*interval(numbers))
        print(line)
    draw(gradients, accuracies, out / "equilibrium.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A deep-equilibrium layer, trained with `backward()`")
    parser.add_argument("--quick", action="store_true", help="fewer runs and epochs")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figure")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.out)
