"""stack: the path-length gradients of a whole stack of residual blocks in one call."""

from __future__ import annotations

import math
import warnings
from typing import Final

import torch
from torch import Tensor

from fastres.ops.mlp_stack_paths import StackLengths, lengths, precision_used
from fastres.paths.result import PathGradients
from fastres.paths.tally import log2_norm

# How far lengths may be from their sum: by dtype, and of products of factors rounded to tf32.
_LIMITS: Final = {torch.float64: 1e-10, torch.float32: 1e-4}
_LIMIT_OF_TF32: Final = 0.1


def mlp_stack_paths(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    grad: Tensor,
    max_length: int | None = None,
    gate: float | Tensor | None = None,
    activation: str = "relu",
    *,
    blocks: int | None = None,
    keep: bool = False,
    input_precision: str = "ieee",
) -> PathGradients:
    """Separate the gradient by the input of `fastres.mlp_stack` by the length of its paths.

    What `fastres.path_gradients` with method "exact" gives for such a stack, from one operator: the
    lengths of a few samples at a time go through all blocks without leaving the cache of a core
    (on a GPU: the shared memory of a multiprocessor).

    Args:
        x: Stream before the first block, [B, D]; float64, float32, or half precision, which is
            computed in float32.
        w1: First weights, [L, H, D].
        b1: First biases, [L, H].
        w2: Second weights, [L, D, H].
        b2: Second biases, [L, D].
        grad: Gradient of a loss by the stream after the last block, [B, D].
        max_length: K, the longest length kept apart; what is longer is in the tail, exactly. None
            for L.
        gate: Scale of the branches: a number, or a tensor [], [L] or [L, B]; None: 1.
        activation: relu, gelu (by erf), gelu_tanh, silu, tanh, sigmoid or identity.
        blocks: As of mlp_stack: L, where one set of weights is used by all blocks.
        keep: Whether to keep the G_k themselves, [K+1, B, D].
        input_precision: How the products of float32 take their factors on CUDA, in the words of
            Triton: "ieee" as they are; "tf32x3" on tensor cores, as sums of two tf32 each, 22 of 24
            bits, which counts as exact; "tf32" as one, 11 bits, which is faster and not exact.
            Elsewhere all three are "ieee".

    Returns:
        What was measured; its sites are mlp_stack[0], ... mlp_stack[L-1], its input_precision that
        of the products.

    Raises:
        TypeError: If an argument is of a wrong type, or tensors differ in dtype or device.
        ValueError: If a shape does not fit, the activation or input_precision is not known, or
            max_length is negative or more than L.

    Warns:
        UserWarning: If the lengths do not add up to the ordinary gradient, to 1e-4 of it in
            float32 (0.1 with "tf32") and 1e-10 in float64, with the cause.

    Example:
        >>> w, b = torch.full((3, 2, 2), 0.5), torch.zeros(3, 2)
        >>> paths = mlp_stack_paths(torch.ones(1, 2), w, b, w, b, torch.ones(1, 2))
        >>> paths.paths, paths.shares
        ((1, 3, 3, 1), tensor([0.1250, 0.3750, 0.3750, 0.1250], dtype=torch.float64))
    """
    given = (x, w1, b1, w2, b2, grad, max_length, gate, activation)
    found = lengths(*given, blocks=blocks, keep=keep, input_precision=input_precision)
    count = w1.size(0) if blocks is None else blocks
    longest = count if max_length is None else max_length
    logs, dots = found.log2_norms.cpu(), found.dots.cpu()
    error = _sum_error(found.norms.cpu())
    used = precision_used(x, input_precision)
    limit = _LIMIT_OF_TF32 if used == "tf32" else _LIMITS[found.gradient.dtype]
    if not error <= limit:
        _warn_of_sum(found, logs, error)
    if longest == count:  # a row of nothing stands for the tail
        logs = torch.cat([logs, torch.full_like(logs[:1], -torch.inf)])
        dots = torch.cat([dots, torch.zeros_like(dots[:1])])
    measured = {"logs": logs, "dots": dots, "tail": found.tail}
    if found.rows is not None:
        measured["gradients"] = found.rows[: longest + 1]
    return PathGradients(
        method="exact",
        where="input",
        sites=tuple(f"mlp_stack[{block}]" for block in range(count)),
        paths=tuple(math.comb(count, k) for k in range(longest + 1)),
        gradient=found.gradient,
        sum_error=error,
        measured=measured,
        input_precision=used,
    )


def _sum_error(norms: Tensor) -> float:
    """||sum - g|| / ||g|| over the batch, from those of the samples; 0 where both are zero."""
    largest = norms.max().item() if norms.numel() else 0.0
    if largest == 0:
        return 0.0
    off, whole = torch.linalg.vector_norm(norms / largest, dim=1).tolist()
    return off / whole if whole else math.inf


def _warn_of_sum(found: StackLengths, logs: Tensor, error: float) -> None:
    cause = "the gradient is not finite"
    if found.gradient.isfinite().all():
        cancelled = log2_norm(logs).exp2().sum() / torch.linalg.vector_norm(found.norms[1].cpu())
        cause = f"the lengths cancel, their norms add up to {cancelled:.1e} times that of the "
        cause += "gradient: take float64"
    warnings.warn(
        f"mlp_stack_paths: the lengths must add up to the ordinary gradient, got {error:.1e} of it "
        f"off: {cause}",
        stacklevel=3,
    )
