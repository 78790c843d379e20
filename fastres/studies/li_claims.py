"""li_claims: what Li et al. 2016 say, what was measured here, and whether both agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from fastres.studies import claims
from fastres.studies.claims import Claim
from fastres.studies.li_compare import (
    PLAIN,
    below,
    course,
    courses,
    curve,
    depths_of,
    is_near,
)
from fastres.studies.li_report import Part, Row, best, rows_of, select


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Hold every statement of the paper against the rows; those without rows yet are left out."""
    found = [
        *(_initial(rows), _growth(rows), _one_shortcut(rows), _flat(rows)),
        *(_on_the_way(rows), _at_the_end(rows), _index(rows), _drop(rows)),
        *(_final(rows), _bent(rows), _rates(rows), _norms(rows)),
    ]
    return [claim for claim in found if claim is not None]


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Give the claims to report.json."""
    return {"claims": [asdict(claim) for claim in claims_of(rows_of(parts))]}


def text(parts: Sequence[Part]) -> str:
    """Lay out the claims for a terminal."""
    return claims.text(claims_of(rows_of(parts)))


def _initial(rows: Sequence[Row]) -> Claim | None:
    found = curve(rows, "2-shortcut")
    if len(found) < 2:
        return None
    low, high = min(found.values()), max(found.values())
    return Claim(
        "2-shortcut, condition number at the start",
        "does not depend on depth",
        f"{low:.4g} to {high:.4g} at depths {min(found)} to {max(found)}",
        high / low < 1.01,
    )


def _growth(rows: Sequence[Row]) -> Claim | None:
    xavier, orthogonal = (curve(rows, net) for net in PLAIN)
    if len(xavier) < 2 or len(orthogonal) < 2:
        return None
    ends = [(c[min(c)], c[max(c)]) for c in (xavier, orthogonal)]
    rising = all([*c.values()] == sorted(c.values()) for c in (xavier, orthogonal))
    return Claim(
        "plain, condition number at the start",
        "grows without bound, fastest with Xavier",
        "Xavier {:.3g} to {:.1e}, orthogonal {:.3g} to {:.3g}".format(*ends[0], *ends[1]),
        rising and ends[0][1] / ends[0][0] > ends[1][1] / ends[1][0],
    )


def _one_shortcut(rows: Sequence[Row]) -> Claim | None:
    one, orthogonal = curve(rows, "1-shortcut"), curve(rows, "plain, orthogonal")
    both = [max(one[d] / orthogonal[d], orthogonal[d] / one[d]) for d in one if d in orthogonal]
    if not both:
        return None
    return Claim(
        "1-shortcut, condition number at the start",
        "as plain with orthogonal weights",
        f"within a factor of {max(both):.2f}",
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
        "3-shortcut, Hessian at zero",
        "zero",
        f"|eigenvalues| at most {steep / usual:.1e} of the 2-shortcut's",
        steep < 0.05 * usual,
    )


def _on_the_way(rows: Sequence[Row]) -> Claim | None:
    fewer, total = below(rows, "condition_tenth")
    if not total:
        return None
    return Claim(
        "on the way, conditioning at the same loss",
        "2-shortcut always better",
        f"at {fewer} of {total} looks",
        fewer == total,
    )


def _index(rows: Sequence[Row]) -> Claim | None:
    fewer, total = below(rows, "index")
    if not total:
        return None
    return Claim(
        "on the way, index at the same loss",
        "2-shortcut always smaller",
        f"at {fewer} of {total} looks",
        fewer == total,
    )


def _at_the_end(rows: Sequence[Row]) -> Claim | None:
    ratios = []
    for task, depth in courses(rows):
        ends = [course(rows, task, net, depth)[-1] for net in ("2-shortcut", *PLAIN)]
        done = [e for e in ends if e.excess is not None and e.condition_tenth]
        known = [e.condition_tenth for e in done if is_near(e, course(rows, task, e.net, depth))]
        values = [value for value in known if value is not None]
        if len(values) > 1:
            ratios.append(max(values) / min(values))
    if not ratios:
        return None
    return Claim(
        "near the minimum, condition numbers",
        "similar",
        f"those that got there differ by a factor of {max(ratios):.2g}",
        max(ratios) < 10,
    )


def _drop(rows: Sequence[Row]) -> Claim | None:
    apart, ways = [], [course(rows, task, "2-shortcut", d) for task, d in courses(rows)]
    for way in ways:
        norms = [row.gradient_norm or 0 for row in way]
        fall = [(a.index or 0) - (b.index or 0) for a, b in pairwise(way)]
        apart.append(abs(int(np.argmax(norms)) - (int(np.argmax(fall)) + 1)))
    if not apart:
        return None
    return Claim(
        "2-shortcut, peak of the gradient norm",
        "when the index drops",
        f"at most {max(apart)} of {len(ways[0])} looks apart",
        max(apart) <= 2,
    )


def _final(rows: Sequence[Row]) -> Claim | None:
    """Compare the final excess of linear networks, the worst of all depths, at the best rates."""
    worst = []
    for net in ("2-shortcut", *PLAIN):
        found = [best(rows, "linear", net, depth) for depth in depths_of(rows, "linear", net)]
        worst.append(max((math.inf if b is None else b.excess for b in found), default=math.nan))
    if any(map(math.isnan, worst)):
        return None
    return Claim(
        "linear, final loss at the best rate",
        "2-shortcut near the optimum at all depths",
        "loss less the best map's at most {:.1e}; Xavier {:.1e}, orthogonal {:.1e}".format(*worst),
        worst[0] < 1e-3,
    )


def _bent(rows: Sequence[Row]) -> Claim | None:
    """Compare the final losses of networks with relu at each depth, at the best rates."""
    depths, lower = depths_of(rows, "relu", "2-shortcut"), []
    if not depths:
        return None
    for depth in depths:
        found = [best(rows, "relu", net, depth) for net in ("2-shortcut", *PLAIN)]
        ours, *theirs = (math.inf if b is None else b.loss for b in found)
        if ours < min(theirs):
            lower.append(str(depth))
    return Claim(
        "relu in the middle, likewise",
        "2-shortcut finds the optimum, plain do not",
        f"lower than both at depths {', '.join(lower) or 'none'}, of {depths[0]} to {depths[-1]}",
        len(lower) == len(depths),
    )


def _rates(rows: Sequence[Row]) -> Claim | None:
    """Compare the highest rates that do not diverge, at the greatest depth."""
    found = {}
    for net in ("2-shortcut", "1-shortcut", *PLAIN):
        depths = depths_of(rows, "linear", net)
        chosen = best(rows, "linear", net, depths[-1]) if depths else None
        if chosen is None:
            return None
        found[net] = chosen.highest
    ours, *others = found.values()
    return Claim(
        "highest rate that does not diverge",
        "2-shortcut tolerates more",
        "at the greatest depth {:.3g}; 1-shortcut {:.3g}, Xavier {:.3g}, orthogonal {:.3g}".format(
            ours, *others
        ),
        ours >= max(others),
    )


def _norms(rows: Sequence[Row]) -> Claim | None:
    found = [best(rows, "linear", "2-shortcut", d) for d in depths_of(rows, "linear", "2-shortcut")]
    norms = [b.weight_norm for b in found if b is not None]
    if len(norms) < 2:
        return None
    return Claim(
        "2-shortcut, mean norm of trained matrices",
        "falls with depth",
        f"{norms[0]:.3g} to {norms[-1]:.3g}",
        norms == sorted(norms, reverse=True),
    )
