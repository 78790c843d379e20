"""branch_weights: size of the weights of blocks, their way from the start, their smoothness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres.nn import CifarResNet, ResidualMLP
from fastres.nn.cifar_resnet import STAGES


class BranchWeights(NamedTuple):
    """Means over the blocks of a network."""

    norm: float  # ||w_l||
    distance: float  # ||w_l - w_l at the start||
    roughness: float  # ||w_(l+1) - w_l||; nan where no two blocks are neighbours


def block_weights(model: nn.Module) -> list[Tensor]:
    """Copy the weight matrices of the blocks of a network, stage by stage.

    Args:
        model: A ResidualMLP, or a CifarResNet, of which blocks with another shape are left out.

    Returns:
        One tensor [blocks, weights] per stage.

    Raises:
        TypeError: If the model is neither.
    """
    if isinstance(model, ResidualMLP):
        parts = (model.stack.w1, model.stack.w2)
        return [torch.cat([part.detach().flatten(1) for part in parts], 1)]
    if not isinstance(model, CifarResNet):
        kind = type(model).__name__
        raise TypeError(f"block_weights: model must be a ResidualMLP or a CifarResNet, got {kind}")
    found = []
    for stage in range(1, len(STAGES) + 1):
        blocks = list(model.get_submodule(f"layer{stage}").children())
        rows = [
            torch.cat(
                [m.weight.detach().flatten() for m in b.modules() if isinstance(m, nn.Conv2d)]
            )
            for b in blocks
        ]
        found.append(torch.stack([row for row in rows if row.shape == rows[-1].shape]))
    return found


def branch_weights(start: Sequence[Tensor], now: Sequence[Tensor]) -> BranchWeights:
    """Measure the weights of blocks against those at the start of training.

    Smooth across depth means a small `roughness`: weights that are samples of one function of depth
    have it fall as 1 / L, weights that are drawn one by one keep sqrt(2) times their norm.

    Args:
        start: What `block_weights` gave before training.
        now: What it gives now; the same shapes.

    Raises:
        ValueError: If the shapes differ.
    """
    if [t.shape for t in start] != [t.shape for t in now]:
        shapes = f"{[[*t.shape] for t in start]} and {[[*t.shape] for t in now]}"
        raise ValueError(f"branch_weights: start and now must have the same shapes, got {shapes}")
    norm = torch.cat([w.double().norm(dim=1) for w in now])
    way = torch.cat(
        [(b.double() - a.double()).norm(dim=1) for a, b in zip(start, now, strict=True)]
    )
    steps = torch.cat([w.double().diff(dim=0).norm(dim=1) for w in now])
    return BranchWeights(norm.mean().item(), way.mean().item(), steps.mean().item())
