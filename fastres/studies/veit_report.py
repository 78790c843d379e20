"""veit_report: lesions as rows, claims and files, and back from files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import correlation, fmean
from typing import Any, Final

from fastres.analysis.lesions import Lesions, Reorderings
from fastres.studies import claims
from fastres.studies.claims import Claim

KINDS: Final = ("single", "several", "order", "recalibrated")
NOTICEABLE: Final = 0.05  # of the paper's axis, which goes to the 0.9 of a plain network
BLOCKS: Final = 54  # of the paper's network


@dataclass(frozen=True)
class Part:
    """Lesions of one kind and size, all on the same images."""

    kind: str  # one of KINDS
    number: int  # of deleted blocks, or of swaps
    blocks: int  # of the network
    baseline: float  # error without a lesion
    deleted: list[str]  # names of the deleted sites of each lesion, by spaces
    tau: list[float]  # Kendall's, of each
    error: list[float]
    change_error: list[float]  # standard error of the change

    @property
    def key(self) -> tuple[str, int]:
        """What is done, and to how many blocks."""
        return self.kind, self.number

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Part:
        """Rebuild a part from JSON; KeyError, TypeError or ValueError where it is not one."""
        numbers = {k: [float(v) for v in entry[k]] for k in ("tau", "error", "change_error")}
        deleted = [str(name) for name in entry["deleted"]]
        if {len(deleted)} != {len(values) for values in numbers.values()}:
            raise ValueError("all lists must have one value per lesion")
        if entry["kind"] not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {entry['kind']}")
        return cls(
            kind=str(entry["kind"]),
            number=int(entry["number"]),
            blocks=int(entry["blocks"]),
            baseline=float(entry["baseline"]),
            deleted=deleted,
            **numbers,
        )


@dataclass(frozen=True)
class Row:
    """One lesion; the change is against the same network without one, on the same images."""

    kind: str
    number: int
    deleted: str
    tau: float
    error: float
    change: float
    change_error: float


def part_of(kind: str, number: int, found: Lesions | Reorderings) -> Part:
    """Keep what a lesion study measured."""
    if isinstance(found, Reorderings):
        deleted, tau = [""] * len(found.orders), found.tau.tolist()
    else:
        deleted, tau = [" ".join(names) for names in found.sets], [1.0] * len(found.sets)
    return Part(
        kind=kind,
        number=number,
        blocks=len(found.sites),
        baseline=float(found.baseline.double().mean()),
        deleted=deleted,
        tau=tau,
        error=found.error.tolist(),
        change_error=found.change_error.tolist(),
    )


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """List all lesions, kind after kind."""
    return [
        Row(part.kind, part.number, deleted, tau, error, error - part.baseline, spread)
        for kind in KINDS
        for part in sorted((p for p in parts if p.kind == kind), key=lambda p: p.number)
        for deleted, tau, error, spread in zip(
            part.deleted, part.tau, part.error, part.change_error, strict=True
        )
    ]


def is_transition(row: Row) -> bool:
    """Tell whether a single lesion is of the first block of a later stage, a projection."""
    return row.deleted in ("layer2.0", "layer3.0")


def means(rows: Sequence[Row], kind: str) -> dict[int, float]:
    """Average the error over the lesions of each size."""
    sizes = sorted({row.number for row in rows if row.kind == kind})
    return {
        size: fmean(row.error for row in rows if row.kind == kind and row.number == size)
        for size in sizes
    }


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
        found += _several(several, parts[0].blocks)
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
    plain = Claim("one layer of a plain VGG deleted", "error 0.9", "not measured", None)
    return [*found, plain]


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
