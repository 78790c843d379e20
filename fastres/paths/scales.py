"""scales: powers of two that keep the cotangents of every length within the floating range.

In 300 blocks the gradients of the lengths span hundreds of orders of magnitude, from length to
length and, for one length, from block to block. Row k is therefore held as 2^e_k G_k, exactly, and
e_k is chosen anew at every block through which all paths go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest_log2(rows: Tensor) -> list[float]:
    """Return log2 of the largest magnitude of each row, [rows, ...] -> [rows]; -inf for a zero."""
    if len(rows) == 1:  # one pass over memory, and not the three of abs and amax
        largest = [max(abs(end.item()) for end in rows.aminmax())]
    else:  # 6 times as fast on a CPU as vector_norm of order inf, and no square underflows
        largest = rows.abs().amax(dim=tuple(range(1, rows.dim()))).tolist()
    return [math.log2(each) if each else -math.inf for each in largest]


def fit(exponents: Sequence[int], logs: Sequence[float], before: float, limit: float) -> list[int]:
    """Choose exponents for which every row is in range, with what the row before it adds to it.

    Args:
        exponents: Of the rows as they are held, [rows].
        logs: log2 of the largest magnitude of each true row, [rows].
        before: The same of the row before the first.
        limit: How many binary orders from 1 a row may be; it leaves room for its smaller parts.

    Returns:
        The exponents, [rows]: the same for rows in range, or not finite. A row of nothing has that
        of the row before, from which it will get the first it has.
    """
    chosen: list[int] = []
    for exponent, log, above in zip(exponents, logs, [before, *logs], strict=False):
        most = max(log, above)
        if most == -math.inf and chosen:
            chosen.append(chosen[-1])
        else:
            far = math.isfinite(most) and abs(most + exponent) > limit
            chosen.append(-round(most) if far else exponent)
    return chosen


def powers(exponents: Sequence[int], like: Tensor) -> Tensor:
    """Return 2^exponents to multiply rows with, [rows] -> [rows, 1, ...] as like is [rows, ...]."""
    most = math.frexp(torch.finfo(like.dtype).max)[1] - 1  # only rows of zeros change by more
    values = [2.0 ** max(-1000, min(most, exponent)) for exponent in exponents]
    factors = torch.tensor(values, dtype=torch.float64, device="cpu")
    return factors.to(like.dtype).to(like.device).view(-1, *[1] * (like.dim() - 1))
