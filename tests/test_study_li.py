"""Claims about the study of Li et al. 2016: what it trains, what it compares, what it leaves."""

import csv
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from fastres.analysis.conditioning import squared_loss
from fastres.cli import main
from fastres.studies import li
from fastres.studies.li import run
from fastres.studies.li_claims import claims_of, summary, text
from fastres.studies.li_compare import PLAIN, course, courses, curve
from fastres.studies.li_data import Task, whitened
from fastres.studies.li_nets import NETS, build, descend, look, loss_of, start
from fastres.studies.li_pieces import Options, Piece, Study, pieces
from fastres.studies.li_report import Part, Row, best, rows_of

COMMITTED = Path(__file__).parent.parent / "docs/li"


def problem(samples: int = 60) -> Task:
    source = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, samples, 10, dtype=torch.float64, generator=source)
    x = whitened(x, 10)
    return Task(x, 0.3 * x.roll(1, 1) + 0.1 * noise)


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    """Small networks on noise, few epochs."""
    some = problem()
    tasks = {"linear": some.condensed(), "relu": Task(some.x.float(), some.y.float())}
    study = Study(tasks, {"linear": some.least, "relu": some.least}, "0")
    monkeypatch.setattr(li, "prepare", lambda _: study)
    monkeypatch.setattr(li.plots, "save", lambda *_: None)
    return Options(
        depths=(2,),
        relu_depths=(2,),
        hessian_depths=(2,),
        course_depths=(2,),
        epochs=4,
        rates=2,
        seeds=1,
        out=tmp_path / "new" / "folder",
    )


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("depth", [2, 6, 7])
def test_a_linear_network_multiplied_out_has_the_loss_of_the_network(net, depth):
    some, network = problem(), build(net, depth, 10, relu=False)
    weights = torch.stack([start(network, seed) for seed in (0, 1)]) * 20
    plain = torch.func.functional_call(network, {"weights": weights}, some.x)
    torch.testing.assert_close(loss_of(network, some)(weights), squared_loss(some.y)(plain))


def test_ten_samples_lack_of_the_loss_of_all_what_the_best_linear_map_leaves():
    some, network = problem(), build("2-shortcut", 4, 10, relu=False)
    weights = start(network, 0) * 30
    whole, few = loss_of(network, some)(weights), loss_of(network, some.condensed())(weights)
    assert float(whole - few) == pytest.approx(some.least, rel=1e-9)


def test_many_networks_descend_as_each_alone():
    some, network = problem(), build("2-shortcut", 4, 10, relu=True)
    loss = loss_of(network, some)
    weights, rates = torch.stack([start(network, s) * 30 for s in (0, 1)]), torch.tensor([0.1, 0.2])
    together = descend(loss, weights, rates, 5, keep={0, 3})
    for i in range(2):
        alone = descend(loss, weights[i : i + 1], rates[i : i + 1], 5)
        torch.testing.assert_close(together.weights[i], alone.weights[0])
    assert torch.equal(together.kept[0], weights)
    torch.testing.assert_close(together.kept[3], descend(loss, weights, rates, 3).weights)


def test_one_step_is_that_of_gradient_descent():
    some, network = problem(), build("1-shortcut", 1, 10, relu=False)
    found = descend(loss_of(network, some), torch.zeros(1, 1, 1, 10, 10).double(), torch.ones(1), 1)
    torch.testing.assert_close(found.weights[0, 0, 0], some.yx - some.xx)  # Y - X, at rate 1


def test_a_2_shortcut_at_zero_has_index_one_half_and_no_gradient():
    some, network = problem(), build("2-shortcut", 4, 10, relu=False)
    shape = look(loss_of(network, some), torch.zeros(2, 2, 10, 10).double())
    assert shape.gradient_norm == 0
    assert shape.eigenvalues.index == 0.5


def test_depths_are_whole_units_and_no_network_comes_twice():
    found = pieces(Options(depths=(2, 4), hessian_depths=(2, 4)))
    assert len({piece.name for piece in found}) == len(found)
    threes = {piece.depth for piece in found if piece.net == "3-shortcut"}
    assert all(depth % 3 == 0 for depth in threes)


def test_a_run_leaves_whole_files_and_the_next_goes_on_from_them(quick, monkeypatch):
    first = run(quick, quiet)
    report = json.loads((quick.out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [piece.name for piece in pieces(quick)]
    with (quick.out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == sum(len(part.rows) for part in first.parts)
    assert list(table[0]) == [field.name for field in fields(Row)]
    monkeypatch.setattr(Piece, "rows", lambda *_: pytest.fail("it was done before"))
    assert run(quick, quiet).parts == first.parts


def test_ctrl_c_keeps_the_parts_that_are_done(quick, monkeypatch):
    whole, done = Piece.rows, []

    def rows(piece, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(piece)
        return whole(piece, *arguments)

    monkeypatch.setattr(Piece, "rows", rows)
    stopped = run(quick, quiet)
    assert stopped.interrupted
    assert len(stopped.parts) == 3
    monkeypatch.setattr(Piece, "rows", whole)
    assert run(quick, quiet).parts[:3] == stopped.parts


def test_other_arguments_take_nothing_over(quick):
    run(quick, quiet)
    done = []
    run(replace(quick, epochs=5), lambda line: done.append(line))
    assert not any("finished before" in line for line in done)


def test_a_network_that_diverges_is_a_row_without_a_loss(quick):
    study = li.prepare(quick)
    piece = Piece("final", "linear", "1-shortcut", 2)
    rows = list(piece.rows(study, replace(quick, epochs=400), []))
    assert [row.rate for row in rows] == [0.001, 10]
    assert rows[1].loss is None
    found = best(rows, "linear", "1-shortcut", 2)
    assert found is not None
    assert found.rate == found.highest == 0.001
    assert best(rows[1:], "linear", "1-shortcut", 2) is None


def test_the_best_rate_has_the_least_mean_over_seeds():
    def row(rate: float, seed: int, loss: float | None) -> Row:
        return Row("final", "linear", "a", 2, seed, rate, 9, loss, loss, weight_norm=1.0)

    rows = [row(0.1, 0, 1.0), row(0.1, 1, 3.0), row(1.0, 0, 0.0), row(1.0, 1, 5.0)]
    rows += [row(10.0, 0, 0.0), row(10.0, 1, None)]  # one seed diverged
    found = best(rows, "linear", "a", 2)
    assert found is not None
    assert (found.rate, found.loss, found.highest) == (0.1, 2.0, 1.0)


def ways(ours: float, theirs: float) -> list[Row]:
    """Looks at a 2-shortcut and the plain networks, with these condition numbers throughout."""
    return [
        Row("course", "linear", net, 4, 0, 0.1, epoch, loss, loss - 0.3, 1.0, 1.0,
            condition_tenth=condition, index=0.1)
        for net, condition in (("2-shortcut", ours), *((net, theirs) for net in PLAIN))
        for epoch, loss in ((0, 5.0), (10, 2.0), (100, 0.31))
    ]  # fmt: skip


@pytest.mark.parametrize(("ours", "agrees"), [(2.0, True), (200.0, False)])
def test_networks_are_compared_at_the_same_loss(ours, agrees):
    found = {claim.about: claim for claim in claims_of(ways(ours, 20.0))}
    claim = found["on the way, conditioning at the same loss"]
    assert claim.agrees == agrees
    assert claim.measured == f"at {6 if agrees else 0} of 6 looks"


def test_what_was_not_measured_yet_is_not_claimed():
    assert claims_of([]) == []
    assert courses(ways(1, 2)[:3]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (3,)}, r"depths must be even, 2 or more, got \[3\]"),
        ({"relu_depths": ()}, r"relu_depths must be even, 2 or more, got \[\]"),
        ({"epochs": 0}, "epochs must be 1 to 1000000, got 0"),
        ({"rates": 1}, "rates must be 2 to 1000, got 1"),
        ({"samples": 10}, "samples must be 11 to 10000, got 10"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ValueError, match=f"li: {message}"):
        Options(**change)


def test_rows_of_another_kind_are_not_taken_over():
    good = asdict(Row("final", "linear", "a", 2, 0))
    for change in ({"kind": "other"}, {"net": 3}, {"loss": "1"}, {"index": [1]}):
        with pytest.raises(ValueError, match="must be"):
            Part.parse({"name": "x", "rows": [good | change]})


def test_the_command_needs_its_data(monkeypatch, capsys):
    monkeypatch.delenv("FASTRES_DATA", raising=False)
    assert main(["study", "li", "--out", "nowhere"]) == 2
    assert "mnist needs its folder in --data-root" in capsys.readouterr().err


@pytest.fixture(scope="module")
def committed() -> list[Part]:
    content = json.loads((COMMITTED / "report.json").read_text())
    return list(map(Part.parse, content["rows"]))


def test_the_committed_run_is_whole_and_its_claims_follow_from_its_rows(committed):
    content = json.loads((COMMITTED / "report.json").read_text())
    assert [entry["name"] for entry in content["rows"]] == [p.name for p in pieces(Options())]
    assert content["claims"] == summary(committed)["claims"]
    assert (COMMITTED / "li.png").stat().st_size > 10_000


def test_the_committed_run_has_the_initial_condition_numbers_of_the_theory(committed):
    rows = rows_of(committed)
    ours = curve(rows, "2-shortcut")
    assert max(ours.values()) / min(ours.values()) < 1.01
    orthogonal = curve(rows, "plain, orthogonal")
    assert [orthogonal[d] for d in (2, 4, 8, 12)] == pytest.approx([3.7, 9.1, 20, 31.1], rel=0.03)
    start = [course(rows, "linear", "2-shortcut", d)[0].index for d in (4, 8)]
    assert start == [0.5, 0.5]


def test_the_document_shows_what_the_run_printed(committed):
    page = (COMMITTED.parent / "conditioning.md").read_text()
    assert text(committed) in page


@pytest.mark.skipif(not os.environ.get("FASTRES_DATA"), reason="FASTRES_DATA is not set")
def test_linear_networks_get_the_moments_of_all_images_and_others_get_images():
    study = li.prepare(Options(samples=50))
    linear, relu = study.tasks["linear"], study.tasks["relu"]
    assert (linear.x.shape, relu.x.shape) == ((10, 10), (50, 10))
    assert study.least["linear"] == pytest.approx(0.334, abs=1e-3)
    torch.testing.assert_close(linear.xx, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(relu.xx, torch.eye(10), atol=1e-5, rtol=0)
