"""Bad input of mlp_stack is named; shapes, settings and NumPy arrays are taken as they come."""

import numpy as np
import pytest
import torch
from test_mlp_stack import stack

import fastres
from fastres.ops import native
from fastres.ops.mlp_stack import allows_tf32, mlp_stack

GOOD = stack(2, 4, 3, 5)
X, W1, B1, W2, B2 = GOOD


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0], W1, B1, W2, B2), {}, ValueError, "x must have 2 dimensions, got 1"),
        ((X.int(), W1, B1, W2, B2), {}, TypeError, "x must be float64, float32, bfloat16 or"),
        ((None, W1, B1, W2, B2), {}, TypeError, "x must be a tensor, got NoneType"),
        ((X, [1.0], B1, W2, B2), {}, TypeError, "w1 must be a tensor, got list"),
        (
            (X, W1.double(), B1, W2, B2), {}, TypeError,
            "w1 must have the dtype of x, torch.float32, got torch.float64",
        ),
        (
            (X, W1, B1, W2, B2.half()), {}, TypeError,
            "b2 must have the dtype of x, torch.float32, got torch.float16",
        ),
        ((X, W1, B1, W2.to("meta"), B2), {}, TypeError, "w2 must be on cpu, got meta"),
        ((X, W1[0], B1, W2, B2), {}, ValueError, "w1 must have shape [L, H, 4], got [3, 4]"),
        ((X, W2, B1, W1, B2), {}, ValueError, "w1 must have shape [L, H, 4], got [5, 4, 3]"),
        ((X, W1[:, :0], B1, W2, B2), {}, ValueError, "w1 must have sizes H, D >= 1, got [5, 0, 4]"),
        ((X, W1, B1[:4], W2, B2), {}, ValueError, "b1 must have shape [5, 3], got [4, 3]"),
        ((X, W1, B2, W2, B2), {}, ValueError, "b1 must have shape [5, 3], got [5, 4]"),
        ((X, W1, B1, W1, B2), {}, ValueError, "w2 must have shape [5, 4, 3], got [5, 3, 4]"),
        ((X, W1, B1, W2, B1), {}, ValueError, "b2 must have shape [5, 4], got [5, 3]"),
        ((*GOOD, torch.ones(4)), {}, ValueError, "gate must have shape [], [5] or [5, 2], got [4]"),
        (
            (*GOOD, torch.ones(2, 5)), {}, ValueError,
            "gate must have shape [], [5] or [5, 2], got [2, 5]",
        ),
        ((*GOOD, torch.ones(5).int()), {}, TypeError, "gate must be float64, float32, bfloat16"),
        ((*GOOD, "half"), {}, TypeError, "gate must be a number or tensor, got str"),
        (
            (*GOOD, None, "softplus"), {}, ValueError,
            "activation must be one of identity, relu, tanh, sigmoid, silu, gelu, gelu_tanh, "
            "got 'softplus'",
        ),
        (GOOD, {"blocks": 4}, ValueError, "blocks must be 5, the sets of weights, got 4"),
        (
            (X, W1[:1], B1[:1], W2[:1], B2[:1]), {"blocks": -1}, ValueError,
            "blocks must be >= 0, got -1",
        ),
        (GOOD, {"blocks": 5.0}, TypeError, "blocks must be an integer, got 5.0"),
        (GOOD, {"return_states": 1}, TypeError, "return_states must be a bool, got int"),
        (GOOD, {"checkpoint": None}, TypeError, "checkpoint must be a bool, got NoneType"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument_the_rule_and_the_value(args, kwargs, error, message):
    with pytest.raises(error) as raised:
        mlp_stack(*args, **kwargs)
    assert str(raised.value).startswith(f"mlp_stack: {message}")
    if "must be on" not in message:
        on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(error) as raised_on_meta:
            mlp_stack(*on_meta, **kwargs)
        assert str(raised_on_meta.value) == str(raised.value)


def test_meta_tensors_give_shapes():
    args = [a.to("meta") for a in GOOD]
    y, stats = mlp_stack(*args, return_states=True)
    assert (y.shape, y.device.type, stats.sums.shape) == ((6, 2, 4), "meta", (5, 3, 2))
    assert stats.skip_sq.shape == (5, 2)


def test_tf32_is_what_either_setting_of_torch_says():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for value in ("tf32", "ieee"):
            matmul.fp32_precision = value
            assert allows_tf32() == (value == "tf32")
        for flag in (True, False):
            matmul.allow_tf32 = flag
            assert allows_tf32() == flag
    finally:
        matmul.fp32_precision = before
    whole = torch.compile(lambda x: x + allows_tf32(), fullgraph=True, backend="eager")
    assert whole(torch.zeros(1)).item() == 0


@pytest.mark.skipif(native.C is None, reason="the compiled library is not built")
def test_numpy_arrays_go_through_the_same_kernel():
    args = stack(3, 20, 7, 4)
    y, sums = native.C.mlp_stack(*(a.numpy() for a in args), "silu")
    expected, stats = mlp_stack(*args, None, "silu")
    assert torch.equal(torch.from_numpy(y), expected)
    assert torch.equal(torch.from_numpy(sums), stats.sums)


@pytest.mark.skipif(native.C is None, reason="the compiled library is not built")
@pytest.mark.parametrize(("width", "hidden"), [(0, 0), (4, 0), (0, 4)])
def test_numpy_arrays_without_features_are_refused(width, hidden):
    with pytest.raises(ValueError, match=r"mlp_stack: w1 must have sizes H, D >= 1, got \(2, "):
        native.C.mlp_stack(*(np.zeros(s, np.float32) for s in (
            (3, width), (2, hidden, width), (2, hidden), (2, width, hidden), (2, width),
        )))  # fmt: skip


def test_it_is_on_the_surface():
    assert fastres.mlp_stack is mlp_stack
