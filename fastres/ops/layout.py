"""layout: which memory layouts the kernels take without a copy, and the dtype of their sums."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of the kernels


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and gates: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_of(gate: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gate as a tensor on the device of `like`; a number does not wait for the device."""
    if isinstance(gate, Tensor):
        return gate.to(like.device, dtype)
    return torch.full((), gate, dtype=dtype, device=like.device)


def has_dense_samples(t: Tensor) -> bool:
    """Tell whether samples lie one after the other, each filling its own stretch of memory."""
    if t.is_contiguous() or t.numel() == 0:
        return True
    expected = 1
    for d in sorted(range(1, t.dim()), key=t.stride):
        if t.size(d) != 1:
            if t.stride(d) != expected:
                return False
            expected *= t.size(d)
    return t.size(0) == 1 or t.stride(0) == expected


def empty_like_first_dense(*tensors: Tensor) -> Tensor:
    """Return an empty tensor in the layout of the first with dense samples, else contiguous."""
    first = tensors[0]
    for t in tensors:
        if has_dense_samples(t):
            return first.new_empty_strided(t.shape, t.stride())
    return first.new_empty(first.shape)


def in_layout(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return t itself where it has these strides, else a copy that has them."""
    if t.stride() == strides:
        return t
    layout = zip(t.shape, t.stride(), strides, strict=True)
    if all(size == 1 or have == want for size, have, want in layout):
        return t
    return t.new_empty_strided(t.shape, strides).copy_(t)


def lines_of(like: Tensor, strides: tuple[int, ...]) -> tuple[int, int]:
    """Return count and length of the lines of a sample of [B, C, ...] with dense samples.

    A line is a channel, or where these lie side by side a place with all channels.
    """
    channels, places = like.size(1), math.prod(like.shape[2:])
    pixels = places == 1 or (channels > 1 and strides[1] == 1)
    return (places, channels) if pixels else (channels, places)


def has_lines(t: Tensor) -> bool:
    """Tell whether samples of t [B, C, ...] are dense, the channels outermost or innermost."""
    if not has_dense_samples(t):
        return False
    lines, length = lines_of(t, t.stride())
    return t.numel() == 0 or lines == 1 or t.stride(1) in (1, length)


def empty_with_lines(*tensors: Tensor) -> Tensor:
    """Return an empty tensor in the layout of the first that has lines, else contiguous."""
    first = tensors[0]
    for t in tensors:
        if has_lines(t):
            return first.new_empty_strided(t.shape, t.stride())
    return first.new_empty(first.shape)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View [B] or [] values so that they scale the samples of `like`, [B, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def scaled(t: Tensor, gate: float | Tensor) -> Tensor:
    """Scale the samples of t [B, ...] by a number or a tensor [] or [B], rounded once to t's dtype.

    A gate of another dtype multiplies in the dtype of sums.
    """
    if not isinstance(gate, Tensor):
        return t * gate
    scale = per_sample(gate, t)
    if scale.dtype == t.dtype:
        return t * scale
    wide = accumulate(t.dtype)
    return (t.to(wide) * scale.to(wide)).to(t.dtype)


def unpack_bits(bits: Tensor, like: Tensor, strides: tuple[int, ...], lines: int = 1) -> Tensor:
    """Unpack one bit per element to a boolean tensor in the shape of `like`, [B, ...].

    Args:
        bits: [B, lines * ceil(N / lines / 8)] uint8; bit c % 8 of byte c / 8 is element c of a
            line, counted in the memory order that `strides` give.
        like: Gives the shape [B, ...] with N features.
        strides: Of the tensor whose elements the bits are.
        lines: Of a sample, of equal length; each begins with a byte.
    """
    dims = range(like.dim())
    order = [0, *sorted(dims[1:], key=lambda d: (-strides[d], d))]
    shape = [like.size(d) for d in order]
    some = max(lines, 1)
    each = bits.reshape(bits.size(0), lines, bits.size(1) // some, 1)
    each = (each >> torch.arange(8, device=bits.device, dtype=torch.uint8)) & 1
    rows = each.flatten(2)[:, :, : math.prod(like.shape[1:]) // some]
    return rows.reshape(shape).permute(sorted(dims, key=order.__getitem__)).bool()
