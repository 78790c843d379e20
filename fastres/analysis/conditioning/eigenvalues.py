"""eigenvalues: condition numbers, index and stationary order, from exact derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigenvalues:
    """The eigenvalues of a Hessian, and what they say of its conditioning.

    Attributes:
        values: All of them, [P] float64, ascending.
        rounding: The relative rounding error of the matrix that they are of.
    """

    values: Tensor
    rounding: float = torch.finfo(torch.float64).eps

    @cached_property
    def magnitudes(self) -> Tensor:
        """Their absolute values, [P], ascending."""
        return self.values.abs().sort().values

    @property
    def largest(self) -> float:
        """The largest |eigenvalue|."""
        return float(self.magnitudes[-1])

    @property
    def smallest(self) -> float:
        """The smallest |eigenvalue|."""
        return float(self.magnitudes[0])

    @property
    def tenth(self) -> float:
        """The 10th percentile of |eigenvalue|, linear between neighbours."""
        place = 0.1 * (len(self.magnitudes) - 1)
        low, high = self.magnitudes[math.floor(place)], self.magnitudes[math.ceil(place)]
        return float(torch.lerp(low, high, place % 1))  # torch.quantile takes no more than 2^24

    @property
    def condition(self) -> float:
        """The ratio max / min of |eigenvalue|: inf for a singular Hessian, nan for a zero one."""
        return _ratio(self.largest, self.smallest)

    @property
    def condition_tenth(self) -> float:
        """The ratio max / 10th percentile of |eigenvalue|, that of Li et al. 2016.

        The smallest |eigenvalue| is unstable, and 0 wherever weights can be traded for others.
        """
        return _ratio(self.largest, self.tenth)

    @property
    def index(self) -> float:
        """The fraction of eigenvalues below zero.

        Those within the rounding error of zero, P rounding max |eigenvalue|, are not.
        """
        tolerance = len(self.values) * self.rounding * self.largest
        return float((self.values < -tolerance).double().mean())


def _ratio(large: float, small: float) -> float:
    if small == 0:
        return float("inf") if large else float("nan")
    return large / small


def eigenvalues(matrix: Tensor) -> Eigenvalues:
    """Find the eigenvalues of a symmetric matrix [P, P], in float64.

    Raises:
        TypeError: If its dtype is not a real floating one.
        ValueError: If it is not square, empty, or not finite.
    """
    if matrix.dim() != 2 or matrix.size(0) != matrix.size(1) or len(matrix) == 0:
        raise ValueError(f"eigenvalues: matrix must have shape [P, P], got {[*matrix.shape]}")
    if not matrix.is_floating_point():
        raise TypeError(f"eigenvalues: matrix must have a floating dtype, got {matrix.dtype}")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("eigenvalues: matrix must be finite, got inf or nan")
    values = torch.linalg.eigvalsh(matrix.detach().double())
    return Eigenvalues(values, torch.finfo(matrix.dtype).eps)


def stationary_order(
    loss: Callable[[Tensor], Tensor],
    point: Tensor,
    most: int = 4,
    *,
    draws: int = 4,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> int:
    """Measure the order to which a point is stationary, by derivatives along random directions.

    It is k where the derivatives of orders 1 to k vanish along all directions drawn (normal, of
    variance 1), and that of order k + 1 does not: the Taylor expansion to order k is constant
    (Li et al. 2016, arXiv 1611.01186). The derivatives are exact, forward in
    forward mode.

    Args:
        loss: Maps a tensor of the shape of point to a scalar.
        point: Where, any shape; float64, unless the loss wants another dtype.
        most: The order from which on no more is looked for.
        draws: Directions.
        seed: Of the directions, an own generator.
        tolerance: What counts as zero, in units of |loss| + 1 and of order factorial.

    Returns:
        0 where the gradient is not zero, to `most` where all orders vanish.

    Raises:
        ValueError: If most or draws is below 1.
    """
    for name, value in (("most", most), ("draws", draws)):
        if value < 1:
            raise ValueError(f"stationary_order: {name} must be >= 1, got {value}")
    source = torch.Generator().manual_seed(seed)
    directions = torch.randn(draws, *point.shape, dtype=torch.float64, generator=source)
    directions = directions.to(point)
    bound = tolerance * (1 + float(loss(point).detach().abs()))
    for order in range(1, most + 1):
        bound *= order
        if any(abs(_derivative(loss, point, v, order)) > bound for v in directions):
            return order - 1
    return most


def _derivative(
    loss: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, order: int
) -> float:
    """The derivative of loss(point + t direction) by t at 0, of any order."""

    def along(t: Tensor) -> Tensor:
        return loss(point.detach() + t * direction)

    found: Callable[[Tensor], Tensor] = along
    for _ in range(order):
        found = _differentiated(found)
    return float(found(point.new_zeros(())))


def _differentiated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def derivative(t: Tensor) -> Tensor:
        value: Tensor = torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
        return value

    return derivative
