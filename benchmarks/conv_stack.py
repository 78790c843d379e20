"""conv_stack: the stages of ResNet-110 for CIFAR in one call each, beside torch's convolutions.

A stage has L = 18 basic blocks, x <- relu(x + conv(relu(conv(x, w1) + b1), w2) + b2), of 16, 32 or
64 channels on images of 32, 16 or 8 pixels square; fastres also takes ||x||^2, ||p||^2 and <x, p>
of every block and sample. The shapes below are [L, N, C, H, W]. Every stage has as many operations,
36 L N C C H W; the fewest bytes are those of the weights, and of x and y once.

Eager runs two convolutions with bias, an add and two ReLUs per block, without norms, in
channels_last, which is what torch is fastest with. On a GPU the clock that goals are about is graph
replay, so that eager is CUDA-graphed: G6, 2.5 times eager up to batch 128 and 4 times at batch 1,
and 1.8 times torch.compile.

On a CPU float32 is bound by its multiply-adds, of which AMX does so many more in bfloat16 that they
are three fifths of the time of a stage (16 channels, N = 64); the rest is sums, activations and
rounding, of numbers that stay in the second cache. Eager's go to memory and back each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

import fastres
from benchmarks.baselines import compile_modes, compiled
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run

NAME = "conv_stack"
BLOCKS = 18
STAGES = ((16, 32), (32, 16), (64, 8))  # channels, side
Shape = tuple[int, int, int, int, int]  # L, N, C, H, W
LAYOUT = torch.channels_last


def tensors(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return x and the weights, as they lie in memory where a network is fused."""
    blocks, batch, channels, height, width = shape
    x = torch.randn(batch, channels, height, width, device=device).relu()
    found = [x.to(dtype).contiguous(memory_format=LAYOUT)]
    for scale in ((9 * channels) ** -0.5, (9 * channels * blocks) ** -0.5):
        w = torch.randn(blocks, 3, 3, channels, channels, device=device) * scale
        b = torch.randn(blocks, channels, device=device) / 10
        found += [w.to(dtype).permute(0, 4, 3, 1, 2), b.to(dtype)]
    return tuple(found)


def eager(x: Tensor, blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """Run the blocks one by one."""
    for w1, b1, w2, b2 in blocks:
        x = (x + conv2d(conv2d(x, w1, b1, padding=1).relu_(), w2, b2, padding=1)).relu_()
    return x


def separate(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the weights of each block in tensors of their own, as torch is fastest with them."""
    blocks = zip(*(t.unbind() for t in weights), strict=True)
    return [[t.contiguous(memory_format=LAYOUT) if t.dim() == 4 else t.clone() for t in each]
            for each in blocks]  # fmt: skip


def ours(x: Tensor, *weights: Tensor) -> Call:
    """Return a call of the operator."""
    w1, b1, w2, b2 = weights
    return lambda: fastres.conv_stack(x, w1, b1, w2, b2)


def by_blocks(x: Tensor, *weights: Tensor) -> Call:
    """Return a call of the blocks one by one."""
    blocks = separate(weights)
    return lambda: eager(x, blocks)


def case(
    shape: Shape, dtype: torch.dtype, device: torch.device, goals: dict[str, float]
) -> Case:  # fmt: skip
    """Return the case of a stage."""
    blocks, batch, channels, height, width = shape
    variants = {OURS: Variant(ours), "eager": Variant(by_blocks)}
    for name, mode, capturable in compile_modes(device, cached=False):
        way = compiled(eager, mode)

        def build(x: Tensor, *weights: Tensor, way=way) -> Call:  # type: ignore[no-untyped-def]
            return way(x, separate(weights))

        variants[name] = Variant(build, capturable=capturable)
    stream, each = batch * channels * height * width, 18 * channels * channels + 2 * channels
    return Case(
        "stage", shape, dtype, lambda: tensors(shape, dtype, device), variants,
        (blocks * each + 2 * stream) * dtype.itemsize, 36.0 * blocks * channels * stream,
        "channels_last", headline=batch != 16, goals=goals, reads=True,
        judged="graph" if device.type == "cuda" else "",
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield each stage at several batches in bfloat16 and, on a GPU at one of them, in float32."""
    if smoke:
        yield case((2, 2, 16, 8, 8), torch.float32, device, {})
        return
    gpu = device.type == "cuda"
    for channels, side in STAGES:
        for batch in (1, 128, 1024) if gpu else (1, 16, 64):
            shape, goals = (BLOCKS, batch, channels, side, side), {}
            if gpu and batch <= 128:
                goals = {"eager": 4.0 if batch == 1 else 2.5, "compile": 1.8}
            yield case(shape, torch.bfloat16, device, goals)
        for batch in (128,) if gpu else (1, 16, 64):
            yield case((BLOCKS, batch, channels, side, side), torch.float32, device, {})


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
