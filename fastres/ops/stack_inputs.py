"""stack_inputs: the arguments of a stack of residual blocks, checked and brought to one form."""

from __future__ import annotations

from torch import Tensor

from fastres.ops.calls import check_gate, check_tensor
from fastres.ops.layout import accumulate, gate_of
from fastres.ops.mlp_stack_blocks import CODES


def expanded(gate: float | Tensor | None, x: Tensor, blocks: int) -> Tensor | None:
    """View a gate as [L, B] in the accumulate dtype."""
    if gate is None:
        return None
    gate = gate_of(gate, x, accumulate(x.dtype))
    return (gate[:, None] if gate.dim() == 1 else gate).expand(blocks, x.size(0))


def check_stack(
    op: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    gate: float | Tensor | None,
    activation: str,
    blocks: int | None,
) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one.

    Args:
        op: Whose arguments they are.
        x: The stream, to be [B, D].
        weights: w1, b1, w2, b2, to be [L, H, D], [L, H], [L, D, H], [L, D].
        gate: To be None, a number, [], [L] or [L, B].
        activation: To be in CODES.
        blocks: To be None or L, more than one where the weights are one set.
    """
    check_tensor(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have 2 dimensions, got {x.dim()}")
    check_alike(op, x, weights)
    w1 = weights[0]
    if w1.dim() != 3 or w1.size(2) != x.size(1):
        raise ValueError(f"{op}: w1 must have shape [L, H, {x.size(1)}], got {[*w1.shape]}")
    sets, hidden, width = w1.shape
    if hidden == 0 or width == 0:
        raise ValueError(f"{op}: w1 must have sizes H, D >= 1, got {[*w1.shape]}")
    if max(hidden, width) > 1 << 30:  # a column is an int on a GPU
        raise ValueError(f"{op}: w1 must have sizes H, D <= 2^30, got {[*w1.shape]}")
    check_shapes(op, weights[1:], (sets, hidden), (sets, width, hidden), (sets, width))
    if activation not in CODES:
        known = ", ".join(CODES)
        raise ValueError(f"{op}: activation must be one of {known}, got {activation!r}")
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int)):
        raise TypeError(f"{op}: blocks must be an integer, got {blocks!r}")
    if blocks is not None and (blocks < 0 or sets not in (1, blocks)):
        rule = ">= 0" if sets == 1 else f"{sets}, the sets of weights"
        raise ValueError(f"{op}: blocks must be {rule}, got {blocks}")
    check_gate(op, gate, x, sets if blocks is None else blocks, x.size(0))


def check_alike(op: str, x: Tensor, weights: tuple[Tensor, ...]) -> None:
    """Raise a TypeError unless w1, b1, w2, b2 are tensors of the dtype and device of x."""
    for name, weight in zip(("w1", "b1", "w2", "b2"), weights, strict=True):
        check_tensor(op, name, weight)
        if weight.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {weight.dtype}")
        if weight.device != x.device:
            raise TypeError(f"{op}: {name} must be on {x.device}, got {weight.device}")


def check_shapes(op: str, weights: tuple[Tensor, ...], *shapes: tuple[int, ...]) -> None:
    """Raise a ValueError unless b1, w2, b2 have these shapes."""
    for name, shape, weight in zip(("b1", "w2", "b2"), shapes, weights, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {[*shape]}, got {[*weight.shape]}")
