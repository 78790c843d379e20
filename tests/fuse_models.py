"""fuse_models: residual networks as people write them, for the tests of fuse."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastres


class LambdaLayer(nn.Module):
    """As in akamaster/pytorch_resnet_cifar10."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def padded(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


class Akamaster(nn.Module):
    """A block as in akamaster/pytorch_resnet_cifar10, option A."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = LambdaLayer(padded)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Kuangliu(Akamaster):
    """A block as in kuangliu/pytorch-cifar: the skip is a convolution with its own batch norm."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__(inputs, width, stride)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )


class PreAct(nn.Module):
    """A block as in kuangliu/pytorch-cifar, pre-activated."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class Handwritten(nn.Module):
    """A block whose branch is a Sequential, with the skip's batch norm beside it."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)),
        )
        self.project = nn.Conv2d(inputs, width, 1, stride)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.add(self.norm(self.project(x)), self.branch(x)))


class Grouped(Akamaster):
    """A block with group norm: an add and a ReLU."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__(inputs, width, stride)
        self.bn1, self.bn2 = nn.GroupNorm(2, width), nn.GroupNorm(2, width)


class Linear(Akamaster):
    """A block without a ReLU at its end."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return out + self.shortcut(x)


KINDS = {
    Akamaster: "batch norm + add + ReLU",
    Kuangliu: "batch norm + add + ReLU",
    Handwritten: "batch norm + add + ReLU",
    fastres.nn.BasicBlock: "batch norm + add + ReLU",
    Linear: "batch norm + add",
    Grouped: "add + ReLU",
    PreAct: "add",
    fastres.nn.PreActBlock: "add",
}


def net(kind: type[nn.Module], seed: int = 0) -> nn.Sequential:
    """Return a network of three blocks, with batch norms as if it had been trained.

    No fewer channels: of 4, with AVX2 in channels_last, oneDNN 3.12 computes the weight gradient of
    a projection wrongly and writes past its memory (uxlfoundation/oneDNN issue 6035).
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), kind(8, 8), kind(8, 16, 2), kind(16, 16)
    ).append(nn.AdaptiveAvgPool2d(1))
    model.extend([nn.Flatten(), nn.Linear(16, 5)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def images(batch: int = 4, size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def twins(kind: type[nn.Module], **options) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a network, and a copy that is fused."""
    plain = net(kind)
    other = copy.deepcopy(plain)
    fusion = fastres.fuse(other, images(), **options)
    assert set(fusion.fused.values()) == {KINDS[kind]}
    assert fusion.fused.keys() == {"1", "2", "3"}
    return plain, other
