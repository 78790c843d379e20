"""tally: norms, inner products and the sum of rows of gradients, whatever their magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Tally:
    """What is kept of the rows G_0, G_1, ... beside the ordinary gradient g they should add up to.

    Args:
        gradient: The ordinary gradient g, [B, ...].
        keep: Whether to keep the rows themselves.

    Attributes:
        logs: log2 of the norm of each row per sample, each [B] float64.
        dots: <G_k, g> per sample, each [B] float64.
        rows: The rows, each [B, ...], where they are kept.
    """

    def __init__(self, gradient: Tensor, keep: bool = False) -> None:
        self.logs: list[Tensor] = []
        self.dots: list[Tensor] = []
        self.rows: list[Tensor] = []
        self._keep, self._like = keep, gradient
        self._gradient = _samples(wide(gradient))  # [B, N]
        self._sum = torch.zeros_like(self._gradient)

    def add_rows(self, rows: Tensor | None, exponents: Sequence[int]) -> None:
        """Note the next rows.

        Args:
            rows: 2^exponent times each row, [rows, B, ...]; None where all are zero.
            exponents: Of the powers of two, [rows].
        """
        for i, exponent in enumerate(exponents):
            self._add(torch.zeros_like(self._like) if rows is None else rows[i], exponent)

    def _add(self, row: Tensor, exponent: int) -> None:
        flat = _samples(wide(row))
        norms = torch.linalg.vector_norm(flat, dim=1).cpu().double()
        self.logs.append(norms.log2() - exponent)
        if exponent:
            flat = scaled(flat, -exponent)
        self.dots.append((flat * self._gradient).sum(1).cpu().double())
        self._sum += flat
        if self._keep:
            self.rows.append(flat.view_as(row).to(row.dtype))

    def error(self) -> float:
        """Return ||sum_k G_k - g|| / ||g||: 0 where both are zero."""
        off = torch.linalg.vector_norm(self._sum - self._gradient).item()
        whole = torch.linalg.vector_norm(self._gradient).item()
        return off / whole if whole else (0.0 if off == 0 else math.inf)


def wide(t: Tensor) -> Tensor:
    """Return t in float64; in float32 on a device that has no float64."""
    return t.float() if t.device.type == "mps" else t.double()


def scaled(t: Tensor, exponent: int) -> Tensor:
    """Return 2^exponent t, also where 2^exponent itself is out of range."""
    half = exponent // 2
    for part in (half, exponent - half):
        t = t * 2.0 ** max(-1000, min(1000, part))
    return t


def log2_norm(logs: Tensor) -> Tensor:
    """Return log2 of the norm of the whole, from that of its samples: [..., B] -> [...]."""
    ln = math.log(2)
    return torch.logsumexp(2 * ln * logs, dim=-1) / (2 * ln)


def _samples(t: Tensor) -> Tensor:
    return t.reshape(t.size(0), -1) if t.dim() else t.reshape(1, 1)
