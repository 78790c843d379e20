"""What path_accumulate's kernel must give, by NumPy: cases and results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cuda_on_cpu.residual_add_reference import COLS, ELEMENTS, Array

SHAPES = [(cols, rows, samples) for cols in COLS for rows, samples in ((1, 1), (2, 3), (5, 2))]
# From 32 KiB on a line is split over blocks: here by 2 to 9, on 16-byte boundaries and not.
SHAPES += [(cols, 2, 1) for cols in (4096, 4099, 8192, 20008, 20003)]
# Lines enough to go round a grid of 5 blocks of 256 threads more than once; rows that have none.
SHAPES += [(3, 5, 300), (40, 70, 10), (256, 20, 10), (8, 3, 0)]


@dataclass(frozen=True)
class Case:
    """One shape with one choice of everything else."""

    index: int  # the dtype's in ELEMENTS, fastres::Dtype
    cols: int
    rows: int
    samples: int
    skip: bool
    before: bool
    dot: bool
    steps: bool
    tail: bool
    in_place: bool  # the new rows are written over skip
    shift: int  # elements that branch starts off a 16-byte boundary
    nan: bool


@dataclass
class Inputs:
    """The arrays of a case, as stored; None where there is none."""

    skip: Array | None  # [rows, samples, cols]
    branch: Array
    before: Array | None  # [samples, cols]
    gradient: Array | None
    steps: Array | None  # [rows] int32


def cases(seed: int = 0) -> Iterator[Case]:
    """Go through all dtypes and shapes, with the rest drawn anew for each."""
    rng = np.random.default_rng(seed)
    for index in range(len(ELEMENTS)):
        for cols, rows, samples in SHAPES:
            skip, before, dot, steps, tail, in_place, nan = (bool(b) for b in rng.random(7) < 0.6)
            shift = int(rng.random() < 0.1)
            yield Case(index, cols, rows, samples, skip, before, dot, steps, tail,
                       skip and in_place, shift, nan)  # fmt: skip


def inputs(case: Case) -> Inputs:
    """Draw the arrays of a case."""
    rng = np.random.default_rng(case.cols * 1000 + case.rows)
    element, row = ELEMENTS[case.index], (case.samples, case.cols)

    def draw(shape: tuple[int, ...], wanted: bool = True, shift: int = 0) -> Array | None:
        if not wanted:
            return None
        array = element.empty(shape, shift)
        array[:] = element.narrow(rng.standard_normal(shape).astype(element.wide))
        return array

    branch = draw((case.rows, *row), shift=case.shift)
    assert branch is not None
    if case.nan and branch.size:  # in the last row, which only a tail may read
        branch[-1, -1, -1] = element.narrow(np.array([np.nan]))[0]
    steps = rng.integers(-9, 10, case.rows).astype(np.int32)
    if case.rows > 2:
        steps[-2:] = 5000, -5000  # to the largest power, and to none
        branch[-3] = 0
    return Inputs(draw((case.rows, *row), case.skip), branch, draw(row, case.before),
                  draw(row, case.dot), steps if case.steps else None)  # fmt: skip


def reference(case: Case, given: Inputs) -> tuple[Array, Array, Array]:
    """Return the new rows, the sums in float64, and the sums of the absolute terms."""
    element = ELEMENTS[case.index]
    rows = np.zeros(given.branch.shape, element.wide)
    rows[1:] = element.widen(given.branch[:-1])
    if given.before is not None:
        rows[0] = element.widen(given.before)
    if given.steps is not None:
        most = np.finfo(element.wide).maxexp - 1
        rows *= np.ldexp(element.wide(1), np.minimum(given.steps, most))[:, None, None]
    if given.skip is not None:
        rows = element.widen(given.skip) + rows
    if case.tail:
        rows[-1] = rows[-1] + element.widen(given.branch[-1])
    wide = rows.astype(np.float64)
    terms = [wide * wide]
    if given.gradient is not None:
        terms.append(wide * element.widen(given.gradient).astype(np.float64))
    each = np.stack(terms)
    return element.narrow(rows), each.sum(3), np.abs(each).sum(3)
