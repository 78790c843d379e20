"""checks: whether the lengths add up to the gradient, and if not, what is the cause."""

from __future__ import annotations

import math
import warnings
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastres.paths.chunks import Chunk, backward
from fastres.paths.forward import Forward
from fastres.paths.graph import custom_functions

# ||sum - g|| / ||g|| above which something is wrong; half precision: of the order of its rounding
_LIMITS: Final = {torch.float64: 1e-10, torch.float32: 1e-4}


def check_sum(forward: Forward, error: float, norms: Tensor, chunk: int) -> None:
    """Warn where the lengths do not add up to the ordinary gradient, and name the cause found.

    Args:
        forward: The pass.
        error: ||sum of all lengths - g|| / ||g||.
        norms: Norms of the lengths, [rows].
        chunk: How many rows went at once.
    """
    if error <= limit(forward):
        return
    cause = _cause(forward, error, norms, chunk)
    warnings.warn(
        f"path_gradients: the lengths must add up to the ordinary gradient, got {error:.1e} of it "
        f"off: {cause}",
        stacklevel=4,
    )


def limit(forward: Forward) -> float:
    """Return the largest error that rounding explains."""
    return _LIMITS.get(precision(forward), 0.05)


def precision(forward: Forward) -> torch.dtype:
    """Return the coarsest type of the gradient and of the sums in the network."""
    kinds = {forward.gradient.dtype, *forward.marks.dtypes}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def _cause(forward: Forward, error: float, norms: Tensor, chunk: int) -> str:
    """Find out by experiments with the backward pass; each gives the same g if all is well."""
    g = forward.gradient
    if not g.isfinite().all():
        return "the gradient is not finite"
    noticeable = limit(forward) / 10
    again, _ = forward.ordinary()
    if _off(again, g) > noticeable:
        return (
            "the backward pass does not repeat itself: a stochastic layer is recomputed, "
            "or a kernel is not deterministic"
        )
    scaled, _ = forward.ordinary(scale=-2.0)
    if scaled is not None and _off(scaled / -2, g) > noticeable:
        functions = ", ".join(custom_functions(get_gradient_edge(forward.loss))) or "a hook"
        return f"the backward pass is not linear in its cotangent: see {functions}"
    if chunk > 1 and _off(_batched(forward), g) > noticeable:
        return "an operator has a wrong batching rule: chunk=1 does without"
    cancelled = (norms.sum() / torch.linalg.vector_norm(g.cpu().double())).item()
    kind = precision(forward)
    if cancelled * torch.finfo(kind).eps * math.sqrt(len(forward.between)) > error / 100:
        name = str(kind).removeprefix("torch.")
        return (
            f"the lengths cancel, their norms add up to {cancelled:.1e} times that of the "
            f"gradient, beyond what {name} resolves: take a wider type"
        )
    return "no cause was found"


def _batched(forward: Forward) -> Tensor | None:
    """Run the ordinary backward pass under vmap."""
    both = Chunk([True, True], [0, 0])
    (rows,) = backward(forward.marks, both, forward.roots, [forward.where])
    return None if rows is None else rows[0]


def _off(got: Tensor | None, wanted: Tensor) -> float:
    if got is None:
        return math.inf
    norm = torch.linalg.vector_norm
    return (norm(got - wanted) / norm(wanted)).item()
