"""li_pieces: what the study of Li et al. 2016 does, piece by piece, and with what options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fastres.studies.li_data import Task
from fastres.studies.li_nets import (
    BENT,
    NETS,
    build,
    descend,
    look,
    loss_of,
    start,
    weight_norm,
)
from fastres.studies.li_report import Row, best, finite

LOOKS: Final = 24  # moments of the training at which there is a Hessian


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    data_root: str | None = None
    depths: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 100)  # matrices
    relu_depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    hessian_depths: tuple[int, ...] = (2, 4, 8, 12, 16)  # at the start
    course_depths: tuple[int, ...] = (4, 8)  # on the way
    epochs: int = 1000
    rates: int = 13  # from 10^-3 to 10, on a log grid
    seeds: int = 2
    samples: int = 300  # of the networks with relu; linear ones take all 10000
    out: Path = Path("fastres-li")
    fresh: bool = False  # do not take over parts that an earlier run has finished

    def __post_init__(self) -> None:
        for name in ("depths", "relu_depths", "hessian_depths", "course_depths"):
            values = getattr(self, name)
            if not values or any(v < 2 or v % 2 for v in values):
                raise ValueError(f"li: {name} must be even, 2 or more, got {list(values)}")
        for name, low, high in (
            ("epochs", 1, 1_000_000),
            ("rates", 2, 1000),
            ("seeds", 1, 1000),
            ("samples", 11, 10_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"li: {name} must be {low} to {high}, got {value}")

    @property
    def grid(self) -> list[float]:
        """The learning rates."""
        return [float(f"{rate:.3g}") for rate in np.geomspace(1e-3, 10, self.rates)]


@dataclass(frozen=True)
class Study:
    """What the networks learn."""

    tasks: dict[str, Task]
    least: dict[str, float]  # the loss of the best linear map
    checksum: str


@dataclass(frozen=True)
class Piece:
    """What becomes one part: networks of one kind and depth."""

    kind: str
    task: str
    net: str
    depth: int

    @property
    def name(self) -> str:
        """Names the part in report.json."""
        return f"{self.kind}, {self.task}, {self.net}, {self.depth}"

    def rows(self, study: Study, options: Options, known: list[Row]) -> Iterator[Row]:
        """Do it; `known` has the rows of all parts before."""
        if self.kind == "initial":
            yield from self._initial(study, options)
        elif self.kind == "final":
            yield from self._final(study, options)
        else:
            yield from self._course(study, options, known)

    def _row(self, depth: int, seed: int) -> Row:
        return Row(kind=self.kind, task=self.task, net=self.net, depth=depth, seed=seed)

    def _initial(self, study: Study, options: Options) -> Iterator[Row]:
        """Look at networks as they start."""
        network = build(self.net, self.depth, 10, self.task == "relu")
        loss = loss_of(network, study.tasks[self.task])
        for seed in range(options.seeds):
            yield self._look(network.depth, seed, loss, start(network, seed), study)

    def _final(self, study: Study, options: Options) -> Iterator[Row]:
        """Train all seeds with all rates at once."""
        chosen = study.tasks[self.task]
        network = build(self.net, self.depth, 10, self.task == "relu")
        first = torch.stack([start(network, seed) for seed in range(options.seeds)])
        rates = torch.tensor(options.grid, dtype=chosen.x.dtype)
        weights = first.to(chosen.x.dtype).repeat(len(rates), *[1] * (first.dim() - 1))
        each = rates.repeat_interleave(options.seeds)
        course = descend(loss_of(network, chosen), weights, each, options.epochs)
        norms, least = weight_norm(course.weights), study.least[self.task]
        for i, value in enumerate(course.loss.tolist()):
            excess = value if self.task == "linear" else value - least
            yield replace(
                self._row(network.depth, i % options.seeds),
                rate=options.grid[i // options.seeds],
                epoch=options.epochs,
                loss=finite(excess + least),
                excess=finite(excess),
                weight_norm=finite(float(norms[i])),
            )

    def _course(self, study: Study, options: Options, known: list[Row]) -> Iterator[Row]:
        """Train once more at the best rate, and look at the network on its way."""
        chosen = study.tasks[self.task]
        network = build(self.net, self.depth, 10, self.task == "relu")
        found = best(known, self.task, self.net, network.depth)
        if found is None:
            return
        loss = loss_of(network, Task(chosen.x.double(), chosen.y.double()))
        keep = {0, *np.round(np.geomspace(1, options.epochs, LOOKS)).astype(int).tolist()}
        rates = torch.tensor([found.rate], dtype=torch.float64)
        course = descend(loss, start(network, 0)[None], rates, options.epochs, keep)
        for epoch, weights in course.kept.items():
            row = self._look(network.depth, 0, loss, weights[0], study)
            yield replace(row, rate=found.rate, epoch=epoch)

    def _look(
        self, depth: int, seed: int, loss: Callable[[Tensor], Tensor], at: Tensor, study: Study
    ) -> Row:
        """Measure one network; the Hessian is that of float64."""
        shape, least = look(loss, at), study.least[self.task]
        excess = shape.loss if self.task == "linear" else shape.loss - least
        values = shape.eigenvalues
        return replace(
            self._row(depth, seed),
            loss=finite(excess + least),
            excess=finite(excess),
            gradient_norm=shape.gradient_norm,
            weight_norm=float(weight_norm(at)),
            largest=values.largest,
            tenth=values.tenth,
            condition_tenth=finite(values.condition_tenth),
            condition=finite(values.condition),
            index=values.index,
        )


def pieces(options: Options) -> list[Piece]:
    """List the parts, those first that others need."""
    trained = sorted({*options.depths, *options.course_depths})
    bent = sorted({*options.relu_depths, min(options.course_depths)})
    plan = (
        ("initial", "linear", options.hessian_depths, tuple(NETS)),
        ("final", "linear", trained, tuple(NETS)),
        ("final", "relu", bent, BENT),
        ("course", "linear", options.course_depths, tuple(NETS)),
        ("course", "relu", (min(options.course_depths),), BENT),
    )
    found: dict[
        tuple[str, str, str, int], Piece
    ] = {}  # depths that are no whole number of units may come to the same network
    for kind, chosen, depths, nets in plan:
        for depth, net in itertools.product(depths, nets):
            real = build(net, depth, 10, chosen == "relu").depth
            found.setdefault((kind, chosen, net, real), Piece(kind, chosen, net, real))
    return list(found.values())
