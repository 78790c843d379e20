"""A stack that runs as one call is recorded as its separate blocks are."""

from __future__ import annotations

import sys

import pytest
import torch
from models import stacks
from record_models import (
    assert_same_bits,
    vectors,
)
from torch import Tensor, nn

from fastres.nn import ResidualMLP, ResidualStack
from fastres.ops import mlp_stack, native
from fastres.record import record


@pytest.mark.parametrize("grad", [True, False])
def test_a_stack_that_runs_as_one_gives_what_its_separate_blocks_give(grad):
    fused, separate = stacks(5, "gelu")
    with record(fused, True) as tape, record(separate, True) as plain, torch.set_grad_enabled(grad):
        for batch in (3, 2):
            fused(vectors(batch))
            separate(vectors(batch))
    assert tape.names == plain.names == [f"stack[{i}]" for i in range(5)]
    assert tape.sites == plain.sites
    assert tape.samples == plain.samples == 5
    for name in ("absolute", "scaled", "cosine", "skip_sq", "branch_sq", "dot"):
        torch.testing.assert_close(getattr(tape, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (2, 3, 4, 8), (0, 8)])
def test_a_recorded_stack_keeps_its_bits_whatever_the_dimensions_of_its_stream(grad, shape):
    assert_same_bits(ResidualStack(8, 4), torch.randn(shape), grad)


def test_a_sample_of_a_stack_is_all_that_dim_0_counts():
    fused, separate = (model.stack for model in stacks(3))
    x = torch.randn(2, 3, 5, 8)
    with record(fused, True) as tape, record(separate, True) as plain:
        for _ in range(2):
            fused(x)
            separate(x)
    assert [site.shape for site in tape.sites] == [(2, 3, 5, 8)] * 3
    torch.testing.assert_close(tape.skip_sq, plain.skip_sq)
    torch.testing.assert_close(tape.dot, plain.dot, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.raw("_mlp_stack") is None, reason="the library is not built")
@pytest.mark.parametrize("grad", [True, False])
def test_recording_a_stack_costs_as_many_calls_whatever_its_depth(grad):
    assert calls_of_a_pass(3, grad) == calls_of_a_pass(300, grad)


def calls_of_a_pass(blocks: int, grad: bool) -> int:
    """Calls of Python and C functions in a pass of a recorded ResidualMLP after the first."""
    model, calls = ResidualMLP(4, 3, width=8, blocks=blocks), []
    with torch.set_grad_enabled(grad), record(model):
        for _ in range(3):
            calls.clear()
            sys.setprofile(lambda _, event, __: calls.append(event) if "call" in event else None)
            try:
                model(vectors())
            finally:
                sys.setprofile(None)
    return len(calls)


def test_a_call_of_mlp_stack_in_any_model_is_recorded():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = ResidualStack(8, 3), ResidualStack(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            s = self.inner
            x, _ = mlp_stack(x, s.w1, s.b1, s.w2, s.b2, 0.5, "tanh", blocks=4)
            x = self.first(x) + x  # twice: a site with the stack in its branch
            return x + self.first.w1.sum() * x.cos()

    model, x = Model(), torch.randn(3, 8)
    with record(model, True) as tape:
        for _ in range(2):
            model(x)
    assert tape.names == [
        *(f"Model[{i}]" for i in range(4)), *(f"first[{i}]" for i in range(3)), "Model[4]",
        "Model[5]",
    ]  # fmt: skip
    assert [site.level for site in tape.sites] == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    s = model.inner
    _, stats = mlp_stack(x, s.w1, s.b1, s.w2, s.b2, 0.5, "tanh", blocks=4)
    assert torch.equal(tape.dot[:4, :3], stats.dot)


def test_records_of_a_model_that_declares_its_adds_may_be_open_at_once():
    for model in stacks(4):
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                record(model) as one,
                record(model) as other,
                record(model.stack) as part,
            ):
                for _ in range(3):
                    model(vectors())
            assert torch.equal(one.absolute, other.absolute)
            assert torch.equal(one.absolute, part.absolute)
            assert one.samples == other.samples == part.samples == 6


def test_a_stack_under_autocast_is_its_separate_blocks():
    fused, separate = stacks(3)
    with record(fused) as tape, record(separate) as plain:
        fused(vectors(4))
        separate(vectors(4))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(vectors(4)), separate(vectors(4)))
    assert tape.samples == plain.samples == 8
    torch.testing.assert_close(tape.scaled, plain.scaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("blocks", "got"), [(4, "one add more"), (2, "none")])
def test_a_stack_that_changes_its_depth_between_passes_is_told(blocks, got):
    model, other = stacks(3)[0], stacks(blocks)[0]
    with record(model) as tape:
        model(vectors())
        for name, parameter in other.stack.named_parameters():
            setattr(model.stack, name, parameter)
        with pytest.raises(RuntimeError, match=rf"site 'stack\[2\]' .* got {got}"):
            model(vectors())
    assert tape.samples == 2
