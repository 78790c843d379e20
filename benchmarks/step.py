"""step: what the sums cost a training step of a residual MLP (goal G3), beside adds without them.

The model is a stack of blocks x + W2 relu(W1 x + b1) + b2 of width W, and the step is forward, loss
and backward pass, the same in every variant but for the add: `fastres.residual_add`, whose three
sums are stacked and kept, a bare `x + f`, which measures nothing, and the eager sums. The fused add
moves the bytes of the bare one and launches one kernel as well, so by bytes the step takes as long:
goals are 2 % at most for W >= 128 and 5 % for W = 64. Eager sums read both tensors again. On a CPU
the same steps are run with smaller batches; no goal is set for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastres
from benchmarks import baselines
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run

NAME = "step"
Join = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]  # x, f -> x + f, what is kept


def fused(x: Tensor, f: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The add that measures."""
    y, stats = fastres.residual_add(x, f)
    return y, list(stats)


def bare(x: Tensor, f: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The add that does not."""
    return x + f, []


def eager(x: Tensor, f: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The add, then the sums."""
    with torch.no_grad():
        sums = baselines.norms(x, f)
    return x + f, list(sums)


def step(join: Join, x: Tensor, parameters: list[Tensor]) -> Call:
    """Return a call of forward, loss and backward pass; it keeps what the adds measured."""

    def call() -> object:
        stream, kept = x, []
        for at in range(0, len(parameters), 4):
            w1, b1, w2, b2 = parameters[at : at + 4]
            stream, sums = join(stream, linear(linear(stream, w1, b1).relu(), w2, b2))
            kept += sums
        loss = stream.square().mean(dtype=torch.float32)
        return torch.autograd.grad(loss, parameters), kept

    return call


def case(device: torch.device, width: int, batch: int, blocks: int, *, goal: float) -> Case:
    """Return the case of one width and batch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def inputs() -> tuple[Tensor, ...]:
        shapes = [(width, width), (width,)] * 2 * blocks
        made = [torch.randn(shape, device=device) / width**0.5 for shape in shapes]
        scaled = [(t / blocks**0.5).to(dtype).requires_grad_() for t in made]
        return torch.randn(batch, width, device=device).to(dtype), *scaled

    def variant(join: Join) -> Variant:
        return Variant(lambda x, *parameters: step(join, x, list(parameters)))

    variants = {OURS: variant(fused), "x + f": variant(bare), "eager norms": variant(eager)}
    return Case(
        f"{blocks} blocks", (batch, width), dtype, inputs, variants, 0,
        3 * 4 * width * width * batch * blocks, headline=True,
        goals={"x + f": 1 / goal} if device.type == "cuda" else {},
        judged="graph" if device.type == "cuda" else "",
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield widths 64, 128 and 512; 8192 rows in bfloat16 on a GPU, 1024 in float32 on a CPU."""
    batch, blocks = (8192, 64) if device.type == "cuda" else (1024, 16)
    for width in (64, 128, 512):
        if smoke:
            width, batch, blocks = 8, 4, 2
        yield case(device, width, batch, blocks, goal=1.05 if width < 128 else 1.02)
        if smoke:
            return


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
