"""result: PathGradients, the gradient of a network by the length of the paths it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from fastres.paths import saving
from fastres.paths.intervals import shortest
from fastres.paths.tally import log2_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["exact", "moments", "energy", "sampled"]


_EXACT = ("method must be 'exact'", "{method!r}")
_ENERGY = ("method must be 'energy'", "{method!r}")
_SAMPLED = ("method must be 'sampled'", "{method!r}")
_BLOCK = ("by must be 'block'", "'length'")
_NEEDS = {
    **dict.fromkeys(("logs", "dots", "tail"), _EXACT),
    "gradients": ("keep must be True, and method 'exact',", "{method!r} or keep=False"),
    **dict.fromkeys(("energy", "energy_error"), _ENERGY),
    **dict.fromkeys(("mean_norm", "mean_norm_error"), _SAMPLED),
    **dict.fromkeys(("block_dots", "block_norms", "weight_norms", "weight_tails"), _BLOCK),
}

_FACTS = ("method", "where", "sites", "paths", "sum_error", "mixes_samples")
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
class PathGradients:
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
    """

    method: Method
    where: str
    sites: tuple[str, ...]
    paths: tuple[int, ...]
    gradient: Tensor
    sum_error: float = math.nan
    mixes_samples: bool = False
    measured: Mapping[str, Tensor] = field(default_factory=dict)  # by the names of the properties

    @property
    def max_length(self) -> int:
        """K, the longest length kept."""
        return len(self.paths) - 1

    # exact: the coherent sum

    @property
    def norms(self) -> Tensor:
        """||G_k|| over the batch, [K+1]; 0 where it is below 1e-308, see `log2_norms`."""
        return self.log2_norms.exp2()

    @property
    def log2_norms(self) -> Tensor:
        """log2 ||G_k|| over the batch, [K+1]; -inf only where a row is zero at any scale."""
        return log2_norm(self._get("logs")[:-1])

    @property
    def norms_per_sample(self) -> Tensor:
        """||G_k|| of each sample, [K+1, B]."""
        return self.log2_norms_per_sample.exp2()

    @property
    def log2_norms_per_sample(self) -> Tensor:
        """log2 ||G_k|| of each sample, [K+1, B]."""
        return self._each("logs")[:-1]

    @property
    def shares(self) -> Tensor:
        """<G_k, g> / <g, g> over the batch, [K+1]; with `tail_share` they add up to 1."""
        return self._share(self._get("dots").sum(1))[:-1]

    @property
    def shares_per_sample(self) -> Tensor:
        """<G_k, g> / <g, g> of each sample, [K+1, B]."""
        dots = self._each("dots")
        return dots[:-1] / dots.sum(0)

    @property
    def gradients(self) -> Tensor:
        """G_k itself, [K+1, B, ...] in the dtype of g; needs keep=True."""
        return self._get("gradients")

    @property
    def tail(self) -> Tensor:
        """The gradient summed over all paths longer than K, [B, ...]; zero where there are none."""
        return self._get("tail")

    @property
    def tail_norm(self) -> float:
        """Norm of the tail over the batch."""
        return log2_norm(self._get("logs")[-1]).exp2().item()

    @property
    def tail_share(self) -> float:
        """<tail, g> / <g, g> over the batch."""
        return self._share(self._get("dots").sum(1))[-1].item()

    # energy and sampled: single paths

    @property
    def energy(self) -> Tensor:
        """Sum over all paths of length k of ||g_path||^2, [K+1]: what does not cancel."""
        return self._get("energy")[:-1]

    @property
    def energy_error(self) -> Tensor:
        """Standard error of `energy`, [K+1]."""
        return self._get("energy_error")[:-1]

    @property
    def tail_energy(self) -> float:
        """Sum over all paths longer than K of ||g_path||^2."""
        return self._get("energy")[-1].item()

    @property
    def mean_norm(self) -> Tensor:
        """Mean of ||g_path|| over random paths of length k, [K+1]."""
        return self._get("mean_norm")

    @property
    def mean_norm_error(self) -> Tensor:
        """Standard error of `mean_norm`, [K+1]."""
        return self._get("mean_norm_error")

    @property
    def count_times_mean(self) -> Tensor:
        """Number of paths times `mean_norm`, [K+1]: Veit's figure. It is not ||G_k||."""
        return (self.mean_norm.log2() + self._log2_paths()).exp2()

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

    # by="block"

    @property
    def block_shares(self) -> Tensor:
        """<g_l, g> / <g, g> with g_l the gradient through the branch of site l, [L]."""
        return self._share(self._get("block_dots"))

    @property
    def block_norms(self) -> Tensor:
        """||g_l||, the gradient of all paths through the branch of site l, [L]."""
        return self._get("block_norms")

    @property
    def weight_norms(self) -> Tensor:
        """Norm of the gradient by the weights that the branch of site l uses, by the length above.

        [L, K]: column k is what comes from paths with k branches between the loss and that branch.
        """
        return self._get("weight_norms")

    @property
    def weight_tails(self) -> Tensor:
        """The same for all longer lengths together, [L]."""
        return self._get("weight_tails")

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
            ValueError: If `save` did not write it.
        """
        facts, arrays = saving.read(Path(path), _FACTS)
        facts |= {name: tuple(facts[name]) for name in ("sites", "paths")}
        return cls(**facts, gradient=arrays.pop("gradient"), measured=arrays)

    def __repr__(self) -> str:
        count = f"{len(self.sites)} sites, lengths 0 to {self.max_length}"
        lines = [f"PathGradients by {self.method!r} at {self.where!r}: {count}"]
        if self._columns or "moments" in self.measured:
            lines.append(f"length {self.mean_length:.4g} ± {self.std_length:.3g}")
        if "dots" in self.measured:
            lines.append(
                f"tail {self.tail_share:.3g} of the gradient, sum off {self.sum_error:.1e}"
            )
        return "\n".join(lines)

    @property
    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS[self.method]

    def _get(self, name: str) -> Tensor:
        if name in self.measured:
            return self.measured[name]
        rule, got = _NEEDS[name]
        raise RuntimeError(
            f"path_gradients: {rule} to read this, got {got.format(method=self.method)}"
        )

    def _each(self, name: str) -> Tensor:
        if self.mixes_samples:
            raise RuntimeError(
                "path_gradients: batch norm must be in eval mode to read single samples, got "
                "train mode: only the whole batch has a gradient"
            )
        return self._get(name)

    def _share(self, dots: Tensor) -> Tensor:
        whole = self.gradient.cpu().double().square().sum()
        return dots / whole

    def _log2_paths(self) -> Tensor:
        logs = [math.log2(n) if n else -math.inf for n in self.paths]
        return torch.tensor(logs, dtype=torch.float64, device="cpu")
