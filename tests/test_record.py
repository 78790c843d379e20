"""record measures what hooks would measure, and the model does not notice."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from models import Block, InPlaceBlock, cifar_resnet, residual_mlp
from record_models import (
    WAYS,
    Watched,
    Written,
    cnn,
    images,
    run,
    vectors,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from fastres.record import record


def test_the_means_are_those_of_independent_hooks_over_several_batches():
    model = residual_mlp(64, 5)
    watched = Watched(model)
    with record(model) as tape:
        for batch in (3, 1, 7):
            model(vectors(batch, seed=batch))
    skip, branch = watched.norms(watched.skips), watched.norms(watched.branches)
    torch.testing.assert_close(tape.absolute, branch.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(tape.scaled, (branch / skip).mean(1), rtol=1e-6, atol=0)
    assert tape.samples == 11
    assert tape.mean_scaled == pytest.approx((branch / skip).mean().item(), rel=1e-6)


def test_single_samples_are_kept_on_request():
    model = residual_mlp(64, 3)
    watched = Watched(model)
    with record(model, per_sample=True) as tape:
        model(vectors(3))
        model(vectors(2, seed=1))
    skip, branch = watched.norms(watched.skips), watched.norms(watched.branches)
    torch.testing.assert_close(tape.skip_sq.double().sqrt(), skip, rtol=1e-6, atol=0)
    torch.testing.assert_close(tape.branch_sq.double().sqrt(), branch, rtol=1e-6, atol=0)
    assert tape.dot.shape == (3, 5)
    cosine = (tape.dot / (tape.skip_sq * tape.branch_sq).sqrt()).double().mean(1)
    torch.testing.assert_close(tape.cosine, cosine, rtol=1e-4, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Sequential, **options: bool) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = checkpoint(layer, x, **self.options)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recomputation_of_checkpoints_is_not_counted(reentrant):
    model = cnn().train()
    wrapped = Checkpointed(copy.deepcopy(model), use_reentrant=reentrant)
    with record(model) as plain, record(wrapped) as tape:
        for seed in range(2):
            one, other = run(model, images(seed=seed)), run(wrapped, images(seed=seed))
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    assert tape.samples == plain.samples == 4
    assert torch.equal(tape.scaled, plain.scaled)
    assert [f"inner.{name}" for name in plain.names] == tape.names


def test_sums_are_never_in_half_precision_under_autocast():
    model = residual_mlp(512, 2)
    model[0].weight.data *= 300  # squares beyond float16
    watched = Watched(model)
    for dtype in (torch.bfloat16, torch.float16):
        for each in (*watched.skips, *watched.branches):
            each.clear()
        with record(model) as tape, torch.autocast("cpu", dtype):
            model(vectors(4))
            model(vectors(4, seed=1))
        torch.testing.assert_close(
            tape.absolute, watched.norms(watched.branches).mean(1), rtol=1e-6, atol=0
        )


def test_float64_is_measured_in_float64():
    model = residual_mlp(16, 2).double()
    watched = Watched(model)
    with record(model) as tape:
        model(vectors().double())
    torch.testing.assert_close(
        tape.absolute, watched.norms(watched.branches).mean(1), rtol=1e-14, atol=0
    )


def test_train_and_eval_passes_may_alternate():
    model = cnn()
    with record(model) as tape:
        model.train()(images())
        model.eval()(images(3))
        with torch.no_grad():
            model(images())
        with torch.inference_mode():
            model(images())
    assert tape.samples == 9


def test_other_image_sizes_and_sequence_lengths_are_the_same_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), InPlaceBlock(8))
    with record(model) as tape:
        model(torch.randn(2, 3, 8, 8))
        model(torch.randn(1, 3, 12, 6))
    assert tape.samples == 3


def test_memory_does_not_grow_with_the_passes():
    model = residual_mlp(8, 4)
    with record(model) as tape:
        sizes = []
        for _ in range(6):
            model(vectors(64))
            gc.collect()
            sizes.append(sum(t.numel() for t in gc.get_objects() if type(t) is Tensor))
    assert sizes[2] == sizes[-1]
    assert sum(total.sums.numel() for total in tape._totals.values()) == 3 * 4


def test_threads_record_their_own_passes():
    model = residual_mlp(16, 3).eval()
    samples = {}

    def work(batch: int) -> None:
        with record(model) as tape, torch.no_grad():
            for _ in range(20):
                model(vectors(batch))
        samples[batch] = (tape.samples, tape.scaled)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch in (1, 2, 3, 4):
        with record(model) as alone, torch.no_grad():
            model(vectors(batch))
        assert samples[batch][0] == 20 * batch
        torch.testing.assert_close(samples[batch][1], alone.scaled, rtol=1e-6, atol=0)


def test_records_of_a_model_and_of_its_part_may_be_open_at_once():
    model = cnn()
    with record(model) as whole, record(model) as again, record(model[2]) as part:
        for _ in range(3):
            model(images())
    assert torch.equal(whole.absolute, again.absolute)
    assert torch.equal(whole.absolute[1:2], part.absolute)
    assert part.names == ["InPlaceBlock"]


def test_shared_layers_are_one_site_per_call():
    block = Block(4)
    model = nn.Sequential(block, block, block)
    with record(model) as tape:
        model(vectors())
        model(vectors())
    assert tape.names == ["0[0]", "0[1]", "0[2]"]


def test_a_tape_is_read_on_the_cpu_whatever_the_default_device():
    model = residual_mlp(8, 2)
    with record(model, per_sample=True) as tape:
        model(vectors())
    plain = tape.absolute, tape.skip_sq, tape.mean_scaled, repr(tape)
    with torch.device("meta"):
        assert torch.equal(tape.absolute, plain[0])
        assert torch.equal(tape.skip_sq, plain[1])
        assert (tape.mean_scaled, repr(tape)) == plain[2:]


def test_a_tape_read_before_any_pass_says_so():
    with record(residual_mlp()) as tape:
        assert "no pass yet" in repr(tape)
        for name in ("names", "sites", "absolute", "scaled", "samples", "mean_scaled"):
            with pytest.raises(RuntimeError, match="record: tape must see a forward pass before"):
                getattr(tape, name)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"record: model must be a torch\.nn\.Module, got int"):
        record(3).__enter__()
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with (
        record(plain),
        pytest.raises(ValueError, match="record: model must contain a residual add, found none in"),
    ):
        plain(vectors())
    compiled = residual_mlp()
    compiled.compile()
    with pytest.raises(TypeError, match="record: model must not be compiled or scripted"):
        record(compiled).__enter__()
    lazy = nn.Sequential(nn.LazyLinear(4), Block(4))
    with pytest.raises(ValueError, match=r"must be initialized, got lazy parameter '0\.weight'"):
        record(lazy).__enter__()
    model = residual_mlp()
    with record(model) as tape:
        model(vectors())
    with pytest.raises(RuntimeError, match="record: per_sample must be True"):
        _ = tape.dot


def test_a_compiled_part_is_left_alone():
    model = residual_mlp(8, 3)
    model[2].compile(backend="eager")
    with record(model) as tape:
        for _ in range(2):
            model(vectors())
    assert tape.names == ["1", "3"]


def test_a_tape_prints_tabulates_and_plots():
    model = cifar_resnet()
    with record(model) as tape:
        model(images())
    assert repr(tape).splitlines()[0] == "Tape of Sequential: 5 sites, 2 samples"
    assert len(repr(tape).splitlines()) == 7
    frame = tape.to_frame()
    assert list(frame["name"]) == tape.names
    assert list(frame.columns)[-3:] == ["absolute", "scaled", "cosine"]
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = tape.plot()
    assert tape.plot(axes) is axes
    kinds = torch.tensor([kind == "identity" for kind in tape.kinds])
    assert tape.mean_scaled == pytest.approx(tape.scaled[kinds].mean().item())


def test_a_zero_skip_is_divided_by_plainly():
    class Zero(Written):
        def forward(self, x: Tensor) -> Tensor:
            return self.write(F.relu(-x.abs()), self.linear)

    model = Zero(WAYS["plus"])
    with record(model) as tape:
        model(torch.ones(2, 8))
    assert tape.scaled.isinf().all()
