"""mlp_stack_rules: what torch must know of the raw operators: derivatives, shapes, vmap."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from fastres.ops import native
from fastres.ops.layout import accumulate
from fastres.ops.mlp_stack_blocks import Outputs, composed, without_autocast

FORWARD: Final = native.raw("_mlp_stack")
BACKWARD: Final = native.raw("_mlp_stack_backward")


def has_kernel(x: Tensor) -> bool:
    """Tell whether the compiled operators run where x is."""
    return FORWARD is not None and native.runs_on(x)


class MlpStack(torch.autograd.Function):
    """The gradient of mlp_stack.

    Of all activations it keeps the states that the operator returns, and no more. They count as a
    result with a gradient of its own: so a derivative of the backward pass finds its way to x.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        gate: Tensor | None,
        blocks: int,
        activation: int,
        every: int,
        tf32: bool,
        trajectory: bool,
    ) -> Outputs:
        """Return y, sums and states."""
        y, sums, states = FORWARD(x, w1, b1, w2, b2, gate, blocks, activation, every, True, tf32)
        return y, sums, states

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivatives need, and nothing else."""
        _, *weights, gate, ctx.blocks, ctx.activation, ctx.every, ctx.tf32, ctx.trajectory = inputs
        _, sums, states = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(states, *weights, gate)

    @staticmethod
    def backward(
        ctx: Any, gy: Tensor | None, _: None, gstates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the weights and gate."""
        compiled = torch.compiler.is_compiling()  # to differentiate once, with zeros for None
        if compiled and not ctx.trajectory:
            gstates = None
        if gy is None and gstates is None:
            return (None,) * 11
        if not compiled and (
            torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or (gstates is not None and ctx.every > 1)
        ):
            return *_composed_backward(ctx, gy, gstates), *[None] * 5
        states, *weights, gate = ctx.saved_tensors
        if gy is None:
            gy = torch.zeros_like(states[0])
        wanted = any(ctx.needs_input_grad[1:5])
        gx, *gweights, ggate = BACKWARD(
            gy,
            gstates,
            states,
            *weights,
            gate,
            ctx.blocks,
            ctx.activation,
            ctx.every,
            wanted,
            ctx.needs_input_grad[5],
            ctx.tf32,
        )
        gate_grad = ggate if ctx.needs_input_grad[5] else None
        return gx, *(gweights if wanted else [None] * 4), gate_grad, *[None] * 5


def _composed_backward(ctx: Any, gy: Tensor | None, gstates: Tensor | None) -> list[Tensor | None]:
    """Differentiate the plain composition, so that the gradients can be differentiated again."""
    states, *rest = ctx.saved_tensors
    given = [states[0], *rest]  # x, the weights, gate
    wanted = [i for i in range(6) if ctx.needs_input_grad[i]]

    def run(*some: Tensor) -> tuple[Tensor, Tensor]:
        full: list[Any] = list(given)
        for i, t in zip(wanted, some, strict=True):
            full[i] = t
        every = 0 if gstates is None else ctx.every
        y, _, kept = composed(*full, ctx.blocks, ctx.activation, every)  # type: ignore[call-arg]
        return y, kept

    vjp: Any = torch.func.vjp  # with two results here
    (y, kept), pull = vjp(run, *(given[i] for i in wanted))
    cotangents = (
        torch.zeros_like(y) if gy is None else gy,
        torch.zeros_like(kept) if gstates is None else gstates,
    )
    grads: list[Tensor | None] = [None] * 6
    with without_autocast(y):
        for i, grad in zip(wanted, pull(cotangents), strict=True):
            grads[i] = grad
    return grads


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    blocks: int,
    activation: int,
    every: int,
    stats: bool,
    tf32: bool,
) -> Outputs:
    """Return y, sums and states of the right shape and dtype, without values."""
    sums = x.new_empty((blocks, 3, x.size(0)) if stats else (0,), dtype=accumulate(x.dtype))
    states = x.new_empty((-(-blocks // every), *x.shape) if every else (0,))
    return x.new_empty(x.shape), sums, states


def _fake_backward(
    gy: Tensor,
    gstates: Tensor | None,
    states: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    blocks: int,
    activation: int,
    every: int,
    weights: bool,
    gate_grad: bool,
    tf32: bool,
) -> tuple[Tensor, ...]:
    size = (blocks, gy.size(0)) if gate_grad else (0,)
    grads = [w.new_empty(w.shape if weights else (0,)) for w in (w1, b1, w2, b2)]
    return gy.new_empty(gy.shape), *grads, gy.new_empty(size, dtype=accumulate(gy.dtype))


def _batched(
    info: Any,
    in_dims: Any,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    *options: Any,
) -> Any:
    """Fold the dimension of vmap into the samples; the weights do not have it."""
    count, (*_, every, stats, _) = info.batch_size, options
    x = x.expand(count, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    split = (count, x.size(1))
    if gate is not None:  # [L, B] -> [L, count * B]
        gate = (
            gate.expand(count, *gate.shape) if in_dims[5] is None else gate.movedim(in_dims[5], 0)
        )
        gate = gate.movedim(0, 1).flatten(1)
    y, sums, states = FORWARD(x.flatten(0, 1), w1, b1, w2, b2, gate, *options)
    return (
        y.unflatten(0, split),
        sums.unflatten(2, split) if stats else sums,
        states.unflatten(1, split) if every else states,
    ), (0, 2 if stats else None, 1 if every else None)


if FORWARD is not None:
    torch.library.register_fake("fastres::_mlp_stack", _fake)
    torch.library.register_fake("fastres::_mlp_stack_backward", _fake_backward)
    torch.library.register_vmap("fastres::_mlp_stack", _batched)
