"""conv_resnet: ResNets for CIFAR-10 after `fastres.fuse`, in eval and training, beside eager.

In eval ours is `fuse(stacks=True)`: a stage, but for the block that changes the shape, is one
`conv_stack`, through which an image goes without leaving a core's second cache. In every other
variant the convolutions are torch's own, and most of the time: a fused block reads branch and skip
and writes their sum, 3 passes over memory where eager has 7, and 2 where it has 4 for the batch
norm and ReLU inside the branch. A training step is forward, loss and backward pass without an
optimizer; ours is recorded, eager is not. "saved" is what the forward pass keeps for the backward
pass, as a part of what eager keeps. Per block eager keeps 4 activations, the inputs of two
convolutions and of two batch norms; recomputing, we keep 2.5 and 2 bits per element: 0.64.

Goals on a CPU: in eval 1.2 times eager at batch 16 and 64, 2 times at batch 1; the recorded step
of ResNet-56 in the time of the eager one; of ResNet-110 at most 75 % saved. On a GPU, in bfloat16
and channels_last: in eval, by graph replay, 4 times eager at batch 1 and 2.5 times at 128, 1.8
times compile; the recorded step of ResNet-110 1.2 times compile with CUDA graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from benchmarks.baselines import compile_modes
from benchmarks.case import OURS, Case, Variant
from benchmarks.command import run
from benchmarks.record import Recorded, step
from benchmarks.stack_baselines import saved_bytes

NAME = "conv_resnet"
SIZE = (3, 32, 32)
FORMS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Model = Callable[[], nn.Module]


def network(
    depth: int, device: torch.device, dtype: torch.dtype, layout: str, train: bool
) -> nn.Module:
    """Return a ResNet with seeded random weights."""
    torch.manual_seed(0)
    model: nn.Module = fastres.nn.cifar_resnet(depth).to(device, dtype).train(train)
    return model.to(memory_format=FORMS[layout])  # type: ignore[call-overload,no-any-return]


def fused(make: Model, recompute: bool, stacks: bool) -> nn.Module:
    """Return the same with every block fused, and in eval mode stacked."""
    model = make()
    example = torch.randn(2, *SIZE).to(next(model.parameters()))
    options = {"recompute": recompute, "stacks": stacks}
    assert not fastres.fuse(model, example, verify=False, **options).left
    return model


def kept(make: Model) -> Callable[..., int]:
    """Return what counts the bytes that a model's forward pass keeps."""

    def saved(x: Tensor, target: Tensor) -> int:
        model = make()
        loss = nn.functional.cross_entropy
        return saved_bytes(lambda: loss(model(x), target), model.parameters())

    return saved


def flops(make: Model, batch: int, train: bool) -> float:
    """Count the operations of a call's convolutions and products, on meta tensors."""
    meta = torch.device("meta")
    target = torch.zeros(batch, dtype=torch.long, device=meta) if train else None
    call = step(make().to(meta, torch.float32), torch.zeros(batch, *SIZE, device=meta), target)
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def case(
    device: torch.device, depth: int, batch: int, layout: str, train: bool, goals: dict[str, float],
    recompute: bool = False, dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Return the case of a forward pass in eval mode, or of a training step."""
    gpu = device.type == "cuda"
    make = partial(network, depth, device, dtype, layout, train)
    ours = partial(fused, make, recompute, not train)

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(batch, *SIZE, device=device).to(dtype, memory_format=FORMS[layout])
        return (x, torch.randint(10, (batch,), device=device)) if train else (x,)

    def variant(model: Model) -> Variant:
        return Variant(
            lambda x, target=None: step(model(), x, target), saved=kept(model) if train else None
        )

    def recorded(model: Model) -> Variant:
        watched = Recorded(model)
        return Variant(watched.build, around=watched.around, saved=kept(model))

    variants = {OURS: recorded(ours) if train else variant(ours), "eager": variant(make)}
    if train:
        variants |= {"fused, not recorded": variant(ours), "eager, recorded": recorded(make)}
    else:
        variants["fused, not stacked"] = variant(partial(fused, make, False, False))
    if gpu:
        for name, mode, capturable in compile_modes(device, cached=True):
            way = variant(lambda mode=mode: torch.compile(make(), mode=mode))
            variants[name] = replace(way, capturable=capturable, saved=None)
    kind = "training step" + ", recomputing" * recompute if train else "eval"
    return Case(
        f"ResNet-{depth} {kind}", (batch, *SIZE), dtype, inputs, variants, 0,
        flops(make, batch, train), layout, headline=gpu or layout == "contiguous", slow=not gpu,
        graphed=not train, goals=goals, judged="graph" if gpu and not train else "",
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield eval at three batches and the training steps, on a CPU in both layouts."""
    if device.type == "cuda" and not smoke:
        of = partial(case, device, 110, layout="channels_last", dtype=torch.bfloat16)
        for batch in (1, 128, 1024):
            goals = {"eager": 4.0 if batch == 1 else 2.5, "compile": 1.8} if batch <= 128 else {}
            yield of(batch, train=False, goals=goals)
        yield of(128, train=True, goals={"compile reduce-overhead": 1.2})
        yield of(128, train=True, goals={"saved": 0.75}, recompute=True)
        return
    for layout in FORMS:
        if smoke:
            train = layout == "contiguous"
            yield case(device, 8, 2, layout, train, {}, recompute=train)
            continue
        for batch in (1, 16, 64):
            yield case(device, 110, batch, layout, False, {"eager": 2.0 if batch == 1 else 1.2})
        yield case(device, 56, 64, layout, True, {"eager": 1.0})
        yield case(device, 110, 64, layout, True, {"saved": 0.75}, recompute=True)
    if not smoke:  # with few images the time of calls from Python counts
        yield case(device, 110, 8, "contiguous", True, {})
    for batch in () if smoke else (1, 16, 64):
        yield case(device, 110, batch, "channels_last", False, {}, dtype=torch.bfloat16)


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
