"""residual_add_rules: what torch must know of the raw operators: derivatives, shapes, vmap."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from fastres.ops import native
from fastres.ops.layout import (
    accumulate,
    empty_like_first_dense,
    in_layout,
    per_sample,
    unpack_bits,
)

FORWARD: Final = native.raw("_residual_add")
FORWARD_MASKED: Final = native.raw("_residual_add_masked")
BACKWARD: Final = native.raw("_residual_add_backward")


def _keep(ctx: Any, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return where the ReLU lets values through, in the shape of `like`; None: everywhere."""
    return None if mask is None else unpack_bits(mask, like, ctx.strides)


class CompiledResidualAdd(torch.autograd.Function):
    """The gradient of residual_add; without jvp, which torch.compile does not take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, f: Tensor, gate: Tensor | None, relu: bool, *_: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y, sums and, with the ReLU, its mask."""
        if relu:
            y, sums, mask = FORWARD_MASKED(x, f, gate)
        else:
            y, sums = FORWARD(x, f, gate, False)
            mask = x.new_empty((0,), dtype=torch.uint8)
        return y, sums, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivatives need, and nothing else."""
        x, f, gate, ctx.relu, ctx.differentiable_stats, ctx.gate_grad = inputs
        y, sums, mask = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([mask] if ctx.differentiable_stats else [mask, sums]))
        ctx.strides = y.stride()
        ctx.save_for_backward(
            mask if ctx.relu else None,
            gate,
            x if ctx.differentiable_stats else None,
            f if ctx.differentiable_stats or ctx.gate_grad else None,
        )
        ctx.save_for_forward(mask if ctx.relu else None, gate, x, f)

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gs: Tensor | None, _: None) -> tuple[Any, ...]:
        """Return the gradients of x, f and gate."""
        mask, gate, x, f = ctx.saved_tensors
        if not ctx.differentiable_stats:
            gs = None  # torch.compile fills it with zeros
        if gy is None and gs is None:
            return (None,) * 6
        if gy is None:
            gy = torch.zeros_like(x)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            gx, gf, ggate = _composed_backward(
                gy, _keep(ctx, mask, gy), gate, x, f, gs, ctx.gate_grad
            )
        elif mask is None and gate is None and gs is None:
            return gy, gy, None, None, None, None
        else:
            gy = in_layout(gy, ctx.strides)
            gx, gf, ggate = BACKWARD(gy, mask, gate, x, f, gs, ctx.gate_grad)
            gx = gy if mask is None and gs is None else gx
            gf = gx if gate is None and gs is None else gf
        return gx, gf, (ggate if ctx.gate_grad else None), None, None, None


class EagerResidualAdd(CompiledResidualAdd):
    """The same with forward-mode derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, tf: Tensor | None, tgate: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return the tangents of y and sums."""
        mask, gate, x, f = ctx.saved_tensors
        dtype, wide = x.dtype, accumulate(x.dtype)
        x, f = x.to(wide), f.to(wide)
        tx = torch.zeros_like(x) if tx is None else tx.to(wide)
        tp = torch.zeros_like(f) if tf is None else tf.to(wide)
        if gate is not None:
            tp = tp * per_sample(gate, x)
        if tgate is not None:
            tp = tp + f * per_sample(tgate, x)
        ty = _through(_keep(ctx, mask, x), tx + tp).to(dtype)
        if not ctx.differentiable_stats:
            return ty, None, None
        p = f if gate is None else f * per_sample(gate, x)
        x, tx, p, tp = (t.flatten(1) for t in (x, tx, p, tp))
        return ty, torch.stack([2 * (x * tx), 2 * (p * tp), x * tp + p * tx]).sum(2), None


def _through(keep: Tensor | None, g: Tensor) -> Tensor:
    """Return g where the ReLU lets it through, 0 elsewhere, be it infinite there."""
    return g if keep is None else torch.where(keep, g, 0.0)


def _composed_backward(
    gy: Tensor,
    keep: Tensor | None,
    gate: Tensor | None,
    x: Tensor | None,
    f: Tensor | None,
    gs: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the backward pass in plain PyTorch, so that it can be differentiated again."""
    dtype, wide = gy.dtype, accumulate(gy.dtype)
    gx = gp = _through(keep, gy.to(wide))
    scale = None if gate is None else per_sample(gate, gy)
    branch = None if f is None else f.to(wide)
    if gs is not None and x is not None and branch is not None:
        skip, p = x.to(wide), branch if scale is None else branch * scale
        of_skip, of_branch, of_dot = (per_sample(g, gy) for g in gs)
        gx, gp = gx + 2 * skip * of_skip + p * of_dot, gp + 2 * p * of_branch + skip * of_dot
    gf = gp if scale is None else gp * scale
    ggate = (gp * branch).flatten(1).sum(1) if gate_grad and branch is not None else None
    return gx.to(dtype), gf.to(dtype), ggate


def _outputs(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and sums of the right shape, dtype and layout, without values."""
    if x.dim() < 2 or x.shape != f.shape or x.dtype != f.dtype or x.device != f.device:
        raise RuntimeError("residual_add: x and f must have one shape, dtype and device")
    return empty_like_first_dense(x, f), x.new_empty((3, x.size(0)), dtype=accumulate(x.dtype))


def _fake(x: Tensor, f: Tensor, gate: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    return _outputs(x, f)


def _fake_masked(x: Tensor, f: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    size = (x.size(0), (math.prod(x.shape[1:]) + 7) // 8)
    return *_outputs(x, f), x.new_empty(size, dtype=torch.uint8)


def _fake_into(x: Tensor, f: Tensor, y: Tensor) -> Tensor:
    return _outputs(x, f)[1]


def _fake_backward(
    gy: Tensor,
    mask: Tensor | None,
    gate: Tensor | None,
    x: Tensor | None,
    f: Tensor | None,
    gs: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gx = torch.empty_like(gy) if mask is not None or gs is not None else gy.new_empty(0)
    gf = torch.empty_like(gy) if gate is not None or gs is not None else gy.new_empty(0)
    return gx, gf, gy.new_empty(gy.size(0) if gate_grad else 0, dtype=accumulate(gy.dtype))


def _batched(
    info: Any, in_dims: Any, x: Tensor, f: Tensor, gate: Tensor | None, *relu: bool
) -> Any:
    """Fold the dimension of vmap into the samples; the masked operator has no `relu`."""
    count = info.batch_size

    def batch_first(t: Tensor, dim: int | None) -> Tensor:
        return t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)

    x, f = batch_first(x, in_dims[0]), batch_first(f, in_dims[1])
    gate = None if gate is None else batch_first(gate, in_dims[2]).flatten()
    each = (count, x.size(1))
    run = FORWARD if relu else FORWARD_MASKED
    y, sums, *mask = run(x.flatten(0, 1), f.flatten(0, 1), gate, *relu)
    split = [t.unflatten(0, each) for t in (y, *mask)]
    return (split[0], sums.unflatten(1, each), *split[1:]), (0, 1, *[0] * len(mask))


if native.C is not None:
    torch.library.register_fake("fastres::_residual_add", _fake)
    torch.library.register_fake("fastres::_residual_add_masked", _fake_masked)
    torch.library.register_fake("fastres::_residual_add_", _fake_into)
    torch.library.register_fake("fastres::_residual_add_backward", _fake_backward)
    torch.library.register_vmap("fastres::_residual_add", _batched)
    torch.library.register_vmap("fastres::_residual_add_masked", _batched)
