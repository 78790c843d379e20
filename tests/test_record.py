"""record measures what hooks would measure, and the model does not notice."""

from __future__ import annotations

import copy
import gc
import sys
import threading

import pytest
import torch
from models import Block, InPlaceBlock, cifar_resnet, residual_mlp, stacks, torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from fastres.nn import ResidualMLP, ResidualStack
from fastres.ops import mlp_stack, native, residual_add
from fastres.record import record
from fastres.sites import add


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def vectors(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [InPlaceBlock(8) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(512, 5))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class Watched(nn.Module):
    """What hooks measure independently: the norms of the two sides of Block's sum, in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.skips: list[list[Tensor]] = []
        self.branches: list[list[Tensor]] = []
        for module in model.modules():
            if isinstance(module, Block):
                self.skips.append([])
                self.branches.append([])
                skip, branch = self.skips[-1], self.branches[-1]
                module.register_forward_pre_hook(lambda _, x, to=skip: to.append(x[0].double()))
                module.branch.register_forward_hook(lambda *a, to=branch: to.append(a[2].double()))

    def norms(self, which: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(each).detach().flatten(1).norm(dim=1) for each in which])


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


def run(model: nn.Module, x: Tensor, grad: bool = True) -> list[Tensor]:
    """One pass with gradients, from one seed: everything that must not change."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(grad):
        x = x.clone().requires_grad_(grad)
        out = model(x)
        if grad:
            out.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())] if grad else []
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_same_bits(model: nn.Module, x: Tensor, grad: bool = True, passes: int = 3) -> None:
    plain = copy.deepcopy(model)
    with record(model) as tape:
        for _ in range(passes):
            for one, other in zip(run(plain, x, grad), run(model, x, grad), strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
    assert tape.samples == passes * x.size(0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_cnn_that_adds_in_place_keeps_its_bits(train, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = cnn().train(train).to(memory_format=form)
    assert_same_bits(model, images().contiguous(memory_format=form))
    assert_same_bits(model, images().contiguous(memory_format=form), grad=False)


def test_projection_skips_keep_their_bits():
    torch.manual_seed(0)
    assert_same_bits(cifar_resnet(), images())


def test_a_transformer_in_training_keeps_its_bits_and_its_dropout():
    assert_same_bits(transformer().train(), torch.randn(2, 5, 16))


@pytest.mark.parametrize("grad", [True, False])
def test_a_vision_transformer_in_eval_mode_keeps_its_bits(grad):
    vit = torchvision().models.VisionTransformer(32, 16, 2, 4, 64, 64, num_classes=3).eval()
    assert_same_bits(vit, torch.randn(2, 3, 32, 32), grad)


def test_encoder_layers_are_recorded_in_eval_mode_as_well():
    model = transformer().eval()
    with torch.no_grad(), record(model) as tape:
        for _ in range(2):
            model(torch.randn(2, 5, 16))
    assert len(tape.names) == 6
    assert tape.names[0] == "layers.0[0]"


def test_an_encoder_with_padding_is_recorded_without_nested_tensors():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
        with record(model) as tape:
            outs = [model(x, src_key_padding_mask=padding) for _ in range(3)]
    assert len(tape.names) == 4
    for out in outs:
        torch.testing.assert_close(out[~padding], plain[~padding])


class Written(nn.Module):
    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.write = nn.Linear(8, 8), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x.sin(), self.linear)


WAYS = {
    "plus": lambda x, f: x + f(x),
    "reversed": lambda x, f: f(x) + x,
    "in place": lambda x, f: f(x).add_(x),
    "alpha": lambda x, f: torch.add(x, f(x), alpha=-0.5),
    "alpha on the skip": lambda x, f: torch.add(f(x), x, alpha=2),
    "by name": lambda x, f: torch.add(input=f(x), other=x),
    "mixed dtypes": lambda x, f: x.double() + f(x),
    "strided": lambda x, f: x.t().clone().t() + f(x),
    "declared": lambda x, f: add(x, f(x)),
    "residual_add": lambda x, f: residual_add(x, f(x))[0],
}
SIDES = {"alpha": (1, -0.5), "alpha on the skip": (2, 1)}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_the_add_is_measured_and_keeps_its_bits(way, grad):
    model = Written(WAYS[way])
    x = torch.randn(3, 8)
    assert_same_bits(model, x, grad)
    with record(model, per_sample=True) as tape, torch.set_grad_enabled(grad):
        model(x)
        model(x)
    a, b = SIDES.get(way, (1, 1))
    skip, branch = x.sin().double(), model.linear(x.sin()).detach().double()
    for got, want in (
        (tape.skip_sq, (a * skip).square().sum(1)),
        (tape.branch_sq, (b * branch).square().sum(1)),
        (tape.dot, (a * b * skip * branch).sum(1)),
    ):
        torch.testing.assert_close(got[0].double(), want.repeat(2), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(native.C is None, reason="the compiled library is not loaded")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", ["plus", "reversed", "in place", "declared"])
def test_the_sums_come_from_the_pass_that_adds(way, grad, monkeypatch):
    from fastres import measuring

    monkeypatch.setattr(measuring, "_reference", None)
    model = Written(WAYS[way])
    with record(model) as tape, torch.set_grad_enabled(grad):
        for _ in range(2):
            model(torch.randn(3, 8))
    assert tape.samples == 6


@pytest.mark.parametrize("grad", [True, False])
def test_a_stack_that_runs_as_one_gives_what_its_separate_blocks_give(grad):
    fused, separate = stacks(5, "gelu")
    with record(fused, True) as tape, record(separate, True) as plain, torch.set_grad_enabled(grad):
        for batch in (3, 2):
            fused(vectors(batch))
            separate(vectors(batch))
    assert tape.names == plain.names == [f"stack[{i}]" for i in range(5)]
    assert tape.sites == plain.sites
    assert tape.samples == plain.samples == 5
    for name in ("absolute", "scaled", "cosine", "skip_sq", "branch_sq", "dot"):
        torch.testing.assert_close(getattr(tape, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (2, 3, 4, 8), (0, 8)])
def test_a_recorded_stack_keeps_its_bits_whatever_the_dimensions_of_its_stream(grad, shape):
    assert_same_bits(ResidualStack(8, 4), torch.randn(shape), grad)


def test_a_sample_of_a_stack_is_all_that_dim_0_counts():
    fused, separate = (model.stack for model in stacks(3))
    x = torch.randn(2, 3, 5, 8)
    with record(fused, True) as tape, record(separate, True) as plain:
        for _ in range(2):
            fused(x)
            separate(x)
    assert [site.shape for site in tape.sites] == [(2, 3, 5, 8)] * 3
    torch.testing.assert_close(tape.skip_sq, plain.skip_sq)
    torch.testing.assert_close(tape.dot, plain.dot, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.raw("_mlp_stack") is None, reason="the library is not built")
@pytest.mark.parametrize("grad", [True, False])
def test_recording_a_stack_costs_as_many_calls_whatever_its_depth(grad):
    assert calls_of_a_pass(3, grad) == calls_of_a_pass(300, grad)


def calls_of_a_pass(blocks: int, grad: bool) -> int:
    """Calls of Python and C functions in a pass of a recorded ResidualMLP after the first."""
    model, calls = ResidualMLP(4, 3, width=8, blocks=blocks), []
    with torch.set_grad_enabled(grad), record(model):
        for _ in range(3):
            calls.clear()
            sys.setprofile(lambda _, event, __: calls.append(event) if "call" in event else None)
            try:
                model(vectors())
            finally:
                sys.setprofile(None)
    return len(calls)


def test_a_call_of_mlp_stack_in_any_model_is_recorded():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = ResidualStack(8, 3), ResidualStack(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            s = self.inner
            x, _ = mlp_stack(x, s.w1, s.b1, s.w2, s.b2, 0.5, "tanh", blocks=4)
            x = self.first(x) + x  # twice: a site with the stack in its branch
            return x + self.first.w1.sum() * x.cos()

    model, x = Model(), torch.randn(3, 8)
    with record(model, True) as tape:
        for _ in range(2):
            model(x)
    assert tape.names == [
        *(f"Model[{i}]" for i in range(4)), *(f"first[{i}]" for i in range(3)), "Model[4]",
        "Model[5]",
    ]  # fmt: skip
    assert [site.level for site in tape.sites] == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    s = model.inner
    _, stats = mlp_stack(x, s.w1, s.b1, s.w2, s.b2, 0.5, "tanh", blocks=4)
    assert torch.equal(tape.dot[:4, :3], stats.dot)


def test_records_of_a_model_that_declares_its_adds_may_be_open_at_once():
    for model in stacks(4):
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                record(model) as one,
                record(model) as other,
                record(model.stack) as part,
            ):
                for _ in range(3):
                    model(vectors())
            assert torch.equal(one.absolute, other.absolute)
            assert torch.equal(one.absolute, part.absolute)
            assert one.samples == other.samples == part.samples == 6


def test_a_stack_under_autocast_is_its_separate_blocks():
    fused, separate = stacks(3)
    with record(fused) as tape, record(separate) as plain:
        fused(vectors(4))
        separate(vectors(4))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(vectors(4)), separate(vectors(4)))
    assert tape.samples == plain.samples == 8
    torch.testing.assert_close(tape.scaled, plain.scaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("blocks", "got"), [(4, "one add more"), (2, "none")])
def test_a_stack_that_changes_its_depth_between_passes_is_told(blocks, got):
    model, other = stacks(3)[0], stacks(blocks)[0]
    with record(model) as tape:
        model(vectors())
        for name, parameter in other.stack.named_parameters():
            setattr(model.stack, name, parameter)
        with pytest.raises(RuntimeError, match=rf"site 'stack\[2\]' .* got {got}"):
            model(vectors())
    assert tape.samples == 2


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
