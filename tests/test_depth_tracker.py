"""The tracker measures what is there, training goes on, absorbed batch norm is the same."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import cifar_resnet, residual_mlp, torchvision
from torch import Tensor, nn

from fastres.analysis.absorbing import absorb, absorbed_weight, pairs_of
from fastres.analysis.depth_tracker import DepthTracker
from fastres.nn import ResidualMLP
from fastres.paths import path_gradients
from fastres.record import record
from fastres.studies.paths_network import FILES, trained

ROOT = os.environ.get("FASTRES_DATA")


def stirred(model: nn.Module) -> nn.Module:
    """Batch norm with statistics and weights that are not those it is made with."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_absorbed_batch_norm_gives_the_same_outputs():
    torch.manual_seed(0)
    small = stirred(cifar_resnet())
    folded = absorb(small, images())
    assert relative(folded(images()), small(images())) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    linear = stirred(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()))
    x = torch.randn(9, 4)
    assert relative(absorb(linear, x)(x), linear(x)) < 1e-5
    large = stirred(torchvision().models.resnet18(num_classes=5))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(absorb(large, x)(x), large(x)) < 1e-5


@pytest.mark.skipif(not ROOT, reason="FASTRES_DATA is not set")
def test_absorbed_batch_norm_of_trained_weights_gives_the_same_outputs():
    network = trained(20, Path(ROOT) / "pretrained" / FILES[20])
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert relative(absorb(network, x)(x), network(x)) < 1e-5


def test_what_has_nothing_to_absorb_is_told():
    with pytest.raises(ValueError, match="absorb: model must have a batch norm after a layer"):
        absorb(residual_mlp(), torch.ones(2, 4))
    plain = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="norm must keep running statistics"):
        absorbed_weight(nn.Linear(2, 3), plain)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3)).train()
    assert pairs_of(model, torch.ones(2, 2)) == []
    assert all(module.training for module in model.modules())


def test_scales_and_kernels_are_those_of_the_last_batch_norm_and_of_all_layers():
    torch.manual_seed(0)
    model = stirred(cifar_resnet())
    tracker = DepthTracker(model, images())
    row = tracker.measure(7)
    assert tracker.names == ["1", "2", "3", "4", "5"]
    for block, name in enumerate(tracker.names):
        module = model.get_submodule(name)
        norm = module.conv2[1]
        assert row.scale[block] == pytest.approx(norm.weight.abs().mean().item())
        want = 0.0
        for conv, bn in ((module.conv1[0], module.conv1[1]), (module.conv2[0], norm)):
            gain = bn.weight / (bn.running_var + bn.eps).sqrt()
            want += (conv.weight * gain[:, None, None, None]).square().sum().item()
        assert row.kernel[block] == pytest.approx(want**0.5, rel=1e-5)
    with record(model, per_sample=True) as tape:
        model(images())
    gain = (tape.branch_sq.sum(1) / tape.skip_sq.sum(1)).sqrt()
    assert row.gain == pytest.approx(gain.numpy())


def test_equal_gains_imply_the_binomial_law_and_beta():
    model = ResidualMLP(4, 2, width=8, blocks=6, activation="identity")
    with torch.no_grad():
        model.stack.w1.copy_(torch.eye(8).expand(6, 8, 8))
        model.stack.w2.copy_(0.5 * torch.eye(8).expand(6, 8, 8))
    row = DepthTracker(model, torch.randn(3, 4)).measure(0)
    assert row.gain == pytest.approx([0.5] * 6, rel=1e-6)
    assert row.beta == pytest.approx(0.5, rel=1e-6)
    law = [math.comb(6, k) * 0.5**k / 1.5**6 for k in range(7)]
    assert row.lengths == pytest.approx(law, rel=1e-5)
    assert np.isnan(row.scale).all()
    assert np.isnan(row.kernel).all()
    assert math.isnan(row.exact_mean_length)


def test_where_branches_are_gains_the_gradient_has_the_lengths_that_they_imply():
    model = ResidualMLP(4, 2, width=8, blocks=5, activation="identity")
    with torch.no_grad():
        model.stack.w1.copy_(torch.eye(8).expand(5, 8, 8))
        for block, gain in enumerate((0.1, 2.0, 0.5, 1.0, 0.3)):
            model.stack.w2[block] = gain * torch.eye(8)
    tracker = DepthTracker(model, torch.randn(3, 4), lambda out: out.sin().sum())
    row = tracker.measure(0, exact=True)
    assert row.exact == pytest.approx(row.lengths, abs=1e-6)
    assert row.exact_mean_length == pytest.approx(row.mean_length, rel=1e-5)


def test_exact_lengths_are_those_of_path_gradients_and_training_goes_on_unchanged():
    torch.manual_seed(0)
    model = cifar_resnet().train()
    model.append(nn.Dropout(0.5))
    twin, x = copy.deepcopy(model), images()
    tracker = DepthTracker(model, x, lambda out: out.square().sum())
    results = []
    for network in (model, twin):
        torch.manual_seed(3)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
        for step in range(3):
            optimiser.zero_grad()
            network(x).square().sum().backward()
            if network is model:
                tracker.measure(step, exact=step == 1)
            optimiser.step()
        assert network.training
        results.append(network.state_dict())
    assert all(torch.equal(results[0][key], value) for key, value in results[1].items())
    assert [row.step for row in tracker.rows] == [0, 1, 2]
    assert [row.exact is None for row in tracker.rows] == [True, False, True]
    row = tracker.measure(3, exact=True)
    want = path_gradients(model.eval(), x, lambda out: out.square().sum())
    assert row.exact == pytest.approx(want.shares.numpy(), rel=1e-6)
    frame = tracker.to_frame()
    assert len(frame) == 4 * 5
    assert frame["mean_length"].iloc[-1] == pytest.approx(row.mean_length)


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match="DepthTracker: model must contain a residual add"):
        DepthTracker(nn.Linear(2, 2), torch.ones(1, 2))
    tracker = DepthTracker(residual_mlp(), torch.ones(2, 4))
    with pytest.raises(ValueError, match="loss must be given to measure exact lengths"):
        tracker.measure(0, exact=True)
