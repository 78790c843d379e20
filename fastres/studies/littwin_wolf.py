"""littwin_wolf: does the ensemble of paths deepen in training? The toy of Littwin & Wolf 2016.

Their toy (arXiv 1611.02525, figure 1d and 1e, appendix C): 10 Gaussians in 50 dimensions, 10,000
samples, 10 layers of 20 ReLU units with a skip over all but the first, with batch norm after the
ReLU or without, SGD on batches of 50. Learning rate, epochs and the spread of the class means are
not given; they are Options here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres import plots
from fastres.analysis.depth_tracker import DepthTracker
from fastres.sites import add
from fastres.studies.littwin_wolf_plots import figure
from fastres.studies.littwin_wolf_report import Part, rows_of, summary, text
from fastres.studies.resuming import Form, Result, measure_all

INPUTS: Final = 50
CLASSES: Final = 10
BATCH: Final = 50
NETWORKS: Final = ("batch norm", "plain")


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    layers: int = 10
    width: int = 20
    gaussians: int = 10  # of them, each of one class
    samples: int = 10_000
    spread: float = 0.5  # standard deviation of the class means, per dimension; of the noise: 1
    epochs: int = 10
    lr: float = 0.05
    seeds: int = 3
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
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"littwin-wolf: {name} must be {low} to {high}, got {value}")
        for name in ("spread", "lr"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"littwin-wolf: {name} must be above 0, got {getattr(self, name)}")


class Layer(nn.Module):
    """x + norm(relu(W x)); the first layer is without the skip."""

    def __init__(self, inputs: int, width: int, norm: bool, skip: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width, bias=False)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.skip = skip
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, inputs] to [B, width]."""
        out: Tensor = self.norm(F.relu(self.linear(x)))
        return add(x, out) if self.skip else out


def toy(options: Options, norm: bool, seed: int) -> nn.Sequential:
    """Make the network; the caller's generator is left alone.

    Without batch norm the branches are scaled by 1 / sqrt(layers), or the stream would grow
    twofold in every layer and SGD diverge: the paper does not say what it does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = options.width
        first = Layer(INPUTS, width, norm, skip=False)
        rest = [Layer(width, width, norm, skip=True) for _ in range(options.layers - 1)]
        if not norm:
            for layer in rest:
                layer.linear.weight.data /= options.layers**0.5
        return nn.Sequential(first, *rest, nn.Linear(width, CLASSES))


def gaussians(options: Options, seed: int) -> tuple[Tensor, Tensor]:
    """Draw samples [N, 50] of a mixture of Gaussians, and their classes [N]."""
    source = torch.Generator().manual_seed(seed)
    count, shape = options.gaussians, (options.samples, INPUTS)
    means = options.spread * torch.randn(count, INPUTS, generator=source)
    which = torch.randint(count, shape[:1], generator=source)
    return means[which] + torch.randn(shape, generator=source), which % CLASSES


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
    """Train both networks with every seed; write the report after each.

    Ctrl-C ends it early and leaves a whole report of what is finished; the same options again go
    on from there.

    Args:
        options: What to run.
        say: Takes each line of text for the user.

    Returns:
        What was measured.

    Raises:
        ValueError: If an option is wrong.
        OSError: If the output folder cannot be written to.
        FloatingPointError: If a loss is not finite.
    """
    return measure_all(
        FORM,
        [(network, seed) for seed in range(options.seeds) for network in NETWORKS],
        lambda key, _: measure(*key, options),
        _arguments(options),
        options.out,
        options.fresh,
        say,
        "networks",
    )


def _draw(out: Path, parts: Sequence[Part]) -> None:
    plots.save(figure(parts), out / "deepening.png")


FORM: Final = Form(Part.parse, summary, rows_of, text, _draw)


def measure(network: str, seed: int, options: Options) -> Part:
    """Train one network, and measure it before the first and after every epoch."""
    x, y = gaussians(options, seed)
    model = toy(options, network == "batch norm", seed)
    fixed = slice(0, 256)
    tracker = DepthTracker(model, x[fixed], lambda out: F.cross_entropy(out, y[fixed]))
    optimiser = torch.optim.SGD(model.parameters(), lr=options.lr)
    order = torch.Generator().manual_seed(seed)
    scales, norms, errors = [], [], []

    def note(epoch: int) -> None:
        tracker.measure(epoch, exact=True)
        layers = [m for m in model if isinstance(m, Layer)]
        scales.append([_scale(layer.norm) for layer in layers])
        squares = sum(layer.linear.weight.detach().square().sum().item() for layer in layers)
        norms.append(squares**0.5)
        model.eval()
        with torch.no_grad():
            errors.append((model(x).argmax(1) != y).float().mean().item())
        model.train()

    model.train()
    with torch.no_grad():  # batch norm as made normalises nothing: not what training starts from
        for part in x.split(BATCH)[:100]:  # type: ignore[no-untyped-call]
            model(part)
    note(0)
    for epoch in range(1, options.epochs + 1):
        shuffled = torch.randperm(len(x), generator=order)
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = shuffled[start : start + BATCH]
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"littwin-wolf: loss must stay finite, got {loss.item()}")
        note(epoch)
    return Part(
        network=network,
        seed=seed,
        scale=scales,
        weight_norm=norms,
        error=errors,
        beta=[row.beta for row in tracker.rows],
        mean_length=[row.mean_length for row in tracker.rows],
        exact_length=[row.exact_mean_length for row in tracker.rows],
    )


def _scale(norm: nn.Module) -> float:
    return norm.weight.detach().abs().mean().item() if isinstance(norm, nn.BatchNorm1d) else 1.0


def _arguments(options: Options) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished networks."""
    names = ("layers", "width", "gaussians", "samples", "spread", "epochs", "lr", "seeds")
    return {
        "study": "littwin-wolf",
        **{name: getattr(options, name) for name in names},
        "batch": BATCH,
        "versions": [fastres.__version__, torch.__version__],
    }
