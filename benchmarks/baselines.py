"""baselines: the strongest other ways to add a branch and measure it, each with the bytes it moves.

Eager PyTorch has no best formulation for all shapes and dtypes, so several are timed, and tables
show the fastest. Sums are float32, but in half precision eager's products <x, f> are rounded to the
storage type before they are summed, and `eager rounded` gives all three sums in that type: both
cheaper, and less exact, than fastres.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from benchmarks.case import Variant
from benchmarks.clocks import Call, UnavailableError

Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # y as x, then ||x||, ||f||, <x, f>, each [B]


def rows(t: Tensor) -> Tensor:
    """View a contiguous or channels_last tensor as [B, N] without a copy."""
    return (t if t.is_contiguous() else t.permute(0, 2, 3, 1)).reshape(t.shape[0], -1)


def norms(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ||x||, ||f||, <x, f>: norms by vector_norm, the product by multiply and sum."""
    a, b, wide = rows(x), rows(f), torch.float32
    of_x, of_f = vector_norm(a, dim=1, dtype=wide), vector_norm(b, dim=1, dtype=wide)
    return of_x, of_f, (a * b).sum(1, dtype=wide)


def by_norms(x: Tensor, f: Tensor) -> Sums:
    """Add, then `norms`."""
    return x + f, *norms(x, f)


def rounded(x: Tensor, f: Tensor) -> Sums:
    """Add, then norms and product in the storage type, which sums in float32 and rounds once."""
    a, b = rows(x), rows(f)
    return x + f, vector_norm(a, dim=1), vector_norm(b, dim=1), (a * b).sum(1)


def by_sums(x: Tensor, f: Tensor) -> Sums:
    """All three by multiply and sum."""
    a, b = rows(x), rows(f)
    aa, bb, ab = ((p * q).sum(1, dtype=torch.float32) for p, q in ((a, a), (b, b), (a, b)))
    return x + f, aa, bb, ab


def by_bmm(x: Tensor, f: Tensor) -> Sums:
    """All three as batched inner products, which allocate nothing large."""
    a, b = rows(x), rows(f)
    pairs = ((a, a), (b, b), (a, b))
    aa, bb, ab = (torch.bmm(p[:, None], q[:, :, None])[:, 0, 0] for p, q in pairs)
    return x + f, aa, bb, ab


def in_float32(x: Tensor, f: Tensor) -> Sums:
    """The formulation for torch.compile, which fuses it: sums of products in float32."""
    a, b = rows(x).float(), rows(f).float()
    return x + f, (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)


def forward_variants(
    device: torch.device, dtype: torch.dtype, numel: int, cached: bool
) -> dict[str, Variant]:
    """Return the baselines of the forward pass; a pass over one tensor is `once` bytes."""
    once = numel * dtype.itemsize
    found = {
        "x + f": Variant(lambda x, f: lambda: x + f, 3 * once),
        "f += x": Variant(lambda x, f: _in_place(x, f.clone()), 3 * once),
        "eager norms": Variant(lambda x, f: lambda: by_norms(x, f), 9 * once),
        "eager sums": Variant(lambda x, f: lambda: by_sums(x, f), 13 * once),
    }
    if dtype.itemsize == 2:
        found["eager rounded"] = Variant(lambda x, f: lambda: rounded(x, f), 9 * once)
    if device.type == "cuda":  # on a CPU it takes 3 to 5 times as long as the others
        found["eager bmm"] = Variant(lambda x, f: lambda: by_bmm(x, f), 7 * once)
    for name, mode, capturable in compile_modes(device, cached):
        found[name] = Variant(compiled(in_float32, mode), 3 * once, capturable=capturable)
    return found


def _in_place(x: Tensor, f: Tensor) -> Call:
    return lambda: f.add_(x)


def compile_modes(device: torch.device, cached: bool) -> list[tuple[str, str, bool]]:
    """Return the ways of torch.compile as (variant, mode, whether a CUDA graph can hold it).

    reduce-overhead copies its inputs in every call, so it is for small ones.
    """
    if device.type == "cpu":
        return [("compile", "default", False)]
    found = [
        ("compile", "default", True),
        ("compile max-autotune", "max-autotune-no-cudagraphs", True),
    ]
    return found + [("compile reduce-overhead", "reduce-overhead", False)] * cached


def compiled(way: Callable[..., Any], mode: str) -> Callable[..., Call]:
    """Return what builds a call of `way` through torch.compile."""

    @cache  # one for all sets of buffers, and none before it is asked for
    def made() -> Callable[..., Any]:
        return torch.compile(way, fullgraph=True, dynamic=False, mode=mode)

    return lambda *given: partial(made(), *given)


def backward_variants(device: torch.device, dtype: torch.dtype, numel: int) -> dict[str, Variant]:
    """Return the baselines of the backward pass of relu(x + f), from y or a mask of bytes."""
    once = numel * dtype.itemsize
    found = {"eager relu": Variant(lambda x, f, g: pull(torch.relu(x + f), x, f, g), 3 * once)}
    for name, mode, capturable in compile_modes(device, cached=False):
        build = _compiled_backward(mode)
        found[name] = Variant(build, 2 * once + numel, capturable=capturable)
    return found


def pull(y: Tensor, x: Tensor, f: Tensor, g: Tensor) -> Call:
    """Return a call that runs y's backward pass again and again on the cotangent g."""
    return lambda: torch.autograd.grad(y, (x, f), g, retain_graph=True)


def _compiled_backward(mode: str) -> Callable[..., Call]:
    @cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(lambda x, f: torch.relu(x + f), dynamic=False, mode=mode)

    def build(x: Tensor, f: Tensor, g: Tensor) -> Call:
        import torch._functorch.config as config

        with config.patch(donated_buffer=False):  # else its backward runs only once
            return pull(compiled()(x, f), x, f, g)

    return build


def liger(x: Tensor, f: Tensor) -> Call:
    """Liger's fused add and RMS norm: x + f and its norm, with one weight per feature."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused
    except ImportError:
        raise UnavailableError("liger_kernel is not installed") from None
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    return lambda: Fused.apply(x, f, weight, 1e-6, 0.0, "llama", False)


def flash_attn(x: Tensor, f: Tensor) -> Call:
    """flash-attn's Triton RMS norm with a residual: the same work as Liger's."""
    try:
        from flash_attn.ops.triton.layer_norm import rms_norm_fn
    except ImportError:
        raise UnavailableError("flash_attn is not installed") from None
    weight = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    return lambda: rms_norm_fn(f, weight, None, residual=x, prenorm=True)


def apex(x: Tensor, f: Tensor) -> Call:
    """The add, then apex's fused RMS norm."""
    try:
        from apex.normalization import FusedRMSNorm
    except ImportError:
        raise UnavailableError("apex is not installed") from None
    norm = FusedRMSNorm(x.shape[1]).to(x.device, x.dtype)

    def call() -> tuple[Tensor, Tensor]:
        y = x + f
        return y, norm(y)

    return call


def peers(numel: int, dtype: torch.dtype) -> dict[str, Variant]:
    """Return other packages' fused adds for [B, N] on a GPU: they also write the normalised sum."""
    once = numel * dtype.itemsize
    return {
        "Liger fused_add_rms_norm": Variant(liger, 4 * once),
        "flash-attn rms_norm_fn": Variant(flash_attn, 4 * once),
        "apex FusedRMSNorm": Variant(apex, 5 * once),
    }
