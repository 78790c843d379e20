"""Compare mlp_stack's CUDA kernels, run as fibers, to NumPy.

In tests/, `python -m cuda_on_cpu.mlp_stack LIBRARY SEED` runs all cases against one library, in
the order of the fibers that the seed draws. FASTRES_MLP_STACK picks the kernels, as it does on a
GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda_on_cpu.mlp_stack_reference import (
    ACTIVATIONS,
    Case,
    Inputs,
    cases,
    exact,
    reference_backward,
    reference_forward,
)
from cuda_on_cpu.residual_add import address, close, expect
from cuda_on_cpu.residual_add_reference import Array
from cuda_on_cpu.running import run_all


class Shape(ctypes.Structure):
    """fastres::mlp_stack::Shape."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "width", "hidden", "blocks")]
        + [(name, ctypes.c_int32) for name in ("dtype", "activation")]
        + [(name, ctypes.c_bool) for name in ("shared", "tf32")]
    )


class Weights(ctypes.Structure):
    """fastres::mlp_stack::Weights."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("w1", "b1", "w2", "b2", "gate")] + [
        (name, ctypes.c_int64) for name in ("gate_block_stride", "gate_row_stride")
    ]


class Args(ctypes.Structure):
    """fastres::mlp_stack::Args."""

    _fields_ = [
        ("shape", Shape),
        ("weights", Weights),
        *[(name, ctypes.c_int64) for name in ("first", "last")],
        *[(name, ctypes.c_void_p) for name in ("x", "y", "states")],
        ("every", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("sums", "scratch")],
    ]


class BackwardArgs(ctypes.Structure):
    """fastres::mlp_stack::BackwardArgs."""

    _fields_ = [
        ("shape", Shape),
        ("weights", Weights),
        *[(name, ctypes.c_int64) for name in ("first", "last")],
        *[(name, ctypes.c_void_p) for name in ("states", "g", "gstates", "ggate")],
        *[(name, ctypes.c_void_p) for name in ("gw1", "gb1", "gw2", "gb2")],
        ("add", ctypes.c_bool),
        ("scratch", ctypes.c_void_p),
    ]


def shape_of(case: Case) -> Shape:
    """Return the shape as the kernels take it."""
    return Shape(case.batch, case.width, case.hidden, case.blocks, case.index,
                 ACTIVATIONS.index(case.activation), case.shared, case.tf32)  # fmt: skip


def weights_of(inputs: Inputs) -> Weights:
    """Return the weights as the kernels take them."""
    gate = inputs.gate
    strides = (0, 0) if gate is None else (s // gate.itemsize for s in gate.strides)
    return Weights(
        *(address(w) for w in (inputs.w1, inputs.b1, inputs.w2, inputs.b2, gate)), *strides
    )


class Runner:
    """Runs cases against one library in one order of the fibers."""

    def __init__(self, path: str, seed: int):
        """Load the library; seed 0 is the order of the indices."""
        self.library = ctypes.CDLL(path)
        for function in ("forward", "backward", "route"):
            getattr(self.library, function).restype = ctypes.c_char_p
        self.seed = seed

    def call(self, function: Any, args: ctypes.Structure) -> None:
        """Launch; an error of the kernel is an error here."""
        error = function(ctypes.byref(args), ctypes.c_uint64(self.seed))
        if error:
            raise AssertionError(error.decode())

    def route(self, case: Case) -> str:
        """Return the name of the kernels that a case runs on."""
        return str(self.library.route(ctypes.byref(shape_of(case))).decode())

    def draw(self, case: Case, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Draw elements, in exactly their bytes."""
        values = case.element.empty(shape, case.shift)
        values[:] = exact(case, rng.standard_normal(shape))
        return values

    def forward(self, case: Case) -> list[Array]:
        """Check the forward pass; return all that it wrote."""
        rng = np.random.default_rng(case.batch * 1000 + case.width)
        element, rows, count = case.element, (case.batch, case.width), case.last - case.first
        inputs, x = Inputs.draw(case, rng), self.draw(case, rng, rows)
        if case.nan:
            x[-1, -1] = element.narrow(np.array([np.nan], element.wide))[0]
        streams, sums = reference_forward(case, inputs, x)

        y = element.empty(rows) if case.wants_y else None
        kept = -(-count // case.every) if case.every else 0
        states = element.empty((kept, *rows), case.shift) if kept else None
        got_sums = np.full((case.blocks, 3, case.batch), np.nan, element.wide)
        self.call(self.library.forward, Args(
            shape_of(case), weights_of(inputs), case.first, case.last, address(x), address(y),
            address(states), max(case.every, 1), address(got_sums) if case.sums else None,
            None))  # fmt: skip
        # Errors of the branches add up: 4 roundings of each, of which none is above the largest x.
        scale = np.max([np.abs(s).max(1) for s in streams], axis=0)[:, None]
        loose = 4 * (count + 1) * case.unit * scale
        if y is not None:
            close("y", element.widen(y), streams[-1], loose)
        for i in range(kept):
            close(f"states[{i}]", element.widen(states[i]), streams[i * case.every], loose)
        if states is not None:
            expect(
                "states[0] is x",
                np.array_equal(element.widen(states[0]), element.widen(x), equal_nan=True),
            )
        if case.sums:
            close("sums", got_sums, sums, 2 * (loose * scale * case.width)[:, 0])
        return [a for a in (y, states, got_sums) if a is not None]

    def backward(self, case: Case) -> list[Array]:
        """Check the backward pass; return all that it wrote."""
        rng = np.random.default_rng(case.batch * 1000 + case.width + 1)
        element, rows, count = case.element, (case.batch, case.width), case.last - case.first
        inputs, states = Inputs.draw(case, rng), self.draw(case, rng, (count, *rows))
        g = element.widen(exact(case, rng.standard_normal(rows))).copy()
        gstates = self.draw(case, rng, (count, *rows)) if case.gstates else None
        if case.nan:
            states[0, -1, -1] = element.narrow(np.array([np.nan], element.wide))[0]
        want = reference_backward(case, inputs, states, g, gstates)

        names = ("gw1", "gb1", "gw2", "gb2")
        grads: dict[str, Array] = {}
        for name in names if case.wants_weights else ():
            like = getattr(inputs, name[1:])
            grads[name] = (
                np.full(like.shape, np.nan, element.wide)
                if case.shared
                else element.empty(like.shape)
            )
            if case.shared and case.add:
                grads[name][:] = 1
        ggate = np.full((case.blocks, case.batch), np.nan, element.wide)
        self.call(self.library.backward, BackwardArgs(
            shape_of(case), weights_of(inputs), case.first, case.last, address(states), address(g),
            address(gstates), address(ggate) if case.wants_ggate else None,
            *(address(grads.get(name)) for name in names), case.add, None))  # fmt: skip
        got = {"g": g, **({"ggate": ggate} if case.wants_ggate else {}), **grads}
        for name, array in got.items():
            wide = element.widen(array) if array.dtype == element.stored else array
            wanted, scale = want[name]
            if name in grads and case.shared:
                wanted = wanted + case.add
            elif name in grads:  # blocks out of the range are not written
                outside = [b for b in range(case.blocks) if not case.first <= b < case.last]
                wanted[outside] = np.nan
            close(name, wide, wanted, 8 * (count + 1) * case.unit * (scale + np.abs(wanted)))
        return list(got.values())

    def run(self, case: Case) -> list[Array]:
        """Check both passes; an error names the case."""
        try:
            return self.forward(case) + self.backward(case)
        except AssertionError as error:
            raise AssertionError(f"{error}\n    {case}, seed {self.seed}") from None


if __name__ == "__main__":
    run_all(Runner, cases, Runner.route)
