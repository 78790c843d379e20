"""stack_hessian: Hessian-vector products through a stack of residual blocks, beside torch.func.

The shapes are [K, L, B, D]: vectors, blocks, batch and width, with H = D. The loss is the cross
entropy of the output, and the vectors are as long as all weights. A product takes 24 K L B D^2
operations, and what no vector changes 8 L B D^2. "product" is one at a point where others
were before, as all but the first of Lanczos or of conjugate gradients are; "point and product" is a
single one, forward and backward pass included.

    torch.func    jvp of grad of the plain composition, under vmap for more than one vector: point
                  and product, each time
    linearize     torch.func.linearize of grad, made before: the product alone

Goal on a CPU: 2 times torch.func, for 300 blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run
from fastres.analysis.conditioning import FunctionHessian, StackHessian
from fastres.ops.mlp_stack_blocks import ACTIVATIONS

NAME = "stack_hessian"
Shape = tuple[int, int, int, int]  # K, L, B, D


def tensors(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """Return x, w1, b1, w2, b2 and the vectors [K, P]."""
    count, blocks, batch, width = shape
    x = torch.randn(batch, width, device=device)
    w1 = (2 / width) ** 0.5 * torch.randn(blocks, width, width, device=device)
    w2 = (width * blocks) ** -0.5 * torch.randn(blocks, width, width, device=device)
    b1, b2 = (0.1 * torch.randn(blocks, width, device=device) for _ in "12")
    vectors = torch.randn(count, 2 * blocks * width * (width + 1), device=device)
    return x, w1, b1, w2, b2, vectors


def cross_entropy(y: Tensor) -> Tensor:
    """The loss, with the classes in turn."""
    return F.cross_entropy(y, torch.arange(len(y), device=y.device) % y.size(1))


def plain(x: Tensor, activation: str) -> Any:
    """Return the loss as a function of the weights, by the plain composition."""
    act = ACTIVATIONS[activation]

    def loss(*weights: Tensor) -> Tensor:
        y = x
        for w1, b1, w2, b2 in zip(*(w.unbind(0) for w in weights), strict=True):
            y = y + F.linear(act(F.linear(y, w1, b1)), w2, b2)
        return cross_entropy(y)

    return loss


def ours(activation: str, whole: bool) -> Variant:
    """Return the operator; `whole` makes it anew in each call."""

    def build(x: Tensor, *rest: Tensor) -> Call:
        *weights, vectors = rest
        if whole:
            return lambda: StackHessian(x, *weights, cross_entropy, activation=activation).products(
                vectors
            )
        operator = StackHessian(x, *weights, cross_entropy, activation=activation)
        return lambda: operator.products(vectors)

    return Variant(build, capturable=False)


def by_func(activation: str) -> Variant:
    """Return forward over reverse."""

    def build(x: Tensor, *rest: Tensor) -> Call:
        *weights, vectors = rest
        operator = FunctionHessian(plain(x, activation), *weights)
        if len(vectors) > 1:
            return lambda: operator.products(vectors)
        gradient = torch.func.grad(plain(x, activation), (0, 1, 2, 3))
        tangents = split(vectors, weights)
        return lambda: torch.func.jvp(gradient, tuple(weights), tangents)[1]

    return Variant(build, capturable=False)


def by_linearize(activation: str) -> Variant:
    """Return the product alone."""

    def build(x: Tensor, *rest: Tensor) -> Call:
        *weights, vectors = rest
        gradient = torch.func.grad(plain(x, activation), (0, 1, 2, 3))
        _, product = torch.func.linearize(gradient, *weights)
        tangents = split(vectors, weights)
        return lambda: product(*tangents)

    return Variant(build, capturable=False)


def split(vectors: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """View the first vector as weights."""
    parts = vectors[0].split([w.numel() for w in weights])
    return tuple(part.view(w.shape) for part, w in zip(parts, weights, strict=True))


def case(shape: Shape, device: torch.device, activation: str, whole: bool, goal: float) -> Case:
    """Return a case; `whole` includes what no vector changes."""
    count, blocks, batch, width = shape
    variants = {OURS: ours(activation, whole), "torch.func": by_func(activation)}
    if count == 1 and not whole:
        variants["linearize"] = by_linearize(activation)
    name = "point and product" if whole else "product"
    return Case(
        f"{name}, {activation}", shape, torch.float32, lambda: tensors(shape, device), variants,
        0, (24 * count + 8 * whole) * blocks * batch * width**2, headline=not whole, slow=True,
        graphed=False, goals={"torch.func": goal} if goal else {},
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    blocks, batch, width = (3, 4, 8) if smoke else (300, 128, 64)
    goal = 0.0 if smoke else 2.0
    for activation in ("relu", "gelu"):
        for whole in (False, True):
            yield case((1, blocks, batch, width), device, activation, whole, goal)
    yield case((8, blocks, batch, width), device, "relu", False, goal)


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
