"""trajectory: how long the way of a sample through the blocks is, and how far it leads.

The length of the way is the sum of ||f|| over the blocks, and the tape has it. The displacement
||x_L - x_0|| does not follow from the three sums of the blocks, which know nothing of the angle
between two branches: they bound it, and `displacement` takes it from the states themselves.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from fastres.tape import Tape


class Stage(NamedTuple):
    """The way through one run of identity sites of one shape, N samples."""

    sites: range
    length: Tensor  # sum of ||f||, [N] float64; the displacement is at most this
    least: Tensor  # | ||x + f|| of the last - ||x|| of the first |, [N] float64; at least this


class Way(NamedTuple):
    """The way of each sample through its states."""

    length: Tensor  # [B] float64
    displacement: Tensor  # [B] float64

    @property
    def straightness(self) -> Tensor:
        """Displacement over length, [B]: 1 for a straight way, nan where nothing moved."""
        return self.displacement / self.length


def stages(tape: Tape) -> list[Stage]:
    """Measure the way through each stage of a network, from the sums of a tape.

    Args:
        tape: What `record(model, per_sample=True)` gave.

    Returns:
        One entry per run of neighbouring identity sites of one shape, outside of other branches.
        Where a ReLU follows each add, the displacement is still at most the length, because a ReLU
        brings no two points apart; the lower bound is that of the sum before the last ReLU.

    Raises:
        RuntimeError: If the tape has seen no pass or keeps no single samples.
    """
    keys = [
        (site.shape[1:], i if site.kind == "projection" or site.level else -1)
        for i, site in enumerate(tape.sites)
    ]
    x_sq, f_sq, dot = (t.double() for t in (tape.skip_sq, tape.branch_sq, tape.dot))
    y = (x_sq + 2 * dot + f_sq).clamp(min=0).sqrt()
    found = []
    for key, group in itertools.groupby(range(len(keys)), keys.__getitem__):
        if key[1] >= 0:
            continue
        members = list(group)
        sites = range(members[0], members[-1] + 1)
        least = (y[sites[-1]] - x_sq[sites[0]].sqrt()).abs()
        found.append(Stage(sites, f_sq[sites.start : sites.stop].sqrt().sum(0), least))
    return found


def displacement(states: Tensor) -> Way:
    """Measure length and displacement of the way through given states, exactly.

    Args:
        states: Stream before every block and after the last, [L + 1, B, ...], as
            `fastres.mlp_stack(..., return_states=True)` returns them; L at least 1.

    Raises:
        ValueError: If there are fewer than two states.

    Example:
        >>> import torch
        >>> way = displacement(torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]], [[3.0, 4.0]]]))
        >>> way.length.item(), way.displacement.item()
        (7.0, 5.0)
    """
    if states.dim() < 3 or len(states) < 2:
        raise ValueError(f"displacement: states must be [2 or more, B, ...], got {[*states.shape]}")
    flat = states.double().flatten(2)
    length = flat.diff(dim=0).norm(dim=2).sum(0)
    return Way(length, (flat[-1] - flat[0]).norm(dim=1))
