"""marks: the policy that marks the branches of a model, to change cotangents there.

A mark is the identity in the forward pass. In the backward pass it hands the cotangent that arrives
at its add to a rule, and sends on what the rule returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastres.adds import Add
from fastres.paths.graph import fork
from fastres.sites import Site

Loss = Callable[[Any], Tensor]


class Rule(Protocol):
    """What is done with the cotangents that arrive at the adds."""

    def __call__(self, site: int, branch: bool, g: Tensor) -> Tensor | None:
        """Return what goes on into the branch (else: into the skip) of a site; None for zero."""


class Block(NamedTuple):
    """Where a site is in the autograd graph."""

    skip: GradientEdge | None  # below its mark; None where it needs no gradient
    branch: GradientEdge  # below its mark
    total: GradientEdge  # their sum


class _Mark(torch.autograd.Function):
    """The identity, whose backward asks a rule."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, marks: Marks, site: int, branch: bool, dirty: bool) -> Tensor:
        ctx.at = marks, site, branch
        ctx.set_materialize_grads(False)
        if dirty:
            ctx.mark_dirty(t)
            return t
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        marks, site, branch = ctx.at
        if g is not None and site in marks.chosen:
            g = marks.rule(site, branch, g)
        return g, None, None, None, None


class Marks:
    """Policy: marks both sides of every site.

    Args:
        model: Name of the model, for errors.
    """

    def __init__(self, model: str) -> None:
        self.sites: list[Site] = []
        self.blocks: dict[int, Block] = {}  # site -> where it is
        self.largest = 0  # bytes of the largest sum
        self.dtypes: set[torch.dtype] = set()  # of the branches
        self.chosen: set[int] = set()  # sites at which the rule is asked
        self.rule: Rule = _pass_on
        self._model = model

    def at(self, site: int, call: Add, skip: int) -> Any:
        """Run the add of a site on marked sides (called by Watch)."""
        sides = call.operands
        branch = sides[1 - skip]
        if not torch.is_grad_enabled() or not branch.requires_grad:
            return call.call()
        edges = [get_gradient_edge(t) if t.requires_grad else None for t in sides]
        below = edges[1 - skip]
        assert below is not None
        self.largest = max(self.largest, branch.nbytes)
        self.dtypes.add(branch.dtype)
        call = self._mark(call, site, 1 - skip, True)
        if sides[skip].requires_grad:
            call = self._mark(call, site, skip, False)
        out = call.call()
        total = out if isinstance(out, Tensor) else out[0]  # `residual_add` also returns its sums
        self.blocks[site] = Block(edges[skip], below, get_gradient_edge(total))
        return out

    def _mark(self, call: Add, site: int, side: int, branch: bool) -> Add:
        # `f += x` changes f itself: there the mark must be put on f, and not on a view of it
        dirty = call.writes(side)
        t = call.operands[side]
        marked: Tensor = _Mark.apply(t, self, site, branch, dirty)  # type: ignore[no-untyped-call]
        return call if dirty else call.replaced(side, marked)

    def passed(self, sites: list[Site]) -> None:
        """Learn which sites there were (called by Watch)."""
        if not sites:
            raise ValueError(
                f"path_gradients: model must contain a residual add, found none in {self._model}"
            )
        self.sites = list(sites)

    def failed(self) -> None:
        """Forget the pass under way: it ended with an exception (called by Watch)."""
        self.clear()

    def stream(self, site: int) -> GradientEdge:
        """Return where the stream enters the block of a site."""
        block = self.blocks.get(site)
        found = fork(block.skip, block.branch) if block and block.skip is not None else None
        if found is None:
            name = self.sites[site].name
            raise ValueError(
                "path_gradients: where must be a site whose two sides come from one tensor "
                f"with a gradient, got {name!r}"
            )
        return found

    @property
    def range(self) -> int:
        """Binary orders on either side of 1 that all the sums hold."""
        least = max(torch.finfo(dtype).smallest_normal for dtype in self.dtypes or {torch.float32})
        return -math.frexp(least)[1]

    def clear(self) -> None:
        """Let go of the graph, which holds the marks that hold this."""
        self.blocks, self.rule = {}, _pass_on


def _pass_on(site: int, branch: bool, g: Tensor) -> Tensor | None:
    return g
