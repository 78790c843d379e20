"""Training on CIFAR-10 goes on where it stopped, and each crop is one of its image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.studies.cifar_training import Schedule, augmented, train_epochs


def data(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.arange(count) % 10


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))


def test_a_crop_is_a_window_of_the_padded_image_or_of_its_mirror_image():
    x = data(60)[0]
    found = augmented(x, torch.Generator().manual_seed(1))
    padded = F.pad(x, (4, 4, 4, 4))
    mirrored = 0
    for image, wide in zip(found, padded, strict=True):
        windows = wide.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        plain = (windows == image).flatten(1).all(1).any()
        flipped = (windows.flip(-1) == image).flatten(1).all(1).any()
        assert plain or flipped
        mirrored += int(flipped)
    assert 15 < mirrored < 45


def test_the_rate_warms_up_and_falls_to_a_tenth_at_each_drop():
    schedule = Schedule(drops=(2, 4), warm_up=3)
    rates = [schedule.rate(epoch, 2 * epoch) for epoch in range(6)]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.001, 0.001])
    assert schedule.rate(1, 3) == pytest.approx(0.1)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, stop):
    x, y = data()
    schedule = Schedule(epochs=3, drops=(2,), batch_size=16)
    whole, again, notes = made(), made(), []
    for epoch in train_epochs(whole, x, y, schedule, tmp_path / "whole.pt", notes):
        notes.append({"epoch": epoch, "seen": [float(epoch)]})
    assert [note["epoch"] for note in notes] == [0, 1, 2, 3]
    kept: list[dict[str, int]] = []
    for epoch in train_epochs(again, x, y, schedule, tmp_path / "again.pt", kept):
        kept.append({"epoch": epoch})
        if epoch == stop + 1:
            break  # within the pass after: its note is not kept
    new, left = made(), []
    numbers = []
    for epoch in train_epochs(new, x, y, schedule, tmp_path / "again.pt", left):
        numbers.append(epoch)
        left.append({"epoch": epoch})
    assert numbers == list(range(stop + 1, 4))
    assert [note["epoch"] for note in left] == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), new.parameters(), strict=True))
    assert list(train_epochs(new, x, y, schedule, tmp_path / "again.pt", left)) == []


def test_a_checkpoint_of_other_arguments_is_not_taken_up(tmp_path):
    x, y = data()
    path = tmp_path / "one.pt"
    list(train_epochs(made(), x, y, Schedule(epochs=1), path, []))
    assert list(train_epochs(made(), x, y, Schedule(epochs=2), path, [])) == [0, 1, 2]
    assert list(train_epochs(made(), x, y, Schedule(epochs=2), path, [], seed=1)) == [0, 1, 2]
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert list(train_epochs(other, x, y, Schedule(epochs=2), path, [], seed=1)) == [0, 1, 2]


def test_blocks_are_gated_in_training_and_open_at_the_stops(tmp_path):
    x, y = data()
    model, steps = Gated(), []

    def gates(step: int) -> dict[str, float]:
        steps.append(step)
        return {"0": 0.0}

    schedule = Schedule(epochs=2, batch_size=10, weight_decay=0.0)
    before = model[0].branch.weight.detach().clone()
    for _ in train_epochs(model, x, y, schedule, tmp_path / "one.pt", [], gates=gates):
        assert not torch.equal(model[0](x), x)
    assert torch.equal(model[0].branch.weight, before)  # closed: it has no gradient
    assert steps == list(range(8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Gated(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Block(), nn.Flatten(), nn.Linear(192, 10))


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    x, y = data()
    with pytest.raises(FloatingPointError, match="train_epochs: loss must stay finite, got nan"):
        list(train_epochs(made(), x * torch.nan, y, Schedule(epochs=1), tmp_path / "a.pt", []))
