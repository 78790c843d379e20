"""paths_network: the ResNets for CIFAR-10 that the study looks at, with public weights or none."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from fastres.nn import CifarResNet, cifar_resnet

# Weights of akamaster/pytorch_resnet_cifar10, in the folder pretrained of the data, by depth.
FILES: Final = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}


def trained(depth: int, path: Path) -> CifarResNet:
    """Load the public weights, in eval mode.

    Args:
        depth: Layers, 20 or 56.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it does not hold the weights of this network.
    """
    return cifar_resnet(depth, weights=path).eval()


def untrained(depth: int, images: Tensor, seed: int) -> CifarResNet:
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
        network = cifar_resnet(depth)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of all that is seen, not of the latest
    with torch.no_grad():
        network.train()(images)
    return network.eval()
