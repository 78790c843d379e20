"""li_compare: networks of the study beside each other: by depth, and at the same loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastres.studies.li_report import Row, select

Values = NDArray[np.float64]

PLAIN: Final = ("plain, Xavier", "plain, orthogonal")
NEAR: Final = 0.01  # of the loss at the start: what counts as near the optimum


def curve(rows: Sequence[Row], net: str) -> dict[int, float]:
    """Initial condition number (max / 10th percentile) by depth: medians over the seeds."""
    chosen = select(rows, kind="initial", net=net)
    depths = sorted({row.depth for row in chosen})
    return {
        depth: float(
            np.median([row.condition_tenth or math.inf for row in select(chosen, depth=depth)])
        )
        for depth in depths
    }


def course(rows: Sequence[Row], task: str, net: str, depth: int) -> list[Row]:
    """The looks at one network on its way, by epoch."""
    chosen = select(rows, kind="course", task=task, net=net, depth=depth)
    return sorted(chosen, key=lambda row: row.epoch)


def courses(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """The tasks and depths of which there are looks at a 2-shortcut and a plain network."""
    chosen = select(rows, kind="course", net="2-shortcut")
    known = sorted({(row.task, row.depth) for row in chosen})
    return [(t, d) for t, d in known if all(course(rows, t, net, d) for net in PLAIN)]


def below(rows: Sequence[Row], name: str) -> tuple[int, int]:
    """Count the looks at which a value of the 2-shortcut is at most that of a plain network.

    They are compared at the same loss: the plain network's value is interpolated between its looks.
    """
    below = total = 0
    for task, depth in courses(rows):
        losses, values = _against_loss(course(rows, task, "2-shortcut", depth), name)
        for net in PLAIN:
            theirs, known = _against_loss(course(rows, task, net, depth), name)
            inside = (losses >= theirs.min(initial=math.inf)) & (losses <= theirs.max(initial=0))
            if inside.any():
                at = np.interp(losses[inside], theirs, known)
                below += int((values[inside] <= at).sum())
                total += int(inside.sum())
    return below, total


def _against_loss(rows: Sequence[Row], name: str) -> tuple[Values, Values]:
    """Losses, ascending, and what goes with them."""
    pairs = [(row.loss, getattr(row, name)) for row in rows]
    known = sorted((loss, value) for loss, value in pairs if loss and value is not None)
    both = np.array(known, np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def is_near(end: Row, way: Sequence[Row]) -> bool:
    """Tell whether a network ended near the loss of the best linear map."""
    first = way[0].excess
    return end.excess is not None and first is not None and abs(end.excess) < NEAR * abs(first)


def depths_of(rows: Sequence[Row], task: str, net: str) -> list[int]:
    """List the depths at which a net was trained."""
    return sorted({row.depth for row in select(rows, kind="final", task=task, net=net)})
