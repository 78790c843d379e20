"""A model that is watched may be interrupted."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import Block
from record_models import vectors
from torch import Tensor, nn

from fastres.record import record


class Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.when = Block(4), ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.when == "between":
            raise KeyboardInterrupt
        y = self.block.branch(x)
        if self.when == "at the add":
            raise KeyboardInterrupt
        return x + y


@pytest.mark.parametrize("when", ["between", "at the add"])
@pytest.mark.parametrize("first", [True, False])
def test_after_a_keyboard_interrupt_recording_goes_on(when, first):
    model, x = Interrupted(), vectors()
    with record(model) as tape:
        if not first:
            model(x)
        model.when = when
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.when = ""
        for _ in range(3):  # of the caller, who need not know
            x = model.block(x) + model.block.branch(x)
        assert first or torch._C._len_torch_function_stack() == 0
        model(x)
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    assert tape.samples == (4 if first else 6)


class Breaking(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.calls += 1
        if self.calls % 2 == 0:
            raise KeyboardInterrupt
        return x


class Catching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Breaking(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        with contextlib.suppress(KeyboardInterrupt):
            x = self.inner(x)
        return x + self.last(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Catching(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = x + x.cos()
        return x + self.last(x)


def test_a_keyboard_interrupt_that_the_model_catches_is_its_own_affair():
    model = Around()
    with record(model) as tape:
        for _ in range(3):
            model(vectors())
    assert tape.names[0] == "inner.inner[0]"
    assert tape.names[3] == "Around"
    assert len(tape.names) == 4
    assert tape.samples == 6
