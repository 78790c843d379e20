"""result: PathGradients, the gradient of a network by the length of the paths it took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fastres.paths import saving
from fastres.paths.intervals import shortest
from fastres.paths.measures import Measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FACTS = ("method", "where", "sites", "paths", "sum_error", "mixes_samples", "input_precision")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "exact": ("norms", "log2_norms", "shares"),
    "moments": (),
    "energy": ("energy", "energy_error"),
    "sampled": ("mean_norm", "mean_norm_error", "count_times_mean"),
}
_PLOTTED = {
    "exact": ("shares", "share of the gradient"),
    "energy": ("energy", "energy of the single paths"),
    "sampled": ("count_times_mean", "number of paths times mean norm"),
}


@dataclass(frozen=True, eq=False, repr=False)
class PathGradients(Measures):
    """What `fastres.path_gradients` measured; which of it there is depends on the method.

    G_k is the gradient summed over all paths of k branches, g = sum_k G_k the ordinary gradient, K
    the longest length kept. All measures are float64 on the CPU. Reading what the method does not
    give raises RuntimeError.

    Attributes:
        method: exact, moments, energy or sampled.
        where: What was differentiated by: "input", "embedding" or a site.
        sites: Names of the counted sites between there and the loss, L of them.
        paths: How many paths of each length there are, K + 1 exact integers.
        gradient: The ordinary gradient g, [B, ...].
        sum_error: ||sum_k G_k - g|| / ||g||, tail included, as computed; nan for "sampled".
        mixes_samples: Whether batch norm in train mode tied the samples of the batch together.
        input_precision: "ieee", or what `mlp_stack_paths` made of the factors of its products:
            "tf32x3", or "tf32", which is not exact.
    """

    # the distribution of lengths

    @property
    def weights(self) -> Tensor:
        """What the lengths are weighed by, [K+1]: |share|, energy, or count times mean norm."""
        if self.method == "energy":
            return self.energy
        return self.count_times_mean if self.method == "sampled" else self.shares.abs()

    def interval(self, mass: float = 0.95) -> tuple[int, int]:
        """Find the shortest interval of lengths, both ends included, that holds so much weight.

        Args:
            mass: Part of all `weights`, those of the tail included ("sampled" has no tail).

        Raises:
            ValueError: If mass is not in (0, 1], or the lengths kept do not hold it.
        """
        beyond = {"exact": "tail_share", "energy": "tail_energy"}.get(self.method)
        return shortest(self.weights.tolist(), abs(getattr(self, beyond)) if beyond else 0.0, mass)

    @property
    def mean_length(self) -> float:
        """Mean length, weighed by the shares; of the lengths kept, or of all ("moments")."""
        return self._moments()[0]

    @property
    def std_length(self) -> float:
        """Standard deviation of the length; nan where shares below zero make the variance so."""
        variance = self._moments()[1]
        return math.sqrt(variance) if variance >= 0 else math.nan

    def _moments(self) -> tuple[float, float]:
        if "moments" in self.measured:
            mean, variance = self.measured["moments"].tolist()
            return mean, variance
        weights = self.shares if self.method == "exact" else self.weights
        length = torch.arange(len(weights), dtype=torch.float64, device="cpu")
        mean = (length * weights).sum() / weights.sum()
        variance = ((length - mean).square() * weights).sum() / weights.sum()
        return mean.item(), variance.item()

    # to look at, and to keep

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with one row per length.

        Columns: length, paths (exact integers), and what the method measured: norm, log2_norm,
        share; energy, energy_error; mean_norm, mean_norm_error, count_times_mean.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install fastres[demo]") from error
        columns = {name.rstrip("s"): getattr(self, name).numpy() for name in self._columns}
        paths = pd.Series(self.paths, dtype=object)  # they outgrow 64 bits
        return pd.DataFrame({"length": range(len(self.paths)), "paths": paths, **columns})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the measure of each length, and mark the interval that holds 95 % of the weight.

        Args:
            ax: Where to draw; None makes a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install fastres[demo]") from error
        if not self._columns:
            self._get("dots")
        if ax is None:
            ax = pyplot.figure(layout="constrained").subplots()
        name, label = _PLOTTED[self.method]
        values = getattr(self, name).numpy()
        ax.bar(range(len(values)), values)
        try:
            first, last = self.interval()
            ax.axvspan(first - 0.5, last + 0.5, alpha=0.15, label=f"95 % in {first} to {last}")
            ax.legend()
        except ValueError:
            pass  # the lengths kept do not hold it
        ax.set_xlabel("path length (branches)")
        ax.set_ylabel(label)
        return ax

    def save(self, path: str | Path) -> None:
        """Write all of it to one file, without pickle: NumPy's npz with a JSON entry.

        Args:
            path: The file; it is there whole or not at all.
        """
        facts = {name: getattr(self, name) for name in _FACTS}
        saving.write(Path(path), facts, {"gradient": self.gradient, **self.measured})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote; tensors are on the CPU.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If `save` did not write it, or it is damaged.
        """
        return saving.read(Path(path), cls._made)

    @classmethod
    def _made(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        known = {name: facts[name] for name in _FACTS}
        known |= {name: tuple(facts[name]) for name in ("sites", "paths")}
        return cls(**known, gradient=tensors.pop("gradient"), measured=tensors)

    def __repr__(self) -> str:
        count = f"{len(self.sites)} sites, lengths 0 to {self.max_length}"
        lines = [f"PathGradients by {self.method!r} at {self.where!r}: {count}"]
        if self._columns or "moments" in self.measured:
            lines.append(f"length {self.mean_length:.4g} ± {self.std_length:.3g}")
        if "dots" in self.measured:
            lines.append(
                f"tail {self.tail_share:.3g} of the gradient, sum off {self.sum_error:.1e}"
            )
        if self.input_precision != "ieee":
            inexact = ": not exact" if self.input_precision == "tf32" else ""
            lines.append(f"factors of products as {self.input_precision}{inexact}")
        return "\n".join(lines)

    @property
    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS[self.method]
