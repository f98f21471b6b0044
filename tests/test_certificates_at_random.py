"""Bounds and estimates on random problems whose exact hypergradient is known: the measurement of docs/results/certificates.py.

The strategies find the exact answers by dense algebra in 38 digits, from derivatives written by hand.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_certificates", ROOT / "docs" / "results" / "certificates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def check(script: ModuleType, rows: dict[str, list[dict]]) -> None:
    """No bound is violated, and nine of ten estimates are within a factor 10, for each way to stop."""
    for name, each in rows.items():
        assert not [row for row in each if "failed" in row], name
        violated = [row for row in each if not row["error"] <= min(row["bound"], row["local bound"])]
        assert not violated, (name, violated)
        found = script.summary(each)
        assert found["in the window"] >= 0.3 * len(each), name
        assert found["within the factor"] >= 0.9 * found["in the window"], (name, found)


@pytest.mark.parametrize("seed", [10, 11])
def test_fifty_problems(script, seed):
    check(script, script.measure(script.cases(50, seed, dims=[(2, 10), (10, 20)]), seed))


@pytest.mark.slow
def test_a_thousand_problems(script):
    """Others than those of the page, up to 100 dimensions and a condition number of 1e6."""
    problems = script.cases(1000, seed=12)
    assert len({case.name for case in problems}) == 1000 and max(float(case.kappa) for case in problems) > 5e5
    check(script, script.measure(problems, 12, in_turn=True))


def test_the_page_is_made_from_the_numbers(script):
    folder = ROOT / "docs" / "results"
    result = json.loads((folder / "certificates.json").read_text())
    assert (folder / "certificates.md").read_text() == script.page(result)
    for rule in result["rules"].values():
        assert rule["summary"]["bounds violated"] == rule["summary"]["local bounds violated"] == 0
        assert rule["summary"]["within the factor"] >= 0.9 * rule["summary"]["in the window"]
