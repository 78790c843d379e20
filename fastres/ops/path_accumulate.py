"""path_accumulate: G_k <- S^T G_k + V_{k-1} for all path lengths, with ||G_k||^2 and <G_k, g>."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fastres.ops import native
from fastres.ops.calls import check_flag, check_tensor, is_underived
from fastres.ops.layout import accumulate, empty_like_first_dense, per_sample

RAW: Final = native.raw("_path_accumulate")
_OP: Final = "path_accumulate"


def path_accumulate(
    skip: Tensor | None,
    branch: Tensor,
    gradient: Tensor | None = None,
    *,
    before: Tensor | None = None,
    steps: Tensor | Sequence[int] | None = None,
    tail: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add what paths through a branch bring to the paths past it, which are one branch shorter.

    Row k holds the gradient summed over all paths of k branches. Through one more block, with S and
    J the Jacobians of skip and branch, V = J^T G, and R the sum over all paths that are longer than
    those in the other rows (Veit, Wilber, Belongie 2016, arXiv 1605.06431, unravelled),

        G_k <- S^T G_k + V_{k-1}        R <- S^T R + J^T (R + G_K)

    For rows that are held as 2^e_k times the true ones, with steps[k] = e_k - e_{k-1}, that is

        rows[k] = skip[k] + 2^steps[k] branch[k-1]

    One pass over memory computes and measures the new rows. Without a skip it is the shift alone,
    which may as well be done before the branch: J^T (R + G_K) needs one pass through it, not two.
    It is itself a step of a backward pass, and has no derivative.

    Args:
        skip: S^T G, [R, B, ...]; None: 0.
        branch: J^T G, [R, B, ...] with R >= 1; float64, float32, bfloat16 or float16. Its last row
            is read for a tail only.
        gradient: g, [B, ...], to measure <G_k, g>; None: not measured.
        before: What the row before the first brings, [B, ...], where rows are computed in several
            parts; None: 0.
        steps: Powers of two, [R] int32; steps[0] is that of `before`. None: 0. Those beyond the
            largest power of the dtype of the sums count as that one.
        tail: Whether the last row is R: it also gets branch[R-1].

    Returns:
        The new rows, [R, B, ...], in the layout of skip if its samples lie one after the other;
        their squared norms, [R, B]; and their inner products with g, [R, B], or None. Both are
        float32 (float64 for float64), of the rows before these are rounded to half precision, and
        in a fixed order: two runs agree bit for bit.

    Raises:
        TypeError: If a tensor is not dense and floating, or steps not int32; dtypes or devices
            differ; tail is no bool.
        ValueError: If shapes do not fit, or a derivative is wanted.

    Example:
        >>> rows, squares, _ = path_accumulate(torch.ones(3, 1, 4), torch.ones(3, 1, 4))
        >>> rows[:, 0, 0], squares[:, 0]
        (tensor([1., 2., 2.]), tensor([ 4., 16., 16.]))
    """
    try:
        if steps is not None and not isinstance(steps, Tensor):
            steps = _tensor_of(steps, branch)
        if isinstance(tail, bool) and _is_plain(branch, skip, gradient, before):
            return _run(skip, branch, gradient, before, steps, tail)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        _check(skip, branch, gradient, before, steps, tail)  # names what was refused
        raise
    _check(skip, branch, gradient, before, steps, tail)
    return reference(skip, branch, gradient, before=before, steps=steps, tail=tail)


def reference(
    skip: Tensor | None,
    branch: Tensor,
    gradient: Tensor | None = None,
    *,
    before: Tensor | None = None,
    steps: Tensor | None = None,
    tail: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute path_accumulate in plain PyTorch: the oracle, and what runs without the library."""
    dtype = accumulate(branch.dtype)
    first = torch.zeros_like(branch[:1]) if before is None else before.unsqueeze(0)
    rows = torch.cat([first, branch[:-1]]).to(dtype)
    if steps is not None:
        most = math.frexp(torch.finfo(dtype).max)[1] - 1
        two = torch.ones_like(steps, dtype=dtype)
        rows = rows * per_sample(torch.ldexp(two, steps.clamp(max=most)), rows)
    rows = rows if skip is None else skip.to(dtype) + rows
    if tail:
        rows = torch.cat([rows[:-1], rows[-1:] + branch[-1:].to(dtype)])
    flat = rows[..., None].flatten(2)
    dot = None if gradient is None else (flat * gradient.to(dtype)[..., None].flatten(1)).sum(2)
    return rows.to(branch.dtype), (flat * flat).sum(2), dot


def _is_plain(branch: Tensor, *others: Tensor | None) -> bool:
    """Tell whether the raw operator may run: where it is, without derivative and vmap."""
    if RAW is None or not native.runs_on(branch) or not is_underived(branch, *others):
        return False
    if not torch._C._are_functorch_transforms_active():
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(t is not None and wrapped(t) for t in (branch, *others))


def _run(
    skip: Tensor | None,
    branch: Tensor,
    gradient: Tensor | None,
    before: Tensor | None,
    steps: Tensor | None,
    tail: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the raw operator, which takes the samples of all rows in one dimension."""
    each = branch.shape[:2]
    flat = None if skip is None else skip.flatten(0, 1)
    rows, sums = RAW(flat, branch.flatten(0, 1), before, gradient, steps, each[0], tail)
    sums = sums.unflatten(1, each)
    return rows.unflatten(0, each), sums[0], None if gradient is None else sums[1]


def _tensor_of(steps: Sequence[int], branch: Tensor) -> Tensor:
    if not all(isinstance(step, int) for step in steps):  # torch.tensor would cut off fractions
        raise TypeError(f"{_OP}: steps must be integers, got {[*steps]}")
    return torch.tensor(steps, dtype=torch.int32, device=branch.device)


def _check(
    skip: Tensor | None,
    branch: Tensor,
    gradient: Tensor | None,
    before: Tensor | None,
    steps: Tensor | Sequence[int] | None,
    tail: bool,
) -> None:
    """Raise the error that names the argument, the rule and the value, if there is one."""
    check_tensor(_OP, "branch", branch)
    if branch.dim() < 2:
        raise ValueError(f"{_OP}: branch must have 2 or more dimensions, got {branch.dim()}")
    if len(branch) == 0:
        raise ValueError(f"{_OP}: branch must have 1 or more rows, got 0")
    row = branch.shape[1:]
    given = (("skip", skip, branch.shape), ("gradient", gradient, row), ("before", before, row))
    for name, t, shape in given:
        if t is not None:
            _check_like(name, t, branch, shape)
    if steps is not None:
        _check_steps(steps, branch)
    check_flag(_OP, "tail", tail)
    for name, t in (("branch", branch), *((name, t) for name, t, _ in given)):
        if not is_underived(t):
            raise ValueError(f"{_OP}: {name} must need no derivative, got one that requires it")


def _check_like(name: str, t: Tensor, branch: Tensor, shape: torch.Size) -> None:
    check_tensor(_OP, name, t)
    if t.shape != shape:
        raise ValueError(f"{_OP}: {name} must have shape {[*shape]}, got {[*t.shape]}")
    if t.dtype != branch.dtype:
        raise TypeError(f"{_OP}: {name} must be {branch.dtype}, as branch is, got {t.dtype}")
    if t.device != branch.device:
        raise TypeError(f"{_OP}: {name} must be on {branch.device}, got {t.device}")


def _check_steps(steps: Tensor | Sequence[int], branch: Tensor) -> None:
    if not isinstance(steps, Tensor):
        steps = _tensor_of(steps, branch)
    if steps.dtype != torch.int32:
        raise TypeError(f"{_OP}: steps must be int32, got {steps.dtype}")
    if steps.shape != branch.shape[:1]:
        raise ValueError(f"{_OP}: steps must have shape [{len(branch)}], got {[*steps.shape]}")
    if steps.device != branch.device:
        raise TypeError(f"{_OP}: steps must be on {branch.device}, got {steps.device}")


def _fake(
    skip: Tensor | None,
    branch: Tensor,
    before: Tensor | None,
    gradient: Tensor | None,
    steps: Tensor | None,
    rows: int,
    tail: bool,
) -> tuple[Tensor, Tensor]:
    given = [t for t in (skip, branch, before, gradient, steps) if t is not None]
    if any(t.device != branch.device for t in given):
        raise RuntimeError("path_accumulate: tensors must be on one device")
    count = 1 if gradient is None else 2
    sums = branch.new_empty((count, branch.size(0)), dtype=accumulate(branch.dtype))
    return empty_like_first_dense(*(() if skip is None else (skip,)), branch), sums


if native.C is not None:
    torch.library.register_fake("fastres::_path_accumulate", _fake)
