"""trajectories: the residuals y(t) of a model, block after block, and where they come to rest."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastres.analysis.operands import read_operands


class ClassTrajectories(NamedTuple):
    """Residuals of C classes over T blocks."""

    mean: Tensor  # [T, C, ...] over the samples of a class
    spread: Tensor  # [T, C, ...] their standard deviation, over n; 0 for one sample


def residuals(model: nn.Module, x: Tensor) -> Tensor:
    """Collect what every block of a model adds: y(1), ..., y(T).

    Args:
        model: Any module whose residual adds all have one shape, as in one stage of a ResNet.
        x: Its input, [B, ...].

    Returns:
        Branches in the order in which they ran, [T, B, ...], as much memory as all of them.

    Raises:
        ValueError: If the model has no residual add, or adds of several shapes.
    """
    sites, found = read_operands("residuals", model, x, lambda _, __, branch: branch.clone())
    shapes = sorted({site.shape[1:] for site in sites})
    if len(shapes) > 1:
        raise ValueError(f"residuals: model must have blocks of one shape, got {shapes}")
    return torch.stack(found)


def by_class(y: Tensor, classes: Tensor) -> ClassTrajectories:
    """Average residuals over the samples of each class.

    Args:
        y: [T, B, ...].
        classes: Of each sample, [B] int64; every one from 0 to the largest must occur.

    Raises:
        ValueError: If there are not as many classes as samples, or one has no sample.
    """
    if classes.dim() != 1 or y.dim() < 3 or y.size(1) != len(classes) or len(classes) == 0:
        found = f"{[*y.shape]} and {[*classes.shape]}"
        raise ValueError(f"by_class: y and classes must be [T, B, ...] and [B], got {found}")
    counts = torch.bincount(classes)
    if bool((counts == 0).any()):
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"by_class: classes must all have a sample, none of {missing}")
    parts = [y[:, classes == label].double() for label in range(len(counts))]
    mean = torch.stack([part.mean(1) for part in parts], 1)
    spread = torch.stack([part.std(1, correction=0) for part in parts], 1)
    return ClassTrajectories(mean, spread)


def convergence(y: Tensor) -> Tensor:
    """Measure how much the residuals change from block to block: mean |y(t + 1) - y(t)|.

    The mean is over samples and neurons: the measure by which Lagzi removes layers, section 3.

    Args:
        y: [T, B, ...], T at least 2.

    Returns:
        [T - 1], float64, in units of y.

    Raises:
        ValueError: If there are fewer than two blocks.
    """
    if y.dim() < 2 or len(y) < 2:
        raise ValueError(f"convergence: y must be [2 or more, B, ...], got {[*y.shape]}")
    return torch.stack([(b - a).abs().double().mean() for a, b in itertools.pairwise(y)])
