"""batch_norm_residual_straight: the raw kernel alone, for calls too plain to need other checks."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastres.ops import native
from fastres.ops.batch_norm_residual_rules import FORWARD, BatchNormResidual
from fastres.ops.calls import is_underived, plain_apply
from fastres.ops.layout import accumulate

_PLAIN: Final = frozenset({Tensor, torch.nn.Parameter, type(None)})


def straight(
    x: Tensor | None,
    f: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Compute y and sums; None, and nothing has changed, where more must be asked of the call.

    Of a small image the checks take longer than the kernel, which checks what it is given before it
    writes. Here is asked what it cannot see.
    """
    tensors = (x, f, weight, bias, running_mean, running_var, num_batches_tracked)
    if (
        f is None
        or not _PLAIN.issuperset(map(type, tensors))
        or (x is not None and x.dtype is not f.dtype)
        or not native.runs_on(f)
        or f.is_meta
        or not all(t is None or t.device == f.device for t in tensors)
        or type(relu) is not bool
        or type(eps) is not float
        or not eps >= 0
        or (momentum is not None and type(momentum) is not float)
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return None
    derived = not is_underived(x, f, weight, bias)
    if training is True:
        if (
            momentum is None
            or f.dim() < 2
            or f.numel() <= f.size(1)  # one value per channel, or none
            or (weight is not None and weight.dtype is not accumulate(f.dtype))  # as in bf16 models
            or torch._C._len_torch_dispatch_stack()  # a mode may fail after the kernel
            or not is_writable(running_mean, running_var, num_batches_tracked)
        ):
            return None
        mean = var = None
        running: tuple[Any, ...] = (running_mean, running_var, momentum, num_batches_tracked)
    elif training is not False or running_mean is None or derived:
        return None
    else:
        mean, var = running_mean, running_var
        running = ()
    given = (x, f, weight, bias, mean, var, None, eps, relu)
    outputs: list[Tensor] = []
    try:
        if derived:
            y = _apply(*given, running, outputs)
        else:
            outputs += FORWARD(*given, False, None, *running)
            y = outputs[0]
    except (RuntimeError, TypeError):
        if outputs:  # a hook has failed
            raise
        return None
    finally:
        moved = [t for t in running if isinstance(t, Tensor)]
        if outputs and moved:
            torch.autograd.graph.increment_version(moved)
    return y, outputs[1]


def is_writable(*given: Tensor | None) -> bool:
    """Tell whether a kernel can write to tensors: none is a negated view or of inference mode."""
    try:
        return not any(t is not None and (t.is_neg() or t._version < 0) for t in given)
    except RuntimeError:  # of tensors made in inference mode to ask for the version is an error
        return False


_apply: Final = plain_apply(BatchNormResidual)


def with_autograd(*args: Any) -> tuple[Tensor, ...]:
    """Return all outputs of the raw kernel, with autograd."""
    if torch.compiler.is_compiling():
        traced: Any = BatchNormResidual.apply
        outputs: tuple[Tensor, ...] = traced(*args)
        return outputs
    others: list[Tensor] = []
    y = _apply(*args, others)
    return y, *others[1:]


def is_transformed() -> bool:
    """Tell whether torch transforms what only the plain composition can follow."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
