"""lagzi_report: parts of the study of residual dynamics as rows and claims, and back from files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fastres.studies import claims
from fastres.studies.claims import Claim

SIGMAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the noise, in standard deviations of all pixels
COMPARABLE: Final = 0.03  # largest difference of clean errors at which noise is compared
KINDS: Final = ("circles", "adaptive", "mnist")
_LISTS: Final = ("change", "spread", "noise_error", "noise_growth", "eigenvalues")


@dataclass(frozen=True)
class Part:
    """One trained network."""

    kind: str  # one of KINDS
    network: str  # shared or own weights of residual layers, or the mlp
    seed: int
    error: float  # on the test set
    depths: list[int]  # layers after each epoch
    change: list[float] = field(default_factory=list)  # mean |y(t+1) - y(t)|
    spread: list[float] = field(default_factory=list)  # of y(t) within a class, mean of neurons
    ends: list[list[float]] = field(default_factory=list)  # circles: last residual of each class
    noise_error: list[float] = field(default_factory=list)  # at SIGMAS
    noise_growth: list[float] = field(default_factory=list)  # ||d(t)|| / ||x(t)||
    eigenvalues: list[float] = field(default_factory=list)  # largest real part, by class
    late_change: float = 0.0  # after 1000 layers
    late_spread: float = 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """What, which network, seed."""
        return self.kind, self.network, self.seed

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Part:
        """Rebuild a part from JSON; KeyError, TypeError or ValueError where it is not one."""
        if entry["kind"] not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {entry['kind']}")
        return cls(
            kind=str(entry["kind"]),
            network=str(entry["network"]),
            seed=int(entry["seed"]),
            error=float(entry["error"]),
            depths=[int(v) for v in entry["depths"]],
            ends=[[float(v) for v in end] for end in entry["ends"]],
            late_change=float(entry["late_change"]),
            late_spread=float(entry["late_spread"]),
            **{name: [float(v) for v in entry[name]] for name in _LISTS},
        )


@dataclass(frozen=True)
class Row:
    """One trained network in a line."""

    kind: str
    network: str
    seed: int
    layers: int
    error: float
    last_change: float


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """List the networks."""
    return [
        Row(p.kind, p.network, p.seed, p.depths[-1], p.error, p.change[-1] if p.change else 0.0)
        for p in parts
    ]


def of(parts: Sequence[Part], kind: str, network: str) -> list[Part]:
    """Choose parts."""
    return [part for part in parts if (part.kind, part.network) == (kind, network)]


def claims_of(parts: Sequence[Part]) -> list[Claim]:
    """Say of each statement of the paper what was measured; only what is there."""
    found: list[Claim] = []
    fixed = of(parts, "circles", "shared")
    if fixed:
        found += _circles(fixed)
    for network, paper in (("shared", "15 to 5 layers, accuracy 1"), ("own", "no layer removed")):
        adaptive = of(parts, "adaptive", network)
        if adaptive:
            found.append(_adaptive(adaptive, network, paper))
    for network, paper, error in (("shared", "0.014", 0.014), ("own", "0.018", 0.018)):
        for part in of(parts, "mnist", network):
            measured, agrees = f"{part.error:.4f}", abs(part.error - error) < 0.005
            found.append(Claim(f"MNIST, {network} weights, test error", paper, measured, agrees))
    for part in of(parts, "mnist", "own"):
        at = next((t + 2 for t, c in enumerate(part.change) if c < 0.01), None)
        measured = "no" if at is None else f"by layer {at}"
        measured += f"; last change {part.change[-1]:.3f}"
        about = "own weights: residuals steady (change < 0.01)"
        found.append(Claim(about, "by layer 4", measured, at is not None and at <= 4))
    for part in of(parts, "mnist", "shared"):
        found += _unrolled(part)
    residual, mlp = of(parts, "mnist", "own"), of(parts, "mnist", "mlp")
    if residual and mlp:
        found.append(_noise(residual[0], mlp[0]))
    return found


def _circles(parts: Sequence[Part]) -> list[Claim]:
    right = sum(part.error == 0 for part in parts)
    near = sum(math.dist(*part.ends) < 0.05 for part in parts)
    count = len(parts)
    every = f"of {count} seeds"
    return [
        Claim("circles, shared weights, accuracy 1", "yes", f"{right} {every}", 2 * right > count),
        Claim(
            "circles: classes rest at one point", "(0, 0, 1)", f"{near} {every}", 2 * near > count
        ),
    ]


def _adaptive(parts: Sequence[Part], network: str, paper: str) -> Claim:
    measured = ", ".join(f"{p.depths[-1]} ({1 - p.error:.3g})" for p in parts)
    if network == "shared":
        good = sum(p.depths[-1] < 15 and p.error == 0 for p in parts)
        agrees = 3 * good >= 2 * len(parts)
    else:
        agrees = all(p.depths[-1] == 15 for p in parts)
    return Claim(f"circles, adaptive, {network} weights: layers", paper, measured, agrees)


def _unrolled(part: Part) -> list[Claim]:
    slow = [value for value in part.eigenvalues if value > 0]
    most = max(part.eigenvalues)
    return [
        Claim(
            "1000 layers: change of y per layer; spread in a class",
            "negligible",
            f"{part.late_change:.1e}; {part.late_spread:.3f}",
            part.late_change < 1e-3 and part.late_spread < 0.01,
        ),
        Claim(
            "1000 layers: classes with an eigenvalue > 0",
            "3 of 10, about 0.02",
            f"{len(slow)} of {len(part.eigenvalues)}, largest {most:.2g}",
            len(slow) > 0 and most < 0.1,
        ),
    ]


def _noise(residual: Part, mlp: Part) -> Claim:
    clean = f"clean errors {residual.error:.3f} and {mlp.error:.3f}"
    about = "error by noise, residual against MLP"
    paper = "residual more robust"
    if abs(residual.error - mlp.error) > COMPARABLE:
        return Claim(about, paper, f"not comparable: {clean}", None)
    lost = [
        (a - residual.noise_error[0], b - mlp.noise_error[0])
        for a, b in zip(residual.noise_error[1:], mlp.noise_error[1:], strict=True)
    ]
    measured = f"+{lost[-1][0]:.3f} against +{lost[-1][1]:.3f} at sigma {SIGMAS[-1]:g}; {clean}"
    return Claim(about, paper, measured, all(a < b for a, b in lost))


def text(parts: Sequence[Part]) -> str:
    """Lay out the claims for a terminal."""
    return claims.text(claims_of(parts))


def summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Give the claims to report.json."""
    return {"claims": [asdict(claim) for claim in claims_of(parts)]}
