"""Claims about the study of depth: known laws are found, files are whole, runs go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.cli import main
from fastres.data import Data
from fastres.studies import hauser
from fastres.studies.hauser import Options, Setting, measure, run
from fastres.studies.hauser_report import Part, claims_of, curves, summary, text

DOCS = Path(__file__).parent.parent / "docs"


def noise(name: str = "mnist") -> Data:
    """Noise of two classes that a linear map tells apart."""
    edge, channels = (28, 1) if name == "mnist" else (32, 3)
    x = torch.randn(60, channels, edge, edge, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    return Data(name, 2, x, y, x, y)


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    monkeypatch.setattr(hauser, "load", lambda name, _: noise(name))
    return Options(
        data=("mnist",), blocks=(2, 4), conv_blocks=(6, 9), samples=60, epochs=1, seeds=2,
        out=tmp_path / "new",
    )  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figure: it takes longer than all that is measured."""
    monkeypatch.setattr(hauser.plots, "save", lambda *_: None)
    monkeypatch.setattr(hauser, "figure", lambda *_: None)


def quiet(_: str) -> None:
    pass


def part(blocks: int, scaled: float, seed: int = 0, **values) -> Part:
    point = {"network": "mlp", "data": "mnist", "decay": 1.0, "seed": seed, "blocks": blocks,
                   "error": 0.1, "absolute": 1.0 / blocks, "scaled": scaled, "scaled_start": 1.0,
                   "norm": 1.0, "distance": 1.0, "roughness": 1.0, "profile": []}  # fmt: skip
    return Part(**{**point, **values})


def test_files_are_whole_and_hold_every_network(quick):
    said: list[str] = []
    parts = run(quick, said.append).parts
    assert [p.key for p in parts] == hauser.plan(quick)
    assert {p.name for p in quick.out.iterdir()} == {"report.json", "table.csv", "depth.png"}
    content = json.loads((quick.out / "report.json").read_text())
    assert [Part.parse(entry) for entry in content["rows"]] == list(parts)
    assert text(parts) in "\n".join(said)
    assert len(content["laws"]) == 4
    for each in parts:
        assert len(each.profile) == each.blocks
        assert each.distance > 0
    table = (quick.out / "table.csv").read_text().splitlines()
    assert len(table) == len(parts) + 1
    assert "profile" not in table[0]


def test_more_seeds_go_on_from_what_is_there(quick, undrawn, monkeypatch):
    first = run(replace(quick, seeds=1), quiet).parts
    whole, measured = hauser.measure, []

    def counted(*arguments):
        measured.append(arguments)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(hauser, "measure", counted)
    stopped = run(quick, quiet)
    assert stopped.interrupted
    assert {p.key for p in stopped.parts} > {p.key for p in first}
    assert len(stopped.parts) == len(first) + 2
    finished = run(quick, quiet)
    assert [p for p in finished.parts if p in stopped.parts] == list(stopped.parts)
    assert [p for p in finished.parts if p in first] == list(first)
    monkeypatch.setattr(hauser, "measure", whole)
    assert run(replace(quick, fresh=True), quiet).parts == finished.parts


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_part_is_what_the_tape_of_its_network_says(network):
    options = Options(samples=60, epochs=1, seeds=1)
    data = noise("cifar10")
    found = measure(Setting(network, "cifar10", 0.01), 0, 6, options, data)
    model = hauser.make_network(Setting(network, "cifar10", 0.01), 0, 6, data)
    small = hauser._for_convolutions(data, options) if network == "conv" else data
    assert small.test_x.shape[1:] == ((3, 16, 16) if network == "conv" else (3, 32, 32))
    tape = hauser.recorded(model, small.test_x)
    assert found.scaled_start == pytest.approx(tape.mean_scaled)
    assert len(found.profile) == len(tape.names) == 6


def test_a_reciprocal_law_is_found_and_a_root_law_is_not_called_one():
    depths = (6, 12, 30)
    exact = [part(n, 0.6 / n * (1 + 0.01 * s), s) for s in range(3) for n in depths]
    first, local, falls, rule = claims_of(exact)
    assert first.agrees
    assert local.agrees
    assert falls.agrees
    assert rule.measured == "12"  # 0.0505, below 0.1
    assert "-1.00 (-1.00 to -1.00); L times value varies 1.0-fold" in first.measured
    root = [part(n, 0.6 * n**-0.5 * (1 + 0.01 * s * n), s) for s in range(2) for n in depths]
    assert [claim.agrees for claim in claims_of(root)[:2]] == [False, False]
    assert summary(exact)["laws"][0]["exponents"]["absolute"][0] == pytest.approx(-1)


def test_a_curve_holds_the_seeds_that_have_every_depth():
    parts = [part(6, 0.1), part(12, 0.05), part(6, 0.1, seed=1)]
    (curve,) = curves(parts)
    assert len(curve.parts) == 1
    assert "one seed" in text(parts)
    assert json.dumps(summary(parts), allow_nan=False)
    assert curves(parts[:1]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ("digits",)}, "data must be mnist, cifar10 or both"),
        ({"conv_blocks": (6, 10)}, "conv_blocks must be multiples of 3"),
        ({"blocks": (0, 3)}, "blocks must be >= 1"),
        ({"seeds": 0}, "seeds must be 1 to 1000, got 0"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=f"hauser: {message}"):
        Options(**change)


def test_the_command_takes_the_options(capsys):
    assert main(["study", "hauser", "--conv-blocks", "4"]) == 2
    assert (
        "hauser: conv_blocks must be multiples of 3 from 6 up, got (4,)" in capsys.readouterr().err
    )
    assert Options(full=True).conv_blocks == (6, 12, 30, 60, 120, 300)


@pytest.mark.parametrize("folder", ["hauser", "hauser-cifar10"])
def test_the_committed_table_is_that_of_the_committed_parts(folder):
    content = json.loads((DOCS / folder / "report.json").read_text())
    parts = [Part.parse(entry) for entry in content["rows"]]
    assert text(parts) in (DOCS / "depth.md").read_text()
