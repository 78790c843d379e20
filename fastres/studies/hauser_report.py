"""hauser_report: perturbation by depth as rows, laws and claims, and back from files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from fastres.analysis.depth import (
    SeedLaw,
    local_exponents,
    reaching_depth,
    reciprocal_law,
    seed_law,
)
from fastres.analysis.depth_choice import choose_depth
from fastres.studies import claims
from fastres.studies.claims import Claim

EPSILON: Final = 0.1  # of the stopping rule
ROUGHLY: Final = 0.15  # how far an exponent may be from -1; a wide interval is no agreement
MEASURES: Final = ("scaled", "absolute", "norm", "distance", "roughness")
_FLOATS: Final = ("decay", "error", "scaled_start", *MEASURES)


@dataclass(frozen=True)
class Part:
    """One trained network; means are over its identity blocks."""

    network: str
    data: str
    decay: float
    seed: int
    blocks: int
    error: float
    absolute: float
    scaled: float
    scaled_start: float  # before training
    norm: float  # of the weights of a block
    distance: float  # of those from the start
    roughness: float  # of the step from the weights of one block to those of the next
    profile: list[float]  # scaled, by block

    @property
    def setting(self) -> tuple[str, str, float]:
        """Names the curve that it is a point of."""
        return self.network, self.data, self.decay

    @property
    def key(self) -> tuple[str, str, float, int, int]:
        """Setting, seed, blocks."""
        return (*self.setting, self.seed, self.blocks)

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Part:
        """Rebuild a part from JSON; KeyError, TypeError or ValueError where it is not one."""
        return cls(
            network=str(entry["network"]),
            data=str(entry["data"]),
            seed=int(entry["seed"]),
            blocks=int(entry["blocks"]),
            profile=[float(v) for v in entry["profile"]],
            **{name: float(entry[name]) for name in _FLOATS},
        )


@dataclass(frozen=True)
class Curve:
    """One setting at several depths, with every seed that has all of them."""

    setting: tuple[str, str, float]
    blocks: list[int]  # [n], increasing
    parts: list[list[Part]]  # [seeds][n]

    @property
    def name(self) -> str:
        """What figures and tables call it."""
        network, data, decay = self.setting
        return f"{network}, {data}, decay {decay:g}"

    def of(self, measure: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Give a measure, [seeds, n]."""
        return np.array([[getattr(part, measure) for part in row] for row in self.parts])

    def law(self, measure: str = "scaled") -> SeedLaw:
        """Fit its exponent."""
        return seed_law(self.blocks, self.of(measure))

    def local(self) -> list[float]:
        """Give the exponents between neighbouring depths, of the mean over seeds."""
        return [float(v) for v in local_exponents(self.blocks, self.of("scaled").mean(0))[1]]


def curves(parts: Sequence[Part]) -> list[Curve]:
    """Sort networks into curves of two depths or more."""
    found = []
    for setting in dict.fromkeys(part.setting for part in parts):
        own = {(p.seed, p.blocks): p for p in parts if p.setting == setting}
        blocks = sorted({depth for _, depth in own})
        seeds = sorted({seed for seed, _ in own})
        whole = [s for s in seeds if all((s, depth) in own for depth in blocks)]
        if whole and len(blocks) > 1:
            rows = [[own[s, depth] for depth in blocks] for s in whole]
            found.append(Curve(setting, blocks, rows))
    return found


def rows_of(parts: Sequence[Part]) -> list[Part]:
    """List the networks."""
    return list(parts)


def claims_of(parts: Sequence[Part]) -> list[Claim]:
    """Say of each setting what was measured; only what is there."""
    return [claim for curve in curves(parts) for claim in _of_curve(curve)]


def _of_curve(curve: Curve) -> list[Claim]:
    law, local = curve.law(), curve.local()
    means = [float(v) for v in curve.of("scaled").mean(0)]
    spread = reciprocal_law(curve.blocks, means).spread
    bounds = "one seed" if math.isnan(law.low) else f"{law.low:.2f} to {law.high:.2f}"
    depths = f"{curve.blocks[0]} to {curve.blocks[-1]} blocks"
    choice = choose_depth(lambda n: _measured(curve, n), curve.blocks, EPSILON)
    found = choice.depth if choice.depth is not None else f"none; by the law {choice.estimate}"
    return [
        Claim(
            f"{curve.name}: exponent, {depths}",
            "-1, roughly",
            f"{law.exponent:.2f} ({bounds}); L times value varies {spread:.1f}-fold",
            abs(law.exponent + 1) < ROUGHLY,
        ),
        Claim(
            "  between neighbouring depths",
            "-1",
            ", ".join(f"{value:.2f}" for value in local),
            all(value < -0.8 for value in local),
        ),
        Claim(
            "  falls with depth",
            "yes",
            f"{means[0]:.3f} to {means[-1]:.3f}",
            all(b < a for a, b in pairwise(means)),
        ),
        Claim(f"  first depth with the mean below {EPSILON:g}", "a rule", f"{found}", None),
    ]


def _measured(curve: Curve, blocks: int) -> SimpleNamespace:
    """Give the means over seeds of one depth."""
    at = curve.blocks.index(blocks)
    absolute, scaled = (float(curve.of(m).mean(0)[at]) for m in ("absolute", "scaled"))
    return SimpleNamespace(mean_absolute=absolute, mean_scaled=scaled)


def text(parts: Sequence[Part]) -> str:
    """Lay out the claims for a terminal."""
    return claims.text(claims_of(parts))


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Give the laws and claims to report.json."""
    laws = [
        {
            "setting": curve.name,
            "seeds": len(curve.parts),
            "exponents": {name: _law(curve.law(name)) for name in MEASURES},
            "local exponents": curve.local(),
            f"depth for {EPSILON:g}": _finite(
                reaching_depth(curve.blocks, curve.of("scaled").mean(0), EPSILON)
            ),
        }
        for curve in curves(parts)
    ]
    return {"laws": laws, "claims": [asdict(claim) for claim in claims_of(parts)]}


def _law(law: SeedLaw) -> list[float | None]:
    return _finite((law.exponent, law.low, law.high))


def _finite(values: Sequence[float]) -> list[float | None]:
    """Write what is not a number of JSON as null."""
    return [value if math.isfinite(value) else None for value in values]
