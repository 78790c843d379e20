"""Claims about StackHessian: it is the Hessian of the plain composition, with many vectors."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.conditioning import FunctionHessian, StackHessian, lanczos
from fastres.ops.mlp_stack import reference
from fastres.ops.mlp_stack_blocks import ACTIVATIONS

L, B, D, H = 4, 5, 3, 6


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def problem(dtype: torch.dtype = torch.float64):
    shapes = ((B, D), (L, H, D), (L, H), (L, D, H), (L, D))
    return [draw(*shape, seed=i, dtype=dtype) * 0.7 for i, shape in enumerate(shapes)]


def cross_entropy(y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(y, torch.arange(len(y)) % D)


def plain(given, loss, gate=None, activation="relu") -> FunctionHessian:
    x, *weights = given
    return FunctionHessian(lambda *w: loss(reference(x, *w, gate, activation)[0]), *weights)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "gate", [None, 0.5, draw(L), draw(L, B)], ids=["none", "number", "block", "sample"]
)
def test_it_is_the_hessian_of_the_plain_composition(activation, gate):
    given = problem()
    ours = StackHessian(*given, cross_entropy, gate, activation)
    theirs = plain(given, cross_entropy, gate, activation)
    torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.gradient(), theirs.gradient(), rtol=1e-10, atol=1e-12)


def test_vectors_that_do_not_fit_at_once_give_the_same(monkeypatch):
    given, vectors = problem(), draw(7, L * (2 * H * D + H + D))
    whole = StackHessian(*given, cross_entropy).products(vectors)
    monkeypatch.setattr("fastres.analysis.conditioning.stacks._TANGENTS", 2 * L * B * 15 * 8)
    parts = StackHessian(*given, cross_entropy).products(vectors)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_float32_is_as_exact_as_torch_func():
    given = problem(torch.float32)
    exact = plain([t.double() for t in given], cross_entropy, None, "gelu").dense()
    ours = StackHessian(*given, cross_entropy, activation="gelu").dense().double() - exact
    theirs = plain(given, cross_entropy, None, "gelu").dense().double() - exact
    assert ours.norm() < 2 * theirs.norm()


def test_a_loss_that_does_not_see_the_stream_has_a_zero_hessian():
    operator = StackHessian(*problem(), lambda y: 0 * y.sum())
    assert not operator.dense().any()


def test_its_lanczos_density_has_the_trace_and_the_ends_of_the_matrix():
    operator = StackHessian(*problem(), cross_entropy, activation="tanh")
    values = torch.linalg.eigvalsh(operator.dense())
    found = lanczos(operator, steps=60, draws=20)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-6)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-6)
    assert abs(found.trace - float(values.sum())) < 4 * found.trace_error


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: draw(B, D).bfloat16()}, TypeError, "x must be float32 or float64, got torch.bfloat16"),
        ({1: draw(L, H, D + 1)}, ValueError, r"mlp_stack: w1 must have shape \[L, H, 3\]"),
        ({0: draw(0, D)}, ValueError, "x must have >= 1 sample, got 0"),
        ({5: lambda y: y}, ValueError, r"loss must be a scalar, got shape \[5, 3\]"),
        (
            {i: draw(0, *s) for i, s in ((1, (H, D)), (2, (H,)), (3, (D, H)), (4, (D,)))},
            ValueError,
            "w1 must have >= 1 block, got 0",
        ),
    ],
)
def test_what_is_no_stack_is_refused(change, error, message):
    arguments = dict(enumerate([*problem(), cross_entropy])) | change
    with pytest.raises(error, match=message):
        StackHessian(*arguments.values())
