"""Claims about fastres.nn.cifar_resnet: the paper's networks, and the public weights' errors."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres.data import read
from fastres.nn import BasicBlock, Bottleneck, PreActBlock, cifar_resnet, load_weights

ROOT = os.environ.get("FASTRES_DATA")
ERRORS = {20: 827, 56: 661}  # of 10,000 test images
FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}

needs_files = pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")
slow = pytest.mark.skipif(not os.environ.get("FASTRES_LARGE"), reason="minutes: FASTRES_LARGE=1")


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)],
)
def test_parameters_are_as_many_as_in_the_paper(depth, millions):
    with torch.device("meta"):
        model = cifar_resnet(depth)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1 if millions > 1 else 2) == pytest.approx(millions, abs=0.01)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def conv(x, layer, stride=1):
    return F.conv2d(x, layer.weight, stride=stride, padding=layer.weight.size(2) // 2)


def norm(x, layer):
    return F.batch_norm(x, None, None, layer.weight, layer.bias, True)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 7, 1)])
@pytest.mark.parametrize("option", ["A", "B"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck, PreActBlock])
def test_a_block_computes_the_formula_of_its_docstring(kind, option, inputs, outputs, stride):
    b = kind(inputs, outputs, stride, option).double()
    x = torch.randn(3, inputs, 6, 6, dtype=torch.float64)
    outputs *= 4 if kind is Bottleneck else 1
    start = F.relu(norm(x, b.bn1)) if kind is PreActBlock else x
    if (inputs, stride) == (outputs, 1):
        skip = x
    elif option == "A":
        skip = torch.zeros(3, outputs, 6 // stride, 6 // stride, dtype=x.dtype)
        before = (outputs - inputs) // 2
        skip[:, before : before + inputs] = start[:, :, ::stride, ::stride]
    elif kind is PreActBlock:
        skip = conv(start, b.shortcut[0], stride)
    else:
        skip = norm(conv(start, b.shortcut[0], stride), b.shortcut[1])
    if kind is PreActBlock:
        expected = skip + conv(F.relu(norm(conv(start, b.conv1, stride), b.bn2)), b.conv2)
    elif kind is BasicBlock:
        inner = F.relu(norm(conv(x, b.conv1, stride), b.bn1))
        expected = F.relu(skip + norm(conv(inner, b.conv2), b.bn2))
    else:
        inner = F.relu(norm(conv(x, b.conv1), b.bn1))
        inner = F.relu(norm(conv(inner, b.conv2, stride), b.bn2))
        expected = F.relu(skip + norm(conv(inner, b.conv3), b.bn3))
    torch.testing.assert_close(b(x), expected)


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("option", ["A", "B"])
def test_every_block_is_one_site_and_two_of_them_project(option, preactivation):
    model = cifar_resnet(20, 7, option, preactivation)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    sites = fastres.trace(model, x)
    assert [s.name for s in sites] == [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)]
    projected = [s.name for s in sites if s.kind == "projection"]
    assert projected == ["layer2.0", "layer3.0"]


@pytest.mark.parametrize("preactivation", [False, True])
def test_gates_as_an_input_are_gates_on_the_sites_bit_for_bit(preactivation):
    torch.manual_seed(0)
    model = cifar_resnet(20, preactivation=preactivation).eval()
    x = torch.randn(3, 3, 32, 32)
    names = [site.name for site in fastres.trace(model, x)]
    rows = torch.rand(9, 3)
    for gates, by_site in (
        (rows, rows),
        (rows[:, 0], rows[:, 0]),
        (0.5, torch.full((9,), 0.5)),
        (torch.tensor(0.25, dtype=torch.float64), torch.full((9,), 0.25)),
        (1.0, torch.ones(9)),
    ):
        with torch.no_grad(), fastres.gate(model, dict(zip(names, by_site, strict=True))):
            expected = model(x)
        with torch.no_grad(), fastres.record(model) as tape:
            assert torch.equal(model(x, gates), expected)
        assert tape.names == names
    assert torch.equal(model(x, 1.0), model(x))
    closed = torch.ones(9)
    closed[4] = 0
    assert not torch.allclose(model(x, closed), model(x))


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck, PreActBlock])
def test_the_gate_of_a_block_scales_its_branch_and_has_a_gradient(kind):
    torch.manual_seed(0)
    block = kind(8, 2 if kind is Bottleneck else 8).double().eval()
    x = torch.rand(3, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x, 0.0), x)  # not negative: the last ReLU keeps it
    half, whole = block(x, 1e-6) - x, block(x, 2e-6) - x
    torch.testing.assert_close(2 * half, whole, rtol=1e-6, atol=1e-12)
    gate = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: block(x, g), (gate,))
    with fastres.record(block, per_sample=True) as tape:
        block(x, gate.detach())
    with fastres.record(block, per_sample=True) as plain:
        block(x)
    torch.testing.assert_close(tape.branch_sq, plain.branch_sq * gate.detach() ** 2)


@pytest.mark.parametrize(
    ("gates", "kind", "message"),
    [
        (torch.ones(3), ValueError, r"gate must have shape \[\], \[9\] or \[9, 2\], got \[3\]"),
        (torch.ones(9, 4), ValueError, r"gate must have shape"),
        ("open", TypeError, "gate must be a number or tensor, got str"),
    ],
)
def test_wrong_gates_are_told(gates, kind, message):
    with pytest.raises(kind, match=f"CifarResNet: {message}"):
        cifar_resnet(20)(torch.ones(2, 3, 32, 32), gates)
    with pytest.raises(kind, match="block: gate must"):
        BasicBlock(3, 3)(torch.ones(2, 3, 4, 4), gates)


def test_a_fresh_network_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model = cifar_resnet(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@needs_files
@pytest.mark.parametrize("depth", [20, pytest.param(56, marks=slow)])
def test_the_public_weights_make_exactly_the_errors_that_are_known_of_them(depth):
    _, (images, labels) = read("cifar10", ROOT)
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    x = (torch.from_numpy(images) / 255 - mean) / deviation
    model = cifar_resnet(depth, weights=Path(ROOT, "pretrained", FILES[depth])).eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    assert int((found != torch.from_numpy(labels)).sum()) == ERRORS[depth]


def saved(path, state):
    torch.save(state, path)
    return path


def test_weights_come_back_from_a_file_with_and_without_prefix(tmp_path):
    model = cifar_resnet(8)
    state = model.state_dict()
    prefixed = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best": 91.0}
    uncounted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for content in (state, prefixed, uncounted):
        other = cifar_resnet(8, weights=saved(tmp_path / "weights.th", content))
        for name, value in other.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("linear.bias"), r"missing: linear\.bias$"),
        (lambda s: s.update(extra=torch.ones(1)), r"unexpected: extra$"),
        (
            lambda s: s.update({"linear.bias": torch.ones(3)}),
            r"of another shape: linear\.bias \[3\] for \[10\]$",
        ),
        (lambda s: [s.pop(k) for k in list(s)[:-2]], r"missing: conv1\.weight, .* and \d+ more$"),
        (lambda s: s.update(epoch=3), r"int as 'epoch'$"),
    ],
)
def test_a_wrong_checkpoint_says_what_is_wrong_and_loads_nothing(change, message, tmp_path):
    model = cifar_resnet(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    change(state)
    path = saved(tmp_path / "weights.th", state)
    with pytest.raises(
        ValueError, match=r"weights\.th: must hold the weights of it, got " + message
    ):
        load_weights(model, path, "it")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 21}, ValueError, "depth must be 6 n \\+ 2 and 8 or more, got 21"),
        ({"depth": 2}, ValueError, "depth must be 6 n \\+ 2 and 8 or more, got 2"),
        ({"depth": 20.0}, TypeError, "depth must be an integer, got 20.0"),
        ({"depth": 20, "classes": 0}, ValueError, "classes must be >= 1, got 0"),
        ({"depth": 20, "classes": True}, TypeError, "classes must be an integer, got True"),
        ({"depth": 20, "option": "C"}, ValueError, "option must be A or B, got 'C'"),
        ({"depth": 20, "preactivation": 1}, TypeError, "preactivation must be a bool, got 1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"cifar_resnet: {message}"):
        cifar_resnet(**arguments)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"CifarResNet: x must have shape \[B, 3, H, W\], got"):
        cifar_resnet(8)(torch.ones(3, 32, 32))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there must be a file .*none\.th"):
        cifar_resnet(8, weights=tmp_path / "none.th")
