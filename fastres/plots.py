"""plots: figures of one look for every study, each file whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastres.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """Make an empty figure in inches; no pyplot, so no window and no state outside of it.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plots: figures need matplotlib: pip install 'fastres[demo]'"
        ) from None
    return Figure((width, height), layout="constrained")


def colours(count: int) -> list[tuple[float, ...]]:
    """List colours, dark to light, told apart by every eye and in print: viridis, no yellow."""
    from matplotlib import colormaps

    return [colormaps["viridis"](v) for v in np.linspace(0, 0.85, count)]


def decorate(axes: Axes, x: str, y: str) -> None:
    """Label the axes, lay a pale grid under what is drawn, and take the frame away."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", lw=0.8)
    axes.set_axisbelow(True)


def log_ticks(axes: Axes) -> None:
    """Make the y axis logarithmic, marked 1, 2, 5, 10 in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write(path, image.getvalue())
