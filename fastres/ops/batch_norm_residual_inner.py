"""batch_norm_residual_inner: a batch norm within a branch, by the same kernels without a skip."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastres.ops.batch_norm_residual import check_count, run
from fastres.ops.batch_norm_residual_straight import straight


def batch_norm_inner(
    f: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    **options: Any,
) -> Tensor:
    """Normalise f, and apply a ReLU: relu?(weight (f - mean) / sqrt(var + eps) + bias).

    One pass over f for its mean and var in training, and one for everything else; the backward pass
    keeps f, and of the ReLU one bit per element.

    Args:
        f: [B, C, ...], of a dtype and on a device that the kernels take.
        running_mean: As the other arguments, like those of `batch_norm_residual`.
        running_var: [C].
        weight: [C] or None.
        bias: [C] or None.
        relu: Whether there is a ReLU.
        options: training, momentum, eps, num_batches_tracked.

    Returns:
        [B, C, ...], dtype and layout of f.

    Raises:
        ValueError: If there is one value per channel in training.
    """
    given = (f, running_mean, running_var, weight, bias, relu)
    if has_torch_function_unary(f):  # a policy watches
        return handle_torch_function(batch_norm_inner, (f,), *given, **options)
    found = straight(None, *given, **options)
    if found is not None:
        return found[0]
    if options.get("training"):
        check_count("f", f)
    return run(None, None, *given[:5], None, relu, **options)[0]
