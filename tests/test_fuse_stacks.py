"""Blocks in a row run as one conv_stack in eval mode, and where anything can tell, one by one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fuse_models import Akamaster, Handwritten, Kuangliu, images
from models import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

import fastres
from fastres.fusing import stacked
from fastres.ops import native

pytestmark = pytest.mark.skipif(
    native.raw("_conv_stack") is None, reason="the compiled library is not built"
)


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms what training leaves in them."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def rows(kind: type[nn.Module], count: int = 3) -> nn.Sequential:
    """Return a network of `count` blocks at one width."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(kind(6, 6) for _ in range(count)))
    return settle(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), blocks, nn.Conv2d(6, 2, 1)))


def twins(make, *args) -> tuple[nn.Module, nn.Module, fastres.Fusion]:
    plain = make(*args)
    model = copy.deepcopy(plain)
    return plain, model, fastres.fuse(model, images(), stacks=True)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the streams that ran as one conv_stack."""
    seen = []

    def run(x, *rest):
        seen.append(tuple(x.shape))
        return native.raw("_conv_stack")(x, *rest)

    monkeypatch.setattr(stacked, "FORWARD", run)
    return seen


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Akamaster, Kuangliu, fastres.nn.BasicBlock])
@torch.no_grad()
def test_blocks_in_a_row_are_one_stack_that_computes_the_same(kind, calls):
    plain, model, fusion = twins(rows, kind)
    assert fusion.verified
    assert fusion.stacked == {f"1.{i}": "conv_stack of 3 blocks in eval mode" for i in range(3)}
    assert not fusion.apart
    calls.clear()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images().contiguous(memory_format=layout)
        y = model(x)
        close(y, plain(x))
        assert y.stride() == plain(x).stride()
    assert calls == [(4, 6, 8, 8)] * 2
    with torch.inference_mode():
        close(model(images()), plain(images()))


@torch.no_grad()
def test_torchvision_resnet18_is_stacked_but_for_the_blocks_that_change_the_shape(calls):
    plain = settle(torchvision().models.resnet18(num_classes=3))
    model = copy.deepcopy(plain)
    fusion = fastres.fuse(model, torch.randn(1, 3, 32, 32), verify=False, stacks=True)
    assert list(fusion.stacked) == ["layer1.0", "layer1.1"]
    assert fusion.apart["layer2.0"] == "its skip is not the identity"
    assert fusion.apart["layer2.1"].startswith("no other block")
    x = torch.randn(1, 3, 33, 40)
    close(model(x), plain(x))
    assert len(calls) > 0


def test_a_report_says_why_a_block_is_in_no_stack():
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Akamaster(3, 3), Akamaster(3, 3), Handwritten(3, 3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    fusion = fastres.fuse(settle(Inside()), images(), stacks=True)
    assert list(fusion.stacked) == ["blocks.0", "blocks.1"]
    assert fusion.apart == {"blocks.2": "its skip is not the identity"}
    assert "stacked   2  conv_stack of 2 blocks in eval mode: blocks.0, blocks.1" in repr(fusion)


@torch.no_grad()
def test_changed_weights_statistics_and_children_are_seen_at_the_next_call():
    plain, model, _ = twins(rows, Akamaster)
    x = images()

    def both(change):
        for each in (plain, model):
            change(each)
        close(model(x), plain(x))

    both(lambda m: m[1][0].conv1.weight.mul_(2))
    both(lambda m: m[1][1].bn2.running_mean.add_(1))
    both(lambda m: setattr(m[1][2].bn1, "eps", 0.5))
    both(lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}))
    both(lambda m: setattr(m[1][1], "bn1", nn.BatchNorm2d(6).eval()))
    both(lambda m: setattr(m[1][0].conv2, "weight", nn.Parameter(m[1][0].conv2.weight + 1)))
    both(lambda m: setattr(m[1][0].conv2, "dilation", (2, 2)) or setattr(
        m[1][0].conv2, "padding", (2, 2)))  # fmt: skip
    both(lambda m: m[1].append(copy.deepcopy(m[1][1])))
    both(lambda m: m[1].__delitem__(0))


def test_training_gradients_and_other_dtypes_run_the_blocks(calls):
    plain, model, _ = twins(rows, Kuangliu)
    calls.clear()
    x = images().requires_grad_()
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (plain, model)]
    close(*grads)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        close(model.train()(x), plain.train()(x))
        for each in (plain, model):
            each.eval()
            each[1][1].bn1.weight.data.mul_(3)  # what `.data` changes after a pass in training
        assert not calls
        close(model(x), plain(x))
        assert calls
        calls.clear()
        torch.vmap(model)(images()[:, None])
        close(torch.compile(model, fullgraph=True, backend="eager")(x), plain(x))
    assert not calls


@torch.no_grad()
def test_hooks_policies_and_modes_see_the_blocks(calls):
    plain, model, _ = twins(rows, Akamaster)
    x, heard = images(), []
    assert fastres.trace(model, x) == fastres.trace(plain, x)
    with fastres.record(plain) as expected, fastres.record(model) as tape:
        for seed in range(2):
            plain(images(seed=seed))
            model(images(seed=seed))
    assert tape.names == expected.names
    torch.testing.assert_close(tape.scaled, expected.scaled, rtol=1e-4, atol=0)
    with fastres.gate(plain, {"1.1": 0.5}), fastres.gate(model, {"1.1": 0.5}):
        close(model(x), plain(x))
    calls.clear()
    handle = model[1][1].bn1.register_forward_hook(lambda *_: heard.append(1))
    model(x)
    assert heard
    assert not calls
    handle.remove()
    close(model(x), plain(x))
    assert calls


@torch.no_grad()
def test_copies_pickles_and_restore_work_after_a_call():
    plain, model, _ = twins(rows, fastres.nn.BasicBlock)
    x = images()
    y = model(x)
    assert list(model.state_dict()) == list(plain.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "_folded" not in vars(other[1][0])
        assert torch.equal(other(x), y)
        other[1][0].conv1.weight.zero_()
        assert not torch.equal(other(x), y)
    assert torch.equal(model(x), y)
    fastres.restore(model)
    assert type(model[1]) is nn.Sequential
    assert "_folded" not in vars(model[1][0])
    assert torch.equal(model(x), plain(x))


def test_stacks_must_be_a_bool():
    with pytest.raises(TypeError, match="fuse: stacks must be a bool, got int"):
        fastres.fuse(rows(Akamaster), images(), stacks=1)


def step(model, make):
    """One step of an optimizer in eval mode."""
    optimizer = make(model.parameters())
    model(images()).square().mean().backward()
    optimizer.step()


def frozen(model):
    """Training mode, but for the batch norms."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def by_data(model):
    """A step written through `.data`, in training mode with frozen batch norms."""
    frozen(model)
    model(images()).square().mean().backward()
    for p in model.parameters():
        p.data.sub_(p.grad, alpha=0.1)
    model.eval()


def late(model):
    """A pass with gradients, one without, then the step of a fused optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    y = model(images())
    with torch.no_grad():
        model(images())
    y.square().mean().backward()
    optimizer.step()


def rounded(model):
    """Other numbers, at the same address and version as it may be."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.half().float()


def plain_weight(model):
    """A weight that is no Parameter, written in place."""
    model.requires_grad_(requires_grad=False)
    conv = model[1][0].conv1
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.weight = weight
    with torch.no_grad():
        model(images())
    weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: step(model, lambda p: torch.optim.Adam(p, 1e-2, fused=True)),
        lambda model: step(model, lambda p: torch.optim.SGD(p, 1e-1, fused=True)),
        lambda model: step(model, lambda p: torch.optim.AdamW(p, 1e-2)),
        by_data,
        late,
        rounded,
        plain_weight,
    ],
    ids=["adam", "sgd", "adamw", "data", "late", "rounded", "plain"],
)
def test_no_way_to_train_leaves_old_weights_behind(change, calls):
    plain, model, _ = twins(rows, Akamaster)
    for each in (plain, model):
        with torch.no_grad():
            before = each(images())
        change(each)
        with torch.no_grad():
            after = each(images())
    assert calls
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain(images()), rtol=1e-3, atol=1e-4)


def test_a_mode_below_the_one_of_a_device_sees_the_blocks(calls):
    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    _, model, _ = twins(rows, Akamaster)
    calls.clear()
    with torch.no_grad(), Seeing(), torch.device("cpu"):
        model(images())
    assert not calls
    assert torch.conv2d in seen


def test_a_list_of_blocks_that_loses_a_list_runs_on():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stages = ([Akamaster(3, 3), Akamaster(3, 3)] for _ in range(2))
            self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in stages)

        def forward(self, x):
            for stage in self.stages:
                for block in stage:
                    x = block(x)
            return x

    plain, model, fusion = twins(lambda: settle(Net()))
    assert len(fusion.stacked) == 4
    for each in (plain, model):
        del each.stages[1]
    with torch.no_grad():
        close(model(images()), plain(images()))
