"""Compare residual_add's CUDA kernels, run as fibers, to NumPy.

In tests/, `python -m cuda_on_cpu.residual_add LIBRARY SEED` runs all cases against one library, in
the order of the fibers that the seed draws.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda_on_cpu.residual_add_reference import (
    ELEMENTS,
    Array,
    Case,
    cases,
    make_gate,
    reference_backward,
    reference_forward,
)
from cuda_on_cpu.running import run_all


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
    """Return where an array begins; null where it is empty, as torch's tensors are."""
    return array.ctypes.data if array is not None and array.size else None


if __name__ == "__main__":
    run_all(Runner, cases)
