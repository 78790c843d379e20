"""What mlp_stack_paths' kernels must give, by NumPy in float64: cases and the recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cuda_on_cpu.mlp_stack_reference import ACTIVATIONS, Inputs, activate
from cuda_on_cpu.residual_add_reference import ELEMENTS, Array, Element

# [batch, width, hidden, blocks, longest]: tails of 16 bytes, of panels of 16, 32 and 64 and of the
# 16 rows of a warp; no length but 0, one and all, with and without a tail; rows of several warps,
# also of samples one after the other, of two tiles, and just of one; samples enough to take 16 at a
# time; no blocks.
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 4, 2), (3, 33, 70, 3, 3), (2, 64, 64, 4, 1)]
SHAPES += [(1, 72, 130, 3, 2), (5, 16, 16, 6, 0), (6, 8, 24, 20, 18), (1, 4, 4, 70, 66)]
SHAPES += [(1, 3, 2, 135, 133), (17, 24, 40, 3, 2), (33, 12, 9, 2, 2), (9, 900, 8, 2, 1)]
SHAPES += [(1, 6, 5, 18, 14), (2, 24, 40, 0, 0)]
SHARED_BYTES = 227 << 10  # of an H200


@dataclass(frozen=True)
class Case:
    """One shape with one choice of everything else."""

    index: int  # the dtype's in ELEMENTS, fastres::Dtype
    batch: int
    width: int
    hidden: int
    blocks: int
    longest: int
    activation: str
    gate: str  # "none", "blocks", "rows"
    shared: bool
    power: int  # branches are 2^power times as steep; not 0: at x = 0, without biases, narrow
    lift: int  # the cotangent is 2^lift times a normal one
    wants_kept: bool
    wants_tail: bool
    shift: int  # elements that x and the cotangent start off a 16-byte boundary
    spoilt: float  # NaN or infinity: what x of the last sample ends in; 0: nothing
    shared_bytes: int
    tf32: bool = False
    turns: bool = False  # branches are 2^power and 2^-power times the identity by turns
    precision: int = 0  # fastres::mlp_stack_paths::InputPrecision

    @property
    def element(self) -> Element:
        """Return the element type."""
        return ELEMENTS[self.index]

    @property
    def unit(self) -> float:
        """Return the rounding, that of tf32 where a factor is one of them."""
        return 2.0**-14 if self.precision == 2 else self.element.unit

    @property
    def rows(self) -> int:
        """Return how many rows there are: the lengths and the tail."""
        return self.longest + 1 + (self.longest < self.blocks)


def least_shared_bytes(index: int, batch: int) -> int:
    """Return what cannot be elsewhere: panels of weights; sums of 4 or 16 samples by 4 warps."""
    return 3 * 9216 + 4 * (16 if batch > 8 else 4) * 72 * np.dtype(ELEMENTS[index].wide).itemsize


def cases(seed: int = 0) -> Iterator[Case]:
    """Go through both types and all shapes, with the rest drawn anew for each; then steep ones."""
    rng = np.random.default_rng(seed)
    turn = int(rng.integers(len(ACTIVATIONS)))
    for index in (0, 1):

        def memory(batch: int, index: int = index) -> int:
            least = least_shared_bytes(index, batch)
            return least if batch == 9 else int(rng.choice([least, least + 8192, SHARED_BYTES]))

        for batch, width, hidden, blocks, longest in SHAPES:
            turn += 1
            yield Case(
                index, batch, width, hidden, blocks, longest, ACTIVATIONS[turn % len(ACTIVATIONS)],
                str(rng.choice(["none", "blocks", "rows"])), bool(rng.random() < 0.3), 0,
                int(rng.choice([0, 0, 100, -130 if index else -600])), bool(rng.random() < 0.6),
                bool(rng.random() < 0.6), int(rng.random() < 0.2),
                float(rng.choice([0, 0, 0, 0, 0, np.inf, np.nan])), memory(batch))  # fmt: skip
            # Tensor cores; nothing infinite, of which the rest is NaN. By both where rows and where
            # a tile of hidden features does not fit.
            most = hidden == 130
            precisions = (1, 2) if most or batch == 9 else (1 + turn % 2,)
            for precision in precisions if index == 1 else ():
                yield Case(
                    index, batch, width, hidden, blocks, longest,
                    ACTIVATIONS[turn // 2 % len(ACTIVATIONS)], "rows", False, 0, 0, True, True, 0,
                    0, least_shared_bytes(index, batch) if most else memory(batch),
                    precision=precision)  # fmt: skip
        for power, blocks, longest in [(-30, 12, 12), (30, 12, 12), (-30, 12, 9), (60, 20, 20)]:
            activation = str(rng.choice(["identity", "tanh"]))
            yield Case(index, 2, 20, 17, blocks, longest, activation, "none", False, power,
                       0, True, True, 0, 0, memory(2))  # fmt: skip
        yield Case(index, 2, 20, 17, 20, 20, "identity", "none", False, -60,
                   0, True, True, 0, 0, memory(2))  # fmt: skip
        for power, longest in [(110, 16), (-110, 16), (110, 4)]:  # neighbours far apart
            yield Case(index, 2, 20, 17, 16, longest, "identity", "none", False, power,
                       0, True, True, 0, 0, memory(2), turns=True)  # fmt: skip


@dataclass
class Reference:
    """The rows [rows, B, D] and g [B, D], and how large the terms are that they are sums of."""

    rows: Array
    g: Array
    rows_scale: Array
    g_scale: Array


def slopes(case: Case, inputs: Inputs, x: Array) -> list[Array]:
    """Return gate * act'(z) of each block, [B, H]."""
    result = []
    for block in range(case.blocks):
        w1, b1, w2, b2, gate = inputs.block(case, block)  # type: ignore[arg-type]
        h, slope = activate(case.activation, x @ w1.T + b1)
        x = x + gate * (h @ w2.T + b2)
        result.append(gate * slope)
    return result


def reference(case: Case, inputs: Inputs, x: Array, cotangent: Array) -> Reference:
    """Go down the blocks with the rows, and with the magnitudes of all their terms."""
    last, smooth = case.longest, case.activation not in ("identity", "relu")
    all_slopes = slopes(case, inputs, x.astype(np.float64))
    results = []
    for magnitudes in (False, True):
        of = np.abs if magnitudes else np.asarray
        g = of(cotangent.astype(np.float64))
        lengths = np.zeros((last + 1, *g.shape))
        lengths[0], tail = g, np.zeros_like(g)
        for block in reversed(range(case.blocks)):
            w1, _, w2, _, gate = inputs.block(case, block)  # type: ignore[arg-type]
            slope = of(all_slopes[block])
            if magnitudes and smooth:  # act' is as wrong as z is
                slope = slope + np.abs(gate)

            def back(v: Array, w1=w1, w2=w2, slope=slope, of=of) -> Array:
                return ((v @ of(w2)) * slope) @ of(w1)

            tail = tail + back(tail + lengths[last])
            lengths[1:] += back(lengths[:-1])
            g = g + back(g)
        results += [lengths if last == case.blocks else np.concatenate([lengths, tail[None]]), g]
    return Reference(*results)
