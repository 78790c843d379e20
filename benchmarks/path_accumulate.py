"""path_accumulate: the step of the path recurrence with its sums, beside the same step in torch.

rows[k] = skip[k] + branch[k-1] for R path lengths, with ||rows[k]||^2 and <rows[k], g> per length
and sample, is two reads and one write of R*B*N elements, and a read of g. Shapes are [R, B, N]. By
bytes, out of cache, fastres should take the time of the bare step, skip[1:] += branch[:-1], which
measures nothing and is itself 3 passes, and be faster than

    eager norms    7/3 = 2.3x   the bare step 3, vector_norm 1, product with g 1 + 1, sum 1
    eager einsum   5/3 = 1.7x   the bare step 3, each of the two sums as inner products 1
    compile        3/3 = 1.0x   one kernel as well: parity is the limit

The shift alone, out[1:] = branch[:-1], is one read and one write, and fastres measures norms on the
way. `path_gradients` shifts before a branch, and asks for the largest magnitude of every row; torch
reads the rows again for it, abs 1 + 1 and amax 1, or vector_norm 1.

All of eager's steps are in place; what a CPU writes elsewhere it reads first: one pass more than
the bytes above. Goals: out of cache 80 % of the copy bandwidth and 1.5 times the faster eager.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

import fastres
from benchmarks import baselines
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run

NAME = "path_accumulate"
FLOPS = 5  # per element: one add, two multiply-adds
Shape = tuple[int, int, int]  # R, B, N

STREAMED = {"eager": 1.5, "limit": 0.8}


def tensors(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return skip and branch, [R, B, N], and g, [B, N], random normal."""
    of_rows = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return *of_rows, torch.randn(shape[1:], device=device).to(dtype)


def bare(skip: Tensor, branch: Tensor, g: Tensor) -> Call:
    """Return the step that measures nothing; skip grows from call to call, which costs no time."""
    return lambda: skip[1:].add_(branch[:-1])


def by_norms(skip: Tensor, branch: Tensor, g: Tensor) -> Call:
    """Return the step in place, with norms by vector_norm and products by multiply and sum."""
    wide = torch.float32

    def call() -> tuple[Tensor, Tensor, Tensor]:
        skip[1:].add_(branch[:-1])
        return skip, vector_norm(skip, dim=2, dtype=wide), (skip * g).sum(2, dtype=wide)

    return call


def by_einsum(skip: Tensor, branch: Tensor, g: Tensor) -> Call:
    """Return the step in place, with both sums as inner products, which store nothing large."""

    def call() -> tuple[Tensor, Tensor, Tensor]:
        skip[1:].add_(branch[:-1])
        squares = torch.einsum("rbn,rbn->rb", skip, skip)
        return skip, squares, torch.einsum("rbn,bn->rb", skip, g)

    return call


def whole(skip: Tensor, branch: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formulation for torch.compile, which fuses it."""
    rows = skip + torch.cat([torch.zeros_like(branch[:1]), branch[:-1]])
    wide = rows.float()
    return rows, (wide * wide).sum(2), (wide * g.float()).sum(2)


def step(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, *,
    goals: dict[str, float], cached: bool = False, shown: bool = False,
) -> Case:  # fmt: skip
    """Return the case of the step with both sums."""
    numel, row = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    once = numel * dtype.itemsize
    moved = 3 * once + row * dtype.itemsize
    variants = {
        OURS: Variant(lambda skip, v, g: lambda: fastres.path_accumulate(skip, v, g), moved),
        "bare step": Variant(bare, 3 * once),
        "eager norms": Variant(by_norms, 7 * once),
        "eager einsum": Variant(by_einsum, 5 * once),
    }
    for mode, how, capturable in baselines.compile_modes(device, cached):
        variants[mode] = Variant(baselines.compiled(whole, how), 3 * once, capturable=capturable)
    return case(name, shape, dtype, device, variants, moved, FLOPS * numel, goals, cached, shown)


def shifted(size: Callable[[Tensor], Tensor]) -> Variant:
    """Return the shift in torch, with the size of each row: 2 passes, and those of `size`."""

    def build(skip: Tensor, branch: Tensor, g: Tensor) -> Call:
        def call() -> tuple[Tensor, Tensor]:
            out = torch.empty_like(branch)
            out[0] = 0
            out[1:] = branch[:-1]
            return out, size(branch)

        return call

    return Variant(build)


def shift(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, *,
    goals: dict[str, float], cached: bool = False, shown: bool = False,
) -> Case:  # fmt: skip
    """Return the case of the shift with the magnitude of every row."""
    once = torch.Size(shape).numel() * dtype.itemsize
    variants = {
        OURS: Variant(lambda skip, v, g: lambda: fastres.path_accumulate(None, v), 2 * once),
        "eager largest": replace(shifted(lambda t: t.abs().amax(dim=(1, 2))), bytes=5 * once),
        "eager norm": replace(shifted(lambda t: vector_norm(t, dim=(1, 2))), bytes=3 * once),
    }
    flops = 2 * torch.Size(shape).numel()
    return case(name, shape, dtype, device, variants, 2 * once, flops, goals, cached, shown)


def case(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device,
    variants: dict[str, Variant], moved: float, flops: float, goals: dict[str, float],
    cached: bool, shown: bool,
) -> Case:  # fmt: skip
    """Return a case; small work on a GPU is judged by events, large by graph replay."""
    judged = "" if device.type == "cpu" else "events" if cached else "graph"
    return Case(
        name, shape, dtype, lambda: tensors(shape, dtype, device), variants, moved, flops,
        cached=cached, headline=shown, goals=goals, judged=judged,
    )  # fmt: skip


def each(device: torch.device, large: int, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Yield the cases of a device: a stack's rows in cache, a ResNet's out of it.

    Args:
        device: Where.
        large: Bytes of the rows that are out of cache.
        dtypes: Of them.
    """
    for dtype in dtypes:
        single = dtype == torch.float32
        for shape in ((32, 16, 64), (8, 8, 16 * 32 * 32)):
            yield step("in cache", shape, dtype, device, goals={}, cached=True, shown=single)
        for samples, cols in ((8, 16 * 32 * 32), (16, 64)):
            shape = (large // dtype.itemsize // (samples * cols), samples, cols)
            shown = single and cols != 64
            yield step("out of cache", shape, dtype, device, goals=STREAMED, shown=shown)
        shape = (large // dtype.itemsize // (8 * 16 * 32 * 32), 8, 16 * 32 * 32)
        yield shift("shift", (32, 16, 64), dtype, device, goals={}, cached=True)
        yield shift("shift", shape, dtype, device, goals={})


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device; a smoke run has a small one of every sort."""
    half, single = torch.bfloat16, torch.float32
    if smoke:
        yield step("step", (4, 3, 24), single, device, goals=STREAMED, cached=True)
        yield step("step", (4, 3, 24), half, device, goals={}, cached=True)
        yield shift("shift", (4, 3, 24), single, device, goals={}, cached=True)
    else:
        large = 256 << 20 if device.type == "cuda" else 64 << 20
        yield from each(device, large, (single, half))


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
