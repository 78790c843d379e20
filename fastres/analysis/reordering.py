"""reordering: what a model loses when its blocks change places (Veit et al. 2016, section 4.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastres.analysis.lesion import Score, check_samples, wrong
from fastres.analysis.lesions import Reorderings
from fastres.gates import Gates
from fastres.progress import bar
from fastres.replaying import Replay, Unit
from fastres.sites import Site, trace
from fastres.training import evaluating
from fastres.watching import Watch


@torch.no_grad()
def reorder(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    orders: Sequence[Sequence[int]],
    *,
    score: Score = wrong,
    batch_size: int = 100,
    progress: str | None = None,
) -> Reorderings:
    """Evaluate a model with its blocks in other orders, in eval mode.

    A block moves whole, with what comes after its add; it must be a module of its own. Orders share
    what they compute before their first difference, as lesions do.

    Args:
        model: Any module that `fastres.trace` finds sites in; equal inputs must give equal outputs.
        x: Inputs, [N, ...].
        y: What the score compares with, [N, ...].
        orders: Each says which block stands at each place, by number: [sites].
        score: Outputs [B, ...] and y [B, ...] -> a value per sample, [B].
        batch_size: Samples per pass; bounds the memory, which holds the output of every module.
        progress: Label of a progress bar on stderr; None for no bar.

    Returns:
        The score of every sample under every order, and without.

    Raises:
        ValueError: If an order is none, or moves a block to a place of another shape, a projection,
            or a site that shares its module with others; if there are no samples.
    """
    check_samples("reorder", model, x, y, batch_size)
    with evaluating(model):
        sites = trace(model, x[:1])
        given = [tuple(order) for order in orders]
        for order in given:
            _check_order(order, sites)
        every = [tuple(range(len(sites))), *given]
        values = torch.empty(len(every), len(x))
        owners = {site.name.partition("[")[0] for site in sites}
        with (
            Replay(model, owners, within=False) as replay,
            bar(progress, values.numel(), unit="image") as shown,
        ):
            places = _places(model, sites, replay, x)
            _check_places(given, sites, places)
            for start in range(0, len(x), batch_size):
                part = slice(start, start + batch_size)
                replay.clear()
                last: tuple[int, ...] = ()
                for i in sorted(range(len(every)), key=every.__getitem__):
                    new = every[i]
                    same = sum(1 for _ in itertools.takewhile(bool, map(int.__eq__, last, new)))
                    if last:
                        replay.up_to(same)
                    for place, block in enumerate(new):
                        here, there = places[place], places[block]
                        if here is not None and there is not None:
                            here.source = there
                    last = new
                    values[i, part] = score(model(x[part]), y[part]).float().cpu()
                    shown.update(len(x[part]))
    return Reorderings(tuple(site.name for site in sites), tuple(given), values[0], values[1:])


def random_orders(
    sites: Sequence[Site], swaps: Sequence[int], draws: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """Draw orders by swapping pairs, `draws` for each number of swaps.

    A pair is drawn uniformly among all that may be swapped: two identity sites of one shape. How
    the paper draws its pairs it does not say; here one swap may undo another.

    Args:
        sites: As `fastres.trace` lists them.
        swaps: How many pairs are swapped, one after the other.
        draws: How many orders for each.
        seed: Of the choice.

    Raises:
        ValueError: If no two sites may be swapped, a number is negative, or draws is below 1.
    """
    allowed = [
        (i, j)
        for i, j in itertools.combinations(range(len(sites)), 2)
        if sites[i].kind == sites[j].kind == "identity" and sites[i].shape[1:] == sites[j].shape[1:]
    ]
    if not allowed:
        raise ValueError("random_orders: sites must have two identity skips of one shape, got none")
    if draws < 1 or min(swaps, default=0) < 0:
        raise ValueError(f"random_orders: draws must be >= 1, swaps >= 0, got {draws}, {swaps}")
    source, found = np.random.default_rng(seed), []
    for count in swaps:
        for _ in range(draws):
            order = list(range(len(sites)))
            for pair in source.integers(len(allowed), size=count):
                i, j = allowed[pair]
                order[i], order[j] = order[j], order[i]
            found.append(tuple(order))
    return found


def _places(
    model: nn.Module, sites: Sequence[Site], replay: Replay, x: Tensor
) -> list[Unit | None]:
    """Find the unit of each site in a first pass; None where it has none of its own."""
    policy = Gates("", {})
    with Watch("reorder", model, policy):
        replay.begin(lambda: policy.met)
        model(x[: min(len(x), 2)])
        replay.settle()
    found: list[Unit | None] = [None] * len(sites)
    for unit in replay.units:
        if unit.calls == 1 and len(unit.sites) == 1:
            found[unit.sites[0]] = unit
    return found


def _check_order(order: tuple[int, ...], sites: Sequence[Site]) -> None:
    if sorted(order) != list(range(len(sites))):
        raise ValueError(
            f"reorder: orders must have 0 to {len(sites) - 1}, the sites, once each, "
            f"got {list(order)}"
        )
    for place, block in enumerate(order):
        here, there = sites[place], sites[block]
        if place == block:
            continue
        for site in (here, there):
            if site.kind != "identity":
                raise ValueError(
                    f"reorder: orders must leave projections where they are, got {site.name!r}"
                )
        if here.shape[1:] != there.shape[1:]:
            raise ValueError(
                f"reorder: orders must swap blocks of one shape, got {there.name!r} "
                f"{[*there.shape[1:]]} in the place of {here.name!r} {[*here.shape[1:]]}"
            )


def _check_places(
    orders: Sequence[tuple[int, ...]], sites: Sequence[Site], places: Sequence[Unit | None]
) -> None:
    for order in orders:
        for place, block in enumerate(order):
            if place != block and places[place] is None:
                raise ValueError(
                    "reorder: orders must move blocks that are modules of their own, "
                    f"got {sites[place].name!r}"
                )
