"""iteration: what a trained block does when it is repeated: whether it contracts, and to where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Iteration:
    """The way of x <- block(x)."""

    point: Tensor  # where each sample is at the end, [B, ...]
    moves: Tensor  # ||x(t + 1) - x(t)||, [steps, B] float64
    fixed: Tensor  # whether the last move is below tolerance * ||x||, [B] bool
    contraction: Tensor  # [B] float64, see `iterate`


@torch.no_grad()
def iterate(
    block: Callable[[Tensor], Tensor], x: Tensor, steps: int = 100, tolerance: float = 1e-6
) -> Iteration:
    """Repeat a block on its own output.

    The contraction of a sample is the factor by which a move is longer than the one before: the
    geometric mean over the second half of the steps before it is at rest. Below 1 the block
    contracts here; near a fixed point it is the largest eigenvalue of its Jacobian, by power
    iteration. It is nan where there are fewer than two such steps.

    Args:
        block: [B, ...] -> the same shape; a module in eval mode, unless its batch matters.
        x: Where to start, [B, ...].
        steps: How often, 2 or more.
        tolerance: Of the last move, relative to the length of the stream, positive.

    Raises:
        ValueError: If an argument breaks its rule, or the block changes the shape.

    Example:
        >>> found = iterate(lambda x: 0.5 * x + 1, torch.zeros(1, 1))
        >>> round(found.point.item(), 6), bool(found.fixed), round(found.contraction.item(), 2)
        (2.0, True, 0.5)
    """
    if steps < 2 or not tolerance > 0:
        found = f"steps {steps}, tolerance {tolerance}"
        raise ValueError(f"iterate: steps must be >= 2 and tolerance positive, got {found}")
    moves = []
    for _ in range(steps):
        after = block(x)
        if after.shape != x.shape or x.dim() < 2:
            found = f"{[*x.shape]} to {[*after.shape]}"
            raise ValueError(f"iterate: block must keep the shape [B, ...], got {found}")
        moves.append((after - x).double().flatten(1).norm(dim=1))
        x = after
    rest = tolerance * x.double().flatten(1).norm(dim=1)
    every = torch.stack(moves)
    return Iteration(x, every, moves[-1] <= rest, _contraction(every, rest))


def _contraction(moves: Tensor, rest: Tensor) -> Tensor:
    """Return [B] from moves [steps, B] and the moves [B] at which samples are at rest."""
    last = (moves > rest).cumprod(0).sum(0) - 1
    first = last.clamp(min=0) // 2
    start, end = (moves.gather(0, at.clamp(min=0)[None])[0] for at in (first, last))
    ratio = (end / start) ** (1 / (last - first).clamp(min=1))
    return torch.where(last > 0, ratio, torch.nan)
