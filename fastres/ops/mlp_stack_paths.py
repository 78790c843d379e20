"""mlp_stack_paths: the gradient of a stack of residual blocks by the length of its paths, fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastres.ops import native
from fastres.ops.calls import check_flag, check_tensor
from fastres.ops.mlp_stack_blocks import ACTIVATIONS, CODES
from fastres.ops.stack_inputs import check_stack, expanded

_OP: Final = "mlp_stack_paths"
# Codes of the raw operator are their places here.
INPUT_PRECISIONS: Final = ("ieee", "tf32x3", "tf32")


class StackLengths(NamedTuple):
    """What is known of the rows G_0, ... G_K and, where K < L, the tail R: rows of them."""

    log2_norms: Tensor  # [rows, B] float64: log2 of the norm of each
    dots: Tensor  # [rows, B] float64: <row, g>
    norms: Tensor  # [2, B] float64: ||sum of the rows - g||, ||g||
    gradient: Tensor  # g, the ordinary gradient, [B, D]
    tail: Tensor  # R, [B, D]; zero where K = L
    rows: Tensor | None  # [rows, B, D], where they are kept


def lengths(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    grad: Tensor,
    max_length: int | None = None,
    gate: float | Tensor | None = None,
    activation: str = "relu",
    *,
    blocks: int | None = None,
    keep: bool = False,
    input_precision: str = "ieee",
) -> StackLengths:
    """Separate the gradient by x of a stack by the number of branches that its paths go through.

    The stack is that of `fastres.mlp_stack`, with the same arguments. Down its blocks, with J that
    of a branch, G_k <- G_k + J^T G_{k-1} and R <- R + J^T (R + G_K) (Veit et al. 2016,
    arXiv 1605.06431, unravelled). Each row of each sample is held with a power of two of its own.
    Half precision is computed in float32. Two runs agree bit for bit; nothing here has a gradient.

    Args:
        x: Stream before the first block, [B, D].
        w1: [L, H, D].
        b1: [L, H].
        w2: [L, D, H].
        b2: [L, D].
        grad: Gradient by the stream after the last block, [B, D], of the dtype and device of x.
        max_length: K, the longest length kept apart; None for L.
        gate: As of mlp_stack.
        activation: As of mlp_stack.
        blocks: As of mlp_stack.
        keep: Whether to return the rows themselves.
        input_precision: How the products of float32 take their factors on CUDA: "ieee" as they are;
            "tf32x3", on tensor cores, as sums of two tf32 each, 22 of 24 bits; "tf32" as one,
            11 bits, which is not exact. Everything else is computed alike. See `precision_used`.

    Raises:
        TypeError: If an argument is of a wrong type, or tensors differ in dtype or device.
        ValueError: If a shape does not fit, the activation or input_precision is not known, or
            max_length is negative or more than L.
    """
    if input_precision not in INPUT_PRECISIONS:
        raise ValueError(
            f"{_OP}: input_precision must be one of {', '.join(INPUT_PRECISIONS)}, "
            f"got {input_precision!r}"
        )
    given, count, longest = _prepare(
        x, (w1, b1, w2, b2), grad, max_length, gate, activation, blocks, keep
    )
    if not (native.runs_on(x) and not x.is_meta and count):
        return _composed(*given, count, activation, longest, keep)
    codes = (CODES[activation], longest, keep, INPUT_PRECISIONS.index(input_precision))
    found = StackLengths(*_RAW(*given, count, *codes))
    return found if keep else found._replace(rows=None)


def precision_used(x: Tensor, input_precision: str) -> str:
    """Return the input precision with which `lengths` computes on the device and dtype of x."""
    chosen = x.is_cuda and native.runs_on(x) and x.dtype != torch.float64
    return input_precision if chosen else "ieee"


def reference(*args: Any, **options: Any) -> StackLengths:
    """Compute `lengths` in plain PyTorch: the oracle, and the fallback without the library."""
    x, w1, b1, w2, b2, grad, *rest = args
    names = ("max_length", "gate", "activation")
    chosen: dict[str, Any] = {"max_length": None, "gate": None, "activation": "relu"}
    chosen |= {"blocks": None, "keep": False} | dict(zip(names, rest, strict=False)) | options
    given, count, longest = _prepare(x, (w1, b1, w2, b2), grad, **chosen)
    return _composed(*given, count, chosen["activation"], longest, chosen["keep"])


_RAW: Final[Any] = native.raw("_mlp_stack_paths")
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


def _prepare(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    grad: Tensor,
    max_length: int | None,
    gate: float | Tensor | None,
    activation: str,
    blocks: int | None,
    keep: bool,
) -> tuple[Given, int, int]:
    """Check the arguments; return the tensors as the raw operator takes them, L and K."""
    check_stack(_OP, x, weights, gate, activation, blocks)
    check_tensor(_OP, "grad", grad)
    check_flag(_OP, "keep", keep)
    if grad.shape != x.shape:
        raise ValueError(f"{_OP}: grad must have shape {[*x.shape]}, got {[*grad.shape]}")
    if grad.dtype != x.dtype or grad.device != x.device:
        raise TypeError(
            f"{_OP}: grad must be {x.dtype} on {x.device} as x, got {grad.dtype} on {grad.device}"
        )
    count = weights[0].size(0) if blocks is None else blocks
    longest = count if max_length is None else max_length
    if isinstance(longest, bool) or not isinstance(longest, int):
        raise TypeError(f"{_OP}: max_length must be an integer, got {longest!r}")
    if not 0 <= longest <= count:
        raise ValueError(f"{_OP}: max_length must be 0 to {count}, the blocks, got {longest}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w1, b1, w2, b2 = (w.detach().to(wide) for w in weights)
    gates = expanded(gate, x, count)
    gates = None if gates is None else gates.detach()
    given = (x.detach().to(wide), w1, b1, w2, b2, gates, grad.detach().to(wide))
    return given, count, longest


@dataclass(frozen=True)
class _Rows:
    """Rows held as 2^exponents times the true ones."""

    held: Tensor  # [rows, B, D]
    exponents: Tensor  # [rows, B]

    @classmethod
    def of(cls, held: Tensor, exponents: Tensor) -> _Rows:
        """Bring the largest element of each row below 1; a row of zeros is infinitely far down."""
        size = held.abs().amax(-1)
        order = torch.frexp(size).exponent.double().where(size.isfinite(), 0.0)
        exponents = (exponents - order).where(size != 0, torch.inf)
        return cls(held * torch.exp2(-order)[..., None].to(held.dtype), exponents)

    def __add__(self, other: _Rows) -> _Rows:
        """Add row by row."""
        common = torch.minimum(self.exponents, other.exponents)
        parts = [
            part.held * torch.exp2((common - part.exponents).nan_to_num(0.0))[..., None]
            for part in (self, other)
        ]
        return _Rows.of((parts[0] + parts[1]).to(self.held.dtype), common)

    def __getitem__(self, where: slice) -> _Rows:
        return _Rows(self.held[where], self.exponents[where])

    @classmethod
    def cat(cls, parts: Sequence[_Rows]) -> _Rows:
        """Put rows one after the other."""
        return cls(torch.cat([p.held for p in parts]), torch.cat([p.exponents for p in parts]))

    def true(self) -> Tensor:
        """Return the rows in float64, zero where they are below its range."""
        return self.held.double() * torch.exp2(-self.exponents)[..., None]


def _composed(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    grad: Tensor,
    blocks: int,
    activation: str,
    longest: int,
    keep: bool,
) -> StackLengths:
    slopes = _slopes(x, (w1, b1, w2, b2), gate, blocks, activation)
    tails = int(longest < blocks)
    start = torch.zeros(longest + 2 + tails, *grad.shape, dtype=grad.dtype, device=grad.device)
    start[0] = start[-1] = grad  # G_0 and, last, g
    rows = _Rows.of(start, torch.zeros(start.shape[:2], dtype=torch.float64, device=x.device))
    for block in reversed(range(blocks)):
        i = block if w1.size(0) == blocks else 0

        def through(rows: _Rows, i: int = i, slope: Tensor = slopes[block]) -> _Rows:
            return _Rows.of(rows.held @ w2[i] * slope @ w1[i], rows.exponents)

        nothing = _Rows(torch.zeros_like(rows.held[:1]), rows.exponents[:1])
        sources = [nothing, rows[:longest], rows[-1:]]
        if tails:
            sources.insert(2, rows[longest : longest + 1] + rows[-2:-1])
        rows = rows + through(_Rows.cat(sources))
    return _measured(rows, tails, keep)


def _slopes(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    gate: Tensor | None,
    blocks: int,
    activation: str,
) -> list[Tensor]:
    """Gate * act'(z) of every block, each [B, H]."""
    slopes = []
    for block in range(blocks):
        w1, b1, w2, b2 = (w[block if w.size(0) == blocks else 0] for w in weights)
        with torch.enable_grad():
            z = torch.addmm(b1, x, w1.t()).requires_grad_()
            h = ACTIVATIONS[activation](z)
            (slope,) = torch.autograd.grad(h.sum(), z)
        scale = 1.0 if gate is None else gate[block][:, None]
        slopes.append(scale * slope)
        x = x + scale * torch.addmm(b2, h.detach(), w2.t())
    return slopes


def _measured(rows: _Rows, tails: int, keep: bool) -> StackLengths:
    g, rows = rows[-1:], rows[:-1]
    squares = rows.held.double().square().sum(-1)
    dots = (rows.held.double() * g.held).sum(-1)
    off = rows.true().sum(0) - g.true()[0]
    dtype = rows.held.dtype
    kept = rows.true().to(dtype)
    return StackLengths(
        log2_norms=squares.log2() / 2 - rows.exponents,
        dots=dots * torch.exp2(-rows.exponents - g.exponents),
        norms=torch.linalg.vector_norm(torch.stack([off, g.true()[0]]), dim=-1),
        gradient=g.true()[0].to(dtype),
        tail=kept[-1] if tails else torch.zeros_like(kept[0]),
        rows=kept if keep else None,
    )
