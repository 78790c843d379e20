"""Paths are counted exactly and drawn evenly, also where blocks lie in the branches of others."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from fastres.paths.counts import PathSampler, choices, path_counts


@pytest.mark.parametrize("blocks", [0, 1, 7, 54, 300])
def test_blocks_in_a_row_have_binomial_counts(blocks):
    counts = path_counts(choices([0] * blocks, range(blocks)))
    assert counts == [math.comb(blocks, k) for k in range(blocks + 1)]


def test_54_blocks_have_the_figures_of_the_paper():
    counts = path_counts(choices([0] * 54, range(54)))
    assert sum(counts) == 2**54
    assert sum(counts[5:18]) / 2**54 == pytest.approx(0.0045367, rel=1e-4)
    assert sum(counts[19:36]) / 2**54 == pytest.approx(0.98017, rel=1e-4)


@pytest.mark.parametrize(
    ("levels", "counted", "start", "counts"),
    [
        ([1, 1, 0], range(3), None, [1, 1, 2, 1]),  # 1 + t (1 + t)^2
        ([2, 1, 0], range(3), None, [1, 1, 1, 1]),
        ([1, 0, 0], range(3), None, [1, 2, 2, 1]),
        ([1, 0, 1, 0], range(4), None, [1, 2, 3, 2, 1]),  # (1 + t + t^2)^2
        ([0, 0, 0], [2], None, [1, 1]),
        ([1, 0], [0], None, [1, 1]),  # the outer block counts as none
        ([1, 0], [1], None, [1, 1]),
        ([1, 1, 0], range(3), 0, [0, 1, 2, 1]),  # they begin in the branch of the outer block
        ([1, 1, 0], [1, 2], 1, [0, 1, 1]),
        ([0, 0, 0], [1, 2], 1, [1, 2, 1]),
    ],
)
def test_nested_blocks_are_counted_through_their_branch_only(levels, counted, start, counts):
    assert path_counts(choices(levels, counted, start)) == counts


@pytest.mark.parametrize("levels", [[0] * 5, [1, 1, 0, 0], [1, 0, 1, 0]])
def test_every_path_of_a_length_is_as_likely(levels):
    series = choices(levels, range(len(levels)))
    counts, draws = path_counts(series), 3000
    sampler = PathSampler(series, seed=0)
    for length, count in enumerate(counts):
        seen = Counter(frozenset(sampler.draw(length)) for _ in range(draws))
        assert len(seen) == count
        assert {len(path) for path in seen} == {length}
        deviation = (draws / count * (1 - 1 / count)) ** 0.5
        assert all(abs(n - draws / count) <= 4 * deviation for n in seen.values())
