"""Moments, energy and sampled paths are those of the exact lengths; chunks change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from path_models import (
    by_length,
    enumerate_paths,
    is_once,
    nested,
    squares,
    switch_mlp,
    vectors,
)

from fastres.paths import path_gradients

# Less than all lengths, and more than one pass.


@pytest.mark.parametrize("longest", [0, 1, 4, 9, 10])
def test_what_is_longer_is_in_the_tail_exactly(longest):
    model, x = switch_mlp(10), vectors()
    whole = path_gradients(model, x, squares, keep=True)
    paths = path_gradients(model, x, squares, longest, keep=True)
    torch.testing.assert_close(paths.gradients, whole.gradients[: longest + 1])
    rest = whole.gradients[longest + 1 :].sum(0)
    torch.testing.assert_close(paths.tail, rest, rtol=1e-10, atol=1e-16)
    assert paths.tail_norm == pytest.approx(rest.norm().item(), rel=1e-10)
    assert paths.tail_share == pytest.approx(whole.shares[longest + 1 :].sum().item(), abs=1e-12)
    assert (paths.max_length, len(paths.paths), len(paths.norms)) == (longest, *2 * [longest + 1])
    assert paths.sum_error < 1e-12


@pytest.mark.parametrize("longest", [None, 3])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 11, 100])
def test_no_result_depends_on_the_chunks(chunk, longest):
    model, x = switch_mlp(10), vectors()
    one = path_gradients(model, x, squares, longest, chunk=100, keep=True)
    other = path_gradients(model, x, squares, longest, chunk=chunk, keep=True)
    torch.testing.assert_close(other.gradients, one.gradients, rtol=1e-13, atol=1e-17)
    torch.testing.assert_close(other.tail, one.tail, rtol=1e-13, atol=1e-17)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("gain", [0.3, 1.0, 3.0])
def test_the_moments_are_those_of_the_exact_shares(gain, chunk):
    model, x = switch_mlp(10, gain=gain), vectors()
    exact = path_gradients(model, x, squares)
    moments = path_gradients(model, x, squares, method="moments", chunk=chunk)
    length = torch.arange(11).double()
    mean = (length * exact.shares).sum().item()
    variance = ((length - mean).square() * exact.shares).sum().item()
    assert moments.mean_length == pytest.approx(mean, rel=1e-8)
    assert exact.mean_length == pytest.approx(mean, rel=1e-8)
    for paths in (exact, moments):
        if variance >= 0:
            assert paths.std_length == pytest.approx(variance**0.5, rel=1e-8)
        else:
            assert math.isnan(paths.std_length)


# Single paths.


def test_the_energy_is_that_of_all_paths_within_three_standard_errors():
    model, x = switch_mlp(10), vectors()
    _, energy, _ = by_length(model, x)
    paths = path_gradients(model, x, squares, method="energy", draws=200)
    off = (paths.energy - energy).abs()
    assert (off <= 3 * paths.energy_error + 1e-12 * energy).all()
    assert (paths.energy_error[1:-1] < 0.3 * energy[1:-1]).all()
    assert paths.energy[0].item() == pytest.approx(energy[0].item(), rel=1e-12)
    assert paths.energy[10].item() == pytest.approx(energy[10].item(), rel=1e-12)


def test_the_energy_beyond_the_longest_length_is_that_of_the_tail():
    model, x = switch_mlp(8), vectors()
    _, energy, _ = by_length(model, x)
    paths = path_gradients(model, x, squares, 1, method="energy", draws=400)
    assert paths.tail_energy == pytest.approx(energy[2:].sum().item(), rel=0.2)
    torch.testing.assert_close(paths.energy, energy[:2], rtol=0.2, atol=0)


def test_sampled_paths_have_the_mean_norm_of_all():
    model, x = switch_mlp(8), vectors()
    _, _, norms = by_length(model, x)
    counts = torch.tensor([math.comb(8, k) for k in range(9)]).double()
    paths = path_gradients(model, x, squares, method="sampled", draws=100)
    off = (paths.mean_norm - norms / counts).abs()
    assert (off <= 3.5 * paths.mean_norm_error + 1e-12).all()
    torch.testing.assert_close(paths.count_times_mean, paths.mean_norm * counts)
    assert paths.mean_norm_error[0] < 1e-15
    assert (paths.mean_norm_error[1:-1] > 0).all()


def test_nested_paths_are_sampled_evenly():
    model = nested()
    norms, counts = torch.zeros(2, 6, dtype=torch.float64)
    for path, (g,) in enumerate_paths(model, vectors(), allowed=is_once):
        norms[sum(path)] += g.norm()
        counts[sum(path)] += 1
    paths = path_gradients(model, vectors(), squares, method="sampled", draws=300)
    off = (paths.mean_norm - norms / counts).abs()
    assert (off <= 3.5 * paths.mean_norm_error + 1e-12).all()


def test_count_times_mean_is_not_the_norm_of_the_sum():
    paths = [
        path_gradients(switch_mlp(10), vectors(), squares, method=method)
        for method in ("exact", "sampled")
    ]
    assert paths[1].count_times_mean[5] > 3 * paths[0].norms[5]


@pytest.mark.parametrize("method", ["energy", "sampled"])
def test_the_seed_decides_what_is_drawn(method):
    model, x = switch_mlp(6), vectors()
    state = torch.random.get_rng_state()
    draws = [
        path_gradients(model, x, squares, method=method, draws=5, seed=seed).weights
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.random.get_rng_state())
