"""Claims about fastres.report: files are whole or not there, and say what they were made with."""

import csv
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

from fastres import report
from fastres.analysis import power_law

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    report.write(file, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_written_file_can_be_read_by_others(tmp_path):
    report.write(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_json_refuses_what_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(tmp_path / "a.json", {"error": math.nan})
    assert not list(tmp_path.iterdir())


def test_csv_comes_back_as_it_went_in(tmp_path):
    rows = [["a, b", 'say "c"', 0.1], ["", "line\nbreak", 1 / 3]]
    report.write_csv(tmp_path / "a.csv", ("x", "y", "z"), rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        back = list(csv.reader(file))
    assert back[0] == ["x", "y", "z"]
    assert [[a, b, float(c)] for a, b, c in back[1:]] == rows


def test_a_table_is_aligned_to_the_right():
    assert report.table(("n", "value"), [("6", "0.5"), ("300", "0.05")]).splitlines() == [
        "  n  value",
        "---  -----",
        "  6    0.5",
        "300   0.05",
    ]


def test_the_environment_says_what_a_result_was_made_with():
    facts = report.environment(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["native"]) == {"_C", "_C_cuda"}
    assert facts["device"]
    json.dumps(facts)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"out must be a writable folder, got .*file/out"):
        report.prepare_folder(tmp_path / "file" / "out")


def test_plots_are_drawn_for_one_block_and_for_many(tmp_path):
    profiles = {n: (np.full(n, 1 / n), np.full(n, 2 / n)) for n in (1, 6, 300)}
    report.plot_profiles(tmp_path / "a.png", profiles)
    depths = sorted(profiles)
    values = [1 / n for n in depths]
    report.plot_power_law(tmp_path / "b.png", depths, values, values, power_law(depths, values))
    for file in tmp_path.iterdir():
        assert file.read_bytes().startswith(PNG)
        assert file.stat().st_size > 10_000


def test_without_matplotlib_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastres\[demo\]'"):
        report.plot_profiles(tmp_path / "a.png", {1: ([0.1], [0.2])})
