"""A fused model is copied, pickled, compiled, exported, distributed and cast like any other."""

from __future__ import annotations

import copy
import io
import tempfile

import pytest
import torch
import torch.distributed as dist
from fuse_models import KINDS, Handwritten, Kuangliu, images, net, twins
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastres
from fastres.ops import native

every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
some = pytest.mark.parametrize("kind", [Kuangliu, Handwritten], ids=lambda kind: kind.__name__)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def pickled(model):
    return torch.load(io.BytesIO(saved(model)), weights_only=False)


def saved(model) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_fused_and_can_be_restored_alone(kind, copied):
    _, fused = twins(kind)
    other = copied(fused)
    assert type(other[1]) is type(fused[1])
    assert torch.equal(other(images()), fused(images()))
    assert other[1].conv1 is not fused[1].conv1 if hasattr(fused[1], "conv1") else True
    fastres.restore(other)
    assert type(other[1]) is kind
    assert type(fused[1]) is not kind


def test_an_average_of_weights_is_a_fused_model():
    plain, fused = twins(Kuangliu)
    averages = [AveragedModel(model) for model in (plain, fused)]
    for average, model in zip(averages, (plain, fused), strict=True):
        model[1].bn2.weight.data.mul_(3)
        average.update_parameters(model)
    torch.testing.assert_close(averages[1].eval()(images()), averages[0].eval()(images()))


@some
@modes
def test_it_compiles_as_one_graph(kind, train):
    plain, fused = (model.train(train) for model in twins(kind))
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = images(seed=seed)
        grads = []
        for model in (plain, compiled):
            y = model(x)
            y.square().sum().backward()
            grads.append(y.detach())
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3)
    for a, b in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(b, a)


@some
@modes
def test_it_is_exported_for_any_batch(kind, train):
    plain, fused = (model.train(train) for model in twins(kind))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fused, (images(),), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes}
    assert native.C is None or any("batch_norm_residual" in name for name in names)
    x = images(6)
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_and_the_errors_of_the_model(kind, dtype):
    plain, fused = twins(kind)
    exact, dtypes, errors = copy.deepcopy(plain).double()(images().double()), [], []
    for model in (plain, fused):
        seen = []
        for block in model[1:4]:
            block.register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y.dtype))
        with torch.autocast("cpu", dtype):
            y = model(images())
        y.float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        dtypes.append(seen)
        errors.append((y.double() - exact).norm())
    assert dtypes[0] == dtypes[1]
    assert errors[1] <= 2 * errors[0] + 1e-3


@every
@modes
def test_channels_last_goes_through(kind, train):
    plain, fused = (model.train(train) for model in twins(kind))
    fused = fused.to(memory_format=torch.channels_last)
    strides = []
    fused[1].register_forward_hook(lambda _m, _a, y: strides.append(y))
    x = images().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), plain(images()), rtol=1e-4, atol=1e-4)
    assert strides[0].is_contiguous(memory_format=torch.channels_last)


@some
def test_it_trains_under_distributed_data_parallel(kind):
    plain, fused = twins(kind)
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", f"file://{file.name}", rank=0, world_size=1)
        try:
            for model in (plain, fused):
                parallel = nn.parallel.DistributedDataParallel(model)
                for seed in range(2):
                    parallel(images(seed=seed)).square().sum().backward()
        finally:
            dist.destroy_process_group()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3)


@some
@pytest.mark.parametrize("shared", [False, True])
def test_a_sync_batch_norm_runs_as_it_is_where_it_is_shared(kind, shared, monkeypatch):
    runs = []

    def forward(norm, x):  # torch's own takes no CPU tensor where there is a process group
        runs.append(norm)
        return nn.BatchNorm2d.forward(norm, x)

    if shared:
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(net(kind).train())
    fused = copy.deepcopy(plain)
    assert fastres.fuse(fused, images()).fused.keys() == {"1", "2", "3"}
    runs.clear()
    for model in (plain, fused):
        model(images()).square().sum().backward()
    norms = [m for model in (plain, fused) for m in model.modules() if type(m) is nn.SyncBatchNorm]
    assert len(runs) == len(set(runs))
    assert set(runs) == set(norms if shared else [])
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p)
    torch.testing.assert_close(fused.eval()(images()), plain.eval()(images()))


def test_one_within_distributed_data_parallel_is_fused():
    plain = net(Kuangliu)
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", f"file://{file.name}", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
            assert fastres.fuse(parallel, images()).fused.keys() == {
                "module.1",
                "module.2",
                "module.3",
            }
            torch.testing.assert_close(parallel(images()), plain(images()))
        finally:
            dist.destroy_process_group()


@every
def test_checkpointed_activations_are_recomputed(kind):
    plain, fused = twins(kind)
    x, grads = images(), []
    for model in (plain, fused):
        model.eval()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_forward_derivatives_follow_the_plain_composition():
    plain, fused = (model.double().eval() for model in twins(Kuangliu))
    x = images().double()
    given = {name: p.detach() for name, p in plain.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in given.items()}
    results = [
        torch.func.jvp(lambda w, m=model: torch.func.functional_call(m, w, x), (given,), (along,))
        for model in (plain, fused)
    ]
    torch.testing.assert_close(results[1], results[0])
