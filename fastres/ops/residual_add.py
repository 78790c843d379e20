"""residual_add: y = act(x + gate * f), and ||x||^2, ||gate * f||^2, <x, gate * f> on the way."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastres.ops import native
from fastres.ops.calls import check_flag, check_gate, check_tensor, is_underived, plain_apply
from fastres.ops.layout import DTYPES, accumulate, gate_of, per_sample
from fastres.ops.residual_add_rules import FORWARD, CompiledResidualAdd, EagerResidualAdd
from fastres.ops.stats import Stats, sums_of

_apply: Final = plain_apply(EagerResidualAdd)
_is_transformed: Final = torch._C._are_functorch_transforms_active


def residual_add(
    x: Tensor,
    f: Tensor,
    gate: float | Tensor | None = None,
    relu: bool = False,
    *,
    differentiable_stats: bool = False,
) -> tuple[Tensor, Stats]:
    """Add a gated branch to its stream, and measure both in the same pass over memory.

    With no ReLU, no gate and plain stats the backward pass launches nothing: the cotangent
    passes through. With the ReLU it keeps one bit per element.

    Args:
        x: Skip, [B, ...] with two or more dimensions; float64, float32, bfloat16 or float16.
        f: Branch, same shape and device. Mixed dtypes promote as in `x + f`.
        gate: Scale of the branch: a number, a tensor [] or a tensor [B], one per sample; None: 1.
        relu: Whether y goes through a ReLU. The sums are of what is added, before it.
        differentiable_stats: Whether the sums carry gradients, to regularise perturbations.

    Returns:
        y, [B, ...] in the layout of x (contiguous, channels_last or any other in which each sample
        fills its own stretch of memory; those are read and written without a copy), and the
        Stats of x and gate * f, in squared units of x. Sums are in a fixed order: two runs agree
        bit for bit.

    Raises:
        TypeError: If x, f or gate is no dense floating tensor (gate may be a number), they are on
            different devices, or relu is no bool.
        ValueError: If the shapes differ, x has fewer than two dimensions, or gate is not [] or [B].

    Example:
        >>> y, stats = residual_add(torch.ones(1, 4), torch.full((1, 4), 2.0), gate=0.5)
        >>> y, stats.skip_sq, stats.branch_sq
        (tensor([[2., 2., 2., 2.]]), tensor([4.]), tensor([4.]))
    """
    if has_torch_function_variadic(x, f):  # a policy watches
        return handle_torch_function(
            residual_add, (x, f), x, f, gate, relu, differentiable_stats=differentiable_stats
        )
    try:
        if gate is None and type(relu) is bool and _is_plain(x, f):
            if is_underived(x, f):
                y, sums = FORWARD(x, f, None, relu)
                return y, Stats(sums)
            if not torch.compiler.is_compiling() and not _is_transformed():
                y, sums, _ = _apply(x, f, None, relu, differentiable_stats, False)
                return y, Stats(sums)
    except (RuntimeError, TypeError, AttributeError, IndexError):
        _check(x, f, gate, relu)  # names what the kernel refused
        raise
    _check(x, f, gate, relu)
    compiled = torch.compiler.is_compiling()
    transformed = not compiled and _is_transformed()
    if transformed or not native.runs_on(x):  # a Function under a vmap would get no cotangent
        return reference(x, f, gate, relu, differentiable_stats=differentiable_stats)
    dtype = torch.promote_types(x.dtype, f.dtype)
    x, f = x.to(dtype), f.to(dtype)
    if gate is not None:
        gate = gate_of(gate, x, accumulate(dtype)).expand(x.size(0))
    gate_grad = gate is not None and gate.requires_grad
    apply: Any = CompiledResidualAdd.apply if compiled else _apply
    y, sums, _ = apply(x, f, gate, relu, differentiable_stats, gate_grad)
    return y, Stats(sums)


def reference(
    x: Tensor,
    f: Tensor,
    gate: float | Tensor | None = None,
    relu: bool = False,
    *,
    differentiable_stats: bool = False,
) -> tuple[Tensor, Stats]:
    """Compute residual_add in plain PyTorch: the oracle, and the fallback without the library."""
    dtype = torch.promote_types(x.dtype, f.dtype)
    skip, branch = x.to(accumulate(dtype)), f.to(accumulate(dtype))
    if gate is not None:
        gate = gate_of(gate, x, accumulate(dtype))
        branch = branch * per_sample(gate, branch)
    y = (skip + branch).to(dtype)
    if not differentiable_stats:
        skip, branch = skip.detach(), branch.detach()
    return (y.relu() if relu else y), Stats(sums_of(skip, branch))


def _is_plain(x: Tensor, f: Tensor) -> bool:
    """Tell whether the kernel takes x and f as they are, or refuses them before it writes."""
    return x.dtype is f.dtype and x.dtype in DTYPES and native.runs_on(x)


def _check(x: Tensor, f: Tensor, gate: float | Tensor | None, relu: bool) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one."""
    check_tensor("residual_add", "x", x)
    check_tensor("residual_add", "f", f)
    if x.dim() < 2:
        raise ValueError(f"residual_add: x must have 2 or more dimensions, got {x.dim()}")
    if f.shape != x.shape:
        raise ValueError(f"residual_add: f must have shape {[*x.shape]}, got {[*f.shape]}")
    if f.device != x.device:
        raise TypeError(f"residual_add: f must be on {x.device}, got {f.device}")
    check_gate("residual_add", gate, x, x.size(0))
    check_flag("residual_add", "relu", relu)
