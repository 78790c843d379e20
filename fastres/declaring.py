"""declaring: add() and stack(), by which a model says where its residual adds are; who hears it."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, Final, ParamSpec, Self, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastres.ops import Stats, batch_norm_residual, mlp_stack, residual_add
from fastres.ops.calls import check_gate
from fastres.ops.mlp_stack_blocks import CODES, run_blocks
from fastres.ops.mlp_stack_rules import has_kernel
from fastres.ops.stack_inputs import expanded

P = ParamSpec("P")
R = TypeVar("R")


class Listener:
    """Hears what is declared, and nothing else, while it is on: cheaper than a function mode."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        self.handle = handle

    def switch(self, on: bool) -> None:
        """Switch it on or off."""
        if on and self not in _local.listeners:
            _local.listeners.append(self)
        elif not on and self in _local.listeners:
            _local.listeners.remove(self)

    def __enter__(self) -> Self:
        self.switch(True)
        return self

    def __exit__(self, *_: object) -> None:
        self.switch(False)


class _Local(threading.local):
    def __init__(self) -> None:
        self.listeners: list[Listener] = []


_local: Final = _Local()


def is_heard() -> bool:
    """Tell whether a listener is on in this thread, below the one at work."""
    return bool(_local.listeners)


def _declared(func: Callable[P, R]) -> Callable[P, R]:
    """Let function modes and listeners handle the calls of a function."""

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args):
            return handle_torch_function(call, args, *args, **kwargs)
        if not _local.listeners:
            return func(*args, **kwargs)
        listener = _local.listeners.pop()  # its own call of the function is for those below it
        try:
            result: R = listener.handle(call, args, kwargs)
        finally:
            _local.listeners.append(listener)
        return result

    return call


@_declared
def add(x: Tensor, f: Tensor) -> Tensor:
    """Add a branch to its stream, and declare that this is a residual add.

    A plain x + f where nobody watches. Under `trace` and `record` it is a site without a search.

    Args:
        x: Skip, [B, ...].
        f: Branch, the shape of x.

    Returns:
        x + f, dtypes promoted as `torch.add`.
    """
    return x + f


fused_add: Final = _declared(residual_add)
fused_norm: Final = _declared(batch_norm_residual)


@_declared
def fused_stack(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: float | Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Stats]:
    """Run mlp_stack on x [B, ..., D]; gate and Stats are of samples, [L, B]."""
    if x.dim() == 2:
        return mlp_stack(x, w1, b1, w2, b2, gate, activation)
    each = math.prod(x.shape[1:-1])  # rows of one sample
    if isinstance(gate, Tensor) and gate.dim() == 2:
        gate = gate.repeat_interleave(each, 1)
    y, stats = mlp_stack(x.reshape(-1, x.size(-1)), w1, b1, w2, b2, gate, activation)
    return y.view(x.shape), Stats(stats.sums.view(w1.size(0), 3, x.size(0), each).sum(3))


def _is_autocast(x: Tensor) -> bool:  # of meta tensors torch raises an error where it is asked
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def stack(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: str = "relu",
    gate: float | Tensor | None = None,
) -> Tensor:
    """Run a stack of residual blocks, and declare its adds: one `mlp_stack` where that has kernels.

    Under autocast, and where there are no kernels, the blocks run one by one, each with `add`.

    Args:
        x: Stream, [..., D].
        w1: First weights, [L, H, D].
        b1: First biases, [L, H].
        w2: Second weights, [L, D, H].
        b2: Second biases, [L, D].
        activation: One that `mlp_stack` knows.
        gate: Scale of the branches: a number, or a tensor [], [L] or [L, B]; None: 1.

    Returns:
        The stream after the last block, [..., D].
    """
    if x.dim() < 2 or not has_kernel(x) or _is_autocast(x):
        blocks = w1.size(0)
        check_gate("stack", gate, x, blocks, x.size(0))
        gates = expanded(gate, x, blocks)
        gates = None if gates is None else gates.to(x.dtype)
        return run_blocks(x, (w1, b1, w2, b2), gates, blocks, CODES[activation], add)
    return fused_stack(x, w1, b1, w2, b2, gate, activation)[0]
