"""Corners of autograd: complex data, tangents of another dtype, functions of vjp called late, hooks of saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import bilevel
from bilevel.curvature import ForwardOverReverse, Hessian
from bilevel.linsys import CG, GMRES, MINRES, BiCGStab, Exact, Jacobi, Neumann, Nystrom, NystromPreconditioner
from bilevel.solvers import LBFGS, GradientDescent, Newton, NewtonCG

F64 = torch.float64
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
THETA, W = torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
SOLVERS: dict[str, Any] = {
    "solver": NewtonCG(max_steps=30, cg_steps=5, tol=1e-12),
    "linsys": CG(max_steps=9, rtol=1e-13),
}


class TestComplexData:
    """G = phi^T A phi / 2 - (|d|^2 theta)^T phi: phi = A^{-1} (|d|^2 theta)."""

    data = torch.tensor([1 + 2j, 0.5j], dtype=torch.complex128)
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, d: 0.5 * phi @ A @ phi - ((d * d.conj()).real * theta) @ phi,
        lambda phi, theta, d: phi.sum(),
        lambda theta, d: torch.zeros_like(theta),
    )

    def ours(self, theta: Tensor, d: Tensor) -> Tensor:
        return bilevel.argmin(self.problem, theta, d, **SOLVERS).sin().sum()

    def closed(self, theta: Tensor, d: Tensor) -> Tensor:
        return (torch.linalg.inv(A) @ ((d * d.conj()).real * theta)).sin().sum()

    def test_backward(self) -> None:
        found = []
        for f in (self.ours, self.closed):
            theta, d = THETA.clone().requires_grad_(), self.data.clone().requires_grad_()
            found.append(torch.autograd.grad(f(theta, d), (theta, d)))
        for mine, exact in zip(*found, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11)
        assert found[0][1].abs().min() > 0.1

    @pytest.mark.parametrize(
        "derivative",
        [
            lambda f, d: vjp(f, d)[1](torch.tensor(1.0, dtype=F64))[0],
            lambda f, d: jvp(f, (d,), (d,))[1],
            lambda f, d: grad(lambda r: f(torch.view_as_complex(r)))(torch.view_as_real(d)),
            lambda f, d: hessian(lambda r: f(torch.view_as_complex(r)))(torch.view_as_real(d)),
        ],
        ids=["vjp", "jvp", "grad", "hessian"],
    )
    def test_transforms(self, derivative: Callable[..., Tensor]) -> None:
        mine, exact = (derivative(lambda d, f=f: f(THETA, d), self.data) for f in (self.ours, self.closed))
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-11)


class TestFloat32:
    """0.5 * theta with a 0-d theta: PyTorch's tangent of it is float64."""

    X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(8, generator=torch.Generator().manual_seed(1))
    theta = torch.tensor(0.7)
    problem = bilevel.BilevelProblem.from_functions(
        lambda w, theta, data: 0.5 * (data[0] @ w - data[1]).square().mean() + 0.5 * theta * w.square().sum(),
        lambda w, theta, data: w.square().sum(),
        lambda theta, data: torch.zeros_like(data[0][0]),
    )

    def closed(self, theta: Tensor) -> Tensor:
        X, y = self.X.double(), self.y.double()
        return torch.linalg.inv(X.T @ X / 8 + theta * torch.eye(3, dtype=F64)) @ (X.T @ y / 8)

    def test_the_premise(self) -> None:
        assert jvp(lambda x: 0.5 * x.sum(), (torch.ones(3),), (torch.ones(3),))[1].dtype == F64

    @pytest.mark.parametrize("order", [jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
    @pytest.mark.parametrize(
        "linsys",
        [
            CG(max_steps=10),
            MINRES(max_steps=10),
            Exact(),
            GMRES(max_steps=10),
            BiCGStab(max_steps=10),
            Neumann(num_terms=300),
        ],
        ids=lambda x: type(x).__name__,
    )
    def test_argmin(self, linsys: Any, order: Callable[..., Any]) -> None:
        solver = NewtonCG(max_steps=20, cg_steps=5, tol=1e-6)
        found = order(lambda t: bilevel.argmin(self.problem, t, (self.X, self.y), solver=solver, linsys=linsys))(
            self.theta
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, order(self.closed)(self.theta.double()).float(), rtol=1e-3, atol=1e-5)

    def test_hypergradient_with_forward_over_reverse(self) -> None:
        found = bilevel.hypergradient(
            self.problem,
            self.theta,
            (self.X, self.y),
            solver=NewtonCG(max_steps=20, cg_steps=5, tol=1e-6),
            linsys=CG(max_steps=10),
            curvature=Hessian(product=ForwardOverReverse()),
        ).unwrap()
        expected = grad(lambda t: self.closed(t).square().sum())(self.theta.double())
        assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected), rel=1e-4)

    @pytest.mark.parametrize(
        "solver",
        [
            GradientDescent(step_size=0.3, max_steps=5),
            NewtonCG(max_steps=2, cg_steps=2, tol=0.0),
            LBFGS(max_steps=3),
        ],
        ids=lambda x: type(x).__name__,
    )
    def test_unrolled_forwards_is_unrolled_backwards(self, solver: Any) -> None:
        forwards, backwards = (
            bilevel.unrolled(self.problem, self.theta, (self.X, self.y), solver=solver, forward_mode=mode).unwrap()
            for mode in (True, False)
        )
        assert forwards.dtype == torch.float32
        torch.testing.assert_close(forwards, backwards, rtol=1e-4, atol=1e-6)


class TestFunctionsOfVjp:
    """vjp's function is called while another transform is on, or later: "escaped? please report a bug to PyTorch"."""

    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * phi @ A @ phi - theta.sin() @ phi + 0.1 * (phi**4).sum(),
        lambda phi, theta, data: phi.sum(),
        lambda theta, data: torch.zeros_like(theta),
    )

    def g(self, theta: Tensor) -> Tensor:
        return bilevel.argmin(self.problem, theta, **SOLVERS)

    @pytest.mark.parametrize("outer", [jacrev, jacfwd], ids=lambda f: f.__name__)
    def test_under_another_derivative(self, outer: Callable[..., Any]) -> None:
        found = outer(lambda v: vjp(self.g, v)[1](W)[0])(THETA)
        torch.testing.assert_close(found, jacrev(lambda v: jacrev(self.g)(v).T @ W)(THETA), rtol=1e-8, atol=1e-10)

    def test_under_vmap(self) -> None:
        thetas = torch.stack([THETA, 2 * THETA])
        found = vmap(lambda v: vjp(self.g, v)[1](W)[0])(thetas)
        expected = torch.stack([jacrev(self.g)(v).T @ W for v in thetas])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)

    def test_later(self) -> None:
        pull = vjp(self.g, THETA)[1]
        expected = jacrev(self.g)(THETA).T
        for found in (jacrev(lambda w: pull(w)[0])(W), jacfwd(lambda w: pull(w)[0])(W)):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(pull(W)[0], expected @ W, rtol=1e-8, atol=1e-10)

    def test_linearize_is_refused_by_its_name(self) -> None:
        with pytest.raises(NotImplementedError, match=r"torch\.func\.linearize makes such\. Use torch\.func\.jvp"):
            torch.func.linearize(self.g, THETA)

    def test_hooks_of_saved_tensors_come_with_a_note(self) -> None:
        theta = THETA.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError) as caught:
            self.g(theta).sum().backward()
        assert "Leave torch.autograd.graph.save_on_cpu()" in caught.value.__notes__[0]


def test_a_phi_without_entries_is_refused() -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: phi.square().sum() + 0 * theta.sum(),
        lambda phi, theta, data: phi.sum() + theta.sum(),
        lambda theta, data: torch.zeros(2, 0, dtype=F64),
    )
    with pytest.raises(ValueError, match="initial_phi: expected at least one number, got tensors without entries"):
        bilevel.hypergradient(problem, THETA, **SOLVERS)


class TestWhatIsNotDifferentiated:
    """Nobody moves the data, so that their derivatives, infinite or missing, are not to be seen."""

    X = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    EXACT: ClassVar[dict[str, Any]] = {"solver": NewtonCG(max_steps=30, cg_steps=20, tol=1e-12), "linsys": Exact()}

    def layer(self, of_data: Callable[[Tensor], Tensor], *, as_theta: bool = False) -> Callable[[Tensor], Tensor]:
        """phi + s + 0.4 phi^3 = theta, with s made of the data or of a leaf of theta."""
        problem = bilevel.BilevelProblem.from_functions(
            lambda phi, theta, data: (
                0.5 * (phi - theta["t"]).square().sum()
                + (of_data(theta["x"] if data is None else data) * phi).sum()
                + 0.1 * phi.pow(4).sum()
            ),
            lambda phi, theta, data: phi.sum(),
            lambda theta, data: torch.zeros_like(theta["t"]),
        )
        if as_theta:
            return lambda t: bilevel.argmin(problem, {"t": t, "x": self.X}, None, **self.EXACT)
        return lambda t: bilevel.argmin(problem, {"t": t}, self.X, **self.EXACT)

    @pytest.mark.parametrize("as_theta", [False, True], ids=["data", "theta"])
    def test_infinite_derivatives(self, as_theta: bool) -> None:
        f, t = self.layer(torch.sqrt, as_theta=as_theta), torch.ones(3, dtype=torch.float64)
        phi = f(t)
        torch.testing.assert_close(phi + 0.4 * phi**3, t - self.X.sqrt(), rtol=1e-10, atol=1e-12)
        first = 1 / (1 + 1.2 * phi**2)
        second = -2.4 * phi * first**3
        for way in (jacfwd, jacrev):
            torch.testing.assert_close(way(f)(t), torch.diag(first), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(jvp(f, (t,), (torch.ones_like(t),))[1], first, rtol=1e-9, atol=1e-12)

        def total(t: Tensor) -> Tensor:
            return f(t).sum()

        for both in (hessian, lambda g: jacrev(jacfwd(g)), lambda g: jacrev(jacrev(g))):
            torch.testing.assert_close(both(total)(t), torch.diag(second), rtol=1e-8, atol=1e-10)
        mapped = vmap(hessian(total))(torch.stack([t, 2 * t]))
        torch.testing.assert_close(mapped[0], torch.diag(second), rtol=1e-8, atol=1e-10)

    def test_an_operator_without_forward_mode(self) -> None:
        f = self.layer(lambda x: torch.cdist(x[:, None], x[:, None]).sum(0))
        t = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(jacfwd(f)(t), jacrev(f)(t), rtol=1e-9, atol=1e-12)

    def test_of_a_root(self) -> None:
        def f(t: Tensor) -> Tensor:
            return bilevel.root(
                lambda p, t, x: p - t + x.sqrt() + 0.4 * p**3,
                t,
                self.X,
                init=torch.zeros_like(t),
                solver=Newton(max_steps=30, tol=1e-12),
                linsys=Exact(),
            )

        t = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(jacfwd(f)(t), torch.diag(1 / (1 + 1.2 * f(t) ** 2)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preconditioner", [NystromPreconditioner(rank=3), Jacobi(num_probes=4)], ids=repr)
def test_seeded_preconditioners_forwards(preconditioner: Any) -> None:
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: (
            0.5 * phi.square().sum() + 0.2 * phi.sum() ** 2 - (phi * theta).sum() + 0.1 * phi.pow(4).sum()
        ),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: torch.zeros_like(theta),
    )
    theta = torch.linspace(-1, 2, 6, dtype=torch.float64)
    solver = NewtonCG(max_steps=30, cg_steps=20, tol=1e-11, preconditioner=preconditioner)
    forwards, backwards = (
        bilevel.unrolled(problem, theta, solver=solver, forward_mode=mode).unwrap() for mode in (True, False)
    )
    exact = bilevel.hypergradient(problem, theta, solver=solver, linsys=Exact()).unwrap()
    torch.testing.assert_close(forwards, backwards, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(forwards, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "linsys", [Nystrom(rank=4, shift=1.0), CG(max_steps=6, rtol=0.0, preconditioner=Jacobi(num_probes=4))], ids=repr
)
def test_seeded_linear_solvers_under_vmap(linsys: Any) -> None:
    """Their numbers are the same each time, and no chance, which vmap refuses."""
    q = torch.linalg.qr(torch.arange(36.0, dtype=torch.float64).reshape(6, 6).sin())[0]
    a = q @ torch.diag(torch.tensor([1.0, 1, 1, 2, 5, 9], dtype=torch.float64)) @ q.T
    b = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)
    found = vmap(lambda b: linsys.solve(lambda v: v @ a, b).value)(b)
    torch.testing.assert_close(found, torch.linalg.solve(a, b.T).T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("where", ["inner", "start"])
def test_chance_in_an_unrolled_path_is_refused_forwards(where: str) -> None:
    """Its directions are taken in chunks, each along a path of its own."""
    noise = {
        name: (lambda x: x + torch.rand_like(x)) if name == where else (lambda x: x) for name in ("inner", "start")
    }
    problem = bilevel.BilevelProblem.from_functions(
        lambda phi, theta, data: 0.5 * (phi - noise["inner"](theta)).square().sum(),
        lambda phi, theta, data: phi.square().sum(),
        lambda theta, data: noise["start"](torch.zeros_like(theta)),
    )
    with pytest.raises(RuntimeError, match="random"):
        bilevel.unrolled(problem, torch.ones(3), solver=GradientDescent(step_size=0.5, max_steps=2), forward_mode=True)
