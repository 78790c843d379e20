"""li_report: what the study of Li et al. 2016 found, row by row, and what the paper says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

KINDS: Final = ("initial", "final", "course")


@dataclass(frozen=True)
class Row:
    """One network at one moment; None where it was not measured, or is no finite number."""

    kind: str  # "initial", "final" (after training) or "course" (on the way)
    task: str  # "linear" or "relu"
    net: str
    depth: int  # matrices
    seed: int
    rate: float | None = None
    epoch: int = 0
    loss: float | None = None
    excess: float | None = None  # loss less that of the best linear map
    gradient_norm: float | None = None
    weight_norm: float | None = None  # mean Frobenius norm of the matrices
    largest: float | None = None  # |eigenvalue|
    tenth: float | None = None  # the 10th percentile of |eigenvalue|
    condition_tenth: float | None = None  # largest / tenth
    condition: float | None = None  # largest / smallest |eigenvalue|
    index: float | None = None  # the fraction of eigenvalues below zero

    @classmethod
    def parse(cls, entry: Any) -> Row:
        """Read a row of report.json.

        Raises:
            KeyError: If a value is missing.
            ValueError: If one is of another type.
            TypeError: If the entry is not an object.
        """
        values = {}
        for field in fields(cls):
            value = entry[field.name]
            texts = field.name in ("kind", "task", "net")
            if texts != isinstance(value, str) or isinstance(value, bool | list | dict):
                raise ValueError(f"{field.name} must be a {field.type}, got {value!r}")
            values[field.name] = value
        if values["kind"] not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {values['kind']!r}")
        return cls(**values)


def finite(value: float) -> float | None:
    """Return the value, or None for what JSON does not have."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Part:
    """A piece of the study that is done as one, and taken over from an earlier run as one."""

    name: str
    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        """Names the part."""
        return self.name

    @classmethod
    def parse(cls, entry: Any) -> Part:
        """Read a part of report.json; errors as those of `Row.parse`."""
        return cls(str(entry["name"]), tuple(map(Row.parse, entry["rows"])))


@dataclass(frozen=True)
class Best:
    """A network of some depth at its best learning rate: means over the seeds."""

    rate: float
    excess: float
    loss: float
    weight_norm: float
    highest: float  # the highest rate at which no seed diverged


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Choose the rows that have all these values."""
    return [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]


def best(rows: Iterable[Row], task: str, net: str, depth: int) -> Best | None:
    """Find the rate with the least final loss, averaged over seeds; None where all diverged."""
    rates: dict[float, list[Row]] = {}
    for row in select(rows, kind="final", task=task, net=net, depth=depth):
        rates.setdefault(row.rate or math.nan, []).append(row)
    found = []
    for rate, runs in rates.items():
        values = [(r.loss, r.excess, r.weight_norm) for r in runs]
        means = [_mean(column) for column in zip(*values, strict=True)]
        if None not in means:
            found.append((means[0], rate, means))
    if not found:
        return None
    _, rate, (loss, excess, norm) = min(found)
    assert loss is not None
    assert excess is not None
    assert norm is not None
    return Best(rate, excess, loss, norm, max(r for _, r, _ in found))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def rows_of(parts: Iterable[Part]) -> list[Row]:
    """List the rows of all parts."""
    return [row for part in parts for row in part.rows]
