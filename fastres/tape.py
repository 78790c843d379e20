"""tape: what was recorded at the sites of a model, as means over samples or sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastres.adds import Add, Site, Stack
from fastres.measuring import measure
from fastres.ops import Stats
from fastres.tracing import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Group = tuple[torch.device, torch.dtype, tuple[int, ...]]  # sites with equal batches, in one place


@dataclass(slots=True)
class _Total:
    """What a group of sites has seen. No value leaves the device before it is read."""

    samples: int = 0
    sums: Tensor | None = None  # [3, sites] float64: of absolute, scaled and cosine over samples
    passes: list[Tensor] = field(default_factory=list)  # each [3, sites, B], the sums as measured


def _plain(t: Tensor) -> Tensor:
    """Return what functorch has wrapped: it cannot be read once its transform has ended."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            raise RuntimeError("record: model must not run under vmap, got a batched tensor")
        t = functorch.get_unwrapped(t)
    return t


class Tape:
    """Record of the residual adds of a model, filled by `fastres.record`.

    With x the skip and f the branch of a site, per sample over all features (Hauser 2019, arXiv
    1902.04106: the perturbation from identity):

        absolute = ||f||      scaled = ||f|| / ||x||      cosine = <x, f> / (||x|| ||f||)

    Means are over the samples of all passes, in float64 on the CPU; reading one waits for the
    device. Division is plain: a sample whose skip is all zero makes `scaled` inf, or nan where its
    branch is zero too. Where dim 0 of a site is not the batch, its rows count as samples.

    Everything read from it raises RuntimeError before the first pass, single samples also without
    per_sample=True and where the sites differ in their number of samples.
    """

    def __init__(self, model: str, per_sample: bool = False) -> None:
        self.per_sample = per_sample
        self._model = model
        self._sites: list[Site] = []
        # first site -> sums [sites, 3, B] of it and those that follow in this pass, skip
        self._now: dict[int, tuple[Tensor, int]] = {}
        self._totals: dict[Group, _Total] = {}

    def at(self, site: int, call: Add, skip: int) -> Any:
        """Run the add of a site and keep its sums (called by Watch)."""
        for side in call.operands:
            _plain(side)
        out, sums = measure(call)
        self._now[site] = _plain(sums)[None], skip
        return out

    def stack(self, first: int, call: Stack) -> tuple[Tensor, Stats]:
        """Run a stack and keep the sums of all its sites (called by Watch)."""
        _plain(call.x)
        out = call.call()
        self._now[first] = _plain(out[1].sums.detach()), 0
        return out

    def failed(self) -> None:
        """Forget the pass under way: it ended with an exception (called by Watch)."""
        self._now = {}

    @torch.no_grad()
    def passed(self, sites: list[Site]) -> None:
        """Add the pass to the totals: a few launches, however many sites (called by Watch)."""
        if not sites:
            raise ValueError(
                f"record: model must contain a residual add, found none in {self._model}"
            )
        self._sites, now, self._now = sites, self._now, {}
        groups: dict[tuple[torch.device, torch.dtype, int, int], list[int]] = {}
        for index in sorted(now):
            sums, skip = now[index]
            groups.setdefault((sums.device, sums.dtype, sums.size(2), skip), []).append(index)
        for (device, dtype, batch, skip), firsts in groups.items():
            members = [i for k in firsts for i in range(k, k + now[k][0].size(0))]
            raw = torch.cat([now[k][0] for k in firsts]).transpose(0, 1)  # [3, sites, B]
            if skip == 1:
                raw = torch.stack([raw[1], raw[0], raw[2]])
            total = self._totals.setdefault((device, dtype, tuple(members)), _Total())
            wide = raw if device.type == "mps" else raw.double()  # mps has no float64
            norm, length = wide[0].sqrt(), wide[1].sqrt()
            means = torch.stack([length, length / norm, wide[2] / (norm * length)])
            sums = means.sum(2)
            total.sums = _plain(sums if total.sums is None else total.sums + sums)
            total.samples += batch
            if self.per_sample:
                total.passes.append(_plain(raw))

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order in which they ran."""
        if not self._sites:
            raise RuntimeError("record: tape must see a forward pass before it is read, got none")
        return list(self._sites)

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return [site.name for site in self.sites]

    @property
    def kinds(self) -> list[Kind]:
        """Kinds of the sites: "identity" or "projection"."""
        return [site.kind for site in self.sites]

    @property
    def samples(self) -> int:
        """Samples seen in all passes (rows of the first site)."""
        return self._samples[0]

    @property
    def absolute(self) -> Tensor:
        """Mean absolute perturbation per site, [sites] float64, in units of the stream."""
        return self._mean(0)

    @property
    def scaled(self) -> Tensor:
        """Mean scaled perturbation per site, [sites] float64, without unit."""
        return self._mean(1)

    @property
    def cosine(self) -> Tensor:
        """Mean cosine between skip and branch per site, [sites] float64."""
        return self._mean(2)

    @property
    def mean_absolute(self) -> float:
        """Mean of `absolute` over the identity sites; nan where there is none."""
        return self._over_identity(self.absolute)

    @property
    def mean_scaled(self) -> float:
        """Mean of `scaled` over the identity sites; nan where there is none."""
        return self._over_identity(self.scaled)

    @property
    def skip_sq(self) -> Tensor:
        """Squared norm of the skip, [sites, samples]; needs per_sample=True."""
        return self._each(0)

    @property
    def branch_sq(self) -> Tensor:
        """Squared norm of the branch, [sites, samples]; needs per_sample=True."""
        return self._each(1)

    @property
    def dot(self) -> Tensor:
        """Inner product of skip and branch, [sites, samples]; needs per_sample=True."""
        return self._each(2)

    @property
    def _samples(self) -> list[int]:
        count = [0] * len(self.sites)
        for (_, _, members), total in self._totals.items():
            for site in members:
                count[site] += total.samples
        return count

    def _mean(self, which: int) -> Tensor:
        mean = torch.zeros(len(self.sites), dtype=torch.float64, device="cpu")
        for (_, _, members), total in self._totals.items():
            if total.sums is not None:
                mean[list(members)] += total.sums[which].cpu().double()
        return mean / torch.tensor(self._samples, device="cpu")

    def _over_identity(self, values: Tensor) -> float:
        return values[[kind == "identity" for kind in self.kinds]].mean().item()

    def _each(self, which: int) -> Tensor:
        """Assemble [sites, samples] on the CPU, the passes of a site in order."""
        count = self._samples
        if not self.per_sample:
            raise RuntimeError("record: per_sample must be True to read single samples, got False")
        if len(set(count)) > 1:
            raise RuntimeError(
                "record: every site must have the batch in dim 0 to read single samples, "
                f"got {sorted(set(count))} samples"
            )
        rows: list[list[Tensor]] = [[] for _ in count]
        for (_, _, members), total in self._totals.items():
            kept = torch.cat(total.passes, dim=2)[which].cpu()
            for site, row in zip(members, kept, strict=True):
                rows[site].append(row)
        return torch.stack([torch.cat(row) for row in rows])

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with one row per site.

        Columns: site, name, kind, level, samples, absolute, scaled, cosine.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install fastres[demo]") from error
        return pd.DataFrame(
            {
                "site": range(len(self.sites)),
                "name": self.names,
                "kind": self.kinds,
                "level": [site.level for site in self.sites],
                "samples": self._samples,
                "absolute": self.absolute.numpy(),
                "scaled": self.scaled.numpy(),
                "cosine": self.cosine.numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the scaled perturbation of each site; projection sites hollow, apart from the line.

        Args:
            ax: Where to draw; None makes a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install fastres[demo]") from error
        if ax is None:
            ax = pyplot.figure(layout="constrained").subplots()
        identity = [kind == "identity" for kind in self.kinds]
        place = torch.arange(len(identity), device="cpu")
        others = [not each for each in identity]
        ax.plot(place[identity], self.scaled[identity], "o-", label="identity skip")
        if any(others):
            ax.plot(place[others], self.scaled[others], "o", mfc="none", label="projection")
            ax.legend()
        ax.set_xlabel("site")
        ax.set_ylabel("scaled perturbation ||f|| / ||x||")
        return ax

    def __repr__(self) -> str:
        if not self._sites:
            return f"Tape of {self._model}: no pass yet"
        width = max(4, *map(len, self.names))
        lines = [
            f"Tape of {self._model}: {len(self._sites)} sites, {self.samples} samples",
            f"{'site':<{width}}  kind        absolute    scaled  cosine",
        ]
        rows = zip(self._sites, self.absolute, self.scaled, self.cosine, strict=True)
        lines += [
            f"{site.name:<{width}}  {site.kind:<10}  {a:8.4g}  {s:8.4g}  {c:6.3f}"
            for site, a, s, c in rows
        ]
        return "\n".join(lines)
