"""stats: the three sums that every residual add gives, ||x||^2, ||p||^2 and <x, p> of a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Stats:
    """The three sums of one residual add, each [B], over all features of a sample.

    float32, or float64 where the add is in float64. What is recorded follows from them: the
    absolute perturbation is sqrt(branch_sq), the scaled one sqrt(branch_sq / skip_sq).
    Unpacks as `skip_sq, branch_sq, dot = stats`. The three are views of `sums` [3, B].
    """

    __slots__ = ("sums",)

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    @property
    def skip_sq(self) -> Tensor:
        """Sum of x * x, [B]."""
        return self.sums.select(-2, 0)

    @property
    def branch_sq(self) -> Tensor:
        """Sum of (gate * f) * (gate * f), [B]."""
        return self.sums.select(-2, 1)

    @property
    def dot(self) -> Tensor:
        """Sum of x * (gate * f), [B]."""
        return self.sums.select(-2, 2)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.skip_sq, self.branch_sq, self.dot))

    def __repr__(self) -> str:
        return f"Stats(skip_sq={self.skip_sq}, branch_sq={self.branch_sq}, dot={self.dot})"


pytree.register_pytree_node(
    Stats,
    lambda stats: ([stats.sums], None),
    lambda leaves, _: Stats(*leaves),
    serialized_type_name="fastres.Stats",
)


def sums_of(skip: Tensor, perturbation: Tensor) -> Tensor:
    """Compute the [3, B] sums in plain PyTorch, in the dtype of the two tensors [B, ...]."""
    x, p = skip.flatten(1), perturbation.flatten(1)
    return torch.stack([(a * b).sum(1) for a, b in ((x, x), (p, p), (x, p))])
