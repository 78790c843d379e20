"""models: small networks for the tests of several rooms, and torchvision without its library."""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.nn import ResidualMLP, ResidualStack
from fastres.ops.mlp_stack_blocks import CODES, run_blocks
from fastres.sites import add


def torchvision() -> ModuleType:
    """Import torchvision; its PyPI build on a CPU torch lacks two schemas, which are stubbed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("no torchvision")
    try:
        importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", boxes)
        importlib.import_module("torchvision.models")
    return sys.modules["torchvision"]


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
    )


class InPlaceBlock(nn.Module):
    """Conv block that adds in place, as torchvision's do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(width, width), nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.branch(x))
        out += x
        return self.relu(out)


class PaddedBlock(nn.Module):
    """CIFAR block with option A: the skip is strided and padded with zero channels."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(a, b, stride)
        self.conv2 = nn.Sequential(nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b))
        self.stride, self.extra = stride, b - a

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        pad = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class MulPaddedBlock(PaddedBlock):
    """The same by the other widespread trick: concatenation with a zeroed copy."""

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        x = F.avg_pool2d(x, 2)
        return torch.cat((x, x.mul(0)), 1)


def cifar_resnet(block: type[PaddedBlock] = PaddedBlock) -> nn.Sequential:
    blocks = [block(4, 4, 1), block(4, 8, 2), block(8, 8, 1), block(8, 16, 2), block(16, 16, 1)]
    return nn.Sequential(conv(3, 4), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class UNet(nn.Module):
    """Residual blocks on the way down and up, long skips by concatenation or by addition."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.additive = additive
        self.stem = conv(3, 8)
        self.down = nn.ModuleList([PaddedBlock(8, 8, 1), PaddedBlock(8, 16, 2)])
        self.middle = InPlaceBlock(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join = conv(8 if additive else 16, 8)
        self.last = InPlaceBlock(8)

    def forward(self, x: Tensor) -> Tensor:
        long = self.down[0](self.stem(x))
        x = self.up(self.middle(self.down[1](long)))
        x = x + long if self.additive else torch.cat((x, long), 1)
        return self.last(self.join(x))


class Block(nn.Module):
    """x + W2 relu(W1 x), or around any other branch."""

    def __init__(self, width: int, branch: nn.Module | None = None) -> None:
        super().__init__()
        two = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.branch = two if branch is None else branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual_mlp(width: int = 8, blocks: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), *[Block(width) for _ in range(blocks)])


class Blocks(ResidualStack):
    """A ResidualStack whose blocks are separate operations."""

    def forward(self, x: Tensor, gates: None = None) -> Tensor:
        assert gates is None
        weights = (self.w1, self.b1, self.w2, self.b2)
        return run_blocks(x, weights, None, self.blocks, CODES[self.activation], add)


def stacks(blocks: int, activation: str = "relu") -> tuple[ResidualMLP, ResidualMLP]:
    """A ResidualMLP, and the same with separate blocks."""
    torch.manual_seed(0)
    fused = ResidualMLP(4, 3, width=8, blocks=blocks, hidden=6, activation=activation)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.3)  # the biases too
    separate = copy.deepcopy(fused)
    separate.stack.__class__ = Blocks
    return fused, separate
