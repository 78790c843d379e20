"""demo_report: the rows of the demo as table, files and plots, and back from the files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres import report
from fastres.analysis.depth import PowerLaw, power_law
from fastres.studies import demo_plots


@dataclass(frozen=True)
class Row:
    """What was measured at one depth L."""

    blocks: int
    error: float  # fraction of the test set
    absolute: float  # mean over test samples and blocks
    scaled: float
    scaled_start: float  # before training: what the initialisation alone gives
    record_cost: float  # time of a recorded training step over that of a plain one
    seconds: float  # of training
    profile_absolute: list[float]  # [L], mean over test samples
    profile_scaled: list[float]  # [L]

    @property
    def key(self) -> int:
        """The depth."""
        return self.blocks

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Row:
        """Rebuild a row from JSON; KeyError, TypeError or ValueError where it is not one."""
        row = cls(
            blocks=int(entry["blocks"]),
            error=float(entry["error"]),
            absolute=float(entry["absolute"]),
            scaled=float(entry["scaled"]),
            scaled_start=float(entry["scaled_start"]),
            record_cost=float(entry["record_cost"]),
            seconds=float(entry["seconds"]),
            profile_absolute=[float(v) for v in entry["profile_absolute"]],
            profile_scaled=[float(v) for v in entry["profile_scaled"]],
        )
        if not len(row.profile_absolute) == len(row.profile_scaled) == row.blocks:
            raise ValueError("a profile must have one value per block")
        return row


def laws_of(rows: Sequence[Row]) -> dict[str, PowerLaw]:
    """Fit both perturbations against the number of blocks; empty below two depths."""
    if len(rows) < 2:
        return {}
    blocks = [row.blocks for row in rows]
    return {
        "absolute": power_law(blocks, [row.absolute for row in rows]),
        "scaled": power_law(blocks, [row.scaled for row in rows]),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Give the power laws to report.json, None for what is not a number."""
    return {
        "power_laws": {
            kind: {k: None if math.isnan(v) else v for k, v in law._asdict().items()}
            for kind, law in laws_of(rows).items()
        }
    }


def table(rows: Sequence[Row]) -> str:
    """Lay out the rows for a terminal."""
    columns = ("blocks", "test error", "absolute", "scaled", "at start", "recording", "time")
    lines = [
        (
            str(row.blocks),
            f"{row.error:.1%}",
            f"{row.absolute:.3f}",
            f"{row.scaled:.4f}",
            f"{row.scaled_start:.4f}",
            f"{row.record_cost:.2f}x",
            f"{row.seconds:.1f} s",
        )
        for row in rows
    ]
    return report.table(columns, lines)


def text(rows: Sequence[Row]) -> str:
    """Lay out the table and, under it, the power laws."""
    laws = [f"mean {kind} perturbation = {law}" for kind, law in laws_of(rows).items()]
    return "\n".join([table(rows), "", *laws])


def draw(out: Path, rows: Sequence[Row]) -> None:
    """Draw perturbation.png and, from two depths on, power_law.png.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    profiles = {row.blocks: (row.profile_scaled, row.profile_absolute) for row in rows}
    demo_plots.plot_profiles(out / "perturbation.png", profiles)
    if laws := laws_of(rows):
        blocks, scaled = [row.blocks for row in rows], [row.scaled for row in rows]
        start = [row.scaled_start for row in rows]
        demo_plots.plot_power_law(out / "power_law.png", blocks, scaled, start, laws["scaled"])
