"""Claims about the demo: every depth learns the digits; what it writes is whole and repeatable."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from fastres.studies import demo
from fastres.studies.demo import Options, run
from fastres.studies.demo_report import Row, laws_of
from fastres.studies.resuming import Result


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[Result[Row], Path]:
    """The demo as it is, at two of its depths."""
    out = tmp_path_factory.mktemp("demo")
    return run(Options(blocks=(30, 6), out=out), say=lambda _: None), out


def test_at_most_5_percent_of_held_out_digits_are_wrong(result):
    assert [row.blocks for row in result[0].parts] == [6, 30]
    assert max(row.error for row in result[0].parts) <= 0.05


def test_at_most_5_percent_are_wrong_at_300_blocks_after_5_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "recording_cost", lambda *_: 1.0)
    options = Options(blocks=(300,), width=32, epochs=5, out=tmp_path)
    assert run(options, say=lambda _: None).parts[0].error <= 0.05


def test_the_perturbation_shrinks_with_depth_and_is_that_of_its_blocks(result):
    shallow, deep = result[0].parts
    assert deep.scaled < shallow.scaled
    assert deep.absolute < shallow.absolute
    assert laws_of(result[0].parts)["scaled"].exponent < 0
    for row in result[0].parts:
        assert row.scaled == pytest.approx(sum(row.profile_scaled) / row.blocks)
        assert row.absolute == pytest.approx(sum(row.profile_absolute) / row.blocks)
        assert row.record_cost > 0.5


def test_before_training_each_block_adds_1_over_sqrt_l(result):
    for row in result[0].parts:  # what the initialisation promises, measured through record
        assert row.scaled_start == pytest.approx(row.blocks**-0.5, rel=0.15)


def test_the_report_is_whole(result):
    found, out = result
    names = {"report.json", "table.csv", "perturbation.png", "power_law.png"}
    assert {path.name for path in out.iterdir()} == names
    content = json.loads((out / "report.json").read_text())
    assert [Row.parse(entry) for entry in content["rows"]] == list(found.parts)
    assert content["arguments"]["seed"] == 0
    assert content["environment"]["threads"] == 1
    assert content["power_laws"]["scaled"]["exponent"] == laws_of(found.parts)["scaled"].exponent
    with (out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["scaled"]) for line in table] == [row.scaled for row in found.parts]


# From here on nothing need be learned: no epochs, two blocks, and no time spent on timing.


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    monkeypatch.setattr(demo, "recording_cost", lambda *_: 1.0)
    return Options(blocks=(1, 2), width=4, epochs=1, out=tmp_path)


def changed(options: Options, **changes: object) -> Options:
    return Options(**{**vars(options), **changes})


def measured(row: Row) -> tuple[object, ...]:
    return row.blocks, row.error, row.profile_scaled, row.profile_absolute


def test_the_same_seed_gives_the_same_rows_bit_for_bit(quick):
    first = run(quick, say=lambda _: None)
    torch.rand(7)  # the caller's own draws do not matter
    again = run(changed(quick, fresh=True), say=lambda _: None)
    other = run(changed(quick, seed=1), say=lambda _: None)
    assert list(map(measured, first.parts)) == list(map(measured, again.parts))
    assert list(map(measured, first.parts)) != list(map(measured, other.parts))


def test_it_leaves_the_callers_generator_and_threads_alone(quick):
    torch.manual_seed(5)
    expected = torch.rand(3)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    run(changed(quick, threads=threads + 1), say=lambda _: None)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(quick, monkeypatch):
    whole, trained = demo.measure, []

    def until_two(blocks, *rest):
        trained.append(blocks)
        if trained == [1, 2]:
            raise KeyboardInterrupt
        return whole(blocks, *rest)

    monkeypatch.setattr(demo, "measure", until_two)
    said: list[str] = []
    stopped = run(quick, said.append)
    assert stopped.interrupted
    assert [row.blocks for row in stopped.parts] == [1]
    assert json.loads((quick.out / "report.json").read_text())["rows"][0]["blocks"] == 1
    assert (quick.out / "perturbation.png").is_file()

    finished = run(quick, said.append)
    assert trained == [1, 2, 2]
    assert [row.blocks for row in finished.parts] == [1, 2]
    assert finished.parts[0] == stopped.parts[0]
    assert any("finished before" in line and "--fresh" in line for line in said)


def test_other_arguments_take_nothing_over(quick, monkeypatch):
    run(quick, say=lambda _: None)
    trained = []
    whole = demo.measure
    monkeypatch.setattr(demo, "measure", lambda n, *r: (trained.append(n), whole(n, *r))[1])
    run(quick, say=lambda _: None)
    assert trained == []
    run(changed(quick, width=5), say=lambda _: None)
    run(changed(quick, width=5, fresh=True), say=lambda _: None)
    assert trained == [1, 2, 1, 2]


def test_other_data_of_the_same_name_and_counts_take_nothing_over(quick, monkeypatch):
    run(quick, say=lambda _: None)
    digits = demo.load("digits")
    other = dataclasses.replace(digits, test_x=digits.test_x.flip(0))
    monkeypatch.setattr(demo, "load", lambda *_: other)
    said: list[str] = []
    assert len(run(quick, said.append).parts) == 2
    assert not any("finished before" in line for line in said)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"arguments": {}, "rows": [{}]}', "\0"])
def test_a_report_that_cannot_be_read_is_not_taken_over(quick, content):
    (quick.out / "report.json").write_text(content)
    assert len(run(quick, say=lambda _: None).parts) == 2


def test_the_table_is_printed_once_with_its_laws(quick):
    said: list[str] = []
    run(quick, said.append)
    text = "\n".join(said)
    assert text.count("test error") == 1
    assert "mean scaled perturbation = " in text
    assert "mean absolute perturbation = " in text


def test_without_matplotlib_all_but_the_plots_is_there(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    run(quick, said.append)
    assert {path.name for path in quick.out.iterdir()} == {"report.json", "table.csv"}
    assert any("figures need matplotlib" in line for line in said)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": ()}, "blocks must be >= 1, got 0"),
        ({"blocks": (6, 0)}, "blocks must be >= 1, got 0"),
        ({"blocks": (-3, 6)}, "blocks must be >= 1, got -3"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"epochs": -1}, "epochs must be >= 0, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"blocks": (6, 10**9)}, "blocks must be <= 65536, got 1000000000"),
        ({"width": 10**8}, "width must be <= 65536, got 100000000"),
        ({"epochs": 10**9}, "epochs must be <= 1048576, got 1000000000"),
        ({"seed": 1 << 64}, "seed must be <= 18446744073709551615, got 18446744073709551616"),
        ({"threads": 10**11}, "threads must be <= 1024, got 100000000000"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"demo: {message}"):
        Options(**wrong)


def test_a_device_that_is_not_there_is_named(quick):
    with pytest.raises(ValueError, match="device must be usable, got 'nonsense'"):
        run(changed(quick, device="nonsense"))


def test_a_device_that_holds_no_values_is_refused(quick):
    with pytest.raises(ValueError, match="demo: device must hold values, got 'meta'"):
        run(changed(quick, device="meta"))


def test_a_model_that_does_not_fit_into_memory_is_named(quick, monkeypatch):
    def full(*_):
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes\nin some file")

    monkeypatch.setattr(demo, "ResidualMLP", full)
    with pytest.raises(ValueError, match=r"got 1 blocks of width 4: not enough .* 9 bytes$"):
        run(quick)


def test_the_greatest_seed_is_taken(quick):
    assert len(run(changed(quick, seed=(1 << 64) - 1), say=lambda _: None).parts) == 2
