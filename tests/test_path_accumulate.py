"""path_accumulate: the step of the path recurrence, what it measures, and what it refuses."""

import itertools
import math

import numpy as np
import pytest
import torch
from contract import DTYPES

from fastres.ops import native
from fastres.ops.path_accumulate import path_accumulate, reference

COLS = (0, 1, 2, 7, 8, 15, 16, 17, 33, 100, 2047, 2049, 32769)

needs_library = pytest.mark.skipif(native.C is None, reason="the compiled library is not built")


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def problem(rows, *row, dtype=torch.float32, device="cpu", seed=0):
    """Return skip, branch, and gradient, before and steps by name."""
    wide = [normal(rows, *row, dtype=dtype, device=device, seed=seed + i) for i in (0, 1)]
    of_row = [normal(*row, dtype=dtype, device=device, seed=seed + i) for i in (2, 3)]
    steps = torch.arange(rows, dtype=torch.int32, device=device) % 7 - 3
    return *wide, dict(zip(("gradient", "before", "steps"), (*of_row, steps), strict=True))


def chosen(named):
    """Every choice of what is given, by name."""
    for given in itertools.product((False, True), repeat=len(named)):
        yield {name: named[name] for name, wanted in zip(named, given, strict=True) if wanted}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_the_reference_bit_for_bit_and_sums_within_1e_6_of_float64(device, dtype):
    for rows, (cols, samples) in itertools.product(
        (1, 2, 5), zip(COLS, itertools.cycle((1, 2, 3)))
    ):
        skip, branch, named = problem(rows, samples, cols, dtype=dtype, device=device, seed=cols)
        for given, own, tail in itertools.product(chosen(named), (None, skip), (False, True)):
            ours = path_accumulate(own, branch, **given, tail=tail)
            plain = reference(own, branch, **given, tail=tail)
            assert torch.equal(ours[0], plain[0])
            wide = [None if own is None else own.double(), branch.double()]
            named64 = {n: t if n == "steps" else t.double() for n, t in given.items()}
            _, squares, dots = reference(*wide, **named64, tail=tail)
            least = 1e-14 if dtype == torch.float64 else 1e-6
            assert ours[1].dtype == plain[1].dtype
            assert ((ours[1] - squares).abs() <= least * squares).all(), (rows, samples, cols)
            assert (ours[2] is None) == ("gradient" not in given)
            if ours[2] is not None:
                scale = (squares * named64["gradient"].square().sum(1)).sqrt()
                assert ((ours[2] - dots).abs() <= least * scale).all(), (rows, samples, cols)


def test_it_is_the_recurrence_of_the_paths(device):
    skip, branch, named = problem(4, 3, 5, dtype=torch.float64, device=device)
    rows, squares, dots = path_accumulate(skip, branch, named["gradient"], tail=True)
    assert torch.equal(rows[0], skip[0])
    assert torch.equal(rows[1:3], skip[1:3] + branch[:2])
    torch.testing.assert_close(rows[3], skip[3] + branch[3] + branch[2])
    torch.testing.assert_close(rows.sum(0), (skip + branch).sum(0))  # no path is left out
    torch.testing.assert_close(squares, rows.square().sum(2))
    torch.testing.assert_close(dots, (rows * named["gradient"]).sum(2))


def test_lengths_of_blocks_that_multiply_by_a_number_are_binomial(device):
    gain, blocks = -0.5, 6
    rows = torch.zeros(blocks + 1, 1, 3, dtype=torch.float64, device=device)
    rows[0] = 1
    for _ in range(blocks):
        rows, _, _ = path_accumulate(rows, gain * rows)
    want = [math.comb(blocks, k) * gain**k for k in range(blocks + 1)]
    assert rows[:, 0, 0].tolist() == want


def test_rows_in_parts_are_the_rows(device):
    skip, branch, named = problem(7, 2, 9, device=device)
    whole = path_accumulate(skip, branch, named["gradient"], steps=named["steps"], tail=True)
    for cut in range(1, 7):
        parts = [
            path_accumulate(
                skip[part],
                branch[part],
                named["gradient"],
                before=before,
                steps=named["steps"][part],
                tail=last,
            )
            for part, before, last in (
                (slice(cut), None, False),
                (slice(cut, None), branch[cut - 1], True),
            )
        ]
        for got, *pieces in zip(whole, *parts, strict=True):
            assert torch.equal(got, torch.cat(pieces))


def test_powers_of_two_are_those_of_the_exponents_of_the_rows(device):
    skip, branch, _ = problem(4, 2, 9, dtype=torch.float64, device=device)
    exponents = torch.tensor([0, 7, -30, 600], device=device)
    held = [torch.ldexp(t, exponents.view(4, 1, 1)) for t in (skip, branch)]
    steps = [0, *exponents.diff().tolist()]
    rows = path_accumulate(*held, steps=steps)[0]
    true = path_accumulate(skip, branch)[0]
    torch.testing.assert_close(torch.ldexp(rows, -exponents.view(4, 1, 1)), true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_beyond_the_range_leaves_zeros_zero_and_loses_what_is_small(device, dtype):
    branch = torch.zeros(3, 1, 4, dtype=dtype, device=device)
    branch[1] = 1
    rows = path_accumulate(None, branch, steps=[0, 5000, -5000])[0]
    assert rows.eq(0).all()


def test_without_a_skip_it_is_the_shift(device):
    _, branch, named = problem(3, 2, 5, device=device)
    rows = path_accumulate(None, branch, before=named["before"])[0]
    assert torch.equal(rows, torch.cat([named["before"][None], branch[:2]]))


def test_half_precision_is_summed_in_float32(device):
    branch = torch.full((2, 1, 1000), 60000.0, dtype=torch.float16, device=device)
    rows, squares, _ = path_accumulate(-branch, branch, steps=[0, -1])
    assert rows[1].eq(-30000).all()
    torch.testing.assert_close(squares[0].item(), 1000 * 59999.0**2, rtol=1e-3, atol=0)


def test_nan_and_infinity_stay_where_they_belong(device):
    skip, branch = torch.zeros(3, 2, 5, device=device), torch.zeros(3, 2, 5, device=device)
    branch[0, 0, 0], skip[1, 1, 4], branch[2] = math.inf, math.nan, math.nan
    rows, squares, _ = path_accumulate(skip, branch)
    assert rows[1, 0, 0].item() == squares[1, 0].item() == math.inf
    assert squares.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert path_accumulate(skip, branch, tail=True)[1][2].isnan().all()


@pytest.mark.parametrize("shape", [(1, 0, 3), (2, 0, 3), (2, 3, 0), (3, 4), (1, 1)], ids=str)
def test_rows_without_samples_or_features_are_taken(device, shape):
    skip, branch, named = problem(*shape, device=device)
    for tail in (False, True):
        ours, plain = (f(skip, branch, **named, tail=tail) for f in (path_accumulate, reference))
        for got, want in zip(ours, plain, strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)


def test_any_layout_is_taken_and_that_of_dense_samples_is_kept(device):
    skip, branch, named = problem(3, 2, 4, 5, 6, device=device)
    last = [t.flatten(0, 1).contiguous(memory_format=torch.channels_last) for t in (skip, branch)]
    last = [t.unflatten(0, (3, 2)) for t in last]
    layouts = [last, [skip, last[1]], [last[0], branch], [None, last[1]]]
    layouts += [[t.transpose(0, 1).contiguous().transpose(0, 1) for t in (skip, branch)]]
    layouts += [[t.expand(3, 2, 4, 5, 6) for t in (skip[:1], branch[:, :1])]]
    for one, other in layouts:
        got = path_accumulate(one, other, **named)
        expected = reference(one, other, **named)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert got[0].is_contiguous() or got[0].stride() == (other if one is None else one).stride()
    assert path_accumulate(*last, **named)[0].stride() == last[0].stride()
    skipped = path_accumulate(skip[..., ::2], branch[..., ::2])[0]
    assert torch.equal(skipped, reference(skip[..., ::2], branch[..., ::2])[0])


def test_the_result_does_not_depend_on_the_number_of_threads():
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([])
            for row in ((2, 100_003), (300, 65)):
                skip, branch, named = problem(5, *row)
                runs[-1] += path_accumulate(skip, branch, **named, tail=True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_vmap_equals_a_loop(device):
    skip, branch, named = problem(3, 2, 5, device=device)
    stacked = torch.stack([branch, -2 * branch])
    got = torch.func.vmap(lambda b: path_accumulate(skip, b, **named))(stacked)
    for i, each in enumerate(stacked):
        for a, b in zip(got, path_accumulate(skip, each, **named), strict=True):
            torch.testing.assert_close(a[i], b)


@needs_library
def test_the_raw_operator_passes_opcheck(device):
    skip, branch, named = problem(3, 2, 5, device=device)
    flat = [t.flatten(0, 1) for t in (skip, branch)]
    operator = torch.ops.fastres._path_accumulate.default
    others = named["before"], named["gradient"], named["steps"]
    torch.library.opcheck(operator, (*flat, *others, 3, True))
    torch.library.opcheck(operator, (None, flat[1], None, None, None, 3, False))


@needs_library
def test_it_compiles_to_one_graph(device):
    skip, branch, named = problem(3, 2, 5, device=device)
    compiled = torch.compile(path_accumulate, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(skip, branch, **named), path_accumulate(skip, branch, **named), strict=True
    ):
        torch.testing.assert_close(got, want)


ONES, ROW = torch.ones(2, 3, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("args", "named", "error", "message"),
    [
        ((ONES, torch.ones(2, 3, 5)), {}, ValueError, "skip must have shape [2, 3, 5], got [2, 3,"),
        ((None, torch.ones(3)), {}, ValueError, "branch must have 2 or more dimensions, got 1"),
        ((None, ONES[:0]), {}, ValueError, "branch must have 1 or more rows, got 0"),
        ((None, ONES, ROW[:2]), {}, ValueError, "gradient must have shape [3, 4], got [2, 4]"),
        (
            (None, ONES),
            {"before": ONES},
            ValueError,
            "before must have shape [3, 4], got [2, 3, 4]",
        ),
        ((None, ONES), {"steps": [1]}, ValueError, "steps must have shape [2], got [1]"),
        ((None, ONES), {"steps": [1, 0.5]}, TypeError, "steps must be integers, got [1, 0.5]"),
        ((None, ONES), {"steps": torch.ones(2)}, TypeError, "steps must be int32, got torch.float"),
        ((None, ONES), {"tail": 1.5}, TypeError, "tail must be a bool, got float"),
        ((None, ONES.int()), {}, TypeError, "branch must be float64, float32, bfloat16 or float16"),
        ((None, None), {}, TypeError, "branch must be a tensor, got NoneType"),
        ((ONES.double(), ONES), {}, TypeError, "skip must be torch.float32, as branch is, got"),
        ((ONES.to_sparse(), ONES), {}, TypeError, "skip must be a dense tensor, got torch.sparse"),
        ((None, ONES, ROW.to("meta")), {}, TypeError, "gradient must be on cpu, got meta"),
        ((None, ONES.clone().requires_grad_()), {}, ValueError, "branch must need no derivative"),
        ((ONES.clone().requires_grad_(), ONES), {}, ValueError, "skip must need no derivative"),
    ],
)
def test_bad_input_names_the_argument_the_rule_and_the_value(args, named, error, message):
    with pytest.raises(error) as raised:
        path_accumulate(*args, **named)
    assert str(raised.value).startswith(f"path_accumulate: {message}")


def test_without_grad_mode_tensors_that_require_a_gradient_are_taken():
    branch = ONES.clone().requires_grad_()
    with torch.no_grad():
        rows, squares, _ = path_accumulate(None, branch)
    assert not rows.requires_grad
    assert squares.tolist() == [[0, 0, 0], [4, 4, 4]]


def test_meta_tensors_give_shapes_and_layout():
    skip, branch, named = problem(3, 2, 5, 4)
    named = {name: t.to("meta") for name, t in named.items()}
    rows, squares, dots = path_accumulate(skip.to("meta"), branch.to("meta"), **named)
    assert (rows.shape, squares.shape, dots.shape) == ((3, 2, 5, 4), (3, 2), (3, 2))
    assert rows.device.type == "meta"


@needs_library
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_arrays_go_through_the_same_kernel(dtype):
    skip, branch, named = problem(3, 2, 1000, dtype=getattr(torch, dtype))
    arrays = {name: t.numpy() for name, t in named.items()}
    rows, sums = native.C.path_accumulate(skip.numpy(), branch.numpy(), **arrays, tail=True)
    expected = path_accumulate(skip, branch, **named, tail=True)
    for got, want in zip((rows, *sums), expected, strict=True):
        assert np.array_equal(got, want.numpy())
    assert native.C.path_accumulate(None, branch.numpy())[1].shape == (1, 3, 2)


@needs_library
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, np.ones((2, 3), "i4")), TypeError, "branch must be float64, float32"),
        ((np.ones((2, 3), "f4"), np.ones((2, 3))), TypeError, "skip must have dtype float64"),
        ((None, np.ones((2, 3)), np.ones(4)), ValueError, r"gradient must have shape \(3,\)"),
        ((None, np.ones((0, 3))), ValueError, "branch must have 1 or more rows, got 0"),
        ((None, np.ones((2, 3)), None, None, np.ones(2)), TypeError, "steps must have dtype int32"),
    ],
)
def test_bad_arrays_are_refused(args, error, message):
    with pytest.raises(error, match=f"path_accumulate: {message}"):
        native.C.path_accumulate(*args)
