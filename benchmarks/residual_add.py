"""residual_add: the add with its three sums, beside eager, bare and compiled adds; goals and model.

y = x + f with ||x||^2, ||f||^2, <x, f> per sample needs two reads and one write, as a bare x + f
does: 3 passes over B*N elements, and 12 bytes per sample. By bytes, out of cache, fastres should
take the time of the bare add (on a CPU less: it asks ahead for the lines that it writes, for which
other stores wait), and be faster than

    eager norms   9/3 = 3.0x   add 3, vector_norm 1 + 1, multiply 3, sum 1; also `eager rounded`
    eager sums   13/3 = 4.3x   add 3, x*x 2 + 1, f*f 2 + 1, x*f 3 + 1
    eager bmm     7/3 = 2.3x   add 3, inner products 1 + 1 + 2 (GPU only)
    compile       3/3 = 1.0x   one kernel as well: parity is the limit

and its backward pass through a ReLU, which reads the cotangent and one bit per element and writes
the result once, should be 3/(2 + 1/8s) of eager's (s bytes per element): 1.48x in float32, 1.45x
in half precision, and (2s + 1)/(2s + 1/8) of a compiled one that keeps a byte.

Goals on a CPU (one thread and two): in cache 2x over eager with its norms; out of cache 1.5x, 85 %
of the copy bandwidth and at most 1.05 times the bare add; 6 us for a call without gradient. On a
GPU: G1 (88 % of copy, 1.6x eager, 0.97x compile, 1.0x the peers), G1n (narrow rows: 85 %, 2.5x, 2x
the peers), G1s (up to 4 MB: 2.5x eager, 1.3x compile, 2x the peers), G2 (backward: 80 %, 1.9x eager
for the whole of a channel-affine backward; the ReLU that exists is bound by its 1.45x). G3 is in
`step.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastres
from benchmarks import baselines
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run

NAME = "residual_add"
FLOPS = 7  # per element: one add, three multiply-adds

CACHED = {"eager": 2.0}
STREAMED = {"eager": 1.5, "limit": 0.85, "x + f": 1 / 1.05}
G1 = {"limit": 0.88, "eager": 1.6, "compile": 0.97, "Liger": 1.0, "flash-attn": 1.0}
G1N = {"limit": 0.85, "eager": 2.5, "Liger": 2.0}
G1S = {"eager": 2.5, "compile": 1.3, "Liger": 2.0}
G2 = {"limit": 0.80, "eager": 1.45, "compile": 1.0}


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str, grad: int = 0
) -> tuple[Tensor, ...]:
    """Return x and f, random normal, and the cotangent of y where `grad` is 1."""
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    made = tuple(
        torch.randn(shape, device=device).to(dtype, memory_format=form) for _ in range(2 + grad)
    )
    for t in made[: 2 * grad]:
        t.requires_grad_()
    return made


def forward(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *,
    goals: dict[str, float], cached: bool = False, layout: str = "contiguous", shown: bool = False,
) -> Case:  # fmt: skip
    """Return the case of a forward pass without gradient."""
    numel = torch.Size(shape).numel()
    moved = 3 * numel * dtype.itemsize + 12 * shape[0]
    variants = {
        OURS: Variant(lambda x, f: lambda: fastres.residual_add(x, f), moved),
        **baselines.forward_variants(device, dtype, numel, cached),
        **(baselines.peers(numel, dtype) if device.type == "cuda" and len(shape) == 2 else {}),
    }
    return Case(
        name, shape, dtype, lambda: tensors(shape, dtype, device, layout), variants, moved,
        FLOPS * numel, layout, cached, shown, goals=goals, judged=judged(device, cached),
    )  # fmt: skip


def judged(device: torch.device, cached: bool) -> str:
    """Return the clock for the goals: small work on a GPU is bound by the host, large is not."""
    return "" if device.type == "cpu" else "events" if cached else "graph"


def backward(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *,
    goals: dict[str, float], cached: bool = False, shown: bool = False,
) -> Case:  # fmt: skip
    """Return the case of the backward pass through the add and a ReLU."""
    numel = torch.Size(shape).numel()
    moved = 2 * numel * dtype.itemsize + numel / 8

    def ours(x: Tensor, f: Tensor, g: Tensor) -> Call:
        return baselines.pull(fastres.residual_add(x, f, relu=True)[0], x, f, g)

    variants = {OURS: Variant(ours, moved), **baselines.backward_variants(device, dtype, numel)}
    return Case(
        name, shape, dtype, lambda: tensors(shape, dtype, device, "contiguous", grad=1), variants,
        moved, numel, "contiguous", cached, shown, goals=goals, judged=judged(device, cached),
    )  # fmt: skip


def overhead(device: torch.device, grad: int) -> Case:
    """Return the case of a call on 8 floats, where only the way to the kernel counts."""
    shape, dtype = (1, 8), torch.float32
    name = "call, with gradient" if grad else "call"
    variants = {
        OURS: Variant(lambda x, f, *_: lambda: fastres.residual_add(x, f)),
        "x + f": Variant(lambda x, f, *_: lambda: x + f),
        "eager norms": Variant(lambda x, f, *_: lambda: baselines.by_norms(x, f)),
    }
    goals = {} if grad or device.type == "cuda" else {"seconds": 6e-6}
    return Case(
        name, shape, dtype, lambda: tensors(shape, dtype, device, "contiguous", grad), variants,
        0, 0, headline=not grad, goals=goals,
    )  # fmt: skip


def on_cpu(device: torch.device) -> Iterator[Case]:
    """Yield the cases of a CPU: in cache, out of cache (64 MiB per tensor), narrow rows, calls."""
    half, single = torch.bfloat16, torch.float32
    for dtype in (single, half):
        for shape in ((128, 64), (64, 512), (32, 4096), (8, 56 * 56 * 64)):
            shown = shape in ((64, 512), (32, 4096))
            yield forward("in cache", shape, dtype, device, goals=CACHED, cached=True, shown=shown)
        large = (64 << 20) // dtype.itemsize
        for cols in (4096, 64, 128, 256, 512):
            name = "out of cache" if cols == 4096 else "narrow rows"
            shape, shown = (large // cols, cols), cols in (4096, 64)
            yield forward(name, shape, dtype, device, goals=STREAMED, shown=shown)
        image = (large // 64**3, 64, 64, 64)
        for layout in ("contiguous", "channels_last"):
            yield forward("images", image, dtype, device, goals=STREAMED, layout=layout)
        for shape, cached in (((32, 4096), True), ((large // 4096, 4096), False)):
            name = f"backward {'in' if cached else 'out of'} cache"
            yield backward(name, shape, dtype, device, goals={}, cached=cached, shown=not cached)
    yield overhead(device, 0)
    yield overhead(device, 1)


def on_cuda(device: torch.device) -> Iterator[Case]:
    """Yield the cases of a GPU: G1 and G1n with 256 MiB per tensor, G1s, G2."""
    half, single = torch.bfloat16, torch.float32
    for dtype, widths in (
        (half, (64, 128, 256, 512, 1024, 4096, 8192)), (single, (64, 1024, 8192)),
        (torch.float16, (64, 4096)),
    ):  # fmt: skip
        large = (256 << 20) // dtype.itemsize
        for cols in widths:
            name, goals = ("G1n narrow rows", G1N) if cols <= 512 else ("G1 out of cache", G1)
            shown, shape = dtype == half and cols in (64, 512, 4096), (large // cols, cols)
            yield forward(name, shape, dtype, device, goals=goals, shown=shown)
    image = ((128 << 20) // 64**3, 64, 64, 64)
    for layout in ("contiguous", "channels_last"):
        yield forward("G1 images", image, half, device, goals=G1, layout=layout)
    for shape in ((128, 64), (512, 256), (512, 4096)):
        shown = shape == (512, 256)
        yield forward("G1s small", shape, half, device, goals=G1S, cached=True, shown=shown)
    for dtype in (half, single):
        for cols in (256, 4096):
            shape = ((256 << 20) // dtype.itemsize // cols, cols)
            shown = cols == 4096
            yield backward("G2 backward", shape, dtype, device, goals=G2, shown=shown)
    yield overhead(device, 0)
    yield overhead(device, 1)


def tiny(device: torch.device) -> Iterator[Case]:
    """Yield one small case of every sort, for a smoke run."""
    for make in (forward, backward):
        yield make(make.__name__, (4, 24), torch.float32, device, goals=CACHED, cached=True)
    yield forward("images", (2, 8, 4, 4), torch.bfloat16, device, goals={}, cached=True,
                  layout="channels_last")  # fmt: skip
    yield overhead(device, 0)
    yield overhead(device, 1)


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    find: Callable[[torch.device], Iterator[Case]] = on_cuda if device.type == "cuda" else on_cpu
    return (tiny if smoke else find)(device)


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
