"""intervals: the shortest interval of lengths that holds a given part of their weight."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shortest(weights: Sequence[float], beyond: float, mass: float) -> tuple[int, int]:
    """Find the shortest interval that holds so much; of several the first.

    Args:
        weights: Of the lengths from 0 on, none below zero.
        beyond: Weight of all other lengths.
        mass: Part of the whole weight.

    Returns:
        First and last length.

    Raises:
        ValueError: If mass is not in (0, 1], or the weights do not hold it.

    Example:
        >>> shortest([1, 2, 4, 2, 1], 0, 0.8)
        (1, 3)
    """
    if not 0 < mass <= 1:
        raise ValueError(f"interval: mass must be in (0, 1], got {mass}")
    kept = math.fsum(weights)
    wanted = mass * (kept + beyond) * (1 - 1e-12)  # or rounding refuses mass=1
    if not kept >= wanted:
        raise ValueError(
            f"interval: mass must be held by the lengths kept, got {mass} with "
            f"{kept / (kept + beyond):.4g} in lengths 0 to {len(weights) - 1}"
        )
    best, first, held = (0, len(weights) - 1), 0, 0.0
    for last, weight in enumerate(weights):
        held += weight
        while first < last and held - weights[first] >= wanted:
            held -= weights[first]
            first += 1
        if held >= wanted and last - first < best[1] - best[0]:
            best = first, last
    return best
