"""Compare batch_norm_residual's CUDA kernels, run as fibers, to NumPy.

In tests/, `python -m cuda_on_cpu.batch_norm_residual LIBRARY SEED` runs all cases against one
library, in the order of the fibers that the seed draws.
"""

from __future__ import annotations

import ctypes

import numpy as np
from cuda_on_cpu.batch_norm_residual_reference import (
    EPS,
    Case,
    Inputs,
    cases,
    exact_backward,
    exact_forward,
    inputs_of,
)
from cuda_on_cpu.residual_add import Runner as ResidualAddRunner
from cuda_on_cpu.residual_add import address, close, expect
from cuda_on_cpu.residual_add_reference import ELEMENTS, Array
from cuda_on_cpu.running import run_all

MOMENTUM = 0.25


class Shape(ctypes.Structure):
    """fastres::batch_norm_residual::Shape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "channels", "places")),
        ("pixels", ctypes.c_bool),
    )


def fields(pointers: str, numbers: str, flags: str) -> list[tuple[str, type]]:
    """Return the fields that both structures are made of."""
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *(("gate_stride", ctypes.c_int64), ("shape", Shape)),
        *((name, ctypes.c_double) for name in numbers.split()),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_bool) for name in flags.split()),
        ("scratch", ctypes.c_void_p),
    ]


class Args(ctypes.Structure):
    """fastres::batch_norm_residual::Args."""

    _fields_ = fields(
        "x f weight bias gate y sums mean var lost "
        "statistics running_mean running_var batches mask",
        *("eps momentum", "relu training narrow"),
    )


class BackwardArgs(ctypes.Structure):
    """fastres::batch_norm_residual::BackwardArgs."""

    _fields_ = fields(
        "gy f weight bias gate statistics mask gx gf gweight gbias ggate",
        *("eps", "training"),
    )


def laid_out(case: Case, values: Array) -> Array:
    """Return [rows, C, S] values as they lie in memory, [rows, lines, length]."""
    return np.ascontiguousarray(values.swapaxes(1, 2) if case.pixels else values)


class Runner(ResidualAddRunner):
    """Runs cases against one library in one order of the fibers."""

    def forward(self, case: Case, given: Inputs) -> list[Array]:  # type: ignore[override]
        """Check the forward pass; return y, sums, statistics, mask, and what was running."""
        element, exact = ELEMENTS[case.index], exact_forward(case, given)
        x, f = laid_out(case, given.x), laid_out(case, given.f)
        y, sums = element.empty(x.shape), np.full((3, case.rows), np.nan, element.wide)
        batches = np.array([6])
        statistics = np.full((3, case.channels), np.nan, element.wide)
        running = given.mean.copy(), given.var.copy()  # they move in training
        mask = np.full((*x.shape[:2], (x.shape[2] + 7) // 8), 0xAA, np.uint8)
        weight, bias, of_mean, of_var = (
            element.narrow(t) if case.is_narrow and t is not None else t
            for t in (given.weight, given.bias, given.mean, given.var)
        )
        if case.training:
            of_mean = of_var = None
        self.call(self.library.forward, Args(
            address(x) if case.skip else None,
            *map(address, (f, weight, bias, given.gate, y, sums if case.skip else None)),
            *map(address, (of_mean, of_var, None, statistics, *running)),
            address(batches) if case.training else None, address(mask) if case.relu else None,
            case.gate == "rows",
            shape_of(case), EPS, MOMENTUM, case.index, case.relu, case.training,
            case.is_narrow, None))  # fmt: skip
        want = laid_out(case, exact["y"])
        got = element.widen(y).astype(np.float64)
        size = np.abs(laid_out(case, exact["p"])) + np.abs(element.widen(x)) + 1
        close("y", got, np.maximum(want, 0) if case.relu else want,
              1.01 * element.unit * np.abs(want) + 64 * element.wide_unit * size)  # fmt: skip
        if case.skip:
            close("sums", sums, exact["sums"], 256 * element.wide_unit * (exact["scale"] + 1))
        expect("batches", batches[0] == 6 + case.training)
        for name, got in zip(("mean", "var"), statistics[:2], strict=True):
            close(name, got, exact[name], 16 * element.wide_unit * (np.abs(exact[name]) + 1))
        count = case.rows * case.places
        for before, got, of_batch in (
            (given.mean, running[0], exact["mean"]),
            (given.var, running[1], exact["var"] * count / max(count - 1, 1)),
        ):
            far = MOMENTUM if case.training and count else 0
            want = before + far * (of_batch - before)
            close("running", got, want, 16 * element.wide_unit * (np.abs(want) + 1))
        if case.relu:
            bits = np.packbits(element.widen(y) > 0, axis=2, bitorder="little")
            expect("mask", np.array_equal(mask, bits))
        return [y, sums, statistics, mask, *running]

    def backward(  # type: ignore[override]
        self, case: Case, given: Inputs, statistics: Array, mask: Array
    ) -> list[Array]:
        """Check the backward pass; return all that it wrote."""
        element = ELEMENTS[case.index]
        gy, f = laid_out(case, given.gy), laid_out(case, given.f)
        keep = np.ones(gy.shape, bool)
        if case.relu:
            keep = np.unpackbits(mask, axis=2, bitorder="little")[..., : gy.shape[2]].astype(bool)
            gy[~keep] = element.narrow(np.array([np.nan]))[0]  # a masked cotangent is 0
        exact = exact_backward(case, given, keep.swapaxes(1, 2) if case.pixels else keep,
                               exact_forward(case, given))  # fmt: skip
        gf = element.empty(gy.shape)
        gx = element.empty(gy.shape) if case.relu and case.skip else None
        gweight, gbias = (
            np.full(case.channels, np.nan, element.wide) if case.wants_affine else None
            for _ in range(2)
        )
        ggate = np.full(case.rows, np.nan, element.wide) if case.wants_gate else None
        self.call(self.library.backward, BackwardArgs(
            *map(address, (gy, f, given.weight, given.bias, given.gate, statistics)),
            address(mask) if case.relu else None, *map(address, (gx, gf, gweight, gbias, ggate)),
            case.gate == "rows", shape_of(case), EPS, case.index, case.training,
            None))  # fmt: skip
        written = []
        for name, got in {"gx": gx, "gf": gf, "gweight": gweight, "gbias": gbias,
                          "ggate": ggate}.items():  # fmt: skip
            if got is None:
                continue
            whole = name in ("gx", "gf")
            want = laid_out(case, exact[name]) if whole else exact[name]
            unit = 1.01 * element.unit if whole else 0
            size = case.rows * case.places + case.channels * case.places
            loose = 512 * element.wide_unit * (np.abs(want) + np.sqrt(size))
            # half a step of float16's subnormal numbers
            floor = 2.0**-25 if element.name == "float16" else 0
            close(name, element.widen(got) if whole else got, want,
                  unit * np.abs(want) + loose + floor)  # fmt: skip
            written.append(got)
        return written

    def run(self, case: Case) -> list[Array]:  # type: ignore[override]
        """Check both passes; an error names the case."""
        given = inputs_of(case)
        try:
            written = self.forward(case, given)
            return written + self.backward(case, given, *written[2:4])
        except AssertionError as error:
            raise AssertionError(f"{error}\n    {case}, seed {self.seed}") from None


def shape_of(case: Case) -> Shape:
    """Return the shape as the kernels take it."""
    return Shape(case.rows, case.channels, case.places, case.pixels)


if __name__ == "__main__":
    run_all(Runner, cases)
