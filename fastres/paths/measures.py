"""measures: what each method measured of the path lengths, and who asks for what is not there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastres.paths.tally import log2_norm

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


@dataclass(frozen=True, eq=False, repr=False)
class Measures:
    """The measures of a `PathGradients`, read by name; see there."""

    method: Method
    where: str
    sites: tuple[str, ...]
    paths: tuple[int, ...]
    gradient: Tensor
    sum_error: float = math.nan
    mixes_samples: bool = False
    measured: Mapping[str, Tensor] = field(default_factory=dict)  # by the names of the properties
    input_precision: str = "ieee"

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
