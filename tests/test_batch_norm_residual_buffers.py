"""What batch_norm_residual does with running statistics and weights, of any dtype."""

from copy import deepcopy
from fractions import Fraction
from importlib import import_module

import pytest
import torch
from contract import DTYPES, largest_error
from test_batch_norm_residual import images, needs_library, running
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops.batch_norm_residual import batch_norm_residual, reference
from fastres.ops.batch_norm_residual_inner import batch_norm_inner
from fastres.ops.layout import accumulate

module = import_module("fastres.ops.batch_norm_residual")
BUFFERS = {
    "float32": lambda t: t.clone(),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.to(torch.float64, copy=True),
    "strided": lambda t: torch.stack([t, t], 1)[:, 0],
    "inference": lambda t: torch.inference_mode()(t.clone)(),
}


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_running_statistics_move_in_place_whatever_they_are(device, dtype, kind):
    x, f, weight, bias = images(6, 5, 3, 4, dtype=dtype, device=device)
    f.requires_grad_(kind == "float32")
    start = running(x, True)
    with torch.inference_mode(kind == "inference"):
        ours = [BUFFERS[kind](t) for t in start]
        kept, versions = [*ours], [t.is_inference() or t._version for t in ours]
        batch_norm_residual(x, f, *ours, weight, bias, training=True, momentum=0.2)
    double = f.detach().double().transpose(0, 1).flatten(1)
    of_batch = double.mean(1), double.var(1)
    for t, before, batch in zip(kept, start, of_batch, strict=True):
        tolerance = 2 * max(torch.finfo(t.dtype).eps, torch.finfo(start[0].dtype).eps)
        torch.testing.assert_close(
            t.double(), before + 0.2 * (batch - before), rtol=tolerance, atol=tolerance
        )
    if kind != "inference":  # as those who keep what they computed of them watch
        assert [t._version for t in kept] > versions


@needs_library
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_plain_call_is_the_kernels_alone(device, training, monkeypatch):
    norm = nn.BatchNorm2d(5, device=device).train(training)
    x, f, _, _ = images(6, 5, 3, 4, device=device)
    given = (x, f, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    options = {"training": training, "num_batches_tracked": norm.num_batches_tracked}
    want = x + deepcopy(norm)(f)
    monkeypatch.setattr(module, "_check", None)  # would take longer than the kernel
    with torch.set_grad_enabled(training):
        y, _ = batch_norm_residual(*given, **options)
    torch.testing.assert_close(y, want)
    assert norm.num_batches_tracked == training


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_buffers_are_those_of_torchs_module_after_several_steps(device, momentum, last):
    ours, theirs = (nn.BatchNorm2d(5, momentum=momentum, device=device) for _ in range(2))
    for step in range(4):
        x, f, _, _ = images(6, 5, 9, 8, device=device, seed=step, last=last)
        y, _ = batch_norm_residual(
            *(x, f, ours.running_mean, ours.running_var, ours.weight, ours.bias),
            training=True,
            momentum=momentum,
            num_batches_tracked=ours.num_batches_tracked,
        )
        torch.testing.assert_close(y, x + theirs(f))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


def test_running_statistics_are_as_exact_as_torchs_however_far_the_mean_lies(device):
    for offset, dtype in ((0.0, torch.float32), (1e3, torch.float32), (1e6, torch.float64)):
        f = (torch.randn(8, 3, 20, 20, dtype=dtype) + offset).to(device)
        mean = [torch.zeros(3, dtype=torch.float64, device=device) for _ in range(2)]
        reference(f.double(), f.double(), *mean, training=True, momentum=1.0)
        errors = []
        for run in (batch_norm_residual, None):
            buffers = [torch.zeros(3, dtype=dtype, device=device) for _ in range(2)]
            if run:
                run(f, f, *buffers, training=True, momentum=1.0)
            else:
                F.batch_norm(f, *buffers, training=True, momentum=1.0)
            errors.append(largest_error(buffers, mean))
        assert errors[0] <= 2 * max(errors[1], torch.finfo(dtype).eps / 2)


def test_the_module_in_float16_or_bfloat16_keeps_float32_statistics(device):
    for dtype in (torch.bfloat16, torch.float16):
        x, f, weight, bias = images(4, 3, 5, 5, device=device)
        mean, var = running(f, True)
        y, stats = batch_norm_residual(x.to(dtype), f.to(dtype), mean, var, weight, bias,
                                       training=True)  # fmt: skip
        assert (y.dtype, stats.sums.dtype, mean.dtype) == (dtype, torch.float32, torch.float32)
        wide = F.batch_norm(f.to(dtype).float(), None, None, weight, bias, True)
        torch.testing.assert_close(y.float(), x.to(dtype).float() + wide, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_and_weights_in_another_dtype_are_taken(device, dtype):
    x, f, weight, bias = images(4, 3, 5, 5, device=device)
    small = [t.to(dtype) for t in (*running(f, True), weight, bias)]
    y, _ = batch_norm_residual(x, f, *small, training=True)
    assert (y.dtype, small[0].dtype) == (torch.float32, dtype)
    torch.testing.assert_close(y, x + F.batch_norm(f, None, None, *(t.float() for t in small[2:]),
                                                   True))  # fmt: skip


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_weights_of_the_dtype_of_the_images_are_not_cast(device, dtype):
    class Every(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, f, weight, bias = images(4, 19, 5, 5, dtype=dtype, device=device)
    small, seen = [t.to(dtype) for t in (*running(f, True), weight, bias)], []
    with Every():
        y, stats = batch_norm_residual(x, f, *small, relu=True)
        inner = batch_norm_inner(f, *small, True)
    assert seen == [torch.ops.fastres._batch_norm_residual.default] * 2
    wide = [t.to(accumulate(dtype)) for t in small]
    expected, of_wide = batch_norm_residual(x, f, *wide, relu=True)
    assert torch.equal(y, expected)
    assert torch.equal(stats.sums, of_wide.sums)
    assert torch.equal(inner, batch_norm_inner(f, *wide, True))


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_do_not_ask_for_the_dtype_of_the_statistics(device, dtype, affine):
    x, f, *of = (t.requires_grad_() for t in images(4, 3, 5, 5, dtype=dtype, device=device))
    statistics = [t.to(dtype) for t in running(f.detach(), True)]
    small, found = [*statistics, *(of if affine else (None, None))], []
    for to in (dtype, accumulate(dtype)):
        cast = [None if t is None else t.to(to) for t in small]
        y, _ = batch_norm_residual(x, f, *cast, relu=True)
        found.append((y, *torch.autograd.grad(y.sum(), (x, f))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["float32", "strided"])
def test_momentum_is_any_real_number(device, kind):
    x, f, _, _ = images(4, 3, 5, 5, device=device)
    found = []
    for momentum in (0.25, Fraction(1, 4)):
        buffers = [BUFFERS[kind](t) for t in running(f, True)]
        batch_norm_residual(x, f, *buffers, training=True, momentum=momentum)
        found.append(buffers)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_empty_batch_leaves_the_running_statistics_alone(device):
    f = torch.empty(0, 3, 4, 4, device=device)
    buffers = running(f, True)
    before, versions = [t.clone() for t in buffers], [t._version for t in buffers]
    y, stats = batch_norm_residual(f, f, *buffers, training=True)
    assert (y.shape, stats.sums.shape) == (f.shape, (3, 0))
    assert [t._version for t in buffers] == versions
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


@needs_library
def test_a_step_in_training_compiles_to_one_graph_that_moves_the_buffers(device):
    x, f, weight, bias = images(4, 3, 5, 5, device=device)

    def step(x, f, mean, var):
        return batch_norm_residual(x, f, mean, var, weight, bias, relu=True, training=True)[0]

    buffers, expected = (list(running(f, True)) for _ in range(2))
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, f, *buffers)
    torch.testing.assert_close(y, step(x, f, *expected))
    for got, want in zip(buffers, expected, strict=True):
        torch.testing.assert_close(got, want)
