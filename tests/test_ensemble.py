"""Path statistics are those of Veit et al., and what enumeration and integers say."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from fastres.analysis.ensemble import (
    log_binomials,
    log_path_weights,
    share_of_lengths,
    shares,
    surviving,
)


def test_shares_of_lengths_are_those_that_the_paper_says():
    assert share_of_lengths(54, 5, 17) == pytest.approx(0.0045367, abs=5e-8)
    assert share_of_lengths(54, 19, 35) == pytest.approx(0.98017, abs=5e-6)  # "more than 95 %"
    assert share_of_lengths(54, 20, 34) == pytest.approx(0.9598, abs=5e-5)
    assert share_of_lengths(23, 5, 17) == pytest.approx(0.99339, abs=5e-6)  # effective paths
    assert share_of_lengths(5000, 0, 5000) == 1.0
    assert share_of_lengths(0, 0, 0) == 1.0


@pytest.mark.parametrize(
    ("deleted", "length", "share"),
    [
        *((1, 5, 0.907), (1, 11, 0.796), (1, 17, 0.685), (1, 27, 0.5)),
        *((10, 5, 0.343), (10, 11, 0.080), (10, 17, 0.0146), (10, 27, 0.0004)),
        *((20, 5, 0.088), (20, 11, 0.003), (20, 17, 0.0), (20, 40, 0.0)),
    ],
)
def test_surviving_paths_are_those_of_the_table(deleted, length, share):
    digits = 4 if share in (0.0146, 0.0004) else 3
    assert round(surviving(54, deleted, length), digits) == share


def test_surviving_paths_are_those_that_are_left_when_all_are_counted():
    for deleted, length in itertools.product(range(7), range(7)):
        every = list(itertools.combinations(range(6), length))
        left = [path for path in every if not set(path) & set(range(deleted))]
        assert surviving(6, deleted, length) == pytest.approx(len(left) / len(every))


def test_deleting_all_blocks_leaves_the_path_of_length_0():
    weights = log_path_weights(np.zeros(9))
    assert weights[0] == 0
    assert (weights[1:] == -np.inf).all()
    assert shares(weights).tolist() == [1.0] + [0.0] * 9
    assert [surviving(54, 54, k) for k in (0, 1, 54)] == [1.0, 0.0, 0.0]


def test_path_weights_are_those_of_all_paths_one_by_one():
    gains = np.random.default_rng(0).lognormal(size=8)
    gains[3] = 0.0
    want = [sum(math.prod(path) for path in itertools.combinations(gains, k)) for k in range(9)]
    assert np.exp(log_path_weights(gains)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("gain", [1.0, 0.5, 1e-3, 40.0])
def test_equal_gains_give_the_binomial_law_at_thousands_of_blocks(gain):
    start = time.perf_counter()
    weights = log_path_weights([gain] * 4000)
    want = log_binomials(4000) + np.arange(4001) * math.log(gain)
    assert np.abs(weights - want).max() < 1e-9
    mean = (np.arange(4001) * shares(weights)).sum()
    assert mean == pytest.approx(4000 * gain / (1 + gain), rel=1e-9)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("n", [0, 1, 2, 7, 54, 301])
def test_log_binomials_are_those_of_the_integers(n):
    assert log_binomials(n).tolist() == [math.log(math.comb(n, k)) for k in range(n + 1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: share_of_lengths(5, 2, 6), r"0 <= low <= high <= 5, the blocks, got 2 and 6"),
        (lambda: share_of_lengths(5, 3, 2), r"got 3 and 2"),
        (lambda: share_of_lengths(-1, 0, 0), r"blocks must be >= 0, got -1"),
        (lambda: surviving(5, 6, 2), r"deleted must be 0 to 5, the blocks, got 6"),
        (lambda: surviving(5, 2, 6), r"length must be 0 to 5, the blocks, got 6"),
        (lambda: log_path_weights([1.0, -1.0]), r"gains must be finite and >= 0, got -1.0"),
        (lambda: log_path_weights([math.nan]), r"gains must be finite and >= 0, got nan"),
        (lambda: log_path_weights(1.0), r"gains must be a list, got shape \[\]"),
        (lambda: shares([-math.inf]), r"log_weights must have a finite largest value"),
        (lambda: log_binomials(-1), r"n must be >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
