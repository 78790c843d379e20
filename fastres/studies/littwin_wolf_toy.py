"""littwin_wolf_toy: mixtures of Gaussians, and the networks that learn them (Littwin & Wolf 2016).

Figure 1d and 1e and appendix C of arXiv 1611.02525: 10 Gaussians in 50 dimensions, 10,000 samples,
10 layers of 20 ReLU units with a skip over all but the first, cross entropy, SGD on batches of 50.
What the paper does not say is chosen so that its theory can show. The classes lie apart, so that
training does not end at noise; the last layer starts small, or the untrained network would be sure
of wrong answers, and SGD would first shrink all branches; the steps are small, as in the theorems.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.sites import add

INPUTS: Final = 50
CLASSES: Final = 10
BATCH: Final = 50
NETWORKS: Final = ("scale", "batch norm", "plain")


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    layers: int = 10
    width: int = 20
    gaussians: int = 10  # of them, each of one class
    samples: int = 10_000
    spread: float = 1.0  # standard deviation of the class means, per dimension; of the noise: 1
    head: float = 0.1  # of the start that torch gives the last layer, how much
    epochs: int = 12
    lr: float = 0.002
    seeds: int = 3
    full: bool = False  # also train ResNet-32 on CIFAR-10, by the options that follow
    data_root: str | None = None
    device: str = "cpu"
    depth: int = 32
    images: int = 50_000  # of the training and the test half, where there are as many
    cifar_epochs: int = 164
    out: Path = Path("fastres-littwin-wolf")
    fresh: bool = False  # do not take over seeds that an earlier run has finished

    def __post_init__(self) -> None:
        for name, low, high in (
            ("layers", 2, 1000),
            ("width", 1, 10_000),
            ("gaussians", CLASSES, 10_000),
            ("samples", BATCH, 1 << 24),
            ("epochs", 1, 10_000),
            ("seeds", 1, 1000),
            ("images", BATCH, 50_000),
            ("cifar_epochs", 1, 10_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"littwin-wolf: {name} must be {low} to {high}, got {value}")
        for name in ("spread", "head", "lr"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"littwin-wolf: {name} must be above 0, got {getattr(self, name)}")


class Scale(nn.Module):
    """lambda x / sigma: sigma is the mean over units of their deviation in the batch (section 4).

    The paper's model of batch norm: one scale for a layer, no shift, nothing is centred. In eval
    mode sigma is the running mean of that of the batches, as in torch's batch norm.
    """

    sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("sigma", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, D] to [B, D]."""
        sigma = self.sigma
        if self.training:
            sigma = x.std(0, correction=0).mean()
            self.sigma += 0.1 * (sigma.detach() - self.sigma)
        return x * (self.weight / (sigma + 1e-5))


class Layer(nn.Module):
    """x + norm(relu(W x)); the first layer is without the skip."""

    def __init__(self, inputs: int, width: int, network: str, skip: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.norm: Scale | nn.BatchNorm1d | nn.Identity = nn.Identity()
        if network != "plain":
            self.norm = Scale() if network == "scale" else nn.BatchNorm1d(width)
        self.skip = skip
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")

    @property
    def scale(self) -> float:
        """Mean |weight| of the norm; 1 where there is none."""
        if isinstance(self.norm, nn.Identity):
            return 1.0
        return self.norm.weight.detach().abs().mean().item()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, inputs] to [B, width]."""
        out: Tensor = self.norm(F.relu(self.linear(x)))
        return add(x, out) if self.skip else out


def toy(options: Options, network: str, seed: int) -> nn.Sequential:
    """Make a network of NETWORKS; the caller's generator is left alone.

    Without batch norm the branches are scaled by 1 / sqrt(layers), or the stream would grow
    twofold in every layer and SGD diverge: the paper does not say what it does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = options.width
        first = Layer(INPUTS, width, network, skip=False)
        rest = [Layer(width, width, network, skip=True) for _ in range(options.layers - 1)]
        head = nn.Linear(width, CLASSES)
    with torch.no_grad():
        for layer in rest if network == "plain" else ():
            layer.linear.weight /= options.layers**0.5
        for parameter in head.parameters():
            parameter.mul_(options.head)
    return nn.Sequential(first, *rest, head)


def gaussians(options: Options, seed: int) -> tuple[Tensor, Tensor]:
    """Draw samples [N, 50] of a mixture of Gaussians, and their classes [N]."""
    source = torch.Generator().manual_seed(seed)
    count, shape = options.gaussians, (options.samples, INPUTS)
    means = options.spread * torch.randn(count, INPUTS, generator=source)
    which = torch.randint(count, shape[:1], generator=source)
    return means[which] + torch.randn(shape, generator=source), which % CLASSES
