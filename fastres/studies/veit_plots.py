"""veit_plots: single deletions, several at once, and reorderings, as the study draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastres import plots
from fastres.studies.veit_report import Row, is_transition, means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(rows: Sequence[Row]) -> Figure:
    """Draw error by deleted block, by how many are deleted, by Kendall's tau, and of the controls.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    controls = [row for row in rows if row.kind in ("plain", "skips")]
    drawn = plots.figure(14.0 if controls else 11.0, 3.4)
    ratios = (1.4, 1, 1, 1)[: 4 if controls else 3]
    single, several, order, *control = drawn.subplots(1, len(ratios), width_ratios=ratios)
    _single(single, [row for row in rows if row.kind == "single"])
    _several(several, rows)
    _order(order, [row for row in rows if row.kind == "order"])
    if controls:
        _control(control[0], controls)
    return drawn


def _single(axes: Axes, rows: Sequence[Row]) -> None:
    dark, _, light = plots.colours(3)
    for transition, colour, label in ((False, light, "in a stage"), (True, dark, "transition")):
        own = [(i, row) for i, row in enumerate(rows) if is_transition(row) == transition]
        spread = [1.96 * row.change_error for _, row in own]
        heights = [row.error for _, row in own]
        places = [i for i, _ in own]
        axes.bar(places, heights, yerr=spread, color=colour, ecolor="0.4", label=label)
    if rows:
        axes.axhline(rows[0].error - rows[0].change, color="0.2", lw=1, ls="--")
    axes.set_title("one block deleted (dashed: none)", loc="left")
    axes.legend(frameon=False)
    plots.decorate(axes, "block", "error")
    axes.set_ylim(bottom=0)


def _several(axes: Axes, rows: Sequence[Row]) -> None:
    dark, middle, light = plots.colours(3)
    own = [row for row in rows if row.kind in ("single", "several")]
    axes.plot([row.number for row in own], [row.error for row in own], ".", color=light)
    mean = means(rows, "single") | means(rows, "several")
    axes.plot(list(mean), list(mean.values()), "-", color=dark, lw=1.2, label="mean")
    again = [row for row in rows if row.kind == "recalibrated"]
    if again:
        places, heights = [row.number for row in again], [row.error for row in again]
        axes.plot(places, heights, "x", color=middle, label="batch norm recalibrated")
    axes.set_title("several deleted", loc="left")
    axes.legend(frameon=False)
    plots.decorate(axes, "deleted blocks", "error")
    axes.set_ylim(0, 1)


def _order(axes: Axes, rows: Sequence[Row]) -> None:
    colour = plots.colours(3)[1]
    axes.plot([row.tau for row in rows], [row.error for row in rows], ".", color=colour)
    axes.invert_xaxis()
    axes.set_title("reordered", loc="left")
    plots.decorate(axes, r"Kendall $\tau$", "error")
    axes.set_ylim(0, 1)


def _control(axes: Axes, rows: Sequence[Row]) -> None:
    dark, _, light = plots.colours(3)
    for kind, colour, label in (("plain", dark, "plain"), ("skips", light, "with skips")):
        errors = [row.error for row in rows if row.kind == kind]
        if errors:
            axes.plot(range(2, len(errors) + 2), errors, ".-", color=colour, label=label)
    axes.axhline(0.9, color="0.2", lw=1, ls="--")
    axes.set_title("one layer (dashed: chance)", loc="left")
    axes.legend(frameon=False)
    plots.decorate(axes, "layer", "error")
    axes.set_ylim(0, 1)
