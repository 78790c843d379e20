"""gate scales the branches of any model, at the adds that trace finds."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Block, InPlaceBlock, cifar_resnet, residual_mlp, stacks, torchvision
from torch import Tensor, nn

from fastres.gates import gate
from fastres.ops import residual_add
from fastres.paths import path_gradients
from fastres.record import record
from fastres.sites import add, trace


def vectors(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class GatedBlock(Block):
    """The same block with its gate written by hand."""

    by: float | Tensor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by * self.branch(x)


def by_hand(model: nn.Sequential, gates: dict[str, float | Tensor]) -> nn.Sequential:
    model = copy.deepcopy(model)
    for name, value in gates.items():
        block = model.get_submodule(name)
        block.__class__, block.by = GatedBlock, value
    return model


VALUES = [0.0, 0.3, -1, torch.tensor(0.5), torch.tensor([[0.2], [1], [-2]])]


@pytest.mark.parametrize("value", VALUES)
def test_a_gated_model_is_the_model_with_gates_written_by_hand(value):
    model, x = residual_mlp(), vectors()
    hand = by_hand(model, {"2": value, "3": 0.5})
    given = value.flatten() if isinstance(value, Tensor) and value.dim() else value
    for _ in range(2):
        with gate(model, {"2": given, "3": 0.5}):
            for _ in range(3):  # the first pass finds the sites, the others know them
                out, want = model(x), hand(x)
                torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
                got = torch.autograd.grad(out.square().sum(), list(model.parameters()))
                expected = torch.autograd.grad(want.square().sum(), list(hand.parameters()))
                for one, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_without_gates_or_with_gates_of_1_the_model_keeps_its_bits():
    model, x = residual_mlp(), vectors()
    plain = model(x)
    for gates in ({}, {"1": 1.0, "2": 1}):
        with gate(model, gates):
            assert torch.equal(model(x), plain)
            assert torch.equal(model(x), plain)
    with gate(model, {"1": 0.0}):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Written(nn.Module):
    """One block, its add written in one of the ways there are."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        f = self.branch(x)
        x = x.clone()
        match self.way:
            case "f += x":
                kept = f
                kept += x
                return f  # the model still holds what it added into
            case "x += f":
                x += f
                return x
            case "add_":
                return f.add_(x)
            case "alpha":
                return torch.add(x, f, alpha=2)
            case "other=":
                return torch.add(input=x, other=f)
            case "add":
                return add(x, f)
            case "residual_add":
                return residual_add(x, f, gate=2.0)[0]
        return f + x


WAYS = ["f + x", "f += x", "x += f", "add_", "alpha", "other=", "add", "residual_add"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_branch_is_scaled_however_the_add_is_written(way, grad):
    model, x = Written(way).requires_grad_(grad), vectors()
    factor = 2 if way in ("alpha", "residual_add") else 1
    by = torch.tensor([0.0, 0.5, -1.0])
    want = x + factor * by[:, None] * model.branch(x)
    with gate(model, {"Written": by}):
        for _ in range(2):
            torch.testing.assert_close(model(x), want)
    if grad:
        leaf = by.clone().requires_grad_()
        with gate(model, {"Written": leaf}):
            (got,) = torch.autograd.grad(model(x).sum(), leaf)
        torch.testing.assert_close(got, factor * model.branch(x).sum(1))


def test_per_sample_gates_evaluate_many_lesions_in_one_batch():
    torch.manual_seed(0)
    model, x = cifar_resnet().eval(), images()
    names = [site.name for site in trace(model, x)]
    one_by_one = []
    for name in names:
        with gate(model, {name: 0.0}):
            one_by_one.append(model(x))
    opened = 1 - torch.eye(len(names)).repeat_interleave(len(x), 1)  # [sites, copies * B]
    with gate(model, dict(zip(names, opened, strict=True))):
        together = model(x.repeat(len(names), 1, 1, 1))
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-5, atol=1e-6)


def test_a_deleted_block_leaves_the_skip_alone():
    torch.manual_seed(0)
    block, x = InPlaceBlock(3).eval(), images()
    with gate(block, {"InPlaceBlock": 0.0}):
        torch.testing.assert_close(block(x), x.relu())


def test_a_stack_is_gated_in_one_call_and_block_by_block_alike():
    fused, separate = stacks(5)
    x = vectors()
    for value in (0.0, torch.tensor([0.5, 0.0, 2.0])):
        gates = {"stack[1]": value, "stack[4]": 0.25}
        with gate(fused, gates) as one, gate(separate, gates):
            for _ in range(2):
                torch.testing.assert_close(fused(x), separate(x), rtol=1e-5, atol=1e-6)
        assert one.step == 2
        assert [site.name for site in one.sites] == [f"stack[{i}]" for i in range(5)]


def test_gates_multiply():
    for model in (residual_mlp(), *stacks(2)):
        x, name = vectors(), "1" if isinstance(model, nn.Sequential) else "stack[1]"
        by = torch.tensor([0.5, 1.0, 3.0])
        with gate(model, {name: 0.5 * by}):
            want = model(x)
        with gate(model, {name: by}), gate(model, {name: 0.5}):
            torch.testing.assert_close(model(x), want)
            torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("width", [8, 4096])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("outside", ["record", "gate"])
def test_a_record_sees_the_gated_branch_in_whatever_order_they_were_opened(
    width, declared, outside
):
    class Declared(Block):
        def forward(self, x: Tensor) -> Tensor:
            return add(x, self.branch(x))

    torch.manual_seed(0)
    kind = Declared if declared else Block
    model = nn.Sequential(*[kind(4, nn.Linear(4, 4)) for _ in range(2)]).requires_grad_(False)
    x = torch.randn(width, 4)
    with record(model) as plain:
        model(x)
    pair = [record(model), gate(model, {"1": 0.5})]
    first, second = pair if outside == "record" else pair[::-1]
    with first as a, second as b:
        tape = a if outside == "record" else b
        for _ in range(3):
            model(x)
    half = plain.absolute * torch.tensor([1, 0.5])
    assert tape.absolute.tolist() == pytest.approx(half.tolist())
    with gate(model, {"1": 0.5}):
        model(x)
        with record(model) as late:
            model(x)
            model(x)
    assert late.absolute.tolist() == pytest.approx(tape.absolute.tolist())


def test_paths_of_a_lesioned_model_do_not_go_through_the_branch():
    model, x = residual_mlp(8, 3), vectors()
    with gate(model, {"1": 0.0, "3": 0.0}):
        paths = path_gradients(model, x, lambda out: out.square().sum())
        assert paths.norms[2:].tolist() == [0.0, 0.0]
        assert paths.norms[:2].min() > 0
    every = dict.fromkeys(("1", "2", "3"), 0.0)
    with gate(model, every):  # deleting all blocks leaves the path of length 0
        alone = path_gradients(model, x, lambda out: out.square().sum())
        torch.testing.assert_close(model(x), model[0](x))
    assert alone.shares.tolist() == pytest.approx([1, 0, 0, 0])


def test_a_schedule_gives_the_gates_of_every_step():
    model, x = residual_mlp(), vectors()
    with gate(model, {"1": lambda step: 1.0 / (1 + step)}, step=1) as gates:
        for want in (0.5, 1 / 3):
            torch.testing.assert_close(model(x), by_hand(model, {"1": want})(x))
    assert gates.step == 3
    asked = []

    def schedule(step: int) -> dict[str, float]:
        asked.append(step)
        return {str(1 + step): 0.0}

    with gate(model, schedule):
        for step in range(3):
            torch.testing.assert_close(model(x), by_hand(model, {str(1 + step): 0.0})(x))
        with pytest.raises(ValueError, match="gates must name sites of the model"):
            model(x)
    assert asked == [0, 1, 2, 3]


def test_a_step_whose_pass_failed_comes_again():
    class Failing(nn.Module):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            if self.passes % 2:
                raise KeyError
            return x

    model, asked = nn.Sequential(residual_mlp(), Failing()), []

    def schedule(step: int) -> dict[str, float]:
        asked.append(step)
        return {}

    with gate(model, schedule):
        for _ in range(2):
            with pytest.raises(KeyError):
                model(vectors())
            model(vectors())
    assert asked == [0, 0, 1, 1]


def test_half_precision_is_scaled_with_the_whole_gate():
    model = nn.Sequential(Block(64, nn.Linear(64, 64))).to(torch.bfloat16)
    x = torch.randn(512, 64).bfloat16()
    by = torch.full((512,), 0.7001)
    with torch.no_grad(), gate(model, {"0": by}):
        y = model(x)
        want = x + (model[0].branch(x).float() * 0.7001).bfloat16()
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want)


def test_a_torchvision_resnet_is_gated_at_its_in_place_adds():
    torch.manual_seed(0)
    model = torchvision().models.resnet18(num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), gate(model, {"layer1.1": 0.0}):
        for _ in range(2):
            got = model(x)
    model.layer1[1] = nn.ReLU()
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        ({"layer9": 0.0}, ValueError, r"gate: gates must name sites of the model, .*got 'layer9'"),
        ({"1[0]": 0.0}, ValueError, r"got '1\[0\]'"),
        (
            {"1": torch.ones(4)},
            ValueError,
            r"\['1'\] must have shape \[\] or \[3\], got \[4\]",
        ),
        ({"1": torch.ones(3, 1)}, ValueError, r"must have shape \[\] or \[B\], got \[3, 1\]"),
        ({"1": "0"}, TypeError, r"gates\['1'\] must be a number or a floating tensor, got str"),
        ({"1": torch.ones(3, dtype=torch.int64)}, TypeError, r"floating tensor, got torch.int64"),
        ({1: 0.0}, TypeError, r"must have the names of sites as keys, got 1"),
        ([0.0], TypeError, r"gates must be a mapping of site names, or a function .*got list"),
        (lambda step: 0.0, TypeError, r"gates must be a mapping .*got float"),
        ({"1": torch.ones(3, device="meta")}, ValueError, r"must be on cpu, got meta"),
    ],
)
def test_wrong_gates_are_told_by_name(gates, error, message):
    model = residual_mlp()
    with pytest.raises(error, match=message), gate(model, gates):
        model(vectors())
    assert torch._C._len_torch_function_stack() == 0
    model(vectors())


def test_what_cannot_be_gated_is_told():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="found none in Sequential"), gate(model, {}):
        model(vectors())
    with pytest.raises(ValueError, match="step must be >= 0, got -1"), gate(model, {}, step=-1):
        pass
    with pytest.raises(TypeError, match="step must be an integer"), gate(model, {}, step=0.5):
        pass
    wanted = "gate: model must be a torch"
    with pytest.raises(TypeError, match=wanted), gate(lambda x: x, {}):
        pass
