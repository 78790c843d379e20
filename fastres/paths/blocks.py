"""blocks: what goes through the branch of each block, and what arrives at its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.paths.chunks import Chunk, backward
from fastres.paths.forward import Forward
from fastres.paths.graph import branch_weights
from fastres.paths.lengths import Rows
from fastres.paths.tally import log2_norm, wide


def through_branches(forward: Forward) -> dict[str, Tensor]:
    """Measure the gradient of all paths through the branch of each site, g_l.

    One backward pass each, from the branch of the site on, with the ordinary cotangent of its sum.

    Returns:
        block_dots: <g_l, g>, [L] float64.
        block_norms: ||g_l||, [L] float64.
    """
    _, arrived = forward.ordinary()
    g = wide(forward.gradient)
    dots, norms = [], []
    for site in forward.between:
        ordinary = Chunk([True], [0])
        roots = [(forward.marks.blocks[site].branch, arrived[site])]
        (rows,) = backward(forward.marks, ordinary, roots, [forward.where])
        through = torch.zeros_like(g) if rows is None else wide(rows[0])
        dots.append((through * g).sum().item())
        norms.append(torch.linalg.vector_norm(through).item())
    return {
        "block_dots": torch.tensor(dots, dtype=torch.float64, device="cpu"),
        "block_norms": torch.tensor(norms, dtype=torch.float64, device="cpu"),
    }


class WeightNorms:
    """The norms of the gradients by the weights of each branch, length by length.

    Attributes:
        places: Where the weights are that a counted branch uses.
    """

    def __init__(self, forward: Forward) -> None:
        marks = forward.marks
        blocks = [(marks.sites[site].level, *marks.blocks[site][:2]) for site in forward.between]
        found = branch_weights(blocks, forward.where)
        self.places = [place for _, place in found]
        self._owners = [owner for owner, _ in found]
        self._blocks = len(blocks)
        self._rows: list[Tensor] = []  # log2 of the norms, [L] each

    def add(self, rows: Rows) -> None:
        """Note the next rows."""
        count = len(rows.exponents)
        shape = (count, self._blocks, len(self.places))
        logs = torch.full(shape, -torch.inf, dtype=torch.float64, device="cpu")
        for i, (owner, g) in enumerate(zip(self._owners, rows.at_weights, strict=True)):
            if g is not None:
                norms = torch.linalg.vector_norm(wide(g).reshape(count, -1), dim=1).cpu().double()
                logs[:, owner, i] = norms.log2()
        self._rows += list(log2_norm(logs))  # rows are not scaled where there are weights

    def measured(self, tail: bool) -> dict[str, Tensor]:
        """Return what all rows gave.

        A path reaches a weight through the branch that it is in: what arrives in row k comes
        from paths with k - 1 branches above it.

        Args:
            tail: Whether the last row is the tail.

        Returns:
            weight_norms: [L, K].
            weight_tails: [L].
        """
        norms = torch.stack(self._rows, dim=1).exp2()  # [L, rows]
        kept = norms[:, :-1] if tail else norms
        last = norms[:, -1] if tail else torch.zeros_like(norms[:, 0])
        return {"weight_norms": kept[:, 1:], "weight_tails": last}
