"""calls: what every operator asks of a call: are these tensors it takes, is a derivative wanted."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastres.ops.layout import DTYPES


def is_underived(*tensors: Tensor | None) -> bool:
    """Tell whether no derivative of any kind is wanted: the raw operator may run alone."""
    if forward_ad._current_level >= 0:
        return False
    if not torch.is_grad_enabled():
        return True
    for t in tensors:
        if t is not None and t.requires_grad:
            return False
    return not torch._C._are_functorch_transforms_active() or not any(map(_is_tracked, tensors))


def _is_tracked(t: Tensor | None) -> bool:
    """Tell whether an outer transform of functorch differentiates t: a vmap in between hides it."""
    if t is None:
        return False
    functorch = torch._C._functorch
    while not t.requires_grad and functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t.requires_grad


def plain_apply(function: type[torch.autograd.Function]) -> Any:
    """Return its `apply` without the inspection of a signature, 30 us a call, for functorch."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise a TypeError unless this is a dense tensor of a dtype that the kernels take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}"
        )


def check_gate(op: str, gate: Any, like: Tensor, *sizes: int) -> None:
    """Raise the error that names the gate, unless it is None, a number, or a tensor that fits.

    Args:
        op: Whose gate it is.
        gate: To be a tensor of some of the leading sizes, or of none.
        like: The stream, on whose device it must be.
        sizes: [B] of one add, [L, B] of a stack.
    """
    if isinstance(gate, Tensor):
        check_tensor(op, "gate", gate)
        if gate.dim() > len(sizes) or gate.shape != sizes[: gate.dim()]:
            known = " or ".join(str([*sizes[:n]]) for n in range(len(sizes) + 1))
            known = known.replace(" or ", ", ", len(sizes) - 1)
            raise ValueError(f"{op}: gate must have shape {known}, got {[*gate.shape]}")
        if gate.device != like.device and not (gate.dim() == 0 and gate.is_cpu):
            raise TypeError(f"{op}: gate must be on {like.device}, got {gate.device}")
    elif gate is not None and not isinstance(gate, Real):
        raise TypeError(f"{op}: gate must be a number or tensor, got {type(gate).__name__}")


def check_flag(op: str, name: str, value: Any) -> None:
    """Raise a TypeError unless this is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
