"""Claims about the study of path lengths: one loss for all methods, whole files, real weights."""

import csv
import json
import math
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from fastres.cli import main
from fastres.nn import cifar_resnet
from fastres.paths import path_gradients
from fastres.studies import paths, paths_plots
from fastres.studies.paths import Options, Study, run
from fastres.studies.paths_network import FILES, trained, untrained
from fastres.studies.paths_report import Part, Row, rows_of, summarise, text

ROOT = os.environ.get("FASTRES_DATA")
needs_files = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")
COMMITTED = Path(__file__).parent.parent / "docs/paths"


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    """Three batches of two noise images, two networks of three blocks."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 32, 32, generator=source)
    networks = {name: untrained(8, x, seed) for seed, name in enumerate(("trained", "untrained"))}
    study = Study(networks, x, torch.arange(6), "0")
    monkeypatch.setattr(paths, "prepare", lambda _: study)
    return Options(batches=3, batch_size=2, draws=2, out=tmp_path / "new" / "folder")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figure: it takes longer than all that is measured."""
    monkeypatch.setattr(paths.plots, "save", lambda *_: None)
    monkeypatch.setattr(paths, "figure", lambda *_: None)


def quiet(_: str) -> None:
    pass


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_image_weighs_the_same_in_the_loss(quick):
    study = paths.prepare(quick)
    network, x, y = study.networks["trained"], study.x[:4], study.y[:4]
    loss = paths.alike(network, x, y)
    whole = path_gradients(network, x, loss, method="moments").gradient
    assert whole.flatten(1).norm(dim=1).tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(network(leaf), y).backward()
    cosines = torch.cosine_similarity(whole.flatten(1), leaf.grad.flatten(1))
    assert cosines.tolist() == pytest.approx([1] * 4, abs=1e-4)


def test_the_gradient_of_an_image_is_kept_however_sure_the_network_is_of_it(quick):
    study = paths.prepare(quick)
    network = study.networks["trained"]
    network.linear.weight.data.zero_()
    network.linear.weight.data[0, 0] = 1.0
    network.linear.bias.data[0] = 20.0  # 1 - p is 2e-8: nothing is left of it in float32
    loss = paths.alike(network, study.x[:1], torch.zeros(1, dtype=torch.int64))
    found = path_gradients(network, study.x[:1], loss)
    assert found.gradient.norm().item() == pytest.approx(1, rel=1e-5)


def test_a_part_is_what_path_gradients_says_of_the_batch(quick):
    study = paths.prepare(quick)
    part = paths.measure("untrained", 1, study, quick)
    model, x, y = study.networks["untrained"], study.x[2:4], study.y[2:4]
    loss = paths.alike(model, x, y)
    exact = path_gradients(model, x, loss)
    assert part.share == pytest.approx(exact.shares.tolist(), rel=1e-4, abs=1e-6)
    assert part.norm == pytest.approx(exact.norms.tolist(), rel=1e-4)
    single = path_gradients(model, x, loss, method="sampled", draws=8)
    for ends in (0, 3):  # one path each: nothing is random
        assert part.mean_norm[ends] == pytest.approx(single.mean_norm[ends].item(), rel=1e-4)
        assert part.energy[ends] == pytest.approx(part.norm[ends] ** 2, rel=1e-4)
    assert part.wrong == int((model(x).argmax(1) != y).sum())


def test_means_and_standard_errors_are_those_of_the_batches():
    part = Part("trained", 0, 1, 1e-7, [0.2, 0.8], [0.5, 0.9], [0.25, 0.81], [0.5, 0.9])
    other = replace(part, batch=1, share=[0.4, 0.6], mean_norm=[0.7, 1.1], norm=[1.5, 0.9])
    first, second = rows_of([part, other])
    assert (first.share, first.share_error) == pytest.approx((0.3, 0.1))
    assert (first.norm, first.log2_norm, first.factor) == pytest.approx((1.0, 0.0, 0.6))
    assert (second.paths, second.count_times_mean) == (1, pytest.approx(1.0))
    assert math.isnan(rows_of([part])[0].share_error)
    summary = summarise(rows_of([part, other]), [part, other])["trained"]
    assert (summary.images_wrong, summary.typical) == (2, 1)
    assert (summary.mean_length, summary.interval_share) == (pytest.approx(0.7), (0, 1))


def test_count_times_mean_counts_all_paths_of_a_length(quick, undrawn):
    rows = rows_of(run(quick, quiet).parts)
    network = paths.prepare(quick).networks["trained"]
    found = path_gradients(network, torch.ones(1, 3, 32, 32), lambda out: out[:, 0].sum())
    for name in ("trained", "untrained"):
        own = [row for row in rows if row.network == name]
        assert tuple(row.paths for row in own) == found.paths
        assert sum(row.share for row in own) == pytest.approx(1, abs=1e-5)
        for row in own:
            assert row.count_times_mean == row.paths * row.mean_norm


def test_files_are_whole_and_figure_and_table_say_the_same(quick):
    said: list[str] = []
    parts = run(quick, said.append).parts
    assert {p.name for p in quick.out.iterdir()} == {"report.json", "table.csv", "paths.png"}
    content = json.loads((quick.out / "report.json").read_text())
    assert [Part.parse(entry) for entry in content["rows"]] == list(parts)
    assert content["arguments"]["seed"] == 0
    assert content["environment"]["device"]
    assert text(parts) in "\n".join(said)
    lines = table_of(quick.out)
    assert [line["network"] for line in lines] == ["trained"] * 4 + ["untrained"] * 4
    rows = rows_of(parts)
    figure = paths_plots.figure(rows, summarise(rows, parts))
    for panel, network in enumerate(("trained", "untrained")):
        own = [line for line in lines if line["network"] == network]
        norms, shares = figure.axes[2 * panel : 2 * panel + 2]
        drawn = [line.get_ydata().tolist() for line in norms.get_lines()]
        assert drawn[0] == [float(line["count_times_mean"]) for line in own]
        assert drawn[1] == [float(line["norm"]) for line in own]
        assert drawn[2] == pytest.approx([math.sqrt(float(line["energy"])) for line in own])
        bars = [bar.get_height() for bar in shares.containers[-1]]
        assert bars == [float(line["share"]) for line in own]


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(quick, undrawn, monkeypatch):
    whole, measured = paths.measure, []

    def until_four(network, batch, *rest):
        measured.append((network, batch))
        if len(measured) == 4:
            raise KeyboardInterrupt
        return whole(network, batch, *rest)

    monkeypatch.setattr(paths, "measure", until_four)
    said: list[str] = []
    stopped = run(quick, said.append)
    assert stopped.interrupted
    assert [(part.network, part.batch) for part in stopped.parts] == measured[:3]
    assert len(table_of(quick.out)) == 8
    finished = run(quick, said.append)
    assert not finished.interrupted
    assert finished.parts[:3] == stopped.parts
    assert len(measured) == 7
    assert measured[3] == measured[4]
    assert any("finished before" in line and "--fresh" in line for line in said)
    run(quick, quiet)
    assert len(measured) == 7
    run(replace(quick, fresh=True), quiet)
    run(replace(quick, seed=1), quiet)
    assert len(measured) == 19


def test_a_run_in_two_halves_is_the_run_in_one(quick, undrawn):
    whole = run(quick, quiet)
    content = json.loads((quick.out / "report.json").read_text())
    del content["rows"][3:]
    (quick.out / "report.json").write_text(json.dumps(content))
    assert run(quick, quiet) == whole
    for broken in ("", "[]", '{"arguments": {}, "rows": [{}]}', "\0"):
        (quick.out / "report.json").write_text(broken)
        assert run(replace(quick, batches=1), quiet).parts == whole.parts[:2]


def test_without_matplotlib_all_but_the_figure_is_there(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    run(replace(quick, batches=1), said.append)
    assert {path.name for path in quick.out.iterdir()} == {"report.json", "table.csv"}
    assert any("figures need matplotlib" in line for line in said)


def test_an_untrained_network_is_normalised_and_leaves_the_generator_alone():
    x = torch.randn(16, 3, 32, 32)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network = untrained(8, x, 0)
    assert torch.equal(torch.rand(3), expected)
    branch = {}
    network.layer3[0].bn2.register_forward_hook(lambda *seen: branch.update(out=seen[2]))
    network(x)
    assert branch["out"].mean().item() == pytest.approx(0, abs=1e-3)
    assert branch["out"].std().item() == pytest.approx(1, abs=1e-2)
    assert torch.equal(network(x), untrained(8, x, 0)(x))
    assert not torch.equal(network(x), untrained(8, x, 1)(x))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 110}, "depth must be one of 20, 56, got 110"),
        ({"batches": 0}, "batches must be 1 to 10000, got 0"),
        ({"batch_size": -1}, "batch_size must be 1 to 10000, got -1"),
        ({"draws": 0}, "draws must be 1 to 1048576, got 0"),
        ({"seed": -1}, "seed must be 0 to 4294967296, got -1"),
        ({"batches": 101, "batch_size": 100}, "batches times batch_size must be at most 10000"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"paths: {message}"):
        Options(**wrong)


def test_data_that_are_not_there_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FASTRES_DATA", raising=False)
    for arguments, message in (
        ([], "data: paths needs its folder in --data-root or the variable FASTRES_DATA, got none"),
        (["--data-root", "/nowhere"], "data: --data-root must be a folder, got /nowhere"),
        (["--data-root", str(tmp_path)], f"data: there must be a file {tmp_path}/pretrained/resn"),
        (["--depth", "9"], "paths: depth must be one of 20, 56, got 9"),
    ):
        assert main(["study", "paths", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"fastres: {message}")
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["empty", "text", "tensor", "dict", "other"])
def test_weights_of_something_else_are_refused(kind, tmp_path):
    file = tmp_path / "weights.th"
    content = {
        "tensor": torch.ones(2),
        "dict": {"epoch": 3},
        "other": {"state_dict": cifar_resnet(8).state_dict()},
    }
    file.write_bytes(b"hello" * (kind == "text"))
    if kind in content:
        torch.save(content[kind], file)
    with pytest.raises(ValueError, match=r"weights\.th: must hold the weights of ResNet-20, got"):
        trained(20, file)


@needs_files
def test_the_public_weights_make_the_errors_that_are_known_of_them():
    options = Options(depth=20, batches=10, batch_size=100)
    study = paths.prepare(options)
    with torch.no_grad():
        wrong = (study.networks["trained"](study.x).argmax(1) != study.y).float().mean()
    assert wrong.item() == pytest.approx(0.0827, abs=0.02)  # of all 10000; here of the first 1000


@needs_files
def test_the_command_measures_real_weights(tmp_path, capsys):
    arguments = ["--depth", "20", "--batches", "1", "--batch-size", "2", "--draws", "1"]
    assert main(["study", "paths", *arguments, "--out", str(tmp_path)]) == 0
    assert "mean length, by shares" in capsys.readouterr().out
    rows = [line for line in table_of(tmp_path) if line["network"] == "trained"]
    assert len(rows) == 10
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-5)


def test_what_is_committed_is_one_run_of_the_default_command():
    content = json.loads((COMMITTED / "report.json").read_text())
    parts = [Part.parse(entry) for entry in content["rows"]]
    usual = Options()
    assert FILES[usual.depth] in content["arguments"]["network"]
    for name in ("batches", "batch_size", "draws", "seed"):
        assert content["arguments"][name] == getattr(usual, name)
    assert len(parts) == 2 * usual.batches
    rows = rows_of(parts)
    summary = {name: asdict(entry) for name, entry in summarise(rows, parts).items()}
    assert content["summary"] == json.loads(json.dumps(summary))
    names = [field.name for field in fields(Row)]
    expected = [{name: str(getattr(row, name)) for name in names} for row in rows]
    assert table_of(COMMITTED) == expected


def test_the_page_says_what_the_run_measured():
    content = json.loads((COMMITTED / "report.json").read_text())
    rows = {(row["network"], int(row["length"])): row for row in table_of(COMMITTED)}
    trained, untrained = (content["summary"][name] for name in ("trained", "untrained"))
    page = " ".join((COMMITTED.parent / "path-gradients.md").read_text().split())
    first, last = trained["interval_share"]
    errors = {
        float(rows["untrained", k]["energy_error"]) / float(rows["untrained", k]["energy"]) / 2
        for k in range(3, 13)  # where 95 % of the shares are
    }
    for claim in (
        f"{trained['factor_typical']:.0f} times the norm of G_k at k = {trained['typical']}",
        f"{float(rows['trained', 12]['factor']):.0f} times at k = 12",
        f"{untrained['factor_typical']:.0f} times the norm at k = {untrained['typical']}",
        f"within the standard error of {max(errors):.0%}".replace("%", " %"),
        f"is {trained['coherence_typical']:.1f} times that root",
        f"it would be {float(rows['trained', 6]['paths']) ** 0.5:.0f} times",
        f"{trained['least_share']:.0e} after training and {untrained['least_share']:.0e} before",
        f"95 % of the shares are those of {first} to {last} of 27 blocks",
    ):
        assert claim in page
    assert untrained["coherence_typical"] == pytest.approx(1, abs=max(errors))
    for network, ahead in (("trained", trained), ("untrained", untrained)):  # "two blocks longer"
        product = [float(rows[network, k]["count_times_mean"]) for k in range(28)]
        assert product.index(max(product)) == ahead["typical"] + 2
