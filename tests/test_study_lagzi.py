"""Claims about the study of residual dynamics: the circles, whole files, runs that go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.cli import main
from fastres.studies import lagzi
from fastres.studies.lagzi import Images, Options, run
from fastres.studies.lagzi_nets import circles, make_network
from fastres.studies.lagzi_report import SIGMAS, Part, claims_of, rows_of, text

COMMITTED = Path(__file__).parent.parent / "docs/lagzi"


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Options:
    """Noise images of two classes that a linear map tells apart, 2 epochs of everything."""
    x = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0, 0, 0] > 0).long()
    monkeypatch.setattr(lagzi, "prepare", lambda _: Images((x[:100], y[:100]), (x, y), "0"))
    monkeypatch.setattr(lagzi, "EPOCHS", 2)
    monkeypatch.setattr(lagzi, "UNROLLED", 40)
    return Options(seeds=2, width=8, samples=100, epochs=2, out=tmp_path / "new")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """No figure: it takes longer than all that is measured."""
    monkeypatch.setattr(lagzi.plots, "save", lambda *_: None)
    monkeypatch.setattr(lagzi, "figure", lambda *_: None)


def quiet(_: str) -> None:
    pass


def test_files_are_whole_and_hold_every_network(quick):
    said: list[str] = []
    parts = run(quick, said.append).parts
    assert [part.key for part in parts] == lagzi.plan(quick)
    assert {p.name for p in quick.out.iterdir()} == {"report.json", "table.csv", "dynamics.png"}
    content = json.loads((quick.out / "report.json").read_text())
    assert [Part.parse(entry) for entry in content["rows"]] == list(parts)
    assert text(parts) in "\n".join(said)
    assert len((quick.out / "table.csv").read_text().splitlines()) == len(rows_of(parts)) + 1
    for part in parts:
        assert len(part.change) == (0 if part.network == "mlp" else part.depths[-1] - 1)
        assert len(part.noise_error) == (len(SIGMAS) if part.kind == "mnist" else 0)
    (shared,) = [p for p in parts if p.key == ("mnist", "shared", 0)]
    assert len(shared.eigenvalues) == 2
    assert 0 < shared.late_change < shared.change[-1]  # 40 layers are nearer to rest than 15


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(quick, undrawn, monkeypatch):
    whole, measured = lagzi.measure, []

    def until_three(*key):
        measured.append(key[:3])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(*key)

    monkeypatch.setattr(lagzi, "measure", until_three)
    stopped = run(quick, quiet)
    assert stopped.interrupted
    assert len(stopped.parts) == 2
    finished = run(quick, quiet)
    assert finished.parts[:2] == stopped.parts
    assert measured[2] == measured[3]
    monkeypatch.setattr(lagzi, "measure", whole)
    assert run(replace(quick, fresh=True), quiet).parts == finished.parts


def test_points_lie_on_their_circles():
    x, y = circles(50, torch.Generator().manual_seed(0))
    assert torch.allclose(x.norm(dim=1), 0.5 + 0.5 * y)
    assert y.sum() == 25


def test_the_mlp_passes_signals_on_at_the_start():
    model = make_network("mlp", 0, (16, 2, 64))
    x = model.start(torch.randn(100, 16, generator=torch.Generator().manual_seed(0)))
    states = model.run(x, return_states=True)
    assert states[-1].std(0).mean() > 0.2 * states[1].std(0).mean()


def test_15_shared_layers_of_3_neurons_learn_the_circles():
    assert lagzi.measure("circles", "shared", 0, Options(), None).error == 0


def test_the_circles_are_learned_and_adaptive_depth_keeps_them_below_15_layers():
    depths = []  # a third of the seeds stays at a local minimum, and which differs by machine
    for seed in range(6):
        part = lagzi.measure("adaptive", "shared", seed, Options(), None)
        if part.error == 0:
            depths.append(part.depths[-1])
        if len(depths) == 2:
            break
    assert len(depths) == 2
    assert max(depths) < 15


def part(kind: str, network: str, seed: int = 0, **values) -> Part:
    return Part(**{"kind": kind, "network": network, "seed": seed, "error": 0.0, "depths": [15],
                   **values})  # fmt: skip


def test_claims_say_what_was_measured():
    def said(*parts: Part) -> dict[str, tuple[str, bool | None]]:
        return {claim.about: (claim.measured, claim.agrees) for claim in claims_of(parts)}

    two = [part("adaptive", "shared", seed, depths=[15, 8]) for seed in range(2)]
    stuck = part("adaptive", "shared", 2, depths=[12], error=0.5)
    about = "circles, adaptive, shared weights: layers"
    assert said(*two, stuck)[about] == ("8 (1), 8 (1), 12 (0.5)", True)
    assert said(two[0], stuck, replace(stuck, seed=3))[about][1] is False
    noisy = {"noise_error": [0.1, 0.1, 0.1, 0.1, 0.2], "error": 0.1}
    worse = part("mnist", "mlp", **{**noisy, "noise_error": [0.1, 0.2, 0.2, 0.2, 0.4]})
    own = part("mnist", "own", change=[0.5, 0.001], **noisy)
    noise = "error by noise, residual against MLP"
    assert said(own, worse)[noise][1] is True
    assert said(own, replace(worse, error=0.9))[noise] == (
        "not comparable: clean errors 0.100 and 0.900",
        None,
    )
    assert said(own)["own weights: residuals steady (change < 0.01)"][1] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seeds": 0}, "seeds must be 1 to 1000, got 0"), ({"samples": 9}, "samples must be 100 to")],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=f"lagzi: {message}"):
        Options(**change)


def test_the_command_takes_the_options_and_full_is_the_size_of_the_paper(quick, undrawn, capsys):
    assert main(["study", "lagzi", "--seeds", "0"]) == 2
    assert "lagzi: seeds must be 1 to 1000, got 0" in capsys.readouterr().err
    full = Options(full=True)
    assert (full.width, full.samples) == (1064, 60_000)


@pytest.mark.skipif(not COMMITTED.exists(), reason="no committed run")
def test_the_committed_table_is_that_of_the_committed_parts():
    content = json.loads((COMMITTED / "report.json").read_text())
    parts = [Part.parse(entry) for entry in content["rows"]]
    page = (COMMITTED.parent / "depth.md").read_text()
    assert text(parts) in page
