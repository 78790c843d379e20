"""conditioning_models: a small residual network, its data and its loss."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Block(nn.Module):
    def __init__(self, width: int, normed: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if normed else nn.Identity()
        self.up, self.down = nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """Three blocks between two linear layers."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.blocks = nn.Sequential(*(Block(5, normed) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)))


X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(7) % 3


def cross_entropy(out: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, Y)
