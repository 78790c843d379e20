"""mlp_stack: 300 residual blocks in one call, with their norms, beside the same blocks one by one.

Block l is x <- x + W2 relu(W1 x + b1) + b2, and fastres also takes ||x||^2, ||p||^2 and <x, p> of
every block and sample, p being what the block adds. The shapes below are [L, B, D]: blocks, batch
and width, with H = D hidden features, in s bytes per number. By arithmetic and by bytes

    forward             4 L B D H operations     L (2 D H + D + H) s bytes of weights + 2 B D s
    training step      12 L B D H operations     the weights twice, their gradients, 4 B D s

A training step is forward and backward pass to x and all weights, without a loss and an optimizer;
what fastres computes again in the backward pass does not count as work: with the ReLU's inputs it
is 14 L B D H operations, with the stream as well, between checkpoints, 18. The limit of a case is
the larger of two times measured in the same run: its operations at the rate of the best matrix
product (`limits.peaks`), and reading as many bytes as it moves (`limits.reads`), which is what
binds small batches.

What explains the figures. Eager runs 1200 operations, so that below B = 128 its time is that of
calls. There fastres waits for memory: a product is over before its weights have come from the last
cache, and threads that share one product wait twice a block for each other's rows; reading alone
is the limit, and it gets to a third of that. Up to 16 samples of narrow blocks go by fours, each
thread some: nobody waits, but every thread reads all weights. From B = 128 on it computes: the
product of 8 rows by 32 samples stays in registers, and activation, residual and sums are passes
over numbers in the nearest cache, which weigh the more the narrower the blocks. Where eager itself
is at 60 % of the limit (B = 1024, D = 128 and 256), nothing can be twice as fast. A training step
also moves all states and gradients through memory; the chain adds a slab of 64 samples to the
weight gradients while it is in cache. Of up to 32 samples of narrow blocks one thread takes the
chain, and both of them, behind it, the weight gradients of the blocks that it is done with.

On a CPU bfloat16 is widened to float32, unless the CPU has AMX. There its tile registers take the
products, four of the eight: where another thread shares the core, products that use all eight take
twice the time. The passes over numbers in cache, as many as in float32, weigh the more. On the way
down what products take is rounded once, for all rows, and kept for the weight gradients. A
product of float32 as six of bfloat16 (Henry, Tang and Heinecke 2019, arXiv 1904.06376) was tried
there: as exact, but with two threads no faster, as it takes long to bring numbers into thirds.

The baselines are those of `stack_baselines`: the ratio to `eager`, which has no norms, is the one
that goals are about. "norms" runs the operator with its sums against the operator without them.
"saved" is what the forward pass keeps for the backward pass, as a part of what eager keeps.

Goals on a CPU with two threads: forward float32 at D = 64 15, 10, 3.5 and 2.3 times eager for
B = 1, 16, 128, 1024, at D = 128 and 256 twice from B = 128 on, and 80 % of the limit at D = 128,
B = 1024; bfloat16 8 times (64, B up to 128) and 1.5 times (128, B = 1024); a training step 10, 3.5
and 2.2 times (64, B = 1, 128, 1024); norms for at most 10 % (64) or 5 %; at most 50 % saved, and
5 % with checkpoints. On a GPU, by graph replay, so that eager is CUDA-graphed: G4 (8, 5, 2 and 1.15
times eager at D = 64, 128, 256, 512; compile 6, 4, 1.7, 1.1), G4b (45 % and 60 % of the limit at
D = 128 and 256, B = 8192), G5 (training step: 6, 4, 1.7, 1.1 times eager), G8 (saved, as above).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import fastres
from benchmarks import stack_baselines as others
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run
from fastres.ops.mlp_stack_blocks import CODES
from fastres.ops.mlp_stack_rules import FORWARD

NAME = "mlp_stack"
BLOCKS = 300
SHOWN = ((64, 128), (128, 128), (128, 1024), (256, 1024))  # width and batch in short tables
Shape = tuple[int, int, int]  # L, B, D


def tensors(
    shape: Shape, dtype: torch.dtype, device: torch.device, grad: bool = False
) -> tuple[Tensor, ...]:
    """Return x, the weights, scaled so that the stream stays finite, and the cotangent if `grad`.

    x is [B, D], w1 and w2 [L, D, D], b1 and b2 [L, D].
    """
    blocks, batch, width = shape
    x, gy = (torch.randn(batch, width, device=device).to(dtype) for _ in range(2))
    shapes = [(blocks, width, width), (blocks, width)] * 2
    scales = [width**-0.5, 0.1, (width * blocks) ** -0.5, 0.1 * blocks**-0.5]
    weights = [
        (torch.randn(each, device=device) * scale).to(dtype)
        for each, scale in zip(shapes, scales, strict=True)
    ]
    if not grad:
        return x, *weights
    return *(t.requires_grad_() for t in (x, *weights)), gy


def ours(
    x: Tensor, stack: Sequence[others.Weights], *, checkpoint: bool = False
) -> tuple[Tensor, object]:
    """Run the stack in one call."""
    (weights,) = stack
    w1, b1, w2, b2 = weights
    return fastres.mlp_stack(x, w1, b1, w2, b2, checkpoint=checkpoint)


def raw(stats: bool) -> Variant:
    """Return the operator with or without its sums, called as the public function calls it."""

    def build(x: Tensor, *weights: Tensor) -> Call:
        blocks, relu = weights[0].size(0), CODES["relu"]
        tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return lambda: FORWARD(x, *weights, None, blocks, relu, 0, stats, tf32)

    return Variant(build)


def work(shape: Shape, dtype: torch.dtype, train: bool) -> tuple[float, float]:
    """Return the bytes that must be moved at least, and the operations."""
    blocks, batch, width = shape
    weights, stream = blocks * (2 * width * width + 2 * width), batch * width
    numbers = 3 * weights + 4 * stream if train else weights + 2 * stream
    return numbers * dtype.itemsize, (12 if train else 4) * blocks * batch * width * width


def case(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device,
    variants: dict[str, Variant], goals: dict[str, float], *, train: bool = False,
    shown: bool = False,
) -> Case:  # fmt: skip
    """Return a case: its weights stay in cache where they fit, as those of a model in use do."""
    moved, flops = work(shape, dtype, train)
    judged = "graph" if device.type == "cuda" else ""
    return Case(
        name, shape, dtype, lambda: tensors(shape, dtype, device, train), variants, moved, flops,
        headline=shown, goals=goals, judged=judged, reads=True,
    )  # fmt: skip


def forward(
    shape: Shape, dtype: torch.dtype, device: torch.device, goals: dict[str, float],
    shown: bool = False,
) -> Case:  # fmt: skip
    """Return the case of a forward pass without gradient."""
    variants = {
        OURS: others.forward(ours, others.stacked),
        "eager": others.forward(others.eager),
        "measured eager": others.forward(others.measured),
    }
    if device.type == "cpu":
        variants["oneDNN"] = Variant(others.onednn)
    for name, (way, capturable) in others.compiled(device).items():
        variants[name] = others.forward(way, capturable=capturable)
    return case("forward", shape, dtype, device, variants, goals, shown=shown)


def step(
    shape: Shape, dtype: torch.dtype, device: torch.device, goals: dict[str, float], *,
    checkpoint: bool = False, shown: bool = False,
) -> Case:  # fmt: skip
    """Return the case of a training step."""
    variants = {
        OURS: others.training(partial(ours, checkpoint=checkpoint), others.stacked),
        "eager": others.training(others.eager),
        "measured eager": others.training(others.measured),
    }
    if checkpoint:
        variants["all states kept"] = others.training(ours, others.stacked)
        # What torch.utils.checkpoint keeps, it keeps out of sight of the hooks that count.
        variants["checkpointed eager"] = replace(others.training(others.segmented), saved=None)
    else:
        for name, (way, capturable) in others.compiled(device).items():
            variants[name] = others.training(way, capturable=capturable)
    name = "checkpointed step" if checkpoint else "training step"
    goals = {**goals, "saved": 0.05 if checkpoint else 0.5}
    return case(name, shape, dtype, device, variants, goals, train=True, shown=shown)


def norms(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of the operator with its sums beside the operator without."""
    variants = {OURS: raw(True), "norms off": raw(False)}
    goals = {"norms off": 1 / (1.1 if shape[2] < 128 else 1.05)}
    return case("norms", shape, dtype, device, variants, goals)


def on_cpu(device: torch.device) -> Iterator[Case]:
    """Yield the cases of a CPU."""
    half, single = torch.bfloat16, torch.float32
    wide = {128: 2.0, 1024: 2.0}
    floors = {
        single: {64: {1: 15.0, 16: 10.0, 128: 3.5, 1024: 2.3}, 128: wide, 256: wide},
        half: {64: {1: 8.0, 16: 8.0, 128: 8.0}, 128: {1024: 1.5}},
    }
    for dtype, widths in floors.items():
        for width, goals in widths.items():
            for batch in (1, 16, 128, 1024):
                goal = {"eager": goals[batch]} if batch in goals else {}
                if (dtype, width, batch) == (single, 128, 1024):
                    goal["limit"] = 0.8
                shown = (dtype, width) == (single, 64) or (width, batch) in SHOWN
                yield forward((BLOCKS, batch, width), dtype, device, goal, shown)
    for batch, least in ((1, 10.0), (128, 3.5), (1024, 2.2)):
        yield step((BLOCKS, batch, 64), single, device, {"eager": least}, shown=True)
    yield step((BLOCKS, 1024, 128), single, device, {}, shown=True)
    for batch, width in ((128, 64), (128, 128), (1024, 128)):
        yield step((BLOCKS, batch, width), half, device, {}, shown=True)
    yield step((BLOCKS, 1024, 64), single, device, {}, checkpoint=True, shown=True)
    for width in (64, 128, 256):
        for batch in (128, 1024):
            yield norms((BLOCKS, batch, width), single, device)


def on_cuda(device: torch.device) -> Iterator[Case]:
    """Yield the cases of a GPU: G4, G4b, G5 and G8, in bfloat16 and some in float32."""
    half, single = torch.bfloat16, torch.float32
    g4 = {64: (8.0, 6.0), 128: (5.0, 4.0), 256: (2.0, 1.7), 512: (1.15, 1.1)}
    g5 = {64: 6.0, 128: 4.0, 256: 1.7, 512: 1.1}
    for width, (eager, compiled) in g4.items():
        for batch in (128, 1024, 8192):
            goals = {"eager": eager, "compile": compiled}
            if batch == 8192 and width in (128, 256):
                goals["limit"] = 0.45 if width == 128 else 0.6
            shape, shown = (BLOCKS, batch, width), batch != 1024
            yield forward(shape, half, device, goals, shown)
            yield step(shape, half, device, {"eager": g5[width]}, shown=shown)
            yield norms(shape, half, device)
        yield forward((BLOCKS, 1024, width), single, device, {})
    yield step((BLOCKS, 8192, 128), half, device, {}, checkpoint=True, shown=True)


def tiny(device: torch.device) -> Iterator[Case]:
    """Yield one small case of every sort, for a smoke run."""
    shape, single = (4, 3, 16), torch.float32
    yield forward(shape, single, device, {"eager": 1.0})
    yield forward(shape, torch.bfloat16, device, {})
    yield step(shape, single, device, {})
    yield step(shape, single, device, {}, checkpoint=True)
    yield norms(shape, single, device)


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    found = tiny(device) if smoke else (on_cuda if device.type == "cuda" else on_cpu)(device)
    return (each for each in found if FORWARD is not None or each.name != "norms")


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
