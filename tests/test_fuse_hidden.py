"""What a forward does besides its tensors is left as it is, or happens at every call."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from fuse_models import Akamaster, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import fastres

DRAWN = "its forward draws random numbers"
SWITCHED = "its forward switches gradients, autocast or checkpoints"


class Drawing(Akamaster):
    """Stochastic depth, by one of the generators."""

    draw = staticmethod(random.random)

    def forward(self, x):
        if self.training and self.draw() < 0.3:
            return x
        return super().forward(x)


class DrawingTorch(Drawing):
    draw = staticmethod(lambda: torch.rand(1).item())


class DrawingNumpy(Drawing):
    draw = staticmethod(np.random.rand)


class WithoutAutocast(Akamaster):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class WithoutGradients(Akamaster):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv1(x)
        return F.relu(x + self.bn2(self.conv2(x)))


class Decorated(Akamaster):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Checkpointed(Akamaster):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class ByChild(Akamaster):
    """Its dropout is switched by a child's mode."""

    def forward(self, x):
        x = F.dropout(x, 0.5, self.bn1.training)
        return F.relu(x + self.bn2(self.conv2(x)))


class ByBuffer(Akamaster):
    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x * self.factor.item())


class Named(nn.Module):
    """Its children have the names that the fused code uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.original = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x, fused=None, original=None):
        return F.relu(x + self.original(self.code(x)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Drawing, DRAWN),
        (DrawingTorch, DRAWN),
        (DrawingNumpy, DRAWN),
        (WithoutAutocast, SWITCHED),
        (WithoutGradients, SWITCHED),
        (Decorated, SWITCHED),
        (Checkpointed, SWITCHED),
        (ByChild, "its forward depends on its mode, training or eval"),
    ],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_what_a_graph_cannot_hold_is_left(kind, why, train):
    states = torch.get_rng_state(), random.getstate()
    model = nn.Sequential(*(kind(3, 3) for _ in range(4))).train(train)
    torch.set_rng_state(states[0])
    fusion = fastres.fuse(model)
    assert not fusion.fused
    assert len(fusion.left) == 4
    assert all(reason.startswith(why) for reason in fusion.left.values())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_caller_that_switches_gradients_off_for_its_stem_keeps_doing_so():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3)
            self.blocks = nn.ModuleList([Akamaster(6, 6), Akamaster(6, 6)])

        def forward(self, x):
            with torch.no_grad():
                x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

    model = Net().eval()
    assert set(fastres.fuse(model, images(), stacks=True).apart.values()) == {SWITCHED}
    model(images()).sum().backward()
    assert model.stem.weight.grad is None
    assert model.blocks[0].conv1.weight.grad is not None


def test_buffers_are_read_at_every_call():
    plain = nn.Sequential(ByBuffer(3, 3), ByBuffer(3, 3)).eval()
    fused = copy.deepcopy(plain)
    assert len(fastres.fuse(fused, images()).fused) == 2
    for model in (plain, fused):
        for block in model:
            block.factor.mul_(3)
    torch.testing.assert_close(fused(images()), plain(images()))


def test_names_of_children_and_arguments_are_free():
    plain = nn.Sequential(Named(), Named()).eval()
    fused = copy.deepcopy(plain)
    assert len(fastres.fuse(fused, images()).fused) == 2
    torch.testing.assert_close(fused(images()), plain(images()))
    torch.testing.assert_close(fused[0](images(), original=1), plain[0](images(), original=1))


def test_an_error_while_it_fuses_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(Akamaster(3, 3), Akamaster(3, 3))

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastres.fusing.verifying.Verified.difference", fail)
    with pytest.raises(KeyboardInterrupt):
        fastres.fuse(model, images())
    assert {type(block) for block in model} == {Akamaster}


def test_one_value_per_channel_is_refused_in_training():
    model = nn.Sequential(Akamaster(3, 3)).train()
    assert fastres.fuse(model).fused
    with pytest.raises(ValueError, match="more than one value per channel"):
        model(torch.randn(1, 3, 1, 1))


def test_a_class_with_a_state_of_its_own_is_left():
    class Stated(Akamaster):
        def __getstate__(self):
            return (self.__dict__, 1)

    (reason,) = fastres.fuse(nn.Sequential(Stated(3, 3)), images()).left.values()
    assert reason == "its class has a way of its own to be copied"
