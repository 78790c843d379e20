"""record: what recording every residual add of ResNet-50 costs, beside hooks that do the same.

Three copies of one model run the same batch in interleaved rounds: bare, with the three sums of
all 16 adds taken by `fastres.record`, and with forward hooks that take them from the same tensors.
The sums need no pass of their own where the add is fused: 16 adds read 2 tensors and write one
either way, so the model says 1.00x of the bare forward pass; the goal is at most 1.03x. Hooks read
both tensors again, and write a product. A training step is forward, loss and backward pass in train
mode, without an optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from benchmarks import baselines
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call, UnavailableError
from benchmarks.command import run

NAME = "record"
Model = Callable[[], nn.Module]


def resnet50(device: torch.device, dtype: torch.dtype, train: bool) -> nn.Module:
    """Return torchvision's ResNet-50 with seeded random weights."""
    try:
        torchvision = _torchvision()
    except ImportError:
        raise UnavailableError("torchvision is not installed") from None
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50()
    form = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(device, dtype).train(train)
    return model.to(memory_format=form)  # type: ignore[call-overload,no-any-return]


def _torchvision() -> Any:
    """Import torchvision, also where its compiled operators do not fit this torch.

    Its Python code then fails to register a fake kernel for two of them, which no model here uses.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision

        torchvision.library_of_stubs = library  # the definitions end with the object
    return torchvision


def hook(model: nn.Module) -> list[tuple[Tensor, ...]]:
    """Hook every bottleneck of a torchvision ResNet; the sums of the last pass are in the list.

    A block adds the output of bn3 to its input, or to the output of `downsample`, which runs last.
    """
    sums: list[tuple[Tensor, ...]] = []
    held: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(skip: Tensor, branch: Tensor) -> None:
        if len(sums) == len(blocks):
            sums.clear()
        sums.append(baselines.norms(skip, branch))

    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "bn3")]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: held.update(x=args[0]))
        if block.downsample is None:
            block.bn3.register_forward_hook(lambda _, args, out: take(held["x"], out))
        else:
            block.bn3.register_forward_hook(lambda _, args, out: held.update(f=out))
            block.downsample.register_forward_hook(lambda _, args, out: take(out, held["f"]))
    return sums


def step(model: nn.Module, x: Tensor, target: Tensor | None) -> Call:
    """Return a call of the forward pass, or of a training step where there is a target."""
    if target is None:
        return torch.no_grad()(lambda: model(x))
    parameters = list(model.parameters())

    def call() -> object:
        loss = nn.functional.cross_entropy(model(x).float(), target)
        return torch.autograd.grad(loss, parameters)

    return call


def case(device: torch.device, batch: int, pixels: int, train: bool, goal: float) -> Case:
    """Return the case of a forward pass in eval mode, or of a training step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch, 3, pixels, pixels)

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(shape, device=device).to(dtype)
        if device.type == "cuda":
            x = x.contiguous(memory_format=torch.channels_last)
        return (x, torch.randint(1000, (batch,), device=device)) if train else (x,)

    def bare(x: Tensor, target: Tensor | None = None) -> Call:
        return step(resnet50(device, dtype, train), x, target)

    def hooked(x: Tensor, target: Tensor | None = None) -> Call:
        model = resnet50(device, dtype, train)
        hook(model)
        return step(model, x, target)

    recorded = Recorded(lambda: resnet50(device, dtype, train))
    variants = {
        OURS: Variant(recorded.build, around=recorded.around),
        "bare": Variant(bare),
        "hooks": Variant(hooked),
    }
    return Case(
        "training step" if train else "forward", shape, dtype, inputs, variants, 0,
        flops(shape, train), cached=True, headline=True, slow=True, graphed=False,
        goals={"bare": 1 / goal},
    )  # fmt: skip


class Recorded:
    """A model and the recording of it that is open while the model is timed."""

    def __init__(self, make: Model) -> None:
        self._make = make
        self._model: nn.Module | None = None

    def around(self) -> Any:
        """Open a recording; finding the sites is left to the first call in it."""
        self._model = self._model or self._make()
        return fastres.record(self._model)

    def build(self, x: Tensor, target: Tensor | None = None) -> Call:
        """Return the call on the model that is recorded."""
        self._model = self._model or self._make()
        return step(self._model, x, target)


def flops(shape: tuple[int, ...], train: bool) -> float:
    """Count the operations of a call's convolutions and products, on meta tensors."""
    meta = torch.device("meta")
    target = torch.zeros(shape[0], dtype=torch.long, device=meta) if train else None
    try:
        model = resnet50(meta, torch.float32, train)
    except UnavailableError:
        return 0.0
    call = step(model, torch.zeros(shape, device=meta), target)
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the forward pass and the training step: batch 8 on a CPU, 64 in bfloat16 on a GPU."""
    batch, pixels = (2, 64) if smoke else (8 if device.type == "cpu" else 64, 224)
    yield case(device, batch, pixels, train=False, goal=1.03)
    yield case(device, batch, pixels, train=True, goal=1.03)


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
