"""Claims about the toy of Littwin & Wolf: what is trained, what is kept, when a claim agrees."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.cli import main
from fastres.sites import trace
from fastres.studies import littwin_wolf, littwin_wolf_plots
from fastres.studies.littwin_wolf import Layer, Options, gaussians, run, toy
from fastres.studies.littwin_wolf_report import Part, claims_of, rows_of, text


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
    model = toy(options, True, 0)
    assert [site.name for site in trace(model, x[:5])] == [str(i) for i in range(1, 10)]
    assert [m.linear.out_features for m in model if isinstance(m, Layer)] == [20] * 10
    assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 10
    assert not any(isinstance(m, nn.BatchNorm1d) for m in toy(options, False, 0).modules())
    mean = torch.stack([x[y == k].mean(0) for k in range(10)])
    assert (x - mean[y]).std().item() == pytest.approx(1, abs=0.01)
    assert mean.std().item() == pytest.approx(options.spread, rel=0.15)
    several = gaussians(replace(options, gaussians=50), 0)[1]
    assert several.unique().tolist() == list(range(10))


def test_making_a_toy_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (toy(Options(), True, seed) for seed in (0, 0, 1))
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
    assert len(lines) == 2 * 2 * 3
    assert [line["mean_length"] for line in lines] == [str(r.mean_length) for r in rows_of(parts)]
    for part in parts:
        assert len(part.scale) == 3
        assert part.scale[0] == [1.0] * 4
        assert (part.scale[1] == [1.0] * 4) == (part.network == "plain")
        assert 0 < part.exact_length[-1] < 3
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
    assert len(measured) == 5
    monkeypatch.setattr(littwin_wolf, "measure", whole)
    assert run(replace(quick, fresh=True), quiet).parts == finished.parts


def part(network: str, end: list[float], norm: list[float], length: list[float]) -> Part:
    count = len(norm)
    scale = [[1.0] * len(end)] * (count - 1) + [end]
    return Part(network, 0, scale, norm, [0.5] * count, [1.0] * count, length, length)


def test_a_claim_agrees_only_where_the_figures_do():
    rising = [
        part("batch norm", [2.0, 1.1, 1.2], [1, 2], [1, 2]),
        part("plain", [1.0] * 3, [1, 2, 3], [1, 1, 2]),
    ]
    falling = [
        part("batch norm", [1.0, 0.9, 1.1], [1, 2], [2, 1]),
        part("plain", [1.0] * 3, [1, 2, 1], [2, 1, 1]),
    ]
    for parts, want in ((rising, True), (falling, False)):
        found = {claim.about: claim.agrees for claim in claims_of(parts)}
        assert found["heaviest length of 100, beta 0.1, 0.5, 2"]
        assert found["critical points as beta rises to 50"]
        assert found["CIFAR ResNet-32, norms of absorbed kernels"] is None
        for about in (
            "batch-norm scales, from 1, after training",
            "scale of the first layer, without a skip",
            "norm of the weights, no batch norm",
            "mean length by gains, batch norm",
            "mean length of the gradient, no batch norm",
        ):
            assert found[about] is want, about


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 1}, "layers must be 2 to 1000, got 1"),
        ({"samples": 10}, "samples must be 50 to"),
        ({"gaussians": 3}, "gaussians must be 10 to"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"epochs": 0}, "epochs must be 1 to 10000, got 0"),
    ],
)
def test_an_option_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=f"littwin-wolf: {message}"):
        Options(**wrong)


def test_the_command_takes_its_options(capsys, tmp_path):
    assert main(["study", "littwin-wolf", "--epochs", "0"]) == 2
    assert "epochs must be 1 to 10000, got 0" in capsys.readouterr().err
