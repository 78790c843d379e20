"""perturbation: how far each block is from the identity (Hauser 2019, arXiv 1902.04106).

With x the skip and f the branch of a site, the perturbation is f: absolute ||f||, scaled ||f|| /
||x||. The paper's abstract names the two and an average; which norm, and what is averaged first, it
does not say there. So each reading has a name here. The default is that of `fastres.record`:
Euclidean norm over all features of a sample, mean of the ratios over samples, then over blocks.

All but `magnitudes` comes from the three sums that `record` keeps. Norms of pixels or channels and
other norms than the Euclidean one do not follow from them: `magnitudes` runs the model once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from fastres.analysis.operands import read_operands
from fastres.tape import Tape
from fastres.tracing import Kind

REDUCTIONS: Final = ("mean_of_ratios", "ratio_of_means", "rms")
SCALES: Final = ("input", "output")
GRANULARITIES: Final = ("sample", "pixel", "channel")


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What the blocks of one model add, each value per site over the samples; tensors [sites].

    Lengths are in units of the stream; per_feature, they are divided by sqrt(D), D the features of
    a sample at the site: so stages of different shapes compare.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    absolute: Tensor  # float64: mean of ||f||, or its root mean square for rms
    scaled: Tensor  # float64, no unit
    angle: Tensor  # float64, radians: mean of the angle between x and f
    parallel: Tensor  # float64: mean of <x, f> / ||x||, negative where f shortens x
    orthogonal: Tensor  # float64: mean length of the part of f at right angles to x

    @property
    def mean_absolute(self) -> float:
        """Mean of `absolute` over the identity sites; nan where there is none."""
        return self._over("identity", self.absolute)

    @property
    def mean_scaled(self) -> float:
        """Mean of `scaled` over the identity sites; nan where there is none."""
        return self._over("identity", self.scaled)

    @property
    def projection_absolute(self) -> float:
        """Mean of `absolute` over the sites whose skip is a projection; nan where there is none."""
        return self._over("projection", self.absolute)

    @property
    def projection_scaled(self) -> float:
        """Mean of `scaled` over the sites whose skip is a projection; nan where there is none."""
        return self._over("projection", self.scaled)

    def _over(self, kind: Kind, values: Tensor) -> float:
        return values[[each == kind for each in self.kinds]].mean().item()


def perturbation(
    tape: Tape,
    reduce: str = "mean_of_ratios",
    scale_by: str = "input",
    per_feature: bool = False,
) -> Perturbation:
    """Measure how far each block is from the identity, from the sums of a tape.

    The orthogonal part is a difference of sums, in float32 for most models: below 1e-3 of ||f|| it
    is rounding. Division is plain, as on the tape: a skip of zeros gives inf or nan.

    Args:
        tape: What `record(model, per_sample=True)` gave.
        reduce: How samples become one scaled value: mean_of_ratios, mean(||f|| / ||x||);
            ratio_of_means, mean ||f|| / mean ||x||; rms, sqrt(sum ||f||^2 / sum ||x||^2).
        scale_by: The length under the fraction: that of the input x, or of the output x + f.
        per_feature: Whether lengths are per sqrt(D).

    Returns:
        The values per site; its means are over identity sites, projections apart.

    Raises:
        RuntimeError: If the tape has seen no pass or keeps no single samples.
        ValueError: If reduce or scale_by is not known.

    Example:
        >>> from fastres import nn, record
        >>> model = nn.ResidualMLP(in_features=4, classes=2, width=8, blocks=3)
        >>> with record(model, per_sample=True) as tape:
        ...     y = model(torch.ones(5, 4))
        >>> perturbation(tape, "rms").scaled.shape
        torch.Size([3])
    """
    _check_choice("perturbation", "reduce", reduce, REDUCTIONS)
    _check_choice("perturbation", "scale_by", scale_by, SCALES)
    x_sq, f_sq, dot = (t.double() for t in (tape.skip_sq, tape.branch_sq, tape.dot))  # [sites, N]
    base_sq = x_sq if scale_by == "input" else (x_sq + 2 * dot + f_sq).clamp(min=0)
    f = f_sq.sqrt()
    if reduce == "rms":
        absolute, scaled = f_sq.mean(1).sqrt(), (f_sq.sum(1) / base_sq.sum(1)).sqrt()
    elif reduce == "ratio_of_means":
        absolute, scaled = f.mean(1), f.mean(1) / base_sq.sqrt().mean(1)
    else:
        absolute, scaled = f.mean(1), (f / base_sq.sqrt()).mean(1)
    parallel = dot / x_sq.sqrt()
    orthogonal = (f_sq - parallel.square()).clamp(min=0).sqrt()
    features = torch.tensor([math.prod(site.shape[1:]) for site in tape.sites])
    unit = features.double().sqrt() if per_feature else torch.ones(len(features))
    return Perturbation(
        names=tuple(tape.names),
        kinds=tuple(tape.kinds),
        absolute=absolute / unit,
        scaled=scaled,
        angle=(dot / (x_sq * f_sq).sqrt()).clamp(-1, 1).acos().mean(1),
        parallel=parallel.mean(1) / unit,
        orthogonal=orthogonal.mean(1) / unit,
    )


class Magnitudes(NamedTuple):
    """Absolute and scaled perturbation in one reading, per sample or per site."""

    absolute: Tensor  # mean over the places of a sample
    scaled: Tensor  # mean over those whose length under the fraction is not 0; nan if there is none
    counted: Tensor  # share of the places that are in the mean of scaled


def magnitude(
    x: Tensor,
    f: Tensor,
    norm: float = 2,
    granularity: str = "sample",
    scale_by: str = "input",
) -> Magnitudes:
    """Measure f against x, sample by sample, in any norm and for each place on its own.

    A place is a whole sample, a pixel (its channels) or a channel (its pixels). Behind a ReLU whole
    channels of x are 0; no ratio is taken there, and `counted` says of how many one was.

    Args:
        x: Skip, [B, ...]; [B, C, ...] unless granularity is sample.
        f: Branch, the shape of x.
        norm: Order p of the norm over a place, above 0: 1, 2, inf.
        granularity: sample, pixel or channel.
        scale_by: As in `perturbation`.

    Returns:
        Three tensors [B] float64.

    Raises:
        ValueError: If a shape does not fit or a choice is not known.
    """
    _check_choice("magnitude", "granularity", granularity, GRANULARITIES)
    _check_choice("magnitude", "scale_by", scale_by, SCALES)
    if not norm > 0:
        raise ValueError(f"magnitude: norm must be positive, got {norm}")
    least = 2 if granularity == "sample" else 3
    if x.shape != f.shape or x.dim() < least:
        found = f"{[*x.shape]} and {[*f.shape]}"
        raise ValueError(f"magnitude: x and f must have one shape of {least} or more, got {found}")
    base = x if scale_by == "input" else x + f
    lengths = (_lengths(t.double(), norm, granularity) for t in (f, base))
    above, under = lengths  # [B, places]
    ratio = torch.where(under > 0, above / under, torch.nan)
    return Magnitudes(above.mean(1), ratio.nanmean(1), (under > 0).double().mean(1))


def _lengths(t: Tensor, norm: float, granularity: str) -> Tensor:
    """Return the norm of each place, [B, places]."""
    if granularity == "sample":
        return torch.linalg.vector_norm(t.flatten(1), norm, 1)[:, None]
    over = 1 if granularity == "pixel" else 2  # of [B, C, pixels]
    return torch.linalg.vector_norm(t.flatten(2), norm, over)


def magnitudes(
    model: nn.Module,
    x: Tensor,
    norm: float = 2,
    granularity: str = "sample",
    scale_by: str = "input",
) -> Magnitudes:
    """Measure every site of a model by `magnitude`, in one pass.

    Args:
        model: Any module with residual adds; runs in its present mode, without gradients.
        x: Its input, [B, ...].
        norm: As in `magnitude`.
        granularity: As in `magnitude`.
        scale_by: As in `magnitude`.

    Returns:
        Three tensors [sites] float64: means over the samples.

    Raises:
        ValueError: If the model has no site, or as in `magnitude`.
    """

    def read(_: int, skip: Tensor, branch: Tensor) -> Tensor:
        each = magnitude(skip, branch, norm, granularity, scale_by)
        return torch.stack([each.absolute.mean(), each.scaled.nanmean(), each.counted.mean()])

    _, found = read_operands("magnitudes", model, x, read)
    return Magnitudes(*torch.stack(found, 1).cpu())


def _check_choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
