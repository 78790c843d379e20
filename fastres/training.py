"""training: minibatch training of a classifier, the same bit for bit under the same seed on CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.data import Data
from fastres.gates import GatesLike, gate
from fastres.progress import bar


@dataclass(frozen=True)
class History:
    """What one training run did."""

    losses: tuple[float, ...]  # mean training loss of each epoch
    seconds: float


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, linear warm-up over a tenth of the steps, then cosine decay to 0."""

    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"train: {name} must be >= {least}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"train: rates must be positive and finite, got {self}")


class Stepper:
    """One model with its optimiser, advanced one batch per call."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        warm = max(steps // 10, 1)

        def rate(step: int) -> float:
            return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward, update: x [B, ...], y [B] -> the loss before the update."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    gates: GatesLike | None = None,
    progress: str | None = None,
) -> History:
    """Train a classifier in place on the training half of a data set.

    The same seed, model and number of threads give the same weights bit for bit on CPU.

    Args:
        model: Maps [B, C, H, W] to logits [B, classes]; moved to the device.
        data: The data set.
        recipe: How; Recipe() if None.
        seed: Of the order of the minibatches, an own generator.
        device: Where to train.
        gates: Scale the branches in every step, as `fastres.gate` does; None: nothing is scaled.
        progress: Label of a progress bar on stderr; None for no bar.

    Returns:
        The mean loss of each epoch and the seconds it took.

    Raises:
        ValueError: If the data set has no training samples.
        FloatingPointError: If the loss of an epoch is not finite.
    """
    recipe = recipe or Recipe()
    count = len(data.train_x)
    if count == 0:
        raise ValueError("train: data must have training samples, got 0")
    x, y = data.train_x.to(device), data.train_y.to(device)
    model.to(device).train()
    batches = math.ceil(count / recipe.batch_size)
    step = Stepper(model, recipe, recipe.epochs * batches)
    order = torch.Generator().manual_seed(seed)
    losses, start = [], time.perf_counter()
    gated = nullcontext() if gates is None else gate(model, gates)
    with gated, bar(progress, recipe.epochs * batches) as shown:
        for epoch in range(recipe.epochs):
            total = torch.zeros((), device=x.device)
            shuffled = torch.randperm(count, generator=order).to(x.device)  # drawn on the CPU
            for chosen in shuffled.split(recipe.batch_size):  # type: ignore[no-untyped-call]
                total += step(x[chosen], y[chosen]) * len(chosen)
                shown.update(1)
            losses.append(total.item() / count)
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"train: loss must stay finite, got {losses[-1]} in epoch {epoch + 1}"
                )
    return History(tuple(losses), time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 2048) -> float:
    """Measure the fraction of wrong answers in eval mode; the model's mode is put back.

    Args:
        model: Maps x [B, ...] to logits [B, classes].
        x: Inputs, [N, ...].
        y: Classes, [N] int64.
        batch_size: Samples per forward pass; bounds the memory.

    Returns:
        The error, 0 to 1.

    Raises:
        ValueError: If there are no samples.
    """
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"evaluate: x and y must be as many, at least 1, got {len(x)}, {len(y)}")
    wrong = 0
    with evaluating(model):
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            wrong += int((model(x[part]).argmax(1) != y[part]).sum())
    return wrong / len(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module of it back into its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
