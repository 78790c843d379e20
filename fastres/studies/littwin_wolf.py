"""littwin_wolf: does the ensemble of paths deepen in training? (Littwin & Wolf 2016)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres import plots
from fastres.analysis.depth_tracker import DepthTracker
from fastres.analysis.scale_growth import ScaleGrowth, scale_growth
from fastres.studies.littwin_wolf_cifar import measure_cifar
from fastres.studies.littwin_wolf_claims import summary, text
from fastres.studies.littwin_wolf_plots import figure
from fastres.studies.littwin_wolf_report import CIFAR, Part, rows_of
from fastres.studies.littwin_wolf_toy import BATCH, NETWORKS, Layer, Options, gaussians, toy
from fastres.studies.resuming import Form, Result, measure_all
from fastres.training import evaluate


def run(options: Options, say: Callable[[str], None] = print) -> Result[Part]:
    """Train every network with every seed; write the report after each.

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
    plan = [(network, seed) for seed in range(options.seeds) for network in NETWORKS]
    if options.full:
        plan.append((CIFAR, 0))
    if options.full and options.fresh:
        (options.out / "resnet.safetensors").unlink(missing_ok=True)
    return measure_all(
        FORM,
        plan,
        lambda key, _: measure_cifar(options) if key[0] == CIFAR else measure(*key, options),
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
    model = toy(options, network, seed)
    few, answers = x[:256], y[:256]

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out, answers)

    tracker = DepthTracker(model, few, loss)
    layers = [module for module in model if isinstance(module, Layer)]
    scales, norms, errors, growth = [], [], [], []

    def note(epoch: int) -> None:
        tracker.measure(epoch, exact=True)
        scales.append([layer.scale for layer in layers])
        squares = sum(layer.linear.weight.detach().square().sum().item() for layer in layers)
        norms.append(squares**0.5)
        errors.append(evaluate(model, x, y))
        growth.append(_growth(model, few, loss, options.lr))

    model.train()
    with torch.no_grad():  # batch norm as made normalises nothing: not what training starts from
        for part in x.split(BATCH)[:100]:  # type: ignore[no-untyped-call]
            model(part)
    note(0)
    for epoch in _epochs(model, x, y, options, seed):
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
        slope=[each.slope.tolist() for each in growth],
        predicted=[each.predicted.tolist() for each in growth],
        measured=[each.measured.tolist() for each in growth],
        predicted_all=[each.predicted_all for each in growth],
        measured_all=[each.measured_all for each in growth],
    )


def _epochs(model: nn.Module, x: Tensor, y: Tensor, options: Options, seed: int) -> Iterator[int]:
    """Train, and stop after each epoch to give its number."""
    optimiser = torch.optim.SGD(model.parameters(), lr=options.lr)
    order = torch.Generator().manual_seed(seed)
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
        yield epoch


def _growth(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], step: float
) -> ScaleGrowth:
    """Measure in float64: what one step changes is a millionth of the slopes late in training."""
    twin = copy.deepcopy(model).double()
    weights = [module.weight for module in twin.modules() if isinstance(module, nn.Linear)]
    return scale_growth(twin, x.double(), loss, step, weights)


def _arguments(options: Options) -> dict[str, Any]:
    """All that decides the result: equal arguments may share finished networks."""
    names = ("layers", "width", "gaussians", "samples", "spread", "head", "epochs", "lr", "seeds")
    full = ("depth", "images", "cifar_epochs") if options.full else ()
    return {
        "study": "littwin-wolf",
        **{name: getattr(options, name) for name in full},
        **{name: getattr(options, name) for name in names},
        "batch": BATCH,
        "versions": [fastres.__version__, torch.__version__],
    }
