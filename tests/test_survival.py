"""Runs survive what happens to them: kill -9, damaged files, full disks, a second run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import asdict, dataclass

import pytest

from fastres import report
from fastres.files import alone_in
from fastres.formats import DataError
from fastres.studies import (
    demo_report,
    li_report,
    littwin_wolf_report,
    paths_report,
    veit_report,
)
from fastres.studies.resuming import Form, measure_all

DOCS = report.Path(__file__).parent.parent / "docs"
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


def killed_after(seconds, out):
    """Run in a process of its own until kill -9; returns whether it was still at work."""
    process = fork.Process(target=go_on, args=(out, 0.01))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_kill_9_at_any_moment_loses_no_finished_part(tmp_path):
    source, killed = random.Random(0), 0
    for number in range(KILLS):
        out = tmp_path / str(number)
        before = 0
        while killed_after(source.uniform(0, 0.12), out):
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
    assert killed >= KILLS / 2


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
    assert "other rows than it was written with; it is now report.damaged.json" in said[0]
    assert (tmp_path / "report.damaged.json").read_text() == text


REPORTS = {
    "demo": demo_report.Row.parse,
    "li": li_report.Part.parse,
    "littwin-wolf": littwin_wolf_report.Part.parse,
    "paths": paths_report.Part.parse,
    "veit": veit_report.Part.parse,
}


@pytest.mark.parametrize("name", [n for n in REPORTS if (DOCS / n / "report.json").exists()])
def test_100_damaged_reports_of_each_study_are_refused_or_change_nothing(name, tmp_path):
    whole = (DOCS / name / "report.json").read_bytes()
    if len(whole) > 100_000:  # of a large one, its first rows
        content = json.loads(whole)
        content["rows"] = content["rows"][:5]
        content["sha256"] = report.digest(content["rows"])
        whole = json.dumps(content, indent=1).encode()
    arguments = json.loads(whole)["arguments"]
    file, source = tmp_path / "report.json", random.Random(0)
    file.write_bytes(whole)
    rows = report.finished(file, arguments, REPORTS[name])
    assert rows
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        if source.random() < 0.2:
            del damaged[source.randrange(len(whole)) :]
        else:
            damaged[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        file.write_bytes(damaged)
        try:
            assert report.finished(file, arguments, REPORTS[name]) in (rows, [])
        except DataError as error:
            assert str(file) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_a_full_disk_leaves_the_last_report_and_an_error(tmp_path):
    go_on(tmp_path, plan=PLAN[:3])
    before = (tmp_path / "report.json").read_bytes()

    def limited(pipe):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            go_on(tmp_path)
        except OSError as error:
            pipe.send(str(error))
        os._exit(0)

    ours, theirs = fork.Pipe()
    process = fork.Process(target=limited, args=(theirs,))
    process.start()
    assert ours.poll(60)
    assert "File too large" in ours.recv()
    process.join()
    assert (tmp_path / "report.json").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "table.csv"}


def test_a_folder_that_cannot_be_written_to_is_named():
    with pytest.raises(OSError, match="report: out must be a writable folder, got /proc/none"):
        go_on(report.Path("/proc/none"))


def test_an_error_inside_stays_what_it_is(tmp_path):
    with pytest.raises(BlockingIOError, match="of something else"), alone_in(tmp_path):
        raise BlockingIOError("of something else")


def test_where_there_is_no_posix_nobody_is_kept_out(tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.files.fcntl", None)
    with alone_in(tmp_path):
        assert len(go_on(tmp_path).parts) == 12
