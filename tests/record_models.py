"""record_models: networks to record, and what watches them in another way."""

from __future__ import annotations

import copy

import torch
from models import Block, InPlaceBlock
from torch import Tensor, nn

from fastres.ops import residual_add
from fastres.record import record
from fastres.sites import add


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def vectors(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [InPlaceBlock(8) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(512, 5))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class Watched(nn.Module):
    """What hooks measure independently: the norms of the two sides of Block's sum, in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.skips: list[list[Tensor]] = []
        self.branches: list[list[Tensor]] = []
        for module in model.modules():
            if isinstance(module, Block):
                self.skips.append([])
                self.branches.append([])
                skip, branch = self.skips[-1], self.branches[-1]
                module.register_forward_pre_hook(lambda _, x, to=skip: to.append(x[0].double()))
                module.branch.register_forward_hook(lambda *a, to=branch: to.append(a[2].double()))

    def norms(self, which: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(each).detach().flatten(1).norm(dim=1) for each in which])


def run(model: nn.Module, x: Tensor, grad: bool = True) -> list[Tensor]:
    """One pass with gradients, from one seed: everything that must not change."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(grad):
        x = x.clone().requires_grad_(grad)
        out = model(x)
        if grad:
            out.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())] if grad else []
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_same_bits(model: nn.Module, x: Tensor, grad: bool = True, passes: int = 3) -> None:
    plain = copy.deepcopy(model)
    with record(model) as tape:
        for _ in range(passes):
            for one, other in zip(run(plain, x, grad), run(model, x, grad), strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
    assert tape.samples == passes * x.size(0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0


class Written(nn.Module):
    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.write = nn.Linear(8, 8), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x.sin(), self.linear)


WAYS = {
    "plus": lambda x, f: x + f(x),
    "reversed": lambda x, f: f(x) + x,
    "in place": lambda x, f: f(x).add_(x),
    "alpha": lambda x, f: torch.add(x, f(x), alpha=-0.5),
    "alpha on the skip": lambda x, f: torch.add(f(x), x, alpha=2),
    "by name": lambda x, f: torch.add(input=f(x), other=x),
    "mixed dtypes": lambda x, f: x.double() + f(x),
    "strided": lambda x, f: x.t().clone().t() + f(x),
    "declared": lambda x, f: add(x, f(x)),
    "residual_add": lambda x, f: residual_add(x, f(x))[0],
}
