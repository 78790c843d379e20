"""Claims about analysis.adaptive_depth: what goes, what stays, and that training goes on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.adaptive_depth import AdaptiveDepth, prune
from fastres.analysis.dynamics import convergence, residuals
from fastres.nn import CifarResNet, LayerNetwork, ResidualMLP, cifar_resnet


def settled(shared: bool = True) -> LayerNetwork:
    """Layers whose residuals come to rest at a corner of the logistic system."""
    torch.manual_seed(0)
    net = LayerNetwork(2, 2, width=3, layers=15, shared=shared)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0, -2], [0, 0, -1], [0, 0, 1]]))
    return net


def points(batch: int = 50) -> torch.Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(0))


def test_a_layer_goes_where_its_residual_is_that_of_the_layer_before():
    net = settled()
    changes = convergence(residuals(net, points()))
    first = next(i for i, change in enumerate(changes) if change < 0.01)
    control = prune(net, points(), threshold=0.01)
    assert net.layers == first + 1  # the change from `first` to `first + 1` is too small to keep it
    assert control.history[0].measured["layers"] == pytest.approx(changes[-1].item(), rel=1e-5)
    assert control.history[0].blocks == {"layers": 14}
    assert control.history[-1].removed == ()
    assert [e.blocks["layers"] for e in control.history[:3]] == [14, 13, 12]  # one at a time


def test_folding_keeps_the_outputs_where_the_removed_residual_is_constant():
    kept, folded = settled(), settled()
    before = kept(points())
    for net, fold in ((kept, False), (folded, True)):
        assert AdaptiveDepth(net, points(), fold=fold).step() == ("layers",)
    assert (kept(points()) - before).abs().max() > 0.1
    assert (folded(points()) - before).abs().max() < 0.01


@pytest.mark.parametrize("rule", ["residual", "scaled"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_residual_mlp_loses_blocks_that_add_nothing(rule, fold):
    torch.manual_seed(0)
    net, x = ResidualMLP(12, 3, width=16, blocks=6), torch.randn(20, 12)
    with torch.no_grad():
        net.stack.w2[3:] = 0
    before = net(x)
    prune(net, x, rule=rule, threshold=1e-6, fold=fold)
    assert net.stack.blocks == (4 if rule == "residual" else 3)  # 0 and 0 alike, 0 and f not
    assert torch.allclose(net(x), before, atol=1e-6)


def test_the_rules_differ_on_a_constant_residual():
    assert AdaptiveDepth(settled(), points()).step() == ("layers",)
    assert AdaptiveDepth(settled(), points(), rule="scaled").step() == ()


def test_stages_of_a_resnet_lose_at_most_one_block_per_step_and_keep_two():
    torch.manual_seed(0)
    net = cifar_resnet(32).eval()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        for name in ("layer1.1", "layer1.2", "layer1.3", "layer1.4", "layer3.3", "layer3.4"):
            for parameter in net.get_submodule(f"{name}.bn2").parameters():
                parameter.zero_()
    before = net(x)
    control = AdaptiveDepth(net, x, threshold=1e-6)
    assert control.step() == ("layer1", "layer3")
    assert control.history[0].blocks == {"layer1": 4, "layer2": 5, "layer3": 4}
    assert control.step() == ("layer1",)  # of layer3 the one before adds something
    assert control.step() == ("layer1",)
    assert control.step() == ()
    assert control.history[-1].blocks == {"layer1": 2, "layer2": 5, "layer3": 4}
    assert torch.allclose(net(x), before, atol=1e-5)
    assert net.depth == 2 + 2 * 11


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (ResidualMLP(12, 3, width=16, blocks=4), torch.randn(32, 12)),
        lambda: (LayerNetwork(12, 3, width=8, layers=4, shared=False), torch.randn(32, 12)),
        lambda: (LayerNetwork(12, 3, width=8, layers=4), torch.randn(32, 12)),
        lambda: (cifar_resnet(26, classes=3), torch.randn(8, 3, 8, 8)),
    ],
)
def test_training_goes_on_with_the_optimiser_of_what_is_left(make):
    torch.manual_seed(0)
    net, x = make()
    y = torch.randint(3, (len(x),))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(3):
        train(net, optimizer, x, y)
    control = AdaptiveDepth(net, x, optimizer, threshold=1e6)
    removed = control.step()
    assert len(removed) == (3 if isinstance(net, CifarResNet) else 1)
    assert all(module.training for module in net.modules())
    left = {id(p) for p in net.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert {id(p) for p in optimizer.state} == left
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 3
        assert state["exp_avg"].shape == parameter.shape
    losses = [train(net, optimizer, x, y) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert control.step()
    assert control.step() == ()  # two are left


def test_measuring_changes_nothing_that_training_sees():
    torch.manual_seed(0)
    net, x = cifar_resnet(20), torch.randn(4, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    AdaptiveDepth(net, x, threshold=1e-12).step()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": 0}, ValueError, "threshold must be positive, got 0"),
        ({"threshold": math.nan}, ValueError, "threshold must be positive, got nan"),
        ({"rule": "l1"}, ValueError, "rule must be one of residual, scaled, got 'l1'"),
        ({"x": points(0)}, ValueError, "x must have a sample, got none"),
        ({"least": 1}, ValueError, "least must be >= 2, got 1"),
        (
            {"least": 15},
            ValueError,
            "model must have a stage of more than 15 blocks, got layers 15",
        ),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a ResidualMLP, .* got Linear"),
        (
            {"model": cifar_resnet(20), "fold": True},
            ValueError,
            "fold must have a bias behind the blocks, got CifarResNet",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=f"AdaptiveDepth: {message}"):
        AdaptiveDepth(**{"model": settled(), "x": points(), **change})
