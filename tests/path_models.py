"""path_models: networks whose single paths can be switched on by hand, for what is said of paths.

Independent of what is tested: nothing here knows autograd functions, hooks or vmap. A side of an
add is shut by adding it as a constant, one path is one ordinary backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from models import PaddedBlock
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def shut(t: Tensor, opened: bool) -> Tensor:
    """Return t, bit for bit, as a constant where it is not open."""
    return t if opened else t.detach()


class Switch(nn.Module):
    """A block whose backward pass can be told to take one side only."""

    taken: bool | None = None  # through the branch, through the skip, or both

    def join(self, skip: Tensor, branch: Tensor) -> Tensor:
        if self.taken is None:
            return skip + branch
        return shut(skip, not self.taken) + shut(branch, self.taken)


class SwitchBlock(Switch):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch(x))


class SwitchPadded(PaddedBlock, Switch):
    """Convolutions and batch norm, ReLU after the sum, option-A projections."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.join(self.shortcut(x), self.conv2(self.conv1(x))))


def two_layers(width: int, gain: float = 1.0) -> nn.Sequential:
    branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    branch[2].weight.data *= gain
    return branch


def switch_mlp(blocks: int, width: int = 5, gain: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    inner = [SwitchBlock(two_layers(width, gain)) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(3, width), *inner, nn.Linear(width, 2)).double()


def squares(out: Tensor) -> Tensor:
    """A loss whose gradient differs from sample to sample."""
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sin().sum()


def enumerate_paths(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor] = squares,
    allowed: Callable[[tuple[bool, ...]], bool] = lambda path: True,
    wanted: list[Tensor] | None = None,
) -> Iterator[tuple[tuple[bool, ...], list[Tensor]]]:
    """Yield every path, one choice per block, with its gradient by x or by what is wanted."""
    blocks = [module for module in model.modules() if isinstance(module, Switch)]
    for path in itertools.product((False, True), repeat=len(blocks)):
        if not allowed(path):
            continue
        for block, taken in zip(blocks, path, strict=True):
            block.taken = taken
        leaf = x.clone().requires_grad_()
        to = [leaf] if wanted is None else wanted
        value = loss(model(leaf))
        found = torch.autograd.grad(value, to, allow_unused=True) if value.requires_grad else ()
        found = found or [None] * len(to)
        yield (
            path,
            [torch.zeros_like(t) if g is None else g for g, t in zip(found, to, strict=True)],
        )
    for block in blocks:
        block.taken = None


def by_length(
    model: nn.Module, x: Tensor, **options: Callable[..., object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the gradients of all paths of one length, their squared norms, and their norms."""
    blocks = sum(isinstance(module, Switch) for module in model.modules())
    sums = torch.zeros(blocks + 1, *x.shape, dtype=x.dtype)
    energy, norms = torch.zeros(2, blocks + 1, dtype=torch.float64)
    for path, (g,) in enumerate_paths(model, x, **options):
        sums[sum(path)] += g
        energy[sum(path)] += g.double().square().sum()
        norms[sum(path)] += g.double().norm()
    return sums, energy, norms


def vectors(batch: int = 3, features: int = 3, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, features, generator=source, dtype=torch.float64)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


class Scale(nn.Module):
    """x + c x, with x -> c x as the branch."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c * x


def nested() -> nn.Sequential:
    torch.manual_seed(0)
    inner = [SwitchBlock(two_layers(5)) for _ in range(2)]
    outer = SwitchBlock(nn.Sequential(nn.Linear(5, 5), *inner, nn.Linear(5, 5)))
    blocks = [SwitchBlock(two_layers(5)), outer, SwitchBlock(two_layers(5))]
    return nn.Sequential(nn.Linear(3, 5), *blocks).double()


def is_once(path: tuple[bool, ...]) -> bool:
    """Tell whether no inner block is taken where the outer one is not: those are one path."""
    return path[1] or not (path[2] or path[3])
