"""path_gradients: what every path length of any model costs, in ordinary backward passes.

The model is the ResNet of 110 layers for CIFAR-10, 54 blocks, in eval mode, with random weights, on
8 images; K = 24 lengths and the exact tail are 26 rows of cotangents. "backward pass" is one by
torch.autograd.grad to the images, on a graph that is kept; fastres runs the forward pass, finds the
54 adds, and sends 26 rows back. The goal is at most 30 such backward passes of time. "ResidualMLP"
is 300 blocks of width 64 on 16 samples, with 32 lengths and the tail.
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
from fastres.nn import ResidualMLP, cifar_resnet

NAME = "path_gradients"


def score(out: Tensor) -> Tensor:
    """Sum the first logit over the batch: one gradient per sample."""
    return out[:, 0].sum()


def ours(model: nn.Module, longest: int) -> Variant:
    """Return the decomposition into lengths up to `longest` and the tail."""

    def build(x: Tensor) -> Call:
        return lambda: fastres.path_gradients(model, x, score, longest)

    return Variant(build, capturable=False)


def ordinary(model: nn.Module) -> Variant:
    """Return one backward pass."""

    def build(x: Tensor) -> Call:
        leaf = x.clone().requires_grad_()
        loss = score(model(leaf))
        return lambda: torch.autograd.grad(loss, leaf, retain_graph=True)

    return Variant(build, capturable=False)


def case(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], device: torch.device,
    longest: int, most: float = 0.0,
) -> Case:  # fmt: skip
    """Return a case; `most` backward passes are the goal, 0 for none."""
    torch.manual_seed(0)
    model = make().to(device).eval()
    return Case(
        name, shape, torch.float32, lambda: (torch.randn(shape, device=device),),
        {OURS: ours(model, longest), "backward pass": ordinary(model)}, 0, 0, headline=True,
        slow=True, graphed=False, goals={"backward pass": 1 / most} if most else {},
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    layers, blocks, longest = (8, 4, 2) if smoke else (110, 300, 32)
    images = (2, 3, 8, 8) if smoke else (8, 3, 32, 32)
    kept = 2 if smoke else 24
    yield case(
        f"ResNet-{layers}", lambda: cifar_resnet(layers), images, device, kept, 0 if smoke else 30
    )
    yield case(
        "ResidualMLP", lambda: ResidualMLP(64, 10, 64, blocks), (16, 64), device, longest
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
