"""batch_norm_residual_rules: what torch must know of the raw operators: derivatives and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from fastres.ops import native
from fastres.ops.layout import (
    accumulate,
    empty_with_lines,
    in_layout,
    lines_of,
    per_sample,
    unpack_bits,
)
from fastres.ops.recomputing import Way, is_free
from fastres.ops.stats import sums_of

FORWARD: Final = native.raw("_batch_norm_residual")
BACKWARD: Final = native.raw("_batch_norm_residual_backward")


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """View [C] values so that they scale the channels of `like`, [B, C, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 2))


def moments(f: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, [C] each, of every channel of f [B, C, ...]."""
    dims = [0, *range(2, f.dim())]
    count = max(f.numel() // max(f.size(1), 1), 1)  # of none the sums are 0
    mean = f.sum(dims) / count
    mean = mean + (f - per_channel(mean, f)).sum(dims) / count  # what the first sum rounded away
    return mean, (f - per_channel(mean, f)).square().sum(dims) / count


def perturbation(
    f: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute gate * (weight (f - mean) / sqrt(var + eps) + bias) in plain PyTorch.

    All in one dtype: f [B, C, ...], gate [B], the others [C].
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    p = (f - per_channel(mean, f)) * per_channel(scale, f)
    if bias is not None:
        p = p + per_channel(bias, f)
    return p if gate is None else p * per_sample(gate, p)


def composed(
    x: Tensor | None,
    f: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gate: Tensor | None,
    eps: float,
    relu: bool,
    add: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Compute y, sums, mean and variance in plain PyTorch; those of f if none are given."""
    branch = f.to(accumulate(f.dtype))
    if mean is None or var is None:
        mean, var = moments(branch)
    p = perturbation(branch, weight, bias, mean, var, gate, eps)
    if x is None:
        y, sums = p, p.new_empty((3, 0))
    else:
        skip = x.to(p.dtype)
        y, sums = add(skip, p), sums_of(skip.detach(), p.detach())
    y = y.to(f.dtype)
    return (y.relu() if relu else y), sums, (mean, var)


class BatchNormResidual(torch.autograd.Function):
    """The gradient of batch_norm_residual. It keeps f, and of the ReLU one bit per element.

    y can be computed again where there is no skip, and where the skip is kept anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        f: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        gate: Tensor | None,
        eps: float,
        relu: bool,
        running: tuple[Any, ...],
        to: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return y, sums, the statistics [3, C] that f is normalised by, and the mask.

        Where these go `to` a list, return y alone: autograd takes some us for each output.
        """
        outputs = FORWARD(x, f, weight, bias, mean, var, gate, eps, relu, relu, None, *running)
        if to is not None:
            to.extend(outputs)
        y, sums, statistics, mask = outputs
        ctx.eps, ctx.training, ctx.strides = eps, mean is None, y.stride()
        recomputes = not torch.compiler.is_compiling() and is_free(x)
        skip = x if recomputes else None
        kept: tuple[Any, ...] = (mask if relu else None, skip, f, weight, bias, statistics, gate)
        ctx.save_for_backward(*kept)
        ctx.way = Way(_recomputed, kept) if recomputes else None
        ctx.set_materialize_grads(False)
        if to is not None:
            return y
        ctx.mark_non_differentiable(sums, statistics, mask)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, f, weight, bias and gate."""
        if gy is None:
            return (None,) * 11
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        ):
            gx, gf, gweight, gbias, ggate = _composed_backward(ctx, gy)
            gx = gx if ctx.needs_input_grad[0] else None
            return gx, gf, gweight, gbias, None, None, ggate, *(None,) * 4
        mask, _, f, weight, bias, statistics, gate = ctx.saved_tensors
        skip, _, scaled, shifted, _, _, gated, *_ = ctx.needs_input_grad
        gy = in_layout(gy, ctx.strides)
        gx, gf, gweight, gbias, ggate = BACKWARD(
            *(gy, mask, f, weight, bias, statistics, gate),
            *(ctx.eps, ctx.training, skip, scaled or shifted, gated),
        )
        return (
            (gy if mask is None else gx) if skip else None,
            gf,
            gweight if scaled else None,
            gbias if shifted else None,
            None,
            None,
            ggate if gated else None,
            *(None,) * 4,
        )


def _recomputed(ctx: Any, kept: tuple[Any, ...]) -> Tensor:
    """Return y again."""
    _, x, f, weight, bias, statistics, gate = kept
    mean, var, lost = statistics.unbind()
    given = (x, f, weight, bias, mean, var, gate, ctx.eps, kept[0] is not None, False)
    y: Tensor = FORWARD(*given, lost)[0]
    return y


def _composed_backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the plain composition, so that the gradients can be differentiated again."""
    mask, _, f, weight, bias, statistics, gate = ctx.saved_tensors
    mean, var, _ = statistics.unbind()
    dtype, wide = gy.dtype, accumulate(gy.dtype)
    g = gy
    if mask is not None:
        keep = unpack_bits(mask, gy, ctx.strides, lines_of(gy, ctx.strides)[0])
        g = torch.where(keep, gy, 0.0)
    given = (f.to(wide), weight, bias, gate)
    wanted = [i for i, at in enumerate((1, 2, 3, 6)) if ctx.needs_input_grad[at]]

    def run(*some: Tensor) -> Tensor:
        full: list[Any] = list(given)
        for i, t in zip(wanted, some, strict=True):
            full[i] = t
        of_f, of_weight, of_bias, of_gate = full
        center, spread = moments(of_f) if ctx.training else (mean, var)
        return perturbation(of_f, of_weight, of_bias, center, spread, of_gate, ctx.eps)

    vjp: Any = torch.func.vjp  # with two results here
    _, pull = vjp(run, *(given[i] for i in wanted))
    grads: list[Tensor | None] = [None] * 4
    for i, grad in zip(wanted, pull(g.to(wide)), strict=True):
        grads[i] = grad
    of_f = grads[0]
    return g, None if of_f is None else of_f.to(dtype), *grads[1:]


def _fake(
    x: Tensor | None,
    f: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    gate: Tensor | None,
    eps: float,
    relu: bool,
    masked: bool,
    lost: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the outputs in the right shape, dtype and layout, without values."""
    wide = accumulate(f.dtype)
    y = empty_with_lines(f if x is None else x, f)
    lines, length = lines_of(y, y.stride())
    size = (f.size(0), lines * ((length + 7) // 8)) if masked else (0, 0)
    return (
        y,
        f.new_empty((3, 0 if x is None else f.size(0)), dtype=wide),
        f.new_empty((3, f.size(1)), dtype=wide),
        f.new_empty(size, dtype=torch.uint8),
    )


def _fake_backward(
    gy: Tensor,
    mask: Tensor | None,
    f: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    gate: Tensor | None,
    eps: float,
    training: bool,
    skip_grad: bool,
    affine_grad: bool,
    gate_grad: bool,
) -> tuple[Tensor, ...]:
    wide = accumulate(gy.dtype)
    channels = gy.size(1) if affine_grad else 0
    return (
        torch.empty_like(gy) if mask is not None and skip_grad else gy.new_empty(0),
        torch.empty_like(gy),
        *(gy.new_empty(channels, dtype=wide) for _ in range(2)),
        gy.new_empty(gy.size(0) if gate_grad else 0, dtype=wide),
    )


if FORWARD is not None:
    torch.library.register_fake("fastres::_batch_norm_residual", _fake)
    torch.library.register_fake("fastres::_batch_norm_residual_backward", _fake_backward)
