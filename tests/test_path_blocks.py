"""What goes through a block, its parameters, and where paths begin."""

from __future__ import annotations

import math

import pytest
import torch
from models import cifar_resnet
from path_models import (
    Scale,
    SwitchPadded,
    by_length,
    enumerate_paths,
    images,
    nested,
    squares,
    switch_mlp,
    vectors,
)
from torch import nn

from fastres.nn import ResidualMLP
from fastres.paths import path_gradients

# Blocks.


def test_the_share_of_a_block_is_that_of_all_paths_through_its_branch():
    model, x = switch_mlp(6), vectors()
    through = torch.zeros(6, *x.shape).double()
    for path, (g,) in enumerate_paths(model, x):
        through[list(path)] += g
    paths = path_gradients(model, x, squares, 2, by="block")
    g = paths.gradient
    torch.testing.assert_close(paths.block_norms, through.flatten(1).norm(dim=1))
    torch.testing.assert_close(paths.block_shares, (through * g).flatten(1).sum(1) / (g * g).sum())
    mean = path_gradients(model, x, squares, method="moments").mean_length
    assert paths.block_shares.sum().item() == pytest.approx(mean)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("longest", [2, 5])
def test_parameter_gradients_are_split_by_the_branches_above(longest, chunk):
    model, x = switch_mlp(5), vectors()
    weights = [list(block.parameters()) for block in model[1:-1]]
    flat = [p for each in weights for p in each]
    sums = [torch.zeros(6, *p.shape).double() for p in flat]
    for path, grads in enumerate_paths(model, x, wanted=flat):
        for place, (total, g) in enumerate(zip(sums, grads, strict=True)):
            own = place // 4
            # what is below its own block does not matter: count such a path once
            if path[own] and not any(path[:own]):
                total[sum(path[own + 1 :])] += g
    blocks = [torch.cat([s.flatten(1) for s in sums[4 * i : 4 * i + 4]], 1) for i in range(5)]
    paths = path_gradients(model, x, squares, longest, by="block", chunk=chunk)
    for i, rows in enumerate(blocks):
        got = paths.weight_norms[i]
        torch.testing.assert_close(got, rows[:longest].norm(dim=1), rtol=1e-10, atol=1e-14)
        rest = rows[longest:].sum(0).norm().item()
        assert paths.weight_tails[i].item() == pytest.approx(rest, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("chunk", [1, 40])
def test_a_weight_of_several_blocks_has_the_sum_of_its_uses(chunk):
    c, blocks = 2.0**-10, 40
    block = Scale(c)
    model = nn.Sequential(*[block] * blocks).float()
    paths = path_gradients(model, torch.ones(2, 3), torch.sum, by="block", chunk=chunk)
    # in block i it multiplies (1 + c)^i, and j of the others above it are gone through
    known = [
        sum((1 + c) ** i * math.comb(blocks - 1 - i, j) * c**j for i in range(blocks)) * 6
        for j in range(8)
    ]
    assert paths.weight_norms[0, :8].tolist() == pytest.approx(known, rel=1e-5)
    assert not paths.weight_norms[1:].any()


def test_parameters_of_a_nested_block_are_those_of_the_inner_one():
    model = nested()
    paths = path_gradients(model, vectors(), squares, by="block")
    assert paths.sites == ("1", "2.branch.1", "2.branch.2", "2", "3")
    assert (paths.weight_norms[:, 0] > 0).tolist() == [True, False, False, True, True]
    assert (paths.weight_norms[1:3, 1] > 0).all()  # the outer branch is above


def test_slices_of_one_parameter_are_the_weights_of_their_own_blocks():
    torch.manual_seed(0)
    model = ResidualMLP(3, 2, width=5, blocks=4).double()
    paths = path_gradients(model, vectors(), squares, by="block")
    wanted = [p for name, p in model.named_parameters() if name.startswith("stack")]
    whole = torch.autograd.grad(squares(model(vectors())), wanted)
    last = torch.cat([g[3].flatten() for g in whole])  # no branch is above the last one
    torch.testing.assert_close(
        paths.weight_norms[3], torch.stack([last.norm(), *3 * [last[0] * 0]])
    )
    assert (paths.weight_norms[0] > 0).all()


# Where, and what is counted.


def test_paths_may_begin_at_the_block_of_any_site():
    model, x = switch_mlp(6), vectors()
    with torch.no_grad():
        stream = model[:4](x)
    rest = nn.Sequential(*model[4:])
    sums, _, _ = by_length(rest, stream)
    paths = path_gradients(model, x, squares, where="4", keep=True)
    assert paths.sites == ("4", "5", "6")
    torch.testing.assert_close(paths.gradients, sums)


def test_a_block_with_a_projection_begins_before_it():
    torch.manual_seed(0)
    model = cifar_resnet(SwitchPadded).double().eval()
    with torch.no_grad():
        stream = model[:2](images())
    sums, _, _ = by_length(nn.Sequential(*model[2:]), stream)
    paths = path_gradients(model, images(), squares, where="2", keep=True)
    torch.testing.assert_close(paths.gradients, sums, rtol=1e-9, atol=1e-12)
