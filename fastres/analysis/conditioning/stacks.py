"""stacks: Hessian-vector products through mlp_stack, forward over reverse, many vectors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from fastres.analysis.conditioning.operators import SymmetricOperator
from fastres.analysis.conditioning.stack_parts import (
    Block,
    Four,
    Pass,
    Tangents,
    derivatives,
    each_block,
    unbound,
)
from fastres.ops import mlp_stack
from fastres.ops.layout import accumulate

_TANGENTS: Final = 256 << 20  # bytes: more vectors at once are no faster


class StackHessian(SymmetricOperator):
    """The Hessian of loss(y) by the weights of an mlp_stack; y is its stream after the last block.

    It acts on w1, b1, w2 and b2 flattened, one after the other: P = L (2 H D + H + D). The stream
    is computed by the fused operator, once; a product then moves tangents forward and cotangents
    of tangents backward through the blocks, all vectors together and without an autograd graph:

        dz' = W1 dx + dW1 x + db1           dx <- dx + gate (W2 (act'(z) dz') + dW2 h + db2)
        dq  = W2^T dg + dW2^T g             dg <- dg + W1^T ddz + dW1^T dz
        ddz = act'(z) dq + act''(z) q dz'   (Pearlmutter 1994, Neural Computation 6)

    Args:
        x: Stream, [B, D]; float32 or float64.
        w1: First weights, [L, H, D].
        b1: First biases, [L, H].
        w2: Second weights, [L, D, H].
        b2: Second biases, [L, D].
        loss: Maps y [B, D] to a scalar.
        gate: None, or the scale of every branch: a number, [L] or [L, B].
        activation: One that `mlp_stack` knows.

    Raises:
        TypeError: If x is of half precision, or as mlp_stack.
        ValueError: As mlp_stack, or if there are no blocks or samples, or the loss is no scalar.
    """

    def __init__(
        self,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        loss: Callable[[Tensor], Tensor],
        gate: float | Tensor | None = None,
        activation: str = "relu",
    ) -> None:
        if x.dtype != accumulate(x.dtype):
            raise TypeError(f"hessian: x must be float32 or float64, got {x.dtype}")
        self.weights: Four = (w1.detach(), b1.detach(), w2.detach(), b2.detach())
        if isinstance(gate, Tensor):
            gate = gate.detach()
        with torch.no_grad():
            states, _ = mlp_stack(x.detach(), *self.weights, gate, activation, return_states=True)
            if len(w1) == 0:
                raise ValueError("hessian: w1 must have >= 1 block, got 0")
            if len(x) == 0:
                raise ValueError("hessian: x must have >= 1 sample, got 0")
            value = loss(states[-1])
        if value.dim():
            raise ValueError(f"hessian: loss must be a scalar, got shape {[*value.shape]}")
        super().__init__(sum(w.numel() for w in self.weights), x.dtype, x.device)
        self._gradient = torch.func.grad(loss)
        column = _column(gate, x, len(w1))
        self._pass = at = self._linearise(states, activation, column)
        nothing = [None] * len(w1)
        bends, gates = (nothing if t is None else t for t in (at.bend, column))
        parts = zip(self.weights[0], self.weights[2], at.slope, bends, gates, strict=True)
        self._blocks = [Block(*part) for part in parts]

    def gradient(self) -> Tensor:
        """Compute the gradient by the weights, [P]."""
        at = self._pass
        parts = (at.dz.mT @ at.x, at.dz.sum(1), at.g.mT @ at.h, at.g.sum(1))
        return torch.cat([part.flatten() for part in parts])

    @torch.no_grad()
    def _linearise(self, states: Tensor, activation: str, gate: Tensor | None) -> Pass:
        """Run the backward pass from the states [L + 1, B, D]; gate [L, B or 1, 1]."""
        w1, b1, w2, _ = self.weights
        x, y = states[:-1], states[-1]
        z = torch.baddbmm(b1[:, None], x, w1.mT)
        h, slope, bend = derivatives(activation, z)
        g, dz = torch.empty_like(x), torch.empty_like(z)
        cotangent = self._gradient(y)
        for block in range(len(w1) - 1, -1, -1):
            branch = cotangent if gate is None else cotangent * gate[block]
            g[block] = branch
            q = torch.mm(branch, w2[block], out=dz[block])
            if bend is not None:
                bend[block] *= q
            q *= slope[block]
            cotangent = torch.addmm(cotangent, q, w1[block])
        return Pass(x, y, h, slope, bend, g, dz)

    @torch.no_grad()
    def products(self, vectors: Tensor) -> Tensor:
        """Multiply vectors [K, P]: [K, P], all at once within the memory for tangents."""
        out = torch.empty_like(vectors)
        blocks, batch, width = self._pass.x.shape
        hidden = self._pass.h.size(2)
        one = blocks * batch * (width + 2 * hidden) * vectors.itemsize
        chunk = max(1, _TANGENTS // one)
        for part, result in zip(_rows(vectors, chunk), _rows(out, chunk), strict=True):
            v, into = self._split(part), self._split(result)
            self._backward(v, self._forward(v), into)
        return out

    def _forward(self, v: Four) -> Tangents:
        """Move tangents of the vectors forward, block by block."""
        at, count = self._pass, len(v[0])
        blocks, batch, width = at.x.shape
        dx = at.x.new_empty(blocks, count, batch, width)
        dz = at.h.new_empty(blocks, count, batch, at.h.size(2))
        dh = dz if at.bend is None else torch.empty_like(dz)
        d = at.x.new_zeros(count, batch, width)
        rows = d.flatten(0, 1)  # of all vectors, for the products with the weights
        each = (each_block(t, count) for t in (at.x, at.h))
        for at_block, given, x, h, kept, z, hid in zip(
            self._blocks, unbound(v), *each, dx, dz, dh, strict=True
        ):
            kept.copy_(d)
            torch.baddbmm(given.b1, x, given.w1.mT, out=z)
            z.flatten(0, 1).addmm_(rows, at_block.w1.mT)
            torch.mul(z, at_block.slope, out=hid)
            p = torch.baddbmm(given.b2, h, given.w2.mT)
            p.flatten(0, 1).addmm_(hid.flatten(0, 1), at_block.w2.mT)
            d.add_(p if at_block.gate is None else p.mul_(at_block.gate))
        return Tangents(dx, dz, dh, d)

    def _backward(self, v: Four, tangents: Tangents, out: Four) -> None:
        """Move the tangents of the cotangents backward, and write the products."""
        at, count = self._pass, len(v[0])
        dg = self._turned(tangents.dy).contiguous()  # [K, B, D]
        ddz = at.h.new_empty(count, *at.h.shape[1:])  # [K, B, H]
        each = (each_block(t, count) for t in (at.x, at.h, at.g, at.dz))
        steps = zip(self._blocks, unbound(v), unbound(out), *each, *tangents[:3], strict=True)
        for at_block, given, into, x, h, g, dz, dx, z, hid in reversed(list(steps)):
            branch = dg if at_block.gate is None else dg * at_block.gate
            torch.bmm(g, given.w2, out=ddz)
            ddz.flatten(0, 1).addmm_(branch.flatten(0, 1), at_block.w2)
            ddz.mul_(at_block.slope)
            if at_block.bend is not None:
                ddz.addcmul_(at_block.bend, z)
            torch.bmm(ddz.mT, x, out=into.w1).baddbmm_(dz.mT, dx)
            torch.sum(ddz, 1, keepdim=True, out=into.b1)
            torch.bmm(branch.mT, h, out=into.w2).baddbmm_(g.mT, hid)
            torch.sum(branch, 1, keepdim=True, out=into.b2)
            dg.flatten(0, 1).addmm_(ddz.flatten(0, 1), at_block.w1)
            dg.baddbmm_(dz, given.w1)

    def _turned(self, dy: Tensor) -> Tensor:
        """Multiply tangents of y, [K, B, D], by the Hessian of the loss by y: [K, B, D]."""

        def one(tangent: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(self._gradient, (self._pass.y,), (tangent,))[1]
            return found

        return torch.func.vmap(one)(dy)

    def _split(self, vectors: Tensor) -> Four:
        """View vectors [K, P] as w1 [K, L, H, D], b1 [K, L, 1, H], w2 [K, L, D, H], b2."""
        sizes = [w.numel() for w in self.weights]
        parts = vectors.split(sizes, 1)  # type: ignore[no-untyped-call]
        a, b, c, d = (p.unflatten(1, w.shape) for p, w in zip(parts, self.weights, strict=True))
        return a, b.unsqueeze(2), c, d.unsqueeze(2)


def _rows(vectors: Tensor, chunk: int) -> Sequence[Tensor]:
    found: Sequence[Tensor] = vectors.split(chunk)  # type: ignore[no-untyped-call]
    return found


def _column(gate: float | Tensor | None, x: Tensor, blocks: int) -> Tensor | None:
    """View a gate as [L, B or 1, 1]."""
    if gate is None:
        return None
    whole = torch.as_tensor(gate, dtype=x.dtype, device=x.device)
    if whole.dim() < 2:
        whole = whole.reshape(-1, 1)
    return whole.expand(blocks, -1).unsqueeze(2)
