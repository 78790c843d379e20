"""batch_norm_residual: a training step of relu(x + batch_norm(f)), and the pass in eval mode.

By bytes, a training step of float32 needs a read of f for its statistics, a pass that reads x and f
and writes y, a pass over gy and f for the sums of each channel, and one that reads them again and
writes both gradients: 10 passes over B*N elements, and a bit per element and pass of the mask.
Where a sample's share stays in cache the statistics cost no traffic of their own. On a CPU a store
waits for its line: our kernels ask for it ahead of time, eager and copy_ do not, and take longer
than by bytes. By bytes

    eager         17/10 = 1.7x   batch_norm 2 + 2, add 3, relu 2; relu 3, batch_norm 2 + 3
    eager norms   19/10 = 1.9x   vector_norm 1 + 1 more
    compile                      one loop for each of the passes: parity is the limit

Goals on a CPU, at the stages of a ResNet for CIFAR-10 and batch 64: 1.6x eager with norms, 1.25x
without. On a GPU: 80 % of the copy bandwidth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F  # noqa: N812

import fastres
from benchmarks.baselines import compile_modes, rows
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run

NAME = "batch_norm_residual"
FLOPS = 30  # per element, of a training step
STAGES = ((16, 32, 32), (32, 16, 16), (64, 8, 8))

TRAINED = {"eager norms": 1.6, "eager": 1.25}
Run = Callable[..., Tensor]  # x, f [B, C, H, W], weight, bias [C], mean, var [C], training -> y


def ours(x: Tensor, f: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor, train: bool) -> Tensor:
    """The operator, which always measures."""
    return fastres.batch_norm_residual(x, f, m, v, w, b, relu=True, training=train)[0]


def eager(x: Tensor, f: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor, train: bool) -> Tensor:
    """What people write, unmeasured."""
    return torch.relu(x + F.batch_norm(f, m, v, w, b, train))


def measured(
    x: Tensor, f: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor, train: bool
) -> Tensor:
    """The same with the norms of x and of the branch."""
    p = F.batch_norm(f, m, v, w, b, train)
    with torch.no_grad():
        for t in (x, p):
            vector_norm(rows(t), dim=1, dtype=torch.float32)
    return torch.relu(x + p)


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str
) -> tuple[Tensor, ...]:
    """Return x, f, weight, bias, running mean and variance, and the cotangent of y."""
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, f, g = (torch.randn(shape, device=device).to(dtype, memory_format=form) for _ in range(3))
    weight, bias = (torch.rand(shape[1], device=device) for _ in range(2))
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    return *(t.requires_grad_() for t in (x, f, weight, bias)), mean, var, g


def step(one: Run) -> Callable[..., Call]:
    """Return what builds a forward and backward pass in training."""

    def build(x: Tensor, f: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Call:
        return lambda: torch.autograd.grad(one(x, f, w, b, m, v, True), (x, f, w, b), g)

    return build


def inference(one: Run) -> Callable[..., Call]:
    """Return what builds a forward pass in eval mode."""

    def build(x: Tensor, f: Tensor, w: Tensor, b: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Call:
        given = tuple(t.detach() for t in (x, f, w, b, m, v))
        return lambda: one(*given, False)

    return build


def compiled(mode: str) -> Run:
    """Return eager with torch.compile, compiled when it is first called."""

    @cache
    def one() -> Run:
        return torch.compile(eager, fullgraph=True, dynamic=False, mode=mode)

    return lambda *given: one()(*given)


def case(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str, train: bool,
    goals: dict[str, float],
) -> Case:  # fmt: skip
    """Return the case of a training step, or of the pass in eval mode."""
    numel, build = torch.Size(shape).numel(), step if train else inference
    moved = (10 if train else 3) * numel * dtype.itemsize
    runs = {OURS: ours, "eager": eager, "eager norms": measured}
    variants = {name: Variant(build(one)) for name, one in runs.items()}
    for name, mode, capturable in compile_modes(device, cached=True):
        variants[name] = Variant(build(compiled(mode)), capturable=capturable)
    return Case(
        "training step" if train else "eval", shape, dtype,
        lambda: tensors(shape, dtype, device, layout), variants, moved,
        (FLOPS if train else 10) * numel, layout, True, layout == "contiguous" and train,
        goals=goals,
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    if smoke:
        for layout in ("contiguous", "channels_last"):
            yield case((3, 4, 5, 5), torch.float32, device, layout, layout == "contiguous", {})
        return
    batch = 64 if device.type == "cpu" else 512
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    goals = TRAINED if device.type == "cpu" else {"limit": 0.8}
    for layout in ("contiguous", "channels_last"):
        for stage in STAGES:
            yield case((batch, *stage), dtype, device, layout, True, goals)
            yield case((batch, *stage), dtype, device, layout, False, {})


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
