"""paths_report: path lengths of both networks as table, files and figure, and back from files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fastres import report
from fastres.paths.intervals import shortest

NETWORKS: Final = ("trained", "untrained")
_MEASURES: Final = ("share", "norm", "energy", "mean_norm")


@dataclass(frozen=True)
class Part:
    """What was measured on one batch of images; lengths 0 to L, the gradient of the batch is 1."""

    network: str
    batch: int
    wrong: int  # images whose class is not found
    sum_error: float  # by how much the lengths miss the ordinary gradient, relative
    share: list[float]  # [L+1]
    norm: list[float]  # [L+1], ||G_k||
    energy: list[float]  # [L+1], mean over draws
    mean_norm: list[float]  # [L+1], mean over draws

    @property
    def key(self) -> tuple[str, int]:
        """Which network, on which batch."""
        return self.network, self.batch

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Part:
        """Rebuild a part from JSON; KeyError, TypeError or ValueError where it is not one."""
        lists = {name: [float(v) for v in entry[name]] for name in _MEASURES}
        if len({len(values) for values in lists.values()}) != 1:
            raise ValueError("all measures must have one value per length")
        return cls(
            network=str(entry["network"]),
            batch=int(entry["batch"]),
            wrong=int(entry["wrong"]),
            sum_error=float(entry["sum_error"]),
            **lists,
        )


@dataclass(frozen=True)
class Row:
    """Paths of one length in one network: means over batches, and their standard errors."""

    network: str
    length: int
    paths: int
    share: float  # <G_k, g> / <g, g>
    share_error: float
    norm: float  # ||G_k|| / ||g||
    norm_error: float
    log2_norm: float
    energy: float  # sum over the paths of ||g_path||^2 / ||g||^2
    energy_error: float
    mean_norm: float  # of ||g_path|| / ||g|| over random paths
    mean_norm_error: float
    count_times_mean: float  # what the paper plots
    count_times_mean_error: float
    factor: float  # count_times_mean over norm


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """Average over the batches, a row for each network and length."""
    rows = []
    for network in NETWORKS:
        chosen = [part for part in parts if part.network == network]
        if not chosen:
            continue
        mean, error = {}, {}
        for name in _MEASURES:
            values = np.array([getattr(part, name) for part in chosen])  # [batches, L+1]
            mean[name], error[name] = values.mean(0), _standard_error(values)
        lengths = len(chosen[0].share)
        for k in range(lengths):
            paths = math.comb(lengths - 1, k)
            norm, single = float(mean["norm"][k]), float(mean["mean_norm"][k])
            rows.append(
                Row(
                    network=network,
                    length=k,
                    paths=paths,
                    **{name: float(mean[name][k]) for name in _MEASURES},
                    **{f"{name}_error": float(error[name][k]) for name in _MEASURES},
                    log2_norm=math.log2(norm) if norm else -math.inf,
                    count_times_mean=paths * single,
                    count_times_mean_error=paths * float(error["mean_norm"][k]),
                    factor=paths * single / norm if norm else math.nan,
                )
            )
    return rows


def _standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the mean over dim 0; nan for one value."""
    if len(values) < 2:
        return np.full_like(values[0], np.nan)
    found: NDArray[np.float64] = values.std(0, ddof=1) / math.sqrt(len(values))
    return found


@dataclass(frozen=True)
class Summary:
    """What the rows of one network say."""

    images_wrong: int
    sum_error: float  # the largest of all batches
    mean_length: float  # by the shares
    std_length: float | None  # None where shares below zero make the variance so
    least_share: float
    interval_share: tuple[int, int]  # the shortest that holds 95 %
    interval_energy: tuple[int, int]
    interval_count_times_mean: tuple[int, int]
    typical: int  # the length of the largest share
    factor_typical: float  # there, count times mean over ||G_k||
    coherence_typical: float  # there, ||G_k|| over the root of the energy; 1 at right angles
    total_count_times_mean: float  # over all lengths, where the gradient is 1


def summarise(rows: Sequence[Row], parts: Sequence[Part]) -> dict[str, Summary]:
    """Sum up each network of the rows."""
    found = {}
    for network in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == network]
        batches = [part for part in parts if part.network == network]
        share = np.array([row.share for row in own])
        length = np.arange(len(own))
        mean = float((length * share).sum() / share.sum())
        variance = float(((length - mean) ** 2 * share).sum() / share.sum())
        typical = int(share.argmax())
        found[network] = Summary(
            images_wrong=sum(part.wrong for part in batches),
            sum_error=max(part.sum_error for part in batches),
            mean_length=mean,
            std_length=math.sqrt(variance) if variance >= 0 else None,
            least_share=float(share.min()),
            interval_share=shortest([abs(row.share) for row in own], 0.0, 0.95),
            interval_energy=shortest([row.energy for row in own], 0.0, 0.95),
            interval_count_times_mean=shortest([row.count_times_mean for row in own], 0.0, 0.95),
            typical=typical,
            factor_typical=own[typical].factor,
            coherence_typical=own[typical].norm / own[typical].energy ** 0.5,
            total_count_times_mean=sum(row.count_times_mean for row in own),
        )
    return found


def text(parts: Sequence[Part]) -> str:
    """Lay out the summaries for a terminal: a line per question, a column per network."""
    found = summarise(rows_of(parts), parts)
    lines: list[tuple[str, Callable[[Summary], str]]] = [
        ("||sum of all G_k - g|| / ||g||", lambda s: f"{s.sum_error:.0e}"),
        ("mean length, by shares", lambda s: f"{s.mean_length:.2f}"),
        ("its standard deviation", lambda s: f"{s.std_length or math.nan:.2f}"),
        ("least share", lambda s: f"{s.least_share:.0e}"),
        ("95 % of the shares", lambda s: _span(s.interval_share)),
        ("95 % of the energy", lambda s: _span(s.interval_energy)),
        ("95 % of count x mean norm", lambda s: _span(s.interval_count_times_mean)),
        ("length k of the largest share", lambda s: f"{s.typical}"),
        ("there, count x mean norm / ||G_k||", lambda s: f"{s.factor_typical:.0f}"),
        ("there, ||G_k|| / sqrt(energy)", lambda s: f"{s.coherence_typical:.1f}"),
        ("count x mean norm, summed / ||g||", lambda s: f"{s.total_count_times_mean:.0f}"),
    ]
    table = [(name, *(cell(summary) for summary in found.values())) for name, cell in lines]
    return report.table(("", *found), table)


def _span(interval: tuple[int, int]) -> str:
    return f"{interval[0]} to {interval[1]}"


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Give the summary of each network to report.json."""
    found = summarise(rows_of(parts), parts)
    return {"summary": {network: asdict(each) for network, each in found.items()}}
