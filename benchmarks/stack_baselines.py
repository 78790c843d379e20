"""stack_baselines: the strongest other ways to run a stack of residual blocks, and what they keep.

Each runs blocks of weight tensors of their own, as models have them:

    eager             x + linear(relu(linear(x))), without norms: what people write
    measured eager    the same with the norms of x and of the branch, by vector_norm
    oneDNN            two calls per block of the kernel that torch.compile puts in place of a linear
                      layer on a CPU, with weights laid out for it beforehand: product, bias and
                      ReLU in one, product, bias and the add in the other; without norms
    compile           one compiled block, applied once per block; without norms
    compile whole     all blocks compiled as one graph, minutes for 300 of them: only where the
                      environment variable FASTRES_COMPILE_WHOLE is set
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from benchmarks.baselines import compile_modes
from benchmarks.case import Variant
from benchmarks.clocks import Call, UnavailableError

Weights = tuple[Tensor, ...]  # w1 [H, D], b1 [H], w2 [D, H], b2 [D]; of a stack with L in front
Run = Callable[[Tensor, Sequence[Weights]], object]  # x [B, D], weights -> y [B, D], or more
Split = Callable[[Sequence[Tensor]], list[Weights]]


def stacked(weights: Sequence[Tensor]) -> list[Weights]:
    """Leave the weights of a stack as they are."""
    return [tuple(weights)]


def separate(weights: Sequence[Tensor]) -> list[Weights]:
    """Return the weights of each block in tensors of their own."""
    grad = any(t.requires_grad for t in weights)
    blocks = zip(*(t.detach().unbind() for t in weights), strict=True)
    return [tuple(t.clone().requires_grad_(grad) for t in each) for each in blocks]


def block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Run one block."""
    return x + linear(linear(x, w1, b1).relu(), w2, b2)


def eager(x: Tensor, blocks: Sequence[Weights]) -> Tensor:
    """Run the blocks one by one."""
    for each in blocks:
        x = block(x, *each)
    return x


def measured(x: Tensor, blocks: Sequence[Weights]) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks one by one, with the norms of x and of the branch, [B] each."""
    norms = []
    for w1, b1, w2, b2 in blocks:
        f = linear(linear(x, w1, b1).relu(), w2, b2)
        with torch.no_grad():
            norms += [vector_norm(t, dim=1, dtype=torch.float32) for t in (x, f)]
        x = x + f
    return x, norms


def segmented(x: Tensor, blocks: Sequence[Weights]) -> Tensor:
    """Run segments of sqrt(L) blocks, which torch computes again in the backward pass."""
    step = max(1, round(len(blocks) ** 0.5))
    for at in range(0, len(blocks), step):
        x = checkpoint(eager, x, blocks[at : at + step], use_reentrant=False)
    return x


def onednn(x: Tensor, *weights: Tensor) -> Call:
    """Return a call of oneDNN's fused products, without gradient."""
    if not (x.is_cpu and torch.backends.mkldnn.is_available()):
        raise UnavailableError("oneDNN is not part of torch here")
    ops = torch.ops.mkldnn

    pack = partial(ops._reorder_linear_weight, batch_size=x.size(0))
    blocks = [(pack(w1), b1, pack(w2), b2) for w1, b1, w2, b2 in separate(weights)]

    def call() -> Tensor:
        stream = x
        for w1, b1, w2, b2 in blocks:
            h = ops._linear_pointwise(stream, w1, b1, "relu", [], "")
            stream = ops._linear_pointwise.binary(h, stream, w2, b2, "add")
        return stream

    return call


def compiled(device: torch.device) -> dict[str, tuple[Run, bool]]:
    """Return the ways of torch.compile as name -> (run, whether a CUDA graph can hold it)."""
    found = {}
    for name, mode, capturable in compile_modes(device, cached=False):
        found[name] = (_by_block(mode), capturable)
        if os.environ.get("FASTRES_COMPILE_WHOLE"):
            whole = "compile whole" + name.removeprefix("compile")
            found[whole] = (_whole(mode), capturable)
    return found


def _by_block(mode: str) -> Run:
    @cache  # none before it is asked for
    def one() -> Callable[..., Tensor]:
        return torch.compile(block, fullgraph=True, dynamic=False, mode=mode)

    def run(x: Tensor, blocks: Sequence[Weights]) -> Tensor:
        for each in blocks:
            x = one()(x, *each)
        return x

    return run


def _whole(mode: str) -> Run:
    @cache
    def all_blocks() -> Callable[..., Tensor]:
        return torch.compile(eager, fullgraph=True, dynamic=False, mode=mode)

    return lambda x, blocks: all_blocks()(x, blocks)


def forward(run: Run, split: Split = separate, capturable: bool = True) -> Variant:
    """Return the variant of a forward pass without gradient; its inputs are x and the weights."""

    def build(x: Tensor, *weights: Tensor) -> Call:
        blocks = split(weights)
        return lambda: run(x, blocks)

    return Variant(build, capturable=capturable)


def training(run: Run, split: Split = separate, capturable: bool = True) -> Variant:
    """Return the variant of a forward pass and a backward pass to x and all weights.

    Its inputs are x, the weights and the cotangent of y.
    """

    def build(x: Tensor, *given: Tensor) -> Call:
        blocks = split(given[:-1])
        leaves = [x, *(t for each in blocks for t in each)]
        return lambda: torch.autograd.grad(result(x, blocks), leaves, given[-1])

    def result(x: Tensor, blocks: Sequence[Weights]) -> Tensor:
        found = run(x, blocks)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[return-value]

    def saved(x: Tensor, *given: Tensor) -> int:
        blocks = split(given[:-1])
        return saved_bytes(lambda: run(x, blocks), (t for each in blocks for t in each))

    return Variant(build, capturable=capturable, saved=saved)


def saved_bytes(call: Call, parameters: Iterable[Tensor]) -> int:
    """Return the bytes that a call keeps for its backward pass.

    Every storage counts once and whole, those of the parameters not at all.
    """
    known = {t.untyped_storage().data_ptr() for t in parameters}
    kept: dict[int, Tensor] = {}  # they stay alive here, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.detach()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = call()
    del output
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)
