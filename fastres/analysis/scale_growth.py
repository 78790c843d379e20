"""scale_growth: whether a step on the weights makes the scales grow (Littwin & Wolf 2016).

Theorems 3 and 4 (arXiv 1611.02525, section 4): let the loss be a sum over paths, each a product
of weights, and lambda_l the scale of branch l. With g the gradient by the weights and g_l its part
from the paths through branch l, a step of -mu g on the weights changes the slopes by the scales,

    lambda_l dL/dlambda_l    by -mu <g_l, g>
    C dL/dC                  by -mu sum_r r <g_r, g>

to first order; C scales all weights at once, g_r is the part from the paths of r weights. If the
slopes were zero, the next step raises |lambda_l| where <g_l, g> > 0, and C where that sum is. For
one block, with paths of m and of p weights, <g_l, g> = ||g_p||^2 + <g_p, g_m> and the sum is
m ||g_m||^2 + p ||g_p||^2 + (m + p) <g_p, g_m>, as the paper has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastres.gates import gate
from fastres.sites import trace
from fastres.training import evaluating


@dataclass(frozen=True, eq=False)
class ScaleGrowth:
    """Slopes of the loss by log scale, before and after a step on the weights; L blocks.

    All are float64. Where the theorems assume a slope of zero, `slope` says what it is.
    """

    sites: tuple[str, ...]
    square: float  # ||g||^2: what a scale that all paths go through has as <g_l, g>
    through: Tensor  # [L], <g_l, g>: Theorem 3 speaks of the blocks where it is above 0
    slope: Tensor  # [L], lambda_l dL/dlambda_l before the step
    predicted: Tensor  # [L], its change by Theorem 3
    measured: Tensor  # [L], its change
    slope_all: float  # C dL/dC before the step
    predicted_all: float  # its change by Theorem 4
    measured_all: float  # its change


def scale_growth(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    step: float,
    weights: Iterable[Tensor] | None = None,
) -> ScaleGrowth:
    """Predict, and measure, how a step of gradient descent on the weights moves the slopes.

    The prediction takes the loss as linear in the output, with the slope that it has there, as the
    losses of the paper are; the measurement takes it as it is. Batch norm is in eval mode: its
    statistics are the sigma_l of the paper, constants. The scale of a branch is a gate of 1 on it.

    The parts of the gradient come from backward passes alone: the derivative of the sum over paths
    by the gate of a branch is the sum over the paths through it.

    Args:
        model: Any module that `fastres.trace` finds sites in; left as it was, bit for bit.
        x: Inputs, [B, ...].
        loss: Output -> scalar.
        step: mu, above 0.
        weights: Parameters that the step moves, and C scales; None: all but those of batch norm.

    Raises:
        ValueError: If the model has no site or no weights, or step is not above 0 and finite.
    """
    if not 0 < step < float("inf"):
        raise ValueError(f"scale_growth: step must be above 0 and finite, got {step}")
    moved = _weights(model) if weights is None else list(weights)
    if not moved:
        kind = type(model).__name__
        raise ValueError(f"scale_growth: weights must hold at least one, got none of {kind}")
    with evaluating(model), torch.enable_grad():
        names = tuple(site.name for site in trace(model, x))
        if not names:
            kind = type(model).__name__
            raise ValueError(f"scale_growth: model must contain a residual add, none in {kind}")
        gates = _open(names, x)
        out = _gated(model, x, names, gates)
        (pull,) = torch.autograd.grad(loss(out), out, retain_graph=True)
        gradient = _grad((pull * out).sum(), moved, create_graph=True)
        fixed = [part.detach() for part in gradient]
        square = _dot(fixed, fixed).item()
        along = _dot(gradient, fixed)  # <g(gates, weights), g>: its slopes are what is asked
        through, *by_weight = _grad(along, [gates, *moved])
        lengths = square + _dot(moved, by_weight).item()  # sum of r <g_r, g>, by Euler's theorem
        slope, slope_all = _slopes(model, x, loss, names, moved)
        with _stepped(moved, fixed, step):
            after, after_all = _slopes(model, x, loss, names, moved)
    return ScaleGrowth(
        sites=names,
        square=square,
        through=through,
        slope=slope,
        predicted=-step * through,
        measured=after - slope,
        slope_all=slope_all,
        predicted_all=-step * lengths,
        measured_all=after_all - slope_all,
    )


def _weights(model: nn.Module) -> list[Tensor]:
    norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in norms]


def _open(names: Sequence[str], x: Tensor) -> Tensor:
    """Gates of 1; float64 keeps their slopes from being rounded once more than the branch is."""
    return torch.ones(len(names), dtype=torch.float64, device=x.device, requires_grad=True)


def _gated(model: nn.Module, x: Tensor, names: Sequence[str], gates: Tensor) -> Tensor:
    with gate(model, dict(zip(names, gates, strict=True))):
        out: Tensor = model(x)
    return out


def _grad(value: Tensor, by: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Differentiate; what the value does not depend on has a gradient of zeros."""
    return torch.autograd.grad(value, by, create_graph=create_graph, materialize_grads=True)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    parts = [(p.double() * q.double()).sum() for p, q in zip(a, b, strict=True)]
    return torch.stack(parts).sum()


def _slopes(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    names: Sequence[str],
    weights: Sequence[Tensor],
) -> tuple[Tensor, float]:
    """Slopes by the log of each branch's scale, [L], and by that of all weights."""
    gates = _open(names, x)
    slope, *gradient = _grad(loss(_gated(model, x, names, gates)), [gates, *weights])
    return slope, _dot(weights, gradient).item()


@contextmanager
def _stepped(weights: Sequence[Tensor], gradient: Sequence[Tensor], step: float) -> Iterator[None]:
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, part in zip(weights, gradient, strict=True):
                weight.sub_(part, alpha=step)
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
