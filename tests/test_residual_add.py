"""residual_add: the contract, and what the formula says."""

import itertools
import math
import os

import numpy as np
import pytest
import torch
from contract import DTYPES, OpContract, Sample

import fastres
from fastres.ops import native
from fastres.ops.residual_add import reference, residual_add

SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 2047, 2048, 2049, 32767, 32769, 70001)


needs_library = pytest.mark.skipif(native.C is None, reason="the compiled library is not built")


def pair(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]


def samples():
    small, image, tall = pair(3, 5), pair(4, 6, 3, 2), pair(2, 5, 4)
    last = [t.contiguous(memory_format=torch.channels_last) for t in image]
    swapped = [t.transpose(1, 2) for t in tall]
    gate = torch.tensor([0.5, -1.5, 2.0])
    yield Sample("plain", tuple(small))
    yield Sample("number", (*small, 0.7))
    yield Sample("per sample", (*small, gate))
    yield Sample("gates that lie apart", (*small, torch.stack([gate, gate], 1)[:, 1], True))
    yield Sample("one gate for all", (*small, torch.tensor(-0.3)))
    yield Sample("relu", (*small, None, True))
    yield Sample("relu and gate", (*small, gate, True))
    yield Sample("stats", tuple(small), {"differentiable_stats": True})
    yield Sample("all", (*small, gate, True), {"differentiable_stats": True})
    yield Sample("image", (*image, None, True), {"differentiable_stats": True})
    yield Sample("channels_last", (*last, None, True), {"differentiable_stats": True})
    yield Sample("channels_last and gate", (*last, gate.repeat(2)[:4], True))
    yield Sample("one channels_last", (image[0], last[1], None, True))
    yield Sample("swapped dimensions", (*swapped, None, True))
    yield Sample("strided samples", tuple(t[::2] for t in image))
    yield Sample("slice of features", tuple(t[:, 1:4] for t in small))
    yield Sample("one value for all", (small[0], small[1][:, :1].expand(3, 5), None, True))
    yield Sample("empty batch", tuple(t[:0] for t in image))
    yield Sample("no features", tuple(t[:, :0] for t in small))
    yield Sample("one feature", tuple(t[:, :1] for t in small))
    yield Sample("long rows", (*pair(2, 70001), gate[:2], True))
    yield Sample("many rows", (*pair(300, 65), None, True))


class TestResidualAdd(OpContract):
    op = staticmethod(residual_add)
    reference = staticmethod(reference)
    samples = staticmethod(samples)

    @staticmethod
    def exported():
        return Sample("relu", (*pair(4, 6), None, True)), (0, 0, None, None)

    @staticmethod
    def raw_samples(device):
        ops = torch.ops.fastres
        image = [t.to(device) for t in pair(2, 3, 4, 5)]
        last = [t.contiguous(memory_format=torch.channels_last) for t in image]
        gate = torch.rand(2, device=device)
        for (x, f), g in itertools.product((image, last), (None, gate)):
            for relu in (False, True):
                yield ops._residual_add.default, (x, f, g, relu)
            yield ops._residual_add_masked.default, (x, f, g)
            mask = ops._residual_add_masked(x, f, g)[2]
            for gs in (None, torch.rand(3, 2, device=device)):
                args = (torch.randn_like(x), mask, g, x, f, gs, g is not None)
                yield ops._residual_add_backward.default, args
            yield ops._residual_add_.default, (x, f, torch.empty_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_within_1e_6_of_float64_at_every_size(device, dtype):
    for n in SIZES:
        x, f = pair(3, n, dtype=dtype, device=device, seed=n)
        _, (skip_sq, branch_sq, dot) = residual_add(x, f)
        x, f = x.double(), f.double()
        scale = (x.square().sum(1) * f.square().sum(1)).sqrt()
        torch.testing.assert_close(skip_sq.double(), x.square().sum(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(branch_sq.double(), f.square().sum(1), rtol=1e-6, atol=0)
        assert ((dot.double() - (x * f).sum(1)).abs() <= 1e-6 * scale).all()


def test_without_a_gate_y_is_the_eager_sum_bit_for_bit(device):
    for n, dtype in itertools.product(SIZES, DTYPES):
        x, f = pair(2, n, dtype=dtype, device=device)
        assert torch.equal(residual_add(x, f)[0], x + f)
        assert torch.equal(residual_add(x, f, relu=True)[0], (x + f).relu())


def test_float16_squares_do_not_overflow(device):
    x = torch.full((1, 1000), 60000.0, dtype=torch.float16, device=device)
    stats = residual_add(x, -x)[1]
    torch.testing.assert_close(stats.skip_sq.item(), 1000 * 59999.0**2, rtol=1e-3, atol=0)
    assert stats.sums.dtype == torch.float32


def test_nan_and_infinity_propagate_as_in_eager(device):
    x = torch.tensor([[1.0, math.nan, math.inf, -math.inf, -2.0]], device=device).expand(3, 5)
    f = torch.ones(3, 5, device=device)
    y, stats = residual_add(x, f, relu=True)
    torch.testing.assert_close(y, (x + f).relu(), equal_nan=True)
    assert stats.skip_sq.isnan().all()
    assert stats.branch_sq.eq(5).all()


def test_a_zero_gate_removes_the_branch_even_where_it_is_large(device):
    x, f = pair(2, 64, device=device)
    y, stats = residual_add(x, f * 1e30, 0.0)
    assert torch.equal(y, x)
    assert stats.branch_sq.eq(0).all()


def test_dtypes_promote_as_in_add(device):
    x, f = pair(2, 9, device=device)
    for a, b in itertools.product(DTYPES, DTYPES):
        y, stats = residual_add(x.to(a), f.to(b))
        assert y.dtype == (x.to(a) + f.to(b)).dtype
        assert torch.equal(y, x.to(a) + f.to(b))
        assert stats.sums.dtype == (torch.float64 if y.dtype == torch.float64 else torch.float32)


def test_gradients_keep_the_dtypes_of_mixed_inputs(device):
    x, f = pair(2, 9, device=device)
    x, f = x.requires_grad_(), f.bfloat16().requires_grad_()
    residual_add(x, f, relu=True)[0].sum().backward()
    assert (x.grad.dtype, f.grad.dtype) == (torch.float32, torch.bfloat16)


def test_plain_backward_passes_the_cotangent_itself(device):
    x, f = (t.requires_grad_() for t in pair(4, 8, device=device))
    y, _ = residual_add(x, f)
    g = torch.randn_like(y)
    gx, gf = torch.autograd.grad(y, (x, f), g)
    assert gx.data_ptr() == g.data_ptr() == gf.data_ptr()


@needs_library
def test_the_relu_keeps_one_bit_per_element(device):
    x, f = (t.requires_grad_() for t in pair(4, 64, device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        residual_add(x, f, relu=True)
    assert sum(t.nbytes for t in saved) == 4 * 64 // 8


def test_an_infinite_cotangent_does_not_pass_a_closed_relu(device):
    x = torch.tensor([[-1.0, 2.0]], device=device, requires_grad=True)
    f = torch.zeros_like(x)
    g = torch.tensor([[math.inf, 1.0]], device=device)
    for twice in (False, True):
        y, _ = residual_add(x, f, relu=True)
        (gx,) = torch.autograd.grad(y, x, g, create_graph=twice)
        assert gx.tolist() == [[0.0, 1.0]]
    _, tangent = torch.func.jvp(lambda x: residual_add(x, f, relu=True)[0], (x.detach(),), (g,))
    assert tangent.tolist() == [[0.0, 1.0]]


def test_float16_derivatives_are_summed_in_float32(device):
    x, f = (torch.full((1, 4), 300.0, dtype=torch.float16, device=device) for _ in range(2))
    gate = torch.ones(1, device=device, requires_grad=True)
    for twice in (False, True):
        y, _ = residual_add(x, f, gate)
        (ggate,) = torch.autograd.grad(y, gate, torch.full_like(y, 300.0), create_graph=twice)
        assert ggate.tolist() == [360000.0]
    _, tangent = torch.func.jvp(
        lambda x: residual_add(x, f, differentiable_stats=True)[1].sums, (x,), (x,)
    )
    assert tangent.dtype == torch.float32
    assert tangent[0].tolist() == [720000.0]


@needs_library
def test_saved_tensors_that_come_back_changed_are_refused(device):
    x, f = (t.requires_grad_() for t in pair(4, 6, device=device))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t[:, :0], lambda t: t):
        y, _ = residual_add(x, f, relu=True)
    with pytest.raises(RuntimeError, match="mask must have the shape"):
        y.sum().backward()


def test_vmap_over_nothing_gives_nothing(device):
    x = torch.randn(0, 2, 3, device=device)
    assert torch.func.vmap(lambda a: residual_add(a, a)[0])(x).shape == (0, 2, 3)


def test_stats_carry_no_gradient_unless_asked(device):
    x, f = (t.requires_grad_() for t in pair(4, 8, device=device))
    assert not residual_add(x, f)[1].sums.requires_grad
    assert residual_add(x, f, differentiable_stats=True)[1].sums.requires_grad


@needs_library
def test_channels_last_is_kept_without_a_copy(device):
    x, f = (t.to(device).contiguous(memory_format=torch.channels_last) for t in pair(2, 8, 16, 16))
    y, _ = residual_add(x, f, relu=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if device.type == "cpu":
        with torch.profiler.profile() as profile:
            residual_add(x, f)
        assert not {e.key for e in profile.key_averages()} & {"aten::copy_", "aten::contiguous"}


def test_the_result_does_not_depend_on_the_number_of_threads():
    x, f = pair(3, 200_003)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, stats = residual_add(x, f, 0.3, relu=True)
            runs.append((y, stats.sums))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@needs_library
def test_in_place_equals_out_of_place(device):
    into = torch.ops.fastres._residual_add_
    for n in (5, 64, 40000):
        x, f = pair(3, n, device=device)
        y, stats = residual_add(x, f)
        for target in (x.clone(), f.clone()):
            first = target if torch.equal(target, x) else x
            second = target if first is x else f
            assert torch.equal(into(first, second, target), stats.sums)
            assert torch.equal(target, y)


def test_a_cuda_graph_replays_the_same_bits(cuda):
    x, f = pair(64, 1000, device=cuda)
    expected = residual_add(x, f, relu=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, stats = residual_add(x, f, relu=True)
    y.zero_(), stats.sums.zero_()
    graph.replay()
    assert torch.equal(y, expected[0])
    assert torch.equal(stats.sums, expected[1].sums)


def test_the_kernel_runs_on_the_current_stream(cuda):
    x, f = pair(4096, 4096, device=cuda)
    expected = residual_add(2 * x, f)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(50):
            torch.cuda._sleep(100_000)
            doubled = 2 * x  # on another stream the add would read it too early
            assert torch.equal(residual_add(doubled, f)[0], expected)


@pytest.mark.skipif(not os.environ.get("FASTRES_LARGE"), reason="needs 14 GB: FASTRES_LARGE=1")
def test_more_than_2_to_the_31_elements(device):
    cols = 2**30 + 9
    x = torch.full((2, cols), 0.5, dtype=torch.bfloat16, device=device)
    x[1, -5:] = 3.0
    y, stats = residual_add(x, x, relu=True)
    assert stats.skip_sq.tolist() == pytest.approx([cols * 0.25, (cols - 5) * 0.25 + 45], rel=1e-6)
    assert y[0, -1].item() == 1.0
    assert (y[1, -5:] == 6.0).all()
    assert (y[1, -100:-5] == 1.0).all()


def test_meta_tensors_give_shapes_and_layout():
    x, f = (t.to("meta") for t in pair(2, 3, 4, 4))
    y, stats = residual_add(x, f, relu=True)
    assert (y.shape, y.device.type, stats.sums.shape) == ((2, 3, 4, 4), "meta", (3, 2))


def test_stats_unpack_and_print():
    stats = residual_add(torch.ones(2, 4), torch.ones(2, 4))[1]
    skip_sq, branch_sq, dot = stats
    assert skip_sq.tolist() == branch_sq.tolist() == dot.tolist() == [4.0, 4.0]
    assert "skip_sq=tensor" in repr(stats)
    assert isinstance(stats, fastres.Stats)


@needs_library
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_arrays_go_through_the_same_kernel(dtype):
    x, f = (t.numpy().astype(dtype) for t in pair(3, 1000))
    gate = np.array([0.5, 2.0, -1.0], dtype="float64" if dtype == "float64" else "float32")
    y, sums = native.C.residual_add(x, f, gate, relu=True)
    expected, stats = residual_add(*map(torch.from_numpy, (x, f, gate)), relu=True)
    assert np.array_equal(y, expected.numpy())
    assert np.array_equal(sums, stats.sums.numpy())


def test_numbers_of_numpy_are_gates():
    x, f = pair(2, 3)
    assert torch.equal(residual_add(x, f, np.float32(0.5))[0], residual_add(x, f, 0.5)[0])
