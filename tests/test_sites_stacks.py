"""The blocks of a stack are sites, and a policy sees them one by one or as a whole."""

from __future__ import annotations

import pytest
import torch
from models import Block
from torch import Tensor, nn

from fastres.nn import ResidualMLP, ResidualStack
from fastres.ops import mlp_stack, native
from fastres.sites import Site, Watch, trace


def test_every_block_of_a_stack_is_a_site():
    sites = trace(ResidualMLP(4, 3, width=8, blocks=3), torch.randn(5, 4))
    assert sites == [Site(f"stack[{i}]", "identity", (5, 8), 0) for i in range(3)]
    assert trace(ResidualMLP(4, 3, width=8, blocks=0), torch.randn(5, 4)) == []
    assert [s.name for s in trace(ResidualStack(8, 1), torch.randn(2, 8))] == ["ResidualStack"]


def test_a_stack_in_a_branch_is_a_level_deeper():
    sites = trace(
        nn.Sequential(Block(8, ResidualStack(8, 2)), ResidualStack(8, 2)), torch.ones(2, 8)
    )
    assert [(site.name, site.level) for site in sites] == [
        ("0.branch[0]", 1),
        ("0.branch[1]", 1),
        ("0", 0),
        ("1[0]", 0),
        ("1[1]", 0),
    ]


def test_a_stream_that_is_a_parameter_is_one():
    class Learned(ResidualStack):
        def __init__(self) -> None:
            super().__init__(8, 2)
            self.start = nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.start) * x

    assert len(trace(Learned(), torch.randn(3, 8))) == 2


class Gates:
    """A policy that scales the branch of site l by 0.1 * l, and notes how it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def at(self, site, call, skip):
        self.asked.append(f"at {site}")
        x, f = call.operands
        return x + 0.1 * site * f

    def passed(self, sites):
        self.asked.append(f"passed {len(sites)}")

    def failed(self):
        self.asked.append("failed")


class StackGates(Gates):
    """The same for whole stacks, by a gate of every sample or one for all."""

    def __init__(self, per_sample: bool) -> None:
        super().__init__()
        self.per_sample = per_sample

    def stack(self, first, call):
        self.asked.append(f"stack {first}, {call.blocks}")
        gate = 0.1 * torch.arange(first, first + call.blocks)
        return call.call(gate=gate[:, None].expand(-1, len(call.x)) if self.per_sample else gate)


class Direct(ResidualStack):
    """Calls the operator itself."""

    def forward(self, x: Tensor) -> Tensor:
        return mlp_stack(x, self.w1, self.b1, self.w2, self.b2, None, self.activation)[0]


@pytest.mark.parametrize("stack", [ResidualStack, Direct])
@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8)])
def test_a_policy_gates_a_stack_as_a_whole_or_block_by_block(stack, shape):
    if stack is Direct and len(shape) > 2:
        return
    torch.manual_seed(0)
    model, x = nn.Sequential(stack(8, 2), Block(8), stack(8, 3)), torch.randn(shape)
    x.requires_grad_()
    outs, grads = [], []
    for policy in (Gates(), StackGates(True), StackGates(False)):
        with Watch("test", model, policy):
            for _ in range(3):
                outs.append(model(x))
                grads.append(torch.autograd.grad(outs[-1].square().sum(), x)[0])
        one_by_one = [f"at {i}" for i in range(6)]
        whole = ["stack 0, 2", "at 2", "stack 3, 3"]
        direct = native.raw("_mlp_stack") is not None or stack is Direct
        asked = whole if direct and type(policy) is StackGates else one_by_one
        assert policy.asked == [*asked, "passed 6"] * 3
    assert torch._C._len_torch_function_stack() == 0
    assert not outs[0].allclose(model(x))
    for out, grad in zip(outs, grads, strict=True):
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(grad, grads[0])
