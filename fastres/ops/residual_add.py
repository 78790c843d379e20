"""residual_add: y = act(x + gate * f), and ||x||^2, ||gate * f||^2, <x, gate * f> on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils import _pytree as pytree

from fastres.ops import native
from fastres.ops.layout import (
    accumulate,
    empty_like_first_dense,
    in_layout,
    per_sample,
    unpack_bits,
)

_DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_forward: Final = native.raw("_residual_add")
_forward_masked: Final = native.raw("_residual_add_masked")
_backward: Final = native.raw("_residual_add_backward")


class Stats:
    """The three sums of one residual add, each [B], over all features of a sample.

    float32, or float64 where the add is in float64. What is recorded follows from them: the
    absolute perturbation is sqrt(branch_sq), the scaled one sqrt(branch_sq / skip_sq).
    Unpacks as `skip_sq, branch_sq, dot = stats`. The three are views of `sums` [3, B].
    """

    __slots__ = ("sums",)

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    @property
    def skip_sq(self) -> Tensor:
        """Sum of x * x, [B]."""
        return self.sums.select(-2, 0)

    @property
    def branch_sq(self) -> Tensor:
        """Sum of (gate * f) * (gate * f), [B]."""
        return self.sums.select(-2, 1)

    @property
    def dot(self) -> Tensor:
        """Sum of x * (gate * f), [B]."""
        return self.sums.select(-2, 2)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.skip_sq, self.branch_sq, self.dot))

    def __repr__(self) -> str:
        return f"Stats(skip_sq={self.skip_sq}, branch_sq={self.branch_sq}, dot={self.dot})"


pytree.register_pytree_node(
    Stats,
    lambda stats: ([stats.sums], None),
    lambda leaves, _: Stats(*leaves),
    serialized_type_name="fastres.Stats",
)


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
        TypeError: If x, f or gate is no floating tensor, or they are on different devices.
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
        if gate is None and _is_plain(x, f):
            y, sums = _forward(x, f, None, relu)
            return y, Stats(sums)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        _check(x, f, gate)  # names what the kernel refused
        raise
    _check(x, f, gate)
    if not native.runs_on(x.device):
        return reference(x, f, gate, relu, differentiable_stats=differentiable_stats)
    dtype = torch.promote_types(x.dtype, f.dtype)
    x, f = x.to(dtype), f.to(dtype)
    if gate is not None:
        gate = torch.as_tensor(gate, dtype=accumulate(dtype), device=x.device).expand(x.size(0))
    gate_grad = gate is not None and gate.requires_grad
    function = _Compiled if torch.compiler.is_compiling() else _Eager
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = function.apply
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
        gate = torch.as_tensor(gate, dtype=accumulate(dtype), device=x.device)
        branch = branch * per_sample(gate, branch)
    y = (skip + branch).to(dtype)
    return (y.relu() if relu else y), Stats(_sums(skip, branch, differentiable_stats))


def _sums(skip: Tensor, branch: Tensor, differentiable: bool) -> Tensor:
    """Return the [3, B] sums of x*x, p*p and x*p in plain PyTorch."""
    if not differentiable:
        skip, branch = skip.detach(), branch.detach()
    skip, branch = skip.flatten(1), branch.flatten(1)
    return torch.stack(
        [(a * b).sum(1) for a, b in ((skip, skip), (branch, branch), (skip, branch))]
    )


def _is_plain(x: Tensor, f: Tensor) -> bool:
    """Tell whether the raw kernel may run alone: one dtype, no derivative of any kind wanted."""
    return (
        _forward is not None
        and x.dtype is f.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or f.requires_grad))
        and forward_ad._current_level < 0
        and native.runs_on(x.device)
    )


def _check(x: Tensor, f: Tensor, gate: float | Tensor | None) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one."""
    for name, value in (("x", x), ("f", f)):
        if not isinstance(value, Tensor):
            raise TypeError(f"residual_add: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in _DTYPES:
            raise TypeError(
                "residual_add: "
                f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}"
            )
    if x.dim() < 2:
        raise ValueError(f"residual_add: x must have 2 or more dimensions, got {x.dim()}")
    if f.shape != x.shape:
        raise ValueError(f"residual_add: f must have shape {[*x.shape]}, got {[*f.shape]}")
    if f.device != x.device:
        raise TypeError(f"residual_add: f must be on {x.device}, got {f.device}")
    if isinstance(gate, Tensor):
        if gate.dtype not in _DTYPES:
            raise TypeError(f"residual_add: gate must be floating, got {gate.dtype}")
        if gate.dim() > 0 and gate.shape != x.shape[:1]:
            raise ValueError(
                f"residual_add: gate must have shape [] or [{x.size(0)}], got {[*gate.shape]}"
            )
        if gate.dim() > 0 and gate.device != x.device:
            raise TypeError(f"residual_add: gate must be on {x.device}, got {gate.device}")
    elif gate is not None and not isinstance(gate, (int, float)):
        raise TypeError(f"residual_add: gate must be a number or tensor, got {type(gate).__name__}")


def _keep(ctx: Any, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the ReLU's mask as 0 and 1 in the shape of `like`."""
    return None if mask is None else unpack_bits(mask, like, ctx.strides)


class _Compiled(torch.autograd.Function):
    """The gradient of residual_add; without jvp, which torch.compile does not take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, f: Tensor, gate: Tensor | None, relu: bool, *_: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if relu:
            return _forward_masked(x, f, gate)
        y, sums = _forward(x, f, gate, False)
        return y, sums, x.new_empty((0,), dtype=torch.uint8)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, f, gate, ctx.relu, ctx.differentiable_stats, ctx.gate_grad = inputs
        y, sums, mask = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mask)
        if not ctx.differentiable_stats:
            ctx.mark_non_differentiable(sums)
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
            gx, gf, ggate = _backward(gy, mask, gate, x, f, gs, ctx.gate_grad)
            gx = gy if mask is None and gs is None else gx
            gf = gx if gate is None and gs is None else gf
        return gx, gf, (ggate if ctx.gate_grad else None), None, None, None


class _Eager(_Compiled):
    """The same with forward-mode derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, tf: Tensor | None, tgate: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor | None, None]:
        mask, gate, x, f = ctx.saved_tensors
        tx = torch.zeros_like(x) if tx is None else tx
        tp = torch.zeros_like(f) if tf is None else tf
        if gate is not None:
            tp = tp * per_sample(gate, x)
        if tgate is not None:
            tp = tp + f * per_sample(tgate, x)
        ty = (tx + tp).to(x.dtype)
        keep = _keep(ctx, mask, x)
        ty = ty if keep is None else ty * keep
        if not ctx.differentiable_stats:
            return ty, None, None
        p = f if gate is None else f * per_sample(gate, x)
        x, tx, p, tp = (t.flatten(1) for t in (x, tx, p, tp))
        return ty, torch.stack([2 * (x * tx), 2 * (p * tp), x * tp + p * tx]).sum(2), None


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
    gx = gp = gy if keep is None else gy * keep
    scale = None if gate is None else per_sample(gate, gy)
    if gs is not None and x is not None and f is not None:
        p = f if scale is None else f * scale
        skip, branch, dot = (per_sample(g, gy) for g in gs)
        gx, gp = gx + 2 * x * skip + p * dot, gp + 2 * p * branch + x * dot
    gf = gp if scale is None else gp * scale
    ggate = (gp * f).flatten(1).sum(1) if gate_grad and f is not None else None
    return (
        gx.to(gy.dtype),
        gf.to(gy.dtype),
        None if ggate is None or gate is None else ggate.to(gate.dtype),
    )


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

    def fold(t: Tensor, dim: int | None) -> Tensor:
        t = t.movedim(dim, 0) if dim is not None else t.expand(count, *t.shape)
        return t.flatten(0, 1)

    x, f = fold(x, in_dims[0]), fold(f, in_dims[1])
    gate = None if gate is None else fold(gate, in_dims[2])
    y, sums, *mask = (_forward if relu else _forward_masked)(x, f, gate, *relu)
    split = [t.unflatten(0, (count, x.size(0) // count)) for t in (y, *mask)]
    sums = sums.unflatten(1, (count, x.size(0) // count))
    return (split[0], sums, *split[1:]), (0, 1, *[0] * len(mask))


if native.C is not None:
    torch.library.register_fake("fastres::_residual_add", _fake)
    torch.library.register_fake("fastres::_residual_add_masked", _fake_masked)
    torch.library.register_fake("fastres::_residual_add_", _fake_into)
    torch.library.register_fake("fastres::_residual_add_backward", _fake_backward)
    torch.library.register_vmap("fastres::_residual_add", _batched)
    torch.library.register_vmap("fastres::_residual_add_masked", _batched)
