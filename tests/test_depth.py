"""Claims about fastres.analysis.depth: the fit is exact where the law is, and knows its error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastres.analysis import power_law, reciprocal_law

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
