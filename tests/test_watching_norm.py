"""A call of batch_norm_residual is a residual add to every policy, as if it were written out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fastres
from fastres.declaring import fused_norm
from fastres.ops import native
from fastres.sites import Watch


class Plain(nn.Module):
    """A block of a ResNet, with a gate of its own."""

    def __init__(self, inputs: int, width: int, relu: bool = True, gate=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()
        self.relu, self.gate = relu, gate

    def forward(self, x):
        branch = self.norm(self.conv(x.tanh()))
        if self.gate is not None:
            branch = branch * self.gate
        y = self.skip(x) + branch
        return F.relu(y) if self.relu else y


class Direct(Plain):
    """The same, by the operator."""

    run = staticmethod(fastres.batch_norm_residual)

    def forward(self, x):
        n = self.norm
        return self.run(
            *(self.skip(x), self.conv(x.tanh()), n.running_mean, n.running_var, n.weight, n.bias),
            self.gate,
            relu=self.relu,
            training=self.training,
            num_batches_tracked=n.num_batches_tracked,
        )[0]


class Declared(Direct):
    run = staticmethod(fused_norm)


def nets(kind, train):
    """A plain model, and the same with blocks of another kind, in double precision."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        Plain(3, 4), Plain(4, 4, gate=0.5), Plain(4, 6, relu=False), Plain(6, 6), nn.Flatten(1)
    )
    plain = plain.double().train(train)
    other = copy.deepcopy(plain)
    for block in other[:4]:
        block.__class__ = kind
    return plain, other, torch.randn(5, 3, 4, 4, dtype=torch.float64)


every = pytest.mark.parametrize("kind", [Direct, Declared])
modes = pytest.mark.parametrize("train", [True, False])


@every
@modes
def test_it_is_a_site_of_the_same_name_and_kind(kind, train):
    plain, other, x = nets(kind, train)
    sites = fastres.trace(other, x)
    assert [site.kind for site in sites] == ["projection", "identity", "projection", "identity"]
    assert sites == fastres.trace(plain, x)


@every
@modes
def test_record_reads_the_sums_that_it_returns(kind, train):
    plain, other, x = nets(kind, train)
    with fastres.record(plain) as expected, fastres.record(other) as tape:
        for _ in range(3):
            torch.testing.assert_close(other(x), plain(x))
    for name in ("absolute", "scaled", "cosine"):
        torch.testing.assert_close(getattr(tape, name), getattr(expected, name))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


@every
@modes
def test_a_gate_scales_what_comes_out_of_the_batch_norm(kind, train):
    plain, other, x = nets(kind, train)
    some = torch.rand(5, dtype=torch.float64, requires_grad=True)
    gates = {"1": some, "2": 0.0, "3": torch.tensor(0.5)}
    grads = []
    for model in (plain, other):
        with fastres.gate(model, gates), fastres.record(model) as tape:
            for _ in range(2):
                y = model(x)
        grads += [tape.absolute, y, *torch.autograd.grad(y.square().sum(), some)]
    assert grads[0][2] == 0
    for got, want in zip(grads[3:], grads[:3], strict=True):
        torch.testing.assert_close(got, want)


@every
@modes
@pytest.mark.parametrize("method", ["exact", "energy"])
def test_paths_have_the_lengths_of_the_written_out_model(kind, train, method):
    plain, other, x = nets(kind, train)
    expected, found = (
        fastres.path_gradients(model, x, lambda y: y.square().sum(), method=method)
        for model in (plain, other)
    )
    name = "norms" if method == "exact" else "energy"
    torch.testing.assert_close(getattr(found, name), getattr(expected, name))


class Asked:
    """A policy that notes what it is shown, and runs it."""

    def __init__(self) -> None:
        self.functions = []

    def at(self, site, call, skip):
        self.functions.append(call.func)
        return call.call()

    def passed(self, sites): ...

    def failed(self): ...


class AskedWhole(Asked):
    def stack(self, first, call):
        raise AssertionError("there is none")


@every
def test_only_a_policy_that_takes_fused_calls_is_shown_one(kind):
    _, other, x = nets(kind, True)
    for policy in (Asked(), AskedWhole()):
        with Watch("test", other, policy):
            for _ in range(3):
                other(x)
        whole = type(policy) is AskedWhole
        assert policy.functions == [kind.run if whole else fastres.sites.add] * 12
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.skipif(not native.CPU, reason="_C is not built")
def test_one_that_is_declared_is_heard_without_a_function_mode():
    _, other, x = nets(Declared, True)
    seen = []

    def note(module, args):
        seen.append(torch._C._len_torch_function_stack())

    for block in other[:4]:
        block.conv.register_forward_hook(lambda m, a, y: note(m, a))
    with fastres.record(other):
        other(x)
        seen.clear()
        other(x)
    assert seen == [0] * 4
