"""paths: the gradient of a trained ResNet by path length, exact and sampled (Veit et al. 2016)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres import plots
from fastres.data import find_folder, read
from fastres.formats import Bytes
from fastres.paths import path_gradients
from fastres.studies.paths_network import FILES, trained, untrained
from fastres.studies.paths_plots import figure
from fastres.studies.paths_report import NETWORKS, Part, rows_of, summarise, summary, text
from fastres.studies.resuming import Form, Result, measure_all

# What the public weights were trained with.
MEAN: Final = (0.485, 0.456, 0.406)
SCALE: Final = (0.229, 0.224, 0.225)
NORMALISED: Final = 256  # training images that give the untrained network its statistics


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data_root: str | None = None
    depth: int = 56  # layers
    batches: int = 8
    batch_size: int = 8  # test images
    draws: int = 4  # random signs, and paths of each length, per batch
    seed: int = 0
    out: Path = Path("fastres-paths")
    fresh: bool = False  # do not take over batches that an earlier run has finished

    def __post_init__(self) -> None:
        if self.depth not in FILES:
            known = ", ".join(map(str, FILES))
            raise ValueError(f"paths: depth must be one of {known}, got {self.depth}")
        for name, low, high in (
            ("batches", 1, 10_000),
            ("batch_size", 1, 10_000),
            ("draws", 1, 1 << 20),
            ("seed", 0, 1 << 32),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"paths: {name} must be {low} to {high}, got {value}")
        if self.images > 10_000:
            raise ValueError(
                f"paths: batches times batch_size must be at most 10000, got {self.images}"
            )

    @property
    def images(self) -> int:
        """How many test images there are in all batches."""
        return self.batches * self.batch_size


@dataclass(frozen=True)
class Study:
    """What is measured on: both networks, and the test images."""

    networks: dict[str, nn.Module]
    x: Tensor  # [N, 3, 32, 32]
    y: Tensor  # [N] int64
    checksum: str  # of images and weights


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
    """Measure both networks on every batch of test images; write the report after each.

    Ctrl-C ends it early and leaves a whole report of the batches that are finished; the same
    options again go on from there.

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
        [(network, batch) for batch in range(options.batches) for network in NETWORKS],
        lambda key, _: measure(*key, study, options),
        _arguments(options, study),
        options.out,
        options.fresh,
        say,
        "batches",
    )


def _draw(out: Path, parts: Sequence[Part]) -> None:
    rows = rows_of(parts)
    plots.save(figure(rows, summarise(rows, parts)), out / "paths.png")


FORM: Final = Form(Part.parse, summary, rows_of, text, _draw)


def prepare(options: Options) -> Study:
    """Load weights and images, and make the untrained network."""
    weights = find_folder("paths", options.data_root) / "pretrained" / FILES[options.depth]
    network = trained(options.depth, weights)
    (train, _), (test, labels) = read("cifar10", options.data_root)
    some, x = normalised(train[:NORMALISED]), normalised(test[: options.images])
    y = torch.from_numpy(labels[: options.images]).long()
    crc = zlib.crc32(weights.read_bytes())
    for tensor in (some, x, y):
        crc = zlib.crc32(tensor.contiguous().numpy().data, crc)
    networks = (network, untrained(options.depth, some, options.seed))
    return Study(dict(zip(NETWORKS, networks, strict=True)), x, y, f"{crc:08x}")


def normalised(images: Bytes) -> Tensor:
    """Scale images [N, 3, 32, 32] as those were that the public weights were trained with."""
    mean, scale = (torch.tensor(v)[:, None, None] for v in (MEAN, SCALE))
    return torch.from_numpy(images).float().div_(255).sub_(mean).div_(scale)


def alike(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Weigh the cross-entropy of each image so that all gradients are as long, the batch's 1.

    A trained network is sure of most images: their gradients are 1e-9 of those of the few that it
    gets wrong, and a plain mean would be a measurement of these. In float64, because what is sure
    to 1e-9 leaves nothing of 1 - p in float32.

    Args:
        network: In eval mode.
        x: Images, [B, C, H, W].
        y: Classes, [B] int64.

    Returns:
        The loss, of logits [B, classes].
    """

    def losses(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), y, reduction="none")

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(network(leaf)).sum(), leaf)
    norms = torch.linalg.vector_norm(gradient.double().flatten(1), dim=1)
    return lambda logits: (losses(logits) / norms).sum() / len(y) ** 0.5


def measure(network: str, batch: int, study: Study, options: Options) -> Part:
    """Measure one batch of one network with all three methods."""
    part = slice(batch * options.batch_size, (batch + 1) * options.batch_size)
    model, x, y = study.networks[network], study.x[part], study.y[part]
    with torch.no_grad():
        wrong = int((model(x).argmax(1) != y).sum())
    loss = alike(model, x, y)
    exact = path_gradients(model, x, loss)
    draws, seed = options.draws, options.seed * options.batches + batch
    energy = path_gradients(model, x, loss, method="energy", draws=draws, seed=seed)
    sampled = path_gradients(model, x, loss, method="sampled", draws=draws, seed=seed)
    return Part(
        network=network,
        batch=batch,
        wrong=wrong,
        sum_error=exact.sum_error,
        share=exact.shares.tolist(),
        norm=exact.norms.tolist(),
        energy=energy.energy.tolist(),
        mean_norm=sampled.mean_norm.tolist(),
    )


def _arguments(options: Options, study: Study) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished batches."""
    return {
        "study": "paths",
        "network": f"ResNet-{options.depth}, weights {FILES[options.depth]}",
        "untrained": f"He initialisation, batch norm of {NORMALISED} training images",
        "loss": "cross-entropy, images weighed to gradients of one length, eval mode",
        "where": "input",
        "images": f"test_batch, 0 to {options.images - 1}",
        "batches": options.batches,
        "batch_size": options.batch_size,
        "draws": options.draws,
        "seed": options.seed,
        "checksum": study.checksum,
        "versions": [fastres.__version__, torch.__version__],
    }
