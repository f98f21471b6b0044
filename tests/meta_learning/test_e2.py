"""The memory meter against blocks of known size, and the measurement of a meta-gradient."""

import sys
from pathlib import Path

import pytest
import torch

from applications.meta_learning.experiments import e2_compute_memory as e2
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.experiments.cost import cost, fresh_processes, peak_bytes, peak_resident

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")


def _block(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * 250_000)  # float32


def _peaks() -> list[float]:
    def one_after_the_other() -> None:
        for _ in range(3):
            _block(40)

    def together() -> None:
        blocks = [_block(40) for _ in range(3)]
        del blocks

    _block(100)  # freed before: nothing of it may hide what comes
    return [peak_resident(lambda: None), peak_resident(one_after_the_other), peak_resident(together)]


def _small_blocks() -> float:
    """Freed blocks too small to be mapped one by one, which the C library keeps."""
    blocks = [torch.ones(15_000) for _ in range(667)]
    del blocks
    return peak_resident(lambda: [torch.ones(15_000) for _ in range(667)])


@linux
def test_the_meter_sees_blocks_of_known_size() -> None:
    with fresh_processes(reuse=False) as processes:
        nothing, one, three = processes.submit(_peaks).result()
        small = processes.submit(_small_blocks).result()
    assert nothing < 1
    assert one == pytest.approx(40, abs=1)
    assert three == pytest.approx(120, abs=1)
    assert small == pytest.approx(40, rel=0.05)


@linux
def test_a_cost_is_the_median_time_and_the_peak_of_one_call() -> None:
    with fresh_processes(reuse=False) as processes:
        found = processes.submit(_cost_of_a_block).result()
    assert found["peak_mb"] == pytest.approx(60, abs=1)
    assert found["repeats"] == 3 and 0 < found["seconds"] < 5


def _cost_of_a_block() -> dict[str, float]:
    return cost(lambda: _block(60), lambda: _block(1), device=torch.device("cpu"), repeats=3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_meter_on_cuda() -> None:
    device = torch.device("cuda")
    found = cost(
        lambda: torch.ones(15_000_000, device=device),
        lambda: torch.ones(1, device=device),
        device=device,
        repeats=3,
    )
    assert found["peak_mb"] == pytest.approx(60, abs=1)


def test_fresh_processes_are_fresh() -> None:
    with fresh_processes(reuse=False) as processes:
        seeds = [processes.submit(_leave_a_mark).result() for _ in range(2)]
    assert seeds == [False, False]
    with fresh_processes(reuse=True) as processes:
        assert [processes.submit(_leave_a_mark).result() for _ in range(2)] == [False, True]


def _leave_a_mark() -> bool:
    marked = hasattr(torch, "_mark_of_the_test")
    torch._mark_of_the_test = True  # type: ignore[attr-defined]
    return marked


def test_maml_stops_where_the_memory_would_not_suffice() -> None:
    def asked(per_step: float) -> list[int]:
        rows: list[dict[str, float]] = []
        seen = []
        for k in e2._affordable((1, 2, 4, 8, 16), rows, limit=1000):  # type: ignore[arg-type]
            rows.append({"steps": k, "peak_mb": 50 + per_step * k})
            seen.append(k)
        return seen

    assert asked(0) == [1, 2, 4, 8, 16]
    assert asked(100) == [1, 2, 4, 8]  # 450 MB at 4 steps: at most 900 at 8; 850 there: up to 1,700 at 16


def test_memory_of_maml_grows_and_that_of_imaml_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure's claim, on its network and tasks."""
    monkeypatch.setattr(e2, "cost", lambda call, *_, **__: {"peak": peak_bytes(call)[0]})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process
    request = Request(quick=False, seed=1, data_dir=None, parts=tmp_path)
    peaks = {}
    for method in (e2.MAML, e2.GD):
        for k in (1, 8):
            config = e2.replace(e2._config(request, method, 2), inner_steps=k)
            peaks[method, k] = e2._meta_gradient_cost(config, None, 0)["peak"]
    assert peaks[e2.GD, 8] == pytest.approx(peaks[e2.GD, 1], rel=0.01)
    assert peaks[e2.MAML, 8] > 2 * peaks[e2.MAML, 1]


def test_line_by_least_squares() -> None:
    rows = [{"steps": k, "peak_mb": 3.0 + 2.5 * k} for k in (1, 2, 8)]
    slope, start = e2._line(rows, "peak_mb")
    assert slope == pytest.approx(2.5) and start == pytest.approx(3.0)
