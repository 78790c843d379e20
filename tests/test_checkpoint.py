"""Claims about checkpoints: whole or not there, checked; trainings go on from them exactly."""

from contextlib import contextmanager

import pytest
import torch
from test_training import blobs, net, weights

from fastres import checkpoint, training
from fastres.formats import DataError
from fastres.schedules import RandomBlocks
from fastres.training import Recipe, train

RECIPE = Recipe(epochs=4, batch_size=16)
TENSORS = {
    "a": torch.randn(3, 4),
    "half": torch.randn(5).bfloat16(),
    "none": torch.empty(0, 2),
    "one": torch.tensor(7),
    "turned": torch.randn(3, 4).t(),
}


def test_what_was_written_comes_back(tmp_path):
    facts = {"losses": [0.1, 1e-300], "name": "x", "deep": {"list": [1, None]}}
    checkpoint.save(tmp_path / "a.safetensors", TENSORS, facts)
    tensors, said = checkpoint.load(tmp_path / "a.safetensors")
    assert said == facts
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[k], t) and tensors[k].dtype == t.dtype for k, t in TENSORS.items()
    )


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there must be a file"):
        checkpoint.load(tmp_path / "a")
    for content in (b"", b"\0" * 100, b"PK\x03\x04"):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DataError, match="must be a whole checkpoint of fastres"):
            checkpoint.load(tmp_path / "a")


@contextmanager
def stopped_after(epochs):
    """Let a training be interrupted when so many epochs are kept."""
    whole, kept = training._Kept.keep, []

    def keep(self, losses):
        whole(self, losses)
        kept.append(len(losses))
        if len(kept) == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Kept, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_that_was_stopped_goes_on_bit_for_bit(epochs, tmp_path):
    torch.manual_seed(1)  # for the dropout
    straight = net()
    losses = train(straight, blobs(), RECIPE).losses
    file = tmp_path / "a.safetensors"
    torch.manual_seed(1)
    with stopped_after(epochs):
        train(net(), blobs(), RECIPE, checkpoint=file)
    torch.manual_seed(99)
    again = net(seed=5)
    assert train(again, blobs(), RECIPE, checkpoint=file).losses == losses
    assert torch.equal(weights(again), weights(straight))
    finished = net(seed=6)
    assert train(finished, blobs(), RECIPE, checkpoint=file).losses == losses
    assert torch.equal(weights(finished), weights(straight))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_gates_of_a_schedule_go_on_at_their_step(tmp_path):
    from fastres.nn import ResidualMLP
    from fastres.sites import trace

    def model():
        torch.manual_seed(0)
        return ResidualMLP(4, 2, width=8, blocks=5)

    schedule = RandomBlocks(trace(model(), torch.zeros(1, 4)), keep=2)
    straight, again = model(), model()
    train(straight, blobs(), RECIPE, gates=schedule)
    file = tmp_path / "a.safetensors"
    with stopped_after(2):
        train(model(), blobs(), RECIPE, gates=schedule, checkpoint=file)
    train(again, blobs(), RECIPE, gates=schedule, checkpoint=file)
    assert torch.equal(weights(again), weights(straight))


def test_a_checkpoint_of_another_training_is_refused_and_nothing_changes(tmp_path):
    file = tmp_path / "a.safetensors"
    train(net(), blobs(), RECIPE, checkpoint=file)
    model = net(seed=3)
    for arguments in (
        {"seed": 1},
        {"recipe": Recipe(epochs=5)},
        {"data": blobs(32)},
        {"gates": {"0": 0.5}},
    ):
        with pytest.raises(DataError, match="must be of a training with the same arguments"):
            train(model, **{"data": blobs(), "recipe": RECIPE, "checkpoint": file} | arguments)
    other = torch.nn.Linear(4, 2)
    before = weights(other).clone()
    with pytest.raises(DataError, match="must be of the same model, got 4 tensors"):
        train(other, blobs(), RECIPE, checkpoint=file)
    assert torch.equal(weights(other), before)
    assert torch.equal(weights(model), weights(net(seed=3)))
