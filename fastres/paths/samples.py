"""samples: what single paths carry, by random signs (all paths at once) or one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastres.paths.chunks import gradients
from fastres.paths.counts import PathSampler
from fastres.paths.forward import Forward
from fastres.paths.lengths import Walk
from fastres.paths.tally import Tally, log2_norm, wide


def random_signs(sites: int, draws: int, seed: int) -> list[list[int]]:
    """Draw a sign for each site: [draws, sites]."""
    source = random.Random(seed)
    return [[source.choice((-1, 1)) for _ in range(sites)] for _ in range(draws)]


def path_energy(walk: Walk, signs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, float, Tensor]:
    """Estimate sum over the paths of a row of ||g_path||^2, for all rows.

    With independent signs s_l = +-1 on the branches the gradient of the paths of length k becomes
    sum_path s_path g_path, whose squared norm has the mean sum_path ||g_path||^2: the signs of two
    different paths are independent, so the products between them vanish.

    Args:
        walk: How the rows are computed.
        signs: [draws, sites].

    Returns:
        Mean and its standard error, [rows] float64 each; and by how much the rows of the first
        draw missed its ordinary gradient, with their norms [rows].
    """
    squares, misses = [], []
    for walk.signs in signs:
        gradient, _ = walk.forward.ordinary(signs=walk.signs)
        tally = Tally(walk.forward.gradient if gradient is None else gradient)
        for rows in walk:
            tally.add_rows(rows.at_where, rows.exponents)
        squares.append((2 * log2_norm(torch.stack(tally.logs))).exp2())
        misses.append(tally.error())
    return *_mean(torch.stack(squares)), misses[0], squares[0].sqrt()


class _OnePath:
    """The rule of a single path: at each site through the branch, or through the skip."""

    def __init__(self, taken: set[int]) -> None:
        self.taken = taken

    def __call__(self, site: int, branch: bool, g: Tensor) -> Tensor | None:
        """Let the cotangent into that side only."""
        return g if branch == (site in self.taken) else None


def sampled_norms(
    forward: Forward,
    counts: Sequence[int],
    draws: int,
    seed: int,
    step: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Measure the norm of the gradient of random single paths (Veit et al. 2016, section 5).

    One backward pass each, through the branch at the sites of the path and through the skip at all
    others. It runs alone, because it leaves out all that the path does not touch.

    Args:
        forward: The pass, with marks on both sides.
        counts: How many paths there are of each length, [lengths]; those of none are 0.
        draws: Paths per length, drawn with repetition.
        seed: Of the drawing.
        step: Called after each path, with 1.

    Returns:
        Mean norm over the paths and its standard error, [lengths] float64 each.
    """
    sampler = PathSampler(forward.choices, seed)
    norms = torch.zeros(draws, len(counts), dtype=torch.float64, device="cpu")
    for length, count in enumerate(counts):
        for draw in range(draws if count else 0):
            forward.marks.rule = _OnePath(sampler.draw(length))
            edges, starts = zip(*forward.roots, strict=True)
            (row,) = gradients(edges, [forward.where], starts)
            if row is not None:
                norms[draw, length] = torch.linalg.vector_norm(wide(row)).item()
            step(1)
    return _mean(norms)


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over dim 0; the error of one value is nan."""
    count = values.size(0)
    spread = values.std(0) if count > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), spread / math.sqrt(count)
