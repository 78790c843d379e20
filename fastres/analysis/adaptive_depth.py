"""adaptive_depth: takes the last block of a stage away once it adds no more than the one before.

Lagzi (arXiv 2101.03009), section 3: start with many layers; after each epoch, where the residuals
of the last two differ by less than a threshold, 0.01 per neuron on average, remove the last. That
removes a constant residual too, which the rule of Hauser 2019 (arXiv 1902.04106), a small
perturbation, would keep; both are here. What a removed block added in the mean can be folded into
the bias behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastres.analysis.operands import read_operands
from fastres.analysis.perturbation import magnitude
from fastres.analysis.stages import stages_of
from fastres.training import evaluating

RULES: Final = ("residual", "scaled")


@dataclass(frozen=True)
class Epoch:
    """What one step of the controller saw and did, by the names of the stages."""

    measured: dict[str, float]  # of the last blocks, before anything was removed
    blocks: dict[str, int]  # after
    removed: tuple[str, ...]


class AdaptiveDepth:
    """Shrinks a network while it is trained, at most one block of each stage per step.

    Args:
        model: A ResidualMLP, a residual LayerNetwork or a CifarResNet; changed in place.
        x: A fixed batch to measure on, in eval mode, [B, ...].
        optimizer: Of the model's parameters; it forgets those that are removed, and keeps its state
            of all others.
        threshold: Blocks are removed below it, positive.
        rule: residual, mean |y_last - y_before| over samples and neurons (Lagzi); or scaled, the
            mean of ||f|| / ||x|| of the last block (Hauser).
        fold: Whether the mean of what a removed block added goes into the bias of the head behind
            it; not in a CifarResNet, where a ReLU or batch norm follows.
        least: Blocks that every stage keeps, 2 or more.

    Attributes:
        history: One entry per step.

    Raises:
        TypeError: If the model is none of these.
        ValueError: If an argument breaks its rule, or no stage can lose a block.

    Example:
        >>> from fastres.nn import LayerNetwork
        >>> model = LayerNetwork(in_features=2, classes=2, width=3, layers=15)
        >>> control = AdaptiveDepth(model, torch.randn(100, 2), threshold=0.01)
        >>> for epoch in range(3):  # train, and then
        ...     removed = control.step()
        >>> len(control.history)
        3
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        optimizer: Optimizer | None = None,
        *,
        threshold: float = 0.01,
        rule: str = "residual",
        fold: bool = False,
        least: int = 2,
    ) -> None:
        self._stages = stages_of("AdaptiveDepth", model)
        if not 0 < threshold < math.inf:
            raise ValueError(f"AdaptiveDepth: threshold must be positive, got {threshold}")
        if rule not in RULES:
            known = ", ".join(RULES)
            raise ValueError(f"AdaptiveDepth: rule must be one of {known}, got {rule!r}")
        if len(x) == 0:
            raise ValueError("AdaptiveDepth: x must have a sample, got none")
        if least < 2:
            raise ValueError(f"AdaptiveDepth: least must be >= 2, got {least}")
        if all(stage.blocks() <= least for stage in self._stages):
            found = ", ".join(f"{stage.name} {stage.blocks()}" for stage in self._stages)
            raise ValueError(
                f"AdaptiveDepth: model must have a stage of more than {least} blocks, got {found}"
            )
        if fold and any(stage.head is None for stage in self._stages):
            kind = type(model).__name__
            raise ValueError(f"AdaptiveDepth: fold must have a bias behind the blocks, got {kind}")
        self.history: list[Epoch] = []
        self._model, self._x, self._optimizer = model, x, optimizer
        self._threshold, self._rule, self._fold, self._least = threshold, rule, fold, least

    def step(self) -> tuple[str, ...]:
        """Measure, and remove the last block of each stage whose measure is below the threshold.

        Returns:
            Names of the stages that lost one.
        """
        measured, means, removed = {}, self._measure(), []
        for stage, (value, mean) in zip(self._stages, means, strict=True):
            measured[stage.name] = value
            if value < self._threshold and stage.blocks() > self._least:
                stage.remove(self._optimizer)
                if self._fold and stage.head is not None:
                    with torch.no_grad():
                        stage.head.bias.add_(stage.head.weight @ mean.to(stage.head.weight))
                removed.append(stage.name)
        blocks = {stage.name: stage.blocks() for stage in self._stages}
        self.history.append(Epoch(measured, blocks, tuple(removed)))
        return tuple(removed)

    def _measure(self) -> list[tuple[float, Tensor]]:
        """Return, per stage, the measure of its last block and the mean of what that adds."""
        ends, before = [], 0
        for stage in self._stages:
            before += stage.blocks()
            ends.append(before - 1)
        wanted = {site for end in ends for site in (end - 1, end)}

        def read(site: int, skip: Tensor, branch: Tensor) -> tuple[Tensor, float] | None:
            if site not in wanted:
                return None
            scaled = magnitude(skip, branch).scaled.nanmean().item()
            return branch.clone(), scaled

        with evaluating(self._model):
            _, found = read_operands("AdaptiveDepth", self._model, self._x, read)
        means = []
        for end in ends:
            last, scaled = found[end]
            change = (last - found[end - 1][0]).abs().double().mean().item()
            means.append((change if self._rule == "residual" else scaled, last.mean(0)))
        return means


def prune(
    model: nn.Module,
    x: Tensor,
    *,
    threshold: float = 0.01,
    rule: str = "residual",
    fold: bool = False,
    least: int = 2,
) -> AdaptiveDepth:
    """Remove the last blocks of a trained network by the same measure, without training it further.

    Args:
        model: As in `AdaptiveDepth`.
        x: As in `AdaptiveDepth`.
        threshold: As in `AdaptiveDepth`.
        rule: As in `AdaptiveDepth`.
        fold: As in `AdaptiveDepth`.
        least: As in `AdaptiveDepth`.

    Returns:
        The controller when no stage lost a block any more, with its history.

    Raises:
        TypeError: As in `AdaptiveDepth`.
        ValueError: As in `AdaptiveDepth`.
    """
    control = AdaptiveDepth(model, x, threshold=threshold, rule=rule, fold=fold, least=least)
    while control.step():
        pass
    return control
