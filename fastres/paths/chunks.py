"""chunks: one backward pass for several rows of cotangents, each fed by the row before it.

A row holds one cotangent for every tensor of the network. At an add the skip gets its row; the
branch gets the row before, and also its own row where that row `stays`:

    skip: G_k        branch: G_{k-1} + stays_k G_k

The row before the first one is that of the last pass, which kept what arrived at every add: cutting
the rows into chunks changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastres.paths.marks import Marks
from fastres.paths.scales import fit, largest_log2, powers

Roots = list[tuple[GradientEdge, Tensor]]  # where a pass begins, and with which cotangent


class Held(NamedTuple):
    """A row as it arrived at an add."""

    row: Tensor  # 2^exponent times the true one
    exponent: int
    log: float  # log2 of the largest magnitude of the true one


@dataclass
class Chunk:
    """The rule of one pass, and what arrives on the way.

    Attributes:
        stays: For each row, whether it passes through branches as well: [rows].
        exponents: The rows are held as 2^exponent times the true ones: [rows]. They change on the
            way; in the end they are those of what arrives at the end.
        before: site -> the row before the first, as it arrived there; zero where it did not.
        signs: What all that enters the branch of a site is multiplied by; None for 1.
        cuts: Sites through whose sum all paths go: there the exponents may change.
        limit: How many binary orders from 1 a row may be there.
        last: site -> the last row, as it arrived there; filled by the pass, in its order.
    """

    stays: Sequence[bool]
    exponents: list[int]
    before: dict[int, Held] = field(default_factory=dict)
    signs: Sequence[int] | None = None
    cuts: Collection[int] = ()
    limit: float = math.inf
    last: dict[int, Held] = field(default_factory=dict)
    # The latest cut, what was added to the exponents there, and the `log` of the last row.
    _scaled: tuple[int, list[int], float] = (-1, [], -math.inf)

    def __call__(self, site: int, branch: bool, g: Tensor) -> Tensor | None:
        """Return what enters the branch (else: the skip) of a site."""
        if len(self.stays) == 1:
            out = self._enter(site, branch, g.unsqueeze(0))
            return None if out is None else out.squeeze(0)
        # An autograd.Function with a vmap rule does the same in 30 times the time.
        functorch = torch._C._functorch
        if not functorch.is_batchedtensor(g):
            return g  # the same in all rows: a zero
        rows = functorch.get_unwrapped(g).movedim(functorch.maybe_get_bdim(g), 0)
        out = self._enter(site, branch, rows)
        assert out is not None
        return functorch._add_batch_dim(out, 0, functorch.maybe_get_level(g))

    def _enter(self, site: int, branch: bool, rows: Tensor) -> Tensor | None:
        if site in self.cuts:
            rows = self._scale(site, rows)
        if not branch:
            return rows
        at_cut, _, log = self._scaled
        if at_cut != site:
            log = largest_log2(rows[-1:])[0] - self.exponents[-1]
        # of several, a row of its own, or all stay in memory
        last = rows[-1] if len(rows) == 1 else rows[-1].clone()
        self.last[site] = Held(last, self.exponents[-1], log)
        out = self._shift(site, rows)
        return -out if out is not None and self.signs and self.signs[site] < 0 else out

    def _scale(self, site: int, rows: Tensor) -> Tensor:
        """Bring rows into range; both sides of an add alike."""
        if self._scaled[0] != site:
            logs = [log - e for log, e in zip(largest_log2(rows), self.exponents, strict=True)]
            before = self.before[site].log if site in self.before else -math.inf
            chosen = fit(self.exponents, logs, before, self.limit)
            change = [new - old for new, old in zip(chosen, self.exponents, strict=True)]
            self._scaled, self.exponents = (site, change, logs[-1]), chosen
        change = self._scaled[1]
        return rows * powers(change, rows) if any(change) else rows

    def _shift(self, site: int, rows: Tensor) -> Tensor | None:
        """Give every row what the one before it brings: [rows, ...]; None for zero."""
        e, held = self.exponents, self.before.get(site)
        first = rows[:1] if self.stays[0] else None
        if held is not None:
            brought = held.row.unsqueeze(0)
            if held.exponent != e[0]:
                brought = brought * powers([e[0] - held.exponent], brought)
            first = brought if first is None else first + brought
        if len(rows) == 1:
            return first
        out = torch.empty_like(rows)
        out[:1] = 0 if first is None else first
        steps = [new - old for new, old in zip(e[1:], e, strict=False)]
        if any(steps):
            torch.mul(rows[:-1], powers(steps, rows), out=out[1:])
        else:
            out[1:] = rows[:-1]
        for row in range(1, len(rows)):
            if self.stays[row]:
                out[row] += rows[row]
        return out


def backward(
    marks: Marks, chunk: Chunk, roots: Roots, wanted: Sequence[GradientEdge]
) -> list[Tensor | None]:
    """Run one pass.

    Args:
        marks: The marks of the model; their rule is the chunk for this pass.
        chunk: The rows.
        roots: Where the first row begins, and with which cotangents; the others begin with zero.
        wanted: What to differentiate by.

    Returns:
        [rows, ...] for each wanted; None where no row arrives.
    """
    rows = len(chunk.stays)
    marks.rule = chunk
    if not roots:
        return [None] * len(wanted)
    edges = [edge for edge, _ in roots]
    if rows == 1:
        found = gradients(edges, wanted, [start for _, start in roots])
        return [None if g is None else g.unsqueeze(0) for g in found]
    stacks = []
    for _, start in roots:
        stacks.append(start.new_zeros(rows, *start.shape))
        stacks[-1][0] = start
    arrived: list[int] = []

    def each(*starts: Tensor) -> list[Tensor]:
        found = gradients(edges, wanted, starts)
        arrived[:] = [i for i, g in enumerate(found) if g is not None]
        return [g for g in found if g is not None]

    batched: Any = torch.func.vmap(each, randomness="same")(*stacks)
    found_at = dict(zip(arrived, batched, strict=True))
    return [found_at.get(i) for i in range(len(wanted))]


def gradients(
    roots: Sequence[GradientEdge], wanted: Sequence[GradientEdge], starts: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Run one backward pass from the roots, by the rule that the marks have.

    Args:
        roots: Where it begins.
        wanted: What to differentiate by.
        starts: The cotangents that it begins with.

    Returns:
        The gradient by each wanted; None where none arrives.
    """
    try:
        return torch.autograd.grad(roots, wanted, starts, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(
                "path_gradients: the graph of the loss must not be freed before it is used, "
                "got a loss that runs backward itself"
            ) from error
        raise
