"""What batch_norm_residual's kernels must give, by NumPy: cases and both passes, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda_on_cpu.residual_add_reference import ELEMENTS, Array

EPS = 1e-3
# rows, channels, places: lanes of 8 to 256, some of them idle; samples split over blocks or not
SHAPES = [(1, 1, 2), (3, 2, 1), (2, 3, 7), (5, 8, 16), (4, 17, 9), (1, 5, 300), (2, 40, 33),
          (3, 300, 5), (33, 3, 4), (2, 2, 1100), (2, 264, 7), (2, 2, 2056), (0, 3, 4),
          (2, 3, 0)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One shape with one choice of everything else."""

    index: int  # the dtype's in ELEMENTS, fastres::Dtype
    rows: int
    channels: int
    places: int
    pixels: bool
    gate: str  # "none", "scalar", "rows"
    skip: bool
    affine: bool
    relu: bool
    training: bool
    wants_affine: bool
    wants_gate: bool
    narrow: bool

    @property
    def is_narrow(self) -> bool:
        """Whether weight, bias and statistics are of the dtype of x, not of the wide one."""
        return self.narrow and not self.training


def cases(seed: int = 0) -> Iterator[Case]:
    """Go through all dtypes, shapes and layouts, with the rest drawn anew for each."""
    rng = np.random.default_rng(seed)
    for index in range(len(ELEMENTS)):
        for rows, channels, places in SHAPES:
            for pixels in (False, True):
                gate = rng.choice(["none", "scalar", "rows"])
                flags = (bool(flag) for flag in rng.random(7) < 0.5)
                yield Case(index, rows, channels, places, pixels, str(gate), *flags)


@dataclass
class Inputs:
    """What a case is run on; x, f and gy are [rows, C, S] stored elements, however they lie.

    Without a skip x is 0.
    """

    x: Array
    f: Array
    gy: Array
    weight: Array | None
    bias: Array | None
    mean: Array
    var: Array
    gate: Array | None


def inputs_of(case: Case) -> Inputs:
    """Draw the inputs of a case; the same for every order of the threads."""
    rng = np.random.default_rng([case.index, case.rows, case.channels, case.places])
    element, shape = ELEMENTS[case.index], (case.rows, case.channels, case.places)
    wide: Any = element.wide
    x, f, gy = (element.narrow(rng.standard_normal(shape).astype(wide)) for _ in range(3))
    if not case.skip:
        x = np.zeros_like(x)
    if (
        case.pixels and element.name == "float32"
    ):  # far from 0, where rounding takes much of the mean
        f = f / 64 + wide(50)
    weight, bias, mean, var = (rng.random(case.channels).astype(wide) + 0.5 for _ in range(4))
    if case.is_narrow:
        weight, bias, mean, var = (
            element.widen(element.narrow(t)) for t in (weight, bias, mean, var)
        )
    gates = {"none": None, "scalar": rng.standard_normal(1), "rows": rng.standard_normal(case.rows)}
    gate = gates[case.gate]
    given = (weight, bias) if case.affine else (None, None)
    return Inputs(x, f, gy, *given, mean, var, None if gate is None else gate.astype(wide))


def column(values: Array | None, otherwise: float) -> Array:
    """View values of channels so that they scale [rows, C, S]."""
    return np.full((1, 1), otherwise) if values is None else values.astype(np.float64)[:, None]


def exact_forward(case: Case, given: Inputs) -> dict[str, Array]:
    """Return y before the ReLU, p, sums, mean, var and what the backward pass needs of them."""
    element = ELEMENTS[case.index]
    x, f = (element.widen(t).astype(np.float64) for t in (given.x, given.f))
    count = max(case.rows * case.places, 1)
    mean, var = given.mean.astype(np.float64), given.var.astype(np.float64)
    if case.training:
        mean = f.sum((0, 2)) / count
        var = ((f - mean[:, None]) ** 2).sum((0, 2)) / count
    root = np.sqrt(var + EPS)
    center = f - mean[:, None]
    n = center * column(given.weight, 1) / root[:, None] + column(given.bias, 0)
    gate = np.ones(1) if given.gate is None else given.gate.astype(np.float64)
    p = gate[:, None, None] * n
    sums = np.stack([(x * x).sum((1, 2)), (p * p).sum((1, 2)), (x * p).sum((1, 2))])
    scale = np.stack([sums[0], sums[1], np.abs(x * p).sum((1, 2))])
    return {"y": x + p, "p": p, "sums": sums, "scale": scale, "mean": mean, "var": var,
            "root": root, "center": center, "n": n, "gate": gate[:, None, None]}  # fmt: skip


def exact_backward(
    case: Case, given: Inputs, keep: Array, forward: dict[str, Array]
) -> dict[str, Array]:
    """Return gx, gf, gweight, gbias and ggate; keep [rows, C, S] is where the ReLU is open."""
    count = max(case.rows * case.places, 1)
    g = np.where(keep, ELEMENTS[case.index].widen(given.gy).astype(np.float64), 0)
    gated, center, root = g * forward["gate"], forward["center"], forward["root"]
    of_g, of_f = gated.sum((0, 2)), (gated * center).sum((0, 2))
    gf = gated
    if case.training:
        gf = gated - of_g[:, None] / count - center * (of_f / (count * root**2))[:, None]
    gf = gf * column(given.weight, 1) / root[:, None]
    ggate = (g * forward["n"]).sum((1, 2))
    return {"gx": g, "gf": gf, "gweight": of_f / root, "gbias": of_g, "ggate": ggate}
