"""training: minibatch training of a classifier, the same bit for bit under the same seed on CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.checkpoint import load, restore_training, save, training_state
from fastres.data import Data
from fastres.files import alone_with
from fastres.formats import DataError
from fastres.gates import GatesLike, gate, gates_at
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
    checkpoint: Path | None = None,
) -> History:
    """Train a classifier in place on the training half of a data set.

    The same seed, model and number of threads give the same weights bit for bit on CPU, also where
    the training was stopped and went on from its checkpoint.

    Args:
        model: Maps [B, C, H, W] to logits [B, classes]; moved to the device.
        data: The data set.
        recipe: How; Recipe() if None.
        seed: Of the order of the minibatches, an own generator.
        device: Where to train.
        gates: Scale the branches in every step, as `fastres.gate` does; None: nothing is scaled.
            With a checkpoint a schedule is asked for step 0 once more: those gates name the run.
        progress: Label of a progress bar on stderr; None for no bar.
        checkpoint: A file that keeps the training after each epoch; where it is there, the training
            goes on from it, with the random numbers of then. None: nothing is kept.

    Returns:
        The mean loss of each epoch, and the seconds that this call took.

    Raises:
        ValueError: If the data set has no training samples, or the checkpoint is damaged, or of a
            training with other arguments, or in use by another run.
        OSError: If the checkpoint cannot be written; one that was there stays as it was.
        FloatingPointError: If the loss of an epoch is not finite.
        ModuleNotFoundError: With a checkpoint, without safetensors.
    """
    if len(data.train_x) == 0:
        raise ValueError("train: data must have training samples, got 0")
    with nullcontext() if checkpoint is None else alone_with(checkpoint):
        return _train(model, data, recipe or Recipe(), seed, device, gates, progress, checkpoint)


def _train(
    model: nn.Module, data: Data, recipe: Recipe, seed: int, device: str | torch.device,
    gates: GatesLike | None, progress: str | None, checkpoint: Path | None,
) -> History:  # fmt: skip
    count = len(data.train_x)
    x, y = data.train_x.to(device), data.train_y.to(device)
    model.to(device).train()
    batches = math.ceil(count / recipe.batch_size)
    step = Stepper(model, recipe, recipe.epochs * batches)
    order = torch.Generator().manual_seed(seed)
    kept = None
    if checkpoint is not None:
        kept = _Kept(checkpoint, step, order, _run(data, recipe, seed, gates))
    losses, start = [] if kept is None else kept.losses(), time.perf_counter()
    done = len(losses) * batches
    gated = nullcontext() if gates is None else gate(model, gates, step=done)
    with gated, bar(progress, recipe.epochs * batches - done) as shown:
        for epoch in range(len(losses), recipe.epochs):
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
            if kept is not None:
                kept.keep(losses)
    return History(tuple(losses), time.perf_counter() - start)


def _run(data: Data, recipe: Recipe, seed: int, gates: GatesLike | None) -> dict[str, Any]:
    """All that decides what a training does, but for the model: its tensors must fit.

    Of gates it is those of the first step.
    """
    first = {} if gates is None else gates_at(gates, 0)
    return {
        "data": data.checksum(),
        **asdict(recipe),
        "seed": seed,
        "torch": torch.__version__,
        "gates": {name: torch.as_tensor(value).tolist() for name, value in first.items()},
    }


class _Kept:
    """The file that keeps a training: after an epoch, all that the next ones depend on."""

    def __init__(
        self, path: Path, stepper: Stepper, order: torch.Generator, run: dict[str, Any]
    ) -> None:
        self.path, self.stepper, self.order, self.run = path, stepper, order, run

    def keep(self, losses: Sequence[float]) -> None:
        """Write the file."""
        step = self.stepper
        tensors, groups = training_state(step.model, step.optimizer)
        tensors |= {"order": self.order.get_state(), "random": torch.get_rng_state()}
        facts = {"groups": groups, "schedule": step.schedule.state_dict(), "losses": list(losses)}
        save(self.path, tensors, {**facts, "run": self.run})

    def losses(self) -> list[float]:
        """Go to where the file is, and return the losses until then; [] where there is none."""
        if not self.path.exists():
            return []
        tensors, facts = load(self.path)
        if facts.get("run") != self.run:
            rule = "must be of a training with the same arguments"
            raise DataError(self.path, rule, facts.get("run"))
        step = self.stepper
        try:
            restore_training(step.model, step.optimizer, tensors, facts["groups"])
        except ValueError as error:
            raise DataError(self.path, "must be of the same model", error) from error
        step.schedule.load_state_dict(facts["schedule"])
        self.order.set_state(tensors["order"])
        torch.set_rng_state(tensors["random"])
        return list(facts["losses"])


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
