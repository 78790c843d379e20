"""conv_stack: L blocks x <- relu(x + gate * conv2(relu(conv1(x)))), with the sums of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastres.ops import native
from fastres.ops.calls import check_gate, check_tensor, is_underived
from fastres.ops.layout import accumulate, per_sample
from fastres.ops.mlp_stack_blocks import without_autocast
from fastres.ops.stack_inputs import check_alike, check_shapes, expanded
from fastres.ops.stats import Stats, sums_of

FORWARD: Final = native.raw("_conv_stack")
_OP: Final = "conv_stack"
Add = Callable[[Tensor, Tensor], Tensor]


def conv_stack(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Run the basic blocks of a ResNet's stage in one call, and measure what each adds.

    Block l computes x <- relu(x + p) with p = gate[l] * (conv(a, w2[l]) + b2[l]) and
    a = relu(conv(x, w1[l]) + b1[l]): two convolutions of 3x3, stride 1 and padding 1 (He et al.
    2016, arXiv 1512.03385, figure 2), whose batch norms are folded into weights and biases. The
    activations stay in the caches of a core from the first block to the last; the stream and all
    sums inside are float32, or float64 for float64. On a GPU, and for bfloat16 with C a multiple
    of 16 on a CPU with AMX, what a product reads is rounded to the dtype of x; on a CPU
    `FASTRES_ISA=avx512` in the environment avoids that. It is made for inference: every derivative
    is that of the plain composition. Autocast changes nothing.

    Args:
        x: Stream, [N, C, H, W], contiguous or channels_last; float64, float32, bfloat16 or float16.
        w1: First weights, [L, C, C, 3, 3]. All weights have the dtype and device of x, any strides;
            those that lie in memory as [L, 3, 3, C in, C out] are read as they are.
        b1: First biases, [L, C].
        w2: Second weights, [L, C, C, 3, 3].
        b2: Second biases, [L, C].
        gate: Scale of the branches: a number, or a tensor [], [L] or [L, N]; None: 1.

    Returns:
        y [N, C, H, W] in the layout of x, and the Stats of x (before each block) and p, each
        [L, N], in squared units of x. The stats carry no gradients. Two runs agree bit for bit.

    Raises:
        TypeError: If an argument is no dense floating tensor, or not of the dtype and device of x.
        ValueError: If a shape does not fit.

    Example:
        >>> w, b = torch.zeros(2, 1, 1, 3, 3), torch.ones(2, 1)
        >>> y, stats = conv_stack(torch.ones(1, 1, 2, 2), w, b, w, b)
        >>> y.flatten(), stats.skip_sq.flatten()
        (tensor([3., 3., 3., 3.]), tensor([ 4., 16.]))
    """
    if has_torch_function_variadic(x, w1, b1, w2, b2):
        given = (x, w1, b1, w2, b2)
        result: tuple[Tensor, Stats] = handle_torch_function(conv_stack, given, *given, gate)
        return result
    _check(x, (w1, b1, w2, b2), gate)
    gates = expanded(gate, x, w1.size(0))
    given = (x, w1, b1, w2, b2)
    if w1.size(0) == 0 or not _runs(*given, gates):
        y, sums = composed(*given, gates)
    else:
        y, sums = FORWARD(*given, gates, True, x.is_cuda and allows_tf32())
    return y, Stats(sums)


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: float | Tensor | None = None,
    *,
    add: Add = torch.add,
) -> tuple[Tensor, Stats]:
    """Compute conv_stack in plain PyTorch: the oracle, the fallback and all derivatives.

    `add` joins a branch to its stream, so that each add can be watched.
    """
    y, sums = composed(x, w1, b1, w2, b2, expanded(gate, x, w1.size(0)), add)
    return y, Stats(sums)


def composed(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    add: Add = torch.add,
) -> tuple[Tensor, Tensor]:
    """Compute what the raw operator does, y and sums, in the accumulate dtype.

    Args:
        x: [N, C, H, W].
        w1: [L, C, C, 3, 3].
        b1: [L, C].
        w2: [L, C, C, 3, 3].
        b2: [L, C].
        gate: [L, N] in the accumulate dtype, or None for 1.
        add: Joins a branch to its stream.
    """
    wide, dtype = accumulate(x.dtype), x.dtype
    sums = []
    # unbind once: w1[l] in the loop would write a full-sized gradient per block, O(L^2)
    sets = zip(*(w.to(wide).unbind(0) for w in (w1, b1, w2, b2)), strict=True)
    y = x.to(wide)
    with without_autocast(x):
        for block, (first, bias, second, bias2) in enumerate(sets):
            inner = torch.relu(F.conv2d(y, first, bias, padding=1))
            p = F.conv2d(inner, second, bias2, padding=1)
            p = p if gate is None else p * per_sample(gate[block], p)
            sums.append(sums_of(y.detach(), p.detach()))
            y = torch.relu(add(y, p))
    measured = torch.stack(sums) if sums else x.new_empty((0, 3, x.size(0)), dtype=wide)
    y = y.to(dtype) if sums else x.clone()
    if is_channels_last(x):
        return y.movedim(1, -1).contiguous().movedim(-1, 1), measured
    return y.contiguous(), measured


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def allows_tf32() -> bool:
    """Tell whether CUDA may round the factors of float32 convolutions to tf32, as torch does.

    torch.compile cannot read that: what it compiles keeps what held then.
    """
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def is_channels_last(x: Tensor) -> bool:
    """Tell whether y lies as [N, H, W, C]: where x [N, C, H, W] does, and is not contiguous too."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()  # vmap asks it only so


def as_packed(w: Tensor) -> Tensor:
    """Return weights [L, C, C, 3, 3] that lie in memory as the kernels read them."""
    return w.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)


def _runs(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether the raw operator computes this call: there are kernels, and no derivatives."""
    if FORWARD is None or not native.runs_on(x) or not is_underived(x, *others):
        return False
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def _check(x: Tensor, weights: tuple[Tensor, ...], gate: float | Tensor | None) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one."""
    check_tensor(_OP, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{_OP}: x must have 4 dimensions, got {x.dim()}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{_OP}: x must have sizes C, H, W >= 1, got {[*x.shape]}")
    check_alike(_OP, x, weights)
    shape, w1 = (x.size(1), x.size(1), 3, 3), weights[0]
    if w1.shape[1:] != shape:
        wanted = ", ".join(["L", *map(str, shape)])
        raise ValueError(f"{_OP}: w1 must have shape [{wanted}], got {[*w1.shape]}")
    blocks, channels = w1.shape[:2]
    check_shapes(_OP, weights[1:], (blocks, channels), (blocks, *shape), (blocks, channels))
    check_gate(_OP, gate, x, blocks, x.size(0))


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    stats: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and sums of the right shape, layout and dtype, without values."""
    last = is_channels_last(x)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty_like(x, memory_format=layout)
    size = (w1.size(0), 3, x.size(0)) if stats else (0,)
    return y, x.new_empty(size, dtype=accumulate(x.dtype))


if FORWARD is not None:
    torch.library.register_fake("fastres::_conv_stack", _fake)
