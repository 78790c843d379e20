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
from torch import nn

from fastres.cli import main
from fastres.data import load
from fastres.gates import gate
from fastres.sites import trace
from fastres.studies import veit, veit_plots
from fastres.studies.claims import Claim
from fastres.studies.claims import text as claims_text
from fastres.studies.paths_network import untrained
from fastres.studies.veit import Options, Study, run
from fastres.studies.veit_claims import claims_of, text
from fastres.studies.veit_plain import LAYERS, control, delete_layers, network
from fastres.studies.veit_report import Part, means, rows_of
from fastres.training import Recipe

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
    study = Study(network, tuple(trace(network, x[:1])), x, y, (x, y), "0")
    monkeypatch.setattr(veit, "prepare", lambda _: study)
    plan = (("single", 1), ("several", 2), ("several", 3), ("order", 1), ("recalibrated", 3))
    monkeypatch.setattr(veit, "PLANS", {20: plan})
    monkeypatch.setattr(veit, "CONTROL", ())
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


def test_controls_are_judged_beside_the_network():
    single = part("single", 1, [0.1, 0.12], deleted=["layer1.1", "layer1.2"])
    plain, near = (
        part("plain", 15, [0.9, 0.85]),
        replace(part("effective", 1, [0.1]), baseline=0.065),
    )
    resilient, fragile = (part("stochastic", 1, [e, e]) for e in (0.08, 0.2))
    found = agreed([single, plain, resilient, near])
    assert found["one of 27 layers of a plain network deleted"]
    assert found["one block deleted, stochastic depth"]
    assert found["trained with 23 of 54 blocks, or as large a part"]
    worse = agreed([single, replace(plain, error=[0.3, 0.9]), fragile, replace(near, baseline=0.1)])
    assert not worse["one of 27 layers of a plain network deleted"]
    assert not worse["one block deleted, stochastic depth"]
    assert not worse["trained with 23 of 54 blocks, or as large a part"]


@pytest.mark.parametrize("skips", [False, True])
def test_deleting_a_layer_hands_on_what_it_was_given(skips):
    torch.manual_seed(0)
    model = network(3, 8, 4, skips, layers=5).eval()
    x, y = torch.randn(30, 3, 8, 8), torch.randint(10, (30,))
    for layer in (part for part in model if hasattr(part, "norm")):
        layer.norm.running_mean.normal_()
    found = delete_layers(model, x, y)
    assert found.sites == ("1", "3", "4")  # 2 halves the images
    for name, values in zip(found.sites, found.values, strict=True):
        other = nn.Sequential(
            *[nn.Identity() if str(i) == name else p for i, p in enumerate(model)]
        )
        with torch.no_grad():
            assert torch.equal(values, (other(x).argmax(1) != y).float())
    if skips:
        with torch.no_grad(), gate(model, {"3": 0.0}):
            assert torch.equal(found.values[1], (model(x).argmax(1) != y).float())


def test_a_plain_network_of_the_paper_has_15_layers_of_128_channels_and_ends_at_4_by_4():
    model = network(3, 32, 128, skips=False)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == LAYERS == 15
    assert {m.out_channels for m in weighted[:-1]} == {128}
    sizes = []
    model[-3].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    model(torch.randn(2, 3, 32, 32))
    assert sizes == [(2, 128, 4, 4)]


def test_a_control_learns_and_its_layers_are_deleted():
    data = load("digits")
    some = replace(data, train_x=data.train_x[:400], train_y=data.train_y[:400])
    found = control(True, 0, some, Recipe(epochs=2, batch_size=20, lr=2e-3))
    assert found.baseline.mean() < 0.7
    assert found.values.shape == (13, len(data.test_x))


@needs_files
def test_the_full_study_trains_its_networks_and_goes_on_after_an_epoch(
    tmp_path, undrawn, monkeypatch
):
    options = Options(
        full=True, depth=14, images=4, draws=1, epochs=1, training_images=16, out=tmp_path / "out"
    )
    assert [kind for kind, _ in Options(full=True).plan][-3:] == [
        "plain",
        "stochastic",
        "effective",
    ]
    assert ("several", 10) in Options(full=True).plan
    whole, measured = veit.measure, []

    def until_three(kind, number, *rest):
        measured.append((kind, number))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(kind, number, *rest)

    monkeypatch.setattr(veit, "measure", until_three)
    stopped = run(options, quiet)
    assert stopped.interrupted
    changed = (options.out / "resnet.safetensors").stat().st_mtime_ns
    parts = run(options, quiet).parts
    assert (options.out / "resnet.safetensors").stat().st_mtime_ns == changed  # not trained again
    assert [part.key for part in parts] == list(options.plan)
    assert parts[:2] == stopped.parts
    about = [claim.about for claim in claims_of(parts)]
    assert "one block deleted, stochastic depth" in about
    assert "trained with 23 of 54 blocks, or as large a part" in about


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
    monkeypatch.setattr(veit, "CONTROL", ())
    arguments = ["--depth", "20", "--images", "40", "--draws", "1", "--out", str(tmp_path)]
    assert main(["study", "veit", *arguments]) == 0
    assert "one block deleted, between stages" in capsys.readouterr().out
    assert len(table_of(tmp_path)) == 9 + 1 + 1 + 1


def test_what_is_committed_is_one_run_of_the_default_command():
    content = json.loads((COMMITTED / "report.json").read_text())
    parts = [Part.parse(entry) for entry in content["rows"]]
    usual = Options()
    assert [part.key for part in parts] == list(usual.plan)
    assert content["arguments"]["images"] == "test_batch, 0 to 999"
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
    five = [row for row in rows if row.kind == "several" and row.number == 5]
    within = [row.error for row in five if not {"layer2.0", "layer3.0"} & {*row.deleted.split()}]
    across = sorted({row.error for row in five} - {*within})
    assert (len(five), len(within), len(across)) == (10, 8, 2)
    for claim in (
        f"the error {min(within):.1f} of the paper in the best of the ten draws",
        f"{sum(within) / 8:.2f} in the mean of the eight in which no transition is deleted",
        f"{across[0]:.2f} and {across[1]:.2f} in the other two",
        f"{sum(v < 0.05 for v in inside.values())} of {len(inside)} raise the error by less than",
        f"the mean of all is {sum(inside.values()) / len(inside):.3f}",
        f"(+{single['layer1.7']:.3f} and +{single['layer1.1']:.3f})",
        f"the mean of the ten from {several[5]:.2f} to {again[5]:.2f}",
    ):
        assert claim in page
