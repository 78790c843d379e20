"""trace finds the residual adds of models, known and unknown, and nothing else."""

from __future__ import annotations

import math
import time

import pytest
import torch
from models import (
    Block,
    InPlaceBlock,
    MulPaddedBlock,
    UNet,
    cifar_resnet,
    residual_mlp,
    torchvision,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fastres.nn import ResidualMLP, ResidualStack
from fastres.ops import mlp_stack, native, residual_add
from fastres.sites import Site, Watch, add, trace

IMAGE = (2, 3, 64, 64)


def counts(sites: list[Site]) -> tuple[int, int]:
    return len(sites), sum(site.kind == "projection" for site in sites)


@pytest.mark.parametrize(
    ("name", "sites", "projections"),
    [
        ("resnet18", 8, 3),
        ("resnet50", 16, 4),
        ("resnext50_32x4d", 16, 4),
        ("convnext_tiny", 18, 0),
        ("swin_t", 24, 0),
        ("efficientnet_b0", 9, 0),
        ("densenet121", 0, 0),
        ("vgg11", 0, 0),
    ],
)
def test_torchvision_models_have_the_sites_of_their_papers(name, sites, projections):
    model = getattr(torchvision().models, name)()
    assert counts(trace(model, torch.randn(IMAGE))) == (sites, projections)
    assert counts(trace(model.eval(), torch.randn(IMAGE)[:1])) == (sites, projections)


@pytest.mark.parametrize("mode", [True, False])
def test_a_vision_transformer_has_two_sites_per_layer_and_none_for_positions(mode):
    model = torchvision().models.vit_b_16(image_size=64).train(mode)
    sites = trace(model, torch.randn(1, 3, 64, 64))
    assert counts(sites) == (24, 0)
    assert sites[1].name == "encoder.layers.encoder_layer_0[1]"


@pytest.mark.parametrize(
    ("name", "sites", "projections"),
    [
        ("resnet26d", 8, 4),
        ("mixer_s16_224", 16, 0),
        ("resnetv2_50", 16, 4),
        ("res2net50_26w_4s", 16, 4),
    ],
)
def test_timm_models_have_the_sites_of_their_papers(name, sites, projections):
    torchvision()
    timm = pytest.importorskip("timm")
    options = {"img_size": 64} if "mixer" in name else {}
    model = timm.create_model(name, **options)
    assert counts(trace(model, torch.randn(IMAGE))) == (sites, projections)


def language_model(name: str) -> nn.Module:
    torchvision()
    hf = pytest.importorskip("transformers")
    if name == "gpt2":
        small = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 100}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    small = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    small |= {"intermediate_size": 128, "vocab_size": 100}
    if name == "bert":
        return hf.BertModel(hf.BertConfig(**small))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_key_value_heads=2))


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("batch", [1, 2])
def test_language_models_have_two_sites_per_layer_and_none_in_gelu_or_rotary(name, batch):
    model = language_model(name)
    ids = torch.arange(10).repeat(batch, 1)
    assert counts(trace(model, ids)) == (8, 0)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    assert counts(trace(model.eval(), ids, attention_mask=mask)) == (8, 0)


@pytest.mark.parametrize("block", [None, MulPaddedBlock])
def test_padded_skips_are_projections(block):
    model = cifar_resnet(block) if block else cifar_resnet()
    kinds = [site.kind for site in trace(model, torch.randn(2, 3, 8, 8))]
    assert kinds == ["identity", "projection", "identity", "projection", "identity"]


def test_a_unet_shows_all_its_residual_blocks_whatever_its_long_skips_are():
    blocks = ["down.0", "down.1", "middle", "last"]
    concatenating = trace(UNet(additive=False), torch.randn(2, 3, 8, 8))
    assert [site.name for site in concatenating] == blocks
    additive = trace(UNet(additive=True), torch.randn(2, 3, 8, 8))
    assert [site.name for site in additive] == [*blocks[:3], "UNet", "last"]
    # The long skip goes around the two inner blocks, which therefore lie in its branch.
    assert [site.level for site in additive] == [0, 1, 1, 0, 0]


def test_a_block_in_the_branch_of_a_block_is_at_level_one():
    inner = nn.Sequential(Block(8), nn.Linear(8, 8), Block(8, Block(8)))
    sites = trace(nn.Sequential(Block(8, inner), Block(8)), torch.randn(2, 8))
    assert [(site.name, site.level) for site in sites] == [
        ("0.branch.0", 1),
        ("0.branch.2.branch", 2),
        ("0.branch.2", 1),
        ("0", 0),
        ("1", 0),
    ]


def test_a_site_tells_its_name_kind_shape_and_level():
    sites = trace(residual_mlp(8, 2), torch.randn(5, 4))
    assert sites == [Site("1", "identity", (5, 8), 0), Site("2", "identity", (5, 8), 0)]


class Written(nn.Module):
    """One residual add, written in the given way, in the model's own forward."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(8, 8), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x.sin(), self.linear)


def iadd(x, f):
    y = f(x)
    y += x
    return y


def iadd_skip(x, f):
    x = x.clone()
    y = f(x)
    x += y
    return x


WAYS = {
    "plus": lambda x, f: x + f(x),
    "plus reversed": lambda x, f: f(x) + x,
    "torch.add": lambda x, f: torch.add(x, f(x)),
    "by name": lambda x, f: torch.add(input=f(x), other=x),
    "alpha": lambda x, f: torch.add(x, f(x), alpha=0.5),
    "method": lambda x, f: f(x).add(x),
    "method in place": lambda x, f: f(x).add_(x),
    "in place": iadd,
    "into the skip": iadd_skip,
    "sum": lambda x, f: sum([x, f(x)]),
    "after a view": lambda x, f: x + f(x.view(2, 2, 4).flatten(1)),
    "after a cast": lambda x, f: x.double() + f(x).double(),
    "declared": lambda x, f: add(x, f(x)),
    "residual_add": lambda x, f: residual_add(x, f(x))[0],
    "layer scale": lambda x, f: x + f(x) * f.bias,
    "dropout": lambda x, f: F.dropout(x + F.dropout(f(x), 0.5)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_a_residual_add_is_one_identity_site(way):
    sites = trace(Written(WAYS[way]), torch.randn(2, 8))
    assert [(site.name, site.kind, site.level) for site in sites] == [("Written", "identity", 0)]


def polynomial_gelu(x, f):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * f.bias


def film(x, f):
    scale, shift = f(x.cos()).chunk(2, dim=1)
    return F.pad(x[:, :4].exp() * (1 + scale) + shift, (0, 4))


def recurrent(x, f):
    first, second = x.view(2, 8).repeat(1, 2).split(8, dim=1)
    return f(second) + f(torch.tanh(f(first)))


OTHERS = {
    "gelu": polynomial_gelu,
    "film by halves": film,
    "film by two maps": lambda x, f: x.exp() * (1 + f(x.cos())) + f(x.cos()),
    "recurrent cell": recurrent,
    "two linear maps": lambda x, f: f(x) + F.linear(x, f.weight),
    "two branches": lambda x, f: f(x).relu() + f(x).tanh(),
    "highway": lambda x, f: x * torch.sigmoid(f(x)) + f(x) * (1 - torch.sigmoid(f(x))),
    "parameter": lambda x, f: f(x) + f.weight[:2],
    "constant": lambda x, f: f(x) + torch.ones(2, 8),
    "noise": lambda x, f: f(x) + 0.1 * torch.randn_like(x),
    "broadcast": lambda x, f: x + f(x).mean(1, keepdim=True),
    "scalar": lambda x, f: f(x) + 1e-5,
    "twice": lambda x, f: f(x + x),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_adds_are_no_sites(what):
    assert trace(Written(OTHERS[what]), torch.randn(2, 8)) == []


def test_a_sum_of_a_skip_and_two_branches_is_two_sites():
    both = Written(lambda x, f: x + f(x).relu() + f(x).tanh())
    assert [site.name for site in trace(both, torch.randn(2, 8))] == ["Written[0]", "Written[1]"]


def test_different_pieces_of_one_tensor_are_different_tensors():
    def hierarchical(x, f):
        first, second = torch.cat([x, x.cos()], 1).split(8, dim=1)
        return second + f(first).relu()  # res2net

    assert trace(Written(hierarchical), torch.randn(2, 8)) == []
    same = Written(lambda x, f: x[:, :4] + f(F.pad(x[:, :4], (0, 4)))[:, :4].relu())
    assert len(trace(same, torch.randn(2, 8))) == 1


def test_in_place_changes_through_a_view_are_seen():
    def through_a_view(x, f):
        x = x.clone()
        x.view(-1).mul_(f.bias.repeat(2))
        y = f(x)
        x.view(4, 4).add_(y.view(4, 4))
        return x

    assert len(trace(Written(through_a_view), torch.randn(2, 8))) == 1


def test_what_an_alias_writes_is_no_longer_the_skip():
    def overwritten(x, f):
        copy = x.clone()
        copy.view(-1).copy_(f(x).view(-1))
        return x + copy

    assert len(trace(Written(overwritten), torch.randn(2, 8))) == 1


def test_memory_that_was_written_is_not_taken_for_another_tensor():
    addresses = []

    def reused(x, f):
        for _ in range(20):
            h = f(x).add_(1)
            addresses.append(h.untyped_storage()._cdata)
            del h
        copy = x.clone()
        return copy + f(x).relu()

    assert [site.kind for site in trace(Written(reused), torch.randn(2, 8))] == ["identity"]
    assert len(set(addresses)) == 20


def test_a_custom_autograd_function_and_a_user_hook_do_not_hide_the_skip():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(x.detach().numpy() * 2)

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    class Doubled(nn.Module):
        def forward(self, x):
            return Double.apply(x)

    model = nn.Sequential(nn.Linear(8, 8), Block(8, nn.Sequential(nn.Linear(8, 8), Doubled())))
    model[1].register_full_backward_hook(lambda *_: None)
    assert len(trace(model, torch.randn(2, 8))) == 1


def test_tracing_leaves_buffers_generators_and_gradients_as_they_were():
    model = nn.Sequential(conv_model := cifar_resnet(), nn.Dropout())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [b._version for b in model.buffers()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trace(model.train(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert versions == [b._version for b in model.buffers()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in conv_model.parameters())


def test_three_hundred_blocks_are_traced_in_under_two_seconds():
    model = residual_mlp(8, 300)
    start = time.perf_counter()
    assert len(trace(model, torch.randn(2, 4))) == 300
    assert time.perf_counter() - start < 2


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), InPlaceBlock(4), InPlaceBlock(4)).eval()
        assert len(trace(model, torch.randn(2, 3, 4, 4))) == 2


def test_models_that_cannot_be_traced_are_refused_by_name():
    with pytest.raises(TypeError, match=r"trace: model must be a torch\.nn\.Module, got function"):
        trace(lambda x: x, torch.randn(2, 8))
    scripted = torch.jit.trace(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(TypeError, match="trace: model must not be compiled or scripted"):
        trace(scripted, torch.randn(2, 8))
    with pytest.raises(TypeError, match="trace: model must not be compiled or scripted"):
        trace(torch.compile(nn.Linear(8, 8)), torch.randn(2, 8))


def test_a_model_with_a_call_of_its_own_is_refused():
    class Direct(Block):
        def __call__(self, x):
            return self.forward(x)

    with pytest.raises(TypeError, match=r"must run through torch\.nn\.Module\.__call__"):
        trace(Direct(8), torch.randn(2, 8))


def test_two_sides_that_cannot_be_added_name_the_module():
    wrong = Written(lambda x, f: x + f(x)[:, :3])
    with pytest.raises(
        ValueError, match=r"trace: the add in 'Written' must .* \[2, 8\] and \[2, 3\]"
    ):
        trace(wrong, torch.randn(2, 8))


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
