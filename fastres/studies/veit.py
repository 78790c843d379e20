"""veit: lesions of a trained ResNet, blocks deleted and reordered (Veit et al. 2016, section 4)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import fastres
from fastres import plots, report
from fastres.analysis.lesion import delete, random_sets
from fastres.analysis.lesions import Lesions
from fastres.analysis.reordering import random_orders, reorder
from fastres.data import find_folder, read
from fastres.sites import Site, trace
from fastres.studies.paths import normalised
from fastres.studies.paths_network import FILES, trained
from fastres.studies.resuming import Form, Result, measure_all
from fastres.studies.veit_claims import summary, text
from fastres.studies.veit_networks import trained_here
from fastres.studies.veit_plain import LAYERS, control, delete_layers
from fastres.studies.veit_plots import figure
from fastres.studies.veit_report import CONTROLS, Part, part_of, rows_of

CALIBRATING: Final = 512  # training images that give batch norm new statistics
# What is done, and to how many blocks: first a little of everything, then what lies between.
PLANS: Final = {
    20: (
        ("single", 1),
        *(("several", 2), ("order", 2), ("recalibrated", 2), ("several", 4)),
        *(("order", 4), ("several", 3), ("order", 1)),
    ),
    56: (
        ("single", 1),
        *(("several", 5), ("order", 4), ("several", 10), ("order", 16), ("several", 2)),
        *(("order", 1), ("recalibrated", 5), ("several", 14), ("order", 8), ("several", 3)),
        *(("order", 2), ("several", 7)),
    ),
}
CONTROL: Final = (("plain", LAYERS), ("skips", LAYERS))  # trained on digits, their layers deleted


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data_root: str | None = None
    depth: int | None = None  # layers; None: 56, or 110 of the full study
    images: int | None = None  # of the test batch; None: 1000, or all of the full study
    draws: int = 10  # lesions of each size, orders of each number of swaps
    seed: int = 0
    full: bool = False  # train the networks of the paper on CIFAR-10, by the options that follow
    device: str = "cpu"
    epochs: int = 164
    training_images: int = 50_000  # where there are as many
    out: Path = Path("fastres-veit")
    fresh: bool = False  # do not take over parts that an earlier run has finished

    def __post_init__(self) -> None:
        if not self.full and self.layers not in FILES:
            known = ", ".join(map(str, FILES))
            raise ValueError(f"veit: depth must be one of {known}, got {self.depth}")
        for name, low, high in (
            ("images", 2, 10_000),
            ("draws", 1, 1000),
            ("seed", 0, 1 << 32),
            ("epochs", 1, 10_000),
            ("training_images", 2, 50_000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"veit: {name} must be {low} to {high}, got {value}")

    @property
    def layers(self) -> int:
        """Layers of the network whose blocks are deleted."""
        return self.depth or (110 if self.full else 56)

    @property
    def plan(self) -> tuple[tuple[str, int], ...]:
        """What is done, and to how many blocks, in order."""
        if not self.full:
            return (*PLANS[self.layers], *CONTROL)
        blocks = (self.layers - 2) // 2
        sizes = sorted({max(2, blocks * k // 54) for k in range(2, 21, 2)})
        several = [(k, n) for n in sizes for k in ("several", "recalibrated")]
        orders = [("order", swaps) for swaps in (1, 2, 4, 8, 16, 24)]
        others = [("plain", LAYERS), ("stochastic", 1), ("effective", 1)]
        return (("single", 1), *several, *orders, *others)


@dataclass(frozen=True)
class Study:
    """What is measured on: the network, its sites, and the images."""

    network: nn.Module
    sites: tuple[Site, ...]
    x: Tensor  # [N, 3, 32, 32]
    y: Tensor  # [N] int64
    training: tuple[Tensor, Tensor]  # [M, 3, 32, 32], [M] int64: some, or all of the full study
    checksum: str  # of images and weights


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
    """Delete and reorder blocks, and write the report after each part.

    Ctrl-C ends it early and leaves a whole report of the parts that are finished; the same options
    again go on from there.

    Args:
        options: What to run.
        say: Takes each line of text for the user.

    Returns:
        What was measured.

    Raises:
        ValueError: If an option or a data file is wrong.
        OSError: If a file is missing or the output folder cannot be written to.
    """
    study = prepare(options)
    return measure_all(
        FORM,
        options.plan,
        lambda key, _: measure(*key, study, options),
        _arguments(options, study),
        options.out,
        options.fresh,
        say,
    )


def _draw(out: Path, parts: Sequence[Part]) -> None:
    plots.save(figure(rows_of(parts)), out / "lesions.png")


FORM: Final = Form(Part.parse, summary, rows_of, text, _draw)


def prepare(options: Options) -> Study:
    """Read the images, and load the network or train it, and find the blocks."""
    if not options.full:
        weights = find_folder("veit", options.data_root) / "pretrained" / FILES[options.layers]
        fast = torch.channels_last  # a quarter less time than contiguous ones
        network: nn.Module = trained(options.layers, weights).to(memory_format=fast)  # type: ignore[call-overload]
    (train, classes), (test, labels) = read("cifar10", options.data_root)
    device = torch.device(options.device if options.full else "cpu")
    count = options.training_images if options.full else CALIBRATING
    tested = options.images or (10_000 if options.full else 1000)
    x, some = (
        normalised(part).to(device, memory_format=torch.channels_last)
        for part in (test[:tested], train[:count])
    )
    y, own = (torch.from_numpy(part).long().to(device) for part in (labels[:tested], classes))
    training = some, own[: len(some)]
    if options.full:
        report.prepare_folder(options.out)
        network = _trained("resnet", options, training)
    crc = 0 if options.full else zlib.crc32(weights.read_bytes())
    for tensor in (x, y, some):
        crc = zlib.crc32(tensor.contiguous().cpu().numpy().data, crc)
    return Study(network, tuple(trace(network, x[:1])), x, y, training, f"{crc:08x}")


def _trained(kind: str, options: Options, images: tuple[Tensor, Tensor]) -> nn.Module:
    """Train a network of the full study, or take it up where it was left."""
    if options.fresh:
        (options.out / f"{kind}.safetensors").unlink(missing_ok=True)
    network = trained_here(kind, options.layers, *images, options.epochs, options.seed, options.out)
    return network


def measure(kind: str, number: int, study: Study, options: Options) -> Part:
    """Measure one part."""
    model, x, y = study.network, study.x, study.y
    if kind in CONTROLS:
        return part_of(kind, number, _control(kind, study, options))
    names, seed = [site.name for site in study.sites], options.seed * 1000 + number
    if kind == "single":
        return part_of(kind, number, delete(model, x, y))
    if kind == "order":
        orders = random_orders(study.sites, [number], options.draws, seed)
        return part_of(kind, number, reorder(model, x, y, orders))
    sets = random_sets(names, [number], options.draws, seed)
    if kind == "several":
        return part_of(kind, number, delete(model, x, y, sets))
    some = study.training[0][:CALIBRATING]
    return part_of(kind, number, delete(model, x, y, sets, recalibrate=some))


def _control(kind: str, study: Study, options: Options) -> Lesions:
    """Train another network, and delete each of its layers or blocks."""
    if not options.full:
        return control(kind == "skips", options.seed)
    model = _trained(kind, options, study.training)
    if kind == "plain":
        assert isinstance(model, nn.Sequential)
        return delete_layers(model, study.x, study.y)
    return delete(model, study.x, study.y)


def _arguments(options: Options, study: Study) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished parts."""
    images = len(study.training[0])
    if options.full:
        weights = f"pre-activation, {options.epochs} epochs on {images} images"
    else:
        weights = f"weights {FILES[options.layers]}"
    return {
        "study": "veit",
        "network": f"ResNet-{options.layers}, {weights}",
        "projections": [site.name for site in study.sites if site.kind == "projection"],
        "blocks": len(study.sites),
        "images": f"test_batch, 0 to {len(study.x) - 1}",
        "recalibration": f"batch norm of {min(images, CALIBRATING)} training images",
        "draws": options.draws,
        "seed": options.seed,
        "checksum": study.checksum,
        "versions": [fastres.__version__, torch.__version__],
    }
