"""path_scales: the weight of each path length, by the scale of the weights (Littwin & Wolf 2016).

Their network (arXiv 1611.02525) has p layers of n ReLU units and a skip over every layer but the
first, so that a path goes through r = 1 to p layers. With rho the probability that a ReLU is open,
C^2 the mean square of the weights and Lambda their number, the paths of length r weigh

    epsilon_r = binom(p - 1, r - 1) beta^r / z        beta = rho n C / sqrt(Lambda)

with z such that the squares add up to 1. All is in logarithms: binomials overflow at p = 1000.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastres.analysis.ensemble import log_binomials


def log_epsilon(beta: float, layers: int) -> NDArray[np.float64]:
    """Compute log epsilon_r for r = 1 to p, [p]; the squares of epsilon add up to 1.

    Scaled to a sum of 1 instead, epsilon_r is the law of 1 + Binomial(p - 1, beta / (1 + beta)):
    beta = 1 is that of Veit et al.

    Args:
        beta: The scale, above 0.
        layers: p, at least 1.

    Raises:
        ValueError: If beta is not above 0 and finite, or layers is below 1.
    """
    _check("log_epsilon", beta, layers)
    weights = log_binomials(layers - 1) + np.arange(1, layers + 1) * math.log(beta)
    top = weights.max()
    norm = top + 0.5 * math.log(float(np.exp(2 * (weights - top)).sum()))
    found: NDArray[np.float64] = weights - norm
    return found


def heaviest(beta: float, layers: int) -> tuple[int, ...]:
    """Find the length of the largest epsilon_r; two lengths where they tie, exactly.

    By epsilon_{r+1} / epsilon_r = beta (p - r) / r, in rational numbers. Theorem 1: for p to
    infinity it is p beta / (1 + beta).

    Raises:
        ValueError: If beta is not above 0 and finite, or layers is below 1.

    Example:
        >>> [heaviest(beta, 100) for beta in (0.1, 0.5, 2, 1)]
        [(10,), (34,), (67,), (50, 51)]
    """
    _check("heaviest", beta, layers)
    exact = Fraction(beta)
    place = exact * layers / (1 + exact)
    first = min(layers, math.floor(place) + 1)
    return (first - 1, first) if place == first - 1 and first > 1 else (first,)


def betas_of(length: int, layers: int) -> tuple[float, float]:
    """Find for which beta paths of one length are the heaviest, from and to (Lemma 4).

    Args:
        length: r, 1 to p.
        layers: p.

    Returns:
        (r - 1) / (p - r + 1) and r / (p - r), which is infinite for r = p.

    Raises:
        ValueError: If layers is below 1, or length is not 1 to layers.
    """
    _check("betas_of", 1.0, layers)
    if not 1 <= length <= layers:
        raise ValueError(f"betas_of: length must be 1 to {layers}, the layers, got {length}")
    high = math.inf if length == layers else length / (layers - length)
    return (length - 1) / (layers - length + 1), high


def beta_of(scale: float, weights: int, width: int, openness: float) -> float:
    """Compute beta = rho n C / sqrt(Lambda).

    Args:
        scale: C, root mean square of the weights, above 0.
        weights: Lambda, how many different weights there are.
        width: n, units of a layer.
        openness: rho, the probability that a ReLU is open, above 0, at most 1.

    Raises:
        ValueError: If an argument is out of its range.
    """
    for name, value in (("scale", scale), ("weights", weights), ("width", width)):
        if not 0 < value < math.inf:
            raise ValueError(f"beta_of: {name} must be above 0 and finite, got {value}")
    if not 0 < openness <= 1:
        raise ValueError(f"beta_of: openness must be above 0 and at most 1, got {openness}")
    return openness * width * scale / math.sqrt(weights)


def mass(beta: float, layers: int, low: int, high: int) -> float:
    """Sum epsilon_r^2 over the lengths low to high, both included (Theorem 2).

    Raises:
        ValueError: If beta or layers is out of range, or not 1 <= low <= high <= layers.
    """
    squares = np.exp(2 * log_epsilon(beta, layers))
    if not 1 <= low <= high <= layers:
        raise ValueError(
            f"mass: low and high must be 1 <= low <= high <= {layers}, the layers, "
            f"got {low} and {high}"
        )
    return float(squares[low - 1 : high].sum())


def log_legendre(degree: int, x: float) -> float:
    """Compute the logarithm of the Legendre polynomial P_n(x) at x >= 1, where it is at least 1.

    The proof of Theorem 2 rests on sum_r binom(n, r)^2 b^(2r) = (1 - b^2)^n P_n((1+b^2)/(1-b^2)).
    By the recurrence (k + 1) P_{k+1} = (2k + 1) x P_k - k P_{k-1}, for the quotient of neighbours.

    Raises:
        ValueError: If degree is negative or x is below 1.
    """
    if degree < 0 or not 1 <= x < math.inf:
        raise ValueError(f"log_legendre: must be of degree >= 0 at x >= 1, got {degree} at {x}")
    found, quotient = 0.0, math.inf  # of P_k and P_{k-1}
    for k in range(degree):
        quotient = ((2 * k + 1) * x - k / quotient) / (k + 1)
        found += math.log(quotient)
    return found


def critical_points(log_weights: ArrayLike) -> float:
    """Compute theta, the growth of the number of critical points of each low index, per weight.

    For the mixed spherical spin glass with these weights (Auffinger, Ben Arous 2013; section 5 of
    the paper): with v' = sum epsilon_r^2 r and v'' = sum epsilon_r^2 r (r - 1) over r >= 2,

        theta = log(v'' / v') / 2 - (v'' - v') / (v'' + v')

    Paths of length 1 are left out, and the others scaled to squares that add up to 1. Theorem 5:
    it is largest where all weight is on the longest paths, `most_critical_points`.

    Args:
        log_weights: log epsilon_r for r = 1 to p, [p], as `log_epsilon` gives them.

    Raises:
        ValueError: If no path of two layers or more has weight.
    """
    given = np.asarray(log_weights, np.float64)
    if given.ndim != 1 or not np.isfinite(given[1:].max(initial=-np.inf)):
        raise ValueError(
            "critical_points: log_weights must have weight at length 2 or more, "
            f"got {given.size} lengths"
        )
    square = np.exp(2 * (given[1:] - given[1:].max()))
    length = np.arange(2, given.size + 1)
    return _theta(float((square * length * (length - 1)).sum() / (square * length).sum()))


def most_critical_points(layers: int) -> float:
    """Compute the largest theta of any weights on lengths 2 to p: log(p - 1) / 2 - (1 - 2 / p).

    Raises:
        ValueError: If layers is below 2.
    """
    if layers < 2:
        raise ValueError(f"most_critical_points: layers must be >= 2, got {layers}")
    return _theta(float(layers - 1))


def _theta(x: float) -> float:
    """With x = v'' / v'; it grows with x."""
    return 0.5 * math.log(x) - (x - 1) / (x + 1)


def _check(where: str, beta: float, layers: int) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"{where}: beta must be above 0 and finite, got {beta}")
    if layers < 1:
        raise ValueError(f"{where}: layers must be >= 1, got {layers}")
