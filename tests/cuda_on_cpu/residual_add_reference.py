"""What residual_add's kernels must give, by NumPy: element types, cases and both passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

COLS = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 255, 256, 257, 512, 1000]
ROWS = [0, 1, 2, 3, 7, 33]
# From 32 KiB on a row is split over blocks: here by 2 to 9, on 16-byte boundaries and not.
WIDE = [(cols, rows) for cols in (4096, 4099, 8192, 20008, 20003) for rows in (1, 3)]
SHAPES = [(cols, rows) for cols in COLS for rows in ROWS] + WIDE
# Rows enough for each lane count to go round a grid of 5 blocks of 256 threads more than once.
SHAPES += [(3, 1500), (8, 3000), (40, 700), (256, 200)]


@dataclass(frozen=True)
class Element:
    """An element type, its accumulate type, and the largest relative error of rounding to each."""

    name: str
    stored: type  # uint16 holds bfloat16
    wide: type
    unit: float
    wide_unit: float

    def widen(self, stored: Array) -> Array:
        """Return stored elements in the accumulate type."""
        if self.name == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(self.wide)

    def narrow(self, wide: Array) -> Array:
        """Round to the element type, to the nearest, ties to even."""
        if self.name != "bfloat16":
            return wide.astype(self.stored)
        bits = np.ascontiguousarray(wide, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)

    def empty(self, shape: tuple[int, ...], shift: int = 0) -> Array:
        """Allocate NaN in exactly the bytes of shape, `shift` elements off a 16-byte boundary."""
        size = int(np.prod(shape))
        array = np.empty(size + shift, self.stored)
        array.view(np.uint8)[:] = 0xFF
        assert array.ctypes.data % 16 == 0
        return array[shift:].reshape(shape)


ELEMENTS = [
    Element("float64", np.float64, np.float64, 2**-53, 2**-53),
    Element("float32", np.float32, np.float32, 2**-24, 2**-24),
    Element("bfloat16", np.uint16, np.float32, 2**-8, 2**-24),
    Element("float16", np.float16, np.float32, 2**-11, 2**-24),
]


@dataclass(frozen=True)
class Case:
    """One shape with one choice of everything else."""

    index: int  # the dtype's in ELEMENTS, fastres::Dtype
    cols: int
    rows: int
    gate: str  # "none", "scalar", "rows"
    relu: bool
    mask: bool
    alias: str  # "none", "x", "f"
    shift: int  # elements that x starts off a 16-byte boundary
    nan: bool
    has_gy: bool
    gs: bool
    wants_gx: bool
    wants_gf: bool
    wants_ggate: bool


def cases(seed: int = 0, shapes: list[tuple[int, int]] = SHAPES) -> Iterator[Case]:
    """Go through all dtypes and shapes, with the rest drawn anew for each."""
    rng = np.random.default_rng(seed)
    for index in range(len(ELEMENTS)):
        for cols, rows in shapes:
            gate = rng.choice(["none", "scalar", "rows"], p=[0.4, 0.2, 0.4])
            relu, mask, nan, gs, wants_gx, wants_gf, wants_ggate = rng.random(7) < 0.5
            alias, shift = rng.choice(["none", "x", "f"]), int(rng.random() < 0.1)
            has_gy = rng.random() < 0.9
            yield Case(index, cols, rows, gate, relu, relu and mask, alias, shift, nan, has_gy, gs,
                       wants_gx, wants_gf, wants_ggate)  # fmt: skip


def make_gate(case: Case, rng: np.random.Generator) -> Array | None:
    """Draw a gate: None, one number, or one per row, some of them 0."""
    if case.gate == "none":
        return None
    gate = rng.standard_normal(case.rows if case.gate == "rows" else 1)
    gate[rng.random(gate.shape) < 0.2] = 0
    return gate.astype(ELEMENTS[case.index].wide)


def column(gate: Array | None, wide: type) -> Array:
    """Return the gate as a column, [rows, 1] or [1, 1]."""
    return np.ones((1, 1), wide) if gate is None else gate[:, None]


def reference_forward(
    case: Case, x: Array, f: Array, gate: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Return y, mask, the sums in float64, and the sums of the absolute terms."""
    element = ELEMENTS[case.index]
    skip, p = element.widen(x), column(gate, element.wide) * element.widen(f)
    s = skip + p
    keep = ~(s <= 0) if case.relu else np.ones(s.shape, bool)
    skip, p = skip.astype(np.float64), p.astype(np.float64)
    terms = np.stack([skip * skip, p * p, skip * p])
    y = element.narrow(np.where(keep, s, element.wide(0)))
    mask = np.packbits(keep, axis=1, bitorder="little")
    return y, mask, terms.sum(2), np.abs(terms).sum(2)


def reference_backward(
    case: Case, gy: Array, x: Array, f: Array, gate: Array | None, gs: Array | None, keep: Array
) -> dict[str, tuple[Array, Array]]:
    """Return gx, gf and ggate in float64, each with how far off a result may be."""
    element = ELEMENTS[case.index]
    g = np.where(keep, element.widen(gy) if case.has_gy else 0, 0).astype(np.float64)
    skip, branch = element.widen(x).astype(np.float64), element.widen(f).astype(np.float64)
    gate = column(gate, element.wide).astype(np.float64)
    p, zero = gate * branch, np.zeros((1, 1))
    s = [zero, zero, zero] if gs is None else [one[:, None].astype(np.float64) for one in gs]
    gx_terms, gp_terms = [g, 2 * s[0] * skip, s[2] * p], [g, 2 * s[1] * p, s[2] * skip]
    gx, gp = sum(gx_terms), sum(gp_terms)
    gx_scale, gp_scale = (sum(np.abs(t) for t in terms) for terms in (gx_terms, gp_terms))
    terms_scale = (gp_scale * np.abs(branch)).sum(1)
    exact = gs is None  # then gx is g, and only gf's product is rounded, here as there
    gf = gate * gp
    want_gf = element.widen(element.narrow(gf.astype(element.wide))) if exact else gf
    loose, wide_error = 0 if exact else 1.01 * element.unit, 0 if exact else 8 * element.wide_unit
    # Half a step of float16's subnormal numbers, for the results that are so small.
    floor = 2.0**-25 if element.name == "float16" and not exact else 0
    return {
        "gx": (gx, loose * np.abs(gx) + wide_error * gx_scale + floor),
        "gf": (want_gf, loose * np.abs(gf) + wide_error * np.abs(gate) * gp_scale + floor),
        "ggate": ((gp * branch).sum(1), 64 * element.wide_unit * terms_scale),
    }
