"""A fused model computes what the model did, from the same Parameters, and can be had back."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path

import pytest
import torch
from fuse_models import KINDS, Akamaster, Kuangliu, images, net, twins
from models import torchvision
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres.data import read
from fastres.nn import cifar_resnet

every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
ROOT = os.environ.get("FASTRES_DATA")
needs_files = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")
slow = pytest.mark.skipif(not os.environ.get("FASTRES_LARGE"), reason="minutes: FASTRES_LARGE=1")


def computed(model, x):
    """Return the output, the gradients of all weights and the input, and the buffers after."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(y.square().sum(), [x, *weights.values()])
    buffers = {name: t.double() for name, t in model.named_buffers()}
    return {"output": y, **dict(zip(["input", *weights], grads, strict=True)), **buffers}


@every
@modes
def test_outputs_gradients_and_statistics_are_within_twice_the_error_of_the_plain_model(
    kind, train
):
    plain, fused = (model.train(train) for model in twins(kind))
    exact = computed(copy.deepcopy(plain).double(), images().double())
    usual, found = computed(plain, images()), computed(fused, images())
    assert found.keys() == usual.keys()
    for name, value in found.items():
        error, allowed = ((t.double() - exact[name]).norm() for t in (value, usual[name]))
        floor = 1e-6 * usual[name].double().norm() + 1e-6  # where eager happens to be exact
        assert error <= 2 * allowed + floor, name


@every
def test_a_step_of_the_optimizer_goes_on_after_fuse(kind):
    plain, fused = net(kind), net(kind)
    optimizers = [
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (plain, fused)
    ]
    for step in range(4):
        if step == 2:
            fastres.fuse(fused, images())
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images(seed=step)), torch.arange(4)).backward()
            optimizer.step()
    for (name, a), b in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


@every
def test_children_parameters_and_state_are_the_same_objects(kind):
    model = net(kind)
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    values = {name: t.clone() for name, t in tensors.items()}
    fastres.fuse(model, images())
    assert type(model[1]).__name__ == f"Fused{kind.__name__}"
    assert isinstance(model[1], kind)
    for name, module in model.named_modules():
        assert module is modules.pop(name)
    assert not modules
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is tensors[name]
        assert torch.equal(t, values.pop(name))
    assert not values


@every
def test_restore_brings_back_the_class_and_every_bit(kind):
    model = net(kind)
    before = model(images())
    fastres.fuse(model, images())
    model(images())
    fastres.restore(model)
    assert all(type(block) is kind for block in model[1:4])
    assert torch.equal(model(images()), before)
    assert "forward" not in vars(model[1])


def test_verification_changes_neither_buffers_nor_gradients_nor_random_numbers():
    model = net(Kuangliu)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    assert fastres.fuse(model, images(), verify=True).verified
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not fastres.fuse(model, images(), verify=False).verified


@every
@modes
def test_the_sites_are_those_of_the_model_and_are_measured_alike(kind, train):
    plain, fused = (model.train(train) for model in twins(kind))
    assert fastres.trace(fused, images()) == fastres.trace(plain, images())
    with fastres.record(plain) as expected, fastres.record(fused) as tape:
        for seed in range(3):
            plain(images(seed=seed))
            fused(images(seed=seed))
    torch.testing.assert_close(tape.absolute, expected.absolute, rtol=1e-4, atol=0)
    torch.testing.assert_close(tape.scaled, expected.scaled, rtol=1e-4, atol=0)
    assert type(fused[1]) is not kind


@every
def test_gates_and_paths_act_on_a_fused_model_as_on_the_model(kind):
    plain, fused = (model.double().eval() for model in twins(kind))
    x, outs, norms = images().double(), [], []
    for model in (plain, fused):
        with fastres.gate(model, {"1": 0.0, "3": torch.linspace(0, 1, 4).double()}):
            outs.append(model(x))
        norms.append(fastres.path_gradients(model, x, lambda y: y.square().sum()).norms)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*norms)


@needs_files
@pytest.mark.parametrize(
    ("depth", "errors", "stacks"),
    [
        (20, 827, False),
        (20, 827, True),
        pytest.param(56, 661, True, marks=[slow, pytest.mark.timeout(1800)]),
    ],
)
def test_the_public_weights_make_the_same_errors_fused(depth, errors, stacks):
    _, (images, labels) = read("cifar10", ROOT)
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    x = (torch.from_numpy(images) / 255 - mean) / deviation
    (file,) = Path(ROOT, "pretrained").glob(f"resnet{depth}-*.th")
    model = cifar_resnet(depth, weights=file).eval()
    fusion = fastres.fuse(model, x[:8], stacks=stacks)
    assert len(fusion.fused) == (depth - 2) // 2
    assert len(fusion.stacked) == (len(fusion.fused) - 2) * stacks
    assert not fusion.left
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    assert int((found != torch.from_numpy(labels)).sum()) == errors


def test_a_torchvision_resnet50_is_fused_trained_saved_restored_and_loaded(tmp_path):
    make, x = torchvision().models.resnet50, images(2, 64)
    model = make(num_classes=3)
    fusion = fastres.fuse(model, x)
    assert fusion.verified
    assert list(fusion.fused.values()) == ["batch norm + add + ReLU"] * 16
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    y = model.eval()(x)
    fastres.restore(model)
    plain = make(num_classes=3).eval()
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(plain(x), model(x))
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)


def test_without_an_example_the_blocks_with_a_batch_norm_are_found():
    for kind in (Akamaster, Kuangliu):
        model, example = net(kind), net(kind)
        found = fastres.fuse(model)
        assert found.fused == fastres.fuse(example, images()).fused
        assert not found.verified
        assert torch.equal(model(images()), example(images()))


def test_the_code_of_a_fused_block_can_be_read():
    _, fused = twins(Akamaster)
    source = inspect.getsource(type(fused[1]).forward)
    assert "self.conv2(" in source
    assert "self.bn2(" not in source


def test_the_report_reads_as_a_table():
    model = nn.Sequential(*net(Akamaster)[:4], nn.Identity())
    model[3].bn2.register_forward_hook(lambda *_: None)
    assert repr(fastres.fuse(model, images())).split("\n") == [
        "Fusion of Sequential: 2 of 3 blocks, verified",
        "  fused   2  batch norm + add + ReLU: 1, 2",
        "  left   1  its batch norm bn2 has hooks: 3",
    ]
