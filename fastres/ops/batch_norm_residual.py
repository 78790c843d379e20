"""batch_norm_residual: y = act(x + gate * batch_norm(f)), with the sums of each add on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastres.ops import native
from fastres.ops.batch_norm_residual_rules import FORWARD, composed
from fastres.ops.batch_norm_residual_straight import (
    is_transformed,
    is_writable,
    straight,
    with_autograd,
)
from fastres.ops.calls import check_flag, check_gate, check_tensor, is_underived
from fastres.ops.layout import accumulate, gate_of
from fastres.ops.stats import Stats

_OP = "batch_norm_residual"
Add = Callable[[Tensor, Tensor], Tensor]


def batch_norm_residual(
    x: Tensor,
    f: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: float | Tensor | None = None,
    relu: bool = False,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Normalise a branch (Ioffe and Szegedy 2015, arXiv 1502.03167), add it to its stream, measure.

    The sum is y = act(x + p) with p = gate * (weight (f - mean) / sqrt(var + eps) + bias). In
    training mean and var are those of f over samples and places (its algorithm 1), and the running
    ones move towards them by the factor `momentum`, var by its unbiased estimate; else they are
    the running ones. A pass over f for them, then one for everything else; the backward pass keeps
    f, and of the ReLU one bit per element. Derivatives of derivatives, and those of torch.func,
    come from the plain composition.

    Args:
        x: Skip, [B, C, ...]; float64, float32, bfloat16 or float16.
        f: Branch, same shape and device. Mixed dtypes promote as in `x + f`.
        running_mean: [C]; changed in training, needed otherwise.
        running_var: [C], likewise.
        weight: Scale of each channel, [C]; None: 1.
        bias: [C]; None: 0. All four in any floating dtype: they are used in float32, or float64
            where x or f is.
        gate: Scale of the branch: a number, a tensor [] or a tensor [B], one per sample; None: 1.
        relu: Whether y goes through a ReLU. The sums are of what is added, before it.
        training: Whether the statistics are those of f.
        momentum: Factor of the running statistics; None: 1 / num_batches_tracked, their mean.
        eps: Added to the variance, 0 or more.
        num_batches_tracked: [], integer; counts the calls in training.

    Returns:
        y, [B, C, ...] in the layout of x (contiguous or channels_last, read and written without a
        copy), and the Stats of x and p, in squared units of x; they carry no gradients. Sums are in
        a fixed order: two runs agree bit for bit.

    Raises:
        TypeError: If an argument is no dense floating tensor, devices differ, or a flag is no bool.
        ValueError: If a shape does not fit, in training if there is one value per channel or the
            momentum lacks num_batches_tracked, and else if there are no running statistics.

    Example:
        >>> f = torch.tensor([[1.0], [3.0]])
        >>> batch_norm_residual(torch.zeros(2, 1), f, training=True, eps=0.0)[0]
        tensor([[-1.],
                [ 1.]])
    """
    given = (x, f, running_mean, running_var, weight, bias, gate, relu)
    options: dict[str, Any] = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "num_batches_tracked": num_batches_tracked,
    }
    if has_torch_function_variadic(x, f):  # a policy watches
        return handle_torch_function(batch_norm_residual, (x, f), *given, **options)
    if gate is None and x is not None:
        found = straight(*given[:6], relu, **options)
        if found is not None:
            return found[0], Stats(found[1])
    _check(*given, **options)
    return run(None, *given, **options)


def reference(*given: Any, add: Add = torch.add, **options: Any) -> tuple[Tensor, Stats]:
    """Compute batch_norm_residual in plain PyTorch: the oracle, and the fallback.

    `add` joins the branch to its stream, so that the add can be watched.
    """
    return run(add, *given, **options)


def run(
    plain: Add | None,
    x: Tensor | None,
    f: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: float | Tensor | None = None,
    relu: bool = False,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Run the kernel, or the composition with a plain add, and move the running statistics.

    Without a skip it is 0.
    """
    dtype = f.dtype if x is None else torch.promote_types(x.dtype, f.dtype)
    wide = accumulate(dtype)
    if gate is not None:
        gate = gate_of(gate, f, wide).expand(f.size(0))
    known = (None, None) if training else (running_mean, running_var)
    small = [_cast(t, wide) for t in (weight, bias, *known)]
    given: tuple[Any, ...] = (_cast(x, dtype), _cast(f, dtype), *small, gate)
    running = None
    if training:
        running = _count(f, running_mean, running_var, momentum, num_batches_tracked)
    composes = plain or FORWARD is None or not native.runs_on(f) or is_transformed()
    written = running if running and not composes and _fits_kernel(*running[:2], wide) else None
    moved = written or (None, None, 0.0)
    statistics: Any  # mean, variance, ...
    if composes:
        y, sums, statistics = composed(*given, eps, relu, plain or torch.add)  # type: ignore[call-arg]
    elif is_underived(*given):
        y, sums, statistics, _ = FORWARD(*given, eps, relu, False, None, *moved)
    else:
        y, sums, statistics, _ = with_autograd(*given, eps, relu, moved)
    if written:
        torch.autograd.graph.increment_version(written[:2])
    elif running:
        _move(f, statistics[0], statistics[1], *running)
    return y, Stats(sums)


def _count(
    f: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> tuple[Tensor, Tensor, float] | None:
    """Count a call in training; return the running statistics, if they move, and how far."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = 1 / float(num_batches_tracked) if momentum is None else momentum
    if running_mean is None or running_var is None or momentum is None or not f.numel():
        return None
    return running_mean, running_var, float(momentum)


def _move(
    f: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> None:
    """Move the running statistics towards those of the batch, in plain PyTorch."""
    count = f.numel() // f.size(1)
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = var * (count / (count - 1))
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def _fits_kernel(running_mean: Tensor, running_var: Tensor, wide: torch.dtype) -> bool:
    """Tell whether the kernel can move running statistics as they are."""
    given = (running_mean, running_var)
    return (
        not torch.compiler.is_compiling()
        and is_writable(*given)
        and all(t.dtype is wide and t.is_contiguous() for t in given)
    )


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast what is not of the dtype: a call of `to` that does nothing takes 2 us."""
    return t if t is None or t.dtype is dtype else t.to(dtype)


def _check(
    x: Tensor,
    f: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: float | Tensor | None,
    relu: bool,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one."""
    check_tensor(_OP, "x", x)
    check_tensor(_OP, "f", f)
    if x.dim() < 2:
        raise ValueError(f"{_OP}: x must have 2 or more dimensions, got {x.dim()}")
    if f.shape != x.shape:
        raise ValueError(f"{_OP}: f must have shape {[*x.shape]}, got {[*f.shape]}")
    if f.device != x.device:
        raise TypeError(f"{_OP}: f must be on {x.device}, got {f.device}")
    channels = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, t in channels.items():
        if t is None:
            continue
        check_tensor(_OP, name, t)
        if t.shape != x.shape[1:2]:
            raise ValueError(f"{_OP}: {name} must have shape [{x.size(1)}], got {[*t.shape]}")
        if t.device != x.device:
            raise TypeError(f"{_OP}: {name} must be on {x.device}, got {t.device}")
    check_gate(_OP, gate, x, x.size(0))
    check_flag(_OP, "relu", relu)
    check_flag(_OP, "training", training)
    if not isinstance(eps, Real) or not eps >= 0:
        raise ValueError(f"{_OP}: eps must be >= 0, got {eps}")
    _check_statistics(x, running_mean, running_var, training, momentum, num_batches_tracked)


def check_count(name: str, t: Tensor) -> None:
    """Raise a ValueError if [B, C, ...] has one value per channel: its variance would be none."""
    if t.size(0) * math.prod(t.shape[2:]) == 1:
        raise ValueError(
            f"{_OP}: {name} must have more than one value per channel in training, got {[*t.shape]}"
        )


def _check_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
) -> None:
    """Raise the error that names what is wrong with the statistics, if anything is."""
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{_OP}: {missing} must be given with the other, got None")
    if not training and running_mean is None:
        raise ValueError(f"{_OP}: running_mean must be given outside of training, got None")
    if training:
        check_count("x", x)
    if momentum is not None and not isinstance(momentum, Real):
        raise TypeError(f"{_OP}: momentum must be a number or None, got {type(momentum).__name__}")
    if training and momentum is None and num_batches_tracked is None and running_mean is not None:
        raise ValueError(f"{_OP}: num_batches_tracked must be given with momentum None, got None")
