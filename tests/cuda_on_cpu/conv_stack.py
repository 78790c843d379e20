"""Compare conv_stack's CUDA kernels, run as fibers, to NumPy.

In tests/, `python -m cuda_on_cpu.conv_stack LIBRARY SEED` runs all cases against one library, in
the order of the fibers that the seed draws. FASTRES_CONV_STACK picks the kernels, as it does on a
GPU.
"""

from __future__ import annotations

import ctypes

import numpy as np
from cuda_on_cpu.conv_stack_reference import Case, Inputs, cases, reference
from cuda_on_cpu.mlp_stack import Weights, weights_of
from cuda_on_cpu.residual_add import address, close
from cuda_on_cpu.residual_add_reference import Array
from cuda_on_cpu.running import run_all


class Shape(ctypes.Structure):
    """fastres::conv_stack::Shape."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "channels", "height", "width", "blocks")]
        + [("dtype", ctypes.c_int32)]
        + [(name, ctypes.c_bool) for name in ("channels_last", "tf32")]
    )


class Args(ctypes.Structure):
    """fastres::conv_stack::Args."""

    _fields_ = [
        ("shape", Shape),
        ("weights", Weights),
        *[(name, ctypes.c_void_p) for name in ("x", "y", "sums", "scratch")],
    ]


def shape_of(case: Case) -> Shape:
    """Return the shape as the kernels take it."""
    return Shape(*case.shape, case.blocks, case.index, case.channels_last, case.tf32)


class Runner:
    """Runs cases against one library in one order of the fibers."""

    def __init__(self, path: str, seed: int):
        """Load the library; seed 0 is the order of the indices."""
        self.library = ctypes.CDLL(path)
        for function in ("forward", "route"):
            getattr(self.library, function).restype = ctypes.c_char_p
        self.seed = seed

    def route(self, case: Case) -> str:
        """Return the name of the kernels that a case runs on."""
        return str(self.library.route(ctypes.byref(shape_of(case))).decode())

    def forward(self, case: Case) -> list[Array]:
        """Check a case; return all that it wrote: y and sums."""
        element, inputs = case.element, Inputs.draw(case)
        streams, want = reference(case, inputs)
        y = element.empty(inputs.x.shape)
        sums = np.full(want.shape, np.nan, element.wide)
        args = Args(shape_of(case), weights_of(inputs), address(inputs.x), address(y),
                    address(sums) if case.sums else None, None)  # fmt: skip
        error = self.library.forward(ctypes.byref(args), ctypes.c_uint64(self.seed))
        if error:
            raise AssertionError(error.decode())
        # Errors of the branches add up: 4 roundings of each, of which none is above the largest x.
        largest = np.max([np.abs(s[np.isfinite(s)]).max(initial=1) for s in streams])
        loose = 4 * (case.blocks + 1) * case.unit * largest
        got = element.widen(y)
        close("y", got if case.channels_last else got.transpose(0, 2, 3, 1), streams[-1], loose)
        if case.sums:
            size = np.sqrt(np.prod(case.shape[1:]))
            norms = np.sqrt(np.stack([want[:, 0], want[:, 1]]).max(0))[:, None]
            close("sums", sums, want, loose * size * (2 * norms + loose * size))
        return [y, sums]

    def run(self, case: Case) -> list[Array]:
        """Check a case; an error names it."""
        try:
            with np.errstate(invalid="ignore"):  # infinity less infinity
                return self.forward(case)
        except AssertionError as error:
            raise AssertionError(f"{error}\n    {case}, seed {self.seed}") from None


if __name__ == "__main__":
    run_all(Runner, cases, Runner.route)
