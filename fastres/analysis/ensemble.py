"""ensemble: how many paths of each length there are, what a lesion leaves, what paths weigh.

A network of n blocks is 2^n paths, binom(n, k) of them through k branches (Veit et al. 2016, arXiv
1605.06431, section 4). Counts are integers and shares their quotients, correctly rounded; what
would overflow is a logarithm. Thousands of blocks are no obstacle.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray


def log_binomials(n: int) -> NDArray[np.float64]:
    """Compute log binom(n, k) for k = 0 to n, [n+1], from the integers themselves.

    Raises:
        ValueError: If n is negative.

    Example:
        >>> np.exp(log_binomials(4)).round(12).tolist()
        [1.0, 4.0, 6.0, 4.0, 1.0]
    """
    _check_least("log_binomials", "n", n, 0)
    count, half = 1, [0.0]
    for k in range(n // 2):
        count = count * (n - k) // (k + 1)
        half.append(math.log(count))
    return np.array([*half, *reversed(half[: (n + 1) // 2])])


def share_of_lengths(blocks: int, low: int, high: int) -> float:
    """Compute which share of all paths goes through low to high branches, both included.

    Args:
        blocks: Number of blocks n.
        low: Least length.
        high: Largest length.

    Raises:
        ValueError: If blocks is negative, or not 0 <= low <= high <= blocks.

    Example:
        >>> f"{share_of_lengths(54, 5, 17):.5%}"
        '0.45367%'
    """
    _check_least("share_of_lengths", "blocks", blocks, 0)
    if not 0 <= low <= high <= blocks:
        raise ValueError(
            f"share_of_lengths: low and high must be 0 <= low <= high <= {blocks}, the blocks, "
            f"got {low} and {high}"
        )
    count = math.comb(blocks, low)
    total = count
    for k in range(low, high):
        count = count * (blocks - k) // (k + 1)
        total += count
    return float(Fraction(total, 1 << blocks))


def surviving(blocks: int, deleted: int, length: int) -> float:
    """Compute which share of the paths of one length avoids all deleted blocks.

    It is binom(n - d, x) / binom(n, x) for d of n blocks and length x.

    Raises:
        ValueError: If deleted or length is not 0 to blocks, or blocks is negative.

    Example:
        >>> round(surviving(54, deleted=10, length=5), 3)
        0.343
    """
    _check_least("surviving", "blocks", blocks, 0)
    for name, value in (("deleted", deleted), ("length", length)):
        if not 0 <= value <= blocks:
            raise ValueError(f"surviving: {name} must be 0 to {blocks}, the blocks, got {value}")
    return float(Fraction(math.comb(blocks - deleted, length), math.comb(blocks, length)))


def log_path_weights(gains: ArrayLike) -> NDArray[np.float64]:
    """Sum the weights of all paths of each length, a path weighing the product of its gains.

    These are the elementary symmetric polynomials e_k of the gains, by e_k <- e_k + b e_{k-1} block
    after block, in logarithms. Equal gains b give binom(n, k) b^k. A product over blocks of
    ||branch|| / ||skip||, of batch-norm scales, or of gates is of this form.

    Args:
        gains: Gain b of each branch beside its skip, [n], >= 0. A gain of 0 is a deleted block.

    Returns:
        log e_k for k = 0 to n, [n+1]; -inf where no path of that length weighs anything.

    Raises:
        ValueError: If gains are no list, or one is negative or not finite.

    Example:
        >>> np.exp(log_path_weights([1, 2, 3])).round(9).tolist()
        [1.0, 6.0, 11.0, 6.0]
    """
    given = np.asarray(gains, np.float64)
    if given.ndim != 1:
        raise ValueError(f"log_path_weights: gains must be a list, got shape {[*given.shape]}")
    wrong = given[~(np.isfinite(given) & (given >= 0))]
    if wrong.size:
        raise ValueError(f"log_path_weights: gains must be finite and >= 0, got {wrong[0]}")
    weights = np.full(given.size + 1, -np.inf)
    weights[0] = 0.0
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        logs = np.log(given)
    for block, gain in enumerate(logs[given > 0], 1):
        new = weights[:block] + gain
        weights[1 : block + 1] = np.logaddexp(weights[1 : block + 1], new)
    return weights


def shares(log_weights: ArrayLike) -> NDArray[np.float64]:
    """Scale weights that are given by their logarithms to a sum of 1.

    Raises:
        ValueError: If there are none, or none is above 0.
    """
    given = np.asarray(log_weights, np.float64)
    largest = given.max() if given.size else -np.inf
    if not np.isfinite(largest):
        raise ValueError("shares: log_weights must have a finite largest value, got none")
    weights: NDArray[np.float64] = np.exp(given - largest)
    return weights / weights.sum()


def _check_least(where: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{where}: {name} must be >= {least}, got {value}")
