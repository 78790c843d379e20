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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute y, sums, mean and variance in plain PyTorch; the last two of f if none are given."""
    branch = f.to(accumulate(f.dtype))
    skip = torch.zeros_like(branch) if x is None else x.to(branch.dtype)
    if mean is None or var is None:
        mean, var = moments(branch)
    p = perturbation(branch, weight, bias, mean, var, gate, eps)
    y = (p if x is None else add(skip, p)).to(f.dtype)
    return (y.relu() if relu else y), sums_of(skip.detach(), p.detach()), mean, var


class BatchNormResidual(torch.autograd.Function):
    """The gradient of batch_norm_residual. It keeps f, and of the ReLU one bit per element.

    y can be computed again where there is no skip, and where the skip is kept anyway.
    """

    @staticmethod
    def forward(
        x: Tensor | None,
        f: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        gate: Tensor | None,
        eps: float,
        relu: bool,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> tuple[Tensor, ...]:
        """Return y, sums; mean, variance, what rounding took of the mean, if none given; mask."""
        small, running = (weight, bias, mean, var, gate), (running_mean, running_var, momentum)
        return tuple(FORWARD(x, f, *small, eps, relu, relu, None, *running))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivatives need, and nothing else."""
        x, f, weight, bias, mean, var, gate, ctx.eps, relu, *_ = inputs
        y, sums, batch_mean, batch_var, lost, mask = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums, batch_mean, batch_var, lost, mask)
        ctx.training, ctx.strides = mean is None, y.stride()
        statistics = (batch_mean, batch_var, lost) if mean is None else (mean, var, None)
        recomputes = not torch.compiler.is_compiling() and is_free(x)
        kept = (mask if relu else None, x if recomputes else None, f, weight, bias, gate)
        ctx.save_for_backward(*kept, *statistics)
        ctx.way = Way(_recomputed, (*kept, *statistics)) if recomputes else None

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, f, weight, bias and gate."""
        if gy is None:
            return (None,) * 12
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        ):
            gx, gf, gweight, gbias, ggate = _composed_backward(ctx, gy)
            gx = gx if ctx.needs_input_grad[0] else None
            return gx, gf, gweight, gbias, None, None, ggate, *(None,) * 5
        mask, _, f, weight, bias, gate, mean, var, lost = ctx.saved_tensors
        skip, _, scaled, shifted, _, _, gated, *_ = ctx.needs_input_grad
        gy = in_layout(gy, ctx.strides)
        gx, gf, gaffine, ggate = BACKWARD(
            *(gy, mask, f, weight, bias, mean, var, lost, gate),
            *(ctx.eps, ctx.training, skip, scaled or shifted, gated),
        )
        return (
            (gy if mask is None else gx) if skip else None,
            gf,
            gaffine[0] if scaled else None,
            gaffine[1] if shifted else None,
            None,
            None,
            ggate if gated else None,
            *(None,) * 5,
        )


def _recomputed(ctx: Any, kept: tuple[Tensor | None, ...]) -> Tensor:
    """Return y again."""
    _, x, f, weight, bias, gate, mean, var, lost = kept
    given = (x, f, weight, bias, mean, var, gate, ctx.eps, kept[0] is not None, False)
    y: Tensor = FORWARD(*given, lost)[0]
    return y


def _composed_backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the plain composition, so that the gradients can be differentiated again."""
    mask, _, f, weight, bias, gate, mean, var, _ = ctx.saved_tensors
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
) -> tuple[Tensor, ...]:
    """Return the outputs in the right shape, dtype and layout, without values."""
    wide = accumulate(f.dtype)
    y = empty_with_lines(f if x is None else x, f)
    lines, length = lines_of(y, y.stride())
    count = f.size(1) if mean is None else 0
    size = (f.size(0), lines * ((length + 7) // 8)) if masked else (0, 0)
    return (
        y,
        f.new_empty((3, f.size(0)), dtype=wide),
        *(f.new_empty(count, dtype=wide) for _ in range(3)),
        f.new_empty(size, dtype=torch.uint8),
    )


def _fake_backward(
    gy: Tensor,
    mask: Tensor | None,
    f: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    lost: Tensor | None,
    gate: Tensor | None,
    eps: float,
    training: bool,
    skip_grad: bool,
    affine_grad: bool,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulate(gy.dtype)
    return (
        torch.empty_like(gy) if mask is not None and skip_grad else gy.new_empty(0),
        torch.empty_like(gy),
        gy.new_empty((2, gy.size(1)) if affine_grad else (0, 0), dtype=wide),
        gy.new_empty(gy.size(0) if gate_grad else 0, dtype=wide),
    )


if FORWARD is not None:
    torch.library.register_fake("fastres::_batch_norm_residual", _fake)
    torch.library.register_fake("fastres::_batch_norm_residual_backward", _fake_backward)
