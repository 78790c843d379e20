"""paths_network: the ResNets for CIFAR-10 of He et al. 2016, with public weights or untrained."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.formats import DataError

# Weights of akamaster/pytorch_resnet_cifar10, in the folder pretrained of the data, by depth.
FILES: Final = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}

# What torch.load and load_state_dict raise on files of anything else.
_NOT_WEIGHTS: Final = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


class Block(nn.Module):
    """relu(skip + two convolutions), the skip strided and padded with zero channels (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.extra = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, outputs // inputs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H, W], or half of H and W if outputs differ."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(x + branch)


class ResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks, with 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            later = [Block(outputs, outputs) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(Block(inputs, outputs), *later))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images x [B, 3, 32, 32] to logits [B, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


def trained(depth: int, path: Path) -> ResNet:
    """Load the public weights, in eval mode.

    Args:
        depth: Layers, 20 or 56.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it does not hold the weights of this network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data: there must be a file {path}")
    network = ResNet(depth)
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))["state_dict"]
        # They were saved from nn.DataParallel.
        network.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except _NOT_WEIGHTS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(path, f"must hold the weights of ResNet-{depth}", reason) from error
    return network.eval()


def untrained(depth: int, images: Tensor, seed: int) -> ResNet:
    """Draw weights as He et al. 2015 do (arXiv 1502.01852), in eval mode.

    Batch norm gets the statistics of the images: at mean 0 and variance 1, as it is made, it would
    normalise nothing, and the network would be another one than training starts from.

    Args:
        depth: Layers, 20 or 56.
        images: [N, 3, 32, 32].
        seed: Of the weights; the caller's generator is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(depth)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the statistics of all that is seen, not of the latest
        nn.init.zeros_(network.linear.bias)
    with torch.no_grad():
        network.train()(images)
    return network.eval()
