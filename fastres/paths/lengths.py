"""lengths: the gradients of all path lengths, row by row in chunks of backward passes.

With the activations fixed, block l sends a cotangent back by S_l^T on its skip and by J_l^T on its
branch. Over all blocks from the last to the first (Veit et al. 2016, arXiv 1605.06431, unravelled)

    G_k <- S^T G_k + J^T G_{k-1}        R <- S^T R + J^T (R + G_K)

G_k is in the end the gradient summed over all paths of k branches, R over all longer than K.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastres.paths.chunks import Chunk, Held, Roots, backward
from fastres.paths.forward import Forward
from fastres.paths.graph import size_of


@dataclass
class Rows:
    """Some rows, as they arrive at what is differentiated by."""

    first: int  # number of the first of them
    exponents: list[int]  # [rows]: what is held is 2^exponent times the true row
    at_where: Tensor | None  # [rows, B, ...]; None: all zero
    at_weights: list[Tensor | None]  # [rows, ...] each


@dataclass
class Walk:
    """How all rows of one kind are computed.

    Attributes:
        forward: The pass that is differentiated.
        stays: For each row, whether it passes through branches as well as skips.
        chunk: How many rows go at once; falls to 1 where an operator cannot take more.
        signs: site -> sign of its branch; None for 1.
        weights: What else to differentiate by. Where there are any, rows are not scaled: one
            weight may be used in blocks that are scaled differently.
        step: Called after each chunk with its number of rows.
    """

    forward: Forward
    stays: Sequence[bool]
    chunk: int
    signs: Sequence[int] | None = None
    weights: Sequence[GradientEdge] = ()
    step: Callable[[int], object] = lambda rows: None

    def __iter__(self) -> Iterator[Rows]:
        """Yield the rows in order."""
        blocks = self.forward.marks.blocks
        cuts = () if self.weights else self.forward.cuts
        roots, before, exponent = self.forward.roots, dict[int, Held](), 0
        first = 0
        while first < len(self.stays):
            part, found = self._pass(first, roots, before, exponent, cuts)
            yield Rows(first, part.exponents, found[0], found[1:])
            self.step(len(part.stays))
            first += len(part.stays)
            # The next row begins where this one first arrived with more than zero. What comes after
            # a cut is reached from there.
            before = {site: held for site, held in part.last.items() if held.log != -math.inf}
            roots = []
            for site, held in before.items():
                roots.append((blocks[site].total, torch.zeros_like(held.row)))
                if site in self.forward.cuts:
                    break
            exponent = next((held.exponent for held in before.values()), 0)

    def _pass(
        self,
        first: int,
        roots: Roots,
        before: dict[int, Held],
        exponent: int,
        cuts: Collection[int],
    ) -> tuple[Chunk, list[Tensor | None]]:
        """Compute the rows from `first` on, of which the first one begins at the roots."""
        stays = self.stays[first : first + self.chunk]
        limit = self.forward.marks.range / 3
        chunk = Chunk(stays, [exponent] * len(stays), before, self.signs, cuts, limit)
        wanted = [self.forward.where, *self.weights]
        try:
            return chunk, backward(self.forward.marks, chunk, roots, wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of whatever kind: alone it comes again if it is not of vmap
            if len(stays) == 1:
                raise
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"path_gradients: lengths are computed one at a time, not {self.chunk}: {reason}",
                stacklevel=5,
            )
            self.chunk = 1
            return self._pass(first, roots, before, exponent, cuts)


# Bytes of all rows of the largest sum. Two Xeon cores: 300 blocks of width 64 take 7.3 s at one row
# of 4 KB, 1.9 s at 16, 2.3 s at 64, 7.4 s at 301 (no triangle). A GPU wants more to be full.
_FULL: Final = {"cpu": 1 << 17}
_FULL_OTHER: Final = 1 << 25
_MEMORY: Final = 1 << 30  # for the cotangents of a chunk: some of the largest sum, and weights


def best_chunk(forward: Forward, rows: int, weights: Sequence[GradientEdge] = ()) -> int:
    """Choose how many rows to compute at once.

    Rows together save calls, rows apart save work: a later pass leaves out the blocks above which
    no path is that long, and batch norm has a kernel of its own only for one row.
    """
    size = max(1, forward.marks.largest)
    full = _FULL.get(forward.gradient.device.type, _FULL_OTHER)
    fits = _MEMORY // (8 * size + sum(map(size_of, weights)))
    return max(1, min(rows, full // size, fits))
