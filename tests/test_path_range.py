"""Norms by path length hold hundreds of orders of magnitude, tails too."""

from __future__ import annotations

import math

import pytest
import torch
from path_models import (
    Scale,
    vectors,
)
from torch import Tensor, nn

from fastres.paths import path_gradients


@pytest.mark.parametrize("chunk", [None, 1, 7, 400])
@pytest.mark.parametrize("c", [0.01, 1e-4])
def test_300_blocks_span_1200_orders_of_magnitude_in_float32(c, chunk):
    model = nn.Sequential(*[Scale(c) for _ in range(300)]).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, chunk=chunk)
    stored = torch.tensor(c).item()  # what float32 makes of c
    known = [math.log2(math.comb(300, k)) + k * math.log2(stored) for k in range(301)]
    known = torch.tensor(known, dtype=torch.float64) + math.log2(6) / 2
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)
    assert paths.log2_norms[-1] < -1900
    assert paths.sum_error < 1e-5


@pytest.mark.parametrize("chunk", [1, 3])
def test_one_branch_may_shrink_by_all_that_float32_holds(chunk):
    c = 2.0**-120
    model = nn.Sequential(*[Scale(c) for _ in range(9)]).float()
    paths = path_gradients(model, torch.full((2, 3), 2.0**-20), torch.sum, chunk=chunk)
    known = [math.log2(math.comb(9, k)) - 120 * k + math.log2(6) / 2 for k in range(10)]
    known = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)


class NestedScale(nn.Module):
    """x + z + c z with z = c x: a site in the branch of another."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c, self.inner = nn.Parameter(torch.tensor(c, dtype=torch.float64)), Scale(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.c * x)


@pytest.mark.parametrize("chunk", [1, 5, 300])
def test_nested_blocks_keep_their_range_too(chunk):
    c, blocks = 2.0**-13, 60
    model = nn.Sequential(*[NestedScale(c) for _ in range(blocks)]).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, chunk=chunk)
    assert sum(paths.paths) == 3**blocks  # (1 + t + t^2)^60
    known = [math.log2(n) - 13 * k + math.log2(6) / 2 for k, n in enumerate(paths.paths)]
    known = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)


class ParallelScale(nn.Module):
    """x + z + c z with z = c x, as the mean of two sites side by side."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))
        self.one, self.two = Scale(c), Scale(c)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(self.c * x), self.two(self.c * x)])
        return x + both.mean(0)


@pytest.mark.parametrize("chunk", [1, 2, 30])
def test_sites_side_by_side_are_both_counted(chunk):
    c, blocks = 0.25, 6
    model = nn.Sequential(*[ParallelScale(c) for _ in range(blocks)])
    paths = path_gradients(model, vectors(), torch.sum, chunk=chunk)
    assert len(paths.sites) == 18
    powers = [1]  # (1 + t + t^2)^6
    for _ in range(blocks):
        powers = [sum(powers[max(0, k - 2) : k + 1]) for k in range(len(powers) + 2)]
    known = [n * c**k * 3 for k, n in enumerate(powers)]
    assert paths.norms[:13].tolist() == pytest.approx(known, rel=1e-12)
    assert not paths.norms[13:].any()


def test_a_tail_far_below_1_is_held_exactly():
    model = nn.Sequential(*[Scale(0.01) for _ in range(300)]).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, 40)
    known = sum(math.comb(300, k) * 0.01**k for k in range(41, 301))
    assert paths.tail_norm == pytest.approx(known * 6**0.5, rel=1e-4)
    assert paths.tail[0, 0].item() == pytest.approx(known, rel=1e-4)


def test_norms_beyond_float32_are_right_and_that_they_cancel_is_said():
    model = nn.Sequential(*[Scale(-2.0) for _ in range(300)]).float()
    with pytest.warns(UserWarning, match=r"the lengths cancel, .* 1\.4e\+143 times"):
        paths = path_gradients(model, torch.ones(2, 3), torch.sum)
    known = [math.log2(math.comb(300, k)) + k + math.log2(6) / 2 for k in range(301)]
    known = torch.tensor(known, dtype=torch.float64)
    torch.testing.assert_close(paths.log2_norms, known, rtol=0, atol=1e-4)
