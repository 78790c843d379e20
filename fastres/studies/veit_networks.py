"""veit_networks: the networks of the paper, trained here.

The networks of Veit et al. (arXiv 1605.06431, section 4), for `fastres study veit --full`: ResNet
of 110 layers with pre-activation, the same with stochastic depth, the same with 23 of its 54 blocks
open in each mini-batch, and VGG of 15 layers with 128 channels. All are trained alike (He et al.
2016); the paper does not say how VGG was. Hours on a GPU; each goes on after its last epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from fastres.gates import GatesLike
from fastres.nn import PreActBlock, cifar_resnet
from fastres.schedules import RandomBlocks, StochasticDepth
from fastres.sites import trace
from fastres.studies.cifar_training import Schedule, train_epochs
from fastres.studies.veit_plain import network

CHANNELS: Final = 128  # of VGG
KEPT: Final = 23 / 54  # of the blocks, section 4.4
WARM_UP: Final = 400  # iterations at a tenth of the rate, for more than 100 layers


def trained_here(
    kind: str, depth: int, x: Tensor, y: Tensor, epochs: int, seed: int, out: Path
) -> nn.Module:
    """Train a network, or take it up from its checkpoint in the output folder.

    Args:
        kind: "resnet", "stochastic", "effective" or "plain".
        depth: Layers of the ResNets.
        x: Images, [N, 3, 32, 32], on the device to train on.
        y: Classes, [N] int64.
        epochs: How many; the rate falls at a half and three quarters of them.
        seed: Of weights, order, crops and gates.
        out: The folder.

    Returns:
        The network in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "plain":
            model: nn.Module = network(3, x.size(-1), CHANNELS, skips=False)
        else:
            model = cifar_resnet(depth, preactivation=True)
    model.to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = Schedule(
        epochs=epochs,
        drops=(epochs // 2, epochs * 3 // 4),
        warm_up=WARM_UP if kind != "plain" and depth > 100 else 0,
    )
    gates = _gates(kind, model, x, seed)
    for _ in train_epochs(model, x, y, schedule, out / f"{kind}.safetensors", [], seed, gates):
        pass
    if isinstance(gates, StochasticDepth):
        with torch.no_grad():  # at test time a branch weighs as often as it was open
            for name, survival in gates.expected.items():
                block = model.get_submodule(name)
                assert isinstance(block, PreActBlock)
                block.conv2.weight.mul_(survival)
    return model.eval()


def _gates(kind: str, model: nn.Module, x: Tensor, seed: int) -> GatesLike | None:
    """Choose the blocks of each mini-batch."""
    if kind in ("resnet", "plain"):
        return None
    sites = trace(model.eval(), x[:2])
    if kind == "stochastic":
        return StochasticDepth(sites, seed=seed)
    return RandomBlocks(sites, keep=max(1, round(KEPT * len(sites))), seed=seed)
