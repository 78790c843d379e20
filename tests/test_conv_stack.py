"""conv_stack: the contract, and what the formula says."""

import math

import numpy as np
import pytest
import torch
from contract import DTYPES, OpContract, Sample
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres.ops import Stats, native
from fastres.ops.conv_stack import as_packed, conv_stack, is_channels_last, reference
from fastres.ops.layout import accumulate, per_sample
from fastres.ops.stats import sums_of
from fastres.threads import threads

needs_library = pytest.mark.skipif(
    native.raw("_conv_stack") is None, reason="the compiled library is not built"
)


def stack(batch, channels, height, width, blocks, *, dtype=torch.float32, device="cpu", seed=0):
    """x, w1, b1, w2, b2: each branch about a third as large as its stream."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    kernel = (blocks, channels, channels, 3, 3)
    gain = math.sqrt(2 / (9 * channels))
    return (
        draw(batch, channels, height, width, scale=1.0),
        draw(*kernel, scale=gain),
        draw(blocks, channels, scale=0.1),
        draw(*kernel, scale=gain / 3),
        draw(blocks, channels, scale=0.1),
    )


def eager(x, w1, b1, w2, b2, gate=None):
    """The blocks as one writes them, in the dtype of x."""
    sums, wide = [], accumulate(x.dtype)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if gate is not None:
        gate = torch.as_tensor(gate, dtype=x.dtype, device=x.device)
        gate = (gate[:, None] if gate.dim() == 1 else gate).expand(w1.size(0), x.size(0))
    y = x
    for i in range(w1.size(0)):
        p = F.conv2d(torch.relu(F.conv2d(y, w1[i], b1[i], padding=1)), w2[i], b2[i], padding=1)
        p = p if gate is None else p * per_sample(gate[i], p)
        sums.append(sums_of(y.detach().to(wide), p.detach().to(wide)))
        y = torch.relu(y + p)
    empty = x.new_empty((0, 3, x.size(0)), dtype=wide)
    y = y.contiguous(memory_format=layout)
    return (y if sums else x.clone(memory_format=layout)), Stats(
        torch.stack(sums) if sums else empty
    )


def channels_last(given):
    x, *weights = given
    return (x.contiguous(memory_format=torch.channels_last), *weights)


def samples():
    small = stack(3, 1, 2, 3, 2)  # of one channel: gradients are checked number by number
    gate = torch.tensor([[0.5, -1.5, 2.0], [1.0, 0.4, 0.3]])  # a 0 would stand on a kink
    yield Sample("plain", small)
    yield Sample("gates that lie apart", (*small, gate.t().contiguous().t()))
    yield Sample("channels_last", (*channels_last(stack(2, 3, 4, 5, 2)), 0.5))
    yield Sample(
        "other strides, a gate per block",
        (
            *(t.movedim(-1, 0).contiguous().movedim(0, -1) for t in stack(2, 3, 3, 4, 2)),
            gate[:, 0].clone(),
        ),
    )
    yield Sample("no blocks", stack(3, 2, 2, 2, 0))
    yield Sample("empty batch", stack(0, 4, 3, 3, 2))
    yield Sample("a plane and a bit, one gate", (*stack(2, 19, 5, 9, 2), torch.tensor(-0.3)))
    yield Sample("three planes", channels_last(stack(3, 48, 3, 17, 1)))


class TestConvStack(OpContract):
    op = staticmethod(conv_stack)
    reference = staticmethod(reference)
    eager = staticmethod(eager)
    samples = staticmethod(samples)

    @staticmethod
    def exported():
        return Sample("gate", (*stack(4, 3, 5, 4, 3), torch.rand(3, 4))), (0, *[None] * 4, 1)

    @staticmethod
    def raw_samples(device):
        given = stack(3, 4, 5, 2, 2, device=device)
        gate = torch.rand(2, 3, device=device)
        yield torch.ops.fastres._conv_stack.default, (*given, None, True, False)
        yield torch.ops.fastres._conv_stack.default, (*channels_last(given), gate, False, False)


@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float32, 40), (torch.bfloat16, 40), (torch.bfloat16, 144)]
)
def test_a_stack_of_an_image_split_over_threads_has_the_bits_of_one_thread(dtype, channels):
    x, *weights = stack(7, channels, 9, 20, 2, dtype=dtype)
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            for batch in (1, 2, 7):
                y, stats = conv_stack(x[:batch], *weights)
                found.append((batch, count, y, stats.sums))
    alone = {batch: (y, sums) for batch, count, y, sums in found if count == 1}
    for batch, _, y, sums in found:
        assert torch.equal(y, alone[batch][0])
        assert torch.equal(sums, alone[batch][1])
        assert torch.equal(y, alone[7][0][:batch])


def test_weights_that_lie_as_the_kernels_read_them_give_the_same_bits():
    x, w1, b1, w2, b2 = stack(2, 18, 5, 6, 3)
    packed = as_packed(w1)
    assert packed.permute(0, 3, 4, 2, 1).is_contiguous()
    assert torch.equal(packed, w1)
    y, stats = conv_stack(x, w1, b1, w2, b2)
    other, others = conv_stack(x, packed, b1, as_packed(w2), b2)
    assert torch.equal(y, other)
    assert torch.equal(stats.sums, others.sums)


@pytest.mark.parametrize("channels", [33, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_gives_the_same_bits_whatever_is_beside_it_and_however_it_lies(dtype, channels):
    x, *weights = stack(5, channels, 7, 10, 2, dtype=dtype)
    y, _ = conv_stack(x, *weights)
    assert torch.equal(conv_stack(x[3:4], *weights)[0], y[3:4])
    lying = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv_stack(lying, *weights)[0], y)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 5), (torch.bfloat16, 16)])
def test_nan_and_infinity_go_where_torch_lets_them_go(dtype, channels):
    x, *weights = stack(2, channels, 4, 20, 2, dtype=dtype)
    x[0, 1, 2, 9], x[1, 4, 0, 0] = math.nan, math.inf
    y, expected = conv_stack(x, *weights)[0], reference(x, *weights)[0]
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[0].isnan().any()
    gate = torch.tensor([[math.inf, 1.0], [0.0, 1.0]])
    sums, wanted = (
        fn(x.nan_to_num(0, 0), *weights, gate)[1].sums for fn in (conv_stack, reference)
    )
    assert torch.equal(sums.isnan(), wanted.isnan())


def test_its_adds_are_sites_of_a_model_that_calls_it():
    class Stage(torch.nn.Module):
        def forward(self, x):
            return fastres.conv_stack(x, *weights)[0]

    x, *weights = stack(3, 4, 5, 5, 3)
    model = Stage()
    assert [site.name for site in fastres.trace(model, x)] == [f"Stage[{i}]" for i in range(3)]
    with fastres.record(model) as tape:
        model(x)
        model(x)
    stats = conv_stack(x, *weights)[1]
    scaled = (stats.branch_sq / stats.skip_sq).sqrt().mean(1)
    torch.testing.assert_close(tape.scaled.float(), scaled)
    with fastres.gate(model, {"Stage[1]": 0.0}):
        torch.testing.assert_close(model(x), conv_stack(x, *weights, torch.tensor([1.0, 0, 1]))[0])


def test_autocast_changes_nothing():
    given = stack(2, 16, 4, 5, 2)
    expected = conv_stack(*given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv_stack(*given)[0], expected)
        torch.testing.assert_close(reference(*given)[0], expected)


@needs_library
def test_numpy_arrays_give_the_same_bits():
    x, w1, b1, w2, b2 = stack(2, 5, 4, 6, 2)
    turned = [w.permute(0, 3, 4, 2, 1).contiguous().numpy() for w in (w1, w2)]
    y, sums = native.C.conv_stack(x.numpy(), turned[0], b1.numpy(), turned[1], b2.numpy())
    expected, stats = conv_stack(x, w1, b1, w2, b2)
    assert np.array_equal(y, expected.numpy())
    assert np.array_equal(sums, stats.sums.numpy())
    with pytest.raises(ValueError, match="w1 must have shape"):
        native.C.conv_stack(x.numpy(), b1.numpy(), b1.numpy(), turned[1], b2.numpy())


BAD = {
    "x must be a tensor": lambda x, w1, b1, w2, b2: ([1.0], w1, b1, w2, b2),
    "x must have 4 dimensions": lambda x, w1, b1, w2, b2: (x[0], w1, b1, w2, b2),
    "x must have sizes C, H, W >= 1": lambda x, w1, b1, w2, b2: (x[:, :, :0], w1, b1, w2, b2),
    r"w1 must have shape \[L, 2, 2, 3, 3\]": lambda x, w1, b1, w2, b2: (x, w1[0], b1, w2, b2),
    r"b1 must have shape \[2, 2\]": lambda x, w1, b1, w2, b2: (x, w1, b1[:1], w2, b2),
    r"w2 must have shape \[2, 2, 2, 3, 3\]": lambda x, w1, b1, w2, b2: (x, w1, b1, w2[:1], b2),
    "b2 must have the dtype of x": lambda x, w1, b1, w2, b2: (x, w1, b1, w2, b2.double()),
    "gate must have shape": lambda *given: (*given, torch.ones(3)),
    "w2 must be on cpu": lambda x, w1, b1, w2, b2: (x, w1, b1, w2.to("meta"), b2),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument_and_the_rule(message):
    given = BAD[message](*stack(2, 2, 3, 3, 2))
    with pytest.raises((TypeError, ValueError), match=f"conv_stack: {message}"):
        conv_stack(*given)
