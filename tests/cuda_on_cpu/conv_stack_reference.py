"""What conv_stack's kernels must give, by NumPy in float64: cases, inputs and the forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cuda_on_cpu.residual_add_reference import ELEMENTS, Array, Element

# [N, C, H, W]: tails of 16 bytes and of tiles of 32 and 64, in pixels and channels; images whose
# pixels are summed up by 1, 4 and 32; a border on every side of a pixel.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (9, 8, 2, 2), (2, 33, 6, 6), (1, 32, 8, 9), (2, 72, 8, 4)]
# Images that stay on one multiprocessor.
RESIDENT = [(1, 16, 32, 32), (2, 32, 16, 16), (1, 64, 8, 8)]


@dataclass(frozen=True)
class Case:
    """One shape with one choice of everything else."""

    index: int  # the dtype's in ELEMENTS, fastres::Dtype
    tf32: bool
    shape: tuple[int, int, int, int]
    blocks: int
    channels_last: bool
    gate: str  # "none", "blocks", "rows"
    sums: bool
    shift: int  # elements that x and the weights start off a 16-byte boundary
    planted: float  # one number of x: NaN, infinity; 0: none is

    @property
    def element(self) -> Element:
        """Return the element type."""
        return ELEMENTS[self.index]

    @property
    def unit(self) -> float:
        """Return the largest relative error of a factor of a product."""
        return 2.0**-11 if self.tf32 else self.element.unit


def cases(seed: int = 0) -> Iterator[Case]:
    """Go through all arithmetics and shapes, with the rest drawn anew for each."""
    rng = np.random.default_rng(seed)
    for index, tf32 in [(0, False), (1, False), (1, True), (2, False), (3, False)]:
        # One of them for each arithmetic, another one with the next seed.
        resident = RESIDENT[(index + seed) % 3 :][: tf32 or index >= 2]
        for shape in [*SHAPES, *resident]:
            blocks = 2 if shape in RESIDENT else int(rng.choice(3, p=[0.1, 0.4, 0.5]))
            channels_last, sums, shifted, nan = (
                bool(b) for b in rng.random(4) < [0.5, 0.8, 0.2, 0.1]
            )
            shifted = shifted and shape not in RESIDENT
            gate = str(rng.choice(["none", "blocks", "rows"]))
            # Where channels are filled up with zeros: no 0 times infinity may reach the others.
            planted = math.inf if shape == SHAPES[1] else math.nan if nan else 0.0
            yield Case(index, tf32, shape, blocks, channels_last, gate, sums, int(shifted), planted)


@dataclass
class Inputs:
    """x [N, C, H, W], the weights and the gate: elements, as they lie in memory."""

    x: Array  # [N, C, H, W] or [N, H, W, C]
    w1: Array  # [L, 3, 3, C in, C out]
    b1: Array  # [L, C]
    w2: Array
    b2: Array
    gate: Array | None  # [L, N], of any strides

    @classmethod
    def draw(cls, case: Case) -> Inputs:
        """Draw weights under which the stream neither dies nor explodes."""
        n, c, h, w = case.shape
        rng, blocks = np.random.default_rng(n * 1000 + c), case.blocks
        kernel, bias = (blocks, 3, 3, c, c), (blocks, c)
        values = [rng.standard_normal(s) for s in ((n, h, w, c), kernel, bias, kernel, bias)]
        for i, scale in enumerate((1, 1 / math.sqrt(9 * c), 0.5, 1 / math.sqrt(9 * c), 0.5)):
            values[i] *= scale
        x, w1, b1, w2, b2 = (exact(case, v) for v in values)
        if case.planted:
            x[-1, -1, -1, -1] = case.element.narrow(np.array([case.planted], case.element.wide))[0]
        if not case.channels_last:
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        gate = None
        if case.gate != "none":
            gate = rng.standard_normal((blocks, n if case.gate == "rows" else 1))
            gate[rng.random(gate.shape) < 0.2] = 0
            gate = np.broadcast_to(gate.astype(case.element.wide), (blocks, n))
        return cls(*(shifted(case, v) for v in (x, w1, b1, w2, b2)), gate)


def exact(case: Case, values: Array) -> Array:
    """Round so that the values are elements, and factors of products without another rounding."""
    if case.tf32:
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return case.element.narrow(values.astype(case.element.wide))


def shifted(case: Case, values: Array) -> Array:
    """Return the values in exactly their bytes, `shift` elements off a 16-byte boundary."""
    array = case.element.empty(values.shape, case.shift)
    array[:] = values
    return array


def convolve(x: Array, w: Array, b: Array) -> Array:
    """Return the convolution of x [N, H, W, C] with w [3, 3, C in, C out], and b [C] added."""
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return b + sum(padded[:, i : i + height, j : j + width] @ w[i, j] for i, j in taps)


def reference(case: Case, inputs: Inputs) -> tuple[list[Array], Array]:
    """Return the streams [N, H, W, C] before each block and after the last; the sums [L, 3, N]."""
    w1, b1, w2, b2, x = (
        case.element.widen(v).astype(np.float64)
        for v in (inputs.w1, inputs.b1, inputs.w2, inputs.b2, inputs.x)
    )
    x = x if case.channels_last else x.transpose(0, 2, 3, 1)
    streams, sums = [x], np.full((case.blocks, 3, case.shape[0]), np.nan)
    for block in range(case.blocks):
        z = convolve(x, w1[block], b1[block])
        p = convolve(np.where(z <= 0, 0, z), w2[block], b2[block])
        if inputs.gate is not None:
            p = p * inputs.gate[block].astype(np.float64)[:, None, None, None]
        sums[block] = [(v * u).sum((1, 2, 3)) for v, u in ((x, x), (p, p), (x, p))]
        x = np.where(x + p <= 0, 0, x + p)
        streams.append(x)
    return streams, sums
