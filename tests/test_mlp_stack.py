"""mlp_stack: the contract, and what the formula says."""

import math

import pytest
import torch
from contract import DTYPES, OpContract, Sample, leaves
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.ops import Stats, native
from fastres.ops.layout import accumulate
from fastres.ops.mlp_stack import mlp_stack, reference
from fastres.ops.mlp_stack_blocks import ACTIVATIONS
from fastres.ops.stats import sums_of

needs_library = pytest.mark.skipif(
    native.raw("_mlp_stack") is None, reason="the compiled library is not built"
)


def stack(batch, width, hidden, blocks, *, dtype=torch.float32, device="cpu", seed=0):
    """x, w1, b1, w2, b2: each branch about a third as large as its stream."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    return (
        draw(batch, width, scale=1.0),
        draw(blocks, hidden, width, scale=1 / math.sqrt(width)),
        draw(blocks, hidden, scale=0.3),
        draw(blocks, width, hidden, scale=0.3 / math.sqrt(hidden)),
        draw(blocks, width, scale=0.1),
    )


def eager(x, w1, b1, w2, b2, gate=None, activation="relu", *, blocks=None, **options):
    """The blocks as one writes them, in the dtype of x."""
    x = x.contiguous()
    states, sums = [x], []
    count = w1.size(0) if blocks is None else blocks
    if gate is not None:
        gate = torch.as_tensor(gate, dtype=x.dtype, device=x.device)
        gate = (gate[:, None] if gate.dim() == 1 else gate).expand(count, x.size(0))
    for i in range(count):
        w = i % w1.size(0)
        p = F.linear(ACTIVATIONS[activation](F.linear(x, w1[w], b1[w])), w2[w], b2[w])
        p = p if gate is None else p * gate[i, :, None]
        wide = accumulate(x.dtype)
        sums.append(sums_of(x.detach().to(wide), p.detach().to(wide)))
        x = x + p
        states.append(x)
    empty = x.new_empty((0, 3, x.size(0)), dtype=accumulate(x.dtype))
    y = torch.stack(states) if options.get("return_states") else x.clone()
    return y, Stats(torch.stack(sums) if sums else empty)


def samples():
    small = stack(3, 4, 3, 2)
    gate = torch.tensor([[0.5, -1.5, 2.0], [1.0, 0.0, 0.3]])
    yield Sample("plain", small)
    for name in ACTIVATIONS:
        yield Sample(name, (*stack(2, 3, 4, 2, seed=1), None, name))
    yield Sample("number", (*small, 0.7))
    yield Sample("one gate for all", (*small, torch.tensor(-0.3)))
    yield Sample("a gate per block", (*small, gate[:, 0].clone()))
    yield Sample("a gate per block and sample", (*small, gate, "gelu"))
    yield Sample("gates that lie apart", (*small, gate.t().contiguous().t(), "silu"))
    yield Sample("shared weights", (*stack(3, 4, 3, 1), gate, "tanh"), {"blocks": 2})
    yield Sample("one block", stack(3, 4, 5, 1))
    yield Sample("states", (*small, gate), {"return_states": True})
    yield Sample("states, narrow branch", (*stack(2, 5, 2, 3),), {"return_states": True})
    yield Sample("narrow branch", (*stack(2, 5, 2, 3), None, "gelu"))
    yield Sample("narrow branch, even", stack(2, 5, 2, 4))
    yield Sample("checkpoint", (*stack(2, 3, 3, 5), 0.5, "silu"), {"checkpoint": True})
    yield Sample("checkpoint, square", stack(2, 3, 3, 4), {"checkpoint": True})
    yield Sample(
        "other strides", tuple(t.movedim(-1, 0).contiguous().movedim(0, -1) for t in small)
    )
    yield Sample("every other weight", (small[0], *(t.repeat(2, *[1] * (t.dim() - 1))[::2]
                                                    for t in small[1:])))  # fmt: skip
    yield Sample("no blocks", stack(3, 4, 3, 0))
    yield Sample("empty batch", stack(0, 4, 3, 2))
    yield Sample("one feature", stack(3, 1, 1, 2))
    yield Sample("odd sizes", stack(17, 33, 19, 3))
    yield Sample("many rows", (*stack(130, 16, 48, 3), None, "gelu_tanh"))


class TestMlpStack(OpContract):
    op = staticmethod(mlp_stack)
    reference = staticmethod(reference)
    eager = staticmethod(eager)
    samples = staticmethod(samples)

    @staticmethod
    def exported():
        return Sample("gate", (*stack(4, 6, 5, 3), torch.rand(3, 4))), (0, *[None] * 4, 1)

    @staticmethod
    def raw_samples(device):
        ops = torch.ops.fastres
        x, *weights = stack(3, 4, 5, 4, device=device)
        for gate in (None, torch.rand(4, 3, device=device)):
            for every in (0, 1, 2, 3):
                options = (4, 1, every, every != 2, False)
                yield ops._mlp_stack.default, (x, *weights, gate, *options)
                if every:
                    states = ops._mlp_stack(x, *weights, gate, *options)[2]
                    gstates = torch.randn_like(states) if every == 1 else None
                    flags = (every != 3, gate is not None, False)
                    yield (
                        ops._mlp_stack_backward.default,
                        (x, gstates, states, *weights, gate, 4, 1, every, *flags),
                    )


def gradients(fn, args, cotangent, **kwargs):
    """The result, and the gradients of all tensors, for a cotangent of the first."""
    args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    y, stats = fn(*args, **kwargs)
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    return [y.detach(), stats.sums, *torch.autograd.grad(y, inputs, cotangent.to(y.dtype))]


def rms(t):
    return t.double().square().mean().sqrt().item()


def gradients_of_draws(fn, draws):
    """The same of several draws of arguments and cotangent, one after the other."""
    found = [gradients(fn, *draw) for draw in draws]
    return [torch.cat([t.flatten() for t in tensors]) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_size_and_activation_is_as_exact_as_eager(device, activation):
    for i, (width, hidden) in enumerate([(1, 1), (3, 17), (17, 3), (33, 64), (64, 33), (16, 16)]):
        batch = (1, 2, 5, 33, 65, 130)[i]
        gate = torch.linspace(-1, 2, 3 * batch, device=device).view(3, batch)
        draws, wide = [], []
        for seed in range(i, 24, 6):  # several, as of few numbers some are lucky
            args = (*stack(batch, width, hidden, 3, device=device, seed=seed), gate)
            cotangent = stack(batch, width, 1, 1, device=device, seed=100 + seed)[0]
            draws.append(([*args, activation], cotangent))
            wide.append(([*(a.double() for a in args), activation], cotangent))
        ours, plain = (gradients_of_draws(fn, draws) for fn in (mlp_stack, eager))
        exact = gradients_of_draws(reference, wide)
        for got, near, e in zip(ours, plain, exact, strict=True):  # y, sums, then each gradient
            bound = 2 * max(rms(near - e), torch.finfo(torch.float32).eps * rms(e))
            assert rms(got - e) <= bound, (width, hidden)


# A GPU takes 64 samples at a time where 16 would make more tiles than it has multiprocessors.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 128])
def test_many_samples_are_no_less_exact_than_twice_eager(device, width, dtype):
    given = stack(2200, width, 40, 3, dtype=dtype, device=device)
    cotangent = stack(2200, width, 1, 1, dtype=dtype, device=device, seed=1)[0]

    def results(fn, dtype):
        args = [t.to(dtype).requires_grad_() for t in given]
        y, stats = fn(*args, activation="gelu")
        return [y, stats.sums, *torch.autograd.grad(y, args, cotangent.to(dtype))]

    unit = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    of_each = results(mlp_stack, dtype), results(eager, dtype), results(reference, torch.float64)
    for ours, plain, wanted in zip(*of_each, strict=True):
        error, of_eager = ((t.double() - wanted).norm() for t in (ours, plain))
        assert error <= 2 * of_eager + 4 * unit * wanted.norm()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_the_batch_it_is_in(device, dtype):
    x, *weights = stack(131, 24, 40, 3, device=device, dtype=dtype)
    y, stats = mlp_stack(x, *weights, 0.5, "silu")
    for batch in (*range(1, 35), 63, 64, 65, 100, 127, 128, 129, 130):
        part, of_part = mlp_stack(x[1 : 1 + batch], *weights, 0.5, "silu")
        assert torch.equal(part, y[1 : 1 + batch]), batch
        assert torch.equal(of_part.sums, stats.sums[..., 1 : 1 + batch]), batch


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "hidden", "sets"), [(40, 24, 60), (64, 96, 60), (64, 96, 1)])
def test_the_result_does_not_depend_on_the_number_of_threads(width, hidden, sets, dtype):
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for batch in (1, 20, 130):
                given = stack(batch, width, hidden, sets, dtype=dtype)
                args = [*given, torch.linspace(0, 1, 60) / 60, "gelu"]
                gy = torch.ones(batch, width, dtype=dtype)
                runs.append(gradients(mlp_stack, args, gy, blocks=60))
    finally:
        torch.set_num_threads(before)
    for i, run in enumerate(runs[3:]):
        assert all(torch.equal(a, b) for a, b in zip(runs[i % 3], run, strict=True))


@needs_library
@pytest.mark.parametrize("size", [(5, 8, 6), (33, 64, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_states_are_the_stream_before_every_block_and_after_the_last(device, dtype, size):
    x, *weights = stack(*size, 4, device=device, dtype=dtype)
    states, stats = mlp_stack(x, *weights, return_states=True)
    assert states.shape == (5, *size[:2])
    assert torch.equal(states[0], x)
    for i in range(5):
        y, _ = mlp_stack(x, *(w[:i] for w in weights))
        assert torch.equal(states[i], y)
    assert torch.equal(stats.sums, mlp_stack(x, *weights)[1].sums)


def test_the_sums_are_those_of_the_states_and_of_their_differences(device):
    x, *weights = stack(5, 8, 6, 4, device=device, dtype=torch.float64)
    states, stats = mlp_stack(x, *weights, 0.7, return_states=True)
    p = states.diff(dim=0)
    for got, expected in zip(stats, ((states[:-1] ** 2), p**2, states[:-1] * p), strict=True):
        torch.testing.assert_close(got, expected.sum(2))


@needs_library
def test_shared_weights_are_one_set_for_every_block(device):
    x, *weights = stack(5, 8, 6, 1, device=device)
    one, stats = mlp_stack(x, *weights, blocks=4)
    many, of_many = mlp_stack(x, *(w.repeat(4, *[1] * (w.dim() - 1)) for w in weights))
    assert torch.equal(one, many)
    assert torch.equal(stats.sums, of_many.sums)


@needs_library
def test_checkpointing_changes_no_bit(device):
    for blocks in (1, 2, 9, 10):
        args = [*stack(5, 8, 8, blocks, device=device), torch.rand(blocks, 5, device=device)]
        g = torch.randn(5, 8, device=device)
        for a, b in zip(
            gradients(mlp_stack, args, g),
            gradients(mlp_stack, args, g, checkpoint=True),
            strict=True,
        ):
            assert torch.equal(a, b)


@needs_library
def test_measuring_changes_no_bit(device):
    """The states that a checkpoint computes again are computed without their sums."""
    x, *weights = stack(20, 24, 40, 3, device=device)
    for gate in (None, torch.rand(3, 20, device=device)):
        with_sums, without = (
            native.raw("_mlp_stack")(x, *weights, gate, 3, 1, 0, stats, False)
            for stats in (True, False)
        )
        assert torch.equal(with_sums[0], without[0])
        assert without[1].numel() == 0


def test_autocast_rounds_no_derivative(device):
    """Not that of the operator, nor those that the plain composition gives."""
    args = [a.requires_grad_() for a in stack(5, 8, 16, 3, device=device)]
    x, *weights = (a.detach() for a in args)
    runs = []
    for enabled in (True, False):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            y, _ = mlp_stack(*args, None, "tanh")
            (first,) = torch.autograd.grad(y.pow(2).sum(), args[0], create_graph=True)
            forwards = torch.func.jvp(lambda v: mlp_stack(v, *weights)[0], (x,), (x,))
        second = torch.autograd.grad(first.pow(2).sum(), args)
        runs.append([y, first, *forwards, *second])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Calls(TorchDispatchMode):
    """The calls of the raw operators, and what they returned."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastres":
            self.seen.append((func._opname, out))
        return out


@needs_library
def test_vmap_over_samples_and_gates_is_one_call(device):
    x, *weights = stack(6, 8, 6, 4, device=device)
    gates = torch.rand(4, 3, 2, device=device)
    with Calls() as calls:
        y, stats = torch.func.vmap(lambda x, g: mlp_stack(x, *weights, g), (0, 1), (1, 0))(
            x.view(3, 2, 8), gates
        )
    assert len(calls.seen) == 1
    expected, of_all = mlp_stack(x, *weights, gates.flatten(1))
    assert torch.equal(y, expected.view(3, 2, 8).transpose(0, 1))
    assert torch.equal(stats.sums.permute(1, 2, 0, 3).flatten(2), of_all.sums)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (None, None)])
@pytest.mark.parametrize("states", [True, False])
def test_vmap_over_any_one_argument_equals_a_loop(device, dims, states):
    x, *weights = stack(2, 3, 4, 3, device=device)
    many, gates = x.repeat(5, 1, 1) * torch.arange(5.0, device=device)[:, None, None], None
    gates = torch.rand(5, 3, device=device)
    firsts = torch.stack([weights[0] * i for i in range(5)])
    in_first = 0 if dims == (None, None) else None

    def call(x, gate, w1):
        return mlp_stack(x, w1, *weights[1:], gate, return_states=states)

    given = (many if dims[0] == 0 else x, gates if dims[1] == 0 else gates[0],
             firsts if in_first == 0 else weights[0])  # fmt: skip
    got = leaves(torch.func.vmap(call, (*dims, in_first))(*given))
    each = [
        leaves(
            call(*(g[i] if d == 0 else g for g, d in zip(given, (*dims, in_first), strict=True)))
        )
        for i in range(5)
    ]
    for a, b in zip(got, (torch.stack(parts) for parts in zip(*each, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_over_nothing_gives_nothing(device):
    _, *weights = stack(2, 3, 4, 3, device=device)
    x = torch.randn(0, 2, 3, device=device)
    assert torch.func.vmap(lambda a: mlp_stack(a, *weights)[0])(x).shape == (0, 2, 3)


def test_a_derivative_may_enter_at_any_state(device):
    for options in ({}, {"checkpoint": True}):
        args = stack(3, 4, 4, 5, device=device, dtype=torch.float64)
        g = torch.randn(6, 3, 4, dtype=torch.float64).to(device)
        for a, b in zip(
            gradients(mlp_stack, args, g, return_states=True, **options),
            gradients(eager, args, g, return_states=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_a_third_derivative_is_that_of_the_reference(device):
    for options in ({}, {"checkpoint": True}):
        x, *weights = stack(2, 3, 3, 5, device=device, dtype=torch.float64)
        got = []
        for fn in (mlp_stack, reference):
            v = x.clone().requires_grad_()
            y = fn(v, *weights, None, "tanh", **options)[0].pow(3).sum()
            for _ in range(3):
                (d,) = torch.autograd.grad(y, v, create_graph=True)
                y = d.pow(2).sum()
            got.append(d.detach())
        torch.testing.assert_close(*got)


def test_no_blocks_return_x_and_carry_the_gradient(device):
    x, *weights = stack(3, 4, 5, 0, device=device)
    y, stats = mlp_stack(x.requires_grad_(), *weights)
    assert torch.equal(y, x)
    assert stats.sums.shape == (0, 3, 3)
    g = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g)
    shared = stack(3, 4, 5, 1, device=device)
    assert torch.equal(mlp_stack(*shared, blocks=0)[0], shared[0])


@needs_library
def test_nan_and_infinity_stay_in_their_sample_and_show_in_its_sums(device):
    x, *weights = stack(40, 16, 16, 3, device=device)
    clean = mlp_stack(x, *weights)
    x[7, 3], x[21, 5] = math.nan, math.inf
    y, stats = mlp_stack(x, *weights)
    hit = torch.zeros(40, dtype=torch.bool, device=device)
    hit[[7, 21]] = True
    assert not y[hit].isfinite().all(1).any()
    assert stats.skip_sq[:, 7].isnan().all()
    assert not stats.skip_sq[:, 21].isfinite().any()
    assert torch.equal(y[~hit], clean[0][~hit])
    assert torch.equal(stats.sums[..., ~hit], clean[1].sums[..., ~hit])


def test_a_nan_weight_shows_from_its_block_on(device):
    x, *weights = stack(4, 8, 8, 3, device=device)
    weights[2][1, 2, 3] = math.nan
    states, stats = mlp_stack(x, *weights, None, "sigmoid", return_states=True)
    assert states[:2].isfinite().all()
    assert states[2:, :, 2].isnan().all()
    assert stats.branch_sq.isnan().tolist() == [[False] * 4, [True] * 4, [True] * 4]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_weight_reaches_no_gradient_by_lanes_without_a_sample(device, dtype):
    x, *weights = stack(31, 64, 64, 3, device=device, dtype=dtype)
    x, weights[0][-1, 3, 5] = x.abs(), math.inf
    given = [t.requires_grad_() for t in (x, *weights)]
    ours, plain = (
        torch.autograd.grad(run(*given, None, "tanh")[0], given, torch.ones_like(x))
        for run in (mlp_stack, eager)
    )
    for name, a, b in zip(("x", "w1", "b1", "w2", "b2"), ours, plain, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_zeros_keep_the_stream_bit_for_bit_however_small(device, dtype):
    x, *weights = (t * 0 if i else t for i, t in enumerate(stack(33, 64, 32, 3, device=device)))
    x = (x.double() * torch.finfo(dtype).smallest_normal).to(dtype)
    states, _ = mlp_stack(x, *(w.to(dtype) for w in weights), return_states=True)
    assert torch.equal(states, x.expand_as(states))


@needs_library
def test_a_zero_gate_removes_the_block_bit_for_bit(device):
    x, *weights = stack(4, 8, 8, 3, device=device)
    y, stats = mlp_stack(x, *weights, torch.tensor([1.0, 0.0, 1.0], device=device))
    rest, _ = mlp_stack(x, *(w[::2] for w in weights))
    assert torch.equal(y, rest)
    assert stats.branch_sq[1].eq(0).all()


def test_float16_squares_do_not_overflow(device):
    x = torch.full((1, 1000), 60000.0, dtype=torch.float16, device=device)
    _, *weights = stack(1, 1000, 2, 1, dtype=torch.float16, device=device)
    stats = mlp_stack(x, *(0 * w for w in weights))[1]
    torch.testing.assert_close(stats.skip_sq.item(), 1000 * 59999.0**2, rtol=1e-3, atol=0)


def test_stats_carry_no_gradient(device):
    y, stats = mlp_stack(*(a.requires_grad_() for a in stack(3, 4, 5, 2, device=device)))
    assert y.requires_grad
    assert not stats.sums.requires_grad


def test_a_device_without_kernels_runs_the_reference(device, monkeypatch):
    args = stack(3, 4, 5, 2, device=device)
    expected = mlp_stack(*args)
    monkeypatch.setattr(native, "runs_on", lambda _: False)
    got = mlp_stack(*args)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1].sums, expected[1].sums)


def test_y_may_be_changed_in_place_before_the_backward_pass(device):
    x, *weights = stack(3, 4, 5, 2, device=device)
    y, _ = mlp_stack(x.requires_grad_(), *weights)
    y = y.mul_(2)
    y.sum().backward()
    assert x.grad.isfinite().all()
