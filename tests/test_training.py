"""Claims about fastres.training: it is reproducible, refuses what is wrong, and learns."""

import sys

import pytest
import torch
from torch import nn

from fastres.data import Data, load
from fastres.training import Recipe, evaluate, evaluating, train


def blobs(count: int = 64) -> Data:
    """Two classes that one feature tells apart."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    x = torch.randn(count, 4, generator=random)
    x[:, 0] += 6 * y - 3
    return Data("blobs", 2, x, y, x, y)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(seed: int) -> tuple[torch.Tensor, tuple[float, ...]]:
    torch.manual_seed(1)  # for the dropout
    model = net()
    history = train(model, blobs(), Recipe(epochs=3, batch_size=16), seed=seed)
    return weights(model), history.losses


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    first, second, other = trained(0), trained(0), trained(1)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert not torch.equal(first[0], other[0])


def test_it_learns_what_one_feature_tells():
    model, data = net(), blobs()
    history = train(model, data, Recipe(epochs=30, batch_size=16, lr=1e-2))
    assert history.losses[-1] < history.losses[0] / 5
    assert evaluate(model, data.test_x, data.test_y) == 0


def test_no_epochs_leave_the_weights_as_they_are():
    model = net()
    assert train(model, blobs(), Recipe(epochs=0)).losses == ()
    assert torch.equal(weights(model), weights(net()))


def test_a_loss_that_is_not_finite_stops_the_training():
    data = blobs()
    data.train_x[5] = torch.inf
    with pytest.raises(FloatingPointError, match="loss must stay finite, got nan in epoch 1"):
        train(net(), data, Recipe(epochs=2))


def test_the_error_is_the_fraction_of_wrong_answers_whatever_the_batch():
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    y = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1])
    for batch in (1, 3, 8, 100):
        assert evaluate(Constant(), torch.zeros(8, 4), y, batch) == 0.25


def test_evaluating_puts_every_module_back_into_its_own_mode():
    model = net().train()
    model[2].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model] == [True, True, False, True]


def test_evaluating_needs_samples():
    with pytest.raises(ValueError, match="at least 1, got 0, 0"):
        evaluate(net(), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}]
)
def test_a_recipe_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"train: .* must be .*, got"):
        Recipe(**wrong)


def test_the_bar_counts_every_step_and_its_absence_is_no_error(capsys, monkeypatch):
    train(net(), blobs(), Recipe(epochs=2, batch_size=16), progress="two epochs")
    shown = capsys.readouterr().err
    assert "two epochs: 100%" in shown
    assert "8/8" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    train(net(), blobs(), Recipe(epochs=1), progress="no tqdm")
    assert capsys.readouterr().err == ""


def test_data_without_training_samples_are_refused():
    data = load("digits")
    empty = Data("empty", 10, data.train_x[:0], data.train_y[:0], data.test_x, data.test_y)
    with pytest.raises(ValueError, match="must have training samples, got 0"):
        train(net(), empty)
