"""demo_plots: the perturbation of every block, and its power law, as the demo draws them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fastres import plots
from fastres.analysis.depth import PowerLaw


def plot_profiles(path: Path, profiles: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> None:
    """Plot the perturbation of every block against its place l / L, one curve per depth.

    Args:
        path: The PNG file.
        profiles: blocks -> (scaled, absolute), each [blocks].

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure = plots.figure(9.6, 4.0)
    panels = figure.subplots(1, 2)
    for axes, kind, name in zip(panels, (0, 1), ("scaled", "absolute"), strict=True):
        for blocks, colour in zip(sorted(profiles), plots.colours(len(profiles)), strict=True):
            place = np.arange(blocks) / blocks
            mark = "o" if blocks == 1 else None  # a line of one point would not be seen
            thickness = 1.6 if blocks < 100 else 0.9  # hundreds of points would run together
            axes.plot(place, profiles[blocks][kind], marker=mark, color=colour, lw=thickness)
        formula = r"$\|f\|\,/\,\|x\|$" if name == "scaled" else r"$\|f\|$"
        plots.decorate(axes, "place of the block, $l\\,/\\,L$", f"{name} perturbation  {formula}")
        plots.log_ticks(axes)
        axes.set_xlim(0, 1)
    lines, names = panels[1].get_lines(), [str(blocks) for blocks in sorted(profiles)]
    figure.legend(lines, names, title="blocks $L$", frameon=False, loc="outside right center")
    plots.save(figure, path)


def plot_power_law(
    path: Path, blocks: ArrayLike, scaled: ArrayLike, start: ArrayLike, law: PowerLaw
) -> None:
    """Plot the mean scaled perturbation against the number of blocks, with its fit and 1 / L.

    Args:
        path: The PNG file.
        blocks: Numbers of blocks, [n].
        scaled: Mean scaled perturbation at each, [n].
        start: The same before training, [n].
        law: The fit to `scaled`.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    depth, value = np.asarray(blocks, float), np.asarray(scaled, float)
    figure = plots.figure(5.6, 4.2)
    axes = figure.subplots()
    reach = np.geomspace(depth.min() / 1.15, depth.max() * 1.15, 50)
    first = depth.argmin()
    guide = value[first] * depth[first] / reach
    axes.plot(
        reach, guide, color="0.6", ls=(0, (4, 3)), lw=1.2, label=r"$\propto 1/L$  (Hauser 2019)"
    )
    fit = rf"$\propto L^{{{law.exponent:.2f}}}$  (fit)"
    axes.plot(reach, law.at(reach), color=plots.colours(3)[1], label=fit)
    axes.plot(depth, start, "o", mfc="none", mec="0.45", ms=9, label="before training")
    axes.plot(depth, value, "o", color=plots.colours(3)[0], ms=6, label="trained", zorder=3)
    axes.set_xscale("log")
    plots.log_ticks(axes)
    axes.set_xticks(depth, [f"{n:g}" for n in depth])
    axes.minorticks_off()
    plots.decorate(axes, "residual blocks $L$", r"mean scaled perturbation  $\|f\|\,/\,\|x\|$")
    axes.legend(frameon=False)
    plots.save(figure, path)
