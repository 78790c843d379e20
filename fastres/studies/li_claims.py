"""li_claims: what Li et al. 2016 say, what was measured here, and whether both agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastres import report
from fastres.studies.li_report import Row, best, select

Values = NDArray[np.float64]

PLAIN = ("plain, Xavier", "plain, orthogonal")
NEAR = 0.01  # of the loss at the start: what counts as near the optimum


@dataclass(frozen=True)
class Claim:
    """One statement of the paper."""

    paper: str
    measured: str
    agrees: bool


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Hold every statement of the paper against the rows; those without rows yet are left out."""
    found = [
        *(_initial(rows), _growth(rows), _one_shortcut(rows), _flat(rows)),
        *(_on_the_way(rows), _at_the_end(rows), _index(rows), _drop(rows)),
        *(_final(rows, "linear"), _final(rows, "relu"), _rates(rows), _norms(rows)),
    ]
    return [claim for claim in found if claim is not None]


def text(claims: Sequence[Claim]) -> str:
    """Lay out the claims for a terminal."""
    lines = [(c.paper, c.measured, "yes" if c.agrees else "no") for c in claims]
    return report.table(("paper says", "measured here", "agrees"), lines)


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


def _initial(rows: Sequence[Row]) -> Claim | None:
    found = curve(rows, "2-shortcut")
    if len(found) < 2:
        return None
    low, high = min(found.values()), max(found.values())
    return Claim(
        "2-shortcut: the initial condition number does not depend on the depth",
        f"{low:.4g} to {high:.4g} at depths {min(found)} to {max(found)}",
        high / low < 1.01,
    )


def _growth(rows: Sequence[Row]) -> Claim | None:
    xavier, orthogonal = (curve(rows, net) for net in PLAIN)
    if len(xavier) < 2 or len(orthogonal) < 2:
        return None
    ends = [(c[min(c)], c[max(c)]) for c in (xavier, orthogonal)]
    rising = all(_rises(c) for c in (xavier, orthogonal))
    return Claim(
        "plain: it grows without bound, fastest with Xavier",
        "Xavier {:.3g} to {:.1e}, orthogonal {:.3g} to {:.3g}".format(*ends[0], *ends[1]),
        rising and ends[0][1] / ends[0][0] > ends[1][1] / ends[1][0],
    )


def _rises(found: dict[int, float]) -> bool:
    values = list(found.values())
    return values == sorted(values)


def _one_shortcut(rows: Sequence[Row]) -> Claim | None:
    one, orthogonal = curve(rows, "1-shortcut"), curve(rows, "plain, orthogonal")
    both = [max(one[d] / orthogonal[d], orthogonal[d] / one[d]) for d in one if d in orthogonal]
    if not both:
        return None
    return Claim(
        "1-shortcut: as a plain network with orthogonal weights",
        f"condition numbers within a factor of {max(both):.2f}",
        max(both) < 1.1,
    )


def _flat(rows: Sequence[Row]) -> Claim | None:
    chosen = select(rows, kind="initial", net="3-shortcut")
    other = select(rows, kind="initial", net="2-shortcut")
    if not chosen or not other:
        return None
    steep = max(row.largest or 0 for row in chosen)
    usual = min(row.largest or 0 for row in other)
    return Claim(
        "3-shortcut: the Hessian is zero at zero",
        f"|eigenvalues| at most {steep / usual:.1e} of the 2-shortcut's",
        steep < 0.05 * usual,
    )


def _on_the_way(rows: Sequence[Row]) -> Claim | None:
    below, total = _below(rows, "condition_tenth")
    if not total:
        return None
    return Claim(
        "on the way: 2-shortcut always better conditioned at the same loss",
        f"at {below} of {total} looks",
        below == total,
    )


def _index(rows: Sequence[Row]) -> Claim | None:
    below, total = _below(rows, "index")
    if not total:
        return None
    return Claim(
        "on the way: 2-shortcut always with a smaller index at the same loss",
        f"at {below} of {total} looks",
        below == total,
    )


def _below(rows: Sequence[Row], name: str) -> tuple[int, int]:
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


def _at_the_end(rows: Sequence[Row]) -> Claim | None:
    ratios = []
    for task, depth in courses(rows):
        ends = [course(rows, task, net, depth)[-1] for net in ("2-shortcut", *PLAIN)]
        done = [e for e in ends if e.excess is not None and e.condition_tenth]
        known = [e.condition_tenth for e in done if _is_near(e, course(rows, task, e.net, depth))]
        values = [value for value in known if value is not None]
        if len(values) > 1:
            ratios.append(max(values) / min(values))
    if not ratios:
        return None
    return Claim(
        "near the minimum: similar condition numbers",
        f"those that got there differ by a factor of {max(ratios):.2g}",
        max(ratios) < 10,
    )


def _is_near(end: Row, way: Sequence[Row]) -> bool:
    first = way[0].excess
    return end.excess is not None and first is not None and abs(end.excess) < NEAR * abs(first)


def _drop(rows: Sequence[Row]) -> Claim | None:
    apart, ways = [], [course(rows, task, "2-shortcut", d) for task, d in courses(rows)]
    for way in ways:
        norms = [row.gradient_norm or 0 for row in way]
        fall = [(a.index or 0) - (b.index or 0) for a, b in pairwise(way)]
        apart.append(abs(int(np.argmax(norms)) - (int(np.argmax(fall)) + 1)))
    if not apart:
        return None
    return Claim(
        "2-shortcut: the gradient norm peaks when the index drops",
        f"at most {max(apart)} of {len(ways[0])} looks apart",
        max(apart) <= 2,
    )


def _depths(rows: Sequence[Row], task: str, net: str) -> list[int]:
    return sorted({row.depth for row in select(rows, kind="final", task=task, net=net)})


def _final(rows: Sequence[Row], task: str) -> Claim | None:
    """Compare the final excess of all depths at the best rates."""
    worst: dict[str, float] = {}
    for net in ("2-shortcut", *PLAIN):
        found = [best(rows, task, net, depth) for depth in _depths(rows, task, net)]
        worst[net] = max((math.inf if b is None else b.excess for b in found), default=math.nan)
    if any(map(math.isnan, worst.values())):
        return None
    ours = worst["2-shortcut"]
    theirs = [worst[net] for net in PLAIN]
    if task == "linear":
        paper = "linear, best rate: 2-shortcut near the optimum at all depths"
        agrees = ours < 0.01
    else:
        paper = "relu in the middle, best rate: 2-shortcut finds the optimum, plain ones do not"
        agrees = ours < 0.01 and min(theirs) > 0.01
    shown = "loss less the best linear map's: 2-shortcut {:.2g}, Xavier {:.2g}, orthogonal {:.2g}"
    return Claim(paper, shown.format(ours, *theirs), agrees)


def _rates(rows: Sequence[Row]) -> Claim | None:
    """Compare the highest rates that do not diverge, at the greatest depth."""
    found = {}
    for net in ("2-shortcut", "1-shortcut", *PLAIN):
        depths = _depths(rows, "linear", net)
        chosen = best(rows, "linear", net, depths[-1]) if depths else None
        if chosen is None:
            return None
        found[net] = chosen.highest
    ours, *others = found.values()
    return Claim(
        "2-shortcut tolerates higher rates",
        "at the greatest depth {:.3g}; 1-shortcut {:.3g}, Xavier {:.3g}, orthogonal {:.3g}".format(
            ours, *others
        ),
        ours >= max(others),
    )


def _norms(rows: Sequence[Row]) -> Claim | None:
    found = [best(rows, "linear", "2-shortcut", d) for d in _depths(rows, "linear", "2-shortcut")]
    norms = [b.weight_norm for b in found if b is not None]
    if len(norms) < 2:
        return None
    return Claim(
        "2-shortcut: the mean norm of the trained matrices falls with the depth",
        f"{norms[0]:.3g} to {norms[-1]:.3g}",
        norms == sorted(norms, reverse=True),
    )
