"""depth_tracker: how deep the ensemble of paths is, step by step (Littwin & Wolf 2016).

They find that training raises the scale of the branches, and so the weight of long paths
(arXiv 1611.02525, sections 4 and 6). Per block, on a fixed batch in eval mode:

    scale   mean |weight| of the block's last batch norm
    kernel  root of the summed squares of its layers with their batch norms absorbed
    gain    root of sum ||branch||^2 / sum ||skip||^2 over the samples: the b of path lengths

The gains give the lengths that the ensemble implies, by elementary symmetric polynomials; beside
them stands, at chosen steps, how the gradient itself divides by length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastres.analysis.absorbing import absorbed_weight, pairs_of
from fastres.analysis.ensemble import log_path_weights, shares
from fastres.paths import path_gradients
from fastres.record import record
from fastres.sites import trace
from fastres.training import evaluating

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Depth:
    """What the tracker measured at one step; L blocks."""

    step: int
    scale: Values  # [L], nan where the block has no batch norm with a weight
    kernel: Values  # [L], nan where no layer is followed by batch norm
    gain: Values  # [L]
    lengths: Values  # [L+1], share of the paths of each length by the gains; they add up to 1
    exact: Values | None  # [L+1], share of the gradient, which may be negative; not at every step

    @property
    def mean_length(self) -> float:
        """Mean length by the gains."""
        return float((np.arange(len(self.lengths)) * self.lengths).sum())

    @property
    def beta(self) -> float:
        """The one gain of all blocks that gives the same mean length: E[k] = L b / (1 + b)."""
        rest = len(self.gain) - self.mean_length
        return self.mean_length / rest if rest > 0 else math.inf

    @property
    def exact_mean_length(self) -> float:
        """Mean length by the gradient; nan where it was not measured."""
        if self.exact is None:
            return math.nan
        return float((np.arange(len(self.exact)) * self.exact).sum() / self.exact.sum())


class DepthTracker:
    """Measures a model at the steps it is told to, and leaves training as it is.

    Args:
        model: Any module that `fastres.trace` finds sites in.
        x: Inputs of the measurement, [B, ...].
        loss: Output -> scalar, for the exact lengths; None: they are never measured.

    Attributes:
        names: Of the sites, [L].
        rows: What was measured so far.

    Raises:
        ValueError: If the model has no site.

    Example:
        >>> from fastres.nn import ResidualMLP
        >>> model, x = ResidualMLP(4, 2, width=8, blocks=3), torch.ones(5, 4)
        >>> tracker = DepthTracker(model, x)
        >>> tracker.measure(step=0).lengths.shape
        (4,)
    """

    def __init__(
        self, model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        with evaluating(model):
            self.names = [site.name for site in trace(model, x)]
        if not self.names:
            kind = type(model).__name__
            raise ValueError(f"DepthTracker: model must contain a residual add, none in {kind}")
        self.rows: list[Depth] = []
        self._model, self._x, self._loss = model, x, loss
        self._pairs = pairs_of(model, x)

    def measure(self, step: int, exact: bool = False) -> Depth:
        """Measure the model as it is now, and keep the row.

        Args:
            step: What the row is called by.
            exact: Whether to separate the gradient by length too, a backward pass per length.

        Raises:
            ValueError: If exact lengths are asked for without a loss.
        """
        if exact and self._loss is None:
            raise ValueError("DepthTracker: loss must be given to measure exact lengths, got None")
        found = None
        with evaluating(self._model):
            with torch.no_grad(), record(self._model, per_sample=True) as tape:
                self._model(self._x)
            if exact and self._loss is not None:
                found = path_gradients(self._model, self._x, self._loss).shares.numpy()
        gain = (tape.branch_sq.double().sum(1) / tape.skip_sq.double().sum(1)).sqrt().numpy()
        row = Depth(
            step=step,
            scale=self._per_block(self._scale),
            kernel=self._per_block(self._kernel),
            gain=gain,
            lengths=shares(log_path_weights(gain)),
            exact=found,
        )
        self.rows.append(row)
        return row

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with one row per step and block.

        Columns: step, block, name, scale, kernel, gain, beta, mean_length, exact_mean_length.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install fastres[demo]") from error
        frames = [
            pd.DataFrame(
                {
                    "step": row.step,
                    "block": range(len(self.names)),
                    "name": self.names,
                    "scale": row.scale,
                    "kernel": row.kernel,
                    "gain": row.gain,
                    "beta": row.beta,
                    "mean_length": row.mean_length,
                    "exact_mean_length": row.exact_mean_length,
                }
            )
            for row in self.rows
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _per_block(self, value: Callable[[str, nn.Module], float]) -> Values:
        owners = [name.partition("[")[0] for name in self.names]
        modules = dict(self._model.named_modules())
        return np.array([value(o, modules[o]) if o in modules else math.nan for o in owners])

    def _scale(self, _name: str, block: nn.Module) -> float:
        norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.affine]
        return norms[-1].weight.detach().abs().mean().item() if norms else math.nan

    @torch.no_grad()
    def _kernel(self, name: str, block: nn.Module) -> float:
        inside = [pair for pair in self._pairs if pair[1].startswith(f"{name}.")]
        if not inside:
            return math.nan
        get = self._model.get_submodule
        weights = [absorbed_weight(get(layer), get(norm))[0] for layer, norm in inside]
        return math.sqrt(sum(weight.double().square().sum().item() for weight in weights))
