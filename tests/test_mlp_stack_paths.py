"""mlp_stack_paths: every path of every length, against enumeration, closed forms and autograd."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres
from fastres.nn import ResidualMLP
from fastres.ops import native
from fastres.ops.mlp_stack_blocks import ACTIVATIONS
from fastres.ops.mlp_stack_paths import lengths, reference

needs_library = pytest.mark.skipif(
    native.raw("_mlp_stack_paths") is None, reason="the compiled library is not built"
)
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(batch, width, hidden, blocks, *, dtype=torch.float64, device="cpu", branch=0.3, seed=0):
    """x, w1, b1, w2, b2, grad; a branch is about `branch` times its stream."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    return (
        normal(batch, width),
        normal(blocks, hidden, width, scale=1 / math.sqrt(width)),
        normal(blocks, hidden, scale=0.3),
        normal(blocks, width, hidden, scale=branch / math.sqrt(hidden)),
        normal(blocks, width, scale=0.1),
        normal(batch, width),
    )


def close(got, wanted, tolerance):
    scale = wanted.double().abs().max().clamp_min(1e-300)
    torch.testing.assert_close(
        got.double() / scale, wanted.double() / scale, rtol=0, atol=tolerance, equal_nan=True
    )


def jacobians(x, w1, b1, w2, b2):
    """Of each branch and sample, [L, B, D, D], by autograd."""
    found = []
    for weights in zip(w1, b1, w2, b2, strict=True):
        u1, c1, u2, c2 = weights

        def branch(v, u1=u1, c1=c1, u2=u2, c2=c2):
            return torch.relu(v @ u1.T + c1) @ u2.T + c2

        found.append(torch.func.vmap(torch.func.jacrev(branch))(x))
        x = x + branch(x)
    return torch.stack(found)


@pytest.mark.parametrize("longest", [None, 0, 3, 9])
def test_it_is_the_sum_over_all_1024_paths_of_ten_blocks(longest):
    x, *weights, grad = draw(3, 5, 4, 10)
    jacobian = jacobians(x, *weights)
    sums = torch.zeros(11, 3, 5, dtype=torch.float64)
    for path in itertools.product((False, True), repeat=10):
        g = grad
        for block in reversed(range(10)):
            if path[block]:
                g = torch.einsum("bo,boi->bi", g, jacobian[block])
        sums[sum(path)] += g
    paths = fastres.mlp_stack_paths(x, *weights, grad, longest, keep=True)
    kept = 11 if longest is None else longest + 1
    close(paths.gradients, sums[:kept], 1e-13)
    close(paths.norms, sums[:kept].flatten(1).norm(dim=1), 1e-13)
    close(paths.tail, sums[kept:].sum(0), 1e-13)
    close(paths.gradient, sums.sum(0), 1e-13)
    assert paths.paths == tuple(math.comb(10, k) for k in range(kept))


@pytest.mark.parametrize(("blocks", "c"), [(12, 0.5), (300, 1e-4), (300, 0.7), (40, 1e4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_branches_of_c_times_the_identity_give_binomials(blocks, c, dtype):
    eye = torch.eye(6, dtype=dtype)
    w1, w2 = eye.repeat(blocks, 1, 1), (c * eye).repeat(blocks, 1, 1)
    b, grad = torch.zeros(blocks, 6, dtype=dtype), torch.ones(2, 6, dtype=dtype)
    found = lengths(grad * 1e-30, w1, b, w2, b, grad, activation="identity")
    stored = math.log2(w2[0, 0, 0].item())
    want = [math.log2(math.comb(blocks, k)) + k * stored for k in range(blocks + 1)]
    want = torch.tensor(want, dtype=torch.float64) + 0.5 * math.log2(6)
    assert (found.log2_norms - want[:, None]).abs().max() < 30 * blocks * torch.finfo(dtype).eps


@pytest.mark.parametrize("steps", [(1e-25, 1e25), (1e-18, 1e18), (1e-18, 1e-18), (1e-9, 1e27)])
@pytest.mark.parametrize("longest", [None, 7, 39])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_shrink_and_blow_up_keep_every_length(device, dtype, longest, steps):
    to = {"device": device, "dtype": dtype}
    eye, c = torch.eye(6, **to), torch.tensor(steps, **to).repeat(20)
    b, grad = torch.zeros(40, 6, **to), torch.ones(2, 6, **to)
    args = (grad, eye.repeat(40, 1, 1), b, c[:, None, None] * eye, b, grad)
    found = lengths(*args, longest, activation="identity")
    want = reference(*(a.double() for a in args), longest, activation="identity")
    assert (found.log2_norms - want.log2_norms).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, v) for v in (1e-40, 1e-37, 1e38, 3e38)]
    + [(torch.float64, v) for v in (1e-310, 1e-307, 1e308)],
)
def test_a_cotangent_at_the_ends_of_the_range_is_one_like_others(device, dtype, size):
    x, *weights, grad = draw(3, 6, 5, 4, dtype=dtype, device=device)
    grad = (size * grad / grad.abs().max()).to(dtype)
    found = lengths(x, *weights, grad)
    power = math.frexp(size)[1]
    near = grad * 2.0 ** -(power // 2) * 2.0 ** (power // 2 - power)
    want = lengths(x, *weights, near)
    close(found.log2_norms - power, want.log2_norms, 20 * EXACT[dtype])


def test_an_infinite_cotangent_stays_one(device):
    x, *weights, grad = draw(3, 6, 5, 4, dtype=torch.float32, device=device)
    grad[1, 2] = torch.inf
    found = lengths(x, *weights, grad, keep=True)
    assert torch.equal(found.rows[0], grad)
    assert found.log2_norms[0, 1] == torch.inf
    assert found.log2_norms[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize(("blocks", "c"), [(80, -0.99), (300, -0.999)])
def test_the_error_of_lengths_that_cancel_is_finite(device, blocks, c):
    eye, b = torch.eye(4, device=device).repeat(blocks, 1, 1), torch.zeros(blocks, 4, device=device)
    grad = torch.ones(2, 4, device=device)
    found = lengths(grad, eye, b, c * eye, b, grad, activation="identity")
    largest = found.log2_norms.max()
    assert found.norms[0].isfinite().all()
    assert (found.norms[0].log2() < largest - 15).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_size_and_option_equals_the_reference(device, dtype, activation):
    shapes = [(3, 1, 1, 3), (2, 5, 3, 15), (17, 33, 7, 14), (33, 16, 48, 16), (5, 64, 64, 6)]
    for i, (batch, width, hidden, blocks) in enumerate(shapes):
        args = draw(batch, width, hidden, blocks, dtype=dtype, device=device, seed=i)
        gates = torch.linspace(-1, 2, blocks * batch, dtype=dtype, device=device)
        gate = [None, gates[:blocks], gates.view(blocks, batch), 0.5, gates.view(batch, blocks).t()]
        for longest in (None, 0, blocks // 2):
            rest = (longest, gate[i], activation)
            got, want = lengths(*args, *rest, keep=True), reference(*args, *rest, keep=True)
            for a, b in zip(got, want, strict=True):
                if a is not got.norms and a is not got.log2_norms:
                    close(a, b, 20 * EXACT[dtype])
            close(got.log2_norms.exp2(), want.log2_norms.exp2(), 20 * EXACT[dtype])


@pytest.mark.parametrize(("precision", "limit"), [("tf32x3", 1e-5), ("tf32", 2e-2)])
def test_products_of_rounded_factors_say_so_and_are_as_exact_as_these(device, precision, limit):
    args = draw(5, 40, 70, 60, dtype=torch.float32, device=device, branch=0.1)
    found = fastres.mlp_stack_paths(*args, 20, keep=True, input_precision=precision)
    assert found.input_precision == (precision if device.type == "cuda" else "ieee")
    assert ("not exact" in repr(found)) == (found.input_precision == "tf32")
    want = reference(*(t.double() for t in args), 20, keep=True)
    assert found.sum_error < limit
    close(found.gradients, want.rows[:-1], limit)
    close(found.tail, want.tail, limit)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_300_blocks_add_up_to_what_autograd_gives(device, dtype, limit):
    x, *weights, grad = draw(5, 24, 24, 300, dtype=dtype, device=device, branch=0.1)
    x.requires_grad_()
    y, _ = fastres.mlp_stack(x, *weights)
    (gradient,) = torch.autograd.grad(y, x, grad)
    for longest in (None, 20):
        paths = fastres.mlp_stack_paths(x, *weights, grad, longest)
        assert paths.sum_error < limit
        close(paths.gradient, gradient, limit)
        assert paths.shares.sum() + paths.tail_share == pytest.approx(1, abs=limit)


def test_it_is_what_the_generic_engine_measures():
    torch.manual_seed(0)
    model = ResidualMLP(in_features=7, classes=3, width=12, blocks=9, activation="gelu").double()
    stream = model.input(torch.randn(4, 7, dtype=torch.float64)).detach()
    stack = model.stack
    generic = fastres.path_gradients(stack, stream, lambda y: (y**3).sum(), max_length=5)
    grad = 3 * stack(stream).detach() ** 2
    fused = fastres.mlp_stack_paths(
        *(stream, stack.w1, stack.b1, stack.w2, stack.b2, grad, 5), activation="gelu"
    )
    close(fused.norms_per_sample, generic.norms_per_sample, 1e-12)
    close(fused.shares_per_sample, generic.shares_per_sample, 1e-12)
    close(fused.tail, generic.tail, 1e-12)
    assert fused.paths == generic.paths


def test_a_shorter_limit_changes_no_length():
    args = draw(3, 10, 21, 30, dtype=torch.float32)
    whole, some = lengths(*args, keep=True), lengths(*args, 4, keep=True)
    assert torch.equal(some.rows[:5], whole.rows[:5])
    assert torch.equal(some.gradient, whole.gradient)
    close(some.tail, whole.rows[5:].sum(0), 1e-6)


@pytest.mark.parametrize("hidden", [1, 16, 21, 70])
def test_no_path_goes_through_a_block_whose_units_are_all_closed(hidden):
    x, w1, b1, w2, b2, grad = draw(20, 9, hidden, 16)
    b1[1:3] = -1000
    found = lengths(x, w1, b1, w2, b2, grad, keep=True)
    assert torch.equal(found.rows[0], grad)
    assert not found.rows[15:].any()
    close(found.norms[1], (found.rows.sum(0)).norm(dim=-1), 1e-13)


@pytest.mark.parametrize("hidden", [1, 16, 21, 70])
def test_a_sample_goes_through_the_units_that_it_opens_alone(hidden):
    x, w1, b1, w2, b2, grad = draw(20, 9, hidden, 16, branch=1.0)
    closed = torch.arange(hidden) % 3 == 1  # for all samples: these weights might as well not be
    b1[:, closed] = -1000
    fewer = (w1[:, ~closed], b1[:, ~closed], w2[..., ~closed], b2)
    found, want = lengths(x, w1, b1, w2, b2, grad, keep=True), lengths(x, *fewer, grad, keep=True)
    assert torch.equal(found.rows, want.rows)


def test_shared_weights_are_those_of_every_block():
    x, w1, b1, w2, b2, grad = draw(3, 6, 5, 1)
    shared = lengths(x, w1, b1, w2, b2, grad, blocks=7)
    repeated = lengths(x, *(w.repeat_interleave(7, 0) for w in (w1, b1, w2, b2)), grad)
    assert torch.equal(shared.log2_norms, repeated.log2_norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    args = draw(3, 6, 5, 4, dtype=dtype)
    got, want = lengths(*args, keep=True), lengths(*(a.float() for a in args), keep=True)
    assert torch.equal(got.rows, want.rows)
    assert got.rows.dtype == torch.float32


def test_a_sample_of_nan_leaves_the_others_alone():
    x, *rest = draw(20, 6, 5, 4, dtype=torch.float32)
    x[7, 2] = torch.nan
    found = lengths(x, *rest, activation="gelu")
    clean = lengths(x.nan_to_num(0.5), *rest, activation="gelu")
    others = torch.arange(20) != 7
    assert found.log2_norms[1:, 7].isnan().all()
    assert torch.equal(found.log2_norms[:, others], clean.log2_norms[:, others])


@needs_library
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 19, 40])
def test_bits_do_not_depend_on_threads_or_on_the_other_samples(batch):
    args = draw(batch, 16, 16, 30, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(lengths(*args, 14, keep=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = lengths(args[0][-1:], *args[1:5], args[5][-1:], 14, keep=True)
    assert torch.equal(alone.rows[:, 0], found[0].rows[:, -1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_length": -1}, ValueError, "max_length must be 0 to 4, the blocks, got -1"),
        ({"max_length": 5}, ValueError, "max_length must be 0 to 4, the blocks, got 5"),
        ({"max_length": 1.0}, TypeError, "max_length must be an integer, got 1.0"),
        ({"grad": torch.ones(3, 5)}, ValueError, r"grad must have shape \[3, 6\], got \[3, 5\]"),
        ({"grad": torch.ones(3, 6).half()}, TypeError, "grad must be torch.float32 on cpu as x"),
        ({"grad": None}, TypeError, "grad must be a tensor, got NoneType"),
        (
            {"w2": torch.ones(4, 6, 4)},
            ValueError,
            r"w2 must have shape \[4, 6, 5\], got \[4, 6, 4\]",
        ),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"keep": 1}, TypeError, "keep must be a bool, got int"),
        (
            {"input_precision": "TF32"},
            ValueError,
            "input_precision must be one of ieee, tf32x3, tf32, got 'TF32'",
        ),
        ({"gate": torch.ones(3)}, ValueError, r"gate must have shape \[\], \[4\] or \[4, 3\]"),
    ],
)
def test_bad_input_is_named(change, error, message):
    names = ("x", "w1", "b1", "w2", "b2", "grad")
    given = dict(zip(names, draw(3, 6, 5, 4, dtype=torch.float32), strict=True))
    with pytest.raises(error, match=f"mlp_stack_paths: {message}"):
        fastres.mlp_stack_paths(**{**given, **change})


def test_no_blocks_is_one_path():
    x, *weights, grad = draw(3, 6, 5, 0)
    paths = fastres.mlp_stack_paths(x, *weights, grad)
    assert paths.paths == (1,)
    assert torch.equal(paths.gradient, grad)


def test_an_empty_batch_has_no_gradient():
    found = lengths(*draw(0, 6, 5, 4), keep=True)
    assert found.log2_norms.shape == (5, 0)
    assert found.rows.shape == (5, 0, 6)


def test_lengths_that_cancel_are_reported():
    x, _, b1, _, b2, grad = draw(2, 8, 8, 60, dtype=torch.float32)
    eye = torch.eye(8).repeat(60, 1, 1)
    with pytest.warns(UserWarning, match="cancel, their norms add up to .*: take float64"):
        fastres.mlp_stack_paths(x, eye, 0 * b1, -0.99 * eye, b2, grad, activation="identity")


MEASURE = """
import re, torch
from fastres.ops.mlp_stack_paths import lengths
blocks, batch, width, longest = 300, 256, 64, {longest}
x, grad = torch.randn(2, batch, width)
w = torch.randn(blocks, width, width) / 30
b = torch.zeros(blocks, width)
lengths(x[:8], w, b, w, b, grad[:8], longest)
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
open("/proc/self/clear_refs", "w").write("5")
before = peak()
lengths(x, w, b, w, b, grad, longest)
print((peak() - before) / ((longest + 2) * batch * width * 4 + blocks * batch * width / 8))
"""


@needs_library
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
@pytest.mark.parametrize("longest", [32, 300])
def test_memory_is_at_most_that_of_the_rows_and_the_masks(longest):
    command = [sys.executable, "-c", MEASURE.format(longest=longest)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.1
