"""A recorded model computes the same bits, whichever way it adds, and each is measured."""

from __future__ import annotations

import pytest
import torch
from models import cifar_resnet, torchvision
from record_models import (
    WAYS,
    Written,
    assert_same_bits,
    cnn,
    images,
    transformer,
)
from torch import nn

from fastres.ops import native
from fastres.record import record


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_cnn_that_adds_in_place_keeps_its_bits(train, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = cnn().train(train).to(memory_format=form)
    assert_same_bits(model, images().contiguous(memory_format=form))
    assert_same_bits(model, images().contiguous(memory_format=form), grad=False)


def test_projection_skips_keep_their_bits():
    torch.manual_seed(0)
    assert_same_bits(cifar_resnet(), images())


def test_a_transformer_in_training_keeps_its_bits_and_its_dropout():
    assert_same_bits(transformer().train(), torch.randn(2, 5, 16))


@pytest.mark.parametrize("grad", [True, False])
def test_a_vision_transformer_in_eval_mode_keeps_its_bits(grad):
    vit = torchvision().models.VisionTransformer(32, 16, 2, 4, 64, 64, num_classes=3).eval()
    assert_same_bits(vit, torch.randn(2, 3, 32, 32), grad)


def test_encoder_layers_are_recorded_in_eval_mode_as_well():
    model = transformer().eval()
    with torch.no_grad(), record(model) as tape:
        for _ in range(2):
            model(torch.randn(2, 5, 16))
    assert len(tape.names) == 6
    assert tape.names[0] == "layers.0[0]"


def test_an_encoder_with_padding_is_recorded_without_nested_tensors():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padding)
        with record(model) as tape:
            outs = [model(x, src_key_padding_mask=padding) for _ in range(3)]
    assert len(tape.names) == 4
    for out in outs:
        torch.testing.assert_close(out[~padding], plain[~padding])


SIDES = {"alpha": (1, -0.5), "alpha on the skip": (2, 1)}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_the_add_is_measured_and_keeps_its_bits(way, grad):
    model = Written(WAYS[way])
    x = torch.randn(3, 8)
    assert_same_bits(model, x, grad)
    with record(model, per_sample=True) as tape, torch.set_grad_enabled(grad):
        model(x)
        model(x)
    a, b = SIDES.get(way, (1, 1))
    skip, branch = x.sin().double(), model.linear(x.sin()).detach().double()
    for got, want in (
        (tape.skip_sq, (a * skip).square().sum(1)),
        (tape.branch_sq, (b * branch).square().sum(1)),
        (tape.dot, (a * b * skip * branch).sum(1)),
    ):
        torch.testing.assert_close(got[0].double(), want.repeat(2), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(native.C is None, reason="the compiled library is not loaded")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", ["plus", "reversed", "in place", "declared"])
def test_the_sums_come_from_the_pass_that_adds(way, grad, monkeypatch):
    from fastres import measuring

    monkeypatch.setattr(measuring, "_reference", None)
    model = Written(WAYS[way])
    with record(model) as tape, torch.set_grad_enabled(grad):
        for _ in range(2):
            model(torch.randn(3, 8))
    assert tape.samples == 6
