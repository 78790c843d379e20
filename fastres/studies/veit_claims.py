"""veit_claims: what the paper says of lesions beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import correlation, fmean
from typing import Any, Final

from fastres.studies import claims
from fastres.studies.claims import Claim
from fastres.studies.veit_report import Part, Row, is_transition, means, rows_of

NOTICEABLE: Final = 0.05  # of the paper's axis, which goes to the 0.9 of a plain network
BLOCKS: Final = 54  # of the paper's network


def claims_of(parts: Sequence[Part]) -> list[Claim]:
    """Say of each statement of the paper what was measured; only what is there."""
    rows = rows_of(parts)
    found: list[Claim] = []
    single = [row for row in rows if row.kind == "single"]
    if single:
        found += _single(single)
    several = {1: fmean(row.error for row in single)} if single else {}
    several |= means(rows, "several")
    if len(several) > 2:
        found += _several(several, next(p.blocks for p in parts if p.kind == "several"))
    orders = [row for row in rows if row.kind == "order"]
    if orders:
        rho = _rank_correlation([row.tau for row in orders], [row.error for row in orders])
        measured = f"rank correlation {rho:.2f}, {len(orders)} orders"
        about = "error as Kendall's tau falls"
        found.append(Claim(about, "rises smoothly", measured, rho < -0.8))
    again = means(rows, "recalibrated")
    for size in set(again) & set(several):
        measured = f"{several[size]:.3f}, then {again[size]:.3f}"
        about = f"{size} deleted, batch norm recalibrated"
        found.append(Claim(about, "not asked", measured, None))
    return found + _controls(parts)


def _controls(parts: Sequence[Part]) -> list[Claim]:
    """Judge the networks beside the one that is looked at, of each one layer or block deleted."""
    own = {part.kind: part for part in parts}
    found = []
    if "plain" in own:
        part = own["plain"]
        about = f"one of {part.blocks} layers of a plain network deleted"
        found.append(Claim(about, "error 0.9", _spread(part), abs(fmean(part.error) - 0.9) < 0.1))
    if "skips" in own:
        about = "the same trained with skips"
        found.append(Claim(about, "not asked", _spread(own["skips"]), None))
    if "stochastic" in own and "single" in own:
        rises = [fmean(own[k].error) - own[k].baseline for k in ("stochastic", "single")]
        measured = f"mean +{rises[0]:.3f}, without +{rises[1]:.3f}"
        about = "one block deleted, stochastic depth"
        found.append(Claim(about, "slightly more resilient", measured, rises[0] < rises[1]))
    if "effective" in own and "single" in own:
        errors = [own[kind].baseline for kind in ("effective", "single")]
        measured = f"error {errors[0]:.4f}, all blocks {errors[1]:.4f}"
        about = f"trained with 23 of {BLOCKS} blocks, or as large a part"
        agrees = abs(errors[0] - errors[1]) < 0.01
        found.append(Claim(about, "0.0596, all blocks 0.0610", measured, agrees))
    return found


def _spread(part: Part) -> str:
    low, high, mean = min(part.error), max(part.error), fmean(part.error)
    return f"{low:.2f} to {high:.2f}, mean {mean:.2f}; without a lesion {part.baseline:.3f}"


def _single(rows: Sequence[Row]) -> list[Claim]:
    inside = [row for row in rows if not is_transition(row)]
    worst = max(inside, key=lambda row: row.change)
    small = sum(row.change < NOTICEABLE for row in inside)
    found = [
        Claim(
            "error without a lesion",
            "0.061 (ResNet-110)",
            f"{rows[0].error - rows[0].change:.3f}",
            abs(rows[0].error - rows[0].change - 0.061) < 0.02,
        ),
        Claim(
            f"one block deleted, {len(inside)} inside stages",
            "no noticeable change",
            f"at most +{worst.change:.3f} ({worst.deleted}), {small} below +{NOTICEABLE}",
            small == len(inside),
        ),
    ]
    ends = [row for row in rows if is_transition(row)]
    if ends:
        least = min(row.change for row in ends)
        rest = fmean(row.change for row in inside)
        measured = ", ".join(f"+{row.change:.3f} ({row.deleted})" for row in ends)
        about = "one block deleted, between stages"
        found.append(Claim(about, "modest peaks", f"{measured}; mean +{rest:.3f}", least > rest))
    return found


def _several(error: Mapping[int, float], blocks: int) -> list[Claim]:
    sizes = sorted(error)
    tenth = min(sizes, key=lambda size: abs(size / blocks - 10 / BLOCKS))
    pairs = list(pairwise(sizes))
    rising = sum(error[b] > error[a] for a, b in pairs)
    last = sizes[-1]
    return [
        Claim(
            "error as more are deleted",
            "rises smoothly",
            f"rises in {rising} of {len(pairs)} steps",
            rising == len(pairs),
        ),
        Claim(
            f"10 of {BLOCKS} deleted; here {tenth} of {blocks}",
            "error around 0.2",
            f"{error[tenth]:.3f}",
            abs(error[tenth] - 0.2) <= 0.1,
        ),
        Claim(
            f"20 of {BLOCKS} deleted; here {last} of {blocks}",
            "severe",
            f"{error[last]:.3f}",
            error[last] > 0.5,
        ),
        Claim(
            f"paths left, 10 of {BLOCKS} deleted",
            "roughly 1e-6",
            f"2^-10 = {2.0**-10:.1e}",
            False,
        ),
    ]


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of mean ranks; nan where all values of one are equal."""
    ranks = []
    for values in (a, b):
        order = sorted(values)
        ends = [order.index(v) + len(order) - 1 - order[::-1].index(v) for v in values]
        ranks.append([end / 2 for end in ends])  # equal values share their mean rank
    if any(len(set(rank)) < 2 for rank in ranks):
        return math.nan
    return correlation(*ranks)


def text(parts: Sequence[Part]) -> str:
    """Lay out the claims for a terminal."""
    return claims.text(claims_of(parts))


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Give the claims to report.json."""
    return {"claims": [asdict(claim) for claim in claims_of(parts)]}
