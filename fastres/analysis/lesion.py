"""lesion: what a model loses when some of its blocks are deleted (Veit et al. 2016, section 4.2).

At a deleted block the skip alone goes on, y = x, or the projection where the skip is one. Lesions
are evaluated so that neighbours share the blocks before their first difference: all single
deletions of 27 blocks take less than half of 27 evaluations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastres.analysis.lesions import Lesions
from fastres.analysis.recalibrating import recalibrated
from fastres.gates import Gates
from fastres.progress import Bar, bar
from fastres.replaying import Replay
from fastres.sites import Site, trace
from fastres.training import evaluating
from fastres.watching import Watch

Score = Callable[[Tensor, Tensor], Tensor]
LesionLike = Collection[str] | Mapping[str, float]


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Score logits [B, classes] by classes y [B]: 1 where the answer is wrong, else 0."""
    return (logits.argmax(1) != y).float()


@torch.no_grad()
def delete(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    sets: Sequence[LesionLike] | None = None,
    *,
    score: Score = wrong,
    batch_size: int = 100,
    copies: int = 1,
    recalibrate: Tensor | None = None,
    progress: str | None = None,
) -> Lesions:
    """Evaluate a model with sets of its blocks deleted, in eval mode.

    Args:
        model: Any module that `fastres.trace` finds sites in; equal inputs must give equal outputs.
        x: Inputs, [N, ...].
        y: What the score compares with, [N, ...].
        sets: Sets of site names, each one lesion; a mapping gives its sites other gates than 0.
            None: each site alone.
        score: Outputs [B, ...] and y [B, ...] -> a value per sample, [B].
        batch_size: Samples per pass; bounds the memory, which holds the output of every module.
        copies: How many lesions are evaluated in one pass, by gates per sample. More than 1 is for
            models that are one fused stack, whose blocks share no prefix.
        recalibrate: Inputs [M, ...] from which batch norm takes new statistics after each lesion,
            and without one: what is lost then is information, and no mere shift of distribution.
        progress: Label of a progress bar on stderr; None for no bar.

    Returns:
        The score of every sample under every lesion, and without.

    Raises:
        ValueError: If a site is not known or is there twice, if there are no samples or x and y
            are not as many, if a number is below 1, or copies and recalibrate are both given.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> delete(model, torch.ones(1, 2), torch.ones(1))
        Traceback (most recent call last):
        ...
        ValueError: delete: model must contain a residual add, found none in Sequential
    """
    check_samples("delete", model, x, y, batch_size)
    if copies < 1:
        raise ValueError(f"delete: copies must be >= 1, got {copies}")
    if recalibrate is not None and (copies > 1 or len(recalibrate) < 2):
        got = f"{copies} copies" if copies > 1 else f"{len(recalibrate)} inputs"
        raise ValueError(f"delete: recalibrate must have 2 inputs or more and no copies, got {got}")
    with evaluating(model):
        sites = trace(model, x[:1])
        if not sites:
            kind = type(model).__name__
            raise ValueError(f"delete: model must contain a residual add, found none in {kind}")
        names = [site.name for site in sites]
        given = [(name,) for name in names] if sets is None else list(sets)
        wanted = [_vector(each, names) for each in given]
        run = _Run(model, sites, score, batch_size)
        every = [(1.0,) * len(names), *wanted]
        with bar(progress, len(every) * len(x), unit="image") as shown:
            if recalibrate is not None:
                values = run.recalibrated(x, y, every, recalibrate, shown)
            elif copies > 1:
                values = run.copied(x, y, every, copies, shown)
            else:
                values = run.shared(x, y, every, shown)
    keys = tuple(tuple(each) for each in given)
    return Lesions(tuple(names), keys, values[0], values[1:])


def pairs(sites: Sequence[str]) -> list[tuple[str, ...]]:
    """List every site alone, then every two of them: what `Lesions.interactions` needs."""
    alone = [(name,) for name in sites]
    return [*alone, *itertools.combinations(sites, 2)]


def random_sets(
    sites: Sequence[str], sizes: Sequence[int], draws: int, seed: int = 0
) -> list[tuple[str, ...]]:
    """Draw sets of sites, `draws` of each size, each uniform among all sets of its size.

    Raises:
        ValueError: If a size is not 0 to the number of sites, or draws is below 1.
    """
    if draws < 1:
        raise ValueError(f"random_sets: draws must be >= 1, got {draws}")
    source, found = np.random.default_rng(seed), []
    for size in sizes:
        if not 0 <= size <= len(sites):
            raise ValueError(f"random_sets: sizes must be 0 to {len(sites)}, the sites, got {size}")
        for _ in range(draws):
            chosen = sorted(source.choice(len(sites), size, replace=False).tolist())
            found.append(tuple(sites[i] for i in chosen))
    return found


class _Run:
    """Evaluates lesions, given as a gate per site."""

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], score: Score, batch_size: int
    ) -> None:
        self._model, self._score, self._batch_size = model, score, batch_size
        self._names = [site.name for site in sites]
        self._owners = {name.partition("[")[0] for name in self._names}
        self._gates: Mapping[str, float | Tensor] = {}

    def _watch(self) -> tuple[Watch, Gates]:
        policy = Gates(type(self._model).__name__, lambda _: self._gates)
        return Watch("delete", self._model, policy), policy

    def _parts(self, x: Tensor) -> Iterator[slice]:
        for start in range(0, len(x), self._batch_size):
            yield slice(start, min(start + self._batch_size, len(x)))

    def shared(
        self, x: Tensor, y: Tensor, every: Sequence[tuple[float, ...]], shown: Bar
    ) -> Tensor:
        """Evaluate lesions in an order in which neighbours share most: [lesions, N]."""
        values = torch.empty(len(every), len(x))
        order = sorted(range(len(every)), key=lambda i: [-gate for gate in every[i]])
        watch, policy = self._watch()
        with watch, Replay(self._model, self._owners) as replay:
            replay.begin(lambda: policy.met)
            self._model(x[: min(len(x), 2)])
            replay.settle()
            for part in self._parts(x):
                replay.clear()
                last: tuple[float, ...] = ()
                for i in order:
                    new = every[i]
                    same = sum(1 for _ in itertools.takewhile(bool, map(float.__eq__, last, new)))
                    watch.replayed = replay.up_to(same) if last else frozenset()
                    self._gates, last = dict(zip(self._names, new, strict=True)), new
                    values[i, part] = self._score(self._model(x[part]), y[part]).float().cpu()
                    shown.update(part.stop - part.start)
        return values

    def copied(
        self, x: Tensor, y: Tensor, every: Sequence[tuple[float, ...]], copies: int, shown: Bar
    ) -> Tensor:
        """Evaluate several lesions in one pass, by gates per sample: [lesions, N]."""
        values = torch.empty(len(every), len(x))
        watch, _ = self._watch()
        with watch:
            for part in self._parts(x):
                for start in range(0, len(every), copies):
                    chosen = torch.tensor(every[start : start + copies], device=x.device)
                    count, size = len(chosen), part.stop - part.start
                    gates = chosen.repeat_interleave(size, 0).T.contiguous()  # [sites, copies * B]
                    self._gates = dict(zip(self._names, gates, strict=True))
                    out = self._model(torch.cat([x[part]] * count))
                    found = self._score(out, torch.cat([y[part]] * count)).float().cpu()
                    values[start : start + count, part] = found.view(count, size)
                    shown.update(count * size)
        return values

    def recalibrated(
        self, x: Tensor, y: Tensor, every: Sequence[tuple[float, ...]], by: Tensor, shown: Bar
    ) -> Tensor:
        """Evaluate each lesion with statistics of its own: [lesions, N]."""
        values = torch.empty(len(every), len(x))
        watch, _ = self._watch()
        with watch:
            for i, gates in enumerate(every):
                self._gates = dict(zip(self._names, gates, strict=True))
                with recalibrated(self._model, by, self._batch_size):
                    for part in self._parts(x):
                        values[i, part] = self._score(self._model(x[part]), y[part]).float().cpu()
                        shown.update(part.stop - part.start)
        return values


def _vector(lesion: LesionLike, names: Sequence[str]) -> tuple[float, ...]:
    """Return the gate of every site, 1 where it is left as it is."""
    if isinstance(lesion, str):
        raise ValueError(f"delete: sets must be sets of site names, got the name {lesion!r}")
    gates = {name: float(lesion[name]) if isinstance(lesion, Mapping) else 0.0 for name in lesion}
    if len(gates) < len(lesion):
        raise ValueError(f"delete: sets must have each site once, got {tuple(lesion)}")
    for name in gates:
        if name not in names:
            known = ", ".join(names[:3])
            raise ValueError(
                f"delete: sets must name sites of the model, such as {known}, got {name!r}"
            )
    return tuple(gates.get(name, 1.0) for name in names)


def check_samples(op: str, model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> None:
    """Raise the error that names the argument, if there is nothing to evaluate."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"{op}: x and y must be as many, at least 1, got {len(x)}, {len(y)}")
    if batch_size < 1:
        raise ValueError(f"{op}: batch_size must be >= 1, got {batch_size}")
