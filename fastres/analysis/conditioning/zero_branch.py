"""zero_branch: the loss around the point of any model where all branches weigh nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastres.analysis.conditioning.eigenvalues import Eigenvalues, eigenvalues
from fastres.gates import gate
from fastres.sites import trace


@dataclass(frozen=True)
class ZeroBranch:
    """The second derivatives of a loss where the gates g [S] of all S sites are 0.

    With the weights w of the branches, [P], as variables too, the Hessian there is

        [ A    C ]      A [S, S]: by gates      C [S, P]: by a gate and a weight
        [ C^T  0 ]      0: a branch that weighs nothing cannot be missed

    which is the shape that two matrices per shortcut give at zero weights (Li et al. 2016, arXiv
    1611.01186, theorem 1): a gate and its branch multiply as two matrices do. Its rank is at most
    2 S, and the eigenvalues that are not 0 are those of [[A, R], [R, 0]] with R R = C C^T.

    Attributes:
        names: Of the sites, [S].
        loss: There.
        gradient: By the gates, [S] float64.
        by_gates: A, [S, S] float64.
        gram: C C^T, [S, S] float64; its diagonal is the squared gradient of each gate's slope.
        weights: P, how many weights the branches have.
    """

    names: tuple[str, ...]
    loss: float
    gradient: Tensor
    by_gates: Tensor
    gram: Tensor
    weights: int

    @cached_property
    def gates(self) -> Eigenvalues:
        """The eigenvalues of A: the loss as a function of the gates alone."""
        return eigenvalues(self.by_gates)

    @cached_property
    def joint(self) -> Eigenvalues:
        """The 2 S eigenvalues of gates and branch weights together; all others are 0."""
        values, basis = torch.linalg.eigh(self.gram)
        root = basis @ values.clamp(min=0).sqrt().diag() @ basis.mT
        zero = torch.zeros_like(root)
        top, bottom = torch.cat((self.by_gates, root), 1), torch.cat((root, zero), 1)
        return eigenvalues(torch.cat((top, bottom)))


def zero_branch(model: nn.Module, loss: Callable[[Any], Tensor], *inputs: Any) -> ZeroBranch:
    """Differentiate a loss twice where every branch of a model has the gate 0.

    One forward pass, and a backward pass for each site. Branch weights are the parameters by which
    the loss does not change there. Parameters, their `.grad` and buffers stay as they are.

    Args:
        model: Any module, in the mode in which it shall run: batch norm in train mode works.
        loss: Maps its output to a scalar.
        inputs: What the model is called with.

    Returns:
        The derivatives, and their eigenvalues.

    Raises:
        TypeError: If model is not a module, or is compiled or scripted.
        ValueError: If it contains no residual add, or the loss is no scalar.
    """
    names = [site.name for site in trace(model, *inputs)]
    if not names:
        kind = type(model).__name__
        raise ValueError(f"zero_branch: model must contain a residual add, found none in {kind}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    dtypes = [p.dtype for p in model.parameters()]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    device = next((p.device for p in model.parameters()), None)
    gates = torch.zeros(len(names), dtype=wide, device=device, requires_grad=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), gate(model, dict(zip(names, gates.unbind(), strict=True))):
        value = loss(torch.func.functional_call(model, buffers, inputs))
        if value.dim():
            raise ValueError(f"zero_branch: loss must be a scalar, got shape {[*value.shape]}")
        first, *by_weights = torch.autograd.grad(
            value, (gates, *parameters), create_graph=True, materialize_grads=True
        )
    within = [p for p, g in zip(parameters, by_weights, strict=True) if not bool(g.any())]
    by_gates, rows = _second(first, gates, within)
    return ZeroBranch(
        tuple(names),
        float(value.detach()),
        first.detach().double().cpu(),
        (by_gates + by_gates.mT) / 2,
        _gram(rows),
        sum(p.numel() for p in within),
    )


def _second(
    first: Tensor, gates: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, list[list[Tensor | None]]]:
    """Differentiate the gradient by the gates again: by gates, [S, S], and by each weight."""
    by_gates, rows = [], []
    for slope in first.unbind():
        own, *others = torch.autograd.grad(
            slope, (gates, *weights), retain_graph=True, allow_unused=True
        )
        by_gates.append(torch.zeros_like(gates) if own is None else own)
        # a branch does not see the weights of most others: what is zero there is not kept
        rows.append([g if g is not None and bool(g.any()) else None for g in others])
    return torch.stack(by_gates).double().cpu(), rows


def _gram(rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Multiply C C^T, [S, S], from the rows of C, each in pieces of which None is zero."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[: i + 1]):
            pairs = zip(a, b, strict=True)
            both = ((x.double(), y.double()) for x, y in pairs if x is not None and y is not None)
            gram[i, j] = gram[j, i] = sum(float((x * y).sum()) for x, y in both)
    return gram
