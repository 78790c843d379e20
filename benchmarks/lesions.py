"""lesions: every single block of a ResNet deleted, beside evaluating the network once for each.

The model is the ResNet of 56 layers for CIFAR-10, 27 blocks, in eval mode, with random weights, on
100 images, the batch of `fastres.analysis.lesion.delete`: a thousand images are ten such passes.
"separate evaluations" are one pass for each block, its branch gated by 0. fastres shares what comes
before the deleted block, and evaluates the network without a lesion besides. The goal is 0.6 of the
time of the separate evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastres
from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run
from fastres.analysis.lesion import delete, wrong
from fastres.nn import cifar_resnet

NAME = "lesions"


def ours(model: nn.Module) -> Variant:
    """Return all single deletions, and the network without one."""

    def build(x: Tensor, y: Tensor) -> Call:
        return lambda: delete(model, x, y)

    return Variant(build, capturable=False)


def separate(model: nn.Module) -> Variant:
    """Return a pass for each block."""

    def build(x: Tensor, y: Tensor) -> Call:
        names = [site.name for site in fastres.trace(model, x[:1])]

        @torch.no_grad()
        def call() -> list[Tensor]:
            with fastres.gate(model, lambda step: {names[step]: 0.0}):
                return [wrong(model(x), y) for _ in names]

        return call

    return Variant(build, capturable=False)


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    layers, shape = (8, (2, 3, 8, 8)) if smoke else (56, (100, 3, 32, 32))
    torch.manual_seed(0)
    model = cifar_resnet(layers).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    yield Case(
        f"ResNet-{layers}", shape, torch.float32, _inputs(shape, device),
        {OURS: ours(model), "separate evaluations": separate(model)}, 0, 0, headline=True,
        slow=True, graphed=False, goals={} if smoke else {"separate evaluations": 1 / 0.6},
    )  # fmt: skip


def _inputs(shape: tuple[int, ...], device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    def make() -> tuple[Tensor, Tensor]:
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        return x, torch.zeros(shape[0], dtype=torch.long, device=device)

    return make


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
