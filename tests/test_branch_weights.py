"""Claims about fastres.analysis.branch_weights: known weights have known sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastres.analysis.branch_weights import block_weights, branch_weights
from fastres.nn import ResidualMLP, cifar_resnet


def test_weights_that_are_known_have_known_sizes():
    start = [torch.zeros(3, 4)]
    now = [torch.tensor([[3.0, 4, 0, 0], [3, 4, 0, 0], [0, 0, 0, 5]])]
    found = branch_weights(start, now)
    assert (found.norm, found.distance) == (5, 5)
    assert found.roughness == pytest.approx((0 + math.sqrt(50)) / 2)
    assert branch_weights(now, now).distance == 0
    assert math.isnan(branch_weights([torch.ones(1, 2)], [torch.ones(1, 2)]).roughness)


def test_all_matrices_of_all_blocks_are_there():
    model = ResidualMLP(5, 2, width=8, blocks=6, hidden=3)
    (stage,) = block_weights(model)
    assert stage.shape == (6, 48)
    assert stage[4].norm() == pytest.approx(
        torch.cat([model.stack.w1[4].flatten(), model.stack.w2[4].flatten()]).norm().item()
    )
    shapes = [tuple(t.shape) for t in block_weights(cifar_resnet(20))]
    assert shapes == [(3, 2 * 9 * 16**2), (2, 2 * 9 * 32**2), (2, 2 * 9 * 64**2)]


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="must be a ResidualMLP or a CifarResNet, got Linear"):
        block_weights(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="branch_weights: start and now must have the same shapes"):
        branch_weights([torch.ones(2, 2)], [torch.ones(3, 2)])
