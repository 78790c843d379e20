"""methods: the four ways to look at the path lengths of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastres.paths.blocks import WeightNorms, through_branches
from fastres.paths.checks import check_sum
from fastres.paths.forward import Forward
from fastres.paths.lengths import Walk, best_chunk
from fastres.paths.samples import path_energy, random_signs, sampled_norms
from fastres.paths.tally import Tally, log2_norm, scaled, wide
from fastres.progress import bar

Measured = tuple[dict[str, Tensor], float]  # by name, and ||sum - g|| / ||g||


@dataclass(frozen=True)
class Task:
    """What is to be measured.

    Attributes:
        forward: The pass, with its graph.
        longest: K, the longest length that is kept apart.
        counts: The number of paths of each length, all of them.
        chunk: Rows per backward pass; None chooses.
        blocks: Whether to look at each block too.
        draws: Random draws.
        seed: Of the draws.
        keep: Whether to keep the G_k.
        progress: Label of the progress bar; None for none.
    """

    forward: Forward
    longest: int
    counts: list[int]
    chunk: int | None
    blocks: bool
    draws: int
    seed: int
    keep: bool
    progress: str | None

    @property
    def has_tail(self) -> bool:
        """Whether there are longer paths than those kept apart."""
        return self.longest < len(self.counts) - 1

    def walk(self, stays: list[bool], weights: Sequence[GradientEdge]) -> Walk:
        """Prepare the computation of rows."""
        chunk = self.chunk or best_chunk(self.forward, len(stays), weights)
        return Walk(self.forward, stays, chunk, weights=weights)

    def lengths(self, weights: Sequence[GradientEdge]) -> Walk:
        """Prepare that of all lengths up to K, and of the tail."""
        return self.walk([False] * (self.longest + 1) + [True] * self.has_tail, weights)


def exact(task: Task) -> Measured:
    """Compute every G_k and the tail."""
    tally = Tally(task.forward.gradient, task.keep)
    inside = WeightNorms(task.forward) if task.blocks else None
    walk = task.lengths(inside.places if inside else [])
    tail = torch.zeros_like(task.forward.gradient)
    with bar(task.progress, len(walk.stays), unit="length") as shown:
        walk.step = shown.update
        for rows in walk:
            tally.add_rows(rows.at_where, rows.exponents)
            if inside:
                inside.add(rows)
    if task.has_tail and rows.at_where is not None:
        tail = scaled(rows.at_where[-1], -rows.exponents[-1])
    logs, dots = torch.stack(tally.logs), torch.stack(tally.dots)
    check_sum(task.forward, tally.error(), log2_norm(logs).exp2(), walk.chunk)
    if not task.has_tail:  # a row of nothing stands for it
        logs = torch.cat([logs, torch.full_like(logs[:1], -torch.inf)])
        dots = torch.cat([dots, torch.zeros_like(dots[:1])])
    measured = {"logs": logs, "dots": dots, "tail": tail}
    if task.keep:
        measured["gradients"] = torch.stack(tally.rows[: task.longest + 1])
    if inside:
        measured |= inside.measured(task.has_tail) | through_branches(task.forward)
    return measured, tally.error()


def moments(task: Task) -> Measured:
    """Compute mean and variance of the length, weighed by the shares.

    With t times the branch on every branch the gradient is G(t) = sum_k t^k G_k. Its expansion
    around 1 needs three rows, A_j = sum_k binom(k, j) G_k, where A_0 = g, so that <A_1, g> is the
    mean of k times <g, g>, and 2 <A_2, g> that of k (k - 1): the factorial moments.
    """
    walk = task.walk([True] * 3, [])
    g = wide(task.forward.gradient)
    sums = []
    for rows in walk:
        for i, exponent in enumerate(rows.exponents):
            row = torch.zeros_like(g) if rows.at_where is None else wide(rows.at_where[i])
            sums.append(scaled(row, -exponent))
    square = (g * g).sum()
    mean, second = ((row * g).sum() / square for row in sums[1:])
    variance = 2 * second + mean - mean.square()
    error = (torch.linalg.vector_norm(sums[0] - g) / square.sqrt()).nan_to_num(0).item()
    check_sum(task.forward, error, square.sqrt().reshape(1).cpu(), walk.chunk)
    return {"moments": torch.stack([mean, variance]).cpu().double()}, error


def energy(task: Task) -> Measured:
    """Estimate the energy of the single paths of each length."""
    walk = task.lengths([])
    signs = random_signs(len(task.forward.marks.sites), task.draws, task.seed)
    with bar(task.progress, len(walk.stays) * task.draws, unit="length") as shown:
        walk.step = shown.update
        mean, error, miss, norms = path_energy(walk, signs)
    check_sum(task.forward, miss, norms, walk.chunk)
    none = torch.zeros(0 if task.has_tail else 1, dtype=torch.float64, device="cpu")
    return {"energy": torch.cat([mean, none]), "energy_error": torch.cat([error, none])}, miss


def sampled(task: Task) -> Measured:
    """Measure random single paths of each length."""
    kept = task.counts[: task.longest + 1]
    with bar(task.progress, len(kept) * task.draws, unit="path") as shown:
        mean, error = sampled_norms(task.forward, kept, task.draws, task.seed, shown.update)
    return {"mean_norm": mean, "mean_norm_error": error}, float("nan")


METHODS: Final[dict[str, Callable[[Task], Measured]]] = {
    "exact": exact,
    "moments": moments,
    "energy": energy,
    "sampled": sampled,
}
