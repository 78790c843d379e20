"""Compare path_accumulate's CUDA kernel, run as fibers, to NumPy.

In tests/, `python -m cuda_on_cpu.path_accumulate LIBRARY SEED` runs all cases against one library,
in the order of the fibers that the seed draws.
"""

from __future__ import annotations

import ctypes

import numpy as np
from cuda_on_cpu.path_accumulate_reference import Case, cases, inputs, reference
from cuda_on_cpu.residual_add import address, close
from cuda_on_cpu.residual_add_reference import ELEMENTS, Array
from cuda_on_cpu.running import run_all


class Args(ctypes.Structure):
    """fastres::path_accumulate::Args."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("skip", "branch", "before", "gradient", "steps")]
        + [(name, ctypes.c_void_p) for name in ("out", "sums")]
        + [(name, ctypes.c_int64) for name in ("rows", "samples", "cols")]
        + [("dtype", ctypes.c_int32), ("tail", ctypes.c_bool), ("dot", ctypes.c_bool)]
        + [("scratch", ctypes.c_void_p)]
    )


class Runner:
    """Runs cases against one library in one order of the fibers."""

    def __init__(self, path: str, seed: int):
        """Load the library; seed 0 is the order of the indices."""
        self.library = ctypes.CDLL(path)
        self.library.accumulate.restype = ctypes.c_char_p
        self.seed = seed

    def run(self, case: Case) -> list[Array]:
        """Check what the kernel writes, and return it; an error names the case."""
        element, given = ELEMENTS[case.index], inputs(case)
        want, sums, scale = reference(case, given)
        out = given.skip if case.in_place else element.empty(given.branch.shape)
        got = np.full(sums.shape, np.nan, element.wide)
        error = self.library.accumulate(ctypes.byref(Args(
            address(given.skip), address(given.branch), address(given.before),
            address(given.gradient), address(given.steps), address(out), address(got), case.rows,
            case.samples, case.cols, case.index, case.tail, case.dot, None)),
            ctypes.c_uint64(self.seed))  # fmt: skip
        try:
            assert not error, error.decode()
            assert out is not None
            close("rows", element.widen(out), element.widen(want), 0)
            close("sums", got, sums, 32 * element.wide_unit * scale)
        except AssertionError as failed:
            raise AssertionError(f"{failed}\n    {case}, seed {self.seed}") from None
        return [out, got]


if __name__ == "__main__":
    run_all(Runner, cases)
