"""littwin_wolf_plots: weights of path lengths, batch-norm scales, norms and lengths in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastres import plots
from fastres.analysis.path_scales import log_epsilon
from fastres.studies.littwin_wolf_claims import FIGURE
from fastres.studies.littwin_wolf_report import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(parts: Sequence[Part]) -> Figure:
    """Draw four panels: epsilon_r, scale by layer, norm of the weights, mean length of paths.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    drawn = plots.figure(12.0, 3.2)
    weights, scale, norm, length = drawn.subplots(1, 4)
    _weights(weights)
    _scale(scale, [part for part in parts if part.network == "scale"])
    plain = [part.weight_norm for part in parts if part.network == "plain"]
    for values in plain:
        norm.plot(values, color=plots.colours(3)[1], lw=1.2)
    norm.set_title("no batch norm", loc="left")
    plots.decorate(norm, "epoch", "norm of all weights")
    _length(length, parts)
    return drawn


def _weights(axes: Axes) -> None:
    for beta, colour in zip(FIGURE, plots.colours(len(FIGURE)), strict=True):
        r = np.arange(1, 101)
        axes.plot(r, np.exp(log_epsilon(beta, 100)), color=colour, label=rf"$\beta$ = {beta:g}")
    axes.legend(frameon=False)
    axes.set_title("100 layers, formula", loc="left")
    plots.decorate(axes, "length $r$", r"$\epsilon_r$")


def _scale(axes: Axes, parts: Sequence[Part]) -> None:
    """Draw the mean over seeds, a line for each of five epochs."""
    if not parts:
        return
    mean = np.mean([part.scale for part in parts], axis=0)  # [E+1, layers]
    epochs = sorted({round(e) for e in np.linspace(0, len(mean) - 1, 5)})
    for epoch, colour in zip(epochs, plots.colours(len(epochs)), strict=True):
        layers = range(1, mean.shape[1] + 1)
        axes.plot(layers, mean[epoch], ".-", color=colour, label=f"epoch {epoch}")
    axes.legend(frameon=False, fontsize="small")
    axes.set_title("one scale per layer", loc="left")
    plots.decorate(axes, "layer", r"scale $\lambda$")


def _length(axes: Axes, parts: Sequence[Part]) -> None:
    dark, middle, light = plots.colours(3)
    for network, which, colour, label in (
        ("scale", "mean_length", light, "one scale, by gains"),
        ("scale", "exact_length", dark, "one scale, of the gradient"),
        ("plain", "exact_length", middle, "no batch norm, of the gradient"),
    ):
        values = [getattr(part, which) for part in parts if part.network == network]
        if values:
            axes.plot(np.mean(values, axis=0), color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    axes.set_title("mean path length", loc="left")
    plots.decorate(axes, "epoch", "branches")
