"""Bad input of residual_add is named."""

import numpy as np
import pytest
import torch
from test_residual_add import needs_library, pair
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.ops import native
from fastres.ops.residual_add import residual_add


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, "f must have shape [2, 3], got [2, 4]"),
        ((torch.ones(3), torch.ones(3)), ValueError, "x must have 2 or more dimensions, got 1"),
        ((torch.ones(()), torch.ones(())), ValueError, "x must have 2 or more dimensions, got 0"),
        ((torch.ones(2, 3).int(), torch.ones(2, 3)), TypeError, "x must be float64, float32, "),
        ((torch.ones(2, 3), torch.ones(2, 3).bool()), TypeError, "f must be float64, float32, "),
        ((torch.ones(2, 3), [1.0]), TypeError, "f must be a tensor, got list"),
        ((None, torch.ones(2, 3)), TypeError, "x must be a tensor, got NoneType"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)),
            ValueError,
            "gate must have shape [] or [2], got [3]",
        ),
        ((torch.ones(2, 3).to_sparse(), torch.ones(2, 3)), TypeError, "x must be a dense tensor"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, "yes"), TypeError, "relu must be a bool, got"),
        ((torch.ones(2, 3), torch.ones(2, 3), None, 1), TypeError, "relu must be a bool, got int"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2).long()), TypeError, "gate must be"),
        ((torch.ones(2, 3), torch.ones(2, 3), "half"), TypeError, "gate must be a number or"),
        ((torch.ones(2, 3), torch.ones(2, 3, device="meta")), TypeError, "f must be on cpu, got"),
    ],
)
def test_bad_input_names_the_argument_the_rule_and_the_value(args, error, message):
    with pytest.raises(error) as raised:
        residual_add(*args)
    assert str(raised.value).startswith(f"residual_add: {message}")
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    if "must be on" not in message and "dense" not in message:
        with pytest.raises(error) as raised_on_meta:
            residual_add(*on_meta)
        assert str(raised_on_meta.value) == str(raised.value)
    wanted = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
              for a in args]  # fmt: skip
    with pytest.raises(error) as raised_with_gradients:
        residual_add(*wanted)
    assert str(raised_with_gradients.value) == str(raised.value)


def test_tensors_without_values_are_checked_as_others_are():
    with FakeTensorMode() as mode:
        x, f = (mode.from_tensor(t) for t in pair(2, 3))
        for wanted in (False, True):
            complex_pair = [t.to(torch.complex64).requires_grad_(wanted) for t in (x, f)]
            with pytest.raises(TypeError, match="x must be float64, float32"):
                residual_add(*complex_pair)
        with pytest.raises(ValueError, match="f must have shape"):
            residual_add(x, f[:, :2].requires_grad_())
        assert residual_add(x, f)[0].shape == x.shape


@needs_library
@pytest.mark.parametrize(
    ("x", "f", "error", "message"),
    [
        (np.ones((2, 3), "i4"), np.ones((2, 3), "i4"), TypeError, "x must be float64, float32"),
        (np.ones((2, 3)), np.ones((2, 3), "f4"), TypeError, "f must have dtype float64"),
        (np.ones((2, 3)), np.ones((2, 4)), ValueError, r"f must have shape \(2, 3\)"),
        (np.ones(3), np.ones(3), ValueError, "x must have 2 or more dimensions, got 1"),
        (np.ones((4, 3))[::2], np.ones((2, 3)), ValueError, "x must be C-contiguous"),
        (np.ones((2, 3), ">f4"), np.ones((2, 3), ">f4"), TypeError, "x must be float64"),
    ],
)
def test_numpy_arrays_of_the_wrong_kind_are_an_error(x, f, error, message):
    with pytest.raises(error, match=message):
        native.C.residual_add(x, f)


@needs_library
def test_what_is_no_array_is_named():
    with pytest.raises(
        TypeError, match="residual_add: x must be a NumPy array, got <class 'list'>"
    ):
        native.C.residual_add([[1.0]], [[1.0]])
    gate = np.ones((2, 2), "f4")[:, 0]
    with pytest.raises(ValueError, match="residual_add: gate must be C-contiguous"):
        native.C.residual_add(np.ones((2, 3), "f4"), np.ones((2, 3), "f4"), gate)
