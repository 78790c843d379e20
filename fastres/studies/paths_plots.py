"""paths_plots: norms and shares of the path lengths of each network, as the study draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastres import plots
from fastres.studies.paths_report import Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(rows: Sequence[Row], summaries: Mapping[str, Summary]) -> Figure:
    """Draw two panels for each network: norms, and shares; bands are one standard error.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    drawn = plots.figure(9.6, 2.9 * len(summaries) + 0.9)
    panels = drawn.subplots(len(summaries), 2, squeeze=False, sharex=True, sharey="col")
    for line, network in zip(panels, summaries, strict=True):
        own = [row for row in rows if row.network == network]
        _norms(line[0], own)
        _shares(line[1], own, summaries[network])
        line[0].set_title(network, loc="left")
    left, right = (axes.get_legend_handles_labels() for axes in panels[0])
    drawn.legend(*left, frameon=False, loc="outside lower left")
    drawn.legend(*right, frameon=False, loc="outside lower right")
    panels[0, 0].set_ylim(bottom=1e-6)  # what is below weighs nothing; once all is drawn
    for axes in panels[:-1].flat:
        axes.set_xlabel("")
    return drawn


def _norms(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the norm of what the paths of one length carry, by the three ways to add them up."""
    length = [row.length for row in rows]
    sampled, single, together = plots.colours(3)
    value = np.array([row.count_times_mean for row in rows])
    error = np.nan_to_num([row.count_times_mean_error for row in rows])
    label = r"number of paths $\times$ mean norm: all alike"
    axes.plot(length, value, ".-", color=sampled, lw=1.2, label=label)
    low = np.maximum(value - error, value / 10)  # where it is all error, a band still has an end
    axes.fill_between(length, low, value + error, color=sampled, alpha=0.2, lw=0)
    norm = [row.norm for row in rows]
    axes.plot(length, norm, ".-", color=together, lw=1.2, label=r"exact $\|G_k\|$")
    energy = np.sqrt([row.energy for row in rows])
    label = r"$\sqrt{\mathrm{energy}}$: paths at right angles"  # dashed: it may hide the exact one
    axes.plot(length, energy, "--", color=single, lw=1.6, label=label)
    axes.set_yscale("log")
    plots.decorate(axes, "path length $k$ (blocks)", r"norm, of $\|g\|$")


def _shares(axes: Axes, rows: Sequence[Row], summary: Summary) -> None:
    """Draw the exact shares, and beside them how the paper's product distributes the lengths."""
    length = [row.length for row in rows]
    first, last = summary.interval_share
    axes.axvspan(first - 0.5, last + 0.5, color="0.93", lw=0)
    axes.set_title(f"95 % in {first} to {last}", loc="left")
    error = np.nan_to_num([row.share_error for row in rows])
    colour = plots.colours(3)[2]
    share = [row.share for row in rows]
    axes.bar(length, share, yerr=error, color=colour, ecolor="0.4", label="exact share")
    value = np.array([row.count_times_mean for row in rows])
    label = r"number of paths $\times$ mean norm, scaled to 1"
    axes.plot(length, value / value.sum(), ".-", color=plots.colours(3)[0], lw=1.2, label=label)
    plots.decorate(axes, "path length $k$ (blocks)", "share of the gradient")
