"""mlp_stack of few samples in widths of whole vectors, for which the CPU has kernels."""

import math

import pytest
import torch
from contract import DTYPES
from test_mlp_stack import eager, gradients, needs_library, rms, stack

from fastres.ops.layout import accumulate
from fastres.ops.mlp_stack import mlp_stack, reference

BATCHES = range(1, 18)  # to one beyond
pytestmark = needs_library


def gates(blocks, batch):
    return torch.linspace(-1, 1.5, blocks * batch).view(blocks, batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(16, 32), (48, 16), (64, 96), (160, 112)])
def test_few_samples_are_as_exact_as_eager(width, hidden, dtype):
    for batch in BATCHES:
        args = [*stack(batch, width, hidden, 3, dtype=dtype, seed=batch), gates(3, batch)]
        exact, exact_stats = reference(*(a.double() for a in args), "gelu")
        y, stats = mlp_stack(*args, "gelu")
        near, _ = eager(*args, "gelu")
        bound = 2 * max(rms(near - exact), torch.finfo(dtype).eps * rms(exact))
        assert rms(y - exact) <= bound, batch
        # Two bytes: the products may round their factors.
        wide = {"rtol": 1e-5, "atol": 1e-4} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(stats.sums.double(), exact_stats.sums, **wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sets", [3, 1])
@pytest.mark.parametrize(("width", "hidden"), [(16, 32), (48, 16), (160, 112)])
def test_gradients_of_few_samples_are_as_exact_as_eager(width, hidden, sets, dtype):
    for batch in range(1, 6):
        given = stack(batch, width, hidden, sets, dtype=dtype, seed=batch)
        args = [*given, gates(3, batch).to(accumulate(dtype))]
        cotangents = torch.randn(4, batch, width, generator=torch.Generator().manual_seed(batch))
        exact, ours, near = (
            gradients(run, [*given, "gelu"], cotangents, blocks=3, return_states=True)
            for run, given in (
                (reference, [a.double() for a in args]),
                (mlp_stack, args),
                (eager, args),
            )
        )
        del exact[1], ours[1], near[1]  # the sums
        for a, b, e in zip(ours, near, exact, strict=True):
            if dtype == torch.float64:  # the reference is no better
                torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
            else:  # 4: the gate has one number for each sample
                assert rms(a - e) <= 4 * max(rms(b - e), torch.finfo(dtype).eps * rms(e)), batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(64, 32), (512, 272)])  # every second state is kept
def test_neither_what_is_kept_nor_what_is_wanted_changes_a_bit_of_few(width, hidden, dtype):
    for batch in range(1, 6):
        x, *weights = stack(batch, width, hidden, 7, dtype=dtype)
        g = torch.ones_like(x)
        found = gradients(mlp_stack, [x, *weights, gates(7, batch)], g)
        again = gradients(mlp_stack, [x, *weights, gates(7, batch)], g, checkpoint=True)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), batch
        leaf = x.clone().requires_grad_()
        y, _ = mlp_stack(leaf, *weights, gates(7, batch))
        assert torch.equal(torch.autograd.grad(y, leaf, g)[0], found[2]), batch


def test_an_infinite_sample_reaches_no_other_of_few():
    x, *weights = stack(3, 32, 48, 4)
    leaf = x.clone().requires_grad_()
    clean = torch.autograd.grad(mlp_stack(leaf, *weights, None, "tanh")[0].sum(), leaf)[0]
    leaf.data[1] = math.inf
    found = torch.autograd.grad(mlp_stack(leaf, *weights, None, "tanh")[0].sum(), leaf)[0]
    assert torch.equal(found[::2], clean[::2])
    assert not torch.equal(found[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256, 512])  # samples are shared out, or rows
def test_no_number_of_threads_changes_a_bit(width, dtype):
    before, runs = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in BATCHES:
                args = stack(batch, width, width, 20, dtype=dtype)
                y, stats = mlp_stack(*args, gates(20, batch), "silu")
                found = [y, stats.sums]
                if batch < 6:
                    given = [*args, gates(20, batch), "silu"]
                    found += gradients(mlp_stack, given, torch.ones_like(y))
                for a, b in zip(found, runs.setdefault(batch, found), strict=True):
                    assert torch.equal(a, b), (threads, batch)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_its_place_among_few(dtype):
    x, *weights = stack(16, 32, 48, 3, dtype=dtype)
    y, stats = mlp_stack(x, *weights, 0.5)
    for batch in range(9, 16):
        part, of_part = mlp_stack(x[16 - batch :], *weights, 0.5)
        assert torch.equal(part, y[16 - batch :]), batch
        assert torch.equal(of_part.sums, stats.sums[..., 16 - batch :]), batch


@pytest.mark.parametrize("batch", [1, 3, 8, 13, 16])
def test_the_states_are_those_of_fewer_blocks(batch):
    x, *weights = stack(batch, 32, 64, 5)
    states, stats = mlp_stack(x, *weights, return_states=True)
    for i in range(6):
        y, _ = mlp_stack(x, *(w[:i] for w in weights))
        assert torch.equal(states[i], y)
    torch.testing.assert_close(stats.skip_sq, states[:-1].square().sum(2))
    torch.testing.assert_close(stats.branch_sq, states.diff(dim=0).square().sum(2))
