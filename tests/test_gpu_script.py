"""benchmarks/gpu.py, which `make gpu` runs: tried on the CPU with tiny sizes, and its slices with commands that do nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "platformdirs", "pooch", "PIL", "rich", "scipy", "sklearn", "typer"):
        pytest.importorskip(package, reason="needs the extra 'benchmarks'")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def runner(gpu: ModuleType, folder: Path, commands: dict[str, str], **options: Any) -> Any:
    """One whose parts are these lines of Python; ``done`` ends a part as a measurement does."""
    args = {
        "out": folder,
        "dry_run": True,
        "seed": 0,
        "data_dir": None,
        "slices": None,
        "minutes": None,
        "cells": None,
        **options,
    }
    made = gpu.Runner(gpu.argparse.Namespace(**args))
    made.commands = lambda: {name: [sys.executable, "-S", "-c", code] for name, code in commands.items()}
    return made


@pytest.mark.parametrize("part", ["meta_step", "memory", "precision", "throughput"])
def test_every_measurement(gpu: ModuleType, part: str, tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--measure", "5w1s", part]) == 0
    stored = json.loads((tmp_path / f"5w1s-{part}.json").read_text())
    assert stored["environment"]["device"] == "cpu" and "/" not in stored["environment"]["command"].replace(
        "benchmarks/", ""
    )
    text = "\n".join(gpu.page({f"5w1s-{part}": stored}, 5, True))
    assert "1 of 5 parts are done" in text and "nan" not in text and "None" not in text
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    if part == "meta_step":
        result = stored["result"]
        assert result["error_to_loop"] < 1e-10 and set(result["milliseconds"]) == {"captured", "plain", "loop"}
        assert "Nothing was captured: a graph needs a CUDA device" in text
        assert 1e6 < result["floor"]["operations"] < 1e8 and result["floor"]["operators"] > 500


def test_the_bytes_and_operators_of_a_floor(gpu: ModuleType) -> None:
    from gpu_parts import Traffic

    x = torch.ones(10, 10)
    with Traffic() as traffic:
        y = x.T.reshape(100)[None]  # a view, a copy, a view
        y.add_(1)
    assert traffic.operators == 2 and traffic.bytes == 2 * 400 + 2 * 400


def test_the_parts_are_there_in_order(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dry_run": False, "seed": 0, "slices": None, "minutes": None, "cells": None}
    commands = gpu.Runner(gpu.argparse.Namespace(out=tmp_path, data_dir=Path("data"), **options)).commands()
    kinds = [name.split("-")[0] for name in commands]
    assert list(dict.fromkeys(kinds)) == ["tests", "5w1s", "20w5s", "cell"]
    tests = {name.removeprefix("tests-") for name in commands if name.startswith("tests-")}
    assert tests >= {"test_cuda", "test_captured", "test_train", "test_step"}
    assert kinds.count("cell") == 112 and commands["cell-20w5s-gd-random-0"][-2:] == [
        "--data-dir",
        str(Path("data").resolve()),
    ]
    monkeypatch.setenv("BILEVEL_OMNIGLOT", "elsewhere")
    found = gpu.Runner(gpu.argparse.Namespace(out=tmp_path, data_dir=None, **options)).commands()
    assert found["cell-20w5s-gd-random-0"][-1] == str(Path("elsewhere").resolve())


def test_without_omniglot_table_2_is_left_out(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not trained on generated characters: nobody should take that for the table."""
    monkeypatch.delenv("BILEVEL_OMNIGLOT", raising=False)
    made = runner(gpu, tmp_path, {"tests-a": "print(1)"}, dry_run=False)
    assert not any(name.startswith("cell-") for name in gpu.Runner.commands(made))
    assert made.run() == 2 and (tmp_path / "tests-a.json").exists()
    assert (
        "Table 2 is left out: name the folder of Omniglot with --data-dir or BILEVEL_OMNIGLOT"
        in capsys.readouterr().out
    )


def test_it_ends_in_time(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setattr(gpu, "SHORTEST", 0.5)
    commands = {"tests-a": "print(1)", "tests-b": "import time; time.sleep(60)", "tests-c": "print(1)"}
    begun = time.time()
    assert runner(gpu, tmp_path, commands, minutes=0.1).run() == 0
    assert time.time() - begun < 15
    assert (tmp_path / "tests-a.json").exists() and not (tmp_path / "tests-c.json").exists()


def test_what_is_done_is_not_done_again(gpu: ModuleType, tmp_path: Path) -> None:
    count = "import pathlib; p = pathlib.Path({!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    seen = tmp_path / "seen"
    commands = {"tests-a": count.format(str(seen)), "cell-b": count.format(str(seen)) + "; print('last line')"}
    assert runner(gpu, tmp_path, commands, slices=1).run() == 0
    assert seen.read_text() == "x" and not (tmp_path / "cell-b.json").exists()
    assert runner(gpu, tmp_path, commands).run() == 0
    assert runner(gpu, tmp_path, commands).run() == 0
    assert seen.read_text() == "xx" and json.loads((tmp_path / "cell-b.json").read_text())["last"] == ["last line"]
    assert "2 of 2 parts" in (tmp_path / "gpu.md").read_text() and "Trained: b." in (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_is_tried_again_the_next_time(gpu: ModuleType, tmp_path: Path) -> None:
    commands = {"tests-a": "raise SystemExit(3)", "cell-b": "print(1)"}
    assert runner(gpu, tmp_path, commands).run() == 3
    assert not (tmp_path / "tests-a.json").exists() and (tmp_path / "cell-b.json").exists()
    assert runner(gpu, tmp_path, commands | {"tests-a": "print(2)"}).run() == 0


def test_a_training_that_takes_longer_goes_on_in_the_next_slice(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As imaml does: at SIGINT it writes its checkpoint and ends with exit code 130."""
    monkeypatch.setattr(gpu, "SLICE", 3.0)
    checkpoint = tmp_path / "checkpoint"
    training = f"""
import pathlib, sys, time
path = pathlib.Path({str(checkpoint)!r})
if path.exists():
    sys.exit(0)
try:
    time.sleep(60)
except KeyboardInterrupt:
    path.write_text("here")
    sys.exit(130)
"""
    assert runner(gpu, tmp_path, {"cell-a": training}).run() == 0
    assert checkpoint.exists() and (tmp_path / "cell-a.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    words = capsys.readouterr().err
    assert "expected a CUDA device, and there is none (torch " in words and "--dry-run tries the script" in words
