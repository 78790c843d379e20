"""cifar_training: networks trained on CIFAR-10 as He et al. 2016 do, epoch by epoch, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.checkpoint import load, restore_training, save, training_state
from fastres.files import alone_with
from fastres.formats import DataError
from fastres.gates import GatesLike, gate
from fastres.progress import bar


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum; the rate falls to a tenth at each drop (arXiv 1512.03385, section 4.2)."""

    epochs: int = 164
    drops: tuple[int, ...] = (82, 123)  # epochs: near 32k and 48k of 64k iterations
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    warm_up: int = 0  # iterations at a tenth of the rate; 400 for 110 layers

    def rate(self, epoch: int, iteration: int) -> float:
        """Return the rate of an iteration, both counted from 0."""
        fallen = sum(epoch >= drop for drop in self.drops)
        return self.lr * 0.1 ** (fallen or int(iteration < self.warm_up))


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pad images x [B, C, H, W] by 4, crop them at random, and flip half of them."""
    count, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    draws = torch.randint(9, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = draws[0] + torch.arange(height)  # [B, H]
    columns = draws[1] + torch.where(flipped, torch.arange(width).flip(0), torch.arange(width))
    sample = torch.arange(count)[:, None, None]
    where = [index.to(x.device) for index in (sample, rows[:, :, None], columns[:, None, :])]
    cut: Tensor = padded.permute(0, 2, 3, 1)[tuple(where)]  # [B, H, W, C]
    return cut.permute(0, 3, 1, 2)


def train_epochs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    schedule: Schedule,
    checkpoint: Path,
    notes: list[Any],
    seed: int = 0,
    gates: GatesLike | None = None,
) -> Iterator[int]:
    """Train a network, and stop at the start and after each epoch to give its number.

    What is there when the next number is asked for, `notes` included, is kept in the checkpoint. A
    later call with the same arguments takes it up from there, and gives the numbers that are left;
    order and crops depend on seed and epoch alone.

    Args:
        model: Maps [B, 3, H, W] to logits; trained in place.
        x: Images, [N, 3, H, W], on the model's device.
        y: Classes, [N] int64.
        schedule: How.
        checkpoint: A file, beside which nothing else is written.
        notes: The caller's, of what JSON can hold; filled from the checkpoint.
        seed: Of order and crops.
        gates: Scale the branches in every iteration, as `fastres.gate` does.

    Raises:
        FloatingPointError: If a loss is not finite.
        OSError: If the checkpoint cannot be written; one that was there stays as it was.
        ValueError: If it is damaged, or in use by another run.
    """
    optimiser = torch.optim.SGD(
        model.parameters(), schedule.lr, schedule.momentum,
        weight_decay=schedule.weight_decay, nesterov=schedule.nesterov,
    )  # fmt: skip
    size = sum(p.numel() for p in model.parameters())
    made_for = json.dumps({**asdict(schedule), "seed": seed, "images": len(x), "parameters": size})
    with alone_with(checkpoint):
        done = _load(checkpoint, made_for, model, optimiser, notes)
        if done < 0:
            yield 0
            _save(checkpoint, made_for, model, optimiser, notes, 0)
        for epoch in range(max(done, 0), schedule.epochs):
            _train_epoch(model, x, y, schedule, optimiser, epoch, seed, gates)
            yield epoch + 1
            _save(checkpoint, made_for, model, optimiser, notes, epoch + 1)


def _train_epoch(
    model: nn.Module, x: Tensor, y: Tensor, schedule: Schedule,
    optimiser: torch.optim.Optimizer, epoch: int, seed: int, gates: GatesLike | None,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    batches = torch.randperm(len(x), generator=generator).split(schedule.batch_size)  # type: ignore[no-untyped-call]
    model.train()
    gated = nullcontext() if gates is None else gate(model, gates, epoch * len(batches))
    with gated, bar(f"epoch {epoch + 1}", len(batches), unit="batch") as shown:
        for place, chosen in enumerate(batches):
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(epoch, epoch * len(batches) + place)
            part = chosen.to(x.device)
            optimiser.zero_grad()
            loss = F.cross_entropy(model(augmented(x[part], generator)), y[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            shown.update(1)
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"train_epochs: loss must stay finite, got {loss.item()}")


def _save(
    path: Path, made_for: str, model: nn.Module,
    optimiser: torch.optim.Optimizer, notes: list[Any], epoch: int,
) -> None:  # fmt: skip
    tensors, groups = training_state(model, optimiser)
    facts = {"made_for": made_for, "groups": groups, "notes": notes, "epoch": epoch}
    save(path, tensors, facts)


def _load(
    path: Path, made_for: str, model: nn.Module, optimiser: torch.optim.Optimizer, notes: list[Any]
) -> int:
    """Return how many epochs are done, -1 where not even the start is noted."""
    if not path.is_file():
        return -1
    tensors, facts = load(path)
    if facts.get("made_for") != made_for:
        return -1
    try:
        restore_training(model, optimiser, tensors, facts["groups"])
    except ValueError as error:
        raise DataError(path, "must be of the same model", error) from error
    notes[:] = facts["notes"]
    return int(facts["epoch"])
