"""mlp_stack_blocks: the stack in plain PyTorch, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fastres.ops.layout import accumulate
from fastres.ops.stats import sums_of


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# In the order of Activation in csrc/mlp_stack/kernel.h.
ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "identity": _identity,
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
    }
)
CODES: Final[Mapping[str, int]] = MappingProxyType({name: i for i, name in enumerate(ACTIVATIONS)})
_BY_CODE: Final = tuple(ACTIVATIONS.values())

Add = Callable[[Tensor, Tensor], Tensor]
Outputs = tuple[Tensor, Tensor, Tensor]  # y, sums, states


def run_blocks(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    gate: Tensor | None,
    blocks: int,
    activation: int,
    add: Add,
) -> Tensor:
    """Run the blocks one after the other, each as its own operations and ending in add(x, p).

    Args:
        x: [B, ..., D].
        weights: w1 [L or 1, H, D], b1 [L or 1, H], w2 [L or 1, D, H], b2 [L or 1, D].
        gate: [L, B], or None for 1.
        blocks: L.
        activation: Its number in CODES.
        add: Joins a branch p to its stream x.
    """
    act = _BY_CODE[activation]
    # unbind once: w1[l] in the loop would write a full-sized gradient per block, O(L^2)
    sets = list(zip(*(w.unbind(0) for w in weights), strict=True))
    for block in range(blocks):
        w1, b1, w2, b2 = sets[block if len(sets) == blocks else 0]
        p = F.linear(act(F.linear(x, w1, b1)), w2, b2)
        x = add(x, p if gate is None else p * gate[block].reshape(-1, *[1] * (p.dim() - 1)))
    return x


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keep autocast from rounding products where x is: the raw operators know nothing of it."""
    if x.is_meta:
        return contextlib.nullcontext()  # of meta tensors torch raises an error where it is asked
    return torch.autocast(x.device.type, enabled=False)


def composed(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    blocks: int,
    activation: int,
    every: int,
    add: Add = torch.add,
) -> Outputs:
    """Compute what the raw operator does, y, sums and states, in plain PyTorch.

    All is computed in the accumulate dtype from the inputs as they are, and y and states are
    rounded to the dtype of x. The sums carry no gradients.
    """
    dtype, wide = x.dtype, accumulate(x.dtype)
    sums: list[Tensor] = []
    states: list[Tensor] = []

    def join(x: Tensor, p: Tensor) -> Tensor:
        if every and len(sums) % every == 0:
            states.append(x.to(dtype))
        sums.append(sums_of(x.detach(), p.detach()))
        return add(x, p)

    weights = (w1.to(wide), b1.to(wide), w2.to(wide), b2.to(wide))
    with without_autocast(x):
        y = run_blocks(x.to(wide).contiguous(), weights, gate, blocks, activation, join)
    measured = torch.stack(sums) if sums else x.new_empty((0, 3, x.size(0)), dtype=wide)
    kept = torch.stack(states) if states else x.new_empty((0, *x.shape) if every else (0,))
    return y.to(dtype), measured, kept
