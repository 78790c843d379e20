"""li_plots: condition numbers, eigenvalues on the way and final losses, as the study draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastres import plots
from fastres.studies.li_compare import course, courses, curve
from fastres.studies.li_nets import NETS
from fastres.studies.li_report import Row, best, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 1e-9  # of a loss over the optimum: less is drawn as this
DEPTHS = (2, 4, 8, 16, 32, 64, 100)  # that axes mark
EXCESS = "loss less that of the best linear map"


def figure(rows: Sequence[Row]) -> Figure:
    """Draw two rows of panels: at the start and at the end; on the way.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    drawn = plots.figure(12, 7.4)
    panels = drawn.subplots(2, 3)
    colours = dict(zip(NETS, plots.colours(len(NETS)), strict=True))
    _initial(panels[0, 0], rows, colours)
    for axes, task in zip(panels[0, 1:], ("linear", "relu"), strict=True):
        _final(axes, rows, task, colours)
    linear = [depth for task, depth in courses(rows) if task == "linear"]
    depth = max(linear, default=0)
    nets = [net for net in NETS if course(rows, "linear", net, depth)]
    _way(panels[1, 0], rows, depth, nets, colours, "|eigenvalue|: largest, and 10th percentile")
    for axes, name, label in (
        (panels[1, 1], "index", "index: fraction of negative eigenvalues"),
        (panels[1, 2], "gradient_norm", "gradient norm"),
    ):
        for net in nets:
            way = course(rows, "linear", net, depth)
            _line(axes, way, "excess", name, colours[net], "-")
        _towards_zero(axes, label)
    panels[1, 2].set_yscale("log")
    for axes in panels[1]:
        axes.set_title(f"linear, depth {depth}, on the way", loc="left")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(NETS))
    return drawn


def _initial(axes: Axes, rows: Sequence[Row], colours: dict[str, tuple[float, ...]]) -> None:
    for net, colour in colours.items():
        found = curve(rows, net)
        axes.plot(list(found), list(found.values()), ".-", color=colour, lw=1.2, label=net)
    axes.set_yscale("log")
    axes.set_title("at the start", loc="left")
    plots.decorate(axes, "matrices", "largest / 10th percentile of |eigenvalue|")


def _final(
    axes: Axes, rows: Sequence[Row], task: str, colours: dict[str, tuple[float, ...]]
) -> None:
    for net, colour in colours.items():
        depths = sorted({r.depth for r in select(rows, kind="final", task=task, net=net)})
        found = [(depth, best(rows, task, net, depth)) for depth in depths]
        shown = "excess" if task == "linear" else "loss"
        points = [(d, max(getattr(b, shown), FLOOR)) for d, b in found if b is not None]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), ".-", color=colour, lw=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(DEPTHS, map(str, DEPTHS), minor=False)
    axes.minorticks_off()
    axes.set_title(f"trained, {task}, best rate", loc="left")
    plots.decorate(axes, "matrices", EXCESS if task == "linear" else "loss")


def _way(
    axes: Axes,
    rows: Sequence[Row],
    depth: int,
    nets: Sequence[str],
    colours: dict[str, tuple[float, ...]],
    label: str,
) -> None:
    for net in nets:
        way = course(rows, "linear", net, depth)
        _line(axes, way, "excess", "largest", colours[net], "-")
        _line(axes, way, "excess", "tenth", colours[net], ":")
    axes.set_yscale("log")
    _towards_zero(axes, label)


def _line(
    axes: Axes, rows: Sequence[Row], x: str, y: str, colour: tuple[float, ...], style: str
) -> None:
    value: Callable[[Row, str], float | None] = getattr
    points = [(value(row, x), value(row, y)) for row in rows]
    known = [(a, b) for a, b in points if a is not None and b is not None and a > 0]
    axes.plot(*zip(*known, strict=True) if known else ((), ()), style, color=colour, lw=1.2)


def _towards_zero(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(30, 1e-5)  # as training goes
    plots.decorate(axes, EXCESS, label)
