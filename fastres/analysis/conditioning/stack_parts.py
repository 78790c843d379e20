"""stack_parts: what a Hessian-vector product through a stack keeps, as a whole and by the block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.ops.mlp_stack_blocks import ACTIVATIONS

Four = tuple[Tensor, Tensor, Tensor, Tensor]  # of w1, b1, w2, b2


class Pass(NamedTuple):
    """The forward and the backward pass at the point, which no vector changes."""

    x: Tensor  # [L, B, D], the stream before every block
    y: Tensor  # [B, D], after the last
    h: Tensor  # [L, B, H], act(z)
    slope: Tensor  # [L, B, H], act'(z)
    bend: Tensor | None  # [L, B, H], q act''(z), q = W2^T gate g; None where act'' is 0
    g: Tensor  # [L, B, D], gate times the cotangent of the stream after every block
    dz: Tensor  # [L, B, H], cotangent of z


class Block(NamedTuple):
    """What all vectors meet at one block."""

    w1: Tensor  # [H, D]
    w2: Tensor  # [D, H]
    slope: Tensor  # [B, H]
    bend: Tensor | None  # [B, H]
    gate: Tensor | None  # [B or 1, 1]


class Weights(NamedTuple):
    """What K vectors, or their products, are at one block."""

    w1: Tensor  # [K, H, D]
    b1: Tensor  # [K, 1, H]
    w2: Tensor  # [K, D, H]
    b2: Tensor  # [K, 1, D]


class Tangents(NamedTuple):
    """What the vectors, K of them, do to the forward pass."""

    dx: Tensor  # [L, K, B, D], tangents of the stream before every block
    dz: Tensor  # [L, K, B, H], of z; where act'' is 0 nobody needs it, and it is dh
    dh: Tensor  # [L, K, B, H], of act(z)
    dy: Tensor  # [K, B, D], of y


def each_block(t: Tensor, count: int) -> Sequence[Tensor]:
    """View [L, ...] as L times [K, ...], the same for all K vectors."""
    return t.unsqueeze(1).expand(-1, count, *t.shape[1:]).unbind(0)


def unbound(v: Four) -> Iterator[Weights]:
    """Go through what there is of each block."""
    return map(Weights._make, zip(*(t.unbind(1) for t in v), strict=True))


def derivatives(activation: str, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute act(z), act'(z) and act''(z), None where that is 0 everywhere; z is consumed."""
    if activation == "relu":
        slope = (z > 0).to(z.dtype)
        return z.relu_(), slope, None
    if activation == "identity":
        return z, torch.ones_like(z), None
    act = ACTIVATIONS[activation]
    # not forward over forward: torch has no such derivative of silu
    differentiated = torch.func.grad(lambda z: act(z).sum())
    slope, bend, *_ = torch.func.jvp(differentiated, (z,), (torch.ones_like(z),))
    return act(z), slope, bend
