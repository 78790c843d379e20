"""The weights of path lengths are those of Littwin & Wolf, at any depth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastres.analysis.ensemble import log_binomials, shares
from fastres.analysis.path_scales import (
    beta_of,
    betas_of,
    critical_points,
    heaviest,
    log_epsilon,
    log_legendre,
    mass,
    most_critical_points,
)


@pytest.mark.parametrize(("beta", "length"), [(0.1, 10), (0.5, 34), (2, 67)])
def test_the_heaviest_paths_are_those_of_the_figure(beta, length):
    assert heaviest(beta, 100) == (length,)
    assert log_epsilon(beta, 100).argmax() + 1 == length


def test_a_tie_is_both_lengths_and_the_ends_are_reached():
    assert heaviest(1, 100) == (50, 51)
    weights = log_epsilon(1, 100)
    assert weights[49] == weights[50] == weights.max()
    assert heaviest(1e-9, 100) == (1,)
    assert heaviest(1e9, 100) == (100,)
    assert heaviest(3, 1) == (1,)


@pytest.mark.parametrize("layers", [1, 7, 100])
def test_every_length_is_the_heaviest_for_some_scale(layers):
    for length in range(1, layers + 1):
        low, high = betas_of(length, layers)
        inside = low + 1 if math.isinf(high) else (low + high) / 2
        assert heaviest(inside, layers) == (length,)
        assert log_epsilon(inside, layers).argmax() + 1 == length


@pytest.mark.parametrize("layers", [10, 100, 3000])
@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0, 10.0])
def test_scaled_to_a_sum_of_1_lengths_are_1_plus_a_binomial(beta, layers):
    weights = log_epsilon(beta, layers)
    share = beta / (1 + beta)
    count, r = layers - 1, np.arange(layers)
    law = np.exp(log_binomials(count) + r * math.log(share) + (count - r) * math.log1p(-share))
    assert shares(weights) == pytest.approx(law, rel=1e-8, abs=1e-300)
    assert np.exp(2 * weights).sum() == pytest.approx(1, rel=1e-12)
    assert ((r + 1) * shares(weights)).sum() == pytest.approx(1 + count * share)


@pytest.mark.parametrize(
    ("beta", "mean", "deviation"),
    [(0.1, 9.79, 2.03), (0.5, 33.92, 3.33), (2, 67.08, 3.33), (1, 50.5, None)],
)
def test_squares_have_a_narrower_law(beta, mean, deviation):
    square, r = np.exp(2 * log_epsilon(beta, 100)), np.arange(1, 101)
    assert (square * r).sum() == pytest.approx(mean, abs=0.005)
    if deviation is not None:
        variance = (square * r**2).sum() - (square * r).sum() ** 2
        assert variance**0.5 == pytest.approx(deviation, abs=0.005)


@pytest.mark.parametrize(("layers", "want"), [(50, 0.715), (200, 0.964), (1000, 0.999998)])
def test_the_mass_gathers_around_its_limit(layers, want):
    low, high = math.ceil(layers * (1 / 3 - 0.05)), math.floor(layers * (1 / 3 + 0.05))
    assert mass(0.5, layers, low, high) == pytest.approx(want, abs=6e-4 if layers < 999 else 6e-7)
    assert mass(0.5, layers, 1, layers) == pytest.approx(1)


@pytest.mark.parametrize("degree", [0, 1, 2, 9, 60, 2000])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_sum_of_squared_binomials_is_a_legendre_polynomial(degree, beta):
    terms = 2 * (log_binomials(degree) + np.arange(degree + 1) * math.log(beta))
    left = terms.max() + math.log(np.exp(terms - terms.max()).sum())
    square = beta * beta
    right = degree * math.log1p(-square) + log_legendre(degree, (1 + square) / (1 - square))
    assert left == pytest.approx(right, rel=1e-12, abs=1e-12)
    if degree < 61:
        series = np.polynomial.legendre.Legendre.basis(degree)
        assert log_legendre(degree, 1.2) == pytest.approx(math.log(series(1.2)), rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "theta"),
    [
        *((0.05, 0.133), (0.1, 0.306), (0.2, 0.521), (0.5, 0.810), (1, 0.993)),
        *((2, 1.126), (5, 1.232), (10, 1.273), (50, 1.309)),
    ],
)
def test_critical_points_are_those_of_the_table_and_below_the_bound(beta, theta):
    found = critical_points(log_epsilon(beta, 100))
    assert round(found, 3) == theta
    assert found < most_critical_points(100)


def test_the_longest_paths_alone_have_the_most_critical_points():
    assert round(most_critical_points(100), 4) == 1.3176
    assert round(most_critical_points(3), 5) == 0.01324
    assert most_critical_points(2) == 0
    alone = np.full(100, -np.inf)
    alone[-1] = 3.0
    assert critical_points(alone) == pytest.approx(most_critical_points(100))
    assert most_critical_points(100) == pytest.approx(0.5 * math.log(99) - (1 - 2 / 100))
    random = np.random.default_rng(0)
    for _ in range(50):
        assert critical_points(random.normal(size=20) * 5) <= most_critical_points(20)


def test_beta_is_the_openness_at_the_usual_initialisation():
    width = 64  # C = 1 / sqrt(n), Lambda = n
    assert beta_of(1 / math.sqrt(width), width, width, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_epsilon(0.0, 5), "beta must be above 0 and finite, got 0.0"),
        (lambda: log_epsilon(math.nan, 5), "beta must be above 0 and finite, got nan"),
        (lambda: heaviest(-1, 5), "beta must be above 0 and finite, got -1"),
        (lambda: heaviest(1, 0), "layers must be >= 1, got 0"),
        (lambda: betas_of(6, 5), "length must be 1 to 5, the layers, got 6"),
        (lambda: mass(1, 5, 0, 3), "1 <= low <= high <= 5, the layers, got 0 and 3"),
        (lambda: critical_points([0.0]), "log_weights must have weight at length 2 or more"),
        (lambda: most_critical_points(1), "layers must be >= 2, got 1"),
        (lambda: log_legendre(3, 0.5), "must be of degree >= 0 at x >= 1, got 3 at 0.5"),
        (lambda: beta_of(1.0, 4, 4, 1.5), "openness must be above 0 and at most 1, got 1.5"),
        (lambda: beta_of(1.0, 0, 4, 0.5), "weights must be above 0 and finite, got 0"),
    ],
)
def test_wrong_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
