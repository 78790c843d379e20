"""Operators on random calls: 100 of each here, 2,000 with --hypothesis-profile=nightly."""

from __future__ import annotations

import pytest
import torch
from contract import differentiable, largest_error, leaves
from drawing import DTYPES, KINDS, LAYOUTS, gates, laid_out, nearby, normal, of_kind, sizes
from hypothesis import given
from hypothesis import strategies as st
from test_batch_norm_residual import eager as batch_norm_eager
from test_batch_norm_residual import with_statistics
from test_conv_stack import eager as conv_eager
from test_conv_stack import stack as conv_blocks
from test_mlp_stack import eager as stack_eager
from test_mlp_stack import stack
from test_mlp_stack_paths import draw as stack_and_gradient
from test_path_accumulate import normal as normal_rows
from torch.utils._pytree import tree_map

from fastres.ops import (
    batch_norm_residual,
    conv_stack,
    mlp_stack,
    native,
    path_accumulate,
    residual_add,
)
from fastres.ops.batch_norm_residual import reference as batch_norm_reference
from fastres.ops.conv_stack import reference as conv_reference
from fastres.ops.layout import accumulate, per_sample
from fastres.ops.mlp_stack import reference as stack_reference
from fastres.ops.mlp_stack_blocks import ACTIVATIONS
from fastres.ops.mlp_stack_paths import lengths
from fastres.ops.mlp_stack_paths import reference as lengths_reference
from fastres.ops.path_accumulate import reference as rows_reference

SEEDS = st.integers(0, 1 << 16)
ISA = native.C.build_info()["isa_in_use"] if native.C else ""


def check_sum(got, exact, size, limits, least):
    """Hold sums of `size` terms against float64: relative, but for what under- or overflows."""
    known = exact.abs() < 0.99 * limits.max
    close = (got.double() - exact).abs() <= least * exact.abs() + size * limits.smallest_normal
    assert (close | ~known).all()
    assert torch.equal(got.isnan(), exact.isnan())
    assert (got.isinf() | ~(exact.abs() > 1.01 * limits.max)).all()


@given(st.data())
def test_residual_add_rounds_once_and_its_sums_are_right_to_1e_6(device, data):
    dtype, relu = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    shape = [data.draw(sizes(40, 0)), data.draw(sizes(1100, 0))]
    if data.draw(st.booleans()):
        shape = [data.draw(sizes(n)) for n in (5, 9, 9, 9)]
    x, f = (
        laid_out(
            of_kind(data.draw(st.sampled_from(KINDS)), shape, data.draw(SEEDS), dtype).to(
                device, dtype
            ),
            data.draw(st.sampled_from(LAYOUTS)),
        )
        for _ in "xf"
    )
    gate = gates(data.draw, shape[0])
    gate = gate.float().to(device) if isinstance(gate, torch.Tensor) else gate
    wide, unit = accumulate(dtype), torch.finfo(dtype).eps / 2
    limits, unit_wide = torch.finfo(wide), torch.finfo(wide).eps / 2

    inputs = [t.detach().requires_grad_() for t in (x, f)]
    y, stats = residual_add(*inputs, gate, relu)
    skip, branch = x.double(), f.double()
    number = 1.0 if gate is None else torch.as_tensor(gate, dtype=wide, device=device).double()
    scale = per_sample(torch.as_tensor(number, device=device).expand(shape[0]).double(), branch)
    p = scale * branch
    total = skip + p
    exact = total.relu() if relu else total

    inside = torch.maximum(skip.abs(), p.abs()) < 0.99 * limits.max
    error = unit * exact.abs() + 2 * unit_wide * (skip.abs() + p.abs())
    error += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    represented = exact.abs() < 0.99 * torch.finfo(dtype).max
    assert ((y.double() - exact).abs() <= error)[inside & represented].all()
    assert torch.equal(y.isnan()[inside], exact.isnan()[inside])
    assert y.isinf()[inside & (exact.abs() > 1.01 * torch.finfo(dtype).max)].all()

    least = 1e-12 if dtype == torch.float64 else 1e-6
    rows = [t.reshape(shape[0], -1) if t.numel() else t.new_zeros(shape[0], 0) for t in (skip, p)]
    size, squares = rows[0].size(1), [row.square().sum(1) for row in rows]
    bounded = (p.abs() < 0.99 * limits.max).reshape(shape[0], -1).all(1) if p.numel() else ...
    check_sum(stats.skip_sq, squares[0], size, limits, least)
    check_sum(stats.branch_sq[bounded], squares[1][bounded], size, limits, least)
    small = (squares[0] < limits.max / 4) & (squares[1] < limits.max / 4)
    dot, bound = (rows[0] * rows[1]).sum(1), (squares[0] * squares[1]).sqrt()
    close = (stats.dot.double() - dot).abs() <= least * bound + size * limits.smallest_normal
    assert close[small].all()

    g = laid_out(normal(shape, 7).to(device, dtype), data.draw(st.sampled_from(LAYOUTS)))
    gx, gf = torch.autograd.grad(y, inputs, g)
    open_ = total > 0 if relu else torch.ones_like(total, dtype=torch.bool)
    sure = (total.abs() > 4 * unit_wide * (skip.abs() + p.abs())) & inside & total.isfinite()
    sure |= torch.full_like(sure, not relu)
    pulled = torch.where(open_, g.double(), 0.0)
    assert torch.equal(gx.double()[sure], pulled[sure])
    error = (unit + 2 * unit_wide) * (scale * pulled).abs() + torch.finfo(dtype).smallest_normal
    assert ((gf.double() - scale * pulled).abs() <= error)[sure].all()


def check(op, in_eager, exactly, args, dtype, device, seed, rounds_between=False):
    """Hold outputs and gradients to twice the error of eager, and the sums to 1e-6.

    Eager may be exact by luck, and a gradient is a sum that may cancel: 4 ulps are granted, what a
    chain of eight roundings gives at most, and eight times what an ulp of each cotangent, and,
    where much is rounded in between, of each input, changes in a result.
    """
    given_args = tree_map(
        lambda t: t.to(device, dtype) if isinstance(t, torch.Tensor) else t, tuple(args)
    )
    unit = 1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps  # exact is float64 itself

    def run(function, kind, *, off=0):
        def near(t):
            return nearby(t, unit, off) if off else t

        moved = tree_map(
            lambda t: (
                (near(t.to(kind)) if rounds_between else t.to(kind)).requires_grad_()
                if isinstance(t, torch.Tensor)
                else t
            ),
            given_args,
        )
        values = leaves(function(*moved))
        outputs = differentiable(values[:1])
        cotangents = [near(normal(o.shape, seed).to(device, dtype).to(kind)) for o in outputs]
        inputs = [t for t in moved if isinstance(t, torch.Tensor)]
        pulled = torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)
        return [t.detach() for t in values], pulled

    (ours, pulled), (theirs, usual) = run(op, dtype), run(in_eager, dtype)
    exact = run(exactly, torch.float64)
    off = [run(exactly, torch.float64, off=draw) for draw in (1, 2, 3)]
    of_terms = given_args[0].double().abs()  # y is a sum with x
    of_ulps = max(largest_error([values[0]], [exact[0][0]], of_terms) for values, _ in off)
    bound = max(largest_error([theirs[0]], [exact[0][0]], of_terms), 4 * of_ulps, 2 * unit)
    assert largest_error([ours[0]], [exact[0][0]], of_terms) <= 2 * bound
    moved = zip(*(gradients for _, gradients in off), strict=True)
    for got, other, some, wanted in zip(pulled, usual, moved, exact[1], strict=True):
        of_ulps = max(largest_error([t], [wanted]) for t in some)
        bound = max(largest_error([other], [wanted]), 4 * of_ulps, 4 * unit)
        assert largest_error([got], [wanted]) <= 2 * bound
    of_sums = unit if dtype == torch.float64 else max(unit, 5e-7)
    for got, other, wanted in zip(ours[1:], theirs[1:], exact[0][1:], strict=True):
        assert sum_error(got, wanted) <= 2 * max(sum_error(other, wanted), of_sums)


def sum_error(sums, exact):
    """Largest error of sums [..., 3, B], over the squares of a sample, which bound its product."""
    if not exact.numel():
        return 0.0
    scale = 1 + exact.abs().amax(-2, keepdim=True)
    return ((sums.double() - exact).abs() / scale).max().item()


@given(st.data())
def test_batch_norm_residual_is_no_less_exact_than_twice_eager(device, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    # of two or three values a channel's gradient is the little that is left of large terms
    samples, training = data.draw(sizes(12, 6)), data.draw(st.booleans())
    places = [data.draw(sizes(n)) for n in data.draw(st.sampled_from(((), (40,), (9, 9))))]
    shape = (samples, data.draw(sizes(40)), *places)
    layout = st.sampled_from(LAYOUTS[:4] + LAYOUTS[5:])
    kind = data.draw(st.sampled_from(("normal", "wide", "alike")))
    x, f = (
        laid_out(of_kind(kind, shape, data.draw(SEEDS), dtype).to(dtype), data.draw(layout))
        for _ in "xf"
    )
    weight, bias = (
        normal(shape[1:2], seed) if data.draw(st.booleans()) else None for seed in (1, 2)
    )
    gate = gates(data.draw, samples)
    relu = dtype == torch.float64 and data.draw(
        st.booleans()
    )  # else a sum near 0 may go either way
    args = (x, f, weight, bias, gate, relu)

    def calling(op):
        return lambda *given: with_statistics(op, *given, training=training)

    check(
        calling(batch_norm_residual),
        lambda *given: batch_norm_eager(*given, training=training),
        calling(batch_norm_reference),
        args, dtype, device, data.draw(SEEDS),
    )  # fmt: skip


@given(st.data())
def test_not_a_number_stays_in_its_channel_and_in_eval_in_its_place(device, data):
    shape = (data.draw(sizes(9, 2)), data.draw(sizes(40)), data.draw(sizes(40)))
    training = data.draw(st.booleans())
    x = normal(shape, 1).to(device, torch.float32)
    f = of_kind("holes", shape, data.draw(SEEDS), torch.float32).to(device, torch.float32)
    y, _ = with_statistics(batch_norm_residual, x, f, training=training)
    lost = ~f.isfinite()
    if training:
        lost = lost.any(2, keepdim=True).any(0, keepdim=True).expand(shape)
    assert torch.equal(y.isfinite(), ~lost)


@given(st.data())
def test_mlp_stack_is_no_less_exact_than_twice_eager(device, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, width, hidden = (data.draw(sizes(n, least)) for n, least in ((140, 0), (70, 1), (70, 1)))
    blocks, shared = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    activation = data.draw(st.sampled_from([*ACTIVATIONS]))
    if activation == "relu":  # a sum near 0 may go either way, and gradients with it
        dtype = torch.float64
    options = {"blocks": blocks if shared else None, "return_states": data.draw(st.booleans())}
    tensors = stack(batch, width, hidden, 1 if shared else blocks, seed=data.draw(SEEDS))
    layout = st.sampled_from(LAYOUTS[:4])
    tensors = [laid_out(t.double(), data.draw(layout)) for t in tensors]
    args = (*tensors, gates(data.draw, blocks, batch), activation)

    def calling(op):
        return lambda *given: op(*given, **options)

    check(
        calling(mlp_stack), calling(stack_eager), calling(stack_reference),
        args, dtype, device, data.draw(SEEDS), rounds_between=True,
    )  # fmt: skip


@given(st.data())
def test_conv_stack_is_no_less_exact_than_twice_eager(device, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = [data.draw(sizes(n, least)) for n, least in ((5, 0), (50, 1), (9, 1), (35, 1))]
    blocks = data.draw(st.integers(1, 3))
    layouts = [st.sampled_from(LAYOUTS), *[st.sampled_from(LAYOUTS[:4])] * 4]
    tensors = conv_blocks(*shape, blocks, seed=data.draw(SEEDS))
    given_args = [
        laid_out(t.to(device, dtype), data.draw(layout))
        for t, layout in zip(tensors, layouts, strict=True)
    ]
    gate = gates(data.draw, blocks, shape[0])
    gate = gate.to(device, dtype) if isinstance(gate, torch.Tensor) else gate
    y, stats = conv_stack(*given_args, gate)
    usual, _ = conv_eager(*given_args, gate)
    wide = gate.double() if isinstance(gate, torch.Tensor) else gate
    exact, sums = conv_reference(*(t.double() for t in given_args), wide)
    unit = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    paired = dtype == torch.bfloat16 and shape[1] % 16 == 0 and ISA == "amx"
    rounds = dtype.itemsize == 2 and (device.type == "cuda" or paired)  # what products read
    assert largest_error([y], [exact]) <= 2 * max(largest_error([usual], [exact]), 4 * unit)
    least = 1e-12 if dtype == torch.float64 else unit if rounds else 2e-5
    assert largest_error([stats.sums], [sums.sums]) <= least
    places = [
        (own, other)
        for size, own, other in zip(y.shape, y.stride(), usual.stride(), strict=True)
        if size > 1
    ]
    assert not y.numel() or all(own == other for own, other in places)


@given(st.data())
def test_path_accumulate_is_the_reference_bit_for_bit(device, data):
    dtype, rows = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 9))
    row = (data.draw(sizes(5)), data.draw(sizes(300, 0)))
    kinds = ("normal", "wide", "alike", "holes")
    steps = data.draw(st.none() | st.lists(st.integers(-40, 40), min_size=rows, max_size=rows))
    if steps is None:  # else what a power of two takes out of the range need not come back alike
        kinds = KINDS
    else:
        steps = torch.tensor(steps, dtype=torch.int32, device=device)
    skip, branch = (
        of_kind(data.draw(st.sampled_from(kinds)), (rows, *row), data.draw(SEEDS), dtype).to(
            device, dtype
        )
        for _ in "sb"
    )
    skip = data.draw(st.sampled_from((skip, None)))
    before = data.draw(st.sampled_from((None, normal_rows(*row, dtype=dtype, device=device))))
    options = {"before": before, "steps": steps, "tail": data.draw(st.booleans())}
    ours, *_ = path_accumulate(skip, branch, **options)
    plain, *_ = rows_reference(skip, branch, **options)
    assert torch.equal(ours.isnan(), plain.isnan())
    assert torch.equal(ours.nan_to_num(), plain.nan_to_num())


@given(st.data())
def test_lengths_of_a_stack_are_those_of_float64(device, data):
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    batch, width, hidden = (data.draw(sizes(n)) for n in (35, 40, 40))
    blocks = data.draw(st.integers(1, 9))
    given_stack = stack_and_gradient(
        batch, width, hidden, blocks, device=device, seed=data.draw(SEEDS)
    )
    longest = data.draw(st.none() | st.integers(1, blocks))
    gate, activation = gates(data.draw, blocks, batch), data.draw(st.sampled_from([*ACTIVATIONS]))
    if activation == "relu":
        dtype = torch.float64
    cast = [t.to(dtype) for t in given_stack]
    ours = lengths(*cast, longest, gate, activation, keep=True)
    wide = [t.double() for t in cast]
    unit = torch.finfo(dtype).eps
    near = [nearby(t, unit, seed) for seed, t in enumerate(wide)]
    true, off = (
        lengths_reference(*tensors, longest, gate, activation, keep=True)
        for tensors in (wide, near)
    )
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for name in ("rows", "tail", "gradient", "dots"):
        got, wanted = getattr(ours, name).double(), getattr(true, name)
        of_ulps = (getattr(off, name) - wanted).abs().max()  # where what is left is small
        bound = torch.maximum(tolerance * wanted.abs().max(), 8 * of_ulps)
        assert ((got - wanted).abs() <= bound).all(), name


@pytest.mark.parametrize("kind", ["huge", "tiny", "holes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_kind_of_value_is_what_it_says(kind, dtype):
    values = of_kind(kind, (64,), 0, dtype).to(dtype)
    squares = values.square()
    assert {
        "huge": squares.isinf().any(),
        "tiny": (squares == 0).all() and values.ne(0).any(),
        "holes": values.isnan().any() and values.isinf().any(),
    }[kind]
