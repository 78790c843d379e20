"""trace finds in known models the sites that their papers count."""

from __future__ import annotations

import pytest
import torch
from models import Block, MulPaddedBlock, UNet, cifar_resnet, residual_mlp, torchvision
from torch import nn

from fastres.sites import Site, trace

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
