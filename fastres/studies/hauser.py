"""hauser: the perturbation of identity against the number of blocks (Hauser 2019).

The paper (arXiv 1902.04106), of which we know the abstract: residual networks of 6 to 300 blocks on
MNIST and CIFAR-10, the mean scaled perturbation roughly inversely proportional to the number of
blocks, and a rule that stops where it is below epsilon. Blocks, widths and training are ours, and
each setting is measured, with its exponent, interval and local exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres import plots
from fastres.analysis.branch_weights import block_weights, branch_weights
from fastres.data import Data, load
from fastres.nn import CifarResNet, ResidualMLP, cifar_resnet
from fastres.record import Tape, record
from fastres.studies.hauser_plots import figure
from fastres.studies.hauser_report import Part, rows_of, summary, text
from fastres.studies.resuming import Form, Result, measure_all
from fastres.training import Recipe, evaluate, evaluating, train

WIDTH: Final = 32  # of the MLPs
DECAYS: Final = (0.01, 3.0, 10.0)  # of AdamW at 6 blocks; convolutions have the first alone


class Setting(NamedTuple):
    """One curve: a network, its data and its weight decay."""

    network: str  # mlp or conv
    data: str
    decay: float


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data_root: str | None = None
    data: tuple[str, ...] = ("mnist", "cifar10")
    blocks: tuple[int, ...] = (6, 12, 30, 60, 120, 300)
    conv_blocks: tuple[int, ...] = (6, 12, 24)  # three stages of as many blocks: multiples of 3
    samples: int = 5000  # images to train MLPs on; convolutions a fifth of them, at 16 x 16
    epochs: int = 8  # of the MLPs; convolutions half of them
    seeds: int = 3
    full: bool = False  # all images, at 32 x 32; convolutions as deep as MLPs
    device: str = "cpu"
    out: Path = Path("fastres-hauser")
    fresh: bool = False  # do not take over networks that an earlier run has finished

    def __post_init__(self) -> None:
        if not self.data or set(self.data) - {"mnist", "cifar10"}:
            raise ValueError(f"hauser: data must be mnist, cifar10 or both, got {self.data}")
        if any(value < 1 for value in self.blocks):
            raise ValueError(f"hauser: blocks must be >= 1, got {self.blocks}")
        if any(value < 6 or value % 3 for value in self.conv_blocks):
            found = self.conv_blocks
            raise ValueError(f"hauser: conv_blocks must be multiples of 3 from 6 up, got {found}")
        for name, low, high in (("samples", 10, 60_000), ("epochs", 1, 10_000), ("seeds", 1, 1000)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"hauser: {name} must be {low} to {high}, got {value}")
        if self.full:
            for name, setting in (
                ("samples", 60_000),
                ("epochs", 40),
                ("conv_blocks", self.blocks),
            ):
                object.__setattr__(self, name, setting)


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
    """Train and measure every network; write the report after each.

    Ctrl-C ends it early and leaves a whole report of what is finished; the same options again go
    on from there.

    Args:
        options: What to run.
        say: Takes each line of text for the user.

    Returns:
        What was measured.

    Raises:
        ValueError: If an option or a data file is wrong.
        OSError: If a file is missing or the output folder cannot be written to.
        FloatingPointError: If a training diverges.
    """
    data = {name: load(name, options.data_root) for name in options.data}
    return measure_all(
        FORM,
        plan(options),
        lambda key, _: measure(Setting(*key[:3]), *key[3:], options, data[key[1]]),
        _arguments(options, data),
        options.out,
        options.fresh,
        say,
        "networks",
        torch.device(options.device),
    )


def _draw(out: Path, parts: Sequence[Part]) -> None:
    plots.save(figure(parts), out / "depth.png")


FORM: Final = Form(Part.parse, summary, rows_of, text, _draw)


def plan(options: Options) -> list[tuple[str, str, float, int, int]]:
    """List the networks, setting, seed, blocks: MLPs first, then convolutions, seed after seed."""
    mlps = [Setting("mlp", data, decay) for data in options.data for decay in DECAYS]
    convs = [Setting("conv", data, DECAYS[0]) for data in options.data]
    return [
        (*setting, seed, blocks)
        for settings, depths in ((mlps, options.blocks), (convs, options.conv_blocks))
        for seed in range(options.seeds)
        for setting in settings
        for blocks in depths
    ]


def measure(setting: Setting, seed: int, blocks: int, options: Options, data: Data) -> Part:
    """Train one network, and measure it on 1000 test images in eval mode."""
    conv, device = setting.network == "conv", torch.device(options.device)
    small = _for_convolutions(data, options) if conv else _first(data, options.samples)
    x, y = small.test_x.to(device), small.test_y.to(device)
    model = make_network(setting, seed, blocks, small).to(device)
    start, weights = recorded(model, x).mean_scaled, block_weights(model)
    # As branches scale by 1 / sqrt(L), so does the best rate of Adam (arXiv 2310.02244); what AdamW
    # takes off the weights in a step, rate times decay, is kept the same at every depth.
    rate = 3e-3 if conv else 7.5e-3 / math.sqrt(blocks)
    recipe = Recipe(
        epochs=-(-options.epochs // 2) if conv else options.epochs,
        batch_size=32 if conv else 128,
        lr=rate,
        weight_decay=setting.decay * (1 if conv else math.sqrt(blocks / 6)),
    )
    train(model, small, recipe, seed=seed, device=device)
    tape, found = recorded(model, x), branch_weights(weights, block_weights(model))
    return Part(
        *setting,
        seed=seed,
        blocks=blocks,
        error=evaluate(model, x, y),
        absolute=tape.mean_absolute,
        scaled=tape.mean_scaled,
        scaled_start=start,
        norm=found.norm,
        distance=found.distance,
        roughness=found.roughness,
        profile=tape.scaled.tolist(),
    )


def make_network(setting: Setting, seed: int, blocks: int, data: Data) -> ResidualMLP | CifarResNet:
    """Make a network of one setting; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if setting.network == "mlp":
            return ResidualMLP(data.features, data.classes, WIDTH, blocks)
        return cifar_resnet(2 * blocks + 2, data.classes, preactivation=True)


def recorded(model: nn.Module, x: Tensor) -> Tape:
    """Record a model in eval mode on x [N, ...]."""
    with torch.no_grad(), evaluating(model), record(model) as tape:
        for part in x.split(250):  # type: ignore[no-untyped-call]
            model(part)
    return tape


def _first(data: Data, samples: int) -> Data:
    """Keep the first training images, and 1000 to test on."""
    return replace(
        data,
        train_x=data.train_x[:samples],
        train_y=data.train_y[:samples],
        test_x=data.test_x[:1000],
        test_y=data.test_y[:1000],
    )


def _for_convolutions(data: Data, options: Options) -> Data:
    """Bring images to three channels and 32 x 32, and, unless full, fewer and to 16 x 16."""
    small = _first(data, options.samples if options.full else -(-options.samples // 5))

    def shaped(x: Tensor) -> Tensor:
        edge = (32 - x.size(-1)) // 2
        x = F.pad(x, (edge,) * 4).expand(-1, 3, -1, -1)
        return x if options.full else F.avg_pool2d(x, 2)

    return replace(small, train_x=shaped(small.train_x), test_x=shaped(small.test_x))


def _arguments(options: Options, data: dict[str, Data]) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished networks."""
    names = ("samples", "epochs", "full", "device")
    return {  # neither seeds nor depths: more of them go on from what is there
        "study": "hauser",
        **{name: getattr(options, name) for name in names},
        "data": list(options.data),
        "width": WIDTH,
        "decays": list(DECAYS),
        "checksums": {name: each.checksum() for name, each in data.items()},
        "versions": [fastres.__version__, torch.__version__],
    }
