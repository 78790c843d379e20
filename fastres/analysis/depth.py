"""depth: how a measured value depends on the number of blocks, value = constant * blocks^exponent.

Hauser 2019 (arXiv 1902.04106) reports that the mean scaled perturbation of trained networks of 6
to 300 blocks is roughly c / L. That is the exponent -1; `power_law` measures the exponent instead
of presuming it, `reciprocal_law` gives c and how far it is from being one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class PowerLaw(NamedTuple):
    """value = constant * blocks^exponent, fitted on logarithms."""

    exponent: float
    constant: float
    exponent_error: float  # standard error; NaN for two points, which fit exactly

    def at(self, blocks: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Evaluate the law: [len(blocks)]."""
        return self.constant * np.asarray(blocks, np.float64) ** self.exponent

    def __str__(self) -> str:
        """Write the law as a formula."""
        error = "" if math.isnan(self.exponent_error) else f" (± {self.exponent_error:.2f})"
        return f"{self.constant:.3g} · blocks^{self.exponent:.2f}{error}"


class ReciprocalLaw(NamedTuple):
    """value = constant / blocks."""

    constant: float  # mean of blocks * value
    spread: float  # largest over smallest blocks * value; 1 where the law is exact


class SeedLaw(NamedTuple):
    """The exponent of each of several runs, and an interval for their mean."""

    exponents: NDArray[np.float64]  # [seeds]
    exponent: float  # their mean
    low: float  # of Student's interval over the seeds; nan for one seed
    high: float


class Reaching(NamedTuple):
    """The depth at which a fitted law reaches a value, with its interval, as real numbers."""

    blocks: float  # inf where the law does not fall
    low: float  # nan where the points leave no freedom: two of them, which fit exactly
    high: float  # inf where the points do not even tell that the law falls

    def __str__(self) -> str:
        """Write depth and interval."""
        bounds = "" if math.isnan(self.low) else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.blocks:.4g} blocks{bounds}"


def power_law(blocks: ArrayLike, values: ArrayLike) -> PowerLaw:
    """Fit values = constant * blocks^exponent by least squares of log(values) on log(blocks).

    Args:
        blocks: Numbers of blocks, [n], positive, at least two of them different.
        values: Measured at each, [n], positive.

    Returns:
        The law with the standard error of its exponent.

    Raises:
        ValueError: If there is nothing to fit a line through.

    Example:
        >>> law = power_law([6, 60, 300], [0.5 / 6, 0.5 / 60, 0.5 / 300])
        >>> round(law.exponent, 12), round(law.constant, 12)
        (-1.0, 0.5)
    """
    depth, value = _points("power_law", blocks, values)
    x, y = np.log(depth), np.log(value)
    centred = x - x.mean()
    square = float(centred @ centred)
    if square == 0:
        raise ValueError(f"power_law: blocks must have two different values, got {depth.tolist()}")
    exponent = float(centred @ y) / square
    residual = y - y.mean() - exponent * centred
    free = len(x) - 2
    error = math.sqrt(float(residual @ residual) / free / square) if free else math.nan
    return PowerLaw(exponent, math.exp(float(y.mean() - exponent * x.mean())), error)


def reciprocal_law(blocks: ArrayLike, values: ArrayLike) -> ReciprocalLaw:
    """Measure c in values = c / blocks, and how much c varies over the points.

    Args:
        blocks: Numbers of blocks, [n], positive.
        values: Measured at each, [n], positive.

    Returns:
        The mean of c and its largest over its smallest value.

    Raises:
        ValueError: If there are no points or one is not positive.
    """
    depth, value = _points("reciprocal_law", blocks, values)
    constants = depth * value
    return ReciprocalLaw(float(constants.mean()), float(constants.max() / constants.min()))


def seed_law(blocks: ArrayLike, values: ArrayLike, level: float = 0.95) -> SeedLaw:
    """Fit the exponent of every run by itself, and bound their mean over the seeds.

    Args:
        blocks: Numbers of blocks, [n], positive, at least two of them different.
        values: Measured by each run at each depth, [seeds, n], positive.
        level: Of the interval, Student's t over the seeds.

    Raises:
        ValueError: If a run cannot be fitted, values are not [seeds, n], or level is no share.
        ModuleNotFoundError: If SciPy is not installed.

    Example:
        >>> law = seed_law([6, 60], [[0.6, 0.06], [0.6, 0.06]])
        >>> round(law.exponent, 6), round(law.high - law.low, 6)
        (-1.0, 0.0)
    """
    runs = np.asarray(values, np.float64)
    if runs.ndim != 2 or len(runs) == 0:
        raise ValueError(f"seed_law: values must be [seeds, depths], got shape {[*runs.shape]}")
    exponents = np.array([power_law(blocks, run).exponent for run in runs])
    mean, free = float(exponents.mean()), len(exponents) - 1
    if free == 0:
        return SeedLaw(exponents, mean, math.nan, math.nan)
    error = float(exponents.std(ddof=1)) / math.sqrt(len(exponents))
    half = _student("seed_law", level, free) * error
    return SeedLaw(exponents, mean, mean - half, mean + half)


def local_exponents(
    blocks: ArrayLike, values: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Take the exponent between each two neighbouring depths, where one line may not fit all.

    Args:
        blocks: Numbers of blocks, [n], positive, all different; any order.
        values: Measured at each, [n], positive.

    Returns:
        The geometric means of neighbouring depths, [n - 1], and the exponents there, [n - 1].

    Raises:
        ValueError: If a point is not positive, or a depth comes twice.

    Example:
        >>> local_exponents([10, 1000, 100], [1, 1e-3, 0.1])[1].round(6).tolist()
        [-1.0, -2.0]
    """
    depth, value = _points("local_exponents", blocks, values)
    order = np.argsort(depth)
    x, y = np.log(depth[order]), np.log(value[order])
    if (np.diff(x) == 0).any():
        raise ValueError(f"local_exponents: blocks must all differ, got {depth.tolist()}")
    return np.exp((x[1:] + x[:-1]) / 2), np.diff(y) / np.diff(x)


def reaching_depth(
    blocks: ArrayLike, values: ArrayLike, target: float, level: float = 0.95
) -> Reaching:
    """Find the depth at which the power law of the points reaches a value: (target / c)^(1 / a).

    The interval is that of inverse prediction (Fieller 1954): the depths at which the confidence
    band of the fitted line contains the target. It holds where one line fits, and so not for a
    crossover: compare `local_exponents`.

    Args:
        blocks: Numbers of blocks, [n], positive, at least two of them different.
        values: Measured at each, [n], positive; several runs are several points.
        target: The value to reach, positive.
        level: Of the interval.

    Raises:
        ValueError: If a line cannot be fitted, the target is not positive, or level is no share.
        ModuleNotFoundError: If there are three points or more and SciPy is not installed.

    Example:
        >>> str(reaching_depth([6, 60], [0.5 / 6, 0.5 / 60], target=0.001))
        '500 blocks'
    """
    if not 0 < target < math.inf:
        raise ValueError(f"reaching_depth: target must be positive, got {target}")
    slope = power_law(blocks, values).exponent
    depth, value = _points("reaching_depth", blocks, values)
    x, y = np.log(depth), np.log(value)
    centre, square = float(x.mean()), float(((x - x.mean()) ** 2).sum())
    rise = math.log(target) - float(y.mean())
    blocks_at = _exp(centre + rise / slope) if slope < 0 else math.inf
    free = len(x) - 2
    if free == 0:
        return Reaching(blocks_at, math.nan, math.nan)
    residual = y - y.mean() - slope * (x - centre)
    noise = _student("reaching_depth", level, free) ** 2 * float(residual @ residual) / free
    # depths at a distance d of the centre with (slope d - rise)^2 <= noise (1 / n + d^2 / square)
    a, b, c = slope**2 - noise / square, -slope * rise, rise**2 - noise / len(x)
    if slope >= 0 or a <= 0:
        return Reaching(blocks_at, 0.0, math.inf)
    half = math.sqrt(max(b * b - a * c, 0.0))
    low, high = (_exp(centre + (-b + sign * half) / a) for sign in (-1, 1))
    return Reaching(blocks_at, low, high)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _student(where: str, level: float, free: int) -> float:
    """Return the quantile of Student's t that a two-sided interval takes."""
    if not 0 < level < 1:
        raise ValueError(f"{where}: level must be between 0 and 1, got {level}")
    try:
        from scipy.stats import t
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{where}: intervals need SciPy: pip install 'fastres[hessian]'"
        ) from None
    return float(t.ppf(0.5 + level / 2, free))


def _points(
    where: str, blocks: ArrayLike, values: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    depth, value = np.asarray(blocks, np.float64), np.asarray(values, np.float64)
    for name, array in (("blocks", depth), ("values", value)):
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"{where}: {name} must be a list of numbers, got {array.tolist()}")
        if not (np.isfinite(array) & (array > 0)).all():
            raise ValueError(f"{where}: {name} must be positive, got {array.tolist()}")
    if depth.shape != value.shape:
        raise ValueError(f"{where}: values must be {len(depth)} numbers, got {len(value)}")
    return depth, value
