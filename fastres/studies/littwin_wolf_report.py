"""littwin_wolf_report: trainings as rows and files, and back from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

CIFAR: Final = "ResNet-32"  # the network of that part
_LISTS: Final = ("weight_norm", "error", "beta", "mean_length", "exact_length")
_GROWTH: Final = ("predicted_all", "measured_all")  # a number per epoch
_LAYERS: Final = ("scale", "slope", "predicted", "measured")  # a list per epoch


@dataclass(frozen=True)
class Part:
    """One training; all lists have the start and every epoch, those of growth may be empty."""

    network: str
    seed: int
    scale: list[list[float]]  # [E+1][layers], mean |weight| of batch norm, the first layer first
    weight_norm: list[float]  # of all layers; of ResNet-32 the root mean square over blocks
    error: list[float]  # on the training samples; of ResNet-32 on test images
    beta: list[float]  # that the gains of the branches imply
    mean_length: list[float]  # by the gains
    exact_length: list[float]  # by the gradient
    # of the loss by the log of each branch's scale, [E+1][layers - 1]; see analysis.scale_growth
    slope: list[list[float]] = field(default_factory=list)
    predicted: list[list[float]] = field(default_factory=list)
    measured: list[list[float]] = field(default_factory=list)
    predicted_all: list[float] = field(default_factory=list)  # by that of all weights
    measured_all: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """Which network, and with which seed."""
        return self.network, self.seed

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Part:
        """Rebuild a part from JSON; KeyError, TypeError or ValueError where it is not one."""
        lists: dict[str, Any] = {n: [float(v) for v in entry[n]] for n in (*_LISTS, *_GROWTH)}
        lists |= {n: [[float(v) for v in row] for row in entry[n]] for n in _LAYERS}
        counts = {len(v) for n, v in lists.items() if v or n in (*_LISTS, "scale")}
        if len(counts) != 1:
            raise ValueError("all lists must have one value per epoch")
        return cls(network=str(entry["network"]), seed=int(entry["seed"]), **lists)


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
