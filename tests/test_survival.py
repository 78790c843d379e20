"""Runs survive what happens to them: kill -9, a damaged report, a second run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import asdict, dataclass

import pytest
import torch
from test_training import blobs, net, weights

from fastres import report
from fastres.checkpoint import load
from fastres.files import alone_in
from fastres.studies.resuming import Form, measure_all
from fastres.training import Recipe, train

EPOCHS = 8
KILLS = int(os.environ.get("FASTRES_KILLS", "25"))
fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Part:
    number: int
    value: float
    profile: list[float]

    @property
    def key(self):
        return self.number

    @classmethod
    def parse(cls, entry):
        return cls(int(entry["number"]), float(entry["value"]), [*map(float, entry["profile"])])


FORM = Form(Part.parse, lambda parts: {"count": len(parts)}, list, str, lambda *_: None)
PLAN = list(range(12))


def part(number, _=()):
    return Part(number, number / 7, [number + i / 3 for i in range(50)])


def go_on(out, pause=0.0, say=lambda _: None, plan=PLAN):
    def measure(number, known):
        time.sleep(pause)
        return part(number, known)

    return measure_all(FORM, plan, measure, {"study": "test"}, out, False, say, with_bar=False)


def killed_after(seconds, run, *arguments):
    """Run in a process of its own until kill -9; returns whether it was still at work."""
    process = fork.Process(target=run, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_kill_9_at_any_moment_loses_no_finished_part(tmp_path, record_property):
    source, killed = random.Random(0), 0
    while killed < KILLS:
        out = tmp_path / str(killed)
        before = 0
        while killed_after(source.uniform(0, 0.12), go_on, out, 0.01):
            killed += 1
            found = report.finished(out / "report.json", {"study": "test"}, Part.parse)
            assert found == [part(n) for n in range(len(found))]
            assert len(found) >= before
            before = len(found)
            if source.random() < 0.3:
                break
        assert go_on(out).parts == tuple(map(part, PLAN))
        content = json.loads((out / "report.json").read_text())
        assert content["rows"] == [asdict(part(n)) for n in PLAN]
        assert len((out / "table.csv").read_text().splitlines()) == 13
    record_property("studies killed", killed)


def trained(file):
    """Train, and return all that it comes to."""
    torch.manual_seed(1)  # for the dropout
    model = net()
    losses = train(model, blobs(), Recipe(EPOCHS, batch_size=32), checkpoint=file).losses
    return [*weights(model).tolist(), *losses]


def trained_alone(file):
    torch.set_num_threads(1)  # threads do not survive a fork
    trained(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd has threads there, once used")
def test_kill_9_at_any_moment_loses_no_kept_epoch(tmp_path, record_property):
    source, killed, whole = random.Random(0), 0, trained(tmp_path / "whole.safetensors")
    while killed < KILLS:
        file = tmp_path / f"{killed}.safetensors"
        before = 0
        while killed_after(source.uniform(0, 0.2), trained_alone, file):
            killed += 1
            losses = load(file)[1]["losses"] if file.exists() else []
            assert losses == whole[-EPOCHS:][: len(losses)]
            assert len(losses) >= before
            before = len(losses)
            if source.random() < 0.3:
                break
        assert trained(file) == whole
    record_property("trainings killed", killed)


def test_parts_are_kept_and_written_in_the_order_of_the_plan(tmp_path):
    assert [p.number for p in go_on(tmp_path, plan=[4, 2]).parts] == [4, 2]
    said = []
    assert [p.number for p in go_on(tmp_path, plan=[1, 2, 3, 4], say=said.append).parts] == [
        1,
        2,
        3,
        4,
    ]
    assert said[0] == f"finished before, in {tmp_path}: 2 of 4 parts (--fresh starts over)"
    assert [p.number for p in go_on(tmp_path, plan=[3, 9], say=said.append).parts] == [3, 9]
    assert said[-3] == f"finished before, in {tmp_path}: 1 of 2 parts (--fresh starts over)"
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == "number,value"


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    with alone_in(tmp_path), pytest.raises(ValueError, match="must be used by one run at a time"):
        go_on(tmp_path)
    assert len(go_on(tmp_path).parts) == 12
    process = fork.Process(target=go_on, args=(tmp_path / "other", 10))
    process.start()
    while not (tmp_path / "other").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    with pytest.raises(ValueError, match="must be used by one run at a time"):
        go_on(tmp_path / "other")
    process.kill()  # what kills a run opens its folder
    process.join()
    assert len(go_on(tmp_path / "other").parts) == 12


def test_a_damaged_report_is_put_aside_and_said(tmp_path):
    go_on(tmp_path)
    file = tmp_path / "report.json"
    text = file.read_text().replace("0.14285714285714285", "0.14285714285714385", 1)
    file.write_text(text)
    said = []
    assert len(go_on(tmp_path, say=said.append).parts) == 12
    assert (
        "other arguments or rows than it was written with; it is now report.damaged.json" in said[0]
    )
    assert (tmp_path / "report.damaged.json").read_text() == text


def test_an_error_inside_stays_what_it_is(tmp_path):
    with pytest.raises(BlockingIOError, match="of something else"), alone_in(tmp_path):
        raise BlockingIOError("of something else")


def test_where_there_is_no_posix_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.files.fcntl", None)
    with alone_in(tmp_path):
        assert len(go_on(tmp_path).parts) == 12
