"""What a fused block does not keep is computed again in the backward pass, once, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from fuse_models import Akamaster, Handwritten, Kuangliu, PreAct, images, net, twins
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import fastres
from fastres.ops import batch_norm_residual_rules as rules
from fastres.ops import native, recomputing
from fastres.ops.batch_norm_residual_inner import batch_norm_inner

pytestmark = pytest.mark.skipif(native.C is None, reason="the compiled library is not built")
kinds = pytest.mark.parametrize(
    "kind", [Akamaster, Kuangliu, Handwritten, PreAct], ids=lambda kind: kind.__name__
)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@pytest.fixture
def keep_all(monkeypatch):
    """Switch the recomputation off."""

    def switch() -> None:
        monkeypatch.setattr(recomputing.Recomputing, "__enter__", lambda self: self)

    return switch


@pytest.fixture
def recomputed(monkeypatch):
    """Count what is computed again."""
    seen, compute = [], rules._recomputed
    monkeypatch.setattr(rules, "_recomputed", lambda *given: seen.append(0) or compute(*given))
    return seen


def gradients(model, x, **options):
    loss = model(x).square().sum()
    return torch.autograd.grad(loss, list(model.parameters()), **options)


def kept_bytes(model, x) -> int:
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert y.requires_grad
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own)


@kinds
@modes
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_are_bit_for_bit_those_of_a_pass_that_keeps_all(kind, train, last, keep_all):
    _, fused = twins(kind, recompute=True, verify=False)
    x = images()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    other, fused = copy.deepcopy(fused).train(train), fused.train(train)
    found = gradients(fused, x)
    keep_all()
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(other, x), strict=True))


def test_a_deep_network_keeps_less_than_three_quarters(recomputed):
    torch.manual_seed(0)
    plain = fastres.nn.cifar_resnet(20)
    fused, x = copy.deepcopy(plain), images(4, 32)
    fastres.fuse(fused, recompute=True)
    assert kept_bytes(fused, x) < 0.7 * kept_bytes(plain, x)
    gradients(fused, x)
    assert 9 < len(recomputed) < 18  # every inner activation, and every other sum of a stage


def test_one_output_is_computed_once_for_all_who_keep_it(recomputed):
    _, fused = twins(Kuangliu, recompute=True, verify=False)  # its second block reads x twice
    loss = fused(images()).square().sum()
    loss.backward(retain_graph=True)
    first = len(recomputed)
    found = [p.grad.clone() for p in fused.parameters()]
    fused.zero_grad()
    loss.backward()
    assert len(recomputed) == 2 * first
    assert all(torch.equal(p.grad, g) for p, g in zip(fused.parameters(), found, strict=True))
    assert first == 3 + 1  # the three blocks' inner activations, the first block's sum


@kinds
def test_derivatives_of_derivatives_are_those_of_the_model(kind):
    results = []
    for model in twins(kind, recompute=True, verify=False):
        model.double()
        x = images().double()
        first = gradients(model, x, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a)


@kinds
def test_hooks_that_are_on_already_get_what_is_kept(kind, recomputed):
    _, fused = twins(kind, recompute=True, verify=False)
    x = images()
    expected = gradients(copy.deepcopy(fused), x)
    seen = len(recomputed)
    with save_on_cpu():
        loss = fused(x).square().sum()
    found = torch.autograd.grad(loss, list(fused.parameters()))
    assert len(recomputed) == 2 * seen
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mixed_precision_is_recomputed_as_it_was(keep_all, recomputed):
    _, fused = twins(Kuangliu, recompute=True, verify=False)
    other, found = copy.deepcopy(fused), []
    for model in (fused, other):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(images())
        found.append(torch.autograd.grad(y.float().square().sum(), list(model.parameters())))
        assert len(recomputed) == 4
        keep_all()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_compiled_graph_keeps_what_it_likes():
    plain, fused = twins(Kuangliu, recompute=True, verify=False)
    torch._dynamo.reset()
    compiled = torch.compile(fused[1], fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 5, 5)
    for a, b in zip(gradients(plain[1], x), gradients(compiled, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_transforms_of_functorch_keep_all():
    plain, fused = (model.double() for model in twins(Akamaster, recompute=True, verify=False))
    weights = [{name: p.detach() for name, p in m.named_parameters()} for m in (plain, fused)]
    found = [
        torch.func.grad(lambda w, m=m: torch.func.functional_call(m, w, images().double()).sum())(w)
        for m, w in zip((plain.eval(), fused.eval()), weights, strict=True)
    ]
    torch.testing.assert_close(*found)


def test_what_is_kept_must_not_be_written_to():
    block = net(Akamaster)[1]
    fastres.fuse(block, recompute=True)
    inner = []
    block.conv1.register_forward_hook(lambda _m, _a, y: inner.append(y))
    loss = block(torch.randn(2, 8, 5, 5)).sum()
    with torch.no_grad():
        inner[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_without_a_skip_is_within_twice_the_error_of_torch(dtype, relu, training):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 5, 7, 6, generator=generator, dtype=torch.float64) * 2 + 3
    weight, bias, mean = torch.randn(3, 5, generator=generator).double()
    var = torch.rand(5, generator=generator).double() + 0.5

    def eager(f, mean, var, weight, bias):
        y = nn.functional.batch_norm(f, mean, var, weight, bias, training)
        return y.relu() if relu else y

    def ours(f, mean, var, weight, bias):
        return batch_norm_inner(f, mean, var, weight, bias, relu, training=training)

    found = []
    for one, kind in ((eager, torch.float64), (eager, dtype), (ours, dtype)):
        leaf = f.to(kind).requires_grad_()
        wide = torch.float64 if kind == torch.float64 else torch.float32
        small = [t.to(wide, copy=True) for t in (mean, var, weight, bias)]
        y = one(leaf, *small)
        (grad,) = torch.autograd.grad(y.double().square().sum(), leaf)
        found.append([t.double() for t in (y, grad, *small[:2])])
        assert y.dtype == kind
    for exact, usual, value in zip(*found, strict=True):
        error, allowed = ((t - exact).norm() for t in (value, usual))
        assert error <= 2 * allowed + 1e-6 * exact.norm()


def test_a_sum_that_is_written_to_without_gradients_is_kept():
    class Clamp(nn.Module):
        def forward(self, y):
            with torch.no_grad():
                y.clamp_(max=0.5)
            return y

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.clamp, self.last = Clamp(), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.last(self.clamp(x + self.norm(self.conv(x))))

    torch.manual_seed(0)
    plain = nn.Sequential(Clamped()).train()
    fused = copy.deepcopy(plain)
    assert fastres.fuse(fused, recompute=True).fused
    for model in (plain, fused):
        model(images()).square().sum().backward()
    torch.testing.assert_close(fused[0].last.weight.grad, plain[0].last.weight.grad)
