"""batch_norm_residual: the contract, and what batch normalisation says."""

import math

import numpy as np
import pytest
import torch
from contract import DTYPES, OpContract, Sample, largest_error
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops import Stats, native
from fastres.ops.batch_norm_residual import batch_norm_residual, reference
from fastres.ops.batch_norm_residual_inner import batch_norm_inner
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
                        yield ops._batch_norm_residual.default, moved
                *_, lost, mask = ops._batch_norm_residual(*args)
                lost = lost if statistics[0] is None else None
                for wanted in (False, True):
                    args = (x, mask, f, weight, bias, mean, var, lost, gate, 1e-5)
                    yield (
                        ops._batch_norm_residual_backward.default,
                        (*args, statistics[0] is None, wanted, not wanted, wanted),
                    )


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


def test_an_empty_batch_leaves_the_running_statistics_alone(device):
    f = torch.empty(0, 3, 4, 4, device=device)
    buffers = running(f, True)
    before = [t.clone() for t in buffers]
    y, stats = batch_norm_residual(f, f, *buffers, training=True)
    assert (y.shape, stats.sums.shape) == (f.shape, (3, 0))
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


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
def test_a_step_in_training_compiles_to_one_graph_that_moves_the_buffers(device):
    x, f, weight, bias = images(4, 3, 5, 5, device=device)

    def step(x, f, mean, var):
        return batch_norm_residual(x, f, mean, var, weight, bias, relu=True, training=True)[0]

    buffers, expected = (list(running(f, True)) for _ in range(2))
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, f, *buffers)
    torch.testing.assert_close(y, step(x, f, *expected))
    for got, want in zip(buffers, expected, strict=True):
        torch.testing.assert_close(got, want)


def bad_calls():
    x, f, weight, _ = images(2, 3, 2, 2)
    mean, var = running(f, True)
    train, infer = {"training": True}, {}
    yield (x, f[:, :2]), train, ValueError, "f must have shape [2, 3, 2, 2], got [2, 2, 2, 2]"
    yield (x[0, 0, 0], f[0, 0, 0]), train, ValueError, "x must have 2 or more dimensions, got 1"
    yield (x.int(), f), train, TypeError, "x must be float64, float32, "
    yield (x, [1.0]), train, TypeError, "f must be a tensor, got list"
    yield (x, f, mean), train, ValueError, "running_var must be given with the other, got None"
    yield (x, f, None, var), train, ValueError, "running_mean must be given with the other, got"
    yield (x, f), infer, ValueError, "running_mean must be given outside of training, got None"
    yield (x, f, mean[:2], var), train, ValueError, "running_mean must have shape [3], got [2]"
    yield (x, f, mean, var.long()), infer, TypeError, "running_var must be float64, float32, "
    yield (x, f, None, None, weight[None]), train, ValueError, "weight must have shape [3], got [1"
    yield (x, f, None, None, None, 1.0), train, TypeError, "bias must be a tensor, got float"
    yield (x, f, *[None] * 4, x[0, 0, 0]), train, None, ""
    yield (x, f, *[None] * 4, weight), train, ValueError, "gate must have shape [] or [2], got [3]"
    yield (x, f, *[None] * 4, "half"), train, TypeError, "gate must be a number or tensor, got str"
    yield (x, f, *[None] * 5, 1), train, TypeError, "relu must be a bool, got int"
    yield (x, f), {"training": 1}, TypeError, "training must be a bool, got int"
    yield (x, f), {**train, "eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"
    yield (x, f), {**train, "momentum": "no"}, TypeError, "momentum must be a number or None, got"
    yield (x, f, mean, var), {**train, "momentum": None}, ValueError, "num_batches_tracked must be"
    one = (x[:1, :, :1, :1], f[:1, :, :1, :1])
    yield one, train, ValueError, "x must have more than one value per channel in training, got [1,"


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), list(bad_calls()))
def test_bad_input_names_the_argument_the_rule_and_the_value(args, kwargs, error, message):
    if error is None:
        batch_norm_residual(*args, **kwargs)
        return
    for device in ("cpu", "meta"):
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(error) as raised:
            batch_norm_residual(*moved, **kwargs)
        assert str(raised.value).startswith(f"batch_norm_residual: {message}")


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(3, dtype=torch.int), 1.0], ids=str)
def test_a_call_that_is_refused_moves_and_counts_nothing(device, weight):
    x, f, _, _ = images(2, 3, 2, 2, device=device)
    buffers = [*running(f, True), torch.tensor(7, device=device)]
    kept = [t.clone() for t in buffers]
    weight = weight.to(device) if isinstance(weight, torch.Tensor) else weight
    with pytest.raises((TypeError, ValueError), match="weight must"):
        batch_norm_residual(x, f.requires_grad_(), *buffers[:2], weight, training=True,
                            num_batches_tracked=buffers[2])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(buffers, kept, strict=True))


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
