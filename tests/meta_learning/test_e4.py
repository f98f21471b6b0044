"""E4: the cells of Table 2, and the numbers that its page makes of runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from typer.testing import CliRunner

from applications.meta_learning.algorithms import MAML, FirstOrderMAML, ImplicitMAML, Reptile
from applications.meta_learning.cli import app
from applications.meta_learning.config import IMPLIED, Config
from applications.meta_learning.experiments import e4_omniglot as e4
from applications.meta_learning.experiments.base import Request
from applications.meta_learning.method import build_method, build_network
from applications.meta_learning.run import RunError
from bilevel.linsys import Identity

RUNNER = CliRunner()


def request_for(folder: Path, **changes: Any) -> Request:
    return Request(**{"quick": False, "seed": 0, "data_dir": Path("omniglot"), "parts": folder, **changes})


def test_the_cells_are_the_rows_of_the_table(tmp_path: Path) -> None:
    kinds = {"gd": ImplicitMAML, "hf": ImplicitMAML, "fo": FirstOrderMAML, "maml": MAML, "reptile": Reptile}
    kinds |= dict.fromkeys((e4.OURS, e4.OURS_FIRST_ORDER, e4.FIXED_FIRST_ORDER), ImplicitMAML)
    for table in (e4.E4CPU(), e4.E4()):
        assert len(set(table.cells)) == len(table.runs) + table.timed
        for cell in table.runs:
            config = table.config(cell, request_for(tmp_path))
            assert (f"{config.ways}w{config.shots}s", config.split, config.seed) == (cell.column, cell.split, cell.seed)
            assert (config.outer_steps, config.meta_batch) == (table.steps, table.batch)
            if cell.split == "random" and cell.seed == 0:
                algorithm = build_method(config, build_network(config)).algorithm
                assert type(algorithm) is kinds[cell.row]
                first_order = cell.row in (e4.OURS_FIRST_ORDER, e4.FIXED_FIRST_ORDER)
                assert first_order == (getattr(algorithm, "linsys", None) == Identity())
                if cell.row in (e4.OURS, e4.OURS_FIRST_ORDER):
                    assert config.inner_steps == (24 if isinstance(table, e4.E4) else 8)


def test_our_two_rows_differ_in_the_linear_system_alone(tmp_path: Path) -> None:
    one, other, fixed = (
        e4.E4CPU().config(e4.Cell("5w1s", row, "random", 0), request_for(tmp_path)).to_dict()
        for row in (e4.OURS, e4.OURS_FIRST_ORDER, e4.FIXED_FIRST_ORDER)
    )
    assert {key for key in one if one[key] != other[key]} == {"linear", "curvature"}
    inner = {"inner_steps", "inner_step_size", "inner_momentum"}
    assert {key for key in one if other[key] != fixed[key]} == inner


def run(row: str, seed: int, means: list[float], seconds: float, final: float) -> dict[str, Any]:
    """A run whose evaluations come at equal times."""
    times = np.linspace(0, seconds, len(means))
    return {
        "row": row,
        "seed": seed,
        "curve": [
            {"step": i, "step_seconds": float(t), "mean": m} for i, (t, m) in enumerate(zip(times, means, strict=True))
        ],
        "step_seconds": seconds,
        "tests": {"paper": {"mean": 0.0, "interval": 0.0}, "tight": {"mean": final, "interval": 0.01}},
    }


def test_accuracy_at_a_time_is_interpolated() -> None:
    one = run("gd", 0, [0.2, 0.6, 0.8], 10.0, 0.8)
    for seconds in (0.0, 1.0, 5.0, 7.5, 10.0, 20.0):
        assert e4._at_time({}, one, seconds) == pytest.approx(np.interp(seconds, [0, 5, 10], [0.2, 0.6, 0.8]))


def test_differences_are_taken_seed_by_seed_with_students_interval() -> None:
    ours = [run("gd", s, [0.2, 0.5, 0.8], 20.0, final) for s, final in enumerate((0.90, 0.92, 0.97))]
    others = [run("fo", s, [0.2, 0.6, 0.7], 10.0, final) for s, final in enumerate((0.88, 0.89, 0.90))]
    (line,) = [text for text in e4._comparison([*others, *ours], {}) if text.startswith("| iMAML, gradient descent")]
    steps, times = line.split("|")[2:4]
    differences = np.array([2.0, 3.0, 7.0])
    half = scipy.stats.t.ppf(0.975, 2) * differences.std(ddof=1) / 3**0.5
    assert steps.strip() == f"{differences.mean():+.2f} ± {half:.2f}"
    assert times.strip() == "-20.00 ± 0.00"  # after 10 s: 0.5 against 0.7


def test_one_cell_by_name_and_a_page_of_what_is_there(tmp_path: Path) -> None:
    wrong = RUNNER.invoke(app, ["experiment", "e4_omniglot_cpu", "--only", "quux", "--out", str(tmp_path)])
    words = "--only: got 'quux'; expected one of the 33 cells of e4_omniglot_cpu, such as 5w1s-ours-random-0, "
    assert wrong.exit_code == 2 and words in wrong.output
    near = RUNNER.invoke(app, ["experiment", "e4_omniglot_cpu", "--only", "5w1s-hf-random", "--out", str(tmp_path)])
    assert near.exit_code == 2 and "such as 5w1s-hf-random-" in near.output
    whole = RUNNER.invoke(app, ["experiment", "e1", "--only", "nothing", "--out", str(tmp_path)])
    assert whole.exit_code == 2 and "measured as a whole" in whole.output
    done = RUNNER.invoke(
        app, ["experiment", "e4_omniglot_cpu", "--quick", "--only", "5w1s-gd-random-0", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "e4_omniglot_cpu.json").read_text())
    assert list(stored["result"]["runs"]) == ["5w1s-gd-random-0"]
    count = len(e4.E4CPU().runs)
    assert f"{count - 1} of {count} runs are not measured yet" in (tmp_path / "e4_omniglot_cpu.md").read_text()


def test_the_runs_of_an_earlier_result_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(name: str) -> dict[str, Any]:
        table = e4.E4CPU()
        table.record(tmp_path, quick=True, seed=0, only=name)
        return json.loads((tmp_path / f"{table.name}.json").read_text())["result"]["runs"]

    first = one("5w1s-gd-random-0")
    both = one("5w1s-fo-random-0")
    assert list(first) == ["5w1s-gd-random-0"] and set(both) == {"5w1s-gd-random-0", "5w1s-fo-random-0"}
    assert both["5w1s-gd-random-0"] == first["5w1s-gd-random-0"]
    stored = json.loads((tmp_path / "e4_omniglot_cpu.json").read_text())
    for name in IMPLIED:  # a run of a version that had no such setting
        del stored["result"]["runs"]["5w1s-gd-random-0"]["config"][name]
    (tmp_path / "e4_omniglot_cpu.json").write_text(json.dumps(stored))
    assert set(one("5w1s-fo-random-0")) == set(both)
    stored["result"]["runs"]["5w1s-gd-random-0"]["config"]["lam"] = 7.0  # of other settings: not the same cell
    (tmp_path / "e4_omniglot_cpu.json").write_text(json.dumps(stored))
    assert set(one("5w1s-fo-random-0")) == {"5w1s-fo-random-0"}


@pytest.mark.parametrize("table", [e4.E4CPU(), e4.E4()], ids=lambda table: table.name)
def test_what_is_published_would_be_kept(table: e4.Table2, tmp_path: Path) -> None:
    """Another cell measured into docs/results must not cost the ones that are there."""
    published = Path(__file__).parents[2] / "docs" / "results" / f"{table.name}.json"
    if not published.exists():
        pytest.skip("not measured yet")
    cells = {cell.name: cell for cell in table.runs}
    for name, run in e4._result_of(published)["runs"].items():
        assert Config.from_dict(run["config"]) == table.config(cells[name], request_for(tmp_path)), name


def test_a_stopped_cell_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from applications.meta_learning.experiments import training

    cell, table = e4.E4CPU().runs[0], e4.E4CPU()
    request = request_for(tmp_path, quick=True, data_dir=None, only=cell.name)
    config = table.config(cell, request)
    protocols = (e4.Protocol(name="paper", tasks=4, query_shots=None),)
    whole = training.trained(request_for(tmp_path / "whole"), cell.name, config, protocols, 1)

    class StopAfterOneStep:
        calls = 0

        def __call__(self) -> bool:
            StopAfterOneStep.calls += 1
            return StopAfterOneStep.calls > 1

    from contextlib import nullcontext

    monkeypatch.setattr(training, "stop_on_signals", lambda: nullcontext(StopAfterOneStep()))
    with pytest.raises(KeyboardInterrupt):
        training.trained(request, cell.name, config, protocols, 1)
    monkeypatch.undo()
    again = training.trained(request, cell.name, config, protocols, 1)
    times = {"seconds", "step_seconds"}
    assert again["tests"] == whole["tests"]
    assert [{k: v for k, v in p.items() if k not in times} for p in again["curve"]] == [
        {k: v for k, v in p.items() if k not in times} for p in whole["curve"]
    ]
    assert again["steps"] == whole["steps"] == 2


def test_a_part_is_never_that_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated characters in the place of Omniglot have a part of their own; settings that changed are named."""
    table, name = e4.E4CPU(), "5w1s-gd-random-0"
    asked: list[str] = []

    def measured(request: Request, part: str, config: Config, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(f"{part}: {config.dataset}")
        return {"config": config.to_dict()}

    monkeypatch.setattr(e4, "trained", measured)
    for data_dir in (None, Path("omniglot"), None):
        found = table.run(request_for(tmp_path / "parts", data_dir=data_dir, only=name))
        dataset = "glyphs" if data_dir is None else "omniglot"
        assert found["dataset"] == dataset and found["runs"][name]["config"]["dataset"] == dataset
    assert asked == [f"glyphs-{name}: glyphs", f"{name}: omniglot"]
    monkeypatch.setattr(type(table), "steps", 500)
    with pytest.raises(
        RunError, match=rf"{name}\.json was measured with other settings \(outer_steps 1000, now 500;? ?.*to measure"
    ):
        table.run(request_for(tmp_path / "parts", only=name))


def test_every_run_says_where_it_comes_from() -> None:
    facts = {"processor": "CPU", "threads": 1, "device": "cpu", "torch": "2.13", "commit": "a" * 40, "bilevel": "0.1"}
    there = {"environment": {**facts, "device": "GPU", "commit": "b" * 40}}
    stored = {"environment": facts, "result": {"runs": {"one": {}, "two": there, "three": there}}}
    assert e4.E4CPU().sources(stored) == (
        f"Hardware: CPU, 1 thread; torch 2.13; commit `{'a' * 12}` (`one`); "
        f"Hardware: GPU beside CPU; torch 2.13; commit `{'b' * 12}` (`two`, `three`)"
    )
    del stored["result"]["runs"]["two"], stored["result"]["runs"]["three"]
    assert e4.E4CPU().sources(stored) == f"Hardware: CPU, 1 thread; torch 2.13; commit `{'a' * 12}`"


def test_beside_the_paper() -> None:
    """Differences to the table, the share of tasks without a gradient, what does not rise, and the order."""

    def one(row: str, means: list[float], failed: int, skipped: int) -> dict[str, Any]:
        counts = {"tasks": 200, "negative_tasks": 190, "failed_tasks": failed, "steps": 4, "skipped_steps": skipped}
        final = means[-1]
        return {**run(row, 0, means, 1.0, final), **counts, "tests": {"paper": {"mean": final, "interval": 0.01}}}

    falls = one("gd", [0.2, 0.5, 0.6, 0.5, 0.4], 150, 1)
    rises = one("fo", [0.2, 0.5, 0.7, 0.8, 0.9], 0, 0)
    text = "\n".join(e4._beside_the_paper([falls, rises], "5w1s"))
    assert "- iMAML, gradient descent: -59.2 points. 75 % of its tasks were left out" in text
    assert "In 25 % of the outer steps no task was left" in text
    assert "It does not rise: 55 % on average over the first half of the outer steps, 40 % at the end" in text
    assert "- first-order MAML: -8.3 points.\n" in text and "All rows saw 200 tasks" in text
    assert (
        "first-order MAML, iMAML, gradient descent, is not that of the paper (iMAML, gradient descent, first-order MAML)"
        in text
    )
    assert e4._beside_the_paper([one(e4.OURS, [0.2, 0.9], 0, 0)], "5w1s") == []


def test_times_are_those_of_all_rows_in_turn_where_these_were_measured() -> None:
    one = {**run("gd", 0, [0.2, 0.6, 0.8], 10.0, 0.8), "steps": 2}
    timed = {"timing": {"seconds": {"gd": 3.0, "fo": 1.0}}}
    assert (e4._times({}, one), e4._end({}, one)) == ([0.0, 5.0, 10.0], 10.0)
    assert (e4._times(timed, one), e4._end(timed, one)) == ([0.0, 3.0, 6.0], 6.0)
    other = {**run("fo", 0, [0.2, 0.5, 0.6], 10.0, 0.6), "steps": 2}
    (line,) = [text for text in e4._comparison([one, other], timed) if text.startswith("| iMAML, gradient descent")]
    assert "-13.33" in line  # after 2 s: 0.2 + 2 / 3 of 0.4 against 0.6


def test_the_time_of_a_step_is_measured_for_all_rows(tmp_path: Path) -> None:
    table = e4.E4CPU()
    table.record(tmp_path, quick=True, seed=0, only=e4.TIMING)
    stored = json.loads((tmp_path / f"{table.name}.json").read_text())["result"]
    assert set(stored["timing"]["seconds"]) == set(e4.ROWS) and stored["runs"] == {}
    assert all(seconds > 0 for seconds in stored["timing"]["seconds"].values())


def test_a_whole_table_is_published_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measured(request: Request, *_: Any, **__: Any) -> dict[str, Any]:
        path = tmp_path / "e4_omniglot.json"
        seen.append(len(json.loads(path.read_text())["result"]["runs"]) if path.exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"config": table.config(cells[request.only], request).to_dict()}

    table = e4.E4()
    cells = {cell.name: cell for cell in table.runs}
    monkeypatch.setattr(e4, "trained", measured)
    monkeypatch.setattr(e4.E4, "publish", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        table.record(tmp_path, quick=False, seed=0)
    assert seen == [0, 1, 2]


def test_generated_characters_are_called_that_and_not_compared_with_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who leaves --data-dir out may take the numbers for those of Omniglot."""
    monkeypatch.delenv("BILEVEL_OMNIGLOT", raising=False)
    name, table = "5w1s-gd-random-0", e4.E4CPU()
    done = RUNNER.invoke(app, ["experiment", table.name, "--quick", "--only", name, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "These are generated characters, not Omniglot: --data-dir names its folder." in done.output
    page, stored = ((tmp_path / f"{table.name}.{kind}").read_text() for kind in ("md", "json"))
    words = "**These are generated characters, not Omniglot:**"
    assert words in page and "Beside the paper" not in page
    real = json.loads(stored)["result"] | {"dataset": "omniglot"}
    other = "\n".join(table.findings(real))
    assert words not in other and "Beside the paper" in other
