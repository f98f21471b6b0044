"""The comparison of `imaml demo`, small."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from applications.meta_learning import demo
from applications.meta_learning.cli import app
from applications.meta_learning.demo import (
    FIRST_ORDER,
    IMAML,
    UNTRAINED,
    Plan,
    Row,
    Snapshot,
    demo_config,
    refuse_other_files,
    run_demo,
    verdict,
)
from applications.meta_learning.evaluate import Evaluation
from applications.meta_learning.run import RunError
from tests.meta_learning.tiny import TINY

PLAN = Plan(seconds=6.0, tasks=40, query_shots=2, points=3, point_tasks=10)


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_two_methods_differ_in_the_linear_solver_only() -> None:
    first_order, imaml = demo_config()
    assert imaml.dataset == "glyphs" and imaml.linear == "cg"
    assert first_order == replace(imaml, linear="identity", steihaug=False, damping=0.0)


STEP_COST = {"identity": 0.1, "cg": 0.25}  # seconds of a clock of our own: a busy machine must not decide a test


def timed_step(arm: demo.Arm) -> None:
    arm.trainer.meta_step()
    arm.seconds += STEP_COST[arm.trainer.config.linear]


def test_equal_steps_and_equal_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.Arm, "step", timed_step)
    console = Console(file=(tmp_path / "console.txt").open("w"), width=80)
    imaml = replace(TINY, outer_rate=5e-3, glyph_classes=40, train_classes=30, meta_batch=4)
    above = run_demo(replace(imaml, linear="identity"), imaml, PLAN, tmp_path, console)
    refuse_other_files(tmp_path)  # of a demo
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["method"], row["at"]): row for row in results["rows"]}
    assert set(rows) == {(UNTRAINED, ""), (FIRST_ORDER, "equal steps"), (FIRST_ORDER, "equal time"), (IMAML, "both")}
    ours = rows[IMAML, "both"]
    assert ours["step"] == rows[FIRST_ORDER, "equal steps"]["step"] > 0
    ahead = rows[FIRST_ORDER, "equal time"]["seconds"] - ours["seconds"]
    assert -1e-9 < ahead < STEP_COST["identity"]  # the first step that is not earlier
    assert ours["seconds"] == pytest.approx(ours["step"] * STEP_COST["cg"])
    assert {row["tasks"] for row in rows.values()} == {40}
    assert above == all(row["mean"] > rows[UNTRAINED, ""]["mean"] for row in results["rows"][1:])
    for figure in ("curves.png", "task.png"):
        width, height = png_size(tmp_path / figure)
        assert width > 300 and height > 200
    text = (tmp_path / "console.txt").read_text()
    for words in (UNTRAINED, FIRST_ORDER, IMAML, "At equal steps:", "At equal time:", "transductive"):
        assert words in text


def test_it_replaces_what_an_earlier_demo_left_and_nothing_else(tmp_path: Path) -> None:
    refuse_other_files(tmp_path / "missing")
    refuse_other_files(tmp_path)
    figure = tmp_path / "curves.png"
    figure.write_bytes(b"mine")
    outcome = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert outcome.exit_code == 2 and figure.read_bytes() == b"mine"
    assert " ".join(outcome.stderr.split()).endswith(
        f"{tmp_path} has curves.png in it, and not from an earlier demo; this one would replace it. Name another folder with --out"
    )
    for mine in ("", "[1]", "[]", "7", '{"rows": 3}', '{"rows": [{"method": "mine"}]}', '{"rows": []}'):
        (tmp_path / "results.json").write_text(mine)
        with pytest.raises(
            RunError, match=r"has results\.json, curves\.png in it, .* would replace them\. Name another"
        ):
            refuse_other_files(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"rows": [{"method": UNTRAINED}, {"method": FIRST_ORDER}]}))
    refuse_other_files(tmp_path)


def test_an_interrupted_demo_does_not_lock_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.Arm, "step", timed_step)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_draw_task", interrupted)
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(KeyboardInterrupt):
        run_demo(replace(TINY, linear="identity"), TINY, replace(PLAN, points=1), tmp_path, console)
    assert (tmp_path / "curves.png").exists()
    refuse_other_files(tmp_path)


def test_without_a_terminal_it_says_now_and_then_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a pipe or into a file it was silent until the table, for minutes."""
    clock = [0.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: clock[0])
    text = io.StringIO()
    arms = {
        name: demo.Arm(trainer=SimpleNamespace(progress=SimpleNamespace(step=step)))  # type: ignore[arg-type]  # all that is read
        for name, step in ((FIRST_ORDER, 12), (IMAML, 7))
    }
    with demo._progress(Console(file=text, width=20), 200.0) as tick:
        for clock[0] in (1.0, 29.0, 31.0, 40.0, 62.0):
            tick(arms)
    assert text.getvalue().splitlines() == [
        "training first-order MAML and iMAML in turn for 200 s ...",
        "31 of 200 s: first-order MAML step 12, iMAML step 7",
        "62 of 200 s: first-order MAML step 12, iMAML step 7",
    ]


def row(method: str, at: str, mean: float) -> Row:
    result = Evaluation(
        metric="accuracy", mean=mean, interval=0.01, tasks=300, query_shots=5, failed=0, inner_residual=0.1
    )
    return Row(method=method, at=at, snapshot=Snapshot(step=1, seconds=1.0, theta={}), result=result)


def test_the_verdict_names_the_winner_whichever_it_is() -> None:
    rows = [
        row(UNTRAINED, "", 0.3),
        row(FIRST_ORDER, "equal steps", 0.5),
        row(FIRST_ORDER, "equal time", 0.605),
        row(IMAML, "both", 0.6),
    ]
    assert verdict(rows) == [
        "At equal steps: iMAML is ahead by 10.0 points; the intervals are apart.",
        "At equal time: first-order MAML is ahead by 0.5 points; the intervals overlap.",
    ]


def test_a_method_that_does_not_learn_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code of the demo rests on this."""
    outcomes = iter([0.5, 0.6, 0.6, 0.5])  # untrained, first order twice, iMAML
    plan = replace(PLAN, seconds=2.0, points=1)

    def fake(*_: object) -> Evaluation:
        mean = next(outcomes, 0.5)  # a busy machine puts more points on the curve
        return Evaluation(
            metric="accuracy", mean=mean, interval=0.01, tasks=40, query_shots=2, failed=0, inner_residual=0.1
        )

    monkeypatch.setattr(demo, "_test", fake)
    console = Console(file=(tmp_path / "console.txt").open("w"))
    assert not run_demo(replace(TINY, linear="identity"), TINY, plan, tmp_path, console)
