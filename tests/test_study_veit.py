"""Claims about the study of lesions: whole files, runs that go on, real weights."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.cli import main
from fastres.gates import gate
from fastres.sites import trace
from fastres.studies import veit, veit_plots
from fastres.studies.claims import Claim
from fastres.studies.claims import text as claims_text
from fastres.studies.paths_network import untrained
from fastres.studies.veit import Options, Study, run
from fastres.studies.veit_report import Part, claims_of, means, rows_of, text

ROOT = os.environ.get("FASTRES_DATA")
needs_files = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")
COMMITTED = Path(__file__).parent.parent / "docs/veit"


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    """Six noise images, a network of nine blocks, five parts."""
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = untrained(20, x, 0)
    with torch.no_grad():
        y = network(x).argmax(1)
    study = Study(network, tuple(trace(network, x[:1])), x, y, x, "0")
    monkeypatch.setattr(veit, "prepare", lambda _: study)
    plan = (("single", 1), ("several", 2), ("several", 3), ("order", 1), ("recalibrated", 3))
    monkeypatch.setattr(veit, "PLANS", {20: plan})
    return Options(depth=20, images=6, draws=2, out=tmp_path / "new" / "folder")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figure: it takes longer than all that is measured."""
    monkeypatch.setattr(veit.plots, "save", lambda *_: None)
    monkeypatch.setattr(veit, "figure", lambda *_: None)


def quiet(_: str) -> None:
    pass


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_files_are_whole_and_every_lesion_is_what_gates_give(quick):
    said: list[str] = []
    parts = run(quick, said.append).parts
    assert [(p.kind, p.number) for p in parts] == list(veit.PLANS[20])
    assert {p.name for p in quick.out.iterdir()} == {"report.json", "table.csv", "lesions.png"}
    content = json.loads((quick.out / "report.json").read_text())
    assert [Part.parse(entry) for entry in content["rows"]] == list(parts)
    assert text(parts) in "\n".join(said)
    lines = table_of(quick.out)
    assert len(lines) == 9 + 2 * 2 + 2 + 2
    study = veit.prepare(quick)
    for line in lines[:13]:
        closed = dict.fromkeys(line["deleted"].split(), 0.0)
        with torch.no_grad(), gate(study.network, closed):
            wrong = (study.network(study.x).argmax(1) != study.y).float().mean().item()
        assert float(line["error"]) == pytest.approx(wrong)
        assert float(line["change"]) == pytest.approx(wrong)  # the labels are its own answers
        assert len(closed) == int(line["number"])
    assert lines[13]["deleted"] == ""
    assert float(lines[13]["tau"]) < 1
    again = [line["deleted"] for line in lines if line["kind"] == "recalibrated"]
    assert again == [line["deleted"] for line in lines if line["number"] == "3"][:2]


def test_the_figure_draws_what_the_table_says(quick, undrawn):
    rows = rows_of(run(quick, quiet).parts)
    single, several, order = veit_plots.figure(rows).axes
    bars = {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height()
        for container in single.containers[1::2]
        for bar in container
    }
    assert [bars[i] for i in range(9)] == [row.error for row in rows[:9]]
    assert several.get_lines()[1].get_ydata().tolist() == [
        means(rows, "single")[1],
        *means(rows, "several").values(),
    ]
    assert order.get_lines()[0].get_xdata().tolist() == [
        row.tau for row in rows if row.kind == "order"
    ]


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(quick, undrawn, monkeypatch):
    whole, measured = veit.measure, []

    def until_three(kind, number, *rest):
        measured.append((kind, number))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(kind, number, *rest)

    monkeypatch.setattr(veit, "measure", until_three)
    said: list[str] = []
    stopped = run(quick, said.append)
    assert stopped.interrupted
    assert len(stopped.parts) == 2
    finished = run(quick, said.append)
    assert finished.parts[:2] == stopped.parts
    assert len(measured) == 6
    assert measured[2] == measured[3]
    assert any("finished before" in line and "--fresh" in line for line in said)
    run(quick, quiet)
    assert len(measured) == 6
    monkeypatch.setattr(veit, "measure", whole)
    assert run(replace(quick, fresh=True), quiet).parts == finished.parts
    for broken in ("", "[]", '{"arguments": {}, "rows": [{}]}', "\0"):
        (quick.out / "report.json").write_text(broken)
        assert run(quick, quiet).parts == finished.parts


def test_without_matplotlib_all_but_the_figure_is_there(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    run(quick, said.append)
    assert {path.name for path in quick.out.iterdir()} == {"report.json", "table.csv"}
    assert any("figures need matplotlib" in line for line in said)


def part(kind: str, number: int, error: list[float], **more: list[float] | list[str]) -> Part:
    count = len(error)
    usual = {"deleted": [""] * count, "tau": [1.0] * count, "change_error": [0.0] * count}
    return Part(kind, number, 27, 0.06, **{**usual, **more}, error=error)


def agreed(parts: list[Part]) -> dict[str, bool | None]:
    return {claim.about: claim.agrees for claim in claims_of(parts)}


def test_a_claim_agrees_only_where_the_figures_do():
    names = ["layer1.0", "layer2.0", "layer2.1", "layer3.0"]
    single = part("single", 1, [0.07, 0.2, 0.09, 0.15], deleted=names)
    several = [part("several", k, [k / 25, k / 25]) for k in (2, 5, 10)]
    orders = part("order", 3, [0.1, 0.2, 0.3], tau=[1.0, 0.9, 0.8])
    found = agreed([single, *several, orders])
    assert found["one block deleted, 2 inside stages"]
    assert found["one block deleted, between stages"]
    assert found["10 of 54 deleted; here 5 of 27"]
    assert not found["20 of 54 deleted; here 10 of 27"]
    assert not found["error as more are deleted"]  # two hurt less than one
    assert found["error as Kendall's tau falls"]
    assert found["one layer of a plain VGG deleted"] is None
    other = agreed(
        [
            replace(single, error=[0.12, 0.07, 0.09, 0.15]),
            *(part("several", k, [k / 25]) for k in (4, 5, 14)),
            replace(orders, error=[0.3, 0.2, 0.1]),
        ]
    )
    assert not other["one block deleted, 2 inside stages"]
    assert not other["one block deleted, between stages"]
    assert other["error as more are deleted"]
    assert other["20 of 54 deleted; here 14 of 27"]
    assert not other["error as Kendall's tau falls"]


def test_claims_are_laid_out_with_what_was_not_measured_left_open():
    shown = claims_text([Claim("a", "1", "2", False), Claim("b", "1", "1", True)])
    assert [line.split() for line in shown.splitlines()[2:]] == [
        ["a", "1", "2", "no"],
        ["b", "1", "1", "yes"],
    ]
    assert claims_text([Claim("c", "1", "-", None)]).splitlines()[2].split() == ["c", "1", "-"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 110}, "depth must be one of 20, 56, got 110"),
        ({"images": 1}, "images must be 2 to 10000, got 1"),
        ({"draws": 0}, "draws must be 1 to 1000, got 0"),
        ({"seed": -1}, "seed must be 0 to 4294967296, got -1"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"veit: {message}"):
        Options(**wrong)


def test_data_that_are_not_there_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FASTRES_DATA", raising=False)
    for arguments, message in (
        ([], "data: veit needs its folder in --data-root or the variable FASTRES_DATA, got none"),
        (["--data-root", str(tmp_path)], f"data: there must be a file {tmp_path}/pretrained/resn"),
        (["--depth", "9"], "veit: depth must be one of 20, 56, got 9"),
    ):
        assert main(["study", "veit", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"fastres: {message}")
        assert printed.err.count("\n") == 1


@needs_files
def test_the_command_measures_real_weights(tmp_path, capsys, monkeypatch):
    plan = (("single", 1), ("several", 2), ("order", 1), ("several", 4))
    monkeypatch.setattr(veit, "PLANS", {20: plan})
    arguments = ["--depth", "20", "--images", "40", "--draws", "1", "--out", str(tmp_path)]
    assert main(["study", "veit", *arguments]) == 0
    assert "one block deleted, between stages" in capsys.readouterr().out
    assert len(table_of(tmp_path)) == 9 + 1 + 1 + 1


def test_what_is_committed_is_one_run_of_the_default_command():
    content = json.loads((COMMITTED / "report.json").read_text())
    parts = [Part.parse(entry) for entry in content["rows"]]
    usual = Options()
    assert [(part.kind, part.number) for part in parts] == list(veit.PLANS[usual.depth])
    assert content["arguments"]["images"] == f"test_batch, 0 to {usual.images - 1}"
    assert (content["arguments"]["draws"], content["arguments"]["seed"]) == (usual.draws, 0)
    names = list(table_of(COMMITTED)[0])
    rows = [{name: str(getattr(row, name)) for name in names} for row in rows_of(parts)]
    assert table_of(COMMITTED) == rows
    claims = [Claim(**entry) for entry in content["claims"]]
    assert claims == claims_of(parts)


def test_the_page_says_what_the_run_measured():
    content = json.loads((COMMITTED / "report.json").read_text())
    rows = rows_of([Part.parse(entry) for entry in content["rows"]])
    page = " ".join((COMMITTED.parent / "ensembles.md").read_text().split())
    single = {row.deleted: row.change for row in rows if row.kind == "single"}
    inside = {k: v for k, v in single.items() if k not in ("layer2.0", "layer3.0")}
    several, again = means(rows, "several"), means(rows, "recalibrated")
    for claim in (
        f"{sum(v < 0.05 for v in inside.values())} of {len(inside)} raise the error by less than",
        f"the mean of all is {sum(inside.values()) / len(inside):.3f}",
        f"(+{single['layer1.7']:.3f} and +{single['layer1.1']:.3f})",
        f"the mean of the three from {several[5]:.2f} to {again[5]:.2f}",
    ):
        assert claim in page
