"""residual_add: y = act(x + gate * f), with ||x||^2, ||gate * f||^2 and <x, gate * f> from the same pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """The three sums of one residual add, each [B], over all features of a sample.

    float32, or float64 where the add is in float64. All that is recorded follows from them:
    absolute perturbation sqrt(branch_sq), scaled sqrt(branch_sq / skip_sq), the angle by dot.
    """

    skip_sq: Tensor  # [B], sum of x * x
    branch_sq: Tensor  # [B], sum of (gate * f) * (gate * f)
    dot: Tensor  # [B], sum of x * (gate * f)


def residual_add(
    x: Tensor,
    f: Tensor,
    gate: float | Tensor | None = None,
    relu: bool = False,
    *,
    differentiable_stats: bool = False,
) -> tuple[Tensor, Stats]:
    """Add a gated branch to its stream and measure both in the same pass over memory."""
    return reference(x, f, gate, relu, differentiable_stats=differentiable_stats)


def reference(
    x: Tensor,
    f: Tensor,
    gate: float | Tensor | None = None,
    relu: bool = False,
    *,
    differentiable_stats: bool = False,
) -> tuple[Tensor, Stats]:
    """Compute residual_add in plain PyTorch: the oracle, and the fallback without the library."""
    dtype = torch.promote_types(x.dtype, f.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    skip, branch = x.to(wide), f.to(wide)
    if gate is not None:
        gate = torch.as_tensor(gate, dtype=wide, device=x.device)
        branch = branch * gate.reshape(-1, *[1] * (x.dim() - 1))
    y = (skip + branch).to(dtype)
    if not differentiable_stats:
        skip, branch = skip.detach(), branch.detach()
    skip, branch = skip.flatten(1), branch.flatten(1)
    stats = Stats((skip * skip).sum(1), (branch * branch).sum(1), (skip * branch).sum(1))
    return (y.relu() if relu else y), stats
