"""What mlp_stack's kernels must give, by NumPy in float64: cases, inputs and both passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cuda_on_cpu.residual_add_reference import ELEMENTS, Array, Element

ACTIVATIONS = ["identity", "relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh"]
# [batch, width, hidden]: tails of 16 bytes, of the 16 x 8 of a warp and of tiles of 16, 32, 64 and
# 128; multiples of all these; hidden features fewer and more than the stream's.
SHAPES = [(1, 1, 1), (2, 5, 3), (16, 16, 16), (17, 24, 40), (64, 64, 64), (65, 33, 70)]
SHAPES += [(70, 72, 130), (33, 136, 48)]


@dataclass(frozen=True)
class Case:
    """One shape with one choice of everything else; blocks [first, last) are run."""

    index: int  # the dtype's in ELEMENTS, fastres::Dtype
    tf32: bool
    batch: int
    width: int
    hidden: int
    blocks: int
    first: int
    last: int
    activation: str
    gate: str  # "none", "blocks", "rows"
    shared: bool
    every: int  # 0: no states
    sums: bool
    wants_y: bool
    gstates: bool
    wants_weights: bool
    wants_ggate: bool
    add: bool
    shift: int  # elements that x and states start off a 16-byte boundary
    nan: bool

    @property
    def element(self) -> Element:
        """Return the element type."""
        return ELEMENTS[self.index]

    @property
    def unit(self) -> float:
        """Return the largest relative error of a factor of a product."""
        return 2.0**-11 if self.tf32 else self.element.unit


def cases(seed: int = 0, shapes: list[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """Go through all arithmetics and shapes, with the rest drawn anew for each."""
    rng = np.random.default_rng(seed)
    turn = int(rng.integers(len(ACTIVATIONS)))
    for index, tf32 in [(0, False), (1, False), (1, True), (2, False), (3, False)]:
        for batch, width, hidden in shapes:
            turn += 1
            blocks = int(rng.integers(1, 5))
            first = int(rng.integers(blocks)) if rng.random() < 0.3 else 0
            last = int(rng.integers(first, blocks)) + 1 if rng.random() < 0.3 else blocks
            shared, sums, wants_y, gstates, weights, ggate, add = (
                bool(b) for b in rng.random(7) < [0.3, 0.8, 0.9, 0.5, 0.9, 0.6, 0.5]
            )
            yield Case(
                index, tf32, batch, width, hidden, blocks, first, last,
                ACTIVATIONS[turn % len(ACTIVATIONS)], str(rng.choice(["none", "blocks", "rows"])),
                shared, int(rng.choice([0, 1, 3])), sums, wants_y, gstates, weights, ggate, add,
                int(rng.random() < 0.2), bool(rng.random() < 0.1))  # fmt: skip


def exact(case: Case, values: Array) -> Array:
    """Round so that the values are elements, and factors of products without another rounding."""
    if case.tf32:
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return case.element.narrow(values.astype(case.element.wide))


@dataclass
class Inputs:
    """The weights and the gate, in elements; wide() of each in float64."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    gate: Array | None  # [L, B], of any strides

    @classmethod
    def draw(cls, case: Case, rng: np.random.Generator) -> Inputs:
        """Draw weights under which the stream neither dies nor explodes."""
        sets = 1 if case.shared else case.blocks
        w1 = rng.standard_normal((sets, case.hidden, case.width)) / math.sqrt(case.width)
        w2 = rng.standard_normal((sets, case.width, case.hidden)) / math.sqrt(case.hidden)
        b1 = rng.standard_normal((sets, case.hidden)) / 2
        b2 = rng.standard_normal((sets, case.width)) / 2
        wide = case.element.wide
        gate = None
        if case.gate != "none":
            gate = rng.standard_normal((case.blocks, case.batch if case.gate == "rows" else 1))
            gate[rng.random(gate.shape) < 0.2] = 0
            gate = np.broadcast_to(gate.astype(wide), (case.blocks, case.batch))
        w1, b1, w2, b2 = (exact(case, w) for w in (w1, b1, w2, b2))
        return cls(w1, b1, w2, b2, gate)

    def block(self, case: Case, block: int) -> tuple[Array, Array, Array, Array, Array]:
        """Return a block's weights and its gate as a column, in float64."""
        i = 0 if case.shared else block
        w = (
            case.element.widen(w[i]).astype(np.float64)
            for w in (self.w1, self.b1, self.w2, self.b2)
        )
        gate = np.ones(case.batch) if self.gate is None else self.gate[block].astype(np.float64)
        return (*w, gate[:, None])  # type: ignore[return-value]


def activate(name: str, z: Array) -> tuple[Array, Array]:
    """Return act(z) and act'(z)."""
    sigmoid = 1 / (1 + np.exp(-z))
    if name == "identity":
        return z, np.ones_like(z)
    if name == "relu":
        return np.where(z <= 0, 0, z), np.where(z <= 0, 0.0, 1.0)
    if name == "tanh":
        return np.tanh(z), 1 - np.tanh(z) ** 2
    if name == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid)
    if name == "silu":
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    if name == "gelu":
        cdf = np.vectorize(lambda v: 0.5 + 0.5 * math.erf(v * math.sqrt(0.5)), otypes=[float])(z)
        return z * cdf, cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    scale, cube = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(scale * (z + cube * z**3))
    slope = scale * (1 + 3 * cube * z * z)
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope


def reference_forward(case: Case, inputs: Inputs, x: Array) -> tuple[list[Array], Array]:
    """Return the streams before each block and after the last, and the sums [L, 3, B]."""
    x = case.element.widen(x).astype(np.float64)
    streams, sums = [x], np.full((case.blocks, 3, case.batch), np.nan)
    for block in range(case.first, case.last):
        w1, b1, w2, b2, gate = inputs.block(case, block)
        h, _ = activate(case.activation, x @ w1.T + b1)
        p = gate * (h @ w2.T + b2)
        sums[block] = (x * x).sum(1), (p * p).sum(1), (x * p).sum(1)
        x = x + p
        streams.append(x)
    return streams, sums


def reference_backward(
    case: Case, inputs: Inputs, states: Array, g: Array, gstates: Array | None
) -> dict[str, tuple[Array, Array]]:
    """Return each gradient in float64, and its scale: the root of its terms' squares' sum."""
    widen = case.element.widen
    x, g = widen(states).astype(np.float64), g.astype(np.float64)
    names, sets = ("gw1", "gb1", "gw2", "gb2"), 1 if case.shared else case.blocks
    grads = {name: np.zeros((sets, *getattr(inputs, name[1:]).shape[1:])) for name in names}
    squares = {name: np.zeros_like(grad) for name, grad in grads.items()}
    ggate = np.full((case.blocks, case.batch), np.nan)
    ggate_scale = np.full((case.blocks, case.batch), np.nan)
    largest = np.abs(g).max(1, keepdims=True)
    for block in reversed(range(case.first, case.last)):
        w1, b1, w2, b2, gate = inputs.block(case, block)
        at, i = block - case.first, 0 if case.shared else block
        h, slope = activate(case.activation, x[at] @ w1.T + b1)
        q = g @ w2
        dz, gated = gate * q * slope, gate * g
        ggate[block] = (q * h).sum(1) + g @ b2
        ggate_scale[block] = np.sqrt(((q * h) ** 2).sum(1) + (g * g) @ (b2 * b2)) + np.abs(
            ggate[block]
        )
        for name, left, right in [("gw1", dz, x[at]), ("gw2", gated, h)]:
            grads[name][i] += left.T @ right
            squares[name][i] += (largest * np.abs(gate)).T ** 2 @ (right * right)
        for name, left in [("gb1", dz), ("gb2", gated)]:
            grads[name][i] += left.sum(0)
            squares[name][i] += ((largest * gate) ** 2).sum()
        g = g + dz @ w1
        if gstates is not None:
            g = g + widen(gstates[at])
        largest = np.maximum(largest, np.abs(g).max(1, keepdims=True))
    scales = {name: np.sqrt(square) for name, square in squares.items()}
    result = {name: (grads[name], scales[name]) for name in names}
    return {**result, "g": (g, largest * np.ones_like(g)), "ggate": (ggate, ggate_scale)}
