"""Claims about the zero-branch point of models: its Hessian, by gates and by branch weights."""

import math

import pytest
import torch
from conditioning_models import Net, X, cross_entropy
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fastres.analysis.conditioning import FunctionHessian, eigenvalues, zero_branch
from fastres.nn import ResidualMLP


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def by_hand(net: Net, gates: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss with the gates written out."""
    x = net.stem(X)
    for i, block in enumerate(net.blocks):
        x = x + gates[i] * (torch.func.functional_call(block, weights[i], (x,)) - x)
    return cross_entropy(net.head(x))


def dense(net: Net) -> torch.Tensor:
    """The whole Hessian by gates and branch weights, by autograd."""
    weights = [dict(block.named_parameters()) for block in net.blocks]
    flat = torch.cat([p.detach().flatten() for block in weights for p in block.values()])

    def loss(both: torch.Tensor) -> torch.Tensor:
        gates, rest, given = both[:3], both[3:], []
        for block in weights:
            given.append({})
            for name, p in block.items():
                given[-1][name], rest = rest[: p.numel()].view(p.shape), rest[p.numel() :]
        return by_hand(net, gates, given)

    return FunctionHessian(loss, torch.cat((torch.zeros(3).double(), flat))).dense()


def test_the_derivatives_are_those_of_the_gates_written_out(net):
    found, whole = zero_branch(net, cross_entropy, X), dense(net)
    mixed = whole[:3, 3:]
    assert found.names == ("blocks.0", "blocks.1", "blocks.2")
    assert found.weights == mixed.size(1)
    torch.testing.assert_close(found.by_gates, whole[:3, :3])
    torch.testing.assert_close(found.gram, mixed @ mixed.mT)
    assert found.loss == pytest.approx(cross_entropy(net.head(net.stem(X))).item())


def test_branches_that_weigh_nothing_have_no_curvature_by_their_weights(net):
    assert not dense(net)[3:, 3:].any()


def test_its_eigenvalues_are_all_that_are_not_zero(net):
    found, whole = zero_branch(net, cross_entropy, X), eigenvalues(dense(net)).values
    largest = whole[whole.abs().argsort(descending=True)[:6]].sort().values
    torch.testing.assert_close(found.joint.values, largest, rtol=1e-8, atol=1e-10)
    assert whole.abs().sort().values[-7] < 1e-9
    assert found.joint.index == 0.5


def test_a_stack_that_runs_as_one_call_gives_the_same_as_its_blocks():
    torch.manual_seed(0)
    model = ResidualMLP(4, 3, 5, blocks=3, activation="tanh").double()
    found = zero_branch(model, cross_entropy, X)
    stack = model.stack

    def loss(gates: torch.Tensor) -> torch.Tensor:
        x = model.input(X)
        for i, gate in enumerate(gates):
            h = torch.tanh(F.linear(x, stack.w1[i], stack.b1[i]))
            x = x + gate * F.linear(h, stack.w2[i], stack.b2[i])
        return cross_entropy(model.head(x))

    by_hand = FunctionHessian(loss, torch.zeros(3).double())
    torch.testing.assert_close(found.by_gates, by_hand.dense())
    torch.testing.assert_close(found.gradient, by_hand.gradient())
    assert found.weights == sum(p.numel() for p in stack.parameters())


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = Net(normed=True).double().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = zero_branch(model, cross_entropy, X)
    assert math.isfinite(found.gates.condition_tenth)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_sites_and_a_loss_that_is_no_scalar_are_refused(net):
    with pytest.raises(ValueError, match="must contain a residual add, found none in Linear"):
        zero_branch(nn.Linear(2, 2), torch.sum, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \[7, 3\]"):
        zero_branch(net, lambda out: out, X)
