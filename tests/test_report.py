"""Claims about fastres.report: tables and JSON come back, and say what they were made with."""

import csv
import json
import math

import pytest
import torch

from fastres import report


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
