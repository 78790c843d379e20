"""A model that is watched may be differentiated in every way."""

from __future__ import annotations

import pytest
import torch
from models import residual_mlp, stacks
from record_models import vectors
from torch import Tensor
from torch.autograd import forward_ad

from fastres.record import record


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("width", [8, 512])
def test_functorch_derivatives_are_those_of_the_model(first, width):
    model, x = residual_mlp(width, 2).requires_grad_(False), vectors(128)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    plain = torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (x,)), torch.func.vjp(loss, x)[0]
    with record(model) as tape:
        if not first:
            model(x)
        got = torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (x,)), torch.func.vjp(loss, x)[0]
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(plain[0], got[0])
    assert torch.equal(plain[2], got[2])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], got[1], strict=True))
    with record(model) as alone:
        model(x)
    torch.testing.assert_close(tape.absolute, alone.absolute)


@pytest.mark.parametrize("first", [True, False])
def test_functorch_derivatives_of_a_stack_are_those_of_the_model(first):
    model, x = stacks(3)[0].requires_grad_(False), vectors(5)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    plain = torch.func.grad(loss)(x), *torch.func.jvp(loss, (x,), (x,))
    with record(model) as tape:
        if not first:
            model(x)
        got = torch.func.grad(loss)(x), *torch.func.jvp(loss, (x,), (x,))
    assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))
    with record(model) as alone:
        model(x)
    torch.testing.assert_close(tape.absolute, alone.absolute)


def test_a_forward_tangent_goes_through_a_recorded_add():
    model, x = residual_mlp(8, 2).requires_grad_(False), vectors()
    with record(model), forward_ad.dual_level():
        for _ in range(2):
            out = model(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("model", [residual_mlp(8, 2), stacks(2)[0]])
def test_vmap_is_refused_and_the_earlier_passes_stay_readable(model):
    refused = pytest.raises(RuntimeError, match="record: model must not run under vmap, got a bat")
    with record(model) as tape:
        for _ in range(2):
            with refused:
                torch.func.vmap(model)(torch.randn(5, 3, 4))
            model(vectors())
    assert tape.samples == 4
    assert tape.absolute.isfinite().all()


def test_a_derivative_through_an_inner_derivative_is_kept():
    model, x = residual_mlp(8, 2).requires_grad_(False), vectors()

    def inner(x: Tensor) -> Tensor:
        return torch.func.grad(lambda s: (model(x) * s).square().sum())(torch.ones(()))

    plain = torch.func.grad(inner)(x)
    with record(model):
        assert torch.equal(torch.func.grad(inner)(x), plain)
        assert torch.equal(torch.func.grad(inner)(x), plain)


def test_double_backward_and_user_modes_work_while_recorded():
    model = residual_mlp(8, 2)
    x = vectors().requires_grad_()
    with record(model) as tape, torch.device("cpu"):
        for _ in range(2):
            (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            g.square().sum().backward()
    assert tape.samples == 4
