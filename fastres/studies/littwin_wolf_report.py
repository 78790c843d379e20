"""littwin_wolf_report: the toy's trainings as claims and files, and back from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, Final

from fastres.analysis.path_scales import (
    critical_points,
    heaviest,
    log_epsilon,
    most_critical_points,
)
from fastres.studies import claims
from fastres.studies.claims import Claim

FIGURE: Final = {0.1: 10, 0.5: 34, 2.0: 67}  # beta -> where figure 1a to 1c has its peak, p = 100
_LISTS: Final = ("weight_norm", "error", "beta", "mean_length", "exact_length")


@dataclass(frozen=True)
class Part:
    """One training; all lists have the start and every epoch."""

    network: str  # "batch norm" or "plain"
    seed: int
    scale: list[list[float]]  # [E+1][layers], mean |weight| of batch norm, the first layer first
    weight_norm: list[float]  # of all layers together
    error: list[float]  # on the training samples
    beta: list[float]  # that the gains of the branches imply
    mean_length: list[float]  # by the gains
    exact_length: list[float]  # by the gradient

    @property
    def key(self) -> tuple[str, int]:
        """Which network, and with which seed."""
        return self.network, self.seed

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Part:
        """Rebuild a part from JSON; KeyError, TypeError or ValueError where it is not one."""
        lists = {name: [float(v) for v in entry[name]] for name in _LISTS}
        scale = [[float(v) for v in row] for row in entry["scale"]]
        if {len(values) for values in lists.values()} != {len(scale)}:
            raise ValueError("all lists must have one value per epoch")
        return cls(network=str(entry["network"]), seed=int(entry["seed"]), scale=scale, **lists)


@dataclass(frozen=True)
class Row:
    """One network after one epoch, 0 being the start."""

    network: str
    seed: int
    epoch: int
    first_scale: float
    mean_scale: float  # of the layers with a skip
    weight_norm: float
    error: float
    beta: float
    mean_length: float
    exact_length: float


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """List every epoch of every training."""
    return [
        Row(
            part.network,
            part.seed,
            epoch,
            scale[0],
            fmean(scale[1:]),
            *(getattr(part, name)[epoch] for name in _LISTS),
        )
        for part in parts
        for epoch, scale in enumerate(part.scale)
    ]


def claims_of(parts: Sequence[Part]) -> list[Claim]:
    """Say of each statement of the paper what was measured."""
    normed = [part for part in parts if part.network == "batch norm"]
    plain = [part for part in parts if part.network == "plain"]
    found = _formulas()
    if normed:
        found += _normed(normed)
    if plain:
        steps = [b > a for part in plain for a, b in pairwise(part.weight_norm)]
        growth = fmean(part.weight_norm[-1] / part.weight_norm[0] for part in plain)
        measured = f"rises in {sum(steps)} of {len(steps)} epochs, x {growth:.2f}"
        about = "norm of the weights, no batch norm"
        found.append(Claim(about, "rises steadily", measured, sum(steps) >= 0.95 * len(steps)))
        found.append(_deepens(plain, "no batch norm", "exact_length"))
    about = "CIFAR ResNet-32, norms of absorbed kernels"
    return [*found, Claim(about, "rise, faster after lr drop", "not measured", None)]


def _formulas() -> list[Claim]:
    peaks = [heaviest(beta, 100)[0] for beta in FIGURE]
    betas = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 50)
    theta = [critical_points(log_epsilon(beta, 100)) for beta in betas]
    rising, most = all(b > a for a, b in pairwise(theta)), most_critical_points(100)
    return [
        Claim(
            "heaviest length of 100, beta 0.1, 0.5, 2",
            ", ".join(map(str, FIGURE.values())),
            ", ".join(map(str, peaks)),
            peaks == list(FIGURE.values()),
        ),
        Claim(
            "critical points as beta rises to 50",
            "more, at most those of p-spin",
            f"theta {theta[0]:.3f} to {theta[-1]:.3f}, bound {most:.3f}",
            rising and theta[-1] < most,
        ),
    ]


def _normed(parts: Sequence[Part]) -> list[Claim]:
    ends = [fmean(part.scale[-1][1:]) for part in parts]
    apart = [not min(p.scale[-1][1:]) <= p.scale[-1][0] <= max(p.scale[-1][1:]) for p in parts]
    spread = f"{min(ends):.2f} to {max(ends):.2f}"
    first = fmean(part.scale[-1][0] for part in parts)
    return [
        Claim(
            "batch-norm scales, from 1, after training",
            "rise",
            f"mean {spread} ({len(parts)} seeds)",
            min(ends) > 1.02,
        ),
        Claim(
            "scale of the first layer, without a skip",
            "apart from the others",
            f"{first:.2f}, outside of theirs in {sum(apart)} of {len(parts)} seeds",
            sum(apart) > len(parts) / 2,
        ),
        _deepens(parts, "batch norm", "mean_length"),
        _deepens(parts, "batch norm", "exact_length"),
    ]


def _deepens(parts: Sequence[Part], network: str, which: str) -> Claim:
    start, end = (fmean(getattr(part, which)[i] for part in parts) for i in (0, -1))
    by = "by gains" if which == "mean_length" else "of the gradient"
    rises = sum(getattr(part, which)[-1] > getattr(part, which)[0] for part in parts)
    measured = f"{start:.2f} to {end:.2f}, up in {rises} of {len(parts)} seeds"
    return Claim(f"mean length {by}, {network}", "rises", measured, rises == len(parts))


def text(parts: Sequence[Part]) -> str:
    """Lay out the claims for a terminal."""
    return claims.text(claims_of(parts))


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Give the claims to report.json."""
    return {"claims": [asdict(claim) for claim in claims_of(parts)]}
