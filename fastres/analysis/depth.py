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
