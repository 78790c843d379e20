"""Claims about depth_choice and nn.resizing: the rule stops, growth changes nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres.analysis.depth_choice import choose_depth, grow
from fastres.nn import ResidualMLP
from fastres.nn.resizing import append_blocks, remove_last_block


def reciprocal(trained: list[int], exponent: float = -1.0):
    def train(blocks: int):
        trained.append(blocks)
        return SimpleNamespace(mean_scaled=0.6 * blocks**exponent, mean_absolute=7.0 * blocks)

    return train


def test_the_first_depth_below_epsilon_is_chosen_and_no_deeper_one_trained():
    trained: list[int] = []
    found = choose_depth(reciprocal(trained), [48, 6, 12, 24, 12], epsilon=0.04)
    assert found.depth == 24
    assert trained == [6, 12, 24] == list(found.depths)
    assert found.values[-1] == pytest.approx(0.025)
    assert found.estimate.blocks == pytest.approx(15)  # 0.6 / 0.04, between 12 and 24


def test_never_below_epsilon_is_an_outcome_with_the_extrapolation():
    found = choose_depth(reciprocal([]), [6, 12, 24], epsilon=0.001)
    assert found.depth is None
    assert found.estimate.blocks == pytest.approx(600)
    assert "none of 6, 12, 24 blocks is below 0.001; by their law 600 blocks" in str(found)
    single = choose_depth(reciprocal([]), [6], epsilon=0.001)
    assert (single.depth, single.estimate) == (None, None)


def test_the_absolute_rule_reads_the_absolute_value():
    found = choose_depth(reciprocal([]), [6, 12], epsilon=10, which="absolute")
    assert found.depth is None
    assert found.estimate.blocks == math.inf  # it rises with depth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0}, "epsilon must be positive, got 0"),
        ({"epsilon": math.nan}, "epsilon must be positive, got nan"),
        ({"depths": []}, r"depths must be some numbers >= 1, got \[\]"),
        ({"depths": [0, 3]}, "depths must be some numbers >= 1"),
        ({"which": "relative"}, "which must be one of absolute, scaled, got 'relative'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=f"choose_depth: {message}"):
        choose_depth(reciprocal([]), **{"depths": [6], "epsilon": 0.1, **change})
    with pytest.raises(ValueError, match="train must give a finite mean over identity sites"):
        choose_depth(lambda _: SimpleNamespace(mean_scaled=math.nan), [6], 0.1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(32, 12), torch.randint(3, (32,))


def step(model, optimizer) -> float:
    x, y = batch()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(gated: bool = False, fused: bool = False, steps: int = 3):
    torch.manual_seed(1)
    model = ResidualMLP(12, 3, width=16, blocks=4, hidden=8, gated=gated)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_at_the_moment_of_growth_no_output_changes_a_bit(gated, grad):
    (model, optimizer), (x, _) = trained(gated), batch()
    with torch.set_grad_enabled(grad):
        before = model(x)
        append_blocks(model.stack, 3, optimizer)
        assert torch.equal(model(x), before)
    assert model.stack.blocks == len(model.stack.w1) == 7
    assert len(fastres.trace(model, x)) == 7


@pytest.mark.parametrize("fused", [False, True])
def test_growth_keeps_the_optimiser_and_training_goes_on(fused):
    model, optimizer = trained(fused=fused)
    old = {name: optimizer.state[p] for name, p in model.named_parameters()}
    append_blocks(model.stack, 2, optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == old[name]["step"] == 3
        assert state["exp_avg"].shape == parameter.shape
        rows = len(old[name]["exp_avg"])
        assert torch.equal(state["exp_avg"][:rows], old[name]["exp_avg"])
        assert not state["exp_avg_sq"][rows:].any()
    added = model.stack.w2[4:].clone()
    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    assert (model.stack.w2[4:] != added).all(2).all(1).all()  # every new block learns


def test_old_blocks_step_after_growth_as_they_would_have_without():
    (grown, optimizer), (plain, other) = trained(), trained()
    append_blocks(grown.stack, 2, optimizer)
    step(grown, optimizer)
    step(plain, other)
    assert torch.allclose(grown.stack.w1[:4], plain.stack.w1, atol=1e-6)
    assert torch.allclose(grown.head.weight, plain.head.weight, atol=1e-6)


def test_removing_what_was_appended_gives_the_network_back():
    model, optimizer = trained()
    before = [p.clone() for p in model.parameters()]
    append_blocks(model.stack, 1, optimizer)
    remove_last_block(model.stack, optimizer)
    assert model.stack.blocks == 4
    assert all(map(torch.equal, before, model.parameters()))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    empty = ResidualMLP(12, 3, width=16, blocks=0)
    with pytest.raises(ValueError, match="remove_last_block: stack must have a block, got 0"):
        remove_last_block(empty.stack)


def test_a_network_grows_until_the_rule_holds():
    (model, optimizer), (x, _) = trained(), batch()

    def train(net):
        for _ in range(3):
            step(net, optimizer)
        with torch.no_grad(), fastres.record(net) as tape:
            net(x)
        return tape

    first = train(model).mean_scaled
    found = grow(model, optimizer, train, epsilon=0.6 * first, step=2, most=40)
    assert found.depth == model.stack.blocks > 4
    assert found.values[-1] < 0.6 * first <= min(found.values[:-1])
    never = grow(model, optimizer, train, epsilon=1e-9, step=3, most=found.depth + 4)
    assert never.depth is None
    assert never.depths == (found.depth, found.depth + 3, found.depth + 4)


@pytest.mark.parametrize(("steps", "most"), [(0, 9), (1, 3)])
def test_growth_that_cannot_grow_is_refused(steps, most):
    model, optimizer = trained()
    with pytest.raises(ValueError, match="grow: step must be >= 1 and most no less"):
        grow(model, optimizer, lambda _: None, 0.1, step=steps, most=most)
    with pytest.raises(ValueError, match="append_blocks: blocks must be >= 1, got 0"):
        append_blocks(model.stack, 0)
