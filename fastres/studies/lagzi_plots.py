"""lagzi_plots: residuals that come to rest, layers that go, and noise, as the study draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastres import plots
from fastres.studies.lagzi_report import SIGMAS, Part, of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(parts: Sequence[Part]) -> Figure:
    """Draw three panels: change of residuals by layer, layers by epoch, error by noise.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    drawn = plots.figure(11.0, 3.4)
    change, depth, noise = drawn.subplots(1, 3)
    _change(change, parts)
    _depth(depth, parts)
    _noise(noise, parts)
    return drawn


def _change(axes: Axes, parts: Sequence[Part]) -> None:
    lines = [p for p in parts if p.kind in ("circles", "mnist") and p.change and p.seed == 0]
    for colour, part in zip(plots.colours(max(len(lines), 1)), lines, strict=False):
        label = f"{part.kind}, {part.network} weights"
        axes.plot(range(2, len(part.change) + 2), part.change, "-", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_title("residuals come to rest", loc="left")
    if lines:
        axes.legend(frameon=False)
    plots.decorate(axes, "layer t", "mean |y(t) - y(t - 1)|")


def _depth(axes: Axes, parts: Sequence[Part]) -> None:
    for colour, network in zip(plots.colours(2), ("shared", "own"), strict=True):
        for i, part in enumerate(of(parts, "adaptive", network)):
            label = f"{network} weights" if i == 0 else None
            places = range(1, len(part.depths) + 1)
            axes.step(places, part.depths, where="post", color=colour, lw=1.2, label=label)
    if any(part.kind == "adaptive" for part in parts):
        axes.legend(frameon=False)
    axes.set_title("circles, adaptive depth", loc="left")
    plots.decorate(axes, "epoch", "layers")
    axes.set_ylim(bottom=0)


def _noise(axes: Axes, parts: Sequence[Part]) -> None:
    for colour, network in zip(plots.colours(3), ("shared", "own", "mlp"), strict=True):
        for part in of(parts, "mnist", network):
            label = "MLP" if network == "mlp" else f"residual, {network} weights"
            axes.plot(SIGMAS, part.noise_error, "o-", ms=3, color=colour, label=label)
    if any(part.kind == "mnist" for part in parts):
        axes.legend(frameon=False)
    axes.set_title("MNIST with noise", loc="left")
    plots.decorate(axes, r"noise $\sigma$", "test error")
    axes.set_ylim(bottom=0)
