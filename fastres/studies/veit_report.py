"""veit_report: lesions as rows and files, and back from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from fastres.analysis.lesions import Lesions, Reorderings

CONTROLS: Final = ("plain", "skips", "stochastic", "effective")  # single deletions, of others
KINDS: Final = ("single", "several", "order", "recalibrated", *CONTROLS)


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
