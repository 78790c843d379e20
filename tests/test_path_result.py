"""What path_gradients returns can be read, kept and drawn; what it does not know, it says."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from path_models import squares, switch_mlp
from torch import Tensor, nn

from fastres.paths import path_gradients
from fastres.paths.result import PathGradients


def measured(**options: object) -> PathGradients:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, generator=source, dtype=torch.float64)
    return path_gradients(switch_mlp(6), x, squares, **options)


def with_shares(shares: list[float], tail: float = 0.0) -> PathGradients:
    """A result of one sample whose gradient is one number, 1."""
    dots = torch.tensor([*shares, tail], dtype=torch.float64).unsqueeze(1)
    return PathGradients(
        method="exact",
        where="input",
        sites=("a",) * (len(shares) - 1),
        paths=tuple(math.comb(len(shares) - 1, k) for k in range(len(shares))),
        gradient=torch.ones(1, 1),
        measured={"dots": dots, "logs": dots.abs().log2()},
    )


@pytest.mark.parametrize(
    ("shares", "mass", "interval"),
    [
        ([0.1, 0.2, 0.4, 0.2, 0.1], 0.4, (2, 2)),
        ([0.1, 0.2, 0.4, 0.2, 0.1], 0.5, (1, 2)),
        ([0.1, 0.2, 0.4, 0.2, 0.1], 0.8, (1, 3)),
        ([0.1, 0.2, 0.4, 0.2, 0.1], 1.0, (0, 4)),
        ([0.5, 0.0, 0.0, 0.0, 0.5], 0.6, (0, 4)),
        ([0.0, 0.0, 0.0, 1.0, 0.0], 1.0, (3, 3)),
        ([1.5, -1.0, 0.5], 0.5, (0, 0)),
        ([1.5, -1.0, 0.5], 0.6, (0, 1)),
    ],
)
def test_the_interval_is_the_shortest_that_holds_the_mass(shares, mass, interval):
    assert with_shares(shares).interval(mass) == interval


def test_an_interval_counts_what_is_in_the_tail():
    paths = with_shares([0.5, 0.4], tail=0.1)
    assert paths.interval(0.9) == (0, 1)
    with pytest.raises(ValueError, match=r"must be held by the lengths kept, got 0\.95 with 0\.9 "):
        paths.interval()
    for mass in (0, -1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"interval: mass must be in \(0, 1\], got"):
            paths.interval(mass)


def test_mean_and_deviation_of_the_length_are_those_of_the_shares():
    paths = with_shares([0.25, 0.5, 0.25])
    assert paths.mean_length == pytest.approx(1)
    assert paths.std_length == pytest.approx(0.5**0.5)
    assert math.isnan(with_shares([0.9, 0.4, -0.3]).std_length)  # a variance below zero


def test_norms_are_read_whatever_their_magnitude():
    logs = torch.tensor([[0.0, 0.0], [-3000.0, -2999.0], [-math.inf, -math.inf], [0, 0]]).double()
    paths = PathGradients("exact", "input", (), (1, 2, 1), torch.ones(2), measured={"logs": logs})
    assert paths.log2_norms[1].item() == pytest.approx(-3000 + math.log2(5) / 2)
    assert paths.log2_norms[0].item() == pytest.approx(0.5)
    assert paths.log2_norms[2] == -math.inf
    assert paths.norms.tolist() == pytest.approx([2**0.5, 0, 0])


READ = {
    "exact": ("norms", "log2_norms", "shares", "tail", "tail_share", "norms_per_sample"),
    "moments": ("mean_length", "std_length"),
    "energy": ("energy", "energy_error", "tail_energy"),
    "sampled": ("mean_norm", "mean_norm_error", "count_times_mean"),
}


@pytest.mark.parametrize("method", READ)
def test_what_another_method_gives_says_so(method):
    paths = measured(method=method, draws=2)
    for other, names in READ.items():
        for name in names:
            if other in (method, "moments"):
                continue
            with pytest.raises(RuntimeError, match=f"method must be '{other}' .*got '{method}'"):
                getattr(paths, name)
    for name in READ[method]:
        getattr(paths, name)


def test_what_was_not_asked_for_says_so():
    with pytest.raises(RuntimeError, match=r"keep must be True, .*, got 'exact' or keep=False"):
        _ = measured().gradients
    for name in ("block_shares", "block_norms", "weight_norms", "weight_tails"):
        with pytest.raises(RuntimeError, match="by must be 'block' to read this, got 'length'"):
            getattr(measured(), name)


def test_single_samples_are_refused_where_batch_norm_ties_them_together():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), *switch_mlp(2)[1:]).double()
    x = torch.randn(4, 3).double()
    assert path_gradients(model.eval(), x, squares).norms_per_sample.shape == (3, 4)
    paths = path_gradients(model.train(), x, squares)
    assert paths.norms.shape == (3,)
    for name in ("norms_per_sample", "log2_norms_per_sample", "shares_per_sample"):
        with pytest.raises(RuntimeError, match="batch norm must be in eval mode to read single"):
            getattr(paths, name)


def test_instance_norm_does_not_tie_samples_together():
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten())
    model = nn.Sequential(model, *switch_mlp(2)).double()
    assert (
        path_gradients(model, torch.randn(4, 3).double(), squares).shares_per_sample.shape[1] == 4
    )


@pytest.mark.parametrize(
    "options",
    [
        {"keep": True, "by": "block", "max_length": 2},
        {"method": "moments"},
        {"method": "energy", "draws": 3},
        {"method": "sampled", "draws": 3},
    ],
)
def test_a_saved_result_is_read_back_bit_for_bit(options, tmp_path):
    paths = measured(**options)
    file = tmp_path / "paths.npz"
    paths.save(file)
    again = PathGradients.load(file)
    assert repr(again) == repr(paths)
    for name in ("method", "where", "sites", "paths", "mixes_samples"):
        assert getattr(again, name) == getattr(paths, name)
    assert torch.equal(again.gradient, paths.gradient)
    assert again.measured.keys() == paths.measured.keys()
    for name, tensor in paths.measured.items():
        assert torch.equal(again.measured[name].nan_to_num(), tensor.nan_to_num())
    with np.load(file, allow_pickle=False) as arrays:
        assert json.loads(bytes(arrays["facts.json"]))["facts"]["sites"] == list(paths.sites)


def test_products_that_are_not_exact_are_told_of(tmp_path):
    paths = dataclasses.replace(measured(), input_precision="tf32")
    assert repr(paths).endswith("\nfactors of products as tf32: not exact")
    paths.save(tmp_path / "paths.npz")
    assert PathGradients.load(tmp_path / "paths.npz").input_precision == "tf32"


def test_counts_beyond_64_bits_and_half_precision_are_saved(tmp_path):
    gradient = torch.ones(1, 2, dtype=torch.bfloat16)
    paths = PathGradients("moments", "input", (), (math.comb(300, 150),), gradient)
    paths.save(tmp_path / "paths.npz")
    again = PathGradients.load(tmp_path / "paths.npz")
    assert again.paths == (math.comb(300, 150),)
    assert again.gradient.dtype == torch.bfloat16
    assert math.isnan(again.sum_error)


def test_another_file_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"none\.npz"):
        PathGradients.load(tmp_path / "none.npz")
    for name, content in (("text", b"hello"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    np.savez(tmp_path / "object.npz", **{"facts.json": np.array([{}], dtype=object)})
    zipfile.ZipFile(tmp_path / "zip", "w").close()
    for name in ("text", "empty", "other.npz", "object.npz", "zip"):
        with pytest.raises(ValueError, match="load: path must be a file that save wrote, got"):
            PathGradients.load(tmp_path / name)


@pytest.mark.parametrize("method", READ)
def test_it_prints_tabulates_and_plots(method):
    paths = measured(method=method, draws=2)
    assert repr(paths).startswith(
        f"PathGradients by '{method}' at 'input': 6 sites, lengths 0 to 6"
    )
    frame = paths.to_frame()
    assert list(frame["length"]) == list(range(7))
    assert list(frame["paths"]) == [math.comb(6, k) for k in range(7)]
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    if method == "moments":
        with pytest.raises(RuntimeError, match="method must be 'exact' to read this"):
            paths.plot()
        return
    axes = paths.plot()
    assert paths.plot(axes) is axes
    assert axes.get_xlabel() == "path length (branches)"


def test_the_frame_has_a_column_for_each_measure():
    assert list(measured().to_frame().columns) == ["length", "paths", "norm", "log2_norm", "share"]
    frame = measured(method="sampled", draws=2).to_frame()
    assert list(frame.columns)[2:] == ["mean_norm", "mean_norm_error", "count_times_mean"]
    assert list(measured(method="energy", draws=2).to_frame().columns)[2:] == [
        "energy",
        "energy_error",
    ]


def test_a_plot_without_its_95_percent_says_nothing_of_it():
    pytest.importorskip("matplotlib").use("Agg")
    assert with_shares([0.5, 0.3], tail=0.2).plot().get_legend() is None


def test_results_are_on_the_cpu_whatever_the_default_device():
    paths: PathGradients = measured(by="block")
    tensors: list[Tensor] = list(paths.measured.values())
    with torch.device("meta"):
        assert paths.interval() == measured_interval(paths)
        assert paths.mean_length > 0
    assert all(t.device.type == "cpu" for t in tensors)


def measured_interval(paths: PathGradients) -> tuple[int, int]:
    weights = paths.shares.abs()
    spans = [
        (last - first, first, last)
        for first in range(7)
        for last in range(first, 7)
        if weights[first : last + 1].sum() >= 0.95 * weights.sum()
    ]
    return min(spans)[1:]
