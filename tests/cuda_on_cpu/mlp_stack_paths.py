"""Compare mlp_stack_paths' CUDA kernels, run as fibers, to NumPy.

In tests/, `python -m cuda_on_cpu.mlp_stack_paths LIBRARY SEED` runs all cases against one library,
in the order of the fibers that the seed draws.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
from cuda_on_cpu.mlp_stack import Weights, weights_of
from cuda_on_cpu.mlp_stack_paths_reference import Case, Reference, cases, reference
from cuda_on_cpu.mlp_stack_reference import ACTIVATIONS, Inputs
from cuda_on_cpu.residual_add import address, close, expect
from cuda_on_cpu.residual_add_reference import Array
from cuda_on_cpu.running import run_all


class Shape(ctypes.Structure):
    """fastres::mlp_stack_paths::Shape."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "width", "hidden", "blocks", "longest")]
        + [(name, ctypes.c_int32) for name in ("dtype", "activation")]
        + [("shared", ctypes.c_bool), ("precision", ctypes.c_int32)]
    )


class Args(ctypes.Structure):
    """fastres::mlp_stack_paths::Args."""

    _fields_ = [
        ("shape", Shape),
        ("weights", Weights),
        *[(name, ctypes.c_void_p) for name in ("x", "cotangent", "log2_norms", "dots", "norms")],
        *[(name, ctypes.c_void_p) for name in ("gradient", "kept", "tail", "scratch")],
    ]


@dataclasses.dataclass
class Outputs:
    """All that a launch writes, as it was before: NaN, in exactly its bytes."""

    log2_norms: Array  # [rows, B]
    dots: Array  # [rows, B]
    norms: Array  # [2, B]
    gradient: Array  # [B, D]
    kept: Array | None  # [rows, B, D]
    tail: Array | None  # [B, D]

    @classmethod
    def of(cls, case: Case) -> Outputs:
        """Allocate for a case."""
        sample, empty = (case.batch, case.width), case.element.empty
        has_tail = case.longest < case.blocks
        return cls(
            np.full((case.rows, case.batch), np.nan), np.full((case.rows, case.batch), np.nan),
            np.full((2, case.batch), np.nan), empty(sample),
            empty((case.rows, *sample)) if case.wants_kept else None,
            empty(sample) if case.wants_tail and has_tail else None)  # fmt: skip

    def arrays(self) -> list[Array]:
        """Return what there is."""
        return [a for a in vars(self).values() if a is not None]


def sample_norm(values: Array) -> Array:
    """Return the norms over the last dimension, also of numbers whose squares underflow."""
    largest = np.abs(values).max(-1, keepdims=True, initial=0)
    largest = np.where(largest > 0, largest, 1)
    return np.sqrt(((values / largest) ** 2).sum(-1)) * largest[..., 0]


class Runner:
    """Runs cases against one library in one order of the fibers."""

    def __init__(self, path: str, seed: int):
        """Load the library; seed 0 is the order of the indices."""
        self.library = ctypes.CDLL(path)
        self.library.paths.restype = self.library.kernel.restype = ctypes.c_char_p
        self.seed = seed

    def inputs(self, case: Case) -> tuple[Inputs, Array, Array]:
        """Draw the weights, x and the cotangent."""
        rng = np.random.default_rng(case.batch * 1000 + case.width)
        inputs = Inputs.draw(case, rng)  # type: ignore[arg-type]
        x, cotangent = (case.element.empty((case.batch, case.width), case.shift) for _ in range(2))
        x[:], cotangent[:] = rng.standard_normal(x.shape), rng.standard_normal(x.shape)
        cotangent *= case.element.wide(2.0**case.lift)
        inputs.w2 *= case.element.wide(1 if case.blocks < 10 else 3 / case.blocks)
        if case.power:
            x[:], inputs.b1[:], inputs.b2[:] = 0, 0, 0
            inputs.w1[:, :, :-3] = 0  # they end in the last features alone
            if case.turns:
                inputs.w1[:] = np.eye(case.hidden, case.width)
                inputs.w2[:] = np.eye(case.width, case.hidden)
            inputs.w2[::2] *= case.element.wide(2.0**case.power)
            inputs.w2[1::2] *= case.element.wide(2.0 ** (-case.power if case.turns else case.power))
        if case.spoilt:
            x[-1, -1] = case.spoilt
        return inputs, x, cotangent

    def launch(self, case: Case, inputs: Inputs, x: Array, cotangent: Array) -> Outputs:
        """Launch; an error of the kernel is an error here."""
        got = Outputs.of(case)
        shape = Shape(case.batch, case.width, case.hidden, case.blocks, case.longest, case.index,
                      ACTIVATIONS.index(case.activation), case.shared, case.precision)  # fmt: skip
        args = Args(shape, weights_of(inputs), address(x), address(cotangent),
                    *(address(a) for a in vars(got).values()), None)  # fmt: skip
        error = self.library.paths(
            ctypes.byref(args), ctypes.c_uint64(self.seed), ctypes.c_int64(case.shared_bytes)
        )
        if error:
            raise AssertionError(error.decode())
        return got

    def kernel(self) -> str:
        """Return the name of the kernel that was launched last."""
        return str(self.library.kernel().decode())

    def check(self, case: Case, got: Outputs, want: Reference) -> None:
        """Compare all outputs; rounding is proportional to the terms of a sum."""
        unit, element = 64 * (case.blocks + 1) * case.unit, case.element
        tiny = 16 * float(np.finfo(element.wide).tiny)
        rows, g = want.rows, want.g
        # A row has one exponent: elements less than 2^-90 of its largest may be lost.
        rows_error, g_error = (
            unit * scale + 2.0**-90 * np.abs(values).max(-1, keepdims=True, initial=0)
            for scale, values in ((want.rows_scale, rows), (want.g_scale, g))
        )

        close("gradient", got.gradient, g.astype(element.wide), g_error + tiny)
        if got.kept is not None:
            close("kept", got.kept, rows.astype(element.wide), rows_error + tiny)
        if got.tail is not None:
            close("tail", got.tail, rows[-1].astype(element.wide), rows_error[-1] + tiny)
        norms = np.stack([0 * g.sum(-1), sample_norm(g)])
        sums_error = sample_norm(rows_error.sum(0) + g_error)
        close("norms", got.norms, norms, np.stack([sums_error, sample_norm(g_error)]))
        true = sample_norm(rows)
        log2_error = 2.0**-52 * (64 + abs(case.lift)) * true
        close("log2_norms", 2.0**got.log2_norms, true, sample_norm(rows_error) + log2_error)
        dots_error = rows_error * (np.abs(g) + g_error) + np.abs(rows) * g_error
        close("dots", got.dots, (rows * g).sum(-1), dots_error.sum(-1))

    def check_powers(self, case: Case, got: Outputs) -> None:
        """Compare the lengths, which may be beyond float64, to those of branches of slope 1."""
        plain = dataclasses.replace(case, power=0)
        inputs, x, cotangent = self.inputs(case)
        inputs.w2 *= case.element.wide(2.0**-case.power)
        want = reference(plain, inputs, x, cotangent)
        k = np.arange(case.rows)[:, None]
        norms = 2.0 ** (got.log2_norms - case.power * k)
        tolerance = 64 * (case.blocks + 1) * case.element.unit
        close("log2_norms", norms, sample_norm(want.rows), tolerance * sample_norm(want.rows_scale))

    def check_turns(self, case: Case, got: Outputs, want: Reference) -> None:
        """Compare the lengths, some of which are beyond float32."""
        true, unit = sample_norm(want.rows), 64 * (case.blocks + 1) * case.element.unit
        close("log2_norms", 2.0 ** (got.log2_norms - np.log2(true)), np.ones_like(true),
              unit * sample_norm(want.rows_scale) / true)  # fmt: skip

    @np.errstate(all="ignore")
    def run(self, case: Case) -> list[Array]:
        """Check a case; an error names it. Returns all that was written."""
        try:
            inputs, x, cotangent = self.inputs(case)
            got = self.launch(case, inputs, x, cotangent)
            if case.turns:
                self.check_turns(case, got, reference(case, inputs, x, cotangent))
            elif case.longest == case.blocks and case.power:
                self.check_powers(case, got)
            if abs(case.power) <= 30:
                self.check(case, got, reference(case, inputs, x, cotangent))
            expect("the kernel's name", self.kernel().startswith("mlp_stack_paths: paths_kernel"))
            return got.arrays()
        except AssertionError as error:
            raise AssertionError(f"{error}\n    {case}, seed {self.seed}") from None


if __name__ == "__main__":
    run_all(Runner, cases, lambda runner, _: runner.kernel())
