"""depth_choice: the first depth whose mean perturbation is below epsilon (Hauser 2019).

The rule of arXiv 1902.04106: choose the depth such that the average size of the perturbation is
below a given epsilon. Either every depth is trained by itself, or one network grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from torch import nn
from torch.optim import Optimizer

from fastres.analysis.depth import Reaching, reaching_depth
from fastres.nn.residual_mlp import ResidualMLP
from fastres.nn.resizing import append_blocks

WHICH: Final = ("absolute", "scaled")


class Measured(Protocol):
    """What tells the mean perturbation of a network: a `Tape`, or a `Perturbation`."""

    @property
    def mean_absolute(self) -> float:
        """Mean over the identity sites."""

    @property
    def mean_scaled(self) -> float:
        """Mean over the identity sites."""


@dataclass(frozen=True)
class DepthChoice:
    """What a search for the depth found."""

    depth: int | None  # the first below epsilon; None: none of those tried is
    epsilon: float
    which: str
    depths: tuple[int, ...]  # those that were trained, in increasing order
    values: tuple[float, ...]  # the mean perturbation of each
    estimate: Reaching | None  # where their power law reaches epsilon; None of fewer than two

    def __str__(self) -> str:
        """Say what was found in a line."""
        if self.depth is not None:
            value = self.values[-1]
            return f"{self.depth} blocks: {self.which} {value:.3g} is below {self.epsilon:g}"
        reached = f"none of {', '.join(map(str, self.depths))} blocks is below {self.epsilon:g}"
        return reached if self.estimate is None else f"{reached}; by their law {self.estimate}"


def choose_depth(
    train: Callable[[int], Measured],
    depths: Iterable[int],
    epsilon: float,
    which: str = "scaled",
) -> DepthChoice:
    """Train in increasing depth, and stop at the first whose mean perturbation is below epsilon.

    Args:
        train: Number of blocks -> what was recorded of the network trained with as many.
        depths: Numbers of blocks to try, in any order, 1 or more; each is trained once.
        epsilon: The bound, positive: of the scaled value without unit, of the absolute one in units
            of the stream.
        which: scaled or absolute.

    Returns:
        The depth with all that was measured. Where none is below epsilon its depth is None, and the
        estimate says where the others point to.

    Raises:
        ValueError: If an argument breaks its rule, or a network has no finite mean, as one without
            identity sites.

    Example:
        >>> from types import SimpleNamespace
        >>> def train(blocks):
        ...     return SimpleNamespace(mean_absolute=1.0, mean_scaled=0.5 / blocks)
        >>> print(choose_depth(train, [48, 12, 24], epsilon=0.03))
        24 blocks: scaled 0.0208 is below 0.03
    """
    _check("choose_depth", epsilon, which)
    ordered = sorted(set(depths))
    if not ordered or ordered[0] < 1:
        raise ValueError(f"choose_depth: depths must be some numbers >= 1, got {ordered}")
    values: list[float] = []
    for blocks in ordered:
        values.append(_mean("choose_depth", train(blocks), which))
        if values[-1] < epsilon:
            break
    return _outcome(ordered[: len(values)], values, epsilon, which)


def grow(
    model: ResidualMLP,
    optimizer: Optimizer,
    train: Callable[[nn.Module], Measured],
    epsilon: float,
    *,
    step: int,
    most: int,
    which: str = "scaled",
) -> DepthChoice:
    """Append blocks to a network in training until its mean perturbation is below epsilon.

    New blocks add nothing at first, so growth changes no output; optimiser state is kept.

    Args:
        model: Grows in place.
        optimizer: Of all its parameters.
        train: Trains the model further, with this optimiser, and returns what was recorded then.
        epsilon: As in `choose_depth`.
        step: Blocks to append at a time.
        most: Blocks the network may have at the end.
        which: As in `choose_depth`.

    Returns:
        As `choose_depth` does.

    Raises:
        ValueError: If an argument breaks its rule, or the mean is not finite.
    """
    _check("grow", epsilon, which)
    if step < 1 or most < model.stack.blocks:
        found = f"step {step}, most {most} for {model.stack.blocks} blocks"
        raise ValueError(f"grow: step must be >= 1 and most no less than the blocks, got {found}")
    depths: list[int] = []
    values: list[float] = []
    while True:
        depths.append(model.stack.blocks)
        values.append(_mean("grow", train(model), which))
        room = min(step, most - model.stack.blocks)
        if values[-1] < epsilon or room == 0:
            return _outcome(depths, values, epsilon, which)
        append_blocks(model.stack, room, optimizer)


def _outcome(depths: list[int], values: list[float], epsilon: float, which: str) -> DepthChoice:
    found = depths[-1] if values[-1] < epsilon else None
    some = len(values) > 1 and min(values) > 0
    estimate = reaching_depth(depths, values, epsilon) if some else None
    return DepthChoice(found, epsilon, which, tuple(depths), tuple(values), estimate)


def _mean(op: str, measured: Measured, which: str) -> float:
    value = measured.mean_scaled if which == "scaled" else measured.mean_absolute
    if not math.isfinite(value):
        raise ValueError(f"{op}: train must give a finite mean over identity sites, got {value}")
    return value


def _check(op: str, epsilon: float, which: str) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"{op}: epsilon must be positive, got {epsilon}")
    if which not in WHICH:
        raise ValueError(f"{op}: which must be one of {', '.join(WHICH)}, got {which!r}")
