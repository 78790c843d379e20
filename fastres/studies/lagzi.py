"""lagzi: residuals as a transient, adaptive depth and noise (Lagzi, arXiv 2101.03009).

Section 3 of the paper: concentric circles with 3 neurons and 15 layers of one matrix, MNIST with
shared and with own weights, the shared ones unrolled to 1000 layers without training, layers
removed while residuals agree. The paper's optimiser, its input map and its protocol of noise are
not known to us; ours are Adam, a linear map with a sigmoid, and Gaussian noise on the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import fastres
from fastres import plots
from fastres.analysis.dynamics import (
    by_class,
    convergence,
    jacobian,
    noise_growth,
    residuals,
)
from fastres.data import load
from fastres.nn import LayerNetwork
from fastres.studies.lagzi_nets import THRESHOLD, Samples, circles, fit, make_network
from fastres.studies.lagzi_plots import figure
from fastres.studies.lagzi_report import SIGMAS, Part, rows_of, summary, text
from fastres.studies.resuming import Form, Result, measure_all
from fastres.training import evaluate

UNROLLED: Final = 1000
EPOCHS: Final = 60  # on circles
RATE: Final = 3e-2  # of Adam on circles
NEURONS: Final = 3  # on circles
RATES: Final = {"shared": 2e-3, "own": 2e-3, "mlp": 2e-4}  # on MNIST; at 2e-3 the MLP ends at 0.8


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data_root: str | None = None
    seeds: int = 3  # of the circles; MNIST is trained with the first
    width: int = 256  # neurons per layer on MNIST
    samples: int = 10_000  # images to train on
    epochs: int = 6
    full: bool = False  # the paper's sizes: 1064 neurons, all images
    device: str = "cpu"
    out: Path = Path("fastres-lagzi")
    fresh: bool = False  # do not take over parts that an earlier run has finished

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seeds", 1, 1000),
            ("width", 1, 1 << 14),
            ("samples", 100, 60_000),
            ("epochs", 1, 10_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"lagzi: {name} must be {low} to {high}, got {value}")
        if self.full:
            for name, value in (("width", 1064), ("samples", 60_000), ("epochs", 30)):
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Images:
    """MNIST, loaded once."""

    train: Samples
    test: Samples
    checksum: str


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
    """Train and measure part after part; write the report after each.

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
    """
    images = prepare(options)
    return measure_all(
        FORM,
        plan(options),
        lambda key, _: measure(*key, options, images),
        _arguments(options, images),
        options.out,
        options.fresh,
        say,
        device=torch.device(options.device),
    )


def _draw(out: Path, parts: Sequence[Part]) -> None:
    plots.save(figure(parts), out / "dynamics.png")


FORM: Final = Form(Part.parse, summary, rows_of, text, _draw)


def plan(options: Options) -> list[tuple[str, str, int]]:
    """List the parts: what, which network, seed."""
    circles = [
        (kind, network, seed)
        for kind in ("circles", "adaptive")
        for network in ("shared", "own")
        for seed in range(options.seeds)
    ]
    return [*circles, *(("mnist", network, 0) for network in RATES)]


def prepare(options: Options) -> Images:
    """Load MNIST."""
    data = load("mnist", options.data_root)
    few, device = options.samples, options.device
    train = data.train_x[:few].to(device), data.train_y[:few].to(device)
    return Images(train, (data.test_x.to(device), data.test_y.to(device)), data.checksum())


def measure(kind: str, network: str, seed: int, options: Options, images: Images) -> Part:
    """Measure one part."""
    if kind == "mnist":
        return _mnist(network, seed, options, images)
    source = torch.Generator().manual_seed(seed)
    train, test = circles(1000, source), circles(1000, source)
    model = make_network(network, seed, (2, 2, NEURONS))
    depths = fit(model, train, EPOCHS, RATE, source, kind == "adaptive")
    y = residuals(model, test[0])
    return Part(
        kind=kind,
        network=network,
        seed=seed,
        error=evaluate(model, *test),
        depths=depths,
        change=convergence(y).tolist(),
        spread=by_class(y, test[1]).spread.mean((1, 2)).tolist(),
        ends=by_class(y, test[1]).mean[-1].tolist(),
    )


def _mnist(network: str, seed: int, options: Options, images: Images) -> Part:
    """Train on MNIST; follow residuals, noise, and shared layers to depth 1000."""
    x, classes = images.test
    model = make_network(network, seed, (x[0].numel(), 10, options.width)).to(options.device)
    source = torch.Generator().manual_seed(seed)
    depths = fit(model, images.train, options.epochs, RATES[network], source)
    error = evaluate(model, x, classes)
    noise = torch.randn(x.shape, generator=source).to(x)
    errors = [evaluate(model, x + sigma * noise, classes) for sigma in SIGMAS]
    few, labels = x[:1000], classes[:1000]
    with torch.no_grad():
        start = model.start(few)
        noisy = model.start(few + 0.5 * noise[:1000])
    found: dict[str, Any] = {}
    if network != "mlp":
        y = residuals(model, few)
        found["change"] = convergence(y).tolist()
        found["spread"] = by_class(y, labels).spread.mean((1, 2)).tolist()
    if network == "shared":
        found |= _unrolled(model, start, labels)
    return Part(
        kind="mnist",
        network=network,
        seed=seed,
        error=error,
        depths=depths,
        noise_error=errors,
        noise_growth=noise_growth(model, start, noisy - start).relative.tolist(),
        **found,
    )


@torch.no_grad()
def _unrolled(model: LayerNetwork, start: Tensor, classes: Tensor) -> dict[str, Any]:
    """Run shared layers to depth 1000 in one call, and look at the last residual of each class."""
    trained, model.layers = model.layers, UNROLLED
    x = model.run(start)
    model.layers = trained
    weight, bias = model.of_layer(0)
    y = torch.sigmoid(x @ weight.T + bias)
    last = by_class(y[None], classes)
    w = weight.double().cpu().numpy()
    leading = [jacobian(w, mean.cpu().numpy()) for mean in last.mean[0]]
    return {
        "late_change": (y - torch.sigmoid((x + y) @ weight.T + bias)).abs().mean().item(),
        "late_spread": last.spread.mean().item(),
        "eigenvalues": [
            torch.linalg.eigvals(torch.from_numpy(j)).real.max().item() for j in leading
        ],
    }


def _arguments(options: Options, images: Images) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished parts."""
    names = ("seeds", "width", "samples", "epochs", "device")
    return {
        "study": "lagzi",
        **{name: getattr(options, name) for name in names},
        "rates": RATES,
        "circles": {"epochs": EPOCHS, "rate": RATE, "threshold": THRESHOLD},
        "checksum": images.checksum,
        "versions": [fastres.__version__, torch.__version__],
    }
