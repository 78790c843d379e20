"""trace tells which adds are residual, however they are written, and leaves models as they were."""

from __future__ import annotations

import math
import time

import pytest
import torch
from models import Block, InPlaceBlock, cifar_resnet, residual_mlp
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.ops import residual_add
from fastres.sites import add, trace


class Written(nn.Module):
    """One residual add, written in the given way, in the model's own forward."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(8, 8), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x.sin(), self.linear)


def iadd(x, f):
    y = f(x)
    y += x
    return y


def iadd_skip(x, f):
    x = x.clone()
    y = f(x)
    x += y
    return x


WAYS = {
    "plus": lambda x, f: x + f(x),
    "plus reversed": lambda x, f: f(x) + x,
    "torch.add": lambda x, f: torch.add(x, f(x)),
    "by name": lambda x, f: torch.add(input=f(x), other=x),
    "alpha": lambda x, f: torch.add(x, f(x), alpha=0.5),
    "method": lambda x, f: f(x).add(x),
    "method in place": lambda x, f: f(x).add_(x),
    "in place": iadd,
    "into the skip": iadd_skip,
    "sum": lambda x, f: sum([x, f(x)]),
    "after a view": lambda x, f: x + f(x.view(2, 2, 4).flatten(1)),
    "after a cast": lambda x, f: x.double() + f(x).double(),
    "declared": lambda x, f: add(x, f(x)),
    "residual_add": lambda x, f: residual_add(x, f(x))[0],
    "layer scale": lambda x, f: x + f(x) * f.bias,
    "dropout": lambda x, f: F.dropout(x + F.dropout(f(x), 0.5)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_residual_add_is_one_identity_site(way):
    sites = trace(Written(WAYS[way]), torch.randn(2, 8))
    assert [(site.name, site.kind, site.level) for site in sites] == [("Written", "identity", 0)]


def polynomial_gelu(x, f):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * f.bias


def film(x, f):
    scale, shift = f(x.cos()).chunk(2, dim=1)
    return F.pad(x[:, :4].exp() * (1 + scale) + shift, (0, 4))


def recurrent(x, f):
    first, second = x.view(2, 8).repeat(1, 2).split(8, dim=1)
    return f(second) + f(torch.tanh(f(first)))


OTHERS = {
    "gelu": polynomial_gelu,
    "film by halves": film,
    "film by two maps": lambda x, f: x.exp() * (1 + f(x.cos())) + f(x.cos()),
    "recurrent cell": recurrent,
    "two linear maps": lambda x, f: f(x) + F.linear(x, f.weight),
    "two branches": lambda x, f: f(x).relu() + f(x).tanh(),
    "highway": lambda x, f: x * torch.sigmoid(f(x)) + f(x) * (1 - torch.sigmoid(f(x))),
    "parameter": lambda x, f: f(x) + f.weight[:2],
    "constant": lambda x, f: f(x) + torch.ones(2, 8),
    "noise": lambda x, f: f(x) + 0.1 * torch.randn_like(x),
    "broadcast": lambda x, f: x + f(x).mean(1, keepdim=True),
    "scalar": lambda x, f: f(x) + 1e-5,
    "twice": lambda x, f: f(x + x),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_adds_are_no_sites(what):
    assert trace(Written(OTHERS[what]), torch.randn(2, 8)) == []


def test_a_sum_of_a_skip_and_two_branches_is_two_sites():
    both = Written(lambda x, f: x + f(x).relu() + f(x).tanh())
    assert [site.name for site in trace(both, torch.randn(2, 8))] == ["Written[0]", "Written[1]"]


def test_different_pieces_of_one_tensor_are_different_tensors():
    def hierarchical(x, f):
        first, second = torch.cat([x, x.cos()], 1).split(8, dim=1)
        return second + f(first).relu()  # res2net

    assert trace(Written(hierarchical), torch.randn(2, 8)) == []
    same = Written(lambda x, f: x[:, :4] + f(F.pad(x[:, :4], (0, 4)))[:, :4].relu())
    assert len(trace(same, torch.randn(2, 8))) == 1


def test_in_place_changes_through_a_view_are_seen():
    def through_a_view(x, f):
        x = x.clone()
        x.view(-1).mul_(f.bias.repeat(2))
        y = f(x)
        x.view(4, 4).add_(y.view(4, 4))
        return x

    assert len(trace(Written(through_a_view), torch.randn(2, 8))) == 1


def test_what_an_alias_writes_is_no_longer_the_skip():
    def overwritten(x, f):
        copy = x.clone()
        copy.view(-1).copy_(f(x).view(-1))
        return x + copy

    assert len(trace(Written(overwritten), torch.randn(2, 8))) == 1


def test_memory_that_was_written_is_not_taken_for_another_tensor():
    addresses = []

    def reused(x, f):
        for _ in range(20):
            h = f(x).add_(1)
            addresses.append(h.untyped_storage()._cdata)
            del h
        copy = x.clone()
        return copy + f(x).relu()

    assert [site.kind for site in trace(Written(reused), torch.randn(2, 8))] == ["identity"]
    assert len(set(addresses)) == 20


def test_a_custom_autograd_function_and_a_user_hook_do_not_hide_the_skip():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(x.detach().numpy() * 2)

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    class Doubled(nn.Module):
        def forward(self, x):
            return Double.apply(x)

    model = nn.Sequential(nn.Linear(8, 8), Block(8, nn.Sequential(nn.Linear(8, 8), Doubled())))
    model[1].register_full_backward_hook(lambda *_: None)
    assert len(trace(model, torch.randn(2, 8))) == 1


def test_tracing_leaves_buffers_generators_and_gradients_as_they_were():
    model = nn.Sequential(conv_model := cifar_resnet(), nn.Dropout())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [b._version for b in model.buffers()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trace(model.train(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert versions == [b._version for b in model.buffers()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in conv_model.parameters())


def test_three_hundred_blocks_are_traced_in_under_two_seconds():
    model = residual_mlp(8, 300)
    start = time.perf_counter()
    assert len(trace(model, torch.randn(2, 4))) == 300
    assert time.perf_counter() - start < 2


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), InPlaceBlock(4), InPlaceBlock(4)).eval()
        assert len(trace(model, torch.randn(2, 3, 4, 4))) == 2


def test_models_that_cannot_be_traced_are_refused_by_name():
    with pytest.raises(TypeError, match=r"trace: model must be a torch\.nn\.Module, got function"):
        trace(lambda x: x, torch.randn(2, 8))
    scripted = torch.jit.trace(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(TypeError, match="trace: model must not be compiled or scripted"):
        trace(scripted, torch.randn(2, 8))
    with pytest.raises(TypeError, match="trace: model must not be compiled or scripted"):
        trace(torch.compile(nn.Linear(8, 8)), torch.randn(2, 8))


def test_a_model_with_a_call_of_its_own_is_refused():
    class Direct(Block):
        def __call__(self, x):
            return self.forward(x)

    with pytest.raises(TypeError, match=r"must run through torch\.nn\.Module\.__call__"):
        trace(Direct(8), torch.randn(2, 8))


def test_two_sides_that_cannot_be_added_name_the_module():
    wrong = Written(lambda x, f: x + f(x)[:, :3])
    with pytest.raises(
        ValueError, match=r"trace: the add in 'Written' must .* \[2, 8\] and \[2, 3\]"
    ):
        trace(wrong, torch.randn(2, 8))
