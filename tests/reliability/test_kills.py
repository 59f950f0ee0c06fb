"""A few of the kills that benchmarks/reliability.py does by the hundred."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from reliability import kill_and_resume

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("method", "seed"), [("monosoup", 1), ("sfgs", 2)])
def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path, method, seed):
    outcomes = kill_and_resume(tmp_path, 3, seed, method)
    assert all(outcome.identical for outcome in outcomes)
