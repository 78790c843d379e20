"""Compare residual_add's CUDA kernels, run as fibers, to NumPy.

`python residual_add.py LIBRARY SEED` runs all cases against one library in one order of the fibers.
"""

from __future__ import annotations

import ctypes
import sys
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


class Args(ctypes.Structure):
    """fastres::residual_add::Args."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "f", "gate", "y", "sums", "mask")]
        + [(name, ctypes.c_int64) for name in ("gate_stride", "rows", "cols")]
        + [("dtype", ctypes.c_int32), ("relu", ctypes.c_bool), ("scratch", ctypes.c_void_p)]
    )


class BackwardArgs(ctypes.Structure):
    """fastres::residual_add::BackwardArgs."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("gy", "x", "f", "gate", "gs", "mask", "gx", "gf", "ggate")]
        + [(name, ctypes.c_int64) for name in ("gate_stride", "rows", "cols")]
        + [("dtype", ctypes.c_int32), ("scratch", ctypes.c_void_p)]
    )


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


def expect(what: str, ok: bool) -> None:
    """Fail unless ok."""
    if not ok:
        raise AssertionError(what)


def close(what: str, got: Array, want: Array, tolerance: Array | float) -> None:
    """Fail unless got is want, NaN where it is NaN, within the tolerance."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    wrong = ~((np.abs(got - want) <= tolerance) | (np.isnan(got) & np.isnan(want)) | (got == want))
    if wrong.any():
        i = tuple(np.argwhere(wrong)[0])
        raise AssertionError(f"{what}[{i}] is {got[i]}, not {want[i]} ({wrong.sum()} wrong)")


class Runner:
    """Runs cases against one library in one order of the fibers."""

    def __init__(self, path: str, seed: int):
        """Load the library; seed 0 is the order of the indices."""
        self.library = ctypes.CDLL(path)
        self.library.forward.restype = self.library.backward.restype = ctypes.c_char_p
        self.seed = seed

    def call(self, function: Any, args: ctypes.Structure) -> None:
        """Launch; an error of the kernel is an error here."""
        error = function(ctypes.byref(args), ctypes.c_uint64(self.seed))
        if error:
            raise AssertionError(error.decode())

    def forward(self, case: Case) -> list[Array]:
        """Check the forward pass; return all that it wrote."""
        rng = np.random.default_rng(case.cols * 1000 + case.rows)
        element, shape = ELEMENTS[case.index], (case.rows, case.cols)
        x, f = element.empty(shape, case.shift), element.empty(shape)
        x[:] = element.narrow(rng.standard_normal(shape).astype(element.wide))
        f[:] = element.narrow(rng.standard_normal(shape).astype(element.wide))
        f[rng.random(shape) < 0.1] = 0
        f[rng.random(shape) < 0.1] = x[0, 0] if x.size else 0
        if case.nan and x.size:
            x[-1, -1] = element.narrow(np.array([np.nan]))[0]
        gate = make_gate(case, rng)
        want, want_mask, sums, scale = reference_forward(case, x, f, gate)

        y = {"x": x, "f": f}.get(case.alias, element.empty(shape))
        got_sums = np.full((3, case.rows), np.nan, element.wide)
        mask = np.full((case.rows, (case.cols + 7) // 8), 0xAA, np.uint8) if case.mask else None
        self.call(self.library.forward, Args(
            address(x), address(f), address(gate), address(y), address(got_sums), address(mask),
            case.gate == "rows", case.rows, case.cols, case.index, case.relu, None))  # fmt: skip
        close("y", element.widen(y), element.widen(want), 0)
        close("sums", got_sums, sums, 32 * element.wide_unit * scale)
        if mask is not None:
            expect("mask", np.array_equal(mask, want_mask))
        return [y, got_sums] + ([] if mask is None else [mask])

    def backward(self, case: Case) -> list[Array]:
        """Check the backward pass; return all that it wrote."""
        rng = np.random.default_rng(case.cols * 1000 + case.rows + 1)
        element, shape = ELEMENTS[case.index], (case.rows, case.cols)
        gy, x, f = (element.empty(shape, s) for s in (case.shift, 0, 0))
        for array in (gy, x, f):
            array[:] = element.narrow(rng.standard_normal(shape).astype(element.wide))
        keep = rng.random(shape) < 0.5 if case.mask else np.ones(shape, bool)
        if case.mask and gy.size:
            gy[~keep] = element.narrow(np.array([np.nan]))[0]  # a masked cotangent is 0, not 0 * it
        mask = np.packbits(keep, axis=1, bitorder="little")
        gate = make_gate(case, rng)
        gs = rng.standard_normal((3, case.rows)).astype(element.wide) if case.gs else None
        want = reference_backward(case, gy, x, f, gate, gs, keep)

        gx = element.empty(shape) if case.wants_gx else None
        gf = element.empty(shape) if case.wants_gf else None
        ggate = np.full(case.rows, np.nan, element.wide) if case.wants_ggate else None
        if case.alias == "f" and case.has_gy and gx is not None:
            gx = gy
        self.call(self.library.backward, BackwardArgs(
            address(gy) if case.has_gy else None, address(x) if case.gs else None,
            address(f) if case.gs or case.wants_ggate else None, address(gate), address(gs),
            address(mask) if case.mask else None, address(gx), address(gf), address(ggate),
            case.gate == "rows", case.rows, case.cols, case.index, None))  # fmt: skip
        written = []
        for name, got in (("gx", gx), ("gf", gf), ("ggate", ggate)):
            if got is not None:
                wide = got if name == "ggate" else element.widen(got)
                close(name, wide, *want[name])
                written.append(got)
        return written

    def run(self, case: Case) -> list[Array]:
        """Check both passes; an error names the case."""
        try:
            return self.forward(case) + self.backward(case)
        except AssertionError as error:
            raise AssertionError(f"{error}\n    {case}, seed {self.seed}") from None


def address(array: Array | None) -> int | None:
    """Return where an array begins."""
    return None if array is None else array.ctypes.data


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


def main() -> None:
    """Run every case; an error ends it."""
    runner, count = Runner(sys.argv[1], int(sys.argv[2])), 0
    for case in cases(runner.seed):
        runner.run(case)
        count += 1
    print(f"{count} cases, seed {runner.seed}")


if __name__ == "__main__":
    main()
