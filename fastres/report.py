"""report: what a study leaves behind, tables, JSON and plots, each file whole or not there."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

import fastres
from fastres.analysis.depth import PowerLaw
from fastres.ops import native

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the program stops.

    Args:
        path: The file; its folder must be there.
        content: Text, stored as UTF-8, or bytes.

    Raises:
        OSError: If the folder cannot be written to; a file that was there stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)  # mkstemp makes it 0600
        os.replace(scratch, path)
    except BaseException:  # also Ctrl-C
        os.unlink(scratch)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write(path, text.getvalue())


def prepare_folder(folder: Path) -> None:
    """Make a folder and see that it can be written to, before work is spent on what goes there.

    Raises:
        OSError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror
        raise OSError(f"report: out must be a writable folder, got {folder}: {reason}") from None


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a terminal: columns as wide as they must be, right-aligned."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what a result was made with: versions, device, threads, native libraries, date."""
    return {
        "fastres": fastres.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "native": {name: name not in native.missing for name in ("_C", "_C_cuda")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Name a device as its maker does, such as 'NVIDIA H200'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def plot_profiles(path: Path, profiles: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> None:
    """Plot the perturbation of every block against its place l / L, one curve per depth.

    Args:
        path: The PNG file.
        profiles: blocks -> (scaled, absolute), each [blocks].

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure = _figure(9.6, 4.0)
    panels = figure.subplots(1, 2)
    for axes, kind, name in zip(panels, (0, 1), ("scaled", "absolute"), strict=True):
        for blocks, colour in zip(sorted(profiles), _colours(len(profiles)), strict=True):
            place = np.arange(blocks) / blocks
            mark = "o" if blocks == 1 else None  # a line of one point would not be seen
            thickness = 1.6 if blocks < 100 else 0.9  # hundreds of points would run together
            axes.plot(place, profiles[blocks][kind], marker=mark, color=colour, lw=thickness)
        formula = r"$\|f\|\,/\,\|x\|$" if name == "scaled" else r"$\|f\|$"
        _decorate(axes, "place of the block, $l\\,/\\,L$", f"{name} perturbation  {formula}")
        _log_ticks(axes)
        axes.set_xlim(0, 1)
    lines, names = panels[1].get_lines(), [str(blocks) for blocks in sorted(profiles)]
    figure.legend(lines, names, title="blocks $L$", frameon=False, loc="outside right center")
    _save(figure, path)


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
    figure = _figure(5.6, 4.2)
    axes = figure.subplots()
    reach = np.geomspace(depth.min() / 1.15, depth.max() * 1.15, 50)
    first = depth.argmin()
    guide = value[first] * depth[first] / reach
    axes.plot(
        reach, guide, color="0.6", ls=(0, (4, 3)), lw=1.2, label=r"$\propto 1/L$  (Hauser 2019)"
    )
    fit = rf"$\propto L^{{{law.exponent:.2f}}}$  (fit)"
    axes.plot(reach, law.at(reach), color=_colours(3)[1], label=fit)
    axes.plot(depth, start, "o", mfc="none", mec="0.45", ms=9, label="before training")
    axes.plot(depth, value, "o", color=_colours(3)[0], ms=6, label="trained", zorder=3)
    axes.set_xscale("log")
    _log_ticks(axes)
    axes.set_xticks(depth, [f"{n:g}" for n in depth])
    axes.minorticks_off()
    _decorate(axes, "residual blocks $L$", r"mean scaled perturbation  $\|f\|\,/\,\|x\|$")
    axes.legend(frameon=False)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """An empty figure in inches; no pyplot, so no window and no state outside of it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "report: plots need matplotlib: pip install 'fastres[demo]'"
        ) from None
    return Figure((width, height), layout="constrained")


def _colours(count: int) -> list[tuple[float, ...]]:
    """Dark to light, told apart with any colour vision and in print: viridis without its yellow."""
    from matplotlib import colormaps

    return [colormaps["viridis"](v) for v in np.linspace(0, 0.85, count)]


def _decorate(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.92", lw=0.8)
    axes.set_axisbelow(True)


def _log_ticks(axes: Axes) -> None:
    """A logarithmic y axis marked 1, 2, 5, 10 in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write(path, image.getvalue())
