"""littwin_wolf_claims: what the paper says of scales and lengths beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import correlation, fmean, median
from typing import Any, Final

from fastres.analysis.path_scales import (
    critical_points,
    heaviest,
    log_epsilon,
    most_critical_points,
)
from fastres.studies import claims
from fastres.studies.claims import Claim
from fastres.studies.littwin_wolf_report import CIFAR, Part

FIGURE: Final = {0.1: 10, 0.5: 34, 2.0: 67}  # beta -> where figure 1a to 1c has its peak, p = 100
ABSORBED: Final = ("CIFAR ResNet-32, norms of absorbed kernels", "rise, faster after lr drop")
DROP: Final = 81  # epochs before the rate falls
NORMED: Final = {"scale": "one scale per layer", "batch norm": "batch norm"}


def claims_of(parts: Sequence[Part]) -> list[Claim]:
    """Say of each statement of the paper what was measured."""
    found = _formulas()
    for network, name in NORMED.items():
        own = [part for part in parts if part.network == network]
        if own:
            found += _normed(own, name)
        if own and network == "scale":
            found += _theorem_3(own)
    plain = [part for part in parts if part.network == "plain"]
    if plain:
        found += _plain(plain)
    cifar = [part for part in parts if part.network == CIFAR]
    return found + (_cifar(cifar[0]) if cifar else [Claim(*ABSORBED, "not measured", None)])


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


def _normed(parts: Sequence[Part], name: str) -> list[Claim]:
    means = [[fmean(scales[1:]) for scales in part.scale] for part in parts]
    steps = [b > a for each in means for a, b in pairwise(each)]
    ends = [each[-1] for each in means]
    apart = [not min(p.scale[-1][1:]) <= p.scale[-1][0] <= max(p.scale[-1][1:]) for p in parts]
    first, rest = fmean(p.scale[-1][0] for p in parts), fmean(ends)
    return [
        Claim(
            f"mean of the scales, from 1, {name}",
            "rises",
            f"to {min(ends):.3f} - {max(ends):.3f}, in {sum(steps)} of {len(steps)} epochs",
            min(ends) > 1 and sum(steps) >= 0.95 * len(steps),
        ),
        Claim(
            f"scale of the first layer, {name}",
            "apart from the others",
            f"{first:.3f}, theirs {rest:.3f}; outside in {sum(apart)} of {len(parts)} seeds",
            sum(apart) > len(parts) / 2,
        ),
        _deepens(parts, name, "mean_length"),
        _deepens(parts, name, "exact_length"),
    ]


def _theorem_3(parts: Sequence[Part]) -> list[Claim]:
    """Judge the slopes by the log of each scale, before and after a step on the weights."""
    slopes, predicted, measured = (
        [value for part in parts for row in getattr(part, name) for value in row]
        for name in ("slope", "predicted", "measured")
    )
    if not slopes:
        return []
    condition = [m < 0 for p, m in zip(predicted, measured, strict=True) if p < 0]
    ratio = median(m / p for p, m in zip(predicted, measured, strict=True) if p)
    outweighed = median(abs(s / p) for s, p in zip(slopes, predicted, strict=True) if p)
    pull, growth = [], []
    for part in parts:
        for epoch, (now, then) in enumerate(pairwise(part.scale)):
            pull += [-s / a for s, a in zip(part.slope[epoch], now[1:], strict=True)]
            growth += [b - a for a, b in zip(now[1:], then[1:], strict=True)]
    held = f"{len(condition)} of {len(predicted)}"
    return [
        Claim(
            "Theorem 3: dL/d lambda after a step on w",
            "falls if <g_p, g> > 0",
            f"so in {held}, falls in {sum(condition)}",
            sum(condition) >= 0.95 * len(condition),
        ),
        Claim(
            "its change over the one predicted, median",
            "1 to first order",
            f"{ratio:.2f}",
            abs(ratio - 1) < 0.1,
        ),
        Claim("dL/d lambda before the step", "assumed 0", f"{outweighed:.0f} x the change", None),
        Claim(
            "growth of a scale in an epoch",
            "not asked",
            f"correlation {correlation(pull, growth):.2f} with -dL/d lambda",
            None,
        ),
    ]


def _plain(parts: Sequence[Part]) -> list[Claim]:
    steps = [b > a for part in parts for a, b in pairwise(part.weight_norm)]
    growth = fmean(part.weight_norm[-1] / part.weight_norm[0] for part in parts)
    measured = f"rises in {sum(steps)} of {len(steps)} epochs, x {growth:.2f}"
    about = "norm of the weights, no batch norm"
    found = [Claim(about, "rises steadily", measured, sum(steps) >= 0.95 * len(steps))]
    pairs = [pair for p in parts for pair in zip(p.predicted_all, p.measured_all, strict=True)]
    if pairs:
        falls = [m < 0 for p, m in pairs if p < 0]
        found.append(
            Claim(
                "Theorem 4: dL/dC after a step on w",
                "falls if one of g_m, g_p dominates",
                f"to fall in {len(falls)} of {len(pairs)}, falls in {sum(falls)}",
                sum(falls) >= 0.95 * len(falls),
            )
        )
    return [*found, _deepens(parts, "no batch norm", "exact_length")]


def _cifar(part: Part) -> list[Claim]:
    norm, scale = part.weight_norm, [fmean(scales) for scales in part.scale]
    drop = min(DROP, len(norm) - 1)
    before = (norm[drop] - norm[0]) / drop
    if drop == len(norm) - 1:
        measured, faster = f"{norm[0]:.2f} to {norm[-1]:.2f}, no lr drop", None
    else:
        later = min(drop + 10, len(norm) - 1)
        after = (norm[later] - norm[drop]) / (later - drop)
        measured = f"{norm[0]:.2f} to {norm[-1]:.2f}; {before:+.3f}, then {after:+.3f} an epoch"
        faster = after > before > 0
    path = f"{scale[0]:.2f}, {scale[drop]:.2f} at the drop, {scale[-1]:.2f}"
    turns = None if faster is None else scale[0] < scale[drop] > scale[-1]
    return [
        Claim(*ABSORBED, measured, faster),
        Claim("its batch-norm scales", "grow until the drop, then fall", path, turns),
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
