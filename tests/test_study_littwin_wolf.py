"""Claims about the toy of Littwin & Wolf: what is trained, what is kept, when a claim agrees."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.cli import main
from fastres.sites import trace
from fastres.studies import littwin_wolf, littwin_wolf_cifar, littwin_wolf_plots
from fastres.studies.claims import Claim
from fastres.studies.littwin_wolf import measure, run
from fastres.studies.littwin_wolf_claims import claims_of, text
from fastres.studies.littwin_wolf_report import Part, rows_of
from fastres.studies.littwin_wolf_toy import NETWORKS, Layer, Options, Scale, gaussians, toy

ROOT = os.environ.get("FASTRES_DATA")
COMMITTED = Path(__file__).parent.parent / "docs/littwin-wolf"


@pytest.fixture
def quick(tmp_path) -> Options:
    return Options(layers=4, width=6, samples=300, epochs=2, seeds=2, out=tmp_path / "out")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figure: it takes longer than all that is measured."""
    monkeypatch.setattr(littwin_wolf.plots, "save", lambda *_: None)
    monkeypatch.setattr(littwin_wolf, "figure", lambda *_: None)


def quiet(_: str) -> None:
    pass


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_toy_is_that_of_the_paper():
    options = Options()
    x, y = gaussians(options, 0)
    assert x.shape == (10_000, 50)
    assert y.unique().tolist() == list(range(10))
    model = toy(options, "batch norm", 0)
    assert [site.name for site in trace(model, x[:5])] == [str(i) for i in range(1, 10)]
    assert [m.linear.out_features for m in model if isinstance(m, Layer)] == [20] * 10
    assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 10
    assert not any(isinstance(m, nn.BatchNorm1d) for m in toy(options, "plain", 0).modules())
    mean = torch.stack([x[y == k].mean(0) for k in range(10)])
    assert (x - mean[y]).std().item() == pytest.approx(1, abs=0.01)
    assert mean.std().item() == pytest.approx(options.spread, rel=0.15)
    several = gaussians(replace(options, gaussians=50), 0)[1]
    assert several.unique().tolist() == list(range(10))


def test_making_a_toy_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (toy(Options(), "scale", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    weights = [nn.utils.parameters_to_vector(m.parameters()) for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_files_are_whole_and_figure_and_table_say_the_same(quick):
    said: list[str] = []
    parts = run(quick, said.append).parts
    assert {p.name for p in quick.out.iterdir()} == {"report.json", "table.csv", "deepening.png"}
    content = json.loads((quick.out / "report.json").read_text())
    assert [Part.parse(entry) for entry in content["rows"]] == list(parts)
    assert text(parts) in "\n".join(said)
    lines = table_of(quick.out)
    assert len(lines) == 3 * 2 * 3
    assert [line["mean_length"] for line in lines] == [str(r.mean_length) for r in rows_of(parts)]
    for part in parts:
        assert len(part.scale) == 3
        assert part.scale[0] == [1.0] * 4
        assert (part.scale[1] == [1.0] * 4) == (part.network == "plain")
        assert 0 < part.exact_length[-1] < 3
        assert [len(row) for row in part.measured] == [3, 3, 3]
    norms = littwin_wolf_plots.figure(parts).axes[2]
    plain = [part.weight_norm for part in parts if part.network == "plain"]
    assert [line.get_ydata().tolist() for line in norms.get_lines()] == plain


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(quick, undrawn, monkeypatch):
    whole, measured = littwin_wolf.measure, []

    def until_three(network, seed, *rest):
        measured.append((network, seed))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(network, seed, *rest)

    monkeypatch.setattr(littwin_wolf, "measure", until_three)
    stopped = run(quick, quiet)
    assert stopped.interrupted
    assert len(stopped.parts) == 2
    finished = run(quick, quiet)
    assert finished.parts[:2] == stopped.parts
    assert len(measured) == 7
    monkeypatch.setattr(littwin_wolf, "measure", whole)
    assert run(replace(quick, fresh=True), quiet).parts == finished.parts


def test_a_scale_divides_by_the_mean_deviation_of_the_units():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).relu() * torch.arange(1, 7)
    scale = Scale()
    sigma = x.var(0, correction=0).sqrt().mean()
    torch.testing.assert_close(scale(x), x / sigma, rtol=1e-4, atol=1e-6)
    for _ in range(200):
        scale(x)
    scale.weight.data.fill_(3)
    torch.testing.assert_close(scale.eval()(x), 3 * x / sigma, rtol=1e-4, atol=1e-6)


def test_scales_rise_in_training_and_so_does_the_norm_without_batch_norm():
    options = Options(samples=2000, epochs=4, lr=0.003, spread=2.0)
    part = measure("scale", 0, options)
    means = [sum(row[1:]) / 9 for row in part.scale]
    assert means[-1] > means[-2] > 1.001
    assert part.error[-1] < part.error[0]
    norms = measure("plain", 0, options).weight_norm
    assert norms == sorted(norms)
    assert norms[-1] > norms[0]


def part(network: str, ends: list[float], norm: list[float], length: list[float]) -> Part:
    count = len(norm)
    scale = [[1.0] * len(ends)] * (count - 1) + [ends]
    return Part(network, 0, scale, norm, [0.5] * count, [1.0] * count, length, length)


def test_a_claim_agrees_only_where_the_figures_do():
    rising = [
        part("scale", [2.0, 1.1, 1.2], [1, 2], [1, 2]),
        part("plain", [1.0] * 3, [1, 2, 3], [1, 1, 2]),
    ]
    falling = [
        part("scale", [1.0, 0.9, 1.05], [1, 2], [2, 1]),
        part("plain", [1.0] * 3, [1, 2, 1], [2, 1, 1]),
    ]
    for parts, want in ((rising, True), (falling, False)):
        found = {claim.about: claim.agrees for claim in claims_of(parts)}
        assert found["heaviest length of 100, beta 0.1, 0.5, 2"]
        assert found["critical points as beta rises to 50"]
        assert found["CIFAR ResNet-32, norms of absorbed kernels"] is None
        for about in (
            "mean of the scales, from 1, one scale per layer",
            "scale of the first layer, one scale per layer",
            "norm of the weights, no batch norm",
            "mean length by gains, one scale per layer",
            "mean length of the gradient, no batch norm",
        ):
            assert found[about] is want, about


def test_theorem_3_is_judged_by_the_signs_and_sizes_of_what_was_measured():
    plain = part("scale", [2.0, 1.1, 1.2], [1, 2], [1, 2])
    slope, predicted = [[-2.0, -4.0], [-1.0, -1.0]], [[-0.1, -0.2], [-0.1, 0.1]]
    for measured, falls, near in (
        ([[-0.1, -0.2], [-0.1, -0.1]], True, True),
        ([[-0.2, -0.4], [-0.2, 0.2]], True, False),
        ([[0.1, -0.2], [0.1, 0.1]], False, False),
    ):
        growth = {"slope": slope, "predicted": predicted, "measured": measured}
        found = {c.about: c for c in claims_of([replace(plain, **growth)])}
        assert found["Theorem 3: dL/d lambda after a step on w"].agrees is falls
        assert found["its change over the one predicted, median"].agrees is near
        assert found["dL/d lambda before the step"].measured == "15 x the change"
        assert "correlation 1.00" in found["growth of a scale in an epoch"].measured


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 1}, "layers must be 2 to 1000, got 1"),
        ({"samples": 10}, "samples must be 50 to"),
        ({"gaussians": 3}, "gaussians must be 10 to"),
        ({"head": 0.0}, "head must be above 0, got 0.0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"epochs": 0}, "epochs must be 1 to 10000, got 0"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"littwin-wolf: {message}"):
        Options(**wrong)


@pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")
def test_the_full_study_trains_a_resnet_and_goes_on_in_the_middle_of_it(
    quick, undrawn, monkeypatch
):
    monkeypatch.setattr(littwin_wolf, "NETWORKS", ("plain",))
    full = replace(quick, seeds=1, epochs=1, full=True, depth=8, images=50, cifar_epochs=3)
    seen, whole = [], littwin_wolf_cifar.evaluate

    def until_two(*arguments):
        seen.append(whole(*arguments))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return seen[-1]

    monkeypatch.setattr(littwin_wolf_cifar, "evaluate", until_two)
    stopped = run(full, quiet)
    assert stopped.interrupted
    assert [part.network for part in stopped.parts] == ["plain"]
    part = run(full, quiet).parts[-1]
    assert part.network == "ResNet-32"
    assert len(seen) == 3 + 2  # the epoch that was cut off, and the last
    assert [len(row) for row in part.scale] == [3] * 4
    monkeypatch.setattr(littwin_wolf_cifar, "evaluate", whole)
    assert run(replace(full, fresh=True), quiet).parts[-1] == part
    about = {claim.about: claim for claim in claims_of([part])}
    assert "no lr drop" in about["CIFAR ResNet-32, norms of absorbed kernels"].measured


def test_the_claims_of_resnet_32_are_of_before_and_after_the_drop():
    norm = [1 + 0.01 * min(e, 81) + 0.05 * max(e - 81, 0) for e in range(165)]
    scale = [[1 + 0.01 * min(e, 81) - 0.02 * max(e - 81, 0)] for e in range(165)]
    lists = [[0.5] * 165] * 4
    found = claims_of([Part("ResNet-32", 0, scale, norm, *lists)])[-2:]
    assert [claim.agrees for claim in found] == [True, True]
    assert found[0].measured == "1.00 to 5.96; +0.010, then +0.050 an epoch"
    falling = [[2 - 0.01 * e] for e in range(165)]
    found = claims_of([Part("ResNet-32", 0, falling, norm[::-1], *lists)])[-2:]
    assert [claim.agrees for claim in found] == [False, False]


def test_what_is_committed_is_one_run_of_the_default_command():
    content = json.loads((COMMITTED / "report.json").read_text())
    parts = [Part.parse(entry) for entry in content["rows"]]
    usual = Options()
    assert [part.key for part in parts] == [(n, s) for s in range(usual.seeds) for n in NETWORKS]
    for name in ("layers", "width", "samples", "spread", "head", "epochs", "lr"):
        assert content["arguments"][name] == getattr(usual, name)
    names = list(table_of(COMMITTED)[0])
    rows = [{name: str(getattr(row, name)) for name in names} for row in rows_of(parts)]
    assert table_of(COMMITTED) == rows
    found = claims_of(parts)
    assert [Claim(**entry) for entry in content["claims"]] == found
    agreed = {claim.about: claim.agrees for claim in found}
    assert agreed["mean of the scales, from 1, one scale per layer"]
    assert agreed["mean of the scales, from 1, batch norm"]
    assert agreed["scale of the first layer, batch norm"]
    assert agreed["norm of the weights, no batch norm"]


def test_the_page_says_what_the_run_measured():
    content = json.loads((COMMITTED / "report.json").read_text())
    parts = [part for part in map(Part.parse, content["rows"]) if part.network == "scale"]
    pairs = [
        pair
        for p in parts
        for rows in zip(p.predicted, p.measured, strict=True)
        for pair in zip(*rows, strict=True)
    ]
    held = [measured for predicted, measured in pairs if predicted < 0]
    page = " ".join((COMMITTED.parent / "ensembles.md").read_text().split())
    assert f"holds in {len(held)} of {len(pairs)} blocks and epochs" in page
    assert f"the slope falls in {sum(m < 0 for m in held)} of them only" in page
    before = {claim.about: claim.measured for claim in claims_of(parts)}
    times = before["dL/d lambda before the step"].split()[0]
    assert f"is {times} times the change that it predicts" in page


def test_the_command_takes_its_options(capsys, tmp_path):
    assert main(["study", "littwin-wolf", "--epochs", "0"]) == 2
    assert "epochs must be 1 to 10000, got 0" in capsys.readouterr().err
