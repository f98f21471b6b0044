"""CapturedStep: what it does around a graph (with a graph on the CPU), where it gives up, and on a GPU the same numbers as without."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import CapturedStep
from bilevel.captured import cuda_graphs
from bilevel.captured.cuda_graphs import CudaGraphs
from bilevel.curvature import GaussNewton, Hessian
from bilevel.linsys import CG
from bilevel.solvers import GradientDescent
from tests.fake_graphs import FakeGraphs, captured_by

F64 = torch.float64
LINE = "nothing is captured, and every call runs as it is"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged."""
    caplog.set_level(logging.INFO, logger="bilevel.captured")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "bilevel.captured"]


def network(device: str = "cpu") -> tuple[nn.Module, bilevel.ProximalProblem]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(device, F64)
    problem = bilevel.ProximalProblem.from_model(
        lambda phi, task: torch.func.functional_call(net, phi, (task["x"],)),
        lambda outputs, task: (outputs - task["y"]).square().mean(),
        lambda phi, task: (torch.func.functional_call(net, phi, (task["x_test"],)) - task["y_test"]).square().mean(),
        2.0,
    )
    return net, problem


def tasks(step: int, device: str = "cpu", count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, x_test = (torch.randn(count, 4, 2, generator=generator, dtype=F64).to(device) for _ in range(2))
    return {"x": x, "x_test": x_test, "y": x.sum(-1, keepdim=True), "y_test": x_test.sum(-1, keepdim=True)}


def training(
    curvature: Any = Hessian(), device: str = "cpu", adam: dict[str, Any] | None = None
) -> tuple[Callable[[Any], Any], nn.Module, torch.optim.Optimizer]:
    """A meta-step, and what it changes. With the options of Adam that CUDA needs, everything it writes is in place."""
    net, problem = network(device)
    theta = dict(net.named_parameters())
    options = {"capturable": True, "lr": torch.tensor(1e-2, dtype=F64, device=device)} if adam is None else adam
    outer = torch.optim.Adam(net.parameters(), **options)

    def meta_step(data: Any) -> Any:
        found = bilevel.hypergradient(
            problem,
            theta,
            data,
            solver=GradientDescent(step_size=0.1, max_steps=3),
            linsys=CG(max_steps=2, rtol=0.0),
            curvature=curvature,
            batched=True,
        )
        for name, leaf in theta.items():
            leaf.grad = found.grad[name]
        outer.step()
        return {"loss": found.outer, "ok": found.ok_per_task, "phi": found.phi, "note": "imaml"}

    return meta_step, net, outer


@pytest.fixture
def capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam(capturable=True) on the CPU too."""
    module = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu", "cuda"])


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# With a graph on the CPU.


@pytest.mark.usefixtures("capturable")
@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("warmup", [1, 3])
def test_a_captured_training_is_the_training(curvature: Any, warmup: int, lines: Any) -> None:
    """Every call is one step: theta, Adam and what is returned, over warm-up, capture and replays, with a rate that changes."""
    (plain, net, outer), (captured, twin, twin_outer) = training(curvature), training(curvature)
    graphs = FakeGraphs()
    step = captured_by(graphs)(captured, mutates=[twin, twin_outer], warmup=warmup)
    for k in range(7):
        for optimizer in (outer, twin_outer):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + k))
        expected, got = plain(tasks(k)), step(tasks(k))
        assert got["note"] == "imaml" and not got["loss"].requires_grad
        assert_same([got[name] for name in ("loss", "ok", "phi")], [expected[name] for name in ("loss", "ok", "phi")])
        assert_same(list(twin.parameters()), [p.detach() for p in net.parameters()])
    assert_same(twin_outer.state_dict()["state"], outer.state_dict()["state"])
    assert graphs.calls == ["aside"] * (warmup - 1) + ["watched", "capture"] + ["replay"] * (7 - warmup)
    assert step.num_captures == 1 and step.why_not is None and not lines()


def test_outputs_are_copies_unless_asked_otherwise() -> None:
    for static in (False, True):
        step = captured_by(FakeGraphs())(lambda x: {"y": 2 * x}, warmup=1, static_outputs=static)
        step(torch.ones(2))
        first = step(torch.ones(2))["y"]
        assert first.tolist() == [2.0, 2.0]
        second = step(3 * torch.ones(2))["y"]
        assert second.tolist() == [6.0, 6.0]
        assert first.tolist() == ([6.0, 6.0] if static else [2.0, 2.0]) and (first is second) == static


def test_inputs_are_not_kept_and_not_changed() -> None:
    step = captured_by(FakeGraphs())(lambda x: x.add_(1), warmup=1)
    step(torch.zeros(2))
    x = torch.zeros(2)
    assert step(x).tolist() == [1.0, 1.0] and x.tolist() == [0.0, 0.0]  # the graph has memory of its own
    assert step(torch.full((2,), 5.0)).tolist() == [6.0, 6.0]


def test_an_input_that_requires_grad_is_one_in_the_graph() -> None:
    step = captured_by(FakeGraphs())(lambda x: torch.autograd.grad((x**3).sum(), x)[0], warmup=1)
    for value in (1.0, 2.0, 3.0):
        assert step(torch.tensor([value], requires_grad=True)).tolist() == [3 * value**2]


def test_each_signature_has_a_graph() -> None:
    graphs = FakeGraphs()
    step = captured_by(graphs)(lambda tree, factor: tree["a"] * factor, warmup=1)
    others = [
        ({"a": torch.ones(2)}, 3),
        ({"a": torch.ones(3)}, 3),  # another shape
        ({"a": torch.ones(2, dtype=F64)}, 3),  # another dtype
        ({"a": torch.ones(2)}, 3.0),  # another kind of number
    ]
    for _ in range(3):
        for tree, factor in others:
            got = step(tree, factor)
            assert got.dtype == tree["a"].dtype and got.tolist() == [3.0] * len(tree["a"])
    assert step.num_captures == 4 and graphs.calls.count("capture") == 4 and graphs.calls.count("replay") == 8


def test_the_number_of_graphs_is_bounded(lines: Any) -> None:
    graphs = FakeGraphs()
    step = captured_by(graphs)(lambda x: 2 * x, warmup=1, max_captures=2)
    for _ in range(3):
        for size in (1, 2, 3, 4):
            assert step(torch.ones(size)).tolist() == [2.0] * size
    assert step.num_captures == 2 and graphs.calls.count("capture") == 2
    assert len(lines()) == 1 and "there are 2 captures already" in lines()[0]


def test_a_state_that_was_replaced_is_captured_anew() -> None:
    """load_state_dict of an optimizer makes new tensors; the old graph would write to those that nobody reads."""
    weight = torch.zeros(2)
    outer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)

    def fn(grad: Tensor) -> Tensor:
        weight.grad = grad
        outer.step()
        return weight.clone()

    graphs = FakeGraphs()
    step = captured_by(graphs)(fn, mutates=[outer], warmup=1)
    for _ in range(3):
        step(torch.ones(2))
    stored, at = outer.state_dict(), weight.clone()
    stored = {**stored, "state": {0: {"momentum_buffer": torch.full((2,), 7.0)}}}
    outer.load_state_dict(stored)
    got = step(torch.ones(2))
    torch.testing.assert_close(got, at - 0.5 * (0.9 * 7 + 1))
    assert graphs.calls.count("capture") == 2 and step.num_captures == 1


def test_reset_begins_again() -> None:
    graphs = FakeGraphs()
    step = captured_by(graphs)(lambda x: 2 * x, warmup=1)
    for _ in range(2):
        step(torch.ones(1))
    step.reset()
    assert step.num_captures == 0
    step(torch.ones(1))
    assert graphs.calls == ["watched", "capture", "replay", "watched"]


# ----------------------------------------------------------------------------------------------------------------------
# Where it gives up.


def test_on_the_cpu_every_call_runs_as_it_is(lines: Any) -> None:
    (plain, net, _), (other, twin, twin_outer) = (training(adam={}) for _ in range(2))
    step = CapturedStep(other, mutates=[twin_outer])
    for k in range(5):
        expected, got = plain(tasks(k)), step(tasks(k))
        assert_same(got["loss"], expected["loss"].detach())
        assert_same(list(twin.parameters()), list(net.parameters()))
    assert step.num_captures == 0 and step.why_not is not None
    assert lines() == [f"CapturedStep: {LINE}: a graph needs a CUDA device, and the tensors are on cpu."]


@pytest.mark.usefixtures("capturable")
@pytest.mark.parametrize("warmup", [1, 2])
def test_a_step_that_reads_a_number_leaves_no_trace(warmup: int, lines: Any) -> None:
    """The watched call stops in the middle, after theta and Adam were written; it is made again from where it began."""
    (plain, net, outer), (inner, twin, twin_outer) = training(), training()

    def reads(data: Any) -> Any:
        found = inner(data)
        return {**found, "number": found["loss"].item()}

    graphs = FakeGraphs()
    step = captured_by(graphs)(reads, mutates=[twin, twin_outer], warmup=warmup)
    for k in range(4):
        expected, got = plain(tasks(k)), step(tasks(k))
        assert got["number"] == pytest.approx(float(expected["loss"]), rel=1e-12)
        assert_same(list(twin.parameters()), list(net.parameters()))
    assert_same(twin_outer.state_dict()["state"], outer.state_dict()["state"])
    assert graphs.calls == ["aside"] * (warmup - 1) + ["watched"]
    assert len(lines()) == 1 and "called a synchronizing operation" in lines()[0] and LINE in lines()[0]


class Fails(FakeGraphs):
    """A capture that fails at its end."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        super().capture(run)
        raise RuntimeError("operation failed due to a previous error during capture\nmore lines")


@pytest.mark.usefixtures("capturable")
def test_a_failed_capture_leaves_no_trace(lines: Any) -> None:
    """What a capture does is not executed, but what is done on the host is."""
    (plain, net, outer), (inner, twin, twin_outer) = training(), training()
    on_host = torch.zeros(1)

    def counts(data: Any) -> Any:
        on_host.numpy()[0] += 1  # past the operators
        return inner(data)

    step = captured_by(Fails())(counts, mutates=[twin_outer, on_host], warmup=1)
    for k in range(4):
        expected, got = plain(tasks(k)), step(tasks(k))
        assert_same(got["loss"], expected["loss"])
        assert_same(list(twin.parameters()), list(net.parameters()))
        assert on_host.item() == k + 1
    assert_same(twin_outer.state_dict()["state"], outer.state_dict()["state"])
    assert len(lines()) == 1 and lines()[0].endswith("previous error during capture.")


def test_a_rate_that_is_a_number_is_seen_to_change(lines: Any) -> None:
    weight = torch.zeros(1)
    outer = torch.optim.SGD([weight], lr=0.5)

    def fn(grad: Tensor) -> Tensor:
        weight.grad = grad
        outer.step()
        return weight.clone()

    step = captured_by(FakeGraphs())(fn, mutates=[outer], warmup=1)
    for _ in range(3):
        got = step(torch.ones(1))
    assert got.item() == -1.5 and step.num_captures == 1 and not lines()
    outer.param_groups[0]["lr"] = 0.25
    assert step(torch.ones(1)).item() == -1.75 and step.num_captures == 0
    assert len(lines()) == 1 and "lr of SGD was 0.5 at the capture and is 0.25" in lines()[0]


def test_tensors_on_two_devices(lines: Any) -> None:
    step = captured_by(FakeGraphs())(lambda x, y: x * 2)
    assert step(torch.ones(1), torch.ones(1, device="meta")).item() == 2
    assert len(lines()) == 1 and "expected all tensors on one device, got cpu, meta" in lines()[0]
    step = captured_by(FakeGraphs())(lambda: torch.ones(1))
    assert step().item() == 1 and "got no tensor" in lines()[1]


def test_the_error_of_the_user_comes_through_and_nothing_has_changed() -> None:
    weight = torch.zeros(1)

    def fn(x: Tensor) -> Tensor:
        weight.add_(1)
        if len(x) == 1:
            raise ValueError("expected more")
        return x

    step = captured_by(FakeGraphs())(fn, mutates=[weight], warmup=1)
    with pytest.raises(ValueError, match="expected more"):
        step(torch.ones(1))
    assert weight.item() == 1  # of the plain call, which the user sees fail; the watched one before it was undone


def test_out_of_memory_is_passed_on_from_where_the_call_began() -> None:
    weight = torch.zeros(1)
    limit = [10]

    def fn(x: Tensor) -> Tensor:
        weight.add_(1)
        if len(x) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + weight

    step = captured_by(FakeGraphs())(fn, mutates=[weight], warmup=1)
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.ones(20))
    assert weight.item() == 0 and step.why_not is None
    for k in range(3):
        assert step(torch.zeros(5)).tolist() == [k + 1.0] * 5
    assert step.num_captures == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fn": 3}, "fn: expected a function"),
        ({"warmup": 0}, "warmup: expected at least 1, got 0"),
        ({"warmup": True}, "warmup: expected an integer"),
        ({"max_captures": 0}, "max_captures: expected at least 1, got 0"),
        ({"mutates": [3]}, "mutates: expected tensors, modules and optimizers, got int"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        CapturedStep(**{"fn": lambda x: x, **options})


def test_a_leaf_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"inputs\[0\]\['a'\]: expected tensors, None, numbers or strings, got set"):
        captured_by(FakeGraphs())(lambda x: x)({"a": {1}})


# ----------------------------------------------------------------------------------------------------------------------
# The graph on the CPU is strict, or the tests above would show nothing.


def test_the_fake_executes_nothing_while_it_captures() -> None:
    weight = torch.ones(2)
    out, replay = FakeGraphs().capture(lambda: weight.mul_(2).add(1))
    assert weight.tolist() == [1.0, 1.0] and out.isnan().all()
    for factor in (2.0, 4.0):
        replay()
        assert weight.tolist() == [factor] * 2 and out.tolist() == [factor + 1] * 2
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        FakeGraphs().capture(lambda: weight.sum().item())


# ----------------------------------------------------------------------------------------------------------------------
# What is asked of CUDA, in which order.


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """``torch.cuda`` as far as a capture uses it. ``fails``: the capture ends with an error, and on its own stream, as CUDA's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(cuda_graphs, "_stream_of", functools.cache(cuda_graphs._stream_of.__wrapped__))
        self.current, self.mode, self.fails = Stream("main", self.log), 0, fails
        for name in ("Stream", "stream", "current_stream", "graph", "CUDAGraph", "current_device", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(
                torch._C, name, lambda *args, name=name: self.log.append(f"{name}{args}"), raising=False
            )
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))

    def Stream(self, device: int) -> Stream:
        assert device == 0
        return Stream("side", self.log)

    def current_stream(self) -> Stream:
        return self.current

    def current_device(self) -> int:
        return 0

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 7)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Stream) -> Iterator[None]:
        assert pool == (0, 7)
        before, self.current = self.current, stream
        self.log.append(f"capture begins on {stream.name}")
        yield
        self.log.append("capture ends")
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append(f"replay on {self.current.name}"))


def test_warm_up_and_capture_share_a_stream_that_waits_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeCuda(monkeypatch), CudaGraphs()
    assert CudaGraphs()._stream is graphs._stream  # one for all: libraries keep a workspace for each
    run = lambda: cuda.log.append(f"run on {cuda.current.name}, mode {cuda.mode}")  # noqa: E731
    graphs.aside(run)
    graphs.watched(run)
    out, replay = graphs.capture(lambda: (run(), 3)[1])
    replay()
    assert out == 3 and cuda.mode == 0 and cuda.current.name == "main"
    assert cuda.log == [
        "side waits for main", "run on side, mode 0", "main waits for side",
        "side waits for main", "run on side, mode error", "main waits for side",
        "capture begins on side", "run on side, mode 0", "capture ends", "replay on main",
    ]  # fmt: skip


def test_whatever_fails_the_stream_and_the_watch_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeCuda(monkeypatch, fails=True), CudaGraphs()

    def broken() -> None:
        raise ValueError("no")

    def already_ended(*_: Any) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    with pytest.raises(ValueError, match="no"):
        graphs.watched(broken)
    assert cuda.log[-1] == "main waits for side"
    assert cuda.mode == 0 and cuda.current.name == "main"
    generator = SimpleNamespace(
        clone_state=lambda: "a copy", graphsafe_set_state=lambda state: cuda.log.append(f"random numbers: {state}")
    )
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(lambda: None)
    assert cuda.current.name == "main" and "random numbers: a copy" in cuda.log
    assert cuda.log[-2:] == ["_cuda_endAllocateToPool(0, (0, 7))", "_cuda_releasePool(0, (0, 7))"]
    with pytest.raises(RuntimeError, match="previous error"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_cuda_endAllocateToPool", already_ended)
        graphs.capture(lambda: None)
    assert cuda.log[-2:] == ["capture ends", "random numbers: a copy"]


def test_devices_that_have_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    reason = CudaGraphs().reason_against
    assert reason(torch.device("cuda:0")) is None
    assert "not the current device" in str(reason(torch.device("cuda:1"))) and "on cpu" in str(
        reason(torch.device("cpu"))
    )


def test_an_optimizer_that_keeps_its_state_elsewhere_is_named(lines: Any) -> None:
    """As Adam does on a GPU without capturable=True; here "meta" stands for the CPU."""
    weight = torch.nn.Parameter(torch.zeros(3))
    outer = torch.optim.Adam([weight])

    def fn(x: Tensor) -> Tensor:
        weight.grad = x
        return x + 1

    step = captured_by(FakeGraphs())(fn, mutates=[outer])
    step(torch.ones(3))
    outer.state[weight]["step"] = torch.zeros((), device="meta")
    assert torch.equal(step(torch.ones(3)), torch.full((3,), 2.0))
    expected = "Adam keeps 'step' on meta, its parameters are on cpu; make the optimizer with capturable=True"
    assert step.why_not == expected and len(lines()) == 1 and expected in lines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
class TestCuda:
    @pytest.mark.parametrize("curvature", [Hessian(), GaussNewton()], ids=["hessian", "gauss-newton"])
    def test_a_captured_training_is_the_training(self, curvature: Any) -> None:
        (plain, net, outer), (captured, twin, twin_outer) = (training(curvature, "cuda") for _ in range(2))
        step = CapturedStep(captured, mutates=[twin, twin_outer])
        for k in range(8):
            for optimizer in (outer, twin_outer):
                optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + k))
            expected, got = plain(tasks(k, "cuda")), step(tasks(k, "cuda"))
            torch.testing.assert_close(got["phi"], expected["phi"], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(list(twin.parameters()), list(net.parameters()), rtol=1e-9, atol=1e-12)
        assert step.num_captures == 1 and step.why_not is None
        torch.testing.assert_close(twin_outer.state_dict()["state"], outer.state_dict()["state"])

    def test_a_replay_has_no_launch_of_its_own(self) -> None:
        """One launch of the graph, and one copy for each tensor that goes in or out."""
        captured, net, outer = training(device="cuda")
        step = CapturedStep(captured, mutates=[net, outer])
        data = tasks(0, "cuda")
        for _ in range(5):
            step(data)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(data)
        launches = sum(
            event.count for event in profile.key_averages() if event.key.startswith(("aten::copy_", "aten::clone"))
        )
        assert launches <= 2 * (len(data) + 8)

    def test_what_reads_a_number_goes_on_as_it_is(self, lines: Any) -> None:
        weight = torch.zeros(3, device="cuda")

        def fn(x: Tensor) -> Tensor:
            weight.add_(x)
            return weight / float(x.sum())

        step = CapturedStep(fn, mutates=[weight])
        for k in range(6):
            got = step(torch.ones(3, device="cuda"))
            assert got.tolist() == pytest.approx([(k + 1) / 3] * 3)
        assert step.num_captures == 0 and len(lines()) == 1

    def test_a_capture_that_fails_half_way_leaves_the_device_usable(self, lines: Any) -> None:
        """The watch does not see an explicit wait; the capture does."""
        weight = torch.zeros(3, device="cuda")
        before = torch.cuda.current_stream()

        def fn(x: Tensor) -> Tensor:
            weight.add_(x)
            torch.cuda.synchronize()
            return weight.clone()

        step = CapturedStep(fn, mutates=[weight])
        for k in range(6):
            assert step(torch.ones(3, device="cuda")).tolist() == [k + 1.0] * 3
        assert step.num_captures == 0 and len(lines()) == 1
        assert torch.cuda.current_stream() == before
        torch.cuda.empty_cache()  # fails with an internal error while the allocator waits for the end of a capture
        assert 0 <= float(torch.rand(1, device="cuda")) < 1  # fails while the generator does
        later = CapturedStep(lambda x: x + 1)
        for _ in range(5):
            assert later(torch.ones(3, device="cuda")).tolist() == [2.0] * 3
        assert later.num_captures == 1

    def test_adam_that_is_not_capturable_is_not_captured(self, lines: Any) -> None:
        (plain, net, _), (other, twin, twin_outer) = (training(device="cuda", adam={}) for _ in range(2))
        step = CapturedStep(other, mutates=[twin_outer])
        for k in range(6):
            plain(tasks(k, "cuda")), step(tasks(k, "cuda"))
            torch.testing.assert_close(list(twin.parameters()), list(net.parameters()), rtol=1e-9, atol=1e-12)
        assert step.num_captures == 0 and len(lines()) == 1 and "with capturable=True" in lines()[0]


def test_an_input_that_is_written_to_is_no_copy() -> None:
    """theta as an argument, its gradient set and its optimizer stepped inside: the graph works on theta itself."""

    def run(captured: bool) -> tuple[list[float], Tensor]:
        theta = {"w": torch.nn.Parameter(torch.zeros(2))}
        outer = torch.optim.SGD(theta.values(), lr=0.5)

        def step(theta: dict[str, Tensor], target: Tensor) -> Tensor:
            theta["w"].grad = (theta["w"] - target).detach()
            outer.step()
            return (theta["w"] - target).square().sum()

        taken: Any = captured_by(FakeGraphs())(step, mutates=[outer]) if captured else step
        losses = [float(taken(theta, torch.full((2,), float(i)))) for i in range(8)]
        assert not captured or taken.num_captures == 1
        return losses, theta["w"].detach()

    (plain, expected), (losses, found) = run(False), run(True)
    assert losses == plain
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_graph_serves_calls_with_the_autocast_of_its_capture() -> None:
    step = captured_by(FakeGraphs())(lambda x: x @ x)
    x = torch.eye(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(5):
            assert step(x).dtype == torch.bfloat16
    assert step(x).dtype == torch.float32


def test_what_is_returned_as_it_is_is_a_copy_too() -> None:
    """A history that is collected on the CPU is the one that a graph would give."""
    total = torch.zeros(2)

    def step(x: Tensor) -> dict[str, Tensor]:
        total.sub_(x)
        return {"total": total}

    captured = CapturedStep(step, mutates=[total])
    found = [captured(torch.ones(2))["total"][0].item() for _ in range(3)]
    history = [captured(torch.ones(2))["total"] for _ in range(3)]
    assert found == [-1.0, -2.0, -3.0] and [float(h[0]) for h in history] == [-4.0, -5.0, -6.0]
