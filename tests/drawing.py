"""drawing: random calls of operators for hypothesis: shapes, layouts, dtypes, gates and values."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# what tiles, vectors, bytes of a mask and tasks begin and end at
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1025)


def sizes(most: int, least: int = 1) -> st.SearchStrategy[int]:
    """Sizes up to `most`: those at edges, and any other."""
    edges = [n for n in EDGES if least <= n <= most]
    return st.sampled_from(edges) | st.integers(least, most)


def normal(shape, seed: int) -> torch.Tensor:
    """Draw float64 numbers; hypothesis chooses the seed, not the numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def nearby(t: torch.Tensor, unit: float, seed: int) -> torch.Tensor:
    """Change each value of float64 by up to `unit` of it."""
    generator = torch.Generator().manual_seed(seed)
    part = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.device) - 1
    return t + unit * part * t


KINDS = ("normal", "alike", "wide", "tiny", "huge", "holes")


def of_kind(kind: str, shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw values of a kind, in float64.

    normal; alike: far from 0 beside their spread; wide: of very different size; tiny: whose squares
    underflow, and denormal ones; huge: whose squares overflow, and sums of them; holes: with
    NaN, infinities and both zeros in between.
    """
    values, limits = normal(shape, seed), torch.finfo(dtype)
    if kind == "alike":
        return values * 0.01 + 50
    if kind == "wide":
        return (values * torch.exp(3 * normal(shape, seed + 1))).clamp(-1000, 1000)
    if kind == "tiny":
        return values * limits.smallest_normal / 8
    if kind == "huge":
        return values * limits.max / 8
    if kind == "holes" and values.numel():
        chosen = torch.randint(values.numel(), (5,), generator=torch.Generator().manual_seed(seed))
        holes = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=torch.float64)
        values.view(-1)[chosen] = holes
    return values


LAYOUTS = ("dense", "moved", "strided", "turned", "broadcast", "channels_last")


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """Give the same values another place in memory, as far as the shape allows."""
    if layout == "moved":  # by one element: off every alignment but its own
        return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)
    if layout == "strided" and t.dim():
        apart = torch.stack((t, t), -1)
        return apart[..., 0]
    if layout == "turned" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "broadcast" and t.dim() > 1 and len(t):
        return t[:1].expand(t.shape)  # other values, on purpose: rows that are one
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t


def gates(draw, *shape: int) -> float | torch.Tensor | None:
    """Draw a gate: none, a number, a tensor [], or one of some of the leading sizes, or a view."""
    form = draw(st.sampled_from(("none", "number", "tensor", "apart")))
    if form == "none":
        return None
    seed = draw(st.integers(0, 1 << 16))
    if form == "number":
        return float(normal((), seed))
    values = normal(shape[: draw(st.integers(0, len(shape)))], seed)
    return laid_out(values, "strided") if form == "apart" else values
