"""mlp_stack: L residual blocks x <- x + gate * (W2 act(W1 x + b1) + b2), with the sums of each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastres.ops.calls import check_flag, is_underived, plain_apply
from fastres.ops.mlp_stack_blocks import CODES, Add, composed
from fastres.ops.mlp_stack_rules import FORWARD, MlpStack, has_kernel
from fastres.ops.stack_inputs import check_stack, expanded
from fastres.ops.stats import Stats


def mlp_stack(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: float | Tensor | None = None,
    activation: str = "relu",
    *,
    blocks: int | None = None,
    return_states: bool = False,
    checkpoint: bool = False,
) -> tuple[Tensor, Stats]:
    """Run a stack of residual blocks in one call, and measure what each adds to the stream.

    Block l computes x <- x + p with p = gate[l] * (W2[l] act(W1[l] x + b1[l]) + b2[l]). The stream
    and all sums inside are float32, or float64 for float64. Products of two-byte numbers round both
    factors to them on a GPU and, of bfloat16, on a CPU with AMX, where D and H are multiples of 32
    and B > 1, or B > 16 backwards; `FASTRES_ISA=avx512` in the environment keeps them in float32.

    For the backward pass it keeps the stream before every block where D <= H, before every second
    where D > H, before fewer where weights are frozen: never more than half of what the blocks one
    by one would keep, unless those are fewer than `checkpoint` keeps. Derivatives of derivatives,
    and those of torch.func, come from the plain composition. Autocast changes nothing.

    Args:
        x: Stream, [B, D]; float64, float32, bfloat16 or float16.
        w1: First weights, [L, H, D]. All weights have the dtype and device of x, any strides.
        b1: First biases, [L, H].
        w2: Second weights, [L, D, H].
        b2: Second biases, [L, D].
        gate: Scale of the branches: a number, or a tensor [], [L] or [L, B]; None: 1.
        activation: relu, gelu (by erf), gelu_tanh, silu, tanh, sigmoid or identity.
        blocks: Blocks to run, L. None: as many as there are weights. More than these: the weights
            are one set, [1, ...], that every block uses.
        return_states: Whether to return the stream before every block and after the last.
        checkpoint: Whether to keep only every ceil(sqrt(L))-th state for the backward pass, which
            computes the others again (Chen et al. 2016, arXiv 1604.06174, section 4.1).

    Returns:
        y [B, D], or the states [L + 1, B, D], x first, contiguous; and the Stats of x and p, each
        [L, B], in squared units of x. The stats carry no gradients. Two runs agree bit for bit.

    Raises:
        TypeError: If an argument is no dense floating tensor, or not of the dtype and device of x;
            or blocks is no integer, or a flag no bool.
        ValueError: If a shape does not fit, or the activation is not known.

    Example:
        >>> w, b = torch.full((3, 2, 2), 0.5), torch.zeros(3, 2)
        >>> y, stats = mlp_stack(torch.ones(1, 2), w, b, w, b)
        >>> y, stats.branch_sq.flatten()
        (tensor([[8., 8.]]), tensor([ 2.,  8., 32.]))
    """
    if has_torch_function_variadic(x, w1, b1, w2, b2):  # a policy watches
        return handle_torch_function(
            mlp_stack,
            (x, w1, b1, w2, b2),
            *(x, w1, b1, w2, b2, gate, activation),
            blocks=blocks,
            return_states=return_states,
            checkpoint=checkpoint,
        )
    check_stack("mlp_stack", x, (w1, b1, w2, b2), gate, activation, blocks)
    check_flag("mlp_stack", "return_states", return_states)
    check_flag("mlp_stack", "checkpoint", checkpoint)
    count = w1.size(0) if blocks is None else blocks
    gates = expanded(gate, x, count)
    code = CODES[activation]
    tf32 = x.is_cuda and allows_tf32()
    given = (x, w1, b1, w2, b2, gates)
    underived = is_underived(*given)
    if count == 0 or not has_kernel(x) or _is_composed(underived, given[1:5]):
        y, sums, states = composed(*given, count, code, int(return_states))
    elif underived:
        y, sums, states = FORWARD(*given, count, code, int(return_states), True, tf32)
    else:
        weights = given[1:5]
        every = 1 if return_states else _every(x, weights, gates, activation, count, checkpoint)
        y, sums, states = _apply(*given, count, code, every, tf32, return_states)
    return (torch.cat([states, y[None]]) if return_states else y), Stats(sums)


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: float | Tensor | None = None,
    activation: str = "relu",
    *,
    blocks: int | None = None,
    return_states: bool = False,
    checkpoint: bool = False,
    add: Add = torch.add,
) -> tuple[Tensor, Stats]:
    """Compute mlp_stack in plain PyTorch: the oracle, and the fallback without the library.

    `add` joins a branch to its stream, so that each add can be watched; nothing is checkpointed.
    """
    count = w1.size(0) if blocks is None else blocks
    gates, code = expanded(gate, x, count), CODES[activation]
    y, sums, states = composed(x, w1, b1, w2, b2, gates, count, code, int(return_states), add)
    return (torch.cat([states, y[None]]) if return_states else y), Stats(sums)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def allows_tf32() -> bool:
    """Tell whether CUDA may round the factors of float32 products to tf32.

    `allow_tf32` would raise where the newer setting was used, and torch.compile can only read that.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _every(
    x: Tensor,
    weights: tuple[Tensor, ...],
    gate: Tensor | None,
    activation: str,
    blocks: int,
    checkpoint: bool,
) -> int:
    """Decide after how many blocks the next state, [B, D], is kept for the backward pass.

    A block by itself keeps its input for the gradient of w1, z or h = act(z) for those of act and
    w2, and its branch for that of the gate. All states are half of that together, or less; but
    never fewer than with checkpoints, where a segment takes as much memory as they do.
    """
    fewest = max(1, math.ceil(math.sqrt(blocks)))
    w1, _, w2, _ = weights
    inner = w2.requires_grad or activation != "identity"
    outer = w1.requires_grad + (gate is not None and gate.requires_grad)
    kept = w1.size(1) * inner + x.size(1) * outer
    if checkpoint or kept == 0:
        return fewest
    return min(fewest, -(-2 * x.size(1) // kept))


def _is_composed(underived: bool, weights: tuple[Tensor, ...]) -> bool:
    """Tell whether torch transforms what only the plain composition can follow.

    That is every derivative by torch.func or forwards, and a vmap over the weights.
    """
    if not torch._C._are_functorch_transforms_active():
        return not underived and forward_ad._current_level >= 0
    return not underived or any(map(torch._C._functorch.is_functorch_wrapped_tensor, weights))


def _apply(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run with autograd."""
    compiled = torch.compiler.is_compiling()
    run: Any = MlpStack.apply if compiled else plain_apply(MlpStack)
    outputs: tuple[Tensor, Tensor, Tensor] = run(*args)
    return outputs
