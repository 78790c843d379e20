"""hauser_plots: scaled perturbation and its local exponent by depth, as the study draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastres import plots
from fastres.analysis.depth import local_exponents
from fastres.studies.hauser_report import Curve, Part, curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "os^vD"


def figure(parts: Sequence[Part]) -> Figure:
    """Draw three panels: value by depth, local exponent by depth, profile by place.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    drawn = plots.figure(11.5, 3.6)
    value, exponent, profile = drawn.subplots(1, 3)
    found = curves(parts)
    for colour, mark, curve in zip(
        plots.colours(max(len(found), 1)), _MARKS * len(found), found, strict=False
    ):
        values = curve.of("scaled")
        value.plot(curve.blocks, values.T, mark, color=colour, ms=3)
        value.plot(curve.blocks, values.mean(0), "-", color=colour, lw=1, label=curve.name)
        for row in values:
            between, slopes = local_exponents(curve.blocks, row)
            exponent.plot(between, slopes, mark, color=colour, ms=3)
        between, slopes = local_exponents(curve.blocks, values.mean(0))
        exponent.plot(between, slopes, "-", color=colour, lw=1)
        _profile(profile, curve, colour)
    _finish(value, exponent, profile, found)
    return drawn


def _profile(axes: Axes, curve: Curve, colour: tuple[float, ...]) -> None:
    """Draw the deepest network of the first seed, block by block."""
    values = curve.parts[0][-1].profile
    places = [(i + 0.5) / len(values) for i in range(len(values))]
    axes.plot(places, values, "-", color=colour, lw=1)


def _finish(value: Axes, exponent: Axes, profile: Axes, found: Sequence[Curve]) -> None:
    depths = sorted({depth for curve in found for depth in curve.blocks})
    labelled: list[int] = []  # those that have room for a label
    for depth in depths:
        if not labelled or depth > 1.5 * labelled[-1]:
            labelled.append(depth)
    for axes in (value, exponent):
        axes.set_xscale("log")
        axes.set_xticks(labelled, map(str, labelled))
        axes.minorticks_off()
    if depths:
        top = max(float(curve.of("scaled").mean(0)[0]) for curve in found)
        law = [top * depths[0] / depth for depth in depths]
        value.plot(depths, law, ":", color="0.4", lw=1, label="1 / L")
        value.legend(frameon=False, fontsize=7, loc="lower left")
    plots.log_ticks(value)
    profile.set_yscale("log")
    exponent.axhline(-1, color="0.4", lw=1, ls=":")
    value.set_title("scaled perturbation", loc="left")
    exponent.set_title("local exponent", loc="left")
    profile.set_title("deepest network, block by block", loc="left")
    plots.decorate(value, "blocks L", "mean ||f|| / ||x||")
    plots.decorate(exponent, "blocks L", "d log value / d log L")
    plots.decorate(profile, "place l / L", "||f|| / ||x||")
