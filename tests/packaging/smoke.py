"""What a user has after `pip install bilevel`: run in an environment with the wheel and nothing else, away from the repository.

    python -I smoke.py bare          only the wheel and what it requires
    python -I smoke.py application   with the extra `meta-learning`

check.py calls it. It uses no test framework: there is none in such an environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import bilevel
import bilevel.testing
from bilevel.linsys import CG
from bilevel.solvers import NewtonCG, ScipyMinimize

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def ridge() -> tuple[bilevel.BilevelProblem, torch.Tensor, Data]:
    """Ridge regression with one penalty per feature; theta are the logarithms of the penalties."""
    torch.manual_seed(0)
    X, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    Xv, yv = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, dtype=torch.float64)

    def train(phi: torch.Tensor, theta: torch.Tensor, data: Data) -> torch.Tensor:
        return 0.5 * (data[0] @ phi - data[1]).square().mean() + 0.5 * (theta.exp() * phi.square()).sum()

    def validate(phi: torch.Tensor, theta: torch.Tensor, data: Data) -> torch.Tensor:
        return 0.5 * (data[2] @ phi - data[3]).square().mean()

    problem = bilevel.BilevelProblem.from_functions(train, validate, initial_phi=lambda theta, data: theta.new_zeros(4))
    return problem, torch.linspace(-1, 0, 4, dtype=torch.float64), (X, y, Xv, yv)


def comes_from_the_wheel() -> None:
    for package in ("bilevel", "applications"):
        folder = Path(importlib.import_module(package).__file__ or "").parent
        assert folder.is_relative_to(sys.prefix), f"{package} is imported from {folder}, not from the environment"
        assert (folder / "py.typed").is_file(), f"{package} does not say that it has types"
    assert importlib.metadata.version("bilevel") == bilevel.__version__


def gives_the_gradient_of_the_closed_form() -> None:
    problem, theta, data = ridge()
    X, y, Xv, yv = data
    H = X.T @ X / len(y) + theta.exp().diag()
    phi = torch.linalg.solve(H, X.T @ y / len(y))
    expected = -theta.exp() * phi * torch.linalg.solve(H, Xv.T @ (Xv @ phi - yv) / len(yv))

    solver, linsys = NewtonCG(max_steps=20, cg_steps=4, tol=1e-12), CG(max_steps=4, rtol=1e-12)
    result = bilevel.hypergradient(problem, theta, data, solver=solver, linsys=linsys)
    torch.testing.assert_close(result.unwrap(), expected, rtol=1e-8, atol=1e-12)

    theta.requires_grad_()
    point = bilevel.argmin(problem, theta, data, solver=solver, linsys=linsys, check=True)
    problem.outer_loss(point, theta, data).backward()
    torch.testing.assert_close(theta.grad, expected, rtol=1e-8, atol=1e-12)


def needs_no_extra_except_where_it_says_so() -> None:
    """Every module of the core is imported; what an extra is for is named by the error."""
    for module in pkgutil.walk_packages(bilevel.__path__, "bilevel.", onerror=lambda name: None):
        if not module.name.startswith("bilevel.testing.strategies"):
            importlib.import_module(module.name)
    assert bilevel.testing.check_hypergradient(
        *ridge(), solver=NewtonCG(max_steps=20, cg_steps=4), linsys=CG(max_steps=4)
    ).ok

    problem, theta, data = ridge()
    says("pip install scipy", lambda: bilevel.solve(problem, theta, data, solver=ScipyMinimize()))
    says("pip install hypothesis", lambda: importlib.import_module("bilevel.testing.strategies"))


def says(words: str, call: object) -> None:
    assert callable(call)
    try:
        call()
    except ImportError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"expected an ImportError with {words!r}: is the package installed that it asks for?")


def imaml(*arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as elsewhere:
        return subprocess.run(
            [str(Path(sys.executable).with_name("imaml")), *arguments], cwd=elsewhere, capture_output=True, text=True
        )


def imaml_says_what_to_install() -> None:
    done = imaml("--help")
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.endswith('pip install ".[meta-learning]" in the folder of the repository\n')
        and "Traceback" not in done.stderr
    ), done.stderr


def imaml_trains() -> None:
    shown = imaml("--help")
    assert shown.returncode == 0 and "evaluate" in shown.stdout, shown.stderr
    done = imaml(
        *("train", "--preset", "sinusoid", "--outer-steps", "2", "--meta-batch", "2", "--no-final-test"),
        *("--no-tensorboard", "--threads", "1", "--eval-tasks", "2"),
    )
    assert done.returncode == 0 and "Next: imaml evaluate" in done.stdout, done.stderr


CHECKS = {
    "bare": (
        comes_from_the_wheel,
        gives_the_gradient_of_the_closed_form,
        needs_no_extra_except_where_it_says_so,
        imaml_says_what_to_install,
    ),
    "application": (comes_from_the_wheel, imaml_trains),
}

if __name__ == "__main__":
    for check in CHECKS[sys.argv[1]]:
        check()
        print(f"ok: {check.__name__.replace('_', ' ')}")
