"""Claims about fastres.analysis.depth: the fit is exact where the law is, and knows its error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastres.analysis import (
    local_exponents,
    power_law,
    reaching_depth,
    reciprocal_law,
    seed_law,
)

DEPTHS = [6, 12, 30, 60, 120, 300]


def scaled_perturbation(blocks: int, c: float) -> float:
    """Mean of ||f|| / ||x|| over the blocks of a stream with f = c x / L."""
    x, seen = np.ones(16), []
    for _ in range(blocks):
        f = c * x / blocks
        seen.append(np.linalg.norm(f) / np.linalg.norm(x))
        x = x + f
    return float(np.mean(seen))


def test_the_exponent_is_minus_1_where_every_branch_is_c_x_over_l():
    law = power_law(DEPTHS, [scaled_perturbation(n, 0.7) for n in DEPTHS])
    assert law.exponent == pytest.approx(-1, abs=1e-12)
    assert law.constant == pytest.approx(0.7, rel=1e-12)
    assert law.exponent_error < 1e-12


@given(st.floats(-3, 3), st.floats(1e-6, 1e6))
def test_any_exact_power_law_is_recovered(exponent, constant):
    law = power_law(DEPTHS, [constant * n**exponent for n in DEPTHS])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.constant == pytest.approx(constant, rel=1e-8)
    assert law.at([40.0])[0] == pytest.approx(constant * 40**exponent, rel=1e-8)


def test_the_standard_error_covers_the_truth_as_often_as_it_should():
    random, inside = np.random.default_rng(0), 0
    depths = np.geomspace(6, 300, 30)
    for _ in range(400):
        law = power_law(depths, depths**-0.8 * np.exp(random.normal(0, 0.2, 30)))
        inside += abs(law.exponent + 0.8) < 2.05 * law.exponent_error  # t(28) at 95 %
    assert 0.92 < inside / 400 < 0.98


def test_two_points_fit_exactly_and_state_no_error():
    law = power_law([10, 100], [1.0, 0.1])
    assert law.exponent == pytest.approx(-1)
    assert math.isnan(law.exponent_error)
    assert str(law) == "10 · blocks^-1.00"


def test_the_reciprocal_law_has_spread_1_where_it_is_exact():
    exact = reciprocal_law(DEPTHS, [3 / n for n in DEPTHS])
    assert exact.constant == pytest.approx(3)
    assert exact.spread == pytest.approx(1)
    assert reciprocal_law([1, 100], [1.0, 0.1]).spread == pytest.approx(10)  # a root law


@pytest.mark.parametrize(
    ("blocks", "values", "message"),
    [
        ([6, 6], [1, 2], "blocks must have two different values, got .6.0, 6.0."),
        ([6, 12], [1, 0], "values must be positive, got .1.0, 0.0."),
        ([6, 12], [1, math.nan], "values must be positive, got .1.0, nan."),
        ([0, 12], [1, 1], "blocks must be positive"),
        ([6, 12, 30], [1, 1], "values must be 3 numbers, got 2"),
        ([], [], "blocks must be a list of numbers"),
        (6, 1.0, "blocks must be a list of numbers, got 6.0"),
    ],
)
def test_points_that_no_line_goes_through_are_refused(blocks, values, message):
    with pytest.raises(ValueError, match=f"power_law: {message}"):
        power_law(blocks, values)


def test_the_interval_over_seeds_covers_the_truth_as_often_as_it_should():
    random, inside = np.random.default_rng(0), 0
    for _ in range(400):
        slopes = random.normal(-0.8, 0.1, 4)  # each seed has an exponent of its own
        values = np.asarray(DEPTHS)[None] ** slopes[:, None]
        law = seed_law(DEPTHS, values)
        assert law.exponents == pytest.approx(slopes)
        inside += law.low < -0.8 < law.high
    assert 0.92 < inside / 400 < 0.98
    assert math.isnan(seed_law(DEPTHS, values[:1]).low)


def test_local_exponents_show_a_crossover():
    values = [n**-0.5 if n <= 60 else 60**0.5 / n for n in DEPTHS]
    between, exponents = local_exponents(DEPTHS[::-1], values[::-1])
    assert exponents == pytest.approx([-0.5, -0.5, -0.5, -1, -1])
    assert between[0] == pytest.approx(math.sqrt(72))


@given(st.floats(-3, -0.1), st.floats(1e-3, 1e3), st.floats(1, 1e4))
def test_the_depth_of_an_exact_law_is_found(exponent, constant, depth):
    values = [constant * n**exponent for n in DEPTHS]
    found = reaching_depth(DEPTHS, values, constant * depth**exponent)
    assert found.blocks == pytest.approx(depth, rel=1e-6)
    assert found.low == pytest.approx(depth, rel=1e-5)
    assert found.high == pytest.approx(depth, rel=1e-5)


def test_the_interval_of_the_depth_covers_the_truth_as_often_as_it_should():
    random, inside = np.random.default_rng(0), 0
    depths = np.geomspace(6, 60, 4)
    for _ in range(400):  # far beyond the points, where the uncertainty of the slope counts
        values = depths**-0.8 * np.exp(random.normal(0, 0.03, 4))
        found = reaching_depth(depths, values, 600**-0.8)
        inside += found.low < 600 < found.high
    assert 0.92 < inside / 400 < 0.98


def test_a_depth_that_points_do_not_determine_has_no_bounds():
    assert reaching_depth([6, 60], [1, 2], 0.5).blocks == math.inf  # the law rises
    noisy = reaching_depth([6, 60, 7], [1, 0.9, 0.5], 0.01)
    assert (noisy.low, noisy.high) == (0, math.inf)
    assert math.isnan(reaching_depth([6, 60], [1, 0.1], 0.01).low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seed_law(DEPTHS, DEPTHS), r"seed_law: values must be .seeds, depths."),
        (
            lambda: seed_law([6, 7], [[1, 2]] * 2, level=1),
            "seed_law: level must be between 0 and 1",
        ),
        (lambda: local_exponents([6, 6], [1, 2]), "local_exponents: blocks must all differ"),
        (
            lambda: reaching_depth([6, 7], [1, 2], 0),
            "reaching_depth: target must be positive, got 0",
        ),
    ],
)
def test_bad_input_of_intervals_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
