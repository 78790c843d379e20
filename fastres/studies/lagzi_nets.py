"""lagzi_nets: circles and networks of the study of residual dynamics, and how they train."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.adaptive_depth import AdaptiveDepth
from fastres.nn import LayerNetwork

LAYERS: Final = 15
THRESHOLD: Final = 0.01  # the paper's, per neuron on average
BATCH: Final = 100
Samples = tuple[Tensor, Tensor]  # x [N, ...], y [N]


def circles(count: int, source: torch.Generator) -> Samples:
    """Draw points [N, 2] on circles of radius 0.5 and 1, and which of them, [N]."""
    classes = torch.arange(count) % 2
    angle = 2 * torch.pi * torch.rand(count, generator=source)
    radius = 0.5 + 0.5 * classes
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), classes


def make_network(name: str, seed: int, sizes: tuple[int, int, int]) -> LayerNetwork:
    """Make a network, shared or own or mlp, of sizes inputs, classes, neurons."""
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator alone
        torch.manual_seed(seed)
        inputs, classes, width = sizes
        shared, residual = name == "shared", name != "mlp"
        model = LayerNetwork(inputs, classes, width, LAYERS, shared=shared, residual=residual)
        if not residual:
            _widen(model)
        return model


@torch.no_grad()
def _widen(model: LayerNetwork) -> None:
    """Start an MLP of sigmoids as one of tanh, or 15 layers pass no signal on and nothing trains.

    sigmoid(z) = (1 + tanh(z / 2)) / 2: weights of variance 16 / N, and biases that centre inputs.
    """
    for weight, bias in ((model.weight, model.bias), (model.head.weight, model.head.bias)):
        weight.normal_(std=4 / weight.size(-1) ** 0.5)
        bias.copy_(-weight.sum(-1) / 2)


def fit(
    model: LayerNetwork,
    train: Samples,
    epochs: int,
    lr: float,
    source: torch.Generator,
    adaptive: bool = False,
) -> list[int]:
    """Train in place by Adam on batches of 100; return the number of layers after each epoch."""
    x, y = train
    optimizer = torch.optim.Adam(model.train().parameters(), lr=lr, fused=True)
    control = AdaptiveDepth(model, x[:200], optimizer, threshold=THRESHOLD) if adaptive else None
    depths = []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=source).to(x.device)
        for chosen in order.split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if control is not None:
            control.step()
        depths.append(model.layers)
    return depths
