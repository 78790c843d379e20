"""mlp_stack_paths: every path length of a stack of residual blocks, beside other exact ways.

The shapes are [L, B, D]: blocks, batch and width, with H = D and ReLU. All L + 1 lengths take
2 L (L + 1) B D^2 operations behind the forward pass's 4 L B D^2, in L (L + 1) / 2 steps of two
products of [B, D] and [D, D] each; a ReLU closes half of the hidden features of a sample, and half
of these operations multiply by 0. The limit is that of the other half at the rate of the best
matrix product (`limits.peaks`). All baselines get the derivatives of the activations, and return
all lengths; none takes norms or inner products or keeps its numbers in range, as fastres does.
Weights are drawn so that float32 holds all lengths.

    in place    per block two products of all lengths so far with the weights, the second one added
                to the rows one length up: the fewest calls that torch needs
    vmap        torch.func: per block the vector-Jacobian product of all rows by vmap
    autograd    one torch.autograd.grad per block and length, on a graph that is kept

"K = 32" keeps 32 lengths and the exact tail; "all lengths" beside it is fastres with all of them.
On a GPU "tf32x3" and "tf32" are fastres with these input precisions; the second is not exact.

What explains the figures: nearly all time is in the products, of fastres and of the recurrence in
place, which is two products a block and nothing else. All lengths of a sample go through the same
hidden features, those that its ReLU has opened, and on a CPU fastres puts their weights side by
side and leaves the others out: half of the operations. What it adds are the choice of the columns
of W2, which weighs the more the fewer lengths are kept (an eighth of the time at K = 32), the size
of every row, and lanes that no weight fills. K = 32 takes 1 / 4.5 of the operations of all lengths,
so that 4 times faster leaves it a tenth for what does not shrink with K: that choice, to find the
features, and the forward pass, which 16 samples take on one thread, are more than twice that. Of
fewer than 12 rows the products are with all columns, and what comes out is chosen from.

Goals on a CPU with two threads: 1.7 times in place and 2.3 times vmap at L = 300; 10 times autograd
(60 blocks: 300 take it minutes); K = 32 4 times faster than all lengths. On a GPU, G7: 1.8 times in
place by graph replay (5 times at D = 64), 4 times vmap, G7k 4 times all lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Variant
from benchmarks.clocks import Call
from benchmarks.command import run
from fastres.ops.mlp_stack_paths import lengths

NAME = "mlp_stack_paths"
BLOCKS = 300
Shape = tuple[int, int, int]  # L, B, D


def tensors(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """Return x, w1, b1, w2, b2 and the gradient by the output."""
    blocks, batch, width = shape
    x, grad = (torch.randn(batch, width, device=device) for _ in range(2))
    w1, w2 = (1.2 * width**-0.5 * torch.randn(blocks, width, width, device=device) for _ in "12")
    b1, b2 = (0.1 * torch.randn(blocks, width, device=device) for _ in "12")
    return x, w1, b1, w2, b2, grad


def masks(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> list[Tensor]:
    """Run the stack, and return where the ReLU of each block passes, [B, D] each."""
    found = []
    for u1, c1, u2, c2 in zip(w1, b1, w2, b2, strict=True):
        z = torch.addmm(c1, x, u1.t())
        found.append(z > 0)
        x = x + torch.addmm(c2, z.relu_(), u2.t())
    return found


def ours(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grad: Tensor, *, longest: int,
    input_precision: str = "ieee",
) -> Call:  # fmt: skip
    """Return a call of the operator."""
    return lambda: lengths(x, w1, b1, w2, b2, grad, longest, input_precision=input_precision)


def in_place(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grad: Tensor, *, longest: int
) -> Call:
    """Return the recurrence by two products per block, with the tail where there is one."""
    blocks, tails = w1.size(0), int(longest < w1.size(0))

    def call() -> Tensor:
        passes = masks(x, w1, b1, w2, b2)
        rows = grad.new_zeros(longest + 1 + tails, *grad.shape)
        rows[0] = grad
        for done, block in enumerate(reversed(range(blocks))):
            kept = min(done + 1, longest)  # rows that are added to
            sources = longest + 2 if done >= longest and tails else kept
            through = (rows[:sources].flatten(0, 1) @ w2[block]).view(sources, *grad.shape)
            through = (through.mul_(passes[block]).flatten(0, 1) @ w1[block]).view_as(through)
            rows[1 : kept + 1] += through[:kept]
            if sources > kept:
                rows[-1] += through[-1] + through[-2]
        return rows

    def all_lengths() -> Tensor:
        passes = masks(x, w1, b1, w2, b2)
        rows = grad.new_zeros(blocks + 1, *grad.shape)
        rows[0] = grad
        for done, block in enumerate(reversed(range(blocks))):
            through = (rows[: done + 1].flatten(0, 1) @ w2[block]).view(done + 1, *grad.shape)
            through.mul_(passes[block])
            rows[1 : done + 2].flatten(0, 1).addmm_(through.flatten(0, 1), w1[block])
        return rows

    return call if tails else all_lengths


def by_vmap(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grad: Tensor) -> Call:
    """Return the recurrence by vector-Jacobian products of the branches, mapped over the rows."""

    def branch(x: Tensor, block: int) -> Tensor:
        h = torch.addmm(b1[block], x, w1[block].t()).relu()
        return torch.addmm(b2[block], h, w2[block].t())

    def call() -> Tensor:
        steps, at = [], x
        for block in range(w1.size(0)):
            p, vjp = torch.func.vjp(partial(branch, block=block), at)
            steps.append(vjp)
            at = at + p
        rows = grad.new_zeros(w1.size(0) + 1, *grad.shape)
        rows[0] = grad
        for done, vjp in enumerate(reversed(steps)):
            (through,) = torch.func.vmap(vjp)(rows[: done + 1])
            rows[1 : done + 2] += through
        return rows

    return call


def by_autograd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, grad: Tensor) -> Call:
    """Return the recurrence by one backward pass through one branch for each row."""

    def call() -> Tensor:
        steps, at = [], x
        for u1, c1, u2, c2 in zip(w1, b1, w2, b2, strict=True):
            at = at.detach().requires_grad_()
            p = torch.addmm(c2, torch.addmm(c1, at, u1.t()).relu(), u2.t())
            steps.append((at, p))
            at = at + p
        rows = [grad]
        for at, p in reversed(steps):
            through = [torch.autograd.grad(p, at, row, retain_graph=True)[0] for row in rows]
            rows = [rows[0], *(a + b for a, b in zip(rows[1:], through, strict=False)), through[-1]]
        return torch.stack(rows)

    return call


def case(
    shape: Shape, device: torch.device, variants: dict[str, Variant], goals: dict[str, float],
    longest: int | None = None,
) -> Case:  # fmt: skip
    """Return a case; `longest` is K."""
    blocks, batch, width = shape
    kept = blocks if longest is None else longest
    rows = sum(min(done + 1, kept + 1) for done in range(blocks))
    rows += (blocks - kept) if kept < blocks else 0  # the tail
    flops = 2.0 * width**2 * batch * (rows + 2 * blocks)
    name = "all lengths" if longest is None else f"K = {longest} and tail"
    return Case(
        name, shape, torch.float32, lambda: tensors(shape, device),
        {OURS: Variant(partial(ours, longest=kept)), **variants}, 0, flops, headline=True,
        goals=goals, slow=True, judged="graph" if device.type == "cuda" else "",
    )  # fmt: skip


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the cases for a device."""
    cuda = device.type == "cuda"
    blocks, few = (6, 4) if smoke else (BLOCKS, 60)
    shapes = [(16, 64), (64, 64), (16, 128), (64, 128)]
    if cuda:
        shapes = [(128, 64), (1024, 64), (128, 128), (1024, 128)]
    whole = {"in place": Variant(partial(in_place, longest=blocks)), "vmap": Variant(by_vmap)}
    for batch, width in shapes[:1] if smoke else shapes:
        least = {"in place": 1.7, "vmap": 2.3}
        if cuda:
            least = {"in place": 5.0 if width == 64 else 1.8, "vmap": 4.0}
            for precision in ("tf32x3", "tf32"):
                call = partial(ours, longest=blocks, input_precision=precision)
                whole[precision] = Variant(call)
        yield case((blocks, batch, width), device, whole, {} if smoke else least)
    for batch, width in shapes[:1] if smoke else shapes:
        short = min(32, blocks // 2)
        variants = {
            "all lengths": Variant(partial(ours, longest=blocks)),
            "in place": Variant(partial(in_place, longest=short)),
        }
        goals = {} if smoke else {"all lengths": 4.0}
        yield case((blocks, batch, width), device, variants, goals, short)
    variants = {
        "in place": Variant(partial(in_place, longest=few)),
        "autograd": Variant(by_autograd, capturable=False),
    }
    yield case((few, 16, 64), device, variants, {} if smoke else {"autograd": 10.0})


if __name__ == "__main__":
    sys.exit(run([sys.modules[__name__]]))
