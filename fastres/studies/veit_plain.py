"""veit_plain: the control, a plain network whose layers are deleted, and its twin with skips.

The control of Veit et al. (arXiv 1605.06431, section 4.2) is VGG of 15 layers with 128 channels
everywhere, so that a layer can be taken out of its middle. Their network has no public weights. By
default a narrow one is trained on digits of 8 by 8, and the same once more with a skip over every
layer that can be deleted; where the images are halved is our choice.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.lesion import wrong
from fastres.analysis.lesions import Lesions
from fastres.data import Data, load
from fastres.sites import add
from fastres.training import Recipe, evaluating, train

LAYERS: Final = 15  # 14 of convolutions, 1 linear
CHANNELS: Final = 32
RECIPE: Final = Recipe(epochs=12, batch_size=64, lr=2e-3)


class Layer(nn.Module):
    """relu(norm(conv(x))), or x + relu(norm(conv(x))); both leave the shape as it is."""

    def __init__(self, inputs: int, outputs: int, skip: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm, self.skip = nn.BatchNorm2d(outputs), skip
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, inputs, H, W] to [B, outputs, H, W]."""
        out = F.relu(self.norm(self.conv(x)))
        return add(x, out) if self.skip else out


def network(
    inputs: int, size: int, channels: int, skips: bool, layers: int = LAYERS
) -> nn.Sequential:
    """Make a control; weights are drawn from torch's global generator.

    Args:
        inputs: Channels of the images.
        size: Height and width; halved, after equal numbers of layers, until 4 to 7 are left.
        channels: Of every layer.
        skips: Whether every layer but the first has a skip.
        layers: How many, the last of them linear.
    """
    convolutions = layers - 1
    halvings = max(0, size.bit_length() - 3)
    every = -(-convolutions // (halvings + 1))
    parts: list[nn.Module] = [Layer(inputs, channels, False)]
    for place in range(1, convolutions):
        if place % every == 0:
            parts.append(nn.MaxPool2d(2))
        parts.append(Layer(channels, channels, skips))
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*parts, *tail)


@torch.no_grad()
def delete_layers(model: nn.Sequential, x: Tensor, y: Tensor) -> Lesions:
    """Evaluate a control with each of its layers but the first deleted, in eval mode.

    What a deleted layer was given goes on to the next: where it has a skip, that is the skip.
    """
    places = [i for i, part in enumerate(model) if isinstance(part, Layer)][1:]
    values = []
    with evaluating(model):
        stream = x
        for place, part in enumerate(model):
            if place in places:
                values.append(wrong(model[place + 1 :](stream), y))
            stream = part(stream)
    names = tuple(str(place) for place in places)
    sets = tuple((name,) for name in names)
    return Lesions(names, sets, wrong(stream, y), torch.stack(values))


def control(skips: bool, seed: int, data: Data | None = None, recipe: Recipe = RECIPE) -> Lesions:
    """Train a control, on digits where no data are given, and delete its layers.

    Raises:
        ModuleNotFoundError: If digits are needed and scikit-learn is missing.
    """
    data = load("digits") if data is None else data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data.train_x.size(1), data.train_x.size(2), CHANNELS, skips)
    train(model, data, recipe, seed=seed)
    return delete_layers(model, data.test_x, data.test_y)
