"""Schedules give every step its gates, the same whenever they are asked."""

from __future__ import annotations

import pytest
import torch
from models import residual_mlp
from torch import nn

from fastres.data import Data
from fastres.gates import gate
from fastres.paths import path_gradients
from fastres.schedules import RandomBlocks, StochasticDepth
from fastres.sites import trace
from fastres.training import Recipe, train

NAMES = [f"block{i}" for i in range(54)]


def test_exactly_so_many_blocks_are_open_and_every_block_as_often():
    schedule = RandomBlocks(NAMES, keep=23, seed=1)
    steps = [schedule(step) for step in range(2000)]
    assert {sum(gates.values()) for gates in steps} == {23.0}
    assert {value for gates in steps for value in gates.values()} == {0.0, 1.0}
    open_at = torch.tensor([list(gates.values()) for gates in steps]).mean(0)
    assert (open_at - 23 / 54).abs().max() < 5 * (23 / 54 * 31 / 54 / 2000) ** 0.5
    assert steps[5] != steps[6]


def test_a_schedule_depends_on_seed_and_step_alone():
    for one, same, other in (
        (RandomBlocks(NAMES, 23), RandomBlocks(NAMES, 23), RandomBlocks(NAMES, 23, seed=1)),
        (StochasticDepth(NAMES), StochasticDepth(NAMES), StochasticDepth(NAMES, seed=1)),
    ):
        later = [one(step) for step in (3, 0, 7)]
        assert later == [same(step) for step in (3, 0, 7)]
        assert one(3) != other(3)


def test_survival_falls_linearly_to_the_last_block():
    schedule = StochasticDepth(NAMES, last=0.5)
    survival = torch.tensor(list(schedule.expected.values()))
    torch.testing.assert_close(survival, 1 - torch.arange(1, 55) / 54 * 0.5)
    steps = torch.tensor([list(schedule(step).values()) for step in range(4000)])
    assert ((steps.mean(0) - survival) / (survival * (1 - survival) / 4000).sqrt()).abs().max() < 5
    assert set(StochasticDepth(NAMES, last=1.0)(0).values()) == {1.0}


def test_paths_of_random_blocks_are_as_long_as_the_open_blocks_at_most():
    model, x = residual_mlp(8, 6), torch.randn(2, 4)
    schedule = RandomBlocks(trace(model, x), keep=2)
    with gate(model, schedule):
        paths = path_gradients(model, x, lambda out: out.square().sum())
    assert (paths.norms > 0).tolist() == [True] * 3 + [False] * 4


def data() -> Data:
    x = torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = (x.flatten(1).sum(1) > 0).long()
    return Data("noise", 2, x[:40], y[:40], x[40:], y[40:])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), residual_mlp(8, 4), nn.Linear(8, 2))


def test_training_with_a_schedule_updates_open_blocks_alone():
    one = model()
    start = {name: p.detach().clone() for name, p in one.named_parameters()}
    names = [site.name for site in trace(one, torch.randn(1, 1, 2, 2))]
    asked = []

    def schedule(step: int) -> dict[str, float]:
        asked.append(step)
        return {name: float(name == "1.2") for name in names}

    recipe = Recipe(epochs=2, batch_size=20, weight_decay=0.0)
    train(one, data(), recipe, gates=schedule)
    assert asked == [0, 1, 2, 3]
    for name, p in one.named_parameters():
        shut = name.startswith("1.") and name[2] in "134"
        assert torch.equal(p, start[name]) == shut, name


def test_the_same_seed_gives_the_same_training_bit_for_bit():
    weights = []
    for seed in (0, 0, 1):
        one = model()
        sites = trace(one, torch.randn(1, 1, 2, 2))
        train(one, data(), Recipe(epochs=2, batch_size=10), gates=RandomBlocks(sites, 2, seed))
        weights.append(nn.utils.parameters_to_vector(one.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomBlocks(["a", "b"], 3), "keep must be 0 to 2, the sites, got 3"),
        (lambda: RandomBlocks(["a", "b"], -1), "keep must be 0 to 2, the sites, got -1"),
        (lambda: RandomBlocks(["a", "a"], 1), "sites must be different, got 'a' twice"),
        (lambda: RandomBlocks(["a"], 1, seed=-1), "seed must be >= 0, got -1"),
        (lambda: StochasticDepth(["a"], last=1.5), "last must be 0 to 1, got 1.5"),
        (lambda: StochasticDepth(["a", "a"]), "sites must be different, got 'a' twice"),
    ],
)
def test_wrong_arguments_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
