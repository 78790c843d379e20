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
from fastres import plots
from fastres.analysis.lesion import delete, random_sets
from fastres.analysis.reordering import random_orders, reorder
from fastres.data import find_folder, read
from fastres.sites import Site, trace
from fastres.studies.paths import normalised
from fastres.studies.paths_network import FILES, trained
from fastres.studies.resuming import Form, Result, measure_all
from fastres.studies.veit_plots import figure
from fastres.studies.veit_report import Part, part_of, rows_of, summary, text

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


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data_root: str | None = None
    depth: int = 56  # layers
    images: int = 1000  # of the test batch
    draws: int = 3  # lesions of each size, orders of each number of swaps
    seed: int = 0
    out: Path = Path("fastres-veit")
    fresh: bool = False  # do not take over parts that an earlier run has finished

    def __post_init__(self) -> None:
        if self.depth not in FILES:
            known = ", ".join(map(str, FILES))
            raise ValueError(f"veit: depth must be one of {known}, got {self.depth}")
        for name, low, high in (("images", 2, 10_000), ("draws", 1, 1000), ("seed", 0, 1 << 32)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"veit: {name} must be {low} to {high}, got {value}")


@dataclass(frozen=True)
class Study:
    """What is measured on: the network, its sites, and the images."""

    network: nn.Module
    sites: tuple[Site, ...]
    x: Tensor  # [N, 3, 32, 32]
    y: Tensor  # [N] int64
    calibrating: Tensor  # [M, 3, 32, 32]
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
        PLANS[options.depth],
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
    """Load weights and images, and find the blocks."""
    weights = find_folder("veit", options.data_root) / "pretrained" / FILES[options.depth]
    fast = torch.channels_last  # a quarter less time than contiguous ones
    network = trained(options.depth, weights).to(memory_format=fast)  # type: ignore[call-overload]
    (train, _), (test, labels) = read("cifar10", options.data_root)
    x, some = (
        normalised(part).contiguous(memory_format=fast)
        for part in (test[: options.images], train[:CALIBRATING])
    )
    y = torch.from_numpy(labels[: options.images]).long()
    crc = zlib.crc32(weights.read_bytes())
    for tensor in (x, y, some):
        crc = zlib.crc32(tensor.contiguous().numpy().data, crc)
    return Study(network, tuple(trace(network, x[:1])), x, y, some, f"{crc:08x}")


def measure(kind: str, number: int, study: Study, options: Options) -> Part:
    """Measure one part."""
    model, x, y = study.network, study.x, study.y
    names, seed = [site.name for site in study.sites], options.seed * 1000 + number
    if kind == "single":
        return part_of(kind, number, delete(model, x, y))
    if kind == "order":
        orders = random_orders(study.sites, [number], options.draws, seed)
        return part_of(kind, number, reorder(model, x, y, orders))
    sets = random_sets(names, [number], options.draws, seed)
    if kind == "several":
        return part_of(kind, number, delete(model, x, y, sets))
    return part_of(kind, number, delete(model, x, y, sets, recalibrate=study.calibrating))


def _arguments(options: Options, study: Study) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished parts."""
    return {
        "study": "veit",
        "network": f"ResNet-{options.depth}, weights {FILES[options.depth]}",
        "projections": [site.name for site in study.sites if site.kind == "projection"],
        "blocks": len(study.sites),
        "images": f"test_batch, 0 to {options.images - 1}",
        "recalibration": f"batch norm of {CALIBRATING} training images",
        "draws": options.draws,
        "seed": options.seed,
        "checksum": study.checksum,
        "versions": [fastres.__version__, torch.__version__],
    }
