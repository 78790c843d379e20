"""batch_norm_residual: the contract, and what batch normalisation says."""

import math

import numpy as np
import pytest
import torch
from contract import DTYPES, OpContract, Sample
from torch.nn import functional as F  # noqa: N812

from fastres.ops import Stats, native
from fastres.ops.batch_norm_residual import batch_norm_residual, reference
from fastres.ops.layout import accumulate, per_sample
from fastres.ops.stats import sums_of

needs_library = pytest.mark.skipif(
    native.raw("_batch_norm_residual") is None, reason="the compiled library is not built"
)
LAST = torch.channels_last


def images(*shape, dtype=torch.float32, device="cpu", seed=0, last=False):
    """x, f, weight, bias: a branch that goes along with x, so that <x, p> does not cancel."""
    generator = torch.Generator().manual_seed(seed)
    x, f = (torch.randn(shape, generator=generator) for _ in range(2))
    f = 1.5 * x + f + 0.5
    if last:
        x, f = x.contiguous(memory_format=LAST), f.contiguous(memory_format=LAST)
    weight, bias = (torch.rand(shape[1], generator=generator) for _ in range(2))
    return [t.to(device, dtype) for t in (x, f, weight + 0.5, bias)]


def running(f, statistics):
    """Running statistics of f's device and accumulate type, or none."""
    if not statistics:
        return None, None
    numbers = torch.arange(f.size(1), dtype=accumulate(f.dtype), device=f.device)
    return numbers / 10, 1 + numbers


def with_statistics(op, x, f, weight=None, bias=None, gate=None, relu=False, *, training=True):
    """Call an operator: in training without running statistics, else with some."""
    mean, var = running(f, not training)
    return op(x, f, mean, var, weight, bias, gate, relu, training=training)


def eager(x, f, weight=None, bias=None, gate=None, relu=False, *, training=True):
    """What one writes without the operator, in the dtype of x."""
    mean, var = (None if t is None else t.to(f.dtype) for t in running(f, not training))
    p = F.batch_norm(f, mean, var, weight, bias, training) if f.numel() else f * 1
    if gate is not None:
        p = p * per_sample(torch.as_tensor(gate, dtype=p.dtype, device=p.device), p)
    y, wide = x + p, accumulate(x.dtype)
    return (y.relu() if relu else y), Stats(sums_of(x.detach().to(wide), p.detach().to(wide)))


def samples():
    small, image, last = images(3, 2), images(3, 2, 2, 3), images(3, 2, 2, 3, last=True)
    gate = torch.tensor([0.5, -1.5, 2.0])
    yield Sample("features", tuple(small))
    yield Sample("image", tuple(image))
    yield Sample("image and relu", (*image, None, True))
    yield Sample("number", (*image, 0.7))
    yield Sample("one gate for all", (*image, torch.tensor(-0.3), True))
    yield Sample("gate and relu", (*image, gate, True))
    yield Sample("no weight, no bias", (*image[:2], None, None, gate, True))
    yield Sample("channels_last", (*last, None, True))
    yield Sample("channels_last and gate", (*last, gate, True))
    yield Sample("one channels_last", (image[0], last[1], *image[2:], None, True))
    yield Sample("slice of places", (*(t[..., 1:] for t in image[:2]), *image[2:], gate))
    yield Sample("sequence", (*images(2, 3, 4), None, True))
    yield Sample("one channel", tuple(images(4, 1, 3, 3)))
    yield Sample("odd planes", (*images(5, 3, 7, 7), None, True))
    yield Sample("odd channels_last", (*images(5, 33, 3, 3, last=True), None, True))
    yield Sample("several tasks", (*images(2, 5, 130, 131), gate[:2], True))
    yield Sample("several tasks of pixels", (*images(2, 20, 60, 61, last=True), gate[:2], True))
    yield Sample("many samples", (*images(300, 4, 6, 6), None, True))
    yield Sample("empty batch", tuple(t[:0] if t.dim() > 1 else t for t in image))
    for sample in [
        Sample("eval", (*image, gate, True)),
        Sample("eval, channels_last", (*last, None, True)),
        Sample("eval without weight", tuple(image[:2])),
        Sample("eval of one value", tuple(images(1, 3))),
    ]:
        yield Sample(sample.name, sample.args, {"training": False})


class TestBatchNormResidual(OpContract):
    @staticmethod
    def op(*args, **kwargs):
        return with_statistics(batch_norm_residual, *args, **kwargs)

    @staticmethod
    def reference(*args, **kwargs):
        return with_statistics(reference, *args, **kwargs)

    # Without the library the reference runs, which is such a composition itself.
    eager = None if native.raw("_batch_norm_residual") is None else staticmethod(eager)
    samples = staticmethod(samples)

    @staticmethod
    def exported():
        return Sample("relu", (*images(4, 3, 4, 4), None, True)), (0, 0, None, None, None, None)

    @staticmethod
    def raw_samples(device):
        ops = torch.ops.fastres
        for last in (False, True):
            x, f, weight, bias = images(3, 4, 3, 3, device=device, last=last)
            mean, var = running(f, True)
            gate = torch.rand(3, device=device)
            for statistics in ((None, None), (mean, var)):
                for relu in (False, True):
                    args = (x, f, weight, bias, *statistics, gate, 1e-5, relu, relu)
                    yield ops._batch_norm_residual.default, args
                    yield ops._batch_norm_residual.default, (None, *args[1:])
                    if statistics[0] is None:
                        moved = (*args, None, *(t.clone() for t in (mean, var)), 0.1)
                        count = torch.tensor(5, device=device)
                        yield ops._batch_norm_residual.default, moved
                        yield ops._batch_norm_residual.default, (*moved, count)
                *_, kept, mask = ops._batch_norm_residual(*args)
                for wanted in (False, True):
                    args = (x, mask, f, weight, bias, kept, gate, 1e-5)
                    yield (
                        ops._batch_norm_residual_backward.default,
                        (*args, statistics[0] is None, wanted, not wanted, wanted),
                    )


def test_dtypes_promote_as_in_add(device):
    x, f, _, _ = images(4, 3, device=device)
    for a in DTYPES:
        for b in DTYPES:
            y, stats = batch_norm_residual(x.to(a), f.to(b), training=True)
            assert y.dtype == (x.to(a) + f.to(b)).dtype
            assert stats.sums.dtype == accumulate(y.dtype)


@needs_library
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_images_are_read_and_written_without_a_copy(device, last):
    x, f, weight, bias = images(4, 16, 8, 8, device=device, last=last)
    leaves = [t.requires_grad_() for t in (x, f, weight, bias)]
    y, _ = batch_norm_residual(x, f, None, None, weight, bias, relu=True, training=True)
    assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    with torch.profiler.profile() as profile:
        y, _ = batch_norm_residual(x, f, None, None, weight, bias, relu=True, training=True)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert not {e.key for e in profile.key_averages()} & {"aten::copy_", "aten::contiguous"}


def test_a_cotangent_in_another_layout_is_taken(device):
    x, f, _, _ = (t.requires_grad_() for t in images(4, 3, 5, 6, device=device))
    y, _ = batch_norm_residual(x, f, relu=True, training=True)
    g = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, f), g, retain_graph=True)
    for other in (g.contiguous(memory_format=LAST), g.transpose(2, 3).contiguous().transpose(2, 3)):
        got = torch.autograd.grad(y, (x, f), other, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_library
def test_it_keeps_the_branch_and_one_bit_per_element(device):
    x, f, weight, bias = (t.requires_grad_() for t in images(4, 16, 8, 8, device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_norm_residual(x, f, None, None, weight, bias, relu=True, training=True)
    small = 5 * weight.nbytes  # weight, bias, mean, variance, what rounding took of the mean
    assert sum(t.nbytes for t in saved) == f.nbytes + f.numel() // 8 + small


def test_without_a_relu_the_skip_gets_the_cotangent_itself(device):
    x, f, _, _ = (t.requires_grad_() for t in images(4, 3, 5, 6, device=device))
    y, _ = batch_norm_residual(x, f, training=True)
    g = torch.randn_like(y)
    assert torch.autograd.grad(y, x, g)[0].data_ptr() == g.data_ptr()


def test_far_from_zero_the_gradient_of_a_gate_does_not_see_the_rounding_of_the_mean(device):
    x, f, weight, bias = images(8, 5, 6, 6, device=device)
    f, gate = 50 + 0.01 * f, torch.rand(8, device=device)

    def of_gate(op, *given):
        *given, gate = given
        gate = gate.clone().requires_grad_()
        y, _ = op(*given[:2], None, None, *given[2:], gate, training=True)
        g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).reshape(y.shape)
        return torch.autograd.grad(y, gate, g)[0].double()

    given = (x, f, weight, bias, gate)
    exact = of_gate(reference, *(t.double() for t in given))
    error = (of_gate(batch_norm_residual, *given) - exact).abs().max()
    assert error < 1e-6 * exact.abs().max()


def test_a_channel_that_is_not_finite_leaves_the_others_alone(device):
    x, f, weight, bias = images(4, 3, 5, 5, device=device)
    whole = batch_norm_residual(x, f, None, None, weight, bias, training=True)[0]
    for value in (math.nan, math.inf, -math.inf):
        for place in ((0, 1, 0, 0), (3, 1, 4, 4)):
            broken = f.clone()
            broken[place] = value
            y, _ = batch_norm_residual(x, broken, None, None, weight, bias, training=True)
            assert y[:, 1].isnan().all()
            assert torch.equal(y[:, ::2], whole[:, ::2])


def test_a_constant_channel_becomes_its_bias(device):
    for constant in (0.0, 3.7, 1e4):
        f = torch.full((4, 2, 33, 3), constant, device=device)
        y, _ = batch_norm_residual(torch.zeros_like(f), f, None, None, None,
                                   torch.ones(2, device=device), training=True)  # fmt: skip
        torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-6)


def test_the_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for last in (False, True):
            x, f, weight, bias = (t.requires_grad_() for t in images(9, 24, 63, 65, last=last))
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y, stats = batch_norm_residual(x, f, None, None, weight, bias, 0.3, True,
                                               training=True)  # fmt: skip
                runs.append((y, stats.sums, *torch.autograd.grad(y, (x, f, weight, bias), y)))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_library
def test_saved_tensors_that_come_back_changed_are_refused(device):
    x, f, _, _ = (t.requires_grad_() for t in images(4, 6, 3, 3, device=device))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t[:, :0] if t.dim() > 1 else t,
                                                  lambda t: t):  # fmt: skip
        y, _ = batch_norm_residual(x, f, relu=True, training=True)
    with pytest.raises(RuntimeError, match="must have the shape"):
        y.sum().backward()


@needs_library
def test_meta_tensors_give_shapes_and_layout():
    x, f, _, _ = images(2, 3, 4, 4, device="meta", last=True)
    y, stats = batch_norm_residual(x, f, relu=True, training=True)
    assert (y.shape, y.device.type, stats.sums.shape) == ((2, 3, 4, 4), "meta", (3, 2))
    assert y.is_contiguous(memory_format=LAST)


@needs_library
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_arrays_go_through_the_same_kernel(dtype):
    wide = "float64" if dtype == "float64" else "float32"
    x, f, weight, bias = (t.numpy() for t in images(3, 4, 5, 6))
    x, f, weight, bias = x.astype(dtype), f.astype(dtype), weight.astype(wide), bias.astype(wide)
    y, sums, mean, var = native.C.batch_norm_residual(x, f, weight, bias, relu=True)
    moved = [torch.from_numpy(a) for a in (x, f, weight, bias)]
    expected, stats = batch_norm_residual(*moved[:2], None, None, *moved[2:], relu=True,
                                          training=True)  # fmt: skip
    assert np.array_equal(y, expected.numpy())
    assert np.array_equal(sums, stats.sums.numpy())
    given = native.C.batch_norm_residual(x, f, weight, bias, mean, var, relu=True)
    assert np.allclose(given[0], y, rtol=1e-6, atol=1e-6)  # the mean is rounded there
