"""The scorecard says what was run: counts are those of the tests, what failed shows as failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scorecard

TOOLS = Path(__file__).parent.parent / "tools"
SOURCE = """
import pytest
from hypothesis import given, strategies as st
@given(st.integers())
def test_calls(number): pass
@pytest.mark.parametrize("number", [3, 4])
def test_counts(number, record_property): record_property("things", number)
def test_fails(record_property):
    record_property("things", 100)
    assert 0
def test_skips(): pytest.skip("none")
"""


@pytest.fixture
def reliability(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import reliability

    yield reliability
    sys.modules.pop("reliability")


@pytest.fixture
def outcome(reliability, tmp_path, monkeypatch):
    """What is kept of a part whose tests are those of SOURCE."""
    (tmp_path / "test_source.py").write_text(SOURCE)
    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    monkeypatch.setitem(reliability.PARTS, "fuzz", (["-p", "no:cacheprovider"], {}))
    return reliability.run_tests("fuzz")


def test_what_a_part_has_tried_is_what_its_tests_have_counted(outcome):
    assert outcome["counts"] == {"things": 7, "random calls": 100, "fewest of a test": 100}
    assert [outcome[kind] for kind in ("passed", "failed", "skipped")] == [3, 1, 1]
    assert outcome["failures"] == ["test_fails"]


def test_a_part_that_failed_or_was_not_run_says_so(outcome, tmp_path, monkeypatch):
    made = {"seconds": 1, "cpu_seconds": 60, "commit": "abc"}
    made |= {"device": {"name": "CPU"}, "versions": {"torch": "2.13.0"}}
    (tmp_path / "scorecard.json").write_text(json.dumps({"fuzz": outcome | made}))
    monkeypatch.setattr(scorecard, "FILE", tmp_path / "scorecard.json")
    fuzz, repeats = scorecard.tables().splitlines()[2:4]
    assert "| 100 fewest of a test, 100 random calls, 7 things |" in fuzz
    assert "3 passed, 1 skipped, **1 failed**: test_fails | 1.0 min" in fuzz
    assert repeats.endswith("| not run | | |")


def test_tests_that_are_not_there_are_a_failure(reliability, tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    monkeypatch.setitem(reliability.PARTS, "fuzz", (["tests/nowhere.py"], {}))
    assert reliability.run_tests("fuzz")["failed"] == 1


def test_every_part_has_its_promise(reliability):
    assert list(scorecard.PROMISES) == list(reliability.PARTS)
