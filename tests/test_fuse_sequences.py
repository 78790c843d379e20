"""Residual MLP blocks that follow each other run as one call, unless one of them is looked at."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres.fusing import sequences
from fastres.ops import native

pytestmark = pytest.mark.skipif(native.C is None, reason="the compiled library is not built")


class Written(nn.Module):
    """As people write it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.relu(self.first(x)))


class Listed(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


def twins(kind, hidden=(6, 6, 6, 9, 9)):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(kind(5, size) for size in hidden))
    plain = nn.Sequential(nn.Linear(3, 5), blocks, nn.Linear(5, 2))
    fused = copy.deepcopy(plain)
    report = fastres.fuse(fused, torch.randn(20, 3))
    assert list(report.fused.values()) == ["add"] * len(hidden)
    assert report.verified
    return plain, fused


@pytest.fixture
def calls(monkeypatch):
    """The blocks of each call of the stack."""
    seen, run = [], sequences.fused_stack
    monkeypatch.setattr(
        sequences, "fused_stack", lambda x, w1, *rest: seen.append(len(w1)) or run(x, w1, *rest)
    )
    return seen


kinds = pytest.mark.parametrize("kind", [Written, Listed], ids=lambda kind: kind.__name__)


@kinds
@pytest.mark.parametrize("shape", [(20, 3), (5, 4, 3)])
def test_blocks_of_one_shape_are_one_call_with_the_gradients_of_the_blocks(kind, shape, calls):
    plain, fused = (model.double() for model in twins(kind))
    calls.clear()
    x, found = torch.randn(shape).double(), []
    for model in (plain, fused):
        y = model(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert calls == [3, 2]
    torch.testing.assert_close(*found)


@kinds
def test_a_block_with_a_hook_runs_by_itself(kind, calls):
    plain, fused = twins(kind, hidden=(6,) * 6)
    calls.clear()
    seen = []
    fused[1][2].register_forward_hook(lambda *_: seen.append(0))
    x = torch.randn(20, 3)
    torch.testing.assert_close(fused(x), plain(x))
    assert (calls, seen) == ([2, 3], [0])


@kinds
def test_policies_see_the_sites_of_the_blocks(kind, calls):
    plain, fused = twins(kind)
    calls.clear()
    x = torch.randn(20, 3)
    assert fastres.trace(fused, x) == fastres.trace(plain, x)
    with fastres.record(plain) as expected, fastres.record(fused) as tape:
        for _ in range(2):
            plain(x), fused(x)
    torch.testing.assert_close(tape.scaled, expected.scaled)
    with fastres.gate(fused, {"1.1": 0.0}), fastres.gate(plain, {"1.1": 0.0}):
        torch.testing.assert_close(fused(x), plain(x))
    assert not calls
    fused(x)
    assert calls == [3, 2]


def test_mixed_precision_and_layers_exchanged_go_the_way_of_the_blocks(calls):
    plain, fused = twins(Written)
    calls.clear()
    x = torch.randn(20, 3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), plain(x))
    for model in (plain, fused):
        torch.manual_seed(1)
        model[1][1].first = nn.Linear(5, 6, bias=False)
    torch.testing.assert_close(fused(x), plain(x))
    assert calls == [2]


def test_of_few_rows_the_weights_are_not_copied(calls):
    plain, fused = twins(Written)
    calls.clear()
    x = torch.randn(12, 3)  # twice the 6 features inside the first blocks, not the 9 of the others
    torch.testing.assert_close(fused(x), plain(x))
    assert calls == [3]


def test_copies_are_stacked_too_and_restore_gives_all_back():
    plain, fused = twins(Listed)
    x = torch.randn(20, 3)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x))
        assert type(other[1]) is type(fused[1]) is not nn.Sequential
    fastres.restore(fused)
    assert type(fused[1]) is nn.Sequential
    assert torch.equal(fused(x), plain(x))


def test_on_meta_tensors_the_blocks_run_by_themselves():
    _, fused = twins(Written)
    assert fused.to("meta")(torch.empty(20, 3, device="meta")).shape == (20, 2)
